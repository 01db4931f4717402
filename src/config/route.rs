//! Which rule serves a request, and what the rule says.

use std::time::Duration;

use http::Method;

use super::template::Template;
use crate::clock::{Wall, millis};
use crate::http::freshness::FreshnessPolicy;
use crate::request::target::Target;
use crate::request::timestamp;

/// One `[[route]]`, compiled.
#[derive(Clone, Debug)]
pub struct Route {
    /// The place in the configuration, which is also its row in tables kept by route.
    pub index: usize,
    /// The name, for metrics, logs and `explain`.
    pub name: String,
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
    /// Whether responses to requests with `Authorization` may be shared where they say so (`authorization = "respect"`).
    pub share_authorized: bool,
    /// Whether a response in a language is also for those who prefer that language (`language = "prefer"`).
    pub match_language: bool,
    /// Whether a `Range` is sent on where nothing is stored, and the beginning that comes so is completed later
    /// (`parts = "complete"`).
    pub complete_ranges: bool,
    /// Whether `Cache-Control` of requests counts (`client_directives = "respect"`).
    pub client_directives: bool,
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

    /// Whether everything that `other` matches is matched by this too.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Exact(path)) => self.matches(path),
            (Self::Below(mine), Self::Below(theirs)) => theirs.starts_with(mine.as_str()),
            (Self::Exact(_), Self::Below(_)) => false,
        }
    }
}

impl Route {
    /// Whether this rule serves the target.
    #[must_use]
    pub fn matches(&self, target: &Target<'_>) -> bool {
        self.path.matches(&target.path)
            && self.with.iter().all(|name| target.has(name))
            && !self.without.iter().any(|name| target.has(name))
    }

    /// Whether the rule caches responses to a method. HEAD is answered from what is stored for GET if `head_as_get`.
    #[must_use]
    pub fn caches(&self, method: &Method, head_as_get: bool) -> bool {
        // Responses to POST may be stored for GET, but each POST itself goes to the upstream.
        let named = *method != Method::POST && self.methods.contains(method);
        named || (head_as_get && method == Method::HEAD && self.methods.contains(&Method::GET))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let below = PathPattern::Below("/api/".into());
        let exact = PathPattern::Exact("/api/symbols".into());
        assert!(below.matches("/api/x/y") && below.matches("/api/") && !below.matches("/api") && !below.matches("/apis"));
        assert!(exact.matches("/api/symbols") && !exact.matches("/api/symbols/"));
        assert!(below.covers(&exact) && !exact.covers(&below));
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
