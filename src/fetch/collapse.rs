//! Collapsed forwarding: for each key one fetch at a time, for all requests that come meanwhile. A request that comes after something was
//! voided that concerns the key does not join a fetch that began before: that one's answer is void for it. It begins a fetch of its
//! own, which those after it join; the older one goes on for those that joined it. So does one that comes when the response of the fetch is
//! stale already, unless that fetch has an older one beside it: a body that takes far longer than it is fresh would be asked for again and
//! again, and make the upstream slower still. Then it joins the newest, and is told its age.
//!
//! A request that finds no fetch under its key gets the [`Leader`] and hands it to a task of its own. Every request, that one included,
//! is then a [`Follower`]. A leader that is dropped without having said how it ended releases its followers with
//! [`Failure::Lost`]. Followers learn whether the response may be shared before they get any of it.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use super::fill::Fill;
use crate::cache::entry::Entry;
use crate::cache::key::Canonical;
use crate::cache::void::Moment;
use crate::upstream::admission::machine::Party;
use crate::upstream::admission::{Askers, Work};
use crate::upstream::failure::Failure;

/// So many fetches of a key there are at a time, as far as it is a response's age that others begin for: one whose response is stale by
/// now, and one after it.
const AT_A_TIME: usize = 2;

/// How far a fetch is.
#[derive(Clone)]
pub enum Progress {
    /// The upstream has not answered yet.
    Pending,
    /// It answered, and the response is for everyone who waits.
    Shared(Arc<Fill>),
    /// It need not be asked: a fetch that had just ended stored this.
    Stored(Arc<Entry>),
    /// It answered, and the response is for the request alone that caused it.
    Unshared,
    /// It did not answer.
    Failed(Failure),
}

/// All fetches under way.
pub struct Collapse {
    fetches: Mutex<HashMap<Bytes, Fetches>>,
    max_followers: usize,
}

/// The fetches of one key that are under way.
#[derive(Default)]
struct Fetches {
    /// The one that is joined.
    newest: Option<Arc<Fetch>>,
    /// How many there are.
    count: usize,
}

/// One fetch under way.
struct Fetch {
    /// When it began.
    asked_at: Moment,
    /// Those who ask for it, as far as the upstream's places are theirs.
    askers: Arc<Askers>,
    progress: watch::Sender<Progress>,
    followers: AtomicUsize,
    /// Told when the last follower leaves.
    left: Notify,
    /// Told when it is given up for another's sake.
    given_up: Notify,
    /// Whether somebody waited for it then.
    is_taken_away: AtomicBool,
}

impl Fetch {
    fn is_answered(&self) -> bool {
        !matches!(*self.progress.borrow(), Progress::Pending)
    }

    /// Whether its response has come, and lives no more.
    fn is_over(&self) -> bool {
        matches!(&*self.progress.borrow(), Progress::Shared(fill) if fill.head.is_over())
    }
}

/// What a request gets that asks for a key.
pub enum Join {
    /// It is the first: it must start the fetch, and may follow it.
    Lead(Leader, Follower),
    /// A fetch is under way.
    Follow(Follower),
    /// A fetch is under way, and too many wait for it.
    Full,
}

impl Collapse {
    /// No fetch under way; at most `max_followers` may wait for each.
    #[must_use]
    pub fn new(max_followers: usize) -> Arc<Self> {
        Arc::new(Self { fetches: Mutex::default(), max_followers })
    }

    fn fetches(&self) -> MutexGuard<'_, HashMap<Bytes, Fetches>> {
        self.fetches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the fetch under a key, or begins one at `asked_at`. `is_void` says whether the response to a fetch that began at a moment is
    /// void by now. A request that `wants_new` accepts no response that came before it (`no-cache`): it joins no fetch that has one.
    #[must_use]
    pub fn join(
        self: &Arc<Self>,
        canonical: &Canonical,
        party: &Party,
        asked_at: Moment,
        wants_new: bool,
        is_void: impl FnOnce(Moment) -> bool,
    ) -> Join {
        let mut all = self.fetches();
        let fetches = all.entry(canonical.0.clone()).or_default();
        if let Some(fetch) = &fetches.newest
            && !(wants_new && fetch.is_answered())
            && !(fetch.is_over() && fetches.count < AT_A_TIME)
            && !is_void(fetch.asked_at)
        {
            // None is added elsewhere.
            if fetch.followers.load(Ordering::Relaxed) >= self.max_followers {
                return Join::Full;
            }
            fetch.followers.fetch_add(1, Ordering::Relaxed);
            return Join::Follow(Follower(Arc::clone(fetch)));
        }
        let (progress, followers) = (watch::Sender::new(Progress::Pending), AtomicUsize::new(1));
        let askers = Arc::new(Askers::one(party));
        let fetch = Arc::new(Fetch {
            asked_at,
            askers,
            progress,
            followers,
            left: Notify::new(),
            given_up: Notify::new(),
            is_taken_away: AtomicBool::new(false),
        });
        fetches.newest = Some(Arc::clone(&fetch));
        fetches.count += 1;
        let led = Led { collapse: Arc::clone(self), canonical: canonical.0.clone(), fetch: Arc::clone(&fetch) };
        Join::Lead(Leader(Arc::new(led)), Follower(fetch))
    }
}

/// The duty to fetch. While it lives, no second fetch begins under its key.
pub struct Leader(Arc<Led>);

/// A fetch, and where it is found. It is counted there as long as it lives.
struct Led {
    collapse: Arc<Collapse>,
    canonical: Bytes,
    fetch: Arc<Fetch>,
}

impl Led {
    /// Takes the fetch away from those who might join it, if nobody follows it.
    fn leave_if_alone(&self) -> bool {
        // Followers join under this lock.
        let mut fetches = self.collapse.fetches();
        let is_alone = self.fetch.followers.load(Ordering::Relaxed) == 0;
        if is_alone {
            self.remove(&mut fetches);
        }
        is_alone
    }

    fn remove(&self, fetches: &mut HashMap<Bytes, Fetches>) {
        if let Some(fetches) = fetches.get_mut(&self.canonical) {
            fetches.newest.take_if(|newest| Arc::ptr_eq(newest, &self.fetch));
        }
    }
}

impl Drop for Led {
    fn drop(&mut self) {
        let mut fetches = self.collapse.fetches();
        self.remove(&mut fetches);
        if let Place::Occupied(mut of_key) = fetches.entry(self.canonical.clone()) {
            let left = of_key.get().count.saturating_sub(1);
            of_key.get_mut().count = left;
            if left == 0 {
                of_key.remove();
            }
        }
    }
}

/// A fetch that was sent is of use to nobody while nobody follows it, although it may be stored.
impl Work for Led {
    fn give_up(&self) -> bool {
        let is_alone = self.leave_if_alone();
        if is_alone {
            self.fetch.given_up.notify_one();
        }
        is_alone
    }

    fn take_away(&self) -> bool {
        self.fetch.is_taken_away.store(true, Ordering::Relaxed);
        // Whoever comes from now on begins another fetch.
        self.remove(&mut self.collapse.fetches());
        self.fetch.given_up.notify_one();
        true
    }

    fn askers(&self) -> Option<Vec<Party>> {
        self.fetch.askers.all()
    }
}

impl Leader {
    /// Waits until nobody follows. From then on nobody can: the next request begins another fetch.
    pub async fn abandoned(&self) {
        loop {
            let left = self.0.fetch.left.notified();
            if self.0.leave_if_alone() {
                return;
            }
            left.await;
        }
    }

    /// Those who ask for the response.
    #[must_use]
    pub fn askers(&self) -> &Arc<Askers> {
        &self.0.fetch.askers
    }

    /// The fetch, as what can be [given up](Work::give_up) while nobody follows it.
    #[must_use]
    pub fn work(&self) -> Weak<dyn Work> {
        let led: Weak<Led> = Arc::downgrade(&self.0);
        led
    }

    /// Waits until the fetch is given up, and returns how that is told. Nobody can follow it from then on, and mostly nobody does.
    pub async fn given_up(&self) -> Failure {
        self.0.fetch.given_up.notified().await;
        if self.0.fetch.is_taken_away.load(Ordering::Relaxed) { Failure::Overloaded } else { Failure::Lost }
    }

    /// The response is for everyone who waits.
    pub fn share(&self, fill: Arc<Fill>) {
        self.0.fetch.progress.send_replace(Progress::Shared(fill));
    }

    /// The response is not to be shared; from now on, others ask for themselves.
    pub fn unshare(self) {
        self.end(Progress::Unshared);
    }

    /// Nothing needs to be fetched: this was stored just before.
    pub fn found(self, entry: Arc<Entry>) {
        self.end(Progress::Stored(entry));
    }

    /// There is no response.
    pub fn fail(self, failure: Failure) {
        self.end(Progress::Failed(failure));
    }

    /// A request that comes from now on begins another fetch: also one that has seen how this one ended.
    fn end(self, progress: Progress) {
        self.leave();
        self.0.fetch.progress.send_replace(progress);
    }

    fn leave(&self) {
        self.0.remove(&mut self.0.collapse.fetches());
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.leave();
        self.0.fetch.progress.send_if_modified(|progress| {
            let lost = matches!(progress, Progress::Pending);
            if lost {
                *progress = Progress::Failed(Failure::Lost);
            }
            lost
        });
    }
}

/// One who waits for a fetch.
pub struct Follower(Arc<Fetch>);

impl Follower {
    /// All who ask for the response.
    #[must_use]
    pub fn askers(&self) -> &Askers {
        &self.0.askers
    }

    /// How the fetch ended, or that its response can be read. The caller sets the deadline.
    pub async fn outcome(&self) -> Progress {
        let mut progress = self.0.progress.subscribe();
        // The sender is held by the fetch, which we hold: this never fails. Were it to, the fetch would be lost.
        match progress.wait_for(|progress| !matches!(progress, Progress::Pending)).await {
            Ok(progress) => progress.clone(),
            Err(_) => Progress::Failed(Failure::Lost),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if self.0.followers.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.left.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::budget::Budget;
    use crate::fetch::fill::Head;
    use crate::fetch::fill::tests::head;
    use crate::telemetry::metrics::Metrics;
    use std::time::Duration;

    fn key() -> Canonical {
        Canonical(Bytes::from_static(b"k"))
    }

    fn join(collapse: &Arc<Collapse>) -> Join {
        collapse.join(&key(), &Party::own("a"), Moment::default(), false, |_| false)
    }

    fn first(collapse: &Arc<Collapse>) -> (Leader, Follower) {
        match join(collapse) {
            Join::Lead(leader, follower) => (leader, follower),
            _ => panic!("not the first"),
        }
    }

    fn follow(collapse: &Arc<Collapse>) -> Follower {
        match join(collapse) {
            Join::Follow(follower) => follower,
            _ => panic!("not a follower"),
        }
    }

    #[tokio::test]
    async fn one_leads_and_the_others_follow_to_one_end() {
        let collapse = Collapse::new(10);
        let (leader, one) = first(&collapse);
        let other = follow(&collapse);
        leader.fail(Failure::Timeout);
        assert!(matches!(one.outcome().await, Progress::Failed(Failure::Timeout)));
        assert!(matches!(other.outcome().await, Progress::Failed(Failure::Timeout)));
        first(&collapse);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_has_seen_how_a_fetch_ended_does_not_join_it() {
        let collapse = Collapse::new(10);
        for _ in 0..2000 {
            let (leader, follower) = first(&collapse);
            let ending = tokio::spawn(async move { leader.fail(Failure::Timeout) });
            follower.outcome().await;
            // A fetch that began after that one must not be taken away by its end either.
            let (_leader, _) = first(&collapse);
            ending.await.unwrap();
            follow(&collapse);
        }
    }

    #[tokio::test]
    async fn a_leader_that_is_dropped_releases_its_followers() {
        let collapse = Collapse::new(10);
        let (leader, _) = first(&collapse);
        let follower = follow(&collapse);
        drop(leader);
        assert!(matches!(follower.outcome().await, Progress::Failed(Failure::Lost)));
        assert!(collapse.fetches().is_empty());
    }

    #[tokio::test]
    async fn a_leader_that_panics_releases_its_followers() {
        let collapse = Collapse::new(10);
        let (leader, follower) = first(&collapse);
        let task = tokio::spawn(async move {
            let _leader = leader;
            panic!("as leaders may");
        });
        assert!(matches!(follower.outcome().await, Progress::Failed(Failure::Lost)));
        assert!(task.await.is_err());
    }

    #[tokio::test]
    async fn all_followers_may_leave_and_the_fetch_goes_on() {
        let collapse = Collapse::new(10);
        let (leader, follower) = first(&collapse);
        drop(follower);
        let late = follow(&collapse);
        leader.unshare();
        assert!(matches!(late.outcome().await, Progress::Unshared));
    }

    #[tokio::test]
    async fn a_fetch_that_is_void_is_not_joined_and_does_not_end_the_one_after_it() {
        let collapse = Collapse::new(10);
        let (old, early) = first(&collapse);
        let Join::Lead(new, late) = collapse.join(&key(), &Party::own("a"), Moment::at(2), false, |began| began == Moment::default())
        else {
            panic!("joined what is void");
        };
        let Join::Follow(later) = collapse.join(&key(), &Party::own("a"), Moment::at(3), false, |began| began == Moment::default()) else {
            panic!("did not join the new fetch");
        };
        old.fail(Failure::Timeout);
        assert!(matches!(early.outcome().await, Progress::Failed(Failure::Timeout)));
        follow(&collapse);
        new.fail(Failure::Reset);
        assert!(matches!(late.outcome().await, Progress::Failed(Failure::Reset)));
        assert!(matches!(later.outcome().await, Progress::Failed(Failure::Reset)));
        first(&collapse);
    }

    #[tokio::test]
    async fn what_wants_a_new_response_joins_no_fetch_that_has_one() {
        let collapse = Collapse::new(10);
        let reload = || collapse.join(&key(), &Party::own("a"), Moment::default(), true, |_| false);
        let (old, _early) = first(&collapse);
        assert!(matches!(reload(), Join::Follow(_)), "nothing has come yet");
        old.0.fetch.progress.send_replace(Progress::Unshared);
        follow(&collapse);
        let Join::Lead(_new, _late) = reload() else { panic!("joined a fetch with a response") };
        assert!(matches!(reload(), Join::Follow(_)));
        drop(old);
        follow(&collapse);
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_whose_life_is_over_is_joined_by_nobody() {
        let collapse = Collapse::new(10);
        let budget = Arc::new(Budget::new(1000, Arc::new(Metrics::new().unwrap())));
        let (old, _early) = first(&collapse);
        let (fill, _writer) = Fill::start(Head { life: Some(Duration::from_secs(5)), ..head() }, 1000, budget);
        old.share(fill);
        tokio::time::advance(Duration::from_millis(4999)).await;
        follow(&collapse);
        tokio::time::advance(Duration::from_millis(1)).await;
        let (_new, _late) = first(&collapse);
        drop(old);
        follow(&collapse);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_takes_longer_than_its_life_is_fetched_twice_at_a_time_and_no_more() {
        let collapse = Collapse::new(10);
        let budget = Arc::new(Budget::new(1000, Arc::new(Metrics::new().unwrap())));
        let share = |leader: &Leader| {
            let (fill, writer) = Fill::start(Head { life: Some(Duration::from_secs(1)), ..head() }, 1000, Arc::clone(&budget));
            leader.share(Arc::clone(&fill));
            (fill, writer)
        };
        let second = || tokio::time::advance(Duration::from_secs(1));
        let (one, _waits) = first(&collapse);
        let _filling = share(&one);
        second().await;
        let (two, _waits) = first(&collapse);
        let (newest, _writer) = share(&two);
        for _ in 0..20 {
            second().await;
            let Progress::Shared(joined) = follow(&collapse).outcome().await else { panic!("it is shared") };
            assert!(Arc::ptr_eq(&joined, &newest));
        }
        // Whichever ends, the other is as stale as before.
        drop(one);
        let (three, _waits) = first(&collapse);
        let _filling = share(&three);
        drop(two);
        second().await;
        let (_four, _waits) = first(&collapse);
        follow(&collapse);
    }

    #[test]
    fn only_so_many_wait_and_those_who_leave_make_room() {
        let collapse = Collapse::new(2);
        let (_leader, _first) = first(&collapse);
        let second = follow(&collapse);
        assert!(matches!(join(&collapse), Join::Full));
        drop(second);
        follow(&collapse);
    }
}
