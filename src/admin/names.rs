//! By which names the admin listener is asked. It answers to its own: a page from elsewhere whose name was made to point here (DNS
//! rebinding) would else read whatever everyone may read who reaches the listener.

use std::net::{IpAddr, Ipv6Addr};

use http::header::HOST;
use http::request;

/// Whether a request names this listener: by the address that it is bound to, as `localhost`, or by one of the names in
/// `admin.hosts`. Bound to every address it has them all. Before HTTP/1.1 a request could do without a name; no browser sends such.
#[must_use]
pub fn are_own(parts: &request::Parts, bound: IpAddr, named: &[String]) -> bool {
    let authority = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let hosts = parts.headers.get_all(HOST).iter().map(|host| host.as_bytes());
    authority.into_iter().chain(hosts).all(|name| host(name).is_some_and(|host| is_own(&host, bound, named)))
}

fn is_own(host: &str, bound: IpAddr, named: &[String]) -> bool {
    if named.iter().any(|name| name == host) {
        return true;
    }
    match host.parse::<IpAddr>() {
        // A page under an address is answered from there: an address cannot be made to point elsewhere.
        Ok(address) => bound.is_unspecified() || address.is_loopback() || address.to_canonical() == bound.to_canonical(),
        // RFC 6761 §6.3: such names are this machine's own.
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    }
}

/// The host of an authority in lower case, without port, brackets, zone and the root's dot; `None`: it is none.
#[must_use]
pub fn host(authority: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(authority).ok()?.to_ascii_lowercase();
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(rest) = text.strip_prefix('[') {
        let (literal, port) = rest.split_once(']')?;
        let address: Ipv6Addr = literal.split('%').next()?.parse().ok()?;
        let ends = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
        return ends.then(|| IpAddr::V6(address).to_canonical().to_string());
    }
    let (host, port) = text.split_once(':').unwrap_or((&text, ""));
    let host = host.strip_suffix('.').unwrap_or(host);
    (!host.is_empty() && is_port(port)).then(|| host.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_names_and_no_others() {
        let named = ["sluice".to_owned(), "metrics.example".to_owned(), "192.0.2.7".to_owned()];
        let own = |bound: &str, host: &str| {
            let request = http::Request::builder().uri("/stats").header(HOST, host);
            are_own(&request.body(()).unwrap().into_parts().0, bound.parse().unwrap(), &named)
        };
        for host in [
            "127.0.0.1",
            "127.0.0.1:9090",
            "127.8.8.8:1",
            "[::1]:9090",
            "[::1%25lo]",
            "[::ffff:127.0.0.1]:9090",
            "localhost",
            "LocalHost.:9090",
            "app.localhost:1",
            "sluice:9090",
            "SLUICE",
            "Metrics.Example.:80",
            "192.0.2.7:9090",
        ] {
            for bound in ["127.0.0.1", "::1", "10.0.0.1", "0.0.0.0", "::"] {
                assert!(own(bound, host), "{bound} {host}");
            }
        }
        for host in ["10.0.0.1:9090", "[2001:db8::1]:9090"] {
            assert!(own("0.0.0.0", host) && own("::", host) && !own("127.0.0.1", host), "{host}");
        }
        assert!(own("10.0.0.1", "10.0.0.1:9090") && own("::ffff:10.0.0.1", "10.0.0.1") && own("2001:db8::1", "[2001:db8:0::1]:1"));
        for host in [
            "evil.example",
            "evil.example:9090",
            "localhost.evil.example",
            "sluice.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1.nip.io:9090",
            "notlocalhost",
            "localhost@evil.example",
            "evil.example@localhost",
            "2130706433",
            "127.1",
            "0x7f.0.0.1",
            "[::1].evil.example",
            "localhost:9090:1",
            "localhost:port",
            "localhost..",
            "",
            ":9090",
            ".",
            "sluice, evil.example",
        ] {
            for bound in ["127.0.0.1", "0.0.0.0"] {
                assert!(!own(bound, host), "{bound} {host}");
            }
        }
    }

    #[test]
    fn all_names_that_a_request_has_must_be_own() {
        let own = |uri: &str, hosts: &[&str]| {
            let request = hosts.iter().fold(http::Request::builder().uri(uri), |request, host| request.header(HOST, *host));
            are_own(&request.body(()).unwrap().into_parts().0, IpAddr::from([127, 0, 0, 1]), &[])
        };
        assert!(own("/", &[]) && own("http://localhost/", &[]) && own("http://localhost/", &["localhost"]));
        assert!(!own("http://evil.example/", &["localhost"]) && !own("http://localhost/", &["evil.example"]));
        assert!(!own("/", &["localhost", "evil.example"]));
    }
}
