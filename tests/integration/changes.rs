//! Requests with unsafe methods: what they may have changed at the backend is void, whatever becomes of their clients, and what
//! they cannot have changed stays.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::support::{Answer, Backend, Connection, Redis, Sluice, Step, TOKEN, get, ok, one_rule, reply, until};

const RULE: &str = "[[route]]\nname='all'\npath='/*'\nttl='1h'\n";

fn config(backend: &Backend, of_backend: &str, rules: &str) -> String {
    format!("[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n{of_backend}\n{rules}", backend.address)
}

/// A backend with one value: anything but GET raises it at once, and is answered after `delay`.
async fn counting(delay: Duration) -> (Backend, Arc<AtomicU64>) {
    let value = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&value);
    let backend = Backend::start(move |asked| {
        if asked.method == "GET" {
            return ok("", counting.load(Ordering::SeqCst).to_string().as_bytes());
        }
        counting.fetch_add(1, Ordering::SeqCst);
        let mut steps = vec![Step::Delay(delay)];
        steps.extend(ok("", b"done"));
        steps
    })
    .await;
    (backend, value)
}

async fn is_hit(sluice: &Sluice, target: &str) -> bool {
    sluice.get(target).await.cache_status().contains("; hit")
}

/// Has `target` stored.
async fn keep(sluice: &Sluice, target: &str) {
    until("it is kept", || is_hit(sluice, target)).await;
}

/// Waits until what is served is what the backend says now.
async fn is_up_to_date(sluice: &Sluice, target: &str, value: &AtomicU64, how: &str) {
    until(how, || async { sluice.get(target).await.text() == value.load(Ordering::SeqCst).to_string() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_before_the_answer_leaves_nothing_void_behind() {
    let (backend, value) = counting(Duration::from_millis(300)).await;
    let sluice = Sluice::with(&config(&backend, "", RULE), &[]);
    for (method, how) in [("POST", "reset"), ("PUT", "close"), ("PATCH", "half-close"), ("DELETE", "reset"), ("MKCOL", "close")] {
        let target = format!("/{method}/{how}");
        keep(&sluice, &target).await;
        let before = value.load(Ordering::SeqCst);
        let mut stream = TcpStream::connect(sluice.address).await.unwrap();
        let head = format!("{method} {target} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi");
        let head = if method == "DELETE" { head.replace("Content-Length: 2\r\n\r\nhi", "\r\n") } else { head };
        stream.write_all(head.as_bytes()).await.unwrap();
        until("the backend has it", || async { value.load(Ordering::SeqCst) > before }).await;
        assert!(is_hit(&sluice, &target).await, "nothing is known yet");
        match how {
            "reset" => stream.set_zero_linger().unwrap(),
            "half-close" => stream.shutdown().await.unwrap(),
            _ => {}
        }
        if how != "half-close" {
            drop(stream);
        }
        is_up_to_date(&sluice, &target, &value, &target).await;
        keep(&sluice, &target).await;
        assert_eq!(sluice.get(&target).await.text(), value.load(Ordering::SeqCst).to_string(), "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_reset_over_http2_leaves_nothing_void_behind() {
    let (backend, value) = counting(Duration::from_millis(300)).await;
    let sluice = Sluice::with(&config(&backend, "", RULE), &[]);
    keep(&sluice, "/x").await;
    let io = TokioIo::new(TcpStream::connect(sluice.address).await.unwrap());
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    let request = Request::patch("http://a/x").body(Full::new(Bytes::from_static(b"hi"))).unwrap();
    let asking = tokio::spawn(sender.send_request(request));
    until("the backend has it", || async { value.load(Ordering::SeqCst) == 1 }).await;
    // The connection stays, the stream is reset.
    asking.abort();
    is_up_to_date(&sluice, "/x", &value, "what the reset stream changed is served").await;
    drop(sender);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_may_have_changed_something() {
    let (backend, _) = counting(Duration::ZERO).await;
    let streaming = config(&backend, "upload_buffer='0B'", &format!("[limits]\nstall_timeout='300ms'\n{RULE}"));
    let sluice = Sluice::with(&streaming, &[]);
    for (number, (fields, bytes, closes)) in [
        ("Content-Length: 9", "half", true),
        ("Transfer-Encoding: chunked", "5\r\nhal", true),
        ("Content-Length: 9", "half", false),
        ("Content-Length: 9\r\nExpect: 100-continue", "", true),
    ]
    .into_iter()
    .enumerate()
    {
        let target = format!("/{number}");
        keep(&sluice, &target).await;
        let mut stream = TcpStream::connect(sluice.address).await.unwrap();
        stream.write_all(format!("PUT {target} HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n{bytes}").as_bytes()).await.unwrap();
        until("it is under way", || async { sluice.metric("inflight", &[]).await >= 1.0 }).await;
        let _open = (!closes).then_some(stream);
        until("it counts as done", || async { !is_hit(&sluice, &target).await }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_while_it_is_gathered_has_asked_for_nothing() {
    let (backend, _) = counting(Duration::ZERO).await;
    let sluice = Sluice::with(&config(&backend, "", RULE), &[]);
    keep(&sluice, "/x").await;
    let mut stream = TcpStream::connect(sluice.address).await.unwrap();
    stream.write_all(b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf").await.unwrap();
    until("it is under way", || async { sluice.metric("upload_bytes", &[]).await == f64::from((16 << 10) + 4) }).await;
    drop(stream);
    until("it is over", || async { sluice.metric("inflight", &[]).await + sluice.metric("upload_bytes", &[]).await == 0.0 }).await;
    assert!(is_hit(&sluice, "/x").await && backend.asked.lock().unwrap().iter().all(|asked| asked.method == "GET"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_and_has_no_answer_that_can_be_read_counts_as_done() {
    let backend = Backend::start(|asked| match (asked.method.as_str(), asked.target.as_str()) {
        ("GET", _) => ok("", b"x"),
        (_, "/reset") => vec![Step::Reset],
        (_, "/close") => vec![Step::Close],
        (_, "/invalid") => vec![Step::Send(b"what\r\n\r\n".to_vec()), Step::Close],
        (_, "/cut-off-head") => vec![Step::Send(b"HTTP/1.1 200 OK\r\nContent-".to_vec()), Step::Close],
        (_, "/truncated") => vec![Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf".to_vec()), Step::Close],
        (_, "/switched") => vec![Step::Send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".to_vec())],
        _ => reply("304 Not Modified", "", b""),
    })
    .await;
    let sluice = Sluice::with(&config(&backend, "timeout='5s'", RULE), &[]);
    for target in ["/reset", "/close", "/invalid", "/cut-off-head", "/truncated", "/switched", "/304"] {
        keep(&sluice, target).await;
        let mut open = Connection::open(sluice.address).await;
        open.send(format!("PATCH {target} HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx").as_bytes()).await;
        // A head whose body breaks off at once may never leave.
        let status = open.head().await.map(|head| head.status);
        assert!(status == Some(502) || (target == "/truncated" && matches!(status, Some(200) | None)), "{target}: {status:?}");
        assert!(!is_hit(&sluice, target).await, "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_times_out_counts_as_done_now_and_once_more_later() {
    // The backend carries it out half a timeout after it was given up.
    let start = Instant::now();
    let due = Arc::new(AtomicU64::new(u64::MAX));
    let applied = Arc::clone(&due);
    let backend = Backend::start(move |asked| {
        let now = u64::try_from(start.elapsed().as_millis()).unwrap();
        if asked.method == "GET" {
            return ok("", if now >= applied.load(Ordering::SeqCst) { b"new" } else { b"old" });
        }
        applied.store(now + if asked.target == "/late" { 1500 } else { 0 }, Ordering::SeqCst);
        vec![Step::Hang]
    })
    .await;
    let sluice = Sluice::with(&config(&backend, "timeout='1s'", RULE), &[]);
    keep(&sluice, "/now").await;
    keep(&sluice, "/late").await;
    let put = async |target| Connection::open(sluice.address).await.ask("PUT", target, &[], b"x").await.status;
    assert_eq!(put("/now").await, 504);
    assert_eq!(sluice.get("/now").await.text(), "new");
    due.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(put("/late").await, 504);
    let after = sluice.get("/late").await;
    assert!(after.text() == "old" && !after.cache_status().contains("; hit"), "{}", after.cache_status());
    until("it is asked for again", || async { sluice.get("/late").await.text() == "new" }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_refused_or_not_sent_leaves_what_is_stored() {
    let mut backend = Backend::start(|asked| match asked.target.trim_start_matches('/').parse::<u16>() {
        Ok(code) if asked.method != "GET" && code > 200 => reply(&format!("{code} Said"), "", b""),
        _ => ok("", b"x"),
    })
    .await;
    let sluice = Sluice::with(&config(&backend, "connect_timeout='1s'", RULE), &[]);
    let change = async |target: &str| Connection::open(sluice.address).await.ask("DELETE", target, &[], b"").await.status;
    for (code, stays) in [(204, false), (303, false), (404, true), (409, true), (500, true), (502, false), (503, true), (504, false)] {
        let target = format!("/{code}");
        keep(&sluice, &target).await;
        assert_eq!(change(&target).await, code);
        assert_eq!(is_hit(&sluice, &target).await, stays, "{code}");
    }
    keep(&sluice, "/x").await;
    backend.kill().await;
    // A request that finds a kept connection which ends meanwhile may have been sent: first none is left.
    until("no connection is left", || async { sluice.get("/y").await.cache_status().contains("backend-connect") }).await;
    assert_eq!(change("/x").await, 502);
    assert!(is_hit(&sluice, "/x").await, "nothing was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_it_waits_for_a_permit_has_asked_for_nothing() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/slow" => [vec![Step::Delay(Duration::from_millis(1500))], ok("", b"x")].into_iter().flatten().collect(),
        _ => ok("", b"x"),
    })
    .await;
    let sluice = Sluice::with(&config(&backend, "max_in_flight=1\ntimeout='5s'", RULE), &[]);
    keep(&sluice, "/x").await;
    let address = sluice.address;
    let slow = tokio::spawn(async move { get(address, "/slow", &[]).await });
    until("the only permit is taken", || async { backend.count_of("/slow") == 1 }).await;
    let mut stream = TcpStream::connect(sluice.address).await.unwrap();
    stream.write_all(b"DELETE /x HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    until("it waits", || async { sluice.metric("inflight", &[]).await == 2.0 }).await;
    drop(stream);
    assert_eq!(slow.await.unwrap().status, 200);
    // What comes after it finds the permit free, so it is not in the line any more.
    assert_eq!(sluice.get("/other").await.status, 200);
    assert!(backend.asked.lock().unwrap().iter().all(|asked| asked.method == "GET"));
    assert!(is_hit(&sluice, "/x").await);
}

/// How often Redis ran a command.
async fn calls(redis: &Redis, commands: &[&str]) -> u64 {
    let text = String::from_utf8(redis.command(&[b"INFO", b"commandstats"]).await).unwrap();
    let named = |line: &&str| commands.iter().any(|command| line.starts_with(&format!("cmdstat_{command}:")));
    text.lines().filter(named).filter_map(|line| line.split(['=', ',']).nth(1)?.parse::<u64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_under_rules_that_store_nothing_cost_redis_nothing() {
    let (backend, _) = counting(Duration::ZERO).await;
    let redis = Redis::start(&[]).await;
    let rules = "[[route]]\nname='off'\npath='/off/*'\ncache=false\n\
                 [[route]]\nname='on'\npath='/on/*'\nttl='1h'\n";
    let sluice = Sluice::ruled(backend.address, &redis.url(), rules).await;
    until("Redis answers", || async { sluice.logged().contains("Redis answers") }).await;
    let post = async |target: &str| {
        let answer: Answer = Connection::open(sluice.address).await.ask("POST", target, &[], b"x").await;
        assert_eq!(answer.status, 200);
    };
    let voids = ["scan", "publish", "hincrby", "unlink", "del"];
    let before = calls(&redis, &voids).await;
    for number in 0..40 {
        for rule in ["off", "no-rule"] {
            post(&format!("/{rule}/{number}")).await;
        }
    }
    assert_eq!(calls(&redis, &voids).await, before);
    post("/on/1").await;
    until("it is in the log", || async { calls(&redis, &["hincrby"]).await > 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_stored_before_a_reload_is_voided_still() {
    let (backend, value) = counting(Duration::ZERO).await;
    let on = config(&backend, "", RULE);
    let off = on.replace("ttl='1h'", "cache=false");
    let sluice = Sluice::with(&on, &[]);
    keep(&sluice, "/x").await;
    for text in [&off, &on] {
        std::fs::write(&sluice.file, text).unwrap();
        assert_eq!(sluice.manage("/reload").await.status, 200);
        if text == &off {
            assert_eq!(Connection::open(sluice.address).await.ask("POST", "/x", &[], b"x").await.status, 200);
        }
    }
    assert_eq!((sluice.get("/x").await.text(), value.load(Ordering::SeqCst)), ("1".to_owned(), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_get_fetches_while_a_change_is_under_way_does_not_outlive_it() {
    let (backend, value) = counting(Duration::from_millis(500)).await;
    let redis = Redis::start(&[]).await;
    let text = config(&backend, "", &format!("[cache]\nredis='{}'\n{RULE}", redis.url()));
    let (one, two) = (Sluice::with(&text, &[]), Sluice::with(&text, &[]));
    for sluice in [&one, &two] {
        until("Redis answers", || async { sluice.logged().contains("Redis answers") }).await;
    }
    let address = one.address;
    let changing = tokio::spawn(async move { Connection::open(address).await.ask("POST", "/x", &[], b"x").await.status });
    until("it is under way", || async { value.load(Ordering::SeqCst) == 1 }).await;
    // As if the backend had not carried it out yet.
    value.store(0, Ordering::SeqCst);
    keep(&one, "/x").await;
    keep(&two, "/x").await;
    value.store(1, Ordering::SeqCst);
    assert_eq!(changing.await.unwrap(), 200);
    assert_eq!(one.get("/x").await.text(), "1", "after the answer");
    until("the other one knows", || async { two.get("/x").await.text() == "1" }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_that_left_has_changed_is_void_at_other_instances_too() {
    let (backend, value) = counting(Duration::from_millis(300)).await;
    let redis = Redis::start(&[]).await;
    let text = config(&backend, "", &format!("[cache]\nredis='{}'\n{RULE}", redis.url()));
    let (one, mut two) = (Sluice::with(&text, &[]), Sluice::with(&text, &[]));
    for sluice in [&one, &two] {
        until("Redis answers", || async { sluice.logged().contains("Redis answers") }).await;
    }
    keep(&two, "/x").await;
    keep(&one, "/x").await;
    for (number, ends) in [(1, false), (2, true)] {
        let stream = TcpStream::connect(two.address).await.unwrap();
        let mut stream = tokio::io::BufWriter::new(stream);
        stream.write_all(b"DELETE /x HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        stream.flush().await.unwrap();
        until("the backend has it", || async { value.load(Ordering::SeqCst) == number }).await;
        drop(stream);
        if ends {
            // The process ends too, once it knows what became of it.
            two.process.signal("TERM");
            until("it ends", || {
                let ended = two.process.child.try_wait().unwrap().is_some();
                async move { ended }
            })
            .await;
        }
        is_up_to_date(&one, "/x", &value, "the other instance knows").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_post_is_not_kept_where_a_later_change_was_answered_first() {
    let posts = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&posts);
    let backend = Backend::start(move |asked| {
        if asked.method == "GET" {
            return ok("", b"second");
        }
        let fields = "Content-Location: /x\r\nCache-Control: max-age=3600\r\n";
        match counted.fetch_add(1, Ordering::SeqCst) {
            0 => [vec![Step::Delay(Duration::from_millis(700))], ok(fields, b"first")].into_iter().flatten().collect(),
            _ => ok("", b"second"),
        }
    })
    .await;
    let rules = one_rule("ttl='0s'\nmethods=['GET','POST']");
    let sluice = Sluice::ruled(backend.address, "", &rules).await;
    let address = sluice.address;
    let first = tokio::spawn(async move { Connection::open(address).await.ask("POST", "/x", &[], b"").await.text() });
    until("the first is under way", || async { posts.load(Ordering::SeqCst) == 1 }).await;
    assert_eq!(Connection::open(address).await.ask("POST", "/x", &[], b"").await.text(), "second");
    assert_eq!(first.await.unwrap(), "first");
    assert_eq!(sluice.get("/x").await.text(), "second");
}
