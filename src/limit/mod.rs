//! Rate limits: how many requests somebody may make, so that whoever asks too much does not take from the others.
//!
//! A limit counts by client address, by the value of a field, or by rule ([`Limiter`]): here ([`table`]), or together with other
//! instances ([`shared`]). What it says of a request stands in the answer's `RateLimit` fields ([`ClientLimits::describe`]).
//!
//! Knows the limits of the configuration, and clients by their address and fields. Knows nothing of what is refused with what.

pub mod shared;
pub mod standing;
pub mod table;

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, MonotonicClock};
use governor::middleware::StateInformationMiddleware;
use governor::{Quota, RateLimiter};
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderName, HeaderValue};
use prometheus::IntCounter;
use sha2::{Digest, Sha256};

use crate::config::rate_limit::{Counts, LimitBy, RateLimit};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::samples::Samples;
use shared::SharedCounts;
use standing::Standing;
use table::{Bucket, Table};

/// What is left of a limit (draft-ietf-httpapi-ratelimit-headers).
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
/// What the limit is.
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// The limits of one configuration.
pub struct Limits {
    all: Vec<Arc<Limiter>>,
    /// By the row of a rule: those that count its requests. The last row is that of requests that no rule matches.
    of_row: Vec<Vec<Arc<Limiter>>>,
}

type Local = RateLimiter<Bucket, Table, MonotonicClock, StateInformationMiddleware>;

/// One limit with its counts.
pub struct Limiter {
    limit: RateLimit,
    local: Local,
    shared: Option<SharedCounts>,
    allowed: IntCounter,
    exceeded: IntCounter,
    /// Which requests beyond a limit that is only reported are logged.
    samples: Samples,
}

impl Limits {
    /// The limits of a configuration whose rules have these names. A limit that `previous` had just so counts on.
    #[must_use]
    pub fn new(limits: &[RateLimit], routes: &[&str], shared: Option<&SharedCounts>, metrics: &Metrics, previous: Option<&Self>) -> Self {
        let kept = |limit: &RateLimit| previous?.all.iter().find(|known| known.limit == *limit).cloned();
        let all: Vec<_> =
            limits.iter().map(|limit| kept(limit).unwrap_or_else(|| Arc::new(Limiter::new(limit, shared, metrics)))).collect();
        let of = |route: Option<&str>| all.iter().filter(|limiter| limiter.limit.counts_on(route)).cloned().collect();
        let of_row = routes.iter().map(|route| of(Some(route))).chain([of(None)]).collect();
        Self { all, of_row }
    }

    /// The limits.
    pub fn defined(&self) -> impl Iterator<Item = &RateLimit> {
        self.all.iter().map(|limiter| &limiter.limit)
    }

    /// Whether any limit counts requests on the rule of a row.
    #[must_use]
    pub fn any(&self, row: usize) -> bool {
        self.of_row.get(row).is_none_or(|limiters| !limiters.is_empty())
    }

    /// What limits a client's request on the rule of a row. `route` is the rule's name.
    #[must_use]
    pub fn of<'a>(&'a self, row: usize, route: &'a str, address: IpAddr, headers: &'a HeaderMap) -> ClientLimits<'a> {
        let counting = Counting::Row(self.of_row.get(row).map_or(&[], Vec::as_slice), route);
        ClientLimits { counting, address, headers, told: Mutex::default() }
    }

    /// What limits a request that may be on any of these rules, each with its row: all that limits requests on one of them.
    #[must_use]
    pub fn of_any<'a>(
        &'a self,
        rules: impl Iterator<Item = (usize, &'a str)>,
        address: IpAddr,
        headers: &'a HeaderMap,
    ) -> ClientLimits<'a> {
        let mut all: Vec<(&Arc<Limiter>, &str)> = Vec::new();
        for (row, route) in rules {
            for limiter in self.of_row.get(row).into_iter().flatten() {
                // Each request counts once, but a limit by rule counts it for each of them.
                let counts = |(known, name): &(&Arc<Limiter>, &str)| {
                    Arc::ptr_eq(known, limiter) && (limiter.limit.by != LimitBy::Route || *name == route)
                };
                if !all.iter().any(counts) {
                    all.push((limiter, route));
                }
            }
        }
        ClientLimits { counting: Counting::Any(all), address, headers, told: Mutex::default() }
    }
}

impl Limiter {
    fn new(limit: &RateLimit, shared: Option<&SharedCounts>, metrics: &Metrics) -> Self {
        let quota = Quota::with_period(limit.rate.interval()).unwrap_or(Quota::per_second(limit.burst)).allow_burst(limit.burst);
        let beyond = if limit.report_only { "reported" } else { "refused" };
        Self {
            local: Local::new(quota, Table::default(), MonotonicClock),
            shared: shared.filter(|_| limit.shared).cloned(),
            allowed: metrics.limit_requests.with_label_values(&[&limit.name, "allowed"]),
            exceeded: metrics.limit_requests.with_label_values(&[&limit.name, beyond]),
            limit: limit.clone(),
            samples: Samples::default(),
        }
    }

    /// Counts one request of a bucket.
    async fn take(&self, bucket: &Bucket) -> Standing {
        if let Some(shared) = &self.shared
            && let Some(standing) = shared.take(&self.limit, bucket).await
        {
            return standing;
        }
        match self.local.check_key(bucket) {
            Ok(snapshot) => Standing { within: true, left: snapshot.remaining_burst_capacity(), wait: Duration::ZERO },
            Err(until) => Standing { within: false, left: 0, wait: until.wait_time_from(self.local.clock().now()) },
        }
    }

    fn bucket(&self, request: &ClientLimits<'_>, route: &str) -> Bucket {
        let named = |name: &HeaderName| request.headers.get(name).map(|value| Bucket::of_secret(value.as_bytes()));
        match &self.limit.by {
            LimitBy::Address => Bucket::of_address(request.address),
            LimitBy::Field(name) => named(name).unwrap_or_else(|| Bucket::of_address(request.address)),
            LimitBy::Route => Bucket::of_text(route.as_bytes()),
        }
    }
}

impl Bucket {
    /// Of one IPv4 address, or of one /64 of IPv6: that is what one client has.
    fn of_address(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::new(4, &address.octets()),
            IpAddr::V6(address) => Self::new(6, &address.octets()[..8]),
        }
    }

    /// Of whoever knows a secret, which is not kept itself.
    fn of_secret(secret: &[u8]) -> Self {
        Self::new(1, &Sha256::digest(secret)[..16])
    }

    fn of_text(text: &[u8]) -> Self {
        Self::new(2, &Sha256::digest(text)[..16])
    }
}

/// The limits that count a request, each on the rule of a name.
enum Counting<'a> {
    /// Those of one rule.
    Row(&'a [Arc<Limiter>], &'a str),
    /// Those of several, to any of which it may lead.
    Any(Vec<(&'a Arc<Limiter>, &'a str)>),
}

impl<'a> Counting<'a> {
    fn get(&self, place: usize) -> Option<(&'a Arc<Limiter>, &'a str)> {
        match self {
            Self::Row(limiters, route) => limiters.get(place).map(|limiter| (limiter, *route)),
            Self::Any(limiters) => limiters.get(place).copied(),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&'a Arc<Limiter>, &'a str)> + '_ {
        (0..).map_while(|place| self.get(place))
    }
}

/// What limits one request, and what was said of it so far.
pub struct ClientLimits<'a> {
    counting: Counting<'a>,
    address: IpAddr,
    headers: &'a HeaderMap,
    /// What limits said, by their place among them.
    told: Mutex<Vec<(usize, Standing)>>,
}

impl ClientLimits<'_> {
    /// The same, or none at all.
    #[must_use]
    pub fn unless(self, unlimited: bool) -> Self {
        if unlimited { Self { counting: Counting::Row(&[], ""), ..self } } else { self }
    }

    /// Whether any limit counts the request at this point of its way. For hits: no allocation.
    #[must_use]
    pub fn count(&self, counts: Counts) -> bool {
        self.counting.iter().any(|(limiter, _)| limiter.limit.counts == counts)
    }

    /// Counts the request where limits say so. `false`: it is beyond one of them, and is to be refused.
    pub async fn take(&self, counts: Counts) -> bool {
        for (place, (limiter, route)) in self.counting.iter().enumerate().filter(|(_, (limiter, _))| limiter.limit.counts == counts) {
            let standing = limiter.take(&limiter.bucket(self, route)).await;
            if standing.within {
                limiter.allowed.inc();
            } else {
                limiter.exceeded.inc();
            }
            if limiter.limit.report_only {
                if !standing.within && limiter.samples.take() {
                    tracing::info!(limit = limiter.limit.name, client = %self.address, route, "beyond a limit that is only reported");
                }
                continue;
            }
            self.told.lock().unwrap_or_else(PoisonError::into_inner).push((place, standing));
            if !standing.within {
                return false;
            }
        }
        true
    }

    /// Tells the client in an answer's fields: what limits it, what is left, and when to come again.
    pub fn describe(self, answer: &mut HeaderMap) {
        let told = self.told.into_inner().unwrap_or_else(PoisonError::into_inner);
        if told.is_empty() {
            return;
        }
        let (mut left, mut policy) = (String::new(), String::new());
        for (place, standing) in &told {
            let Some((limiter, _)) = self.counting.get(*place) else { continue };
            let limit = &limiter.limit;
            let comma = if left.is_empty() { "" } else { ", " };
            // How long until as much is left as there can be; of what is used up, until the next one.
            let used = limit.burst.get().saturating_sub(standing.left);
            let again = if standing.within { limit.rate.interval() * used } else { standing.wait };
            // What is written to a String is written.
            let _ = write!(left, "{comma}\"{}\";r={};t={}", limit.name, standing.left, whole_seconds(again));
            let _ = write!(policy, "{comma}\"{}\";q={};w={}", limit.name, limit.rate.count, limit.rate.per.as_secs());
        }
        let wait = told.iter().filter(|(_, standing)| !standing.within).map(|(_, standing)| standing.wait).max();
        if let Some(wait) = wait {
            answer.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(wait).max(1)));
        }
        for (name, text) in [(RATE_LIMIT, left), (RATE_LIMIT_POLICY, policy)] {
            if let Ok(value) = HeaderValue::try_from(text) {
                answer.insert(name, value);
            }
        }
    }
}

/// Seconds, rounded up.
fn whole_seconds(span: Duration) -> u64 {
    span.as_secs() + u64::from(span.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::rate_limit::Rate;
    use std::num::NonZeroU32;

    fn limit(by: LimitBy, count: u32, burst: u32) -> RateLimit {
        let rate = Rate { count: NonZeroU32::new(count).unwrap(), per: Duration::from_secs(60) };
        let burst = NonZeroU32::new(burst).unwrap();
        RateLimit { name: "l".into(), routes: None, by, rate, burst, counts: Counts::All, shared: false, report_only: false }
    }

    fn headers(key: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static("x-api-key"), HeaderValue::from_static(key))])
    }

    async fn taken(limits: &Limits, address: &str, headers: &HeaderMap) -> (bool, HeaderMap) {
        let request = limits.of(0, "r", address.parse().unwrap(), headers);
        let within = request.take(Counts::All).await;
        assert!(request.take(Counts::Backend).await, "nothing counts there");
        let mut answer = HeaderMap::new();
        request.describe(&mut answer);
        (within, answer)
    }

    #[tokio::test]
    async fn each_client_has_its_own_count_and_is_told() {
        let metrics = Metrics::new().unwrap();
        let limits = Limits::new(&[limit(LimitBy::Address, 60, 2)], &["r"], None, &metrics, None);
        let none = HeaderMap::new();
        let (within, answer) = taken(&limits, "192.0.2.1", &none).await;
        assert!(within);
        assert_eq!((answer[RATE_LIMIT].as_bytes(), answer[RATE_LIMIT_POLICY].as_bytes()), (&b"\"l\";r=1;t=1"[..], &b"\"l\";q=60;w=60"[..]));
        assert!(taken(&limits, "::ffff:192.0.2.1", &none).await.0, "the same one");
        let (within, answer) = taken(&limits, "192.0.2.1", &none).await;
        assert_eq!((within, answer[RETRY_AFTER].as_bytes(), answer[RATE_LIMIT].as_bytes()), (false, &b"1"[..], &b"\"l\";r=0;t=1"[..]));
        assert!(taken(&limits, "192.0.2.2", &none).await.0);
        for (address, within) in [("2001:db8::1", true), ("2001:db8::2", true), ("2001:db8::ffff:1", false), ("2001:db8:0:1::1", true)] {
            assert_eq!(taken(&limits, address, &none).await.0, within, "{address}");
        }
        assert!(metrics.limit_requests.with_label_values(&["l", "refused"]).get() == 2);
    }

    #[tokio::test]
    async fn keys_and_rules_count_apart_and_reports_refuse_nobody() {
        let metrics = Metrics::new().unwrap();
        let by_key = limit(LimitBy::Field(HeaderName::from_static("x-api-key")), 60, 1);
        let limits = Limits::new(std::slice::from_ref(&by_key), &["r"], None, &metrics, None);
        for (key, within) in [("a", true), ("b", true), ("a", false)] {
            assert_eq!(taken(&limits, "192.0.2.1", &headers(key)).await.0, within, "{key}");
        }
        // The same limit counts on in another configuration, another one begins anew.
        let same = Limits::new(std::slice::from_ref(&by_key), &["r"], None, &metrics, Some(&limits));
        assert!(!taken(&same, "192.0.2.1", &headers("a")).await.0);
        let reported = RateLimit { report_only: true, ..by_key };
        let limits = Limits::new(&[reported], &["r"], None, &metrics, Some(&same));
        for _ in 0..3 {
            let (within, answer) = taken(&limits, "192.0.2.1", &headers("a")).await;
            assert!(within && answer.is_empty());
        }
        assert_eq!(metrics.limit_requests.with_label_values(&["l", "reported"]).get(), 2);
        let of_others = RateLimit { routes: Some(vec!["other".into()]), ..limit(LimitBy::Route, 60, 1) };
        let limits = Limits::new(&[of_others], &["r", "other"], None, &metrics, None);
        assert!(limits.of_row[0].is_empty() && limits.of_row[2].is_empty() && limits.of_row[1].len() == 1);
    }
}
