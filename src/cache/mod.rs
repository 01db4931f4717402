//! What is stored, and who may get it: keys ([`key`]), stored responses ([`entry`]), what is void of them ([`void`]), and the
//! stores ([`store`]): [`memory`], [`redis`] (bytes by [`codec`], perhaps sealed by [`seal`]) and both in one, [`tiered`].
//!
//! Knows rules only to make keys from them. A store knows keys and entries, never requests or freshness decisions, and it
//! never fails: what cannot be read is a miss, what cannot be written is not stored, and both are counted.

pub mod codec;
pub mod entry;
pub mod key;
pub mod memory;
pub mod redis;
pub mod seal;
pub mod store;
pub mod tiered;
pub mod void;

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::clock::Wall;
use crate::telemetry::metrics::Metrics;
use entry::Entry;
use key::{Canonical, Key};
use store::Store;
use void::{Selection, Validity, Voids};

/// The cache: a store, and what is void of it. Whatever is read here may be used, as far as purges and invalidations go.
///
/// `target_uri` is, throughout, the canonical request without origin and variant: what an invalidation names (RFC 9111 §4.4).
pub struct Cache {
    store: Arc<dyn Store>,
    voids: Voids,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

impl Cache {
    /// The cache over a store. What need not be waited for is done on `runtime`.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, runtime: Handle, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { store, voids: Voids::default(), runtime, metrics })
    }

    /// The store, for what voids do not bear upon: reports, and other forms of an entry.
    #[must_use]
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// The voids.
    #[must_use]
    pub const fn voids(&self) -> &Voids {
        &self.voids
    }

    /// The entry in memory. For hits: no allocation, no I/O.
    #[must_use]
    pub fn peek(&self, canonical: &Canonical, target_uri: impl FnOnce() -> Canonical) -> Option<Arc<Entry>> {
        let entry = self.store.peek(canonical)?;
        self.valid(entry, target_uri)
    }

    /// The entry under a key, whatever its age.
    pub async fn get(&self, key: &Key, target_uri: impl FnOnce() -> Canonical) -> Option<Arc<Entry>> {
        let entry = self.store.get(key).await?;
        self.valid(entry, target_uri)
    }

    /// What may be used of an entry that was read.
    fn valid(&self, entry: Arc<Entry>, target_uri: impl FnOnce() -> Canonical) -> Option<Arc<Entry>> {
        let left = match self.voids.check(&entry, target_uri) {
            Validity::Valid => return Some(entry),
            Validity::Expired(left) => Some(Arc::from(left)),
            Validity::Void => None,
        };
        // A purge removes what was stored when it came. This entry may have been read from Redis before that and put into
        // memory after.
        self.store.replace(&entry, left.clone());
        left
    }

    /// Stores an entry: in memory at once, and elsewhere until the future ends.
    ///
    /// What was voided meanwhile does not stay. A void that is made after the check within finds the entry in the store, one
    /// that was made before is found by the check.
    pub fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>, target_uri: &'a Canonical) -> impl Future<Output = ()> + Send + 'a {
        let writing = self.store.put(key, Arc::clone(&entry));
        async move {
            writing.await;
            match self.voids.check_written(&entry, target_uri) {
                Validity::Valid => {}
                Validity::Expired(left) => self.store.put(key, left.into()).await,
                Validity::Void => self.store.remove(key).await,
            }
        }
    }

    /// Purges what `what` selects, or with `soft` makes it stale. Returns how many entries that were.
    pub async fn purge(&self, what: Selection, soft: bool) -> usize {
        let purge = self.voids.purge(what, soft);
        let purged = self.store.purge(&purge).await;
        self.metrics.purged.inc_by(purged as u64);
        tracing::info!(what = ?purge.what, soft, purged, "purged");
        purged
    }

    /// A client changed what is stored under these keys, which are those of target URIs (RFC 9111 §4.4): neither that nor what
    /// is being fetched for them is used any more. The returned task removes it.
    pub fn invalidate(&self, keys: Vec<Key>) -> JoinHandle<()> {
        for key in &keys {
            self.voids.invalidate(&key.canonical);
        }
        let store = Arc::clone(&self.store);
        self.runtime.spawn(async move {
            for key in keys {
                store.remove(&key).await;
            }
        })
    }

    /// The moment of something that is asked of the upstream now.
    #[must_use]
    pub fn ask(&self) -> Wall {
        self.voids.ask()
    }
}

#[cfg(test)]
mod tests {
    use super::codec::tests::entry as stored;
    use super::memory::Memory;
    use super::store::{StoreFuture, Tier};
    use super::void::Purge;
    use super::*;
    use bytes::Bytes;
    use std::collections::BTreeMap;
    use std::sync::{OnceLock, Weak};

    /// What happens between the moment at which an entry is given to a store and the moment at which it is there.
    type Meanwhile = fn(Arc<Cache>) -> StoreFuture<'static, ()>;

    /// A store in which something happens before each write.
    struct Slow {
        memory: Memory,
        cache: OnceLock<Weak<Cache>>,
        meanwhile: Meanwhile,
    }

    impl Store for Slow {
        fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>> {
            self.memory.peek(canonical)
        }

        fn get<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Arc<Entry>>> {
            self.memory.get(key)
        }

        fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> StoreFuture<'a, ()> {
            Box::pin(async move {
                if let Some(cache) = self.cache.get().and_then(Weak::upgrade) {
                    (self.meanwhile)(cache).await;
                }
                self.memory.put(key, entry).await;
            })
        }

        fn replace(&self, entry: &Arc<Entry>, other: Option<Arc<Entry>>) {
            self.memory.replace(entry, other);
        }

        fn remove<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
            self.memory.remove(key)
        }

        fn purge<'a>(&'a self, purge: &'a Purge) -> StoreFuture<'a, usize> {
            self.memory.purge(purge)
        }

        fn report(&self) -> Vec<Tier> {
            self.memory.report()
        }

        fn keys_by_prefix(&self) -> BTreeMap<String, u64> {
            self.memory.keys_by_prefix()
        }

        fn is_up(&self) -> bool {
            true
        }
    }

    fn key() -> Key {
        Key { canonical: Canonical(Bytes::from_static(b"k")), readable: "liq:BTC".to_owned(), tags: vec!["symbol:BTC".to_owned()] }
    }

    fn target_uri() -> Canonical {
        key().canonical
    }

    /// What is left in the store of a response that was asked for before `meanwhile` and stored after.
    async fn left_after(meanwhile: Meanwhile) -> Option<Arc<Entry>> {
        let metrics = Arc::new(Metrics::new(&[]).unwrap());
        let memory = Memory::new(1 << 20, 1 << 20, Arc::clone(&metrics)).unwrap();
        let store = Arc::new(Slow { memory, cache: OnceLock::new(), meanwhile });
        let cache = Cache::new(Arc::clone(&store) as _, Handle::current(), metrics);
        store.cache.set(Arc::downgrade(&cache)).unwrap();
        let key = key();
        let template = stored(b"old", &key.tags, "v");
        let entry = Entry { asked_at: cache.ask(), canonical: key.canonical.0.clone(), readable: key.readable.clone(), ..template };
        cache.put(&key, Arc::new(entry), &target_uri()).await;
        // Not only may it not be used: it is gone, so that it cannot come back once its void is forgotten.
        let left = store.peek(&key.canonical);
        assert_eq!(cache.peek(&key.canonical, target_uri), left);
        left
    }

    fn purge(cache: Arc<Cache>, what: Selection) -> StoreFuture<'static, ()> {
        Box::pin(async move {
            cache.purge(what, false).await;
        })
    }

    #[tokio::test]
    async fn a_purge_between_the_request_and_the_write_voids_what_is_written() {
        assert!(left_after(|_| Box::pin(async {})).await.is_some());
        let by_tag: Meanwhile = |cache| purge(cache, Selection::Tag("symbol:BTC".into()));
        let by_pattern: Meanwhile = |cache| purge(cache, Selection::Pattern("liq:*".into()));
        let another: Meanwhile = |cache| purge(cache, Selection::Tag("symbol:ETH".into()));
        assert_eq!((left_after(by_tag).await, left_after(by_pattern).await), (None, None));
        assert!(left_after(another).await.is_some());
        let many: Meanwhile = |cache| {
            Box::pin(async move {
                for _ in 0..1000 {
                    cache.purge(Selection::Tag("symbol:ETH".into()), false).await;
                }
            })
        };
        assert_eq!(left_after(many).await, None, "a purge that was forgotten meanwhile counts");
    }

    #[tokio::test]
    async fn a_soft_purge_between_the_request_and_the_write_leaves_it_stale() {
        let softly: Meanwhile = |cache| {
            Box::pin(async move {
                // Only before the first write: what is left is written too.
                if cache.metrics.purged.get() == 0 {
                    cache.metrics.purged.inc();
                    cache.purge(Selection::Tag("symbol:BTC".into()), true).await;
                }
            })
        };
        let left = left_after(softly).await.expect("what is left");
        assert!(left.lifetimes.fresh.is_zero());
    }

    #[tokio::test]
    async fn a_change_between_the_request_and_the_write_voids_what_is_written() {
        let change: Meanwhile = |cache| Box::pin(async move { cache.invalidate(vec![key()]).await.unwrap() });
        assert_eq!(left_after(change).await, None);
    }
}
