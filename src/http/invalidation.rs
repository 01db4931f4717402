//! What an unsafe request invalidates (RFC 9111 §4.4).

use http::header::{CONTENT_LOCATION, LOCATION};
use http::{HeaderMap, HeaderValue, Method};

/// Whether a request with this method may change something: it is none of those that RFC 9110 §9.2.1 calls safe, and so unsafe
/// or unknown (RFC 9111 §4.4 invalidates for either).
#[must_use]
pub fn is_unsafe(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

/// The other targets that a response invalidates, those of its `Location` and `Content-Location`, as paths and queries. Only
/// those of the same origin count (`is_own` knows its authorities): nobody may invalidate what is another's. Relative ones
/// are resolved from `path`.
#[must_use]
pub fn named_targets(fields: &HeaderMap, path: &str, is_own: impl Fn(&str) -> bool) -> Vec<String> {
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
    fn only_targets_of_the_same_origin_are_named() {
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
            let named = named_targets(&fields, "/x/y", |authority| authority == "own");
            assert_eq!(named.first().map(String::as_str), expected, "{location}");
        }
    }

    #[test]
    fn a_method_that_is_not_known_to_be_safe_is_unsafe() {
        for method in ["POST", "PUT", "PATCH", "DELETE", "M-SEARCH", "MKCOL", "get", "X"] {
            assert!(is_unsafe(&Method::from_bytes(method.as_bytes()).unwrap()), "{method}");
        }
        for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE] {
            assert!(!is_unsafe(&method), "{method}");
        }
    }
}
