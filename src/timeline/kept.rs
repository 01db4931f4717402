//! Computed answers in memory, bounded in bytes: what was asked for least and longest ago makes room.

use std::hash::Hash;
use std::sync::Arc;

use foldhash::fast::RandomState;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};

use crate::body::BoxError;

/// Something of which it is known how many bytes it takes.
pub trait Weigh {
    /// What the allocator holds for it, in bytes.
    fn weight(&self) -> u64;
}

#[derive(Clone)]
struct Weight;

impl<K, V: Weigh> Weighter<K, Arc<V>> for Weight {
    fn weight(&self, _: &K, value: &Arc<V>) -> u64 {
        value.weight()
    }
}

/// Values under keys, of so many bytes at most.
pub struct Kept<K, V: Weigh>(Cache<K, Arc<V>, Weight, RandomState, DefaultLifecycle<K, Arc<V>>>);

impl<K: Clone + Eq + Hash, V: Weigh> Kept<K, V> {
    /// Room for `bytes`.
    ///
    /// # Errors
    /// The options make no sense to the cache, which a test rules out.
    pub fn new(bytes: u64) -> Result<Self, BoxError> {
        // A single shard: one value may take a large part of the room.
        let options = OptionsBuilder::new()
            .weight_capacity(bytes)
            .estimated_items_capacity(usize::try_from(bytes / 4096).unwrap_or(usize::MAX).clamp(64, 1 << 16))
            .shards(1)
            .build()
            .map_err(|_| "the timeline's options are contradictory")?;
        Ok(Self(Cache::with_options(options, Weight, RandomState::default(), DefaultLifecycle::default())))
    }

    /// The value under a key, if it is there.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<Arc<V>> {
        self.0.get(key)
    }

    /// Keeps a value, if there is room for it at all.
    pub fn insert(&self, key: K, value: Arc<V>) {
        self.0.insert(key, value);
    }

    /// Forgets what is under a key.
    pub fn remove(&self, key: &K) {
        self.0.remove(key);
    }

    /// Each key and value, one after the other: others go on meanwhile.
    pub fn all(&self) -> impl Iterator<Item = (K, Arc<V>)> {
        self.0.iter()
    }

    /// Forgets all.
    pub fn clear(&self) {
        self.0.clear();
    }

    /// How many values there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// How many bytes they take together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.weight()
    }

    /// How many bytes they may take.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.0.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Weigh for u64 {
        fn weight(&self) -> u64 {
            *self
        }
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let kept: Kept<u64, u64> = Kept::new(1000).unwrap();
        (0..100).for_each(|key| kept.insert(key, Arc::new(90)));
        assert!((500..=1000).contains(&kept.bytes()), "{}", kept.bytes());
        kept.insert(200, Arc::new(2000));
        assert_eq!(kept.get(&200), None);
        let some = (0..100).find(|key| kept.get(key).is_some()).unwrap();
        kept.remove(&some);
        assert_eq!(kept.get(&some), None);
    }
}
