//! Windows, pages and lists of the newest, computed from orders kept in spans: byte for byte what the backend says, without
//! asking it.
//!
//! `SLUICE_WINDOWS=10000 tests/run timeline` asks more often; `SLUICE_SEED` repeats a run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sluice::clock::Wall;

use crate::support::{Answer, MariaDb, Redis, Service, Sluice, TOKEN, number, until};

pub const DAY: i64 = 86_400_000;

pub fn now() -> i64 {
    i64::try_from(Wall::now().as_millis()).unwrap()
}

pub const SYMBOLS: [&str; 3] = ["BTCUSDT", "ethusdt", "1000PEPEUSDT"];

/// An order, as a statement inserts it and as a CSV file has it.
pub fn row(random: &mut fastrand::Rng, symbol: &str, time: i64) -> String {
    let side = if random.bool() { "buy" } else { "sell" };
    let (average, filled) = (random.f64() * 100_000.0, random.f64() * 3.0);
    format!("{symbol},{side},LIMIT,IOC,{filled:.3},{average:.1},{average:.5},FILLED,{filled:.3},{filled:.8},{time}")
}

/// Some orders of the last days and right up to a moment, some of them at one moment.
pub fn orders(count: usize, until: i64, days: i64) -> Vec<String> {
    let mut random = fastrand::Rng::with_seed(5);
    let mut time = until;
    let mut rows = Vec::new();
    for _ in 0..count {
        let symbol = SYMBOLS[random.usize(..SYMBOLS.len())];
        rows.push(row(&mut random, symbol, time));
        if random.u8(..) > 40 {
            time -= random.i64(0..2 * days * DAY / i64::try_from(count).unwrap());
        }
    }
    rows
}

/// A server with such orders, indexed.
pub async fn database(rows: &[String]) -> MariaDb {
    let database = MariaDb::empty(&[]).await;
    database.load().await;
    database.run("DELETE FROM api.binance_liqs").await;
    insert(&database, rows).await;
    database.index();
    database
}

pub async fn insert(database: &MariaDb, rows: &[String]) {
    let value = |row: &String| format!("('{}')", row.replace(',', "','"));
    for rows in rows.chunks(1000) {
        let values: Vec<String> = rows.iter().map(value).collect();
        database.run(&format!("INSERT INTO api.binance_liqs VALUES {}", values.join(","))).await;
    }
}

/// A time as clients write it.
fn written(random: &mut fastrand::Rng, time: i64) -> String {
    match random.u8(..4) {
        0 => jiff::Timestamp::from_millisecond(time).unwrap().strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string(),
        1 => format!("%20{time}+"),
        _ => time.to_string(),
    }
}

/// A request as dashboards and others make it.
fn target(random: &mut fastrand::Rng, days: i64) -> String {
    let symbol = SYMBOLS[random.usize(..SYMBOLS.len())];
    let symbol = match random.u8(..4) {
        0 => symbol.to_ascii_lowercase(),
        1 => format!("{}+", symbol.to_ascii_uppercase()),
        2 => symbol.chars().map(|letter| if random.bool() { letter.to_ascii_uppercase() } else { letter.to_ascii_lowercase() }).collect(),
        _ => symbol.to_owned(),
    };
    let now = now();
    let end = match random.u8(..4) {
        0 => now - random.i64(0..days * DAY),
        1 => now + random.i64(0..DAY),
        _ => now,
    };
    let start = end - [DAY, random.i64(0..days * DAY), random.i64(0..3_600_000), 0][random.usize(..4)];
    let (start, end) = (written(random, start), written(random, end));
    match random.u8(..4) {
        0 => format!("/api/liquidation-orders?symbol={symbol}&limit={}", random.u16(1..=1000)),
        1 => {
            let (page, size) = (random.u8(1..9), random.u16(1..=200));
            format!("/api/liquidation-orders?symbol={symbol}&start_timestamp={start}&end_timestamp={end}&page={page}&page_size={size}")
        }
        _ => {
            let timeframe = ["1m", "5m", "7m", "1h", "4H", "01d", "30d"][random.usize(..7)];
            format!("/api/liquidations?symbol={symbol}&timeframe={timeframe}&start_timestamp={start}&end_timestamp={end}")
        }
    }
}

pub fn is_computed(answer: &Answer) -> bool {
    answer.field("cache-status").is_some_and(|status| status.ends_with("detail=timeline"))
}

/// Asks until the timeline answers.
pub async fn warm(sluice: &Sluice, target: &str) {
    until("the timeline answers", || async { is_computed(&sluice.get(target).await) }).await;
}

/// Makes every symbol known.
pub async fn know(sluice: &Sluice) {
    for symbol in SYMBOLS {
        warm(sluice, &format!("/api/liquidation-orders?symbol={symbol}&limit=1")).await;
        let (start, end) = (now() - DAY, now());
        warm(sluice, &format!("/api/liquidations?symbol={symbol}&timeframe=1h&start_timestamp={start}&end_timestamp={end}")).await;
    }
}

/// Compares so many random answers with those of a program without rules; `quick` says that orders may come in between, so that
/// both are asked again.
async fn compare(sluice: &Sluice, reference: &Sluice, count: u64, days: i64, moving: bool) {
    let mut random = fastrand::Rng::with_seed(number("SLUICE_SEED", 7));
    let (mut computed, mut found) = (0, 0);
    for _ in 0..count {
        let target = target(&mut random, days);
        let mut pair = (sluice.get(&target).await, reference.get(&target).await);
        if moving && pair.0.body != pair.1.body {
            // An order that was not known yet when the first was asked is known soon.
            until(&format!("both say the same to {target}"), || async {
                let pair = (sluice.get(&target).await, reference.get(&target).await);
                is_computed(&pair.0) && pair.0.body == pair.1.body
            })
            .await;
            pair = (sluice.get(&target).await, reference.get(&target).await);
            computed += usize::from(is_computed(&pair.0));
            continue;
        }
        assert_eq!((pair.0.status, pair.0.text()), (pair.1.status, pair.1.text()), "{target}");
        computed += usize::from(is_computed(&pair.0));
        found += usize::from(pair.0.status == 200);
    }
    let count = usize::try_from(count).unwrap();
    assert!(computed * 100 >= count * 90, "{computed} of {count} were computed");
    assert!(moving || found * 2 > count, "{found} of {count} found anything");
}

/// The shipped configuration with these changes of `[timeline]`.
pub const QUICK: [(&str, &str); 2] = [("refresh = \"5s\"", "refresh = \"200ms\""), ("probation = 20", "probation = 3")];

#[tokio::test(flavor = "multi_thread")]
async fn random_windows_over_the_database_are_what_the_database_says() {
    let database = database(&orders(6000, now() - 1000, 12)).await;
    let (sluice, reference) = (database.sluice(&QUICK), database.uncached(&[], &[]));
    know(&sluice).await;
    compare(&sluice, &reference, number("SLUICE_WINDOWS", 600), 12, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_windows_while_orders_arrive_are_soon_what_the_database_says() {
    let database = Arc::new(database(&orders(6000, now() - 1000, 12)).await);
    let (sluice, reference) = (database.sluice(&QUICK), database.uncached(&[], &[]));
    know(&sluice).await;
    let stop = Arc::new(AtomicBool::new(false));
    let inserting = tokio::spawn({
        let (stop, database) = (Arc::clone(&stop), Arc::clone(&database));
        async move {
            let mut random = fastrand::Rng::with_seed(3);
            while !stop.load(Ordering::Acquire) {
                // Some of them late.
                let rows: Vec<String> = SYMBOLS
                    .map(|symbol| {
                        let late = random.i64(0..120_000);
                        row(&mut random, symbol, now() - late)
                    })
                    .into();
                insert(&database, &rows).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    compare(&sluice, &reference, number("SLUICE_WINDOWS", 600) / 3, 12, true).await;
    stop.store(true, Ordering::Release);
    inserting.await.unwrap();
}

/// In front of a service, with the shipped rules and these changes of the configuration.
pub async fn proxy(service: &Service, redis: &str, changes: &[(&str, &str)]) -> Sluice {
    let mut text = include_str!("../../proxy.toml").to_owned();
    for (from, to) in QUICK.iter().chain(changes) {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let url = format!("http://{}", service.backend.address);
    Sluice::with(&text, &[("BACKEND_URL", &url), ("REDIS_URL", redis), ("SLUICE_ADMIN_TOKEN", TOKEN)])
}

/// The service itself, asked directly.
pub async fn direct(service: &Service, target: &str) -> Answer {
    crate::support::get(service.backend.address, target, &[]).await
}

pub fn window(symbol: &str, timeframe: &str, start: i64, end: i64) -> String {
    format!("/api/liquidations?symbol={symbol}&timeframe={timeframe}&start_timestamp={start}&end_timestamp={end}")
}

pub fn day(timeframe: &str) -> String {
    window("BTCUSDT", timeframe, now() - DAY, now())
}

/// How an endpoint stands.
pub async fn state(sluice: &Sluice, endpoint: &str) -> String {
    let stats: serde_json::Value = serde_json::from_slice(&crate::support::get(sluice.admin, "/stats", &[]).await.body).unwrap();
    stats["timeline"]["endpoints"][endpoint]["state"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn random_windows_in_front_of_a_service_are_what_the_service_says() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[]).await;
    know(&sluice).await;
    let mut random = fastrand::Rng::with_seed(number("SLUICE_SEED", 8));
    let count = number("SLUICE_WINDOWS", 400);
    // Fields for 404 are learnt from the first such answers.
    let mut computed = 0;
    for _ in 0..count {
        let target = target(&mut random, 6);
        let (ours, theirs) = (sluice.get(&target).await, direct(&service, &target).await);
        assert_eq!((ours.status, ours.text()), (theirs.status, theirs.text()), "{target}");
        for name in ["content-type", "server"] {
            assert_eq!(ours.field(name), theirs.field(name), "{target}");
        }
        computed += u64::from(is_computed(&ours));
    }
    assert!(computed * 100 >= count * 80, "{computed} of {count}");
    assert_eq!((state(&sluice, "liquidations").await, state(&sluice, "liquidation-orders").await), ("on".into(), "on".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_asked_once_a_symbol_and_refresh_however_many_ask() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[("refresh = \"200ms\"", "refresh = \"1s\""), ("verify = 0.001", "verify = 0.0")]).await;
    know(&sluice).await;
    let (before, begun) = (service.backend.count(), tokio::time::Instant::now());
    let (mut asked, mut waited, mut random) = (0, 0, fastrand::Rng::with_seed(4));
    while begun.elapsed() < Duration::from_secs(6) {
        for timeframe in ["1m", "5m", "15m", "1h"] {
            let answer = sluice.get(&day(timeframe)).await;
            assert_eq!(answer.status, 200);
            (asked, waited) = (asked + 1, waited + u32::from(answer.field("cache-status") != Some("sluice; hit; detail=timeline")));
        }
        service.add(row(&mut random, "BTCUSDT", now()));
    }
    let (questions, streams) = (service.backend.count() - before, service.asked(before, "/api/liquidation-orders/stream"));
    assert_eq!(questions, streams, "only the newest part is asked for");
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap();
    assert!(questions <= seconds + 2, "{questions} in {seconds} s");
    assert!(waited * 20 <= asked, "{waited} of {asked} waited");
    // Nobody asks any more: nor does Sluice.
    let last = std::cell::Cell::new((service.backend.count(), tokio::time::Instant::now()));
    until("nothing is asked for three times as long as a refresh", || async {
        if last.get().0 != service.backend.count() {
            last.set((service.backend.count(), tokio::time::Instant::now()));
        }
        last.get().1.elapsed() > Duration::from_secs(3)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_orders_show_within_a_refresh() {
    let service = Service::start(orders(3000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[]).await;
    know(&sluice).await;
    let mut random = fastrand::Rng::with_seed(4);
    for late in [0, 1000, 60_000, 290_000] {
        let time = now() - late;
        service.add(row(&mut random, "BTCUSDT", time));
        let target = format!("/api/liquidation-orders?symbol=BTCUSDT&start_timestamp={}&end_timestamp={}", time - 5, time + 5);
        until("the late order shows", || async {
            let answer = sluice.get(&target).await;
            is_computed(&answer) && answer.text().contains(&time.to_string())
        })
        .await;
    }
}

/// Times that are no milliseconds of now: microseconds, nanoseconds, and what a database makes of a number that is too large.
const FAR: [i64; 3] = [1_780_000_000_000_000, 1_780_000_000_000_000_000, i64::MAX];

/// What such orders show in, besides all that is asked otherwise.
fn far_targets() -> Vec<String> {
    let mut targets: Vec<String> =
        [1, 2, 3, 4, 50, 1000].map(|limit| format!("/api/liquidation-orders?symbol=BTCUSDT&limit={limit}")).into();
    for end in [FAR[0], FAR[1], i64::MAX] {
        targets.push(window("BTCUSDT", "1d", now() - DAY, end));
        targets.push(format!("/api/liquidation-orders?symbol=BTCUSDT&start_timestamp=0&end_timestamp={end}&page_size=7"));
    }
    targets
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_of_a_far_time_stay_in_the_lists_over_the_database() {
    let database = database(&orders(3000, now() - 1000, 6)).await;
    let mut random = fastrand::Rng::with_seed(4);
    insert(&database, &[row(&mut random, "BTCUSDT", FAR[0])]).await;
    let (sluice, reference) = (database.sluice(&QUICK), database.uncached(&[], &[]));
    know(&sluice).await;
    let same = || async {
        for target in far_targets() {
            let (ours, theirs) = (sluice.get(&target).await, reference.get(&target).await);
            assert_eq!((ours.status, ours.text()), (theirs.status, theirs.text()), "{target}");
        }
    };
    same().await;
    assert!(is_computed(&sluice.get("/api/liquidation-orders?symbol=BTCUSDT&limit=50").await));
    assert!(is_computed(&sluice.get(&day("1h")).await));
    // More of them arrive.
    insert(&database, &FAR[1..].iter().map(|&time| row(&mut random, "BTCUSDT", time)).collect::<Vec<_>>()).await;
    let newest = || async { sluice.get("/api/liquidation-orders?symbol=BTCUSDT&limit=1").await.text() };
    until("the farthest is the newest", || async { newest().await.contains(&i64::MAX.to_string()) }).await;
    // Answers by URL that were stored before they came are none of the timeline's.
    assert_eq!(sluice.manage("/purge?pattern=*").await.status, 200);
    know(&sluice).await;
    same().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_of_a_far_time_stay_in_the_lists_in_front_of_a_service() {
    let mut rows = orders(3000, now() - 1000, 6);
    let mut random = fastrand::Rng::with_seed(4);
    rows.extend(FAR.map(|time| row(&mut random, "BTCUSDT", time)));
    let service = Service::start(rows).await;
    let sluice = proxy(&service, "", &[]).await;
    know(&sluice).await;
    for target in far_targets() {
        let (ours, theirs) = (sluice.get(&target).await, direct(&service, &target).await);
        assert_eq!((ours.status, ours.text()), (theirs.status, theirs.text()), "{target}");
    }
    warm(&sluice, "/api/liquidation-orders?symbol=BTCUSDT&limit=50").await;
    warm(&sluice, &day("1h")).await;
    assert!(sluice.get("/api/liquidation-orders?symbol=BTCUSDT&limit=50").await.text().contains(&FAR[0].to_string()));
    assert_eq!(sluice.metric("timeline_doubts_total", &[]).await, 0.0);
    assert_eq!((state(&sluice, "liquidations").await, state(&sluice, "liquidation-orders").await), ("on".into(), "on".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_symbols_never_reach_the_timeline() {
    let service = Service::start(orders(300, now() - 1000, 2)).await;
    let sluice = proxy(&service, "", &[]).await;
    know(&sluice).await;
    let before = service.backend.count();
    for number in 0..200 {
        let target = format!("/api/liquidation-orders?symbol=NOPE{}&limit=5", number % 100);
        assert_eq!(sluice.get(&target).await.status, 404);
    }
    assert_eq!(service.asked(before, "/api/liquidation-orders?symbol=NOPE"), 100, "once each, as without a timeline");
    assert_eq!(service.asked(before, "/api/liquidation-orders/stream?symbol=NOPE"), 0);
}

/// Every kind of request, compared with what the service says, for as long as `condition` is not reached.
async fn truthful_until<F: Future<Output = bool>>(sluice: &Sluice, service: &Service, what: &str, mut condition: impl FnMut() -> F) {
    let mut random = fastrand::Rng::with_seed(6);
    until(what, || {
        let target = target(&mut random, 6);
        let condition = condition();
        async move {
            let (ours, theirs) = (sluice.get(&target).await, direct(service, &target).await);
            assert_eq!((ours.status, ours.text()), (theirs.status, theirs.text()), "{target}");
            condition.await
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn checks_while_orders_pour_in_find_no_difference() {
    let service = Arc::new(Service::start(orders(2000, now() - 1000, 6)).await);
    let sluice = proxy(&service, "", &[("verify = 0.001", "verify = 1.0")]).await;
    know(&sluice).await;
    let stop = Arc::new(AtomicBool::new(false));
    let pouring = tokio::spawn({
        let (service, stop) = (Arc::clone(&service), Arc::clone(&stop));
        async move {
            let mut random = fastrand::Rng::with_seed(5);
            while !stop.load(Ordering::Acquire) {
                // Every other one is late, though not as late as may be.
                let late = if random.bool() { random.i64(0..60_000) } else { 0 };
                service.add(row(&mut random, "BTCUSDT", now() - late));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    let checked = async |result: &str| sluice.metric("timeline_checks_total", &[&format!("result=\"{result}\"")]).await;
    let (before, least) = (checked("equal").await, number("SLUICE_CHECKS", 30) as f64);
    let mut random = fastrand::Rng::with_seed(7);
    until("enough is compared", || {
        let (start, end) = (now() - random.i64(1..DAY), now() + random.i64(0..10_000));
        let target = match random.u32(..3) {
            0 => format!("/api/liquidation-orders?symbol=BTCUSDT&limit={}", random.u32(1..200)),
            1 => window("BTCUSDT", "1m", start, end),
            _ => format!("/api/liquidation-orders?symbol=BTCUSDT&start_timestamp={start}&end_timestamp={end}&page=1&page_size=50"),
        };
        let sluice = &sluice;
        async move {
            assert_eq!(sluice.get(&target).await.status, 200);
            for endpoint in ["liquidations", "liquidation-orders"] {
                assert_eq!(state(sluice, endpoint).await, "on", "{endpoint}");
            }
            checked("equal").await - before >= least
        }
    })
    .await;
    assert_eq!(checked("different").await, 0.0);
    stop.store(true, Ordering::Release);
    pouring.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_rest_a_slow_source_is_waited_for_and_nothing_old_is_given() {
    let service = Service::start_slow(orders(2000, now() - 1000, 6), Duration::from_millis(1300)).await;
    let sluice = proxy(&service, "", &[("stale_while_revalidate = \"15s\"", "stale_while_revalidate = \"1s\"")]).await;
    let list = "/api/liquidation-orders?symbol=BTCUSDT&limit=5";
    warm(&sluice, list).await;
    let age = async || {
        let located = crate::support::get(sluice.admin, &format!("/explain?target={}", list.replace('&', "%26")), &[]).await.text();
        located.split("asked for ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok())
    };
    // Longer than the rule allows that something is late.
    until("it rests", || async { age().await.expect("it is known") > 3000 }).await;
    let mut random = fastrand::Rng::with_seed(5);
    service.add(row(&mut random, "BTCUSDT", now()));
    // It is not asked for again by itself, and the order is older than any that may be missing.
    until("it has rested", || async { age().await.expect("it is known") > 8000 }).await;
    let (ours, theirs) = tokio::join!(sluice.get(list), direct(&service, list));
    assert_eq!(ours.text(), theirs.text(), "{:?}", ours.field("cache-status"));
}

/// Whether a target asks for orders of a span.
fn is_stream(target: &str) -> bool {
    target.starts_with("/api/liquidation-orders/stream")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_lacks_or_changes_orders_is_found_and_never_served() {
    type Change = fn(Vec<u8>) -> Vec<u8>;
    let cut: Change = |body| body[..body[..body.len() * 2 / 3].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1)].to_vec();
    let changed: Change = |body| String::from_utf8(body).unwrap().replacen("\"average_price\": ", "\"average_price\": 1", 1).into_bytes();
    for change in [cut, changed] {
        let service = Service::start(orders(2000, now() - 1000, 6)).await;
        service.lie(move |target, body| if is_stream(target) && !body.is_empty() { change(body) } else { body });
        let sluice = proxy(&service, "", &[]).await;
        // What is answered all the same is true. By its sums, or for orders that are too new for sums by comparing answers: the one or the other comes first.
        let found =
            async || sluice.metric("timeline_doubts_total", &[]).await + sluice.metric("timeline_checks_total", &["different"]).await;
        truthful_until(&sluice, &service, "the lie is found", || async { found().await >= 2.0 }).await;
        let asked = service.backend.count();
        truthful_until(&sluice, &service, "answers stay true", || async { service.backend.count() > asked + 400 }).await;
        let doubts = sluice.metric("timeline_doubts_total", &[]).await;
        let said = doubts == 0.0 || sluice.logged().contains("what the backend streams is not what it says elsewhere");
        assert!(said, "{}", sluice.logged());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cut_later_never_takes_orders_away() {
    // With others since midnight that its sums tell of, and with none that are old enough for sums.
    for rest in [600_000, 2 * DAY] {
        cut_later(rest).await;
    }
}

async fn cut_later(rest: i64) {
    let mut random = fastrand::Rng::with_seed(9);
    let newest = (0..200).map(|number| row(&mut random, "BTCUSDT", now() - 1000 - number * 900));
    let service = Service::start(orders(2000, now() - rest, 4).into_iter().chain(newest).collect()).await;
    let sluice = proxy(&service, "", &[("verify = 0.001", "verify = 0.0")]).await;
    know(&sluice).await;
    // Whole lines are missing at its end, and nothing says so.
    service.lie(|target, body| {
        let ends: Vec<usize> = body.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1).collect();
        if is_stream(target) && ends.len() > 1 { body[..ends[ends.len() / 2 - 1]].to_vec() } else { body }
    });
    let doubted = || async { sluice.metric("timeline_doubts_total", &[]).await >= 2.0 };
    let failing = || async { sluice.metric("timeline_fetches_total", &["newest", "failed"]).await >= 1.0 };
    truthful_until(&sluice, &service, "it is noticed", || async { failing().await || doubted().await }).await;
    let asked = service.backend.count();
    truthful_until(&sluice, &service, "answers stay true", || async { service.backend.count() > asked + 100 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_of_one_moment_in_another_order_are_found_and_never_served() {
    let service = Service::start(orders(2000, now() - 1000, 6)).await;
    // Ties the other way round: lines of one moment in reverse.
    service.lie(|target, body| {
        if !is_stream(target) {
            return body;
        }
        let text = String::from_utf8(body).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let time = |line: &str| line.rsplit(' ').next().unwrap().to_owned();
        lines
            .chunk_by(|a, b| time(a) == time(b))
            .flat_map(|tie| tie.iter().rev())
            .flat_map(|line| [line.as_bytes(), b"\n"].concat())
            .collect()
    });
    let sluice = proxy(&service, "", &[]).await;
    truthful_until(&sluice, &service, "it is found", || async { sluice.logged().contains("it is in quarantine") }).await;
    assert!(sluice.logged().contains("the timeline's answer differs from the backend's"));
    let asked = service.backend.count();
    truthful_until(&sluice, &service, "answers stay true", || async { service.backend.count() > asked + 400 }).await;
    // Sums do not depend on it.
    truthful_until(&sluice, &service, "sums are computed", || async { is_computed(&sluice.get(&day("1h")).await) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_in_an_error_line_is_no_stream() {
    let service = Service::start(orders(2000, now() - 1000, 6)).await;
    service.lie(|target, mut body| {
        if is_stream(target) {
            body.truncate(body.len() / 2);
            body.truncate(body.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1));
            body.extend_from_slice(b"{\"error\": \"Query timeout\"}\n");
        }
        body
    });
    let sluice = proxy(&service, "", &[]).await;
    let failed = || async { sluice.metric("timeline_fetches_total", &["newest", "failed"]).await >= 3.0 };
    truthful_until(&sluice, &service, "it fails", failed).await;
    assert_eq!(sluice.metric("timeline_answers_total", &[]).await, 0.0);
    until("it is told", || async { sluice.logged().contains("Query timeout") }).await;
    // It is well again: so is the timeline.
    service.lie(|_, body| body);
    truthful_until(&sluice, &service, "sums are computed", || async { is_computed(&sluice.get(&day("1h")).await) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_timestamps_of_the_services_cache_are_no_lie() {
    let service = Service::start(orders(2000, now() - 1000, 6)).await;
    service.lie(|target, body| {
        let text = String::from_utf8(body).unwrap();
        if !target.starts_with("/api/liquidations") {
            return text.into_bytes();
        }
        let buckets: Vec<String> =
            text.split("{\"timestamp\":").map(|part| part.replacen(",\"timestamp_iso", "\",\"timestamp_iso", 1)).collect();
        buckets.join("{\"timestamp\":\"").into_bytes()
    });
    let sluice = proxy(&service, "", &[]).await;
    warm(&sluice, &day("1h")).await;
    let text = sluice.get(&day("1h")).await.text();
    assert!(text.starts_with("[{\"timestamp\":1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_part_is_served_stale_while_the_service_is_down_and_anew_when_it_is_back() {
    let mut service = Service::start(orders(2000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[]).await;
    know(&sluice).await;
    warm(&sluice, &window("BTCUSDT", "1h", now() - 3 * DAY, now() - 2 * DAY)).await;
    service.backend.kill().await;
    until("answers are stale", || async {
        let answer = sluice.get(&day("1h")).await;
        assert_eq!(answer.status, 200);
        answer.field("cache-status").unwrap().contains("detail=stale-if-error")
    })
    .await;
    // What is over needs nobody.
    assert!(is_computed(&sluice.get(&window("BTCUSDT", "5m", now() - 3 * DAY, now() - 2 * DAY)).await));
    service.backend.revive().await;
    until("answers are new", || async { is_computed(&sluice.get(&day("1h")).await) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_drop_orders_too() {
    let service = Service::start(orders(2000, now() - 1000, 6)).await;
    let sluice = proxy(&service, "", &[("verify = 0.001", "verify = 0.0")]).await;
    know(&sluice).await;
    for purge in [
        "/purge?symbol=BTCUSDT",
        "/purge?tag=symbol:BTCUSDT",
        "/purge?pattern=liq:BTCUSDT:*",
        "/purge?pattern=*",
        "/purge?symbol=BTCUSDT&soft=true",
    ] {
        let closed = window("BTCUSDT", "1h", now() - 3 * DAY, now() - 2 * DAY);
        warm(&sluice, &closed).await;
        warm(&sluice, &day("1h")).await;
        let before = service.backend.count();
        assert_eq!(sluice.manage(purge).await.status, 200);
        assert!(!is_computed(&sluice.get(&closed).await) || service.asked(before, "/api/liquidation-orders/stream") > 0, "{purge}");
        warm(&sluice, &closed).await;
        assert!(service.asked(before, "/api/liquidation-orders/stream") >= 2, "{purge}: all of it is asked for again");
    }
    // Others stay.
    warm(&sluice, &day("1h")).await;
    assert_eq!(sluice.manage("/purge?symbol=ETHUSDT").await.status, 200);
    assert!(is_computed(&sluice.get(&day("1h")).await));
}

pub async fn in_redis(redis: &Redis, symbol: &str) -> usize {
    let prefix = format!("timeline:{symbol}");
    redis.keys().await.iter().filter(|name| name.contains(&prefix)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_found_in_redis_after_a_restart() {
    let service = Service::start(orders(2000, now() - 1000, 6)).await;
    let redis = Redis::start(&[]).await;
    let closed = window("BTCUSDT", "1h", now() - 4 * DAY, now() - 2 * DAY);
    for key in ["", &"ab".repeat(32)] {
        let changes =
            [("encryption_key = \"${SLUICE_CACHE_KEY:-}\"", &*format!("encryption_key = \"{key}\"")), ("verify = 0.001", "verify = 0.0")];
        let first = proxy(&service, &redis.url(), &changes).await;
        know(&first).await;
        warm(&first, &closed).await;
        let expected = first.get(&closed).await.text();
        assert!(first.metric("timeline_spans", &[]).await >= 3.0);
        // Three days of one symbol, and of each yesterday, unless that is not over yet.
        let spans = if now() % DAY < 600_000 { 3 } else { 6 };
        until("all spans are written", || async { in_redis(&redis, "").await >= spans }).await;
        drop(first);
        let second = proxy(&service, &redis.url(), &changes).await;
        let before = service.backend.count();
        know(&second).await;
        warm(&second, &closed).await;
        assert_eq!(second.get(&closed).await.text(), expected);
        let spans = second.metric("timeline_fetches_total", &["spans"]).await;
        assert_eq!(spans, 0.0, "none was asked for again, of {} questions", service.backend.count() - before);
        // A purge finds them there.
        assert_eq!(second.manage("/purge?pattern=liq:BTCUSDT:1h:*").await.status, 200);
        assert_eq!(in_redis(&redis, "BTCUSDT:").await, 0);
        assert_eq!(second.manage("/purge?pattern=*").await.status, 200);
        until("the others are gone too", || async { in_redis(&redis, "").await == 0 }).await;
    }
}
