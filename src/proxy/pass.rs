//! Requests in which the cache has no say: passed to the upstream for one client alone, and what their responses mean for what
//! is stored. Those that may change something go through [`change`](super::change).

use std::sync::Arc;

use http::header::{CONNECTION, IF_MODIFIED_SINCE, IF_NONE_MATCH, TRAILER, VIA};
use http::{HeaderValue, Method, Request, Response, StatusCode, request};
use http_body::Body as _;

use super::Proxy;
use super::answer::Answer;
use super::asked::{Asked, CacheableRequest, party};
use super::change::Changed;
use super::outcome::{Outcome, PassWhy};
use super::spent::Step;
use crate::body::{ClientFault, Reply, Stream};
use crate::cache::void::Moment;
use crate::config::rate_limit::Counts;
use crate::config::route::Route;
use crate::fetch::Job;
use crate::fetch::other_methods::represents_its_target;
use crate::http::freshness::is_failure;
use crate::http::invalidation::is_unsafe;
use crate::request::refusal::Refusal;
use crate::upstream::BackendError;
use crate::upstream::failure::Failure;
use crate::upstream::request_fields::{self, Forwarding, is_fully_keyed};
use crate::upstream::response_fields::{self, OWN_VIA};

impl Proxy {
    /// Passes a request to the upstream.
    pub(super) async fn pass(self: &Arc<Self>, asked: Asked<'_>, why: PassWhy, body: Stream) -> Answer {
        let Asked { parts, route, forwarding, limits, spent, .. } = asked;
        if !spent.on(Step::Limit, limits.take(Counts::Backend)).await {
            return self.refuse_limited(route.map_or("none", |route| &route.name));
        }
        if let Some(route) = route.filter(|_| !parts.method.is_safe()) {
            route.written.note();
        }
        // Content in a HEAD has no meaning (RFC 9110 §9.3.2), and so has what is answered to it.
        let meaningful = parts.method != Method::HEAD || body.is_end_stream();
        let updating =
            route.filter(|route| meaningful && route.updates_from(&parts.method) && is_fully_keyed(parts, &route.request_fields));
        let storable = updating.is_some();
        let asked_at = self.cache.ask();
        let sent = if is_unsafe(&parts.method) {
            let changed = spent.on(Step::Pass, self.change(asked, body, storable)).await;
            self.note_answer(route, changed.as_ref().ok().map(|changed| &changed.response));
            changed
        } else {
            let sending = self.send(route, parts, body, forwarding, storable);
            spent.on(Step::Pass, sending).await.map(|response| Changed { response, is_newest: true, asked_at })
        };
        let Changed { response, is_newest, asked_at } = match sent {
            Ok(changed) => changed,
            Err(BackendError::Client(ClientFault::Broken)) => return Answer::refused(Refusal::BrokenBody),
            Err(BackendError::Client(ClientFault::Slow)) => return Answer::refused(Refusal::SlowBody),
            Err(error) => return Answer::failed(Failure::from(&error)),
        };
        let response = match updating.filter(|_| is_newest) {
            Some(route) => self.update_stored(CacheableRequest::new(route, asked), response, asked_at).await,
            None => response,
        };
        Answer { response: deliver(response), outcome: Outcome::Pass(why) }
    }

    /// Sends a client's own request to the upstream. With `storable` nothing in it depends on what the cache key does not
    /// hold, so that its response may be stored.
    pub(super) async fn send(
        &self,
        route: Option<&Route>,
        parts: &request::Parts,
        body: Stream,
        forwarding: Forwarding<'_>,
        storable: bool,
    ) -> Result<Response<Stream>, BackendError> {
        let (request, conditional) = self.to_upstream(route, parts, body, forwarding, storable).await;
        let party = party(route, forwarding);
        let answer = Self::understood(self.upstream.call(&party, request, self.body_timeout).await, conditional);
        self.note_answer(route, answer.as_ref().ok());
        answer
    }

    /// Notes that the upstream answered a client's own request, unless it said that it failed.
    fn note_answer(&self, route: Option<&Route>, answer: Option<&Response<Stream>>) {
        if answer.is_some_and(|response| !is_failure(response.status())) {
            self.fetcher.failing().answered(route.map_or("none", |route| &route.name));
        }
    }

    /// A client's own request as the upstream gets it, and whether it is conditional. To be called within the connection's own task.
    pub(super) async fn to_upstream(
        &self,
        route: Option<&Route>,
        parts: &request::Parts,
        body: Stream,
        forwarding: Forwarding<'_>,
        storable: bool,
    ) -> (Request<Stream>, bool) {
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = parts.uri.clone();
        *request.headers_mut() = match route.filter(|_| storable) {
            Some(route) => request_fields::for_storable_pass(parts, forwarding, &route.request_fields),
            None => request_fields::for_pass(parts, forwarding),
        };
        if !(request.body().is_end_stream() || matches!(parts.method, Method::POST | Method::PUT | Method::PATCH)) {
            // An upstream that expects no body there may take it for the next request on that connection.
            request.headers_mut().append(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(interim) = forwarding.interim {
            interim.attach(request.extensions_mut()).await;
        }
        let conditional = parts.headers.contains_key(IF_NONE_MATCH) || parts.headers.contains_key(IF_MODIFIED_SINCE);
        (request, conditional)
    }

    /// An answer that can be passed on.
    pub(super) fn understood(answer: Result<Response<Stream>, BackendError>, conditional: bool) -> Result<Response<Stream>, BackendError> {
        match answer {
            // Nobody asked for it, so it answers nothing.
            Ok(response) if response.status() == StatusCode::NOT_MODIFIED && !conditional => {
                Err(BackendError::Invalid("it answered 304 to what was not asked".into()))
            }
            result => result,
        }
    }

    /// What the response to a POST or a HEAD means for what is stored for GET (see [`crate::fetch::other_methods`]). What was voided after
    /// `asked_at` concerns it.
    async fn update_stored(&self, mut request: CacheableRequest<'_>, response: Response<Stream>, asked_at: Moment) -> Response<Stream> {
        let (status, parts) = (response.status(), request.parts);
        if parts.method == Method::POST && represents_its_target(status, response.headers(), request.text()) {
            // Only with a freshness lifetime of its own, whatever the rule says (RFC 9110 §9.3.3).
            let mut job = self.job(&request, None);
            (job.policy, job.asked_at) = (job.policy.explicit_only(), asked_at);
            return self.fetcher.store_passing(job, response).await;
        }
        if parts.method == Method::HEAD
            && status == StatusCode::OK
            && let Ok(entry) = self.look_up(&mut request).await
        {
            let (fetcher, mut head) = (Arc::clone(&self.fetcher), response.headers().clone());
            let job = Job { asked_at, ..self.job(&request, None) };
            response_fields::clean(&mut head);
            self.fetcher.spawn(fetcher.update_from_head(job, entry, head));
        }
        response
    }
}

/// Makes a response of the upstream's fit for the one client that gets it.
pub(super) fn deliver(response: Response<Stream>) -> Response<Reply> {
    let mut response = response.map(Reply::Stream);
    // A body that is sent as it is read may end in trailers.
    let trailer = response.headers().get(TRAILER).cloned();
    response_fields::clean(response.headers_mut());
    if let Some(trailer) = trailer {
        response.headers_mut().insert(TRAILER, trailer);
    }
    response.headers_mut().append(VIA, OWN_VIA);
    response
}
