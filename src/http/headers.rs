//! Fields that a gateway must take away, and dates.

use std::time::{Duration, UNIX_EPOCH};

use http::header::{
    AGE, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
    SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::{HeaderMap, HeaderValue};

use super::cache_control::delta_seconds;
use crate::clock::{Wall, millis};

/// Fields that belong to one connection (RFC 9110 §7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Fields that protect or frame a message and that `Connection` may therefore not take away: a client could
/// otherwise strip what the backend or Sluice relies on.
const NOT_NOMINABLE: [HeaderName; 8] = [AUTHORIZATION, COOKIE, SET_COOKIE, CACHE_CONTROL, AGE, HOST, CONTENT_LENGTH, VIA];

/// Removes what must not be passed on (RFC 9110 §7.6.1), in either direction.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let nominated: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .filter(|name| !NOT_NOMINABLE.contains(name))
        .collect();
    for name in nominated.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// A date in any of the three forms of RFC 9110 §5.6.7.
#[must_use]
pub fn http_date(value: &HeaderValue) -> Option<Wall> {
    let time = httpdate::parse_http_date(value.to_str().ok()?.trim()).ok()?;
    Some(Wall::from_millis(millis(time.duration_since(UNIX_EPOCH).unwrap_or_default())))
}

/// How old a response already was when it arrived (`Age`, RFC 9111 §5.1); the first value counts, nonsense is zero.
#[must_use]
pub fn age(headers: &HeaderMap) -> Duration {
    let first = |value: &HeaderValue| {
        let bytes = value.as_bytes();
        delta_seconds(bytes.split(|&byte| byte == b',').next().unwrap_or_default().trim_ascii())
    };
    headers.get(AGE).and_then(first).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_fields_go_and_protecting_ones_stay() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Private, Authorization"),
            ("connection", "x-other, , b@d"),
            ("x-private", "1"),
            ("x-other", "1"),
            ("authorization", "secret"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("content-type", "text/plain"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "content-type"]);
    }

    #[test]
    fn all_three_date_forms_are_read() {
        for form in ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"] {
            assert_eq!(http_date(&HeaderValue::from_static(form)), Some(Wall::from_millis(784_111_777_000)), "{form}");
        }
        assert_eq!(http_date(&HeaderValue::from_static("0")), None);
    }

    #[test]
    fn age_is_lenient() {
        for (value, seconds) in [("7", 7), ("7, 9", 7), ("-1", 0), ("x", 0)] {
            let mut headers = HeaderMap::new();
            headers.insert(AGE, HeaderValue::from_static(value));
            assert_eq!(age(&headers), Duration::from_secs(seconds), "{value}");
        }
    }
}
