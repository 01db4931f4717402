//! Fields that a gateway must take away, and dates.

use std::time::Duration;

use http::header::{
    AGE, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, COOKIE, DATE, ETAG,
    EXPIRES, HOST, HeaderName, ORIGIN, PRAGMA, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, RETRY_AFTER, SET_COOKIE, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE, VARY, VIA,
};
use http::{HeaderMap, HeaderValue};

use super::cache_control::delta_seconds;
use crate::clock::Wall;

/// Fields that belong to one connection (RFC 9110 §7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 10] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("http2-settings"),
];

/// Fields that protect or frame a message and that `Connection` may therefore not take away: a client could
/// otherwise strip what the backend or Sluice relies on.
const NOT_NOMINABLE: [HeaderName; 16] = [
    AUTHORIZATION,
    COOKIE,
    SET_COOKIE,
    CACHE_CONTROL,
    HeaderName::from_static("cdn-cache-control"),
    EXPIRES,
    PRAGMA,
    VARY,
    ETAG,
    AGE,
    DATE,
    HOST,
    ORIGIN,
    CONTENT_LENGTH,
    CONTENT_ENCODING,
    VIA,
];

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

/// Fields of a 304 that would describe other bytes than those that are kept (RFC 9111 §3.2).
const OF_THE_BYTES: [HeaderName; 5] = [CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, TRANSFER_ENCODING];

/// The fields of a stored answer after the backend said that it still holds: what the 304 says wins (RFC 9111 §3.2).
#[must_use]
pub fn freshened(stored: &HeaderMap, not_modified: &HeaderMap) -> HeaderMap {
    let mut fields = stored.clone();
    for name in not_modified.keys().filter(|name| !OF_THE_BYTES.contains(name)) {
        fields.remove(name);
        for value in not_modified.get_all(name) {
            fields.append(name.clone(), value.clone());
        }
    }
    fields
}

/// For how long the sender of a response is not to be asked again (RFC 9110 §10.2.3): seconds, or until a date. `None`: it does not say, or
/// not in a way that can be read.
#[must_use]
pub fn retry_after(headers: &HeaderMap, now: Wall) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?;
    delta_seconds(value.as_bytes().trim_ascii()).or_else(|| Some(http_date(value)?.since(now)))
}

/// A date in any of the three forms of RFC 9110 §5.6.7. Names in any case count; the weekday is not held against it.
/// Years of two digits are of the fifty years around now, within which a cache's dates lie.
#[must_use]
pub fn http_date(value: &HeaderValue) -> Option<Wall> {
    let text = value.to_str().ok()?.trim();
    let words: Vec<&str> = text.split(' ').collect();
    let (year, month, day, time) = match words[..] {
        // Sun, 06 Nov 1994 08:49:37 GMT
        [weekday, day, month, year, time, zone] if year.len() == 4 && day.len() == 2 => {
            let named = weekday.len() == 4 && weekday.ends_with(',');
            (named && zone.eq_ignore_ascii_case("GMT")).then_some((number(year)?, month, day, time))?
        }
        // Sunday, 06-Nov-94 08:49:37 GMT
        [weekday, date, time, zone] => {
            let mut parts = date.split('-');
            let (day, month, year) = (parts.next()?, parts.next()?, parts.next()?);
            let fine = parts.next().is_none() && weekday.ends_with(',') && zone.eq_ignore_ascii_case("GMT");
            let year = if day.len() == 2 && year.len() == 2 { number(year)? } else { return None };
            fine.then_some((if year < 70 { 2000 + year } else { 1900 + year }, month, day, time))?
        }
        // Sun Nov  6 08:49:37 1994
        [_, month, "", day, time, year] if day.len() == 1 && year.len() == 4 => (number(year)?, month, day, time),
        [_, month, day, time, year] if day.len() == 2 && year.len() == 4 => (number(year)?, month, day, time),
        _ => return None,
    };
    let month = MONTHS.iter().position(|name| name.eq_ignore_ascii_case(month))?;
    let [hour, minute, second] = clock(time)?;
    let month = i8::try_from(month + 1).ok()?;
    // A leap second counts as the one before it.
    let moment = jiff::civil::DateTime::new(year, month, small(day)?, hour, minute, second.min(59), 0).ok()?;
    let since = moment.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_millisecond();
    Some(Wall::from_millis(u64::try_from(since).unwrap_or(0)))
}

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

fn number(text: &str) -> Option<i16> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn small(text: &str) -> Option<i8> {
    number(text).and_then(|number| i8::try_from(number).ok())
}

/// `08:49:37`, two digits each.
fn clock(text: &str) -> Option<[i8; 3]> {
    let parts: Vec<&str> = text.split(':').collect();
    let [hour, minute, second] = parts[..] else { return None };
    let two = |part: &str| if part.len() == 2 { small(part) } else { None };
    Some([two(hour)?, two(minute)?, two(second)?])
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
    fn how_long_not_to_ask_again() {
        let now = Wall::from_millis(784_111_777_000);
        for (text, seconds) in [
            ("30", Some(30)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:48:37 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
            ("1.5", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]);
            assert_eq!(retry_after(&headers, now), seconds.map(Duration::from_secs), "{text}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

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
        for form in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
            "SUN, 06 nov 1994 08:49:37 gMT",
            "Mon, 06 Nov 1994 08:49:37 GMT",
        ] {
            assert_eq!(http_date(&HeaderValue::from_static(form)), Some(Wall::from_millis(784_111_777_000)), "{form}");
        }
        for nonsense in [
            "0",
            "",
            "-1",
            "Thu, 18 Aug 2050 02:01:18 UTC",
            "Thu, 18 Aug 50 02:01:18 GMT",
            "Thu 18 Aug 2050 02:01:18 GMT",
            "Thu, 18  Aug  2050 02:01:18 GMT",
            "Thu, 18-Aug-2050 02:01:18 GMT",
            "Thu, 18 Aug 2050 02.01.18 GMT",
            "Thu, 18 Aug 2050 2:01:18 GMT",
            "Thu, 31 Feb 2050 02:01:18 GMT",
        ] {
            assert_eq!(http_date(&HeaderValue::from_static(nonsense)), None, "{nonsense}");
        }
        assert_eq!(http_date(&HeaderValue::from_static("Thu Aug  8 02:01:18 2050")).map(Wall::as_millis), Some(2_543_536_878_000));
    }

    #[test]
    fn a_304_updates_what_does_not_describe_the_bytes() {
        let of = |pairs: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in pairs {
                map.append(*name, HeaderValue::from_static(value));
            }
            map
        };
        let stored = of(&[("a", "1"), ("a", "2"), ("b", "1"), ("content-type", "x"), ("content-length", "9")]);
        let told = of(&[("a", "3"), ("c", "1"), ("content-type", "y"), ("content-length", "0"), ("content-encoding", "br")]);
        let expected = of(&[("a", "3"), ("b", "1"), ("c", "1"), ("content-type", "x"), ("content-length", "9")]);
        assert_eq!(freshened(&stored, &told), expected);
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
