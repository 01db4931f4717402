//! What a gateway does to a message on its way through (RFC 9110 §7.6), in both directions.

use std::net::{IpAddr, SocketAddr};

use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, IF_MATCH, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LOCATION, PRAGMA, RANGE, TE, VIA,
};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Version, request};

use crate::config::{Limits, PublicUrl};
use crate::http::headers::strip_hop_by_hop;
use crate::request::interim::Interim;

/// `X-Request-Id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

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

/// Removes every field whose name is one that `is_bad` knows.
fn remove_where(headers: &mut HeaderMap, is_bad: impl Fn(&str) -> bool) {
    let bad: Vec<HeaderName> = headers.keys().filter(|name| is_bad(name.as_str())).cloned().collect();
    for name in bad {
        headers.remove(name);
    }
}

/// Who asks, as far as that can be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The address: of the other end of the connection or, if that is a trusted proxy, what it says.
    pub address: IpAddr,
    /// How the client reached the trusted proxy, if it was one.
    pub reached: Option<PublicUrl>,
}

impl Client {
    /// Who asks through a connection from `peer`. What a request claims counts only if the one who sent it is trusted
    /// (`trusted_proxies`), and of a chain of addresses only what trusted proxies added.
    #[must_use]
    pub fn of(request: &request::Parts, peer: IpAddr, limits: &Limits) -> Self {
        if !limits.trusts(peer) {
            return Self { address: peer.to_canonical(), reached: None };
        }
        let mut address = peer.to_canonical();
        let chain: Vec<&[u8]> =
            request.headers.get_all(FORWARDED_FOR).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b',')).collect();
        for hop in chain.into_iter().rev() {
            let Some(hop) = read_address(hop) else { break };
            address = hop;
            if !limits.trusts(hop) {
                break;
            }
        }
        let one = |name: &HeaderName| {
            let mut values = request.headers.get_all(name).iter();
            values.next().filter(|_| values.next().is_none())?.to_str().ok()
        };
        let scheme = one(&FORWARDED_PROTO).filter(|scheme| matches!(*scheme, "http" | "https")).unwrap_or("http").to_owned();
        let host = one(&FORWARDED_HOST).map(ToOwned::to_owned);
        let host = host.or_else(|| Some(request_authority(request)?.to_str().ok()?.to_owned()));
        let authority = host.and_then(|host| host.parse::<Authority>().ok()).filter(|host| !host.as_str().contains('@'));
        Self { address, reached: authority.map(|authority| PublicUrl { scheme, authority }) }
    }
}

/// An address as `X-Forwarded-For` has it, perhaps with a port.
fn read_address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let with_port = || text.parse().ok().map(|address: SocketAddr| address.ip());
    bare.parse().ok().or_else(with_port).map(|address: IpAddr| address.to_canonical())
}

/// What Sluice knows of a request's way to it.
#[derive(Clone, Copy)]
pub struct Origin<'a> {
    /// Who asks.
    pub client: &'a Client,
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
    match (origin.public, &origin.client.reached) {
        (Some(_), _) => {}
        (None, Some(reached)) => say_reached(&mut headers, reached),
        (None, None) => {
            headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
            if let Some(host) = request_authority(request) {
                headers.insert(FORWARDED_HOST, host);
            }
        }
    }
    headers
}

/// The fields for the backend of a request that is passed on, but whose answer may teach the cache something: nothing in
/// them depends on what the key does not hold.
#[must_use]
pub fn for_lesson(request: &request::Parts, origin: Origin<'_>) -> HeaderMap {
    onward(request, origin)
}

/// Whether a request asks for a part, unconditionally, and says nothing else that could change the answer.
#[must_use]
pub fn is_plain_part(request: &request::Parts) -> bool {
    request.headers.contains_key(RANGE) && says_only(request, &[ACCEPT_ENCODING, CACHE_CONTROL, PRAGMA, RANGE])
}

/// Whether a request says nothing that could change the answer beyond what its key holds.
#[must_use]
pub fn is_plain(request: &request::Parts) -> bool {
    says_only(request, &[ACCEPT_ENCODING, CONTENT_LENGTH, CACHE_CONTROL, PRAGMA])
}

/// Whether of the fields that could change an answer without being part of its key a request has these alone.
fn says_only(request: &request::Parts, harmless: &[HeaderName]) -> bool {
    !request.headers.keys().any(|name| is_override(name.as_str()) || (UNKEYED.contains(name) && !harmless.contains(name)))
}

/// The fields for the backend of a request whose answer others get too: without what the key does not hold.
#[must_use]
pub fn for_fetch(request: &request::Parts, origin: Origin<'_>) -> HeaderMap {
    let mut headers = onward(request, origin);
    remove_where(&mut headers, is_override);
    // Trailers are not kept, so none are asked for.
    headers.remove(TE);
    headers.remove(CONNECTION);
    for name in &UNKEYED {
        headers.remove(name);
    }
    // Always the same, so that the coding of what is stored does not depend on who asked first.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    headers
}

fn onward(request: &request::Parts, origin: Origin<'_>) -> HeaderMap {
    let mut headers = request.headers.clone();
    let trailers = takes_trailers(&headers);
    strip_hop_by_hop(&mut headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    // To CGI and WSGI `X_Forwarded_For` is `X-Forwarded-For`: names that are not plain do not go on.
    remove_where(&mut headers, |name| is_claim(name) || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    for name in &[HOST, EXPECT] {
        headers.remove(name);
    }
    headers.append(VIA, HeaderValue::from_static(via(request.version)));
    if let Ok(address) = HeaderValue::from_str(&origin.client.address.to_string()) {
        headers.insert(FORWARDED_FOR, address);
    }
    headers.insert(REQUEST_ID, origin.id.clone());
    if let Some(public) = origin.public {
        say_reached(&mut headers, public);
    }
    headers
}

fn say_reached(headers: &mut HeaderMap, url: &PublicUrl) {
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(if url.scheme == "https" { "https" } else { "http" }));
    if let Ok(host) = HeaderValue::from_str(url.authority.as_str()) {
        headers.insert(FORWARDED_HOST, host);
    }
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

/// Whether a client takes trailers (RFC 9110 §10.1.4).
fn takes_trailers(headers: &HeaderMap) -> bool {
    let mut members = headers.get_all(TE).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    members.any(|member| member.trim_ascii().eq_ignore_ascii_case(b"trailers"))
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
pub fn relocate(headers: &mut HeaderMap, backend: &[Authority], request: &request::Parts, client: &Client, public: Option<&PublicUrl>) {
    let Some(rest) = headers.get(LOCATION).and_then(|location| beyond_authority(location, backend)) else { return };
    if let Some(moved) = own_url(&rest, request, client, public) {
        headers.insert(LOCATION, moved);
    }
}

/// Whether an answer sends whoever gets it to the authority that the request named, and that is not the backend's own
/// name: somebody else may have named another.
#[must_use]
pub fn reflects(headers: &HeaderMap, asked: Option<&HeaderValue>, backend: &[Authority]) -> bool {
    let Some(asked) = asked.and_then(|asked| asked.to_str().ok()?.parse::<Authority>().ok()) else { return false };
    let own = |known: &Authority| known.as_str().eq_ignore_ascii_case(asked.as_str());
    let named = [LOCATION, http::header::CONTENT_LOCATION, http::header::REFRESH, http::header::LINK];
    let mut values = named.iter().flat_map(|name| headers.get_all(name)).filter_map(|value| value.to_str().ok());
    !backend.iter().any(own) && values.any(|value| value.to_ascii_lowercase().contains(&asked.as_str().to_ascii_lowercase()))
}

/// The absolute URL under which the client that asked reaches a path and query of Sluice's.
#[must_use]
pub fn own_url(path_and_query: &str, request: &request::Parts, client: &Client, public: Option<&PublicUrl>) -> Option<HeaderValue> {
    let (scheme, host) = match (public, &client.reached) {
        (Some(public), _) => (public.scheme.as_str(), request_authority(request)?),
        (None, Some(reached)) => (reached.scheme.as_str(), HeaderValue::from_str(reached.authority.as_str()).ok()?),
        (None, None) => ("http", request_authority(request)?),
    };
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

    const CLIENT: &Client = &Client { address: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7)), reached: None };

    fn origin(id: &HeaderValue) -> Origin<'_> {
        Origin { client: CLIENT, id, public: None, interim: None }
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let text = "trusted_proxies=['10.0.0.0/8', '192.0.2.1']\n[backend]\nurl='http://127.0.0.1:1'";
        let limits = crate::config::check("t", text, &|_| None).config.unwrap().limits;
        let request = parts(&[
            ("host", "inner"),
            ("x-forwarded-for", "6.6.6.6, 198.51.100.7:4711"),
            ("x-forwarded-for", "10.1.1.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "api.example"),
        ]);
        let client = |request: &request::Parts, peer: &str| Client::of(request, peer.parse().unwrap(), &limits);
        let stranger = client(&request, "203.0.113.9");
        assert_eq!((stranger.address.to_string().as_str(), stranger.reached), ("203.0.113.9", None));
        let trusted = client(&request, "::ffff:192.0.2.1");
        assert_eq!(trusted.address.to_string(), "198.51.100.7");
        assert_eq!(trusted.reached.unwrap().authority, "api.example");
        for (claim, address) in
            [("nonsense", "10.9.9.9"), ("", "10.9.9.9"), ("2001:db8::1", "2001:db8::1"), ("[2001:db8::1]", "2001:db8::1")]
        {
            let request = parts(&[("host", "h"), ("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", claim)]);
            let client = client(&request, "10.9.9.9");
            assert_eq!((client.address.to_string().as_str(), client.reached.unwrap().authority.as_str()), (address, "h"), "{claim}");
        }
        let id = HeaderValue::from_static("7");
        let trusted = client(&request, "10.0.0.1");
        let headers = for_pass(&request, Origin { client: &trusted, ..origin(&id) });
        assert_eq!((headers["x-forwarded-proto"].as_bytes(), headers["x-forwarded-host"].as_bytes()), (&b"https"[..], &b"api.example"[..]));
        assert!(!for_fetch(&request, Origin { client: &trusted, ..origin(&id) }).contains_key("x-forwarded-host"));
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
            relocate(&mut headers, &backend, &parts(&[("host", "api.test")]), CLIENT, None);
            assert_eq!(headers[LOCATION], expected);
        }
    }
}
