//! A client that gives up leaves a trace: in the counters, in the access log and in its span, with what it waited for.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::support::{Backend, Connection, Sluice, Step, frames, get, ok, one_rule, until};

/// Five clients over each protocol that ask for `path` and leave.
async fn ask_and_leave(sluice: &Sluice, path: &str) {
    let mut clients = Vec::new();
    for number in 0..5 {
        let mut client = TcpStream::connect(sluice.address).await.unwrap();
        client.write_all(format!("GET {path}/{number} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.unwrap();
        clients.push(client);
    }
    let mut http2 = TcpStream::connect(sluice.address).await.unwrap();
    http2.write_all(&frames::opening()).await.unwrap();
    for number in 0..5_u32 {
        let target = format!("{path}/h2-{number}");
        let head = frames::fields(&[(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", &target)]);
        http2.write_all(&frames::frame(1, frames::END_STREAM | frames::END_HEADERS, 2 * number + 1, &head)).await.unwrap();
    }
    until("they wait", || async { sluice.metric("inflight", &[]).await == 10.0 }).await;
    for number in 0..5 {
        http2.write_all(&frames::frame(3, 0, 2 * number + 1, &8_u32.to_be_bytes())).await.unwrap();
    }
    drop(clients);
    until("they wait no more", || async { sluice.metric("inflight", &[]).await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_leave_are_counted_and_logged_with_what_they_waited_for() {
    let backend = Backend::start(|asked| if asked.target.contains("/fine") { ok("", b"x") } else { vec![Step::Hang] }).await;
    let rules = format!("[[route]]\nname='pass'\npath='/pass/*'\ncache=false\n{}", one_rule("ttl='1h'"));
    for log in ["text", "json"] {
        let text = format!("[log]\nformat='{log}'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n{rules}", backend.address);
        let sluice = Sluice::with(&text, &[]);
        let left = |route: &'static str| [format!("route=\"{route}\""), "outcome=\"client-left\"".to_owned(), "status=\"499\"".to_owned()];
        let count = async |route| {
            let labels = left(route);
            sluice.metric("requests_total", &[&labels[0], &labels[1], &labels[2]]).await
        };
        let page = get(sluice.admin, "/metrics", &[]).await.text();
        assert!(page.contains("sluice_requests_total{outcome=\"client-left\",route=\"all\",status=\"499\"} 0"), "from the start");
        for (path, route, detail) in [("/slow", "all", "waited-for-fetch"), ("/pass/slow", "pass", "waited-for-backend")] {
            ask_and_leave(&sluice, path).await;
            assert_eq!(count(route).await, 10.0, "{path}");
            until("the lines are written", || async { sluice.logged().matches(detail).count() == 10 }).await;
        }
        assert_eq!(sluice.logged().matches("client-left").count(), 20);
        // Others are not counted so, whether they keep the connection or close it.
        let mut connection = Connection::open(sluice.address).await;
        for number in 0..3 {
            assert_eq!(connection.ask("GET", &format!("/fine/{number}"), &[], b"").await.status, 200);
        }
        drop(connection);
        until("it is closed", || async { sluice.metric("connections", &[]).await == 0.0 }).await;
        assert_eq!(count("all").await + count("pass").await, 20.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_who_has_all_is_logged_so() {
    let backend = Backend::start(|asked| match &*asked.target {
        "/chunks" => vec![Step::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec())],
        "/empty" => ok("Cache-Control: no-store\r\n", b""),
        _ => ok("Cache-Control: no-store\r\n", b"hello"),
    })
    .await;
    let text = format!("[log]\naccess='all'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    let asked = [("GET", "/length"), ("HEAD", "/length"), ("POST", "/length"), ("GET", "/chunks"), ("GET", "/chunks"), ("GET", "/empty")];
    for (method, target) in asked {
        Connection::open(sluice.address).await.ask(method, target, &[], b"").await;
    }
    until("all are logged", || async { sluice.logged().matches(" access ").count() == asked.len() }).await;
    assert!(!sluice.logged().contains("whole=false"), "{}", sluice.logged());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_who_leaves_within_a_hit_is_logged_so() {
    let backend = Backend::start(|_| ok("", &vec![b'x'; 8 << 20])).await;
    let text = format!("[log]\naccess='all'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    until("it is a hit", || async { sluice.get("/x").await.cache_status().contains("hit") }).await;
    let mut client = Connection::open(sluice.address).await;
    client.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!(client.head().await.unwrap().status, 200);
    drop(client);
    let line = |line: &&str| line.contains(" access ") && line.contains("whole=false");
    until("the line is written", || async { sluice.logged().lines().any(|one| line(&one)) }).await;
    let logged = sluice.logged();
    let of_it: Vec<&str> = logged.lines().filter(line).collect();
    assert!(of_it.len() == 1 && of_it[0].contains("hit") && !of_it[0].contains("bytes=8388608"), "{of_it:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_who_leaves_within_a_body_is_logged_with_what_was_sent() {
    let backend = Backend::start(|_| {
        let head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".to_vec();
        vec![Step::Send(head), Step::Delay(Duration::from_secs(3600))]
    })
    .await;
    let text = format!("[log]\naccess='all'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    let mut client = Connection::open(sluice.address).await;
    client.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!(client.head().await.unwrap().status, 200);
    drop(client);
    until("the line is written", || async { sluice.logged().contains("bytes=5 whole=false") }).await;
}
