//! What the timeline does under load: it computes within bounds of memory and cores, asks its source within bounds, and small requests go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sluice::clock::Wall;

use tokio::io::BufReader;

use crate::support::{Answer, Connection, MariaDb, Service, Sluice, connect_from, recorded_dir, scratch, until};

const MINUTE: i64 = 60_000;
const DAY: i64 = 86_400_000;
const MIB: u64 = 1 << 20;
/// Minutes with an order each: an answer by minutes has over seven megabytes.
const MINUTES: i64 = 60_000;

fn now() -> i64 {
    i64::try_from(Wall::now().as_millis()).unwrap()
}

/// An order a minute, as a CSV file has them.
fn orders(until: i64) -> Vec<String> {
    let row =
        |number: i64| format!("BTCUSDT,buy,LIMIT,IOC,1.5,98000.5,98000.{:04},FILLED,1.5,1.5,{}", number % 9973, until - number * MINUTE);
    (0..MINUTES).map(row).collect()
}

/// The shipped configuration with these changes.
pub fn configured(changes: &[(&str, &str)]) -> String {
    let mut text = include_str!("../../proxy.toml").to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    text
}

/// A window over all orders; another one for each number.
fn large(until: i64, number: i64) -> String {
    let start = until - (MINUTES + 10) * MINUTE - number;
    format!("/api/liquidations?symbol=BTCUSDT&timeframe=1m&start_timestamp={start}&end_timestamp={}", until - 2 * DAY)
}

fn small(until: i64, number: i64) -> String {
    let start = until - 9 * DAY - number;
    format!("/api/liquidations?symbol=BTCUSDT&timeframe=1h&start_timestamp={start}&end_timestamp={}", until - 8 * DAY)
}

fn is_computed(answer: &Answer) -> bool {
    answer.cache_status().ends_with("detail=timeline")
}

/// A client that asks, reads the head of the answer and takes no more.
async fn ask_and_rest(sluice: &Sluice, target: &str) -> (Connection, Answer) {
    let mut connection = Connection::open(sluice.address).await;
    connection.send(format!("GET {target} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
    let head = connection.head().await.unwrap();
    (connection, head)
}

/// Clients that rest before large answers until there is no more room, and what became of so many that asked.
async fn fill_the_room(sluice: &Sluice, until: i64, count: i64) -> Vec<(Connection, Answer)> {
    let mut resting = Vec::new();
    for number in 0..count {
        resting.push(ask_and_rest(sluice, &large(until, 1000 + number)).await);
    }
    resting
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_before_slow_clients_are_bounded_and_small_ones_go_on() {
    let (dir, last) = (scratch(), now() - 1000);
    let file = dir.join("orders.csv");
    std::fs::write(&file, orders(last).join("\n")).unwrap();
    let file = format!("orders = \"{}\"", file.display());
    let text = configured(&[("orders = \"\"", &file), ("memory = \"128MiB\"", "memory = \"64MiB\"")]);
    let sluice = Sluice::with(&text, &[("BACKEND_KIND", "sample"), ("REDIS_URL", "")]);
    until("the long window is known", || async { is_computed(&sluice.get(&large(last, 0)).await) }).await;
    let asked = async || sluice.metric("backend_requests_total", &["route=\"liquidations\"", "status=\"200\""]).await;
    let (before, backend) = (sluice.process.resident(), asked().await);
    let resting = fill_the_room(&sluice, last, 24).await;
    let (mut served, mut refused) = (0, 0);
    for (_, head) in &resting {
        match head.status {
            200 => served += 1,
            503 => {
                assert_eq!((head.field("retry-after"), head.cache_status()), (Some("1"), "sluice; fwd=bypass; detail=overloaded"));
                refused += 1;
            }
            other => panic!("{other}"),
        }
    }
    assert!(served >= 4 && refused >= 8, "{served} served, {refused} refused");
    // The answers that nobody takes are held, and no more than there is room for.
    let room = sluice.metric("timeline_room_bytes", &[]).await;
    assert!(room > 20e6 && room <= 96.0 * MIB as f64, "{room}");
    let grown = sluice.process.resident_peak().saturating_sub(before) / MIB;
    assert!(grown < 160, "{grown} MiB");
    for number in 0..200 {
        let answer = sluice.get(&small(last, number)).await;
        assert!(answer.status == 200 && is_computed(&answer), "{} {}", answer.status, answer.cache_status());
    }
    let unanswered = sluice.metric("timeline_unanswered_total", &["reason=\"no_room\""]).await;
    assert!(unanswered >= f64::from(refused), "{unanswered}");
    assert_eq!(asked().await, backend, "the backend, which would need the same memory, was not asked");
    drop(resting);
    until("there is room again", || async { is_computed(&sluice.get(&large(last, 5)).await) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_finds_no_room_goes_to_a_service_a_few_at_a_time() {
    let last = now() - 1000;
    let service = Arc::new(Service::start_slow(orders(last), Duration::from_millis(100)).await);
    let text = configured(&[
        ("memory = \"128MiB\"", "memory = \"64MiB\""),
        ("probation = 20", "probation = 0"),
        ("verify = 0.001", "verify = 0.0"),
    ]);
    let url = format!("http://{}", service.backend.address);
    let sluice = Arc::new(Sluice::with(&text, &[("BACKEND_URL", &url), ("REDIS_URL", "")]));
    until("the long window is known", || async { is_computed(&sluice.get(&large(last, 0)).await) }).await;
    // Those that rest before an answer of the timeline's; the others went to the service.
    let resting = fill_the_room(&sluice, last, 12).await;
    assert!(resting.iter().filter(|(_, head)| is_computed(head)).count() >= 4);
    let (before, most) = (service.backend.count(), Arc::new(AtomicUsize::new(0)));
    let watching = tokio::spawn({
        let (service, most) = (Arc::clone(&service), Arc::clone(&most));
        async move {
            loop {
                most.fetch_max(service.backend.answering(), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    let asking: Vec<_> = (0..60)
        .map(|number| {
            let sluice = Arc::clone(&sluice);
            tokio::spawn(async move { ask_and_rest(&sluice, &large(last, number)).await.1 })
        })
        .collect();
    let (mut refused, mut served) = (0, 0);
    for asking in asking {
        let head = asking.await.unwrap();
        assert!(head.status == 200 || (head.status == 503 && head.field("retry-after") == Some("1")), "{}", head.status);
        (served, refused) = (served + usize::from(head.status == 200), refused + usize::from(head.status == 503));
    }
    watching.abort();
    let asked = service.asked(before, "/api/liquidations?");
    assert!(served >= 1 && refused >= 20 && asked <= 60 - refused, "{served} served, {refused} refused, {asked} asked for");
    // Besides, the timeline itself asks one thing about its symbol.
    assert!(most.load(Ordering::Relaxed) <= 8 + 1, "{} at a time", most.load(Ordering::Relaxed));
    let small = sluice.get(&small(last, 1)).await;
    assert!(small.status == 200 && is_computed(&small));
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_downloads_do_not_make_the_newest_orders_late() {
    let database = MariaDb::empty(&[]).await;
    database.feed(&recorded_dir().join("schema.sql"));
    database
        .run("USE api; INSERT INTO binance_liqs SELECT 'BTCUSDT', 'buy', 'LIMIT', 'IOC', 1, 1, 1, 'FILLED', 1, 1, seq FROM seq_1_to_400000")
        .await;
    database.index();
    let add = async |time: i64| {
        let values = format!("('ETHUSDT', 'buy', 'LIMIT', 'IOC', 1, 1, 1, 'FILLED', 1, 1, {time})");
        database.run(&format!("INSERT INTO api.binance_liqs VALUES {values}")).await;
    };
    add(now()).await;
    let sluice = database.sluice(&[("pool_max = 20", "pool_max = 8"), ("refresh = \"5s\"", "refresh = \"200ms\"")]);
    let list = "/api/liquidation-orders?symbol=ETHUSDT&limit=5";
    until("the list is computed", || async { is_computed(&sluice.get(list).await) }).await;
    // They take nothing of what they ask for, and come from ten addresses, so that they get all that downloads may have.
    let mut downloads = Vec::new();
    for from in 2..12 {
        let mut connection = Connection(BufReader::new(connect_from(sluice.address, from).await));
        let target = "/api/liquidation-orders/stream?symbol=BTCUSDT&start_timestamp=0&end_timestamp=1000000";
        connection.send(format!("GET {target} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
        downloads.push(connection);
    }
    until("as many downloads wait as may", || async { database.running().await.len() >= 4 }).await;
    let asked = async |result: &str| sluice.metric("timeline_fetches_total", &["of=\"newest\"", &format!("result=\"{result}\"")]).await;
    let before = asked("answered").await;
    for _ in 0..3 {
        let time = now();
        add(time).await;
        until("the order shows", || async {
            let answer = sluice.get(list).await;
            is_computed(&answer) && answer.text().contains(&time.to_string())
        })
        .await;
    }
    assert!(asked("answered").await >= before + 3.0);
    assert_eq!(asked("failed").await, 0.0);
    assert!(database.running().await.len() >= 4, "the downloads are there still");
}
