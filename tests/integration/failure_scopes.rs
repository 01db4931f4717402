//! A failure belongs to what failed: one bad address leaves all others as they are, and what cannot be stored is not asked for back to
//! back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::time::{Instant, sleep};

use crate::support::{Backend, Connection, Sluice, Step, ok, one_rule, reply, until};

fn sluice(backend: &Backend, rules: &str) -> Sluice {
    let cache = "[cache]\nredis=''\nrefresh_early=false";
    Sluice::with(&format!("[backend]\nurl='http://{}'\n{cache}\n{rules}", backend.address), &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_address_makes_no_other_stale() {
    for status in ["503 Busy", "500 Oops", "504 Late"] {
        let backend = Backend::start(move |asked| if asked.target == "/bad" { reply(status, "", b"no") } else { ok("", b"fine") }).await;
        let sluice = sluice(&backend, &one_rule("ttl='1s'\nstale_if_error='1h'"));
        for number in 0..40 {
            assert_eq!(sluice.get(&format!("/{number}")).await.status, 200);
        }
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3) {
            for _ in 0..5 {
                assert!(sluice.get("/bad").await.status >= 500);
            }
            for number in 0..40 {
                let answer = sluice.get(&format!("/{number}")).await;
                assert!(!answer.cache_status().contains("ttl=-"), "{status}: {}", answer.cache_status());
            }
        }
        assert_eq!(sluice.metric("breaker_open", &["of=\"backend\""]).await, 0.0, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_fails_as_a_whole_is_left_alone_until_anything_is_answered() {
    // The second rule caches, but not for those who ask for events: that is passed by itself.
    for (target, fields) in [("/pass", &[][..]), ("/new", &[("Accept", "text/event-stream")])] {
        is_left_alone_until_this_is_answered(target, fields).await;
    }
}

async fn is_left_alone_until_this_is_answered(target: &str, fields: &[(&str, &str)]) {
    let failing = Arc::new(AtomicUsize::new(0));
    let switch = Arc::clone(&failing);
    let backend = Backend::start(move |asked| match switch.load(Ordering::SeqCst) {
        1 => reply("503 Busy", "", b"no"),
        _ => ok("", asked.target.as_bytes()),
    })
    .await;
    let rules = format!("[[route]]\nname='pass'\npath='/pass'\ncache=false\n{}", one_rule("ttl='1s'\nstale_if_error='1h'"));
    let sluice = sluice(&backend, &rules);
    for number in 0..10 {
        sluice.get(&format!("/{number}")).await;
    }
    failing.store(1, Ordering::SeqCst);
    until("the breaker opens", || async {
        for number in 0..10 {
            assert_eq!(sluice.get(&format!("/{number}")).await.status, 200);
        }
        sluice.metric("breaker_open", &["of=\"backend\""]).await == 1.0
    })
    .await;
    failing.store(0, Ordering::SeqCst);
    assert_eq!(sluice.get_with(target, fields).await.status, 200);
    assert_eq!(sluice.metric("breaker_open", &["of=\"backend\""]).await, 0.0, "{target} was passed and answered");
    for number in 0..10 {
        let target = format!("/{number}");
        until("it is fresh again", || async { !sluice.get(&target).await.cache_status().contains("ttl=-") }).await;
    }
}

/// How often the backend is asked within three seconds for what is served stale meanwhile.
async fn asked_while_stale(status: &'static str, fields: &'static str) -> usize {
    let asked = AtomicUsize::new(0);
    let backend = Backend::start(move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0 => ok("Cache-Control: max-age=0, stale-while-revalidate=60\r\nETag: \"a\"\r\n", b"seen"),
        _ => reply(status, fields, b"no"),
    })
    .await;
    let sluice = sluice(&backend, &one_rule("ttl='1s'\nstale_while_revalidate='1h'\nstale_if_error='1h'\norigin_headers='ignore'"));
    assert_eq!(sluice.get("/x").await.text(), "seen");
    until("it is stale", || async { sluice.get("/x").await.cache_status().contains("ttl=-") }).await;
    let mut connection = Connection::open(sluice.address).await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        let answer = connection.ask("GET", "/x", &[], b"").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "seen"), "{status}");
    }
    backend.count() - 1
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_stored_is_not_revalidated_back_to_back() {
    for (status, fields, most) in [
        ("429 Slow down", "Retry-After: 30\r\n", 1),
        ("503 Busy", "Retry-After: 30\r\n", 1),
        ("429 Slow down", "", 6),
        ("403 No", "", 6),
        ("400 What", "", 6),
        ("206 Partial Content", "Content-Range: bytes 0-1/9\r\n", 6),
    ] {
        let asked = asked_while_stale(status, fields).await;
        assert!((1..=most).contains(&asked), "{status} {fields}: asked {asked} times");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_that_break_off_while_their_clients_pause_are_no_failures_of_the_backend() {
    let mut backend = Backend::start(|asked| match asked.target.as_str() {
        target if target.starts_with("/video") => {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 64 << 20);
            vec![Step::Send(head.into_bytes()), Step::Repeat(vec![b'x'; 1 << 20], 64)]
        }
        _ => ok("", b"fine"),
    })
    .await;
    let rules = format!("[limits]\nstall_timeout='1h'\n{}", one_rule("ttl='1h'\nstale_if_error='1h'"));
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nredis=''\nmax_object='1MiB'\n{rules}", backend.address);
    let sluice = Sluice::with(&text, &[]);
    let mut clients = Vec::new();
    for number in 0..3 {
        let mut client = Connection::open(sluice.address).await;
        client.send(format!("GET /video/{number} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
        assert_eq!(client.head().await.unwrap().status, 200);
        clients.push(client);
    }
    // A pause is a time: longer than what counts as one.
    sleep(Duration::from_secs(3)).await;
    backend.kill().await;
    for mut client in clients {
        let mut rest = Vec::new();
        let _ = client.0.read_to_end(&mut rest).await;
        assert!(rest.len() < 64 << 20);
    }
    until("all have ended", || async { sluice.metric("backend_active", &[]).await == 0.0 }).await;
    assert_eq!(sluice.metric("breaker_open", &["of=\"backend\""]).await, 0.0);
}
