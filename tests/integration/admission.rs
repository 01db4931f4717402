//! Who reaches the backend: each phase of a request has places of its own, so that a client that is slow, leaves or asks too much
//! takes nothing from the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use crate::support::{Asked, Backend, Connection, Sluice, Step, connect_from, frames, get, ok, one_rule, until};

const EVENTS: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata:1\r\n";

/// Answers by the path: events without an end, much, after a while, or never.
fn answer(asked: &Asked) -> Vec<Step> {
    match asked.target.split(['/', '?']).nth(1).unwrap_or("") {
        "events" => vec![Step::Send(EVENTS.to_vec()), Step::Hang],
        "large" => ok("Cache-Control: no-store\r\n", &vec![b'x'; 8 << 20]),
        "hang" => vec![Step::Hang],
        _ => ok("", b"x"),
    }
}

fn sluice(backend: &Backend, lines: &str) -> Sluice {
    let text =
        format!("own.endpoints=true\n[backend]\nurl='http://{}'\n{lines}\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    Sluice::with(&text, &[])
}

async fn open(sluice: &Sluice, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(sluice.address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream
}

async fn active(sluice: &Sluice, phase: &str) -> f64 {
    sluice.metric("backend_active", &[&format!("phase=\"{phase}\"")]).await
}

/// Another client is answered, and so is what a load balancer asks.
async fn others_are_answered(sluice: &Sluice) {
    for target in ["/new/1", "/new/2", "/health"] {
        assert_eq!(sluice.get(target).await.status, 200, "{target}");
    }
    for target in ["/livez", "/readyz"] {
        assert_eq!(get(sluice.admin, target, &[]).await.status, 200, "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_without_their_bodies_take_no_place() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=4");
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(open(&sluice, "POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf").await);
    }
    until("all are gathered", || async { sluice.metric("upload_bytes", &[]).await == f64::from(8 * ((16 << 10) + 4)) }).await;
    assert_eq!(active(&sluice, "ask").await + active(&sluice, "upload").await, 0.0);
    others_are_answered(&sluice).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_slow_readers_take_no_place_of_those_who_ask() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=2");
    let mut clients = Vec::new();
    for number in 0..8 {
        clients.push(open(&sluice, &format!("GET /events/{number} HTTP/1.1\r\nHost: h\r\n\r\n")).await);
        clients.push(open(&sluice, &format!("GET /large/{number} HTTP/1.1\r\nHost: h\r\n\r\n")).await);
    }
    until("all are on their way", || async { active(&sluice, "stream").await == 8.0 && active(&sluice, "download").await >= 1.0 }).await;
    others_are_answered(&sluice).await;
    until("nobody asks any more", || async { active(&sluice, "ask").await == 0.0 }).await;
    drop(clients);
    until("nothing is left", || async { active(&sluice, "").await + sluice.metric("inflight", &[]).await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_any_more_is_not_asked() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=2\nqueue=10000\nqueue_timeout='30s'");
    let before = sluice.process.resident();
    for round in 0..4 {
        let mut clients = Vec::new();
        for number in 0..200 {
            clients.push(open(&sluice, &format!("GET /hang/{round}-{number} HTTP/1.1\r\nHost: h\r\n\r\n")).await);
        }
        let mut http2 = open(&sluice, "").await;
        http2.write_all(&frames::opening()).await.unwrap();
        for id in 0..100 {
            let target = format!("/hang/{round}-h2-{id}");
            let head = frames::fields(&[(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", &target)]);
            http2.write_all(&frames::frame(1, frames::END_STREAM | frames::END_HEADERS, 2 * id + 1, &head)).await.unwrap();
        }
        until("they wait", || async { sluice.metric("backend_pending", &[]).await >= 200.0 }).await;
        for id in 0..100 {
            http2.write_all(&frames::frame(3, 0, 2 * id + 1, &8_u32.to_be_bytes())).await.unwrap();
        }
        drop(clients);
        until("they wait no more", || async { sluice.metric("backend_pending", &[]).await == 0.0 }).await;
    }
    until("nobody is answered", || async { sluice.metric("inflight", &[]).await == 0.0 }).await;
    assert!(backend.count() <= 2, "{} reached the backend", backend.count());
    let grown = sluice.process.resident().saturating_sub(before) >> 20;
    assert!(grown < 48, "{grown} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_any_more_gives_way_to_another_client() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=4");
    let ask = |number: u8, from: u8| {
        let address = sluice.address;
        async move {
            let mut stream = connect_from(address, from).await;
            stream.write_all(format!("GET /hang/{number} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.unwrap();
            stream
        }
    };
    let mut clients = Vec::new();
    for number in 0..4 {
        clients.push(ask(number, 9).await);
    }
    until("all are asked", || async { active(&sluice, "ask").await == 4.0 && backend.count() == 4 }).await;
    // Who waits for what hangs keeps its place, and who joins a fetch keeps it going.
    let waiting = tokio::spawn({
        let address = sluice.address;
        async move { Connection(BufReader::new(connect_from(address, 8).await)).ask("GET", "/new", &[], b"").await }
    });
    until("it waits", || async { sluice.metric("backend_pending", &[]).await == 1.0 }).await;
    let joined = ask(0, 7).await;
    until("all are there", || async { sluice.metric("inflight", &[]).await == 6.0 }).await;
    drop(clients);
    assert_eq!(waiting.await.unwrap().status, 200);
    let given_up = || sluice.metric("backend_requests_total", &["status=\"given-up\""]);
    assert_eq!(given_up().await, 1.0);
    // A fetch of one address alone gives way to none of the same.
    for number in 0..3 {
        assert_eq!(sluice.get(&format!("/new/{number}")).await.status, 200);
    }
    assert_eq!((given_up().await, active(&sluice, "ask").await), (1.0, 3.0));
    drop(joined);
}

#[tokio::test(flavor = "multi_thread")]
async fn also_where_each_of_those_who_left_had_an_address_of_its_own() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=4");
    let mut clients = Vec::new();
    for number in 2..6 {
        let mut stream = connect_from(sluice.address, number).await;
        stream.write_all(format!("GET /hang/{number} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.unwrap();
        clients.push(stream);
    }
    until("all are asked", || async { active(&sluice, "ask").await == 4.0 && backend.count() == 4 }).await;
    drop(clients);
    until("all have left", || async { sluice.metric("inflight", &[]).await == 0.0 }).await;
    others_are_answered(&sluice).await;
    assert_eq!(sluice.metric("backend_requests_total", &["status=\"given-up\""]).await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_addresses_that_wait_for_what_hangs_leave_the_backend_to_others() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=16");
    let mut clients = Vec::new();
    for number in 0..60 {
        let mut stream = connect_from(sluice.address, 5 + number % 3).await;
        stream.write_all(format!("GET /hang/{number} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.unwrap();
        clients.push(stream);
    }
    until("all places are taken that one rule may have", || async { backend.count() >= 15 }).await;
    // Not one of them leaves. Others find a place all the same, and few requests are given up for that.
    for number in 0..20 {
        assert_eq!(sluice.get(&format!("/new/{number}")).await.status, 200, "{number}");
    }
    let displaced = sluice.metric("backend_rejected_total", &["phase=\"ask\"", "why=\"displaced\""]).await;
    assert!((1.0..4.0).contains(&displaced), "{displaced}");
    drop(clients);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_slowly_with_many_loses_one_to_who_finds_no_place() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_downloads=4");
    let mut slow = Vec::new();
    for (number, from) in [9, 9, 9, 8].into_iter().enumerate() {
        let mut stream = connect_from(sluice.address, from).await;
        stream.write_all(format!("GET /large/{number} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.unwrap();
        until("its body is on its way", || async { active(&sluice, "download").await > number as f64 }).await;
        slow.push(stream);
    }
    // Once they have not moved for a while.
    let number = AtomicUsize::new(0);
    until("another is answered", || async {
        let target = format!("/large/new-{}", number.fetch_add(1, Ordering::Relaxed));
        let answer = sluice.get(&target).await;
        answer.status == 200 && answer.body.len() == 8 << 20
    })
    .await;
    assert_eq!(sluice.metric("backend_rejected_total", &["phase=\"download\"", "why=\"displaced\""]).await, 1.0);
    let mut read = Vec::new();
    for mut stream in slow {
        let mut body = vec![0; (8 << 20) + 1];
        // One that is cut off ends before, or is reset.
        read.push(stream.read_exact(&mut body).await.is_ok());
    }
    assert_eq!(read.iter().filter(|is_whole| !**is_whole).count(), 1, "{read:?}");
    assert!(read[3], "it has but one");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_slowly_with_many_loses_one_to_who_finds_no_place() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "upload_buffer='1KiB'\nmax_uploads=2");
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut stream = connect_from(sluice.address, 9).await;
        stream.write_all(b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n").await.unwrap();
        stream.write_all(&[b'x'; 20_000]).await.unwrap();
        slow.push(stream);
    }
    until("both are on their way", || async { active(&sluice, "upload").await == 2.0 }).await;
    let other = Connection::open(sluice.address).await.ask("PUT", "/y", &[], &[b'y'; 5000]).await;
    assert_eq!(other.status, 200);
    assert_eq!(sluice.metric("backend_rejected_total", &["phase=\"upload\"", "why=\"displaced\""]).await, 1.0);
    assert_eq!(active(&sluice, "upload").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_change_goes_on_where_there_is_no_place_for_it() {
    let backend = Backend::start(|asked| match (asked.method.as_str(), asked.target.as_str()) {
        ("POST", "/x") => ok("", &vec![b'x'; 8 << 20]),
        (_, "/large") => answer(asked),
        _ => ok("", b"x"),
    })
    .await;
    let sluice = sluice(&backend, "max_downloads=1");
    sluice.get("/x").await;
    let _slow = open(&sluice, "GET /large HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until("its body is on its way", || async { active(&sluice, "download").await == 1.0 }).await;
    assert!(sluice.get("/x").await.cache_status().contains("hit"));
    let change = |target: &'static str| async move { Connection::open(sluice.address).await.ask("POST", target, &[], b"").await };
    // It was carried out, and its client is not made to repeat it.
    let made = change("/x").await;
    assert_eq!((made.status, made.body.len()), (200, 8 << 20));
    // What is whole with its head needs no place.
    assert_eq!(change("/y").await.status, 200);
    let after = Connection::open(sluice.address).await.ask("GET", "/x", &[], b"").await;
    assert!(after.status == 200 && after.cache_status().contains("miss"), "{after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_may_take_longer_than_the_answer_to_it() {
    for lines in ["timeout='1s'", "timeout='1s'\nupload_buffer='4KiB'"] {
        let backend = Backend::start(answer).await;
        let sluice = sluice(&backend, lines);
        let mut client = Connection::open(sluice.address).await;
        client.send(b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 200000\r\n\r\n").await;
        for _ in 0..20 {
            client.send(&[b'x'; 10_000]).await;
            sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(client.answer(false).await.unwrap().status, 200, "{lines}");
        assert_eq!(backend.last().body.len(), 200_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_is_waited_for_from_the_end_of_the_request() {
    let backend = Backend::start(answer).await;
    for lines in ["timeout='1s'", "timeout='1s'\nupload_buffer='0B'"] {
        let sluice = sluice(&backend, lines);
        let answer = Connection::open(sluice.address).await.ask("PUT", "/hang", &[], b"hello").await;
        assert_eq!((answer.status, answer.cache_status()), (504, "sluice; fwd=miss; detail=backend-timeout"), "{lines}");
    }
}

/// A backend each of whose connections answers one request, and ends when it is asked the next.
async fn dying(asked: Arc<AtomicUsize>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let asked = Arc::clone(&asked);
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                for is_first in [true, false] {
                    let mut line = String::new();
                    while line != "\r\n" {
                        line.clear();
                        if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    asked.fetch_add(1, Ordering::SeqCst);
                    if is_first {
                        sleep(Duration::from_millis(200)).await;
                        let answer = b"HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nContent-Length: 1\r\n\r\nx";
                        stream.get_mut().write_all(answer).await.unwrap();
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_connections_that_are_dead_cost_no_answer() {
    let asked = Arc::new(AtomicUsize::new(0));
    let address = dying(Arc::clone(&asked)).await;
    let sluice = Sluice::ruled(address, "", &one_rule("ttl='1h'")).await;
    for _ in 0..2 {
        let asking: Vec<_> = (0..8)
            .map(|number| {
                let sluice = sluice.address;
                tokio::spawn(async move { get(sluice, &format!("/{number}"), &[]).await.status })
            })
            .collect();
        for asking in asking {
            assert_eq!(asking.await.unwrap(), 200);
        }
    }
    assert_eq!(sluice.metric("breaker_open", &["of=\"backend\""]).await, 0.0);
    // What may change something is asked once, whatever the connection.
    let before = asked.load(Ordering::SeqCst);
    let answer = Connection::open(sluice.address).await.ask("DELETE", "/x", &[], b"").await;
    assert!(matches!(answer.status, 200 | 502), "{}", answer.status);
    assert_eq!(asked.load(Ordering::SeqCst), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_said_at_once() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=1\nqueue=1\ntimeout='60s'\nqueue_timeout='60s'");
    let _first = open(&sluice, "GET /hang/1 HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until("the place is taken", || async { active(&sluice, "ask").await == 1.0 }).await;
    let _second = open(&sluice, "GET /hang/2 HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until("the queue is full", || async { sluice.metric("backend_pending", &[]).await == 1.0 }).await;
    let third = sluice.get("/hang/3").await;
    assert_eq!((third.status, third.field("retry-after")), (503, Some("1")));
    assert_eq!(third.cache_status(), "sluice; fwd=miss; detail=backend-overloaded");
    assert_eq!(sluice.metric("backend_rejected_total", &["phase=\"ask\"", "why=\"full\""]).await, 1.0);
    assert_eq!(sluice.get("/health").await.status, 200);
    assert_eq!(get(sluice.admin, "/readyz", &[]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_asks_for_much_waits_behind_one_that_asks_for_little() {
    let backend = Backend::slow(Duration::from_millis(50)).await;
    let config = format!(
        "trusted_proxies=['127.0.0.0/8']\n[backend]\nurl='http://{}'\nmax_in_flight=2\nqueue_timeout='30s'\n[cache]\nredis=''\n{}",
        backend.address,
        one_rule("ttl='1h'")
    );
    let sluice = Sluice::with(&config, &[]);
    let mut clients = Vec::new();
    for number in 0..60 {
        clients.push(open(&sluice, &format!("GET /much/{number} HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")).await);
    }
    until("many wait", || async { sluice.metric("backend_pending", &[]).await >= 30.0 }).await;
    assert_eq!(sluice.get_with("/little", &[("X-Forwarded-For", "192.0.2.2")]).await.status, 200);
    assert!(sluice.metric("backend_pending", &[]).await >= 10.0, "it was answered before most of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_joins_what_waits_does_not_wait_behind_the_share_of_another() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "max_in_flight=16");
    let address = sluice.address;
    let from = async |number: u8, target: &str| {
        let mut connection = Connection(BufReader::new(connect_from(address, number).await));
        connection.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
        connection
    };
    let mut hung = Vec::new();
    for number in 0..15 {
        hung.push(from(9, &format!("/hang/{number}")).await);
    }
    until("one address holds its share", || async { active(&sluice, "ask").await == 15.0 }).await;
    let mut first = from(9, "/new").await;
    until("it waits", || async { sluice.metric("backend_pending", &[]).await == 1.0 }).await;
    let mut second = from(8, "/new").await;
    for client in [&mut second, &mut first] {
        assert_eq!(client.answer(false).await.unwrap().status, 200);
    }
    assert_eq!(backend.count_of("/new"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn gathered_bodies_are_bounded_together() {
    let backend = Backend::start(answer).await;
    let sluice = sluice(&backend, "upload_memory='64KiB'\nmax_uploads=2");
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut client = open(&sluice, "PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n").await;
        client.write_all(&[b'x'; 20_000]).await.unwrap();
        clients.push(client);
    }
    until("what has no room is sent as it comes", || async { active(&sluice, "upload").await == 2.0 }).await;
    assert!(sluice.metric("upload_bytes", &[]).await <= 65_536.0);
    others_are_answered(&sluice).await;
    drop(clients);
    until("nothing is left", || async { sluice.metric("upload_bytes", &[]).await + active(&sluice, "").await == 0.0 }).await;
}
