//! The backend fails in every way there is; what is stored is served.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::support::{Backend, Connection, Sluice, Step, get, ok, one_rule, reply, until};

const RULE: &str = "ttl='1s'\nstale_if_error='1h'\nnegative_ttl='1h'";

/// Seen once, gone stale, and then the backend fails as `failure` says.
async fn stale_after(failure: fn() -> Vec<Step>, detail: &str) {
    let failing = Arc::new(AtomicUsize::new(0));
    let switch = Arc::clone(&failing);
    let backend = Backend::start(move |_| if switch.load(Ordering::SeqCst) == 1 { failure() } else { ok("", b"seen") }).await;
    // A refresh ahead of time would find the failure before any client does.
    let cache = "[cache]\nredis=''\nrefresh_early=false";
    let text = format!("[backend]\nurl='http://{}'\ntimeout='500ms'\n{cache}\n{}", backend.address, one_rule(RULE));
    let sluice = Sluice::with(&text, &[]);
    assert_eq!(sluice.get("/x").await.text(), "seen");
    failing.store(1, Ordering::SeqCst);
    until("the stale answer for the failure", || async {
        let answer = sluice.get("/x").await;
        assert_eq!((answer.status, answer.text().as_str(), answer.whole), (200, "seen", true), "{detail}: {}", answer.cache_status());
        answer.cache_status().starts_with("sluice; hit; ttl=-") && answer.cache_status().contains(detail)
    })
    .await;
    // It is left alone for a while: asking on does not ask the backend each time.
    let before = backend.count();
    for _ in 0..20 {
        assert_eq!(sluice.get("/x").await.text(), "seen");
    }
    assert!(backend.count() - before < 10, "{}", backend.count() - before);
    // And longer each time: the key from at least a quarter of a second on, the backend as a whole from half of that.
    let least = if detail.ends_with("truncated") { 1400 } else { 600 };
    let (began, before) = (Instant::now(), backend.count());
    until("it is asked again and again", || async { sluice.get("/x").await.whole && backend.count() >= before + 3 }).await;
    assert!(began.elapsed() >= Duration::from_millis(least), "{detail}: {:?}", began.elapsed());
    // And recovery is noticed.
    failing.store(0, Ordering::SeqCst);
    until("a fresh answer", || async { sluice.get("/x").await.cache_status().starts_with("sluice; hit; ttl=0") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_of_failure() {
    stale_after(|| reply("500 Oops", "", b"no"), "stale-if-error-500").await;
    stale_after(|| reply("502 Oops", "", b"no"), "stale-if-error-502").await;
    stale_after(|| reply("503 Oops", "", b"no"), "stale-if-error-503").await;
    stale_after(|| reply("504 Oops", "", b"no"), "stale-if-error-504").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset() {
    stale_after(|| vec![Step::Reset], "stale-if-error-reset").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_body() {
    stale_after(
        || vec![Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec()), Step::Close],
        "stale-if-error-truncated",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_chunked_body() {
    let cut = || vec![Step::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal".to_vec()), Step::Close];
    stale_after(cut, "stale-if-error-truncated").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense() {
    stale_after(|| vec![Step::Send(b"BANANA\r\n\r\n".to_vec()), Step::Close], "stale-if-error-invalid").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence() {
    stale_after(|| vec![Step::Hang], "stale-if-error-timeout").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_takes_long_has_a_deadline_of_its_own() {
    // A second connection is established once the first is accepted: until then the kernel lets nothing in, and tries again after a second.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let _first = tokio::net::TcpStream::connect(address).await.unwrap();
    let text =
        format!("[backend]\nurl='http://{address}'\nconnect_timeout='20s'\ntimeout='500ms'\n[cache]\nredis=''\n{}", one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    let asked = tokio::spawn({
        let address = sluice.address;
        async move { get(address, "/x", &[]).await.status }
    });
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert!(!asked.is_finished(), "the deadline for the answer does not run yet");
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                while connection.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {
                    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").await.unwrap();
                }
            });
        }
    });
    assert_eq!(asked.await.unwrap(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_and_recovery() {
    let mut backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1s'\nstale_while_revalidate='1s'\nstale_if_error='1h'")).await;
    let targets: Vec<String> = (0..30).map(|number| format!("/{number}")).collect();
    for target in &targets {
        assert_eq!(sluice.get(target).await.text(), *target);
    }
    backend.kill().await;
    until("the breaker opens", || async {
        for target in &targets {
            assert_eq!(sluice.get(target).await.text(), *target, "every URL seen before is still answered");
        }
        sluice.metric("breaker_open", &["of=\"backend\""]).await == 1.0
    })
    .await;
    assert_eq!(sluice.get("/unseen").await.status, 502);
    backend.revive().await;
    // What is not stored is tried at once; what is stored, after a while.
    assert_eq!(sluice.get("/unseen").await.text(), "/unseen");
    until("the breaker closes", || async { sluice.metric("breaker_open", &["of=\"backend\""]).await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_under_load_every_url_seen_is_answered() {
    let mut backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1s'\nstale_while_revalidate='1s'\nstale_if_error='1h'")).await;
    for number in 0..50 {
        sluice.get(&format!("/{number}")).await;
    }
    let asked = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(AtomicUsize::new(0));
    let load: Vec<_> = (0..8)
        .map(|client| {
            let (address, asked, stop) = (sluice.address, Arc::clone(&asked), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut connection = Connection::open(address).await;
                for number in (client..).step_by(7) {
                    let target = format!("/{}", number % 50);
                    let answer = connection.ask("GET", &target, &[], b"").await;
                    assert_eq!((answer.status, answer.text()), (200, target));
                    asked.fetch_add(1, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) == 1 {
                        return;
                    }
                }
            })
        })
        .collect();
    backend.kill().await;
    until("stale answers for a failure", || async { sluice.metric("requests_total", &["outcome=\"stale\""]).await > 500.0 }).await;
    stop.store(1, Ordering::SeqCst);
    for client in load {
        client.await.unwrap();
    }
    assert!(asked.load(Ordering::SeqCst) > 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_anything_stored_failures_are_said_in_json() {
    for (failure, status, detail) in [
        ((|| vec![Step::Hang]) as fn() -> Vec<Step>, 504, "The backend did not answer in time"),
        (|| vec![Step::Reset], 502, "The backend closed the connection before it answered"),
        (|| vec![Step::Send(b"BANANA\r\n\r\n".to_vec()), Step::Close], 502, "The backend's answer could not be understood"),
    ] {
        let backend = Backend::start(move |_| failure()).await;
        let text = format!("[backend]\nurl='http://{}'\ntimeout='300ms'\n[cache]\nredis=''\n{}", backend.address, one_rule(RULE));
        let sluice = Sluice::with(&text, &[]);
        for target in ["/x", "/y"] {
            let answer = sluice.get(target).await;
            assert_eq!((answer.status, answer.text()), (status, format!("{{\"detail\":\"{detail}\"}}")));
            assert_eq!(answer.field("content-type"), Some("application/json"));
            assert!(answer.cache_status().starts_with("sluice; fwd=miss; detail="), "{}", answer.cache_status());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backends_own_errors_pass_unchanged_and_are_not_kept() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/503" => reply("503 Busy", "Content-Type: application/json\r\n", b"{\"detail\":\"Database service unavailable\"}"),
        "/422" => reply("422 No", "", b"422"),
        _ => reply("404 No", "", b"404"),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule(RULE)).await;
    for (target, status, asked) in [("/503", 503, 3), ("/422", 422, 3), ("/404", 404, 1)] {
        for _ in 0..3 {
            assert_eq!(sluice.get(target).await.status, status);
        }
        assert_eq!(backend.count_of(target), asked, "{target}");
    }
    assert_eq!(sluice.get("/503").await.text(), r#"{"detail":"Database service unavailable"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_ends_early_breaks_its_client_off_and_is_not_stored() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/length" => vec![Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhalf".to_vec()), Step::Close],
        _ => vec![Step::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n".to_vec()), Step::Close],
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule(RULE)).await;
    for target in ["/length", "/chunked", "/length", "/chunked"] {
        let mut client = Connection::open(sluice.address).await;
        client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
        // Broken off, or, if nothing was sent yet, told so.
        if let Some(answer) = client.answer(false).await {
            assert!(answer.status == 502 || (answer.status == 200 && !answer.whole), "{target}: {answer:?}");
            assert!(!answer.cache_status().contains("hit"), "{target}");
        }
    }
    assert_eq!(sluice.metric("memory_entries", &[]).await, 0.0);
}
