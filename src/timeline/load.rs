//! Drives an engine over a fake source under paused time: thousands of symbols, and a source that is slow, fails, or hangs for one kind of question.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::engine::{Allowed, Engine, Newness, Source};
use super::symbol::{Symbol, Want};
use super::unanswered::Unanswered;
use crate::api::orders::{Batches, Bucket, Order, Orders, OrdersError, Page, Span};
use crate::cache::Cache;
use crate::cache::memory::Memory;
use crate::config::Timeline as Settings;
use crate::telemetry::metrics::Metrics;

const S: Duration = Duration::from_secs(1);
const DAY: i64 = 86_400_000;

/// What the source does with one kind of question, and how it was asked.
#[derive(Default)]
struct Kind {
    takes_ms: AtomicU64,
    fails: AtomicBool,
    hangs: AtomicBool,
    /// Its streams are out of order.
    unfit: AtomicBool,
    asking: AtomicUsize,
    most: AtomicUsize,
    by_symbol: Mutex<BTreeMap<String, u32>>,
}

impl Kind {
    fn questions(&self) -> u32 {
        self.by_symbol.lock().unwrap().values().sum()
    }

    async fn ask(&self, symbol: &str) -> Result<(), OrdersError> {
        struct Asking<'k>(&'k AtomicUsize);
        impl Drop for Asking<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        *self.by_symbol.lock().unwrap().entry(symbol.to_owned()).or_default() += 1;
        self.most.fetch_max(self.asking.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        let _asking = Asking(&self.asking);
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        sleep(Duration::from_millis(self.takes_ms.load(Ordering::Relaxed))).await;
        if self.fails.load(Ordering::Relaxed) { Err(OrdersError::Unavailable("it fails".into())) } else { Ok(()) }
    }
}

/// A source without orders.
struct Fake(Arc<Kind>);

impl Orders for Fake {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        Err(OrdersError::NotCovered)
    }

    async fn buckets(&self, symbol: &str, _: Span, _: i64) -> Result<Vec<Bucket>, OrdersError> {
        self.0.ask(symbol).await.map(|()| Vec::new())
    }

    async fn latest(&self, _: &str, _: usize) -> Result<Vec<Order>, OrdersError> {
        Ok(Vec::new())
    }

    async fn page(&self, symbol: &str, _: Span, _: Page) -> Result<Vec<Order>, OrdersError> {
        self.0.ask(symbol).await.map(|()| Vec::new())
    }

    async fn stream(&self, symbol: &str, _: Span) -> Result<Batches<OrdersError>, OrdersError> {
        self.0.ask(symbol).await?;
        if !self.0.unfit.load(Ordering::Relaxed) {
            return Ok(Batches::none());
        }
        let (sender, receiver) = mpsc::channel(1);
        // One without a time.
        drop(sender.try_send(Ok(vec![Order::default()])));
        Ok(Batches::new(receiver))
    }

    async fn check(&self) -> Result<(), OrdersError> {
        Ok(())
    }
}

struct World {
    engine: Arc<Engine<Fake>>,
    newest: Arc<Kind>,
    past: Arc<Kind>,
    symbols: Vec<Arc<Symbol>>,
}

impl World {
    /// `symbols` of them, over a source that takes this long for a question.
    fn new(symbols: usize, takes: Duration) -> Self {
        let metrics = Arc::new(Metrics::new().unwrap());
        let memory = Memory::new(1 << 20, 1 << 18, Arc::clone(&metrics)).unwrap();
        let cache = Cache::new(Arc::new(memory), Arc::default(), None, Handle::current(), Arc::clone(&metrics));
        let [newest, past] = [(), ()].map(|()| Arc::new(Kind::default()));
        for kind in [&newest, &past] {
            kind.takes_ms.store(u64::try_from(takes.as_millis()).unwrap(), Ordering::Relaxed);
        }
        let source = Source { newest: Fake(Arc::clone(&newest)), past: Fake(Arc::clone(&past)) };
        let engine = Engine::new(source, false, Settings::default(), cache, Handle::current(), metrics).unwrap();
        let symbols = (0..symbols).map(|number| engine.symbol_or_new(&format!("S{number}"), Vec::new)).collect();
        Self { engine, newest, past, symbols }
    }

    /// All symbols are wanted each second. Gives the greatest age of any symbol's newest orders at those moments, and how far behind the
    /// source was at most, both after `warm` seconds.
    async fn watch(&self, warm: u32, seconds: u32) -> (Duration, Duration) {
        let (mut oldest, mut behind) = (Duration::ZERO, Duration::ZERO);
        for second in 0..warm + seconds {
            for symbol in &self.symbols {
                let tail = self.engine.known_tail(symbol);
                if second >= warm {
                    oldest = oldest.max(tail.map_or(Duration::MAX, |tail| tail.asked.elapsed()));
                }
            }
            if second >= warm {
                behind = behind.max(self.engine.size().behind);
            }
            sleep(S).await;
        }
        (oldest, behind)
    }
}

#[tokio::test(start_paused = true)]
async fn refresh_is_kept_for_2000_symbols_where_the_source_can_do_2000_questions_in_that_time() {
    let world = World::new(2000, Duration::from_millis(18));
    let (oldest, behind) = world.watch(20, 60).await;
    assert!(oldest <= S * 6 && behind <= S, "{oldest:?} old, {behind:?} behind");
    let questions = world.newest.questions();
    assert!((2000 * 80 / 6..=2000 * 80 / 5).contains(&questions), "{questions}");
    assert_eq!(world.newest.most.load(Ordering::Relaxed), Settings::default().questions);
}

#[tokio::test(start_paused = true)]
async fn where_the_source_cannot_the_pauses_grow_alike_for_all_and_the_metric_says_so() {
    // Eight at a time make 133 a second: 2,000 take 15 seconds.
    let world = World::new(2000, Duration::from_millis(60));
    let (oldest, behind) = world.watch(40, 120).await;
    assert!(oldest >= S * 14 && oldest <= S * 17, "{oldest:?} old");
    assert!(behind >= S * 8 && behind <= S * 12, "{behind:?} behind");
    let by_symbol = world.newest.by_symbol.lock().unwrap();
    let (least, most) = (by_symbol.values().min().unwrap(), by_symbol.values().max().unwrap());
    assert!(by_symbol.len() == 2000 && most - least <= 1, "{least} to {most}");
    assert_eq!(world.newest.most.load(Ordering::Relaxed), Settings::default().questions);
}

/// The sums of a day.
const fn day(number: i64) -> Want {
    Want { to: (number + 1) * DAY, from: number * DAY, details: false }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_hangs_for_the_past_alone_does_not_make_the_newest_orders_late() {
    let world = World::new(100, Duration::from_millis(15));
    world.past.hangs.store(true, Ordering::Relaxed);
    for symbol in &world.symbols {
        let (engine, symbol) = (Arc::clone(&world.engine), Arc::clone(symbol));
        tokio::spawn(async move { assert_eq!(engine.fill_few(&symbol, &[day(1)]).await, Err(Unanswered::SpansMissing)) });
    }
    let (oldest, behind) = world.watch(5, 60).await;
    assert!(oldest <= S * 6 && behind <= S, "{oldest:?} old, {behind:?} behind");
    assert_eq!(world.past.most.load(Ordering::Relaxed), Settings::default().concurrency);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_hangs_for_the_newest_orders_alone_goes_on_giving_those_of_the_past() {
    let world = World::new(100, Duration::from_millis(15));
    let (oldest, _) = world.watch(5, 5).await;
    assert!(oldest <= S * 6);
    world.newest.hangs.store(true, Ordering::Relaxed);
    world.watch(30, 0).await;
    for symbol in &world.symbols {
        assert_eq!(world.engine.fill_few(symbol, &[day(1), day(2)]).await, Ok(()));
    }
    // What hangs for so long fails: what is known is given at once, for symbols that are asked for and for those that wait for them.
    let failing = async || {
        for symbol in &world.symbols {
            let began = Instant::now();
            let (_, newness, _) = world.engine.new_tail(symbol, Allowed { late: S, failing: S * 3600 }).await.unwrap();
            assert!(matches!(newness, Newness::Failing(_)) && began.elapsed().is_zero(), "{newness:?}");
        }
    };
    failing().await;
    let nothing = Allowed { late: S, failing: S };
    assert_eq!(world.engine.new_tail(&world.symbols[0], nothing).await.map(|_| ()), Err(Unanswered::NewestFailing));
    world.watch(120, 0).await;
    failing().await;
    assert!(world.newest.most.load(Ordering::Relaxed) <= Settings::default().questions);
    world.newest.hangs.store(false, Ordering::Relaxed);
    let (oldest, _) = world.watch(200, 10).await;
    assert!(oldest <= S * 6, "{oldest:?} old");
}

#[tokio::test(start_paused = true)]
async fn a_question_that_hangs_is_waited_for_and_then_what_is_known_is_given() {
    let world = World::new(1, Duration::from_millis(15));
    let symbol = &world.symbols[0];
    let allowed = Allowed { late: S, failing: S * 3600 };
    world.watch(5, 0).await;
    sleep(S * 10).await;
    world.newest.hangs.store(true, Ordering::Relaxed);
    let began = Instant::now();
    let (_, newness, waited) = world.engine.new_tail(symbol, allowed).await.unwrap();
    assert!(matches!(newness, Newness::Failing(_)) && waited && began.elapsed() == S * 10, "{newness:?} after {:?}", began.elapsed());
    // A slow one does not hang.
    world.newest.hangs.store(false, Ordering::Relaxed);
    world.newest.takes_ms.store(9000, Ordering::Relaxed);
    world.watch(250, 0).await;
    world.newest.takes_ms.store(20_000, Ordering::Relaxed);
    sleep(S * 60).await;
    let began = Instant::now();
    assert_eq!(world.engine.new_tail(symbol, allowed).await.map(|_| ()), Err(Unanswered::NewestLate));
    assert_eq!(began.elapsed(), S * 10);
}

#[tokio::test(start_paused = true)]
async fn what_is_nothing_to_compute_with_is_no_failure_of_the_backend() {
    let world = World::new(1, Duration::from_millis(15));
    let symbol = &world.symbols[0];
    world.watch(5, 0).await;
    world.newest.unfit.store(true, Ordering::Relaxed);
    sleep(S * 10).await;
    let allowed = Allowed { late: S, failing: S * 3600 };
    assert_eq!(world.engine.new_tail(symbol, allowed).await.map(|_| ()), Err(Unanswered::NewestUnfit));
    let longer = Allowed { late: S * 20, ..allowed };
    assert!(matches!(world.engine.new_tail(symbol, longer).await, Ok((_, Newness::Late(_), _))));
    world.newest.unfit.store(false, Ordering::Relaxed);
    world.watch(70, 0).await;
    assert!(matches!(world.engine.new_tail(symbol, allowed).await, Ok((_, Newness::Fresh, _))));
}

#[tokio::test(start_paused = true)]
async fn what_may_be_late_is_given_at_once_where_turns_are_far_away() {
    let world = World::new(500, Duration::from_millis(15));
    world.watch(5, 0).await;
    world.newest.takes_ms.store(3000, Ordering::Relaxed);
    world.watch(20, 0).await;
    let allowed = Allowed { late: S * 60, failing: S * 60 };
    for symbol in &world.symbols {
        let began = Instant::now();
        let (_, newness, waited) = world.engine.new_tail(symbol, allowed).await.unwrap();
        let is_asked = symbol.asking_since().is_some() || newness == Newness::Fresh;
        assert!(is_asked || (began.elapsed().is_zero() && !waited), "{newness:?} after {:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_is_asked_by_one_question_at_a_time_for_all_symbols_together() {
    let world = World::new(500, Duration::from_millis(15));
    for kind in [&world.newest, &world.past] {
        kind.fails.store(true, Ordering::Relaxed);
    }
    let filling = async {
        for _ in 0..120 {
            for symbol in &world.symbols {
                let reason = world.engine.fill_many(symbol, Span { start: DAY, end: 40 * DAY }, 100 * DAY);
                assert!(matches!(reason, Unanswered::SpansMissing | Unanswered::SpansFailing));
            }
            sleep(S).await;
        }
    };
    tokio::join!(world.watch(120, 0), filling);
    let (newest, past) = (world.newest.questions(), world.past.questions());
    assert!((6..=20).contains(&newest) && (6..=20).contains(&past), "{newest} and {past} questions in two minutes");
    assert_eq!(world.engine.spared(), (true, true));
    for kind in [&world.newest, &world.past] {
        kind.fails.store(false, Ordering::Relaxed);
    }
    let (oldest, behind) = world.watch(40, 10).await;
    assert!(oldest <= S * 6 && behind <= S, "{oldest:?} old, {behind:?} behind");
    assert!(!world.engine.spared().0);
}
