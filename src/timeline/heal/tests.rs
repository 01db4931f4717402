//! What is voided and fetched anew, over a source that changes.

use super::super::engine::Source;
use super::super::symbol::First;
use super::*;
use crate::api::orders::{Batches, Bucket, Order, OrdersError, Page};
use crate::api::sample::Sample;
use crate::cache::Cache;
use crate::cache::memory::Memory;
use crate::cache::void::Effect;
use crate::config::Timeline as Settings;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use tokio::runtime::Handle;

const DAY: i64 = 86_400_000;

/// What happens while the newest orders are asked for.
type Meanwhile = dyn Fn(&Cache) + Send + Sync;

/// A source whose orders change.
struct Changing {
    rows: Arc<Mutex<Vec<String>>>,
    meanwhile: Mutex<Option<Box<Meanwhile>>>,
    cache: Arc<Cache>,
    lists: AtomicUsize,
    /// What was streamed of the past.
    streams: Mutex<Vec<Span>>,
}

impl Changing {
    fn now(&self) -> Sample {
        Sample::parse(&self.rows.lock().unwrap().join("\n"), Duration::ZERO).unwrap()
    }
}

impl Orders for Changing {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        self.now().symbols().await
    }

    async fn buckets(&self, symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, OrdersError> {
        self.now().buckets(symbol, span, width).await
    }

    async fn latest(&self, symbol: &str, limit: usize) -> Result<Vec<Order>, OrdersError> {
        self.lists.fetch_add(1, Ordering::AcqRel);
        let latest = self.now().latest(symbol, limit).await;
        if let Some(meanwhile) = self.meanwhile.lock().unwrap().take() {
            meanwhile(&self.cache);
        }
        latest
    }

    async fn page(&self, symbol: &str, span: Span, page: Page) -> Result<Vec<Order>, OrdersError> {
        self.now().page(symbol, span, page).await
    }

    async fn stream(&self, symbol: &str, span: Span) -> Result<Batches<OrdersError>, OrdersError> {
        if span.end < i64::MAX {
            self.streams.lock().unwrap().push(span);
        }
        let orders = self.now().page(symbol, span, Page { offset: 0, size: usize::MAX }).await?;
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        if !orders.is_empty() {
            let _ = sender.try_send(Ok(orders));
        }
        Ok(Batches::new(receiver))
    }

    async fn check(&self) -> Result<(), OrdersError> {
        Ok(())
    }
}

fn row(time: i64) -> String {
    format!("A,buy,LIMIT,IOC,1,2,2,FILLED,1,1,{time}")
}

fn now() -> i64 {
    moment(Wall::now())
}

/// An order an hour of the last days.
fn rows(days: i64) -> Vec<String> {
    (0..days * 24).map(|hours| row(now() - 1000 - hours * 3_600_000)).collect()
}

struct World {
    engine: Arc<Engine<Arc<Changing>>>,
    rows: Arc<Mutex<Vec<String>>>,
    symbol: Arc<Symbol>,
    cache: Arc<Cache>,
}

impl World {
    fn new(rows: Vec<String>, meanwhile: Option<Box<Meanwhile>>) -> Self {
        let metrics = Arc::new(Metrics::new().unwrap());
        let memory = Memory::new(1 << 20, 1 << 20, Arc::clone(&metrics)).unwrap();
        let cache = Cache::new(Arc::new(memory), Arc::default(), None, Handle::current(), Arc::clone(&metrics));
        let rows = Arc::new(Mutex::new(rows));
        let (cache_too, rows_too) = (Arc::clone(&cache), Arc::clone(&rows));
        let source = Arc::new(Changing {
            rows: rows_too,
            meanwhile: Mutex::new(meanwhile),
            cache: cache_too,
            lists: AtomicUsize::new(0),
            streams: Mutex::default(),
        });
        let source = Source { newest: Arc::clone(&source), past: source };
        let settings = Settings { refresh: Duration::from_millis(20), ..Settings::default() };
        let engine = Engine::new(source, true, settings, Arc::clone(&cache), Handle::current(), metrics).unwrap();
        let symbol = engine.symbol_or_new("A", || vec!["symbol:A".to_owned(), piece::tag("A")]);
        Self { engine, rows, symbol, cache }
    }

    async fn tail(&self) -> Arc<Tail> {
        self.engine.tail_anew(&self.symbol, Instant::now() + Duration::from_secs(60)).await.unwrap()
    }

    /// Brings the spans of some days before today.
    async fn bring(&self, days: i64) -> Vec<i64> {
        let today = self.tail().await.start;
        let starts: Vec<i64> = (1..=days).rev().map(|day| today - day * DAY).collect();
        assert!(self.engine.bring_spans(&self.symbol, &starts, Instant::now() + Duration::from_secs(60)).await);
        starts
    }

    /// How many orders of each span are in memory.
    fn stored(&self, starts: &[i64]) -> Vec<usize> {
        let count = |start| {
            let stretches = self.engine.stored(&self.symbol, start).unwrap();
            stretches.iter().map(|stretch| stretch.orders.count(Span { start, end: start + DAY - 1 })).sum()
        };
        starts.iter().map(|&start| count(start)).collect()
    }

    /// What was streamed of the past since this was asked last.
    fn streamed(&self) -> Vec<Span> {
        std::mem::take(&mut self.engine.past.streams.lock().unwrap())
    }
}

#[tokio::test]
async fn a_purge_while_the_newest_orders_are_asked_for_is_not_missed() {
    let purge: Box<Meanwhile> = Box::new(|cache| drop(cache.voids().add(Selection::Tag("symbol:A".into()), Effect::Remove, Wall::now())));
    let world = World::new(rows(2), Some(purge));
    world.tail().await;
    assert_eq!(world.engine.source.lists.load(Ordering::Acquire), 2, "what was asked for before the purge was used");
}

#[tokio::test]
async fn only_the_span_that_differs_is_fetched_anew() {
    for (days, wrong) in [(2, 1), (12, 7)] {
        let world = World::new(rows(14), None);
        let starts = world.bring(days).await;
        let before = world.stored(&starts);
        world.streamed();
        world.rows.lock().unwrap().push(row(starts[wrong] + 5));
        let span = Span {
            start: if days == 2 { starts[wrong] } else { starts[0] },
            end: if days == 2 { starts[wrong] + DAY - 1 } else { *starts.last().unwrap() },
        };
        assert!(world.engine.renew(&world.symbol, span).await);
        let after = world.stored(&starts);
        for place in 0..starts.len() {
            assert_eq!(after[place], before[place] + usize::from(place == wrong), "{days} {place}");
        }
        assert_eq!(world.streamed(), [Span { start: starts[wrong], end: starts[wrong] + DAY - 1 }], "the others stay");
    }
}

#[tokio::test]
async fn a_late_order_of_today_has_the_newest_part_asked_for_anew() {
    let world = World::new(rows(3), None);
    let starts = world.bring(2).await;
    let (before, spans) = (world.tail().await, world.stored(&starts));
    world.streamed();
    world.rows.lock().unwrap().push(row(before.start + 1));
    assert!(world.engine.renew(&world.symbol, Span { start: before.start, end: i64::MAX }).await);
    let after = world.tail().await;
    assert_eq!((after.start, after.columns.len()), (before.start, before.columns.len() + 1));
    assert_eq!((world.stored(&starts), world.streamed()), (spans, Vec::new()));
}

#[tokio::test]
async fn purges_of_others_that_are_forgotten_void_nothing() {
    let world = World::new(rows(4), None);
    let starts = world.bring(3).await;
    world.symbol.note_oldest(starts[0], world.cache.ask());
    let (spans, tail) = (world.stored(&starts), world.tail().await);
    world.streamed();
    for _ in 0..600 {
        world.cache.purge(Selection::Tag("symbol:B".into()), false).await;
    }
    assert_eq!((world.stored(&starts), world.streamed()), (spans, Vec::new()));
    let first: Arc<First> = world.symbol.first().unwrap();
    assert_eq!((world.engine.oldest(&world.symbol), first.moment), (Some(starts[0]), starts[0]));
    assert!(world.engine.known_tail(&world.symbol).is_some_and(|known| known.oldest_asked == tail.oldest_asked));
    world.cache.purge(Selection::Tag("symbol:A".into()), false).await;
    assert!(world.engine.spans.within("A", i64::MIN, i64::MAX).is_empty(), "they make room at once");
}
