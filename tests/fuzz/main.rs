//! Fuzz targets for what reads hostile bytes: see `tests/fuzz/run`. Each checks more than that nothing panics.

#![no_main]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a target fails by panicking")]

use std::sync::LazyLock;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use libfuzzer_sys::fuzz_target;
use sluice::api::json::{Style, write_order};
use sluice::api::orders::{Order, Span};
use sluice::api::texts::Texts;
use sluice::cache::codec::{decode, encode};
use sluice::cache::hot_file::read_entries;
use sluice::cache::key::{Canonical, Key, NameParts};
use sluice::cache::peers::{MOST, Message};
use sluice::cache::seal::Sealer;
use sluice::cache::void::view::LoggedVoid;
use sluice::cache::void::{Effect, Moment};
use sluice::clock::Wall;
use sluice::config::route::{RequestFields, Route, select};
use sluice::config::secret::SecretKey;
use sluice::front::framing::{Framing, Next};
use sluice::http::cache_control::CacheControl;
use sluice::http::conditional::{not_modified, validates};
use sluice::http::encoding::{accepts_gzip, gunzip};
use sluice::http::freshness::{FreshnessPolicy, Verdict, verdict};
use sluice::http::headers::{age, freshened, http_date, strip_hop_by_hop};
use sluice::http::range::{Parts, cut, parts};
use sluice::http::request_directives::RequestDirectives;
use sluice::http::vary::{Vary, content_language};
use sluice::proxy::short::Fields;
use sluice::request::client::Client;
use sluice::request::target::Target;
use sluice::timeline;
use sluice::timeline::kept::Weigh as _;
use sluice::upstream::request_fields::Forwarding;
use sluice::upstream::selecting::Selecting;
use xxhash_rust::xxh3::xxh3_64;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| match std::env::var("SLUICE_FUZZ").as_deref() {
    Ok("key") => key,
    Ok("headers") => headers,
    Ok("framing") => framing,
    Ok("plain") => plain,
    Ok("range") => range,
    Ok("codec") => codec,
    Ok("config") => config,
    Ok("spans") => spans,
    Ok("stream") => stream,
    Ok("voids") => voids,
    Ok("handover") => handover,
    Ok("peers") => peers,
    other => panic!("SLUICE_FUZZ={other:?} is no target"),
});

fuzz_target!(|data: &[u8]| TARGET(data));

/// The rules of the shipped file, and one that takes everything.
static ROUTES: LazyLock<Vec<Route>> = LazyLock::new(|| {
    let text = format!("{}\n[[route]]\nname='all'\npath='/*'\n", include_str!("../../proxy.toml"));
    sluice::config::check("proxy.toml", &text, &|_| None).config.expect("the shipped file").routes
});

/// The decoded path and the parameters that a rule says matter, read simply.
fn meaning(route: &Route, target: &str) -> (String, Vec<(String, Option<String>)>) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let decode = |text: &str| {
        let (mut out, mut rest) = (String::new(), text.bytes());
        while let Some(byte) = rest.next() {
            let byte = match byte {
                b'%' => u8::from_str_radix(&String::from_utf8(vec![rest.next().unwrap(), rest.next().unwrap()]).unwrap(), 16).unwrap(),
                other => other,
            };
            // Latin-1 keeps bytes apart as well as anything.
            out.push(if byte == b'+' && text.contains('+') && !text.contains("%2") { '\u{100}' } else { char::from(byte) });
        }
        out
    };
    let mut pairs = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').map_or((part, None), |(name, value)| (name, Some(value)));
        let (name, value) = (decode(name), value.map(decode));
        let folds = route.fold_case.contains(&name);
        if route.query.as_ref().is_none_or(|names| names.contains(&name)) {
            pairs.push((name, if folds { value.map(|value| value.to_ascii_uppercase()) } else { value }));
        }
    }
    pairs.sort_by(|a, b| a.0.cmp(&b.0));
    (decode(path), pairs)
}

/// Two targets: those that share a key mean the same.
fn key(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (one, two) = text.split_once('\n').unwrap_or((text, text));
    let canonical = |text: &str| {
        let target = Target::parse(text).ok()?;
        let route = select(&ROUTES, &target)?;
        let canonical = Canonical::new(route, &target, &HeaderMap::new());
        let key = Key::new(route, &target, canonical.clone());
        let name = key.name("sluice");
        assert!(name.len() <= sluice::cache::key::MAX_NAME && name.ends_with(&canonical.digest()));
        Some((route, canonical))
    };
    let (Some((first, a)), Some((second, b))) = (canonical(one), canonical(two)) else { return };
    if a == b {
        assert_eq!(first.name, second.name);
        assert_eq!(meaning(first, one), meaning(second, two));
    }
}

/// `name: value` lines up to an empty one, and what follows it.
fn fields(text: &[u8]) -> (HeaderMap, &[u8]) {
    let mut map = HeaderMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
        let line = &rest[..end];
        rest = &rest[(end + 1).min(rest.len())..];
        if line.is_empty() {
            break;
        }
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let pair = (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(line[colon + 1..].trim_ascii()));
        if let (Ok(name), Ok(value)) = pair {
            map.append(name, value);
        }
    }
    (map, rest)
}

/// The fields of an answer, an empty line, the fields of a request.
fn headers(data: &[u8]) {
    let (answer, rest) = fields(data);
    let (request, _) = fields(rest);
    let now = Wall::from_millis(1_735_689_600_000);
    let control = CacheControl::of(&answer);
    let hour = Duration::from_secs(3600);
    for ttl in [Duration::ZERO, hour] {
        for respect_origin in [false, true] {
            let policy = FreshnessPolicy {
                ttl,
                negative_ttl: ttl,
                stale_while_revalidate: hour,
                stale_if_error: hour,
                respect_origin,
                heuristic: true,
                set_cookie: false,
                authorized: respect_origin,
            };
            for status in [200, 206, 302, 304, 404, 405, 500, 503] {
                let verdict = verdict(&policy, StatusCode::from_u16(status).unwrap(), &answer, now);
                let kept = matches!(verdict, Verdict::Store(_) | Verdict::StoreForValidation(_));
                assert!(!kept || !(control.private || answer.contains_key("set-cookie") || matches!(status, 206 | 304)));
                assert!(!kept || !control.no_store || control.must_understand);
                assert!(!kept || Vary::of(&answer) != Vary::Any);
            }
        }
    }
    if let Vary::Fields(names) = Vary::of(&answer) {
        assert_eq!(selecting(&request).selected(&names), selecting(&request).selected(&names));
        assert!(!names.contains(&http::header::ACCEPT_ENCODING));
    }
    let mut stripped = request.clone();
    strip_hop_by_hop(&mut stripped);
    for name in ["connection", "transfer-encoding", "te", "upgrade"] {
        assert!(!stripped.contains_key(name));
    }
    for name in ["authorization", "cookie", "cache-control", "host"] {
        assert_eq!(stripped.contains_key(name), request.contains_key(name));
    }
    for value in answer.values() {
        let _ = http_date(value);
    }
    let _ = (age(&answer), freshened(&answer, &request), validates(&request, &answer), accepts_gzip(&request));
    let _ = (content_language(&answer), selecting(&request).preferred_language(), RequestDirectives::of(&request));
    let tagged = not_modified(&request, &answer);
    assert!(!tagged || request.contains_key("if-none-match") || request.contains_key("if-modified-since"));
}

/// By what a request with these fields selects a variant.
fn selecting(fields: &http::HeaderMap) -> Selecting {
    let mut parts = http::Request::new(()).into_parts().0;
    parts.headers = fields.clone();
    let (client, id) = (Client { address: [192, 0, 2, 1].into(), reached: None }, http::HeaderValue::from_static("1"));
    Selecting::of(&parts, Forwarding { client: &client, id: &id, public: None, interim: None }, &RequestFields::All, true)
}

/// A connection's bytes: how they are cut does not matter, and whatever goes on is a sequence of whole, plain heads.
fn framing(data: &[u8]) {
    let mut whole = Framing::new(1024);
    let (passed, next) = whole.inspect(data);
    assert!(passed <= data.len());
    let step = data.first().map_or(1, |byte| usize::from(*byte % 7) + 1);
    let (mut pieces, mut held, mut gone, mut last) = (Framing::new(1024), Vec::new(), 0, Next::More);
    for piece in data.chunks(step) {
        held.extend_from_slice(piece);
        let (count, next) = pieces.inspect(&held);
        gone += count;
        held.drain(..count);
        last = next;
        if next != Next::More {
            break;
        }
    }
    assert_eq!((gone, last, pieces.heads()), (passed, next, whole.heads()));
    if whole.heads() == 1 && !whole.is_http2() && data.starts_with(b"GET ") {
        let head = &data[..data.windows(4).position(|four| four == b"\r\n\r\n").unwrap()];
        assert!(!head.split(|&byte| byte == b'\n').rev().skip(1).any(|line| !line.ends_with(b"\r")), "a bare LF went on");
    }
}

/// What follows a request line: what counts as plain is one whole head without a body to everyone else too, and says the same.
fn plain(data: &[u8]) {
    let Some(read) = Fields::read(data) else { return };
    let request = [b"GET / HTTP/1.1\r\n", data].concat();
    let mut framing = Framing::new(64 << 10);
    assert_eq!(framing.inspect(&request), (request.len(), Next::More));
    assert!(framing.heads() == 1 && framing.is_between_requests() && !framing.is_http2());
    let text: Vec<u8> = data.iter().copied().filter(|&byte| byte != b'\r').collect();
    let (map, rest) = fields(&text);
    assert!(rest.is_empty() && map.get_all("host").iter().count() == 1);
    for name in ["transfer-encoding", "content-length", "authorization", "x-api-key", "range", "expect", "upgrade", "te"] {
        assert!(!map.contains_key(name), "{name}");
    }
    let only = |name: &str| map.get(name).map(|value| value.as_bytes().into());
    assert_eq!((read.origin, read.none_match, read.id), (only("origin"), only("if-none-match"), only("x-request-id")));
    assert_eq!(read.gzip, map.contains_key("accept-encoding").then(|| accepts_gzip(&map)));
    assert_eq!(read.directives, map.contains_key("cache-control") || map.contains_key("pragma"));
}

/// A length, `Range`, `If-Range`: what is cut lies within the answer.
fn range(data: &[u8]) {
    let Some((&length, rest)) = data.split_first() else { return };
    let mut lines = rest.split(|&byte| byte == b'\n');
    let mut request = HeaderMap::new();
    for name in ["range", "if-range"] {
        if let Some(Ok(value)) = lines.next().map(HeaderValue::from_bytes) {
            request.insert(name, value);
        }
    }
    let mut answer = HeaderMap::new();
    answer.insert("etag", HeaderValue::from_static("\"a\""));
    answer.insert("content-type", HeaderValue::from_static("text/plain"));
    let body: Bytes = (0..length).collect();
    let found = parts(&request, &answer, body.len());
    if let Parts::Some(ranges) = &found {
        assert!(!ranges.is_empty() && ranges.iter().all(|range| range.start() <= range.end() && *range.end() < body.len()));
        assert!(ranges.iter().map(|range| range.end() - range.start() + 1).sum::<usize>() <= body.len());
    }
    let (status, part) = cut(&found, &mut answer, &body);
    match found {
        Parts::Whole => assert_eq!((status, part), (StatusCode::OK, body)),
        Parts::Unsatisfiable => assert_eq!((status, part.len()), (StatusCode::RANGE_NOT_SATISFIABLE, 0)),
        Parts::Some(_) => assert_eq!(status, StatusCode::PARTIAL_CONTENT),
    }
}

/// Bytes from Redis: as they are, and as the payload of an otherwise valid entry; and sealed ones.
fn codec(data: &[u8]) {
    let _ = decode(Bytes::copy_from_slice(data));
    let mut framed = b"SLUC\x02".to_vec();
    framed.extend_from_slice(&(data.len() as u64).to_le_bytes());
    framed.extend_from_slice(&xxh3_64(data).to_le_bytes());
    framed.extend_from_slice(data);
    if let Ok(entry) = decode(framed.into()) {
        assert_eq!(decode(encode(&entry)).as_ref(), Ok(&entry));
        let _ = (
            entry.weight(),
            entry.age(Wall::from_millis(u64::MAX)),
            entry.conditions(),
            entry.expired(Wall::from_millis(5), Moment::default(), Effect::Expire),
        );
    }
    static SEALER: LazyLock<Sealer> = LazyLock::new(|| Sealer::new(&SecretKey::parse(&"ab".repeat(32)).unwrap(), None).unwrap());
    assert!(SEALER.open(b"name", data).is_err(), "forged");
    let _ = gunzip(data, 1 << 16);
}

/// Orders of a part from Redis: what decodes is written the same again, and can be computed with.
fn spans(data: &[u8]) {
    let Some(part) = timeline::codec::decode(data) else { return };
    let again = timeline::codec::encode(&part);
    assert_eq!(timeline::codec::encode(&timeline::codec::decode(&again).unwrap()), again);
    let (sums, details) = (&part.block.sums, &part.block.details);
    // Each of them reads.
    let orders: Vec<_> = (0..details.len()).map(|place| details.order(place)).collect();
    assert_eq!(orders.len(), sums.len());
    let _ = (part.block.weight(), details.tie(), part.block.cut(part.from, part.from.midpoint(part.to)));
    if let Some(Span { start, end }) = sums.extent() {
        assert_eq!(sums.count(Span { start, end }), sums.len());
        for width in [60_000, 86_400_000] {
            let _ = timeline::buckets::buckets([&**sums], Span { start, end: end.min(start.saturating_add(1000 * width)) }, width);
        }
    }
}

/// Lines of an existing service's stream: an order that was read is the same once it is written and read again.
fn stream(data: &[u8]) {
    let mut texts = Texts::default();
    for text in data.split(|&byte| byte == b'\n') {
        let Ok(order) = timeline::service::line(text, &mut texts) else { continue };
        let mut written = String::new();
        write_order(&order, Style::Spaced, &mut written);
        let again = timeline::service::line(written.as_bytes(), &mut texts).unwrap();
        assert_eq!(Order { usd: order.usd, ..again }, order);
        let _ = timeline::builder::Builder::columns([&order]);
    }
}

/// A configuration: every problem has a place, and what has none is usable.
fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let checked = sluice::config::check("f", text, &|name| (name == "SET").then(|| "7".to_owned()));
    for line in &checked.report {
        let mut parts = line.splitn(4, ':');
        assert_eq!(parts.next(), Some("f"));
        assert!(parts.next().unwrap().parse::<usize>().unwrap() > 0 && parts.next().unwrap().parse::<usize>().unwrap() > 0);
    }
    assert!(checked.config.is_some() || !checked.report.is_empty(), "unusable for no reason");
}

/// Names and voids as others may have written them to Redis.
fn voids(data: &[u8]) {
    if let Some(parts) = NameParts::read(data, "ns") {
        assert!(data.starts_with(b"ns:") && data.len() > parts.readable.len() + 64);
        assert_eq!(parts.has("aaaaa").is_none(), parts.marks.is_none());
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let read = LoggedVoid::read(text);
    let again = LoggedVoid::read(&read.void.write(read.id));
    assert_eq!((again.id, &again.void), (read.id, &read.void), "{text}");
    // It is held against something, however odd it is.
    let _ = read.void.what.matches("liq:BTC", &["symbol:BTC".to_owned()], 7);
}

/// A file that is said to be what another process left.
fn handover(data: &[u8]) {
    let Ok(entries) = read_entries(data, data.len() as u64) else { return };
    assert!(entries.iter().map(|entry| entry.canonical.len()).sum::<usize>() <= data.len());
}

/// What another process at the same address is said to say.
fn peers(data: &[u8]) {
    let mut left = BytesMut::from(data);
    while let Ok(Some(message)) = Message::take(&mut left) {
        let mut again = BytesMut::from(&message.encode()[..]);
        assert_eq!(Message::take(&mut again).unwrap(), Some(message));
        assert!(again.is_empty() && left.len() < data.len());
    }
    assert!(left.len() <= data.len().max(MOST));
}
