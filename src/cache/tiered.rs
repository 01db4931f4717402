//! Memory in front of Redis, itself a [`Store`].

use std::collections::BTreeMap;
use std::sync::Arc;

use super::entry::Entry;
use super::key::{Canonical, Key};
use super::memory::Memory;
use super::store::{Store, StoreFuture, Tier};
use super::void::Validity;

/// Memory in front of a slower store.
///
/// An entry carries the moment it was stored and its lifetimes, so what is read from below lives in memory no longer than it
/// would have lived there.
pub struct Tiered<S> {
    memory: Memory,
    below: Arc<S>,
}

impl<S: Store> Tiered<S> {
    /// Both tiers as one.
    pub const fn new(memory: Memory, below: Arc<S>) -> Self {
        Self { memory, below }
    }
}

impl<S: Store> Store for Tiered<S> {
    fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>> {
        self.memory.peek(canonical)
    }

    fn get<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Arc<Entry>>> {
        Box::pin(async move {
            if let Some(found) = self.memory.get(key).await {
                return Some(found);
            }
            let found = self.below.get(key).await?;
            self.memory.insert(Arc::clone(&found));
            Some(found)
        })
    }

    fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> StoreFuture<'a, ()> {
        self.memory.insert(Arc::clone(&entry));
        self.below.put(key, entry)
    }

    fn keep(&self, entry: Arc<Entry>) {
        self.memory.insert(entry);
    }

    fn replace(&self, entry: &Arc<Entry>, other: Option<Arc<Entry>>) {
        self.memory.replace(entry, other);
    }

    fn remove<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        // Memory at once. What is read back from below meanwhile is void: that is noticed when it is read.
        drop(self.memory.remove(key));
        self.below.remove(key)
    }

    fn work_off(&self, judge: &mut dyn FnMut(&Entry) -> Validity) {
        self.memory.work_off(judge);
    }

    fn shared(&self) -> Option<&dyn Store> {
        Some(&*self.below)
    }

    fn report(&self) -> Vec<Tier> {
        self.memory.report().into_iter().chain(self.below.report()).collect()
    }

    fn keys_by_prefix(&self) -> BTreeMap<String, u64> {
        self.memory.keys_by_prefix()
    }

    fn server_info(&self) -> StoreFuture<'_, Option<BTreeMap<String, String>>> {
        self.below.server_info()
    }

    fn is_up(&self) -> bool {
        true
    }
}
