//! What a shared cache does when everything is left to the headers, rule by rule: the behaviours that the public
//! conformance suite asks about, and where to find them in the standards. The configuration is the one with which that
//! suite is run.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use jiff::{Timestamp, tz::TimeZone};

use crate::support::{Answer, Asked, Backend, Connection, Sluice, Step, columns, reply, rows};

const RULES: &str = include_str!("../conformance/proxy.toml");

/// `{now}`, `{now+60}` and `{now-60}` become dates.
fn dated(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{now") {
        let (offset, after) = after.split_once('}').expect("a brace");
        let second = Timestamp::now().as_second() + offset.parse::<i64>().unwrap_or(0);
        let date = Timestamp::from_second(second).unwrap().to_zoned(TimeZone::UTC);
        out.push_str(before);
        out.push_str(&date.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string());
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Fields separated by `|`, as lines.
fn lines(fields: &str) -> String {
    fields.split('|').filter(|field| !field.trim().is_empty()).map(|field| format!("{}\r\n", dated(field.trim()))).collect()
}

/// Fields separated by `|`, as pairs.
fn pairs(fields: &str) -> Vec<(String, String)> {
    let pair = |field: &str| field.split_once(':').map(|(name, value)| (name.trim().to_owned(), dated(value.trim())));
    fields.split('|').filter_map(pair).collect()
}

async fn ask(sluice: &Sluice, method: &str, target: &str, fields: &str) -> Answer {
    let fields = pairs(fields);
    let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    Connection::open(sluice.address).await.ask(method, target, &fields, b"").await
}

fn is_hit(answer: &Answer) -> bool {
    answer.cache_status().starts_with("sluice; hit")
}

/// A backend whose answer to `/N` is what `say` makes of the number, and Sluice before it.
async fn scene(say: impl Fn(usize, &Asked) -> Vec<Step> + Send + Sync + 'static) -> (Backend, Sluice) {
    let backend = Backend::start(move |asked| {
        let digits = asked.target.trim_start_matches('/').split(['?', '/']).next().and_then(|number| number.parse().ok());
        say(digits.unwrap_or(usize::MAX), asked)
    })
    .await;
    let sluice = Sluice::with(&RULES.replace("http://127.0.0.1:8001", &format!("http://{}", backend.address)), &[]);
    (backend, sluice)
}

/// Whether a second request is answered from the cache, the status of the response, and its fields.
const FRESHNESS: &str = include_str!("http_caching/freshness.txt");

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_and_for_how_long() {
    let row = |row| {
        let [second, status, fields] = columns(row);
        (status.parse().unwrap(), fields, second == "hit")
    };
    let mut rows: Vec<(u16, &str, bool)> = rows(FRESHNESS).into_iter().map(row).collect();
    assert!(rows.len() >= 111, "{}", rows.len());
    // Any final status with explicit freshness, and none without it.
    for status in [200, 203, 204, 299, 301, 302, 303, 307, 308, 400, 404, 410, 499, 500, 502, 503, 504, 599] {
        rows.push((status, "Cache-Control: max-age=3600", true));
        rows.push((status, "Cache-Control: max-age=5|Age: 10", false));
    }
    let said = rows.clone();
    let (_backend, sluice) = scene(move |row, asked| {
        let (status, fields, _) = said[row];
        match status {
            204 => vec![Step::Send(format!("HTTP/1.1 204 No Content\r\n{}\r\n", lines(fields)).into_bytes())],
            _ => reply(&format!("{status} X"), &lines(fields), asked.target.as_bytes()),
        }
    })
    .await;
    for (row, (status, fields, kept)) in rows.iter().enumerate() {
        let first = sluice.get(&format!("/{row}")).await;
        let second = sluice.get(&format!("/{row}")).await;
        assert_eq!((first.status, second.status), (*status, *status), "{fields}");
        assert!(!is_hit(&first), "{fields}");
        assert_eq!(is_hit(&second), *kept, "{status} {fields}: {}", second.cache_status());
        assert!(second.field("warning").is_none());
        if *kept {
            assert!(second.field("age").is_some_and(|age| age.parse::<u32>().is_ok()), "{fields}");
        }
    }
}

/// Whether a second request gets the first one's response, the response's fields, and those of either request.
const VARIANTS: &str = include_str!("http_caching/variants.txt");

#[tokio::test(flavor = "multi_thread")]
async fn who_may_have_an_answer() {
    let table: Vec<[&str; 4]> = rows(VARIANTS).into_iter().map(columns).collect();
    assert!(table.len() >= 41, "{}", table.len());
    let said = table.clone();
    let (_backend, sluice) = scene(move |row, asked| {
        let said = said[row][1];
        reply("200 OK", &lines(&format!("{said}|Cache-Control: max-age=3600")), asked.target.as_bytes())
    })
    .await;
    for (row, [second, said, one, two]) in table.into_iter().enumerate() {
        let same = second == "hit";
        let target = format!("/{row}");
        ask(&sluice, "GET", &target, one).await;
        let second = ask(&sluice, "GET", &target, two).await;
        assert_eq!(is_hit(&second), same, "{said} / {one} / {two}: {}", second.cache_status());
        if same && !two.contains("max-stale") {
            // The second did not drive the first out.
            assert!(one.contains("no-store") || is_hit(&ask(&sluice, "GET", &target, one).await), "{said} / {one}");
        }
    }
    // Parameters count, and nothing is stored that the client says it wants nowhere or only from here.
    assert!(!is_hit(&sluice.get("/0?a=2").await) && is_hit(&sluice.get("/0?a=2").await));
    let absent = ask(&sluice, "GET", "/0?none", "Cache-Control: only-if-cached").await;
    assert_eq!((absent.status, absent.cache_status()), (504, "sluice; fwd=bypass; detail=only-if-cached"));
}

/// The status that a request gets from what is stored, the stored response's fields, and the request's.
const CONDITIONS: &str = include_str!("http_caching/conditions.txt");

#[tokio::test(flavor = "multi_thread")]
async fn conditions_and_ranges_are_settled_from_what_is_stored() {
    let table: Vec<[&str; 3]> = rows(CONDITIONS).into_iter().map(columns).collect();
    assert!(table.len() >= 27, "{}", table.len());
    let said = table.clone();
    let (backend, sluice) = scene(move |row, _| {
        let fields = said.get(row).map_or("ETag: \"x\"", |row| row[1]);
        reply("200 OK", &lines(&format!("{fields}|Cache-Control: max-age=3600|X-Test: 1")), b"0123456789")
    })
    .await;
    for (row, [status, said, asked]) in table.iter().enumerate() {
        let status: u16 = status.parse().unwrap();
        let target = format!("/{row}");
        sluice.get(&target).await;
        let answer = ask(&sluice, "GET", &target, asked).await;
        assert!(is_hit(&answer), "{said} / {asked}");
        assert_eq!(answer.status, status, "{said} / {asked}");
        assert_eq!(answer.field("x-test"), Some("1"), "the stored fields come with it: {asked}");
        match status {
            304 => assert!(answer.body.is_empty() && answer.field("content-type").is_none(), "{asked}"),
            206 if !asked.contains(", 2-3") => {
                assert!(answer.field("content-range").is_some_and(|range| range.ends_with("/10")), "{asked}")
            }
            200 => assert_eq!(answer.body, b"0123456789", "{asked}"),
            _ => {}
        }
    }
    assert_eq!(backend.count(), table.len());
}

/// What is stored comes back field by field, but for what belongs to a connection; a 304 updates what does not describe
/// the bytes (RFC 9111 §3.1, §3.2, §4.3.4).
#[tokio::test(flavor = "multi_thread")]
async fn fields_are_kept_and_updated() {
    const KEPT: &[&str] = &[
        "Test-Header",
        "X-Test-Header",
        "Content-Foo",
        "X-Content-Foo",
        "Content-Location",
        "Content-MD5",
        "Content-Security-Policy",
        "Content-Type",
        "Clear-Site-Data",
        "ETag",
        "Expires",
        "Public-Key-Pins",
        "Set-Cookie2",
        "X-Frame-Options",
        "X-XSS-Protection",
    ];
    const DROPPED: &[&str] =
        &["Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "TE", "Upgrade", "Named-By-Connection"];
    /// These describe the stored bytes or the validator by which they were told.
    const NOT_UPDATED: &[&str] = &["Content-Type", "ETag"];
    let value = |name: &str, round: usize| match name {
        "ETag" => "\"tag\"".to_owned(),
        "Expires" => format!("Thu, 18 Aug 205{round} 02:01:18 GMT"),
        "Content-Type" => format!("text/plain;x={round}"),
        _ => format!("value-{round}"),
    };
    let (_backend, sluice) = scene(move |_, asked| {
        let revalidates = asked.field("if-none-match").is_some();
        let round = usize::from(revalidates);
        let mut fields = "Connection: Named-By-Connection\r\nCache-Control: max-age=3600, no-cache\r\n".to_owned();
        for name in KEPT.iter().chain(DROPPED) {
            fields.push_str(&format!("{name}: {}\r\n", value(name, round)));
        }
        match revalidates {
            true => vec![Step::Send(format!("HTTP/1.1 304 Not Modified\r\n{fields}\r\n").into_bytes())],
            false => reply("200 OK", &fields, b"the body"),
        }
    })
    .await;
    let first = sluice.get("/1").await;
    let updated = || async { sluice.get("/1").await.field("test-header") == Some("value-1") };
    crate::support::until("the stored fields are updated", updated).await;
    for (round, answer) in [first, sluice.get("/1").await].iter().enumerate() {
        assert_eq!((answer.status, answer.text().as_str()), (200, "the body"));
        for name in KEPT {
            let expected = value(name, if NOT_UPDATED.contains(name) { 0 } else { round });
            assert_eq!(answer.field(&name.to_ascii_lowercase()), Some(expected.as_str()), "{name}, round {round}");
        }
        for name in DROPPED {
            assert_eq!(answer.field(&name.to_ascii_lowercase()), None, "{name}, round {round}");
        }
    }
}

/// Upstream, what is stale is asked for with its validators, and what no longer holds is replaced (§4.3.1, §4.3.3).
#[tokio::test(flavor = "multi_thread")]
async fn what_is_stale_is_validated_with_what_it_had() {
    for (fields, condition, value) in [
        ("ETag: \"abc\"", "if-none-match", "\"abc\""),
        ("ETag: W/\"abc\"", "if-none-match", "W/\"abc\""),
        ("Last-Modified: Wed, 01 Jan 2025 00:00:00 GMT", "if-modified-since", "Wed, 01 Jan 2025 00:00:00 GMT"),
    ] {
        let (backend, sluice) =
            scene(move |_, asked| reply("200 OK", &lines(&format!("{fields}|Cache-Control: max-age=1|Age: 5")), asked.target.as_bytes()))
                .await;
        // Not before the first answer was stored.
        crate::support::until(fields, || async {
            assert_eq!(sluice.get("/1").await.text(), "/1");
            backend.last().field(condition) == Some(value)
        })
        .await;
    }
}

/// A response ages from when its head came, however long its body takes (§4.2.3).
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_comes_slowly_is_as_old_as_its_head() {
    let (backend, sluice) = scene(|row, _| {
        let life = if row == 1 { 60 } else { 1 };
        let head = format!("HTTP/1.1 200 OK\r\nCache-Control: max-age={life}\r\nContent-Length: 4\r\n\r\nbo");
        vec![Step::Send(head.into_bytes()), Step::Delay(Duration::from_millis(1500)), Step::Send(b"dy".to_vec())]
    })
    .await;
    assert_eq!(sluice.get("/1").await.text(), "body");
    crate::support::until("it is stored", || async { is_hit(&sluice.get("/1").await) }).await;
    assert!(sluice.get("/1").await.field("age").is_some_and(|age| age != "0"));
    for asked in 1..=2 {
        assert_eq!(sluice.get("/2").await.text(), "body");
        assert_eq!(backend.count_of("/2"), asked, "it was over when its body ended");
    }
}

/// A 304 about another response than the stored one freshens nothing: it is asked for again, without conditions (§4.3.3).
#[tokio::test(flavor = "multi_thread")]
async fn a_304_about_something_else_is_asked_for_in_full() {
    let (backend, sluice) = scene(|_, asked| match asked.field("if-none-match") {
        Some(_) => vec![Step::Send(b"HTTP/1.1 304 Not Modified\r\nETag: \"abc-gzip\"\r\n\r\n".to_vec())],
        None => reply("200 OK", "ETag: \"abc\"\r\nCache-Control: max-age=1\r\nAge: 5\r\n", b"full"),
    })
    .await;
    crate::support::until("it was validated and asked for in full", || async {
        let answer = sluice.get("/1").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "full"));
        let asked = backend.asked.lock().unwrap();
        let conditional = asked.iter().position(|asked| asked.field("if-none-match").is_some());
        conditional.is_some_and(|first| asked.get(first + 1).is_some_and(|next| next.field("if-none-match").is_none()))
    })
    .await;
}

/// Unsafe methods that succeed invalidate their address and those that the answer names (RFC 9111 §4.4).
#[tokio::test(flavor = "multi_thread")]
async fn changes_invalidate() {
    let (_backend, sluice) = scene(|row, asked| match asked.method.as_str() {
        "GET" => reply("200 OK", "Cache-Control: max-age=3600\r\n", b"x"),
        _ if asked.target.contains("failed") => reply("500 Oops", "", b"x"),
        _ => reply("200 OK", &format!("Location: /{row}/location\r\nContent-Location: /{row}/cl\r\n"), b"x"),
    })
    .await;
    for (row, method) in ["POST", "PUT", "DELETE", "M-SEARCH", "PATCH"].iter().enumerate() {
        let targets = ["", "/location", "/cl", "/failed", "/other"].map(|end| format!("/{row}{end}"));
        for target in &targets {
            sluice.get(target).await;
        }
        ask(&sluice, method, &targets[0], "").await;
        ask(&sluice, method, &targets[3], "").await;
        for (target, kept) in targets.iter().zip([false, false, false, true, true]) {
            assert_eq!(is_hit(&sluice.get(target).await), kept, "{method} {target}");
        }
    }
}

/// A backend that fails or is gone: what may be served stale is, and nothing else (RFC 9111 §4.2.4, RFC 5861 §4).
#[tokio::test(flavor = "multi_thread")]
async fn stale_answers_stand_in_only_where_they_may() {
    const ROWS: &[(&str, bool)] = &[
        ("Cache-Control: max-age=1", true),
        ("Cache-Control: max-age=1, stale-if-error=60", true),
        ("Cache-Control: max-age=1, stale-if-error=0", false),
        ("Cache-Control: max-age=1, must-revalidate", false),
        ("Cache-Control: max-age=1, proxy-revalidate", false),
        ("Cache-Control: max-age=1, no-cache", false),
        ("Cache-Control: s-maxage=1", false),
        ("Cache-Control: max-age=1, stale-if-error=1|Age: 100", true),
    ];
    let fails = Arc::new(AtomicUsize::new(0));
    let when = Arc::clone(&fails);
    let (mut backend, sluice) = scene(move |row, _| match when.load(Ordering::Relaxed) {
        0 => reply("200 OK", &lines(&format!("ETag: \"a\"|Age: 5|{}", ROWS[row].0)), b"stood in"),
        _ => reply("503 Service Unavailable", "", b"busy"),
    })
    .await;
    for row in 0..ROWS.len() {
        sluice.get(&format!("/{row}")).await;
    }
    for round in ["503", "gone"] {
        fails.store(1, Ordering::Relaxed);
        if round == "gone" {
            backend.kill().await;
        }
        for (row, (fields, may)) in ROWS.iter().enumerate().take(ROWS.len() - 1) {
            let answer = sluice.get(&format!("/{row}")).await;
            assert_eq!(answer.text() == "stood in", *may, "{round}: {fields}: {}", answer.cache_status());
            assert_eq!(answer.cache_status().contains("stale-if-error"), *may, "{round}: {fields}");
        }
    }
}

/// A POST's answer that is the representation of its own address is kept for GET (RFC 9110 §9.3.3).
#[tokio::test(flavor = "multi_thread")]
async fn a_post_may_answer_a_get() {
    let (backend, sluice) = scene(|row, asked| {
        let location = if row == 1 { "/elsewhere" } else { asked.target.as_str() };
        let age = if row == 2 { "" } else { "Cache-Control: max-age=3600\r\n" };
        reply("200 OK", &format!("Content-Location: {location}\r\n{age}"), asked.method.as_bytes())
    })
    .await;
    for (row, fields, kept) in [(0, "", true), (1, "", false), (2, "", false), (3, "Cookie: a=b", false), (4, "X-Original-URL: /x", false)]
    {
        let target = format!("/{row}");
        let post = ask(&sluice, "POST", &target, &format!("Content-Length: 0|{fields}")).await;
        assert_eq!(post.text(), "POST");
        if kept {
            // Not asked for before: what a GET gets is newer.
            crate::support::until("it is kept", || async { sluice.metric("memory_entries", &[]).await > 0.0 }).await;
        }
        let answer = sluice.get(&target).await;
        assert_eq!((answer.text().as_str(), is_hit(&answer)), if kept { ("POST", true) } else { ("GET", false) }, "{row}");
    }
    // What it says of no one in particular says no Host.
    assert_eq!(backend.asked.lock().unwrap()[0].field("x-forwarded-host"), None);
}

/// A HEAD that is forwarded says whether what is stored still holds (RFC 9111 §4.3.5).
#[tokio::test(flavor = "multi_thread")]
async fn a_head_updates_what_is_stored_or_ends_its_freshness() {
    let (_backend, sluice) = scene(|row, asked| {
        let head = asked.method == "HEAD";
        let tag = if head && row == 1 { "\"b\"" } else { "\"a\"" };
        let fields = format!("ETag: {tag}\r\nCache-Control: max-age=3600\r\nX-From: {}\r\nContent-Length: 4\r\n\r\n", asked.method);
        vec![Step::Send(format!("HTTP/1.1 200 OK\r\n{fields}{}", if head { "" } else { "body" }).into_bytes())]
    })
    .await;
    for row in [0, 1, 2] {
        let target = format!("/{row}");
        sluice.get(&target).await;
        ask(&sluice, "HEAD", &target, if row == 2 { "Cookie: a=b" } else { "" }).await;
        match row {
            0 => {
                let updated = || async { sluice.get(&target).await.field("x-from") == Some("HEAD") };
                crate::support::until("the field is updated", updated).await;
                assert!(is_hit(&sluice.get(&target).await) && sluice.get(&target).await.text() == "body");
            }
            1 => crate::support::until("it is fetched anew", || async { !is_hit(&sluice.get(&target).await) }).await,
            _ => assert_eq!(sluice.get(&target).await.field("x-from"), Some("GET"), "what a cookie may have changed teaches nothing"),
        }
    }
}

/// Trailers pass with what is passed, to those who take them (RFC 9110 §6.5).
#[tokio::test(flavor = "multi_thread")]
async fn trailers_pass_to_those_who_take_them() {
    let backend = Backend::start(|_| {
        let fields = "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n";
        vec![Step::Send(format!("HTTP/1.1 200 OK\r\n{fields}5\r\nhello\r\n0\r\nX-Sum: 7\r\n\r\n").into_bytes())]
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", "[[route]]\nname='pass'\npath='/*'\ncache=false\n").await;
    for (te, passed) in [("TE: trailers\r\nConnection: TE\r\n", true), ("", false)] {
        let mut connection = Connection::open(sluice.address).await;
        connection.send(format!("GET /x HTTP/1.1\r\nHost: h\r\n{te}\r\n").as_bytes()).await;
        let head = connection.head().await.unwrap();
        assert_eq!(head.field("trailer").is_some(), passed || te.is_empty(), "{te}");
        let mut rest = Vec::new();
        let ends: &[u8] = if passed { b"x-sum: 7\r\n\r\n" } else { b"0\r\n\r\n" };
        while !rest.to_ascii_lowercase().ends_with(ends) {
            let mut piece = [0; 256];
            let read = tokio::io::AsyncReadExt::read(&mut connection.0, &mut piece).await.unwrap();
            assert!(read > 0, "{:?}", String::from_utf8_lossy(&rest));
            rest.extend_from_slice(&piece[..read]);
        }
        assert_eq!(backend.last().field("te"), passed.then_some("trailers"));
    }
}

/// With `parts = "complete"` the rest of an answer is asked for alone, and joined under one strong validator (RFC 9111 §3.4).
#[tokio::test(flavor = "multi_thread")]
async fn the_rest_of_a_part_is_asked_for_alone() {
    let (backend, sluice) = scene(|row, asked| {
        // The first changes never, the second between the two parts, the third says nothing to tell them apart; the fourth is shorter by
        // then; the fifth says nothing either, and gives the whole when it is asked for the rest.
        let tag = match (row, asked.field("range")) {
            (1, Some(range)) => format!("ETag: \"{}\"\r\n", range.len()),
            (2 | 4, _) => String::new(),
            _ => "ETag: \"a\"\r\n".to_owned(),
        };
        let fields = format!("Cache-Control: max-age=3600\r\n{tag}");
        match asked.field("range") {
            Some("bytes=0-4") => reply("206 Partial", &format!("{fields}Content-Range: bytes 0-4/10\r\n"), b"01234"),
            Some("bytes=5-") if row == 3 => reply("416 No", &fields, b""),
            Some("bytes=5-") if row != 4 => reply("206 Partial", &format!("{fields}Content-Range: bytes 5-9/10\r\n"), b"56789"),
            _ => reply("200 OK", &fields, b"0123456789"),
        }
    })
    .await;
    for (row, asked) in [(0, 2), (1, 3), (2, 3), (3, 3), (4, 2)] {
        let (target, before) = (format!("/{row}"), backend.count());
        let part = ask(&sluice, "GET", &target, "Range: bytes=0-4").await;
        assert_eq!((part.status, part.text().as_str(), part.cache_status()), (206, "01234", "sluice; fwd=bypass; detail=part"));
        let whole = sluice.get(&target).await;
        assert_eq!((whole.status, whole.text().as_str(), whole.field("content-range")), (200, "0123456789", None), "{row}");
        assert_eq!(backend.count() - before, asked, "{row}");
        let part = || async { is_hit(&ask(&sluice, "GET", &target, "Range: bytes=2-7").await) };
        crate::support::until("the whole is stored", part).await;
        assert!(is_hit(&sluice.get(&target).await));
    }
}
