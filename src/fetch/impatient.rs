//! The few requests that are passed by themselves because the fetch that they waited for takes too long.
//!
//! Few for the whole process, since the upstream is slow already; and fewer for one key, so that a slow one leaves places to the others.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use crate::cache::key::Canonical;
use crate::upstream::failure::Failure;

/// Requests at a time, of all keys.
const ALL: usize = 8;
/// Requests at a time of one key.
const OF_ONE: usize = 2;

/// The places of impatient requests.
pub struct Impatient {
    all: Semaphore,
    /// By key, as long as requests for it have a place or wait for one.
    by_key: Mutex<HashMap<Bytes, Arc<Semaphore>>>,
}

/// A place. It is given back when this is dropped.
pub struct Place<'a> {
    _one: Turn<'a>,
    _of_all: SemaphorePermit<'a>,
}

/// A place among the requests for a key, or the wait for one.
struct Turn<'a> {
    impatient: &'a Impatient,
    key: Bytes,
    /// `None`: it is being dropped.
    places: Option<Arc<Semaphore>>,
    has_place: bool,
}

impl Default for Impatient {
    fn default() -> Self {
        Self { all: Semaphore::new(ALL), by_key: Mutex::default() }
    }
}

impl Impatient {
    /// A place for a request for this key.
    ///
    /// # Errors
    /// [`Failure::Overloaded`] if none becomes free in time.
    pub async fn place(&self, key: &Canonical, patience: Duration) -> Result<Place<'_>, Failure> {
        let waiting = async {
            // First among its own: those who wait for these keep no place from others.
            let mut one = self.turn(key);
            one.places.as_ref()?.acquire().await.ok()?.forget();
            one.has_place = true;
            Some(Place { _one: one, _of_all: self.all.acquire().await.ok()? })
        };
        timeout(patience, waiting).await.ok().flatten().ok_or(Failure::Overloaded)
    }

    fn turn(&self, key: &Canonical) -> Turn<'_> {
        let places = Arc::clone(self.by_key().entry(key.0.clone()).or_insert_with(|| Arc::new(Semaphore::new(OF_ONE))));
        Turn { impatient: self, key: key.0.clone(), places: Some(places), has_place: false }
    }

    fn by_key(&self) -> MutexGuard<'_, HashMap<Bytes, Arc<Semaphore>>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let (true, Some(places)) = (self.has_place, &self.places) {
            places.add_permits(1);
        }
        // They are made and dropped under this lock, so that the last one sees that it is.
        let mut by_key = self.impatient.by_key();
        self.places = None;
        if let Entry::Occupied(known) = by_key.entry(self.key.clone())
            && Arc::strong_count(known.get()) == 1
        {
            known.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn key(number: usize) -> Canonical {
        Canonical(Bytes::from(number.to_string()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_key_leaves_places_to_the_others_and_all_have_so_many() {
        let impatient = Impatient::default();
        let slow = [impatient.place(&key(0), PATIENCE).await.unwrap(), impatient.place(&key(0), PATIENCE).await.unwrap()];
        assert!(matches!(impatient.place(&key(0), PATIENCE).await, Err(Failure::Overloaded)));
        let mut others = Vec::new();
        for number in 1..=ALL - 2 {
            others.push(impatient.place(&key(number), Duration::ZERO).await.unwrap());
        }
        assert!(matches!(impatient.place(&key(100), PATIENCE).await, Err(Failure::Overloaded)));
        let same = key(0);
        let (waiting, ()) = tokio::join!(impatient.place(&same, PATIENCE), async { drop(slow) });
        assert!(waiting.is_ok());
        drop((waiting, others));
        assert!(impatient.by_key().is_empty());
        assert_eq!(impatient.all.available_permits(), ALL);
    }
}
