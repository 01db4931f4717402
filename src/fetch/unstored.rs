//! Why the last response of a key was not stored: for `Cache-Status`, and for an operator who asks why a URL was not a hit. Nothing is decided by
//! it.

use super::remembered::{Heap, Remembered, remembered};
use crate::cache::key::Canonical;
use crate::clock::Wall;
use crate::http::freshness::Unstorable;

/// All that is remembered, in bytes, and the room for how many is made.
const KEYS: (usize, usize) = (1 << 20, 8192);

/// A response that was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unstored {
    /// Why not.
    pub why: Unstorable,
    /// Its status.
    pub status: u16,
    /// When it came.
    pub at: Wall,
}

impl Heap for Unstored {
    fn heap(&self) -> usize {
        0
    }
}

/// By what is fetched once at a time: the last response that was not stored, if none was since.
pub struct LastUnstored(Remembered<Unstored>);

impl Default for LastUnstored {
    fn default() -> Self {
        Self(remembered(KEYS))
    }
}

impl LastUnstored {
    /// How many bytes they take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// A response for this key with this status came, and is not stored.
    pub fn note(&self, key: &Canonical, why: Unstorable, status: u16) {
        self.0.insert(&key.0, Unstored { why, status, at: Wall::now() });
    }

    /// Something was stored for this key.
    pub fn remove(&self, key: &Canonical) {
        self.0.remove(&key.0);
    }

    /// The last response for this key, if it was not stored.
    #[must_use]
    pub fn get(&self, key: &Canonical) -> Option<Unstored> {
        self.0.get(&key.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn the_last_one_is_remembered_until_something_is_stored_and_all_are_bounded() {
        let (last, key) = (LastUnstored::default(), |number: u32| Canonical(Bytes::from(number.to_string())));
        last.note(&key(0), Unstorable::SetCookie, 200);
        last.note(&key(0), Unstorable::Error, 403);
        assert_eq!(last.get(&key(0)).map(|last| (last.why, last.status)), Some((Unstorable::Error, 403)));
        last.remove(&key(0));
        assert_eq!(last.get(&key(0)), None);
        (0..50_000).for_each(|number| last.note(&key(number), Unstorable::Private, 200));
        assert!(last.bytes() <= 1 << 20, "{}", last.bytes());
    }
}
