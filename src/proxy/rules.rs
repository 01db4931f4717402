//! The rules that serve, with all else that a reload may change: exchanged at once for requests to come, while those that are being
//! answered keep theirs.

use std::collections::HashSet;
use std::time::Duration;

use xxhash_rust::xxh3::Xxh3Default;

use crate::clock::Wall;
use crate::config::route::{Route, beside};
use crate::config::tokens::Tokens;
use crate::config::warm::Warm;
use crate::config::{Access, Config};
use crate::limit::Limits;
use crate::limit::shared::SharedCounts;
use crate::request::target::Target;
use crate::telemetry::metrics::{Metrics, Rows};

/// The rules of one configuration.
pub struct Rules {
    /// The rules, in the order in which they are tried.
    pub routes: Vec<Route>,
    /// Those under which something may be stored, by name and shape: those that store, and those that did before a reload.
    holding: HashSet<(String, [u8; 8])>,
    /// Where their requests are counted.
    pub rows: Rows,
    /// How many requests clients may make on them.
    pub limits: Limits,
    /// Who may manage.
    pub tokens: Tokens,
    /// The names that the admin listener answers to beside its own addresses, in lower case.
    pub admin_hosts: Vec<String>,
    /// What warming asks for.
    pub warm: Warm,
    /// Which requests get an access line.
    pub access: Access,
    /// From when on a request is slow; zero: never.
    pub slow: Duration,
    /// The first digits of the SHA-256 of the configuration file.
    pub digest: String,
    /// Since when they serve.
    pub since: Wall,
}

impl Rules {
    /// The rules of a configuration, serving from now on. Limits that `previous` had too count on.
    #[must_use]
    pub fn new(config: &Config, shared: Option<&SharedCounts>, metrics: &Metrics, previous: Option<&Self>) -> Self {
        let names: Vec<&str> = config.routes.iter().map(|route| route.name.as_str()).collect();
        let limits = Limits::new(&config.rate_limits, &names, shared, metrics, previous.map(|previous| &previous.limits));
        let rows = metrics.rows(names.into_iter());
        let routes = config.routes.clone();
        let storing = routes.iter().filter(|route| route.may_store()).map(|route| (route.name.clone(), route.shape));
        let is_there = |(name, shape): &(String, [u8; 8])| routes.iter().any(|route| route.name == *name && route.shape == *shape);
        let before = previous.into_iter().flat_map(|previous| previous.holding.iter().filter(|held| is_there(held)).cloned());
        let holding = storing.chain(before).collect();
        let before = previous.map_or(&[][..], |previous| &previous.routes);
        for route in routes.iter().filter(|route| before.iter().any(|before| before.name == route.name && before.written.get())) {
            route.written.note();
        }
        Self {
            holding,
            routes,
            rows,
            limits,
            tokens: config.admin.tokens.clone(),
            admin_hosts: config.admin.hosts.clone(),
            warm: config.warm.clone(),
            access: config.log.access,
            slow: config.log.slow,
            digest: config.digest.clone(),
            since: Wall::now(),
        }
    }

    /// Whether something may be stored under a rule.
    #[must_use]
    pub fn may_hold(&self, route: &Route) -> bool {
        route.may_store() || self.holding.iter().any(|(name, shape)| *name == route.name && *shape == route.shape)
    }

    /// The rule beside the one that serves a target ([`beside`]), if limits count its requests.
    #[must_use]
    pub fn limited_beside(&self, target: &Target<'_>) -> Option<&Route> {
        self.limits.defined().next()?;
        beside(&self.routes, target).filter(|route| self.limits.any(route.index))
    }

    /// A digest of what a target's digest depends on: processes with the same one mean the same by it.
    #[must_use]
    pub fn shapes(&self) -> u64 {
        let mut digest = Xxh3Default::new();
        for route in &self.routes {
            digest.update(format!("{:?}{:?}{:?}", route.name, route.path, route.shape).as_bytes());
        }
        digest.digest()
    }

    /// Whether requests that take so long are slow.
    #[must_use]
    pub fn are_slow(&self, span: Duration) -> bool {
        !self.slow.is_zero() && span >= self.slow
    }
}
