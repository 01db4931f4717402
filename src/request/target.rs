//! The request target, sanitised: what it says, whether it may occur at all, and whether its meaning is certain.

use std::borrow::Cow;

use super::refusal::Refusal;

/// The longest path and query, in bytes.
pub const MAX_LEN: usize = 8192;

/// Stands for a `+` that was not percent-encoded. Backends that read forms take it for a space and others do not, so
/// it is kept apart from both `%20` and `%2B`. Control characters are refused, so the byte is free.
pub const PLUS: u8 = 0x01;

/// Reserved characters (RFC 3986 §2.2). Percent-encoded they are data, plain they may be structure, so that the two are different
/// targets to some backends and equal to others: where one was encoded, a byte of its own stands for it, counted from [`MARKS`].
const RESERVED: &[u8; 18] = b":/?#[]@!$&'()*+,;=";
/// The byte that stands for the first of them.
const MARKS: u8 = 0x02;

/// What stands for an encoded byte: its mark if it is reserved.
fn marked(byte: u8) -> u8 {
    let place = RESERVED.iter().position(|&reserved| reserved == byte);
    place.and_then(|place| u8::try_from(place).ok()).map_or(byte, |place| MARKS + place)
}

/// The character that a byte of a name, a value or a [canonical path](Target::canonical_path) stands for.
#[must_use]
pub fn unmarked(byte: u8) -> u8 {
    RESERVED.get(usize::from(byte.wrapping_sub(MARKS))).copied().unwrap_or(byte)
}

/// A request target whose escapes have been decoded once.
#[derive(Debug, PartialEq, Eq)]
pub struct Target<'a> {
    /// The decoded path.
    pub path: Cow<'a, str>,
    /// The same with marks, if a reserved character of it was encoded.
    marked_path: Option<Box<str>>,
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
    /// How many bytes it takes beside its own struct, if it owns its text.
    #[must_use]
    pub fn heap(&self) -> usize {
        let text = |parameter: &Parameter<'_>| parameter.name.len() + parameter.value.as_ref().map_or(0, |value| value.len());
        let parameters: usize = self.parameters.iter().map(|parameter| size_of::<Parameter<'_>>() + 32 + text(parameter)).sum();
        self.path.len() + self.marked_path.as_ref().map_or(0, |path| path.len()) + parameters + 32
    }

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
        let Path { path, marked, doubtful } = read_path(path)?;
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
        Ok(Self { path, marked_path: marked, doubtful, parameters })
    }

    /// The path as keys hold it: unreserved characters are the same encoded or not, reserved ones are not (RFC 3986 §6.2.2.2).
    #[must_use]
    pub fn canonical_path(&self) -> &str {
        self.marked_path.as_deref().unwrap_or(&self.path)
    }

    /// The same, holding its text itself.
    #[must_use]
    pub fn into_owned(self) -> Target<'static> {
        let owned = |text: Cow<'_, [u8]>| Cow::Owned(text.into_owned());
        let parameters = self.parameters.into_iter();
        let parameters = parameters.map(|one| Parameter { name: owned(one.name), value: one.value.map(owned) }).collect();
        let (path, marked_path) = (Cow::Owned(self.path.into_owned()), self.marked_path);
        Target { path, marked_path, doubtful: self.doubtful, parameters }
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
        let mut own = self.name.iter().map(|&byte| unmarked(byte));
        self.name.len() == name.len() && name.bytes().all(|byte| own.next() == Some(byte))
    }

    /// The name's bytes, decoded; reserved characters that were encoded are told apart from those that were not
    /// ([`unmarked`] makes them equal), and so is a `+`.
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
        as_text(self.value.as_deref().unwrap_or_default())
    }

    /// The name as text likewise.
    #[must_use]
    pub fn name_text(&self) -> Cow<'_, str> {
        as_text(&self.name)
    }
}

/// Decoded bytes as text: an unencoded `+` is a space, and whether another character was encoded does not matter.
#[must_use]
pub fn as_text(bytes: &[u8]) -> Cow<'_, str> {
    if bytes.iter().any(|&byte| byte < b' ') {
        let plain: Vec<u8> = bytes.iter().map(|&byte| if byte == PLUS { b' ' } else { unmarked(byte) }).collect();
        return Cow::Owned(String::from_utf8_lossy(&plain).into_owned());
    }
    String::from_utf8_lossy(bytes)
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

/// A path as it was read.
struct Path<'a> {
    /// Decoded.
    path: Cow<'a, str>,
    /// The same with marks, if that is something else.
    marked: Option<Box<str>>,
    /// Whether its meaning is doubtful.
    doubtful: bool,
}

/// Reads a path.
fn read_path(path: &str) -> Result<Path<'_>, Refusal> {
    if is_plain(path) {
        return Ok(Path { path: Cow::Borrowed(path), marked: None, doubtful: false });
    }
    let mut with_marks = None;
    let mut doubtful = path.contains("//") || path.bytes().any(|byte| matches!(byte, b'\\' | b';'));
    let decoded: Cow<'_, str> = if path.bytes().any(|byte| byte == b'%' || byte < 0x20 || byte == 0x7f) {
        let (mut bytes, mut marks) = (Vec::with_capacity(path.len()), Vec::with_capacity(path.len()));
        let mut rest = path.as_bytes();
        while let Some((byte, escaped, after)) = next(rest)? {
            // An encoded delimiter is data to one program and structure to the next.
            doubtful |= escaped && matches!(byte, b'/' | b'\\' | b';' | b'?' | b'#' | b'%');
            bytes.push(byte);
            marks.push(if escaped { marked(byte) } else { byte });
            rest = after;
        }
        with_marks = Some(marks).filter(|marks| *marks != bytes).and_then(|marks| String::from_utf8(marks).ok());
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
    Ok(Path { path: decoded, marked: with_marks.map(String::into_boxed_str), doubtful })
}

/// Decodes a name or a value once, keeping an unencoded `+` and encoded reserved characters apart.
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
            b'+' => b'+',
            other if escaped => marked(other),
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
        assert_eq!(value("/?a=%42%3A"), value("/?a=B%3a"));
    }

    #[test]
    fn reserved_characters_are_kept_apart_from_encoded_ones_and_read_the_same() {
        for reserved in RESERVED.iter().map(|&byte| char::from(byte)).filter(|reserved| !"&#+".contains(*reserved)) {
            let encoded = format!("%{:02x}", reserved as u32);
            let [plain, escaped] = [reserved.to_string(), encoded].map(|text| format!("/?v=a{text}b"));
            let [plain, escaped] = [&plain, &escaped].map(|text| Target::parse(text).unwrap());
            assert_ne!(plain.parameters, escaped.parameters, "{reserved}");
            assert_eq!(plain.text("v"), escaped.text("v"), "{reserved}");
        }
        for reserved in ":[]@!$&'()*+,=".chars() {
            let texts = [format!("/a{reserved}b"), format!("/a%{:02X}b", reserved as u32)];
            let [plain, escaped] = texts.each_ref().map(|text| Target::parse(text).unwrap());
            assert_ne!(plain.canonical_path(), escaped.canonical_path(), "{reserved}");
            assert_eq!(plain.path, escaped.path, "{reserved}");
        }
        let target = Target::parse("/?a%5B%5D=1&b%2cc=2").unwrap();
        assert!(target.has("a[]") && target.has("b,c") && !target.has("b"));
        assert_eq!(Target::parse("/%7e%2D").unwrap().canonical_path(), "/~-");
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
