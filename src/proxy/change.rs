//! Requests with unsafe methods, which may change what is stored. What follows from each for the cache is its [`Effect`]; it is
//! found out in a task of the request's own, whether the client waits for it or not.
//!
//! ```text
//! waits for a place ─── the client leaves: nothing is sent, nothing is void
//!        │
//!      sent ─────────── the client leaves: the task goes on
//!        │
//! answer, failure or backend.timeout ── Effect ── void, if it may be done ── the answer, if the client is there still
//!                                                      └─ may be under way: void once more, backend.timeout later
//! ```
//!
//! What a GET fetched since the request began is void with it, since a void concerns all that was asked for before. There are no
//! more such tasks than places (`backend.max_in_flight`, `backend.max_uploads`); those that only wait to void once more are bounded too.
//! When the program stops, [`Changes::take`](super::changes::Changes::take) hands over what is open still, to be counted as done.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response};
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::Proxy;
use super::asked::{Asked, party};
use super::effect::Effect;
use crate::body::Stream;
use crate::cache::key::{Canonical, Key};
use crate::cache::void::{Moment, Purge};
use crate::config::route::select;
use crate::http::invalidation::named_targets;
use crate::request::client::request_authority;
use crate::request::target::Target;
use crate::telemetry::trace::carry;
use crate::upstream::BackendError;
use crate::upstream::admission::Askers;
use crate::upstream::failure::Failure;

/// The answer to a change.
pub(super) struct Changed {
    /// The answer.
    pub response: Response<Stream>,
    /// Whether nothing else voided the target since the request was sent: what the answer says of it holds.
    pub is_newest: bool,
    /// What the answer says was so at this moment: when the change voided the target, or was sent.
    pub asked_at: Moment,
}

impl Proxy {
    /// Sends a request that may change something. Whatever becomes of its client, what it may have changed is void.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(super) async fn change(self: &Arc<Self>, asked: Asked<'_>, body: Stream, storable: bool) -> Result<Changed, BackendError> {
        let (request, conditional) = self.to_upstream(asked.route, asked.parts, body, asked.forwarding, storable).await;
        let admitted = self.upstream.admit(&Arc::new(Askers::one(&party(asked.route, asked.forwarding))), request).await?;
        let mut change = Change::begin(self, asked);
        let (sender, answer) = oneshot::channel();
        let proxy = Arc::clone(self);
        self.fetcher.spawn(carry(async move {
            let sent = proxy.upstream.call_admitted(admitted, proxy.body_timeout).await;
            let (effect, changed) = change.end(Self::understood(sent, conditional)).await;
            // A client that has left needs no answer.
            let _ = sender.send(changed);
            if effect == Effect::UnderWay {
                change.void_later(proxy.timeout).await;
            }
        }));
        answer.await.unwrap_or_else(|lost| Err(BackendError::Reset(lost.into())))
    }

    /// The key of what is stored for a target, if anything may be.
    fn stored_key(&self, target: &Target<'_>) -> Option<Key> {
        if !self.stores {
            return None;
        }
        let rules = self.rules.load();
        let route = select(&rules.routes, target).filter(|route| rules.may_hold(route))?;
        Some(Key::new(route, target, Canonical::new(route, target, &HeaderMap::new())))
    }
}

/// One change. If it is lost before its effect is known, that is unknown.
struct Change {
    proxy: Arc<Proxy>,
    number: u64,
    /// What its target is stored under.
    key: Option<Key>,
    path: String,
    /// What the client calls the backend.
    host: Option<HeaderValue>,
    /// When it was sent.
    asked_at: Moment,
    is_known: bool,
}

impl Change {
    /// From here on the request may reach the backend.
    fn begin(proxy: &Arc<Proxy>, asked: Asked<'_>) -> Self {
        let key = proxy.stored_key(asked.target);
        Self {
            number: proxy.changes.begin(key.as_ref()),
            key,
            path: asked.target.path.to_string(),
            host: request_authority(asked.parts),
            asked_at: proxy.cache.ask(),
            is_known: false,
            proxy: Arc::clone(proxy),
        }
    }

    /// It was answered, or is given up. Ends when what it voids is void on all instances that can be reached.
    async fn end(&mut self, answer: Result<Response<Stream>, BackendError>) -> (Effect, Result<Changed, BackendError>) {
        let effect = Effect::of(answer.as_ref().map(Response::status).map_err(Failure::from));
        let mut voided = None;
        if effect.voids() {
            let named = answer.as_ref().map(|response| self.named(response.headers())).unwrap_or_default();
            voided = self.void(named).await;
        }
        let is_newest = voided.as_ref().is_none_or(|own| !self.is_overtaken(own));
        let asked_at = voided.map_or(self.asked_at, |own| own.at);
        self.is_known = true;
        self.proxy.changes.is_known();
        if effect != Effect::UnderWay {
            self.proxy.changes.end(self.number);
        }
        (effect, answer.map(|response| Changed { response, is_newest, asked_at }))
    }

    /// Whether something else voided its target since it was sent, until its own void.
    fn is_overtaken(&self, own: &Purge) -> bool {
        let Some(key) = &self.key else { return false };
        let voids = self.proxy.cache.voids().concerning(&key.readable, &key.tags, key.target);
        own.before.is_some_and(|before| before > self.asked_at) || voids.iter().any(|void| void.at > self.asked_at && void.at < own.at)
    }

    /// The keys of the targets that the answer names besides its own.
    fn named(&self, answer: &HeaderMap) -> Vec<Key> {
        let is_own = |authority: &str| {
            self.host.as_ref().is_some_and(|host| host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()))
                || self.proxy.authorities.iter().any(|own| own.as_str().eq_ignore_ascii_case(authority))
        };
        let named = named_targets(answer, &self.path, is_own);
        named.iter().filter_map(|text| self.proxy.stored_key(&Target::parse(text).ok()?)).collect()
    }

    /// What is stored for its target, and for others, is void. Returns the void of its target.
    async fn void(&self, others: Vec<Key>) -> Option<Purge> {
        // Once each: what its own answer says of its target is from the moment of the one void of that.
        let others = others.into_iter().filter(|other| self.key.as_ref().is_none_or(|own| own.target != other.target));
        let keys: Vec<Key> = self.key.iter().cloned().chain(others).collect();
        if keys.is_empty() {
            return None;
        }
        let (own, telling) = self.proxy.cache.invalidate(keys);
        // The client that made the change sees it everywhere, and what is stored from now on is not removed with what it replaces.
        drop(telling.await);
        own.filter(|_| self.key.is_some())
    }

    /// Voids its target once more after a while, by when the backend has carried it out or never will.
    async fn void_later(self, after: Duration) {
        let proxy = Arc::clone(&self.proxy);
        if self.key.is_none() {
            return;
        }
        let Some(_permit) = proxy.changes.late() else {
            tracing::debug!("many changes are overdue: what is fetched before the backend carries them out stays");
            return;
        };
        sleep(after).await;
        self.void(Vec::new()).await;
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if !self.is_known {
            if let Some(key) = self.key.take() {
                drop(self.proxy.cache.invalidate(vec![key]).1);
            }
            self.proxy.changes.is_known();
        }
        self.proxy.changes.end(self.number);
    }
}
