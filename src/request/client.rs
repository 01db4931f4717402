//! Who asks, and by which address they reached Sluice, as far as that can be known.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use http::header::HOST;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, request};

/// `X-Forwarded-For`.
pub const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// `X-Forwarded-Proto`.
pub const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `X-Forwarded-Host`.
pub const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// The scheme and authority of a URL under which clients reach Sluice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicUrl {
    /// `http` or `https`.
    pub scheme: String,
    /// Host and port.
    pub authority: Authority,
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
    pub fn of(request: &request::Parts, peer: IpAddr, is_trusted: impl Fn(IpAddr) -> bool) -> Self {
        if !is_trusted(peer) {
            return Self { address: peer.to_canonical(), reached: None };
        }
        let mut address = peer.to_canonical();
        let chain: Vec<&[u8]> =
            request.headers.get_all(FORWARDED_FOR).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b',')).collect();
        for hop in chain.into_iter().rev() {
            let Some(hop) = read_address(hop) else { break };
            address = hop;
            if !is_trusted(hop) {
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

/// The address by which a client is counted: a client that has one address of an IPv6 /64 has all of them, so these count as one.
#[must_use]
pub fn counted_address(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address @ IpAddr::V4(_) => address,
    }
}

/// The address by which a client is counted where clients share what there is. A site of IPv6 mostly has a /48, which are 65,536 of those that
/// count as one elsewhere: they share as the clients behind one address of IPv4 do.
#[must_use]
pub fn counted_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 80))),
        address @ IpAddr::V4(_) => address,
    }
}

/// An address as `X-Forwarded-For` has it, perhaps with a port.
fn read_address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let with_port = || text.parse().ok().map(|address: SocketAddr| address.ip());
    bare.parse().ok().or_else(with_port).map(|address: IpAddr| address.to_canonical())
}

/// The authority that the client asked: of the target (HTTP/2, absolute form), or else `Host`.
#[must_use]
pub fn request_authority(request: &request::Parts) -> Option<HeaderValue> {
    match request.uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => request.headers.get(HOST).cloned(),
    }
}

/// The absolute URL under which the client that asked reaches a path and query of Sluice's. Where nobody who is believed says how that
/// is, it is what the client asked for, over `scheme`; nobody else gets such an answer.
#[must_use]
pub fn own_url(
    path_and_query: &str,
    scheme: &str,
    request: &request::Parts,
    client: &Client,
    public: Option<&PublicUrl>,
) -> Option<HeaderValue> {
    let (scheme, host) = match public.or(client.reached.as_ref()) {
        Some(known) => (known.scheme.as_str(), HeaderValue::from_str(known.authority.as_str()).ok()?),
        None => (scheme, request_authority(request)?),
    };
    HeaderValue::from_bytes(&[scheme.as_bytes(), b"://", host.as_bytes(), path_and_query.as_bytes()].concat()).ok()
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

    #[test]
    fn only_trusted_proxies_are_believed() {
        let networks: [ipnet::IpNet; 2] = ["10.0.0.0/8".parse().unwrap(), "192.0.2.1/32".parse().unwrap()];
        let is_trusted = |peer: IpAddr| networks.iter().any(|network| network.contains(&peer.to_canonical()));
        let request = parts(&[
            ("host", "inner"),
            ("x-forwarded-for", "6.6.6.6, 198.51.100.7:4711"),
            ("x-forwarded-for", "10.1.1.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "api.example"),
        ]);
        let client = |request: &request::Parts, peer: &str| Client::of(request, peer.parse().unwrap(), is_trusted);
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
    }
}
