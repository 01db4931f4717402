//! What is being computed: equal requests at one time are computed once.
//!
//! A computation is a task of its own. Those who wait for it share it, none of them can end it for the others, and it ends when all of them
//! have left. Whether what it gives is new enough for a request that joined it late, that request decides itself.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use foldhash::quality::RandomState;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::upstream::AbortOnDrop;

/// The canonical request, and whether its answer is packed.
pub type FlightKey = (Bytes, bool);

type Map<T> = HashMap<FlightKey, Weak<Flight<T>>, RandomState>;

/// All that is being computed. Each of these stands here for as long as somebody waits for it.
pub struct Flights<T>(Arc<Mutex<Map<T>>>);

/// A computation that is under way, or has just ended.
pub struct Flight<T> {
    key: FlightKey,
    flights: Weak<Mutex<Map<T>>>,
    /// The version of the newest orders when it began.
    version: u64,
    began: Instant,
    made: watch::Receiver<Option<T>>,
    _task: AbortOnDrop<()>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// The computation for a key that began with this version of the newest orders, or else a new one. The flag says that it is new.
    pub fn join<F>(&self, runtime: &Handle, key: FlightKey, version: u64, work: impl FnOnce() -> F) -> (Arc<Flight<T>>, bool)
    where
        F: Future<Output = T> + Send + 'static,
    {
        self.join_if(runtime, key, version, |flight| flight.version == version, work)
    }

    /// The same where the computation must have begun after a moment: for one who had joined another that had begun too early.
    pub fn join_later<F>(
        &self,
        runtime: &Handle,
        key: FlightKey,
        version: u64,
        came: Instant,
        work: impl FnOnce() -> F,
    ) -> (Arc<Flight<T>>, bool)
    where
        F: Future<Output = T> + Send + 'static,
    {
        self.join_if(runtime, key, version, |flight| flight.began > came, work)
    }

    fn join_if<F>(
        &self,
        runtime: &Handle,
        key: FlightKey,
        version: u64,
        is_good: impl Fn(&Flight<T>) -> bool,
        work: impl FnOnce() -> F,
    ) -> (Arc<Flight<T>>, bool)
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut map = lock(&self.0);
        let found = map.get(&key).and_then(Weak::upgrade);
        if let Some(flight) = found.as_ref().filter(|flight| is_good(flight)) {
            return (Arc::clone(flight), false);
        }
        let flight = self.fly(runtime, key.clone(), version, work());
        map.insert(key, Arc::downgrade(&flight));
        // Before what was found, which may need the map itself to end.
        drop(map);
        (flight, true)
    }

    fn fly<F>(&self, runtime: &Handle, key: FlightKey, version: u64, work: F) -> Arc<Flight<T>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let (began, (sender, made)) = (Instant::now(), watch::channel(None));
        let task = AbortOnDrop(runtime.spawn(async move { drop(sender.send(Some(work.await))) }));
        Arc::new(Flight { key, flights: Arc::downgrade(&self.0), version, began, made, _task: task })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.0).len()
    }
}

impl<T: Clone> Flight<T> {
    /// Waits for what it gives; `None`: it panicked.
    pub async fn made(&self) -> Option<T> {
        let mut made = self.made.clone();
        let made = made.wait_for(Option::is_some).await.ok()?;
        made.clone()
    }
}

impl<T> Drop for Flight<T> {
    fn drop(&mut self) {
        let Some(flights) = self.flights.upgrade() else { return };
        if let Entry::Occupied(entry) = lock(&flights).entry(self.key.clone())
            && std::ptr::eq(entry.get().as_ptr(), self)
        {
            entry.remove();
        }
    }
}

fn lock<T>(flights: &Mutex<Map<T>>) -> MutexGuard<'_, Map<T>> {
    flights.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    fn key(text: &'static str) -> FlightKey {
        (Bytes::from_static(text.as_bytes()), false)
    }

    #[tokio::test(start_paused = true)]
    async fn equal_requests_are_computed_once_and_nobody_works_for_nobody() {
        let (flights, begun, done) = (Flights::default(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let fly = |version| {
            let (begun, done) = (Arc::clone(&begun), Arc::clone(&done));
            let work = async move {
                begun.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(1)).await;
                done.fetch_add(1, Ordering::Relaxed);
                version
            };
            flights.join(&Handle::current(), key("a"), version, || work).0
        };
        let (first, second) = (fly(1), fly(1));
        assert!(Arc::ptr_eq(&first, &second));
        drop(first);
        assert_eq!(second.made().await, Some(1), "the one who began it has left");
        assert_eq!(fly(1).made().await, Some(1), "it has just ended");
        // Another version is another computation; the first one that is left is not the one that stands there.
        let newer = fly(2);
        drop(second);
        assert!(Arc::ptr_eq(&newer, &fly(2)));
        tokio::task::yield_now().await;
        drop(newer);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!((begun.load(Ordering::Relaxed), done.load(Ordering::Relaxed), flights.count()), (2, 1, 0), "all have left");
    }

    #[tokio::test(start_paused = true)]
    async fn those_whose_computation_had_begun_too_early_share_the_next_one() {
        let (flights, begun) = (Flights::default(), Arc::new(AtomicUsize::new(0)));
        let work = || {
            let begun = Arc::clone(&begun);
            async move { begun.fetch_add(1, Ordering::Relaxed) }
        };
        let early = flights.join(&Handle::current(), key("a"), 1, work).0;
        tokio::time::advance(Duration::from_millis(1)).await;
        let came = Instant::now();
        tokio::time::advance(Duration::from_millis(1)).await;
        let later = || flights.join_later(&Handle::current(), key("a"), 1, came, work);
        let ((one, is_own), (other, is_others)) = (later(), later());
        assert!(is_own && !is_others && Arc::ptr_eq(&one, &other) && !Arc::ptr_eq(&one, &early));
        assert_eq!((early.made().await, other.made().await, begun.load(Ordering::Relaxed)), (Some(0), Some(1), 2));
    }

    #[tokio::test]
    async fn one_that_panics_gives_nothing() {
        let flights: Flights<u8> = Flights::default();
        let (flight, _) = flights.join(&Handle::current(), key("a"), 1, || async { panic!("as a test wants it") });
        assert_eq!(flight.made().await, None);
        drop(flight);
        assert_eq!(flights.count(), 0);
    }
}
