//! `GET /stats`: what an operator asks first, as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::cache::store::Tier;
use crate::cache::void_log::VoidLog;
use crate::config::route::Route;
use crate::proxy::Proxy;
use crate::request::secrets::{text_without_secrets, without_secrets};
use crate::telemetry::metrics::OutcomeLabel;
use crate::timeline::Report;

#[derive(Serialize)]
struct Stats<'a> {
    version: &'static str,
    /// Which configuration serves.
    config: Serving<'a>,
    total: Counts,
    routes: BTreeMap<&'a str, RouteStats>,
    /// What the cache was asked for most of late, and about how often.
    hottest: Vec<Hot>,
    /// Entries in memory by the first part of their key.
    keys: BTreeMap<String, u64>,
    tiers: Vec<Tier>,
    /// Orders kept in spans of time; `null` without a timeline.
    timeline: Option<Report>,
    breakers: Breakers,
    /// Purges and changes that instances share; `null` without Redis.
    voids: Option<SharedVoids>,
    inflight: i64,
    connections: i64,
    purged: u64,
}

#[derive(Serialize)]
struct Hot {
    /// The path and query, without the values of what may be a secret ([`without_secrets`]).
    target: String,
    requests: u64,
}

/// So many of the hottest targets are told of.
const HOTTEST: usize = 20;

#[derive(Serialize)]
struct SharedVoids {
    /// Which log it is: another one once Redis has lost its data.
    epoch: String,
    /// The number of the newest one that is known.
    seq: u64,
    /// How many wait for Redis to be back.
    waiting: usize,
}

impl SharedVoids {
    fn of(log: &VoidLog) -> Self {
        let at = log.position().unwrap_or_default();
        Self { epoch: at.epoch_text(), seq: at.seq, waiting: log.waiting() }
    }
}

#[derive(Serialize)]
struct Serving<'a> {
    /// The first digits of the SHA-256 of its file.
    digest: &'a str,
    since: String,
    rules: usize,
}

#[derive(Serialize)]
struct RouteStats {
    #[serde(flatten)]
    counts: Counts,
    ttl_seconds: Option<u64>,
    /// How answers in shadow compared with what the cache would have said.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    shadow: BTreeMap<&'static str, u64>,
}

/// Requests by outcome. The hit ratio is of those that the cache could have answered.
#[derive(Default, Serialize)]
struct Counts {
    requests: u64,
    hits: u64,
    stale: u64,
    misses: u64,
    collapsed: u64,
    passed: u64,
    refused: u64,
    failed: u64,
    /// Whose clients left before there was an answer.
    left: u64,
    hit_ratio: Option<f64>,
    mean_hit_ms: Option<f64>,
    mean_miss_ms: Option<f64>,
}

#[derive(Serialize)]
struct Breakers {
    backend: &'static str,
    redis: &'static str,
}

/// The page.
#[must_use]
pub fn page(proxy: &Proxy) -> String {
    let rules = proxy.rules.load();
    let rows = rules.routes.iter().map(|route| (route.name.as_str(), Some(route))).chain([("none", None)]);
    let mut total = [(0, 0.0); OutcomeLabel::ALL.len()];
    let mut routes = BTreeMap::new();
    for (row, (name, route)) in rows.enumerate() {
        let mut of_route = [(0, 0.0); OutcomeLabel::ALL.len()];
        for (outcome, (cell, sum)) in OutcomeLabel::ALL.into_iter().zip(of_route.iter_mut().zip(&mut total)) {
            *cell = rules.rows.requests_of(row, outcome);
            sum.0 += cell.0;
            sum.1 += cell.1;
        }
        let ttl_seconds = route.filter(|route| route.cache).map(|route: &Route| route.policy.ttl.as_secs());
        routes.insert(name, RouteStats { counts: counts(&of_route), ttl_seconds, shadow: proxy.metrics.shadow_of(name) });
    }
    let tiers = proxy.cache.store().report();
    let state = |up: bool| if up { "closed" } else { "open" };
    let redis = tiers.iter().find(|tier| tier.tier == "redis").map_or("not configured", |tier| state(tier.up));
    let stats = Stats {
        version: env!("CARGO_PKG_VERSION"),
        config: Serving { digest: &rules.digest, since: rules.since.text(), rules: rules.routes.len() },
        total: counts(&total),
        routes,
        hottest: proxy
            .hottest
            .here(HOTTEST)
            .into_iter()
            .map(|(target, requests)| Hot { target: without_secrets(&target).into_owned(), requests })
            .collect(),
        keys: keys(proxy.cache.store().keys_by_prefix()),
        tiers,
        timeline: proxy.timeline.as_ref().map(|timeline| timeline.report()),
        breakers: Breakers { backend: state(!proxy.fetcher.failing().upstream()), redis },
        voids: proxy.cache.log().map(SharedVoids::of),
        inflight: proxy.metrics.inflight.get(),
        connections: proxy.metrics.connections.get(),
        purged: proxy.metrics.purged.get(),
    };
    serde_json::to_string_pretty(&stats).unwrap_or_default()
}

/// Where a key begins with what a client sent, that may be a secret.
fn keys(by_prefix: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let mut keys = BTreeMap::new();
    for (prefix, count) in by_prefix {
        *keys.entry(text_without_secrets(&prefix).into_owned()).or_default() += count;
    }
    keys
}

#[allow(clippy::cast_precision_loss, reason = "ratios and means")]
fn counts(of: &[(u64, f64); OutcomeLabel::ALL.len()]) -> Counts {
    let [hits, stale, misses, collapsed, passed, refused, failed, _local, left] = of.map(|(count, _)| count);
    let cacheable = hits + stale + misses + collapsed;
    let round = |value: f64| (value * 1e4).round() / 1e4;
    let mean = |(count, seconds): (u64, f64)| (count > 0).then(|| round(seconds / count as f64 * 1e3));
    Counts {
        requests: of.iter().map(|(count, _)| count).sum(),
        hits,
        stale,
        misses,
        collapsed,
        passed,
        refused,
        failed,
        left,
        hit_ratio: (cacheable > 0).then(|| round((hits + stale) as f64 / cacheable as f64)),
        mean_hit_ms: mean(of[OutcomeLabel::Hit as usize]),
        mean_miss_ms: mean(of[OutcomeLabel::Miss as usize]),
    }
}
