//! Stretches of time of which all orders are known, in memory: bounded in bytes, found by symbol and time.
//!
//! A stretch holds one half of the orders of a block: there are as many [`Spans`] as there are halves, each with room of its own. Stretches
//! of a symbol never overlap. When there is no room, one that was not used since its last turn goes.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use foldhash::fast::RandomState;

use super::kept::Weigh;
use super::memory::shared;
use crate::cache::entry::Checked;
use crate::cache::void::Moment;

/// All orders of a symbol within `from..to`.
#[derive(Debug)]
pub struct Stretch<V> {
    /// Its first millisecond.
    pub from: i64,
    /// The first millisecond after it.
    pub to: i64,
    /// A half of its orders.
    pub orders: Arc<V>,
    /// When they were asked for: what was voided since is not used.
    pub asked_at: Moment,
    /// The newest void that they were checked against.
    pub checked: Checked,
    used: AtomicBool,
}

/// What a stretch takes in the map and in the queue of turns besides, in bytes: two words each, half as much again for the room between.
const PLACES: u64 = 48;

impl<V: Weigh> Stretch<V> {
    /// A stretch of which nobody knows yet.
    #[must_use]
    pub fn new((from, to): (i64, i64), orders: Arc<V>, asked_at: Moment, checked: Checked) -> Self {
        Self { from, to, orders, asked_at, checked, used: AtomicBool::new(false) }
    }

    fn weight(&self) -> u64 {
        shared::<Self>() + PLACES + self.orders.weight()
    }
}

/// Stretches of all symbols.
pub struct Spans<V> {
    all: RwLock<All<V>>,
    capacity: u64,
}

struct All<V> {
    by_symbol: HashMap<Arc<str>, BTreeMap<i64, Arc<Stretch<V>>>, RandomState>,
    /// In the order in which they are looked at when there is no room. Some are not there any more.
    turns: VecDeque<(Arc<str>, Weak<Stretch<V>>)>,
    count: usize,
    bytes: u64,
}

impl<V: Weigh> Spans<V> {
    /// Room for so many bytes.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        let all = All { by_symbol: HashMap::default(), turns: VecDeque::new(), count: 0, bytes: 0 };
        Self { all: RwLock::new(all), capacity }
    }

    /// The stretches of a symbol that reach into `from..to`, oldest first.
    #[must_use]
    pub fn within(&self, symbol: &str, from: i64, to: i64) -> Vec<Arc<Stretch<V>>> {
        let all = self.read();
        let Some(of_symbol) = all.by_symbol.get(symbol).filter(|_| from < to) else { return Vec::new() };
        let reaching = overlapping(of_symbol, from, to);
        reaching
            .inspect(|stretch| {
                if !stretch.used.load(Ordering::Relaxed) {
                    stretch.used.store(true, Ordering::Relaxed);
                }
            })
            .cloned()
            .collect()
    }

    /// Keeps a stretch, if there is room for it at all; those that it overlaps are forgotten.
    pub fn insert(&self, symbol: &Arc<str>, stretch: Stretch<V>) {
        let weight = stretch.weight();
        let mut all = self.write();
        let known = all.by_symbol.get(symbol);
        let overlapped: Vec<_> = known.map(|known| overlapping(known, stretch.from, stretch.to).cloned().collect()).unwrap_or_default();
        overlapped.iter().for_each(|overlapped| all.remove(symbol, overlapped));
        if weight > self.capacity || stretch.from >= stretch.to {
            return;
        }
        let stretch = Arc::new(stretch);
        all.turns.push_back((Arc::clone(symbol), Arc::downgrade(&stretch)));
        all.by_symbol.entry(Arc::clone(symbol)).or_default().insert(stretch.from, stretch);
        (all.count, all.bytes) = (all.count + 1, all.bytes + weight);
        all.make_room(self.capacity);
    }

    /// Forgets a stretch.
    pub fn remove(&self, symbol: &str, stretch: &Arc<Stretch<V>>) {
        self.write().remove(symbol, stretch);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.read().count
    }

    /// How many bytes they take together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.read().bytes
    }

    /// How many bytes they may take.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read(&self) -> RwLockReadGuard<'_, All<V>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, All<V>> {
        self.all.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those that reach into `from..to`, of which none overlap.
fn overlapping<V>(known: &BTreeMap<i64, Arc<Stretch<V>>>, from: i64, to: i64) -> impl Iterator<Item = &Arc<Stretch<V>>> {
    let before = known.range(..from).next_back().map(|(_, stretch)| stretch).filter(|stretch| stretch.to > from);
    let inside = if from < to { (Bound::Included(from), Bound::Excluded(to)) } else { (Bound::Excluded(from), Bound::Included(from)) };
    before.into_iter().chain(known.range(inside).map(|(_, stretch)| stretch))
}

impl<V: Weigh> All<V> {
    fn remove(&mut self, symbol: &str, stretch: &Arc<Stretch<V>>) {
        let Some(of_symbol) = self.by_symbol.get_mut(symbol) else { return };
        if of_symbol.get(&stretch.from).is_none_or(|known| !Arc::ptr_eq(known, stretch)) {
            return;
        }
        of_symbol.remove(&stretch.from);
        if of_symbol.is_empty() {
            self.by_symbol.remove(symbol);
        }
        (self.count, self.bytes) = (self.count - 1, self.bytes - stretch.weight());
    }

    /// Looks at each in turn, and forgets those that were not used since their last turn, until the rest has room.
    fn make_room(&mut self, capacity: u64) {
        if self.turns.len() > 2 * self.count + 64 {
            self.turns.retain(|(_, stretch)| stretch.strong_count() > 0);
        }
        while self.bytes > capacity {
            let Some((symbol, turn)) = self.turns.pop_front() else { return };
            let Some(stretch) = turn.upgrade() else { continue };
            if stretch.used.swap(false, Ordering::Relaxed) {
                self.turns.push_back((symbol, turn));
            } else {
                self.remove(&symbol, &stretch);
            }
        }
    }
}

/// The parts of `from..to` that none of these stretches (in order of time, within it) covers, oldest first.
#[must_use]
pub fn gaps<V>(stretches: &[Arc<Stretch<V>>], from: i64, to: i64) -> Vec<(i64, i64)> {
    let mut gaps = Vec::new();
    let mut known = from;
    for stretch in stretches {
        if stretch.from > known {
            gaps.push((known, stretch.from.min(to)));
        }
        known = known.max(stretch.to);
    }
    if known < to {
        gaps.push((known, to));
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Bytes(u64);

    impl Weigh for Bytes {
        fn weight(&self) -> u64 {
            self.0
        }
    }

    fn stretch(from: i64, to: i64, bytes: u64) -> Stretch<Bytes> {
        Stretch::new((from, to), Arc::new(Bytes(bytes)), Moment::default(), Checked::default())
    }

    fn known(spans: &Spans<Bytes>, symbol: &str) -> Vec<(i64, i64)> {
        spans.within(symbol, i64::MIN, i64::MAX).iter().map(|stretch| (stretch.from, stretch.to)).collect()
    }

    #[test]
    fn the_newer_of_two_that_overlap_stays() {
        let spans = Spans::new(1 << 20);
        let symbol: Arc<str> = "A".into();
        for (from, to) in [(0, 10), (10, 20), (30, 40), (15, 16), (35, 50)] {
            spans.insert(&symbol, stretch(from, to, 100));
        }
        assert_eq!(known(&spans, "A"), [(0, 10), (15, 16), (35, 50)]);
        assert_eq!((spans.count(), known(&spans, "B").len()), (3, 0));
        let found = spans.within("A", 5, 40);
        assert_eq!(gaps(&found, 5, 40), [(10, 15), (16, 35)]);
        assert_eq!(gaps(&spans.within("A", 20, 30), 20, 30), [(20, 30)]);
        found.iter().for_each(|stretch| spans.remove("A", stretch));
        assert_eq!((spans.count(), spans.bytes(), gaps(&found, 36, 49)), (0, 0, vec![]));
    }

    #[test]
    fn what_was_not_used_makes_room() {
        let spans = Spans::new(10_000);
        let symbol: Arc<str> = "A".into();
        for day in 0..40 {
            spans.insert(&symbol, stretch(day, day + 1, 1000));
            assert_eq!(spans.within("A", 0, 1).len(), 1, "it is used all the time");
            assert!(spans.bytes() <= 10_000);
        }
        assert!(spans.count() >= 7 && known(&spans, "A").contains(&(39, 40)));
        spans.insert(&symbol, stretch(0, 1, 20_000));
        assert_eq!(spans.within("A", 0, 1).len(), 0);
        assert!(spans.all.read().unwrap().turns.len() <= 2 * spans.count() + 64);
    }

    proptest! {
        #[test]
        fn stretches_and_gaps_are_all_that_was_asked_for(kept in proptest::collection::vec((0_i64..100, 1_i64..30), 0..20), from in 0_i64..100, length in 1_i64..60) {
            let spans = Spans::new(1 << 20);
            for &(from, length) in &kept {
                spans.insert(&"A".into(), stretch(from, from + length, 100));
            }
            let all = spans.within("A", i64::MIN, i64::MAX);
            prop_assert!(all.windows(2).all(|pair| pair[0].to <= pair[1].from));
            prop_assert_eq!(spans.bytes(), all.iter().map(|stretch| stretch.weight()).sum::<u64>());
            let found = spans.within("A", from, from + length);
            let gaps = gaps(&found, from, from + length);
            for moment in from..from + length {
                let is_known = found.iter().any(|stretch| (stretch.from..stretch.to).contains(&moment));
                prop_assert_eq!(gaps.iter().any(|gap| (gap.0..gap.1).contains(&moment)), !is_known);
            }
        }
    }
}
