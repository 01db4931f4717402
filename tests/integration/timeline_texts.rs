//! Behind a service whose own cache makes text of timestamps (deviation D3 of the contract): clients get numbers, numbers are what is
//! stored, and everything else goes on as it came.

use std::collections::HashSet;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sluice::http::encoding::gzip;

use crate::support::{Answer, Asked, Backend, Connection, Sluice, Step, TOKEN, get, ok, until};

/// A list of so many buckets, with this around each timestamp.
fn buckets(count: u64, quote: &str) -> String {
    let bucket = |number: u64| {
        let time = 1_735_689_600_000 + number * 60_000;
        let rest = r#""timestamp_iso":"2025-01-01T00:00:00+00:00","side":"buy","cumulated_usd_size""#;
        format!(r#"{{"timestamp":{quote}{time}{quote},{rest}:{number}.25}}"#)
    };
    format!("[{}]", (0..count).map(bucket).collect::<Vec<_>>().join(","))
}

const JSON: &str = "Content-Type: application/json\r\n";

/// In pieces of this size.
fn chunked(fields: &str, body: &[u8], size: usize) -> Vec<Step> {
    let mut bytes = format!("HTTP/1.1 200 OK\r\n{fields}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
    for piece in body.chunks(size) {
        write!(bytes, "{:x}\r\n", piece.len()).unwrap();
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    vec![Step::Send(bytes)]
}

/// The shipped rules, answered by URL alone.
fn proxy(backend: &Backend, changes: &[(&str, &str)]) -> Sluice {
    let mut text = include_str!("../../proxy.toml").to_owned();
    for (from, to) in [("[timeline]\nenabled = true", "[timeline]\nenabled = false")].iter().chain(changes) {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let url = format!("http://{}", backend.address);
    Sluice::with(&text, &[("BACKEND_URL", &url), ("REDIS_URL", ""), ("SLUICE_ADMIN_TOKEN", TOKEN)])
}

fn window(symbol: &str) -> String {
    format!("/api/liquidations?symbol={symbol}&timeframe=1m&start_timestamp=1735689600000&end_timestamp=1735776000000")
}

/// A service that caches: numbers at first, and text from then on.
async fn caching(count: u64) -> Backend {
    let cached: Mutex<HashSet<String>> = Mutex::default();
    Backend::start(move |asked: &Asked| {
        let quote = if cached.lock().unwrap().insert(asked.target.clone()) { "" } else { "\"" };
        ok(JSON, buckets(count, quote).as_bytes())
    })
    .await
}

/// An answer of this program's: its length and coding fit its bytes, and these are the contract's.
fn is_contracted(answer: &Answer, count: u64) {
    assert_eq!((answer.status, answer.whole), (200, true), "{answer:?}");
    assert!(answer.text() == buckets(count, ""), "{:?} {:.200}", answer.fields, answer.text());
    assert_eq!(answer.field("content-type"), Some("application/json"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_cache_is_warm_gives_numbers_on_a_miss_on_a_hit_and_in_every_form() {
    for count in [1, 3, 2000] {
        let backend = caching(count).await;
        let sluice = proxy(&backend, &[]);
        let target = window("BTCUSDT");
        is_contracted(&get(backend.address, &target, &[]).await, count);
        assert_eq!(get(backend.address, &target, &[]).await.text(), buckets(count, "\""), "its cache is warm");
        let miss = sluice.get(&target).await;
        is_contracted(&miss, count);
        assert_eq!(miss.cache_status(), "sluice; fwd=uri-miss; stored");
        until("it is stored", || async { sluice.get(&target).await.cache_status().starts_with("sluice; hit") }).await;
        let plain = sluice.get(&target).await;
        is_contracted(&plain, count);
        let gzip = [("Accept-Encoding", "gzip")];
        // A large one is packed after it was stored.
        until("it is packed", || async { count <= 3 || sluice.get_with(&target, &gzip).await.field("content-encoding").is_some() }).await;
        let packed = sluice.get_with(&target, &gzip).await;
        is_contracted(&packed, count);
        assert_eq!(packed.field("content-encoding").is_some(), count > 3);
        let tag = plain.field("etag").unwrap().to_owned();
        assert_eq!(sluice.get_with(&target, &[("If-None-Match", &tag)]).await.status, 304);
        let head = Connection::open(sluice.address).await.ask("HEAD", &target, &[], b"").await;
        assert_eq!(head.field("content-length"), Some(&*plain.body.len().to_string()));
        let part = sluice.get_with(&target, &[("Range", "bytes=10-29")]).await;
        assert_eq!((part.status, &part.body[..]), (206, &plain.body[10..30]));
        // The validator is that of the same answer as the service gives it without its cache.
        let other = caching(count).await;
        let same = proxy(&other, &[]);
        same.get(&target).await;
        until("it is stored", || async { same.get(&target).await.field("etag") == Some(&tag) }).await;
        assert_eq!(backend.count(), 3);
        assert_eq!(sluice.metric("timeline_texts_total", &[]).await, 1.0);
        assert_eq!(same.metric("timeline_texts_total", &[]).await, 0.0);
        assert!(sluice.logged().contains("the backend's own cache makes text of timestamps"), "{}", sluice.logged());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_becomes_numbers_however_it_is_coded_and_framed() {
    const MANY: u64 = 30_000;
    let backend = Backend::start(|asked: &Asked| {
        let (small, large) = (buckets(20, "\""), buckets(MANY, "\""));
        let coded = format!("{JSON}Content-Encoding: gzip\r\nVary: Accept-Encoding\r\nETag: \"text\"\r\n");
        match asked.target.split(['=', '&']).nth(1).unwrap() {
            "GZIP" => ok(&coded, &gzip(small.as_bytes())),
            "GZIPLARGE" => chunked(&coded, &gzip(large.as_bytes()), 1000),
            "BYTES" => chunked(JSON, small.as_bytes(), 1),
            "GZIPBYTES" => chunked(&coded, &gzip(small.as_bytes()), 1),
            "LARGE" => chunked(&format!("{JSON}ETag: \"text\"\r\nDigest: sha-256=x\r\n"), large.as_bytes(), 777),
            _ => ok(&format!("{JSON}ETag: \"text\"\r\nAccept-Ranges: bytes\r\n"), small.as_bytes()),
        }
    })
    .await;
    let sluice = proxy(&backend, &[]);
    for symbol in ["GZIP", "GZIPLARGE", "BYTES", "GZIPBYTES", "LARGE", "PLAIN"] {
        let count = if symbol.ends_with("LARGE") { MANY } else { 20 };
        for coding in ["gzip", "identity"] {
            let target = window(symbol);
            sluice.manage("/purge?pattern=*").await;
            let miss = sluice.get_with(&target, &[("Accept-Encoding", coding)]).await;
            is_contracted(&miss, count);
            until("it is stored", || async { sluice.get(&target).await.cache_status().starts_with("sluice; hit") }).await;
            let hit = sluice.get_with(&target, &[("Accept-Encoding", coding)]).await;
            is_contracted(&hit, count);
            for answer in [miss, hit] {
                assert!(answer.field("etag") != Some("\"text\"") && answer.field("digest").is_none(), "{symbol} {:?}", answer.fields);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_who_wait_for_one_fetch_get_numbers_and_a_body_that_breaks_off_is_not_stored() {
    let broken = Arc::new(AtomicBool::new(true));
    let breaks = Arc::clone(&broken);
    let backend = Backend::start(move |_: &Asked| {
        let mut steps = ok(JSON, buckets(9, "\"").as_bytes());
        steps.insert(0, Step::Delay(Duration::from_millis(300)));
        if breaks.swap(false, Ordering::AcqRel)
            && let Some(Step::Send(bytes)) = steps.last_mut()
        {
            bytes.truncate(bytes.len() - 200);
            steps.push(Step::Reset);
        }
        steps
    })
    .await;
    let sluice = proxy(&backend, &[]);
    let first = sluice.get(&window("BTCUSDT")).await;
    assert!(first.status != 200 || !first.whole, "{first:?}");
    assert!(!broken.load(Ordering::Acquire));
    let target = window("BTCUSDT");
    let (one, two, three) = tokio::join!(sluice.get(&target), sluice.get(&target), sluice.get(&target));
    for answer in [one, two, three] {
        is_contracted(&answer, 9);
    }
    assert_eq!(backend.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_changed_is_passed_on_and_not_stored() {
    let backend = Backend::start(|asked: &Asked| {
        let text = buckets(9, "\"");
        match asked.target.contains("OPAQUE") {
            true => ok(&format!("{JSON}Content-Encoding: br\r\n"), b"not looked into"),
            false => ok(&format!("{JSON}Cache-Control: no-transform, max-age=600\r\nETag: \"text\"\r\n"), text.as_bytes()),
        }
    })
    .await;
    let sluice = proxy(&backend, &[]);
    for asked in 1..4 {
        let answer = sluice.get(&window("KEPT")).await;
        assert_eq!((answer.text(), answer.field("etag")), (buckets(9, "\""), Some("\"text\"")));
        assert_eq!(answer.cache_status(), "sluice; fwd=uri-miss");
        assert_eq!(sluice.get(&window("OPAQUE")).await.text(), "not looked into");
        assert_eq!(backend.count(), asked * 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_answers_go_on_as_they_came() {
    let text = r#"[{"timestamp":"17","a":1}]"#;
    let backend = Backend::start(move |asked: &Asked| {
        let fields = format!("{JSON}ETag: \"own\"\r\n");
        match asked.target.contains("MISSING") {
            true => crate::support::reply("404 Not Found", &fields, text.as_bytes()),
            false if asked.target.contains("TYPE") => ok("Content-Type: text/plain\r\nETag: \"own\"\r\n", text.as_bytes()),
            false if asked.target.contains("ISO") => ok(&fields, r#"[{"timestamp":"2025-01-01"}]"#.as_bytes()),
            false => ok(&fields, text.as_bytes()),
        }
    })
    .await;
    let sluice = proxy(&backend, &[]);
    let as_they_are = [
        "/api/symbols".to_owned(),
        "/api/liquidation-orders?symbol=BTCUSDT&limit=5".to_owned(),
        "/api/elsewhere".to_owned(),
        window("MISSING"),
        window("TYPE"),
        window("ISO"),
    ];
    for target in &as_they_are {
        let direct = get(backend.address, target, &[]).await;
        for _ in 0..2 {
            let answer = sluice.get(target).await;
            assert_eq!((answer.status, answer.text(), answer.field("etag")), (direct.status, direct.text(), Some("\"own\"")), "{target}");
        }
    }
    // A rule that does not say that it is this API.
    let other = proxy(&backend, &[("timeline = true   ", "timeline = false   ")]);
    assert_eq!(other.get(&window("BTCUSDT")).await.text(), text);
    assert_eq!(sluice.get(&window("BTCUSDT")).await.text(), text.replace("\"17\"", "17"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_revalidated_or_passed_has_numbers_and_a_rule_in_shadow_answers_as_the_service_does() {
    let modified = "Last-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n";
    let backend = Backend::start(move |asked: &Asked| match asked.field("if-modified-since") {
        Some(_) => crate::support::reply("304 Not Modified", modified, b""),
        None if asked.target.contains("COOKIE") => ok(&format!("{JSON}Set-Cookie: a=b\r\n"), buckets(9, "\"").as_bytes()),
        None => ok(&format!("{JSON}{modified}"), buckets(9, "\"").as_bytes()),
    })
    .await;
    let quick = [("ttl = \"24h\"", "ttl = \"1s\""), ("stale_while_revalidate = \"1m\"", "stale_while_revalidate = \"0s\"")];
    let sluice = proxy(&backend, &quick);
    let target = window("BTCUSDT");
    is_contracted(&sluice.get(&target).await, 9);
    until("it was revalidated", || async {
        let answer = sluice.get(&target).await;
        is_contracted(&answer, 9);
        answer.cache_status().starts_with("sluice; fwd=stale")
    })
    .await;
    is_contracted(&sluice.get(&target).await, 9);
    for status in ["sluice; fwd=uri-miss; detail=uncacheable-set-cookie", "sluice; fwd=bypass; detail=uncacheable-set-cookie"] {
        let private = sluice.get(&window("COOKIE")).await;
        is_contracted(&private, 9);
        assert_eq!((private.cache_status(), private.field("set-cookie")), (status, Some("a=b")));
    }
    let shadow = proxy(&backend, &[("timeline = true   ", "shadow = true\ntimeline = true   ")]);
    until("the same was found", || async {
        assert_eq!(shadow.get(&target).await.text(), buckets(9, "\""));
        shadow.metric("shadow_answers_total", &["liquidations", "same"]).await > 0.0
    })
    .await;
    assert_eq!(shadow.metric("shadow_answers_total", &["liquidations", "body"]).await, 0.0);
}
