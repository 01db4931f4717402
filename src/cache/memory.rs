//! The tier in memory: bounded in bytes, with quick_cache's scan-resistant eviction (S3-FIFO with a ghost queue).

use std::collections::BTreeMap;
use std::hash::BuildHasher as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use foldhash::fast::RandomState;
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};

use super::entry::Entry;
use super::key::{Canonical, Key};
use super::store::{Store, StoreFuture, Tier};
use super::void::Validity;
use crate::clock::Wall;
use crate::telemetry::metrics::Metrics;

/// Locks that writers share: those of different keys seldom wait for one another.
const WRITE_LOCKS: usize = 64;
/// Prefixes of keys that statistics tell apart.
const MAX_PREFIXES: usize = 100;

/// Stores entries in this process.
pub struct Memory {
    cache: Cache<Bytes, Arc<Entry>, Weight, RandomState, Evictions>,
    /// Held while an entry is written, so that none takes the place of a newer one that it was not made from.
    writing: [Mutex<()>; WRITE_LOCKS],
    hasher: RandomState,
    metrics: Arc<Metrics>,
}

#[derive(Clone)]
struct Weight;

impl Weighter<Bytes, Arc<Entry>> for Weight {
    fn weight(&self, _: &Bytes, entry: &Arc<Entry>) -> u64 {
        entry.weight()
    }
}

/// Counts what is evicted for want of room.
#[derive(Clone)]
struct Evictions(prometheus::IntCounter);

impl Lifecycle<Bytes, Arc<Entry>> for Evictions {
    type RequestState = ();

    fn on_evict(&self, (): &mut (), _: Bytes, _: Arc<Entry>) {
        self.0.inc();
    }
}

impl Memory {
    /// A tier of at most `bytes`, in which objects of up to `max_object` bytes have their place.
    ///
    /// # Errors
    /// The options make no sense to the cache, which a test rules out.
    pub fn new(bytes: u64, max_object: usize, metrics: Arc<Metrics>) -> Result<Self, crate::body::BoxError> {
        // Each shard is a cache of its own: it must have room for several of the largest objects.
        let shards = (bytes / (4 * max_object as u64).max(1)).clamp(1, 16);
        let options = OptionsBuilder::new()
            .weight_capacity(bytes)
            .estimated_items_capacity(usize::try_from(bytes / 2048).unwrap_or(usize::MAX).clamp(64, 1 << 20))
            .shards(usize::try_from(shards).unwrap_or(1))
            .build()
            .map_err(|_| "the memory tier's options are contradictory")?;
        let evictions = Evictions(metrics.evictions.with_label_values(&["size"]));
        let cache = Cache::with_options(options, Weight, RandomState::default(), evictions);
        Ok(Self { cache, writing: [const { Mutex::new(()) }; WRITE_LOCKS], hasher: RandomState::default(), metrics })
    }

    fn update_gauges(&self) {
        self.metrics.memory_bytes.set(i64::try_from(self.cache.weight()).unwrap_or(i64::MAX));
        self.metrics.memory_entries.set(i64::try_from(self.cache.len()).unwrap_or(i64::MAX));
    }

    /// Keeps other writers of this key away.
    fn write_alone(&self, canonical: &Bytes) -> MutexGuard<'_, ()> {
        let lock = usize::try_from(self.hasher.hash_one(canonical) % WRITE_LOCKS as u64).unwrap_or(0);
        self.writing[lock].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores an entry, at once, unless the response to a later request is there by now.
    pub fn insert(&self, entry: Arc<Entry>) {
        let _alone = self.write_alone(&entry.canonical);
        if self.cache.peek(&entry.canonical).is_some_and(|there| entry.is_overtaken_by(&there)) {
            return;
        }
        self.cache.insert(entry.canonical.clone(), entry);
        self.update_gauges();
    }

    /// Removes an entry whose lifetimes are all over. One that took its place meanwhile stays.
    fn remove_expired(&self, entry: &Arc<Entry>) {
        if self.cache.remove_if(&entry.canonical, |current| Arc::ptr_eq(current, entry)).is_some() {
            self.metrics.evictions.with_label_values(&["expired"]).inc();
            self.update_gauges();
        }
    }
}

impl Store for Memory {
    fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>> {
        self.cache.get(&canonical.0)
    }

    fn get<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Arc<Entry>>> {
        let found = self.peek(&key.canonical);
        let now = Wall::now();
        if let Some(entry) = found.as_ref().filter(|entry| now.since(entry.stored_at) >= entry.lifetimes.kept()) {
            self.remove_expired(entry);
            return Box::pin(std::future::ready(None));
        }
        Box::pin(std::future::ready(found))
    }

    fn put<'a>(&'a self, _: &'a Key, entry: Arc<Entry>) -> StoreFuture<'a, ()> {
        self.insert(entry);
        Box::pin(std::future::ready(()))
    }

    fn keep(&self, entry: Arc<Entry>) {
        self.insert(entry);
    }

    fn replace(&self, entry: &Arc<Entry>, other: Option<Arc<Entry>>) {
        let is_same = |current: &Arc<Entry>| Arc::ptr_eq(current, entry);
        let changed = match other {
            Some(other) => {
                let _alone = self.write_alone(&entry.canonical);
                self.cache.peek(&entry.canonical).as_ref().is_some_and(is_same)
                    && self.cache.replace(entry.canonical.clone(), other, true).is_ok()
            }
            None => self.cache.remove_if(&entry.canonical, is_same).is_some(),
        };
        if changed {
            self.update_gauges();
        }
    }

    fn remove<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        self.cache.remove(&key.canonical.0);
        self.update_gauges();
        Box::pin(std::future::ready(()))
    }

    fn work_off(&self, judge: &mut dyn FnMut(&Entry) -> Validity) {
        let judged: Vec<_> = self
            .cache
            .iter()
            .filter_map(|(_, entry)| match judge(&entry) {
                Validity::Valid => None,
                Validity::Expired(left) => Some((entry, Some(Arc::from(left)))),
                Validity::Void => Some((entry, None)),
            })
            .collect();
        for (entry, left) in judged {
            // Only the very entry that was judged: a fresh one that took its place meanwhile stays.
            self.replace(&entry, left);
        }
    }

    fn report(&self) -> Vec<Tier> {
        vec![Tier {
            tier: "memory",
            up: true,
            entries: Some(self.cache.len() as u64),
            bytes: Some(self.cache.weight()),
            capacity: Some(self.cache.capacity()),
        }]
    }

    fn keys_by_prefix(&self) -> BTreeMap<String, u64> {
        let mut prefixes = BTreeMap::new();
        for (_, entry) in self.cache.iter() {
            let prefix = entry.readable.split(':').next().unwrap_or_default();
            if let Some(count) = prefixes.get_mut(prefix) {
                *count += 1;
            } else if prefixes.len() < MAX_PREFIXES {
                prefixes.insert(prefix.to_owned(), 1);
            }
        }
        prefixes
    }

    fn is_up(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::codec::tests::entry;
    use crate::cache::void::{Effect, Moment};
    use crate::clock::Wall;

    fn memory(bytes: u64) -> Memory {
        Memory::new(bytes, 1 << 20, Arc::new(Metrics::new().unwrap())).unwrap()
    }

    fn numbered(number: u32, size: usize) -> Arc<Entry> {
        let mut one = entry(&vec![b'x'; size], &[format!("t{}", number % 2)], "v");
        one.canonical = Bytes::from(number.to_string());
        one.readable = format!("k:{number}");
        Arc::new(one)
    }

    fn canonical(number: u32) -> Canonical {
        Canonical(Bytes::from(number.to_string()))
    }

    #[test]
    fn the_tier_stays_within_its_bytes() {
        let memory = memory(1 << 20);
        for number in 0..5000 {
            memory.insert(numbered(number, 2000));
        }
        let tier = &memory.report()[0];
        assert!(tier.bytes.unwrap() <= 1 << 20 && tier.entries.unwrap() > 100, "{tier:?}");
        assert!(memory.metrics.evictions.with_label_values(&["size"]).get() > 4000);
    }

    #[test]
    fn a_scan_does_not_push_out_what_is_asked_for_again() {
        let memory = memory(1 << 20);
        memory.insert(numbered(0, 2000));
        for number in 1..5000 {
            memory.peek(&canonical(0));
            memory.insert(numbered(number, 2000));
        }
        assert!(memory.peek(&canonical(0)).is_some());
    }

    #[test]
    fn the_response_to_an_earlier_request_takes_no_later_ones_place() {
        // Also that of an upstream that answers within the millisecond.
        [0, 1000].into_iter().for_each(takes_no_later_ones_place);
    }

    fn takes_no_later_ones_place(cost: u32) {
        let memory = memory(1 << 20);
        let asked = |at: u64| {
            let one = Entry { asked_at: Moment::at(at), cost, ..Entry::clone(&numbered(1, 10)) };
            let one = Arc::new(one);
            memory.insert(Arc::clone(&one));
            one
        };
        let later = asked(20);
        asked(10);
        assert!(Arc::ptr_eq(&memory.peek(&canonical(1)).unwrap(), &later));
        let latest = asked(30);
        assert!(Arc::ptr_eq(&memory.peek(&canonical(1)).unwrap(), &latest));
        // Nor is it removed because one before it was over.
        memory.remove_expired(&later);
        assert!(memory.peek(&canonical(1)).is_some());
        memory.remove_expired(&latest);
        assert!(memory.peek(&canonical(1)).is_none());
    }

    #[test]
    fn only_the_very_entry_is_replaced() {
        let memory = memory(1 << 20);
        let (old, new, other) = (numbered(1, 10), numbered(1, 20), numbered(1, 30));
        memory.insert(Arc::clone(&new));
        memory.replace(&old, None);
        memory.replace(&old, Some(Arc::clone(&other)));
        assert!(Arc::ptr_eq(&memory.peek(&canonical(1)).unwrap(), &new));
        memory.replace(&new, Some(Arc::clone(&other)));
        assert!(Arc::ptr_eq(&memory.peek(&canonical(1)).unwrap(), &other));
        memory.replace(&other, None);
        assert!(memory.peek(&canonical(1)).is_none());
    }

    #[test]
    fn what_is_judged_void_goes_and_what_expired_is_left_stale() {
        let memory = memory(1 << 20);
        (0..4).for_each(|number| memory.insert(numbered(number, 10)));
        let now = Wall::from_millis(1_735_689_600_124);
        memory.work_off(&mut |entry| match &*entry.readable {
            "k:0" => Validity::Expired(Box::new(entry.expired(now, Moment::default(), Effect::Expire))),
            "k:1" => Validity::Void,
            _ => Validity::Valid,
        });
        assert_eq!(memory.peek(&canonical(0)).unwrap().lifetimes.fresh, std::time::Duration::ZERO);
        assert!(memory.peek(&canonical(1)).is_none() && memory.peek(&canonical(2)).is_some() && memory.peek(&canonical(3)).is_some());
    }
}
