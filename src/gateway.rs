//! What a gateway does to a message on its way through (RFC 9110 §7.6), in both directions.

use std::net::IpAddr;

use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, IF_MATCH, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LOCATION, PRAGMA, RANGE, VIA,
};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Version, request};

use crate::config::PublicUrl;
use crate::http::headers::strip_hop_by_hop;
use crate::interim::Interim;

/// `X-Request-Id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Fields by which a client claims what only a proxy knows: taken away and, where Sluice knows, rebuilt.
const CLAIMS: [HeaderName; 7] = [
    FORWARDED,
    FORWARDED_FOR,
    FORWARDED_PROTO,
    FORWARDED_HOST,
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-forwarded-prefix"),
    HeaderName::from_static("x-real-ip"),
];

/// Fields that could change an answer that others get, without being part of its key.
const UNKEYED: [HeaderName; 21] = [
    COOKIE,
    AUTHORIZATION,
    // Sluice answers conditions and ranges itself, from the whole answer.
    RANGE,
    IF_RANGE,
    IF_MATCH,
    IF_NONE_MATCH,
    IF_MODIFIED_SINCE,
    IF_UNMODIFIED_SINCE,
    ACCEPT_ENCODING,
    CONTENT_LENGTH,
    CACHE_CONTROL,
    PRAGMA,
    HeaderName::from_static("x-original-url"),
    HeaderName::from_static("x-rewrite-url"),
    HeaderName::from_static("x-original-host"),
    HeaderName::from_static("x-host"),
    HeaderName::from_static("x-forwarded-server"),
    HeaderName::from_static("x-http-method"),
    HeaderName::from_static("x-http-method-override"),
    HeaderName::from_static("x-method-override"),
    HeaderName::from_static("x-forwarded-scheme"),
];

/// What Sluice knows of a request's way to it.
#[derive(Clone, Copy)]
pub struct Origin<'a> {
    /// The client's address.
    pub peer: IpAddr,
    /// The request's id.
    pub id: &'a HeaderValue,
    /// How clients reach Sluice, if it was told.
    pub public: Option<&'a PublicUrl>,
    /// Where interim answers go, if the client may have any.
    pub interim: Option<&'a Interim>,
}

/// The fields for the backend of a request that is for one client alone.
#[must_use]
pub fn for_pass(request: &request::Parts, origin: Origin<'_>) -> HeaderMap {
    let mut headers = onward(request, origin);
    if origin.public.is_none() {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
        if let Some(host) = request_authority(request) {
            headers.insert(FORWARDED_HOST, host);
        }
    }
    headers
}

/// The fields for the backend of a request whose answer others get too: without what the key does not hold.
#[must_use]
pub fn for_fetch(request: &request::Parts, origin: Origin<'_>) -> HeaderMap {
    let mut headers = onward(request, origin);
    for name in &UNKEYED {
        headers.remove(name);
    }
    // Always the same, so that the coding of what is stored does not depend on who asked first.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    headers
}

fn onward(request: &request::Parts, origin: Origin<'_>) -> HeaderMap {
    let mut headers = request.headers.clone();
    strip_hop_by_hop(&mut headers);
    for name in CLAIMS.iter().chain(&[HOST, EXPECT]) {
        headers.remove(name);
    }
    headers.append(VIA, HeaderValue::from_static(via(request.version)));
    if let Ok(peer) = HeaderValue::from_str(&origin.peer.to_canonical().to_string()) {
        headers.insert(FORWARDED_FOR, peer);
    }
    headers.insert(REQUEST_ID, origin.id.clone());
    if let Some(public) = origin.public {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static(if public.scheme == "https" { "https" } else { "http" }));
        if let Ok(host) = HeaderValue::from_str(public.authority.as_str()) {
            headers.insert(FORWARDED_HOST, host);
        }
    }
    headers
}

const fn via(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0 sluice",
        Version::HTTP_2 => "2.0 sluice",
        _ => "1.1 sluice",
    }
}

/// The authority that the client asked: of the target (HTTP/2, absolute form), or else `Host`.
#[must_use]
pub fn request_authority(request: &request::Parts) -> Option<HeaderValue> {
    match request.uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => request.headers.get(HOST).cloned(),
    }
}

/// Cleans the fields of the backend's answer. The id is Sluice's to echo.
pub fn clean_answer(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
    headers.remove(REQUEST_ID);
}

/// Takes back what Sluice added to `Via` when it stored an answer.
pub fn take_own_via(headers: &mut HeaderMap) {
    let own = HeaderValue::from_static(crate::proxy::VIA);
    let others: Vec<HeaderValue> = headers.get_all(VIA).iter().filter(|value| **value != own).cloned().collect();
    headers.remove(VIA);
    for value in others {
        headers.append(VIA, value);
    }
}

/// A `Location` that names the backend's authority gets the request's own: clients cannot reach the backend.
pub fn relocate(headers: &mut HeaderMap, backend: &[Authority], request: &request::Parts, public: Option<&PublicUrl>) {
    let Some(rest) = headers.get(LOCATION).and_then(|location| beyond_authority(location, backend)) else { return };
    if let Some(moved) = own_url(&rest, request, public) {
        headers.insert(LOCATION, moved);
    }
}

/// The absolute URL under which the client that asked reaches a path and query of Sluice's.
#[must_use]
pub fn own_url(path_and_query: &str, request: &request::Parts, public: Option<&PublicUrl>) -> Option<HeaderValue> {
    let host = request_authority(request)?;
    let scheme = public.map_or("http", |public| public.scheme.as_str());
    HeaderValue::from_bytes(&[scheme.as_bytes(), b"://", host.as_bytes(), path_and_query.as_bytes()].concat()).ok()
}

/// What follows the authority of an absolute URL, if that is one of the backend's.
fn beyond_authority(location: &HeaderValue, backend: &[Authority]) -> Option<String> {
    let text = location.to_str().ok()?;
    let after = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"))?;
    let end = after.find(['/', '?', '#']).unwrap_or(after.len());
    let (authority, rest) = after.split_at(end);
    backend.iter().any(|known| known.as_str().eq_ignore_ascii_case(authority)).then(|| rest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(fields: &[(&'static str, &'static str)]) -> request::Parts {
        let mut request = http::Request::builder().uri("/x");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn origin(id: &HeaderValue) -> Origin<'_> {
        Origin { peer: IpAddr::from([192, 0, 2, 7]), id, public: None, interim: None }
    }

    #[test]
    fn a_shared_fetch_carries_nothing_that_the_key_does_not_hold() {
        let id = HeaderValue::from_static("7");
        let request = parts(&[
            ("host", "api.test"),
            ("cookie", "a=b"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-host", "evil"),
            ("x-original-url", "/admin"),
            ("x-http-method-override", "DELETE"),
            ("range", "bytes=0-1"),
            ("if-none-match", "\"x\""),
            ("accept-encoding", "br"),
            ("connection", "x-forwarded-for, via"),
            ("accept", "application/json"),
        ]);
        let headers = for_fetch(&request, origin(&id));
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "accept-encoding", "via", "x-forwarded-for", "x-request-id"]);
        assert_eq!(
            (&headers["x-forwarded-for"], &headers["accept-encoding"]),
            (&HeaderValue::from_static("192.0.2.7"), &HeaderValue::from_static("gzip"))
        );
    }

    #[test]
    fn a_passed_request_tells_the_backend_where_it_came_from() {
        let id = HeaderValue::from_static("7");
        let headers = for_pass(&parts(&[("host", "api.test"), ("cookie", "a=b")]), origin(&id));
        assert_eq!(
            (&headers["x-forwarded-host"], &headers["cookie"]),
            (&HeaderValue::from_static("api.test"), &HeaderValue::from_static("a=b"))
        );
        assert!(!headers.contains_key(HOST));
    }

    #[test]
    fn locations_of_the_backend_become_the_requests_own() {
        let backend = [Authority::from_static("127.0.0.1:8000")];
        for (location, expected) in [
            ("http://127.0.0.1:8000/a?b", "http://api.test/a?b"),
            ("http://127.0.0.1:8000", "http://api.test"),
            ("http://127.0.0.1:80001/a", "http://127.0.0.1:80001/a"),
            ("/a", "/a"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, HeaderValue::from_static(location));
            relocate(&mut headers, &backend, &parts(&[("host", "api.test")]), None);
            assert_eq!(headers[LOCATION], expected);
        }
    }
}
