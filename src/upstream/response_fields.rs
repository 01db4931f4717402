//! The fields of a response on its way back from the upstream.

use http::header::{CONTENT_LOCATION, LINK, LOCATION, REFRESH, VIA};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue};

use crate::http::headers::strip_hop_by_hop;
use crate::request::fields::REQUEST_ID;

/// What Sluice adds to a response's `Via`: the upstream is always reached over HTTP/1.1 (RFC 9110 §7.6.3).
pub const OWN_VIA: HeaderValue = HeaderValue::from_static("1.1 sluice");

/// Takes away what belongs to the connection to the upstream, and its echo of the request's id: that one is Sluice's to
/// echo.
pub fn clean(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
    headers.remove(REQUEST_ID);
}

/// Takes back what Sluice added to `Via` when it stored a response.
pub fn remove_own_via(headers: &mut HeaderMap) {
    let others: Vec<HeaderValue> = headers.get_all(VIA).iter().filter(|value| **value != OWN_VIA).cloned().collect();
    headers.remove(VIA);
    for value in others {
        headers.append(VIA, value);
    }
}

/// Rewrites a `Location` that names one of the upstream's authorities, which clients cannot reach, into what `own_url` makes
/// of its path and query.
pub fn relocate(headers: &mut HeaderMap, upstream: &[Authority], own_url: impl FnOnce(&str) -> Option<HeaderValue>) {
    let Some(rest) = headers.get(LOCATION).and_then(|location| after_authority(location, upstream)) else { return };
    if let Some(moved) = own_url(&rest) {
        headers.insert(LOCATION, moved);
    }
}

/// What follows the authority of an absolute URL, if that is one of the upstream's.
fn after_authority(location: &HeaderValue, upstream: &[Authority]) -> Option<String> {
    let text = location.to_str().ok()?;
    let after = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"))?;
    let end = after.find(['/', '?', '#']).unwrap_or(after.len());
    let (authority, rest) = after.split_at(end);
    upstream.iter().any(|known| known.as_str().eq_ignore_ascii_case(authority)).then(|| rest.to_owned())
}

/// Whether a response sends whoever gets it to the authority that the request named, where that is not the upstream's own.
/// Such a response must not be stored: an attacker who names another host would have later clients sent there.
#[must_use]
pub fn reflects_host(headers: &HeaderMap, requested: Option<&HeaderValue>, upstream: &[Authority]) -> bool {
    let Some(requested) = requested.and_then(|host| host.to_str().ok()?.parse::<Authority>().ok()) else { return false };
    if upstream.iter().any(|known| known.as_str().eq_ignore_ascii_case(requested.as_str())) {
        return false;
    }
    let requested = requested.as_str().to_ascii_lowercase();
    let fields = [LOCATION, CONTENT_LOCATION, REFRESH, LINK];
    let mut values = fields.iter().flat_map(|name| headers.get_all(name)).filter_map(|value| value.to_str().ok());
    values.any(|value| value.to_ascii_lowercase().contains(&requested))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_of_the_upstream_become_the_requests_own() {
        let upstream = [Authority::from_static("127.0.0.1:8000")];
        for (location, expected) in [
            ("http://127.0.0.1:8000/a?b", "http://api.test/a?b"),
            ("http://127.0.0.1:8000", "http://api.test"),
            ("http://127.0.0.1:80001/a", "http://127.0.0.1:80001/a"),
            ("/a", "/a"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, HeaderValue::from_static(location));
            relocate(&mut headers, &upstream, |rest| HeaderValue::from_str(&format!("http://api.test{rest}")).ok());
            assert_eq!(headers[LOCATION], expected);
        }
    }

    #[test]
    fn a_redirect_to_the_host_that_was_asked_for_is_known() {
        let upstream = [Authority::from_static("own:8000")];
        let redirect = HeaderMap::from_iter([(LOCATION, HeaderValue::from_static("https://Evil.example/x"))]);
        for (host, reflects) in [("evil.EXAMPLE", true), ("other.example", false), ("own:8000", false)] {
            assert_eq!(reflects_host(&redirect, Some(&HeaderValue::from_static(host)), &upstream), reflects, "{host}");
        }
        assert!(!reflects_host(&redirect, None, &upstream));
    }
}
