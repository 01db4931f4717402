//! Getting an answer from the backend through the cache: one fetch a key, detached from whoever asked first.
//!
//! [`Fetcher::fetch`] is for a client that waits, [`Fetcher::refresh`] for an entry that is served stale meanwhile.
//! Both start the same task, which asks, decides what may be done with the answer, shares it while it fills, and
//! stores it.

pub mod collapse;
pub mod fill;
pub mod other_methods;
pub mod parts;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::RandomState;
use http::header::{ACCEPT_LANGUAGE, CONTENT_LENGTH, CONTENT_RANGE, ETAG};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, request, response};
use http_body::Body as _;
use http_body_util::BodyExt;
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::body::{self, Stream};
use crate::breaker::{Backoff, Breaker, Gate};
use crate::cache::entry::{Answer, Content, Entry};
use crate::cache::invalidated::Invalidated;
use crate::cache::key::{Canonical, Key};
use crate::cache::purges::Purges;
use crate::cache::{Selection, Store};
use crate::clock::Wall;
use crate::fetch::collapse::{Flights, Follower, Join, Lead, Phase};
use crate::fetch::fill::{Budget, End, Fill, Head, Writer};
use crate::fetch::parts::Part;
use crate::http::cache_control::CacheControl;
use crate::http::conditional::{etag_of, validates};
use crate::http::encoding::{self, Coding};
use crate::http::freshness::{Grant, Lifetimes, Unstorable, Verdict, is_failure, verdict};
use crate::http::headers::{age, freshened};
use crate::http::vary::{Vary, content_language, selection};
use crate::proxy::outcome::Failure;
use crate::telemetry::Metrics;
use crate::upstream::forward;
use crate::upstream::{Upstream, body_failure};

/// A backend that does not connect, breaks off or times out so often in a row is left alone. So is one that answers
/// 502, 503 or 504.
const BACKEND_BACKOFF: Backoff = Backoff { first: Duration::from_millis(250), longest: Duration::from_secs(15), tolerated: 2 };
/// An address that failed is left alone from the first failure on: others may work.
const KEY_BACKOFF: Backoff = Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(30), tolerated: 0 };
/// Addresses whose failures are remembered, and addresses that are known to be uncacheable.
const REMEMBERED: usize = 16_384;
/// For how long an address that turned out uncacheable does not queue.
const UNCACHEABLE_FOR: Duration = Duration::from_secs(60);
/// Requests that go by themselves at one time because the one who fetches takes too long.
const LET_THROUGH: usize = 8;
/// Bodies from this size on are compressed off the runtime's own threads.
const COMPRESS_ELSEWHERE: usize = 64 << 10;
/// Coded bodies of up to this size are inflated on the spot.
const INFLATE_HERE: usize = 4 << 10;

type Remembered<T> = Cache<Bytes, T, UnitWeighter, RandomState, DefaultLifecycle<Bytes, T>>;

/// What a fetch needs to know.
pub struct Job {
    /// The key under which the answer is stored.
    pub key: Key,
    /// What is fetched once at a time: the key, or its variant where it is known that the answer varies.
    pub flight: Canonical,
    /// The canonical request of any origin, which a change invalidates.
    pub address: Canonical,
    /// The rule's name.
    pub route: String,
    /// The authority that the client asked.
    pub authority: Option<HeaderValue>,
    /// What the rule grants.
    pub grant: Grant,
    /// When it was asked for: a purge after that forbids storing the answer.
    pub asked: Instant,
    /// The request as the backend shall get it.
    pub request: request::Parts,
    /// Whether an answer in a language is also for those who prefer that language.
    pub by_language: bool,
    /// Whether the rest of an answer may be asked for alone.
    pub by_parts: bool,
    /// What is stored and stale: the request may be conditional on its validators.
    pub stale: Option<Arc<Entry>>,
    /// Whether what is stored may be served if the backend fails, so that a failure must not take its place.
    pub stands_in: bool,
}

/// What a client that waited for a fetch gets.
pub enum Fetched {
    /// An answer for everyone who waits, as it fills.
    Shared {
        /// The answer.
        fill: Arc<Fill>,
        /// Whether someone else's request caused it.
        collapsed: bool,
    },
    /// An answer for this client alone.
    Own(Response<Stream>),
    /// No answer.
    Failed(Failure),
    /// The answer is not to be shared, or waiting took too long: ask the backend directly.
    GoYourself {
        /// Waiting took too long.
        too_long: bool,
    },
    /// Too many wait.
    Full,
}

/// Bounds and thresholds of fetches.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Larger bodies stream through.
    pub max_object: usize,
    /// Bodies from this size on are kept compressed.
    pub compress_above: usize,
    /// Bytes of all bodies on their way into the cache together.
    pub fill_budget: usize,
    /// The longest silence within a body that fills.
    pub silence: Duration,
    /// Requests that may wait for one fetch.
    pub waiters: usize,
    /// How long they wait.
    pub wait_timeout: Duration,
}

/// Fetches.
pub struct Fetcher {
    upstream: Arc<Upstream>,
    store: Arc<dyn Store>,
    flights: Arc<Flights>,
    budget: Arc<Budget>,
    backend: Breaker,
    failing: Remembered<Arc<Breaker>>,
    uncacheable: Remembered<Instant>,
    let_through: Semaphore,
    parts: Remembered<Arc<Part>>,
    purges: Purges,
    /// What changed while it may have been stored.
    pub invalidated: Invalidated,
    settings: Settings,
    /// The names under which the backend may call itself.
    authorities: Vec<Authority>,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

impl Fetcher {
    /// A fetcher whose tasks run on `runtime`.
    #[must_use]
    pub fn new(
        upstream: Arc<Upstream>,
        store: Arc<dyn Store>,
        settings: Settings,
        authorities: Vec<Authority>,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            upstream,
            store,
            flights: Flights::new(settings.waiters),
            budget: Arc::new(Budget::new(settings.fill_budget, Arc::clone(&metrics))),
            backend: Breaker::new(BACKEND_BACKOFF),
            failing: remembered(REMEMBERED),
            uncacheable: remembered(REMEMBERED),
            parts: remembered(parts::REMEMBERED),
            let_through: Semaphore::new(LET_THROUGH),
            purges: Purges::default(),
            invalidated: Invalidated::default(),
            settings,
            authorities,
            runtime,
            metrics,
        })
    }

    /// Runs work beside requests.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Whether this address, or the whole backend, failed lately and is being left alone.
    #[must_use]
    pub fn rests(&self, canonical: &Canonical) -> bool {
        self.backend.is_open() || self.failing.get(&canonical.0).is_some_and(|breaker| breaker.is_open())
    }

    /// Whether the backend as a whole is being left alone.
    #[must_use]
    pub fn backend_rests(&self) -> bool {
        self.backend.is_open()
    }

    /// Whether this address turned out uncacheable lately, so that its requests do not queue for each other.
    #[must_use]
    pub fn is_uncacheable(&self, canonical: &Canonical) -> bool {
        self.uncacheable.get(&canonical.0).is_some_and(|until| Instant::now() < until)
    }

    /// Removes entries, or with `soft` ends their freshness; what is being fetched meanwhile is not stored. Returns how
    /// many entries that were.
    pub async fn purge(&self, what: &Selection, soft: bool) -> usize {
        self.purges.note(what.clone());
        self.parts.clear();
        let purged = self.store.purge(what, soft).await;
        self.metrics.purged.inc_by(purged as u64);
        tracing::info!(?what, soft, purged, "purged");
        purged
    }

    /// Something changed under these keys: what is stored, or being fetched, is not used any more. The task that is
    /// returned removes it.
    pub fn invalidate(&self, keys: Vec<Key>) -> JoinHandle<()> {
        let now = Wall::now();
        for key in &keys {
            self.invalidated.note(key.canonical.0.clone(), now);
        }
        let store = Arc::clone(&self.store);
        self.runtime.spawn(async move {
            for key in keys {
                store.remove(&key).await;
            }
        })
    }

    /// Has an entry refreshed in the background, unless that is under way already.
    pub fn refresh(self: &Arc<Self>, job: Job) {
        if let Join::First(lead, _) = self.flights.join(&job.flight) {
            let (own, _) = oneshot::channel();
            self.runtime.spawn(Arc::clone(self).lead(job, lead, own));
        }
    }

    /// Has an entry refreshed in the background if the backend has been left alone for long enough.
    pub fn try_again(self: &Arc<Self>, job: impl FnOnce() -> Job, canonical: &Canonical) {
        let gate = match self.backend.enter() {
            Gate::Closed => self.failing.get(&canonical.0).map_or(Gate::Closed, |breaker| breaker.enter()),
            gate => gate,
        };
        if gate != Gate::Open {
            self.refresh(job());
        }
    }

    /// Gets an answer for a client that waits. If the client leaves, the fetch goes on.
    pub async fn fetch(self: &Arc<Self>, job: Job) -> Fetched {
        let (follower, mut own, collapsed) = match self.flights.join(&job.flight) {
            Join::First(lead, follower) => {
                let (sender, receiver) = oneshot::channel();
                self.runtime.spawn(Arc::clone(self).lead(job, lead, sender));
                (follower, Some(receiver), false)
            }
            Join::Follow(follower) => {
                self.metrics.collapsed.with_label_values(&[&job.route]).inc();
                (follower, None, true)
            }
            Join::Full => return Fetched::Full,
        };
        // The first one waits for as long as the backend may take; the others get impatient.
        let phase = if collapsed { self.patiently(&follower).await } else { Some(follower.outcome().await) };
        match phase {
            Some(Phase::Shared(fill)) => Fetched::Shared { fill, collapsed },
            Some(Phase::Failed(failure)) => Fetched::Failed(failure),
            Some(Phase::Unshared) => match own.take() {
                Some(own) => own.await.map_or(Fetched::Failed(Failure::Lost), Fetched::Own),
                None => Fetched::GoYourself { too_long: false },
            },
            Some(Phase::Pending) | None => Fetched::GoYourself { too_long: true },
        }
    }

    async fn patiently(&self, follower: &Follower) -> Option<Phase> {
        timeout(self.settings.wait_timeout, follower.outcome()).await.ok()
    }

    /// A place among the few that may go by themselves because the one who fetches takes too long.
    ///
    /// # Errors
    /// [`Failure::Overloaded`] if none becomes free in time.
    pub async fn let_through(&self) -> Result<tokio::sync::SemaphorePermit<'_>, Failure> {
        match timeout(self.settings.wait_timeout, self.let_through.acquire()).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(Failure::Overloaded),
        }
    }

    /// The fetch itself: a task of its own, so that no client's leaving ends it.
    async fn lead(self: Arc<Self>, job: Job, lead: Lead, own: oneshot::Sender<Response<Stream>>) {
        let (mut head, mut body) = match self.ask(&job).await {
            Ok(answer) => answer.into_parts(),
            Err(failure) => {
                self.note_failure(&job.flight, failure);
                return lead.fail(failure);
            }
        };
        if head.status == StatusCode::NOT_MODIFIED {
            // One that was not asked for, or that is about something else, answers nothing.
            let revived = match &job.stale {
                Some(stale) => self.revive(stale, &head.headers).await,
                None => None,
            };
            let Some(revived) = revived else {
                tracing::warn!(route = job.route, "the backend answered 304 to what was not asked; it counts as a failure");
                self.note_failure(&job.flight, Failure::Invalid);
                return lead.fail(Failure::Invalid);
            };
            (head, body) = revived.into_parts();
        }
        match is_failure(head.status) {
            true => self.note_failure(&job.flight, Failure::Status(head.status.as_u16())),
            false => self.note_success(&job.flight),
        }
        let reflects = || forward::reflects(&head.headers, job.authority.as_ref(), &self.authorities);
        let verdict = match head.status.is_redirection() && reflects() {
            true => Verdict::Private(Unstorable::Reflection),
            false => verdict(&job.grant, head.status, &head.headers, Wall::now()),
        };
        let Vary::Fields(fields) = Vary::of(&head.headers) else {
            return self.hand_over(&job, lead, own, Response::from_parts(head, body));
        };
        let lives = match verdict {
            Verdict::Store(_) if job.stands_in && is_failure(head.status) => None,
            Verdict::Store(lives) | Verdict::Keep(lives) => Some(lives),
            Verdict::Share(_) => None,
            Verdict::Private(_) => return self.hand_over(&job, lead, own, Response::from_parts(head, body)),
        };
        let length = body.size_hint().exact();
        let fits = length.is_none_or(|length| length <= self.settings.max_object as u64);
        let stored = lives.is_some() && fits;
        let (fill, writer) = self.start_fill(&job, head, fields, length, stored);
        if !stored {
            fill.settle(None);
        }
        if matches!(verdict, Verdict::Keep(_)) {
            // For the one who asked, and for those to come once the backend has been asked again.
            let answer = fill.reader().map(|reader| fill.head.response(reader.boxed_unsync()));
            if let Some(answer) = answer {
                drop(own.send(answer));
            }
            lead.unshare();
            return self.pump(&job, None, &fill, writer, body, lives).await;
        }
        lead.share(Arc::clone(&fill));
        self.pump(&job, Some(lead), &fill, writer, body, lives).await;
    }

    /// Asks the backend for the whole answer: for the rest alone where the beginning is known, and for all of it where the
    /// two are not of one piece.
    async fn ask(&self, job: &Job) -> Result<Response<Stream>, Failure> {
        let call = async |part: Option<&Part>| {
            let mut request = Request::from_parts(job.request.clone(), body::empty());
            if let Some(part) = part {
                part.ask(request.headers_mut());
            }
            let answer = self.upstream.call(&job.route, request, self.settings.silence).await;
            let mut answer = answer.map_err(|error| Failure::from(&error))?;
            forward::clean_answer(answer.headers_mut());
            Ok::<_, Failure>(answer)
        };
        let Some(part) = self.part(job) else { return call(None).await };
        let (mut head, rest) = call(Some(&part)).await?.into_parts();
        if head.status != StatusCode::PARTIAL_CONTENT {
            return Ok(Response::from_parts(head, rest));
        }
        self.parts.remove(&job.flight.0);
        let rest = body::read(rest, self.settings.max_object).await;
        let Some(whole) = rest.and_then(|rest| part.join(&head.headers, &rest)) else { return call(None).await };
        head.status = StatusCode::OK;
        head.headers.remove(CONTENT_RANGE);
        head.headers.remove(CONTENT_LENGTH);
        Ok(Response::from_parts(head, body::full(whole)))
    }

    /// A stored answer that the backend says still holds, as if it had come anew with the fields that the 304 updates
    /// (RFC 9111 §4.3.4).
    async fn revive(&self, stale: &Entry, told: &HeaderMap) -> Option<Response<Stream>> {
        let Content::Answer(answer) = &stale.content else { return None };
        if !validates(told, &answer.fields) {
            return None;
        }
        let plain = match (answer.coding, &answer.plain) {
            (Coding::Identity | Coding::Opaque, _) => answer.body.clone(),
            (Coding::Gzip, Some(plain)) => plain.clone(),
            (Coding::Gzip, None) => {
                let (coded, limit) = (answer.body.clone(), encoding::inflation_limit(answer.body.len(), self.settings.max_object));
                self.runtime.spawn_blocking(move || encoding::gunzip(&coded, limit)).await.ok()?.ok()?
            }
        };
        let mut stored = answer.fields.clone();
        forward::take_own_via(&mut stored);
        let mut response = Response::new(body::full(plain));
        *response.status_mut() = answer.status;
        *response.headers_mut() = freshened(&stored, told);
        Some(response)
    }

    /// A fill for the body of an answer that varies by `names`.
    fn start_fill(
        &self,
        job: &Job,
        head: response::Parts,
        names: Vec<HeaderName>,
        length: Option<u64>,
        stored: bool,
    ) -> (Arc<Fill>, Writer) {
        let (coding, mut fields) = (Coding::of(&head.headers), head.headers);
        fields.remove(CONTENT_LENGTH);
        let selected = selection(&names, &job.request.headers);
        let head = Head { status: head.status, fields, coding, length, stored, vary: (names, selected) };
        Fill::start(head, self.settings.max_object, Arc::clone(&self.budget))
    }

    /// An answer for one client alone. Whoever waited goes by itself, and those to come do not queue.
    fn hand_over(&self, job: &Job, lead: Lead, own: oneshot::Sender<Response<Stream>>, answer: Response<Stream>) {
        // What a client did wrong says nothing about the address.
        if !answer.status().is_client_error() {
            self.uncacheable.insert(job.flight.0.clone(), Instant::now() + UNCACHEABLE_FOR);
        }
        // A client that left, or a refresh, has no use for it.
        drop(own.send(answer));
        lead.unshare();
    }

    /// Reads the body into the fill, and the fill into the store.
    async fn pump(&self, job: &Job, lead: Option<Lead>, fill: &Arc<Fill>, writer: Writer, mut body: Stream, lives: Option<Lifetimes>) {
        let mut lead = lead;
        let mut left = fill.head.length;
        if lives.is_none() && left == Some(0) {
            lead = None;
        }
        while let Some(frame) = body.frame().await {
            let chunk = match frame.map(http_body::Frame::into_data) {
                Ok(Ok(chunk)) => chunk,
                Ok(Err(_trailers)) => continue,
                Err(error) => {
                    let failure = body_failure(&error);
                    tracing::warn!(route = job.route, %error, "the backend's body broke off; it was not stored");
                    self.note_failure(&job.flight, failure);
                    return writer.fail(failure);
                }
            };
            left = left.map(|left| left.saturating_sub(chunk.len() as u64));
            if lives.is_none() && left == Some(0) {
                // What is not kept must not be given to those who ask after others had all of it.
                lead = None;
            }
            if writer.push(chunk).await.is_err() {
                return;
            }
        }
        // What is kept must be given to them: until the entry can be found, the flight is where it is.
        let lead = lives.map(|lives| (lead, lives));
        let Some(bytes) = writer.complete() else {
            // Too large to be stored: those to come need not queue for it.
            self.uncacheable.insert(job.flight.0.clone(), Instant::now() + UNCACHEABLE_FOR);
            return;
        };
        if let Some((_lead, lives)) = lead {
            self.store(job, fill, bytes, lives).await;
        }
    }

    async fn store(&self, job: &Job, fill: &Arc<Fill>, bytes: Bytes, lives: Lifetimes) {
        let head = &fill.head;
        let compress =
            head.coding == Coding::Identity && bytes.len() >= self.settings.compress_above && !CacheControl::of(&head.fields).no_transform;
        let limit = encoding::inflation_limit(bytes.len(), self.settings.max_object);
        let coding = head.coding;
        let prepare = move || prepare(bytes, coding, compress, limit);
        // What is coded may be hundreds of times as large.
        let here = if coding == Coding::Gzip { INFLATE_HERE } else { COMPRESS_ELSEWHERE };
        let large = fill.head.length.unwrap_or(u64::MAX) >= here as u64;
        let prepared = if large { self.runtime.spawn_blocking(prepare).await.ok().flatten() } else { prepare() };
        let Some(prepared) = prepared else {
            tracing::warn!(route = job.route, "the backend's gzip body is not valid or inflates too far; it was not stored");
            return fill.settle(None);
        };
        let mut fields = own_memory(&head.fields);
        let age_when_stored = u32::try_from(age(&fields).as_secs()).unwrap_or(u32::MAX);
        finish_fields(&mut fields, || prepared.etag.clone());
        let answer = Answer::new(head.status, fields, prepared.coding, coding, prepared.body);
        let now = Wall::now().max(self.invalidated.first_valid(&job.address.0));
        let entry = |key: &Key, content| Arc::new(Entry::new(key, now, age_when_stored, lives, content));
        let (names, _) = &head.vary;
        let key = if names.is_empty() { job.key.clone() } else { job.key.variant(names, &job.request.headers) };
        let answer = entry(&key, Content::Answer(answer));
        let changed = self.invalidated.any() && self.invalidated.asked(&job.address.0, job.asked);
        if changed || self.purges.hit(&job.key, job.asked) {
            return fill.settle(Some(answer));
        }
        // Memory has it as soon as `put` is called; Redis gets it while clients go on.
        let writing = self.store.put(&key, Arc::clone(&answer));
        // In this language those get it too who prefer it to all others.
        let language = content_language(&head.fields).filter(|_| job.by_language && names[..] == [ACCEPT_LANGUAGE]);
        let speaking = language.map(|language| {
            let key = Key { canonical: job.key.canonical.language(&language), ..job.key.clone() };
            let entry = Arc::new(Entry { canonical: key.canonical.0.clone(), ..Entry::clone(&answer) });
            (key, entry)
        });
        let marking = (!names.is_empty()).then(|| self.store.put(&job.key, entry(&job.key, Content::Varies(names.clone()))));
        fill.settle(Some(answer));
        writing.await;
        if let Some((key, entry)) = speaking {
            self.store.put(&key, entry).await;
        }
        if let Some(marking) = marking {
            marking.await;
        }
        self.uncacheable.remove(&job.flight.0);
    }

    fn note_success(&self, canonical: &Canonical) {
        self.failing.remove(&canonical.0);
        if self.backend.succeeded() {
            self.metrics.breaker_open.with_label_values(&["backend"]).set(0);
            tracing::info!("the backend answers again");
        }
    }

    fn note_failure(&self, canonical: &Canonical, failure: Failure) {
        let breaker = self.failing.get(&canonical.0).unwrap_or_else(|| {
            let breaker = Arc::new(Breaker::new(KEY_BACKOFF));
            self.failing.insert(canonical.0.clone(), Arc::clone(&breaker));
            breaker
        });
        breaker.failed();
        // A 500 is about one request, and being busy is our own doing; the rest is about the backend.
        if matches!(failure, Failure::Status(500) | Failure::Overloaded | Failure::Lost) {
            return;
        }
        if let Some(span) = self.backend.failed() {
            self.metrics.breaker_open.with_label_values(&["backend"]).set(1);
            tracing::warn!(reason = failure.answer().1, pause = ?span, "the backend fails and is left alone; what is stored is served stale meanwhile");
        }
    }
}

fn remembered<T: Clone>(count: usize) -> Remembered<T> {
    Cache::with(count, count as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default())
}

/// A body in the form in which it is kept.
struct Prepared {
    body: Bytes,
    coding: Coding,
    etag: HeaderValue,
}

/// Checks, compresses and digests a body. `None` if it claims to be gzip and is not, or would inflate too far.
fn prepare(bytes: Bytes, coding: Coding, compress: bool, limit: usize) -> Option<Prepared> {
    match coding {
        Coding::Gzip => {
            let plain = encoding::gunzip(&bytes, limit).ok()?;
            // The tag names the bytes as the backend coded them; the identity form gets its weak form.
            Some(Prepared { etag: etag_of(&plain), body: bytes, coding })
        }
        Coding::Opaque => Some(Prepared { etag: etag_of(&bytes), body: bytes, coding }),
        Coding::Identity => {
            let etag = etag_of(&bytes);
            let packed = compress.then(|| encoding::gzip(&bytes)).filter(|packed| !packed.is_empty() && packed.len() < bytes.len());
            Some(match packed {
                Some(body) => Prepared { body, coding: Coding::Gzip, etag },
                None => Prepared { body: bytes, coding, etag },
            })
        }
    }
}

/// The same fields in memory of their own. As they arrived they are slices of the connection's buffer, which they
/// would keep alive for as long as the entry lives.
fn own_memory(fields: &HeaderMap) -> HeaderMap {
    let mut own = HeaderMap::with_capacity(fields.len() + 2);
    for (name, value) in fields {
        let copy = (HeaderName::from_bytes(name.as_str().as_bytes()), HeaderValue::from_bytes(value.as_bytes()));
        if let (Ok(name), Ok(value)) = copy {
            own.append(name, value);
        }
    }
    own
}

/// Puts what every stored or shared answer carries: `Via`, an `ETag`; and takes `Age`, which is counted anew.
pub fn finish_fields(fields: &mut HeaderMap, etag: impl FnOnce() -> HeaderValue) {
    fields.remove(http::header::AGE);
    fields.append(http::header::VIA, HeaderValue::from_static(crate::proxy::VIA));
    if !fields.contains_key(ETAG) {
        fields.insert(ETAG, etag());
    }
}

/// Waits until a fill's body is whole, for a client that has something to fall back on.
///
/// # Errors
/// How the body broke off.
pub async fn whole(fill: &Fill, patience: Duration) -> Result<(), Failure> {
    match timeout(patience, fill.end()).await {
        Ok(End::Broken(failure)) => Err(failure),
        Ok(End::Whole | End::Passing) => Ok(()),
        Err(_) => Err(Failure::Timeout),
    }
}
