//! Log lines that one client could have written a thousand times a second.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::time::Instant;

use crate::clock::millis;

/// The shortest time between two lines, in milliseconds.
const PAUSE: u64 = 1000;
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A line that is written once a second at most.
pub struct Seldom {
    /// When the next one is due, in milliseconds since the first of any.
    due: AtomicU64,
    /// How many were left out since the last one.
    left_out: AtomicU64,
}

impl Default for Seldom {
    fn default() -> Self {
        Self::new()
    }
}

impl Seldom {
    /// The first one is due.
    #[must_use]
    pub const fn new() -> Self {
        Self { due: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// How many lines were left out since the last one that was written; `None`: this one is left out too.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        self.next_at(millis(START.elapsed()))
    }

    fn next_at(&self, now: u64) -> Option<u64> {
        let due = |due: u64| (now >= due).then_some(now + PAUSE);
        if self.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, due).is_ok() {
            return Some(self.left_out.swap(0, Ordering::Relaxed));
        }
        self.left_out.fetch_add(1, Ordering::Relaxed);
        None
    }
}

/// A line that is written when something begins, and not again before it is over.
#[derive(Debug, Default)]
pub struct Once(AtomicBool);

impl Once {
    /// It has not begun.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// It is so now. Whether it was not before, so that the line is due.
    #[must_use]
    pub fn begins(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    /// It is over.
    pub fn ends(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_when_it_begins() {
        let line = Once::new();
        assert_eq!([line.begins(), line.begins()], [true, false]);
        line.ends();
        assert!(line.begins());
    }

    #[test]
    fn one_line_a_second_says_how_many_were_left_out() {
        let line = Seldom::new();
        let said: Vec<_> = [0, 1, 999, 1000, 1001, 5000].into_iter().map(|now| line.next_at(now)).collect();
        assert_eq!(said, [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
