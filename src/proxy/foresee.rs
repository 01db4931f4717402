//! What would become of a GET now: the steps of [`Proxy::handle`] up to its decision, by the same functions. Nobody is asked but the
//! cache, and nothing is counted.

use std::net::IpAddr;
use std::sync::Arc;

use http::request;

use super::Proxy;
use super::asked::{Asked, CacheableRequest};
use super::decide::{Admission, Decision, admit};
use super::exchange::Exchange;
use super::outcome::FetchWhy;
use super::remembered::read_target;
use super::rules::Rules;
use crate::cache::entry::Entry;
use crate::cache::key::Key;
use crate::clock::Wall;
use crate::config::route::select;
use crate::fetch::unstored::Unstored;
use crate::request::client::Client;

/// What would become of a request that the cache may answer.
pub struct Foreseen {
    /// What is stored for it, or why nothing is.
    pub found: Result<Arc<Entry>, FetchWhy>,
    /// Whether that was in memory before it was looked for.
    pub in_memory: bool,
    /// What is done with it.
    pub decision: Decision,
    /// The last response, if it was not stored.
    pub unstored: Option<Unstored>,
    /// Whether requests are passed without waiting for each other, since responses were found uncacheable lately.
    pub is_passed: bool,
    /// Whether the upstream failed lately, for it or for all, and is left alone.
    pub is_failing: bool,
    /// The key under which it is stored, which is that of a variant where it is known that the response varies.
    pub key: Key,
    /// When all this was so.
    pub now: Wall,
}

impl Proxy {
    /// What would become of a request with this head, which `client` sends; `None`: the cache has no say, or it would be refused.
    pub async fn foresee(&self, rules: &Rules, parts: &request::Parts, client: IpAddr) -> Option<Foreseen> {
        let target = read_target(parts.uri.path_and_query().map_or("/", |text| text.as_str())).ok()?;
        if self.own.owns(&target.path) {
            return None;
        }
        let (exchange, client) = (Exchange::begin(&self.metrics, parts), Client { address: client, reached: None });
        let route = select(&rules.routes, &target);
        let limits = rules.limits.of(rules.rows.no_route(), "none", client.address, &parts.headers);
        let forwarding = exchange.forwarding(&client, self.public.as_ref(), None);
        let asked = Asked { parts, target: &target, route, forwarding, limits: &limits, spent: exchange.spent(), own: false };
        let admission = Admission {
            method: &parts.method,
            headers: &parts.headers,
            has_body: false,
            doubtful: target.doubtful,
            head_as_get: self.head_as_get,
            client: Some(client.address),
        };
        let route = admit(route, admission).ok()?;
        if self.cache.is_uncertain() {
            self.cache.ascertain().await;
        }
        let mut request = CacheableRequest::new(route, asked);
        let in_memory = self.cache.peek(&request.canonical).is_some();
        let found = self.look_up(&mut request).await;
        let decision = self.decide(&request, &found);
        if request.shared && self.has_own_answer(&request) {
            request.shared = false;
        }
        let collapse_key = request.collapse_key();
        let canonical = request.variant.clone().unwrap_or_else(|| request.canonical.clone());
        Some(Foreseen {
            found,
            in_memory,
            decision,
            unstored: self.fetcher.last_unstored(&collapse_key),
            is_passed: self.fetcher.is_uncacheable(&collapse_key),
            is_failing: self.fetcher.failing().key(&route.name, &collapse_key),
            key: Key::new(route, &target, canonical),
            now: request.now,
        })
    }
}
