//! One fetch a key, however many ask.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::support::{Backend, Connection, Sluice, Step, get, ok, one_rule, reply, until};

fn slow(asked: &crate::support::Asked) -> Vec<Step> {
    let mut steps = vec![Step::Delay(Duration::from_millis(500))];
    steps.extend(ok("", asked.target.repeat(50).as_bytes()));
    steps
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_for_a_cold_key_cost_one_request_and_get_their_own_keys_body() {
    let backend = Backend::start(slow).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let mut clients = JoinSet::new();
    for number in 0..1000 {
        let (address, target) = (sluice.address, if number % 100 == 7 { format!("/other/{number}") } else { "/cold".to_owned() });
        clients.spawn(async move { (get(address, &target, &[]).await, target) });
    }
    while let Some(done) = clients.join_next().await {
        let (answer, target) = done.unwrap();
        assert_eq!((answer.status, answer.whole), (200, true));
        assert_eq!(answer.text(), target.repeat(50), "another key's body");
    }
    assert_eq!(backend.count_of("/cold"), 1);
    assert_eq!(backend.count(), 11);
    assert!(sluice.metric("collapsed_total", &[]).await > 900.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_client_may_leave_at_once() {
    let backend = Backend::start(slow).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let mut first = Connection::open(sluice.address).await;
    first.send(b"GET /cold HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until("the fetch began", || async { backend.count() == 1 }).await;
    drop(first);
    let mut clients = JoinSet::new();
    for _ in 0..100 {
        let address = sluice.address;
        clients.spawn(async move { get(address, "/cold", &[]).await });
    }
    while let Some(answer) = clients.join_next().await {
        assert_eq!(answer.unwrap().text(), "/cold".repeat(50));
    }
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_alone_still_fills_the_cache() {
    let backend = Backend::start(slow).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let mut only = Connection::open(sluice.address).await;
    only.send(b"GET /cold HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until("the fetch began", || async { backend.count() == 1 }).await;
    drop(only);
    until("the entry is stored", || async { sluice.metric("memory_entries", &[]).await > 0.0 }).await;
    assert!(sluice.get("/cold").await.cache_status().contains("hit"));
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_bytes_are_not_held_back() {
    let backend =
        Backend::start(|_| vec![Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\nfirst".to_vec()), Step::Hang]).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    for _ in 0..2 {
        // Both the one who fetches and the one who follows are sent what there is.
        let mut client = Connection::open(sluice.address).await;
        client.send(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut first = [0; 5];
        tokio::io::AsyncReadExt::read_exact(&mut client.0, &mut first).await.unwrap();
        assert_eq!(&first, b"first");
    }
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn uncacheable_answers_are_not_shared_and_do_not_queue() {
    let backend = Backend::start(|asked| {
        let mut steps = vec![Step::Delay(Duration::from_millis(100))];
        let id = asked.field("x-request-id").unwrap_or("").to_owned();
        steps.extend(ok("Cache-Control: private\r\n", id.as_bytes()));
        steps
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let mut clients = JoinSet::new();
    for number in 0..50 {
        let address = sluice.address;
        clients.spawn(async move { (number, get(address, "/mine", &[("X-Request-Id", &format!("client-{number}"))]).await) });
    }
    while let Some(done) = clients.join_next().await {
        let (number, answer) = done.unwrap();
        assert_eq!(answer.text(), format!("client-{number}"), "a private answer went to another client");
    }
    assert_eq!(backend.count(), 50);
    assert!(sluice.get("/mine").await.cache_status().contains("fwd=bypass; detail=uncacheable"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_page_for_one_client_does_not_keep_the_next_answer_out_of_the_cache() {
    let asked = AtomicUsize::new(0);
    let backend = Backend::start(move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0 => reply("503 Busy", "Cache-Control: no-store\r\n", b"no"),
        1 => reply("500 Oops", "Set-Cookie: a=b\r\n", b"no"),
        _ => ok("", b"fine"),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    assert_eq!((sluice.get("/x").await.status, sluice.get("/x").await.status), (503, 500));
    let answer = sluice.get("/x").await;
    assert!(answer.status == 200 && answer.cache_status().contains("stored"), "{}", answer.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_passed_as_uncacheable_is_fetched_again_once_an_answer_may_be_stored() {
    let asked = AtomicUsize::new(0);
    let backend = Backend::start(move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0 | 1 => ok("Set-Cookie: a=b\r\n", b"mine"),
        _ => ok("", b"for all"),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    sluice.get("/x").await;
    for _ in 0..2 {
        assert!(sluice.get("/x").await.cache_status().contains("detail=uncacheable"));
    }
    let answer = sluice.get("/x").await;
    assert!(answer.text() == "for all" && answer.cache_status().contains("stored"), "{}", answer.cache_status());
    assert!(sluice.get("/x").await.cache_status().contains("hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_wait_too_long_go_by_themselves() {
    let backend = Backend::start(|asked| if asked.field("x-slow").is_some() { vec![Step::Hang] } else { ok("", b"quick") }).await;
    let sluice =
        Sluice::ruled(backend.address, "", &format!("[limits]\nwait_timeout='200ms'\n{}", one_rule("ttl='1h'\nrequest_headers='all'")))
            .await;
    let mut first = Connection::open(sluice.address).await;
    first.send(b"GET /x HTTP/1.1\r\nHost: h\r\nX-Slow: 1\r\n\r\n").await;
    until("the fetch began", || async { backend.count() == 1 }).await;
    let impatient = sluice.get("/x").await;
    assert_eq!(impatient.text(), "quick");
    assert!(impatient.cache_status().contains("waited-too-long"), "{}", impatient.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_so_many_may_wait() {
    let backend = Backend::start(|_| vec![Step::Hang]).await;
    let sluice = Sluice::ruled(backend.address, "", &format!("[limits]\nwaiters=1\n{}", one_rule("ttl='1h'"))).await;
    let mut first = Connection::open(sluice.address).await;
    first.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until("the fetch began", || async { backend.count() == 1 }).await;
    let refused = sluice.get("/x").await;
    assert_eq!((refused.status, refused.field("retry-after")), (503, Some("1")));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_misses_just_before_a_fetch_ends_begins_no_other() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let address = sluice.address;
        clients.spawn(async move {
            for number in 0..400 {
                let target = format!("/{number}");
                assert_eq!(get(address, &target, &[]).await.text(), target);
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    assert_eq!(backend.count(), 400);
}
