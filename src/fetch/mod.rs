//! One fetch a key, whoever asks for it: from the upstream, through the cache, to everyone who waits.
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
//! Knows the cache and the upstream. Knows neither clients nor rules: what it needs of either stands in the [`Job`].

pub mod budget;
pub mod collapse;
pub mod failing;
pub mod fill;
pub mod freshen;
pub mod lead;
pub mod other_methods;
pub mod partial;
pub mod remembered;
pub mod storing;

use std::sync::Arc;
use std::time::Duration;

use http::uri::Authority;
use http::{HeaderValue, Response, request};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::{Instant, timeout};

use crate::body::Stream;
use crate::cache::Cache;
use crate::cache::entry::Entry;
use crate::cache::key::{Canonical, Key};
use crate::clock::Wall;
use crate::http::freshness::FreshnessPolicy;
use crate::telemetry::metrics::Metrics;
use crate::upstream::Upstream;
use crate::upstream::failure::Failure;
use budget::Budget;
use collapse::{Collapse, Join, Progress};
use failing::Failing;
use fill::Fill;
use partial::Beginnings;
use remembered::{Remembered, remembered};

/// Keys that are known to be uncacheable, and for how long: requests for them do not wait for each other.
const UNCACHEABLE_KEYS: usize = 16_384;
const UNCACHEABLE_FOR: Duration = Duration::from_secs(60);
/// Requests at a time that are passed by themselves because the fetch that they waited for takes too long.
const IMPATIENT: usize = 8;

/// What a fetch needs to know.
pub struct Job {
    /// The request as the upstream is sent it.
    pub request: request::Parts,
    /// The key under which the response is stored.
    pub key: Key,
    /// What is fetched once at a time: the key, or its variant where it is known that the response varies.
    pub collapse_key: Canonical,
    /// The canonical request without origin and variant: what an invalidation names.
    pub target_uri: Canonical,
    /// The rule's name.
    pub route: String,
    /// How long the rule lets a response live.
    pub policy: FreshnessPolicy,
    /// Whether a response in a language is also for those who prefer that language.
    pub match_language: bool,
    /// Whether the rest of a response whose beginning is known may be asked for alone.
    pub complete_ranges: bool,
    /// The authority that the client asked for.
    pub requested_host: Option<HeaderValue>,
    /// When it is asked for: what is voided after that does not stay in the cache.
    pub asked_at: Wall,
    /// What is stored and stale, if the request is conditional on its validators.
    pub validated: Option<Arc<Entry>>,
    /// Whether what is stored may be served if the upstream fails, so that an error must not take its place.
    pub replaces_errors: bool,
}

/// What a client that waited for a fetch gets.
pub enum Fetched {
    /// A response for everyone who waits, as it fills.
    Shared {
        /// The response.
        fill: Arc<Fill>,
        /// Whether another request had begun the fetch.
        collapsed: bool,
    },
    /// A response for this client alone.
    Private(Response<Stream>),
    /// No response.
    Failed(Failure),
    /// The response is not to be shared: the client's own request must be passed.
    NotShared,
    /// The fetch takes too long to wait for it: the client's own request must be passed.
    TooSlow,
    /// Too many wait.
    Full,
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
    uncacheable: Remembered<Instant>,
    impatient: Semaphore,
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
            budget: Arc::new(Budget::new(settings.fill_budget, Arc::clone(&metrics))),
            failing: Failing::new(Arc::clone(&metrics)),
            uncacheable: remembered(UNCACHEABLE_KEYS),
            impatient: Semaphore::new(IMPATIENT),
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
        self.uncacheable.get(&key.0).is_some_and(|until| Instant::now() < until)
    }

    fn note_uncacheable(&self, key: &Canonical) {
        self.uncacheable.insert(key.0.clone(), Instant::now() + UNCACHEABLE_FOR);
    }

    /// The beginnings of responses that are known.
    #[must_use]
    pub const fn beginnings(&self) -> &Beginnings {
        &self.beginnings
    }

    /// Runs work beside requests.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Has a stored response revalidated in the background, unless that is under way already.
    pub fn revalidate(self: &Arc<Self>, job: Job) {
        if let Join::Lead(leader, _) = self.collapse.join(&job.collapse_key) {
            let (private, _) = oneshot::channel();
            self.runtime.spawn(Arc::clone(self).lead(job, leader, private));
        }
    }

    /// Gets a response for a client that waits. If the client leaves, the fetch goes on.
    pub async fn fetch(self: &Arc<Self>, job: Job) -> Fetched {
        match self.collapse.join(&job.collapse_key) {
            Join::Lead(leader, follower) => {
                let (sender, private) = oneshot::channel();
                self.runtime.spawn(Arc::clone(self).lead(job, leader, sender));
                match follower.outcome().await {
                    Progress::Shared(fill) => Fetched::Shared { fill, collapsed: false },
                    Progress::Unshared => private.await.map_or(Fetched::Failed(Failure::Lost), Fetched::Private),
                    Progress::Failed(failure) => Fetched::Failed(failure),
                    Progress::Pending => Fetched::TooSlow,
                }
            }
            Join::Follow(follower) => {
                self.metrics.collapsed.with_label_values(&[&job.route]).inc();
                // The leader waits for as long as the upstream may take; the others for `limits.wait_timeout`.
                match timeout(self.settings.wait_timeout, follower.outcome()).await {
                    Ok(Progress::Shared(fill)) => Fetched::Shared { fill, collapsed: true },
                    Ok(Progress::Unshared) => Fetched::NotShared,
                    Ok(Progress::Failed(failure)) => Fetched::Failed(failure),
                    Ok(Progress::Pending) | Err(_) => Fetched::TooSlow,
                }
            }
            Join::Full => Fetched::Full,
        }
    }

    /// A permit of the few requests that may be passed by themselves because the fetch takes too long.
    ///
    /// # Errors
    /// [`Failure::Overloaded`] if none becomes free in time.
    pub async fn impatient(&self) -> Result<SemaphorePermit<'_>, Failure> {
        match timeout(self.settings.wait_timeout, self.impatient.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Failure::Overloaded),
        }
    }
}
