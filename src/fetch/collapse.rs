//! Single-flight: for each key one fetch at a time, however many ask.
//!
//! The one who finds no flight under its key gets the [`Lead`] and hands it to a task of its own; everyone, that one
//! included, then follows the [`Flight`]. A lead that is dropped without having said how it ended releases its
//! followers with [`Failure::Lost`]. Followers learn whether the answer may be shared before they get any of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use crate::cache::key::Canonical;
use crate::fetch::fill::Fill;
use crate::proxy::outcome::Failure;

/// Where a fetch stands.
#[derive(Clone)]
pub enum Phase {
    /// The backend has not answered yet.
    Pending,
    /// It answered, and the answer is for everyone who waits.
    Shared(Arc<Fill>),
    /// It answered, and the answer belongs to the request that caused it.
    Unshared,
    /// It did not answer.
    Failed(Failure),
}

/// All fetches under way.
pub struct Flights {
    map: Mutex<HashMap<Bytes, Arc<Flight>>>,
    max_waiters: usize,
}

/// One fetch under way.
pub struct Flight {
    phase: watch::Sender<Phase>,
    waiters: AtomicUsize,
}

/// What a request gets that asks to join.
pub enum Join {
    /// It is the first: it must start the fetch, and may follow it.
    First(Lead, Follower),
    /// A fetch is under way.
    Follow(Follower),
    /// A fetch is under way, and too many wait for it.
    Full,
}

impl Flights {
    /// No fetch under way; at most `max_waiters` may wait for each.
    #[must_use]
    pub fn new(max_waiters: usize) -> Arc<Self> {
        Arc::new(Self { map: Mutex::default(), max_waiters })
    }

    fn map(&self) -> MutexGuard<'_, HashMap<Bytes, Arc<Flight>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the fetch under a key, or begins one.
    #[must_use]
    pub fn join(self: &Arc<Self>, canonical: &Canonical) -> Join {
        let mut map = self.map();
        if let Some(flight) = map.get(&canonical.0) {
            if flight.waiters.fetch_add(1, Ordering::Relaxed) >= self.max_waiters {
                flight.waiters.fetch_sub(1, Ordering::Relaxed);
                return Join::Full;
            }
            return Join::Follow(Follower(Arc::clone(flight)));
        }
        let flight = Arc::new(Flight { phase: watch::Sender::new(Phase::Pending), waiters: AtomicUsize::new(1) });
        map.insert(canonical.0.clone(), Arc::clone(&flight));
        let lead = Lead { flights: Arc::clone(self), canonical: canonical.0.clone(), flight: Arc::clone(&flight) };
        Join::First(lead, Follower(flight))
    }
}

/// The duty to fetch. While it lives, no second fetch begins under its key.
pub struct Lead {
    flights: Arc<Flights>,
    canonical: Bytes,
    flight: Arc<Flight>,
}

impl Lead {
    /// The answer is for everyone who waits.
    pub fn share(&self, fill: Arc<Fill>) {
        self.flight.phase.send_replace(Phase::Shared(fill));
    }

    /// The answer is not to be shared; from now on, others fetch for themselves.
    pub fn unshare(self) {
        self.flight.phase.send_replace(Phase::Unshared);
    }

    /// There is no answer.
    pub fn fail(self, failure: Failure) {
        self.flight.phase.send_replace(Phase::Failed(failure));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.flights.map().remove(&self.canonical);
        self.flight.phase.send_if_modified(|phase| {
            let lost = matches!(phase, Phase::Pending);
            if lost {
                *phase = Phase::Failed(Failure::Lost);
            }
            lost
        });
    }
}

/// One who waits for a fetch.
pub struct Follower(Arc<Flight>);

impl Follower {
    /// How the fetch ended, or that its answer can be read. The caller sets the deadline.
    pub async fn outcome(&self) -> Phase {
        let mut phase = self.0.phase.subscribe();
        // The sender lives in the flight that we hold, so this fails never; were it to, the fetch would be lost.
        match phase.wait_for(|phase| !matches!(phase, Phase::Pending)).await {
            Ok(phase) => phase.clone(),
            Err(_) => Phase::Failed(Failure::Lost),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.waiters.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Canonical {
        Canonical(Bytes::from_static(b"k"))
    }

    fn first(flights: &Arc<Flights>) -> (Lead, Follower) {
        match flights.join(&key()) {
            Join::First(lead, follower) => (lead, follower),
            _ => panic!("not the first"),
        }
    }

    fn follow(flights: &Arc<Flights>) -> Follower {
        match flights.join(&key()) {
            Join::Follow(follower) => follower,
            _ => panic!("not a follower"),
        }
    }

    #[tokio::test]
    async fn one_leads_and_the_others_follow_to_one_end() {
        let flights = Flights::new(10);
        let (lead, one) = first(&flights);
        let other = follow(&flights);
        lead.fail(Failure::Timeout);
        assert!(matches!(one.outcome().await, Phase::Failed(Failure::Timeout)));
        assert!(matches!(other.outcome().await, Phase::Failed(Failure::Timeout)));
        first(&flights);
    }

    #[tokio::test]
    async fn a_leader_that_is_dropped_releases_its_followers() {
        let flights = Flights::new(10);
        let (lead, _) = first(&flights);
        let follower = follow(&flights);
        drop(lead);
        assert!(matches!(follower.outcome().await, Phase::Failed(Failure::Lost)));
        assert!(flights.map().is_empty());
    }

    #[tokio::test]
    async fn a_leader_that_panics_releases_its_followers() {
        let flights = Flights::new(10);
        let (lead, follower) = first(&flights);
        let task = tokio::spawn(async move {
            let _lead = lead;
            panic!("as leaders may");
        });
        assert!(matches!(follower.outcome().await, Phase::Failed(Failure::Lost)));
        assert!(task.await.is_err());
    }

    #[tokio::test]
    async fn all_followers_may_leave_and_the_fetch_goes_on() {
        let flights = Flights::new(10);
        let (lead, follower) = first(&flights);
        drop(follower);
        let late = follow(&flights);
        lead.unshare();
        assert!(matches!(late.outcome().await, Phase::Unshared));
    }

    #[test]
    fn only_so_many_wait_and_those_who_leave_make_room() {
        let flights = Flights::new(2);
        let (_lead, _first) = first(&flights);
        let second = follow(&flights);
        assert!(matches!(flights.join(&key()), Join::Full));
        drop(second);
        follow(&flights);
    }
}
