//! What becomes of a request. **Begin here**: [`Proxy::handle`] is a request's way, from top to bottom.
//!
//! ```text
//! request → refuse → route → limit → admit → look up → decide → respond → outcome
//!              │        │       │       │                  │
//!              │        │       │       │                  ├─ Hit, stale: from the cache        (respond)
//!              │        │       │       │                  └─ Fetch: from the upstream          (miss, then ../fetch)
//!              │        │       │       └─ the cache has no say: passed to the upstream         (pass; compared: shadow; unsafe: change)
//!              │        │       └─ more than the client may ask for: 429                        (../limit)
//!              │        └─ Sluice's own endpoints                                               (OwnEndpoints)
//!              └─ an error answer                                                               (errors)
//! ```
//!
//! Whatever happens ends in one [`Outcome`], from which `Cache-Status`, metrics and the access log are made in one place
//! (`Proxy::finish`); what would become of a request is told by the same steps ([`foresee`]). The rare and long steps are boxed: a hit's future is moved several times, and stays small.
//!
//! Knows everything below it. Knows nothing of sockets, or of what its own endpoints answer.

pub mod access_log;
pub mod answer;
pub mod asked;
pub mod change;
pub mod changes;
pub mod decide;
pub mod effect;
pub mod errors;
pub mod exchange;
pub mod foresee;
pub mod hottest;
pub mod lookup;
pub mod miss;
pub mod outcome;
pub mod pass;
pub mod purge;
pub mod remembered;
pub mod respond;
pub mod rules;
pub mod shadow;
pub mod short;
pub mod span;
pub mod spent;
pub mod timeline;
pub mod traced;
pub mod warm;

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::uri::Authority;
use http::{Request, Response, request};
use http_body::Body;
use http_body_util::BodyExt;

use crate::body::{BoxError, Reply};
use crate::cache::Cache;
use crate::cache::ready::CACHE_STATUS;
use crate::config::Limits;
use crate::config::rate_limit::Counts;
use crate::config::route::{may_serve, select};
use crate::fetch::Fetcher;
use crate::limit::ClientLimits;
use crate::limit::shared::SharedCounts;
use crate::request::Arrival;
use crate::request::client::{Client, PublicUrl};
use crate::request::fields::REQUEST_ID;
use crate::request::refusal::Refusal;
use crate::request::target::Target;
use crate::request::validate::validate;
use crate::telemetry::metrics::{CLIENT_LEFT, Metrics};
use crate::telemetry::samples::Samples;
use crate::telemetry::trace::{self, Tracer};
use crate::timeline::Timeline;
use crate::upstream::Upstream;
use crate::upstream::locations::relocate;
use answer::Answer;
use asked::{Asked, CacheableRequest};
use changes::Changes;
use decide::{Admission, Decision, admit};
use exchange::Exchange;
use hottest::Hottest;
use outcome::{FetchWhy, Outcome, StaleWhy};
use rules::Rules;
use spent::Step;

/// Everything that answering a request needs.
pub struct Proxy {
    /// The rules that serve now.
    pub rules: ArcSwap<Rules>,
    /// What counts requests together with other instances, if Redis is configured.
    pub shared_counts: Option<SharedCounts>,
    /// What is stored.
    pub cache: Arc<Cache>,
    /// What remembers the targets that are asked for most.
    pub hottest: Arc<Hottest>,
    /// Whether what is asked for often is refreshed before it is stale.
    pub refresh_early: bool,
    /// What gets responses through the cache.
    pub fetcher: Arc<Fetcher>,
    /// What gets responses past it.
    pub upstream: Arc<Upstream>,
    /// Requests under way that may change something.
    pub changes: Changes,
    /// Whether anything is stored, here or in Redis.
    pub stores: bool,
    /// What computes answers from orders kept in spans of time, if that is configured.
    pub timeline: Option<Arc<dyn Timeline>>,
    /// What Sluice answers itself.
    pub own: Arc<dyn OwnEndpoints>,
    /// All metrics.
    pub metrics: Arc<Metrics>,
    /// Bounds on clients.
    pub limits: Limits,
    /// How clients reach this listener, if that was said (`public_url`).
    pub public: Option<PublicUrl>,
    /// The names by which the upstream may call itself: the address at which it is reached, then the `Host` that it is sent.
    pub authorities: Vec<Authority>,
    /// Whether HEAD is answered from GET.
    pub head_as_get: bool,
    /// Whether purges are passed on to the backend (`forward_invalidation`).
    pub forward_invalidation: bool,
    /// To the head of the upstream's response.
    pub timeout: Duration,
    /// The longest silence within a body that is passed through.
    pub body_timeout: Duration,
    /// Larger bodies are not stored, in bytes.
    pub max_object: usize,
    /// Which differences of answers in shadow are logged.
    pub samples: Arc<Samples>,
    /// What makes spans of requests, if that is configured.
    pub tracer: Option<Arc<Tracer>>,
}

/// An answer to be.
pub type AnswerFuture<'a> = Pin<Box<dyn Future<Output = Answer> + Send + 'a>>;

/// The endpoints that Sluice answers itself on the main listener, before any rule.
pub trait OwnEndpoints: Send + Sync {
    /// Whether this path is one of them.
    fn owns(&self, path: &str) -> bool;

    /// Answers a request for one of them.
    fn answer<'a>(&'a self, asked: Asked<'a>, proxy: &'a Arc<Proxy>) -> AnswerFuture<'a>;
}

impl Proxy {
    /// Sets the gauges of what nobody counts as it changes.
    pub fn update_gauges(&self) {
        let bytes = remembered::bytes() + self.fetcher.remembered_bytes();
        self.metrics.remembered_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Answers one request.
    pub async fn handle<B>(self: &Arc<Self>, request: Request<B>, arrival: Arrival) -> Response<Reply>
    where
        B: Body<Data = Bytes, Error = BoxError> + Send + 'static,
    {
        let (parts, body) = request.into_parts();
        let exchange = Exchange::begin(&self.metrics, &parts);
        let client = Client::of(&parts, arrival.peer, |peer| self.limits.trusts(peer));
        let target = arrival.refused.map_or_else(|| validate(&parts).and_then(remembered::read_target), Err);
        let rules = self.rules.load();
        let route = target.as_ref().ok().and_then(|target| select(&rules.routes, target));
        let forwarding = exchange.forwarding(&client, self.public.as_ref(), arrival.interim.as_ref());
        let (row, name) = route.map_or((rules.rows.no_route(), "none"), |route| (route.index, route.name.as_str()));
        let own = arrival.own;
        let limits = match target.as_deref() {
            Ok(target) if target.doubtful => doubtful_limits(&rules, &parts, target, client.address),
            Ok(target) if let Some(beside) = rules.limited_beside(target) => {
                let both = [(row, name), (beside.index, beside.name.as_str())];
                rules.limits.of_any(both.into_iter(), client.address, &parts.headers)
            }
            _ => rules.limits.of(row, name, client.address, &parts.headers),
        };
        let limits = limits.unless(own);
        let leaving = Leaving { proxy: self, rules: &rules, exchange: &exchange, row: (row, name), parts: &parts, client: &client };
        let leaving = Unanswered(Some((leaving, trace::here())));
        let asked = |target| Asked { parts: &parts, target, route, forwarding, limits: &limits, spent: exchange.spent(), own };
        let mut answer = match &target {
            Err(refusal) => Answer::refused(*refusal),
            Ok(target) if self.own.owns(&target.path) => self.own.answer(asked(target), self).await,
            Ok(_) if limits.count(Counts::All) && !Box::pin(exchange.spent().on(Step::Limit, limits.take(Counts::All))).await => {
                self.refuse_limited(name)
            }
            Ok(target) => self.answer(asked(target), body).await,
        };
        limits.describe(answer.response.headers_mut());
        leaving.end();
        self.finish(exchange, &rules, (row, name), &parts, &client, answer)
    }

    /// Answers from the cache where it has a say (from the timeline where that can), else from the upstream.
    async fn answer<B>(self: &Arc<Self>, asked: Asked<'_>, body: B) -> Answer
    where
        B: Body<Data = Bytes, Error = BoxError> + Send + 'static,
    {
        let (method, headers) = (&asked.parts.method, &asked.parts.headers);
        let has_body = !body.is_end_stream() || headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0");
        let (doubtful, head_as_get) = (asked.target.doubtful, self.head_as_get);
        let client = (!asked.own).then_some(asked.forwarding.client.address);
        if self.cache.is_uncertain() {
            Box::pin(self.cache.ascertain()).await;
        }
        match admit(asked.route, Admission { method, headers, has_body, doubtful, head_as_get, client }) {
            Ok(route) if route.shadow => {
                Box::pin(self.answer_in_shadow(asked, CacheableRequest::new(route, asked), body.boxed_unsync())).await
            }
            Ok(route) => match self.timeline.as_deref().filter(|_| route.timeline) {
                Some(timeline) => Box::pin(self.answer_from_timeline(timeline, CacheableRequest::new(route, asked))).await,
                None => self.answer_from_stored(CacheableRequest::new(route, asked)).await,
            },
            Err(why) => Box::pin(self.pass(asked, why, body.boxed_unsync())).await,
        }
    }

    /// Looks up what is stored, and does what it allows.
    async fn answer_from_stored(&self, mut request: CacheableRequest<'_>) -> Answer {
        let found = self.look_up(&mut request).await;
        let outcome = match self.decide(&request, &found) {
            Decision::Hit(left) => {
                self.refresh_if_early(&request, &found, left);
                Outcome::Hit(left)
            }
            Decision::StaleAndRevalidate(by) => {
                self.revalidate(&request, &found);
                Outcome::Stale(by, StaleWhy::Revalidating)
            }
            Decision::StaleWhileFailing(by) => {
                self.revalidate_if_due(&request, &found);
                Outcome::Stale(by, StaleWhy::WhileFailing)
            }
            Decision::OnlyIfCached => return Answer::refused(Refusal::OnlyIfCached),
            Decision::FetchUnstored => return Box::pin(self.fetch_unstored(&request)).await,
            Decision::Fetch { why, fallback } => return Box::pin(self.fetch(&mut request, why, found.ok(), fallback)).await,
        };
        self.hottest.note(request.text());
        match self.respond(&request, found.as_ref().ok()).await {
            Some(response) => Answer { response, outcome },
            // What is stored is damaged: as if it were not there.
            None => {
                if let Ok(damaged) = &found {
                    self.cache.store().replace(damaged, None);
                }
                Box::pin(self.fetch(&mut request, FetchWhy::UriMiss, None, None)).await
            }
        }
    }

    /// Refuses a request that is beyond a limit.
    fn refuse_limited(&self, route: &str) -> Answer {
        self.metrics.rate_limited.with_label_values(&[route]).inc();
        Answer::refused(Refusal::RateLimited)
    }

    /// Says what became of the request: in the response, in the metrics, in the access log.
    fn finish(
        &self,
        mut exchange: Exchange,
        rules: &Rules,
        (row, name): (usize, &str),
        parts: &request::Parts,
        client: &Client,
        answer: Answer,
    ) -> Response<Reply> {
        let Answer { mut response, outcome } = answer;
        let outcome = outcome.with_status(response.status());
        let headers = response.headers_mut();
        relocate(headers, &self.authorities, parts, client, self.public.as_ref());
        headers.insert(CACHE_STATUS, outcome.cache_status());
        headers.insert(REQUEST_ID, exchange.take_id());
        self.metrics.record(&rules.rows, row, name, outcome.label(), response.status().as_u16(), exchange.elapsed());
        exchange.end(rules, name, parts, client.address, response, &outcome)
    }
}

/// What is known of a request should its client leave.
struct Leaving<'a> {
    proxy: &'a Proxy,
    rules: &'a Rules,
    exchange: &'a Exchange,
    row: (usize, &'a str),
    parts: &'a request::Parts,
    client: &'a Client,
}

/// A request without an answer. If it is dropped so, its client has left, which is told as any outcome is.
struct Unanswered<'a>(Option<(Leaving<'a>, Option<trace::Here>)>);

impl Unanswered<'_> {
    /// There is an answer.
    fn end(mut self) {
        self.0 = None;
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let Some((leaving, here)) = self.0.take() else { return };
        let Leaving { proxy, rules, exchange, row: (row, name), parts, client } = leaving;
        let outcome = Outcome::ClientLeft(exchange.spent().waits_for());
        proxy.metrics.record(&rules.rows, row, name, outcome.label(), CLIENT_LEFT, exchange.elapsed());
        exchange.gave_up(rules, name, parts, client.address, here.as_ref(), &outcome);
    }
}

/// What limits a request whose target may mean different things: all that limits requests on a rule to which it may lead.
fn doubtful_limits<'a>(rules: &'a Rules, parts: &'a request::Parts, target: &Target<'_>, address: IpAddr) -> ClientLimits<'a> {
    let text = parts.uri.path_and_query().map_or("/", |text| text.as_str());
    let found = if rules.limits.defined().next().is_some() { may_serve(&rules.routes, text, target) } else { Vec::new() };
    match &found[..] {
        [] => rules.limits.of(rules.rows.no_route(), "none", address, &parts.headers),
        found => rules.limits.of_any(found.iter().map(|route| (route.index, route.name.as_str())), address, &parts.headers),
    }
}
