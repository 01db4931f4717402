//! How many bytes all bodies on their way into the cache may take together.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::telemetry::metrics::Metrics;

/// The list of bodies that are whole is tidied when it has this many.
const UNTIDY: usize = 64;

/// Small bodies have this part of the room besides, which others cannot take from them.
const FOR_SMALL: usize = 4;
/// Bodies of up to this many bytes are small.
const SMALL: usize = 64 << 10;
/// A body that is whole does not give way before its readers had this much time for it.
const TIME_TO_READ: Duration = Duration::from_secs(2);

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
    whole: Mutex<VecDeque<(Instant, Weak<dyn Whole>)>>,
    metrics: Arc<Metrics>,
}

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize, metrics: Arc<Metrics>) -> Self {
        Self { used: AtomicUsize::new(0), limit, whole: Mutex::new(VecDeque::new()), metrics }
    }

    /// Takes bytes for a body of `size` bytes, as far as that is known, if enough are left, or can be had from bodies that have been whole for
    /// a while.
    #[must_use]
    pub fn take(&self, bytes: usize, size: usize) -> bool {
        let limit = if size <= SMALL { self.limit.saturating_add(self.limit / FOR_SMALL) } else { self.limit };
        while !self.take_free(bytes, limit) {
            let oldest = {
                let mut whole = self.whole();
                match whole.front() {
                    Some((since, _)) if since.elapsed() >= TIME_TO_READ => whole.pop_front(),
                    _ => return false,
                }
            };
            if let Some(oldest) = oldest.and_then(|(_, body)| body.upgrade()) {
                oldest.let_go();
            }
        }
        true
    }

    fn take_free(&self, bytes: usize, limit: usize) -> bool {
        let taken =
            self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| used.checked_add(bytes).filter(|&sum| sum <= limit));
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
            whole.retain(|(_, body)| body.upgrade().is_some_and(|body| body.has_bytes()));
        }
        whole.push_back((Instant::now(), body));
    }

    fn whole(&self) -> std::sync::MutexGuard<'_, VecDeque<(Instant, Weak<dyn Whole>)>> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are taken.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}
