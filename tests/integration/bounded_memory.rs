//! Memory stays bounded, whatever comes.

use tokio::io::AsyncReadExt;

use crate::support::{Backend, Connection, Sluice, Step, get, ok, one_rule, until};

const MIB: u64 = 1 << 20;

/// How many keys the sweep asks for; `SLUICE_SWEEP_KEYS` asks for more, for a run by hand.
fn keys() -> usize {
    std::env::var("SLUICE_SWEEP_KEYS").ok().and_then(|text| text.parse().ok()).unwrap_or(200_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keys_through_a_small_tier() {
    let backend = Backend::start(|_| ok("Content-Type: application/json\r\n", &[b'x'; 223])).await;
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nmemory='64MiB'\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    let each = keys() / 16;
    let clients: Vec<_> = (0..16)
        .map(|client| {
            let address = sluice.address;
            tokio::spawn(async move {
                let mut connection = Connection::open(address).await;
                for number in 0..each {
                    let answer = connection.ask("GET", &format!("/{client}/{number}"), &[], b"").await;
                    assert_eq!(answer.status, 200);
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    assert!(sluice.metric("evictions_total", &[]).await > 0.0);
    assert!(sluice.metric("memory_bytes", &[]).await <= 64e6 * 1.05);
    let resident = sluice.process.resident();
    assert!(resident < 128 * MIB, "{} MiB", resident / MIB);
}

/// Fills a tier of 128 MiB with answers of a size, asks for some of them again, and sees that no more memory is resident than it says.
async fn is_as_large_as_it_says_when_full_of(size: usize, fields: &'static str, path: &str) {
    let backend = Backend::start(move |asked| {
        let mut random = fastrand::Rng::with_seed(asked.target.len() as u64);
        ok(fields, &(0..size).map(|_| random.alphanumeric() as u8).collect::<Vec<u8>>())
    })
    .await;
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nmemory='128MiB'\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    let most = 128 * MIB;
    let filling: Vec<_> = (0..16)
        .map(|client| {
            let (address, path) = (sluice.address, path.to_owned());
            tokio::spawn(async move {
                let mut connection = Connection::open(address).await;
                let mut number = 0_u64;
                // Each is asked for twice: what is stored, and the forms in which it is sent.
                let each = most * 3 / 2 / 16 / (size as u64 + 900) + 8;
                while number < each {
                    for _ in 0..2 {
                        let answer = connection.ask("GET", &format!("{path}/{client}/{number}"), &[], b"").await;
                        assert_eq!(answer.status, 200);
                    }
                    number += 1;
                }
            })
        })
        .collect();
    for filling in filling {
        filling.await.unwrap();
    }
    assert!(sluice.metric("evictions_total", &["size"]).await > 0.0, "{size}: it is not full");
    let entries = sluice.metric("memory_entries", &[]).await;
    // What answering took is given back in a moment.
    let allowed = most + most * 15 / 100 + 24 * MIB;
    until("it is as large as it says", || async { sluice.process.resident() <= allowed }).await;
    let resident = sluice.process.resident() / MIB;
    eprintln!("{size} bytes, a path of {}: {entries} entries, {resident} MiB resident", path.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cache_is_as_large_as_it_says() {
    const MANY: &str = "Content-Type: application/json\r\nX-One: 1\r\nX-Two: 2\r\nX-Three: 3\r\nLast-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\nX-Four: 4\r\nX-Five: 5\r\n";
    let long = format!("/{}", "a".repeat(1500));
    for (size, fields, path) in [
        (200, "Content-Type: application/json\r\n", ""),
        (200, MANY, &long[..]),
        (2000, MANY, ""),
        (20_000, "", ""),
        (70_000, "", ""),
        (1 << 20, "", ""),
    ] {
        is_as_large_as_it_says_when_full_of(size, fields, path).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_remembered_of_long_targets_is_bounded_too() {
    // Some fail, some are private, some vary, and all have long keys.
    let backend = Backend::start(|asked| match asked.target.len() % 4 {
        0 => ok("Cache-Control: private\r\n", b"x"),
        1 => ok("Vary: Accept\r\n", b"x"),
        2 => crate::support::reply("503 Busy", "", b"no"),
        _ => ok("Cache-Control: public\r\n", b"x"),
    })
    .await;
    let text = format!(
        "own.endpoints=true\n[backend]\nurl='http://{}'\n[cache]\nmemory='8MiB'\nredis=''\n{}",
        backend.address,
        one_rule("ttl='1h'")
    );
    let sluice = Sluice::with(&text, &[]);
    sluice.get("/health").await;
    let before = sluice.process.resident();
    let asking: Vec<_> = (0..8)
        .map(|client| {
            let address = sluice.address;
            tokio::spawn(async move {
                let mut connection = Connection::open(address).await;
                for number in 0..2000 {
                    let long = "a".repeat(7900 + number % 7);
                    assert!(connection.ask("GET", &format!("/{client}/{number}/{long}"), &[], b"").await.status < 600);
                    let many = "&a".repeat(120);
                    connection.ask("GET", &format!("/health?{client}{number}{many}"), &[], b"").await;
                }
            })
        })
        .collect();
    for asking in asking {
        asking.await.unwrap();
    }
    until("it is small again", || async { sluice.process.resident().saturating_sub(before) < 40 * MIB }).await;
}

/// `size` MiB in chunks, without an announced length.
fn endless(size: usize) -> Vec<Step> {
    let mut piece = b"10000\r\n".to_vec();
    piece.resize(piece.len() + 65_536, b'x');
    piece.extend_from_slice(b"\r\n");
    vec![
        Step::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec()),
        Step::Repeat(piece, size * 16),
        Step::Send(b"0\r\n\r\n".to_vec()),
    ]
}

async fn read_all(sluice: &Sluice, target: &str) -> u64 {
    let mut client = Connection::open(sluice.address).await;
    client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes()).await;
    assert_eq!(client.head().await.unwrap().status, 200);
    let (mut buffer, mut read) = (vec![0; 1 << 20], 0);
    loop {
        match client.0.read(&mut buffer).await.unwrap() {
            0 => return read,
            count => read += count as u64,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_body_streams_through_in_constant_memory() {
    let backend = Backend::start(|_| endless(300)).await;
    let rules = "[[route]]\nname='pass'\npath='/pass'\ncache=false\n[[route]]\nname='all'\npath='/*'\nttl='1h'\nkey='all'\n";
    let sluice = Sluice::ruled(backend.address, "", rules).await;
    sluice.get("/health").await;
    let before = sluice.process.resident();
    for target in ["/pass", "/cached", "/cached"] {
        assert!(read_all(&sluice, target).await > 300 * MIB);
        let grown = sluice.process.resident().saturating_sub(before);
        assert!(grown < 32 * MIB, "{target}: {} MiB", grown / MIB);
    }
    assert_eq!(sluice.metric("memory_entries", &[]).await, 0.0);
    until("fills give their memory back", || async { sluice.metric("fill_bytes", &[]).await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_the_backend_back() {
    let backend = Backend::start(|_| endless(2000)).await;
    let rules = "[[route]]\nname='all'\npath='/*'\nttl='1h'\nkey='all'\n[limits]\nstall_timeout='1s'\n";
    let sluice = Sluice::ruled(backend.address, "", rules).await;
    let before = sluice.process.resident();
    let mut client = Connection::open(sluice.address).await;
    client.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!(client.head().await.unwrap().status, 200);
    // Without reading on: Sluice gives it up, and lets go of the backend.
    until("the stalled client is closed", || async {
        sluice.metric("inflight", &[]).await == 0.0 && sluice.metric("connections", &[]).await == 0.0
    })
    .await;
    let grown = sluice.process.resident().saturating_sub(before);
    assert!(grown < 48 * MIB, "{} MiB", grown / MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_heads_and_idle_connections_are_closed() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let limits = "[limits]\nheader_timeout='300ms'\nidle_timeout='600ms'\n";
    let sluice = Sluice::ruled(backend.address, "", &format!("{limits}{}", one_rule("ttl='1h'"))).await;
    let mut silent = Connection::open(sluice.address).await;
    let mut slow = Connection::open(sluice.address).await;
    slow.send(b"GET / HTTP/1.1\r\nHos").await;
    let mut idle = Connection::open(sluice.address).await;
    assert_eq!(idle.ask("GET", "/", &[], b"").await.status, 200);
    for connection in [&mut slow, &mut silent, &mut idle] {
        assert!(connection.head().await.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_objects_and_heads() {
    let backend = Backend::start(|asked| if asked.target == "/big" { ok("", &vec![b'x'; 3 << 20]) } else { ok("", b"x") }).await;
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nmax_object='2MiB'\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    for _ in 0..2 {
        let answer = sluice.get("/big").await;
        assert_eq!((answer.body.len(), answer.whole), (3 << 20, true));
        assert!(!answer.cache_status().contains("stored"), "{}", answer.cache_status());
    }
    assert_eq!(sluice.metric("memory_entries", &[]).await, 0.0);
    let long = get(sluice.address, &format!("/{}", "a".repeat(8192)), &[]).await;
    assert_eq!((long.status, long.text().as_str()), (400, r#"{"detail":"The URL is longer than 8192 bytes"}"#));
    let huge = get(sluice.address, "/", &[("X-Large", &"a".repeat(100_000))]).await;
    assert_eq!(huge.status, 431);
}
