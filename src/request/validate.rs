//! What a request must be before anything is done with it: one authority beyond doubt, a method that a gateway may pass on,
//! no expectation that cannot be met.
//!
//! Its framing was checked before, as bytes, in `front/`; what its target says is read next ([`super::target`]).

use http::header::{EXPECT, HOST};
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Version, request};

use super::refusal::Refusal;

/// The characters of a host (RFC 3986 §3.2.2) and a port: no user information, no other delimiter.
const HOST_BYTES: [bool; 256] = {
    let (mut table, mut text) = ([false; 256], 0_u8);
    while text < 127 {
        table[text as usize] = text.is_ascii_alphanumeric()
            || matches!(
                text,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b':'
                    | b'['
                    | b']'
                    | b'%'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b','
                    | b';'
                    | b'='
            );
        text += 1;
    }
    table
};

/// Whether these are the bytes of a host, perhaps with a port.
#[must_use]
pub fn is_host(host: &[u8]) -> bool {
    !host.is_empty() && host.iter().all(|&byte| HOST_BYTES[usize::from(byte)])
}

/// Checks a request (RFC 9112 §3.2, RFC 9113 §8.3.1) and returns its path and query.
///
/// # Errors
/// The [`Refusal`] of a request that a gateway cannot or must not pass on.
pub fn validate(parts: &request::Parts) -> Result<&str, Refusal> {
    if matches!(parts.method, Method::CONNECT | Method::TRACE) {
        return Err(Refusal::Method);
    }
    let mut hosts = parts.headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
    match (parts.uri.authority().map(|authority| authority.as_str().as_bytes()), hosts.next(), hosts.next()) {
        (_, _, Some(_)) => return Err(Refusal::BadHost),
        (Some(authority), None, _) if is_host(authority) => {}
        (Some(authority), Some(host), _) if is_host(authority) && host.eq_ignore_ascii_case(authority) => {}
        (None, Some(host), _) if is_host(host) => {}
        // Before HTTP/1.1 a request could do without.
        (None, None, _) if parts.version == Version::HTTP_10 => {}
        _ => return Err(Refusal::BadHost),
    }
    if parts.uri.scheme_str().is_some_and(|scheme| !matches!(scheme, "http" | "https")) {
        return Err(Refusal::NotAPath);
    }
    if parts.headers.get_all(EXPECT).iter().any(|expected| !expected.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Err(Refusal::Expectation);
    }
    parts.uri.path_and_query().map(PathAndQuery::as_str).ok_or(Refusal::NotAPath)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_authority_or_twice_the_same() {
        let asks = |version, uri: &str, fields: &[(&'static str, &str)]| {
            let mut request = http::Request::builder().version(version).uri(uri);
            for (name, value) in fields {
                request = request.header(*name, *value);
            }
            validate(&request.body(()).unwrap().into_parts().0).map(str::to_owned)
        };
        let (new, old, two) = (Version::HTTP_11, Version::HTTP_10, Version::HTTP_2);
        for (version, uri, fields, expected) in [
            (new, "/a?b", &[("host", "h:80")][..], Ok("/a?b")),
            (new, "/a", &[], Err(Refusal::BadHost)),
            (old, "/a", &[], Ok("/a")),
            (two, "/a", &[], Err(Refusal::BadHost)),
            (two, "http://h/a", &[], Ok("/a")),
            (two, "http://h/a", &[("host", "H")], Ok("/a")),
            (new, "http://h/a", &[("host", "i")], Err(Refusal::BadHost)),
            (new, "/a", &[("host", "h"), ("host", "h")], Err(Refusal::BadHost)),
            (new, "/a", &[("host", "")], Err(Refusal::BadHost)),
            (new, "/a", &[("host", "a@h")], Err(Refusal::BadHost)),
            (new, "ftp://h/a", &[("host", "h")], Err(Refusal::NotAPath)),
            (new, "/a", &[("host", "h"), ("expect", "100-Continue")], Ok("/a")),
            (new, "/a", &[("host", "h"), ("expect", "more")], Err(Refusal::Expectation)),
        ] {
            assert_eq!(asks(version, uri, fields), expected.map(str::to_owned), "{uri} {fields:?}");
        }
    }
}
