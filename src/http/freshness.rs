//! How long a response may be used, and by whom: what a rule says and what the response says, brought together
//! (RFC 9111 §3, §4.2; RFC 5861).

use std::time::Duration;

use http::header::{DATE, EXPIRES, SET_COOKIE};
use http::{HeaderMap, StatusCode};

use super::cache_control::CacheControl;
use super::encoding::Coding;
use super::headers::{age, http_date};
use super::vary::Vary;
use crate::clock::Wall;

/// What a rule grants an answer, before the answer itself has been heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
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
}

/// The three lives of a stored response, each counted from the moment it was stored or from the end of freshness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetimes {
    /// Fresh for so long from the moment it was stored.
    pub fresh: Duration,
    /// Then usable for so long while it is refreshed.
    pub stale_while_revalidate: Duration,
    /// Then usable for so long (from the end of freshness too) while the backend fails.
    pub stale_if_error: Duration,
}

impl Lifetimes {
    /// The same lives for something that is `age` old and must be gone after `left`.
    #[must_use]
    pub fn ending_within(self, age: Duration, left: Duration) -> Self {
        let total = age.saturating_add(left);
        let fresh = self.fresh.min(total);
        let stale = |life: Duration| life.min(total.saturating_sub(fresh));
        Self { fresh, stale_while_revalidate: stale(self.stale_while_revalidate), stale_if_error: stale(self.stale_if_error) }
    }

    /// How long it is worth keeping, from the moment it was stored.
    #[must_use]
    pub fn kept(&self) -> Duration {
        self.fresh.saturating_add(self.stale_while_revalidate.max(self.stale_if_error))
    }
}

/// Why a response is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unstorable {
    /// `no-store`, `no-cache` or `private`.
    Directive,
    /// It sets a cookie.
    SetCookie,
    /// `Vary: *`.
    VaryAny,
    /// A coding that Sluice cannot undo for clients that do not take it.
    Coding,
    /// No freshness from the rule or from the headers.
    NoFreshness,
    /// A status that is about one request: 206, 304, 401, 407, 429 and the like.
    Status,
    /// An answer that is an error and is therefore not stored, though it may be shared by those who wait for it.
    Error,
}

/// What may be done with a response that has just arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Give it to everyone who waits for it, and keep it.
    Store(Lifetimes),
    /// Give it to everyone who waits for it, and forget it.
    Share(Unstorable),
    /// It belongs to the one request that caused it.
    Private(Unstorable),
}

/// Decides what may be done with a response to a request without `Authorization` on a caching rule.
#[must_use]
pub fn verdict(grant: &Grant, status: StatusCode, headers: &HeaderMap, now: Wall) -> Verdict {
    let control = CacheControl::of(headers);
    if let Some(reason) = never_shared(&control, headers) {
        return Verdict::Private(reason);
    }
    if matches!(status.as_u16(), 100..=199 | 206 | 304 | 401 | 403 | 407 | 408 | 421 | 425 | 429) {
        return Verdict::Private(Unstorable::Status);
    }
    let explicit = if grant.respect_origin { explicit(&control, headers, now) } else { None };
    let error = is_failure(status) || (status.is_client_error() && !is_absent(status));
    let fresh = match explicit {
        // A failing or refusing backend's headers never make Sluice repeat the failure.
        _ if error => return Verdict::Share(Unstorable::Error),
        Some(fresh) => fresh,
        None => heed_rule(grant, status),
    };
    let (swr, sie) = if grant.respect_origin {
        if control.must_revalidate {
            (Duration::ZERO, Duration::ZERO)
        } else {
            (control.stale_while_revalidate.unwrap_or(grant.stale_while_revalidate), control.stale_if_error.unwrap_or(grant.stale_if_error))
        }
    } else {
        (grant.stale_while_revalidate, grant.stale_if_error)
    };
    if fresh.is_zero() {
        return match status {
            status if is_absent(status) => Verdict::Share(Unstorable::NoFreshness),
            _ => Verdict::Private(Unstorable::NoFreshness),
        };
    }
    // An absent thing may appear at any moment: it is not served past its short life.
    let stale = if is_absent(status) { (Duration::ZERO, Duration::ZERO) } else { (swr, sie) };
    Verdict::Store(Lifetimes { fresh, stale_while_revalidate: stale.0, stale_if_error: stale.1 })
}

/// What no rule can allow to be shared.
fn never_shared(control: &CacheControl, headers: &HeaderMap) -> Option<Unstorable> {
    if control.no_store || control.private || control.no_cache {
        Some(Unstorable::Directive)
    } else if headers.contains_key(SET_COOKIE) {
        Some(Unstorable::SetCookie)
    } else if Vary::of(headers) == Vary::Any {
        Some(Unstorable::VaryAny)
    } else if Coding::of(headers).is_none() {
        Some(Unstorable::Coding)
    } else {
        None
    }
}

/// The statuses that mean "the backend failed", for which a stale answer is better (RFC 5861 §4).
#[must_use]
pub fn is_failure(status: StatusCode) -> bool {
    matches!(status.as_u16(), 500 | 502 | 503 | 504)
}

fn is_absent(status: StatusCode) -> bool {
    matches!(status.as_u16(), 404 | 410)
}

fn heed_rule(grant: &Grant, status: StatusCode) -> Duration {
    match status.as_u16() {
        200 | 203 | 204 => grant.ttl,
        404 | 410 => grant.negative_ttl,
        _ => Duration::ZERO,
    }
}

/// The freshness that the response itself declares (RFC 9111 §4.2.1), less the age it already has. An `Expires`
/// that is not a date means "already expired" (§5.3).
fn explicit(control: &CacheControl, headers: &HeaderMap, now: Wall) -> Option<Duration> {
    let declared = control.explicit().or_else(|| {
        let expires = headers.get(EXPIRES)?;
        let date = headers.get(DATE).and_then(http_date).unwrap_or(now);
        Some(http_date(expires).map_or(Duration::ZERO, |at| at.since(date)))
    })?;
    Some(declared.saturating_sub(age(headers)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const NOW: Wall = Wall::from_millis(1_735_689_600_000);
    const GRANT: Grant = Grant {
        ttl: Duration::from_secs(300),
        negative_ttl: Duration::from_secs(10),
        stale_while_revalidate: Duration::from_secs(60),
        stale_if_error: Duration::from_secs(86_400),
        respect_origin: true,
    };

    fn judge(grant: &Grant, status: u16, fields: &[(&'static str, &str)]) -> Verdict {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        verdict(grant, StatusCode::from_u16(status).unwrap(), &headers, NOW)
    }

    fn stored(fresh: u64, swr: u64, sie: u64) -> Verdict {
        let s = Duration::from_secs;
        Verdict::Store(Lifetimes { fresh: s(fresh), stale_while_revalidate: s(swr), stale_if_error: s(sie) })
    }

    #[test]
    fn the_rule_speaks_where_the_backend_is_silent() {
        assert_eq!(judge(&GRANT, 200, &[]), stored(300, 60, 86_400));
        assert_eq!(judge(&GRANT, 404, &[]), stored(10, 0, 0));
        assert_eq!(judge(&GRANT, 307, &[]), Verdict::Private(Unstorable::NoFreshness));
    }

    #[test]
    fn the_backend_overrides_the_rule_when_it_is_respected() {
        assert_eq!(judge(&GRANT, 200, &[("cache-control", "max-age=20")]), stored(20, 60, 86_400));
        assert_eq!(judge(&GRANT, 200, &[("cache-control", "max-age=20"), ("age", "5")]), stored(15, 60, 86_400));
        assert_eq!(judge(&GRANT, 200, &[("cache-control", "s-maxage=9, stale-while-revalidate=1, stale-if-error=2")]), stored(9, 1, 2));
        assert_eq!(judge(&GRANT, 200, &[("cache-control", "must-revalidate")]), stored(300, 0, 0));
        assert_eq!(judge(&GRANT, 200, &[("expires", "Wed, 01 Jan 2025 00:01:00 GMT")]), stored(60, 60, 86_400));
        assert_eq!(judge(&GRANT, 200, &[("expires", "0")]), Verdict::Private(Unstorable::NoFreshness));
        assert_eq!(judge(&GRANT, 301, &[("cache-control", "max-age=5")]), stored(5, 60, 86_400));
        let deaf = Grant { respect_origin: false, ..GRANT };
        assert_eq!(judge(&deaf, 200, &[("cache-control", "max-age=20, must-revalidate")]), stored(300, 60, 86_400));
    }

    #[test]
    fn what_belongs_to_one_client_is_never_shared_whatever_the_rule() {
        for respect_origin in [true, false] {
            let grant = Grant { respect_origin, ..GRANT };
            for (field, why) in [
                (("cache-control", "private"), Unstorable::Directive),
                (("cache-control", "no-store"), Unstorable::Directive),
                (("cache-control", "no-cache=\"x\""), Unstorable::Directive),
                (("set-cookie", "a=b"), Unstorable::SetCookie),
                (("vary", "origin, *"), Unstorable::VaryAny),
                (("content-encoding", "br"), Unstorable::Coding),
            ] {
                assert_eq!(judge(&grant, 200, &[field]), Verdict::Private(why), "{field:?}");
                assert_eq!(judge(&grant, 503, &[field]), Verdict::Private(why), "{field:?}");
            }
        }
    }

    #[test]
    fn errors_are_shared_by_those_who_wait_and_never_kept() {
        for status in [400, 405, 413, 422, 500, 502, 503, 504] {
            let verdict = judge(&GRANT, status, &[("cache-control", "max-age=60")]);
            assert_eq!(verdict, Verdict::Share(Unstorable::Error), "{status}");
        }
        for status in [206, 304, 401, 403, 429] {
            assert_eq!(judge(&GRANT, status, &[]), Verdict::Private(Unstorable::Status), "{status}");
        }
    }

    #[test]
    fn lives_can_be_cut_short() {
        let s = Duration::from_secs;
        let lives = Lifetimes { fresh: s(10), stale_while_revalidate: s(5), stale_if_error: s(100) };
        for (age, left, kept) in [(0, 1000, 110), (4, 20, 24), (4, 1, 5), (50, 10, 60)] {
            assert_eq!(lives.ending_within(s(age), s(left)).kept(), s(kept), "{age} {left}");
        }
    }

    #[test]
    fn a_rule_without_ttl_leaves_it_to_the_headers() {
        let rule = Grant { ttl: Duration::ZERO, ..GRANT };
        assert_eq!(judge(&rule, 200, &[]), Verdict::Private(Unstorable::NoFreshness));
        assert_eq!(judge(&rule, 200, &[("cache-control", "max-age=3")]), stored(3, 60, 86_400));
    }
}
