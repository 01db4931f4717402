//! What keeps entries under keys: the trait that memory, Redis and both in one implement.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use super::entry::Entry;
use super::key::{Canonical, Key};
use super::void::Validity;

/// The future of what a store does.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Keeps entries under keys.
pub trait Store: Send + Sync {
    /// What is in memory. For hits: no allocation, no I/O.
    fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>>;

    /// The entry under a key, whatever its age. It always belongs to the key: the canonical request was compared.
    fn get<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Arc<Entry>>>;

    /// Stores an entry until its lifetimes are over or room is needed.
    fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> StoreFuture<'a, ()>;

    /// Stores an entry in memory alone, if there is any.
    fn keep(&self, entry: Arc<Entry>) {
        drop(entry);
    }

    /// Puts `other` in the place of an entry in memory (its body inflated, say), or nothing; not if another entry took its
    /// place meanwhile.
    fn replace(&self, entry: &Arc<Entry>, other: Option<Arc<Entry>>);

    /// Removes the entry under a key.
    fn remove<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()>;

    /// Shows every entry in memory to `judge`, and keeps what that leaves of it. It takes a while: not for a thread that serves.
    fn work_off(&self, judge: &mut dyn FnMut(&Entry) -> Validity);

    /// The tier that instances share, by itself: for what must not take room in memory. `None` without one.
    fn shared(&self) -> Option<&dyn Store> {
        None
    }

    /// The tiers, for `stats`.
    fn report(&self) -> Vec<Tier>;

    /// How many entries are in memory, by the first part of their readable key, for `stats`.
    fn keys_by_prefix(&self) -> BTreeMap<String, u64>;

    /// What the server of the shared tier says of itself, by Redis's names; `None` without one, or while it fails.
    fn server_info(&self) -> StoreFuture<'_, Option<BTreeMap<String, String>>> {
        Box::pin(std::future::ready(None))
    }

    /// Whether the store works right now.
    fn is_up(&self) -> bool;
}

/// One tier, as `stats` shows it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Tier {
    /// `memory` or `redis`.
    pub tier: &'static str,
    /// Whether it works right now.
    pub up: bool,
    /// Entries, where that is known without asking.
    pub entries: Option<u64>,
    /// Bytes, likewise.
    pub bytes: Option<u64>,
    /// Bytes that it may hold, likewise.
    pub capacity: Option<u64>,
}
