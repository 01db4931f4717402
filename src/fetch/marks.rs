//! Keys whose responses turned out uncacheable lately: requests for them do not wait for each other.
//!
//! A mark begins short, since one response may be for one client and the next for all, and grows while nothing can be stored. The requests
//! that are passed meanwhile say whether it still holds: a response that could be stored [ends it](Marks::lift).

use std::time::Duration;

use tokio::time::Instant;

use super::remembered::{Heap, Remembered, remembered};
use crate::cache::key::Canonical;

/// The first mark of a key.
const FIRST: Duration = Duration::from_secs(2);
/// The longest one.
const LONGEST: Duration = Duration::from_secs(60);
/// All that is remembered, in bytes, and the room for how many is made.
const MARKS: (usize, usize) = (2 << 20, 16_384);

/// Why a key is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A response was for the one client that asked.
    Private,
    /// Responses are for the credentials that asked. They are as long as they say so: the mark is the longest at once.
    Credentials,
    /// A response was larger than what may be stored, as the next one will be: the mark is the longest at once.
    TooLarge,
}

/// The mark of a key.
#[derive(Clone, Copy)]
struct Mark {
    why: Why,
    span: Duration,
    /// Until when it holds.
    until: Instant,
    /// From when on a passed response may end it.
    liftable: Instant,
}

impl Heap for Mark {
    fn heap(&self) -> usize {
        0
    }
}

/// The keys that are marked.
pub struct Marks(Remembered<Mark>);

impl Default for Marks {
    fn default() -> Self {
        Self(remembered(MARKS))
    }
}

impl Marks {
    /// How many bytes they take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Whether a key is marked now.
    #[must_use]
    pub fn holds(&self, key: &Canonical) -> bool {
        self.0.get(&key.0).is_some_and(|mark| Instant::now() < mark.until)
    }

    /// Marks a key: for twice as long as the last time, if nothing was stored for it since.
    pub fn note(&self, key: &Canonical, why: Why) {
        let now = Instant::now();
        // What ended long ago says nothing of today.
        let last = self.0.get(&key.0).filter(|last| now < last.until + LONGEST);
        let span = match why {
            Why::Private => last.map_or(FIRST, |last| last.span.saturating_mul(2).min(LONGEST)),
            Why::Credentials | Why::TooLarge => LONGEST,
        };
        // A mark that was ended in vain is not ended so soon again: what is passed may differ from what is fetched, which says less.
        let liftable = if why == Why::Private { now + span.saturating_sub(FIRST) } else { now };
        self.0.insert(&key.0, Mark { why, span, until: now + span, liftable });
    }

    /// A passed response for a key could be stored: its mark holds no more. `length` is that of its body, in bytes, where it is known to be
    /// one that may be stored; a mark for what is too large ends only with that.
    pub fn lift(&self, key: &Canonical, length: Option<u64>) {
        let now = Instant::now();
        let Some(mark) = self.0.get(&key.0).filter(|mark| mark.liftable <= now && now < mark.until) else { return };
        if mark.why != Why::TooLarge || length.is_some() {
            self.0.insert(&key.0, Mark { until: now, ..mark });
        }
    }

    /// Something was stored for a key: nothing of its mark is remembered.
    pub fn remove(&self, key: &Canonical) {
        self.0.remove(&key.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use tokio::time::advance;

    fn key() -> Canonical {
        Canonical(Bytes::from_static(b"k"))
    }

    /// For how many seconds a mark holds.
    async fn span(marks: &Marks) -> u64 {
        let mut seconds = 0;
        while marks.holds(&key()) {
            advance(Duration::from_secs(1)).await;
            seconds += 1;
        }
        seconds
    }

    #[tokio::test(start_paused = true)]
    async fn a_mark_begins_short_and_grows_until_something_is_stored() {
        let marks = Marks::default();
        for expected in [2, 4, 8, 16, 32, 60, 60] {
            marks.note(&key(), Why::Private);
            assert_eq!(span(&marks).await, expected);
        }
        marks.remove(&key());
        marks.note(&key(), Why::Private);
        assert_eq!(span(&marks).await, 2);
        advance(LONGEST).await;
        marks.note(&key(), Why::Private);
        assert_eq!(span(&marks).await, 2, "long ago");
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_be_stored_ends_a_mark_and_one_that_was_ended_in_vain_lasts() {
        let marks = Marks::default();
        marks.note(&key(), Why::Private);
        marks.lift(&key(), None);
        assert!(!marks.holds(&key()));
        marks.note(&key(), Why::Private);
        marks.lift(&key(), None);
        assert!(marks.holds(&key()), "not so soon again");
        advance(Duration::from_secs(2)).await;
        marks.lift(&key(), None);
        assert!(!marks.holds(&key()));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_large_is_so_until_a_length_says_otherwise() {
        let marks = Marks::default();
        marks.note(&key(), Why::TooLarge);
        marks.lift(&key(), None);
        assert!(marks.holds(&key()));
        marks.lift(&key(), Some(5));
        assert!(!marks.holds(&key()));
        marks.note(&key(), Why::Credentials);
        assert_eq!(span(&marks).await, 60);
    }
}
