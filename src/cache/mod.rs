//! What is stored, and who may get it: keys ([`key`], read back for people by [`read_key`]), stored responses ([`entry`], as they are sent: [`ready`]), what is void of them ([`void`], with other
//! instances through [`void_log`], which [`void_worker`] sweeps), what the upstream has taken back ([`ended`]), and the stores ([`store`]):
//! [`memory`], [`redis`] (bytes by [`codec`], perhaps sealed by [`seal`]) and both in one, [`tiered`]. What memory holds outlives a
//! restart in a [`hot_file`]; what is voided while one process takes over from another goes by [`handover`] to its [`peers`].
//!
//! Knows rules only to make keys from them. A store knows keys and entries, never requests or freshness decisions, and it
//! never fails: what cannot be read is a miss, what cannot be written is not stored, and both are counted.

pub mod codec;
pub mod ended;
pub mod entry;
pub mod handover;
pub mod hot_file;
pub mod key;
pub mod memory;
pub mod peers;
pub mod read_key;
pub mod ready;
pub mod redis;
pub mod seal;
pub mod store;
pub mod tiered;
pub mod void;
pub mod void_log;
pub mod void_scripts;
pub mod void_worker;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::clock::Wall;
use crate::telemetry::metrics::Metrics;
use ended::Ended;
use entry::Entry;
use key::{Canonical, Key, entry_digest};
use peers::Peers;
use store::Store;
use void::view::{Added, LoggedVoid};
use void::{Effect, Moment, Purge, Selection, Validity, Voids};
use void_log::{Pending, VoidLog};

/// Counts of purges that are kept.
const COUNTS: usize = 256;
/// Invalidated targets after which memory is swept of what they concern.
const TARGETS: usize = 20_000;
/// How long a purge waits for the count of what it concerned.
const PATIENCE: Duration = Duration::from_millis(800);

/// The cache: a store, and what is void of it. Whatever is read here may be used, as far as purges and invalidations go.
pub struct Cache {
    store: Arc<dyn Store>,
    voids: Arc<Voids>,
    /// What the upstream has taken back.
    ended: Ended,
    /// The voids of all instances, if Redis is configured.
    log: Option<Arc<VoidLog>>,
    /// Processes at the same address that take over from this one, or the other way around.
    peers: Peers,
    /// What else holds something in memory that voids concern.
    others: Mutex<Vec<Weak<dyn Holder>>>,
    /// How many entries in memory each of the last purges concerned.
    counts: tokio::sync::Mutex<BTreeMap<Moment, u64>>,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

/// What holds something in memory that is no entry, and that voids concern.
pub trait Holder: Send + Sync {
    /// Checks all of it against the voids of this moment, and forgets what is void. It takes a while: not for a thread that serves.
    fn drop_void(&self);
}

/// What was stored under a key when it was looked up.
#[derive(Clone, Debug)]
pub struct LookedUp {
    /// The canonical form of the request that it was looked up for.
    canonical: Canonical,
    entry: Option<Arc<Entry>>,
    /// When looking began.
    pub began: Instant,
    /// How long it took.
    pub took: Duration,
}

/// What came of a purge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purged {
    /// How many entries it concerned; `None`: that is being found out.
    pub count: Option<u64>,
    /// Its number among those of all instances, by which it can be asked for later.
    pub number: Option<u64>,
    /// Whether other instances get to know it only when Redis is back.
    pub waits: bool,
}

impl fmt::Display for Purged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.count, self.number) {
            (Some(count), _) => write!(f, "{count} entries")?,
            (None, Some(number)) => write!(f, "being counted as number {number}")?,
            (None, None) => f.write_str("being counted")?,
        }
        f.write_str(if self.waits { ", other instances when Redis is back" } else { "" })
    }
}

impl Cache {
    /// The cache over a store, with the voids that hold for it. What need not be waited for is done on `runtime`.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, voids: Arc<Voids>, log: Option<Arc<VoidLog>>, runtime: Handle, metrics: Arc<Metrics>) -> Arc<Self> {
        let (ended, peers, others, counts) = Default::default();
        Arc::new(Self { store, voids, ended, log, peers, others, counts, runtime, metrics })
    }

    /// The store, for what voids do not bear upon: reports, and other forms of an entry.
    #[must_use]
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// From now on `other` is swept too. What it holds would otherwise be void once the voids that it was not checked against are forgotten.
    pub fn sweep_too(&self, other: Weak<dyn Holder>) {
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.retain(|other| other.strong_count() > 0);
        others.push(other);
    }

    /// The voids.
    #[must_use]
    pub fn voids(&self) -> &Voids {
        &self.voids
    }

    /// Processes that hear what is void here while one takes over from the other.
    #[must_use]
    pub const fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Whether other instances may have voided something that is not known here: before anything is served,
    /// [`ascertain`](Self::ascertain).
    #[must_use]
    pub fn is_uncertain(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.is_uncertain())
    }

    /// Waits until it is known what other instances voided, or, a tenth of a second later, that Redis cannot say.
    pub async fn ascertain(&self) {
        if let Some(log) = &self.log {
            log.ascertain().await;
        }
    }

    /// The entry in memory. For hits: no allocation, no I/O.
    #[must_use]
    pub fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>> {
        let entry = self.store.peek(canonical)?;
        self.valid(entry)
    }

    /// The entry under a key, whatever its age.
    pub async fn get(&self, key: &Key) -> Option<Arc<Entry>> {
        let entry = self.store.get(key).await?;
        self.going_on(entry)
    }

    /// What may be used of an entry that was read a while ago, perhaps from Redis: it may have been taken back since.
    fn going_on(&self, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        if self.ended.is_over(&entry) {
            self.store.replace(&entry, None);
            return None;
        }
        self.valid(entry)
    }

    /// Whether what memory has not may be had from the tier that instances share.
    #[must_use]
    pub fn may_be_shared(&self) -> bool {
        self.store.shared().is_some_and(Store::is_up)
    }

    /// Looks up what is stored under a key, for who does not wait for it here.
    pub fn look_up(self: &Arc<Self>, key: Arc<Key>) -> impl Future<Output = LookedUp> + Send + use<> {
        let cache = Arc::clone(self);
        async move {
            let began = Instant::now();
            let entry = cache.get(&key).await;
            LookedUp { canonical: key.canonical.clone(), entry, began, took: began.elapsed() }
        }
    }

    /// What was found when a request was looked up, as far as it may be used still; `None`: that was another request.
    #[must_use]
    pub fn found(&self, looked_up: &LookedUp, canonical: &Canonical) -> Option<Option<Arc<Entry>>> {
        (looked_up.canonical == *canonical).then(|| looked_up.entry.clone().and_then(|entry| self.going_on(entry)))
    }

    /// What may be used of an entry that was read.
    fn valid(&self, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        let left = match self.voids.check(&entry) {
            Validity::Valid => return Some(entry),
            Validity::Expired(left) => Some(Arc::from(left)),
            Validity::Void => None,
        };
        self.store.replace(&entry, left.clone());
        left
    }

    /// Stores an entry: in memory at once, and elsewhere until the future ends.
    ///
    /// What is void already is not stored, so that a slow fetch takes no place from a newer one that began after the void. What is voided
    /// meanwhile goes at once. It would not be used either: each use checks it.
    pub fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> impl Future<Output = ()> + Send + 'a {
        let writing = self.worth_storing(key, entry).map(|entry| (self.store.put(key, Arc::clone(&entry)), entry));
        async move {
            let Some((writing, entry)) = writing else { return };
            writing.await;
            if self.ended.refuses(&entry) {
                // Not another one that took its place in memory.
                self.store.replace(&entry, None);
                if let Some(shared) = self.store.shared() {
                    shared.remove(key).await;
                }
                return;
            }
            match self.voids.check(&entry) {
                Validity::Valid => {}
                Validity::Expired(left) => self.store.replace(&entry, Some(left.into())),
                Validity::Void => self.store.replace(&entry, None),
            }
        }
    }

    /// Stores an entry in memory alone, until it is [put](Self::put) in another form.
    pub fn keep(&self, key: &Key, entry: &Arc<Entry>) {
        let Some(kept) = self.worth_storing(key, Arc::clone(entry)) else { return };
        self.store.keep(Arc::clone(&kept));
        if self.ended.refuses(&kept) {
            self.store.replace(&kept, None);
        }
    }

    /// What is left of an entry that was fetched, as far as it may be stored. A slow fetch does not replace the response to a later one.
    fn worth_storing(&self, key: &Key, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        let is_overtaken = || self.store.peek(&key.canonical).is_some_and(|there| entry.is_overtaken_by(&there));
        if self.ended.refuses(&entry) || is_overtaken() {
            return None;
        }
        match self.voids.check(&entry) {
            Validity::Valid => Some(entry),
            Validity::Expired(left) => self.store.peek(&key.canonical).is_none().then(|| left.into()),
            Validity::Void => None,
        }
    }

    /// Purges what `what` selects, or with `soft` makes it stale, on every instance. What it concerns is not served here any more
    /// from now on, and nowhere else within a second; what came of it is counted meanwhile.
    pub async fn purge(self: &Arc<Self>, what: Selection, soft: bool) -> Purged {
        let (pending, Purge { at, .. }) = self.void(what.clone(), soft);
        let cache = Arc::clone(self);
        let counting = self.runtime.spawn(async move { cache.sweep(at).await });
        // Whoever asked for it may go away: all are told.
        let cache = Arc::clone(self);
        let telling = self.runtime.spawn(async move {
            let void = LoggedVoid { what, soft };
            tokio::join!(cache.peers.tell(&void), cache.share(pending)).1
        });
        let added = telling.await.unwrap_or(None);
        let (number, elsewhere) = match (&self.log, added) {
            (Some(log), Some(Added::Shared(number))) => (Some(number), log.counted(number, PATIENCE).await),
            _ => (None, Some(0)),
        };
        let here = match timeout(PATIENCE, counting).await {
            Ok(Ok(count)) => Some(count),
            _ => None,
        };
        let count = here.zip(elsewhere).map(|(here, elsewhere)| here.max(elsewhere));
        self.metrics.purged.inc_by(count.or(here).unwrap_or(0));
        Purged { count, number, waits: added == Some(Added::Waits) }
    }

    /// The voids of all instances, if Redis is configured.
    #[must_use]
    pub fn log(&self) -> Option<&VoidLog> {
        self.log.as_deref()
    }

    /// Voids something here.
    fn void(&self, what: Selection, soft: bool) -> (Option<Pending>, Purge) {
        match &self.log {
            Some(log) => {
                let (pending, purge) = log.void(what, soft);
                (Some(pending), purge)
            }
            None => (None, self.voids.add(what, Effect::of_purge(soft), Wall::now())),
        }
    }

    /// Says to the other instances what is void here. `None` without Redis.
    async fn share(&self, pending: Option<Pending>) -> Option<Added> {
        Some(self.log.as_ref()?.share(pending?).await)
    }

    /// Removes from memory what is void, and says how many entries the purge of a moment concerned.
    async fn sweep(self: &Arc<Self>, at: Moment) -> u64 {
        let mut counts = self.counts.lock().await;
        if self.voids.is_swept(at) {
            return counts.get(&at).copied().unwrap_or(0);
        }
        let (store, voids) = (Arc::clone(&self.store), Arc::clone(&self.voids));
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let working = self.runtime.spawn_blocking(move || {
            let (purges, newest) = voids.to_sweep();
            let mut found = vec![0; purges.len()];
            store.work_off(&mut |entry| {
                for (purge, count) in purges.iter().zip(&mut found) {
                    *count += u64::from(entry.asked_at < purge.at && purge.what.concerns(entry));
                }
                voids.check(entry)
            });
            others.iter().filter_map(Weak::upgrade).for_each(|other| other.drop_void());
            voids.swept(newest);
            purges.into_iter().map(|purge| purge.at).zip(found).collect::<Vec<_>>()
        });
        counts.extend(working.await.unwrap_or_default());
        while counts.len() > COUNTS {
            counts.pop_first();
        }
        counts.get(&at).copied().unwrap_or(0)
    }

    /// A client changed something: what is stored under these keys, which are those of target URIs (RFC 9111 §4.4), and whatever is
    /// being fetched for them, is not used any more, on no instance. The returned task ends when all of them have been told. What is
    /// returned besides is the void of the first of them.
    pub fn invalidate(self: &Arc<Self>, keys: Vec<Key>) -> (Option<Purge>, JoinHandle<()>) {
        let pending: Vec<_> = keys.iter().map(|key| self.void(Selection::Target(key.target), false)).collect();
        let first = pending.first().map(|(_, purge)| purge.clone());
        // Now, so that nothing that is fetched anew is removed: what is void goes when it is looked at.
        keys.iter().for_each(|key| drop(self.peek(&key.canonical)));
        let cache = Arc::clone(self);
        let telling = self.runtime.spawn(async move {
            let telling = async {
                for key in &keys {
                    cache.peers.tell(&LoggedVoid { what: Selection::Target(key.target), soft: false }).await;
                }
            };
            let sharing = async {
                for (key, (pending, _)) in keys.iter().zip(pending) {
                    cache.share(pending).await;
                    if let Some(shared) = cache.store.shared() {
                        shared.remove(key).await;
                    }
                }
            };
            // A process that hangs does not keep the instances waiting, nor what was void in Redis until it is fetched anew.
            tokio::join!(telling, sharing);
            // One sweep serves all that waits for it.
            if cache.voids.targets() > TARGETS && cache.counts.try_lock().is_ok() {
                let (sweeping, newest) = (Arc::clone(&cache), cache.voids.to_sweep().1);
                cache.runtime.spawn(async move { sweeping.sweep(newest).await });
            }
        });
        (first, telling)
    }

    /// The upstream has taken back what is stored under a key. It is removed, and what was asked for before does not take its place. The
    /// other instances are told, as far as Redis takes it: what they have would end by itself once they ask the upstream.
    pub async fn end(self: &Arc<Self>, key: &Key) {
        self.ended.note(&key.canonical, self.ask(), Wall::now());
        let what = Selection::Entry(entry_digest(&key.canonical.0));
        let pending = self.log.as_ref().filter(|_| self.may_be_shared()).map(|log| (Arc::clone(log), log.void(what.clone(), false).0));
        if let Some(there) = self.store.peek(&key.canonical) {
            self.store.replace(&there, None);
        }
        let (cache, key) = (Arc::clone(self), key.clone());
        // Whoever asked for it may go away: all are told.
        let telling = self.runtime.spawn(async move {
            if let Some(shared) = cache.store.shared() {
                shared.remove(&key).await;
            }
            let sharing = async {
                if let Some((log, pending)) = pending {
                    log.share_now(pending).await;
                }
            };
            let void = LoggedVoid { what, soft: false };
            tokio::join!(cache.peers.tell(&void), sharing);
        });
        let _ = telling.await;
    }

    /// The moment of something that is asked of the upstream now.
    #[must_use]
    pub fn ask(&self) -> Moment {
        self.voids.ask()
    }
}

#[cfg(test)]
mod tests {
    use super::codec::tests::entry as stored;
    use super::memory::Memory;
    use super::store::{StoreFuture, Tier};
    use super::*;
    use bytes::Bytes;
    use std::collections::BTreeMap;
    use std::sync::OnceLock;

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

        fn work_off(&self, judge: &mut dyn FnMut(&Entry) -> Validity) {
            self.memory.work_off(judge);
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
        Key::of(Canonical(Bytes::from_static(b"k")), "liq:BTC".to_owned(), vec!["symbol:BTC".to_owned()], 5)
    }

    /// What is left in the store of a response that was asked for before `meanwhile` and stored after.
    async fn left_after(meanwhile: Meanwhile) -> Option<Arc<Entry>> {
        let metrics = Arc::new(Metrics::new().unwrap());
        let memory = Memory::new(1 << 20, 1 << 20, Arc::clone(&metrics)).unwrap();
        let store = Arc::new(Slow { memory, cache: OnceLock::new(), meanwhile });
        let cache = Cache::new(Arc::clone(&store) as _, Arc::default(), None, Handle::current(), metrics);
        store.cache.set(Arc::downgrade(&cache)).unwrap();
        let key = key();
        let template = stored(b"old", &key.tags, "v");
        let entry =
            Entry { asked_at: cache.ask(), canonical: key.canonical.0.clone(), readable: key.readable.clone(), target: 5, ..template };
        cache.put(&key, Arc::new(entry)).await;
        // Not only may it not be used: it is gone, so that it cannot come back once its void is forgotten.
        let left = store.peek(&key.canonical);
        assert_eq!(cache.peek(&key.canonical), left);
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
    async fn what_was_looked_up_is_not_used_once_it_was_taken_back() {
        let metrics = Arc::new(Metrics::new().unwrap());
        let memory = Memory::new(1 << 20, 1 << 20, Arc::clone(&metrics)).unwrap();
        let cache = Cache::new(Arc::new(memory), Arc::default(), None, Handle::current(), metrics);
        let key = Arc::new(key());
        let mut template = stored(b"old", &key.tags, "v");
        template.lifetimes.fresh = Duration::from_secs(3600);
        let stored_at = Wall::from_millis(Wall::now().as_millis() - 1000);
        cache.put(&key, Arc::new(Entry { canonical: key.canonical.0.clone(), asked_at: cache.ask(), stored_at, ..template })).await;
        let looked_up = cache.look_up(Arc::clone(&key)).await;
        assert!(cache.found(&looked_up, &key.canonical).unwrap().is_some());
        cache.end(&key).await;
        assert!(cache.found(&looked_up, &key.canonical).unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn all_are_told_of_what_is_void_though_whoever_asked_for_it_goes_away() {
        let metrics = Arc::new(Metrics::new().unwrap());
        let memory = Memory::new(1 << 20, 1 << 20, Arc::clone(&metrics)).unwrap();
        let cache = Cache::new(Arc::new(memory), Arc::default(), None, Handle::current(), metrics);
        for ends in [false, true] {
            // Another process hangs: it is told, waited for, and cut off.
            let (_, mut queue) = cache.peers.join().unwrap();
            let telling: StoreFuture<'_, ()> = match ends {
                true => Box::pin(async { cache.end(&key()).await }),
                false => purge(Arc::clone(&cache), Selection::Tag("t".into())),
            };
            assert!(timeout(peers::PATIENCE / 10, telling).await.is_err());
            assert!(queue.recv().await.is_some() && cache.peers.are_there());
            tokio::time::sleep(peers::PATIENCE).await;
            assert!(!cache.peers.are_there(), "{ends}: it is not waited for any more");
        }
    }

    #[tokio::test]
    async fn a_change_between_the_request_and_the_write_voids_what_is_written() {
        let change: Meanwhile = |cache| Box::pin(async move { cache.invalidate(vec![key()]).1.await.unwrap() });
        assert_eq!(left_after(change).await, None);
    }
}
