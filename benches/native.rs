//! The native API beside the statements that the legacy service sends for the same questions, over a table of millions
//! of orders with the indexes of `deploy/mysql/indexes.sql`.
//!
//! `benches/native [ROWS] [ROUNDS]` runs it, against a private MariaDB with its default buffer pool. Both sides ask the same
//! server in turns, each figure is the median of several rounds, and nothing is cached by Sluice: it has no rules here.
//! The legacy's stream asks for 1,000 orders after the other with a growing OFFSET; ten of its statements, evenly
//! spaced, are measured and taken for all.

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
use support::{MariaDb, Sluice, recorded_dir, scratch};
use tokio::time::{Duration, Instant};

const START: i64 = 1_735_689_600_000;
const YEAR: i64 = 365 * 86_400_000;
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

struct Bench {
    database: MariaDb,
    sluice: Sluice,
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

    async fn native(&self, target: &str, expected: u16) -> (Duration, usize) {
        let begun = Instant::now();
        let answer = self.sluice.get(target).await;
        let took = begun.elapsed();
        assert_eq!(answer.status, expected, "{target}");
        (took, answer.body.len())
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
            native.push(self.native(target, expected).await.0);
        }
        let (legacy, native) = (median(legacy), median(native));
        let ratio = legacy.as_secs_f64() / native.as_secs_f64();
        let line = format!("{name:<44}{:>12.1}{:>12.1}{ratio:>10.1}", legacy.as_secs_f64() * 1e3, native.as_secs_f64() * 1e3);
        eprintln!("{line}");
        writeln!(self.page, "{line}").unwrap();
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
    let sluice = database.uncached(&[], &[]);
    let mut bench = Bench { database, sluice, rounds, page: String::new() };
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
    let title = format!("{rows} orders, {count} of BTCUSDT; milliseconds, medians of {rounds}");
    let head = format!("{title:<44}\n{:<44}{:>12}{:>12}{:>10}", "", "legacy", "sluice", "ratio");
    eprintln!("{head}");
    writeln!(bench.page, "{head}").unwrap();
    let target = format!("/api/liquidations?symbol=NOPE&timeframe=1d&{span}");
    bench.pair("an unknown symbol", &[sums("NOPE", 86_400_000)], 1.0, &target, 404).await;
    let target = format!("/api/liquidation-orders?symbol=BTCUSDT&{span}&page_size=100&page=1");
    bench.pair("the first page of 100 over a year", &[page(100, 0)], 1.0, &target, 200).await;
    let target = format!("/api/liquidation-orders?symbol=BTCUSDT&{span}&page_size=100&page={deep}");
    bench.pair(&format!("page {deep}"), &[page(100, (deep - 1) * 100)], 1.0, &target, 200).await;
    let target = format!("/api/liquidations?symbol=BTCUSDT&timeframe=1d&{span}");
    bench.pair("a year of 1d buckets", &[sums("BTCUSDT", 86_400_000)], 1.0, &target, 200).await;
    let some: Vec<String> = (0..10).map(|tenth| page(1000, batches * tenth / 10 * 1000)).collect();
    let target = format!("/api/liquidation-orders/stream?symbol=BTCUSDT&{span}");
    bench.pair("the stream of all", &some, batches as f64 / 10.0, &target, 200).await;
    let resident = bench.sluice.process.resident_peak() >> 20;
    let line = format!("resident memory of Sluice at its peak: {resident} MiB");
    eprintln!("{line}");
    writeln!(bench.page, "{line}").unwrap();
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/native.txt"), bench.page).unwrap();
}
