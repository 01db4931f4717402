//! How many bytes all bodies on their way into the cache may take together.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::telemetry::metrics::Metrics;

/// The list of bodies that are for their readers alone is tidied when it has this many.
const UNTIDY: usize = 64;

/// Small bodies have this part of the room besides, which others cannot take from them.
const FOR_SMALL: usize = 4;
/// Bodies of up to this many bytes are small.
const SMALL: usize = 64 << 10;
/// Readers that are behind have this part of the room besides, all of them together.
const OVERDRAFT: usize = 4;
/// A body that is for its readers alone does not give way before its readers had this much time for it.
pub const TIME_TO_READ: Duration = Duration::from_secs(2);

/// A body whose bytes are of use to its readers alone: one that is whole, or that only passes by.
pub trait ForReaders: Send + Sync {
    /// Gives back to the budget what it had taken. One that is whole lets go of what its readers have not read, which cuts them off; one
    /// that passes by, of nothing that its fastest reader has not read.
    fn let_go(&self);

    /// How many bytes of the budget it would give back.
    fn bytes(&self) -> usize;

    /// Whether it has any bytes of the budget still. Those that it would not give back now it may later.
    fn has_any(&self) -> bool;
}

/// All fills' bytes together.
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
    /// Bytes that are held beyond that, so that nobody is cut off who reads more slowly than another.
    overdrawn: AtomicUsize,
    /// Bodies that are for their readers alone, the oldest first. They give way to those that are on their way: a client that does not
    /// read keeps nobody's answer out of the cache.
    for_readers: Mutex<Queue>,
    metrics: Arc<Metrics>,
}

/// Bodies, and since when they are for their readers alone.
type Queue = VecDeque<(Instant, Weak<dyn ForReaders>)>;

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize, metrics: Arc<Metrics>) -> Self {
        let (used, overdrawn) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { used, limit, overdrawn, for_readers: Mutex::new(VecDeque::new()), metrics }
    }

    /// Takes bytes for a body of `size` bytes, as far as that is known, if enough are left, or can be had from bodies that have been for
    /// their readers alone for a while. Nobody is cut off where that would not do.
    #[must_use]
    pub fn take(&self, bytes: usize, size: usize) -> bool {
        let limit = if size <= SMALL { self.limit.saturating_add(self.limit / FOR_SMALL) } else { self.limit };
        while !self.take_free(bytes, limit) {
            let oldest = {
                let mut queue = self.for_readers();
                match self.used().saturating_add(bytes).saturating_sub(limit) {
                    // It was given back just now.
                    0 => continue,
                    missing if suffice(&queue, missing) => queue.pop_front(),
                    _ => return false,
                }
            };
            if let Some(oldest) = oldest.and_then(|(_, body)| body.upgrade()) {
                oldest.let_go();
                if oldest.has_any() {
                    self.keep_for_readers(Arc::downgrade(&oldest));
                }
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

    /// Takes bytes beyond the budget for readers that are behind the fastest one, if no more than a part of it are taken so by all.
    #[must_use]
    pub fn overdraw(&self, bytes: usize) -> bool {
        let most = self.limit / OVERDRAFT;
        let taken = self
            .overdrawn
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| taken.checked_add(bytes).filter(|&sum| sum <= most))
            .is_ok();
        if taken {
            self.metrics.fill_bytes.add(i64::try_from(bytes).unwrap_or(0));
        }
        taken
    }

    /// Gives back bytes that were taken beyond the budget.
    pub fn give_back_overdrawn(&self, bytes: usize) {
        self.overdrawn.fetch_sub(bytes, Ordering::Relaxed);
        self.metrics.fill_bytes.sub(i64::try_from(bytes).unwrap_or(0));
    }

    /// Notes a body that is for its readers alone from now on, and keeps its bytes for them until they are needed.
    pub fn keep_for_readers(&self, body: Weak<dyn ForReaders>) {
        let mut queue = self.for_readers();
        if queue.len() >= UNTIDY {
            queue.retain(|(_, body)| body.upgrade().is_some_and(|body| body.has_any()));
        }
        queue.push_back((Instant::now(), body));
    }

    fn for_readers(&self) -> MutexGuard<'_, Queue> {
        self.for_readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As if all that stand in the queue had come earlier by this.
    #[cfg(test)]
    pub fn age(&self, by: Duration) {
        self.for_readers().iter_mut().for_each(|(since, _)| *since = since.checked_sub(by).unwrap_or(*since));
    }

    /// Bytes that are taken.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Whether so many bytes can be had from those whose readers had their time.
fn suffice(queue: &Queue, missing: usize) -> bool {
    let mut sum = 0_usize;
    let bodies = queue.iter().take_while(|(since, _)| since.elapsed() >= TIME_TO_READ);
    bodies.filter_map(|(_, body)| body.upgrade()).any(|body| {
        sum = sum.saturating_add(body.bytes());
        sum >= missing
    })
}
