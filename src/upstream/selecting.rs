//! What selects a variant: one header map, for all who ask (RFC 9111 §4.1).
//!
//! A response that varies by a field depends on what the upstream was sent in it, which is not always what the client said. So
//! the key under which a response is stored, the key under which it is looked up, and what a follower of a fetch is compared by
//! are all made from a [`Selecting`]: the fields of the request as the upstream would be sent them if it named all of them in
//! `Vary`. Nothing else makes one, and nothing else makes a [`Selected`].
//!
//! | field | selects by |
//! |---|---|
//! | one that the client sends and that may go on | the client's values |
//! | `Accept`, `User-Agent` where it sends none | what Sluice sends then |
//! | `X-Forwarded-For`, `-Proto`, `-Host`, `Via` | what Sluice sends |
//! | `Host` | nothing: the upstream is sent the same for all |
//! | one that never goes on (`Range`, conditions, `Cache-Control`, claims, overrides) | nothing |
//! | one that is another one each time (`X-Request-Id`, `traceparent`) | no request matches: [`Vary::Any`](crate::http::vary::Vary) |

use http::header::ACCEPT_LANGUAGE;
use http::{HeaderMap, HeaderName, request};
use sha2::{Digest, Sha256};

use super::request_fields::{Forwarding, Negotiable, for_fetch, insert_credentials};
use crate::config::route::RequestFields;
use crate::http::vary::languages;

/// The fields of a request as `Vary` selects by them.
#[derive(Clone, Debug)]
pub struct Selecting(HeaderMap);

/// What a request says in the fields that a response varies by: a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selected([u8; 32]);

impl Selected {
    /// What requests say in no fields.
    #[cfg(test)]
    pub(crate) const NOTHING: Self = Self([0; 32]);

    /// The digest.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Selecting {
    /// Those of a request under a rule; `authorized`: its credentials go on.
    #[must_use]
    pub fn of(request: &request::Parts, forwarding: Forwarding<'_>, rule: &RequestFields, authorized: bool) -> Self {
        let mut fields = for_fetch(request, forwarding, rule);
        Negotiable::of(request, rule).tell_all(&mut fields);
        if authorized {
            insert_credentials(&mut fields, request);
        }
        Self(fields)
    }

    /// What the request says in these fields, white space around members aside.
    ///
    /// Values are length-prefixed and absent fields differ from empty ones, so that no two selections run together.
    #[must_use]
    pub fn selected(&self, names: &[HeaderName]) -> Selected {
        let mut digest = Sha256::new();
        let mut part = |bytes: &[u8]| {
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(bytes);
        };
        for name in names {
            part(name.as_str().as_bytes());
            // Some programs read only the first of several lines, so their order may matter.
            if name == ACCEPT_LANGUAGE && self.0.get_all(name).iter().nth(1).is_none() {
                languages(&self.0).iter().for_each(|language| part(language.as_bytes()));
                continue;
            }
            for value in self.0.get_all(name) {
                for member in value.as_bytes().split(|&byte| byte == b',') {
                    part(b",");
                    part(member.trim_ascii());
                }
            }
        }
        Selected(digest.finalize().into())
    }

    /// The language that the request prefers to all others, in lower case: the only one with the greatest weight.
    #[must_use]
    pub fn preferred_language(&self) -> Option<String> {
        if self.0.get_all(ACCEPT_LANGUAGE).iter().nth(1).is_some() {
            return None;
        }
        let mut weighted: Vec<(f32, String)> = Vec::new();
        for language in languages(&self.0) {
            let (tag, weight) = language.split_once(";q=")?;
            weighted.push((weight.parse().ok()?, tag.to_owned()));
        }
        weighted.sort_by(|a, b| b.0.total_cmp(&a.0));
        match &weighted[..] {
            [(first, _), (second, _), ..] if first <= second => None,
            [(weight, tag), ..] if *weight > 0.0 && tag != "*" => Some(tag.clone()),
            _ => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::request::client::{Client, PublicUrl};
    use http::HeaderValue;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    /// As if these were all the fields that the upstream would be sent.
    pub(crate) fn selecting(pairs: &[(&'static str, &str)]) -> Selecting {
        Selecting(headers(pairs))
    }

    #[test]
    fn languages_differ_by_weight_and_not_by_order_or_case() {
        let of = |value: &str| selecting(&[("accept-language", value)]).selected(&[ACCEPT_LANGUAGE]);
        for same in ["de, en", "EN,De", " en ;q=1.0,  de;q=1"] {
            assert_eq!(of("en, de"), of(same), "{same}");
        }
        for other in ["en", "en;q=0.9, de", "en, de, fr", "", "en;x=1, de", "en;q=1.5, de", "en;q=+1, de", "en;q=1e0, de"] {
            assert_ne!(of("en, de"), of(other), "{other}");
        }
        let lines = |one, two| selecting(&[("accept-language", one), ("accept-language", two)]).selected(&[ACCEPT_LANGUAGE]);
        assert_ne!(lines("de, en;q=0.5", "de"), lines("de", "de, en;q=0.5"));
    }

    #[test]
    fn one_language_is_preferred_or_none() {
        for (value, preferred) in [
            ("fr;q=0.5, DE;q=1.0", Some("de")),
            ("de", Some("de")),
            ("de-AT, de;q=0.9", Some("de-at")),
            ("de, en", None),
            ("*, de;q=0.5", None),
            ("de;q=0", None),
            ("de;x=1", None),
            ("", None),
        ] {
            assert_eq!(selecting(&[("accept-language", value)]).preferred_language().as_deref(), preferred, "{value}");
        }
    }

    #[test]
    fn selections_differ_where_the_values_do() {
        let fields = [HeaderName::from_static("a"), HeaderName::from_static("b")];
        let of = |pairs: &[(&'static str, &str)]| selecting(pairs).selected(&fields);
        assert_eq!(of(&[("a", "x, y")]), of(&[("a", "x"), ("a", " y")]));
        assert_ne!(of(&[("a", "x")]), of(&[("b", "x")]));
        assert_ne!(of(&[("a", "")]), of(&[]));
        assert_ne!(of(&[("a", "xy")]), of(&[("a", "x,y")]));
        assert_eq!(of(&[("c", "1")]), of(&[]));
    }

    /// What a client selects by a field, at an address, under a rule.
    fn selected(rule: &RequestFields, address: &str, name: &str, fields: &[(&'static str, &str)]) -> Selected {
        let mut parts = http::Request::get("/x").body(()).unwrap().into_parts().0;
        parts.headers = headers(fields);
        let client = Client { address: address.parse().unwrap(), reached: None };
        let public = PublicUrl { scheme: "https".into(), authority: "api.example".parse().unwrap() };
        let id = HeaderValue::from_static("7");
        let forwarding = Forwarding { client: &client, id: &id, public: Some(&public), interim: None };
        Selecting::of(&parts, forwarding, rule, true).selected(&[HeaderName::from_bytes(name.as_bytes()).unwrap()])
    }

    #[test]
    fn a_field_selects_by_what_the_upstream_is_sent_in_it() {
        let listed = RequestFields::Listed(vec![HeaderName::from_static("x-listed")]);
        for rule in [&listed, &RequestFields::All] {
            let of = |name: &'static str, value: Option<&'static str>| {
                let fields: Vec<_> = value.map(|value| (name, value)).into_iter().collect();
                selected(rule, "192.0.2.1", name, &fields)
            };
            // The client's own.
            for name in ["accept", "user-agent", "accept-language", "cookie", "origin", "x-any", "x-listed", "authorization", "x-api-key"] {
                assert!(of(name, Some("a")) != of(name, Some("b")) && of(name, Some("a")) != of(name, None), "{name} {rule:?}");
            }
            // Sluice's own, and what never goes on, say the same whatever the client says.
            for name in
                ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "host", "x-real-ip", "forwarded", "range", "if-none-match"]
                    .into_iter()
                    .chain(["cache-control", "pragma", "x-original-url", "te", "connection", "accept-encoding", "x_any", "expect"])
            {
                assert!(of(name, Some("a")) == of(name, Some("b")) && of(name, Some("a")) == of(name, None), "{name} {rule:?}");
            }
            let from = |address| selected(rule, address, "x-forwarded-for", &[]);
            assert!(from("192.0.2.1") != from("192.0.2.2"));
        }
        let uniform = selected(&listed, "192.0.2.1", "accept", &[]);
        assert_eq!(uniform, selected(&listed, "192.0.2.1", "accept", &[("accept", "*/*")]));
    }
}
