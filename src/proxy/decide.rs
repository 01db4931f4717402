//! What to do with a request: the cache's policy on one screen.
//!
//! Three questions, all pure. Before anything is looked up: does the cache have a say ([`admit`])? After it: what does the
//! stored response that was found allow now ([`decide`]), and what is left of that once the client's own directives count
//! ([`respect_directives`])?

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderMap, Method};

use super::outcome::{FetchWhy, PassWhy};
use crate::cache::entry::{Content, Entry};
use crate::clock::Wall;
use crate::config::route::Route;
use crate::http::cache_control::CacheControl;
use crate::http::freshness::Lifetimes;
use crate::http::request_directives::RequestDirectives;

/// What [`admit`] needs of a request.
#[derive(Clone, Copy, Debug)]
pub struct Admission<'a> {
    /// The method.
    pub method: &'a Method,
    /// The fields.
    pub headers: &'a HeaderMap,
    /// Whether the request has a body, or announces one.
    pub has_body: bool,
    /// Whether programs may disagree about what its target means.
    pub doubtful: bool,
    /// Which client asks; `None`: Sluice itself.
    pub client: Option<IpAddr>,
    /// Whether HEAD is answered from what is stored for GET (`backend.head = "get"`).
    pub head_as_get: bool,
}

/// The rule by which the cache may answer a request.
///
/// # Errors
/// The reason why the request goes past the cache.
pub fn admit<'r>(route: Option<&'r Route>, request: Admission<'_>) -> Result<&'r Route, PassWhy> {
    if request.doubtful {
        return Err(PassWhy::DoubtfulPath);
    }
    let route = route.ok_or(PassWhy::NoRule)?;
    if !route.caches(request.method, request.head_as_get) {
        return Err(PassWhy::Method);
    }
    if !route.cache {
        return Err(PassWhy::Rule);
    }
    if request.client.is_some_and(|client| !route.rollout.includes(&route.name, client)) {
        return Err(PassWhy::Rollout);
    }
    // RFC 9111 §3.5: a shared cache neither answers nor stores these, but for the exceptions that a rule must allow.
    if route.sees_credentials(request.headers) && !route.share_authorized {
        return Err(PassWhy::Authorization);
    }
    if request.has_body {
        return Err(PassWhy::Body);
    }
    Ok(route)
}

/// What a stored response allows at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Serve it: it is fresh for this much longer.
    Hit(Duration),
    /// Serve it although it went stale so long ago, and revalidate it in the background (RFC 5861 §3).
    StaleAndRevalidate(Duration),
    /// Serve it although it went stale so long ago: the upstream failed lately and is spared. When its breaker allows a
    /// trial, one request revalidates in the background.
    StaleWhileFailing(Duration),
    /// Ask the upstream; `fallback` says how long ago the stored response went stale that may be served if that fails.
    Fetch {
        /// Why.
        why: FetchWhy,
        /// How long ago it went stale.
        fallback: Option<Duration>,
    },
    /// Ask the upstream and store nothing: the client says `no-store`.
    FetchUnstored,
    /// Do not ask the upstream: the client says `only-if-cached`.
    OnlyIfCached,
}

/// How far the clocks of two instances may differ before a response stored in the future is distrusted.
const MAX_SKEW: Duration = Duration::from_secs(5);

/// Decides for what was found: a response stored at a moment with these lifetimes, or why there is none.
///
/// `upstream_failing` says whether the upstream failed lately and is spared; it is asked only if that matters.
#[must_use]
pub fn decide(found: Result<(Wall, Lifetimes), FetchWhy>, now: Wall, upstream_failing: impl FnOnce() -> bool) -> Decision {
    let (stored_at, lifetimes) = match found {
        Ok(found) => found,
        Err(why) => return Decision::Fetch { why, fallback: None },
    };
    let age = now.since(stored_at);
    // A clock that was set back must not make a response live longer than it may. Between instances, clocks differ a little.
    if age < lifetimes.fresh && stored_at.since(now) <= MAX_SKEW {
        return Decision::Hit(lifetimes.fresh.saturating_sub(age));
    }
    let by = age.saturating_sub(lifetimes.fresh);
    let may_replace_errors = by < lifetimes.stale_if_error;
    if by < lifetimes.stale_while_revalidate {
        return if upstream_failing() { Decision::StaleWhileFailing(by) } else { Decision::StaleAndRevalidate(by) };
    }
    if may_replace_errors && upstream_failing() {
        return Decision::StaleWhileFailing(by);
    }
    Decision::Fetch { why: FetchWhy::Stale, fallback: may_replace_errors.then_some(by) }
}

/// Whether a response that is fresh for `left` of `fresh` is to be refreshed already: by chance, the more likely the nearer its end and
/// the more a fetch costs (XFetch: Vattani, Chierichetti and Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB
/// 2015). Each request throws the dice, so what is asked for often is refreshed in time, and what is not, not. `random` gives numbers
/// from 0 to 1; it is asked only where that can matter.
#[must_use]
pub fn is_early(left: Duration, fresh: Duration, cost: Duration, random: impl FnOnce() -> f64) -> bool {
    // With less than one chance in e^12 it is not worth a throw; and half of a life is lived in any case.
    if left > cost * 12 || left > fresh / 2 {
        return false;
    }
    left.as_secs_f64() < cost.as_secs_f64() * -random().max(f64::MIN_POSITIVE).ln()
}

/// What is left of a decision about what was found once the client's directives count (RFC 9111 §5.2.1).
#[must_use]
pub fn respect_directives(directives: &RequestDirectives, decision: Decision, found: Option<&Entry>, now: Wall) -> Decision {
    let decision = found.map_or(decision, |entry| restrict(directives, decision, entry, now));
    match decision {
        Decision::Fetch { .. } if directives.only_if_cached => Decision::OnlyIfCached,
        Decision::Fetch { .. } if directives.no_store => Decision::FetchUnstored,
        _ => decision,
    }
}

/// A client may want something fresher than the cache would serve it, or be content with something staler.
fn restrict(directives: &RequestDirectives, decision: Decision, entry: &Entry, now: Wall) -> Decision {
    let age = Duration::from_secs(entry.age(now));
    let stale_by = now.since(entry.stored_at).checked_sub(entry.lifetimes.fresh);
    let too_old = directives.no_cache || directives.max_age.is_some_and(|most| age > most);
    let too_short = |left: Duration| directives.min_fresh.is_some_and(|least| left < least);
    let ask = Decision::Fetch { why: FetchWhy::Request, fallback: None };
    match (decision, stale_by) {
        (Decision::Hit(left), _) if too_old || too_short(left) => ask,
        (Decision::StaleAndRevalidate(_) | Decision::StaleWhileFailing(_), _) if too_old || directives.min_fresh.is_some() => ask,
        (Decision::Fetch { why: FetchWhy::Stale, .. }, Some(by))
            if !too_old && directives.max_stale.is_some_and(|most| by <= most) && may_be_stale_on_request(entry) =>
        {
            Decision::StaleAndRevalidate(by)
        }
        _ => decision,
    }
}

/// Whether a client's `max-stale` may make a stale response be served (RFC 9111 §4.2.4).
fn may_be_stale_on_request(entry: &Entry) -> bool {
    let Content::Response(response) = &entry.content else { return false };
    let control = CacheControl::of(&response.fields);
    // What was stale already when it was stored is staler than its time in the cache says.
    !(entry.lifetimes.fresh.is_zero() || control.must_revalidate || control.no_cache || control.s_maxage.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::codec::tests::entry;
    use crate::config::tests::routes;
    use http::HeaderValue;
    use http::header::AUTHORIZATION;
    use http::header::CACHE_CONTROL;
    use proptest::prelude::*;

    const START: Wall = Wall::from_millis(1_000_000_000);
    const LIFETIMES: Lifetimes = Lifetimes {
        fresh: Duration::from_secs(10),
        stale_while_revalidate: Duration::from_secs(5),
        stale_if_error: Duration::from_secs(100),
        validatable: Duration::ZERO,
    };

    fn at(seconds: u64, failing: bool) -> Decision {
        decide(Ok((START, LIFETIMES)), START + Duration::from_secs(seconds), || failing)
    }

    #[test]
    fn a_stored_response_is_fresh_then_stale_then_gone() {
        let s = Duration::from_secs;
        let fetch = |fallback| Decision::Fetch { why: FetchWhy::Stale, fallback };
        assert_eq!(at(0, false), Decision::Hit(s(10)));
        assert_eq!(at(9, true), Decision::Hit(s(1)));
        assert_eq!(at(10, false), Decision::StaleAndRevalidate(s(0)));
        assert_eq!(at(14, false), Decision::StaleAndRevalidate(s(4)));
        assert_eq!(at(14, true), Decision::StaleWhileFailing(s(4)));
        assert_eq!(at(15, false), fetch(Some(s(5))));
        assert_eq!(at(15, true), Decision::StaleWhileFailing(s(5)));
        assert_eq!(at(109, false), fetch(Some(s(99))));
        assert_eq!(at(110, true), fetch(None));
        for why in [FetchWhy::UriMiss, FetchWhy::VaryMiss] {
            assert_eq!(decide(Err(why), START, || true), Decision::Fetch { why, fallback: None });
        }
    }

    #[test]
    fn a_response_from_the_far_future_is_not_fresh() {
        let far = Ok((START + Duration::from_secs(60), LIFETIMES));
        assert!(!matches!(decide(far, START, || false), Decision::Hit(_)));
        let near = Ok((START + Duration::from_secs(2), LIFETIMES));
        assert_eq!(decide(near, START, || false), Decision::Hit(Duration::from_secs(10)));
    }

    #[test]
    fn only_plain_reads_of_caching_rules_are_admitted() {
        let rule = |lines: &str| routes(&format!("[[route]]\nname='r'\npath='/*'\n{lines}\n")).remove(0);
        let (plain, posts) = (rule(""), rule("methods=['GET','POST']"));
        let (shares, passes) = (rule("authorization='respect'"), rule("cache=false"));
        let (none, secret) = (HeaderMap::new(), HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static("x"))]));
        let client = Some("192.0.2.1".parse().unwrap());
        let get = Admission { method: &Method::GET, headers: &none, has_body: false, doubtful: false, head_as_get: true, client };
        let nobody = rule("rollout='0%'");
        let head = Admission { method: &Method::HEAD, ..get };
        for (route, request, refused) in [
            (Some(&plain), get, None),
            (Some(&plain), head, None),
            (Some(&plain), Admission { head_as_get: false, ..head }, Some(PassWhy::Method)),
            (Some(&plain), Admission { method: &Method::POST, ..get }, Some(PassWhy::Method)),
            (Some(&posts), Admission { method: &Method::POST, ..get }, Some(PassWhy::Method)),
            (Some(&plain), Admission { headers: &secret, ..get }, Some(PassWhy::Authorization)),
            (Some(&shares), Admission { headers: &secret, ..get }, None),
            (Some(&plain), Admission { has_body: true, ..get }, Some(PassWhy::Body)),
            (Some(&passes), get, Some(PassWhy::Rule)),
            (Some(&nobody), get, Some(PassWhy::Rollout)),
            (Some(&nobody), Admission { client: None, ..get }, None),
            (None, get, Some(PassWhy::NoRule)),
            (None, Admission { doubtful: true, ..get }, Some(PassWhy::DoubtfulPath)),
        ] {
            assert_eq!(admit(route, request).err(), refused, "{request:?}");
        }
    }

    #[test]
    fn a_clients_directives_change_decisions() {
        let s = Duration::from_secs;
        let (hit, stale) = (Decision::Hit(s(10)), Decision::Fetch { why: FetchWhy::Stale, fallback: None });
        let ask = Decision::Fetch { why: FetchWhy::Request, fallback: None };
        // Twelve seconds old; stale for nine, in the last cases.
        let mut stored = entry(b"x", &[], "");
        (stored.stored_at, stored.age_when_stored) = (START, 0);
        for (text, fresh, decision, expected) in [
            ("no-cache", 20, hit, ask),
            ("max-age=5", 20, hit, ask),
            ("max-age=20", 20, hit, hit),
            ("max-age=soon", 20, hit, ask),
            ("min-fresh=11", 20, hit, ask),
            ("min-fresh=10", 20, hit, hit),
            ("foo, only-if-cached", 20, hit, hit),
            ("min-fresh=1", 11, Decision::StaleAndRevalidate(s(1)), ask),
            ("max-stale", 3, stale, Decision::StaleAndRevalidate(s(9))),
            ("max-stale=8", 3, stale, stale),
            ("max-stale, max-age=5", 3, stale, stale),
            ("max-stale", 0, stale, stale),
            ("no-store", 3, stale, Decision::FetchUnstored),
            ("only-if-cached, no-store", 3, stale, Decision::OnlyIfCached),
            ("only-if-cached, no-cache", 20, hit, Decision::OnlyIfCached),
        ] {
            let headers = HeaderMap::from_iter([(CACHE_CONTROL, HeaderValue::from_static(text))]);
            stored.lifetimes.fresh = s(fresh);
            let left = respect_directives(&RequestDirectives::of(&headers), decision, Some(&stored), START + s(12));
            assert_eq!(left, expected, "{text}, fresh for {fresh} s");
        }
    }

    #[test]
    fn what_costs_much_and_is_nearly_over_is_refreshed_early() {
        let ms = Duration::from_millis;
        let early = |left, fresh, cost, random: f64| is_early(ms(left), ms(fresh), ms(cost), || random);
        assert!(early(100, 10_000, 200, 0.5) && !early(150, 10_000, 200, 0.5));
        assert!(early(900, 10_000, 200, 0.01) && !early(1000, 10_000, 200, 0.01));
        assert!(!early(600, 1000, 5000, 0.0), "in the first half of its life");
        assert!(!is_early(ms(2500), ms(10_000), ms(200), || panic!("no dice are thrown")));
        assert!(!early(1, 1000, 0, 0.5) && !early(0, 0, 0, 1.0));
    }

    proptest! {
        #[test]
        fn nothing_is_served_past_its_lifetimes(
            fresh in 0u64..1000, swr in 0u64..1000, sie in 0u64..1000, age in 0u64..4000, failing: bool,
        ) {
            let s = Duration::from_secs;
            let lifetimes = Lifetimes { fresh: s(fresh), stale_while_revalidate: s(swr), stale_if_error: s(sie), validatable: s(3600) };
            match decide(Ok((START, lifetimes)), START + s(age), || failing) {
                Decision::Hit(left) => prop_assert_eq!(s(age) + left, s(fresh)),
                Decision::StaleAndRevalidate(by) => prop_assert!(age >= fresh && by < s(swr)),
                Decision::StaleWhileFailing(by) => prop_assert!(age >= fresh && failing && by < s(swr.max(sie))),
                Decision::Fetch { fallback, .. } => {
                    prop_assert!(age >= fresh);
                    prop_assert!(fallback.is_none_or(|by| by < s(sie)));
                }
                other => prop_assert!(false, "only a client's directives lead to {other:?}"),
            }
        }
    }
}
