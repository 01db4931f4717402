//! What a successful unsafe request made doubtful (RFC 9111 §4.4).
//!
//! The entry itself is removed at once. Its variants, and those of other origins, cannot be named; they are told by having
//! been stored before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::RandomState;
use http::header::{CONTENT_LOCATION, LOCATION};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};
use tokio::time::Instant;

use crate::clock::Wall;

/// Addresses that are remembered.
const REMEMBERED: usize = 16_384;

/// By both clocks: what is stored is judged by wall time, what is being fetched by the runtime's.
type Times = Cache<Bytes, (Wall, Instant), UnitWeighter, RandomState, DefaultLifecycle<Bytes, (Wall, Instant)>>;

/// When which addresses were invalidated.
pub struct Invalidated {
    /// Whether there are any: reads, which are nearly all requests, need not look further.
    any: AtomicBool,
    when: Times,
}

impl Default for Invalidated {
    fn default() -> Self {
        let when = Cache::with(REMEMBERED, REMEMBERED as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default());
        Self { any: AtomicBool::new(false), when }
    }
}

impl Invalidated {
    /// Whether any address was.
    #[must_use]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// An address is invalidated now.
    pub fn note(&self, address: Bytes, now: Wall) {
        self.when.insert(address, (now, Instant::now()));
        self.any.store(true, Ordering::Release);
    }

    /// Whether what was stored at `stored_at` under an address has been since.
    #[must_use]
    pub fn stored(&self, address: &Bytes, stored_at: Wall) -> bool {
        self.when.get(address).is_some_and(|(at, _)| stored_at <= at)
    }

    /// The first moment at which what is stored under an address is valid again.
    #[must_use]
    pub fn first_valid(&self, address: &Bytes) -> Wall {
        let after = |(at, _): (Wall, Instant)| at + Duration::from_millis(1);
        self.when.get(address).filter(|_| self.any()).map_or(Wall::from_millis(0), after)
    }

    /// Whether what was asked for at `asked` has been since.
    #[must_use]
    pub fn asked(&self, address: &Bytes, asked: Instant) -> bool {
        self.when.get(address).is_some_and(|(_, at)| asked <= at)
    }
}

/// Whether an answer to a request with this method says that something may have changed (RFC 9110 §9.2.1).
#[must_use]
pub fn is_change(method: &Method, status: StatusCode) -> bool {
    let safe = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE);
    !safe && (status.is_success() || status.is_redirection())
}

/// The other addresses that an answer names, `Location` and `Content-Location`, as paths and queries: those of the same
/// origin, since nobody may invalidate what is another's. Relative ones are meant from `path`.
#[must_use]
pub fn named(fields: &HeaderMap, path: &str, is_own: impl Fn(&str) -> bool) -> Vec<String> {
    let text = |name| fields.get(name).map(HeaderValue::to_str).and_then(Result::ok);
    [text(LOCATION), text(CONTENT_LOCATION)].into_iter().flatten().filter_map(|text| resolve(text, path, &is_own)).collect()
}

fn resolve(text: &str, path: &str, is_own: &impl Fn(&str) -> bool) -> Option<String> {
    let text = text.split('#').next().unwrap_or_default();
    let after = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).or_else(|| text.strip_prefix("//"));
    if let Some(after) = after {
        let end = after.find(['/', '?']).unwrap_or(after.len());
        let (authority, rest) = after.split_at(end);
        return is_own(authority).then(|| if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") });
    }
    if text.starts_with('/') {
        return Some(text.to_owned());
    }
    let folder = &path[..path.rfind('/').map_or(0, |at| at + 1)];
    (!text.contains(':')).then(|| format!("{folder}{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_same_origin_are_named() {
        for (location, expected) in [
            ("/a?b#c", Some("/a?b")),
            ("c", Some("/x/c")),
            ("http://own/y", Some("/y")),
            ("https://own?z", Some("/?z")),
            ("//own/y", Some("/y")),
            ("http://other/y", None),
            ("mailto:x", None),
        ] {
            let mut fields = HeaderMap::new();
            fields.insert(CONTENT_LOCATION, HeaderValue::from_str(location).unwrap());
            let named = named(&fields, "/x/y", |authority| authority == "own");
            assert_eq!(named.first().map(String::as_str), expected, "{location}");
        }
    }

    #[test]
    fn what_came_before_is_invalid_and_what_comes_after_is_not() {
        let (invalidated, address, before) = (Invalidated::default(), Bytes::from_static(b"a"), Instant::now());
        let now = Wall::from_millis(1000);
        assert!(!invalidated.any() && !invalidated.stored(&address, now));
        invalidated.note(address.clone(), now);
        assert!(invalidated.any() && invalidated.stored(&address, now) && invalidated.asked(&address, before));
        assert!(!invalidated.stored(&address, Wall::from_millis(1001)));
        assert_eq!(invalidated.first_valid(&address), Wall::from_millis(1001));
        assert!(!invalidated.stored(&Bytes::from_static(b"b"), now));
    }

    #[test]
    fn changes_are_unsafe_methods_that_succeeded() {
        for (method, status, change) in [
            ("POST", 200, true),
            ("M-SEARCH", 201, true),
            ("DELETE", 303, true),
            ("PUT", 500, false),
            ("GET", 200, false),
            ("POST", 404, false),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert_eq!(is_change(&method, StatusCode::from_u16(status).unwrap()), change, "{method} {status}");
        }
    }
}
