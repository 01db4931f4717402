//! Validators (RFC 9110 §8.8) and the preconditions that an answer from the cache can settle (§13.1.2, §13.1.3).

use http::header::{DATE, ETAG, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED};
use http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};

use super::headers::http_date;

/// A strong validator for a body that came without one: a digest of its identity bytes, so every instance and every
/// restart gives the same answer the same tag.
#[must_use]
pub fn etag_of(plain: &[u8]) -> HeaderValue {
    let digest = Sha256::digest(plain);
    let mut text = String::with_capacity(34);
    text.push('"');
    hex(&digest[..16], &mut text);
    text.push('"');
    HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

/// The weak form of a tag, for a representation whose bytes Sluice recoded (RFC 9110 §8.8.1).
#[must_use]
pub fn weaken(tag: &HeaderValue) -> HeaderValue {
    if tag.as_bytes().starts_with(b"W/") {
        return tag.clone();
    }
    HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat()).unwrap_or_else(|_| tag.clone())
}

/// Appends lower-case hexadecimal digits of `bytes` to `out`.
pub fn hex(bytes: &[u8], out: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// Whether a conditional GET or HEAD is answered 304, given the fields of the stored 200.
///
/// `If-None-Match` wins over `If-Modified-Since` (RFC 9110 §13.2.2).
#[must_use]
pub fn not_modified(request: &HeaderMap, stored: &HeaderMap) -> bool {
    if request.contains_key(IF_NONE_MATCH) {
        return request.get_all(IF_NONE_MATCH).iter().any(|list| is_listed(list.as_bytes(), stored.get(ETAG)));
    }
    let Some(since) = request.get(IF_MODIFIED_SINCE).and_then(http_date) else { return false };
    // RFC 9111 §4.3.2: without a date of modification, the date of the answer stands in.
    let modified = stored.get(LAST_MODIFIED).or_else(|| stored.get(DATE)).and_then(http_date);
    modified.is_some_and(|modified| modified <= since)
}

/// Whether a value of `If-None-Match` names a tag, compared weakly (RFC 9110 §8.8.3.2). A response without one is never named.
#[must_use]
pub fn is_listed(list: &[u8], etag: Option<&HeaderValue>) -> bool {
    let Some(ours) = etag.map(|etag| opaque(etag.as_bytes())) else { return false };
    list.trim_ascii() == b"*" || tags(list).any(|tag| opaque(tag) == ours)
}

/// Whether a 304 is about a stored answer (RFC 9111 §4.3.3): what validators it has are the stored ones.
#[must_use]
pub fn validates(not_modified: &HeaderMap, stored: &HeaderMap) -> bool {
    match (not_modified.get(ETAG), stored.get(ETAG)) {
        (Some(told), Some(ours)) => opaque(told.as_bytes()) == opaque(ours.as_bytes()),
        _ => true,
    }
}

/// An entity tag without its mark of weakness: what the weak comparison compares (RFC 9110 §8.8.3.2).
#[must_use]
pub fn opaque(tag: &[u8]) -> &[u8] {
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// The entity tags of a list. A comma may stand inside a tag's quotes.
fn tags(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    list.split(move |&byte| {
        quoted ^= byte == b'"';
        byte == b',' && !quoted
    })
    .map(<[u8]>::trim_ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(name: &'static str, value: &str) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(name, HeaderValue::from_str(value).unwrap());
        map
    }

    #[test]
    fn tags_compare_weakly_in_lists() {
        let ours = asks("etag", "\"a,b\"");
        for (list, same) in [
            ("\"a,b\"", true),
            ("W/\"a,b\"", true),
            ("\"x\", W/\"a,b\" , \"y\"", true),
            ("*", true),
            ("\"a\"", false),
            ("a,b", false),
            ("", false),
        ] {
            assert_eq!(not_modified(&asks("if-none-match", list), &ours), same, "{list}");
        }
        assert!(!not_modified(&asks("if-none-match", "*"), &HeaderMap::new()));
    }

    #[test]
    fn dates_count_only_without_tags() {
        let stored = asks("last-modified", "Wed, 01 Jan 2025 00:00:00 GMT");
        let since = |date| asks("if-modified-since", date);
        assert!(not_modified(&since("Wed, 01 Jan 2025 00:00:00 GMT"), &stored));
        assert!(!not_modified(&since("Tue, 31 Dec 2024 23:59:59 GMT"), &stored));
        assert!(!not_modified(&since("nonsense"), &stored));
        let dated = asks("date", "Wed, 01 Jan 2025 00:00:00 GMT");
        assert!(not_modified(&since("Wed, 01 Jan 2025 00:00:00 GMT"), &dated));
        assert!(!not_modified(&since("Tue, 31 Dec 2024 23:59:59 GMT"), &dated));
        let mut both = since("Wed, 01 Jan 2025 00:00:00 GMT");
        both.insert("if-none-match", HeaderValue::from_static("\"x\""));
        let mut stored = stored;
        stored.insert("etag", HeaderValue::from_static("\"y\""));
        assert!(!not_modified(&both, &stored));
    }

    #[test]
    fn generated_tags_are_stable_and_weaken_once() {
        let tag = etag_of(b"[]");
        assert_eq!(tag, "\"4f53cda18c2baa0c0354bb5f9a3ecbe5\"");
        assert_eq!(weaken(&weaken(&tag)), "W/\"4f53cda18c2baa0c0354bb5f9a3ecbe5\"");
    }
}
