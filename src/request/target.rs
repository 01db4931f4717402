//! The request target, sanitised: what it says, whether it may occur at all, and whether its meaning is certain.

use std::borrow::Cow;

use super::refusal::Refusal;

/// The longest path and query, in bytes.
pub const MAX_LEN: usize = 8192;

/// Stands for a `+` that was not percent-encoded. Backends that read forms take it for a space and others do not, so
/// it is kept apart from both `%20` and `%2B`. Control characters are refused, so the byte is free.
const PLUS: u8 = 0x01;

/// A request target whose escapes have been decoded once.
#[derive(Debug, PartialEq, Eq)]
pub struct Target<'a> {
    /// The decoded path.
    pub path: Cow<'a, str>,
    /// The target may mean different things to different programs: an encoded delimiter in the path, a dot segment, `//`,
    /// a backslash, bytes that are not UTF-8; anywhere a `;`, at which some programs separate parameters, or a character
    /// that no URL has. Such a request is forwarded verbatim and never cached.
    pub doubtful: bool,
    /// The parameters in the order in which they came.
    pub parameters: Vec<Parameter<'a>>,
}

/// One `name=value` of the query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter<'a> {
    name: Cow<'a, [u8]>,
    /// `None` for a name without `=`.
    value: Option<Cow<'a, [u8]>>,
}

impl<'a> Target<'a> {
    /// Reads a path with its query, as it stood in the request.
    ///
    /// # Errors
    /// A [`Refusal`] for what may not occur: over 8 KiB, control characters (encoded ones too), broken escapes.
    pub fn parse(target: &'a str) -> Result<Self, Refusal> {
        if target.len() > MAX_LEN {
            return Err(Refusal::UrlTooLong);
        }
        if !target.starts_with('/') {
            return Err(Refusal::NotAPath);
        }
        let (path, query) = match target.as_bytes().iter().position(|&byte| byte == b'?') {
            Some(at) => (&target[..at], &target[at + 1..]),
            None => (target, ""),
        };
        let (path, doubtful) = read_path(path)?;
        let doubtful = doubtful || !target.bytes().all(is_url_byte);
        let count = if query.is_empty() { 0 } else { query.bytes().filter(|&byte| byte == b'&').count() + 1 };
        let mut parameters = Vec::with_capacity(count);
        for part in query.as_bytes().split(|&byte| byte == b'&').filter(|part| !part.is_empty()) {
            let (name, value) = match part.iter().position(|&byte| byte == b'=') {
                Some(at) => (&part[..at], Some(decode(&part[at + 1..])?)),
                None => (part, None),
            };
            parameters.push(Parameter { name: decode(name)?, value });
        }
        Ok(Self { path, doubtful, parameters })
    }

    /// The same, holding its text itself.
    #[must_use]
    pub fn into_owned(self) -> Target<'static> {
        let owned = |text: Cow<'_, [u8]>| Cow::Owned(text.into_owned());
        let parameters = self.parameters.into_iter();
        let parameters = parameters.map(|one| Parameter { name: owned(one.name), value: one.value.map(owned) }).collect();
        Target { path: Cow::Owned(self.path.into_owned()), doubtful: self.doubtful, parameters }
    }

    /// The last value of a parameter as text, as the API reads it: `+` is a space, bad UTF-8 becomes U+FFFD, a name
    /// without `=` has the empty value.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        self.parameters.iter().rev().find(|parameter| parameter.is(name)).map(Parameter::text)
    }

    /// Whether a parameter is present.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.parameters.iter().any(|parameter| parameter.is(name))
    }
}

impl Parameter<'_> {
    /// Whether this is the parameter `name`.
    #[must_use]
    pub fn is(&self, name: &str) -> bool {
        &*self.name == name.as_bytes()
    }

    /// The name's bytes, decoded; an unencoded `+` is told apart from an encoded one.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// The value's bytes likewise; `None` for a name without `=`.
    #[must_use]
    pub fn value(&self) -> Option<&[u8]> {
        self.value.as_deref()
    }

    /// The value as text, as the API reads it.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        let bytes = self.value.as_deref().unwrap_or_default();
        if bytes.contains(&PLUS) {
            let plain: Vec<u8> = bytes.iter().map(|&byte| if byte == PLUS { b' ' } else { byte }).collect();
            return Cow::Owned(String::from_utf8_lossy(&plain).into_owned());
        }
        String::from_utf8_lossy(bytes)
    }
}

/// A byte that a URL may hold as it is (RFC 3986 §2) and that means the same to all: not the `;`, but the brackets that
/// many put into queries. Programs disagree about the others: some refuse them, some encode them, some end the target
/// there.
fn is_url_byte(byte: u8) -> bool {
    const FINE: [bool; 256] = {
        let (mut fine, mut byte) = ([false; 256], 0_u8);
        while byte < 128 {
            fine[byte as usize] =
                byte.is_ascii_graphic() && !matches!(byte, b'"' | b'#' | b';' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}');
            byte += 1;
        }
        fine
    };
    FINE[usize::from(byte)]
}

/// Whether a path needs no decoding, as nearly all do not: nothing encoded, no segment that begins with a dot or is empty,
/// nothing but printable ASCII.
fn is_plain(path: &str) -> bool {
    let mut after_slash = false;
    path.bytes().all(|byte| {
        let plain = match byte {
            b'/' | b'.' => !after_slash,
            b'%' | b'\\' | b';' => false,
            other => other.is_ascii_graphic(),
        };
        after_slash = byte == b'/';
        plain
    })
}

/// The decoded path, and whether its meaning is doubtful.
fn read_path(path: &str) -> Result<(Cow<'_, str>, bool), Refusal> {
    if is_plain(path) {
        return Ok((Cow::Borrowed(path), false));
    }
    let mut doubtful = path.contains("//") || path.bytes().any(|byte| matches!(byte, b'\\' | b';'));
    let decoded: Cow<'_, str> = if path.bytes().any(|byte| byte == b'%' || byte < 0x20 || byte == 0x7f) {
        let mut bytes = Vec::with_capacity(path.len());
        let mut rest = path.as_bytes();
        while let Some((byte, escaped, after)) = next(rest)? {
            // An encoded delimiter is data to one program and structure to the next.
            doubtful |= escaped && matches!(byte, b'/' | b'\\' | b';' | b'?' | b'#' | b'%');
            bytes.push(byte);
            rest = after;
        }
        match String::from_utf8(bytes) {
            Ok(text) => Cow::Owned(text),
            Err(error) => {
                doubtful = true;
                Cow::Owned(String::from_utf8_lossy(error.as_bytes()).into_owned())
            }
        }
    } else {
        Cow::Borrowed(path)
    };
    doubtful |= decoded.split('/').any(|segment| matches!(segment, "." | ".."));
    Ok((decoded, doubtful))
}

/// Decodes a name or a value once, keeping an unencoded `+` apart.
fn decode(text: &[u8]) -> Result<Cow<'_, [u8]>, Refusal> {
    let special = |byte: &u8| matches!(*byte, b'%' | b'+') || *byte < 0x20 || *byte == 0x7f;
    if !text.iter().any(special) {
        return Ok(Cow::Borrowed(text));
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, escaped, after)) = next(rest)? {
        bytes.push(match byte {
            b'+' if !escaped => PLUS,
            other => other,
        });
        rest = after;
    }
    Ok(Cow::Owned(bytes))
}

/// A byte, whether it was percent-encoded, and what follows it.
type Step<'a> = (u8, bool, &'a [u8]);

/// The next byte of `text`, whether it was percent-encoded, and what follows it.
fn next(text: &[u8]) -> Result<Option<Step<'_>>, Refusal> {
    let (byte, escaped, rest) = match text {
        [] => return Ok(None),
        [b'%', high, low, rest @ ..] => match (nibble(*high), nibble(*low)) {
            (Some(high), Some(low)) => (high << 4 | low, true, rest),
            _ => return Err(Refusal::BrokenEscape),
        },
        [b'%', ..] => return Err(Refusal::BrokenEscape),
        [byte, rest @ ..] => (*byte, false, rest),
    };
    if byte < 0x20 || byte == 0x7f {
        return Err(Refusal::ControlCharacter);
    }
    Ok(Some((byte, escaped, rest)))
}

const fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_may_not_occur_is_refused() {
        for (target, refusal) in [
            ("/a%00", Refusal::ControlCharacter),
            ("/a?x=%0d%0aSet-Cookie:", Refusal::ControlCharacter),
            ("/a?x=\u{1}", Refusal::ControlCharacter),
            ("/a?%7f", Refusal::ControlCharacter),
            ("/a?x=%", Refusal::BrokenEscape),
            ("/a?x=%4", Refusal::BrokenEscape),
            ("/%zz", Refusal::BrokenEscape),
            ("*", Refusal::NotAPath),
            ("", Refusal::NotAPath),
        ] {
            assert_eq!(Target::parse(target), Err(refusal), "{target:?}");
        }
        assert_eq!(Target::parse(&format!("/{}", "a".repeat(MAX_LEN))), Err(Refusal::UrlTooLong));
        assert!(Target::parse(&format!("/{}", "a".repeat(MAX_LEN - 1))).is_ok());
    }

    #[test]
    fn doubtful_paths_are_known() {
        for path in [
            "/api%2Fsymbols",
            "/api%2fsymbols",
            "//api/symbols",
            "/api//symbols",
            "/api/./symbols",
            "/api/x/../symbols",
            "/api/%2e%2e/x",
            "/api\\x",
            "/api%5cx",
            "/a%3fb",
            "/a%23b",
            "/a%253f",
            "/a;b",
            "/a%3bb",
            "/%ff",
            "/é",
            "/a?x=1;y=2",
            "/a?x={1}",
            "/a?x=<b>",
            "/a?x=é",
        ] {
            assert!(Target::parse(path).unwrap().doubtful, "{path}");
        }
        for path in ["/", "/api/symbols", "/api/s%79mbols", "/a..b/.x", "/api/symbols?x=/../", "/%C3%A9"] {
            assert!(!Target::parse(path).unwrap().doubtful, "{path}");
        }
        assert_eq!(Target::parse("/api/s%79mbols").unwrap().path, "/api/symbols");
    }

    #[test]
    fn parameters_read_as_the_api_reads_them() {
        let target = Target::parse("/?&&symbol=ETH&symbol=B%54C+%2b&&x&%6cimit=2&y=%FF&").unwrap();
        assert_eq!(target.text("symbol").unwrap(), "BTC +");
        assert_eq!(target.text("x").unwrap(), "");
        assert_eq!(target.text("limit").unwrap(), "2");
        assert_eq!(target.text("y").unwrap(), "\u{fffd}");
        assert_eq!(target.text("Symbol"), None);
        assert_eq!(target.parameters.len(), 5);
    }

    #[test]
    fn what_a_backend_could_tell_apart_stays_apart() {
        let value = |query: &str| Target::parse(query).unwrap().parameters[0].clone().value.map(Cow::into_owned);
        let all = ["/?a=+", "/?a=%20", "/?a=%2B", "/?a=%3B", "/?a=", "/?a"].map(value);
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one), "{one:?}");
        }
        assert_eq!(value("/?a=%42:"), value("/?a=B%3a"));
    }

    proptest! {
        #[test]
        fn plain_paths_need_no_decoding(path in "/[a-c/.%;é2fF]{0,12}") {
            if is_plain(&path) {
                prop_assert!(!path.split('/').any(|segment| segment == "." || segment == ".."));
                prop_assert!(!path.contains("//") && !path.contains(['%', ';', 'é']));
            }
        }

        #[test]
        fn any_target_is_read_or_refused(target in "/[ -~%&=+;é\u{1}]{0,60}") {
            if let Ok(read) = Target::parse(&target) {
                prop_assert!(!read.path.bytes().any(|byte| byte < 0x20 || byte == 0x7f));
            }
        }
    }
}
