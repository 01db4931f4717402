//! A request as the steps of its way read it: first as any request, then as one that the cache may answer.

use std::sync::OnceLock;

use http::request;

use super::spent::Spent;
use crate::cache::key::Canonical;
use crate::clock::Wall;
use crate::config::route::Route;
use crate::limit::ClientLimits;
use crate::request::target::Target;
use crate::timeline::OrdersRequest;
use crate::timeline::endpoint::Endpoint;
use crate::upstream::admission::machine::Party;
use crate::upstream::request_fields::Forwarding;
use crate::upstream::selecting::Selecting;

/// A request that was not refused, as every step reads it.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// Its method, URI and fields.
    pub parts: &'a request::Parts,
    /// What its target says.
    pub target: &'a Target<'a>,
    /// The rule that serves it.
    pub route: Option<&'a Route>,
    /// What the upstream is told of it besides.
    pub forwarding: Forwarding<'a>,
    /// How many requests its client may make.
    pub limits: &'a ClientLimits<'a>,
    /// Where its time goes.
    pub spent: &'a Spent,
    /// Whether Sluice asks itself.
    pub own: bool,
}

/// A request that the cache may answer.
pub struct CacheableRequest<'a> {
    /// The rule that serves it.
    pub route: &'a Route,
    /// What its target says.
    pub target: &'a Target<'a>,
    /// Its method, URI and fields.
    pub parts: &'a request::Parts,
    /// What the upstream is told of it besides.
    pub forwarding: Forwarding<'a>,
    /// How many requests its client may make.
    pub limits: &'a ClientLimits<'a>,
    /// Where its time goes.
    pub spent: &'a Spent,
    /// Its canonical form.
    pub canonical: Canonical,
    /// The variant under which the response was looked for, where it is known that it varies.
    pub variant: Option<Canonical>,
    /// Whether it has credentials that are not part of its canonical form.
    pub authorized: bool,
    /// Whether the response is known to be for all who have credentials too (RFC 9111 §3.5).
    pub shared: bool,
    /// By what it selects a variant, made when that is first asked for.
    selecting: OnceLock<Box<Selecting>>,
    /// When it came.
    pub now: Wall,
}

impl<'a> CacheableRequest<'a> {
    /// A request on a rule that admits it.
    #[must_use]
    pub fn new(route: &'a Route, asked: Asked<'a>) -> Self {
        let Asked { parts, target, forwarding, limits, spent, route: _, own: _ } = asked;
        let canonical = Canonical::new(route, target, &parts.headers);
        let (authorized, now) = (route.sees_credentials(&parts.headers), Wall::now());
        let (variant, shared, selecting) = (None, false, OnceLock::new());
        Self { route, target, parts, forwarding, limits, spent, canonical, variant, authorized, shared, selecting, now }
    }

    /// Path and query, as they were sent.
    #[must_use]
    pub fn text(&self) -> &'a str {
        self.parts.uri.path_and_query().map_or("/", |text| text.as_str())
    }

    /// The same request as the timeline is asked; `canonical` is its canonical form.
    #[must_use]
    pub fn for_timeline<'c>(&self, canonical: &'c Canonical) -> OrdersRequest<'c>
    where
        'a: 'c,
    {
        OrdersRequest { route: self.route, text: self.text(), target: self.target, headers: &self.parts.headers, canonical }
    }

    /// Whether its answer should be the contract's buckets: on rules that say that this API stands behind them.
    #[must_use]
    pub fn is_for_buckets(&self) -> bool {
        self.route.timeline && Endpoint::of(&self.target.path) == Some(Endpoint::Liquidations)
    }

    /// By what it selects a variant.
    #[must_use]
    pub fn selecting(&self) -> &Selecting {
        let make = || Selecting::of(self.parts, self.forwarding, &self.route.request_fields, self.authorized);
        self.selecting.get_or_init(|| Box::new(make()))
    }

    /// What is fetched once at a time: the request or its variant. Of requests with credentials only those with the same ones
    /// wait for one another, unless the response is known to be for all.
    #[must_use]
    pub fn collapse_key(&self) -> Canonical {
        let alone = if self.shared { None } else { self.credentials_key() };
        alone.unwrap_or_else(|| self.selected_key().clone())
    }

    /// What answers to its credentials alone are remembered by; `None` if it has none that the key does not hold.
    #[must_use]
    pub fn credentials_key(&self) -> Option<Canonical> {
        self.authorized.then(|| self.selected_key().with_credentials(&self.parts.headers))
    }

    fn selected_key(&self) -> &Canonical {
        self.variant.as_ref().unwrap_or(&self.canonical)
    }
}

/// The client and the rule for which the upstream is asked.
pub(super) fn party(route: Option<&Route>, forwarding: Forwarding<'_>) -> Party {
    Party::client(forwarding.client.address, route.map_or("none", |route| &route.name))
}
