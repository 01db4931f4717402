//! The fetch itself: asks the upstream, judges what may be done with the response, gives it to those who wait while it
//! arrives, and stores it.

use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_LENGTH, CONTENT_RANGE, IF_MODIFIED_SINCE, IF_NONE_MATCH, VARY};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, response};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::collapse::Leader;
use super::failing::LONGEST_RETRY_AFTER;
use super::fill::{Fill, Head, NotHeld, Writer};
use super::marks::Why;
use super::partial::Beginning;
use super::{Fetcher, Job, Private};
use crate::body::{self, Stream};
use crate::cache::entry::Content;
use crate::clock::Wall;
use crate::http::cache_control::CacheControl;
use crate::http::encoding::Coding;
use crate::http::endless::is_endless;
use crate::http::freshness::{FreshnessPolicy, Lifetimes, Unstorable, Verdict, is_failure, verdict};
use crate::http::headers;
use crate::http::taken_back::takes_back;
use crate::http::vary::{Vary, content_language};
use crate::telemetry::seldom::Seldom;
use crate::upstream::failure::{BrokenBody, Failure};
use crate::upstream::response_fields;

/// A backend that breaks off may do so as often as a client asks.
static BROKE_OFF: Seldom = Seldom::new();
/// And so may one that misunderstands validators.
static UNASKED_304: Seldom = Seldom::new();

/// More fields than this are not told to an upstream that names them in `Vary`.
const MOST_NAMED: usize = 16;
/// A body whose readers kept it waiting for so long breaks off by their fault, not the upstream's.
const PAUSED: Duration = Duration::from_secs(1);
/// So often an upstream is asked again because it named other fields than it was told.
const MOST_TRIES: u32 = 2;

/// A response whose body is on its way.
pub(super) struct Arrived {
    /// Its head.
    pub head: response::Parts,
    /// When that came.
    pub came: Instant,
    /// The request fields by which it varies.
    pub names: Vec<HeaderName>,
    /// The length of its body, as far as that is known.
    pub length: Option<u64>,
    /// How long it lives, if it is meant to be stored.
    pub stored: Option<Lifetimes>,
}

impl Fetcher {
    /// One fetch, from the request to the stored response. `private` gets the response if it is for one client alone; it
    /// leads nowhere where no client asked.
    pub(super) async fn lead(self: Arc<Self>, mut job: Job, leader: Leader, private: oneshot::Sender<Private>) {
        let (response, came) = match self.answer(&mut job, &leader).await {
            Ok(answer) => answer,
            Err(failure) => {
                self.failing.failed(job.address(), failure);
                // Given up for another's sake, or without a place: begun again by the next hit it would only be given up again.
                if job.party.address.is_none() && matches!(failure, Failure::Lost | Failure::Overloaded) {
                    self.failing.put_off(&job.collapse_key, None);
                }
                return leader.fail(failure);
            }
        };
        match is_failure(response.status()) {
            true => self.failing.failed_with(job.address(), response.status().as_u16(), retry_after(response.headers())),
            false => self.failing.answered(&job.party.rule),
        }
        if job.found.is_some() && !is_failure(response.status()) {
            // Until something is stored: whatever keeps that from happening would be asked for again and again.
            self.failing.put_off(&job.collapse_key, retry_after(response.headers()));
        }
        let (response, may_be_stored) = tokio::select! {
            contracted = self.as_contracted(&job, response) => contracted,
            failure = leader.given_up() => return leader.fail(failure),
        };
        self.note_whether_shared(&job, &response);
        let status = response.status();
        if let Some(why) = for_its_credentials(&job, response.headers()) {
            self.unstored.note(&job.collapse_key, why, status.as_u16());
            // Of what others have, and of what they will be answered, it says nothing.
            if let Some(key) = job.credentials_key.as_ref().filter(|_| takes_back(status)) {
                self.uncacheable.note(key, Why::Credentials);
            }
            return self.deliver_privately(&job, leader, private, response);
        }
        let Vary::Fields(names) = Vary::of(response.headers()) else {
            self.unstored.note(&job.collapse_key, Unstorable::VaryAny, status.as_u16());
            self.end_replaced(&job, status).await;
            self.note_private(&job, status);
            return self.deliver_privately(&job, leader, private, response);
        };
        let verdict = self.judge(&job.policy, job.requested_host.as_ref(), &response);
        if let Verdict::Private(why) | Verdict::Share(why) = verdict {
            self.unstored.note(&job.collapse_key, why, status.as_u16());
        }
        let lifetimes = match verdict {
            // An error must not take the place of what may be served instead of it.
            Verdict::Store(_) if job.replaces_errors && is_failure(response.status()) => None,
            Verdict::Store(lifetimes) | Verdict::StoreForValidation(lifetimes) => {
                // What was said of an earlier one is not why this one is not stored, if it is not.
                self.unstored.remove(&job.collapse_key);
                Some(lifetimes).filter(|_| may_be_stored)
            }
            Verdict::Share(_) => None,
            Verdict::Private(_) => {
                self.end_replaced(&job, status).await;
                self.note_private(&job, status);
                return self.deliver_privately(&job, leader, private, response);
            }
        };
        let (head, body) = response.into_parts();
        let length = body.size_hint().exact();
        let fits = length.is_none_or(|length| length <= self.settings.max_object as u64);
        let stored = lifetimes.filter(|_| fits);
        let (fill, writer) = self.start_fill(&job, Arrived { head, came, names, length, stored });
        if stored.is_none() {
            self.end_replaced(&job, status).await;
        }
        let passing = fill.passing();
        if passing == Some(NotHeld::TooLarge) {
            self.note_too_large(&job, status);
        }
        // One that is not held is read at the pace of the client that asked, and no other depends on that. One that must be validated is for
        // the one who asked, and for those to come once the upstream has been asked again.
        if passing.is_some() || matches!(verdict, Verdict::StoreForValidation(_)) {
            if let Some(response) = fill.reader().map(|reader| fill.head.response(reader.boxed_unsync())) {
                drop(private.send(Private::Response(response)));
            }
            leader.unshare();
            return self.transfer(&job, None, &fill, writer, body, lifetimes).await;
        }
        leader.share(Arc::clone(&fill));
        self.transfer(&job, Some(leader), &fill, writer, body, lifetimes).await;
    }

    /// The upstream's answer, and when its head came; a 304 as what it freshens. One that is about another response than the stored one, or
    /// about one that is damaged here, would come each time: then the upstream is asked once more, without conditions (RFC 9111 §4.3.3).
    async fn answer(&self, job: &mut Job, leader: &Leader) -> Result<(Response<Stream>, Instant), Failure> {
        let response = self.negotiate(job, leader).await?;
        let mut came = Instant::now();
        let mut validated = self.validated(job, response).await;
        if validated.is_none() && job.validated.take().is_some() {
            for condition in [IF_NONE_MATCH, IF_MODIFIED_SINCE] {
                job.request.headers.remove(condition);
            }
            let response = self.negotiate(job, leader).await?;
            came = Instant::now();
            validated = self.validated(job, response).await;
        }
        if validated.is_none()
            && let Some(left_out) = UNASKED_304.next()
        {
            tracing::warn!(route = &*job.party.rule, left_out, "the backend answered 304 to what was not asked; it counts as a failure");
        }
        Ok((validated.ok_or(Failure::Invalid)?, came))
    }

    /// Asks until the upstream was told what it names in `Vary`, and nothing else that the cache key does not hold. What it
    /// names is remembered, so that the next request needs no second try.
    async fn negotiate(&self, job: &mut Job, leader: &Leader) -> Result<Response<Stream>, Failure> {
        let mut tries = 0;
        loop {
            let mut response = self.ask(job, leader).await?;
            let Vary::Fields(named) = Vary::of(response.headers()) else { return Ok(response) };
            if !job.negotiable.tell(&named, &mut job.request.headers) {
                return Ok(response);
            }
            tries += 1;
            if named.len() > MOST_NAMED || tries > MOST_TRIES {
                // It never names the same ones: nothing is known of what it depends on, and this response is for nobody.
                job.negotiable.tell(&[], &mut job.request.headers);
                response.headers_mut().insert(VARY, HeaderValue::from_static("*"));
                return Ok(response);
            }
            self.varying.insert(&job.key.canonical.0, named.into());
        }
    }

    /// Asks the upstream for the whole response: for the rest alone where the beginning is known, and for all of it where the
    /// two do not belong together.
    async fn ask(&self, job: &Job, leader: &Leader) -> Result<Response<Stream>, Failure> {
        let known = job.complete_ranges.then(|| self.beginnings.get(&job.collapse_key, job.key.target, self.cache.voids())).flatten();
        let max_object = self.settings.max_object as u64;
        let Some(beginning) = known.filter(|known| known.length() <= max_object) else { return self.call(job, leader, None).await };
        let (mut head, rest) = self.call(job, leader, Some(&beginning)).await?.into_parts();
        match head.status {
            // It was asked whether what is stored still holds.
            StatusCode::NOT_MODIFIED => return Ok(Response::from_parts(head, rest)),
            // The whole comes, or comes next.
            _ => self.beginnings.remove(&job.collapse_key),
        }
        match head.status {
            StatusCode::OK => Ok(Response::from_parts(head, rest)),
            StatusCode::PARTIAL_CONTENT if beginning.is_continued_by(&head.headers, rest.size_hint().exact()) => {
                head.status = StatusCode::OK;
                head.headers.remove(CONTENT_RANGE);
                head.headers.remove(CONTENT_LENGTH);
                Ok(Response::from_parts(head, beginning.join(rest)))
            }
            // An answer to Sluice's own `Range` is none for those who asked for the whole.
            _ => {
                // Its place is needed for the whole.
                drop(rest);
                self.call(job, leader, None).await
            }
        }
    }

    /// Asks once. If all who wait leave before the request is sent, it is not sent; once it is, the upstream works on an answer
    /// that may be stored, and is asked to the end unless another request needs the place.
    async fn call(&self, job: &Job, leader: &Leader, beginning: Option<&Beginning>) -> Result<Response<Stream>, Failure> {
        let mut request = Request::from_parts(job.request.clone(), body::empty());
        if let Some(beginning) = beginning {
            beginning.ask_for_rest(request.headers_mut());
        }
        let is_awaited = job.party.address.is_some();
        let admitted = tokio::select! {
            admitted = self.upstream.admit(leader.askers(), request) => admitted,
            () = leader.abandoned(), if is_awaited => return Err(Failure::Lost),
        };
        let response = match admitted {
            Ok(admitted) => {
                // Sluice's own is given up too, unless a client waits for it by then.
                admitted.is_for(leader.work());
                tokio::select! {
                    response = self.upstream.call_admitted(admitted, self.settings.silence) => response,
                    failure = leader.given_up() => {
                        self.upstream.count_given_up(&job.party.rule, job.began);
                        return Err(failure);
                    }
                }
            }
            Err(error) => Err(error),
        };
        let mut response = response.map_err(|error| Failure::from(&error))?;
        response_fields::clean(response.headers_mut());
        Ok(response)
    }

    /// The response; a 304 as the stored response that it freshens. `None`: a 304 that was not asked for, or that is about
    /// something else, answers nothing.
    async fn validated(&self, job: &Job, response: Response<Stream>) -> Option<Response<Stream>> {
        if response.status() != StatusCode::NOT_MODIFIED {
            return Some(response);
        }
        self.freshen(job.validated.as_deref()?, response.headers()).await
    }

    /// Notes whether all who have credentials may wait for one fetch of this request. An error or a redirect, to wrong credentials
    /// maybe, says nothing of that.
    fn note_whether_shared(&self, job: &Job, response: &Response<Stream>) {
        let (key, control) = (&job.key.canonical.0, CacheControl::of(response.headers()));
        if control.shares_authorized() && !control.private && !control.no_store {
            self.shared.insert(key, ());
        } else if response.status().is_success() {
            self.shared.remove(key);
        }
    }

    /// A response as the contract has it where that matters, and whether it may be stored.
    pub(super) async fn as_contracted(&self, job: &Job, response: Response<Stream>) -> (Response<Stream>, bool) {
        if job.is_buckets { self.contracted(response).await } else { (response, true) }
    }

    /// What may be done with a response (RFC 9111 §3).
    pub(super) fn judge(&self, policy: &FreshnessPolicy, requested_host: Option<&HeaderValue>, response: &Response<Stream>) -> Verdict {
        let (status, fields) = (response.status(), response.headers());
        if status.is_redirection() && response_fields::reflects_host(fields, requested_host, &self.authorities) {
            return Verdict::Private(Unstorable::Reflection);
        }
        if is_endless(fields, response.body().size_hint().exact()) {
            return Verdict::Private(Unstorable::Endless);
        }
        verdict(policy, status, fields, Wall::now())
    }

    /// Ends what is stored for the request, if the answer does not allow it to be kept.
    async fn end_replaced(&self, job: &Job, status: StatusCode) {
        let Some(entry) = job.replaced.as_ref().filter(|_| takes_back(status)) else { return };
        self.cache.end(&entry.key()).await;
        // Those who prefer its language find it under another key.
        if let Content::Response(stored) = &entry.content
            && let Some(language) = content_language(&stored.fields).filter(|_| job.match_language)
        {
            self.cache.end(&job.key.language(&language)).await;
        }
    }

    /// A fill for the body of a response.
    pub(super) fn start_fill(&self, job: &Job, arrived: Arrived) -> (Arc<Fill>, Writer) {
        let Arrived { head, came, names, length, stored } = arrived;
        let (coding, mut fields) = (Coding::of(&head.headers), head.headers);
        fields.remove(CONTENT_LENGTH);
        let selected = job.selecting.selected(&names);
        let life = stored.map(|stored| stored.fresh.saturating_add(stored.stale_while_revalidate));
        let (status, stored) = (head.status, stored.is_some());
        let head = Head { status, fields, came, life, coding, length, stored, vary: (names, selected) };
        Fill::start(head, self.settings.max_object, Arc::clone(&self.budget))
    }

    /// Notes that all of a response came, which speaks for its key unless it says itself that the upstream failed.
    fn note_whole(&self, job: &Job, status: StatusCode) {
        if !is_failure(status) {
            self.failing.succeeded(&job.collapse_key);
        }
    }

    /// Notes that requests to come need not wait for each other, since a response was for one client alone.
    fn note_private(&self, job: &Job, status: StatusCode) {
        // What a client did wrong says nothing about the next one, and that the upstream failed nothing about when it works again: else one
        // error page would have all requests of a hot key sent to an upstream that is just coming back.
        if !status.is_client_error() && !status.is_server_error() {
            self.uncacheable.note(&job.collapse_key, Why::Private);
        }
    }

    /// The same where a response was too large to be stored.
    fn note_too_large(&self, job: &Job, status: StatusCode) {
        self.unstored.note(&job.collapse_key, Unstorable::TooLarge, status.as_u16());
        if !status.is_server_error() {
            self.uncacheable.note(&job.collapse_key, Why::TooLarge);
        }
    }

    /// Gives a response to the one client that it is for. Those who waited ask by themselves.
    fn deliver_privately(&self, job: &Job, leader: Leader, private: oneshot::Sender<Private>, response: Response<Stream>) {
        self.note_whole(job, response.status());
        let answer = if job.negotiable.withholds() { Private::AskAgain } else { Private::Response(response) };
        // A client that left, or a revalidation, has no use for it.
        drop(private.send(answer));
        leader.unshare();
    }

    /// Notes that the body of a response was not held for the cache. One that is too large is no answer that could be kept: requests to
    /// come need not wait for each other, and what it was to replace is not kept either. The other reasons are Sluice's own or those of
    /// clients that left, and say nothing of what is stored.
    async fn note_not_held(&self, job: &Job, fill: &Fill, why: NotHeld) {
        if why != NotHeld::TooLarge {
            return;
        }
        self.note_too_large(job, fill.head.status);
        // What was not to be stored has ended it by now, if it does at all.
        if fill.head.stored {
            self.end_replaced(job, fill.head.status).await;
        }
    }

    /// Reads the body into the fill, and stores what it holds in the end.
    ///
    /// A request that comes while the leader lives follows this fetch, unless the response's life is over by then. For what is stored the
    /// leader therefore lives until the entry can be found in the cache; for what is not, only until the last bytes are read, so that
    /// nobody is given what others had all of already.
    pub(super) async fn transfer(
        &self,
        job: &Job,
        leader: Option<Leader>,
        fill: &Arc<Fill>,
        writer: Writer,
        mut body: Stream,
        lifetimes: Option<Lifetimes>,
    ) {
        let mut left = fill.head.length;
        let keep = |leader: Option<Leader>, left: Option<u64>| leader.filter(|_| lifetimes.is_some() || left != Some(0));
        let mut leader = keep(leader, left);
        let mut was_held_up = false;
        loop {
            let frame = tokio::select! {
                biased;
                frame = body.frame() => frame,
                () = fill.useless(lifetimes.is_some()) => return,
            };
            let Some(frame) = frame else { break };
            let chunk = match frame.map(Frame::into_data) {
                Ok(Ok(chunk)) => chunk,
                Ok(Err(_trailers)) => continue,
                Err(error) => {
                    let failure = BrokenBody::failure(&error);
                    if failure != Failure::Overloaded
                        && let Some(left_out) = BROKE_OFF.next()
                    {
                        tracing::warn!(route = &*job.party.rule, %error, left_out, "the backend's body broke off; it was not stored");
                    }
                    // An upstream has deadlines too, and waits for those who do not read no longer than these.
                    if !was_held_up {
                        self.failing.failed(job.address(), failure);
                    }
                    drop(leader);
                    return writer.fail(failure);
                }
            };
            left = left.map(|left| left.saturating_sub(chunk.len() as u64));
            leader = keep(leader, left);
            let pushing = Instant::now();
            if let Err(why) = writer.push(chunk).await {
                return self.note_not_held(job, fill, why).await;
            }
            was_held_up |= pushing.elapsed() >= PAUSED;
        }
        let leader = leader.filter(|_| lifetimes.is_some());
        self.note_whole(job, fill.head.status);
        match (writer.complete(), lifetimes) {
            (Ok(bytes), Some(lifetimes)) => self.store(job, leader, fill, bytes, lifetimes).await,
            (Ok(_), None) => {}
            (Err(why), _) => self.note_not_held(job, fill, why).await,
        }
    }
}

/// Why a response is for the credentials of its request alone: it does not say that others may have it (RFC 9111 §3.5), or says
/// that they may not. `None`: it is not.
fn for_its_credentials(job: &Job, fields: &HeaderMap) -> Option<Unstorable> {
    if !job.policy.authorized {
        return None;
    }
    let control = CacheControl::of(fields);
    if control.no_store && !control.must_understand {
        return Some(Unstorable::NoStore);
    }
    if control.private {
        return Some(Unstorable::Private);
    }
    (!control.shares_authorized()).then_some(Unstorable::Authorized)
}

/// For how long the upstream is not to be asked again, as far as that is obeyed.
fn retry_after(fields: &HeaderMap) -> Option<Duration> {
    headers::retry_after(fields, Wall::now()).map(|after| after.min(LONGEST_RETRY_AFTER))
}
