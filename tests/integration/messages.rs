//! What leaves for a client and for the backend, over both protocols, wherever it comes from: bodies, lengths, codings, cookies,
//! trailers; and what is refused of what comes.

use std::net::SocketAddr;

use crate::support::{Asked, Backend, Connection, HANG, Http2, Redis, Sluice, Step, get, ok, one_rule, reply, until};

const RULES: &str =
    "[[route]]\nname='pass'\npath='/pass/*'\ncache=false\n[[route]]\nname='all'\npath='/*'\nttl='1h'\nnegative_ttl='1h'\nkey='all'\n";

/// A backend with an answer of every kind, by the target's last word, that knows what HEAD is.
async fn kinds() -> Backend {
    Backend::start(|asked| {
        let kind = asked.target.rsplit('/').next().unwrap();
        let mut steps = match kind {
            "none" => vec![Step::Send(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec())],
            "missing" => reply("404 Not Found", "", b"it is not here"),
            "error" => reply("500 Oops", "", b"it failed"),
            "moved" => reply("301 Moved", "Location: /x\r\n", b"it is there"),
            "empty" => ok("", b""),
            "gzip" => ok("Content-Encoding: gzip\r\n", &sluice::http::encoding::gzip(b"hello, hello, hello")),
            "large" => ok("", &[b'x'; 200_000]),
            "chunked" => {
                vec![Step::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec())]
            }
            "closed" => vec![Step::Send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello".to_vec()), Step::Close],
            _ => ok("", b"hello"),
        };
        if asked.method == "HEAD"
            && let Some(Step::Send(bytes)) = steps.first_mut()
        {
            let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
            bytes.truncate(end + 4);
        }
        steps
    })
    .await
}

/// What a client saw of an answer.
#[derive(Debug)]
struct Seen {
    status: u16,
    length: Option<String>,
    body: Vec<u8>,
    said: String,
}

async fn over_http1(address: SocketAddr, method: &str, target: &str, fields: &[(&str, &str)]) -> Seen {
    let mut connection = Connection::open(address).await;
    let answer = connection.ask(method, target, fields, b"").await;
    assert!(answer.whole, "{method} {target}: {answer:?}");
    if method == "HEAD" && answer.field("connection") != Some("close") {
        // Anything that follows the head would be taken for this answer.
        let next = connection.ask("GET", "/livez", &[], b"").await;
        assert!(next.status == 200 || next.status == 404 || next.status == 502, "after HEAD {target}: {next:?}");
    }
    let said = answer.cache_status().to_owned();
    Seen { status: answer.status, length: answer.field("content-length").map(str::to_owned), said, body: answer.body }
}

async fn over_http2(address: SocketAddr, method: &str, target: &str, fields: &[(&str, &str)]) -> Seen {
    let streamed = Http2::open(address).await.ask(method, target, fields, b"").await;
    let answer = streamed.answer;
    assert!(answer.whole && streamed.reset.is_none(), "{method} {target}: {answer:?}");
    if method == "HEAD" || matches!(answer.status, 204 | 304) {
        assert!(streamed.bare && streamed.data == 0, "{method} {target}: frames of data after {answer:?}");
    }
    let said = answer.cache_status().to_owned();
    Seen { status: answer.status, length: answer.field("content-length").map(str::to_owned), said, body: answer.body }
}

async fn seen(http2: bool, address: SocketAddr, method: &str, target: &str, fields: &[(&str, &str)]) -> Seen {
    match http2 {
        false => over_http1(address, method, target, fields).await,
        true => over_http2(address, method, target, fields).await,
    }
}

/// Checks the answer to HEAD by the one to GET (RFC 9110 §9.3.2): no body, and the same length where one is said.
fn is_head_of(head: &Seen, got: &Seen, must_say: bool, what: &str) {
    assert_eq!(head.status, got.status, "{what}");
    assert!(head.body.is_empty(), "{what}: {head:?}");
    if head.status == 204 || head.status == 304 {
        assert!(got.body.is_empty() && got.length.is_none() && head.length.is_none(), "{what}: {got:?}, {head:?}");
        return;
    }
    if let Some(length) = &head.length {
        assert_eq!(*length, got.body.len().to_string(), "{what}");
    }
    assert!(!must_say || head.length.is_some(), "{what}: {head:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn head_is_answered_like_get_without_a_body_wherever_the_answer_comes_from() {
    let (backend, redis) = (kinds().await, Redis::start(&[]).await);
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nmemory='0B'\nredis='{}'\n{RULES}", backend.address, redis.url());
    let over_redis = Sluice::with(&text, &[]);
    let kinds = ["plain", "none", "missing", "error", "moved", "empty", "gzip", "large", "chunked", "closed"];
    for http2 in [false, true] {
        for kind in kinds {
            for accepts in [&[][..], &[("accept-encoding", "gzip")]] {
                let place = format!("{http2}/{}", accepts.len());
                let what = |source: &str| format!("{source} {kind}, HTTP/2 {http2}, {accepts:?}");
                // Passed on, also for want of a rule that caches.
                let target = format!("/pass/{place}/{kind}");
                let got = seen(http2, sluice.address, "GET", &target, accepts).await;
                let head = seen(http2, sluice.address, "HEAD", &target, accepts).await;
                is_head_of(&head, &got, got.length.is_some(), &what("passed"));
                // Fetched by HEAD first, then from what that stored.
                for (store, sluice) in [("memory", &sluice), ("Redis", &over_redis)] {
                    let target = format!("/{store}/{place}/{kind}");
                    let head = seen(http2, sluice.address, "HEAD", &target, accepts).await;
                    let got = seen(http2, sluice.address, "GET", &target, accepts).await;
                    is_head_of(&head, &got, false, &what("fetched"));
                    if head.said.contains("stored") {
                        until("it is stored", || async { seen(http2, sluice.address, "GET", &target, accepts).await.said.contains("hit") })
                            .await;
                        let mut got = seen(http2, sluice.address, "GET", &target, accepts).await;
                        let head = loop {
                            let head = seen(http2, sluice.address, "HEAD", &target, accepts).await;
                            let again = seen(http2, sluice.address, "GET", &target, accepts).await;
                            // Else it was packed meanwhile, as large ones are once.
                            if got.body == again.body {
                                break head;
                            }
                            got = again;
                        };
                        assert!(head.said.contains("hit"), "{head:?}");
                        is_head_of(&head, &got, head.status != 204, &what(store));
                    }
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn head_gets_no_body_of_refusals_errors_and_own_endpoints() {
    let mut backend = kinds().await;
    const HEEDS: &str = "[[route]]\nname='heeds'\npath='/heeds/*'\nttl='1h'\nclient_directives='respect'\n";
    let limit = "[[limit]]\nname='one'\nrate='1/h'\nroutes=['limited']\n";
    let rules = format!("[[route]]\nname='limited'\npath='/limited/*'\nttl='1h'\n{HEEDS}{RULES}");
    let sluice = Sluice::ruled(backend.address, "", &format!("{limit}{rules}")).await;
    sluice.get("/limited/x").await;
    assert_eq!(sluice.get("/limited/x").await.status, 429);
    let cached = [("cache-control", "only-if-cached")];
    let none = &[][..];
    for http2 in [false, true] {
        for (admin, target, fields, status) in [
            (false, "/a%zz", none, 400),
            (false, "/a%00", none, 400),
            (false, "/a", &[("expect", "magic")], 417),
            (false, "/limited/x", none, 429),
            (false, "/heeds/x", &cached, 504),
            (false, "/health", none, 200),
            (false, "/api/cache/stats", none, 200),
            (false, "/api/cache/stats/", none, 307),
            (false, "/api/cache/clear", none, 405),
            (true, "/", none, 200),
            (true, "/livez", none, 200),
            (true, "/readyz", none, 200),
            (true, "/metrics", none, 200),
            (true, "/stats", none, 200),
            (true, "/explain?target=/x", none, 200),
            (true, "/nothing", none, 404),
            (true, "/reload", none, 405),
            (true, "/a%zz", none, 400),
        ] {
            let address = if admin { sluice.admin } else { sluice.address };
            let got = seen(http2, address, "GET", target, fields).await;
            let head = seen(http2, address, "HEAD", target, fields).await;
            assert_eq!(head.status, status, "{target}, HTTP/2 {http2}");
            // What these say may differ from one second to the next.
            let got = if ["/metrics", "/stats", "/api/cache/stats"].contains(&target) { Seen { length: None, ..got } } else { got };
            if got.length.is_some() {
                is_head_of(&head, &got, true, target);
            }
            assert!(head.body.is_empty() && head.length.is_some(), "{target}: {head:?}");
        }
    }
    backend.kill().await;
    for http2 in [false, true] {
        for target in ["/gone", "/pass/gone"] {
            let got = seen(http2, sluice.address, "GET", target, &[]).await;
            let head = seen(http2, sluice.address, "HEAD", target, &[]).await;
            assert_eq!(head.status, 502, "{target}");
            is_head_of(&head, &got, true, target);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_304_has_no_body_over_either_protocol() {
    let backend = Backend::start(|_| ok("ETag: \"a\"\r\n", b"hello")).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    sluice.get("/x").await;
    for http2 in [false, true] {
        for method in ["GET", "HEAD"] {
            let answer = seen(http2, sluice.address, method, "/x", &[("if-none-match", "\"a\"")]).await;
            assert_eq!((answer.status, answer.body.len()), (304, 0), "{method}, HTTP/2 {http2}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_unknown_length_reaches_the_backend_with_every_method() {
    let backend = Backend::start(|asked| if asked.method == "HEAD" { ok("", b"") } else { ok("", &asked.body) }).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for target in ["/pass/x", "/x"] {
        for method in ["GET", "HEAD", "DELETE", "OPTIONS", "POST", "PUT", "PATCH", "QUERY"] {
            for http2 in [false, true] {
                let status = if http2 {
                    Http2::open(sluice.address).await.ask(method, target, &[], b"hello").await.answer.status
                } else {
                    let mut connection = Connection::open(sluice.address).await;
                    let head = format!("{method} {target} HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n");
                    connection.send(format!("{head}5\r\nhello\r\n0\r\n\r\n").as_bytes()).await;
                    connection.answer(method == "HEAD").await.unwrap().status
                };
                let asked = backend.last();
                let what = format!("{method} {target}, HTTP/2 {http2}: {asked:?}");
                assert_eq!((status, asked.body.as_slice()), (200, &b"hello"[..]), "{what}");
                assert_eq!((asked.field("transfer-encoding"), asked.field("content-length")), (Some("chunked"), None), "{what}");
                let kept = matches!(method, "POST" | "PUT" | "PATCH");
                assert_eq!(asked.field("connection"), (!kept).then_some("close"), "{what}");
                // With a length it keeps that.
                let fields = [("content-length", "5")];
                if http2 {
                    Http2::open(sluice.address).await.ask(method, target, &fields, b"hello").await;
                    let asked = backend.last();
                    assert_eq!((asked.body.as_slice(), asked.field("content-length")), (&b"hello"[..], Some("5")), "{what}");
                }
            }
        }
    }
}

/// What becomes of a request over HTTP/2: the status, or zero for a reset stream.
async fn status_of(address: SocketAddr, head: &[(&str, &str)], body: &[u8], trailers: Option<&[(&str, &str)]>) -> u16 {
    let streamed = Http2::open(address).await.send(head, body, trailers).await;
    if streamed.answer.whole { streamed.answer.status } else { 0 }
}

/// The method, the target, the fields, and the status.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], u16);

/// One table for both protocols: what is refused over the one is refused over the other.
#[tokio::test(flavor = "multi_thread")]
async fn what_http1_refuses_http2_refuses_too() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    let long = format!("/{}", "a".repeat(120));
    let many = vec![("x", "y"); 101];
    let none = &[][..];
    let lengths = [("content-length", "0"), ("content-length", "0")];
    // Over HTTP/2 the status is the same, or the stream is reset.
    let cases: Vec<Case<'_>> = vec![
        ("GET", "/fine", none, 200),
        ("GET", &long, none, 200),
        ("GET", "/a#b", none, 400),
        ("GET", "/a?b#c", none, 400),
        ("GET", "/#", none, 400),
        ("HEAD", "/a#b", none, 400),
        ("GET", "/a b", none, 400),
        ("GET", "/a\u{1}", none, 400),
        ("GET", "*", none, 400),
        ("GET", "/a%00", none, 400),
        ("GET", "/a%zz", none, 400),
        ("G(T", "/a", none, 400),
        ("TRACE", "/a", none, 501),
        ("GET", "/a", &lengths, 400),
        ("POST", "/a", &lengths, 400),
        ("GET", "/a", &[("content-length", "+0")], 400),
        ("GET", "/a", &[("content-length", "-0")], 400),
        ("GET", "/a", &[("content-length", "0, 0")], 400),
        ("GET", "/a", &[("content-length", "0x0")], 400),
        ("GET", "/a", &[("content-length", "")], 400),
        ("GET", "/a", &[("content-length", "99999999999999999999")], 400),
        ("GET", "/a", &[("transfer-encoding", "chunked, gzip")], 400),
        ("GET", "/a", &[("transfer-encoding", "identity")], 400),
        ("GET", "/a", &[("expect", "magic")], 417),
        ("GET", "/a", &[("x y", "z")], 400),
        ("GET", "/a", &[("x", "a\u{0}b")], 400),
        ("GET", "/a", &[("x", "a\rb")], 400),
        ("GET", "/a", &[("x", "a\u{7f}b")], 400),
        ("GET", "/a", &[("host", "api.test"), ("host", "api.test")], 400),
        ("GET", "/a", &many, 431),
    ];
    for (method, target, fields, status) in cases {
        let before = backend.count();
        let mut head = format!("{method} {target} HTTP/1.1\r\n");
        if fields.first().is_none_or(|(name, _)| *name != "host") {
            head.push_str("Host: api.test\r\n");
        }
        fields.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        let mut connection = Connection::open(sluice.address).await;
        connection.send(format!("{head}\r\n").as_bytes()).await;
        assert_eq!(connection.answer(method == "HEAD").await.map(|answer| answer.status), Some(status), "{head:?}");
        let pseudo = [(":method", method), (":scheme", "http"), (":authority", "api.test"), (":path", target)];
        let over_http2 = status_of(sluice.address, &[&pseudo[..], fields].concat(), b"", None).await;
        assert!(over_http2 == status || (over_http2 == 0 && status >= 400), "{over_http2} over HTTP/2 for {head:?}");
        assert!(status == 200 || backend.count() == before, "{head:?} reached the backend");
    }
    // What has the same answer over both, and is counted.
    let refused = sluice.metric("requests_total", &["outcome=\"refused\""]).await;
    let pseudo = |target| [(":method", "GET"), (":scheme", "http"), (":authority", "api.test"), (":path", target)];
    for (target, fields, status) in [
        ("/a#b", none, 400),
        ("/a", &lengths, 400),
        ("/a", &[("x", " a")], 400),
        ("/a", &[("x", "a ")], 400),
        ("/a", &[("x", "\ta")], 400),
        ("/a", &[("x", "a\t")], 400),
        ("/a", &many, 431),
    ] {
        let answered = status_of(sluice.address, &[&pseudo(target)[..], fields].concat(), b"", None).await;
        assert_eq!(answered, status, "{target} {fields:?}");
    }
    assert_eq!(sluice.metric("requests_total", &["outcome=\"refused\""]).await, refused + 7.0);
    // A refusal ends its stream, not the connection.
    let mut connection = Http2::open(sluice.address).await;
    assert_eq!(connection.ask("GET", "/a#b", &[], b"").await.answer.status, 400);
    assert_eq!(connection.ask("GET", "/fine", &[], b"").await.answer.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_hold_no_pseudo_fields_and_no_outer_spaces() {
    let backend = Backend::start(|asked| ok("", &asked.body)).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for method in ["POST", "GET"] {
        let head = [(":method", method), (":scheme", "http"), (":authority", "api.test"), (":path", "/pass/x")];
        assert_eq!(status_of(sluice.address, &head, b"hello", Some(&[("x-sum", "1")])).await, 200);
        let before = backend.count();
        for trailers in [
            &[(":path", "/evil")][..],
            &[(":method", "GET")],
            &[("x-sum", "1"), (":status", "200")],
            &[(":x", "y")],
            &[("x-sum", " 1")],
            &[("x-sum", "1\t")],
            &[("connection", "x")],
        ] {
            let status = status_of(sluice.address, &head, b"hello", Some(trailers)).await;
            assert!(matches!(status, 0 | 400), "{status}: {trailers:?}");
        }
        assert_eq!(backend.count(), before, "a body that did not end well looked whole");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cookies_in_several_fields_of_http2_are_one_for_the_backend_and_for_vary() {
    let backend = Backend::start(|asked| {
        let cookies: Vec<&str> = asked.fields.iter().filter(|(name, _)| name == "cookie").map(|(_, value)| value.as_str()).collect();
        ok("Vary: Cookie\r\n", cookies.join("|").as_bytes())
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for target in ["/pass/x", "/x"] {
        let crumbs = [("cookie", "a=b"), ("x", "y"), ("cookie", "c=d; e=f"), ("cookie", "g=h")];
        let answer = Http2::open(sluice.address).await.ask("GET", target, &crumbs, b"").await.answer;
        assert_eq!(answer.text(), "a=b; c=d; e=f; g=h", "{target}");
    }
    // The same in one field is the same variant.
    let whole = [("cookie", "a=b; c=d; e=f; g=h")];
    assert!(sluice.get_with("/x", &whole).await.cache_status().contains("hit"));
    assert!(Http2::open(sluice.address).await.ask("GET", "/x", &whole, b"").await.answer.cache_status().contains("hit"));
    assert!(!sluice.get_with("/x", &[("cookie", "a=b")]).await.cache_status().contains("hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_does_wrong_in_its_body_is_a_400_and_not_the_backends_failure() {
    let backend = Backend::start(|asked| ok("", &asked.body)).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    let (chunked, sized) = ("Transfer-Encoding: chunked\r\n\r\n", "Content-Length: 10\r\n\r\n");
    let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(300));
    let cases: Vec<(&str, &str)> = vec![
        (chunked, "x\r\n"),
        (chunked, "-1\r\n"),
        (chunked, "5\nhello"),
        (chunked, "5\r\nhelloX"),
        (chunked, "5\r\nhello\r\n5 \r\n"),
        (chunked, "fffffffffffffffff\r\n"),
        (chunked, &long),
        (chunked, "5\r\nhello\r\n0\r\n bad: trailer\r\n\r\n"),
        (chunked, "5\r\nhello\r\n0\r\nbad trailer\r\n\r\n"),
        (chunked, "5\r\nhello\r\n0\r\nA: b\n\r\n"),
        // Cut off: the client sends no more, and waits.
        (chunked, "5\r\nhel"),
        (chunked, "5\r\nhello\r\n"),
        (chunked, "5\r\nhello\r\n0\r\n"),
        (sized, "hello"),
        (sized, ""),
    ];
    let mut number = 0.0;
    for method in ["POST", "GET", "PUT", "DELETE"] {
        for target in ["/pass/x", "/x"] {
            for (framing, body) in &cases {
                let mut connection = Connection::open(sluice.address).await;
                connection.send(format!("{method} {target} HTTP/1.1\r\nHost: api.test\r\n{framing}{body}").as_bytes()).await;
                tokio::io::AsyncWriteExt::shutdown(connection.0.get_mut()).await.unwrap();
                let answer = connection.answer(false).await.unwrap_or_else(|| panic!("no answer to {method} {body:?}"));
                assert_eq!((answer.status, answer.whole), (400, true), "{method} {target} {body:?}: {answer:?}");
                assert_eq!(answer.field("connection"), Some("close"));
                assert!(connection.head().await.is_none());
                number += 1.0;
            }
        }
    }
    assert_eq!(sluice.metric("requests_total", &["outcome=\"refused\"", "status=\"400\""]).await, number);
    for status in ["reset", "invalid", "truncated", "timeout", "connect", "client"] {
        assert_eq!(sluice.metric("backend_requests_total", &[&format!("status=\"{status}\"")]).await, 0.0, "{status}");
    }
    assert_eq!(sluice.metric("breaker_open", &["backend"]).await, 0.0);
    assert_eq!(sluice.metric("requests_total", &["outcome=\"failed\""]).await, 0.0);
    assert_eq!(sluice.get("/fine").await.status, 200);
    // Over HTTP/2 a client that gives up has nobody to tell.
    let mut connection = Http2::open(sluice.address).await;
    let fields = [("content-length", "10")];
    assert!(connection.ask("POST", "/pass/x", &fields, b"hello").await.reset.is_some());
    assert_eq!(sluice.get("/fine2").await.status, 200);
    assert_eq!(sluice.metric("requests_total", &["outcome=\"failed\""]).await, 0.0);
    assert_eq!(backend.count(), 2, "a body that did not end well looked whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_comes_too_slowly_is_its_clients_fault() {
    let backend = Backend::start(|asked| ok("", &asked.body)).await;
    let sluice = Sluice::ruled(backend.address, "", &format!("[limits]\nstall_timeout='1s'\n{RULES}")).await;
    let mut connection = Connection::open(sluice.address).await;
    connection.send(b"POST /pass/x HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhello").await;
    if let Some(answer) = connection.answer(false).await {
        assert_eq!(answer.status, 408);
    }
    until("it is counted", || async { sluice.metric("requests_total", &["outcome=\"refused\""]).await > 0.0 }).await;
    assert_eq!(sluice.metric("requests_total", &["outcome=\"failed\""]).await, 0.0);
    assert_eq!(sluice.metric("backend_requests_total", &[]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_coding_of_the_backends_that_is_not_undone_whole_is_a_502_and_never_stored() {
    let codings: Vec<String> = [
        "gzip, chunked",
        "xchunked",
        "chunked, chunked",
        "chunked, gzip",
        "gzip",
        "identity",
        "identity, chunked",
        "chunked;a=b",
        "\"chunked\"",
        "",
        "chunked,",
        ",chunked",
        "chunked\r\nTransfer-Encoding: chunked",
        "gzip\r\nTransfer-Encoding: chunked",
        "chunked\r\nTransfer-Encoding: gzip",
        "gzip, chunked\r\nContent-Length: 5",
        "xchunked\r\nContent-Length: 5",
        "chunked, chunked\r\nContent-Length: 5",
    ]
    .map(str::to_owned)
    .into();
    let said = codings.clone();
    let backend = Backend::start(move |asked| {
        let number: usize = asked.target.rsplit('/').next().unwrap().parse().unwrap();
        let head = format!("HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nTransfer-Encoding: {}\r\n\r\n", said[number]);
        let body = if asked.method == "HEAD" { "" } else { "5\r\nhello\r\n0\r\n\r\n" };
        vec![Step::Send(format!("{head}{body}").into_bytes()), Step::Close]
    })
    .await;
    for (number, coding) in codings.iter().enumerate() {
        // Each has its own, since the backend is left alone after a while.
        let sluice = Sluice::ruled(backend.address, "", RULES).await;
        for prefix in ["/pass", ""] {
            for method in ["GET", "HEAD", "POST"] {
                let answer = Connection::open(sluice.address).await.ask(method, &format!("{prefix}/{number}"), &[], b"").await;
                assert_eq!(answer.status, 502, "{method} {prefix} {coding:?}: {answer:?}");
                assert!(!answer.text().contains("hello") && !answer.cache_status().contains("stored"), "{coding:?}: {answer:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_length_of_the_backends_goes_on_only_if_it_is_true() {
    let heads = [
        ("Content-Length: 3\r\nTransfer-Encoding: chunked", 200),
        ("Content-Length: 9\r\nTransfer-Encoding: chunked", 200),
        ("Transfer-Encoding: chunked\r\nContent-Length: zz", 200),
        ("Content-Length: 5, 5", 200),
        ("Content-Length: 5\r\nContent-Length: 5", 200),
        ("Content-Length: zz", 502),
        ("Content-Length: -1", 502),
        ("Content-Length: +5", 502),
        ("Content-Length: 5, 6", 502),
        ("Content-Length: 5\r\nContent-Length: 6", 502),
    ];
    let backend = Backend::start(move |asked| {
        let (head, _) = heads[asked.target.rsplit('/').next().unwrap().parse::<usize>().unwrap()];
        let body = match head.contains("chunked") {
            _ if asked.method == "HEAD" => "",
            true => "5\r\nhello\r\n0\r\n\r\n",
            false => "hello",
        };
        vec![Step::Send(format!("HTTP/1.1 200 OK\r\nConnection: close\r\n{head}\r\n\r\n{body}").into_bytes()), Step::Close]
    })
    .await;
    for (number, (head, status)) in heads.into_iter().enumerate() {
        let sluice = Sluice::ruled(backend.address, "", RULES).await;
        for prefix in ["/pass", ""] {
            for method in ["GET", "POST", "HEAD"] {
                for http2 in [false, true] {
                    let target = format!("{prefix}/{number}");
                    let seen = seen(http2, sluice.address, method, &target, &[]).await;
                    assert_eq!(seen.status, status, "{method} {prefix} {head}: {seen:?}");
                    if status == 200 && method != "HEAD" {
                        assert_eq!(seen.body, b"hello", "{method} {prefix} {head}");
                    }
                    assert!(status != 200 || seen.length.as_deref().is_none_or(|length| length == "5"), "{method} {head}: {seen:?}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_coding_that_is_not_known_or_doubled_goes_on_as_it_is() {
    let packed = sluice::http::encoding::gzip(b"hello");
    let twice = sluice::http::encoding::gzip(&packed);
    let codings = ["gzip, gzip", "gzip\r\nContent-Encoding: gzip", "x, gzip", "gzip, x", "br", "", "identity, gzip", "gzip,"];
    let body = twice.to_vec();
    let backend = Backend::start(move |asked| {
        let number: usize = asked.target.rsplit('/').next().unwrap().parse().unwrap();
        ok(&format!("Content-Encoding: {}\r\n", codings[number]), &body)
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for (number, coding) in codings.iter().enumerate() {
        for prefix in ["/pass", ""] {
            for accepts in ["identity", "gzip"] {
                for _ in 0..2 {
                    let answer = sluice.get_with(&format!("{prefix}/{number}"), &[("Accept-Encoding", accepts)]).await;
                    let told: Vec<&str> =
                        answer.fields.iter().filter(|(name, _)| name == "content-encoding").map(|(_, value)| value.as_str()).collect();
                    assert_eq!(told.join("\r\nContent-Encoding: "), *coding);
                    assert_eq!(answer.body, twice, "{prefix} {coding:?} for {accepts}");
                }
            }
        }
    }
}

/// Chunks that are none, after nothing at all and after a good one.
const BAD_CHUNKS: [&str; 9] =
    ["zz\r\n", "-5\r\nhello", "5\nhello\r\n", "5\r\nhelloX", "\r\n", "fffffffffffffffff\r\n", " 5\r\nhello", "0x5\r\nhello", "5\r\nhel"];

#[tokio::test(flavor = "multi_thread")]
async fn malformed_chunks_of_the_backend_are_a_502_or_end_visibly() {
    let backend = Backend::start(|asked| {
        let mut words = asked.target.rsplit('/');
        let number: usize = words.next().unwrap().parse().unwrap();
        let after = words.next().unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let first = if after == "nothing" { "" } else { "5\r\nfirst\r\n" };
        let bad = BAD_CHUNKS[number].as_bytes().to_vec();
        match after {
            "late" => vec![
                Step::Send(format!("{head}{first}").into_bytes()),
                Step::Delay(std::time::Duration::from_millis(100)),
                Step::Send(bad),
                Step::Close,
            ],
            _ => vec![Step::Send([format!("{head}{first}").as_bytes(), &bad].concat()), Step::Close],
        }
    })
    .await;
    for (number, bad) in BAD_CHUNKS.iter().enumerate() {
        for after in ["nothing", "one", "late"] {
            let sluice = Sluice::ruled(backend.address, "", RULES).await;
            for prefix in ["/pass", ""] {
                let target = format!("{prefix}/{after}/{number}");
                let what = format!("{target} {bad:?}");
                let is_told = |answer: &crate::support::Answer| match after {
                    "nothing" if !bad.starts_with("5\r\nhel") => {
                        assert_eq!((answer.status, answer.whole), (502, true), "{what}: {answer:?}")
                    }
                    _ => assert!(answer.status == 502 || !answer.whole, "{what}: {answer:?}"),
                };
                let mut connection = Connection::open(sluice.address).await;
                connection.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
                is_told(&connection.answer(false).await.unwrap_or_else(|| panic!("closed without a word: {what}")));
                let streamed = Http2::open(sluice.address).await.ask("GET", &target, &[], b"").await;
                is_told(&streamed.answer);
                // HTTP/1.0 knows the end by the connection's alone: it is reset.
                let mut old = Connection::open(sluice.address).await;
                old.send(format!("GET {target} HTTP/1.0\r\nHost: h\r\n\r\n").as_bytes()).await;
                let mut bytes = Vec::new();
                let read = tokio::io::AsyncReadExt::read_to_end(&mut old.0, &mut bytes);
                let read = tokio::time::timeout(HANG, read).await.expect("an end");
                assert!(read.is_err() || String::from_utf8_lossy(&bytes).contains(" 502 "), "{what} looks whole over HTTP/1.0");
                assert!(!get(sluice.address, &target, &[]).await.cache_status().contains("hit"), "{what} was stored");
            }
        }
    }
}

/// What Sluice packed itself, however well, is for clients that take no gzip too: from memory, from Redis, and once it was validated.
#[tokio::test(flavor = "multi_thread")]
async fn what_sluice_packs_well_hits_for_everyone() {
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|asked: &Asked| match (asked.field("if-none-match"), asked.target.as_str()) {
        (Some(_), _) => vec![Step::Send(b"HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n\r\n".to_vec())],
        (None, "/small") => ok("ETag: \"a\"\r\n", &[b'x'; 100 << 10]),
        (None, _) => ok("ETag: \"a\"\r\n", &vec![b'x'; 3 << 20]),
    })
    .await;
    for (target, size) in [("/small", 100 << 10), ("/large", 3 << 20)] {
        for (memory, lines) in [("64MiB", "ttl='1h'"), ("0B", "ttl='1h'"), ("64MiB", "ttl='0s'\nstale_if_error='1h'")] {
            let text = format!(
                "[backend]\nurl='http://{}'\n[cache]\nmemory='{memory}'\nmax_object='4MiB'\nredis='{}'\nnamespace='{}'\n{}",
                backend.address,
                redis.url(),
                fastrand::u64(..),
                one_rule(lines)
            );
            let sluice = Sluice::with(&text, &[]);
            assert_eq!(sluice.get(target).await.body.len(), size);
            let expected = if lines.contains("0s") { "fwd=stale" } else { "hit" };
            until("it is stored", || async {
                let answer = sluice.get(target).await;
                assert_eq!((answer.status, answer.body.len()), (200, size), "{memory} {lines}");
                answer.cache_status().contains(expected)
            })
            .await;
            let before = backend.asked.lock().unwrap().iter().filter(|asked| asked.field("if-none-match").is_none()).count();
            for fields in [&[][..], &[("Accept-Encoding", "gzip")], &[("Range", "bytes=0-9")]] {
                for method in ["GET", "HEAD"] {
                    let answer = Connection::open(sluice.address).await.ask(method, target, fields, b"").await;
                    assert!(answer.status < 300 && answer.cache_status().contains(expected), "{memory} {lines} {fields:?}: {answer:?}");
                }
            }
            let after = backend.asked.lock().unwrap().iter().filter(|asked| asked.field("if-none-match").is_none()).count();
            assert_eq!(after, before, "asked anew: {memory} {lines}");
        }
    }
}
