//! **The one table of message rules** for both protocols: what the fields of a request must be, and where its body ends (RFC 9110
//! §5, §8.6; RFC 9112 §5, §6; RFC 9113 §8.2). HTTP/1 shows its field lines as they are read ([`super::framing`]), HTTP/2 those of
//! a request that the library has read ([`Fields::of_http2`]).

use http::header::COOKIE;
use http::{HeaderMap, HeaderValue, Uri};

use crate::request::refusal::Refusal;

/// The most fields of a message's head.
pub const MAX_FIELDS: usize = 100;

/// What was read of the fields of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields {
    count: usize,
    length: Option<u64>,
    codings: Codings,
}

/// The transfer codings that a request names, over all its lines (RFC 9112 §6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codings {
    /// None.
    Absent,
    /// `chunked` alone.
    Chunked,
    /// Others that are not known here; `chunked` last or not yet.
    Unknown { chunked: bool },
    /// Not codings, or in an order in which nobody knows where the body ends.
    Bad,
}

/// Where a request's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// After this many bytes.
    Sized(u64),
    /// After its last chunk.
    Chunked,
}

impl Fields {
    /// No field yet.
    pub const NONE: Self = Self { count: 0, length: None, codings: Codings::Absent };

    /// Takes the next field.
    ///
    /// # Errors
    /// The [`Refusal`] of a field that is malformed, or that must not be repeated.
    pub fn take(&mut self, name: &[u8], value: &[u8]) -> Result<(), Refusal> {
        if self.count == MAX_FIELDS {
            return Err(Refusal::Head);
        }
        self.count += 1;
        if !value.iter().all(|&byte| is_field_byte(byte)) {
            return Err(Refusal::FieldLine);
        }
        // Only these two decide where the body ends; their first letters rule nearly all others out.
        match name.first() {
            Some(b'c' | b'C') if name.eq_ignore_ascii_case(b"content-length") => {
                let given = plain_number(trim(value)).ok_or(Refusal::Length)?;
                if self.length.replace(given).is_some() {
                    return Err(Refusal::Length);
                }
            }
            Some(b't' | b'T') if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                for coding in value.split(|&byte| byte == b',') {
                    self.codings = self.codings.then(trim(coding));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The head is whole: where its body ends.
    ///
    /// # Errors
    /// The [`Refusal`] of a request of which that is not certain.
    pub const fn body(&self, http10: bool) -> Result<Body, Refusal> {
        match (self.codings, self.length) {
            (Codings::Absent, None) => Ok(Body::Sized(0)),
            (Codings::Absent, Some(length)) => Ok(Body::Sized(length)),
            (_, Some(_)) => Err(Refusal::LengthAndCoding),
            (_, None) if http10 => Err(Refusal::LengthAndCoding),
            (Codings::Chunked, None) => Ok(Body::Chunked),
            (Codings::Unknown { chunked: true }, None) => Err(Refusal::Coding),
            (Codings::Unknown { chunked: false } | Codings::Bad, None) => Err(Refusal::CodingOrder),
        }
    }

    /// Why the fields of a request over HTTP/2 are refused, if they are. The library has refused already what belongs to a
    /// connection, and a body that is not as long as it says.
    #[must_use]
    pub fn of_http2(headers: &HeaderMap) -> Option<Refusal> {
        let (mut fields, mut has_cookie) = (Self::NONE, false);
        let mut all = headers.iter().map(|(name, value)| {
            // Browsers spread cookies over many fields, which become one ([`join_cookies`]).
            if name == COOKIE && std::mem::replace(&mut has_cookie, true) {
                fields.count -= 1;
            }
            fields.take(name.as_str().as_bytes(), value.as_bytes())?;
            if has_outer_space(value.as_bytes()) { Err(Refusal::FieldLine) } else { Ok(()) }
        });
        all.find_map(Result::err)
    }
}

impl Codings {
    /// After another coding. What is named after `chunked` would be applied to chunks, whose end is then not known.
    fn then(self, coding: &[u8]) -> Self {
        let is_chunked = coding.eq_ignore_ascii_case(b"chunked");
        // `identity` was a coding once; it is none any more (RFC 9112 §7).
        let is_none = coding.is_empty() || !coding.iter().all(|&byte| is_token_byte(byte)) || coding.eq_ignore_ascii_case(b"identity");
        match self {
            _ if is_none => Self::Bad,
            Self::Bad | Self::Chunked | Self::Unknown { chunked: true } => Self::Bad,
            Self::Absent if is_chunked => Self::Chunked,
            Self::Absent | Self::Unknown { chunked: false } => Self::Unknown { chunked: is_chunked },
        }
    }
}

/// Makes one field of the several over which HTTP/2 may spread cookies: what is not HTTP/2 knows one alone (RFC 9113 §8.2.3).
pub fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, whole);
    }
}

/// Whether a value begins or ends in a space or tab, which HTTP/2 forbids (RFC 9113 §8.2.1).
#[must_use]
pub fn has_outer_space(value: &[u8]) -> bool {
    trim(value).len() != value.len()
}

/// Digits and nothing else (RFC 9110 §8.6), at most nineteen, so that every program can hold the number.
fn plain_number(text: &[u8]) -> Option<u64> {
    let fine = (1..=19).contains(&text.len()) && text.iter().all(u8::is_ascii_digit);
    fine.then(|| std::str::from_utf8(text).ok()?.parse().ok())?
}

/// Without spaces and tabs around it: no other white space is allowed there (RFC 9110 §5.6.3).
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = value {
        value = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// What a byte may be part of: a token (RFC 9110 §5.6.2), a field's value (§5.5), a target. Looked up, since every byte
/// of every head is asked about.
const TOKEN: u8 = 1;
const FIELD: u8 = 2;
const TARGET: u8 = 4;
const KINDS: [u8; 256] = {
    let (mut kinds, mut byte) = ([0; 256], 0_u8);
    loop {
        let punctuation =
            matches!(byte, b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~');
        if byte.is_ascii_alphanumeric() || punctuation {
            kinds[byte as usize] |= TOKEN;
        }
        if matches!(byte, b'\t' | b' '..=b'~' | 0x80..) {
            kinds[byte as usize] |= FIELD;
        }
        if matches!(byte, b'!'..=b'~' | 0x80..) && byte != b'#' {
            kinds[byte as usize] |= TARGET;
        }
        if byte == 255 {
            break kinds;
        }
        byte += 1;
    }
};

/// Whether a byte may be part of a token.
#[must_use]
pub fn is_token_byte(byte: u8) -> bool {
    KINDS[usize::from(byte)] & TOKEN != 0
}

/// Whether a byte may be part of a field's value.
#[must_use]
pub fn is_field_byte(byte: u8) -> bool {
    KINDS[usize::from(byte)] & FIELD != 0
}

/// Why a request target is refused, if it is: a space, or a fragment, which never belongs to a request; or one that the library would refuse
/// without a word to anybody, for characters that no URL has. A control character has a refusal of its own.
#[must_use]
pub fn bad_target(target: &[u8]) -> Option<Refusal> {
    let Some(bad) = target.iter().find(|&&byte| KINDS[usize::from(byte)] & TARGET == 0) else {
        let is_odd = |byte: &u8| matches!(byte, b'"' | b'<' | b'>' | b'`' | b'\\' | b'^' | b'{' | b'|' | b'}' | 0x7f..);
        return (target.iter().any(is_odd) && Uri::try_from(target).is_err()).then_some(Refusal::RequestLine);
    };
    let control = bad.is_ascii_control() && !target.iter().any(|byte| matches!(byte, b' ' | b'#'));
    Some(if control { Refusal::ControlCharacter } else { Refusal::RequestLine })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(lines: &[&str]) -> Result<Body, Refusal> {
        let mut fields = Fields::NONE;
        for line in lines {
            fields.take(b"Transfer-Encoding", line.as_bytes())?;
        }
        fields.body(false)
    }

    #[test]
    fn targets_that_the_library_would_refuse_are_refused_here() {
        for (target, refused) in [
            (&b"/items?id=a<"[..], true),
            (b"/items>", true),
            (b"/items`", true),
            (b"/items?a=\"", true),
            (b"/items?a=\xff", true),
            (b"http://a/<", true),
            (b"/items?a={b}|c^d", false),
            (b"/items?a=\xc3\xa9", false),
            (b"http://a/?{", false),
            (b"*", false),
        ] {
            let is_read = Uri::try_from(target).is_ok();
            assert_eq!((bad_target(target), is_read), (refused.then_some(Refusal::RequestLine), !refused), "{}", target.escape_ascii());
        }
    }

    #[test]
    fn chunked_ends_a_body_only_where_it_is_last_and_named_once() {
        for lines in [&["chunked"][..], &["\tChunked "]] {
            assert_eq!(body(lines), Ok(Body::Chunked), "{lines:?}");
        }
        for lines in [&["gzip, chunked"][..], &["gzip", "chunked"], &["gzip,deflate , chunked"]] {
            assert_eq!(body(lines), Err(Refusal::Coding), "{lines:?}");
        }
        for lines in [
            &["chunked, gzip"][..],
            &["chunked", "gzip"],
            &["chunked", "identity"],
            &["identity", "chunked"],
            &["identity, chunked"],
            &["chunked, chunked"],
            &["gzip, chunked, chunked"],
            &["gzip"],
            &["xchunked"],
            &["chunked;a=b"],
            &["\"chunked\""],
            &["chunked,"],
            &[",chunked"],
            &["gzip chunked"],
            &[""],
        ] {
            assert_eq!(body(lines), Err(Refusal::CodingOrder), "{lines:?}");
        }
    }

    #[test]
    fn http2_has_the_same_fields_without_outer_spaces() {
        let of = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.append(*name, HeaderValue::from_static(value));
            }
            Fields::of_http2(&headers)
        };
        for (pairs, refusal) in [
            (&[("content-length", "1"), ("x", "a b")][..], None),
            (&[("content-length", "1"), ("content-length", "1")], Some(Refusal::Length)),
            (&[("content-length", "1, 1")], Some(Refusal::Length)),
            (&[("x", " a")], Some(Refusal::FieldLine)),
            (&[("x", "a\t")], Some(Refusal::FieldLine)),
            (&[("x", " ")], Some(Refusal::FieldLine)),
            (&[("x", "")], None),
            (&[("x", "y"); MAX_FIELDS], None),
            (&[("x", "y"); MAX_FIELDS + 1], Some(Refusal::Head)),
            (&[("cookie", "a=b"); 2 * MAX_FIELDS], None),
            (&[("cookie", "a=b"), ("cookie", " a=b")], Some(Refusal::FieldLine)),
        ] {
            assert_eq!(of(pairs), refusal, "{:?}", &pairs[..2.min(pairs.len())]);
        }
    }

    #[test]
    fn cookies_become_one_field() {
        let mut headers = HeaderMap::new();
        for crumb in ["a=b", "c=d; e=f", "g=h"] {
            headers.append(COOKIE, HeaderValue::from_static(crumb));
        }
        join_cookies(&mut headers);
        assert_eq!(headers.get_all(COOKIE).iter().collect::<Vec<_>>(), ["a=b; c=d; e=f; g=h"]);
    }
}
