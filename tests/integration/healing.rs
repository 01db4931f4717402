//! The timeline's orders go wrong: late orders, wrong values in Redis, a service that lies. Checks find it, and it heals.
//!
//! `SLUICE_SECONDS=60 tests/run healing` lets orders arrive for longer.

use std::time::Duration;

use crate::support::{MariaDb, Redis, Service, Sluice, number, until};
use crate::timeline::{
    DAY, QUICK, SYMBOLS, database, day, direct, in_redis, insert, is_computed, know, now, orders, proxy, row, state, warm, window,
};

const CHECKED: (&str, &str) = ("verify = 0.001", "verify = 1.0");
const UNCHECKED: (&str, &str) = ("verify = 0.001", "verify = 0.0");

/// A window that is over, with the time of an order in the middle of it.
fn closed(symbol: &str, timeframe: &str) -> (String, i64) {
    let middle = (now() - 3 * DAY).div_euclid(DAY) * DAY + DAY / 2;
    (window(symbol, timeframe, middle - DAY / 4, middle + DAY / 4), middle)
}

fn page(symbol: &str, middle: i64) -> String {
    format!(
        "/api/liquidation-orders?symbol={symbol}&start_timestamp={}&end_timestamp={}&page_size=1000",
        middle - 500_000,
        middle + 500_000
    )
}

async fn quarantined(sluice: &Sluice) -> f64 {
    sluice.metric("timeline_quarantined", &[]).await
}

async fn is_on(sluice: &Sluice) -> bool {
    state(sluice, "liquidations").await == "on" && state(sluice, "liquidation-orders").await == "on"
}

/// Asks until the timeline itself says what the service says.
async fn heals(sluice: &Sluice, service: &Service, target: &str) {
    until(&format!("the timeline says what the service says to {target}"), || async {
        let (ours, theirs) = (sluice.get(target).await, direct(service, target).await);
        is_computed(&ours) && ours.text() == theirs.text()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_order_heals_for_all_endpoints_and_drops_nothing_of_others() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[CHECKED]).await;
    know(&sluice).await;
    for symbol in SYMBOLS {
        warm(&sluice, &closed(symbol, "1h").0).await;
    }
    let (sums, middle) = closed("BTCUSDT", "1h");
    let page = page("BTCUSDT", middle);
    warm(&sluice, &page).await;
    let healed = async || sluice.metric("timeline_healed_total", &[]).await;
    // Of a span that is over, and of the newest part, which is not asked for again so far back.
    let mut random = fastrand::Rng::with_seed(4);
    for (time, targets) in [(middle, [&sums, &page]), (now() - 400_000, [&day("1h"), &day("5m")])] {
        let (before, asked) = (healed().await, service.backend.count());
        service.add(row(&mut random, "BTCUSDT", time));
        for target in targets {
            heals(&sluice, &service, target).await;
        }
        until("it is told", || async { healed().await > before }).await;
        let others = SYMBOLS[1..]
            .iter()
            .map(|symbol| service.asked(asked, &format!("/api/liquidation-orders/stream?symbol={}", symbol.to_ascii_uppercase())));
        // Their newest parts are asked for, at most, and nobody asks for them.
        assert!(others.sum::<usize>() <= 4, "others were fetched anew");
    }
    assert!(is_on(&sluice).await && quarantined(&sluice).await == 0.0);
    assert!(sluice.logged().contains("the symbol's orders were fetched anew and are the backend's"), "{}", sluice.logged());
    assert_eq!(sluice.get(&page).await.text(), direct(&service, &page).await.text());
}

/// All sums by the hour about a symbol are larger than they are. Those by the day, which fetches are compared with, are right.
fn lie_about(service: &Service, symbol: &'static str) {
    service.lie(move |target, body| {
        let text = String::from_utf8(body).unwrap();
        match target.starts_with("/api/liquidations") && target.contains(&format!("symbol={symbol}")) && target.contains("timeframe=1h") {
            true => text.replace("\"cumulated_usd_size\":", "\"cumulated_usd_size\":1").into_bytes(),
            false => text.into_bytes(),
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_lies_about_one_symbol_is_left_to_answer_for_it_until_it_is_right_again() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[CHECKED]).await;
    know(&sluice).await;
    lie_about(&service, "BTCUSDT");
    let (sums, middle) = closed("BTCUSDT", "1h");
    until("it is in quarantine", || async {
        sluice.get(&sums).await;
        sluice.logged().contains("it is in quarantine")
    })
    .await;
    assert_eq!(quarantined(&sluice).await, 1.0);
    for target in [&sums, &day("1h"), &page("BTCUSDT", middle)] {
        let answer = sluice.get(target).await;
        assert!(!is_computed(&answer) && answer.text() == direct(&service, target).await.text(), "{target}");
    }
    // Others and endpoints stay on.
    warm(&sluice, &closed("ETHUSDT", "1h").0).await;
    assert!(is_on(&sluice).await);
    let explained = crate::support::get(sluice.admin, &format!("/explain?target={}", sums.replace('&', "%26")), &[]).await.text();
    assert!(explained.contains("in quarantine for "), "{explained}");
    service.lie(|_, body| body);
    heals(&sluice, &service, &sums).await;
    heals(&sluice, &service, &page("BTCUSDT", middle)).await;
    until("nothing is in quarantine", || async { quarantined(&sluice).await == 0.0 }).await;
    assert!(sluice.logged().contains("the symbol's quarantine is over"), "{}", sluice.logged());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_lies_about_all_symbols_turns_one_endpoint_off_until_it_is_right_again() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[CHECKED]).await;
    know(&sluice).await;
    lie_about(&service, "");
    until("the endpoint is off", || async {
        for symbol in SYMBOLS {
            sluice.get(&closed(symbol, "1h").0).await;
        }
        state(&sluice, "liquidations").await == "off"
    })
    .await;
    assert_eq!(state(&sluice, "liquidation-orders").await, "on", "each endpoint is judged by itself");
    assert_eq!(sluice.metric("timeline_on", &["\"liquidations\""]).await, 0.0);
    service.lie(|_, body| body);
    until("it is on, and all symbols are", || async {
        for symbol in SYMBOLS {
            sluice.get(&closed(symbol, "1h").0).await;
            sluice.get(&page(symbol, closed(symbol, "1h").1)).await;
        }
        is_on(&sluice).await && quarantined(&sluice).await == 0.0
    })
    .await;
    heals(&sluice, &service, &closed("BTCUSDT", "1h").0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_span_in_redis_is_found_once_and_used_by_nobody_after() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let redis = Redis::start(&[]).await;
    let (sums, middle) = closed("BTCUSDT", "1h");
    let first = proxy(&service, &redis.url(), &[UNCHECKED]).await;
    know(&first).await;
    warm(&first, &sums).await;
    let spans = first.metric("timeline_spans", &[]).await;
    until("all spans are written", || async { in_redis(&redis, "").await as f64 >= spans }).await;
    drop(first);
    service.add(row(&mut fastrand::Rng::with_seed(4), "BTCUSDT", middle));
    let second = proxy(&service, &redis.url(), &[CHECKED]).await;
    know(&second).await;
    heals(&second, &service, &sums).await;
    assert!(second.metric("timeline_checks_total", &["different"]).await >= 1.0, "the wrong span was there");
    until("it is written anew", || async { in_redis(&redis, "").await as f64 >= spans }).await;
    drop(second);
    let third = proxy(&service, &redis.url(), &[CHECKED]).await;
    know(&third).await;
    warm(&third, &sums).await;
    assert_eq!(third.get(&sums).await.text(), direct(&service, &sums).await.text());
    assert_eq!(third.metric("timeline_checks_total", &["different"]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_instance_finds_wrong_no_other_goes_on_using() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let redis = Redis::start(&[]).await;
    let (checks, relies) = (proxy(&service, &redis.url(), &[CHECKED]).await, proxy(&service, &redis.url(), &[UNCHECKED]).await);
    let (sums, middle) = closed("BTCUSDT", "1h");
    for sluice in [&checks, &relies] {
        know(sluice).await;
        warm(sluice, &sums).await;
        warm(sluice, &page("BTCUSDT", middle)).await;
    }
    let mut random = fastrand::Rng::with_seed(4);
    for time in [middle, now() - 400_000] {
        service.add(row(&mut random, "BTCUSDT", time));
    }
    heals(&checks, &service, &sums).await;
    heals(&checks, &service, &day("1h")).await;
    for target in [&sums, &page("BTCUSDT", middle), &day("1h")] {
        heals(&relies, &service, target).await;
    }
}

/// The timeline over the database, with these changes, and a program without rules.
fn pair(database: &MariaDb, verify: (&'static str, &'static str)) -> (Sluice, Sluice) {
    (database.sluice(&[QUICK[0], QUICK[1], verify]), database.uncached(&[], &[]))
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_come_late_or_go_are_found_in_the_database_and_heal() {
    let database = database(&orders(6000, now() - 1000, 12)).await;
    let (sluice, reference) = pair(&database, CHECKED);
    know(&sluice).await;
    let (sums, middle) = closed("BTCUSDT", "1h");
    let page = page("BTCUSDT", middle);
    for target in [&sums, &page] {
        warm(&sluice, target).await;
    }
    let heals = async |target: &str| {
        until(&format!("the timeline says what the database says to {target}"), || async {
            let (ours, theirs) = (sluice.get(target).await, reference.get(target).await);
            is_computed(&ours) && ours.text() == theirs.text()
        })
        .await;
    };
    let mut random = fastrand::Rng::with_seed(4);
    let recent = now() - 400_000;
    for (time, targets) in [(middle, [&sums, &page]), (recent, [&day("1h"), &day("5m")])] {
        insert(&database, &[row(&mut random, "BTCUSDT", time)]).await;
        for target in targets {
            heals(target).await;
        }
        database.run(&format!("DELETE FROM api.binance_liqs WHERE order_trade_time = {time}")).await;
        for target in targets {
            heals(target).await;
        }
    }
    assert!(sluice.metric("timeline_healed_total", &[]).await >= 4.0);
    assert!(sluice.metric("timeline_checks_total", &["\"sums\"", "different"]).await >= 4.0);
    assert!(is_on(&sluice).await && quarantined(&sluice).await == 0.0);
}

/// Orders arrive, and everything is asked for and checked: nothing differs.
async fn checked_while_orders_arrive(sluice: &Sluice, checks: &str, arrive: impl AsyncFn(String)) {
    let mut random = fastrand::Rng::with_seed(5);
    let until = tokio::time::Instant::now() + Duration::from_secs(number("SLUICE_SECONDS", 8));
    let mut asked = tokio::time::interval(Duration::from_millis(300));
    while tokio::time::Instant::now() < until {
        asked.tick().await;
        let time = now() - random.i64(0..100);
        arrive(row(&mut random, "BTCUSDT", time)).await;
        let list = format!("/api/liquidation-orders?symbol=BTCUSDT&limit={}", random.u32(1..200));
        for target in [&day("1m"), &list, &closed("BTCUSDT", "5m").0] {
            assert_eq!(sluice.get(target).await.status, 200);
        }
        assert!(is_on(sluice).await && quarantined(sluice).await == 0.0, "{}", sluice.logged());
    }
    assert_eq!(sluice.metric("timeline_checks_total", &["different"]).await, 0.0, "{}", sluice.logged());
    assert!(sluice.metric("timeline_checks_total", &[checks, "equal"]).await >= 5.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_checked_while_orders_arrive_and_none_differs() {
    let service = Service::start(orders(2000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[CHECKED]).await;
    know(&sluice).await;
    checked_while_orders_arrive(&sluice, "liquidation", async |row| service.add(row)).await;
    let database = database(&orders(2000, now() - 1000, 6)).await;
    let (native, _) = pair(&database, CHECKED);
    know(&native).await;
    checked_while_orders_arrive(&native, "\"sums\"", async |row| insert(&database, &[row]).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_purges_of_others_drop_nothing() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[UNCHECKED]).await;
    know(&sluice).await;
    let (sums, _) = closed("BTCUSDT", "1h");
    warm(&sluice, &sums).await;
    let fetched = async || sluice.metric("timeline_fetches_total", &["spans"]).await;
    let before = fetched().await;
    for number in 0..600 {
        assert_eq!(sluice.manage(&format!("/purge?symbol=OTHER{number}")).await.status, 200);
    }
    let answer = sluice.get(&sums).await;
    assert_eq!((is_computed(&answer), fetched().await), (true, before), "{:?}", answer.field("cache-status"));
}
