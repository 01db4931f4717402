//! One fetch a key at a time: from the upstream, through the cache, to everyone who waits.
//!
//! ```text
//! Fetcher::fetch ──────┐                            ┌─ followers read the fill
//!                      ├─ collapse ─ lead: ask ─ judge ─ fill ─ store
//! Fetcher::revalidate ─┘            (304: freshen)  └─ or one client alone gets the response
//! ```
//!
//! [`Fetcher::fetch`] is for a client that waits, [`Fetcher::revalidate`] for a stored response that is served stale meanwhile.
//! Either way the fetch is a task of its own ([`lead`]), so that no client's leaving ends it.
//!
//! Knows the cache and the upstream, and the shape of buckets ([`contract`]). Knows neither clients nor rules: what it needs of either stands in the [`Job`].

pub mod budget;
pub mod collapse;
pub mod contract;
pub mod failing;
pub mod fill;
pub mod freshen;
pub mod impatient;
pub mod inflate;
pub mod lead;
pub mod marks;
pub mod other_methods;
pub mod partial;
pub mod remembered;
pub mod storing;
pub mod unstored;

use std::sync::Arc;
use std::time::Duration;

use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Response, request};
use http_body::Body as _;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep};

use crate::body::Stream;
use crate::cache::Cache;
use crate::cache::entry::{Content, Entry};
use crate::cache::key::{Canonical, Key};
use crate::cache::void::Moment;
use crate::clock::Wall;
use crate::http::freshness::{FreshnessPolicy, Verdict, is_failure};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::carry;
use crate::upstream::Upstream;
use crate::upstream::admission::machine::Party;
use crate::upstream::failure::Failure;
use crate::upstream::request_fields::Negotiable;
use crate::upstream::room::Room;
use crate::upstream::selecting::Selecting;
use budget::Budget;
use collapse::{Collapse, Join, Progress};
use failing::{Address, Failing};
use fill::Fill;
use impatient::{Impatient, Place};
use marks::Marks;
use partial::Beginnings;
use remembered::{Remembered, remembered};
use unstored::{LastUnstored, Unstored};

/// For how many keys room is made where something is remembered of them.
const KEYS: usize = 16_384;
/// Requests of which it is remembered what their responses vary by, in bytes: the upstream need not be asked twice for them.
const VARYING_KEYS: (usize, usize) = (4 << 20, KEYS);
/// Requests whose responses are known to be for all who have credentials, in bytes.
const SHARED_KEYS: (usize, usize) = (2 << 20, KEYS);

/// Bytes of all requests that wait for others' fetches.
const MOST_WAITING: usize = 256 << 20;
/// Responses in memory that are to be packed later.
const TO_PACK: usize = 4096;
/// Responses at a time that are refreshed before they are stale.
const EARLY: usize = 4;

/// What a fetch needs to know.
pub struct Job {
    /// The request as the upstream is sent it.
    pub request: request::Parts,
    /// What the upstream is told of the client's fields once it names them in `Vary`.
    pub negotiable: Negotiable,
    /// The request's fields as `Vary` selects by them (RFC 9111 §4.1).
    pub selecting: Selecting,
    /// The key under which the response is stored.
    pub key: Key,
    /// What is fetched once at a time: the key, or its variant where it is known that the response varies; with the credentials
    /// of the request, unless it is known that the response is for all who have some.
    pub collapse_key: Canonical,
    /// The same with the credentials of the request in any case; `None` if it has none that the key does not hold.
    pub credentials_key: Option<Canonical>,
    /// The client and the rule.
    pub party: Party,
    /// How long the rule lets a response live.
    pub policy: FreshnessPolicy,
    /// Whether a response in a language is also for those who prefer that language.
    pub match_language: bool,
    /// Whether the response should be buckets, which go on as the API's contract has them ([`contract`]).
    pub is_buckets: bool,
    /// Whether the rest of a response whose beginning is known may be asked for alone.
    pub complete_ranges: bool,
    /// The authority that the client asked for.
    pub requested_host: Option<HeaderValue>,
    /// Whether the client accepts no response that came before its request (`no-cache`).
    pub wants_new: bool,
    /// When the upstream was asked for what was found in the cache and does not do as it is; `None` if nothing was found.
    pub found: Option<Moment>,
    /// The moment at which it is asked for: what is voided after that does not stay in the cache.
    pub asked_at: Moment,
    /// The same by the runtime's clock, for what it costs.
    pub began: Instant,
    /// What is stored and does not do as it is: an answer that is not stored may end it.
    pub replaced: Option<Arc<Entry>>,
    /// The same, if the request is conditional on its validators.
    pub validated: Option<Arc<Entry>>,
    /// Whether what is stored may be served if the upstream fails, so that an error must not take its place.
    pub replaces_errors: bool,
}

impl Job {
    /// By what its failures are counted.
    fn address(&self) -> Address<'_> {
        let target = self.request.uri.path_and_query().map_or("", |target| target.as_str());
        Address { rule: &self.party.rule, key: &self.collapse_key, target }
    }
}

/// What a client that waited for a fetch gets.
pub enum Fetched<'f> {
    /// A response for everyone who waits, as it fills.
    Shared {
        /// The response.
        fill: Arc<Fill>,
        /// Whether another request had begun the fetch.
        collapsed: bool,
    },
    /// What another request's fetch stored between the look into the cache and now.
    Stored(Arc<Entry>),
    /// A response for this client alone.
    Private(Response<Stream>),
    /// No response.
    Failed(Failure),
    /// The response is not to be shared: the client's own request must be passed.
    NotShared,
    /// The fetch takes too long to wait for it: the client's own request must be passed, in this place.
    TooSlow(Place<'f>),
    /// Too many wait.
    Full,
}

/// What becomes of a response that is for one client alone.
pub(crate) enum Private {
    /// The client gets it.
    Response(Response<Stream>),
    /// The client said something that the upstream was not told, so it must ask by itself.
    AskAgain,
}

/// Bounds and thresholds of fetches.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Larger bodies are not stored, in bytes.
    pub max_object: usize,
    /// Bodies from this size on are stored compressed, in bytes.
    pub compress_above: usize,
    /// Bytes of all bodies on their way into the cache together.
    pub fill_budget: usize,
    /// The longest silence within a body.
    pub silence: Duration,
    /// Requests that may wait for one fetch.
    pub waiters: usize,
    /// How long they wait.
    pub wait_timeout: Duration,
}

/// Fetches.
pub struct Fetcher {
    upstream: Arc<Upstream>,
    cache: Arc<Cache>,
    collapse: Arc<Collapse>,
    budget: Arc<Budget>,
    failing: Failing,
    uncacheable: Marks,
    unstored: LastUnstored,
    /// By canonical request: what its responses vary by.
    varying: Remembered<Arc<[HeaderName]>>,
    /// Canonical requests whose last response said that it is for all who have credentials too (RFC 9111 §3.5).
    shared: Remembered<()>,
    /// What requests hold that wait for others' fetches.
    waiting: Room,
    impatient: Impatient,
    early: Arc<Semaphore>,
    to_pack: Arc<Semaphore>,
    beginnings: Beginnings,
    settings: Settings,
    /// The names by which the upstream may call itself.
    authorities: Vec<Authority>,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

impl Fetcher {
    /// A fetcher whose tasks run on `runtime`.
    #[must_use]
    pub fn new(
        upstream: Arc<Upstream>,
        cache: Arc<Cache>,
        settings: Settings,
        authorities: Vec<Authority>,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            upstream,
            cache,
            collapse: Collapse::new(settings.waiters),
            waiting: Room::new(MOST_WAITING, metrics.waiting_bytes.clone()),
            budget: Arc::new(Budget::new(settings.fill_budget, Arc::clone(&metrics))),
            failing: Failing::new(Arc::clone(&metrics)),
            uncacheable: Marks::default(),
            unstored: LastUnstored::default(),
            varying: remembered(VARYING_KEYS),
            shared: remembered(SHARED_KEYS),
            impatient: Impatient::default(),
            early: Arc::new(Semaphore::new(EARLY)),
            to_pack: Arc::new(Semaphore::new(TO_PACK)),
            beginnings: Beginnings::default(),
            settings,
            authorities,
            runtime,
            metrics,
        })
    }

    /// What failed lately and is spared.
    #[must_use]
    pub const fn failing(&self) -> &Failing {
        &self.failing
    }

    /// Whether responses for this key turned out uncacheable lately, so that requests for it do not wait for each other.
    #[must_use]
    pub fn is_uncacheable(&self, key: &Canonical) -> bool {
        self.uncacheable.holds(key)
    }

    /// The last response for this key, if it was not stored.
    #[must_use]
    pub fn last_unstored(&self, key: &Canonical) -> Option<Unstored> {
        self.unstored.get(key)
    }

    /// Looks at a response that is passed for an uncacheable key. If it could have been stored, the next request for the key is fetched
    /// again, for all who wait. `requested_host` is the authority that the client asked for.
    pub fn note_passed(
        &self,
        key: &Canonical,
        policy: &FreshnessPolicy,
        requested_host: Option<&HeaderValue>,
        response: &Response<Stream>,
    ) {
        let length = response.body().size_hint().exact();
        let fits = length.is_none_or(|length| length <= self.settings.max_object as u64);
        let verdict = self.judge(policy, requested_host, response);
        if fits && matches!(verdict, Verdict::Store(_) | Verdict::StoreForValidation(_)) && !is_failure(response.status()) {
            self.uncacheable.lift(key, length);
        }
        match verdict {
            Verdict::Private(why) | Verdict::Share(why) => self.unstored.note(key, why, response.status().as_u16()),
            Verdict::Store(_) | Verdict::StoreForValidation(_) => {}
        }
    }

    /// The fields by which responses to this request varied lately, so far as they are remembered.
    #[must_use]
    pub fn varies_by(&self, request: &Canonical) -> Arc<[HeaderName]> {
        self.varying.get(&request.0).unwrap_or_default()
    }

    /// Whether the last response to this request was for all who have credentials, so that they may wait for one fetch.
    #[must_use]
    pub fn is_shared(&self, request: &Canonical) -> bool {
        self.shared.get(&request.0).is_some()
    }

    /// The beginnings of responses that are known.
    #[must_use]
    pub const fn beginnings(&self) -> &Beginnings {
        &self.beginnings
    }

    /// How many bytes take what is remembered of keys beside what is stored.
    #[must_use]
    pub fn remembered_bytes(&self) -> u64 {
        let keys = self.uncacheable.bytes() + self.unstored.bytes() + self.varying.bytes() + self.shared.bytes();
        keys + self.failing.bytes() + self.beginnings.bytes()
    }

    /// Runs work beside requests.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Joins the fetch of a job's key, or begins one.
    fn join(&self, job: &Job) -> Join {
        let Key { readable, tags, target, .. } = &job.key;
        let is_void = |began| self.cache.voids().concern_since(began, readable, tags, *target);
        self.collapse.join(&job.collapse_key, &job.party, job.asked_at, job.wants_new, is_void)
    }

    /// Has a stored response revalidated in the background, unless that is under way already.
    pub fn revalidate(self: &Arc<Self>, mut job: Job) {
        job.party.address = None;
        if let Join::Lead(leader, _) = self.join(&job) {
            if let Some(entry) = self.stored_meanwhile(&job) {
                return leader.found(entry);
            }
            let (private, _) = oneshot::channel();
            self.runtime.spawn(carry(Arc::clone(self).lead(job, leader, private)));
        }
    }

    /// The same for a response that is fresh still, within the budget for those.
    pub fn refresh_early(self: &Arc<Self>, mut job: Job) {
        job.party.address = None;
        let Ok(permit) = Arc::clone(&self.early).try_acquire_owned() else { return };
        if let Join::Lead(leader, _) = self.join(&job) {
            self.metrics.early_refreshes.with_label_values(&[&*job.party.rule]).inc();
            let (private, _) = oneshot::channel();
            let fetching = Arc::clone(self).lead(job, leader, private);
            self.runtime.spawn(async move {
                fetching.await;
                drop(permit);
            });
        }
    }

    /// Gets a response for a client that waits. If the client leaves, the fetch goes on.
    pub async fn fetch(self: &Arc<Self>, job: Job) -> Fetched<'_> {
        match self.join(&job) {
            Join::Lead(leader, follower) => {
                if let Some(entry) = self.stored_meanwhile(&job) {
                    leader.found(Arc::clone(&entry));
                    return Fetched::Stored(entry);
                }
                let (sender, private) = oneshot::channel();
                self.runtime.spawn(carry(Arc::clone(self).lead(job, leader, sender)));
                match follower.outcome().await {
                    Progress::Shared(fill) => Fetched::Shared { fill, collapsed: false },
                    Progress::Stored(entry) => Fetched::Stored(entry),
                    Progress::Unshared => match private.await {
                        Ok(Private::Response(response)) => Fetched::Private(response),
                        Ok(Private::AskAgain) => Fetched::NotShared,
                        Err(_) => Fetched::Failed(Failure::Lost),
                    },
                    Progress::Failed(failure) => Fetched::Failed(failure),
                    Progress::Pending => Fetched::Failed(Failure::Lost),
                }
            }
            Join::Follow(follower) => {
                let mut room = self.waiting.of(job.party.address);
                if !room.take(weight_of_waiting(&job.request.headers)) {
                    return Fetched::Full;
                }
                self.metrics.collapsed.with_label_values(&[&*job.party.rule]).inc();
                self.upstream.join(follower.askers(), &job.party);
                // The leader waits for as long as the upstream may take; the others for `limits.wait_timeout`. What comes while they wait
                // for a place of their own is as good.
                let impatient = async {
                    sleep(self.settings.wait_timeout).await;
                    self.impatient.place(&job.collapse_key, self.settings.wait_timeout).await
                };
                let progress = tokio::select! {
                    biased;
                    progress = follower.outcome() => progress,
                    place = impatient => return place.map_or_else(Fetched::Failed, Fetched::TooSlow),
                };
                match progress {
                    Progress::Shared(fill) => Fetched::Shared { fill, collapsed: true },
                    // It was found for the one who began the fetch, who may select another variant, and take what is older.
                    Progress::Stored(entry) => self.found_for(&job, entry).map_or(Fetched::NotShared, Fetched::Stored),
                    Progress::Unshared => Fetched::NotShared,
                    Progress::Failed(failure) => Fetched::Failed(failure),
                    Progress::Pending => Fetched::Failed(Failure::Lost),
                }
            }
            Join::Full => Fetched::Full,
        }
    }

    /// What a request gets where another one found an entry: that entry, if it is its own key's, or what there is of its own.
    fn found_for(&self, job: &Job, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        let is_newer = is_newer(entry.asked_at, job.found, job.wants_new.then_some(job.asked_at));
        if entry.canonical == job.collapse_key.0 && is_newer { Some(entry) } else { self.stored_meanwhile(job) }
    }

    /// What a fetch stored that ended after the job's request had looked into the cache and before it could join that fetch.
    /// The leader now begins the only fetch of the key, so this look is the last one that is needed.
    fn stored_meanwhile(&self, job: &Job) -> Option<Arc<Entry>> {
        let mut entry = self.cache.peek(&job.collapse_key)?;
        if let Content::Varies(names) = &entry.content {
            entry = self.cache.peek(&job.key.variant(names, &job.selecting).canonical)?;
        }
        let is_newer = is_newer(entry.asked_at, job.found, job.wants_new.then_some(job.asked_at));
        let is_fresh = Wall::now().since(entry.stored_at) < entry.lifetimes.fresh;
        (is_newer && is_fresh && matches!(entry.content, Content::Response(_))).then_some(entry)
    }
}

/// What a request that waits for another's fetch holds in memory, in bytes: about so much, whatever it asks, and its fields as its client sent
/// them, as the upstream would be, and as they are compared.
fn weight_of_waiting(fields: &HeaderMap) -> usize {
    const ANY: usize = 16 << 10;
    const FIELD: usize = 100;
    ANY + 3 * fields.iter().map(|(name, value)| name.as_str().len() + value.len() + FIELD).sum::<usize>()
}

/// Whether what was asked for at `asked_at` is newer than what was found, if anything was, and no older than a request that wants something
/// new (`no-cache`).
fn is_newer(asked_at: Moment, found: Option<Moment>, wanted: Option<Moment>) -> bool {
    found.is_none_or(|found| asked_at > found) && wanted.is_none_or(|wanted| asked_at >= wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stored_meanwhile_is_newer_than_what_was_found_and_no_older_than_a_reload() {
        let at = |moment: Option<u64>| moment.map(Moment::at);
        for (asked, found, wanted, newer) in [
            (5, None, None, true),
            (5, Some(4), None, true),
            (5, Some(5), None, false),
            (5, None, Some(6), false),
            (5, Some(4), Some(6), false),
            (7, Some(4), Some(6), true),
        ] {
            assert_eq!(is_newer(Moment::at(asked), at(found), at(wanted)), newer, "{asked} {found:?} {wanted:?}");
        }
    }
}
