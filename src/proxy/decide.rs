//! What to do with a request: the whole cache policy of a request on one screen.
//!
//! Two questions, both pure. Before the lookup: may the cache have a say at all ([`admit`])? After it: what does the
//! entry that was found allow now ([`decide`])?

use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderMap, Method};

use crate::clock::Wall;
use crate::http::freshness::Lifetimes;
use crate::proxy::outcome::{FetchWhy, PassWhy};

/// What of a rule bears on whether the cache has a say.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// `cache` of the rule.
    pub cache: bool,
    /// `methods` of the rule.
    pub methods: &'a [Method],
    /// Whether HEAD is answered from GET (`backend.head = "get"`).
    pub head_as_get: bool,
    /// Whether the backend's answers to requests with `Authorization` may be shared where they say so
    /// (`authorization = "respect"`).
    pub authorization: bool,
}

/// Whether the cache may answer this request, before anything is looked up.
///
/// # Errors
/// The reason why the request goes past the cache.
pub fn admit(rule: Option<Rule<'_>>, method: &Method, headers: &HeaderMap, has_body: bool) -> Result<(), PassWhy> {
    let Some(rule) = rule else { return Err(PassWhy::NoRule) };
    let head_of_get = rule.head_as_get && method == Method::HEAD && rule.methods.contains(&Method::GET);
    // What a POST says may teach the cache, but each goes to the backend.
    if *method == Method::POST || (!rule.methods.contains(method) && !head_of_get) {
        return Err(PassWhy::Method);
    }
    if !rule.cache {
        return Err(PassWhy::Rule);
    }
    // RFC 9111 §3.5: a shared cache does not answer or store these, but for the exceptions that a rule must allow.
    if headers.contains_key(AUTHORIZATION) && !rule.authorization {
        return Err(PassWhy::Authorization);
    }
    if has_body {
        return Err(PassWhy::Body);
    }
    Ok(())
}

/// What an entry allows at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Serve it: it is fresh for this much longer.
    Hit(Duration),
    /// Serve it although it went stale so long ago, and have it refreshed.
    StaleAndRefresh(Duration),
    /// Serve it although it went stale so long ago: the backend failed lately and is left alone. A single request
    /// tries the backend in the background.
    StaleLeftAlone(Duration),
    /// Ask the backend; `fallback` says how long ago the entry went stale that may be served if the backend fails.
    Fetch {
        /// Why.
        why: FetchWhy,
        /// The age past freshness of an entry that may stand in.
        fallback: Option<Duration>,
    },
}

/// Decides for a stored response that lives `lifetimes` from `stored_at`.
///
/// `backend_rests` says that the backend failed lately and should be spared (see `breaker`).
#[must_use]
pub fn decide(entry: Option<(Wall, Lifetimes)>, now: Wall, backend_rests: bool) -> Decision {
    let Some((stored_at, lives)) = entry else {
        return Decision::Fetch { why: FetchWhy::UriMiss, fallback: None };
    };
    let age = now.since(stored_at);
    // A clock that was set back must not make an entry live longer than it was granted: an entry from the future is
    // as old as it can be and still be fresh only if it is from the near future, as between instances.
    if age < lives.fresh && stored_at.since(now) <= MAX_SKEW {
        return Decision::Hit(lives.fresh.saturating_sub(age));
    }
    let by = age.saturating_sub(lives.fresh);
    let within_error = by < lives.stale_if_error;
    if by < lives.stale_while_revalidate {
        return if backend_rests { Decision::StaleLeftAlone(by) } else { Decision::StaleAndRefresh(by) };
    }
    if within_error && backend_rests {
        return Decision::StaleLeftAlone(by);
    }
    Decision::Fetch { why: FetchWhy::Stale, fallback: within_error.then_some(by) }
}

/// How far the clocks of two instances may differ before an entry from the future is distrusted.
const MAX_SKEW: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    const START: Wall = Wall::from_millis(1_000_000_000);
    const LIVES: Lifetimes = Lifetimes {
        fresh: Duration::from_secs(10),
        stale_while_revalidate: Duration::from_secs(5),
        stale_if_error: Duration::from_secs(100),
        validatable: Duration::ZERO,
    };

    fn at(seconds: u64, rests: bool) -> Decision {
        decide(Some((START, LIVES)), START + Duration::from_secs(seconds), rests)
    }

    #[test]
    fn the_lives_of_an_entry() {
        let s = Duration::from_secs;
        let fetch = |fallback| Decision::Fetch { why: FetchWhy::Stale, fallback };
        assert_eq!(at(0, false), Decision::Hit(s(10)));
        assert_eq!(at(9, true), Decision::Hit(s(1)));
        assert_eq!(at(10, false), Decision::StaleAndRefresh(s(0)));
        assert_eq!(at(14, false), Decision::StaleAndRefresh(s(4)));
        assert_eq!(at(14, true), Decision::StaleLeftAlone(s(4)));
        assert_eq!(at(15, false), fetch(Some(s(5))));
        assert_eq!(at(15, true), Decision::StaleLeftAlone(s(5)));
        assert_eq!(at(109, false), fetch(Some(s(99))));
        assert_eq!(at(110, true), fetch(None));
        assert_eq!(decide(None, START, true), Decision::Fetch { why: FetchWhy::UriMiss, fallback: None });
    }

    #[test]
    fn an_entry_from_the_far_future_is_not_fresh() {
        let entry = Some((START + Duration::from_secs(60), LIVES));
        assert!(!matches!(decide(entry, START, false), Decision::Hit(_)));
        let near = Some((START + Duration::from_secs(2), LIVES));
        assert_eq!(decide(near, START, false), Decision::Hit(Duration::from_secs(10)));
    }

    #[test]
    fn only_plain_reads_of_caching_rules_are_admitted() {
        let methods = [Method::GET];
        let rule = Rule { cache: true, methods: &methods, head_as_get: true, authorization: false };
        let none = HeaderMap::new();
        let mut secret = HeaderMap::new();
        secret.insert(AUTHORIZATION, HeaderValue::from_static("x"));
        assert_eq!(admit(Some(rule), &Method::GET, &none, false), Ok(()));
        assert_eq!(admit(Some(rule), &Method::HEAD, &none, false), Ok(()));
        assert_eq!(admit(Some(Rule { head_as_get: false, ..rule }), &Method::HEAD, &none, false), Err(PassWhy::Method));
        assert_eq!(admit(Some(rule), &Method::POST, &none, false), Err(PassWhy::Method));
        let posts = [Method::GET, Method::POST];
        assert_eq!(admit(Some(Rule { methods: &posts, ..rule }), &Method::POST, &none, false), Err(PassWhy::Method));
        assert_eq!(admit(Some(rule), &Method::GET, &secret, false), Err(PassWhy::Authorization));
        assert_eq!(admit(Some(Rule { authorization: true, ..rule }), &Method::GET, &secret, false), Ok(()));
        assert_eq!(admit(Some(rule), &Method::GET, &none, true), Err(PassWhy::Body));
        assert_eq!(admit(Some(Rule { cache: false, ..rule }), &Method::GET, &none, false), Err(PassWhy::Rule));
        assert_eq!(admit(None, &Method::GET, &none, false), Err(PassWhy::NoRule));
    }

    proptest! {
        #[test]
        fn nothing_is_served_past_what_it_was_granted(
            fresh in 0u64..1000, swr in 0u64..1000, sie in 0u64..1000, age in 0u64..4000, rests: bool,
        ) {
            let s = Duration::from_secs;
            let lives = Lifetimes { fresh: s(fresh), stale_while_revalidate: s(swr), stale_if_error: s(sie), validatable: s(3600) };
            match decide(Some((START, lives)), START + s(age), rests) {
                Decision::Hit(left) => prop_assert_eq!(s(age) + left, s(fresh)),
                Decision::StaleAndRefresh(by) => prop_assert!(age >= fresh && by < s(swr)),
                Decision::StaleLeftAlone(by) => prop_assert!(age >= fresh && rests && by < s(swr.max(sie))),
                Decision::Fetch { fallback, .. } => {
                    prop_assert!(age >= fresh);
                    prop_assert!(fallback.is_none_or(|by| by < s(sie)));
                }
            }
        }
    }
}
