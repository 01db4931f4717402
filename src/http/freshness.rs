//! How long a response may be used, and by whom: what a rule says and what the response says, brought together
//! (RFC 9111 §3, §4.2; RFC 5861).

use std::time::Duration;

use http::header::{DATE, ETAG, EXPIRES, LAST_MODIFIED, SET_COOKIE};
use http::{HeaderMap, StatusCode};

use super::cache_control::CacheControl;
use super::encoding::Coding;
use super::headers::{age, http_date};
use super::vary::Vary;
use crate::clock::Wall;

/// How long a rule lets responses live, before the response itself says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreshnessPolicy {
    /// Fresh for so long (200, 203, 204). Zero: only what the backend's own headers allow.
    pub ttl: Duration,
    /// Fresh for so long when the answer is 404 or 410.
    pub negative_ttl: Duration,
    /// After that, served stale for so long while one request refreshes it.
    pub stale_while_revalidate: Duration,
    /// After that, served stale for so long while the backend fails.
    pub stale_if_error: Duration,
    /// Whether the backend's `Cache-Control` and `Expires` override the above.
    pub respect_origin: bool,
    /// Where neither says anything: fresh for a tenth of the time since it was last modified (RFC 9111 §4.2.2).
    pub heuristic: bool,
    /// Whether an answer that sets a cookie may be stored all the same.
    pub set_cookie: bool,
    /// Whether the request is authorized, so that its answer is shared only where it says so.
    pub authorized: bool,
}

impl FreshnessPolicy {
    /// The same policy where only the freshness lifetime that the upstream itself declares counts.
    #[must_use]
    pub const fn explicit_only(self) -> Self {
        Self { ttl: Duration::ZERO, heuristic: false, respect_origin: true, ..self }
    }
}

/// How long a stored response may be used, each span counted from the moment it was stored or from the end of freshness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetimes {
    /// Fresh for so long from the moment it was stored.
    pub fresh: Duration,
    /// Then usable for so long while it is refreshed.
    pub stale_while_revalidate: Duration,
    /// Then usable for so long (from the end of freshness too) while the backend fails.
    pub stale_if_error: Duration,
    /// Kept for so long (from the end of freshness too) to be validated, and used only if the backend says that it
    /// still holds.
    pub validatable: Duration,
}

/// How long past its freshness an answer with a validator is kept.
const VALIDATABLE: Duration = Duration::from_secs(3600);
/// The longest that a heuristic makes anything fresh.
const HEURISTIC_CAP: Duration = Duration::from_secs(86_400);

impl Lifetimes {
    /// The same lifetimes for something that is `age` old and must be gone after `left`.
    #[must_use]
    pub fn ending_within(self, age: Duration, left: Duration) -> Self {
        let total = age.saturating_add(left);
        let fresh = self.fresh.min(total);
        let stale = |life: Duration| life.min(total.saturating_sub(fresh));
        Self {
            fresh,
            stale_while_revalidate: stale(self.stale_while_revalidate),
            stale_if_error: stale(self.stale_if_error),
            validatable: stale(self.validatable),
        }
    }

    /// What is left of them after a while.
    #[must_use]
    pub fn after(self, elapsed: Duration) -> Self {
        let over = elapsed.saturating_sub(self.fresh);
        Self {
            fresh: self.fresh.saturating_sub(elapsed),
            stale_while_revalidate: self.stale_while_revalidate.saturating_sub(over),
            stale_if_error: self.stale_if_error.saturating_sub(over),
            validatable: self.validatable.saturating_sub(over),
        }
    }

    /// How long it is worth keeping, from the moment it was stored.
    #[must_use]
    pub fn kept(&self) -> Duration {
        self.fresh.saturating_add(self.stale_while_revalidate.max(self.stale_if_error).max(self.validatable))
    }
}

/// Why a response is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unstorable {
    /// `no-store`.
    NoStore,
    /// `private`.
    Private,
    /// `no-cache`, and nothing to validate it by.
    NoCache,
    /// It sets a cookie.
    SetCookie,
    /// It answers a request with `Authorization` and does not say that others may have it (RFC 9111 §3.5).
    Authorized,
    /// `Vary: *`.
    VaryAny,
    /// A coding that Sluice cannot undo for clients that do not take it, and no freshness of the backend's own.
    Coding,
    /// No freshness from the rule or from the headers.
    NoFreshness,
    /// A status that is about one request: 206, 304, 401, 407, 429 and the like.
    Status,
    /// A stream without a known end ([`is_endless`](super::endless::is_endless)).
    Endless,
    /// A redirect to the host that the request named: who names another is sent there.
    Reflection,
    /// An answer that is an error and is therefore not stored, though it may be shared by those who wait for it.
    Error,
    /// Its body is larger than what may be stored (`cache.max_object`).
    TooLarge,
}

impl Unstorable {
    /// The reason as `Cache-Status` and the access log name it.
    #[must_use]
    pub const fn detail(self) -> &'static str {
        match self {
            Self::NoStore => "uncacheable-no-store",
            Self::Private => "uncacheable-private",
            Self::NoCache => "uncacheable-no-cache",
            Self::SetCookie => "uncacheable-set-cookie",
            Self::Authorized => "uncacheable-authorization",
            Self::VaryAny => "uncacheable-vary",
            Self::Coding => "uncacheable-coding",
            Self::NoFreshness => "uncacheable-no-freshness",
            Self::Status => "uncacheable-status",
            Self::Endless => "uncacheable-stream",
            Self::Reflection => "uncacheable-redirect",
            Self::Error => "uncacheable-error",
            Self::TooLarge => "uncacheable-too-large",
        }
    }
}

/// What may be done with a response that has just arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Give it to everyone who waits for it, and keep it.
    Store(Lifetimes),
    /// Give it to the one request that caused it, and store it to be validated: nobody else may have it before the upstream
    /// has said that it still holds.
    StoreForValidation(Lifetimes),
    /// Give it to everyone who waits for it, and forget it.
    Share(Unstorable),
    /// It belongs to the one request that caused it.
    Private(Unstorable),
}

/// Decides what may be done with a response on a caching rule.
#[must_use]
pub fn verdict(policy: &FreshnessPolicy, status: StatusCode, headers: &HeaderMap, now: Wall) -> Verdict {
    let mut control = CacheControl::of(headers);
    // RFC 9111 §5.2.2.3: a cache that implements the status's caching rules ignores `no-store`.
    control.no_store &= !(control.must_understand && is_understood(status));
    if let Some(reason) = never_shared(&control, headers, policy.set_cookie) {
        return Verdict::Private(reason);
    }
    if policy.authorized && !control.shares_authorized() {
        return Verdict::Private(Unstorable::Authorized);
    }
    if matches!(status.as_u16(), 100..=199 | 206 | 304 | 401 | 407 | 408 | 421 | 425 | 429) {
        return Verdict::Private(Unstorable::Status);
    }
    let validatable = if is_validatable(status, headers) { VALIDATABLE } else { Duration::ZERO };
    if control.no_cache {
        // §5.2.2.4: never used without being validated, not even when the backend fails.
        let lifetimes = Lifetimes { validatable, ..Lifetimes::default() };
        return if validatable.is_zero() { Verdict::Private(Unstorable::NoCache) } else { Verdict::StoreForValidation(lifetimes) };
    }
    let declared = if policy.respect_origin { explicit(&control, headers, now) } else { None };
    // Without a word from the backend, what it answered to others may be coded otherwise.
    if declared.is_none() && Coding::of(headers) == Coding::Opaque {
        return Verdict::Private(Unstorable::Coding);
    }
    let error = status.is_server_error() || (status.is_client_error() && !is_absent(status));
    let fresh = match declared {
        Some(fresh) => fresh,
        None if policy.heuristic => heuristic(&control, status, headers, now).unwrap_or_else(|| rule_lifetime(policy, status)),
        None => rule_lifetime(policy, status),
    };
    // A rule with a `ttl` never keeps an error; one without leaves that to the backend too.
    if error && (fresh.is_zero() || !policy.ttl.is_zero()) {
        // What a client did wrong is its own: those who wait beside it may have done better.
        return if status.is_client_error() { Verdict::Private(Unstorable::Error) } else { Verdict::Share(Unstorable::Error) };
    }
    let (swr, sie) = stale_lifetimes(policy, &control);
    // An absent thing may appear, and what failed may work, at any moment: they are not served past their short life.
    let (swr, sie) = if error || is_absent(status) { (Duration::ZERO, Duration::ZERO) } else { (swr, sie) };
    let lifetimes = Lifetimes { fresh, stale_while_revalidate: swr, stale_if_error: sie, validatable };
    if fresh.is_zero() {
        return match status {
            status if is_absent(status) => Verdict::Share(Unstorable::NoFreshness),
            // Not to be served before it was validated, unless the backend itself says for how long.
            _ if !validatable.is_zero() => {
                let swr = control.stale_while_revalidate.filter(|_| policy.respect_origin).unwrap_or_default();
                Verdict::StoreForValidation(Lifetimes { stale_while_revalidate: swr, ..lifetimes })
            }
            _ => Verdict::Private(Unstorable::NoFreshness),
        };
    }
    Verdict::Store(lifetimes)
}

/// How long it may be served stale (RFC 5861), unless the backend forbids that (RFC 9111 §4.2.4).
fn stale_lifetimes(policy: &FreshnessPolicy, control: &CacheControl) -> (Duration, Duration) {
    let of_rule = (policy.stale_while_revalidate, policy.stale_if_error);
    match policy.respect_origin {
        false => of_rule,
        true if control.must_revalidate => (Duration::ZERO, Duration::ZERO),
        true => {
            // §5.2.2.10: `s-maxage` forbids it as `proxy-revalidate` does, unless the backend itself allows it.
            let of_rule = if control.s_maxage.is_some() { (Duration::ZERO, Duration::ZERO) } else { of_rule };
            (control.stale_while_revalidate.unwrap_or(of_rule.0), control.stale_if_error.unwrap_or(of_rule.1))
        }
    }
}

/// What no rule can allow to be shared.
fn never_shared(control: &CacheControl, headers: &HeaderMap, set_cookie: bool) -> Option<Unstorable> {
    if control.no_store {
        Some(Unstorable::NoStore)
    } else if control.private {
        Some(Unstorable::Private)
    } else if headers.contains_key(SET_COOKIE) && !set_cookie {
        Some(Unstorable::SetCookie)
    } else if Vary::of(headers) == Vary::Any {
        Some(Unstorable::VaryAny)
    } else {
        None
    }
}

/// Statuses whose caching rules are known here (RFC 9111 §5.2.2.3).
fn is_understood(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 302 | 303 | 307 | 308 | 404 | 405 | 410 | 414 | 501)
}

/// Whether the backend gave it something to validate it by.
fn is_validatable(status: StatusCode, headers: &HeaderMap) -> bool {
    status == StatusCode::OK && (headers.contains_key(ETAG) || headers.get(LAST_MODIFIED).is_some_and(|date| http_date(date).is_some()))
}

/// RFC 9111 §4.2.2: a tenth of the time since it was last modified, for the statuses that allow it (RFC 9110 §15.1) and
/// for what is `public`.
fn heuristic(control: &CacheControl, status: StatusCode, headers: &HeaderMap, now: Wall) -> Option<Duration> {
    let allowed = matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501);
    if !allowed && !control.public {
        return None;
    }
    let modified = headers.get(LAST_MODIFIED).and_then(http_date)?;
    let date = headers.get(DATE).and_then(http_date).unwrap_or(now);
    Some((date.since(modified) / 10).min(HEURISTIC_CAP).saturating_sub(age(headers)))
}

/// The statuses that mean "the backend failed", for which a stale answer is better (RFC 5861 §4).
#[must_use]
pub fn is_failure(status: StatusCode) -> bool {
    matches!(status.as_u16(), 500 | 502 | 503 | 504)
}

fn is_absent(status: StatusCode) -> bool {
    matches!(status.as_u16(), 404 | 410)
}

fn rule_lifetime(policy: &FreshnessPolicy, status: StatusCode) -> Duration {
    match status.as_u16() {
        200 | 203 | 204 => policy.ttl,
        404 | 410 => policy.negative_ttl,
        _ => Duration::ZERO,
    }
}

/// The freshness that the response itself declares (RFC 9111 §4.2.1), less the age it already has. An `Expires`
/// that is not a date means "already expired" (§5.3).
fn explicit(control: &CacheControl, headers: &HeaderMap, now: Wall) -> Option<Duration> {
    let declared = control.explicit().or_else(|| {
        let mut expires = headers.get_all(EXPIRES).iter();
        let first = expires.next().filter(|_| !control.targeted)?;
        let date = headers.get(DATE).and_then(http_date).unwrap_or(now);
        // Two of them contradict each other.
        let at = if expires.next().is_some() { None } else { http_date(first) };
        Some(at.map_or(Duration::ZERO, |at| at.since(date)))
    })?;
    Some(declared.saturating_sub(age(headers)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const NOW: Wall = Wall::from_millis(1_735_689_600_000);
    const POLICY: FreshnessPolicy = FreshnessPolicy {
        ttl: Duration::from_secs(300),
        negative_ttl: Duration::from_secs(10),
        stale_while_revalidate: Duration::from_secs(60),
        stale_if_error: Duration::from_secs(86_400),
        respect_origin: true,
        heuristic: false,
        set_cookie: false,
        authorized: false,
    };

    fn judge(policy: &FreshnessPolicy, status: u16, fields: &[(&'static str, &str)]) -> Verdict {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        verdict(policy, StatusCode::from_u16(status).unwrap(), &headers, NOW)
    }

    fn stored(fresh: u64, swr: u64, sie: u64) -> Verdict {
        let s = Duration::from_secs;
        Verdict::Store(Lifetimes { fresh: s(fresh), stale_while_revalidate: s(swr), stale_if_error: s(sie), validatable: s(0) })
    }

    #[test]
    fn what_is_left_of_a_life_goes_in_its_order() {
        let s = Duration::from_secs;
        let all = Lifetimes { fresh: s(10), stale_while_revalidate: s(5), stale_if_error: s(100), validatable: s(0) };
        for (elapsed, fresh, swr, sie) in [(0, 10, 5, 100), (4, 6, 5, 100), (10, 0, 5, 100), (13, 0, 2, 97), (200, 0, 0, 0)] {
            let left = Lifetimes { fresh: s(fresh), stale_while_revalidate: s(swr), stale_if_error: s(sie), validatable: s(0) };
            assert_eq!(all.after(s(elapsed)), left, "{elapsed}");
        }
    }

    #[test]
    fn the_rule_speaks_where_the_backend_is_silent() {
        assert_eq!(judge(&POLICY, 200, &[]), stored(300, 60, 86_400));
        assert_eq!(judge(&POLICY, 404, &[]), stored(10, 0, 0));
        assert_eq!(judge(&POLICY, 307, &[]), Verdict::Private(Unstorable::NoFreshness));
    }

    #[test]
    fn the_backend_overrides_the_rule_when_it_is_respected() {
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "max-age=20")]), stored(20, 60, 86_400));
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "max-age=20"), ("age", "5")]), stored(15, 60, 86_400));
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "s-maxage=9, stale-while-revalidate=1, stale-if-error=2")]), stored(9, 1, 2));
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "must-revalidate")]), stored(300, 0, 0));
        assert_eq!(judge(&POLICY, 200, &[("expires", "Wed, 01 Jan 2025 00:01:00 GMT")]), stored(60, 60, 86_400));
        assert_eq!(judge(&POLICY, 200, &[("expires", "0")]), Verdict::Private(Unstorable::NoFreshness));
        assert_eq!(judge(&POLICY, 301, &[("cache-control", "max-age=5")]), stored(5, 60, 86_400));
        let ignoring = FreshnessPolicy { respect_origin: false, ..POLICY };
        assert_eq!(judge(&ignoring, 200, &[("cache-control", "max-age=20, must-revalidate")]), stored(300, 60, 86_400));
    }

    #[test]
    fn what_belongs_to_one_client_is_never_shared_whatever_the_rule() {
        for respect_origin in [true, false] {
            let policy = FreshnessPolicy { respect_origin, ..POLICY };
            for (field, why) in [
                (("cache-control", "private"), Unstorable::Private),
                (("cache-control", "no-store"), Unstorable::NoStore),
                (("cache-control", "no-cache=\"x\""), Unstorable::NoCache),
                (("set-cookie", "a=b"), Unstorable::SetCookie),
                (("vary", "origin, *"), Unstorable::VaryAny),
                (("content-encoding", "br"), Unstorable::Coding),
            ] {
                assert_eq!(judge(&policy, 200, &[field]), Verdict::Private(why), "{field:?}");
                assert_eq!(judge(&policy, 503, &[field]), Verdict::Private(why), "{field:?}");
            }
        }
    }

    #[test]
    fn errors_are_shared_by_those_who_wait_for_the_backend_and_kept_only_where_it_says_so() {
        let ignoring = FreshnessPolicy { respect_origin: false, ..POLICY };
        for status in [400, 403, 405, 413, 414, 422, 431, 500, 501, 502, 503, 504, 599] {
            let whose = if status < 500 { Verdict::Private(Unstorable::Error) } else { Verdict::Share(Unstorable::Error) };
            assert_eq!(judge(&POLICY, status, &[]), whose, "{status}");
            assert_eq!(judge(&ignoring, status, &[("cache-control", "max-age=60")]), whose, "{status}");
            assert_eq!(judge(&POLICY, status, &[("cache-control", "max-age=60")]), whose, "{status}");
            let headers_alone = FreshnessPolicy { ttl: Duration::ZERO, ..POLICY };
            assert_eq!(judge(&headers_alone, status, &[("cache-control", "max-age=60")]), stored(60, 0, 0), "{status}");
        }
        for status in [206, 304, 401, 429] {
            assert_eq!(judge(&POLICY, status, &[]), Verdict::Private(Unstorable::Status), "{status}");
        }
    }

    #[test]
    fn what_must_be_validated_is_kept_for_that_alone() {
        let hour = Lifetimes { validatable: VALIDATABLE, ..Lifetimes::default() };
        let rule =
            FreshnessPolicy { ttl: Duration::ZERO, stale_while_revalidate: Duration::ZERO, stale_if_error: Duration::ZERO, ..POLICY };
        let tag = ("etag", "\"a\"");
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "no-cache"), tag]), Verdict::StoreForValidation(hour));
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "no-cache")]), Verdict::Private(Unstorable::NoCache));
        assert_eq!(judge(&rule, 200, &[("cache-control", "max-age=0"), tag]), Verdict::StoreForValidation(hour));
        assert_eq!(judge(&rule, 200, &[("last-modified", "Wed, 01 Jan 2025 00:00:00 GMT")]), Verdict::StoreForValidation(hour));
        let s = Duration::from_secs;
        let own = Lifetimes { stale_if_error: s(86_400), ..hour };
        assert_eq!(
            judge(&POLICY, 200, &[("cache-control", "max-age=0"), tag]),
            Verdict::StoreForValidation(own),
            "the rule's grace is not the backend's"
        );
        let graced = Lifetimes { stale_while_revalidate: s(7), ..own };
        assert_eq!(
            judge(&POLICY, 200, &[("cache-control", "max-age=0, stale-while-revalidate=7"), tag]),
            Verdict::StoreForValidation(graced)
        );
        assert_eq!(judge(&rule, 200, &[("cache-control", "max-age=9"), tag]), Verdict::Store(Lifetimes { fresh: s(9), ..hour }));
    }

    #[test]
    fn must_understand_and_the_targeted_field() {
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "max-age=9, no-store, must-understand")]), stored(9, 60, 86_400));
        let unknown = judge(&POLICY, 599, &[("cache-control", "max-age=9, no-store, must-understand")]);
        assert_eq!(unknown, Verdict::Private(Unstorable::NoStore));
        assert_eq!(judge(&POLICY, 200, &[("cache-control", "no-store"), ("cdn-cache-control", "max-age=9")]), stored(9, 60, 86_400));
        assert_eq!(judge(&POLICY, 200, &[("cdn-cache-control", "max-age=9"), ("expires", "0")]), stored(9, 60, 86_400));
        let none = judge(
            &FreshnessPolicy { ttl: Duration::ZERO, ..POLICY },
            200,
            &[("cdn-cache-control", "foo"), ("expires", "Thu, 01 Jan 2026 00:00:00 GMT")],
        );
        assert_eq!(none, Verdict::Private(Unstorable::NoFreshness), "Expires does not count beside a targeted field");
    }

    #[test]
    fn other_codings_are_shared_where_the_backend_says_how_long() {
        let coded = ("content-encoding", "br");
        assert_eq!(judge(&POLICY, 200, &[coded]), Verdict::Private(Unstorable::Coding));
        assert_eq!(judge(&POLICY, 200, &[coded, ("cache-control", "max-age=5")]), stored(5, 60, 86_400));
    }

    #[test]
    fn answers_to_authorized_requests_are_shared_where_they_say_so() {
        let policy = FreshnessPolicy { authorized: true, ..POLICY };
        assert_eq!(judge(&policy, 200, &[("cache-control", "max-age=9")]), Verdict::Private(Unstorable::Authorized));
        for directive in ["public", "must-revalidate", "proxy-revalidate", "s-maxage=5"] {
            let control = format!("max-age=9, {directive}");
            assert!(matches!(judge(&policy, 200, &[("cache-control", &control)]), Verdict::Store(_)), "{directive}");
        }
    }

    #[test]
    fn heuristics_are_for_rules_that_ask_for_them() {
        let guess = FreshnessPolicy {
            ttl: Duration::ZERO,
            heuristic: true,
            stale_while_revalidate: Duration::ZERO,
            stale_if_error: Duration::ZERO,
            ..POLICY
        };
        let day_ago = ("last-modified", "Tue, 31 Dec 2024 00:00:00 GMT");
        for status in [203, 204, 404, 405, 410, 414, 501] {
            assert_eq!(judge(&guess, status, &[day_ago]), stored(8640, 0, 0), "{status}");
        }
        for status in [201, 202, 403, 502, 503, 599] {
            assert!(!matches!(judge(&guess, status, &[day_ago]), Verdict::Store(_)), "{status}");
        }
        assert_eq!(judge(&guess, 599, &[day_ago, ("cache-control", "public")]), stored(8640, 0, 0));
        assert_eq!(judge(&FreshnessPolicy { heuristic: false, ..guess }, 203, &[day_ago]), Verdict::Private(Unstorable::NoFreshness));
        let old = [("last-modified", "Sat, 01 Jan 2000 00:00:00 GMT")];
        assert_eq!(judge(&guess, 203, &old), stored(86_400, 0, 0));
    }

    #[test]
    fn lifetimes_can_be_cut_short() {
        let s = Duration::from_secs;
        let lifetimes = Lifetimes { fresh: s(10), stale_while_revalidate: s(5), stale_if_error: s(100), validatable: s(0) };
        for (age, left, kept) in [(0, 1000, 110), (4, 20, 24), (4, 1, 5), (50, 10, 60)] {
            assert_eq!(lifetimes.ending_within(s(age), s(left)).kept(), s(kept), "{age} {left}");
        }
    }

    #[test]
    fn a_rule_without_ttl_leaves_it_to_the_headers() {
        let rule = FreshnessPolicy { ttl: Duration::ZERO, ..POLICY };
        assert_eq!(judge(&rule, 200, &[]), Verdict::Private(Unstorable::NoFreshness));
        assert_eq!(judge(&rule, 200, &[("cache-control", "max-age=3")]), stored(3, 60, 86_400));
    }
}
