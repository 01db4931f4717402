//! `Vary` (RFC 9110 §12.5.5, RFC 9111 §4.1): which request fields chose the representation.

use http::header::{ACCEPT_ENCODING, ACCEPT_LANGUAGE, CONTENT_LANGUAGE, VARY};
use http::{HeaderMap, HeaderName};
use sha2::{Digest, Sha256};

/// What a response says about the request fields it depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vary {
    /// `*`, or a name that cannot be one: no later request is known to match.
    Any,
    /// These fields, lower-case, sorted, without `Accept-Encoding` (which Sluice settles itself). Often empty.
    Fields(Vec<HeaderName>),
}

impl Vary {
    /// Reads every `Vary` field of a response.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut fields = Vec::new();
        for value in headers.get_all(VARY) {
            for name in value.as_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                match HeaderName::from_bytes(name) {
                    _ if name.is_empty() => {}
                    _ if name == b"*" => return Self::Any,
                    Ok(name) if name == ACCEPT_ENCODING => {}
                    Ok(name) => fields.push(name),
                    Err(_) => return Self::Any,
                }
            }
        }
        fields.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
        fields.dedup();
        Self::Fields(fields)
    }
}

/// The secondary key: a digest of what `request` says in `fields`, white space around members aside.
///
/// Values are length-prefixed and absent fields differ from empty ones, so that no two selections run together.
#[must_use]
pub fn selection(fields: &[HeaderName], request: &HeaderMap) -> [u8; 32] {
    let mut digest = Sha256::new();
    let mut part = |bytes: &[u8]| {
        digest.update((bytes.len() as u64).to_le_bytes());
        digest.update(bytes);
    };
    for name in fields {
        part(name.as_str().as_bytes());
        // Some programs read only the first of several lines, so their order may matter.
        if name == ACCEPT_LANGUAGE && request.get_all(name).iter().nth(1).is_none() {
            languages(request).iter().for_each(|language| part(language.as_bytes()));
            continue;
        }
        for value in request.get_all(name) {
            for member in value.as_bytes().split(|&byte| byte == b',') {
                part(b",");
                part(member.trim_ascii());
            }
        }
    }
    digest.finalize().into()
}

/// The language of an answer, if it is one (RFC 9110 §8.5), in lower case.
#[must_use]
pub fn content_language(answer: &HeaderMap) -> Option<String> {
    let mut values = answer.get_all(CONTENT_LANGUAGE).iter();
    let (only, None) = (values.next()?.to_str().ok()?, values.next()) else { return None };
    let fine = !only.is_empty() && only.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    fine.then(|| only.to_ascii_lowercase())
}

/// The language that a request prefers to all others, in lower case: the only one with the greatest weight.
#[must_use]
pub fn preferred_language(request: &HeaderMap) -> Option<String> {
    if request.get_all(ACCEPT_LANGUAGE).iter().nth(1).is_some() {
        return None;
    }
    let mut weighted: Vec<(f32, String)> = Vec::new();
    for language in languages(request) {
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

/// `Accept-Language` (RFC 9110 §12.5.4) in one spelling: tags are blind to case, their weights and not their order say
/// which is preferred. What has no sense is kept as it is.
fn languages(request: &HeaderMap) -> Vec<String> {
    let mut languages = Vec::new();
    for value in request.get_all(ACCEPT_LANGUAGE) {
        for member in value.as_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|member| !member.is_empty()) {
            let text = String::from_utf8_lossy(member).to_ascii_lowercase();
            let (tag, weight) = text.split_once(';').map_or((text.as_str(), None), |(tag, weight)| (tag.trim(), Some(weight.trim())));
            let weight = weight
                .map(|weight| weight.strip_prefix("q=").filter(|weight| is_weight(weight)).and_then(|weight| weight.parse::<f32>().ok()));
            languages.push(match weight {
                None => format!("{tag};q=1.000"),
                Some(Some(weight)) => format!("{tag};q={weight:.3}"),
                Some(None) => text,
            });
        }
    }
    languages.sort_unstable();
    languages
}

/// `0`, `1` and up to three decimals (RFC 9110 §12.4.2): what some programs read and others do not is no weight.
fn is_weight(text: &str) -> bool {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let digits = |digit: &u8| digit.is_ascii_digit() && (whole == "0" || *digit == b'0');
    matches!(whole, "0" | "1") && decimals.len() <= 3 && decimals.as_bytes().iter().all(digits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    #[test]
    fn fields_are_sorted_once_each_and_accept_encoding_is_settled_elsewhere() {
        let vary = Vary::of(&headers(&[("vary", "Origin, accept-encoding"), ("vary", "accept,ORIGIN, ")]));
        let Vary::Fields(fields) = vary else { panic!("not fields") };
        assert_eq!(fields, ["accept", "origin"]);
        assert_eq!(Vary::of(&headers(&[])), Vary::Fields(vec![]));
    }

    #[test]
    fn a_star_or_nonsense_anywhere_matches_no_request() {
        assert_eq!(Vary::of(&headers(&[("vary", "origin, *")])), Vary::Any);
        assert_eq!(Vary::of(&headers(&[("vary", "a b")])), Vary::Any);
    }

    #[test]
    fn languages_differ_by_weight_and_not_by_order_or_case() {
        let of = |value: &str| selection(&[ACCEPT_LANGUAGE], &headers(&[("accept-language", value)]));
        for same in ["de, en", "EN,De", " en ;q=1.0,  de;q=1"] {
            assert_eq!(of("en, de"), of(same), "{same}");
        }
        for other in ["en", "en;q=0.9, de", "en, de, fr", "", "en;x=1, de", "en;q=1.5, de", "en;q=+1, de", "en;q=1e0, de"] {
            assert_ne!(of("en, de"), of(other), "{other}");
        }
        let lines = |one, two| selection(&[ACCEPT_LANGUAGE], &headers(&[("accept-language", one), ("accept-language", two)]));
        assert_ne!(lines("de, en;q=0.5", "de"), lines("de", "de, en;q=0.5"));
    }

    #[test]
    fn one_language_is_preferred_or_none() {
        let of = |value: &str| preferred_language(&headers(&[("accept-language", value)]));
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
            assert_eq!(of(value).as_deref(), preferred, "{value}");
        }
        let of = |value: &str| content_language(&headers(&[("content-language", value)]));
        assert_eq!((of("DE").as_deref(), of("de, en"), of("")), (Some("de"), None, None));
    }

    #[test]
    fn selections_differ_where_the_values_do() {
        let fields = [HeaderName::from_static("a"), HeaderName::from_static("b")];
        let of = |pairs: &[(&'static str, &str)]| selection(&fields, &headers(pairs));
        assert_eq!(of(&[("a", "x, y")]), of(&[("a", "x"), ("a", " y")]));
        assert_ne!(of(&[("a", "x")]), of(&[("b", "x")]));
        assert_ne!(of(&[("a", "")]), of(&[]));
        assert_ne!(of(&[("a", "xy")]), of(&[("a", "x,y")]));
        assert_eq!(of(&[("c", "1")]), of(&[]));
    }
}
