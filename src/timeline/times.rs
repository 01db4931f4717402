//! Timestamps of buckets that an existing service's own cache made text (deviation D3 of the API's contract): finding them, and making
//! numbers of them again.
//!
//! The service keeps its answers as JSON in a Redis of its own, and writes `"timestamp":"1735689600000"` where it wrote
//! `"timestamp":1735689600000` before. Clients that compute with it fail.

use std::borrow::Cow;

use memchr::memmem;

/// The name of the member, as JSON writes it. Within other text its quotes are escaped, so it stands nowhere else.
const KEY: &[u8] = b"\"timestamp\"";
/// What follows the name is looked at so far, in bytes: nothing that is a timestamp is longer.
const LONGEST: usize = 64;
/// Of an answer so much is looked at, in bytes: its first bucket is shorter.
pub const LOOKED_AT: usize = 1024;

/// What follows the member's name.
#[derive(Debug, PartialEq, Eq)]
enum Value {
    /// Text that is a whole number: the places of the opening and the closing quote.
    Text(usize, usize),
    /// Anything else.
    Other,
    /// It is not whole yet.
    Open,
}

impl Value {
    fn of(after: &[u8]) -> Self {
        Self::find(after).unwrap_or(if after.len() < LONGEST { Self::Open } else { Self::Other })
    }

    /// `None`: what is there ends before it is known.
    fn find(after: &[u8]) -> Option<Self> {
        let colon = skip_space(after, 0);
        if *after.get(colon)? != b':' {
            return Some(Self::Other);
        }
        let open = skip_space(after, colon + 1);
        if *after.get(open)? != b'"' {
            return Some(Self::Other);
        }
        let sign = usize::from(*after.get(open + 1)? == b'-');
        let first = open + 1 + sign;
        let digits = after.get(first..)?.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let close = first + digits;
        let is_number = *after.get(close)? == b'"' && digits > 0 && (digits == 1 || after[first] != b'0');
        Some(if is_number { Self::Text(open, close) } else { Self::Other })
    }
}

fn skip_space(text: &[u8], from: usize) -> usize {
    let space = text.get(from..).unwrap_or_default().iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n'));
    from + space.count()
}

/// Whether an answer that begins so is a list of buckets whose first has text for its timestamp; `None`: too little of it is there to
/// tell.
#[must_use]
pub fn begins_with_text(beginning: &[u8]) -> Option<bool> {
    let unknown = (beginning.len() >= LOOKED_AT).then_some(false);
    let list = skip_space(beginning, 0);
    let bucket = skip_space(beginning, list + 1);
    for (at, expected) in [(list, b'['), (bucket, b'{')] {
        match beginning.get(at) {
            None => return unknown,
            Some(&byte) if byte != expected => return Some(false),
            Some(_) => {}
        }
    }
    let rest = &beginning[bucket..];
    let end = memchr::memchr(b'}', rest);
    let Some(at) = memmem::find(&rest[..end.unwrap_or(rest.len())], KEY) else {
        return if end.is_some() { Some(false) } else { unknown };
    };
    match Value::of(&rest[at + KEY.len()..]) {
        Value::Text(..) => Some(true),
        Value::Other => Some(false),
        Value::Open => unknown,
    }
}

/// Makes numbers of a list's text timestamps as it passes, piece by piece. What is not known yet is held back: never more than
/// a few dozen bytes.
#[derive(Debug, Default)]
pub struct Numbering {
    held: Vec<u8>,
}

impl Numbering {
    /// What can be said of the answer once this piece of it came.
    #[must_use]
    pub fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        let mut held = std::mem::take(&mut self.held);
        held.extend_from_slice(piece);
        let mut out = Vec::with_capacity(held.len());
        let mut rest = &held[..];
        while let Some(at) = memmem::find(rest, KEY) {
            let (before, after) = rest.split_at(at + KEY.len());
            match Value::of(after) {
                Value::Text(open, close) => {
                    out.extend_from_slice(before);
                    out.extend_from_slice(&after[..open]);
                    out.extend_from_slice(&after[open + 1..close]);
                    rest = &after[close + 1..];
                }
                Value::Other => {
                    out.extend_from_slice(before);
                    rest = after;
                }
                Value::Open => {
                    out.extend_from_slice(&rest[..at]);
                    self.held = rest[at..].to_vec();
                    return out;
                }
            }
        }
        // Its end may be the beginning of another name.
        let open = (1..KEY.len()).rev().find(|&length| rest.ends_with(&KEY[..length])).unwrap_or(0);
        let (known, open) = rest.split_at(rest.len() - open);
        out.extend_from_slice(known);
        self.held = open.to_vec();
        out
    }

    /// What was held back, once nothing more comes.
    #[must_use]
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

/// A whole answer in which timestamps that are text are numbers.
#[must_use]
pub fn number_times(body: &[u8]) -> Cow<'_, [u8]> {
    if begins_with_text(body) != Some(true) {
        return Cow::Borrowed(body);
    }
    let mut numbering = Numbering::default();
    let mut out = numbering.push(body);
    out.extend_from_slice(&numbering.finish());
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_list_is_known_by_its_first_bucket() {
        for (beginning, known) in [
            ("", None),
            ("[", None),
            ("[{\"timestamp\":\"17", None),
            ("[{\"timestamp\":\"17\"", Some(true)),
            (" [ {\n\"timestamp\" : \"0\"", Some(true)),
            ("[{\"side\":\"buy\",\"timestamp\":\"-17\"}", Some(true)),
            ("[{\"timestamp\":1", Some(false)),
            ("[{\"timestamp\":\"\"", Some(false)),
            ("[{\"timestamp\":\"017\"", Some(false)),
            ("[{\"timestamp\":\"2025-01-01\"", Some(false)),
            ("[{\"side\":\"buy\"},{\"timestamp\":\"17\"}]", Some(false)),
            ("[{\"side\":\"buy", None),
            ("[{\"side\":\"\\\"timestamp\\\":\\\"17\\\"\",\"timestamp\":17}]", Some(false)),
            ("[]", Some(false)),
            ("{\"timestamp\":\"17\"}", Some(false)),
        ] {
            assert_eq!(begins_with_text(beginning.as_bytes()), known, "{beginning}");
        }
        assert_eq!(begins_with_text(&[b' '; LOOKED_AT]), Some(false), "no more of it is looked at");
    }

    #[test]
    fn other_text_stays() {
        for body in [
            "[{\"timestamp\":\"x\"},{\"timestamp\":\"1",
            "[{\"timestamp\":null,\"timestamp\"",
            "{\"a\":\"\\\"timestamp\\\":\\\"17\\\"\"}",
            "\"times",
        ] {
            let mut numbering = Numbering::default();
            let said = [numbering.push(body.as_bytes()), numbering.finish()].concat();
            assert_eq!(String::from_utf8(said).unwrap(), body);
        }
    }

    proptest! {
        #[test]
        fn any_pieces_give_numbers(times in proptest::collection::vec(any::<i64>(), 0..40), size in 1_usize..50, space in 0_usize..3) {
            let list = |quote: &str| {
                let space = &" \n "[..space];
                let bucket = |time: &i64| {
                    format!("{{\"timestamp\"{space}:{space}{quote}{time}{quote},\"timestamp_iso\":\"{time}\",\"side\":\"\\\"timestamp\"}}")
                };
                format!("[{}]", times.iter().map(bucket).collect::<Vec<_>>().join(","))
            };
            let mut numbering = Numbering::default();
            let mut said = Vec::new();
            for piece in list("\"").as_bytes().chunks(size) {
                said.extend(numbering.push(piece));
                prop_assert!(numbering.held.len() < KEY.len() + LONGEST);
            }
            said.extend(numbering.finish());
            prop_assert_eq!(String::from_utf8(said).unwrap(), list(""));
            let text = list("\"");
            let numbers = list("").into_bytes();
            prop_assert_eq!(number_times(text.as_bytes()).into_owned(), numbers);
        }

        #[test]
        fn any_bytes_pass(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..30), 0..9)) {
            let mut numbering = Numbering::default();
            let mut said: Vec<u8> = pieces.iter().flat_map(|piece| numbering.push(piece)).collect();
            said.extend(numbering.finish());
            prop_assert_eq!(said, pieces.concat());
        }
    }
}
