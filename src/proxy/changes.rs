//! The requests under way that may change something, for the end of the program: see [`change`](super::change).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::timeout;

use crate::cache::key::Key;

/// Changes that wait to be voided once more, at most. Beyond that, the first void is the only one.
const LATE: usize = 1024;

/// The changes that are under way.
pub struct Changes {
    open: Mutex<Open>,
    /// How many of them nobody knows the effect of.
    count: watch::Sender<usize>,
    late: Semaphore,
}

#[derive(Default)]
struct Open {
    next: u64,
    /// The keys of their targets.
    keys: HashMap<u64, Key>,
}

impl Default for Changes {
    fn default() -> Self {
        Self { open: Mutex::default(), count: watch::Sender::new(0), late: Semaphore::new(LATE) }
    }
}

impl Changes {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the effect of each is known, for at most so long. Whether it is.
    pub async fn settled(&self, patience: Duration) -> bool {
        let mut count = self.count.subscribe();
        let settled = timeout(patience, count.wait_for(|count| *count == 0)).await;
        settled.is_ok()
    }

    /// The keys of the targets of all that may be under way at the backend still. Nothing else voids them afterwards.
    #[must_use]
    pub fn take(&self) -> Vec<Key> {
        self.open().keys.drain().map(|(_, key)| key).collect()
    }

    /// One begins, with this number from now on.
    pub(super) fn begin(&self, key: Option<&Key>) -> u64 {
        let mut open = self.open();
        open.next += 1;
        let number = open.next;
        open.keys.extend(key.map(|key| (number, key.clone())));
        self.count.send_modify(|count| *count += 1);
        number
    }

    /// The effect of one is known.
    pub(super) fn is_known(&self) {
        self.count.send_modify(|count| *count -= 1);
    }

    /// One is over at the backend too.
    pub(super) fn end(&self, number: u64) {
        self.open().keys.remove(&number);
    }

    /// A place among those that wait to be voided once more.
    pub(super) fn late(&self) -> Option<SemaphorePermit<'_>> {
        self.late.try_acquire().ok()
    }
}
