//! What the upstream has taken back: keys whose stored response has ended because the answer to its revalidation does not allow it
//! to be kept (RFC 9111 §4.3.3).
//!
//! The entry is removed from the stores. Two that come late are recognised here: what a slow fetch brings that was begun before,
//! and what is read from Redis though it was to be removed there.

use foldhash::fast::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};
use xxhash_rust::xxh3::xxh3_128;

use super::entry::Entry;
use super::key::Canonical;
use super::void::Moment;
use crate::clock::Wall;

/// Ends that are remembered; the longest unused is forgotten first.
const ENDS: usize = 16_384;

/// The keys that ended lately, by a digest of their canonical requests.
pub struct Ended(Cache<u128, End, UnitWeighter, RandomState, DefaultLifecycle<u128, End>>);

#[derive(Clone, Copy)]
struct End {
    /// What was asked for until this moment is not stored any more.
    asked: Moment,
    /// What was stored before this is not used any more.
    stored: Wall,
}

impl Default for Ended {
    fn default() -> Self {
        Self(Cache::with(ENDS, ENDS as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default()))
    }
}

impl Ended {
    /// What was asked for until `asked`, and stored before `now`, has ended.
    pub fn note(&self, canonical: &Canonical, asked: Moment, now: Wall) {
        self.0.insert(xxh3_128(&canonical.0), End { asked, stored: now });
    }

    fn of(&self, entry: &Entry) -> Option<End> {
        self.0.get(&xxh3_128(&entry.canonical))
    }

    /// Whether an entry that is to be stored was asked for before its key ended.
    #[must_use]
    pub fn refuses(&self, entry: &Entry) -> bool {
        self.of(entry).is_some_and(|end| entry.asked_at <= end.asked)
    }

    /// Whether an entry that was read had been stored before its key ended.
    #[must_use]
    pub fn is_over(&self, entry: &Entry) -> bool {
        self.of(entry).is_some_and(|end| entry.stored_at < end.stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::codec::tests::entry;

    #[test]
    fn what_came_before_the_end_is_over_and_what_comes_after_is_not() {
        let (ended, mut one) = (Ended::default(), entry(b"x", &[], ""));
        let at = |millis: u64| Wall::from_millis(1_000_000 + millis);
        assert!(!ended.refuses(&one) && !ended.is_over(&one));
        ended.note(&Canonical(one.canonical.clone()), Moment::at(10), at(20));
        for (asked, stored, refused, over) in [(9, 19, true, true), (10, 20, true, false), (11, 21, false, false)] {
            (one.asked_at, one.stored_at) = (Moment::at(asked), at(stored));
            assert_eq!((ended.refuses(&one), ended.is_over(&one)), (refused, over), "{asked}");
        }
        one.canonical = bytes::Bytes::from_static(b"another");
        (one.asked_at, one.stored_at) = (Moment::at(0), at(0));
        assert!(!ended.refuses(&one) && !ended.is_over(&one));
    }
}
