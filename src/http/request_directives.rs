//! What a client asks of a cache (RFC 9111 §5.2.1): heeded where a rule says `client_directives = "respect"`.

use std::time::Duration;

use http::HeaderMap;
use http::header::{CACHE_CONTROL, PRAGMA};

use super::cache_control::{Directives, delta_seconds};
use crate::proxy::decide::Decision;
use crate::proxy::outcome::FetchWhy;

/// The request directives that Sluice acts on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `no-cache`: nothing that was not validated for this request.
    pub no_cache: bool,
    /// `no-store`: the answer is not to be kept.
    pub no_store: bool,
    /// `only-if-cached`: nothing that the backend would have to be asked for.
    pub only_if_cached: bool,
    /// `max-age`: nothing older.
    pub max_age: Option<Duration>,
    /// `min-fresh`: nothing that is fresh for less.
    pub min_fresh: Option<Duration>,
    /// `max-stale`: something stale will do, if it is not staler than this.
    pub max_stale: Option<Duration>,
}

impl Wishes {
    /// Reads a request. Without `Cache-Control`, `Pragma: no-cache` counts (§5.4).
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        let seconds = |argument: Option<&[u8]>| argument.and_then(delta_seconds);
        for value in headers.get_all(CACHE_CONTROL) {
            for (name, argument) in Directives::new(value.as_bytes()) {
                match name.as_str() {
                    "no-cache" => found.no_cache = true,
                    "no-store" => found.no_store = true,
                    "only-if-cached" => found.only_if_cached = true,
                    // One that makes no sense is taken at its strictest.
                    "max-age" => found.max_age = Some(seconds(argument).unwrap_or_default()),
                    "min-fresh" => found.min_fresh = Some(seconds(argument).unwrap_or(Duration::MAX)),
                    "max-stale" if argument.is_none() => found.max_stale = Some(Duration::MAX),
                    "max-stale" => found.max_stale = seconds(argument),
                    _ => {}
                }
            }
        }
        if !headers.contains_key(CACHE_CONTROL) {
            found.no_cache = headers.get_all(PRAGMA).iter().any(|value| value.as_bytes().eq_ignore_ascii_case(b"no-cache"));
        }
        found
    }

    /// What becomes of a decision about an entry that is `age` old, went stale `by` ago (if it did), and may be served
    /// stale if the client agrees (`lenient`).
    #[must_use]
    pub fn heed(&self, decision: Decision, age: Duration, by: Option<Duration>, lenient: bool) -> Decision {
        let too_old = self.no_cache || self.max_age.is_some_and(|most| age > most);
        let short = |left: Duration| self.min_fresh.is_some_and(|least| left < least);
        let ask = Decision::Fetch { why: FetchWhy::Request, fallback: None };
        match (decision, by) {
            (Decision::Hit(left), _) if too_old || short(left) => ask,
            (Decision::StaleAndRefresh(_) | Decision::StaleLeftAlone(_), _) if too_old || self.min_fresh.is_some() => ask,
            (Decision::Fetch { why: FetchWhy::Stale, .. }, Some(by))
                if !too_old && lenient && self.max_stale.is_some_and(|most| by <= most) =>
            {
                Decision::StaleAndRefresh(by)
            }
            _ => decision,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn wishes(text: &'static str) -> Wishes {
        let mut headers = HeaderMap::new();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static(text));
        Wishes::of(&headers)
    }

    #[test]
    fn wishes_change_decisions() {
        let s = Duration::from_secs;
        let (hit, stale) = (Decision::Hit(s(10)), Decision::Fetch { why: FetchWhy::Stale, fallback: None });
        let ask = Decision::Fetch { why: FetchWhy::Request, fallback: None };
        for (text, decision, by, expected) in [
            ("no-cache", hit, None, ask),
            ("max-age=5", hit, None, ask),
            ("max-age=20", hit, None, hit),
            ("max-age=soon", hit, None, ask),
            ("min-fresh=11", hit, None, ask),
            ("min-fresh=10", hit, None, hit),
            ("min-fresh=1", Decision::StaleAndRefresh(s(1)), Some(s(1)), ask),
            ("max-stale", stale, Some(s(9)), Decision::StaleAndRefresh(s(9))),
            ("max-stale=8", stale, Some(s(9)), stale),
            ("max-stale, max-age=5", stale, Some(s(9)), stale),
            ("foo, only-if-cached", hit, None, hit),
        ] {
            assert_eq!(wishes(text).heed(decision, s(12), by, true), expected, "{text}");
        }
        assert_eq!(wishes("max-stale").heed(stale, s(12), Some(s(9)), false), stale, "what must be validated is");
    }

    #[test]
    fn pragma_counts_alone() {
        let mut headers = HeaderMap::new();
        headers.insert(PRAGMA, HeaderValue::from_static("no-cache"));
        assert!(Wishes::of(&headers).no_cache);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=1"));
        assert!(!Wishes::of(&headers).no_cache);
    }
}
