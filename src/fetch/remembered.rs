//! What is remembered of keys besides what is stored under them.
//!
//! A map holds a digest of each key (XXH3, 128 bits, with a seed of this process) in place of the key, which a client may make as long as a URL may be.
//! That two keys have one digest cannot be arranged from outside; if it happened, one would be treated as was learned of
//! the other. Nothing that is served depends on these maps alone.

use bytes::Bytes;
use foldhash::fast::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// A bounded map by canonical request; the longest unused is forgotten first.
pub struct Remembered<T> {
    by_digest: Cache<u128, T, UnitWeighter, RandomState, DefaultLifecycle<u128, T>>,
    seed: u64,
}

/// An empty map of at most `count` keys.
#[must_use]
pub fn remembered<T: Clone>(count: usize) -> Remembered<T> {
    let by_digest = Cache::with(count, count as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default());
    Remembered { by_digest, seed: fastrand::u64(..) }
}

impl<T: Clone> Remembered<T> {
    fn digest(&self, key: &Bytes) -> u128 {
        xxh3_128_with_seed(key, self.seed)
    }

    /// What is remembered of a key.
    #[must_use]
    pub fn get(&self, key: &Bytes) -> Option<T> {
        self.by_digest.get(&self.digest(key))
    }

    /// What is remembered of a key, made now if nothing is.
    pub fn get_or_insert(&self, key: &Bytes, make: impl FnOnce() -> T) -> T {
        let digest = self.digest(key);
        self.by_digest.get(&digest).unwrap_or_else(|| {
            let made = make();
            self.by_digest.insert(digest, made.clone());
            made
        })
    }

    /// Remembers something of a key.
    pub fn insert(&self, key: &Bytes, value: T) {
        self.by_digest.insert(self.digest(key), value);
    }

    /// Forgets a key.
    pub fn remove(&self, key: &Bytes) {
        self.by_digest.remove(&self.digest(key));
    }

    /// Forgets every key.
    pub fn clear(&self) {
        self.by_digest.clear();
    }
}
