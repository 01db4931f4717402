//! What is remembered of keys besides what is stored under them.
//!
//! A map holds a digest of each key (XXH3, 128 bits, with a seed of this process) in place of the key, which a client may make as long as a URL may be.
//! That two keys have one digest cannot be arranged from outside; if it happened, one would be treated as was learned of
//! the other. Nothing that is served depends on these maps alone.

use std::sync::Arc;

use bytes::Bytes;
use foldhash::fast::RandomState;
use http::HeaderName;
use quick_cache::Weighter;
use quick_cache::sync::{Cache, DefaultLifecycle};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::breaker::Breaker;
use crate::cache::entry::allocated;

/// What an item of a map takes beside its key and its value, in bytes.
const ITEM: usize = 64;

/// What takes memory beside its own struct.
pub trait Heap {
    /// How many bytes.
    fn heap(&self) -> usize;
}

impl Heap for () {
    fn heap(&self) -> usize {
        0
    }
}

impl Heap for Instant {
    fn heap(&self) -> usize {
        0
    }
}

impl Heap for Arc<Breaker> {
    fn heap(&self) -> usize {
        allocated(size_of::<Breaker>() + 16)
    }
}

impl Heap for Arc<[HeaderName]> {
    fn heap(&self) -> usize {
        allocated(size_of_val(&**self) + 16) + self.iter().map(|name| allocated(name.as_str().len() + 32)).sum::<usize>()
    }
}

/// Weighs items in bytes.
#[derive(Clone, Debug)]
pub struct InBytes;

impl<K: Heap, V: Heap> Weighter<K, V> for InBytes {
    fn weight(&self, key: &K, value: &V) -> u64 {
        (ITEM + size_of::<K>() + key.heap() + size_of::<V>() + value.heap()) as u64
    }
}

impl Heap for u128 {
    fn heap(&self) -> usize {
        0
    }
}

/// A map by canonical request, bounded in bytes; the longest unused is forgotten first.
pub struct Remembered<T: Heap> {
    by_digest: Cache<u128, T, InBytes, RandomState, DefaultLifecycle<u128, T>>,
    seed: u64,
}

/// An empty map of at most this many bytes, with room made for so many items.
#[must_use]
pub fn remembered<T: Clone + Heap>((bytes, items): (usize, usize)) -> Remembered<T> {
    let by_digest = Cache::with(items, bytes as u64, InBytes, RandomState::default(), DefaultLifecycle::default());
    Remembered { by_digest, seed: fastrand::u64(..) }
}

impl<T: Clone + Heap> Remembered<T> {
    /// How many bytes it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.by_digest.weight()
    }

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
