//! The in-process tier: bounded by bytes, with quick_cache's scan-resistant eviction (S3-FIFO with a ghost queue).

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use foldhash::fast::RandomState;
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};

use super::{Entry, Pending, Selection, Store, Tier};
use crate::cache::key::{Canonical, Key};
use crate::clock::Wall;
use crate::telemetry::Metrics;

/// Families of keys that statistics tell apart.
const MAX_FAMILIES: usize = 100;

/// Keeps entries in this process.
pub struct Memory {
    cache: Cache<Bytes, Arc<Entry>, Weight, RandomState, Evictions>,
    metrics: Arc<Metrics>,
}

#[derive(Clone)]
struct Weight;

impl Weighter<Bytes, Arc<Entry>> for Weight {
    fn weight(&self, _: &Bytes, entry: &Arc<Entry>) -> u64 {
        entry.weight()
    }
}

/// Counts what leaves for want of room.
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
        Ok(Self { cache, metrics })
    }

    fn gauge(&self) {
        self.metrics.memory_bytes.set(i64::try_from(self.cache.weight()).unwrap_or(i64::MAX));
        self.metrics.memory_entries.set(i64::try_from(self.cache.len()).unwrap_or(i64::MAX));
    }

    /// Keeps an entry, at once.
    pub fn insert(&self, entry: Arc<Entry>) {
        self.cache.insert(entry.canonical.clone(), entry);
        self.gauge();
    }

    /// Drops an entry that has outlived all its lives.
    fn drop_dead(&self, canonical: &Canonical) {
        if self.cache.remove(&canonical.0).is_some() {
            self.metrics.evictions.with_label_values(&["expired"]).inc();
            self.gauge();
        }
    }

    /// Removes or expires what is selected, at once.
    pub fn purge_now(&self, what: &Selection, soft: bool, now: Wall) -> usize {
        let meant: Vec<_> = self.cache.iter().filter(|(_, entry)| what.matches(&entry.readable, &entry.tags)).collect();
        for (canonical, entry) in &meant {
            // Only the very entry that was selected: a fresh one that took its place meanwhile stays.
            let removed = self.cache.remove_if(canonical, |current| Arc::ptr_eq(current, entry));
            if soft && removed.is_some() {
                self.cache.insert(canonical.clone(), Arc::new(entry.expired(now)));
            }
        }
        self.gauge();
        meant.len()
    }
}

impl Store for Memory {
    fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>> {
        self.cache.get(&canonical.0)
    }

    fn get<'a>(&'a self, key: &'a Key) -> Pending<'a, Option<Arc<Entry>>> {
        let found = self.peek(&key.canonical);
        let now = Wall::now();
        if found.as_ref().is_some_and(|entry| now.since(entry.stored_at) >= entry.lives.kept()) {
            self.drop_dead(&key.canonical);
            return Box::pin(std::future::ready(None));
        }
        Box::pin(std::future::ready(found))
    }

    fn put<'a>(&'a self, _: &'a Key, entry: Arc<Entry>) -> Pending<'a, ()> {
        self.insert(entry);
        Box::pin(std::future::ready(()))
    }

    fn improve(&self, entry: Arc<Entry>) {
        // Not over a newer entry, and not if it was purged meanwhile.
        let same = |current: &Arc<Entry>| current.stored_at == entry.stored_at;
        if self.cache.peek(&entry.canonical).as_ref().is_some_and(same) {
            let replaced = self.cache.replace(entry.canonical.clone(), entry, true);
            if replaced.is_ok() {
                self.gauge();
            }
        }
    }

    fn remove<'a>(&'a self, key: &'a Key) -> Pending<'a, ()> {
        self.cache.remove(&key.canonical.0);
        self.gauge();
        Box::pin(std::future::ready(()))
    }

    fn purge<'a>(&'a self, what: &'a Selection, soft: bool) -> Pending<'a, usize> {
        Box::pin(std::future::ready(self.purge_now(what, soft, Wall::now())))
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

    fn families(&self) -> BTreeMap<String, u64> {
        let mut families = BTreeMap::new();
        for (_, entry) in self.cache.iter() {
            let family = entry.readable.split(':').next().unwrap_or_default();
            if let Some(count) = families.get_mut(family) {
                *count += 1;
            } else if families.len() < MAX_FAMILIES {
                families.insert(family.to_owned(), 1);
            }
        }
        families
    }

    fn is_up(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::codec::tests::entry;

    fn memory(bytes: u64) -> Memory {
        Memory::new(bytes, 1 << 20, Arc::new(Metrics::new(&[]).unwrap())).unwrap()
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
    fn purges_take_what_they_name() {
        let memory = memory(1 << 20);
        (0..4).for_each(|number| memory.insert(numbered(number, 10)));
        let now = Wall::from_millis(1_735_689_600_124);
        assert_eq!(memory.purge_now(&Selection::Tag("t0".into()), true, now), 2);
        assert_eq!(memory.peek(&canonical(0)).unwrap().lives.fresh, std::time::Duration::ZERO);
        assert_eq!(memory.purge_now(&Selection::Pattern("k:1".into()), false, now), 1);
        assert!(memory.peek(&canonical(1)).is_none() && memory.peek(&canonical(3)).is_some());
    }
}
