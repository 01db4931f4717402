//! Readers of one answer are independent: one that is slow, or does not read, slows neither the fetch nor another reader, and keeps
//! nothing out of the cache.

use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::support::{Backend, Connection, HANG, Sluice, Step, frames, get, ok, one_rule, until};

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n";

fn chunk(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// A client that has read the head of an answer, and nothing else.
async fn at_the_head(sluice: &Sluice, target: &str) -> Connection {
    let mut client = Connection::open(sluice.address).await;
    client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
    assert_eq!(client.head().await.unwrap().status, 200);
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_keep_nothing_out_of_the_cache() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        target if target.starts_with("/large") => ok("", &vec![b'x'; 4 << 20]),
        _ => [vec![Step::Delay(Duration::from_millis(300))], ok("", b"x")].into_iter().flatten().collect(),
    })
    .await;
    let config = format!(
        "[backend]\nurl='http://{}'\n[cache]\nmemory='64MiB'\nmax_object='4MiB'\nredis=''\n[limits]\nstall_timeout='1h'\n{}",
        backend.address,
        one_rule("ttl='1h'")
    );
    let sluice = Sluice::with(&config, &[]);
    let mut idle = Vec::new();
    for number in 0..8 {
        idle.push(at_the_head(&sluice, &format!("/large/{number}")).await);
        // A body that is whole has two seconds in which it does not give way; four of them have room.
        sleep(Duration::from_millis(700)).await;
    }
    until("all bodies are whole", || async { sluice.metric("memory_entries", &[]).await == 8.0 }).await;
    let asking: Vec<_> = (0..20)
        .map(|_| {
            let address = sluice.address;
            tokio::spawn(async move { get(address, "/new", &[]).await })
        })
        .collect();
    for asking in asking {
        let answer = asking.await.unwrap();
        assert!(answer.status == 200 && answer.cache_status().contains("stored"), "{}", answer.cache_status());
    }
    assert_eq!(backend.count_of("/new"), 1);
    sleep(Duration::from_secs(2)).await;
    let large = sluice.get("/large/9").await;
    assert!(large.whole && large.cache_status().contains("stored"), "{}", large.cache_status());
    until("it is stored", || async { sluice.get("/large/9").await.cache_status().contains("hit") }).await;
    drop(idle);
    until("the room is free", || async { sluice.metric("fill_bytes", &[]).await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_come_slowly_for_nobody_keep_nothing_out_of_the_cache() {
    let backend = Backend::start(|asked| match asked.target.split('/').nth(1).unwrap_or("") {
        "slow" => vec![Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nabc".to_vec()), Step::Hang],
        _ => ok("", &vec![b'x'; 500_000]),
    })
    .await;
    let cache = "[cache]\nmemory='8MiB'\nmax_object='1MiB'\nredis=''";
    let sluice = Sluice::with(
        &format!("[backend]\ntimeout='10m'\nbody_timeout='10m'\nurl='http://{}'\n{cache}\n{}", backend.address, one_rule("ttl='1h'")),
        &[],
    );
    for number in 0..3 {
        drop(at_the_head(&sluice, &format!("/slow/{number}")).await);
    }
    until("they have left, and have all the room", || async {
        sluice.metric("inflight", &[]).await == 0.0 && sluice.metric("fill_bytes", &[]).await == 2e6
    })
    .await;
    let number = AtomicUsize::new(0);
    until("another answer is stored", || async {
        let target = format!("/large/{}", number.fetch_add(1, Ordering::Relaxed));
        sluice.get(&target).await;
        sluice.get(&target).await.cache_status().contains("hit")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_does_not_read_holds_no_other_up() {
    let backend = Backend::start(|asked| {
        let head =
            if asked.target == "/known" { format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", 64 << 20) } else { CHUNKED.to_owned() };
        let piece = if asked.target == "/known" { vec![b'x'; 1 << 20] } else { chunk(&vec![b'x'; 1 << 20]) };
        let end = if asked.target == "/known" { Vec::new() } else { b"0\r\n\r\n".to_vec() };
        let head = format!("{head}Cache-Control: max-age=60\r\n\r\n").into_bytes();
        vec![Step::Delay(Duration::from_millis(500)), Step::Send(head), Step::Repeat(piece, 64), Step::Send(end)]
    })
    .await;
    let config = format!(
        "[backend]\nurl='http://{}'\n[cache]\nmax_object='1MiB'\nredis=''\n[limits]\nstall_timeout='1h'\n{}",
        backend.address,
        one_rule("ttl='1h'")
    );
    let sluice = Sluice::with(&config, &[]);
    for target in ["/known", "/unknown"] {
        let address = sluice.address;
        let (idle, reading) = tokio::join!(at_the_head(&sluice, target), get(address, target, &[]));
        assert!(reading.whole && reading.body.len() == 64 << 20, "{target}: {}", reading.body.len());
        assert!(!reading.cache_status().contains("stored") || target == "/unknown", "{target}: {}", reading.cache_status());
        drop(idle);
    }
    until("nothing is held", || async { sluice.metric("fill_bytes", &[]).await + sluice.metric("inflight", &[]).await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_body_ends_with_its_last_reader() {
    let backend = Backend::start(|asked| {
        let head = match asked.target.as_str() {
            "/absent" => CHUNKED.replace("200 OK", "404 Not Found"),
            "/private" => format!("{CHUNKED}Cache-Control: private\r\n"),
            _ => CHUNKED.to_owned(),
        };
        vec![Step::Send([head.as_bytes(), b"\r\n", &chunk(b"x")].concat()), Step::Hang]
    })
    .await;
    let rules = one_rule("ttl='0s'");
    let text = format!("[backend]\nurl='http://{}'\ntimeout='1h'\nbody_timeout='1h'\n[cache]\nredis=''\n{rules}", backend.address);
    let sluice = Sluice::with(&text, &[]);
    for target in ["/absent", "/unstored", "/private"] {
        let mut clients = Vec::new();
        for _ in 0..2 {
            let mut client = Connection::open(sluice.address).await;
            client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
            assert!(client.head().await.is_some());
            clients.push(client);
        }
        assert!(sluice.metric("backend_active", &["download"]).await > 0.0);
        drop(clients);
        until(target, || async { sluice.metric("backend_active", &[]).await == 0.0 }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_flushed_piece_of_gzip_comes_when_it_is_sent() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(b"first").unwrap();
    encoder.flush().unwrap();
    let first = encoder.get_ref().clone();
    let backend = Backend::start(move |asked| match asked.target.as_str() {
        "/empty" => ok("Content-Encoding: gzip\r\n", b""),
        _ => vec![Step::Send([format!("{CHUNKED}Content-Encoding: gzip\r\n\r\n").as_bytes(), &chunk(&first)].concat()), Step::Hang],
    })
    .await;
    for rule in ["ttl='1h'", "cache=false"] {
        let sluice = Sluice::ruled(backend.address, "", &one_rule(rule)).await;
        if rule != "cache=false" {
            let mut client = at_the_head(&sluice, "/pieces").await;
            let mut piece = [0; 10];
            client.0.read_exact(&mut piece).await.unwrap();
            assert_eq!(&piece, b"5\r\nfirst\r\n");
        }
        for _ in 0..2 {
            let empty = sluice.get("/empty").await;
            assert_eq!((empty.status, empty.body.len(), empty.whole), (200, 0, true), "{rule}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_replaces_something_stale_is_sent_as_it_comes() {
    let backend = Backend::start(|asked| match asked.field("if-none-match") {
        None => ok("ETag: \"a\"\r\nCache-Control: max-age=0\r\n", b"old"),
        Some(_) => vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nnew".to_vec()),
            Step::Delay(Duration::from_secs(2)),
            Step::Send(b"est".to_vec()),
        ],
    })
    .await;
    // Its body takes longer than the head may.
    let text = format!(
        "[backend]\nurl='http://{}'\ntimeout='3s'\n[cache]\nredis=''\n{}",
        backend.address,
        one_rule("ttl='1h'\nstale_if_error='1h'")
    );
    let sluice = Sluice::with(&text, &[]);
    assert_eq!(sluice.get("/x").await.text(), "old");
    let mut client = Connection::open(sluice.address).await;
    client.0.get_mut().write_all(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
    let head = client.head().await.unwrap();
    let mut first = [0; 3];
    if head.field("transfer-encoding").is_some() {
        client.0.read_exact(&mut first).await.unwrap();
    }
    client.0.read_exact(&mut first).await.unwrap();
    assert_eq!((head.status, &first), (200, b"new"));
    assert_eq!(backend.answering(), 1, "the rest is on its way");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_of_what_is_stored_no_more_are_bounded_in_bytes() {
    const SIZE: usize = 8 << 20;
    let backend = Backend::start(|_| {
        let mut random = fastrand::Rng::with_seed(7);
        ok("", &(0..SIZE).map(|_| random.u8(..)).collect::<Vec<u8>>())
    })
    .await;
    let config = format!(
        "[backend]\nurl='http://{}'\n[cache]\nmemory='64MiB'\nmax_object='8MiB'\nredis=''\n[limits]\nstall_timeout='1h'\n{}",
        backend.address,
        one_rule("ttl='1h'")
    );
    let sluice = Sluice::with(&config, &[]);
    let ask = |target: &str, stream| {
        let head = [(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", target)];
        frames::frame(1, 5, stream, &frames::fields(&head))
    };
    let mut http2 = TcpStream::connect(sluice.address).await.unwrap();
    http2.write_all(&frames::opening()).await.unwrap();
    let mut slow = Vec::new();
    for number in 0..24 {
        let target = format!("/{number}");
        until("it is a hit", || async {
            let answer = sluice.get(&target).await;
            assert_eq!(answer.body.len(), SIZE);
            answer.cache_status().contains("; hit")
        })
        .await;
        match number % 3 {
            // Its window is never opened again.
            0 => http2.write_all(&ask(&target, 2 * number + 1)).await.unwrap(),
            // By the library, and by the short way.
            1 => {
                let mut client = Connection::open(sluice.address).await;
                client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\nRange: bytes=0-{}\r\n\r\n", SIZE - 2).as_bytes()).await;
                assert_eq!(client.head().await.unwrap().status, 206);
                slow.push(client);
            }
            _ => slow.push(at_the_head(&sluice, &target).await),
        }
        sleep(Duration::from_millis(300)).await;
    }
    let unstored = sluice.metric("unstored_bytes", &[]).await;
    // Those of the last two seconds have had no time yet.
    assert!((1.0..=f64::from(64 << 20) + 8.0 * SIZE as f64).contains(&unstored), "{unstored}");
    // The first ones are cut off. Over HTTP/2 that is the stream; its connection is good for others still.
    for client in &mut slow[..2] {
        let mut rest = Vec::new();
        let _ = timeout(HANG, client.0.read_to_end(&mut rest)).await.expect("an end of the connection");
        assert!(rest.len() < SIZE - 2);
    }
    http2.write_all(&frames::frame(6, 0, 0, b"are you?")).await.unwrap();
    let (mut is_reset, mut is_answered) = (false, false);
    while !(is_reset && is_answered) {
        let mut head = [0; 9];
        timeout(HANG, http2.read_exact(&mut head)).await.expect("a frame").unwrap();
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        http2.read_exact(&mut payload).await.unwrap();
        is_reset |= (head[3], head[8]) == (3, 1);
        is_answered |= (head[3], head[4]) == (6, 1);
    }
    drop((slow, http2));
    until("nothing is kept", || async { sluice.metric("unstored_bytes", &[]).await == 0.0 }).await;
}
