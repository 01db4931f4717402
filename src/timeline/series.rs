//! What is known of a symbol besides its orders: how it is called, and what is being asked about it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::cache::void::Moment;
use crate::cache::void::Selection;

/// A symbol whose orders are kept.
pub struct Series {
    /// The symbol, in upper case: the source is asked for it so.
    pub symbol: Arc<str>,
    /// The tags under which purges find its orders.
    pub tags: Vec<String>,
    /// One fetch for the newest part at a time.
    pub refreshing: tokio::sync::Mutex<()>,
    /// One fetch for spans that are over at a time.
    pub filling: tokio::sync::Mutex<()>,
    /// Whether somebody asked since the newest part was asked for.
    pub used: AtomicBool,
    /// Whether the newest part is asked for again when it is due.
    pub tended: AtomicBool,
    /// Grows whenever the newest part changes.
    pub generation: AtomicU64,
    notes: Mutex<Notes>,
}

#[derive(Clone, Copy, Default)]
struct Notes {
    asking_since: Option<Instant>,
    failed: Option<Instant>,
    filled: Option<Instant>,
    oldest: Option<(i64, Moment)>,
}

impl Series {
    /// Nothing is known of it yet.
    #[must_use]
    pub fn new(symbol: Arc<str>, tags: Vec<String>) -> Self {
        Self {
            symbol,
            tags,
            refreshing: tokio::sync::Mutex::default(),
            filling: tokio::sync::Mutex::default(),
            used: AtomicBool::new(false),
            tended: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            notes: Mutex::default(),
        }
    }

    /// Whether a purge concerns its orders.
    #[must_use]
    pub fn is_concerned(&self, selection: &Selection) -> bool {
        selection.matches("", &self.tags, u64::MAX)
    }

    /// Its newest part is asked for from now on, or (`None`) is not any more.
    pub fn note_asking(&self, since: Option<Instant>) {
        self.notes().asking_since = since;
    }

    /// Since when the newest part is being asked for.
    #[must_use]
    pub fn asking_since(&self) -> Option<Instant> {
        self.notes().asking_since
    }

    /// A fetch failed, or (`None`) was answered.
    pub fn note_failed(&self, at: Option<Instant>) {
        self.notes().failed = at;
    }

    /// When a fetch failed, if none was answered since.
    #[must_use]
    pub fn failed(&self) -> Option<Instant> {
        self.notes().failed
    }

    /// Takes the turn to fill many spans, unless somebody did since `after`.
    pub fn take_turn(&self, now: Instant, after: std::time::Duration) -> bool {
        let mut notes = self.notes();
        if notes.filled.is_some_and(|at| now < at + after) {
            return false;
        }
        notes.filled = Some(now);
        true
    }

    /// The first moment before which there are no orders, and when that was asked for.
    #[must_use]
    pub fn oldest(&self) -> Option<(i64, Moment)> {
        self.notes().oldest
    }

    /// There are no orders before `moment`.
    pub fn note_oldest(&self, moment: i64, asked_at: Moment) {
        self.notes().oldest = Some((moment, asked_at));
    }

    /// The newest part changed.
    pub fn note_change(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
