//! Turns to ask the source for orders of the past: a few at a time for all symbols together, and a breaker.
//!
//! Questions about the newest orders have turns of their own (the [`schedule`](super::schedule)), so neither kind takes what the other needs. Turns
//! are given in the order in which they were asked for, one a symbol at a time, so that no symbol keeps the others waiting for all that it wants.
//! What nobody waits for leaves one turn to what requests wait for, where there is more than one.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::breaker::{Backoff, Breaker, Gate};

/// After three failures in a row, of whichever symbols, one fetch at a time tries, after pauses that grow.
const BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(60), tolerated: 2 };

/// All turns.
pub struct Turns {
    all: Semaphore,
    /// Those for what nobody waits for.
    unhurried: Semaphore,
    breaker: Breaker,
}

/// A turn, until it is dropped.
pub struct Turn<'t> {
    turns: &'t Turns,
    is_ended: bool,
    _permits: (SemaphorePermit<'t>, Option<SemaphorePermit<'t>>),
}

/// What became of the breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The source fails, and is spared from now on.
    Spared,
    /// It answers again.
    Back,
}

impl Turns {
    /// At most `most` at a time.
    #[must_use]
    pub fn new(most: usize) -> Self {
        let most = most.max(1);
        Self { all: Semaphore::new(most), unhurried: Semaphore::new((most - 1).max(1)), breaker: Breaker::new(BACKOFF) }
    }

    /// Waits for a turn. `None`: the source fails and is spared.
    pub async fn take(&self, is_urgent: bool) -> Option<Turn<'_>> {
        if self.breaker.is_sparing() {
            return None;
        }
        let unhurried = if is_urgent { None } else { Some(self.unhurried.acquire().await.ok()?) };
        let permit = self.all.acquire().await.ok()?;
        let turn = Turn { turns: self, is_ended: false, _permits: (permit, unhurried) };
        match self.breaker.enter() {
            Gate::Closed | Gate::Trial => Some(turn),
            Gate::Open => {
                turn.give_back();
                None
            }
        }
    }

    /// Whether the source fails and is spared.
    #[must_use]
    pub fn are_sparing(&self) -> bool {
        self.breaker.is_open()
    }
}

impl Turn<'_> {
    /// The source has answered, or failed to.
    pub fn end(mut self, has_failed: bool) -> Change {
        self.is_ended = true;
        if has_failed {
            return if self.turns.breaker.failed().is_some() { Change::Spared } else { Change::None };
        }
        if self.turns.breaker.succeeded() { Change::Back } else { Change::None }
    }

    /// It was asked nothing.
    fn give_back(mut self) {
        self.is_ended = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // It was given up in the middle.
        if !self.is_ended {
            self.turns.breaker.failed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{advance, timeout};

    const SOON: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn what_nobody_waits_for_leaves_a_turn_to_what_requests_wait_for() {
        let turns = Turns::new(2);
        let unhurried = turns.take(false).await.unwrap();
        assert!(timeout(SOON, turns.take(false)).await.is_err());
        let urgent = turns.take(true).await.unwrap();
        assert!(timeout(SOON, turns.take(true)).await.is_err());
        assert_eq!((unhurried.end(false), urgent.end(false)), (Change::None, Change::None));
        // With one turn there is one for all.
        let turns = Turns::new(1);
        let unhurried = turns.take(false).await.unwrap();
        assert!(timeout(SOON, turns.take(true)).await.is_err());
        drop(unhurried);
        assert!(turns.take(true).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_fails_is_tried_by_one_after_pauses() {
        let turns = Turns::new(3);
        let mut changes = Vec::new();
        for _ in 0..3 {
            changes.push(turns.take(true).await.unwrap().end(true));
        }
        assert_eq!(changes, [Change::None, Change::None, Change::Spared]);
        assert!(turns.are_sparing() && turns.take(true).await.is_none());
        advance(BACKOFF.first).await;
        let trial = turns.take(false).await.unwrap();
        assert!(turns.take(true).await.is_none(), "one tries");
        drop(trial);
        assert!(turns.take(true).await.is_none(), "what was given up has failed");
        advance(BACKOFF.first * 2).await;
        assert_eq!(turns.take(true).await.unwrap().end(false), Change::Back);
        assert!(!turns.are_sparing() && turns.take(false).await.is_some());
    }
}
