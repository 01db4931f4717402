//! The admin listener, and what an operator sees.

use crate::support::{Backend, Connection, Sluice, TOKEN, get, ok, one_rule, until};

const RULES: &str = "[[route]]\nname='symbols'\npath='/s'\nttl='1h'\nkey='symbols:all'\n[[route]]\nname='liq'\npath='/l'\nttl='1h'\nstale_while_revalidate='1h'\nkey='liq:{symbol}:{tf}'\nfold_case=['symbol']\ntags=['symbol:{symbol}']\n[warm]\ntargets=['/s','/l?symbol=BTC']\n";

async fn filled() -> (Backend, Sluice) {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for target in ["/s", "/l?symbol=BTC&tf=1m", "/l?symbol=btc&tf=1h", "/l?symbol=ETH&tf=1m"] {
        sluice.get(target).await;
        assert!(sluice.get(target).await.cache_status().contains("hit"));
    }
    (backend, sluice)
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_take_what_they_name() {
    let (_backend, sluice) = filled().await;
    assert_eq!(sluice.manage("/purge?symbol=Btc").await.text(), "{\"purged\":2}");
    assert!(sluice.get("/l?symbol=BTC&tf=1m").await.cache_status().contains("uri-miss"));
    assert!(sluice.get("/l?symbol=ETH&tf=1m").await.cache_status().contains("hit"));
    assert_eq!(sluice.manage("/purge?pattern=liq:ETH:*&soft=true").await.text(), "{\"purged\":1}");
    assert!(sluice.get("/l?symbol=ETH&tf=1m").await.cache_status().contains("stale-while-revalidate"));
    assert_eq!(sluice.manage("/purge?pattern=*").await.status, 200);
    assert_eq!(sluice.metric("memory_entries", &[]).await, 0.0);
    assert_eq!(sluice.manage("/purge").await.status, 400);
    assert_eq!(sluice.manage("/purge?pattern=a&tag=b").await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn management_needs_the_token() {
    let (backend, sluice) = filled().await;
    for fields in [&[][..], &[("Authorization", "Bearer wrong")], &[("Authorization", TOKEN)]] {
        let refused = Connection::open(sluice.admin).await.ask("POST", "/purge?pattern=*", fields, b"").await;
        assert_eq!((refused.status, refused.field("www-authenticate")), (401, Some("Bearer")));
    }
    assert!(sluice.get("/s").await.cache_status().contains("hit"));
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let open = Sluice::with(&text, &[]);
    let refused = Connection::open(open.admin).await.ask("POST", "/purge?pattern=*", &[("Authorization", "Bearer ")], b"").await;
    assert_eq!(refused.status, 403);
    assert_eq!(get(open.admin, "/purge", &[]).await.status, 405);
    assert_eq!(get(open.admin, "/nope", &[]).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_metrics_and_explanations() {
    let (_backend, sluice) = filled().await;
    let stats: serde_json::Value = serde_json::from_str(&get(sluice.admin, "/stats", &[]).await.text()).unwrap();
    assert_eq!((&stats["total"]["hits"], &stats["total"]["misses"], &stats["total"]["hit_ratio"]), (&4.into(), &4.into(), &0.5.into()));
    assert_eq!(stats["routes"]["liq"]["misses"], 3);
    assert_eq!((&stats["tiers"][0]["entries"], &stats["breakers"]["backend"]), (&4.into(), &"closed".into()));
    assert_eq!(stats["keys"]["liq"], 3);
    for (name, labels) in [
        ("requests_total", &["route=\"liq\"", "outcome=\"hit\"", "status=\"200\""][..]),
        ("request_seconds_count", &["route=\"symbols\"", "outcome=\"miss\""]),
        ("backend_requests_total", &["route=\"liq\"", "status=\"200\""]),
        ("backend_seconds_count", &["route=\"symbols\""]),
        ("memory_entries", &[]),
        ("memory_bytes", &[]),
        ("build_info", &["version=\""]),
    ] {
        assert!(sluice.metric(name, labels).await > 0.0, "{name}");
    }
    let explained = get(sluice.admin, "/explain?target=/l%3Fsymbol=btc%26tf=1m", &[]).await.text();
    for part in ["rule       liq", "key        liq:BTC:1m", "fresh      1h", "tags       symbol:BTC"] {
        assert!(explained.contains(part), "{explained}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn warming_asks_as_a_client_would() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    assert_eq!(sluice.manage("/warm").await.text(), "{\"warming\":2}");
    until("both are warm", || async { sluice.metric("memory_entries", &[]).await == 2.0 }).await;
    assert!(sluice.get("/s").await.cache_status().contains("hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_readiness_follow_the_backend() {
    let health = br#"{"status":"healthy","components":{"database":{"status":"healthy","message":"Database connection successful"}}}"#;
    let mut backend = Backend::start(|asked| if asked.target == "/health" { ok("", health) } else { ok("", b"x") }).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    assert_eq!(get(sluice.admin, "/livez", &[]).await.status, 200);
    assert_eq!(get(sluice.admin, "/readyz", &[]).await.status, 200);
    let page = sluice.get("/health").await;
    assert_eq!(page.status, 200);
    let page: serde_json::Value = serde_json::from_str(&page.text()).unwrap();
    assert_eq!((&page["status"], &page["components"]["redis"]["status"]), (&"healthy".into(), &"degraded".into()));
    assert_eq!(page["timestamp"].as_str().unwrap().len(), "2026-11-22T17:55:25.897829+00:00".len());
    backend.kill().await;
    until("health says so", || async { sluice.get("/health").await.status == 503 }).await;
    until("neither the backend nor the empty cache can answer", || async {
        sluice.get("/x").await;
        get(sluice.admin, "/readyz", &[]).await.status == 503
    })
    .await;
    assert_eq!(get(sluice.admin, "/livez", &[]).await.status, 200);
    backend.revive().await;
    until("ready again", || async {
        sluice.get("/x").await;
        get(sluice.admin, "/readyz", &[]).await.status == 200
    })
    .await;
}
