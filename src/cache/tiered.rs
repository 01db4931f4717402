//! Memory in front of Redis, itself a [`Store`].

use std::collections::BTreeMap;
use std::sync::Arc;

use super::memory::Memory;
use super::{Entry, Pending, Selection, Store, Tier};
use crate::cache::key::{Canonical, Key};

/// Memory in front of a slower store.
///
/// An entry carries the moment it was stored and its lives, so what is read from below lives in memory no longer than
/// it would have lived there.
pub struct Tiered<S> {
    memory: Memory,
    below: S,
}

impl<S: Store> Tiered<S> {
    /// Both tiers as one.
    pub const fn new(memory: Memory, below: S) -> Self {
        Self { memory, below }
    }
}

impl<S: Store> Store for Tiered<S> {
    fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>> {
        self.memory.peek(canonical)
    }

    fn get<'a>(&'a self, key: &'a Key) -> Pending<'a, Option<Arc<Entry>>> {
        Box::pin(async move {
            if let Some(found) = self.memory.get(key).await {
                return Some(found);
            }
            let found = self.below.get(key).await?;
            self.memory.insert(Arc::clone(&found));
            Some(found)
        })
    }

    fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> Pending<'a, ()> {
        self.memory.insert(Arc::clone(&entry));
        self.below.put(key, entry)
    }

    fn improve(&self, entry: Arc<Entry>) {
        self.memory.improve(entry);
    }

    fn remove<'a>(&'a self, key: &'a Key) -> Pending<'a, ()> {
        // Memory at once: what it reads back from below meanwhile is told by its age.
        drop(self.memory.remove(key));
        self.below.remove(key)
    }

    fn purge<'a>(&'a self, what: &'a Selection, soft: bool) -> Pending<'a, usize> {
        Box::pin(async move {
            // Below first: what memory reads back meanwhile is then purged from memory too.
            let below = self.below.purge(what, soft).await;
            let above = self.memory.purge(what, soft).await;
            below.max(above)
        })
    }

    fn report(&self) -> Vec<Tier> {
        self.memory.report().into_iter().chain(self.below.report()).collect()
    }

    fn families(&self) -> BTreeMap<String, u64> {
        self.memory.families()
    }

    fn shared_facts(&self) -> Pending<'_, Option<BTreeMap<String, String>>> {
        self.below.shared_facts()
    }

    fn is_up(&self) -> bool {
        true
    }
}
