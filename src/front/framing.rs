//! Where one HTTP/1 request ends and the next begins (RFC 9112), read strictly.
//!
//! Request smuggling is two programs that disagree about this. The HTTP library is lenient in places where the standard
//! allows it (bare LF, a length beside a transfer coding, a repeated length); another program between the client and
//! Sluice may be lenient in others. So every head is looked at here before the library may see any of it, and whatever
//! two programs could read in two ways is refused.
//!
//! A [`Framing`] is told all bytes of a connection in order and says how many of them may go on.

use super::frames::{Fault, Frames, Stop};
use super::message::{Body, Fields, bad_target, is_field_byte, is_token_byte};
use crate::request::refusal::Refusal;

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
    /// Over HTTP/2: this many bytes of fields with which something is wrong ([`with_fault`](super::frames::with_fault)). They were
    /// looked at: what follows them is to be shown next.
    Fault(usize, Fault),
}

/// A connection's framing.
#[derive(Debug)]
pub struct Framing {
    state: State,
    max_head: usize,
    /// Heads that went on.
    heads: u64,
    /// HTTP/2's frames, once it is spoken.
    frames: Option<Box<Frames>>,
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
    fields: Fields,
}

/// A line of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// The request line.
    Request,
    /// The empty line after HTTP/2's first one.
    Preface,
    /// A field line, or the end.
    Field,
}

const HEAD: State = State::Head(Partial { at: 0, next: Line::Request, skipped: false, http10: false, fields: Fields::NONE });
const SIZE: State = State::Size { read: 0, size: 0, part: SizePart::Digits };

impl Framing {
    /// The framing of a new connection whose heads have at most `max_head` bytes.
    #[must_use]
    pub const fn new(max_head: usize) -> Self {
        Self { state: HEAD, max_head, heads: 0, frames: None }
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

    /// Whether the connection speaks HTTP/2, and its client has not sent all that it begins with.
    #[must_use]
    pub fn is_beginning_http2(&self) -> bool {
        self.is_http2() && !self.frames.as_ref().is_some_and(|frames| frames.has_begun())
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
                State::Http2 => {
                    let frames = self.frames.get_or_insert_with(|| Box::new(Frames::new(self.max_head)));
                    let (count, stop) = frames.inspect(rest);
                    let next = match stop {
                        None => Next::More,
                        Some(Stop::End) => Next::Broken,
                        Some(Stop::Fault(length, fault)) => Next::Fault(length, fault),
                    };
                    return (at + count, next);
                }
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
                Line::Request => (partial.http10, partial.next) = (request_line(line)?, Line::Field),
                Line::Preface if line.is_empty() => {
                    self.state = State::Http2;
                    break;
                }
                Line::Preface => return Err(Refusal::Version),
                Line::Field if line.is_empty() => {
                    self.state = match partial.fields.body(partial.http10)? {
                        Body::Sized(0) => HEAD,
                        Body::Sized(length) => State::Sized(length),
                        Body::Chunked => SIZE,
                    };
                    break;
                }
                Line::Field => partial.field(line)?,
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
        self.fields.take(name, &value[1..])
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
    if let Some(refusal) = bad_target(target) {
        return Err(refusal);
    }
    match version {
        b"HTTP/1.1" => Ok(false),
        b"HTTP/1.0" => Ok(true),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => Err(Refusal::Version),
        _ => Err(Refusal::RequestLine),
    }
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
            ("POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n", CodingOrder),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", CodingOrder),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", CodingOrder),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", CodingOrder),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", CodingOrder),
            ("POST / HTTP/1.1\r\nTransfer-Encoding:\r\n chunked\r\n\r\n", FieldLine),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip,\r\n chunked\r\n\r\n", FieldLine),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\nContent-Length: 1\r\n\r\n", LengthAndCoding),
            ("POST / HTTP/1.1\r\nTransfer-Encoding:\x0bchunked\r\n\r\n", FieldLine),
        ] {
            assert_eq!(judge(head.as_bytes()), (0, Next::Refuse(refusal)), "{head:?}");
        }
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(crate::front::message::MAX_FIELDS + 1));
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
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
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
