//! `Cache-Control` of a request (RFC 9111 §5.2.1): what a client asks of caches on the way.

use std::time::Duration;

use http::HeaderMap;
use http::header::{CACHE_CONTROL, PRAGMA};

use super::cache_control::{Directives, delta_seconds};

/// The request directives that Sluice acts on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestDirectives {
    /// `no-cache`: nothing that was not validated for this request.
    pub no_cache: bool,
    /// `no-store`: the response is not to be stored.
    pub no_store: bool,
    /// `only-if-cached`: nothing that the upstream would have to be asked for.
    pub only_if_cached: bool,
    /// `max-age`: nothing older.
    pub max_age: Option<Duration>,
    /// `min-fresh`: nothing that is fresh for less.
    pub min_fresh: Option<Duration>,
    /// `max-stale`: something stale will do, if it is not staler than this.
    pub max_stale: Option<Duration>,
}

impl RequestDirectives {
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
                    // One that makes no sense is taken at its strictest (§4.2.1 says so of responses).
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

    /// Whether no response will do that came before the request.
    #[must_use]
    pub fn wants_new(&self) -> bool {
        self.no_cache || self.max_age.is_some_and(|most| most.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn directives_that_make_no_sense_are_taken_at_their_strictest() {
        let of = |text: &'static str| RequestDirectives::of(&HeaderMap::from_iter([(CACHE_CONTROL, HeaderValue::from_static(text))]));
        assert_eq!(of("max-age=soon").max_age, Some(Duration::ZERO));
        assert_eq!(of("min-fresh").min_fresh, Some(Duration::MAX));
        assert_eq!((of("max-stale").max_stale, of("max-stale=x").max_stale), (Some(Duration::MAX), None));
        assert!(of("foo, only-if-cached, NO-STORE").only_if_cached);
    }

    #[test]
    fn pragma_counts_alone() {
        let mut headers = HeaderMap::new();
        headers.insert(PRAGMA, HeaderValue::from_static("no-cache"));
        assert!(RequestDirectives::of(&headers).no_cache);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("max-age=1"));
        assert!(!RequestDirectives::of(&headers).no_cache);
    }
}
