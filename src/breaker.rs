//! Leaving alone what fails: a growing, jittered while.
//!
//! A [`Breaker`] says whether something may be tried. After failures it opens for a while that doubles with each
//! further failure; when the while is over, one caller may try, and its success closes the breaker.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// How long things are left alone.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The first while.
    pub first: Duration,
    /// The longest while.
    pub longest: Duration,
    /// Failures in a row before the first while begins.
    pub tolerated: u32,
}

impl Backoff {
    /// The while after the `failures`-th failure in a row: doubled each time, then between half and all of that, so
    /// that many instances do not come back at one moment.
    #[must_use]
    pub fn after(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(self.tolerated + 1).min(20);
        let full = self.first.saturating_mul(1 << doublings).min(self.longest);
        full.mul_f64(fastrand::f64().mul_add(0.5, 0.5))
    }
}

/// Whether something that fails may be tried.
#[derive(Debug)]
pub struct Breaker {
    backoff: Backoff,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    failures: u32,
    /// Until when it is left alone.
    until: Option<Instant>,
}

/// What a breaker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// It works as far as is known.
    Closed,
    /// It failed; the caller may try once, and no one else meanwhile.
    Trial,
    /// It failed: leave it alone.
    Open,
}

impl Breaker {
    /// A closed breaker.
    #[must_use]
    pub fn new(backoff: Backoff) -> Self {
        Self { backoff, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Whether it is being left alone. Changes nothing.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state().until.is_some()
    }

    /// Whether nobody may try now. Changes nothing.
    #[must_use]
    pub fn is_sparing(&self) -> bool {
        self.state().until.is_some_and(|until| Instant::now() < until)
    }

    /// Asks to try. [`Gate::Trial`] is given to one caller a while; it must report back with [`Breaker::succeeded`]
    /// or [`Breaker::failed`], and if it never does, the next while's end gives another one the chance.
    #[must_use]
    pub fn enter(&self) -> Gate {
        let mut state = self.state();
        match state.until {
            None => Gate::Closed,
            Some(until) if Instant::now() >= until => {
                // As if it failed: only its success says anything else.
                state.failures = state.failures.saturating_add(1);
                state.until = Some(Instant::now() + self.backoff.after(state.failures));
                Gate::Trial
            }
            Some(_) => Gate::Open,
        }
    }

    /// It worked. Returns whether that closed the breaker.
    pub fn succeeded(&self) -> bool {
        let mut state = self.state();
        let was_open = state.until.is_some();
        *state = State::default();
        was_open
    }

    /// It failed. Returns for how long it is now left alone, if the breaker was closed before.
    pub fn failed(&self) -> Option<Duration> {
        self.failed_for(Duration::ZERO)
    }

    /// The same if it is to be left alone for at least so long, which it may ask for itself. Further failures do not make the while longer,
    /// nor begin it anew when it is over: else what fails all the time would keep everybody from trying. A trial's failure is counted by
    /// [`enter`](Self::enter).
    pub fn failed_for(&self, least: Duration) -> Option<Duration> {
        let (mut state, now) = (self.state(), Instant::now());
        let asked_for = now + least;
        if let Some(until) = state.until {
            state.until = Some(until.max(asked_for));
            return None;
        }
        state.failures = state.failures.saturating_add(1);
        if state.failures <= self.backoff.tolerated && least.is_zero() {
            return None;
        }
        let span = self.backoff.after(state.failures).max(least);
        state.until = Some(now + span);
        Some(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(10), tolerated: 2 };

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_the_tolerated_failures_and_lets_one_try() {
        let breaker = Breaker::new(BACKOFF);
        assert_eq!((breaker.failed(), breaker.failed()), (None, None));
        assert_eq!(breaker.enter(), Gate::Closed);
        assert!(breaker.failed().is_some());
        assert_eq!(breaker.enter(), Gate::Open);
        tokio::time::advance(Duration::from_millis(101)).await;
        assert_eq!((breaker.enter(), breaker.enter()), (Gate::Trial, Gate::Open));
        assert_eq!(breaker.failed(), None);
        assert!(breaker.is_open());
        tokio::time::advance(Duration::from_millis(201)).await;
        assert_eq!(breaker.failed(), None);
        assert_eq!(breaker.enter(), Gate::Trial, "a failure that was no trial keeps nobody from one");
        assert!(breaker.succeeded());
        assert_eq!(breaker.enter(), Gate::Closed);
    }

    #[test]
    fn whiles_grow_to_a_bound_and_are_jittered() {
        for (failures, full) in [(3, 100), (4, 200), (6, 800), (40, 10_000)] {
            let span = BACKOFF.after(failures);
            assert!(span >= Duration::from_millis(full / 2) && span <= Duration::from_millis(full), "{failures}: {span:?}");
        }
    }
}
