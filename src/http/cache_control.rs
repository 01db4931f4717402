//! `Cache-Control` of a response (RFC 9111 §5.2.2, RFC 5861), and `CDN-Cache-Control`, which wins over it (RFC 9213).

use std::time::Duration;

use http::header::CACHE_CONTROL;
use http::{HeaderMap, HeaderName, HeaderValue};
use sfv::{BareItem, Dictionary, Item, ListEntry, Parser};

/// The targeted field for caches between client and origin (RFC 9213 §3).
const CDN_CACHE_CONTROL: HeaderName = HeaderName::from_static("cdn-cache-control");

/// Durations of RFC 9111 §1.2.2 are capped here: 2³¹ seconds, "infinity" for every purpose.
const MAX_SECONDS: u64 = 1 << 31;

/// The response directives that Sluice acts on. Unknown ones are ignored (RFC 9111 §5.2.3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheControl {
    /// `no-store`: nothing may be kept.
    pub no_store: bool,
    /// `private`, with or without field names: not for a shared cache.
    pub private: bool,
    /// `no-cache`, with or without field names: not to be used without validation.
    pub no_cache: bool,
    /// `must-revalidate` or `proxy-revalidate`: never served stale.
    pub must_revalidate: bool,
    /// `no-transform`: the body may not be recoded.
    pub no_transform: bool,
    /// `public`: may be kept although the request was authorized, or the status has no freshness of its own.
    pub public: bool,
    /// `must-understand`: `no-store` counts only for those who do not know the status (§5.2.2.3).
    pub must_understand: bool,
    /// The directives came in `CDN-Cache-Control`, so `Expires` does not count either (RFC 9213 §2.1).
    pub targeted: bool,
    /// `s-maxage`, for shared caches; wins over `max-age`.
    pub s_maxage: Option<Duration>,
    /// `max-age`.
    pub max_age: Option<Duration>,
    /// `stale-while-revalidate` (RFC 5861 §3).
    pub stale_while_revalidate: Option<Duration>,
    /// `stale-if-error` (RFC 5861 §4).
    pub stale_if_error: Option<Duration>,
}

impl CacheControl {
    /// Reads every `Cache-Control` field of `headers` as one list, unless there is a valid `CDN-Cache-Control`, which is
    /// meant for caches like this one and is then all that counts.
    ///
    /// A repeated duration keeps its smallest value and one that does not parse counts as zero: when in doubt, a
    /// response is treated as stale (RFC 9111 §4.2.1).
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        for value in headers.get_all(CACHE_CONTROL) {
            for (name, argument) in Directives(value.as_bytes()) {
                found.apply(&name, argument);
            }
        }
        match Self::targeted(headers) {
            // Whether the bytes may be recoded is said to everyone on the way.
            Some(targeted) => Self { no_transform: targeted.no_transform || found.no_transform, ..targeted },
            None => found,
        }
    }

    /// Whether an answer to a request with `Authorization` may be shared (RFC 9111 §3.5).
    #[must_use]
    pub const fn shares_authorized(&self) -> bool {
        self.public || self.must_revalidate || self.s_maxage.is_some()
    }

    /// `CDN-Cache-Control`: a dictionary of structured values (RFC 9213 §2.1). One that is none is as if it were absent.
    fn targeted(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(CDN_CACHE_CONTROL).iter().map(HeaderValue::as_bytes);
        let mut text = values.next()?.to_vec();
        for value in values {
            text.extend_from_slice(b", ");
            text.extend_from_slice(value);
        }
        let dictionary: Dictionary = Parser::new(&text).parse().ok()?;
        if dictionary.is_empty() {
            return None;
        }
        let mut found = Self { targeted: true, ..Self::default() };
        for (name, member) in &dictionary {
            match member {
                ListEntry::Item(Item { bare_item: BareItem::Boolean(true), .. }) => found.apply(name.as_str(), None),
                ListEntry::Item(Item { bare_item: BareItem::Integer(number), .. }) => {
                    found.apply(name.as_str(), Some(number.to_string().as_bytes()));
                }
                // A value of another type says nothing.
                _ => {}
            }
        }
        Some(found)
    }

    /// How long the directives say that the response is fresh for a shared cache, if they say so.
    #[must_use]
    pub fn explicit(&self) -> Option<Duration> {
        self.s_maxage.or(self.max_age)
    }

    fn apply(&mut self, name: &str, argument: Option<&[u8]>) {
        match name {
            "no-store" => self.no_store = true,
            "private" => self.private = true,
            "no-cache" => self.no_cache = true,
            "must-revalidate" | "proxy-revalidate" => self.must_revalidate = true,
            "no-transform" => self.no_transform = true,
            "public" => self.public = true,
            "must-understand" => self.must_understand = true,
            "s-maxage" => shorten(&mut self.s_maxage, argument),
            "max-age" => shorten(&mut self.max_age, argument),
            "stale-while-revalidate" => shorten(&mut self.stale_while_revalidate, argument),
            "stale-if-error" => shorten(&mut self.stale_if_error, argument),
            _ => {}
        }
    }
}

fn shorten(slot: &mut Option<Duration>, argument: Option<&[u8]>) {
    let value = argument.and_then(delta_seconds).unwrap_or_default();
    *slot = Some(slot.map_or(value, |old| old.min(value)));
}

/// `delta-seconds` (RFC 9111 §1.2.2): digits alone, overflow capped.
#[must_use]
pub fn delta_seconds(text: &[u8]) -> Option<Duration> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = text.iter().fold(0u64, |sum, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0')).min(MAX_SECONDS));
    Some(Duration::from_secs(seconds))
}

/// Iterates `name[=token|"quoted"]` members of a comma-separated list. A comma inside quotes separates nothing.
pub struct Directives<'a>(&'a [u8]);

impl<'a> Directives<'a> {
    /// The members of one field value.
    #[must_use]
    pub const fn new(value: &'a [u8]) -> Self {
        Self(value)
    }
}

impl<'a> Iterator for Directives<'a> {
    type Item = (String, Option<&'a [u8]>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.0.is_empty() {
                return None;
            }
            let member = self.member().trim_ascii();
            if member.is_empty() {
                continue;
            }
            let split = member.iter().position(|&byte| byte == b'=');
            let (name, argument) = match split {
                Some(at) => (&member[..at], Some(unquote(member[at + 1..].trim_ascii()))),
                None => (member, None),
            };
            let name = String::from_utf8_lossy(name.trim_ascii()).to_ascii_lowercase();
            return Some((name, argument));
        }
    }
}

impl<'a> Directives<'a> {
    fn member(&mut self) -> &'a [u8] {
        let bytes = self.0;
        let (mut quoted, mut escaped) = (false, false);
        for (at, &byte) in bytes.iter().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                b',' if !quoted => {
                    self.0 = &bytes[at + 1..];
                    return &bytes[..at];
                }
                _ => {}
            }
        }
        self.0 = &[];
        bytes
    }
}

fn unquote(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targeted_field_wins_if_it_is_one() {
        let of = |targeted: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store, max-age=5, no-transform"));
            headers.insert(CDN_CACHE_CONTROL, HeaderValue::from_str(targeted).unwrap());
            CacheControl::of(&headers)
        };
        let s = Duration::from_secs;
        for (text, no_store, max_age) in [
            ("max-age=3600", false, Some(s(3600))),
            ("foobar, max-age=99999999999", false, Some(s(MAX_SECONDS))),
            ("max-age=\"10\"", false, None),
            ("no-store", true, None),
            ("max-age=10, &&&&&", true, Some(s(5))),
            ("MaX-aGe=10", true, Some(s(5))),
            ("max-age= 10", true, Some(s(5))),
            ("", true, Some(s(5))),
        ] {
            let found = of(text);
            assert_eq!((found.no_store, found.max_age, found.no_transform), (no_store, max_age, true), "{text}");
        }
    }
    use http::HeaderValue;
    use proptest::prelude::*;

    fn read(fields: &[&str]) -> CacheControl {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(CACHE_CONTROL, HeaderValue::from_str(field).unwrap());
        }
        CacheControl::of(&headers)
    }

    fn seconds(n: u64) -> Option<Duration> {
        Some(Duration::from_secs(n))
    }

    #[test]
    fn directives_are_found_in_any_case_place_and_field() {
        let found = read(&["Public, MAX-AGE=60", "s-maxage=\"30\" , , no-transform"]);
        assert_eq!((found.max_age, found.s_maxage), (seconds(60), seconds(30)));
        assert!(found.no_transform && !found.private && !found.no_store);
        assert_eq!(found.explicit(), seconds(30));
    }

    #[test]
    fn a_directive_inside_quotes_is_not_one() {
        let found = read(&["ext=\"a, no-store, \\\", private\", max-age=5"]);
        assert!(!found.no_store && !found.private);
        assert_eq!(found.max_age, seconds(5));
        assert!(read(&["private=\"set-cookie, x\""]).private);
    }

    #[test]
    fn doubtful_durations_are_stale_and_large_ones_capped() {
        assert_eq!(read(&["max-age=60, max-age=10"]).max_age, seconds(10));
        assert_eq!(read(&["max-age=abc"]).max_age, seconds(0));
        assert_eq!(read(&["max-age"]).max_age, seconds(0));
        assert_eq!(read(&["max-age=-1"]).max_age, seconds(0));
        assert_eq!(read(&["max-age=99999999999999999999"]).max_age, seconds(MAX_SECONDS));
    }

    proptest! {
        #[test]
        fn nothing_makes_the_reader_fail(value in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                let mut headers = HeaderMap::new();
                headers.insert(CACHE_CONTROL, value);
                let found = CacheControl::of(&headers);
                prop_assert!(found.explicit().unwrap_or_default().as_secs() <= MAX_SECONDS);
            }
        }
    }
}
