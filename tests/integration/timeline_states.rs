//! What operators see of the timeline: how a symbol stands, and why requests about it are left to the backend.

use sluice::clock::Wall;

use super::timeline_load::configured;
use crate::support::{Answer, Service, Sluice, get, until};

const DAY: i64 = 86_400_000;
const LIST: &str = "/api/liquidation-orders?symbol=BTCUSDT&limit=5";

fn now() -> i64 {
    i64::try_from(Wall::now().as_millis()).unwrap()
}

/// An order an hour for six days, the last one a minute ago.
fn orders() -> Vec<String> {
    let last = now() - 60_000;
    (0..144).map(|hour| format!("BTCUSDT,buy,LIMIT,IOC,1.5,98000.5,98000.5,FILLED,1.5,1.5,{}", last - hour * 3_600_000)).collect()
}

fn is_computed(answer: &Answer) -> bool {
    answer.cache_status().ends_with("detail=timeline")
}

async fn explained(sluice: &Sluice, target: &str) -> String {
    get(sluice.admin, &format!("/explain?target={}", target.replace('&', "%26")), &[]).await.text()
}

async fn stats(sluice: &Sluice, query: &str) -> serde_json::Value {
    serde_json::from_slice(&get(sluice.admin, &format!("/stats{query}"), &[]).await.body).unwrap()
}

async fn left(sluice: &Sluice, reason: &str) -> f64 {
    sluice.metric("timeline_unanswered_total", &[&format!("reason=\"{reason}\"")]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn why_a_request_is_left_to_the_backend_is_counted_and_explained() {
    let service = Service::start(orders()).await;
    let text = configured(&[("refresh = \"5s\"", "refresh = \"200ms\""), ("probation = 20", "probation = 3")]);
    let url = format!("http://{}", service.backend.address);
    let sluice = Sluice::with(&text, &[("BACKEND_URL", &url), ("REDIS_URL", "")]);
    assert_eq!(left(&sluice, "no_room").await, 0.0, "each reason is there from the start");
    assert_eq!(get(sluice.admin, "/stats?symbol=BTCUSDT", &[]).await.status, 404);
    sluice.get(LIST).await;
    assert_eq!(left(&sluice, "probation").await, 1.0);
    assert!(explained(&sluice, LIST).await.contains("on probation: "), "{}", explained(&sluice, LIST).await);
    until("the timeline answers", || async { is_computed(&sluice.get(LIST).await) }).await;
    sluice.get("/api/liquidation-orders?symbol=NOPE&limit=5").await;
    sluice.get("/api/liquidation-orders?symbol=BTCUSDT&limit=5000").await;
    for reason in ["unknown_symbol", "shape"] {
        assert_eq!(left(&sluice, reason).await, 1.0, "{reason}");
    }
    let explained = explained(&sluice, "/api/liquidation-orders?symbol=NOPE&limit=5").await;
    assert!(explained.contains("left to the backend now: nothing is known of the symbol yet"), "{explained}");
    let told = &stats(&sluice, "").await["timeline"];
    assert_eq!((&told["left_to_backend"]["shape"], told["worst"].as_array().unwrap().len()), (&1.into(), 0), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn how_a_symbol_stands_is_told_in_words() {
    let mut service = Service::start(orders()).await;
    let text = configured(&[
        ("refresh = \"5s\"", "refresh = \"200ms\""),
        ("probation = 20", "probation = 3"),
        ("stale_if_error = \"24h\"", "stale_if_error = \"1s\""),
    ]);
    let url = format!("http://{}", service.backend.address);
    let sluice = Sluice::with(&text, &[("BACKEND_URL", &url), ("REDIS_URL", "")]);
    until("the list is computed", || async { is_computed(&sluice.get(LIST).await) }).await;
    let (start, end) = (now() - 3 * DAY, now());
    let window = format!("/api/liquidations?symbol=BTCUSDT&timeframe=1h&start_timestamp={start}&end_timestamp={end}");
    until("the window is computed", || async { is_computed(&sluice.get(&window).await) }).await;
    let told = stats(&sluice, "?symbol=btcusdt").await;
    assert_eq!(
        (&told["symbol"], &told["quarantine"], &told["newest"]["failures"]),
        (&"BTCUSDT".into(), &serde_json::Value::Null, &0.into())
    );
    assert!(told["newest_order_age"].as_f64().unwrap() >= 60.0 && told["newest_order"].as_str().unwrap().len() > 15, "{told}");
    assert!(told["spans"]["known"].as_u64().unwrap() >= 3 && told["verified_ago"].is_number(), "{told}");
    let text = explained(&sluice, &window).await;
    for part in ["newest order 2", " s old; ", "spans: ", " known", "compared with the backend's answers ", "asked for "] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // The service fails.
    service.backend.kill().await;
    until("it is among the worst", || async {
        sluice.get(LIST).await;
        let told = &stats(&sluice, "").await["timeline"];
        let worst = told["worst"].as_array().unwrap();
        worst.iter().any(|symbol| symbol["symbol"] == "BTCUSDT" && symbol["newest"]["failures"].as_u64().unwrap() > 0)
    })
    .await;
    until("its requests are left to the backend", || async {
        sluice.get(LIST).await;
        left(&sluice, "newest_failing").await > 0.0
    })
    .await;
    let text = explained(&sluice, LIST).await;
    assert!(text.contains("questions in a row failed") && text.contains("(newest_failing)"), "{text}");
    service.backend.revive().await;
    until("nothing is wrong any more", || async {
        sluice.get(LIST).await;
        stats(&sluice, "").await["timeline"]["worst"].as_array().unwrap().is_empty()
    })
    .await;
}
