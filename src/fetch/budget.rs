//! How many bytes all bodies on their way into the cache may take together.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::telemetry::metrics::Metrics;

/// So many bodies that are gone are kept in the list of those that are whole before it is tidied.
const UNTIDY: usize = 64;

/// A body that is whole and is kept for its readers alone.
pub trait Whole: Send + Sync {
    /// Lets go of what its readers have not read, which cuts them off. It gives back to the budget what it had taken.
    fn let_go(&self);

    /// Whether it has bytes of the budget still.
    fn has_bytes(&self) -> bool;
}

/// All fills' bytes together.
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
    /// Bodies that are whole, the oldest first. They give way to those that are on their way: a client that does not read keeps
    /// nobody's answer out of the cache.
    whole: Mutex<VecDeque<Weak<dyn Whole>>>,
    metrics: Arc<Metrics>,
}

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize, metrics: Arc<Metrics>) -> Self {
        Self { used: AtomicUsize::new(0), limit, whole: Mutex::new(VecDeque::new()), metrics }
    }

    /// Takes bytes, if enough are left, or can be had from bodies that are whole.
    #[must_use]
    pub fn take(&self, bytes: usize) -> bool {
        while !self.take_free(bytes) {
            let oldest = self.whole().pop_front();
            let Some(oldest) = oldest else { return false };
            if let Some(oldest) = oldest.upgrade() {
                oldest.let_go();
            }
        }
        true
    }

    fn take_free(&self, bytes: usize) -> bool {
        let taken =
            self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| used.checked_add(bytes).filter(|&sum| sum <= self.limit));
        if taken.is_ok() {
            self.metrics.fill_bytes.add(i64::try_from(bytes).unwrap_or(0));
        }
        taken.is_ok()
    }

    /// Gives bytes back.
    pub fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        self.metrics.fill_bytes.sub(i64::try_from(bytes).unwrap_or(0));
    }

    /// Notes a body that is whole, and keeps its bytes for its readers until they are needed.
    pub fn keep_for_readers(&self, body: Weak<dyn Whole>) {
        let mut whole = self.whole();
        if whole.len() >= UNTIDY {
            whole.retain(|body| body.upgrade().is_some_and(|body| body.has_bytes()));
        }
        whole.push_back(body);
    }

    fn whole(&self) -> std::sync::MutexGuard<'_, VecDeque<Weak<dyn Whole>>> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are taken.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}
