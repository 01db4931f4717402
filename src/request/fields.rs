//! What the names of request fields mean to a proxy that shares responses: claims, overrides, credentials, and what it settles
//! itself.

use http::HeaderName;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, COOKIE, EXPECT, HOST, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    IF_RANGE, IF_UNMODIFIED_SINCE, PRAGMA, RANGE, VIA,
};

/// `X-Api-Key`: credentials, as `Authorization` is.
pub const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// `X-Request-Id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Fields by which a client claims what only a proxy knows: taken away and, where Sluice knows, rebuilt. So is `Proxy`,
/// which CGI turns into `HTTP_PROXY`.
#[must_use]
pub fn is_claim(name: &str) -> bool {
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
#[must_use]
pub fn is_override(name: &str) -> bool {
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
pub const UNKEYED: [HeaderName; 12] = [
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

/// Whether a field of the client's may go on at all with a request whose response others get too.
#[must_use]
pub fn may_go_on(name: &HeaderName) -> bool {
    let text = name.as_str();
    let settled = UNKEYED.contains(name) && *name != COOKIE;
    let connection = matches!(text, "connection" | "keep-alive" | "proxy-connection" | "te" | "trailer" | "transfer-encoding" | "upgrade");
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    plain && !settled && !connection && !is_claim(text) && !is_override(text) && ![HOST, EXPECT, VIA, REQUEST_ID, API_KEY].contains(name)
}

/// Why a rule may not list a field in `request_headers`; `None`: it may.
#[must_use]
pub fn unlistable(name: &HeaderName) -> Option<&'static str> {
    match () {
        () if *name == AUTHORIZATION => Some("credentials are what authorization = \"respect\" is for"),
        () if *name == API_KEY || may_go_on(name) => None,
        () => Some("it is settled by Sluice itself, or dangerous to share answers with"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rule_may_list() {
        for (name, listable) in [
            ("x-tenant", true),
            ("x-api-key", true),
            ("cookie", true),
            ("accept", true),
            ("accept-language", true),
            ("authorization", false),
            ("range", false),
            ("accept-encoding", false),
            ("host", false),
            ("te", false),
            ("x-forwarded-host", false),
            ("x-original-url", false),
            ("x_tenant", false),
        ] {
            assert_eq!(unlistable(&HeaderName::from_static(name)).is_none(), listable, "{name}");
        }
    }
}
