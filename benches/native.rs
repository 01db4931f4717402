//! The native API beside the statements that the legacy service sends for the same questions, over a table of millions
//! of orders with the indexes of `deploy/mysql/indexes.sql`.
//!
//! `benches/native [ROWS] [ROUNDS]` runs it (without the stream of all orders, which takes half an hour, if
//! `SLUICE_BENCH_STREAM=0`), against a private MariaDB with its default buffer pool. Both sides ask the same
//! server in turns, each figure is the median of several rounds, and nothing is cached by Sluice: it has no rules here.
//! The legacy's stream asks for 1,000 orders after the other with a growing OFFSET; ten of its statements, evenly
//! spaced, are measured and taken for all.
//!
//! Then the same questions, and a day of minutes, to a Sluice with the shipped rules whose timeline knows the orders: a window
//! that nobody asked for before each time. Last, how many such windows a second it answers on one core.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    dead_code,
    unused_imports,
    missing_docs,
    reason = "a benchmark"
)]

#[path = "../tests/integration/support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::io::Write as _;

use mysql_async::Row;
use mysql_async::prelude::Queryable;
use support::{Connection, MariaDb, Sluice, recorded_dir, scratch, until};
use tokio::time::{Duration, Instant};

const START: i64 = 1_735_689_600_000;
const DAY: i64 = 86_400_000;
const YEAR: i64 = 365 * DAY;
const SERVER_CORE: &str = "0";
const LOAD_CORE: &str = "1";
/// About a third of the orders are of the first symbol, as in production.
const SYMBOLS: [&str; 22] = [
    "BTCUSDT",
    "ETHUSDT",
    "SOLUSDT",
    "XRPUSDT",
    "ADAUSDT",
    "DOGEUSDT",
    "1000PEPEUSDT",
    "BNBUSDT",
    "LTCUSDT",
    "LINKUSDT",
    "AVAXUSDT",
    "1000SHIBUSDT",
    "SUIUSDT",
    "WIFUSDT",
    "TRXUSDT",
    "BTCUSDT_250328",
    "ETHUSDT_250328",
    "BTCUSDC",
    "FARTCOINUSDT",
    "1INCHUSDT",
    "SHIBUSDT",
    "memeusdt",
];
const COLUMNS: &str = "symbol, side, order_type, time_in_force, original_quantity, price, average_price, order_status, \
                       order_last_filled_quantity, order_filled_accumulated_quantity, order_trade_time";

fn main() {
    let numbers: Vec<u64> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let (rows, rounds) = (numbers.first().copied().unwrap_or(3_000_000), numbers.get(1).copied().unwrap_or(3));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(compare(rows, usize::try_from(rounds).unwrap()));
}

/// Orders at evenly spread moments, the same for the same number of them.
fn orders(rows: u64) -> std::path::PathBuf {
    let file = scratch().join("orders.csv");
    let mut out = std::io::BufWriter::new(std::fs::File::create(&file).unwrap());
    let mut random = fastrand::Rng::with_seed(11);
    let weights: Vec<f64> = (1..=SYMBOLS.len()).map(|rank| 1.0 / (rank as f64).powf(1.1)).collect();
    let total: f64 = weights.iter().sum();
    for number in 0..rows {
        let mut left = random.f64() * total;
        let found = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        let rank = found.unwrap_or(0);
        let (price, quantity) = (98_000.0 / (rank as f64 * 3.0 + 1.0) * random.f64().mul_add(0.06, 0.97), random.f64() * 3.0 + 0.001);
        let side = if random.bool() { "buy" } else { "sell" };
        let time = START + i64::try_from(number).unwrap() * YEAR / i64::try_from(rows).unwrap();
        let symbol = SYMBOLS[rank];
        writeln!(out, "{symbol},{side},LIMIT,IOC,{quantity:.3},{price:.1},{:.3},FILLED,{quantity:.3},{quantity:.3},{time}", price * 1.001)
            .unwrap();
    }
    file
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Gives a process one core.
fn pin(pid: &str, core: &str) {
    assert!(std::process::Command::new("taskset").args(["-a", "-c", "-p", core, pid]).output().unwrap().status.success());
}

struct Bench {
    database: MariaDb,
    sluice: Sluice,
    /// With the shipped rules, and so with a timeline.
    timeline: Sluice,
    rounds: usize,
    page: String,
}

impl Bench {
    async fn legacy(&self, statement: &str) -> Duration {
        let mut conn = self.database.admin().await;
        conn.query_drop("USE api").await.unwrap();
        let begun = Instant::now();
        let rows: Vec<Row> = conn.query(statement).await.unwrap();
        drop(rows);
        begun.elapsed()
    }

    async fn native(&self, target: &str, expected: u16) -> Duration {
        let begun = Instant::now();
        let answer = self.sluice.get(target).await;
        let took = begun.elapsed();
        assert_eq!(answer.status, expected, "{target}");
        took
    }

    /// From the timeline, which must know all of it.
    async fn warm(&self, target: &str) -> Duration {
        let begun = Instant::now();
        let answer = self.timeline.get(target).await;
        let took = begun.elapsed();
        assert_eq!((answer.status, answer.cache_status()), (200, "sluice; hit; detail=timeline"), "{target}");
        took
    }

    /// Both in turns.
    async fn pair(&mut self, name: &str, statements: &[String], scale: f64, target: &str, expected: u16) {
        let (mut legacy, mut native) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            let mut sum = Duration::ZERO;
            for statement in statements {
                sum += self.legacy(statement).await;
            }
            legacy.push(sum.mul_f64(scale));
            native.push(self.native(target, expected).await);
        }
        self.write(name, legacy, native);
    }

    /// The legacy's statement and a warm timeline in turns; `target` makes a target that is another one each time.
    async fn pair_warm(&mut self, name: &str, statement: &str, target: impl Fn(i64) -> String) {
        until("the timeline knows it", || async { self.timeline.get(&target(0)).await.cache_status().contains("hit; detail=timeline") })
            .await;
        let (mut legacy, mut warm) = (Vec::new(), Vec::new());
        for round in 1..=self.rounds as i64 {
            legacy.push(self.legacy(statement).await);
            warm.push(self.warm(&target(round)).await);
        }
        self.write(name, legacy, warm);
    }

    /// How many such windows of a day are answered a second, each another one, on one core.
    async fn rate(&mut self, timeframe: &str, days: std::ops::Range<i64>) {
        pin(&self.timeline.process.child.id().to_string(), SERVER_CORE);
        pin(&std::process::id().to_string(), LOAD_CORE);
        let (seconds, address) = (Duration::from_secs(5), self.timeline.address);
        let clients: Vec<_> = (0..8)
            .map(|seed| {
                let (timeframe, days) = (timeframe.to_owned(), days.clone());
                tokio::spawn(async move {
                    let mut random = fastrand::Rng::with_seed(seed);
                    let (mut connection, mut count, begun) = (Connection::open(address).await, 0_u64, Instant::now());
                    while begun.elapsed() < seconds {
                        let start = START + random.i64(days.start * DAY..days.end * DAY);
                        let window = format!("start_timestamp={start}&end_timestamp={}", start + DAY);
                        let target = format!("/api/liquidations?symbol=BTCUSDT&timeframe={timeframe}&{window}");
                        let answer = connection.ask("GET", &target, &[], b"").await;
                        assert_eq!(answer.cache_status(), "sluice; hit; detail=timeline");
                        count += 1;
                    }
                    count as f64 / begun.elapsed().as_secs_f64()
                })
            })
            .collect();
        let mut sum = 0.0;
        for client in clients {
            sum += client.await.unwrap();
        }
        self.say(&format!("different days of {timeframe} buckets a second, on one core, 8 clients: {sum:.0}"));
    }

    fn say(&mut self, line: &str) {
        eprintln!("{line}");
        writeln!(self.page, "{line}").unwrap();
    }

    fn write(&mut self, name: &str, legacy: Vec<Duration>, native: Vec<Duration>) {
        let (legacy, native) = (median(legacy), median(native));
        let ratio = legacy.as_secs_f64() / native.as_secs_f64();
        self.say(&format!("{name:<44}{:>12.1}{:>12.2}{ratio:>10.1}", legacy.as_secs_f64() * 1e3, native.as_secs_f64() * 1e3));
    }
}

async fn compare(rows: u64, rounds: usize) {
    let database = MariaDb::empty(&["--innodb-buffer-pool-size=128M"]).await;
    database.feed(&recorded_dir().join("schema.sql"));
    eprintln!("writing and loading {rows} orders");
    let file = orders(rows);
    database.load_file(&file);
    database.index();
    database.run("ANALYZE TABLE api.binance_liqs").await;
    let (sluice, timeline) = (database.uncached(&[], &[]), database.sluice(&[]));
    let mut bench = Bench { database, sluice, timeline, rounds, page: String::new() };
    let (start, end) = (START, START + YEAR);
    let (span, within) = (format!("start_timestamp={start}&end_timestamp={end}"), format!("order_trade_time BETWEEN {start} AND {end}"));
    let sums = |symbol: &str, width: i64| {
        format!(
            "SELECT FLOOR((order_trade_time - {start}) / {width}) * {width} + {start} AS timestamp, side, \
             SUM(average_price * order_filled_accumulated_quantity) AS cumulated_usd_size FROM binance_liqs \
             WHERE LOWER(symbol) = LOWER('{symbol}') AND {within} GROUP BY timestamp, side ORDER BY timestamp, side"
        )
    };
    let page = |size: u64, offset: u64| {
        format!(
            "SELECT {COLUMNS} FROM binance_liqs WHERE LOWER(symbol) = LOWER('BTCUSDT') AND {within} ORDER BY order_trade_time DESC \
             LIMIT {size} OFFSET {offset}"
        )
    };
    let mut conn = bench.database.admin().await;
    let count: Option<u64> = conn.query_first("SELECT COUNT(*) FROM api.binance_liqs WHERE symbol = 'BTCUSDT'").await.unwrap();
    let count = count.unwrap();
    let deep = count / 100 * 97 / 100;
    let batches = count.div_ceil(1000);
    let full = std::env::var_os("SLUICE_BENCH_STREAM").is_none_or(|value| value != "0");
    let title = format!("{rows} orders, {count} of BTCUSDT; milliseconds, medians of {rounds}");
    let head = format!("{title:<44}\n{:<44}{:>12}{:>12}{:>10}", "", "legacy", "sluice", "ratio");
    bench.say(&head);
    let target = format!("/api/liquidations?symbol=NOPE&timeframe=1d&{span}");
    bench.pair("an unknown symbol", &[sums("NOPE", 86_400_000)], 1.0, &target, 404).await;
    let target = format!("/api/liquidation-orders?symbol=BTCUSDT&{span}&page_size=100&page=1");
    bench.pair("the first page of 100 over a year", &[page(100, 0)], 1.0, &target, 200).await;
    let target = format!("/api/liquidation-orders?symbol=BTCUSDT&{span}&page_size=100&page={deep}");
    bench.pair(&format!("page {deep}"), &[page(100, (deep - 1) * 100)], 1.0, &target, 200).await;
    let target = format!("/api/liquidations?symbol=BTCUSDT&timeframe=1d&{span}");
    bench.pair("a year of 1d buckets", &[sums("BTCUSDT", 86_400_000)], 1.0, &target, 200).await;
    // Before the stream, whose statements drive everything else out of the server's memory.
    let of = |timeframe: &str, start: i64, end: i64| {
        format!("/api/liquidations?symbol=BTCUSDT&timeframe={timeframe}&start_timestamp={start}&end_timestamp={end}")
    };
    bench.pair_warm("warm: a year of 1d buckets", &sums("BTCUSDT", DAY), |round| of("1d", start + round, end + round)).await;
    let deep_page = |round: i64| {
        let window = format!("start_timestamp={}&end_timestamp={}", start - round, end + round);
        format!("/api/liquidation-orders?symbol=BTCUSDT&{window}&page_size=100&page={deep}")
    };
    bench.pair_warm(&format!("warm: page {deep}"), &page(100, (deep - 1) * 100), deep_page).await;
    let minutes = sums("BTCUSDT", 60_000).replace(&start.to_string(), &(end - DAY).to_string());
    bench.pair_warm("warm: a day of 1m buckets", &minutes, |round| of("1m", end - DAY - round, end - round)).await;
    bench.rate("1m", 300..360).await;
    bench.rate("1h", 300..360).await;
    let resident = bench.timeline.process.resident_peak() >> 20;
    bench.say(&format!("resident memory of Sluice with all of this in its timeline, at its peak: {resident} MiB"));
    if full {
        let some: Vec<String> = (0..10).map(|tenth| page(1000, batches * tenth / 10 * 1000)).collect();
        let target = format!("/api/liquidation-orders/stream?symbol=BTCUSDT&{span}");
        bench.pair("the stream of all", &some, batches as f64 / 10.0, &target, 200).await;
    }
    let resident = bench.sluice.process.resident_peak() >> 20;
    bench.say(&format!("resident memory of Sluice without a timeline, at its peak: {resident} MiB"));
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/native.txt"), bench.page).unwrap();
}
