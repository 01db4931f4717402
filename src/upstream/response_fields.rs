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
    fn a_redirect_to_the_host_that_was_asked_for_is_known() {
        let upstream = [Authority::from_static("own:8000")];
        let redirect = HeaderMap::from_iter([(LOCATION, HeaderValue::from_static("https://Evil.example/x"))]);
        for (host, reflects) in [("evil.EXAMPLE", true), ("other.example", false), ("own:8000", false)] {
            assert_eq!(reflects_host(&redirect, Some(&HeaderValue::from_static(host)), &upstream), reflects, "{host}");
        }
        assert!(!reflects_host(&redirect, None, &upstream));
    }
}
