//! How many bytes all bodies on their way into the cache may take together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::telemetry::metrics::Metrics;

/// All fills' bytes together.
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
    metrics: Arc<Metrics>,
}

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize, metrics: Arc<Metrics>) -> Self {
        Self { used: AtomicUsize::new(0), limit, metrics }
    }

    /// Takes bytes, if so many are left.
    #[must_use]
    pub fn take(&self, bytes: usize) -> bool {
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

    /// Bytes that are taken.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}
