//! `Vary` (RFC 9110 §12.5.5, RFC 9111 §4.1): which request fields chose the representation. What a request says in them is for
//! [`Selecting`](crate::upstream::selecting::Selecting) to tell.

use http::header::{ACCEPT_ENCODING, ACCEPT_LANGUAGE, CONTENT_LANGUAGE, VARY};
use http::{HeaderMap, HeaderName};

/// What a response says about the request fields it depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vary {
    /// `*`, a name that cannot be one, or a field that is another one in each request: no later request is known to match.
    Any,
    /// These fields, lower-case, sorted, without `Accept-Encoding` (which Sluice settles itself). Often empty.
    Fields(Vec<HeaderName>),
}

/// Fields that Sluice sets anew for each request: the id, and the place in a trace.
const ALWAYS_ANOTHER: [&str; 3] = ["x-request-id", "traceparent", "tracestate"];

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
                    Ok(name) if ALWAYS_ANOTHER.contains(&name.as_str()) => return Self::Any,
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

/// The language of an answer, if it is one (RFC 9110 §8.5), in lower case.
#[must_use]
pub fn content_language(answer: &HeaderMap) -> Option<String> {
    let mut values = answer.get_all(CONTENT_LANGUAGE).iter();
    let (only, None) = (values.next()?.to_str().ok()?, values.next()) else { return None };
    let fine = !only.is_empty() && only.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    fine.then(|| only.to_ascii_lowercase())
}

/// `Accept-Language` (RFC 9110 §12.5.4) in one spelling: tags are blind to case, their weights and not their order say
/// which is preferred. What has no sense is kept as it is.
#[must_use]
pub fn languages(request: &HeaderMap) -> Vec<String> {
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
        for name in ["X-Request-Id", "traceparent", "accept, Tracestate"] {
            assert_eq!(Vary::of(&headers(&[("vary", name)])), Vary::Any, "{name}");
        }
    }

    #[test]
    fn one_language_is_that_of_an_answer_or_none() {
        let of = |value: &str| content_language(&headers(&[("content-language", value)]));
        assert_eq!((of("DE").as_deref(), of("de, en"), of("")), (Some("de"), None, None));
    }
}
