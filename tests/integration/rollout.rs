//! Rolling a rule out: in shadow first, then for a share of clients, then for all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Backend, Connection, Sluice, TOKEN, get, ok, until};

fn rule(backend: &Backend, lines: &str) -> String {
    format!(
        "trusted_proxies=['127.0.0.0/8']\n[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n[[route]]\nname='r'\npath='/*'\nttl='1h'\n{lines}\n",
        backend.address
    )
}

async fn compared(sluice: &Sluice, result: &str) -> f64 {
    sluice.metric("shadow_answers_total", &["route=\"r\"", &format!("result=\"{result}\"")]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn in_shadow_everything_comes_from_the_backend_and_one_byte_of_a_thousand_answers_is_found() {
    let lies = Arc::new(AtomicBool::new(false));
    let lying = Arc::clone(&lies);
    let backend = Backend::start(move |asked| {
        let mut body = format!("{{\"target\":\"{}\",\"rest\":\"{}\"}}", asked.target, "x".repeat(3000));
        if lying.load(Ordering::Acquire) && asked.target == "/777" {
            body.replace_range(2000..2001, "y");
        }
        ok("Content-Type: application/json\r\nX-Version: 1\r\n", body.as_bytes())
    })
    .await;
    let sluice = Sluice::with(&rule(&backend, "shadow=true"), &[]);
    let mut open = Connection::open(sluice.address).await;
    for number in 0..1000 {
        let answer = open.ask("GET", &format!("/{number}"), &[], b"").await;
        assert_eq!((answer.status, answer.cache_status()), (200, "sluice; fwd=bypass; detail=shadow"));
    }
    until("the cache is filled", || async { sluice.metric("memory_entries", &[]).await >= 1000.0 }).await;
    assert_eq!(compared(&sluice, "not_stored").await, 1000.0);
    let before = backend.count();
    lies.store(true, Ordering::Release);
    for number in 0..1000 {
        let fields: &[(&str, &str)] = if number % 2 == 0 { &[("Accept-Encoding", "gzip")] } else { &[] };
        open.ask("GET", &format!("/{number}"), fields, b"").await;
    }
    assert_eq!(backend.count() - before, 1000, "each answer is the backend's, and nothing is fetched besides");
    until("all are compared", || async { compared(&sluice, "same").await >= 999.0 }).await;
    assert_eq!((compared(&sluice, "same").await, compared(&sluice, "body").await), (999.0, 1.0));
    until("it is shown", || async { sluice.logged().contains("from byte 2000 on") }).await;
    let logged = sluice.logged();
    let line = logged.lines().find(|line| line.contains("in shadow")).unwrap();
    // Where, and of how many: not what stands there.
    assert!(line.contains("/777") && line.contains("3027 bytes instead of 3027") && !line.contains("yxxx"), "{line}");
    let stats: serde_json::Value = serde_json::from_slice(&get(sluice.admin, "/stats", &[]).await.body).unwrap();
    assert_eq!(stats["routes"]["r"]["shadow"], serde_json::json!({"same": 999, "body": 1, "not_stored": 1000}));
    assert!(get(sluice.admin, "/explain?target=/x", &[]).await.text().contains("(shadow)"));
    sluice.manage("/purge?pattern=nothing*").await;
    assert!(!get(sluice.admin, "/explain?target=/x", &[]).await.text().contains("voided"));
    sluice.manage("/purge?pattern=r&soft=true").await;
    let explained = get(sluice.admin, "/explain?target=/x", &[]).await.text();
    assert!(explained.contains("voided     by pattern r: what was asked for before 20") && explained.contains("is stale"), "{explained}");
    // Trusted now: what is stored serves.
    std::fs::write(&sluice.file, rule(&backend, "")).unwrap();
    assert_eq!(sluice.manage("/reload").await.status, 200);
    let trusted = open.ask("GET", "/1", &[], b"").await;
    assert!(trusted.cache_status().contains("hit") || trusted.cache_status().contains("fwd=stale"), "{}", trusted.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn other_fields_and_statuses_are_found_and_nothing_fails_that_cannot_be_compared() {
    let backend = Backend::start(|asked| match asked.field("x-changed") {
        Some("field") => ok("X-Version: 2\r\n", b"x"),
        Some("status") => crate::support::reply("404 Not Found", "X-Version: 1\r\n", b"x"),
        Some("cut") => vec![
            crate::support::Step::Send(b"HTTP/1.1 200 OK\r\nX-Version: 1\r\nContent-Length: 9\r\n\r\nx".to_vec()),
            crate::support::Step::Close,
        ],
        _ => ok("X-Version: 1\r\n", b"x"),
    })
    .await;
    let sluice = Sluice::with(&rule(&backend, "shadow=true"), &[]);
    sluice.get("/x").await;
    until("the cache is filled", || async { sluice.metric("memory_entries", &[]).await >= 1.0 }).await;
    for (change, result) in [("field", "fields"), ("status", "status"), ("cut", "not_compared")] {
        // What is cut may break off before its head was sent.
        let mut open = Connection::open(sluice.address).await;
        open.send(format!("GET /x HTTP/1.1\r\nHost: h\r\nX-Changed: {change}\r\n\r\n").as_bytes()).await;
        open.answer(false).await;
        until(result, || async { compared(&sluice, result).await == 1.0 }).await;
    }
    assert_eq!(sluice.get("/x").await.status, 200);
    assert_eq!(compared(&sluice, "same").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenth_of_ten_thousand_clients_are_cached_for_and_the_same_ones_again() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::with(&rule(&backend, "rollout='10%'"), &[]);
    let mut open = Connection::open(sluice.address).await;
    let mut included = Vec::new();
    for round in 0..2 {
        let mut now = Vec::new();
        for number in 0..10_000_u32 {
            let client = std::net::Ipv4Addr::from(0x0a00_0000 + number).to_string();
            let answer = open.ask("GET", "/x", &[("X-Forwarded-For", &client)], b"").await;
            let status = answer.cache_status();
            assert!(status == "sluice; fwd=bypass; detail=rollout" || status.contains("hit") || status.contains("miss"), "{status}");
            if !status.contains("rollout") {
                now.push(number);
            }
        }
        assert!((900..1100).contains(&now.len()), "{}", now.len());
        if round == 0 {
            included = now;
        } else {
            assert_eq!(included, now);
        }
    }
    let client = std::net::Ipv4Addr::from(0x0a00_0000 + included[0]).to_string();
    let explained = get(sluice.admin, "/explain?target=/x", &[("X-Forwarded-For", &client)]).await.text();
    assert!(explained.contains(&format!("rollout    for 10% of clients; {client} is one of them")), "{explained}");
    // All, and back to a tenth.
    for (lines, cached) in [("", true), ("rollout='0%'", false), ("rollout='10%'", true)] {
        std::fs::write(&sluice.file, rule(&backend, lines)).unwrap();
        assert_eq!(sluice.manage("/reload").await.status, 200);
        let answer = open.ask("GET", "/x", &[("X-Forwarded-For", &client)], b"").await;
        assert_eq!(answer.cache_status().contains("hit"), cached, "{lines}");
    }
}
