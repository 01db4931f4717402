//! Clients that are slow, silent, or send what costs more than it says: each loses what it has itself, and is told why where that can
//! be; the others do not notice.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::support::{Asked, Backend, Connection, HANG, Http2, Sluice, Step, connect_from, frames, ok, one_rule, until};

const LARGE: usize = 8 << 20;

fn answer(asked: &Asked) -> Vec<Step> {
    match asked.target.split('/').nth(1).unwrap_or("") {
        "large" => ok("", &vec![b'x'; LARGE]),
        "pass" => ok("Cache-Control: no-store\r\n", &vec![b'x'; LARGE]),
        "slow" => vec![Step::Delay(Duration::from_millis(300)), Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx".to_vec())],
        _ => ok("", b"x"),
    }
}

async fn start(lines: &str) -> (Backend, Sluice) {
    let backend = Backend::start(answer).await;
    let sluice = Sluice::ruled(backend.address, "", &format!("[limits]\n{lines}\n{}", one_rule("ttl='1h'"))).await;
    (backend, sluice)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_but_steady_download_is_not_cut() {
    // A connection is idle once all that was answered is sent.
    let (_backend, sluice) = start("stall_timeout='1s'\nidle_timeout='2s'").await;
    assert_eq!(sluice.get("/large").await.body.len(), LARGE);
    until("it is stored", || async { sluice.get("/large").await.cache_status().contains("hit") }).await;
    let downloads: Vec<_> = ["/large", "/pass"]
        .into_iter()
        .map(|target| {
            let address = sluice.address;
            tokio::spawn(async move {
                let mut client = Connection::open(address).await;
                client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes()).await;
                client.head().await.unwrap();
                let (mut read, mut buffer) = (0, vec![0; 30_000]);
                // Many times slower than what the kernel's buffers hold would take a second for.
                for _ in 0..80 {
                    read += client.0.read(&mut buffer).await.unwrap_or(0);
                    sleep(Duration::from_millis(100)).await;
                }
                let mut rest = Vec::new();
                let end = timeout(HANG, client.0.read_to_end(&mut rest)).await.unwrap();
                (target, end.is_ok(), read + rest.len())
            })
        })
        .collect();
    for download in downloads {
        let (target, is_fine, read) = download.await.unwrap();
        assert!(is_fine && read == LARGE, "{target}: cut after {read} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_takes_nothing_is_cut() {
    let (_backend, sluice) = start("stall_timeout='1s'").await;
    for target in ["/large", "/large", "/pass"] {
        let mut client = Connection::open(sluice.address).await;
        client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
        client.head().await.unwrap();
        until("it is cut", || async { sluice.metric("connections", &[]).await == 0.0 }).await;
    }
}

/// A frame that came: its kind, flags, stream and payload.
async fn next(stream: &mut TcpStream) -> Option<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
    stream.read_exact(&mut payload).await.ok()?;
    Some((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload))
}

fn http2_get(stream: u32, target: &str) -> Vec<u8> {
    let head = frames::fields(&[(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", target)]);
    frames::frame(1, frames::END_STREAM | frames::END_HEADERS, stream, &head)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_its_client_does_not_take_ends_alone() {
    let (_backend, sluice) = start("stall_timeout='1s'").await;
    for every in [None, Some(Duration::from_millis(300))] {
        let mut client = TcpStream::connect(sluice.address).await.unwrap();
        let window = frames::frame(8, 0, 0, &(1_u32 << 30).to_be_bytes());
        client.write_all(&[frames::opening(), window, http2_get(1, "/large")].concat()).await.unwrap();
        // Nothing, or thirty bytes now and then.
        let (mut reading, mut writing) = client.split();
        let reset = async {
            loop {
                let mut head = [0; 9];
                reading.read_exact(&mut head).await.unwrap();
                let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
                reading.read_exact(&mut payload).await.unwrap();
                if (head[3], head[8]) == (3, 1) {
                    return;
                }
                assert_ne!(head[3], 7, "the connection goes on");
            }
        };
        let opening = async {
            let Some(every) = every else { return std::future::pending().await };
            loop {
                sleep(every).await;
                writing.write_all(&frames::frame(8, 0, 1, &30_u32.to_be_bytes())).await.unwrap();
            }
        };
        timeout(HANG, async {
            tokio::select! {
                () = reset => (),
                () = opening => (),
            }
        })
        .await
        .expect("the stream is reset");
        client.write_all(&http2_get(3, "/small")).await.unwrap();
        loop {
            let (kind, flags, stream, _) = timeout(HANG, next(&mut client)).await.unwrap().expect("the connection goes on");
            if (kind, stream) == (0, 3) && flags & frames::END_STREAM != 0 {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_with_room_for_the_beginning_of_its_only_piece_ends_too() {
    // At this rate the first piece of a body has 16 KiB.
    let (_backend, sluice) = start("stall_timeout='1s'\nmin_rate='40KiB'").await;
    assert_eq!(sluice.get("/large").await.body.len(), LARGE);
    until("it is stored", || async { sluice.get("/large").await.cache_status().contains("hit") }).await;
    for range in ["bytes=0-9999", "bytes=0-99999"] {
        let mut client = TcpStream::connect(sluice.address).await.unwrap();
        let one_byte = frames::frame(4, 0, 0, &[0, 4, 0, 0, 0, 1]);
        client.write_all(&[frames::PREFACE, &one_byte].concat()).await.unwrap();
        for number in 0..20 {
            let head = [(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", "/large"), ("range", range)];
            let head = frames::frame(1, frames::END_STREAM | frames::END_HEADERS, 2 * number + 1, &frames::fields(&head));
            client.write_all(&head).await.unwrap();
        }
        let mut resets = 0;
        while resets < 20 {
            let (kind, ..) = timeout(HANG, next(&mut client)).await.expect("all streams are reset").expect("the connection goes on");
            resets += usize::from(kind == 3);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_reaches_a_client_that_still_sends() {
    let backend = Backend::start(answer).await;
    let limit = "[[limit]]\nname='l'\nrate='1/h'\nburst=1\nby='address'\n";
    let sluice = Sluice::ruled(backend.address, "", &format!("{}{limit}", one_rule("ttl='1h'"))).await;
    assert_eq!(sluice.get("/x").await.status, 200);
    for head in ["Content-Length: 10000000", "Transfer-Encoding: chunked"] {
        let mut client = Connection::open(sluice.address).await;
        client.send(format!("POST /x HTTP/1.1\r\nHost: h\r\n{head}\r\n\r\n").as_bytes()).await;
        let chunk = [b"f4240\r\n".as_slice(), &vec![b'x'; 1_000_000], b"\r\n"].concat();
        for _ in 0..10 {
            let piece = if head.starts_with('C') { &chunk[7..1_000_007] } else { &chunk[..] };
            timeout(HANG, client.0.get_mut().write_all(piece)).await.unwrap().expect("it may send on");
            sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(client.answer(false).await.expect("the answer").status, 429, "{head}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_over_http2_ends_its_stream_alone() {
    let backend = Backend::start(answer).await;
    let limit = "[[limit]]\nname='l'\nrate='1/h'\nburst=1\nby='address'\n";
    let sluice = Sluice::ruled(backend.address, "", &format!("{}{limit}", one_rule("ttl='1h'"))).await;
    assert_eq!(sluice.get("/x").await.status, 200);
    let mut client = TcpStream::connect(sluice.address).await.unwrap();
    let post = frames::fields(&[(":method", "POST"), (":scheme", "http"), (":authority", "h"), (":path", "/x")]);
    let begun = [frames::opening(), frames::frame(1, frames::END_HEADERS, 1, &post), frames::frame(0, 0, 1, &[b'x'; 10_000])];
    client.write_all(&begun.concat()).await.unwrap();
    let (mut kinds, mut is_over) = (Vec::new(), false);
    while !is_over {
        let (kind, flags, stream, _) = timeout(HANG, next(&mut client)).await.unwrap().expect("the connection goes on");
        assert_ne!(kind, 7, "GOAWAY");
        if stream == 1 {
            is_over = kind == 3 || (kind < 2 && flags & frames::END_STREAM != 0);
            kinds.push(kind);
        }
    }
    assert!(kinds.contains(&1), "an answer: {kinds:?}");
    // What was on its way does no harm, and another request is answered.
    client.write_all(&[frames::frame(0, frames::END_STREAM, 1, &[b'x'; 10_000]), http2_get(3, "/x")].concat()).await.unwrap();
    loop {
        let (kind, _, stream, _) = timeout(HANG, next(&mut client)).await.unwrap().expect("the connection goes on");
        if (kind, stream) == (1, 3) {
            break;
        }
    }
}

/// Whether the server ends the connection.
async fn is_ended(stream: &mut TcpStream) -> bool {
    let ended = async { while next(stream).await.is_some() {} };
    timeout(HANG, ended).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames_end_their_connection_alone() {
    let (_backend, sluice) = start("").await;
    let mut other = Http2::open(sluice.address).await;
    assert_eq!(other.ask("GET", "/x", &[], b"").await.answer.status, 200);
    let pings = frames::frame(6, 0, 0, &[1; 8]).repeat(20_000);
    let settings = frames::frame(4, 0, 0, &[]).repeat(20_000);
    let resets: Vec<u8> = (0..500_u32)
        .flat_map(|number| {
            [http2_get(2 * number + 1, &format!("/slow/{number}")), frames::frame(3, 0, 2 * number + 1, &8_u32.to_be_bytes())]
        })
        .flatten()
        .collect();
    let windows = frames::frame(8, 0, 0, &1_u32.to_be_bytes()).repeat(20_000);
    for flood in [pings, settings, resets, windows] {
        let mut client = TcpStream::connect(sluice.address).await.unwrap();
        client.write_all(&frames::opening()).await.unwrap();
        let (mut reading, mut writing) = client.into_split();
        let writing = tokio::spawn(async move {
            let _ = writing.write_all(&flood).await;
            // Not closed here.
            std::future::pending::<()>().await;
        });
        let mut bytes = Vec::new();
        let _ = timeout(HANG, reading.read_to_end(&mut bytes)).await.expect("the connection ends");
        writing.abort();
        assert_eq!(other.ask("GET", "/x", &[], b"").await.answer.status, 200);
    }
    // What a client that means well sends is answered.
    let mut client = TcpStream::connect(sluice.address).await.unwrap();
    client.write_all(&[frames::opening(), frames::frame(6, 0, 0, &[1; 8]).repeat(100)].concat()).await.unwrap();
    let mut answered = 0;
    while answered < 100 {
        let (kind, flags, ..) = timeout(HANG, next(&mut client)).await.unwrap().expect("the connection goes on");
        answered += usize::from(kind == 6 && flags & 1 != 0);
    }
    // Clients do not fill the log.
    assert!(!sluice.logged().contains(" WARN "), "{}", sluice.logged());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_hears_that_its_idle_connection_ends() {
    let (_backend, sluice) = start("idle_timeout='300ms'").await;
    let mut client = TcpStream::connect(sluice.address).await.unwrap();
    client.write_all(&[frames::opening(), http2_get(1, "/x")].concat()).await.unwrap();
    let mut is_told = false;
    while let Some((kind, ..)) = timeout(HANG, next(&mut client)).await.expect("the connection ends") {
        is_told |= kind == 7;
    }
    assert!(is_told, "GOAWAY");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_begins_in_pieces_goes_on() {
    let (_backend, sluice) = start("header_timeout='500ms'\nidle_timeout='1h'").await;
    let mut client = TcpStream::connect(sluice.address).await.unwrap();
    client.set_nodelay(true).unwrap();
    client.write_all(frames::PREFACE).await.unwrap();
    // Long enough to be read apart, mostly.
    sleep(Duration::from_millis(50)).await;
    client.write_all(&frames::frame(4, 0, 0, &[])).await.unwrap();
    for number in 0..20 {
        sleep(Duration::from_millis(50)).await;
        let stream = 2 * number + 1;
        client.write_all(&http2_get(stream, "/small")).await.unwrap();
        loop {
            let (kind, flags, of, _) = timeout(HANG, next(&mut client)).await.unwrap().expect("the connection goes on");
            assert_ne!(kind, 7, "it is told to end");
            if (kind, of) == (0, stream) && flags & frames::END_STREAM != 0 {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_half_sent_ends_over_http2_too() {
    let (_backend, sluice) = start("header_timeout='300ms'\nidle_timeout='1h'").await;
    let whole = http2_get(1, "/x");
    let open = frames::frame(1, frames::END_STREAM, 1, &whole[9..]);
    let opening = frames::opening();
    let mut parts = vec![[&opening[..], &whole[..whole.len() - 3]].concat(), [&opening[..], &open].concat()];
    // From the end of the line that says HTTP/2 up to the last byte of its first frame.
    parts.extend([18, 20, 24, 27, opening.len() - 1].map(|count| opening[..count].to_vec()));
    for part in parts {
        let mut client = TcpStream::connect(sluice.address).await.unwrap();
        client.write_all(&part).await.unwrap();
        assert!(is_ended(&mut client).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_connections_are_open_idle_ones_give_way() {
    let (_backend, sluice) = start("connections=8\nconnections_per_address=6").await;
    let mut held = Vec::new();
    for from in [2, 3, 4, 5, 6, 7] {
        for _ in 0..6 {
            held.push(connect_from(sluice.address, from).await);
        }
    }
    until("all are open", || async { sluice.metric("connections", &[]).await == 8.0 }).await;
    // What was closed is known as closed, and what is idle has been for a while.
    sleep(Duration::from_millis(600)).await;
    for from in [8, 9, 10] {
        let mut newcomer = Connection(BufReader::new(connect_from(sluice.address, from).await));
        assert_eq!(newcomer.ask("GET", "/x", &[], b"").await.status, 200, "from {from}");
    }
    assert!(sluice.metric("connections", &[]).await <= 8.0);
    assert!(sluice.metric("connections_refused_total", &[]).await >= 20.0);
}
