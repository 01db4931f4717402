//! Where one HTTP/1 request ends and the next begins (RFC 9112), read strictly.
//!
//! Request smuggling is two programs that disagree about this. The HTTP library is lenient in places where the standard
//! allows it (bare LF, a length beside a transfer coding, a repeated length); another program between the client and
//! Sluice may be lenient in others. So every head is looked at here before the library may see any of it, and whatever
//! two programs could read in two ways is refused.
//!
//! A [`Framing`] is told all bytes of a connection in order and says how many of them may go on.

use crate::request::refusal::Refusal;

/// The most fields of a head.
const MAX_FIELDS: usize = 100;
/// The longest line of a chunk's size with its extensions, and all trailers together.
const MAX_CHUNK_LINE: usize = 256;
const MAX_TRAILERS: usize = 8 << 10;

/// What follows the bytes that may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, or the beginning of a head: it is to be shown again, from its first byte, with more bytes.
    More,
    /// A head that is refused. Nothing after it has a meaning.
    Refuse(Refusal),
    /// A body that is no body. Nothing after it has a meaning, and an answer may be under way already.
    Broken,
}

/// A connection's framing.
#[derive(Debug)]
pub struct Framing {
    state: State,
    max_head: usize,
    /// Heads that went on.
    heads: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Within a head.
    Head(Partial),
    /// Within a body that has so many more bytes.
    Sized(u64),
    /// Within a chunk's size line: so many bytes of it, the size so far, and where in the line.
    Size { read: usize, size: u64, part: SizePart },
    /// Within a chunk's bytes.
    Chunk(u64),
    /// Within the line end after a chunk, CR read or not.
    ChunkEnd { cr: bool },
    /// Within the trailers: bytes of all, bytes of this line, whether CR was read.
    Trailers { read: usize, line: usize, cr: bool },
    /// HTTP/2, which has frames of its own.
    Http2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SizePart {
    Digits,
    Extension,
    Cr,
}

/// What is known of a head of which some lines were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Partial {
    /// Where the next line begins.
    at: usize,
    next: Line,
    /// An empty line stood before the request.
    skipped: bool,
    /// The request is HTTP/1.0.
    http10: bool,
    length: Option<u64>,
    chunked: bool,
}

/// A line of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// The request line.
    Request,
    /// The empty line after HTTP/2's first one.
    Preface,
    /// A field line, before which there were so many, or the end.
    Field(usize),
}

const HEAD: State = State::Head(Partial { at: 0, next: Line::Request, skipped: false, http10: false, length: None, chunked: false });
const SIZE: State = State::Size { read: 0, size: 0, part: SizePart::Digits };

impl Framing {
    /// The framing of a new connection whose heads have at most `max_head` bytes.
    #[must_use]
    pub const fn new(max_head: usize) -> Self {
        Self { state: HEAD, max_head, heads: 0 }
    }

    /// How many heads went on so far.
    #[must_use]
    pub const fn heads(&self) -> u64 {
        self.heads
    }

    /// Whether the connection speaks HTTP/2.
    #[must_use]
    pub const fn is_http2(&self) -> bool {
        matches!(self.state, State::Http2)
    }

    /// Whether the next byte begins a request.
    #[must_use]
    pub fn is_between_requests(&self) -> bool {
        self.state == HEAD
    }

    /// Looks at the next bytes. Returns how many of them may go on, and what follows those.
    pub fn inspect(&mut self, bytes: &[u8]) -> (usize, Next) {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match self.state {
                State::Http2 => return (bytes.len(), Next::More),
                State::Head(partial) => match self.head(rest, partial) {
                    Ok(Some(end)) => at += end,
                    Ok(None) => return (at, Next::More),
                    Err(refusal) => return (at, Next::Refuse(refusal)),
                },
                State::Sized(left) | State::Chunk(left) => {
                    let taken = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
                    let left = left - taken as u64;
                    self.state = match self.state {
                        State::Sized(_) if left == 0 => HEAD,
                        State::Sized(_) => State::Sized(left),
                        _ if left == 0 => State::ChunkEnd { cr: false },
                        _ => State::Chunk(left),
                    };
                    at += taken;
                }
                State::Size { .. } | State::ChunkEnd { .. } | State::Trailers { .. } => {
                    let Some(state) = between_chunks(self.state, rest[0]) else { return (at, Next::Broken) };
                    self.state = state;
                    at += 1;
                }
            }
        }
        (at, Next::More)
    }

    /// A head at the beginning of `bytes`, of which some lines were read: its length, if it is whole.
    fn head(&mut self, bytes: &[u8], mut partial: Partial) -> Result<Option<usize>, Refusal> {
        // What lies beyond the largest head does not matter, however it came.
        let (bytes, too_large) = if bytes.len() > self.max_head { (&bytes[..self.max_head], true) } else { (bytes, false) };
        loop {
            let rest = &bytes[partial.at..];
            let Some(newline) = memchr::memchr(b'\n', rest) else {
                self.state = State::Head(partial);
                return if too_large { Err(Refusal::Head) } else { Ok(None) };
            };
            let line = rest[..newline].strip_suffix(b"\r").ok_or(Refusal::LineEnd)?;
            partial.at += newline + 1;
            match partial.next {
                // One empty line may stand before a request (RFC 9112 §2.2).
                Line::Request if line.is_empty() && !partial.skipped => partial.skipped = true,
                Line::Request if line == b"PRI * HTTP/2.0" && self.heads == 0 && !partial.skipped => partial.next = Line::Preface,
                Line::Request => (partial.http10, partial.next) = (request_line(line)?, Line::Field(0)),
                Line::Preface if line.is_empty() => {
                    self.state = State::Http2;
                    break;
                }
                Line::Preface => return Err(Refusal::Version),
                Line::Field(_) if line.is_empty() => {
                    self.state = partial.body()?;
                    break;
                }
                Line::Field(MAX_FIELDS) => return Err(Refusal::Head),
                Line::Field(count) => {
                    partial.field(line)?;
                    partial.next = Line::Field(count + 1);
                }
            }
        }
        self.heads += 1;
        Ok(Some(partial.at))
    }
}

/// One byte of what stands between chunks (RFC 9112 §7.1).
fn between_chunks(state: State, byte: u8) -> Option<State> {
    Some(match state {
        State::Size { read, .. } if read > MAX_CHUNK_LINE => return None,
        State::Size { read, size, part } => match (part, byte) {
            (SizePart::Digits, digit) if digit.is_ascii_hexdigit() => {
                let digit = char::from(digit).to_digit(16)?;
                let size = size.checked_mul(16)?.checked_add(u64::from(digit))?;
                State::Size { read: read + 1, size, part }
            }
            (SizePart::Digits, b';') if read > 0 => State::Size { read: read + 1, size, part: SizePart::Extension },
            (SizePart::Digits, b'\r') if read > 0 => State::Size { read, size, part: SizePart::Cr },
            (SizePart::Extension, b'\r') => State::Size { read, size, part: SizePart::Cr },
            (SizePart::Extension, byte) if is_field_byte(byte) => State::Size { read: read + 1, size, part },
            (SizePart::Cr, b'\n') if size == 0 => State::Trailers { read: 0, line: 0, cr: false },
            (SizePart::Cr, b'\n') => State::Chunk(size),
            _ => return None,
        },
        State::ChunkEnd { cr: false } if byte == b'\r' => State::ChunkEnd { cr: true },
        State::ChunkEnd { cr: true } if byte == b'\n' => SIZE,
        State::Trailers { read, .. } if read > MAX_TRAILERS => return None,
        State::Trailers { line: 0, cr: true, .. } if byte == b'\n' => HEAD,
        State::Trailers { read, cr: true, .. } if byte == b'\n' => State::Trailers { read, line: 0, cr: false },
        State::Trailers { read, line, cr: false } if byte == b'\r' => State::Trailers { read, line, cr: true },
        State::Trailers { read, line, cr: false } if is_field_byte(byte) && (line != 0 || is_token_byte(byte)) => {
            State::Trailers { read: read + 1, line: line + 1, cr: false }
        }
        _ => return None,
    })
}

impl Partial {
    /// Checks a field line, and notes what says where the body ends.
    fn field(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let colon = line.iter().position(|&byte| !is_token_byte(byte)).filter(|&at| at > 0 && line[at] == b':');
        let (name, value) = line.split_at(colon.ok_or(Refusal::FieldLine)?);
        let value = &value[1..];
        if !value.iter().all(|&byte| is_field_byte(byte)) {
            return Err(Refusal::FieldLine);
        }
        // Only these two decide where the body ends; their first letters rule nearly all others out.
        match name[0] {
            b'c' | b'C' if name.eq_ignore_ascii_case(b"content-length") => {
                let given = plain_number(trim(value)).ok_or(Refusal::Length)?;
                if self.length.replace(given).is_some() {
                    return Err(Refusal::Length);
                }
            }
            b't' | b'T' if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.chunked || !trim(value).eq_ignore_ascii_case(b"chunked") {
                    return Err(Refusal::Coding);
                }
                self.chunked = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// The head is whole: what follows it.
    const fn body(&self) -> Result<State, Refusal> {
        match (self.length, self.chunked) {
            (Some(_), true) => Err(Refusal::LengthAndCoding),
            (None, true) if self.http10 => Err(Refusal::LengthAndCoding),
            (None, true) => Ok(SIZE),
            (None | Some(0), false) => Ok(HEAD),
            (Some(length), false) => Ok(State::Sized(length)),
        }
    }
}

/// Checks `METHOD target HTTP/1.x`; says whether it is HTTP/1.0.
fn request_line(line: &[u8]) -> Result<bool, Refusal> {
    let spaces = memchr::memchr(b' ', line).zip(memchr::memrchr(b' ', line)).filter(|(first, last)| first < last);
    let (first, last) = spaces.ok_or(Refusal::RequestLine)?;
    let (method, target, version) = (&line[..first], &line[first + 1..last], &line[last + 1..]);
    if method.is_empty() || !method.iter().all(|&byte| is_token_byte(byte)) || target.is_empty() {
        return Err(Refusal::RequestLine);
    }
    // A space, or a fragment, which never belongs to a request; a control character has a refusal of its own.
    if let Some(bad) = target.iter().find(|&&byte| KINDS[usize::from(byte)] & TARGET == 0) {
        let control = bad.is_ascii_control() && !target.iter().any(|byte| matches!(byte, b' ' | b'#'));
        return Err(if control { Refusal::ControlCharacter } else { Refusal::RequestLine });
    }
    match version {
        b"HTTP/1.1" => Ok(false),
        b"HTTP/1.0" => Ok(true),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => Err(Refusal::Version),
        _ => Err(Refusal::RequestLine),
    }
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

fn is_token_byte(byte: u8) -> bool {
    KINDS[usize::from(byte)] & TOKEN != 0
}

fn is_field_byte(byte: u8) -> bool {
    KINDS[usize::from(byte)] & FIELD != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn judge(bytes: &[u8]) -> (usize, Next) {
        Framing::new(8192).inspect(bytes)
    }

    #[test]
    fn what_two_programs_could_read_in_two_ways_is_refused() {
        use Refusal::*;
        for (head, refusal) in [
            ("GET / HTTP/1.1\nHost: h\r\n\r\n", LineEnd),
            ("GET / HTTP/1.1\r\nHost: h\n\r\n", LineEnd),
            ("GET / HTTP/1.1\r\nHost: h\r\n\n", LineEnd),
            ("\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", LineEnd),
            ("\r\n\r\nGET / HTTP/1.1\r\n\r\n", RequestLine),
            ("GET  / HTTP/1.1\r\n\r\n", RequestLine),
            ("GET / HTTP/1.1 \r\n\r\n", RequestLine),
            ("GET\t/ HTTP/1.1\r\n\r\n", RequestLine),
            (" GET / HTTP/1.1\r\n\r\n", RequestLine),
            ("GET /\r\n\r\n", RequestLine),
            ("G(T / HTTP/1.1\r\n\r\n", RequestLine),
            ("GET /a#b HTTP/1.1\r\n\r\n", RequestLine),
            ("GET /a\u{1} HTTP/1.1\r\n\r\n", ControlCharacter),
            ("GET / http/1.1\r\n\r\n", RequestLine),
            ("GET / HTTP/1.2\r\n\r\n", Version),
            ("GET / HTTP/2.0\r\n\r\n", Version),
            ("GET / HTTP/1.1\r\nA : b\r\n\r\n", FieldLine),
            ("GET / HTTP/1.1\r\n A: b\r\n\r\n", FieldLine),
            ("GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", FieldLine),
            ("GET / HTTP/1.1\r\nA\r\n\r\n", FieldLine),
            ("GET / HTTP/1.1\r\n: b\r\n\r\n", FieldLine),
            ("GET / HTTP/1.1\r\nA: b\u{0}\r\n\r\n", FieldLine),
            ("GET / HTTP/1.1\r\nA: b\rc\r\n\r\n", FieldLine),
            ("POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", Length),
            ("POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", Length),
            ("POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n", Length),
            ("POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\n", Length),
            ("POST / HTTP/1.1\r\nContent-Length:\r\n\r\n", Length),
            ("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", Length),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n", Length),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", LengthAndCoding),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", LengthAndCoding),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", Coding),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n", Coding),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", Coding),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", Coding),
            ("POST / HTTP/1.1\r\nTransfer-Encoding:\x0bchunked\r\n\r\n", FieldLine),
        ] {
            assert_eq!(judge(head.as_bytes()), (0, Next::Refuse(refusal)), "{head:?}");
        }
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_FIELDS + 1));
        assert_eq!(judge(many.as_bytes()), (0, Next::Refuse(Head)));
        let long = format!("GET / HTTP/1.1\r\nA: {}", "b".repeat(8192));
        assert_eq!(judge(long.as_bytes()), (0, Next::Refuse(Head)));
    }

    #[test]
    fn bodies_end_where_they_say() {
        let get = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        for (first, next) in [
            ("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", Next::More),
            ("POST / HTTP/1.1\r\nContent-Length: \t5 \r\n\r\nGET /", Next::More),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n5;a=\"b\"\r\nhello\r\n0\r\nA: b\r\n\r\n", Next::More),
            ("\r\nGET / HTTP/1.0\r\n\r\n", Next::More),
            ("POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", Next::More),
        ] {
            let both = format!("{first}{get}");
            assert_eq!(judge(both.as_bytes()), (both.len(), next), "{first:?}");
            let bad = format!("{first}GET /\r\n\r\n");
            assert_eq!(judge(bad.as_bytes()), (first.len(), Next::Refuse(Refusal::RequestLine)), "{first:?}");
        }
        let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        for broken in
            ["\r\n", "g\r\n", "-1\r\n", "5\nhello", "5\r\nhelloX", "5 \r\n", "11111111111111111\r\n", "0\r\n A: b\r\n", "0\r\nA\n"]
        {
            let (_, next) = judge(format!("{chunked}{broken}").as_bytes());
            assert_eq!(next, Next::Broken, "{broken:?}");
        }
    }

    #[test]
    fn http2_begins_a_connection_or_is_no_request() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0";
        assert_eq!(judge(preface), (preface.len(), Next::More));
        let late = [b"GET / HTTP/1.1\r\n\r\n", &preface[..]].concat();
        assert_eq!(judge(&late), (18, Next::Refuse(Refusal::Version)));
    }

    /// What a stream of bytes comes to if it is read in pieces, the rest of each shown again as the contract says.
    fn piecewise(bytes: &[u8], cuts: &[usize]) -> (usize, Next) {
        let mut framing = Framing::new(200);
        let (mut gone, mut held) = (0, Vec::new());
        let mut start = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            let end = end.min(bytes.len()).max(start);
            held.extend_from_slice(&bytes[start..end]);
            start = end;
            let (passed, next) = framing.inspect(&held);
            gone += passed;
            held.drain(..passed);
            if next != Next::More {
                return (gone, next);
            }
        }
        (gone, Next::More)
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_arrive(
            parts in proptest::collection::vec(prop_oneof![
                Just("GET / HTTP/1.1\r\nHost: h\r\n\r\n"), Just("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"),
                Just("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), Just("2\r\nab\r\n"), Just("0\r\n\r\n"),
                Just("\r\n"), Just("\n"), Just("x"), Just("GET / HTTP/1.1\r\nA: b\n\r\n"),
            ], 0..8),
            mut cuts in proptest::collection::vec(0usize..300, 0..10),
        ) {
            let bytes = parts.concat().into_bytes();
            cuts.sort_unstable();
            prop_assert_eq!(piecewise(&bytes, &cuts), piecewise(&bytes, &[]));
        }

        #[test]
        fn hostile_bytes_are_judged_calmly(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (passed, _) = judge(&bytes);
            prop_assert!(passed <= bytes.len());
        }
    }
}
