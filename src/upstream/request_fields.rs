//! The fields of a request on its way to the upstream (RFC 9110 §7.6): what goes on, what is taken away, what is added.

use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, EXPECT, HOST, ORIGIN, PRAGMA,
    RANGE, TE, USER_AGENT, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue, Version, request};

use crate::config::route::RequestFields;
use crate::http::headers::strip_hop_by_hop;
use crate::request::client::{Client, FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO, PublicUrl, request_authority};
use crate::request::fields::{API_KEY, REQUEST_ID, UNKEYED, is_claim, is_override, may_go_on};
use crate::request::interim::InterimSender;

/// Fields that Sluice takes away or sets itself on the way, whatever the client said in them.
const OWN: [HeaderName; 6] = [HOST, VIA, REQUEST_ID, FORWARDED_FOR, FORWARDED_PROTO, FORWARDED_HOST];

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
/// depends on what the cache key does not hold, and what the client leaves out is said as [`for_fetch`] says it.
#[must_use]
pub fn for_storable_pass(request: &request::Parts, forwarding: Forwarding<'_>, rule: &RequestFields) -> HeaderMap {
    let mut headers = end_to_end(request, forwarding);
    if matches!(rule, RequestFields::Listed(_)) {
        headers.insert(VIA, HeaderValue::from_static(via(request.version)));
        insert_uniform(&mut headers);
    }
    insert_listed(&mut headers, request, rule);
    headers
}

/// The fields of a request whose response others get too: nothing that the cache key does not hold.
///
/// Of the client's own fields those go on that are part of the key; `Accept` and `User-Agent` say the same for all clients. What
/// the upstream names in `Vary` is added by [`Negotiable`]. A rule that leaves everything to `Vary` lets all go on but for those
/// that are known to change responses without being named there.
#[must_use]
pub fn for_fetch(request: &request::Parts, forwarding: Forwarding<'_>, rule: &RequestFields) -> HeaderMap {
    let mut headers = end_to_end(request, forwarding);
    if matches!(rule, RequestFields::Listed(_)) {
        for name in request.headers.keys().filter(|name| !OWN.contains(name) && !is_keyed(name, rule)) {
            headers.remove(name);
        }
        headers.insert(VIA, HeaderValue::from_static(via(request.version)));
        insert_uniform(&mut headers);
    }
    insert_listed(&mut headers, request, rule);
    remove_where(&mut headers, is_override);
    // Trailers are not stored, so none are asked for.
    headers.remove(TE);
    headers.remove(CONNECTION);
    for name in UNKEYED.iter().filter(|name| !is_keyed(name, rule)) {
        headers.remove(name);
    }
    // Always the same, so that the coding of what is stored does not depend on who asked first.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    headers
}

/// Adds a client's credentials, for a rule that shares what says that it may be shared (RFC 9111 §3.5).
pub fn insert_credentials(headers: &mut HeaderMap, request: &request::Parts) {
    for name in [AUTHORIZATION, API_KEY] {
        if let Some(credentials) = request.headers.get(&name) {
            headers.insert(name, credentials.clone());
        }
    }
}

/// What the key holds is said, though the client's `Connection` names it: the answer would be that of a request without it.
fn insert_listed(headers: &mut HeaderMap, request: &request::Parts, rule: &RequestFields) {
    for name in rule.listed() {
        if !headers.contains_key(name) {
            for value in request.headers.get_all(name) {
                headers.append(name, value.clone());
            }
        }
    }
}

fn insert_uniform(headers: &mut HeaderMap) {
    for (name, value) in UNIFORM {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
}

/// What is said in these fields where nothing of the client's own is: some upstreams refuse requests without them.
const UNIFORM: [(HeaderName, &str); 2] = [(ACCEPT, "*/*"), (USER_AGENT, concat!("sluice/", env!("CARGO_PKG_VERSION")))];

/// A client's fields that the upstream is told only once it names them in `Vary` (RFC 9110 §12.5.5), so that the response to each
/// value is a variant of its own.
#[derive(Clone, Debug, Default)]
pub struct Negotiable {
    fields: HeaderMap,
    /// Whether something is said where the client says nothing ([`UNIFORM`]).
    uniform: bool,
    told: Vec<HeaderName>,
}

impl Negotiable {
    /// Those of a request under a rule, none of which was told yet. Under a rule that lets all go on, that is `Cookie`.
    #[must_use]
    pub fn of(request: &request::Parts, rule: &RequestFields) -> Self {
        let mut fields = request.headers.clone();
        // What `Connection` names is told all the same: a response that varies by it must not be that of another value.
        fields.remove(CONNECTION);
        strip_hop_by_hop(&mut fields);
        let goes_on = |name: &HeaderName| match rule {
            RequestFields::Listed(_) => may_go_on(name) && !is_keyed(name, rule),
            RequestFields::All => *name == COOKIE,
        };
        let others: Vec<HeaderName> = fields.keys().filter(|name| !goes_on(name)).cloned().collect();
        for name in others {
            fields.remove(name);
        }
        Self { fields, uniform: matches!(rule, RequestFields::Listed(_)), told: Vec::new() }
    }

    /// Has a request say all of those fields.
    pub fn tell_all(&mut self, request: &mut HeaderMap) {
        let names: Vec<HeaderName> = self.fields.keys().cloned().collect();
        self.tell(&names, request);
    }

    /// Has a request say exactly those fields of the client's that are `named` in `Vary`. Whether that changes the request.
    pub fn tell(&mut self, named: &[HeaderName], request: &mut HeaderMap) -> bool {
        let wanted: Vec<HeaderName> = named.iter().filter(|name| self.fields.contains_key(*name)).cloned().collect();
        if wanted == self.told {
            return false;
        }
        for name in self.told.iter().filter(|name| !wanted.contains(name)) {
            request.remove(name);
        }
        for name in &wanted {
            request.remove(name);
            for value in self.fields.get_all(name) {
                request.append(name, value.clone());
            }
        }
        if self.uniform {
            insert_uniform(request);
        }
        self.told = wanted;
        true
    }

    /// Whether the client said something that the upstream was not told.
    #[must_use]
    pub fn withholds(&self) -> bool {
        self.fields.keys().any(|name| !self.told.contains(name))
    }
}

/// Whether a request says nothing, beyond what its key holds, that could change the response.
#[must_use]
pub fn is_fully_keyed(request: &request::Parts, rule: &RequestFields) -> bool {
    has_no_unkeyed_but(request, rule, &[ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, CACHE_CONTROL, PRAGMA])
}

/// Whether a request asks for a range, unconditionally, and is fully keyed otherwise.
#[must_use]
pub fn is_keyed_range(request: &request::Parts, rule: &RequestFields) -> bool {
    request.headers.contains_key(RANGE) && has_no_unkeyed_but(request, rule, &[ACCEPT_ENCODING, CACHE_CONTROL, PRAGMA, RANGE])
}

/// Whether a request has, of the fields that could change a response without being part of its key, these alone.
fn has_no_unkeyed_but(request: &request::Parts, rule: &RequestFields, harmless: &[HeaderName]) -> bool {
    let changes = |name: &HeaderName| match rule {
        RequestFields::All => is_override(name.as_str()) || UNKEYED.contains(name) || *name == API_KEY,
        // What is not known may change anything.
        RequestFields::Listed(_) => !OWN.contains(name) && !is_keyed(name, rule),
    };
    !request.headers.keys().any(|name| changes(name) && !harmless.contains(name))
}

/// Whether the cache key holds a field's value.
fn is_keyed(name: &HeaderName, rule: &RequestFields) -> bool {
    *name == ORIGIN || matches!(rule, RequestFields::Listed(listed) if listed.contains(name))
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
        assert!(
            !for_fetch(&request, Forwarding { client: &client, ..forwarding(&id) }, &RequestFields::All).contains_key("x-forwarded-host")
        );
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
        let headers = for_fetch(&request, forwarding(&id), &RequestFields::All);
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "accept-encoding", "via", "x-forwarded-for", "x-request-id"]);
        assert_eq!(
            (&headers["x-forwarded-for"], &headers["accept-encoding"]),
            (&HeaderValue::from_static("192.0.2.7"), &HeaderValue::from_static("gzip"))
        );
    }

    #[test]
    fn what_the_key_does_not_hold_is_told_only_where_vary_names_it() {
        let (id, rule) = (HeaderValue::from_static("7"), RequestFields::Listed(vec![HeaderName::from_static("x-tenant")]));
        let request = parts(&[
            ("x-tenant", "a"),
            ("x-backend-host", "evil"),
            ("origin", "o"),
            ("accept-language", "de"),
            ("user-agent", "evil"),
            ("via", "1.0 evil"),
            ("cookie", "a=b"),
            ("x-forwarded-host", "evil"),
            ("accept-encoding", "br"),
        ]);
        let mut headers = for_fetch(&request, forwarding(&id), &rule);
        let said = |headers: &HeaderMap| {
            let mut said: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
            said.retain(|line| !line.starts_with("x-request-id") && !line.starts_with("x-forwarded-for"));
            said.sort_unstable();
            said.join("; ")
        };
        let agent = format!("user-agent: sluice/{}", env!("CARGO_PKG_VERSION"));
        let before = format!("accept-encoding: gzip; accept: */*; origin: o; {agent}; via: 1.1 sluice; x-tenant: a");
        assert_eq!(said(&headers), before);
        let mut negotiable = Negotiable::of(&request, &rule);
        let named = [ACCEPT, http::header::ACCEPT_LANGUAGE, HeaderName::from_static("x-forwarded-host")];
        assert!(negotiable.withholds() && negotiable.tell(&named, &mut headers) && !negotiable.tell(&named, &mut headers));
        assert_eq!((headers["accept-language"].as_bytes(), headers["accept"].as_bytes()), (&b"de"[..], &b"*/*"[..]));
        assert!(!headers.contains_key("x-forwarded-host"));
        assert!(negotiable.tell(&[USER_AGENT, http::header::COOKIE], &mut headers), "and no others");
        assert_eq!((headers["user-agent"].as_bytes(), headers["cookie"].as_bytes()), (&b"evil"[..], &b"a=b"[..]));
        assert!(negotiable.tell(&[], &mut headers));
        assert_eq!(said(&headers), before);
        let mut negotiable = Negotiable::of(&request, &RequestFields::All);
        let mut headers = for_fetch(&request, forwarding(&id), &RequestFields::All);
        assert!(negotiable.withholds() && !headers.contains_key("cookie"));
        assert!(negotiable.tell(&[http::header::COOKIE, ACCEPT], &mut headers) && !negotiable.withholds());
        assert_eq!((headers["cookie"].as_bytes(), headers.contains_key("accept")), (&b"a=b"[..], false));
    }

    #[test]
    fn only_keyed_requests_update_what_is_stored() {
        let rule = RequestFields::Listed(vec![HeaderName::from_static("x-tenant")]);
        let keyed = parts(&[("host", "h"), ("x-tenant", "a"), ("content-type", "x"), ("content-length", "1"), ("origin", "o")]);
        assert!(is_fully_keyed(&keyed, &rule));
        for name in ["x-other", "cookie", "range", "user-agent", "x-api-key"] {
            assert!(!is_fully_keyed(&parts(&[(name, "1")]), &rule), "{name}");
        }
        assert!(is_fully_keyed(&parts(&[("x-other", "1")]), &RequestFields::All));
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
