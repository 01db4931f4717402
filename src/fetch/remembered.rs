//! What is remembered of keys besides what is stored under them.

use bytes::Bytes;
use foldhash::fast::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};

/// A bounded map by canonical request; the longest unused is forgotten first.
pub type Remembered<T> = Cache<Bytes, T, UnitWeighter, RandomState, DefaultLifecycle<Bytes, T>>;

/// An empty map of at most `count` keys.
#[must_use]
pub fn remembered<T: Clone>(count: usize) -> Remembered<T> {
    Cache::with(count, count as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default())
}
