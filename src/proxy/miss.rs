//! What happens off the hit path where the cache has a say: the upstream is asked through a fetch that others may share.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response};
use tokio::time::{Instant, timeout};

use super::answer::Answer;
use super::asked::{CacheableRequest, party};
use super::decide::{Decision, is_early};
use super::lookup::is_for;
use super::outcome::{FetchWhy, Fetched as FetchedOutcome, Outcome, PassWhy, StaleWhy};
use super::pass::deliver;
use super::spent::Step;
use super::{Proxy, respond};
use crate::body::{self, Reply, Stream};
use crate::cache::entry::Entry;
use crate::cache::key::{Canonical, Key};
use crate::config::rate_limit::Counts;
use crate::fetch::fill::{End, Fill, Head};
use crate::fetch::{Fetched, Job};
use crate::http::cache_control::CacheControl;
use crate::http::encoding::{Coding, accepts_gzip};
use crate::http::endless::asks_for_events;
use crate::http::freshness::{FreshnessPolicy, Unstorable, is_failure};
use crate::http::request_directives::RequestDirectives;
use crate::request::client::request_authority;
use crate::request::refusal::Refusal;
use crate::upstream::failure::Failure;
use crate::upstream::request_fields::{self, Negotiable, is_keyed_range};

/// A small response that was just fetched is waited for this long: then it is sent with its validator, as it is stored.
const SETTLE: Duration = Duration::from_millis(20);
/// The body of a response that may be replaced by a stale one is waited for this long before its head is sent.
const WHOLE: Duration = Duration::from_millis(250);
/// Responses of up to this many bytes count as small.
const SMALL: u64 = 64 << 10;
/// After this many fetches that were answered for others a request is passed.
const MOST_TURNS: usize = 3;

impl Proxy {
    /// Answers from the upstream, through a fetch that others may share.
    ///
    /// `stored` is what is stored and cannot be served as it is; `fallback` says how long ago it went stale, if it may be
    /// served should the upstream fail.
    pub(super) async fn fetch(
        &self,
        request: &mut CacheableRequest<'_>,
        why: FetchWhy,
        stored: Option<Arc<Entry>>,
        fallback: Option<Duration>,
    ) -> Answer {
        if !request.spent.on(Step::Limit, request.limits.take(Counts::Backend)).await {
            return match self.respond(request, stored.as_ref().filter(|_| fallback.is_some())).await {
                Some(response) => Answer { response, outcome: Outcome::Stale(fallback.unwrap_or_default(), StaleWhy::Limited) },
                None => self.refuse_limited(&request.route.name),
            };
        }
        if request.route.complete_ranges
            && stored.is_none()
            && request.parts.method == Method::GET
            && is_keyed_range(request.parts, &request.route.request_fields)
        {
            return self.fetch_range(request).await;
        }
        let failure = match self.fetch_or_pass(request, why, stored.as_ref(), fallback.is_some()).await {
            Ok(answer) => return answer,
            Err(failure) => failure,
        };
        if let Some(by) = fallback
            && let Some(response) = self.respond(request, stored.as_ref()).await
        {
            return Answer { response, outcome: Outcome::Stale(by, StaleWhy::Error(failure)) };
        }
        Answer::failed(failure)
    }

    /// The answer of a fetch, or of a request of its own where the fetch's response is not for this client. With a fallback
    /// an error response of the upstream's counts as its failure.
    async fn fetch_or_pass(
        &self,
        request: &mut CacheableRequest<'_>,
        why: FetchWhy,
        stored: Option<&Arc<Entry>>,
        has_fallback: bool,
    ) -> Result<Answer, Failure> {
        let mut stored = stored.cloned();
        for _ in 0..MOST_TURNS {
            if let Some(answer) = self.fetch_with_others(request, why, stored.as_ref(), has_fallback).await? {
                return Ok(answer);
            }
            // What came is for others. What this request selects may be stored by now; if not, it is fetched under its own key.
            let key = request.variant.clone().unwrap_or_else(|| request.canonical.clone());
            let found = self.find(request, &key).await.filter(|entry| is_for(request, entry)).ok_or(FetchWhy::VaryMiss);
            if let Decision::Hit(left) = self.decide(request, &found)
                && let Some(response) = self.respond(request, found.as_ref().ok()).await
            {
                return Ok(Answer { response, outcome: Outcome::Hit(left) });
            }
            stored = found.ok();
        }
        self.pass_as_uncacheable(request, has_fallback).await
    }

    /// One fetch, that others may share. `None`: what came is not for this request, whose key says now what it is to ask for.
    async fn fetch_with_others(
        &self,
        request: &mut CacheableRequest<'_>,
        why: FetchWhy,
        stored: Option<&Arc<Entry>>,
        has_fallback: bool,
    ) -> Result<Option<Answer>, Failure> {
        if request.shared && self.has_own_answer(request) {
            // Those who wait for what all may have do not wait for this one.
            request.shared = false;
        }
        let key = request.collapse_key();
        if self.fetcher.is_uncacheable(&key) {
            let response = not_failed(self.pass_uncacheable(request, &key).await?, has_fallback)?;
            return Ok(Some(Answer { response, outcome: Outcome::Pass(PassWhy::Uncacheable(self.why_unstored(&key))) }));
        }
        let fetched = if asks_for_events(&request.parts.headers) {
            Fetched::NotShared
        } else {
            let mut job = self.job(request, stored);
            if let Some(interim) = request.forwarding.interim {
                interim.attach(&mut job.request.extensions).await;
            }
            request.spent.on(Step::Fetch, self.fetcher.fetch(job)).await
        };
        let fetched_as = |stored: bool, collapsed| {
            let unstored = if stored { None } else { self.why_unstored(&key) };
            Outcome::Fetched(FetchedOutcome { why, stored, collapsed, unstored })
        };
        match fetched {
            Fetched::Shared { fill, .. } if !is_selected_by(request, &fill) => Ok(None),
            Fetched::Stored(entry) if !is_for(request, &entry) => {
                request.shared = false;
                Ok(None)
            }
            Fetched::Shared { fill, collapsed } => {
                match request.spent.on(Step::Fetch, self.respond_from_fill(request, &fill, has_fallback)).await? {
                    Some(response) => Ok(Some(Answer { response, outcome: fetched_as(fill.head.stored, collapsed) })),
                    // Its beginning is gone.
                    None => self.pass_as_uncacheable(request, false).await.map(Some),
                }
            }
            Fetched::Stored(entry) => match self.respond(request, Some(&entry)).await {
                Some(response) => Ok(Some(Answer { response, outcome: fetched_as(true, true) })),
                None => self.pass_as_uncacheable(request, has_fallback).await.map(Some),
            },
            Fetched::Private(response) => {
                let response = not_failed(deliver(respond::recode(response, &request.parts.headers)), has_fallback)?;
                Ok(Some(Answer { response, outcome: fetched_as(false, false) }))
            }
            Fetched::NotShared => self.pass_as_uncacheable(request, has_fallback).await.map(Some),
            Fetched::TooSlow(_place) => self.pass_because(request, PassWhy::WaitedTooLong, has_fallback).await.map(Some),
            Fetched::Failed(failure) => Err(failure),
            Fetched::Full if has_fallback => Err(Failure::Overloaded),
            Fetched::Full => {
                self.metrics.rate_limited.with_label_values(&[&request.route.name]).inc();
                Ok(Some(Answer::refused(Refusal::Overloaded)))
            }
        }
    }

    /// The response that a fetch shares, for this client, whom it is for. `None`: its beginning is gone.
    async fn respond_from_fill(
        &self,
        request: &CacheableRequest<'_>,
        fill: &Arc<Fill>,
        has_fallback: bool,
    ) -> Result<Option<Response<Reply>>, Failure> {
        let head = &fill.head;
        if has_fallback {
            if is_failure(head.status) {
                return Err(Failure::Status(head.status.as_u16()));
            }
            wait_for_whole(fill).await?;
        }
        if head.stored && head.length.is_some_and(|length| length <= SMALL) {
            let entry = timeout(SETTLE, fill.settled()).await.ok().flatten();
            if let Some(response) = self.respond(request, entry.as_ref()).await {
                return Ok(Some(response));
            }
        }
        match fill.broken() {
            // Nothing was sent yet, so the client can be told.
            Some(failure) => Err(failure),
            None => Ok(respond::from_fill(fill, &request.parts.headers).map(|response| without_length(request, head, response))),
        }
    }

    /// Asks for the range that a client wants of what is not stored.
    async fn fetch_range(&self, request: &CacheableRequest<'_>) -> Answer {
        let job = self.job(request, None);
        let result = match self.send(Some(request.route), request.parts, body::empty(), request.forwarding, true).await {
            Ok(response) => self.fetcher.beginnings().remember(&job.collapse_key, &job.policy, job.asked_at, response).await,
            Err(error) => Err(Failure::from(&error)),
        };
        match result {
            Ok(response) => Answer { response: deliver(response), outcome: Outcome::Pass(PassWhy::Part) },
            Err(failure) => Answer::failed(failure),
        }
    }

    /// Asks for a client that wants nothing stored.
    pub(super) async fn fetch_unstored(&self, request: &CacheableRequest<'_>) -> Answer {
        if !request.spent.on(Step::Limit, request.limits.take(Counts::Backend)).await {
            return self.refuse_limited(&request.route.name);
        }
        match self.pass_alone(request).await {
            Ok(response) => Answer { response, outcome: Outcome::Pass(PassWhy::NoStore) },
            Err(failure) => Answer::failed(failure),
        }
    }

    /// Why the last response for a key was not stored, if it was not.
    fn why_unstored(&self, key: &Canonical) -> Option<Unstorable> {
        self.fetcher.last_unstored(key).map(|last| last.why)
    }

    /// Asks for this client alone, since what was fetched is not for it.
    async fn pass_as_uncacheable(&self, request: &CacheableRequest<'_>, has_fallback: bool) -> Result<Answer, Failure> {
        let why = PassWhy::Uncacheable(self.why_unstored(&request.collapse_key()));
        self.pass_because(request, why, has_fallback).await
    }

    /// Asks for this client alone, and says why. With a fallback an error response counts as a failure.
    async fn pass_because(&self, request: &CacheableRequest<'_>, why: PassWhy, has_fallback: bool) -> Result<Answer, Failure> {
        let response = not_failed(self.pass_alone(request).await?, has_fallback)?;
        Ok(Answer { response, outcome: Outcome::Pass(why) })
    }

    /// Asks for this client alone, since responses for its key turned out uncacheable; and sees whether this one is too.
    async fn pass_uncacheable(&self, request: &CacheableRequest<'_>, key: &Canonical) -> Result<Response<Reply>, Failure> {
        let response = self.send_alone(request).await?;
        // A response to HEAD has no body whose length could say anything.
        if request.parts.method == Method::GET {
            let host = request_authority(request.parts);
            self.fetcher.note_passed(key, &policy_of(request), host.as_ref(), &response);
        }
        Ok(deliver(response))
    }

    /// Asks for this client alone, though the rule caches.
    async fn pass_alone(&self, request: &CacheableRequest<'_>) -> Result<Response<Reply>, Failure> {
        self.send_alone(request).await.map(deliver)
    }

    async fn send_alone(&self, request: &CacheableRequest<'_>) -> Result<Response<Stream>, Failure> {
        let sent = self.send(Some(request.route), request.parts, body::empty(), request.forwarding, false);
        let response = request.spent.on(Step::Pass, sent).await.map_err(|error| Failure::from(&error))?;
        Ok(if request.is_for_buckets() { self.fetcher.contracted(response).await.0 } else { response })
    }

    /// Has a stored response that is served stale revalidated in the background.
    pub(super) fn revalidate(&self, request: &CacheableRequest<'_>, found: &Result<Arc<Entry>, FetchWhy>) {
        if !self.fetcher.failing().may_revalidate(&request.collapse_key()) {
            return;
        }
        self.fetcher.revalidate(self.job(request, found.as_ref().ok()));
    }

    /// Has a response that is fresh for `left` revalidated already, by chance, if it is asked for often: see [`is_early`].
    pub(super) fn refresh_if_early(&self, request: &CacheableRequest<'_>, found: &Result<Arc<Entry>, FetchWhy>, left: Duration) {
        let Ok(entry) = found else { return };
        let cost = Duration::from_millis(u64::from(entry.cost));
        if self.refresh_early
            && is_early(left, entry.lifetimes.fresh, cost, fastrand::f64)
            && request.parts.method == Method::GET
            && self.fetcher.failing().may_revalidate(&request.collapse_key())
        {
            self.fetcher.refresh_early(self.job(request, Some(entry)));
        }
    }

    /// The same where the upstream fails: only if it was spared for long enough.
    pub(super) fn revalidate_if_due(&self, request: &CacheableRequest<'_>, found: &Result<Arc<Entry>, FetchWhy>) {
        let (failing, key) = (self.fetcher.failing(), request.collapse_key());
        // One that may not be sent is nobody's trial.
        if !failing.is_put_off(&key) && failing.may_try(&request.route.name, &key) {
            self.revalidate(request, found);
        }
    }

    /// What a fetch needs to know of a request, which validates `stored` if it can.
    pub(super) fn job(&self, request: &CacheableRequest<'_>, stored: Option<&Arc<Entry>>) -> Job {
        let mut to_upstream = Request::new(());
        *to_upstream.method_mut() = Method::GET;
        *to_upstream.uri_mut() = request.parts.uri.clone();
        let rule = &request.route.request_fields;
        *to_upstream.headers_mut() = request_fields::for_fetch(request.parts, request.forwarding, rule);
        let mut negotiable = Negotiable::of(request.parts, rule);
        negotiable.tell(&self.fetcher.varies_by(&request.canonical), to_upstream.headers_mut());
        let conditions = stored.map(|entry| entry.conditions()).unwrap_or_default();
        let validated = stored.filter(|_| !conditions.is_empty()).cloned();
        to_upstream.headers_mut().extend(conditions);
        if request.authorized {
            request_fields::insert_credentials(to_upstream.headers_mut(), request.parts);
        }
        Job {
            request: to_upstream.into_parts().0,
            selecting: request.selecting().clone(),
            negotiable,
            key: Key::new(request.route, request.target, request.canonical.clone()),
            collapse_key: request.collapse_key(),
            credentials_key: request.credentials_key(),
            party: party(Some(request.route), request.forwarding),
            policy: policy_of(request),
            match_language: request.route.match_language,
            is_buckets: request.is_for_buckets(),
            complete_ranges: request.route.complete_ranges,
            wants_new: request.route.client_directives && RequestDirectives::of(&request.parts.headers).wants_new(),
            requested_host: request_authority(request.parts),
            found: stored.map(|entry| entry.asked_at),
            asked_at: self.cache.ask(),
            began: Instant::now(),
            replaced: stored.cloned(),
            validated,
            replaces_errors: stored.is_some_and(|entry| entry.may_replace_errors(request.now)),
        }
    }
}

/// How long a response to a request may live.
fn policy_of(request: &CacheableRequest<'_>) -> FreshnessPolicy {
    FreshnessPolicy { authorized: request.authorized, ..request.route.policy_for(request.target, request.now) }
}

/// Waits a little for a body to be whole, for a client that has something to fall back on if it breaks off. One that takes longer is
/// sent as it comes.
async fn wait_for_whole(fill: &Fill) -> Result<(), Failure> {
    match timeout(WHOLE, fill.end()).await {
        Ok(End::Broken(failure)) => Err(failure),
        Ok(End::Whole | End::Passing) | Err(_) => Ok(()),
    }
}

/// Whether a response that is being fetched is for this request. If not, its key is from now on that of what is.
fn is_selected_by(request: &mut CacheableRequest<'_>, fill: &Fill) -> bool {
    let (fields, selected) = &fill.head.vary;
    if request.authorized && request.shared && !CacheControl::of(&fill.head.fields).shares_authorized() {
        request.shared = false;
        return false;
    }
    if !fields.is_empty() && request.selecting().selected(fields) != *selected {
        request.variant = Some(request.canonical.variant(fields, request.selecting()));
        return false;
    }
    true
}

/// A response, unless it says that the upstream failed and there is something to fall back on.
fn not_failed(response: Response<Reply>, has_fallback: bool) -> Result<Response<Reply>, Failure> {
    match has_fallback && is_failure(response.status()) {
        true => Err(Failure::Status(response.status().as_u16())),
        false => Ok(response),
    }
}

/// The answer to HEAD says no length (RFC 9110 §8.6) where GET may get a body that Sluice has compressed by then.
fn without_length(request: &CacheableRequest<'_>, head: &Head, response: Response<Reply>) -> Response<Reply> {
    let may_be_compressed = head.stored && head.coding == Coding::Identity && accepts_gzip(&request.parts.headers);
    if request.parts.method == Method::HEAD && may_be_compressed {
        return response.map(|_| Reply::Stream(body::empty()));
    }
    response
}
