//! The request path.
//!
//! ```text
//! request → refusals → route → admit → key → lookup → decide → respond
//!                                                       │
//!              Hit · StaleAndRefresh · StaleLeftAlone · Fetch (→ answer, or stale, or error)
//! ```
//!
//! [`Proxy::handle`] is all of it; each step is a short function below it. Whatever happens ends in one
//! [`Outcome`], from which `Cache-Status`, metrics and the access log are made in one place (`Proxy::finish`).
//! The rare and long steps are boxed, so that a hit's future is small: it is moved several times.

pub mod access_log;
pub mod decide;
pub mod explain;
pub mod outcome;
pub mod respond;
pub mod warm;

use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT_LANGUAGE, AUTHORIZATION, CONNECTION, IF_MODIFIED_SINCE, IF_NONE_MATCH, TRAILER};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, Response, StatusCode, request};
use http_body::Body as HttpBody;
use http_body_util::BodyExt;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::admin::own::{Endpoint, Local};
use crate::body::{BoxError, Reply, Stream};
use crate::cache::entry::Content;
use crate::cache::invalidated;
use crate::cache::key::{Canonical, Key};
use crate::cache::{Entry, Store};
use crate::clock::Wall;
use crate::config::route::{Route, select};
use crate::config::{Limits, PublicUrl};
use crate::fetch::fill::Fill;
use crate::fetch::{Fetched, Fetcher, Job, other_methods, whole};
use crate::front::listener::Arrival;
use crate::http::cache_control::CacheControl;
use crate::http::freshness::{Grant, is_failure};
use crate::http::request_directives::Wishes;
use crate::http::vary::{preferred_language, selection};
use crate::proxy::access_log::Visit;
use crate::proxy::decide::{Decision, admit, decide};
use crate::proxy::outcome::{Failure, FetchWhy, Fetched as Answered, Outcome, PassWhy, StaleWhy};
use crate::request::refusal::Refusal;
use crate::request::target::Target;
use crate::request::validate;
use crate::telemetry::Metrics;
use crate::upstream::Upstream;
use crate::upstream::forward::{self, Client, Origin};

/// What Sluice adds to `Via`.
pub const VIA: &str = "1.1 sluice";

/// A small answer that was just fetched is waited for this long: then it carries its validator and its coding.
const SETTLE: Duration = Duration::from_millis(20);
/// Answers of up to so many bytes count as small.
const SMALL: u64 = 64 << 10;

/// Everything that answering a request needs.
pub struct Proxy {
    /// The rules.
    pub routes: Vec<Route>,
    /// What is kept.
    pub store: Arc<dyn Store>,
    /// What gets answers through the cache.
    pub fetcher: Arc<Fetcher>,
    /// What gets answers past it.
    pub upstream: Arc<Upstream>,
    /// What Sluice answers itself.
    pub local: Local,
    /// All metrics.
    pub metrics: Arc<Metrics>,
    /// Bounds on clients.
    pub limits: Limits,
    /// How clients reach this listener.
    pub public: Option<PublicUrl>,
    /// The names under which the backend may call itself.
    pub authorities: Vec<Authority>,
    /// Whether HEAD is answered from GET.
    pub head_as_get: bool,
    /// To the head of the backend's answer.
    pub timeout: Duration,
    /// The longest silence within a body that is passed through.
    pub body_timeout: Duration,
    /// Larger bodies stream through.
    pub max_object: usize,
    /// Which requests get an access line.
    pub access: crate::config::Access,
}

/// An answer and what it is called.
type Said = (Response<Reply>, Outcome);

/// One request that the cache may answer.
struct Question<'a> {
    route: &'a Route,
    target: &'a Target<'a>,
    parts: &'a request::Parts,
    origin: Origin<'a>,
    canonical: Canonical,
    /// The variant under which the answer was looked for, where it is known to vary.
    variant: Option<Canonical>,
    /// What is fetched once at a time for a request with `Authorization`: only those with the same credentials wait for
    /// one another, until the answer says that it is for all.
    authorized: Option<Canonical>,
    now: Wall,
}

impl Question<'_> {
    /// The canonical request of any origin, which a change invalidates.
    fn address(&self) -> Canonical {
        Canonical::new(self.route, self.target, &HeaderMap::new())
    }

    /// What is fetched once at a time: the canonical request, or its variant.
    fn flight(&self) -> &Canonical {
        self.authorized.as_ref().or(self.variant.as_ref()).unwrap_or(&self.canonical)
    }
}

impl Proxy {
    /// Answers one request.
    pub async fn handle<B>(&self, request: Request<B>, arrival: Arrival) -> Response<Reply>
    where
        B: HttpBody<Data = bytes::Bytes, Error = BoxError> + Send + 'static,
    {
        let (parts, body) = request.into_parts();
        let interim = arrival.interim.as_ref();
        let visit = Visit::begin(&self.metrics, &parts);
        let client = Client::of(&parts, arrival.peer, &self.limits);
        let target = arrival.refused.map_or_else(|| validate::target_of(&parts).and_then(Target::parse), Err);
        let (route, (response, outcome)) = match &target {
            Err(refusal) => (None, (respond::refused(*refusal), Outcome::Refused(*refusal))),
            Ok(target) => {
                let route = select(&self.routes, target);
                let said = match Endpoint::of(&target.path, self.local.native) {
                    Some(own) => Box::pin(self.local.answer(own, target, &parts, &client, self)).await,
                    None => self.answer(route, target, &parts, body, visit.origin(&client, self.public.as_ref(), interim)).await,
                };
                (route, said)
            }
        };
        self.finish(visit, route, &parts, &client, response, outcome)
    }

    async fn answer<B>(&self, route: Option<&Route>, target: &Target<'_>, parts: &request::Parts, body: B, origin: Origin<'_>) -> Said
    where
        B: HttpBody<Data = bytes::Bytes, Error = BoxError> + Send + 'static,
    {
        let rule = route.map(|route| route.rule(self.head_as_get));
        let has_body = respond::has_body(parts, body.is_end_stream());
        let why = match (route, admit(rule, &parts.method, &parts.headers, has_body)) {
            (Some(route), Ok(())) => {
                let canonical = Canonical::new(route, target, &parts.headers);
                let fields = parts.headers.contains_key(AUTHORIZATION).then_some(&[AUTHORIZATION]);
                let authorized = fields.map(|fields| canonical.variant(fields, &parts.headers));
                let question = Question { route, target, parts, origin, canonical, variant: None, authorized, now: Wall::now() };
                return self.cached(question).await;
            }
            (_, Err(_)) if target.doubtful => PassWhy::DoubtfulPath,
            (_, Err(why)) => why,
            (None, Ok(())) => PassWhy::NoRule,
        };
        Box::pin(self.passed(route, why, target, parts, body.boxed_unsync(), origin)).await
    }

    /// A request that goes past the cache.
    async fn passed(
        &self,
        route: Option<&Route>,
        why: PassWhy,
        target: &Target<'_>,
        parts: &request::Parts,
        body: Stream,
        origin: Origin<'_>,
    ) -> Said {
        let lesson = route.filter(|route| route.learns_from(&parts.method) && forward::is_plain(parts)).map(|route| {
            let canonical = Canonical::new(route, target, &parts.headers);
            Question { route, target, parts, origin, canonical, variant: None, authorized: None, now: Wall::now() }
        });
        let response = match self.pass(route, parts, body, origin, lesson.is_some()).await {
            Ok(response) => response,
            Err(failure) => return (respond::failed(failure), Outcome::Failed(failure)),
        };
        let change = invalidated::is_change(&parts.method, response.status());
        let removing = change.then(|| self.invalidate(target, parts, response.headers()));
        let response = match lesson {
            Some(lesson) => {
                if let Some(removing) = removing {
                    // What is learnt now must not be removed with what it replaces.
                    drop(removing.await);
                }
                self.learn(lesson, response).await
            }
            None => response,
        };
        (deliver(response), Outcome::Pass(why))
    }

    /// What the answer to a request that was passed on says about GET (see [`learn`]).
    async fn learn(&self, mut lesson: Question<'_>, response: Response<Stream>) -> Response<Stream> {
        let (status, parts) = (response.status(), lesson.parts);
        let address = parts.uri.path_and_query().map_or("", |target| target.as_str());
        if parts.method == Method::POST && other_methods::names_itself(status, response.headers(), address) {
            // Only what says how long it is fresh, whatever the rule grants (RFC 9110 §9.3.3).
            let mut job = self.job(&lesson, None);
            job.grant = job.grant.on_the_backends_word();
            return self.fetcher.adopt(job, response);
        }
        if parts.method == Method::HEAD
            && status == StatusCode::OK
            && let Some(entry) = self.lookup(&mut lesson).await
        {
            let (fetcher, job, mut told) = (Arc::clone(&self.fetcher), self.job(&lesson, None), response.headers().clone());
            forward::clean_answer(&mut told);
            self.fetcher.spawn(fetcher.heard(job, entry, told));
        }
        response
    }

    /// A change was made: what is stored under its address, and under those that the answer names, is not used any more.
    fn invalidate(&self, target: &Target<'_>, parts: &request::Parts, answer: &HeaderMap) -> JoinHandle<()> {
        let host = forward::request_authority(parts);
        let is_own = |authority: &str| {
            host.as_ref().is_some_and(|host| host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()))
                || self.authorities.iter().any(|own| own.as_str().eq_ignore_ascii_case(authority))
        };
        let named = invalidated::named(answer, &target.path, is_own);
        let others = named.iter().filter_map(|text| Target::parse(text).ok());
        let key = |target: &Target<'_>| {
            let route = select(&self.routes, target)?;
            Some(Key::new(route, target, Canonical::new(route, target, &HeaderMap::new())))
        };
        self.fetcher.invalidate(key(target).into_iter().chain(others.filter_map(|other| key(&other))).collect())
    }

    /// A request that the cache may answer.
    async fn cached(&self, mut question: Question<'_>) -> Said {
        let entry = self.lookup(&mut question).await;
        let life = entry.as_ref().map(|entry| (entry.stored_at, entry.lives));
        let resting = || self.fetcher.rests(question.flight());
        let headers = &question.parts.headers;
        let mut decision = decide(life, question.now, false);
        if !matches!(decision, Decision::Hit(_)) && resting() {
            decision = decide(life, question.now, true);
        }
        if question.route.client_directives {
            let wishes = Wishes::of(headers);
            if let Some(entry) = &entry {
                decision = heeded(&wishes, decision, entry, question.now);
            }
            if matches!(decision, Decision::Fetch { .. }) && (wishes.only_if_cached || wishes.no_store) {
                return Box::pin(self.without_storing(&question, wishes.only_if_cached)).await;
            }
        }
        let outcome = match decision {
            Decision::Hit(left) => Outcome::Hit(left),
            Decision::StaleAndRefresh(by) => {
                self.fetcher.refresh(self.job(&question, entry.as_ref()));
                Outcome::Stale(by, StaleWhy::Revalidating)
            }
            Decision::StaleLeftAlone(by) => {
                self.fetcher.try_again(|| self.job(&question, entry.as_ref()), question.flight());
                Outcome::Stale(by, StaleWhy::LeftAlone)
            }
            Decision::Fetch { fallback: None, .. } if entry.is_none() && question.variant.is_some() => {
                return Box::pin(self.fetch(&question, FetchWhy::VaryMiss, None, None)).await;
            }
            Decision::Fetch { why, fallback } => return Box::pin(self.fetch(&question, why, entry.as_ref(), fallback)).await,
        };
        match self.stored(entry.as_ref(), &question).await {
            Some(response) => (response, outcome),
            // Only a forged entry does not inflate: as if it were not there.
            None => Box::pin(self.fetch(&question, FetchWhy::UriMiss, None, None)).await,
        }
    }

    /// For a client that wants nothing stored, or nothing but what is stored, when that does not do.
    async fn without_storing(&self, question: &Question<'_>, only_if_cached: bool) -> Said {
        if only_if_cached {
            return (respond::refused(Refusal::OnlyIfCached), Outcome::Refused(Refusal::OnlyIfCached));
        }
        match self.go_alone(question, false).await {
            Ok(response) => (response, Outcome::Pass(PassWhy::NoStore)),
            Err(failure) => (respond::failed(failure), Outcome::Failed(failure)),
        }
    }

    /// The entry that answers, through the one that says what the answer varies by.
    async fn lookup(&self, question: &mut Question<'_>) -> Option<Arc<Entry>> {
        let mut entry = self.find(question, &question.canonical).await?;
        if let Content::Varies(fields) = &entry.content {
            let variant = question.variant.insert(question.canonical.variant(fields, &question.parts.headers)).clone();
            entry = match self.find(question, &variant).await {
                Some(entry) => entry,
                None if question.route.by_language && fields[..] == [ACCEPT_LANGUAGE] => {
                    let language = preferred_language(&question.parts.headers)?;
                    self.find(question, &question.canonical.language(&language)).await?
                }
                None => return None,
            };
        }
        if self.fetcher.invalidated.any() && self.fetcher.invalidated.stored(&question.address().0, entry.stored_at) {
            return None;
        }
        match &entry.content {
            Content::Answer(answer) if question.authorized.is_some() && !CacheControl::of(&answer.fields).shares_authorized() => None,
            Content::Answer(_) => Some(entry),
            Content::Varies(_) => None,
        }
    }

    async fn find(&self, question: &Question<'_>, canonical: &Canonical) -> Option<Arc<Entry>> {
        if let Some(entry) = self.store.peek(canonical) {
            return Some(entry);
        }
        self.store.get(&Key::new(question.route, question.target, canonical.clone())).await
    }

    async fn stored(&self, entry: Option<&Arc<Entry>>, question: &Question<'_>) -> Option<Response<Reply>> {
        let entry = entry?;
        let Content::Answer(answer) = &entry.content else { return None };
        let (headers, parts) = (&question.parts.headers, question.parts.method == Method::GET);
        respond::from_entry(&*self.store, entry, answer, headers, parts, question.now, self.max_object).await.ok()
    }

    /// Asks the backend, through a fetch that others may share.
    ///
    /// `entry` is what is stored and cannot be served as it is; `fallback` says how long ago it went stale, if it may be
    /// served should the backend fail.
    async fn fetch(&self, question: &Question<'_>, why: FetchWhy, entry: Option<&Arc<Entry>>, fallback: Option<Duration>) -> Said {
        if question.route.by_parts && entry.is_none() && question.parts.method == Method::GET && forward::is_plain_part(question.parts) {
            return match self.fetch_part(question).await {
                Ok(response) => (response, Outcome::Pass(PassWhy::Part)),
                Err(failure) => (respond::failed(failure), Outcome::Failed(failure)),
            };
        }
        let went = |too_long| if too_long { PassWhy::WaitedTooLong } else { PassWhy::Uncacheable };
        let fetched = if self.fetcher.is_uncacheable(question.flight()) {
            Fetched::GoYourself { too_long: false }
        } else {
            let mut job = self.job(question, entry);
            if let Some(interim) = question.origin.interim {
                interim.accompany(&mut job.request.extensions).await;
            }
            self.fetcher.fetch(job).await
        };
        let failure = match fetched {
            Fetched::Shared { fill, collapsed } => {
                match self.shared(question, &fill, fallback.is_some()).await {
                    Ok(Some(response)) => {
                        let stored = fill.head.stored;
                        return (response, Outcome::Fetched(Answered { why, stored, collapsed }));
                    }
                    // What came is not for this request, or its beginning is gone.
                    Ok(None) => match self.go_alone(question, false).await {
                        Ok(response) => return (response, Outcome::Pass(went(false))),
                        Err(failure) => failure,
                    },
                    Err(failure) => failure,
                }
            }
            Fetched::Own(response) if fallback.is_some() && is_failure(response.status()) => Failure::Status(response.status().as_u16()),
            Fetched::Own(response) => {
                let response = deliver(respond::fit(response, &question.parts.headers));
                return (response, Outcome::Fetched(Answered { why, stored: false, collapsed: false }));
            }
            Fetched::GoYourself { too_long } => match self.go_alone(question, too_long).await {
                Ok(response) if fallback.is_some() && is_failure(response.status()) => Failure::Status(response.status().as_u16()),
                Ok(response) => return (response, Outcome::Pass(went(too_long))),
                Err(failure) => failure,
            },
            Fetched::Failed(failure) => failure,
            Fetched::Full if fallback.is_some() => Failure::Overloaded,
            Fetched::Full => {
                self.metrics.rate_limited.with_label_values(&[&question.route.name]).inc();
                return (respond::refused(Refusal::Overloaded), Outcome::Refused(Refusal::Overloaded));
            }
        };
        if let Some(by) = fallback
            && let Some(response) = self.stored(entry, question).await
        {
            return (response, Outcome::Stale(by, StaleWhy::Error(failure)));
        }
        (respond::failed(failure), Outcome::Failed(failure))
    }

    /// Asks for the part that a client wants of what is not stored.
    async fn fetch_part(&self, question: &Question<'_>) -> Result<Response<Reply>, Failure> {
        let job = self.job(question, None);
        let response = self.pass(Some(question.route), question.parts, crate::body::empty(), question.origin, true).await?;
        self.fetcher.remember_part(&job, response).await.map(deliver)
    }

    /// An answer that was fetched for everyone who waits. `Ok(None)`: it is not for this request after all.
    async fn shared(&self, question: &Question<'_>, fill: &Arc<Fill>, can_fall_back: bool) -> Result<Option<Response<Reply>>, Failure> {
        let head = &fill.head;
        let headers = &question.parts.headers;
        let (fields, selected) = &head.vary;
        if !fields.is_empty() && selection(fields, headers) != *selected {
            return Ok(None);
        }
        if can_fall_back {
            if is_failure(head.status) {
                return Err(Failure::Status(head.status.as_u16()));
            }
            whole(fill, self.timeout).await?;
        }
        if head.stored && head.length.is_some_and(|length| length <= SMALL) {
            let settled = timeout(SETTLE, fill.settled()).await.ok().flatten();
            if let Some(response) = self.stored(settled.as_ref(), question).await {
                return Ok(Some(response));
            }
        }
        match fill.broken() {
            // Nothing was sent yet, so the client can be told.
            Some(failure) => Err(failure),
            None => Ok(respond::from_fill(fill, headers)),
        }
    }

    /// Asks for this client alone, though the rule caches.
    async fn go_alone(&self, question: &Question<'_>, too_long: bool) -> Result<Response<Reply>, Failure> {
        let _place = if too_long { Some(self.fetcher.let_through().await?) } else { None };
        self.pass(Some(question.route), question.parts, crate::body::empty(), question.origin, false).await.map(deliver)
    }

    /// Asks the backend for one client alone; with `teaches` the cache may learn from the answer.
    async fn pass(
        &self,
        route: Option<&Route>,
        parts: &request::Parts,
        body: Stream,
        origin: Origin<'_>,
        teaches: bool,
    ) -> Result<Response<Stream>, Failure> {
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = parts.uri.clone();
        *request.headers_mut() = if teaches { forward::for_lesson(parts, origin) } else { forward::for_pass(parts, origin) };
        if !(request.body().is_end_stream() || matches!(parts.method, Method::POST | Method::PUT | Method::PATCH)) {
            // A backend that expects no body there may take it for the next request on that connection.
            request.headers_mut().append(CONNECTION, http::HeaderValue::from_static("close"));
        }
        if let Some(interim) = origin.interim {
            interim.accompany(request.extensions_mut()).await;
        }
        let conditional = parts.headers.contains_key(IF_NONE_MATCH) || parts.headers.contains_key(IF_MODIFIED_SINCE);
        let name = route.map_or("none", |route| route.name.as_str());
        match self.upstream.call(name, request, self.body_timeout).await {
            // Nobody asked for it, so it answers nothing.
            Ok(response) if response.status() == StatusCode::NOT_MODIFIED && !conditional => Err(Failure::Invalid),
            Ok(response) => Ok(response),
            Err(error) => Err(Failure::from(&error)),
        }
    }

    fn job(&self, question: &Question<'_>, entry: Option<&Arc<Entry>>) -> Job {
        let mut request = Request::new(());
        *request.method_mut() = Method::GET;
        *request.uri_mut() = question.parts.uri.clone();
        *request.headers_mut() = forward::for_fetch(question.parts, question.origin);
        let conditions = entry.map(|entry| entry.conditions()).unwrap_or_default();
        let stale = entry.filter(|_| !conditions.is_empty()).cloned();
        request.headers_mut().extend(conditions);
        if let Some(credentials) = question.parts.headers.get(AUTHORIZATION) {
            request.headers_mut().insert(AUTHORIZATION, credentials.clone());
        }
        Job {
            stale,
            stands_in: entry.is_some_and(|entry| entry.may_stand_in(question.now)),
            key: Key::new(question.route, question.target, question.canonical.clone()),
            flight: question.flight().clone(),
            address: question.address(),
            route: question.route.name.clone(),
            authority: forward::request_authority(question.parts),
            by_language: question.route.by_language,
            by_parts: question.route.by_parts,
            asked: Instant::now(),
            grant: Grant { authorized: question.authorized.is_some(), ..question.route.grant(question.target, question.now) },
            request: request.into_parts().0,
        }
    }

    /// Says what became of the request: in the answer, in the metrics, in the access log.
    fn finish(
        &self,
        mut visit: Visit<'_>,
        route: Option<&Route>,
        parts: &request::Parts,
        client: &Client,
        mut response: Response<Reply>,
        outcome: Outcome,
    ) -> Response<Reply> {
        let (row, name) = route.map_or((self.metrics.none_row(), "none"), |route| (route.index, route.name.as_str()));
        let headers = response.headers_mut();
        forward::relocate(headers, &self.authorities, parts, client, self.public.as_ref());
        headers.insert(http::HeaderName::from_static("cache-status"), outcome.cache_status());
        headers.insert(forward::REQUEST_ID, visit.take_id());
        self.metrics.record(row, name, &outcome, response.status().as_u16(), visit.elapsed());
        visit.end(self.access, name, parts, client.address, response, &outcome)
    }
}

/// A decision about an entry, after the client was heard.
fn heeded(wishes: &Wishes, decision: Decision, entry: &Entry, now: Wall) -> Decision {
    let since = now.since(entry.stored_at);
    let by = since.checked_sub(entry.lives.fresh);
    let lenient = match &entry.content {
        Content::Answer(answer) => {
            let control = CacheControl::of(&answer.fields);
            // What was stale when it came was so by more than is known here.
            !(entry.lives.fresh.is_zero() || control.must_revalidate || control.no_cache || control.s_maxage.is_some())
        }
        Content::Varies(_) => false,
    };
    wishes.heed(decision, Duration::from_secs(entry.age(now)), by, lenient)
}

/// Makes the backend's answer fit for the one client that gets it.
fn deliver(response: Response<Stream>) -> Response<Reply> {
    let mut response = response.map(Reply::Stream);
    // What comes as it is read may end in trailers.
    let trailer = response.headers().get(TRAILER).cloned();
    forward::clean_answer(response.headers_mut());
    if let Some(trailer) = trailer {
        response.headers_mut().insert(TRAILER, trailer);
    }
    response.headers_mut().append(http::header::VIA, http::HeaderValue::from_static(VIA));
    response
}
