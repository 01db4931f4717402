//! What became of a request is said truly: failures that clients feel, why an answer was not kept, and whether all of it was sent.

use std::time::Duration;

use crate::support::{Backend, Http2, MariaDb, Sluice, Step, get, ok, one_rule, reply, until};

/// The first access line about a target.
async fn line_about(sluice: &Sluice, target: &str) -> String {
    let field = format!("target=\"{target}\"");
    let is_meant = |line: &&str| line.contains(" access ") && line.contains(&field);
    until("the line is written", || async { sluice.logged().lines().any(|line| is_meant(&line)) }).await;
    sluice.logged().lines().find(is_meant).unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_backends_own_is_a_failure_unless_something_stored_stands_in() {
    let backend = Backend::start(|asked| match asked.target.split('?').next().unwrap() {
        "/passed/off" | "/fetched/off" => reply("503 Busy", "", b"{\"detail\":\"no\"}"),
        "/fetched/not" => reply("501 No", "", b"no"),
        _ => ok("", b"x"),
    })
    .await;
    let rules = "[log]\naccess='all'\n[[route]]\nname='fetched'\npath='/fetched/*'\nttl='1h'\n";
    let sluice = Sluice::ruled(backend.address, "", rules).await;
    for (target, rule, status) in [
        ("/fetched/off?1", "fetched", "sluice; fwd=uri-miss; fwd-status=503; detail=backend-status"),
        ("/passed/off?2", "none", "sluice; fwd=bypass; detail=no-rule; fwd-status=503"),
    ] {
        let answer = sluice.get(target).await;
        assert_eq!((answer.status, answer.cache_status(), answer.text().as_str()), (503, status, "{\"detail\":\"no\"}"));
        let route = format!("route=\"{rule}\"");
        assert_eq!(sluice.metric("requests_total", &[&route, "outcome=\"failed\"", "status=\"503\""]).await, 1.0, "{target}");
        let line = line_about(&sluice, target).await;
        assert!(line.contains("outcome=\"failed\"") && line.contains("detail=\"backend-status\"") && line.contains("whole=true"), "{line}");
    }
    // What the backend does not do is no failure: a client could have it said all day.
    assert_eq!(sluice.get("/fetched/not").await.status, 501);
    let stats: serde_json::Value = serde_json::from_str(&get(sluice.admin, "/stats", &[]).await.text()).unwrap();
    assert_eq!((&stats["total"]["failed"], &stats["routes"]["none"]["failed"]), (&2.into(), &1.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_fails_requests_and_is_told_once() {
    let mut database = MariaDb::filled().await;
    database.index();
    database.kill();
    let sluice = database.uncached(&[], &[]);
    for number in 0..30 {
        let answer = sluice.get(&format!("/api/liquidation-orders?symbol=BTCUSDT&limit={}", number + 1)).await;
        assert_eq!(answer.status, 503);
        assert!(answer.cache_status().contains("fwd-status=503"), "{}", answer.cache_status());
        assert_eq!(sluice.get("/health").await.status, 503);
    }
    assert_eq!(sluice.metric("requests_total", &["outcome=\"failed\""]).await, 30.0);
    assert_eq!(sluice.metric("requests_total", &["outcome=\"miss\""]).await, 0.0);
    let logged = sluice.logged();
    for line in ["the database cannot be reached", "a query to the database was not answered", "the database is unhealthy"] {
        assert!(logged.matches(line).count() <= 1, "{line}: {logged}");
    }
    assert!(logged.contains("the database cannot be reached"), "{logged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn why_an_answer_is_not_kept_is_said_each_time() {
    let large = vec![b'x'; 3000];
    let backend = Backend::start(move |asked| match asked.target.as_str() {
        "/set-cookie" => ok("Set-Cookie: a=b\r\n", b"x"),
        "/private" => ok("Cache-Control: private\r\n", b"x"),
        "/no-store" => ok("CDN-Cache-Control: no-store\r\n", b"x"),
        "/no-cache" => ok("Cache-Control: no-cache\r\n", b"x"),
        "/vary" => ok("Vary: *\r\n", b"x"),
        "/no-freshness" => ok("Cache-Control: max-age=0\r\n", b"x"),
        "/coding" => ok("Content-Encoding: br\r\n", b"x"),
        "/stream" => ok("Content-Type: text/event-stream\r\n", b"x"),
        "/error" => reply("403 No", "", b"x"),
        "/status" => reply("429 Slow", "", b"x"),
        "/too-large" => ok("", &large),
        _ => ok("", b"x"),
    })
    .await;
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nredis=''\nmax_object='2KiB'\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    for why in ["set-cookie", "private", "no-store", "no-cache", "vary", "no-freshness", "coding", "stream", "error", "status", "too-large"]
    {
        let detail = format!("; detail=uncacheable-{why}");
        for time in 0..3 {
            let status = sluice.get(&format!("/{why}")).await.cache_status().to_owned();
            assert!(status.ends_with(&detail), "{why}, {time}: {status}");
        }
    }
    assert_eq!(sluice.get("/kept").await.cache_status(), "sluice; fwd=uri-miss; stored");
}

/// The access log says of each kind of answer whether all of it was sent.
#[tokio::test(flavor = "multi_thread")]
async fn whole_answers_are_told_as_whole() {
    let backend = Backend::start(|asked| match asked.target.split('/').next_back().unwrap() {
        "chunked" => vec![Step::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec())],
        "later" => vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello".to_vec()),
            Step::Delay(Duration::from_millis(50)),
            Step::Send(b"hello".to_vec()),
        ],
        "error" => reply("500 Oh No", "", b"hello"),
        "large" => ok("", &vec![b'x'; 1 << 20]),
        "nothing" => vec![Step::Send(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec())],
        "short" => vec![Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello".to_vec()), Step::Close],
        _ => ok("", b"hello"),
    })
    .await;
    let rules = "[log]\naccess='all'\n[[route]]\nname='f'\npath='/f/*'\nttl='1h'\n";
    let sluice = Sluice::ruled(backend.address, "", rules).await;
    for kind in ["length", "chunked", "later", "error", "large", "nothing"] {
        for way in ["p", "f"] {
            let target = format!("/{way}/{kind}");
            assert!(sluice.get(&target).await.whole);
            let line = line_about(&sluice, &target).await;
            assert!(line.contains("whole=true"), "{line}");
            let target = format!("/{way}/2/{kind}");
            let streamed = Http2::open(sluice.address).await.ask("GET", &target, &[], b"").await;
            assert!(streamed.answer.whole, "{target}");
            let line = line_about(&sluice, &target).await;
            assert!(line.contains("whole=true"), "HTTP/2: {line}");
        }
    }
    assert!(!sluice.get("/p/short").await.whole);
    let line = line_about(&sluice, "/p/short").await;
    assert!(line.contains("bytes=5 whole=false"), "{line}");
}
