//! What failed lately and is spared: a key whose fetches fail, or the upstream as a whole.

use std::sync::Arc;
use std::time::Duration;

use super::remembered::{Remembered, remembered};
use crate::breaker::{Backoff, Breaker, Gate};
use crate::cache::key::Canonical;
use crate::telemetry::metrics::Metrics;
use crate::upstream::failure::Failure;

/// An upstream that does not connect, breaks off, times out or answers 502, 503 or 504 so often in a row is spared.
const UPSTREAM_BACKOFF: Backoff = Backoff { first: Duration::from_millis(250), longest: Duration::from_secs(15), tolerated: 2 };
/// A key is spared from its first failure on: others may work.
const KEY_BACKOFF: Backoff = Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(30), tolerated: 0 };
/// Keys whose failures are remembered.
const KEYS: usize = 16_384;

/// The breakers.
pub struct Failing {
    upstream: Breaker,
    keys: Remembered<Arc<Breaker>>,
    metrics: Arc<Metrics>,
}

impl Failing {
    /// Nothing has failed yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { upstream: Breaker::new(UPSTREAM_BACKOFF), keys: remembered(KEYS), metrics }
    }

    /// Whether the upstream as a whole is spared.
    #[must_use]
    pub fn upstream(&self) -> bool {
        self.upstream.is_open()
    }

    /// Whether this key is spared, or the upstream as a whole.
    #[must_use]
    pub fn key(&self, key: &Canonical) -> bool {
        self.upstream() || self.keys.get(&key.0).is_some_and(|breaker| breaker.is_open())
    }

    /// Whether this key may be tried now: nothing is spared, or was for long enough. Of those who ask in one pause, one may.
    #[must_use]
    pub fn may_try(&self, key: &Canonical) -> bool {
        let gate = match self.upstream.enter() {
            Gate::Closed => self.keys.get(&key.0).map_or(Gate::Closed, |breaker| breaker.enter()),
            gate => gate,
        };
        gate != Gate::Open
    }

    /// The whole response to a fetch for this key came. Its head alone says nothing of the key: a body that breaks off each time
    /// must not be asked for ever again after the shortest while.
    pub fn succeeded(&self, key: &Canonical) {
        self.keys.remove(&key.0);
    }

    /// The upstream answered, whatever becomes of the body.
    pub fn answered(&self) {
        if self.upstream.succeeded() {
            self.metrics.breaker_open.with_label_values(&["backend"]).set(0);
            tracing::info!("the backend answers again");
        }
    }

    /// A fetch for this key failed. What was not asked, or given up, says nothing of the key.
    pub fn failed(&self, key: &Canonical, failure: Failure) {
        if matches!(failure, Failure::Overloaded | Failure::Lost) {
            return;
        }
        let breaker = self.keys.get(&key.0).unwrap_or_else(|| {
            let breaker = Arc::new(Breaker::new(KEY_BACKOFF));
            self.keys.insert(key.0.clone(), Arc::clone(&breaker));
            breaker
        });
        breaker.failed();
        // A 500 is about one request; the rest is about the upstream.
        if matches!(failure, Failure::Status(500)) {
            return;
        }
        if let Some(pause) = self.upstream.failed() {
            self.metrics.breaker_open.with_label_values(&["backend"]).set(1);
            tracing::warn!(
                reason = failure.answer().1,
                ?pause,
                "the backend fails and is left alone; what is stored is served stale meanwhile"
            );
        }
    }
}
