//! What a response says of where things are, in `Location` and `Content-Location`: the upstream may call itself there by a name that
//! clients cannot reach, or over a scheme that they do not speak.
//!
//! | the URL names | `public_url`, or a trusted proxy, says how clients reach Sluice | nobody says it |
//! |---|---|---|
//! | the address at which the upstream is reached | that scheme and authority | what the client asked for; `https` stays |
//! | the `Host` that it is sent (`backend.host`) | that scheme and authority | as it is where the client asked for it, else without scheme and authority |
//! | the public authority | that scheme and authority | |
//! | anything else | as it is | as it is |
//!
//! With a known URL nothing of what the client sent gets into the response. Without one, what is stored holds what the upstream said:
//! it is rewritten for each client anew.

use http::header::{CONTENT_LOCATION, LOCATION};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, request};

use crate::request::client::{Client, PublicUrl, own_url, request_authority};

/// An absolute URL, or one without its scheme.
struct Url<'a> {
    is_https: bool,
    authority: &'a str,
    /// What follows the authority.
    rest: &'a str,
}

impl<'a> Url<'a> {
    fn read(text: &'a str) -> Option<Self> {
        let after = |prefix: &str| {
            let (begin, rest) = text.split_at_checked(prefix.len())?;
            begin.eq_ignore_ascii_case(prefix).then_some(rest)
        };
        let https = after("https://");
        let rest = https.or_else(|| after("http://")).or_else(|| after("//"))?;
        let (authority, rest) = rest.split_at(rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len()));
        let authority = authority.rsplit_once('@').map_or(authority, |(_user, host)| host);
        Some(Self { is_https: https.is_some(), authority, rest })
    }

    /// Whether it names an authority. The default ports are no part of a name.
    fn names(&self, known: &str) -> bool {
        let bare = |text: &'a str, port: &str| text.strip_suffix(port).unwrap_or(text);
        let own = bare(self.authority, if self.is_https { ":443" } else { ":80" });
        let without_dot = own.strip_suffix('.').unwrap_or(own);
        without_dot.eq_ignore_ascii_case(known) || own.eq_ignore_ascii_case(known.strip_suffix(":80").unwrap_or(known))
    }

    /// What a client resolves against the URL that it asked for. A path that begins with two slashes would name another host.
    fn relative(&self) -> String {
        match self.rest.as_bytes() {
            [b'/', b'/' | b'\\', ..] => format!("/.{}", self.rest),
            [b'/', ..] => self.rest.to_owned(),
            _ => format!("/{}", self.rest),
        }
    }
}

/// Rewrites the URLs of a response for the client that gets it. `upstream` holds the address at which the upstream is reached, then the
/// `Host` that it is sent, if that is another.
pub fn relocate(headers: &mut HeaderMap, upstream: &[Authority], request: &request::Parts, client: &Client, public: Option<&PublicUrl>) {
    for name in [LOCATION, CONTENT_LOCATION] {
        if headers.contains_key(&name) {
            relocate_field(headers, &name, |text| moved(text, upstream, request, client, public));
        }
    }
}

fn relocate_field(headers: &mut HeaderMap, name: &HeaderName, moved: impl Fn(&str) -> Option<HeaderValue>) {
    let http::header::Entry::Occupied(mut entry) = headers.entry(name) else { return };
    for value in entry.iter_mut() {
        if let Some(other) = value.to_str().ok().and_then(&moved) {
            *value = other;
        }
    }
}

/// What stands in a URL's place; `None`: it stays.
fn moved(text: &str, upstream: &[Authority], request: &request::Parts, client: &Client, public: Option<&PublicUrl>) -> Option<HeaderValue> {
    let url = Url::read(text)?;
    let is_address = upstream.first().is_some_and(|address| url.names(address.as_str()));
    let is_host = upstream.iter().skip(1).any(|host| url.names(host.as_str()));
    let known = public.or(client.reached.as_ref());
    let is_public = public.is_some_and(|public| url.names(public.authority.as_str()));
    if !is_address && !is_host && !is_public {
        return None;
    }
    if known.is_none() && !is_address {
        let asked = request_authority(request);
        let is_asked = asked.as_ref().and_then(|asked| asked.to_str().ok()).is_some_and(|asked| url.names(asked));
        return if is_asked { None } else { HeaderValue::from_str(&url.relative()).ok() };
    }
    let scheme = if url.is_https { "https" } else { "http" };
    own_url(url.rest, scheme, request, client, public).or_else(|| HeaderValue::from_str(&url.relative()).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case<'a> {
        host: &'a str,
        public: Option<&'a str>,
        reached: Option<&'a str>,
        asked: &'a str,
    }

    impl Case<'_> {
        fn of(&self, location: &str) -> String {
            let url = |text: &str| {
                let (scheme, authority) = text.split_once("://").unwrap();
                PublicUrl { scheme: scheme.to_owned(), authority: authority.parse().unwrap() }
            };
            let names = [Authority::from_static("10.0.0.9:8000"), self.host.parse().unwrap()];
            let request = http::Request::builder().uri("/").header("host", self.asked).body(()).unwrap().into_parts().0;
            let client = Client { address: [192, 0, 2, 1].into(), reached: self.reached.map(url) };
            let mut headers = HeaderMap::new();
            for name in [LOCATION, CONTENT_LOCATION] {
                headers.append(name, HeaderValue::from_str(location).unwrap());
            }
            relocate(&mut headers, &names, &request, &client, self.public.map(url).as_ref());
            assert_eq!(headers[LOCATION], headers[CONTENT_LOCATION]);
            headers[LOCATION].to_str().unwrap().to_owned()
        }
    }

    #[test]
    fn with_a_public_url_whatever_the_upstream_calls_itself_becomes_that() {
        for host in ["10.0.0.9:8000", "inner.test", "api.example", "api.example:80"] {
            for asked in ["evil.example", "api.example", "10.0.0.9:8000", "inner.test"] {
                for reached in [None, Some("http://evil.example")] {
                    let case = Case { host, public: Some("https://api.example"), reached, asked };
                    for scheme in ["http://", "https://", "HTTP://", "//", "http://user:pass@"] {
                        for name in ["10.0.0.9:8000", host, "api.example"] {
                            for rest in ["", "/", "/a?b#c", "?b", "//evil.example/"] {
                                let location = format!("{scheme}{name}{rest}");
                                assert_eq!(case.of(&location), format!("https://api.example{rest}"), "{host} {asked} {location}");
                            }
                        }
                    }
                    for other in ["/a", "a", "", "http://elsewhere.test/", "https://10.0.0.9:80001/", "http://10.0.0.9:8000.evil.example/"]
                    {
                        assert_eq!(case.of(other), other);
                    }
                }
            }
        }
    }

    #[test]
    fn without_one_the_address_becomes_what_was_asked_for_and_the_host_stays_or_is_left_out() {
        for (host, asked, reached, location, expected) in [
            ("10.0.0.9:8000", "api.test", None, "http://10.0.0.9:8000/a?b", "http://api.test/a?b"),
            ("10.0.0.9:8000", "api.test", None, "https://10.0.0.9:8000/a", "https://api.test/a"),
            ("10.0.0.9:8000", "api.test", None, "http://10.0.0.9:8000", "http://api.test"),
            // The public name: it is not made http, and no other host gets in.
            ("api.example", "api.example", None, "https://api.example/a", "https://api.example/a"),
            ("api.example", "API.example:80", None, "http://api.example/a", "http://api.example/a"),
            ("api.example", "evil.example", None, "https://api.example/a?b", "/a?b"),
            ("api.example", "evil.example", None, "https://api.example", "/"),
            ("api.example", "evil.example", None, "https://api.example//evil.example/", "/.//evil.example/"),
            ("api.example", "evil.example", None, "https://api.example/\\evil.example/", "/./\\evil.example/"),
            ("api.example", "evil.example", None, "https://api.example?b", "/?b"),
            // A private one.
            ("inner.test", "api.test", None, "http://inner.test/a", "/a"),
            ("inner.test", "api.test", None, "http://INNER.test.:80/a", "/a"),
            // A trusted proxy says it.
            ("inner.test", "x", Some("https://api.test"), "http://inner.test/a", "https://api.test/a"),
            ("inner.test", "x", Some("https://api.test"), "http://10.0.0.9:8000/a", "https://api.test/a"),
            ("inner.test", "api.test", None, "http://elsewhere.test/a", "http://elsewhere.test/a"),
        ] {
            let case = Case { host, public: None, reached, asked };
            assert_eq!(case.of(location), expected, "{host} {asked} {location}");
        }
    }

    #[test]
    fn each_value_is_looked_at() {
        let mut headers = HeaderMap::new();
        for text in ["/a", "http://10.0.0.9:8000/b"] {
            headers.append(LOCATION, HeaderValue::from_static(text));
        }
        relocate_field(&mut headers, &LOCATION, |text| Url::read(text).map(|url| HeaderValue::from_str(&url.relative()).unwrap()));
        assert!(headers.get_all(LOCATION).iter().eq(["/a", "/b"]));
    }
}
