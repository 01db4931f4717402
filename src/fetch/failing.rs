//! What failed lately and is spared. A failure has a scope:
//!
//! ```text
//! key      one request             spared from its first failure on
//! rule     URLs of one rule        spared once several of them failed, and none of them was answered in between
//! backend  all of it               spared once several paths failed, or connections, and nothing was answered in between
//! ```
//!
//! Each is spared for a while that grows with each further failure, or for as long as the upstream says (`Retry-After`). When the while is
//! over, one request may try. Any answer of the upstream, also one to a request that is passed, says that the backend is there: then
//! nothing is spared any more, keys that failed before included, so that all of them are fresh again soon.
//!
//! What is counted of a rule is how many *different* URLs failed, and of the backend, how many paths. One that fails each time, however often it
//! is asked for and with whatever credentials and variants, says nothing of the others; nor does one path with whatever queries of other rules. Nor may it be the trial of its scope again and again: a key that
//! is spared for itself is no trial, and one that failed while its scope was spared leaves the next trials to others.
//!
//! A revalidation whose answer may not be stored is no failure. Its key is [put off](Failing::put_off): what is stale is served on, and the
//! upstream is asked again after a while that grows in the same way. After one that was stale already when it was stored that is a second,
//! or as long as it took.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::remembered::{Remembered, remembered};
use crate::breaker::{Backoff, Breaker, Gate};
use crate::cache::key::Canonical;
use crate::telemetry::metrics::Metrics;
use crate::upstream::failure::Failure;

/// When a rule, or the upstream, is spared, and for how long. A trial costs one request: the longest pause is short, so that nobody is
/// served what is stale long after the upstream is back.
const WIDE_BACKOFF: Backoff = Backoff { first: Duration::from_millis(250), longest: Duration::from_secs(2), tolerated: 2 };
/// A key is spared from its first failure on: others may work.
const KEY_BACKOFF: Backoff = Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(30), tolerated: 0 };
/// A key whose response was stale when it was stored is revalidated after a while that does not grow: that is how it is meant to be used.
const STALE_BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(1), tolerated: 0 };
/// The longest that an upstream may ask to be spared (RFC 9110 §10.2.3).
pub const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);
/// Keys whose failures are remembered, in bytes, and the room for how many is made.
const KEYS: (usize, usize) = (4 << 20, 16_384);
/// Failing URLs or paths that a scope tells apart. More of them are as many. And failing keys that are no trials.
const DIFFERENT: usize = 8;
/// A key that failed while its scope was spared is no trial for so long. If nothing else is asked for, it is one then.
const NO_TRIAL: Duration = Duration::from_secs(6);

/// A request, as far as failures are counted by it.
#[derive(Clone, Copy, Debug)]
pub struct Address<'a> {
    /// The rule that serves it.
    pub rule: &'a str,
    /// Its key.
    pub key: &'a Canonical,
    /// The path and query that the upstream is asked for.
    pub target: &'a str,
}

impl Address<'_> {
    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }
}

/// A rule, or the upstream as a whole.
struct Scope {
    breaker: Breaker,
    failed: Mutex<Failed>,
}

/// What failed of a scope since the last answer, by digests.
#[derive(Default)]
struct Failed {
    asked: VecDeque<u64>,
    /// Keys that failed while the scope was spared, and when.
    keys: VecDeque<(u64, Instant)>,
}

/// Adds something to the few that are told apart; the oldest is forgotten.
fn push<T>(few: &mut VecDeque<T>, one: T) {
    if few.len() == DIFFERENT {
        few.pop_front();
    }
    few.push_back(one);
}

impl Scope {
    fn new() -> Self {
        Self { breaker: Breaker::new(WIDE_BACKOFF), failed: Mutex::default() }
    }

    fn since_the_last_answer(&self) -> MutexGuard<'_, Failed> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request failed, and is counted as what was `asked`. Returns for how long the scope is spared, if it was not before. `counts_alone`: the
    /// failure is about more than the request.
    fn failed(&self, address: Address<'_>, asked: &str, counts_alone: bool) -> Option<Duration> {
        let (asked, mut failed) = (digest(asked.as_bytes()), self.since_the_last_answer());
        let is_open = self.breaker.is_open();
        if is_open && !counts_alone {
            let key = digest(&address.key.0);
            failed.keys.retain(|(other, _)| *other != key);
            push(&mut failed.keys, (key, Instant::now()));
        }
        // A trial that fails again extends the while; while nothing is spared, each counts once.
        if failed.asked.contains(&asked) && !counts_alone && !is_open {
            return None;
        }
        push(&mut failed.asked, asked);
        drop(failed);
        self.breaker.failed()
    }

    /// Asks for a request with this key to try.
    fn enter(&self, key: &Canonical) -> Gate {
        let is_no_trial = || {
            let key = digest(&key.0);
            self.since_the_last_answer().keys.iter().any(|(other, at)| *other == key && at.elapsed() < NO_TRIAL)
        };
        if self.breaker.is_open() && is_no_trial() { Gate::Open } else { self.breaker.enter() }
    }

    /// Something was answered. Whether the scope was spared before.
    fn answered(&self) -> bool {
        *self.since_the_last_answer() = Failed::default();
        self.breaker.succeeded()
    }
}

/// The breakers.
pub struct Failing {
    upstream: Scope,
    /// By rule. Rules are the operator's, so that there are not many.
    rules: Mutex<HashMap<String, Arc<Scope>>>,
    keys: Remembered<Arc<Breaker>>,
    /// Keys whose revalidation gave nothing that could be stored.
    put_off: Remembered<Arc<Breaker>>,
    /// Held while the gauge is set.
    shown: Mutex<()>,
    metrics: Arc<Metrics>,
}

impl Failing {
    /// Nothing has failed yet.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let (keys, put_off) = (remembered(KEYS), remembered(KEYS));
        Self { upstream: Scope::new(), rules: Mutex::default(), keys, put_off, shown: Mutex::default(), metrics }
    }

    /// How many bytes the keys take that are remembered.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.keys.bytes() + self.put_off.bytes()
    }

    /// Whether the upstream as a whole is spared.
    #[must_use]
    pub fn upstream(&self) -> bool {
        self.upstream.breaker.is_open()
    }

    fn rule(&self, rule: &str) -> Option<Arc<Scope>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).get(rule).cloned()
    }

    /// Whether this key is spared, or its rule, or the upstream as a whole.
    #[must_use]
    pub fn key(&self, rule: &str, key: &Canonical) -> bool {
        self.upstream()
            || self.rule(rule).is_some_and(|scope| scope.breaker.is_open())
            || self.keys.get(&key.0).is_some_and(|breaker| breaker.is_open())
    }

    /// Whether this key may be tried now: nothing is spared, or was for long enough. Of those who ask in one pause, one may.
    #[must_use]
    pub fn may_try(&self, rule: &str, key: &Canonical) -> bool {
        let own = self.keys.get(&key.0);
        // One that is spared for itself would spend the trial that others wait for.
        if own.as_ref().is_some_and(|own| own.is_sparing()) {
            return false;
        }
        // The widest scope that is spared decides: its trial is one for all that it covers.
        let mut gate = self.upstream.enter(key);
        if gate == Gate::Closed {
            gate = self.rule(rule).map_or(Gate::Closed, |scope| scope.enter(key));
        }
        if gate == Gate::Closed {
            gate = own.map_or(Gate::Closed, |own| own.enter());
        }
        gate != Gate::Open
    }

    /// The whole response to a fetch for this key came. Its head alone says nothing of the key: else a body that breaks off
    /// each time would be asked for after the shortest pause each time.
    pub fn succeeded(&self, key: &Canonical) {
        self.keys.remove(&key.0);
    }

    /// Something was stored for this key.
    pub fn stored(&self, key: &Canonical) {
        self.put_off.remove(&key.0);
    }

    /// Something was stored for this key that was stale by then. It took so long to get it.
    pub fn stored_stale(&self, key: &Canonical, took: Duration) {
        let breaker = Arc::new(Breaker::new(STALE_BACKOFF));
        breaker.failed_for(took.clamp(STALE_BACKOFF.first, KEY_BACKOFF.longest));
        self.put_off.insert(&key.0, breaker);
    }

    /// The upstream answered a request on this rule, whatever becomes of the body.
    pub fn answered(&self, rule: &str) {
        if let Some(scope) = self.rule(rule)
            && scope.answered()
        {
            tracing::info!(route = rule, "the backend answers requests on this rule again");
        }
        self.backend_answered();
    }

    fn backend_answered(&self) {
        if self.upstream.answered() {
            // They failed with it: what is stale is asked for again at once.
            self.keys.clear();
            self.show();
            tracing::info!("the backend answers again");
        }
    }

    /// The upstream answered a request, and the answer says that it failed. `after` is for how long it asks to be spared.
    pub fn failed_with(&self, address: Address<'_>, status: u16, after: Option<Duration>) {
        if status == 500 {
            // It concerns one request, and the backend that sent it is there.
            self.backend_answered();
        }
        self.note(address, Failure::Status(status), after);
    }

    /// A fetch failed. What was not asked, or given up, says nothing of what was asked for.
    pub fn failed(&self, address: Address<'_>, failure: Failure) {
        if !matches!(failure, Failure::Overloaded | Failure::Lost) {
            self.note(address, failure, None);
        }
    }

    /// Sets the gauge to what is. Under a lock, so that the last one that sets it sees the last state.
    fn show(&self) {
        let _last = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        self.metrics.breaker_open.with_label_values(&["backend"]).set(i64::from(self.upstream()));
    }

    fn note(&self, address: Address<'_>, failure: Failure, after: Option<Duration>) {
        let Address { rule, key, target } = address;
        let new = || Arc::new(Breaker::new(KEY_BACKOFF));
        self.keys.get_or_insert(&key.0, new).failed_for(after.unwrap_or_default());
        if matches!(failure, Failure::Status(500)) {
            return;
        }
        // No connection is nobody's fault but the upstream's.
        let counts_alone = matches!(failure, Failure::Connect);
        let scope = {
            let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(rules.entry(rule.to_owned()).or_insert_with(|| Arc::new(Scope::new())))
        };
        let reason = failure.answer().1;
        let rule_pause = scope.failed(address, target, counts_alone);
        if let Some(pause) = self.upstream.failed(address, address.path(), counts_alone) {
            self.show();
            tracing::warn!(reason, ?pause, "the backend fails and is left alone; what is stored is served stale meanwhile");
        } else if let Some(pause) = rule_pause.filter(|_| !self.upstream()) {
            tracing::warn!(
                route = rule,
                reason,
                ?pause,
                "the backend fails on this rule, which is left alone; what is stored is served stale meanwhile"
            );
        }
    }

    /// A revalidation of this key gave nothing that may be stored: the next one waits, at least for `after`.
    pub fn put_off(&self, key: &Canonical, after: Option<Duration>) {
        self.put_off.get_or_insert(&key.0, || Arc::new(Breaker::new(KEY_BACKOFF))).failed_for(after.unwrap_or_default());
    }

    /// Whether this key may not be revalidated now. Changes nothing.
    #[must_use]
    pub fn is_put_off(&self, key: &Canonical) -> bool {
        self.put_off.get(&key.0).is_some_and(|breaker| breaker.is_sparing())
    }

    /// Whether this key may be revalidated while what is stale is served. Of those who ask in one pause, one may.
    #[must_use]
    pub fn may_revalidate(&self, key: &Canonical) -> bool {
        self.put_off.get(&key.0).is_none_or(|breaker| breaker.enter() != Gate::Open)
    }
}

/// A digest that tells keys, URLs and paths apart; two that have one count as one.
fn digest(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use tokio::time::advance;

    fn key(number: usize) -> Canonical {
        Canonical(Bytes::from(number.to_string()))
    }

    fn path(number: usize) -> String {
        format!("/{number}")
    }

    fn of<'a>(rule: &'a str, key: &'a Canonical, path: &'a str) -> Address<'a> {
        Address { rule, key, target: path }
    }

    fn failing() -> Failing {
        Failing::new(Arc::new(Metrics::new().unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn one_path_that_hangs_whatever_is_asked_of_it_spares_its_rule_and_not_the_backend() {
        let failing = failing();
        for number in 0..10 {
            failing.failed(of("a", &key(number), &format!("/search?q={number}")), Failure::Timeout);
        }
        assert!(failing.key("a", &key(99)) && !failing.key("b", &key(99)) && !failing.upstream());
        failing.answered("a");
        assert!(!failing.key("a", &key(99)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_key_that_fails_however_often_harms_no_other() {
        for failure in [Failure::Timeout, Failure::Status(503), Failure::Reset, Failure::Truncated] {
            let failing = failing();
            for _ in 0..100 {
                failing.failed(of("a", &key(1), &path(1)), failure);
                failing.failed(of("a", &key(2), &path(2)), failure);
            }
            assert!(failing.key("a", &key(1)) && failing.key("a", &key(2)));
            assert!(!failing.upstream() && !failing.key("a", &key(3)), "{failure:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_fail_spare_their_rule_and_what_another_rule_answers_keeps_the_backend() {
        let failing = failing();
        for number in 0..3 {
            failing.failed(of("bad", &key(number), &path(number)), Failure::Timeout);
            failing.answered("good");
        }
        assert!(failing.key("bad", &key(9)) && !failing.upstream() && !failing.key("good", &key(9)));
        // Without an answer in between it is the backend.
        for number in 0..3 {
            failing.failed(of("bad", &key(number), &path(number)), Failure::Timeout);
        }
        assert!(failing.upstream() && failing.key("good", &key(9)));
        failing.answered("other");
        assert!(!failing.upstream() && !failing.key("good", &key(9)));
        failing.answered("bad");
        assert!(!failing.key("bad", &key(0)), "a key that failed with the backend is tried again");
    }

    #[tokio::test(start_paused = true)]
    async fn no_connection_is_about_the_backend_and_an_error_of_one_request_is_not() {
        let one = failing();
        for _ in 0..3 {
            one.failed(of("a", &key(1), &path(1)), Failure::Connect);
        }
        assert!(one.upstream());
        one.failed_with(of("a", &key(1), &path(1)), 500, None);
        assert!(!one.upstream() && one.key("a", &key(1)), "it answers");
        let other = failing();
        for number in 0..100 {
            other.failed_with(of("a", &key(number), &path(number)), 500, None);
            other.failed(of("a", &key(number), &path(number)), Failure::Overloaded);
            other.failed(of("a", &key(1000), &path(1000)), Failure::Lost);
        }
        assert!(!other.upstream() && !other.key("a", &key(1000)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_may_try_after_a_while_that_is_never_long() {
        let failing = failing();
        for number in 0..50 {
            failing.failed(of("a", &key(number), &path(number)), Failure::Reset);
        }
        assert!(!failing.may_try("a", &key(100)));
        advance(WIDE_BACKOFF.longest).await;
        assert!(failing.may_try("a", &key(100)) && !failing.may_try("b", &key(101)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_upstream_asks_for_is_obeyed() {
        let failing = failing();
        let after = Some(Duration::from_secs(60));
        failing.failed_with(of("a", &key(1), &path(1)), 503, after);
        failing.put_off(&key(2), after);
        advance(Duration::from_secs(59)).await;
        assert!(!failing.may_try("a", &key(1)) && !failing.may_revalidate(&key(2)));
        advance(Duration::from_secs(2)).await;
        assert!(failing.may_try("a", &key(1)) && failing.may_revalidate(&key(2)));
        assert!(!failing.may_revalidate(&key(2)), "one at a time");
        failing.stored(&key(2));
        assert!(failing.may_revalidate(&key(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_stored_is_revalidated_less_and_less() {
        let failing = failing();
        let mut times = 0;
        for _ in 0..600 {
            if failing.may_revalidate(&key(1)) {
                times += 1;
                failing.put_off(&key(1), None);
            }
            advance(Duration::from_millis(100)).await;
        }
        assert!((5..15).contains(&times), "{times} in a minute");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_stale_when_it_is_stored_is_revalidated_once_a_second_or_as_often_as_it_can_be() {
        for (took, most) in [(Duration::from_millis(5), 60), (Duration::from_secs(6), 10)] {
            let failing = failing();
            let mut times = 0;
            for _ in 0..600 {
                if failing.may_revalidate(&key(1)) {
                    times += 1;
                    failing.put_off(&key(1), None);
                    failing.stored_stale(&key(1), took);
                }
                advance(Duration::from_millis(100)).await;
            }
            assert!((most / 2..=most).contains(&times), "{times} in a minute");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_path_that_fails_with_whatever_query_harms_no_other() {
        let failing = failing();
        for number in 0..100 {
            failing.failed(of("a", &key(number), "/search"), Failure::Timeout);
        }
        assert!(failing.key("a", &key(99)) && !failing.key("a", &key(100)) && !failing.upstream());
        // With the third path it is more than that.
        failing.failed(of("a", &key(100), "/other"), Failure::Timeout);
        assert!(!failing.upstream());
        failing.failed(of("a", &key(101), "/third"), Failure::Timeout);
        assert!(failing.upstream());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_is_known_to_be_bad_leaves_the_trials_to_others() {
        let failing = failing();
        let bad = key(100);
        failing.failed_with(of("a", &bad, "/bad"), 503, Some(Duration::from_secs(30)));
        for number in 0..2 {
            failing.failed(of("a", &key(number), &path(number)), Failure::Timeout);
        }
        assert!(failing.upstream());
        advance(WIDE_BACKOFF.longest).await;
        assert!(!failing.may_try("a", &bad), "it is spared for itself");
        assert!(failing.may_try("a", &key(0)));
        failing.failed(of("a", &key(0), "/0"), Failure::Timeout);
        advance(WIDE_BACKOFF.longest).await;
        assert!(!failing.may_try("a", &key(0)), "it was tried just now");
        assert!(failing.may_try("a", &key(1)));
        // If nobody asks for anything else it is tried again, and no connection is nobody's fault.
        advance(NO_TRIAL).await;
        assert!(failing.may_try("a", &key(0)));
        failing.failed(of("a", &key(1), "/1"), Failure::Connect);
        advance(WIDE_BACKOFF.longest).await;
        assert!(failing.may_try("a", &key(1)));
        failing.answered("a");
        assert!(failing.may_try("a", &bad), "the backend is there");
    }
}
