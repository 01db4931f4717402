//! The timeline of a symbol with 92 million orders a year, over a source that makes them up: what it takes, and how fast it answers.
//!
//! `cargo bench --bench blocks [ORDERS]` fetches the year, then asks for a year of days and for a day of minutes from memory, compares what
//! the process takes with what the timeline says that it takes, and does the same for 1,300 days of ten orders.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs, reason = "a benchmark")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of a benchmark")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sluice::api::orders::{Batches, Bucket, Order, Orders, OrdersError, Page, Span};
use sluice::api::usd::Usd;
use sluice::cache::Cache;
use sluice::cache::memory::Memory;
use sluice::clock::Wall;
use sluice::config::Timeline as Settings;
use sluice::telemetry::metrics::Metrics;
use sluice::timeline::compute::compute;
use sluice::timeline::endpoint::Endpoint;
use sluice::timeline::engine::{Allowed, Engine, Source};
use sluice::timeline::symbol::Symbol;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const DAY: i64 = 86_400_000;
/// How long the source takes for an answer before its first order.
const DELAY: Duration = Duration::from_millis(20);

/// A source that makes orders up, evenly: `every` milliseconds one, from `first` up to `last`.
struct Made {
    first: i64,
    last: i64,
    every: f64,
    texts: [Arc<str>; 6],
    /// How many orders were read.
    read: Arc<AtomicU64>,
}

impl Made {
    fn new(orders: u64, days: i64, last: i64, read: &Arc<AtomicU64>) -> Arc<Self> {
        let texts = ["BTCUSDT", "buy", "sell", "LIMIT", "IOC", "FILLED"].map(Arc::from);
        let (first, every) = (last - days * DAY, (days * DAY) as f64 / orders as f64);
        Arc::new(Self { first, last, every, texts, read: Arc::clone(read) })
    }

    fn order(&self, number: i64) -> Order {
        let mixed = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let text = |place: usize| Some(Arc::clone(&self.texts[place]));
        // A price of cents and a quantity of three places, as exchanges have them.
        let (price, quantity) = (9_000_000 + (mixed % 1_000_000) as i128, 1 + (mixed >> 24) as i128 % 3000);
        let (average, filled) = (price as f64 / 100.0, quantity as f64 / 1000.0);
        Order {
            symbol: text(0),
            side: text(1 + (mixed & 1) as usize),
            order_type: text(3),
            time_in_force: text(4),
            original_quantity: Some(filled),
            price: Some(average),
            average_price: Some(average),
            order_status: text(5),
            order_last_filled_quantity: Some(filled),
            order_filled_accumulated_quantity: Some(filled),
            order_trade_time: Some(self.time(number)),
            usd: Usd::Exact(price * quantity * 10_i128.pow(11)),
        }
    }

    fn time(&self, number: i64) -> i64 {
        self.first + (number as f64 * self.every) as i64
    }

    /// The numbers of the orders within a span.
    fn within(&self, span: Span) -> std::ops::Range<i64> {
        let number = |time: i64| {
            let time = time.clamp(self.first, self.last);
            let near = ((time - self.first) as f64 / self.every) as i64;
            (near - 2..near + 3).find(|&number| self.time(number) >= time).unwrap_or(near).max(0)
        };
        number(span.start)..number(span.end.saturating_add(1))
    }
}

impl Orders for Made {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        Err(OrdersError::NotCovered)
    }

    async fn buckets(&self, _: &str, _: Span, _: i64) -> Result<Vec<Bucket>, OrdersError> {
        Err(OrdersError::NotCovered)
    }

    async fn latest(&self, symbol: &str, limit: usize) -> Result<Vec<Order>, OrdersError> {
        self.page(symbol, Span { start: 0, end: self.last }, Page { offset: 0, size: limit }).await
    }

    async fn page(&self, _: &str, span: Span, page: Page) -> Result<Vec<Order>, OrdersError> {
        tokio::time::sleep(DELAY).await;
        let numbers = self.within(span).rev().skip(page.offset as usize).take(page.size);
        Ok(numbers.map(|number| self.order(number)).collect())
    }

    async fn stream(&self, _: &str, span: Span) -> Result<Batches<OrdersError>, OrdersError> {
        tokio::time::sleep(DELAY).await;
        let (sender, receiver) = mpsc::channel(2);
        let (numbers, made) = (self.within(span), self.clone());
        tokio::spawn(async move {
            let mut end = numbers.end;
            while end > numbers.start {
                let begin = (end - 2048).max(numbers.start);
                made.read.fetch_add((end - begin) as u64, Ordering::Relaxed);
                if sender.send(Ok((begin..end).rev().map(|number| made.order(number)).collect())).await.is_err() {
                    return;
                }
                end = begin;
            }
        });
        Ok(Batches::new(receiver))
    }

    async fn check(&self) -> Result<(), OrdersError> {
        Ok(())
    }
}

impl Clone for Made {
    fn clone(&self) -> Self {
        Self { first: self.first, last: self.last, every: self.every, texts: self.texts.clone(), read: Arc::clone(&self.read) }
    }
}

fn main() {
    let orders = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(92_000_000);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        // First, so that what the year gives back does not hide what this takes.
        small().await;
        year(orders).await;
    });
}

fn now() -> i64 {
    i64::try_from(Wall::now().as_millis()).unwrap()
}

/// What the process takes, in bytes.
fn resident() -> u64 {
    let pages: u64 = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A timeline over a source, and its symbol, once its newest orders are known.
async fn begin(made: Arc<Made>, memory: u64) -> (Arc<Engine<Arc<Made>>>, Arc<Symbol>) {
    let metrics = Arc::new(Metrics::new().unwrap());
    let store = Arc::new(Memory::new(1 << 20, 1 << 20, Arc::clone(&metrics)).unwrap());
    let cache = Cache::new(store, Arc::default(), None, Handle::current(), Arc::clone(&metrics));
    let settings = Settings { memory, refresh: Duration::from_secs(86_400), ..Settings::default() };
    let engine = Engine::new(Source { newest: Arc::clone(&made), past: made }, false, settings, cache, Handle::current(), metrics).unwrap();
    let symbol = engine.symbol_or_new("BTCUSDT", Vec::new);
    let begun = Instant::now();
    while engine.known_tail(&symbol).is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("  newest orders known after {:?}; the source takes {DELAY:?} for each of two answers", begun.elapsed());
    (engine, symbol)
}

fn window(timeframe: &str, start: i64, end: i64) -> String {
    format!("/api/liquidations?symbol=BTCUSDT&timeframe={timeframe}&start_timestamp={start}&end_timestamp={end}")
}

/// Asks until it is answered from memory.
async fn fill(engine: &Arc<Engine<Arc<Made>>>, symbol: &Arc<Symbol>, target: &str) -> Duration {
    let begun = Instant::now();
    while compute(engine, symbol, Endpoint::Liquidations, target, Allowed::NOTHING).await.is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    begun.elapsed()
}

/// The median of several answers.
async fn answer(engine: &Arc<Engine<Arc<Made>>>, symbol: &Arc<Symbol>, target: &str) -> (Duration, usize) {
    let (mut times, mut length) = (Vec::new(), 0);
    for _ in 0..101 {
        let begun = Instant::now();
        length = compute(engine, symbol, Endpoint::Liquidations, target, Allowed::NOTHING).await.expect("it is known").body.len();
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    (times[50], length)
}

/// After a while, in which the allocator gives back what nobody uses any more.
async fn tell_memory(engine: &Engine<Arc<Made>>, before: u64, orders: u64) {
    tokio::time::sleep(Duration::from_secs(15)).await;
    let (size, taken) = (engine.size(), resident().saturating_sub(before));
    println!(
        "  {} stretches; the timeline says {:.1} MiB, the process took {:.1} MiB more ({:+.1} %): {:.2} bytes an order of {orders}",
        size.spans,
        mib(size.bytes),
        mib(taken),
        (taken as f64 / size.bytes as f64 - 1.0) * 100.0,
        size.bytes as f64 / orders as f64
    );
}

async fn year(orders: u64) {
    println!("{orders} orders of one symbol in a year");
    let (read, last, before) = (Arc::default(), now() - 1000, resident());
    let (engine, symbol) = begin(Made::new(orders, 365, last, &read), 2400 << 20).await;
    let (year, day) = (window("1d", last - 365 * DAY, last), window("1m", last - DAY, last));
    println!("  a day of minutes known after {:?}", fill(&engine, &symbol, &day).await);
    println!(
        "  a year of days known after {:?}, for which {} orders were read",
        fill(&engine, &symbol, &year).await,
        read.load(Ordering::Relaxed)
    );
    tell_memory(&engine, before, orders).await;
    for (name, target) in [("a year of days", year), ("a day of minutes", day), ("a day of hours", window("1h", last - DAY, last))] {
        let (took, length) = answer(&engine, &symbol, &target).await;
        println!("  {name}: {took:?} ({:.0} a second), {length} bytes", 1.0 / took.as_secs_f64());
    }
    let deep = format!(
        "/api/liquidation-orders?symbol=BTCUSDT&start_timestamp={}&end_timestamp={last}&page={}&page_size=100",
        last - 300 * DAY,
        orders / 200
    );
    let begun = Instant::now();
    while compute(&engine, &symbol, Endpoint::Orders, &deep, Allowed::NOTHING).await.is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("  a page from the middle of it: {:?}, its details fetched", begun.elapsed());
}

async fn small() {
    println!("1,300 days of ten orders");
    let (read, last, before) = (Arc::default(), now() - 1000, resident());
    let (engine, symbol) = begin(Made::new(13_000, 1300, last, &read), 128 << 20).await;
    let all = window("1d", last - 1300 * DAY, last);
    println!("  all known after {:?}, for which {} orders were read", fill(&engine, &symbol, &all).await, read.load(Ordering::Relaxed));
    tell_memory(&engine, before, 13_000).await;
    println!("  all of it: {:?}", answer(&engine, &symbol, &all).await.0);
}
