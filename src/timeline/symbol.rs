//! What is known of one symbol: one entry, made once, evicted whole. Requests find it here, join what is under way about it, and never begin a
//! second question.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use foldhash::quality::RandomState;
use tokio::sync::watch;
use tokio::time::Instant;

use super::kept::Weigh;
use super::schedule::{Ended, Number};
use super::tail::Tail;
use super::unanswered::Unanswered;
use crate::api::orders::Span;
use crate::cache::entry::Checked;
use crate::cache::void::{Moment, Selection};
use crate::clock::millis;

/// A symbol whose orders are kept.
pub struct Symbol {
    /// The symbol, in upper case: the source is asked for it so.
    pub name: Arc<str>,
    /// Its number in the schedule.
    pub number: Number,
    /// The tags under which purges find its orders.
    tags: ArcSwap<Vec<String>>,
    /// Changes whenever the newest part does, and is that of no other entry, before or after.
    version: AtomicU64,
    is_evicted: AtomicBool,
    /// Whether the schedule knows that somebody wants it.
    wanted: AtomicBool,
    /// When it was used last, in milliseconds since the first use of any.
    used: AtomicU64,
    state: Mutex<State>,
    /// How many questions about its newest part have ended.
    pub questions: watch::Sender<u64>,
    filling: Mutex<Filling>,
    /// How many times spans that are over came, or failed to.
    pub fills: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    tail: Option<Arc<Tail>>,
    asking_since: Option<Instant>,
    /// How long the last question took that was answered.
    took: Duration,
    /// How it ended, unless it was answered.
    failed: Option<Ended>,
    /// When a check of it found the same as the backend's.
    verified: Option<Instant>,
    /// The last request about it that was left to the backend.
    left: Option<(Unanswered, Instant)>,
    first: Option<Arc<First>>,
}

/// Where a symbol's orders begin.
#[derive(Debug)]
pub struct First {
    /// There are none before this moment.
    pub moment: i64,
    /// When that was asked for.
    pub asked_at: Moment,
    /// The newest void that it was checked against.
    pub checked: Checked,
}

/// A stretch of time whose orders are wanted. Those that end last come last in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Want {
    /// The first millisecond after it.
    pub to: i64,
    /// Its first millisecond.
    pub from: i64,
    /// Whether details are wanted, not sums.
    pub details: bool,
}

/// What is to be brought of spans that are over, by the one task that does so.
#[derive(Default)]
pub struct Filling {
    /// What requests wait for.
    pub urgent: BTreeSet<Want>,
    /// What nobody waits for.
    pub wanted: BTreeSet<Want>,
    /// A window of which it is not known yet which spans it needs, and where the newest part begins.
    pub window: Option<(Span, i64)>,
    /// How much time a question may cover so that about as many orders come as one is to bring, in milliseconds; zero: it is not known yet.
    pub reach: i64,
    /// How many orders the last question found in the past, and in how many milliseconds.
    pub found: Option<(usize, i64)>,
    /// What is as long as this, in milliseconds, has no room, until then.
    pub too_long: Option<(i64, Instant)>,
    /// Whether a task is at it.
    pub is_active: bool,
    /// When a window was asked for last.
    pub asked: Option<(Instant, Moment)>,
    /// Failures in a row.
    pub failures: u32,
    /// Until when nothing is asked for after them.
    pub paused_until: Option<Instant>,
}

impl Symbol {
    /// Whether a purge concerns its orders.
    #[must_use]
    pub fn is_concerned(&self, selection: &Selection) -> bool {
        selection.matches("", &self.tags.load(), u64::MAX)
    }

    /// The tags of its orders.
    #[must_use]
    pub fn tags(&self) -> Arc<Vec<String>> {
        self.tags.load_full()
    }

    /// What an answer was made from: it is current as long as this is.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Whether it was forgotten: nobody says to it what is new.
    #[must_use]
    pub fn is_evicted(&self) -> bool {
        self.is_evicted.load(Ordering::Acquire)
    }

    /// Somebody wants its newest part. Whether the schedule is to know.
    #[must_use]
    pub fn is_wanted_anew(&self) -> bool {
        self.used.store(moment(), Ordering::Relaxed);
        !self.wanted.swap(true, Ordering::AcqRel)
    }

    /// The newest part as it is known.
    #[must_use]
    pub fn tail(&self) -> Option<Arc<Tail>> {
        self.state().tail.clone()
    }

    /// A question about the newest part begins.
    pub fn begin_question(&self) {
        self.wanted.store(false, Ordering::Release);
        self.state().asking_since = Some(Instant::now());
    }

    /// It has ended.
    pub fn end_question(&self, how: Ended) {
        let mut state = self.state();
        if let Some(since) = state.asking_since.take().filter(|_| how == Ended::Answered) {
            state.took = since.elapsed();
        }
        state.failed = Some(how).filter(|how| *how != Ended::Answered);
        drop(state);
        self.questions.send_modify(|ended| *ended += 1);
    }

    /// Since when the newest part is being asked for.
    #[must_use]
    pub fn asking_since(&self) -> Option<Instant> {
        self.state().asking_since
    }

    /// How long the last question took that was answered.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.state().took
    }

    /// How the last question ended, unless it was answered.
    #[must_use]
    pub fn failed(&self) -> Option<Ended> {
        self.state().failed
    }

    /// Why its newest part is not known, where it is not.
    #[must_use]
    pub fn why_missing(&self) -> Unanswered {
        match self.failed() {
            None => Unanswered::NewestMissing,
            Some(Ended::Unfit) => Unanswered::NewestUnfit,
            Some(_) => Unanswered::NewestFailing,
        }
    }

    /// A check of it found the same as the backend's.
    pub fn note_verified(&self) {
        self.state().verified = Some(Instant::now());
    }

    /// When one did the last time.
    #[must_use]
    pub fn verified(&self) -> Option<Instant> {
        self.state().verified
    }

    /// A request about it is left to the backend.
    pub fn note_left(&self, reason: Unanswered) {
        self.state().left = Some((reason, Instant::now()));
    }

    /// Why the last one was that was left to the backend, and when.
    #[must_use]
    pub fn left_to_backend(&self) -> Option<(Unanswered, Instant)> {
        self.state().left
    }

    /// Where its orders begin, as far as that is known.
    #[must_use]
    pub fn first(&self) -> Option<Arc<First>> {
        self.state().first.clone()
    }

    /// There are no orders before `moment`.
    pub fn note_oldest(&self, moment: i64, asked_at: Moment) {
        self.state().first = Some(Arc::new(First { moment, asked_at, checked: Checked::default() }));
    }

    /// What is to be brought of spans that are over.
    pub fn filling(&self) -> MutexGuard<'_, Filling> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since the first use of any symbol.
fn moment() -> u64 {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    millis(START.elapsed())
}

/// All symbols of which anything is known.
pub struct Symbols {
    all: RwLock<All>,
    /// How many there may be, and what their newest parts may take, in bytes.
    most: usize,
    capacity: u64,
    /// What they take.
    bytes: AtomicU64,
    next_version: AtomicU64,
}

#[derive(Default)]
struct All {
    by_name: HashMap<Arc<str>, Arc<Symbol>, RandomState>,
    by_number: HashMap<Number, Arc<Symbol>, RandomState>,
    next: Number,
}

impl Symbols {
    /// Room for `most` symbols, and for newest parts of `capacity` bytes.
    #[must_use]
    pub fn new(most: usize, capacity: u64) -> Self {
        Self { all: RwLock::default(), most, capacity, bytes: AtomicU64::new(0), next_version: AtomicU64::new(1) }
    }

    /// The symbol of this name, in upper case.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<Symbol>> {
        self.read().by_name.get(name).cloned()
    }

    /// The symbol of this number.
    #[must_use]
    pub fn numbered(&self, number: Number) -> Option<Arc<Symbol>> {
        self.read().by_number.get(&number).cloned()
    }

    /// The symbol of this name, and those that were evicted for it.
    pub fn get_or_make(&self, name: &str, tags: impl FnOnce() -> Vec<String>) -> (Arc<Symbol>, Vec<Arc<Symbol>>) {
        if let Some(known) = self.get(name) {
            return (known, Vec::new());
        }
        let mut all = self.write();
        if let Some(known) = all.by_name.get(name) {
            return (Arc::clone(known), Vec::new());
        }
        let mut evicted = Vec::new();
        while all.by_name.len() >= self.most {
            let Some(least) = least_used(&all, None) else { break };
            self.evict(&mut all, &least);
            evicted.push(least);
        }
        let symbol = Arc::new(Symbol {
            name: name.into(),
            number: all.next,
            tags: ArcSwap::from_pointee(tags()),
            version: AtomicU64::new(self.version()),
            is_evicted: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            used: AtomicU64::new(moment()),
            state: Mutex::default(),
            questions: watch::Sender::new(0),
            filling: Mutex::default(),
            fills: watch::Sender::new(0),
        });
        all.next += 1;
        all.by_name.insert(Arc::clone(&symbol.name), Arc::clone(&symbol));
        all.by_number.insert(symbol.number, Arc::clone(&symbol));
        (symbol, evicted)
    }

    /// Keeps a newest part, and says which symbols were evicted for it. `None`: there is no room for it alone.
    pub fn keep_tail(&self, symbol: &Arc<Symbol>, tail: Arc<Tail>) -> Option<Vec<Arc<Symbol>>> {
        let mut all = self.write();
        if symbol.is_evicted() {
            return Some(Vec::new());
        }
        if tail.weight() > self.capacity {
            self.set_tail(symbol, None);
            return None;
        }
        self.set_tail(symbol, Some(tail));
        let mut evicted = Vec::new();
        while self.bytes() > self.capacity {
            let Some(least) = least_used(&all, Some(symbol)) else { break };
            self.evict(&mut all, &least);
            evicted.push(least);
        }
        Some(evicted)
    }

    /// Forgets a newest part, which was purged.
    pub fn remove_tail(&self, symbol: &Symbol, purged: &Arc<Tail>) {
        let _alone = self.write();
        if symbol.tail().is_some_and(|tail| Arc::ptr_eq(&tail, purged)) {
            self.set_tail(symbol, None);
        }
    }

    /// The only place where a newest part changes; under the lock.
    fn set_tail(&self, symbol: &Symbol, tail: Option<Arc<Tail>>) {
        let mut state = symbol.state();
        let is_same = match (&state.tail, &tail) {
            (Some(known), Some(tail)) => Arc::ptr_eq(&known.columns, &tail.columns),
            (None, None) => true,
            _ => false,
        };
        let weight = |tail: &Option<Arc<Tail>>| tail.as_ref().map_or(0, |tail| tail.weight());
        self.bytes.fetch_add(weight(&tail), Ordering::Relaxed);
        self.bytes.fetch_sub(weight(&state.tail), Ordering::Relaxed);
        state.tail = tail;
        if !is_same {
            symbol.version.store(self.version(), Ordering::Release);
        }
    }

    fn evict(&self, all: &mut All, symbol: &Symbol) {
        symbol.is_evicted.store(true, Ordering::Release);
        self.set_tail(symbol, None);
        all.by_name.remove(&symbol.name);
        all.by_number.remove(&symbol.number);
        // Nothing comes any more for those who wait.
        symbol.questions.send_modify(|ended| *ended += 1);
        symbol.fills.send_modify(|fills| *fills += 1);
    }

    /// The tags of each are made anew.
    pub fn follow(&self, tags: impl Fn(&str) -> Vec<String>) {
        self.read().by_name.values().for_each(|symbol| symbol.tags.store(Arc::new(tags(&symbol.name))));
    }

    /// How many there are, how many of them have a newest part, and how many bytes these take.
    #[must_use]
    pub fn size(&self) -> (usize, usize, u64) {
        let all = self.read();
        let tails = all.by_name.values().filter(|symbol| symbol.tail().is_some()).count();
        (all.by_name.len(), tails, self.bytes())
    }

    /// All of them, at this moment.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Symbol>> {
        self.read().by_name.values().cloned().collect()
    }

    /// What newest parts take, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn version(&self) -> u64 {
        self.next_version.fetch_add(1, Ordering::Relaxed)
    }

    fn read(&self) -> RwLockReadGuard<'_, All> {
        self.all.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, All> {
        self.all.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The symbol that was used longest ago, other than one.
fn least_used(all: &All, but: Option<&Arc<Symbol>>) -> Option<Arc<Symbol>> {
    let others = all.by_name.values().filter(|symbol| but.is_none_or(|but| !Arc::ptr_eq(symbol, but)));
    others.min_by_key(|symbol| symbol.used.load(Ordering::Relaxed)).cloned()
}

#[cfg(test)]
mod tests {
    use super::super::builder::Builder;
    use super::super::columns::tests::order;
    use super::*;
    use crate::api::usd::Usd;
    use crate::clock::Wall;

    fn tail(orders: i64) -> Arc<Tail> {
        let orders: Vec<_> = (0..orders).rev().map(|time| order(time, "buy", Usd::Exact(1))).collect();
        let since = Builder::columns(&orders).unwrap();
        Arc::new(Tail::begin(0, &[], since, (Instant::now(), Wall::from_millis(1)), Moment::default()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn symbols_are_evicted_whole_and_made_anew_with_another_version() {
        let symbols = Symbols::new(2, 1 << 20);
        let make = |name: &str| symbols.get_or_make(name, Vec::new);
        let (one, _) = make("A");
        assert!(one.is_wanted_anew() && !one.is_wanted_anew());
        symbols.keep_tail(&one, tail(3)).unwrap();
        let version = one.version();
        symbols.keep_tail(&one, Arc::clone(&one.tail().unwrap())).unwrap();
        assert_eq!(one.version(), version, "nothing is new");
        tokio::time::advance(Duration::from_secs(1)).await;
        make("B");
        let (_, evicted) = make("C");
        assert!(evicted.len() == 1 && Arc::ptr_eq(&evicted[0], &one) && one.is_evicted());
        assert_eq!((symbols.bytes(), symbols.numbered(one.number).is_none(), symbols.size().0), (0, true, 2));
        // What a question about it brings is kept by nobody.
        assert!(symbols.keep_tail(&one, tail(3)).unwrap().is_empty() && symbols.bytes() == 0);
        let (again, _) = make("A");
        assert!(again.number != one.number && again.version() != version);
    }

    #[tokio::test(start_paused = true)]
    async fn newest_parts_are_bounded_in_bytes() {
        let weight = tail(100).weight();
        let symbols = Symbols::new(10, weight * 2);
        let mut made = Vec::new();
        for name in ["A", "B"] {
            let (symbol, _) = symbols.get_or_make(name, Vec::new);
            assert!(symbols.keep_tail(&symbol, tail(100)).unwrap().is_empty());
            made.push(symbol);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(symbols.bytes(), weight * 2);
        let (third, _) = symbols.get_or_make("C", Vec::new);
        let evicted = symbols.keep_tail(&third, tail(50)).unwrap();
        assert!(evicted.len() == 1 && Arc::ptr_eq(&evicted[0], &made[0]));
        assert!(symbols.keep_tail(&third, tail(1000)).is_none() && third.tail().is_none());
        symbols.remove_tail(&made[1], &tail(1));
        assert!(made[1].tail().is_some(), "another one came meanwhile");
        symbols.remove_tail(&made[1], &made[1].tail().unwrap());
        assert_eq!(symbols.bytes(), 0);
    }
}
