//! Warming, and refreshing ahead.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::support::{Backend, Connection, Redis, Sluice, TOKEN, get, ok, until};

fn config(backend: &Backend, redis: &str, warm: &str) -> String {
    format!(
        "[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis='{redis}'\n[warm]\n{warm}\n[[route]]\nname='all'\npath='/*'\nttl='1h'\n",
        backend.address
    )
}

async fn state(sluice: &Sluice) -> Value {
    serde_json::from_slice(&get(sluice.admin, "/warm", &[]).await.body).unwrap()
}

async fn warmed(sluice: &Sluice, of: u64) -> Value {
    until("it is warm", || async { state(sluice).await["running"] == false && state(sluice).await["of"] == of }).await;
    state(sluice).await
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_start_the_symbols_of_the_api_are_asked_for_in_every_timeframe() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/api/symbols" => ok("", b"[\"BTC\",\"ETH\"]"),
        target if target.contains("symbol=ETH&timeframe=1h") => crate::support::reply("500 Oh No", "", b""),
        target => ok("", target.as_bytes()),
    })
    .await;
    let warm = "at_start=true\ntargets=['/a','/a']\ntemplates=['/l?symbol={symbol}&timeframe={timeframe}']\ntimeframes=['1m','1h']";
    // Limits and rollouts are about clients.
    let text = config(&backend, "", warm) + "rollout='0%'\n[[limit]]\nname='all'\nrate='1/h'\n";
    let sluice = Sluice::with(&text, &[]);
    assert_eq!(warmed(&sluice, 5).await, serde_json::json!({"running": false, "done": 5, "of": 5, "failed": 1}));
    let before = backend.count();
    assert_eq!(before, 6);
    std::fs::write(&sluice.file, config(&backend, "", warm)).unwrap();
    assert_eq!(sluice.manage("/reload").await.status, 200);
    for target in ["/a", "/api/symbols", "/l?symbol=BTC&timeframe=1m", "/l?symbol=ETH&timeframe=1m"] {
        assert!(sluice.get(target).await.cache_status().contains("hit"), "{target}");
    }
    assert_eq!(backend.count(), before);
    // On demand again: what is there costs the backend nothing.
    assert!(sluice.manage("/warm").await.text().starts_with("{\"warming\":"));
    warmed(&sluice, 5).await;
    assert_eq!(backend.count(), before + 1, "the one that failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_backend_gets_rest_and_never_more_than_so_many_requests() {
    let backend = Backend::slow(Duration::from_millis(50)).await;
    let targets: Vec<String> = (0..12).map(|number| format!("'/{number}'")).collect();
    let sluice = Sluice::with(&config(&backend, "", &format!("concurrency=2\ntargets=[{}]", targets.join(","))), &[]);
    let began = Instant::now();
    assert_eq!(sluice.manage("/warm").await.text(), "{\"warming\":12}");
    // A second run does not begin beside the first one.
    assert_eq!(sluice.manage("/warm").await.text(), "{\"warming\":12}");
    warmed(&sluice, 12).await;
    assert_eq!(backend.count(), 12);
    // Six rounds of 50 ms each, with as much rest in between.
    assert!(began.elapsed() > Duration::from_millis(500), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_most_before_is_asked_for_after_a_start() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let redis = Redis::start(&[]).await;
    redis.command(&[b"ZADD", b"sluice!hottest", b"7", b"/hot?a=1", b"9", b"/hotter", b"1", b"/cold", b"100", b"no path"]).await;
    let sluice = Sluice::with(&config(&backend, &redis.url(), "at_start=true\nhottest=3"), &[]);
    warmed(&sluice, 2).await;
    let before = backend.count();
    for (target, hit) in [("/hot?a=1", true), ("/hotter", true), ("/cold", false)] {
        assert_eq!(sluice.get(target).await.cache_status().contains("hit"), hit, "{target}");
    }
    assert_eq!(backend.count(), before + 1);
    // What this one is asked for is counted.
    let mut open = Connection::open(sluice.address).await;
    for _ in 0..500 {
        open.ask("GET", "/busy", &[], b"").await;
    }
    until("it is written", || async {
        let score = redis.command(&[b"ZSCORE", b"sluice!hottest", b"/busy"]).await;
        score.starts_with(b"$1")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_often_is_refreshed_before_it_is_stale() {
    let backend = Backend::slow(Duration::from_millis(300)).await;
    let text = config(&backend, "", "").replace("ttl='1h'", "ttl='3s'");
    let sluice = Sluice::with(&text, &[]);
    let mut open = Connection::open(sluice.address).await;
    open.ask("GET", "/busy", &[], b"").await;
    open.ask("GET", "/idle", &[], b"").await;
    // Nobody waits for as long as it is asked for often.
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        let answer = open.ask("GET", "/busy", &[], b"").await;
        assert!(answer.cache_status().contains("hit"), "{}", answer.cache_status());
    }
    assert!(sluice.metric("early_refreshes_total", &["route=\"all\""]).await >= 2.0);
    let asked = backend.count_of("/busy");
    assert!((3..=8).contains(&asked), "{asked}");
    assert_eq!(backend.count_of("/idle"), 1);
}
