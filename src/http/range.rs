//! Parts of a whole answer (RFC 9110 §14): `Range`, and `If-Range`, which says of which answer.
//!
//! Only bytes of the identity coding are cut, so that a part means the same to every client.

use std::ops::RangeInclusive;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, IF_RANGE, LAST_MODIFIED, RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};

use super::conditional::etag_of;
use super::headers::http_date;

/// Whoever asks for more parts than this gets the whole (§14.2 warns of many small or overlapping ones).
const MOST_PARTS: usize = 16;
/// A validator that is a date is strong only if the answer was made so much later (§8.8.2.2).
const STRONG_AFTER_MS: u64 = 1000;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parts {
    /// The whole: there is no `Range`, it makes no sense, or it is about another answer.
    Whole,
    /// These bytes, each range within the answer.
    Some(Vec<RangeInclusive<usize>>),
    /// Nothing that the answer has.
    Unsatisfiable,
}

/// What a GET asks of an answer with these fields and so many bytes.
#[must_use]
pub fn parts(request: &HeaderMap, answer: &HeaderMap, length: usize) -> Parts {
    let Some(range) = request.get(RANGE).filter(|_| is_same(request, answer)) else { return Parts::Whole };
    let Some(specs) = range.as_bytes().strip_prefix(b"bytes=") else { return Parts::Whole };
    let mut found = Vec::new();
    for (number, spec) in specs.split(|&byte| byte == b',').enumerate() {
        match part(spec.trim_ascii(), length) {
            _ if number >= MOST_PARTS => return Parts::Whole,
            None => return Parts::Whole,
            Some(part) => found.extend(part),
        }
    }
    let asked: usize = found.iter().map(|part: &RangeInclusive<usize>| part.end() - part.start() + 1).sum();
    match found.len() {
        0 => Parts::Unsatisfiable,
        1 => Parts::Some(found),
        // Overlapping parts would be more than the whole.
        _ if asked > length => Parts::Whole,
        _ => Parts::Some(found),
    }
}

/// `first-last`, `first-` or `-suffix`. The outer `None`: nonsense; the inner one: nothing that there is.
fn part(spec: &[u8], length: usize) -> Option<Option<RangeInclusive<usize>>> {
    let dash = spec.iter().position(|&byte| byte == b'-')?;
    let (first, last) = (&spec[..dash], &spec[dash + 1..]);
    if first.is_empty() {
        let suffix = number(last)?.min(length);
        return Some((suffix > 0).then(|| length - suffix..=length - 1));
    }
    let first = number(first)?;
    let last = if last.is_empty() { usize::MAX } else { number(last)? };
    if last < first {
        return None;
    }
    Some((first < length).then(|| first..=last.min(length - 1)))
}

/// Digits alone; what is too large is as large as can be.
fn number(digits: &[u8]) -> Option<usize> {
    let fine = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    fine.then(|| digits.iter().fold(0_usize, |sum, digit| sum.saturating_mul(10).saturating_add(usize::from(digit - b'0'))))
}

/// `If-Range` (§13.1.5): absent, or the very validator of the answer, compared strongly.
fn is_same(request: &HeaderMap, answer: &HeaderMap) -> bool {
    let Some(condition) = request.get(IF_RANGE) else { return true };
    if condition.as_bytes().starts_with(b"\"") {
        return answer.get(ETAG) == Some(condition);
    }
    let (told, modified) = (http_date(condition), answer.get(LAST_MODIFIED).and_then(http_date));
    let made = answer.get(DATE).and_then(http_date);
    let is_strong = modified.zip(made).is_some_and(|(modified, made)| made.as_millis() >= modified.as_millis() + STRONG_AFTER_MS);
    told.is_some() && told == modified && is_strong
}

/// Parts of up to this many bytes are copied.
const SMALL_PART: usize = 16 << 10;

/// The status, the fields that say which part it is, and the bytes.
#[must_use]
pub fn cut(parts: &Parts, fields: &mut HeaderMap, body: &Bytes) -> (StatusCode, Bytes) {
    let length = body.len();
    match parts {
        Parts::Whole => (StatusCode::OK, body.clone()),
        Parts::Unsatisfiable => {
            fields.remove(CONTENT_TYPE);
            fields.insert(CONTENT_RANGE, text(&format!("bytes */{length}")));
            (StatusCode::RANGE_NOT_SATISFIABLE, Bytes::new())
        }
        Parts::Some(ranges) => match &ranges[..] {
            [range] => {
                fields.insert(CONTENT_RANGE, text(&format!("bytes {}-{}/{length}", range.start(), range.end())));
                let part = body.slice(range.clone());
                // A small part would keep all of a large body in memory for as long as its client takes to read it.
                let is_small = part.len() <= SMALL_PART && body.len() > SMALL_PART;
                (StatusCode::PARTIAL_CONTENT, if is_small { Bytes::copy_from_slice(&part) } else { part })
            }
            ranges => (StatusCode::PARTIAL_CONTENT, multipart(ranges, fields, body)),
        },
    }
}

/// Several parts (§14.6), between boundaries that do not occur in them.
fn multipart(ranges: &[RangeInclusive<usize>], fields: &mut HeaderMap, body: &Bytes) -> Bytes {
    let kind = fields.get(CONTENT_TYPE).cloned();
    let digest = etag_of(body);
    // The digest of the whole answer: an answer does not hold its own.
    let boundary = format!("part-{}", digest.to_str().unwrap_or_default().trim_matches('"'));
    let mut out = BytesMut::new();
    for range in ranges {
        out.extend_from_slice(format!("\r\n--{boundary}\r\n").as_bytes());
        if let Some(kind) = &kind {
            out.extend_from_slice(b"Content-Type: ");
            out.extend_from_slice(kind.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(format!("Content-Range: bytes {}-{}/{}\r\n\r\n", range.start(), range.end(), body.len()).as_bytes());
        out.extend_from_slice(&body[range.clone()]);
    }
    out.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    fields.insert(CONTENT_TYPE, text(&format!("multipart/byteranges; boundary={boundary}")));
    out.freeze()
}

fn text(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("bytes */*"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect()
    }

    fn of(range: &str) -> Parts {
        parts(&map(&[("range", range)]), &HeaderMap::new(), 10)
    }

    #[test]
    fn ranges_within_ten_bytes() {
        for (range, expected) in [
            ("bytes=0-4", Parts::Some(vec![0..=4])),
            ("bytes=5-", Parts::Some(vec![5..=9])),
            ("bytes=-3", Parts::Some(vec![7..=9])),
            ("bytes=-99", Parts::Some(vec![0..=9])),
            ("bytes=8-99999999999999999999999", Parts::Some(vec![8..=9])),
            ("bytes=0-1, 4-5", Parts::Some(vec![0..=1, 4..=5])),
            ("bytes=0-1,99-", Parts::Some(vec![0..=1])),
            ("bytes=0-9,0-9", Parts::Whole),
            ("bytes=10-", Parts::Unsatisfiable),
            ("bytes=-0", Parts::Unsatisfiable),
            ("bytes=4-2", Parts::Whole),
            ("bytes=a-b", Parts::Whole),
            ("bytes=", Parts::Whole),
            ("bytes=-", Parts::Whole),
            ("lines=0-4", Parts::Whole),
        ] {
            assert_eq!(of(range), expected, "{range}");
        }
        assert_eq!(of(&format!("bytes={}", vec!["0-0"; 17].join(","))), Parts::Whole);
    }

    #[test]
    fn if_range_compares_strongly() {
        let answer =
            map(&[("etag", "\"a\""), ("last-modified", "Wed, 01 Jan 2025 00:00:00 GMT"), ("date", "Wed, 01 Jan 2025 00:00:09 GMT")]);
        for (condition, same) in [
            ("\"a\"", true),
            ("W/\"a\"", false),
            ("\"b\"", false),
            ("Wed, 01 Jan 2025 00:00:00 GMT", true),
            ("Wed, 01 Jan 2025 00:00:01 GMT", false),
            ("nonsense", false),
        ] {
            let asked = parts(&map(&[("range", "bytes=0-1"), ("if-range", condition)]), &answer, 10);
            assert_eq!(asked != Parts::Whole, same, "{condition}");
        }
    }

    #[test]
    fn several_parts_say_which_they_are() {
        let mut fields = map(&[("content-type", "text/plain")]);
        let (status, body) = cut(&Parts::Some(vec![0..=1, 8..=9]), &mut fields, &Bytes::from_static(b"0123456789"));
        let text = String::from_utf8(body.to_vec()).unwrap();
        let boundary = fields["content-type"].to_str().unwrap().split_once("boundary=").unwrap().1.to_owned();
        assert_eq!(status, StatusCode::PARTIAL_CONTENT);
        let part = |range: &str, bytes: &str| {
            format!("\r\n--{boundary}\r\nContent-Type: text/plain\r\nContent-Range: bytes {range}/10\r\n\r\n{bytes}")
        };
        assert_eq!(text, format!("{}{}\r\n--{boundary}--\r\n", part("0-1", "01"), part("8-9", "89")));
    }

    proptest! {
        #[test]
        fn parts_lie_within_the_answer(range in "bytes=[0-9, -]{0,20}", length in 0_usize..40) {
            let body = Bytes::from(vec![b'x'; length]);
            let asked = parts(&map(&[("range", &range)]), &HeaderMap::new(), length);
            if let Parts::Some(ranges) = &asked {
                prop_assert!(!ranges.is_empty() && ranges.iter().all(|range| range.start() <= range.end() && *range.end() < length));
            }
            let _ = cut(&asked, &mut HeaderMap::new(), &body);
        }
    }
}
