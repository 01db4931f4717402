//! Which rule serves a request, and what the rule says.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, Method};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::template::Template;
use super::units::share;
use crate::clock::{Wall, millis};
use crate::http::freshness::FreshnessPolicy;
use crate::request::fields::API_KEY;
use crate::request::readings;
use crate::request::target::Target;
use crate::request::timestamp;

/// One `[[route]]`, compiled.
#[derive(Clone, Debug)]
pub struct Route {
    /// The place in the configuration, which is also its row in tables kept by route.
    pub index: usize,
    /// The name, for metrics, logs and `explain`.
    pub name: String,
    /// A digest of what decides which requests are equal under this rule, for whom its answers are, and by which key and tags a purge
    /// finds them: what was stored under other rules of this name is not for its requests.
    pub shape: [u8; 8],
    /// Which paths it serves.
    pub path: PathPattern,
    /// Which methods it caches.
    pub methods: Vec<Method>,
    /// Parameters that must be present for the rule to match.
    pub with: Vec<String>,
    /// Parameters that must be absent for the rule to match.
    pub without: Vec<String>,
    /// `false`: requests pass through.
    pub cache: bool,
    /// For which share of clients it caches.
    pub rollout: Rollout,
    /// Whether the upstream answers everything, and answers are compared with what the cache would have said.
    pub shadow: bool,
    /// Whether requests are answered from the timeline where it can.
    pub timeline: bool,
    /// Whether responses to requests with `Authorization` may be shared where they say so (`authorization = "respect"`).
    pub share_authorized: bool,
    /// Whether a response in a language is also for those who prefer that language (`language = "prefer"`).
    pub match_language: bool,
    /// Whether a `Range` is sent on where nothing is stored, and the beginning that comes so is completed later
    /// (`parts = "complete"`).
    pub complete_ranges: bool,
    /// Whether `Cache-Control` of requests counts (`client_directives = "respect"`).
    pub client_directives: bool,
    /// Which fields of requests reach the upstream.
    pub request_fields: RequestFields,
    /// How long it lets responses live.
    pub policy: FreshnessPolicy,
    /// The readable part of the key.
    pub key: Template,
    /// The parameters that matter; `None`: all.
    pub query: Option<Vec<String>>,
    /// The parameters whose ASCII case does not matter.
    pub fold_case: Vec<String>,
    /// The tags that an entry gets.
    pub tags: Vec<Template>,
    /// Longer freshness for answers about a closed past.
    pub history: Option<History>,
    /// Whether a client has changed something on this rule.
    pub written: Written,
}

/// Whether a client has sent an unsafe request (RFC 9110 §9.2.1) since this rule serves. It belongs to the process: it is no part of
/// what two rules are compared by.
#[derive(Default)]
pub struct Written(AtomicBool);

impl Written {
    /// A client sends such a request.
    pub fn note(&self) {
        if !self.get() {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Whether one has.
    #[must_use]
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Clone for Written {
    fn clone(&self) -> Self {
        Self(AtomicBool::new(self.get()))
    }
}

impl fmt::Debug for Written {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}

/// `rollout`: a share of clients, the same ones each time and on every instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollout {
    /// Hundredths of a percent, up to 10,000.
    share: u16,
}

impl Rollout {
    /// All clients.
    pub const ALL: Self = Self { share: 10_000 };

    /// A share such as `10%` or `0.5%`.
    ///
    /// # Errors
    /// A sentence that says what is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        share(text).map(|share| Self { share })
    }

    /// Whether the rule of this name caches for a client. Those of a smaller share are among those of a larger one.
    #[must_use]
    pub fn includes(self, route: &str, client: IpAddr) -> bool {
        self == Self::ALL || Self::place(route, client) < self.share
    }

    /// The share from which on a client is included, in hundredths of a percent. Clients of one IPv6 /64 are one.
    #[must_use]
    pub fn place(route: &str, client: IpAddr) -> u16 {
        let digest = match client.to_canonical() {
            IpAddr::V4(address) => xxh3_64_with_seed(&address.octets(), xxh3_64(route.as_bytes())),
            IpAddr::V6(address) => xxh3_64_with_seed(&address.octets()[..8], xxh3_64(route.as_bytes())),
        };
        u16::try_from(digest % 10_000).unwrap_or_default()
    }
}

impl fmt::Display for Rollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.share / 100, self.share % 100) {
            (whole, 0) => write!(f, "{whole}%"),
            (whole, part) => write!(f, "{whole}.{part:02}%"),
        }
    }
}

/// `request_headers`: which fields of clients' requests reach the upstream where others get the response too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestFields {
    /// These, which are part of the key, and those that the upstream names in `Vary`. Lower-case, sorted.
    Listed(Vec<HeaderName>),
    /// All of them: the upstream names in `Vary` whatever its responses depend on.
    All,
}

impl RequestFields {
    /// The fields that are part of the key.
    #[must_use]
    pub fn listed(&self) -> &[HeaderName] {
        match self {
            Self::Listed(listed) => listed,
            Self::All => &[],
        }
    }
}

/// The paths that a rule serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathPattern {
    /// This path and no other.
    Exact(String),
    /// This path (which ends in `/`) and everything below it.
    Below(String),
}

/// `route.history`: answers about a past that is closed may live longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// The parameter that says where the answer's span ends.
    pub parameter: String,
    /// How long ago it must have ended.
    pub older_than: Duration,
    /// How long the answer is then fresh.
    pub ttl: Duration,
}

impl PathPattern {
    /// Whether a decoded path is one of these.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == path,
            Self::Below(prefix) => path.starts_with(prefix.as_str()),
        }
    }

    /// Whether a decoded path is the one of these, but for a `/` more or less at its end.
    #[must_use]
    pub fn is_beside(&self, path: &str) -> bool {
        match (self, path.strip_suffix('/')) {
            (Self::Exact(exact), Some(bare)) => exact == bare,
            (Self::Exact(exact), None) => exact.strip_suffix('/') == Some(path),
            (Self::Below(_), _) => false,
        }
    }

    /// Whether everything that `other` matches is matched by this too.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Exact(path)) => self.matches(path),
            (Self::Below(mine), Self::Below(theirs)) => theirs.starts_with(mine.as_str()),
            (Self::Exact(_), Self::Below(_)) => false,
        }
    }

    /// Whether a path is among these and among `other`'s.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

impl Route {
    /// Whether what this rule has stored is for `other` too, and is voided by the same changes: as far as this goes they are one rule.
    #[must_use]
    pub fn goes_on_as(&self, other: &Self) -> bool {
        let same = |method: &Method| self.methods.contains(method) == other.methods.contains(method);
        let same_requests = self.name == other.name && self.shape == other.shape && self.path == other.path;
        same_requests && same(&Method::GET) && same(&Method::HEAD) && self.cache == other.cache
    }

    /// Whether this rule serves the target.
    #[must_use]
    pub fn matches(&self, target: &Target<'_>) -> bool {
        self.path.matches(&target.path) && self.has_parameters(target)
    }

    /// Whether the target has the parameters that the rule wants, and none that it does not.
    fn has_parameters(&self, target: &Target<'_>) -> bool {
        self.with.iter().all(|name| target.has(name)) && !self.without.iter().any(|name| target.has(name))
    }

    /// Whether the rule caches responses to a method. HEAD is answered from what is stored for GET if `head_as_get`.
    #[must_use]
    pub fn caches(&self, method: &Method, head_as_get: bool) -> bool {
        // Responses to POST may be stored for GET, but each POST itself goes to the upstream.
        let named = *method != Method::POST && self.methods.contains(method);
        named || (head_as_get && method == Method::HEAD && self.methods.contains(&Method::GET))
    }

    /// Whether anything may be stored under this rule that is used without the backend's word: else nothing needs to be voided.
    #[must_use]
    pub fn may_store(&self) -> bool {
        let policy = &self.policy;
        let lifetimes = [policy.ttl, policy.negative_ttl, policy.stale_while_revalidate, policy.stale_if_error];
        let lives = policy.respect_origin || policy.heuristic || lifetimes.iter().any(|span| !span.is_zero());
        let reads = self.methods.iter().any(|method| matches!(*method, Method::GET | Method::HEAD));
        self.cache && reads && (lives || self.timeline || self.history.is_some())
    }

    /// Whether a request has credentials that are not part of the key: its response may be for one client alone.
    #[must_use]
    pub fn sees_credentials(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(AUTHORIZATION) || (headers.contains_key(API_KEY) && !self.request_fields.listed().contains(&API_KEY))
    }

    /// Whether the response to this method, which is passed on, may store or update what answers GET.
    #[must_use]
    pub fn updates_from(&self, method: &Method) -> bool {
        let named = self.methods.contains(method) || *method == Method::HEAD;
        self.cache && named && matches!(*method, Method::HEAD | Method::POST) && self.methods.contains(&Method::GET)
    }

    /// How long the rule lets a response for `target` live that is asked for at `now`.
    #[must_use]
    pub fn policy_for(&self, target: &Target<'_>, now: Wall) -> FreshnessPolicy {
        match &self.history {
            Some(history) if history.applies(target, now) => FreshnessPolicy { ttl: history.ttl, ..self.policy },
            _ => self.policy,
        }
    }
}

impl History {
    /// Whether the target asks about a span that ended long enough before `now`. A time that cannot be read is not in the
    /// past.
    #[must_use]
    pub fn applies(&self, target: &Target<'_>, now: Wall) -> bool {
        let Some(end) = target.text(&self.parameter).and_then(|text| timestamp::parse(&text)) else { return false };
        let closed = now.as_millis().saturating_sub(millis(self.older_than));
        i64::try_from(closed).is_ok_and(|closed| end <= closed)
    }
}

/// The first rule that matches; none for a doubtful path.
#[must_use]
pub fn select<'r>(routes: &'r [Route], target: &Target<'_>) -> Option<&'r Route> {
    if target.doubtful {
        return None;
    }
    routes.iter().find(|route| route.matches(target))
}

/// The rule of the same path with a `/` more at its end, or without that, if the target is not doubtful: many programs serve both
/// alike, so that its limits count too. Nothing is allocated.
#[must_use]
pub fn beside<'r>(routes: &'r [Route], target: &Target<'_>) -> Option<&'r Route> {
    routes.iter().find(|route| route.path.is_beside(&target.path) && !target.doubtful && route.has_parameters(target))
}

/// The rules to which a doubtful target may lead, by whatever program reads it ([`readings`]): those whose limits count its
/// requests. All of them, if its path is too long to be read in every way.
#[must_use]
pub fn may_serve<'r>(routes: &'r [Route], text: &str, target: &Target<'_>) -> Vec<&'r Route> {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    if path.len() > readings::MAX_READ {
        return routes.iter().collect();
    }
    // Programs that separate parameters elsewhere find others than those that were read.
    let is_certain = !query.bytes().any(|byte| matches!(byte, b';' | b'%') || !byte.is_ascii_graphic());
    let mut found: Vec<&Route> = Vec::new();
    for path in readings::paths(text) {
        found.extend(routes.iter().filter(|route| route.path.is_beside(&path)));
        for route in routes.iter().filter(|route| route.path.matches(&path)) {
            let for_all = route.with.is_empty() && route.without.is_empty();
            let matches = for_all || route.has_parameters(target);
            if (matches || !is_certain) && !found.iter().any(|known| known.index == route.index) {
                found.push(route);
            }
            if for_all || (matches && is_certain) {
                break;
            }
        }
    }
    found.sort_unstable_by_key(|route| route.index);
    found.dedup_by_key(|route| route.index);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubtful_target_leads_to_each_rule_that_a_reading_of_it_does() {
        let rule = |name: &str, path: &str, lines: &str| format!("[[route]]\nname='{name}'\npath='{path}'\n{lines}\n");
        let routes = crate::config::tests::routes(
            &[
                rule("orders", "/api/orders", ""),
                rule("day", "/api/x", "with=['day']"),
                rule("x", "/api/x", ""),
                rule("y", "/api/y/", ""),
                rule("api", "/api/*", ""),
                rule("rest", "/*", ""),
            ]
            .concat(),
        );
        for (text, names) in [
            ("/api/./orders", "api orders"),
            ("/api/orders?a;b", "orders"),
            ("/api//orders/x", "api"),
            ("/api/z/..;/x?day=1&{}", "api day"),
            ("/api/./x?a=1", "api x"),
            ("/api/./x?a=1;day=2", "api day x"),
            ("/other//x", "rest"),
            ("/api/./y", "api y"),
        ] {
            let target = Target::parse(text).unwrap();
            let mut found: Vec<&str> = may_serve(&routes, text, &target).iter().map(|route| route.name.as_str()).collect();
            found.sort_unstable();
            assert!(target.doubtful && names.split(' ').all(|name| found.contains(&name)), "{text}: {found:?}");
            assert!(found.iter().all(|name| names.contains(name) || *name == "rest"), "{text}: {found:?}");
        }
    }

    #[test]
    fn a_doubtful_target_whose_path_is_long_leads_to_all_rules() {
        let routes = crate::config::tests::routes("[[route]]\nname='a'\npath='/a'\n[[route]]\nname='b'\npath='/b/*'\n");
        let count = |text: &str| may_serve(&routes, text, &Target::parse(text).unwrap()).len();
        let long = "%255c..;/%2f//.".repeat(80);
        assert_eq!((count(&format!("/{long}")), count(&format!("/c;?{long}")), count("/c//")), (2, 0, 0));
    }

    #[test]
    fn the_rule_beside_a_target_has_its_path_but_for_a_slash_at_the_end() {
        let rule = |name: &str, path: &str, lines: &str| format!("[[route]]\nname='{name}'\npath='{path}'\n{lines}\n");
        let routes = crate::config::tests::routes(
            &[
                rule("day", "/api/x", "with=['day']"),
                rule("x", "/api/x", ""),
                rule("y", "/api/y/", ""),
                rule("root", "/", ""),
                rule("rest", "/*", ""),
            ]
            .concat(),
        );
        for (text, name) in [
            ("/api/x/", Some("x")),
            ("/api/%78/?a", Some("x")),
            ("/api/x/?day=1", Some("day")),
            ("/api/y", Some("y")),
            ("/api/x", None),
            ("/api/y/", None),
            ("/api/z/", None),
            ("/api/x//", None),
            ("/", None),
        ] {
            let target = Target::parse(text).unwrap();
            assert_eq!(beside(&routes, &target).map(|route| route.name.as_str()), name, "{text}");
        }
    }

    #[test]
    fn patterns() {
        let below = PathPattern::Below("/api/".into());
        let exact = PathPattern::Exact("/api/symbols".into());
        assert!(below.matches("/api/x/y") && below.matches("/api/") && !below.matches("/api") && !below.matches("/apis"));
        assert!(exact.matches("/api/symbols") && !exact.matches("/api/symbols/"));
        assert!(below.covers(&exact) && !exact.covers(&below));
    }

    #[test]
    fn a_rollout_is_a_share_of_clients_and_a_larger_one_includes_a_smaller_one() {
        for (text, shown) in [("10%", "10%"), ("0.5%", "0.50%"), ("100%", "100%"), ("0%", "0%"), ("33.33%", "33.33%")] {
            assert_eq!(Rollout::parse(text).unwrap().to_string(), shown);
        }
        for text in ["", "10", "%", "101%", "-1%", "1.234%", "x%", "1e1%"] {
            assert!(Rollout::parse(text).is_err(), "{text}");
        }
        let clients = || (0..10_000_u32).map(|number| IpAddr::from((0x0a00_0000 + number).to_be_bytes()));
        let included = |text: &str| clients().filter(|client| Rollout::parse(text).unwrap().includes("r", *client)).count();
        assert_eq!((included("0%"), included("100%")), (0, 10_000));
        assert!((850..1150).contains(&included("10%")), "{}", included("10%"));
        let (few, many) = (Rollout::parse("10%").unwrap(), Rollout::parse("11%").unwrap());
        assert!(clients().all(|client| !few.includes("r", client) || many.includes("r", client)));
        assert!(clients().any(|client| few.includes("r", client) != few.includes("other", client)), "another rule, other clients");
        let neighbours = ["2001:db8::1", "2001:db8::2"].map(|text| Rollout::place("r", text.parse().unwrap()));
        assert_eq!(neighbours[0], neighbours[1]);
    }

    #[test]
    fn history_is_a_closed_past() {
        let history = History { parameter: "end".into(), older_than: Duration::from_secs(3600), ttl: Duration::from_secs(86_400) };
        let now = Wall::from_millis(1_735_693_200_000);
        for (query, applies) in [
            ("end=1735689600000", true),
            ("end=1735689600001", false),
            ("end=2025-01-01", true),
            ("end=2025-01-02", false),
            ("end=2025-01-01&end=2025-01-02", false),
            ("end=soon", false),
            ("end=99999999999999999999999", false),
            ("other=1", false),
        ] {
            let target = format!("/?{query}");
            assert_eq!(history.applies(&Target::parse(&target).unwrap(), now), applies, "{query}");
        }
    }
}
