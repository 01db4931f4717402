//! The frames of HTTP/2 that carry fields (RFC 9113 §6.2, §6.10), looked at before the library sees them: it cuts the fragment off
//! a `:path`, and drops what has no place in trailers, so that nobody behind it could refuse either.
//!
//! Where something is to be refused, a field is added at the end of the block: one that the library resets the stream for, or one
//! with which [`refused`] says the request's refusal to what answers it. The bytes of a client's own stay as they are.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::OnceLock;

use http::{HeaderMap, HeaderName};

use super::flood::Flood;
use super::hpack::{Decoder, Malformed};
use super::message::bad_target;
use crate::request::refusal::Refusal;

/// A frame's head, in bytes.
const HEAD: usize = 9;
/// What follows the first line of HTTP/2's preface and the empty one after it.
const PREFACE_REST: usize = b"SM\r\n\r\n".len();
/// The largest payload of a frame: what HTTP/2 begins with (§6.5.2).
const LARGEST_FRAME: usize = 16 << 10;

/// Open streams that are remembered: many times what the library lets be open, or reset for errors.
const MOST_OPEN: usize = 4096;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY_FRAME: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;

/// The frames of one direction of a connection.
#[derive(Debug)]
pub struct Frames {
    /// These many bytes go on as they are.
    skip: usize,
    /// What is not whole yet of a client's beginning (§3.4): the rest of the preface, and a frame.
    to_begin: u8,
    decoder: Decoder,
    /// The newest stream that was opened.
    newest: u32,
    /// The streams whose requests have begun and not ended, as far as is seen here: not when the server resets them.
    open: BTreeSet<u32>,
    /// What the client sent that costs more to answer than to send.
    flood: Flood,
    /// The largest block of fields, in bytes as it is sent.
    max_block: usize,
    /// The most frames that may continue a block before the one that ends it.
    max_continuations: usize,
}

/// What is wrong with a block of fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The message is malformed: its stream is reset (§8.1.1).
    Malformed,
    /// The request is refused.
    Refused(Refusal),
}

/// Where the bytes stop that may go on as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Before these many bytes of fields, with which something is wrong. They were looked at.
    Fault(usize, Fault),
    /// The connection cannot go on. What the library needs to say why may go on, and no frame after that: the library may read
    /// it otherwise, or only reset a stream without having read its fields.
    End,
}

/// A frame, all of which is there.
struct Frame<'b> {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: &'b [u8],
}

impl Frames {
    /// The frames of a new connection, whose fields have at most `max_head` bytes once they are read.
    #[must_use]
    pub fn new(max_head: usize) -> Self {
        // As it is sent, a head is hardly larger than once it is read, where each of its fields counts 32 bytes more (§10.5.1).
        let max_block = max_head.saturating_add(2 * LARGEST_FRAME);
        // A client that fills its frames needs a quarter less; the library allows as many.
        let full = (max_head / LARGEST_FRAME).max(1);
        let max_continuations = (full + full / 4).max(5);
        let (decoder, open, flood) = (Decoder::default(), BTreeSet::new(), Flood::default());
        Self { skip: PREFACE_REST, to_begin: 2, decoder, newest: 0, open, flood, max_block, max_continuations }
    }

    /// Whether the client sent all that it begins a connection with.
    #[must_use]
    pub const fn has_begun(&self) -> bool {
        self.to_begin == 0
    }

    /// Looks at the next bytes. Returns how many of them may go on, and why no more, unless more bytes must come first.
    pub fn inspect(&mut self, bytes: &[u8]) -> (usize, Option<Stop>) {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            if self.skip > 0 {
                let skipped = self.skip.min(rest.len());
                self.skip -= skipped;
                at += skipped;
                if self.skip == 0 {
                    self.to_begin = self.to_begin.saturating_sub(1);
                }
                continue;
            }
            let Some(head) = rest.first_chunk::<HEAD>() else { return (at, None) };
            match head[3] {
                HEADERS => match self.block(rest) {
                    Block::Partial if rest.len() > self.max_block => return (at, Some(Stop::End)),
                    Block::Partial => return (at, None),
                    Block::Whole(length, None) => at += length,
                    Block::Whole(length, Some(fault)) => return (at, Some(Stop::Fault(length, fault))),
                    Block::Invalid(length) => return (at + length, Some(Stop::End)),
                },
                // Without the block that it continues (§6.10), or what no client may send (§8.4).
                CONTINUATION | PUSH_PROMISE => match frame(rest) {
                    Some(frame) => return (at + HEAD + frame.payload.len(), Some(Stop::End)),
                    None if is_too_large(rest) => return (at + HEAD, Some(Stop::End)),
                    None => return (at, None),
                },
                WINDOW_UPDATE if rest.len() < HEAD + length_of(head).min(4) => return (at, None),
                kind => {
                    if !self.may_come(head, rest) {
                        return (at, Some(Stop::End));
                    }
                    if kind == RST_STREAM || (kind == DATA && head[4] & END_STREAM != 0) {
                        self.open.remove(&stream_of(head));
                    }
                    self.skip = HEAD + length_of(head);
                }
            }
        }
        (at, None)
    }

    /// Whether a frame without fields may come; if not, the connection is flooded with them.
    fn may_come(&mut self, head: &[u8; HEAD], bytes: &[u8]) -> bool {
        match head[3] {
            // Answers to what was sent.
            SETTINGS | PING if head[4] & ACK != 0 => true,
            SETTINGS | PING | PRIORITY_FRAME => self.flood.may_come(),
            DATA if length_of(head) == 0 && head[4] & END_STREAM == 0 => self.flood.may_come(),
            // Of a stream that was never opened it costs as much, and is no reset of one.
            RST_STREAM => self.flood.may_reset() && (stream_of(head) <= self.newest || self.flood.may_come()),
            WINDOW_UPDATE => self.flood.may_open(opening_of(bytes)),
            DATA => true,
            // Unknown ones are skipped (§4.1).
            _ => self.flood.may_come(),
        }
    }

    /// A block of fields at the beginning of `bytes`: a frame of HEADERS, and those that continue it.
    fn block(&mut self, bytes: &[u8]) -> Block {
        let Some(first) = frame(bytes) else { return if is_too_large(bytes) { Block::Invalid(HEAD) } else { Block::Partial } };
        let mut length = HEAD + first.payload.len();
        let Some(fragment) = fragment(&first) else { return Block::Invalid(length) };
        let (mut flags, mut count) = (first.flags, 0);
        while flags & END_HEADERS == 0 {
            let rest = &bytes[length..];
            let Some(next) = frame(rest) else {
                return if is_too_large(rest) { Block::Invalid(length + HEAD) } else { Block::Partial };
            };
            let after = length + HEAD + next.payload.len();
            if next.kind != CONTINUATION || next.stream != first.stream {
                // Where the library has given the block up already, it would take fields for a request's.
                return Block::Invalid(if next.kind == HEADERS { length } else { after });
            }
            (length, flags, count) = (after, next.flags, count + 1);
            if flags & END_HEADERS == 0 && count > self.max_continuations {
                return Block::Invalid(length);
            }
        }
        let joined =
            if count == 0 { Cow::Borrowed(fragment) } else { Cow::Owned(join(fragment, &bytes[HEAD + first.payload.len()..length])) };
        match self.judge(&first, &joined) {
            Ok(fault) => Block::Whole(length, fault),
            Err(_) => Block::Invalid(length),
        }
    }

    /// Reads the fields of a whole block, and says what is wrong with them that the library does not see.
    fn judge(&mut self, first: &Frame<'_>, block: &[u8]) -> Result<Option<Fault>, Malformed> {
        let is_request = first.stream > self.newest;
        if is_request {
            self.flood.did_open();
        }
        self.newest = self.newest.max(first.stream);
        // Whatever comes for a stream that has ended is the library's to answer.
        let is_trailers = !is_request && self.open.contains(&first.stream);
        if first.flags & END_STREAM != 0 {
            self.open.remove(&first.stream);
        } else if is_request {
            self.open.insert(first.stream);
            if self.open.len() > MOST_OPEN {
                self.open.pop_first();
            }
        }
        // Of a repeated one the library says that it is malformed. It costs next to nothing to send, and a look at each would not.
        let (mut fault, mut has_path) = (None, false);
        self.decoder.decode(block, |name, value| match name {
            // Pseudo-fields have no place in trailers (§8.1).
            [b':', ..] if is_trailers => fault = Some(Fault::Malformed),
            b":path" if is_request && !has_path => (fault, has_path) = (bad_target(value).map(Fault::Refused), true),
            _ => {}
        })?;
        Ok(fault)
    }
}

/// What a frame of HEADERS begins.
enum Block {
    /// A block that is not there yet in full.
    Partial,
    /// How many bytes, and what is wrong with them.
    Whole(usize, Option<Fault>),
    /// No block: the library needs these many bytes to end the connection.
    Invalid(usize),
}

/// The length of a frame's payload.
fn length_of(head: &[u8; HEAD]) -> usize {
    usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])
}

/// The stream that a frame belongs to.
fn stream_of(head: &[u8; HEAD]) -> u32 {
    u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]])
}

/// By how many bytes a WINDOW_UPDATE at the beginning of `bytes` opens a window (§6.9).
fn opening_of(bytes: &[u8]) -> u32 {
    let increment = bytes.get(HEAD..).and_then(<[u8]>::first_chunk).copied().unwrap_or_default();
    u32::from_be_bytes(increment) & (u32::MAX >> 1)
}

/// Whether the next frame is larger than any may be, so that nobody waits for its end.
fn is_too_large(bytes: &[u8]) -> bool {
    bytes.first_chunk().is_some_and(|head| length_of(head) > LARGEST_FRAME)
}

/// The frame at the beginning of `bytes`, if all of it is there and none larger than it may be.
fn frame(bytes: &[u8]) -> Option<Frame<'_>> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    let payload = rest.get(..length_of(head)).filter(|payload| payload.len() <= LARGEST_FRAME)?;
    Some(Frame { kind: head[3], flags: head[4], stream: stream_of(head), payload })
}

/// The fields of a block: those of its first frame, and of the whole frames that continue it.
fn join(first: &[u8], mut continued: &[u8]) -> Vec<u8> {
    let mut joined = first.to_vec();
    while let Some(next) = frame(continued) {
        joined.extend_from_slice(next.payload);
        continued = &continued[HEAD + next.payload.len()..];
    }
    joined
}

/// The fields in a frame of HEADERS, without padding and priority; `None` if there is less than it says, or the stream depends on
/// itself: the library resets it without reading its fields, and could not read those of later ones.
fn fragment<'b>(frame: &Frame<'b>) -> Option<&'b [u8]> {
    let mut fields = frame.payload;
    let mut padding = 0;
    if frame.flags & PADDED != 0 {
        let (&first, rest) = fields.split_first()?;
        (padding, fields) = (usize::from(first), rest);
    }
    if frame.flags & PRIORITY != 0 {
        let (priority, rest) = fields.split_first_chunk::<5>()?;
        let depends_on = u32::from_be_bytes([priority[0] & 0x7f, priority[1], priority[2], priority[3]]);
        fields = Some(rest).filter(|_| depends_on != frame.stream)?;
    }
    fields.get(..fields.len().checked_sub(padding)?)
}

/// The frames of a block, with a field more at its end that says what is wrong with it.
#[must_use]
pub fn with_fault(block: &[u8], fault: Fault) -> Vec<u8> {
    let mut frames = block.to_vec();
    let mut last = 0;
    while let Some(next) = frame(&block[last..]).map(|frame| last + HEAD + frame.payload.len()).filter(|&next| next < block.len()) {
        last = next;
    }
    let (name, value) = match fault {
        // A field of the connection's is what the library knows to be malformed.
        Fault::Malformed => ("connection", ""),
        Fault::Refused(refusal) => (marker().as_str(), refusal.row().detail),
    };
    let short = |text: &str| u8::try_from(text.len()).unwrap_or_default() & 0x7f;
    let field = [&[0, short(name)], name.as_bytes(), &[short(value)], value.as_bytes()].concat();
    frames[last + 4] &= !END_HEADERS;
    let stream = &block[5..HEAD];
    frames.extend_from_slice(&[0, 0, short(name) + short(value) + 3, CONTINUATION, END_HEADERS]);
    frames.extend_from_slice(stream);
    frames.extend_from_slice(&field);
    frames
}

/// The field that tells a refusal. No client knows its name.
fn marker() -> &'static HeaderName {
    static MARKER: OnceLock<HeaderName> = OnceLock::new();
    MARKER.get_or_init(|| {
        let name = format!("x-sluice-{:032x}", fastrand::u128(..));
        HeaderName::from_bytes(name.as_bytes()).unwrap_or(HeaderName::from_static("x-sluice-refused"))
    })
}

/// Takes the refusal of a request out of its fields.
pub fn refused(headers: &mut HeaderMap) -> Option<Refusal> {
    let detail = headers.remove(marker())?;
    Refusal::ALL.into_iter().find(|refusal| detail == refusal.row().detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame_of(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        [&[0, length[0], length[1], kind, flags, 0, 0, 0, stream], payload].concat()
    }

    fn literal(name: &str, value: &str) -> Vec<u8> {
        let short = |text: &str| u8::try_from(text.len()).unwrap();
        [&[0, short(name)], name.as_bytes(), &[short(value)], value.as_bytes()].concat()
    }

    fn opened() -> Frames {
        let mut frames = Frames::new(8192);
        assert_eq!(frames.inspect(b"SM\r\n\r\n"), (6, None));
        frames
    }

    fn fields(frames: &[u8]) -> Vec<String> {
        let (mut block, mut at) = (Vec::new(), 0);
        while let Some(frame) = frame(&frames[at..]) {
            block.extend_from_slice(if frame.kind == HEADERS { fragment(&frame).unwrap() } else { frame.payload });
            at += HEAD + frame.payload.len();
        }
        let mut fields = Vec::new();
        Decoder::default().decode(&block, |name, _| fields.push(String::from_utf8_lossy(name).into_owned())).unwrap();
        fields
    }

    #[test]
    fn a_fragment_is_refused_and_a_pseudo_field_in_trailers_malformed() {
        let request = frame_of(HEADERS, END_HEADERS, 1, &literal(":path", "/a"));
        let trailers = frame_of(HEADERS, END_HEADERS | 1, 1, &literal(":path", "/a"));
        let fine = frame_of(HEADERS, END_HEADERS | 1, 1, &literal("x", "y"));
        let data = frame_of(0, 0, 1, b"hello");
        let mut frames = opened();
        let bytes = [&request[..], &data, &trailers].concat();
        let before = request.len() + data.len();
        assert_eq!(frames.inspect(&bytes), (before, Some(Stop::Fault(trailers.len(), Fault::Malformed))));
        assert_eq!(opened().inspect(&[&request[..], &data, &fine].concat()).1, None);
        // Of a stream that has ended the library has its own to say.
        for end in [frame_of(DATA, END_STREAM, 1, b""), frame_of(RST_STREAM, 0, 1, &[0; 4]), fine] {
            assert_eq!(opened().inspect(&[&request[..], &end, &trailers].concat()).1, None);
        }
        let cut = frame_of(HEADERS, END_HEADERS, 3, &literal(":path", "/a#b"));
        assert_eq!(opened().inspect(&cut), (0, Some(Stop::Fault(cut.len(), Fault::Refused(Refusal::RequestLine)))));
    }

    #[test]
    fn blocks_are_read_over_frames_and_a_field_is_added_at_their_end() {
        let fields_of = [literal(":method", "GET"), literal(":path", "/a#b"), literal("x", "y")].concat();
        let padded = [&[3, 0, 0, 0, 0, 9][..], &fields_of[..5], &[0; 3]].concat();
        let block = [
            frame_of(HEADERS, PADDED | PRIORITY | 1, 1, &padded),
            frame_of(CONTINUATION, 0, 1, &fields_of[5..9]),
            frame_of(CONTINUATION, END_HEADERS, 1, &fields_of[9..]),
        ]
        .concat();
        for cut in 0..block.len() {
            let mut frames = opened();
            assert_eq!(frames.inspect(&block[..cut]), (0, None), "{cut}");
            assert_eq!(frames.inspect(&block), (0, Some(Stop::Fault(block.len(), Fault::Refused(Refusal::RequestLine)))), "{cut}");
        }
        let told = with_fault(&block, Fault::Refused(Refusal::RequestLine));
        assert_eq!(fields(&told), [":method", ":path", "x", marker().as_str()]);
        assert_eq!(fields(&with_fault(&block, Fault::Malformed))[3], "connection");
        let mut headers = HeaderMap::new();
        assert_eq!(refused(&mut headers), None);
        headers.insert(marker(), http::HeaderValue::from_static("request-line"));
        assert_eq!((refused(&mut headers), headers.len()), (Some(Refusal::RequestLine), 0));
    }

    #[test]
    fn a_block_without_end_ends_the_connection() {
        let more = frame_of(CONTINUATION, 0, 1, &[0; 10_000]);
        let first = frame_of(HEADERS, 0, 1, b"");
        let bytes = [first.clone(), more.repeat(10)].concat();
        assert_eq!(opened().inspect(&bytes), (first.len() + 6 * more.len(), Some(Stop::End)));
        assert_eq!(opened().inspect(&bytes[..41_000]), (0, Some(Stop::End)), "more is held than a head may have");
        assert_eq!(opened().inspect(&bytes[..40_000]), (0, None));
        // A head as large as it may be, in frames that are full.
        let mut frames = Frames::new(64 << 10);
        let name = literal("x", &"y".repeat(120)).repeat(500);
        let pieces: Vec<Vec<u8>> = name.chunks(LARGEST_FRAME).map(|piece| frame_of(CONTINUATION, 0, 1, piece)).collect();
        let block = [&first[..], &pieces.concat(), &frame_of(CONTINUATION, END_HEADERS, 1, b"")].concat();
        assert_eq!(frames.inspect(b"SM\r\n\r\n").0, 6);
        assert_eq!(frames.inspect(&block), (block.len(), None));
        let empty = frame_of(CONTINUATION, 0, 1, b"");
        assert_eq!(opened().inspect(&[&first[..], &empty.repeat(1000)].concat()), (first.len() + 6 * empty.len(), Some(Stop::End)));
    }

    #[test]
    fn of_a_repeated_path_the_first_is_judged() {
        let block = |paths: [&str; 2]| frame_of(HEADERS, END_HEADERS, 1, &paths.map(|path| literal(":path", path)).concat());
        assert_eq!(opened().inspect(&block(["/a", "/a#b"])).1, None);
        let cut = block(["/a#b", "/a"]);
        assert_eq!(opened().inspect(&cut).1, Some(Stop::Fault(cut.len(), Fault::Refused(Refusal::RequestLine))));
    }

    #[test]
    fn nothing_goes_on_after_what_the_library_may_read_otherwise() {
        let later = frame_of(HEADERS, END_HEADERS, 3, &literal(":path", "/a#b"));
        let path = literal(":path", "/a");
        let on_itself = [&[0, 0, 0, 1, 9][..], &path].concat();
        let (begun, data) = (frame_of(HEADERS, 0, 1, &literal("connection", "x")), frame_of(DATA, 0, 1, b"hello"));
        for (what, goes_on, stays) in [
            ("a stream that depends on itself", frame_of(HEADERS, END_HEADERS | PRIORITY, 1, &on_itself), vec![]),
            ("more padding than bytes", frame_of(HEADERS, END_HEADERS | PADDED, 1, &[200, 0, 0]), vec![]),
            ("a push", frame_of(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &path].concat()), vec![]),
            ("a block without its own", frame_of(CONTINUATION, END_HEADERS, 1, &path), vec![]),
            ("no HPACK", frame_of(HEADERS, END_HEADERS, 1, &[0x80]), vec![]),
            ("other frames within a block", [&begun[..], &data].concat(), vec![]),
            ("another block within one", begun, frame_of(HEADERS, END_HEADERS, 1, &path)),
            ("a frame that is too large", [0, 0x40, 1, HEADERS, END_HEADERS, 0, 0, 0, 1].to_vec(), vec![0; 100]),
        ] {
            let bytes = [&goes_on[..], &stays, &later].concat();
            assert_eq!(opened().inspect(&bytes), (goes_on.len(), Some(Stop::End)), "{what}");
        }
        let part = frame_of(PUSH_PROMISE, END_HEADERS, 1, &[0; 20]);
        assert_eq!(opened().inspect(&part[..20]), (0, None));
    }

    proptest! {
        #[test]
        fn hostile_frames_are_judged_calmly(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..11_u8) {
            let mut bytes = bytes;
            if let Some(head) = bytes.get_mut(..4) {
                head.copy_from_slice(&[0, 0, 20, kind]);
            }
            let mut frames = opened();
            let (passed, next) = frames.inspect(&bytes);
            prop_assert!(passed <= bytes.len());
            if let Some(Stop::Fault(length, fault)) = next {
                let _ = with_fault(&bytes[passed..passed + length], fault);
            }
        }
    }
}
