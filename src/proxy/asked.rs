//! A request as the steps of its way read it: first as any request, then as one that the cache may answer.

use http::header::AUTHORIZATION;
use http::request;

use super::spent::Spent;
use crate::cache::key::Canonical;
use crate::clock::Wall;
use crate::config::route::Route;
use crate::limit::ClientLimits;
use crate::request::fields::API_KEY;
use crate::request::target::Target;
use crate::timeline::OrdersRequest;
use crate::upstream::request_fields::Forwarding;

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
    /// The canonical form with its credentials, for a request with credentials.
    pub authorized: Option<Canonical>,
    /// When it came.
    pub now: Wall,
}

impl<'a> CacheableRequest<'a> {
    /// A request on a rule that admits it.
    #[must_use]
    pub fn new(route: &'a Route, asked: Asked<'a>) -> Self {
        let Asked { parts, target, forwarding, limits, spent, route: _, own: _ } = asked;
        let canonical = Canonical::new(route, target, &parts.headers);
        let authorized = route.sees_credentials(&parts.headers).then(|| canonical.variant(&[AUTHORIZATION, API_KEY], &parts.headers));
        Self { route, target, parts, forwarding, limits, spent, canonical, variant: None, authorized, now: Wall::now() }
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

    /// What is fetched once at a time: the request or its variant. Of requests with `Authorization` only those with the same
    /// credentials wait for one another, until the response says that it is for all.
    #[must_use]
    pub fn collapse_key(&self) -> &Canonical {
        self.authorized.as_ref().or(self.variant.as_ref()).unwrap_or(&self.canonical)
    }
}
