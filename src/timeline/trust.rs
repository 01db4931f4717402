//! Whether what is computed may be served: not before it was the same as the backend's own answers often enough, and never again
//! once it was not.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// So often must orders of one moment have come in the backend's own order before lists are served in which they show.
const TIES: u32 = 3;

/// Whether an endpoint's answers are trusted.
#[derive(Debug, Default)]
pub struct Trust {
    /// Equal answers in a row that are asked for.
    needed: u32,
    /// Whether ties are too.
    ties_needed: u32,
    equal: AtomicU32,
    ties: AtomicU32,
    off: AtomicBool,
}

/// What an operator is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum State {
    /// It answers.
    On,
    /// Its answers are compared with the backend's, which are served.
    Probation {
        /// So many in a row were equal.
        equal: u32,
        /// So many are asked for.
        of: u32,
    },
    /// An answer differed: the backend's are served.
    Off,
}

impl Trust {
    /// Trusted from the start: whoever computes answers the API itself.
    #[must_use]
    pub fn proven() -> Self {
        Self::default()
    }

    /// Trusted after `needed` equal answers in a row.
    #[must_use]
    pub fn probation(needed: u32) -> Self {
        Self { needed, ties_needed: TIES, ..Self::default() }
    }

    /// How things stand.
    #[must_use]
    pub fn state(&self) -> State {
        let equal = self.equal.load(Ordering::Acquire);
        match self.off.load(Ordering::Acquire) {
            true => State::Off,
            false if equal >= self.needed => State::On,
            false => State::Probation { equal, of: self.needed },
        }
    }

    /// Whether an answer may be served; `ties` says whether the order of orders of one moment shows in it.
    #[must_use]
    pub fn allows(&self, ties: bool) -> bool {
        self.state() == State::On && (!ties || self.ties.load(Ordering::Acquire) >= self.ties_needed)
    }

    /// Whether it is not known yet in which order the backend gives orders of one moment.
    #[must_use]
    pub fn lacks_ties(&self) -> bool {
        self.ties.load(Ordering::Acquire) < self.ties_needed
    }

    /// An answer was equal.
    pub fn note_equal(&self, ties: bool) {
        self.equal.fetch_add(1, Ordering::AcqRel);
        self.ties.fetch_add(u32::from(ties), Ordering::AcqRel);
    }

    /// An answer differed, and went on to. Whether that is new.
    pub fn note_different(&self) -> bool {
        !self.off.swap(true, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_served_once_enough_were_equal_and_until_one_differs() {
        let trust = Trust::probation(2);
        trust.note_equal(false);
        assert_eq!((trust.allows(false), trust.state()), (false, State::Probation { equal: 1, of: 2 }));
        (0..TIES).for_each(|_| trust.note_equal(false));
        assert_eq!((trust.allows(false), trust.allows(true)), (true, false), "ties were never compared");
        (0..TIES).for_each(|_| trust.note_equal(true));
        assert!(trust.allows(true));
        assert!(trust.note_different() && !trust.note_different());
        assert_eq!((trust.allows(false), trust.state()), (false, State::Off));
        assert!(Trust::proven().allows(true));
    }
}
