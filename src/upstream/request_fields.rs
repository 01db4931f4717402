//! The fields of a request on its way to the upstream (RFC 9110 §7.6): what goes on, what is taken away, what is added.

use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, IF_MATCH, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, PRAGMA, RANGE, TE, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue, Version, request};

use crate::http::headers::strip_hop_by_hop;
use crate::request::client::{Client, FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO, PublicUrl, request_authority};
use crate::request::interim::InterimSender;

/// `X-Request-Id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Fields by which a client claims what only a proxy knows: taken away and, where Sluice knows, rebuilt. So is `Proxy`,
/// which CGI turns into `HTTP_PROXY`.
fn is_claim(name: &str) -> bool {
    name.starts_with("x-forwarded-")
        || matches!(
            name,
            "forwarded"
                | "x-forwarded"
                | "x-real-ip"
                | "x-client-ip"
                | "x-cluster-client-ip"
                | "x-remote-ip"
                | "x-remote-addr"
                | "x-originating-ip"
                | "x-envoy-external-address"
                | "true-client-ip"
                | "client-ip"
                | "cf-connecting-ip"
                | "fastly-client-ip"
                | "front-end-https"
                | "proxy"
        )
}

/// Fields by which frameworks let a request say that it means another address, host, scheme or method than it does.
fn is_override(name: &str) -> bool {
    ["x-original-", "x-rewrite-", "x-http-", "x-override-", "x-middleware-", "x-invoke-", "x-accel-", "x-sendfile-"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
        || matches!(
            name,
            "x-host"
                | "x-method"
                | "x-method-override"
                | "x-request-uri"
                | "x-request-path"
                | "x-request-method"
                | "x-scheme"
                | "x-url-scheme"
                | "x-server-name"
                | "x-server-port"
                | "x-proxy-url"
                | "x-proxy-host"
                | "x-wap-profile"
                | "x-script-name"
                | "x-base-url"
                | "x-destination"
                | "base-url"
                | "destination"
                | "request-uri"
        )
}

/// Fields that could change an answer that others get, without being part of its key, and those that Sluice settles
/// itself: conditions and ranges from the whole answer, codings from what is stored.
const UNKEYED: [HeaderName; 12] = [
    COOKIE,
    AUTHORIZATION,
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
];

/// What Sluice knows of a request besides its own bytes, and tells the upstream.
#[derive(Clone, Copy)]
pub struct Forwarding<'a> {
    /// Who asks.
    pub client: &'a Client,
    /// The request's id.
    pub id: &'a HeaderValue,
    /// How clients reach Sluice, if it was told (`public_url`).
    pub public: Option<&'a PublicUrl>,
    /// Where interim (1xx) responses go, if the client may have any.
    pub interim: Option<&'a InterimSender>,
}

/// The fields of a request that is for one client alone.
#[must_use]
pub fn for_pass(request: &request::Parts, forwarding: Forwarding<'_>) -> HeaderMap {
    let mut headers = end_to_end(request, forwarding);
    match (forwarding.public, &forwarding.client.reached) {
        (Some(_), _) => {}
        (None, Some(reached)) => insert_reached(&mut headers, reached),
        (None, None) => {
            headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
            if let Some(host) = request_authority(request) {
                headers.insert(FORWARDED_HOST, host);
            }
        }
    }
    headers
}

/// The fields of a request that is passed on, but whose response may be stored or update what is stored: nothing in them
/// depends on what the cache key does not hold.
#[must_use]
pub fn for_storable_pass(request: &request::Parts, forwarding: Forwarding<'_>) -> HeaderMap {
    end_to_end(request, forwarding)
}

/// The fields of a request whose response others get too: without what the cache key does not hold.
#[must_use]
pub fn for_fetch(request: &request::Parts, forwarding: Forwarding<'_>) -> HeaderMap {
    let mut headers = end_to_end(request, forwarding);
    remove_where(&mut headers, is_override);
    // Trailers are not stored, so none are asked for.
    headers.remove(TE);
    headers.remove(CONNECTION);
    for name in &UNKEYED {
        headers.remove(name);
    }
    // Always the same, so that the coding of what is stored does not depend on who asked first.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    headers
}

/// Whether a request says nothing, beyond what its key holds, that could change the response.
#[must_use]
pub fn is_fully_keyed(request: &request::Parts) -> bool {
    has_no_unkeyed_but(request, &[ACCEPT_ENCODING, CONTENT_LENGTH, CACHE_CONTROL, PRAGMA])
}

/// Whether a request asks for a range, unconditionally, and is fully keyed otherwise.
#[must_use]
pub fn is_keyed_range(request: &request::Parts) -> bool {
    request.headers.contains_key(RANGE) && has_no_unkeyed_but(request, &[ACCEPT_ENCODING, CACHE_CONTROL, PRAGMA, RANGE])
}

/// Whether a request has, of the fields that could change a response without being part of its key, these alone.
fn has_no_unkeyed_but(request: &request::Parts, harmless: &[HeaderName]) -> bool {
    !request.headers.keys().any(|name| is_override(name.as_str()) || (UNKEYED.contains(name) && !harmless.contains(name)))
}

/// The end-to-end fields that may go on, with those that Sluice adds to every request.
fn end_to_end(request: &request::Parts, forwarding: Forwarding<'_>) -> HeaderMap {
    let mut headers = request.headers.clone();
    let trailers = accepts_trailers(&headers);
    strip_hop_by_hop(&mut headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    // CGI and WSGI read `X_Forwarded_For` as `X-Forwarded-For`: names with other signs than `-` do not go on.
    remove_where(&mut headers, |name| is_claim(name) || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    for name in &[HOST, EXPECT] {
        headers.remove(name);
    }
    headers.append(VIA, HeaderValue::from_static(via(request.version)));
    if let Ok(address) = HeaderValue::from_str(&forwarding.client.address.to_string()) {
        headers.insert(FORWARDED_FOR, address);
    }
    headers.insert(REQUEST_ID, forwarding.id.clone());
    if let Some(public) = forwarding.public {
        insert_reached(&mut headers, public);
    }
    headers
}

/// Removes every field whose name satisfies `unwanted`.
fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    let names: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

/// Sets `X-Forwarded-Proto` and `X-Forwarded-Host`.
fn insert_reached(headers: &mut HeaderMap, url: &PublicUrl) {
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(if url.scheme == "https" { "https" } else { "http" }));
    if let Ok(host) = HeaderValue::from_str(url.authority.as_str()) {
        headers.insert(FORWARDED_HOST, host);
    }
}

/// `Via` names the version in which the message was received (RFC 9110 §7.6.3).
const fn via(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0 sluice",
        Version::HTTP_2 => "2.0 sluice",
        _ => "1.1 sluice",
    }
}

/// Whether a client takes trailers (RFC 9110 §10.1.4).
fn accepts_trailers(headers: &HeaderMap) -> bool {
    let mut members = headers.get_all(TE).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    members.any(|member| member.trim_ascii().eq_ignore_ascii_case(b"trailers"))
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

    const CLIENT: &Client = &Client { address: std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7)), reached: None };

    fn forwarding(id: &HeaderValue) -> Forwarding<'_> {
        Forwarding { client: CLIENT, id, public: None, interim: None }
    }

    #[test]
    fn what_a_trusted_proxy_says_goes_on_with_what_is_passed_and_not_with_what_is_shared() {
        let (id, request) = (HeaderValue::from_static("7"), parts(&[("host", "inner")]));
        let reached = PublicUrl { scheme: "https".to_owned(), authority: "api.example".parse().unwrap() };
        let client = Client { reached: Some(reached), ..CLIENT.clone() };
        let headers = for_pass(&request, Forwarding { client: &client, ..forwarding(&id) });
        assert_eq!((headers["x-forwarded-proto"].as_bytes(), headers["x-forwarded-host"].as_bytes()), (&b"https"[..], &b"api.example"[..]));
        assert!(!for_fetch(&request, Forwarding { client: &client, ..forwarding(&id) }).contains_key("x-forwarded-host"));
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
            ("x_forwarded_for", "1.2.3.4"),
            ("x-rewrite-url", "/admin"),
            ("true-client-ip", "1.2.3.4"),
            ("range", "bytes=0-1"),
            ("if-none-match", "\"x\""),
            ("accept-encoding", "br"),
            ("connection", "x-forwarded-for, via"),
            ("accept", "application/json"),
        ]);
        let headers = for_fetch(&request, forwarding(&id));
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
        let headers = for_pass(&parts(&[("host", "api.test"), ("cookie", "a=b")]), forwarding(&id));
        assert_eq!(
            (&headers["x-forwarded-host"], &headers["cookie"]),
            (&HeaderValue::from_static("api.test"), &HeaderValue::from_static("a=b"))
        );
        assert!(!headers.contains_key(HOST));
    }
}
