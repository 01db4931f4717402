//! What was purged lately, so that an answer that was asked for before a purge is not stored after it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use crate::cache::Selection;
use crate::cache::key::Key;

/// Purges that are remembered. A fetch older than the oldest of them is not stored, to be safe.
const REMEMBERED: usize = 256;

/// The last purges.
#[derive(Default)]
pub struct Purges(Mutex<VecDeque<(Instant, Selection)>>);

impl Purges {
    /// A purge begins.
    pub fn note(&self, what: Selection) {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if log.len() == REMEMBERED {
            log.pop_front();
        }
        log.push_back((Instant::now(), what));
    }

    /// Whether what was asked for at `since` under `key` may have been purged.
    #[must_use]
    pub fn hit(&self, key: &Key, since: Instant) -> bool {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let forgotten = log.len() == REMEMBERED && log.front().is_some_and(|(at, _)| *at >= since);
        forgotten || log.iter().any(|(at, what)| *at >= since && what.matches(&key.readable, &key.tags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::key::Canonical;

    #[test]
    fn only_fetches_that_began_before_a_purge_are_hit() {
        let key = Key { canonical: Canonical(bytes::Bytes::new()), readable: "liq:BTC".into(), tags: vec!["t".into()] };
        let (purges, before) = (Purges::default(), Instant::now());
        assert!(!purges.hit(&key, before));
        purges.note(Selection::Pattern("liq:ETH".into()));
        assert!(!purges.hit(&key, before));
        purges.note(Selection::Tag("t".into()));
        assert!(purges.hit(&key, before));
        assert!(!purges.hit(&key, Instant::now() + std::time::Duration::from_secs(1)));
        (0..REMEMBERED).for_each(|_| purges.note(Selection::Tag("x".into())));
        assert!(purges.hit(&key, before), "what is forgotten counts as purged");
    }
}
