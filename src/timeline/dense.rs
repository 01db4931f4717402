//! Tests of the timeline over a symbol with many blocks of orders a day: what it answers is what its source answers, and each order is read once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout};

use super::columns::BLOCK;
use super::engine::{Allowed, Engine, Source};
use super::symbol::Symbol;
use super::tail::moment;
use super::view::View;
use crate::api::orders::{Batches, Bucket, Order, Orders, OrdersError, Page, Span};
use crate::api::sample::Sample;
use crate::cache::Cache;
use crate::cache::memory::Memory;
use crate::clock::Wall;
use crate::config::Timeline as Settings;
use crate::telemetry::metrics::Metrics;

const DAY: i64 = 86_400_000;
/// As many orders as make a dozen blocks, in two days.
const ORDERS: i64 = 200_000;

/// Orders in memory whose streams are counted, and break off when asked to.
struct Counted {
    orders: Sample,
    /// Orders that streams brought.
    read: AtomicU64,
    /// Streams end after a block and a half.
    breaks: AtomicBool,
}

impl Orders for Arc<Counted> {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        self.orders.symbols().await
    }

    async fn buckets(&self, symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, OrdersError> {
        self.orders.buckets(symbol, span, width).await
    }

    async fn latest(&self, symbol: &str, limit: usize) -> Result<Vec<Order>, OrdersError> {
        self.orders.latest(symbol, limit).await
    }

    async fn page(&self, symbol: &str, span: Span, page: Page) -> Result<Vec<Order>, OrdersError> {
        self.orders.page(symbol, span, page).await
    }

    async fn stream(&self, symbol: &str, span: Span) -> Result<Batches<OrdersError>, OrdersError> {
        let mut batches = self.orders.stream(symbol, span).await?;
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let counted = Self::clone(self);
        tokio::spawn(async move {
            let mut sent = 0;
            while let Some(batch) = batches.next().await {
                let count = batch.as_ref().map_or(0, Vec::len);
                if counted.breaks.load(Ordering::Acquire) && sent > BLOCK * 3 / 2 {
                    drop(sender.send(Err(OrdersError::Busy)).await);
                    return;
                }
                if sender.send(batch).await.is_err() {
                    return;
                }
                sent += count;
                counted.read.fetch_add(count as u64, Ordering::AcqRel);
            }
        });
        Ok(Batches::new(receiver))
    }

    async fn check(&self) -> Result<(), OrdersError> {
        Ok(())
    }
}

/// A timeline over such orders, up to a moment that has passed.
async fn begin(foreign: bool) -> (Arc<Counted>, Arc<Engine<Arc<Counted>>>, Arc<Symbol>, i64) {
    let (mut random, last) = (fastrand::Rng::with_seed(9), moment(Wall::now()) - 1000);
    let rows: Vec<String> = (0..ORDERS)
        .map(|number| {
            // Of some moments there are several.
            let time = last - (number / 3 * 3) * (2 * DAY / ORDERS);
            let (side, price) = (if random.bool() { "buy" } else { "sell" }, random.u32(1..9_000_000));
            format!(
                "BTCUSDT,{side},LIMIT,IOC,{number},1.5,{}.{:02},FILLED,0.1,0.{:03},{time}",
                price / 100,
                price % 100,
                random.u16(1..1000)
            )
        })
        .collect();
    let orders = Sample::parse(&rows.join("\n"), Duration::ZERO).unwrap();
    let source = Arc::new(Counted { orders, read: AtomicU64::new(0), breaks: AtomicBool::new(false) });
    let metrics = Arc::new(Metrics::new().unwrap());
    let store = Arc::new(Memory::new(1 << 20, 1 << 20, Arc::clone(&metrics)).unwrap());
    let cache = Cache::new(store, Arc::default(), None, Handle::current(), Arc::clone(&metrics));
    let settings = Settings { refresh: Duration::from_secs(3600), memory: 64 << 20, ..Settings::default() };
    let both = Source { newest: Arc::clone(&source), past: Arc::clone(&source) };
    let engine = Engine::new(both, foreign, settings, cache, Handle::current(), metrics).unwrap();
    let symbol = engine.symbol_or_new("BTCUSDT", Vec::new);
    until(|| engine.known_tail(&symbol).is_some()).await;
    (source, engine, symbol, last)
}

async fn until(is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(60), waiting).await.expect("it never was");
}

fn view(engine: &Arc<Engine<Arc<Counted>>>, symbol: &Arc<Symbol>) -> View<Arc<Counted>> {
    View::new(Arc::clone(engine), Arc::clone(symbol), Allowed::NOTHING)
}

/// Sums from the timeline, as soon as it has them.
async fn sums(engine: &Arc<Engine<Arc<Counted>>>, symbol: &Arc<Symbol>, span: Span, width: i64) -> Vec<Bucket> {
    let begun = Instant::now();
    loop {
        match view(engine, symbol).buckets("BTCUSDT", span, width).await {
            Ok(buckets) => return buckets,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(60), "{error}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_blocks_a_day_are_answered_as_their_source_does() {
    for foreign in [false, true] {
        let (source, engine, symbol, last) = begin(foreign).await;
        let tail = engine.known_tail(&symbol).unwrap();
        assert!(tail.columns.len() < 2 * BLOCK, "the newest part is {} orders", tail.columns.len());
        let all = Span { start: last - 2 * DAY, end: last };
        assert_eq!(sums(&engine, &symbol, all, DAY).await, source.buckets("BTCUSDT", all, DAY).await.unwrap());
        assert_eq!(source.read.load(Ordering::Acquire), ORDERS as u64, "each order is read once");
        assert!(engine.size().bytes < ORDERS as u64 * 75, "{} bytes", engine.size().bytes);
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..60 {
            let start = random.i64(all.start..all.end);
            let span = Span { start, end: random.i64(start..=all.end) };
            let width = [60_000, 3_600_000, DAY][random.usize(..3)];
            assert_eq!(sums(&engine, &symbol, span, width).await, source.buckets("BTCUSDT", span, width).await.unwrap(), "{span:?}");
            let page = Page { offset: random.u64(..60_000), size: random.usize(1..100) };
            let expected = source.page("BTCUSDT", span, page).await.unwrap();
            let expected: Vec<Order> = expected.into_iter().map(|order| Order { usd: crate::api::usd::Usd::Unknown, ..order }).collect();
            assert_eq!(view(&engine, &symbol).page("BTCUSDT", span, page).await.unwrap(), expected, "{span:?} {page:?}");
        }
    }
}

/// A question that finds nothing where it was thought that there is much: the past is not judged by today.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_day_says_nothing_of_those_before_it() {
    let (source, engine, symbol, last) = begin(false).await;
    let all = Span { start: last - 400 * DAY, end: last };
    // At the density of the last two days it would take half a gigabyte.
    assert_eq!(sums(&engine, &symbol, all, DAY).await, source.buckets("BTCUSDT", all, DAY).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_off_goes_on_where_it_stopped() {
    let (source, engine, symbol, last) = begin(false).await;
    let all = Span { start: last - 2 * DAY, end: last };
    source.breaks.store(true, Ordering::Release);
    assert!(view(&engine, &symbol).buckets("BTCUSDT", all, DAY).await.is_err());
    until(|| symbol.filling().is_paused()).await;
    let before = source.read.load(Ordering::Acquire);
    assert!(engine.size().spans > 0, "what came was kept");
    source.breaks.store(false, Ordering::Release);
    assert_eq!(sums(&engine, &symbol, all, DAY).await, source.buckets("BTCUSDT", all, DAY).await.unwrap());
    let again = source.read.load(Ordering::Acquire) - ORDERS as u64;
    assert!(again < 2 * BLOCK as u64, "{again} orders were read twice, {before} had come");
}
