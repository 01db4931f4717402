//! Responses without an end are for the one client that asked: never shared, stored or replayed.

use tokio::io::AsyncReadExt;

use crate::support::{Backend, Connection, Sluice, Step, get, ok, one_rule, until};

fn stream(kind: &str) -> Vec<Step> {
    let head = format!("HTTP/1.1 200 OK\r\n{kind}\r\nTransfer-Encoding: chunked\r\n\r\n");
    // Events follow one another for as long as somebody listens; writing to nobody fails after a while.
    let mut steps = vec![Step::Send(head.into_bytes())];
    for number in 0..10_000 {
        let event = format!("data: {number:05}\n\n");
        steps.push(Step::Send(format!("{:x}\r\n{event}\r\n", event.len()).into_bytes()));
        steps.push(Step::Delay(std::time::Duration::from_millis(10)));
    }
    steps
}

async fn listen(sluice: &Sluice, fields: &str) -> Connection {
    let mut client = Connection::open(sluice.address).await;
    client.send(format!("GET /events HTTP/1.1\r\nHost: h\r\n{fields}\r\n").as_bytes()).await;
    let head = client.head().await.unwrap();
    assert_eq!(head.status, 200);
    assert!(!head.cache_status().contains("collapsed") && !head.cache_status().contains("stored"), "{}", head.cache_status());
    let mut first = [0; 4];
    client.0.read_exact(&mut first).await.unwrap();
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_has_its_own_stream_which_ends_with_it() {
    for kind in [
        "Content-Type: text/event-stream",
        "Content-Type: application/x-ndjson; charset=utf-8",
        "Content-Type: application/jsonl",
        "Content-Type: multipart/x-mixed-replace; boundary=b",
        "Content-Type: text/plain\r\nX-Accel-Buffering: no",
        "Content-Type: text/event-stream\r\nCache-Control: max-age=600",
    ] {
        for rule in ["ttl='1h'", "ttl='1h'\nrequest_headers='all'"] {
            let backend = Backend::start(move |_| stream(kind)).await;
            let sluice = Sluice::ruled(backend.address, "", &one_rule(rule)).await;
            for fields in ["", "Accept: text/event-stream\r\n"] {
                let before = backend.count();
                let clients = [listen(&sluice, fields).await, listen(&sluice, fields).await, listen(&sluice, fields).await];
                assert_eq!(backend.count() - before, 3, "{kind} {rule} {fields}");
                assert!(backend.answering() >= 3);
                drop(clients);
                until("the backend's connections end with the clients'", || async { backend.answering() == 0 }).await;
            }
            assert_eq!(sluice.metric("memory_entries", &[]).await, 0.0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_known_length_is_stored() {
    let backend = Backend::start(|_| ok("Content-Type: application/x-ndjson\r\n", b"{}\n{}\n")).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    get(sluice.address, "/export", &[]).await;
    assert!(get(sluice.address, "/export", &[]).await.cache_status().contains("hit"));
    assert_eq!(backend.count(), 1);
}
