//! Logical moments: what came first in this process. They are no time: clocks step back, and two events share a millisecond.

use std::sync::atomic::{AtomicU64, Ordering};

/// A place in the order of events of this process: something was asked for, or something was voided. No two events share one.
/// Moments of two processes cannot be compared; none is ever stored or sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// Its place as a number.
    pub(crate) const fn number(self) -> u64 {
        self.0
    }

    /// The moment at a place.
    pub(crate) const fn at(number: u64) -> Self {
        Self(number)
    }
}

/// Hands out moments.
#[derive(Debug, Default)]
pub struct MomentClock(AtomicU64);

impl MomentClock {
    /// A moment that is later than all that were handed out.
    pub fn tick(&self) -> Moment {
        Moment(self.0.fetch_add(1, Ordering::AcqRel) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_moment_is_later_than_those_before() {
        let clock = MomentClock::default();
        let moments: Vec<Moment> = (0..100).map(|_| clock.tick()).collect();
        assert!(moments.is_sorted_by(|a, b| a < b) && moments[0] > Moment::default());
    }
}
