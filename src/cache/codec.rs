//! Entries as bytes, for Redis: versioned, with length and checksum. Whatever does not decode is a miss.
//!
//! ```text
//! "SLUC" version:1 length:8 checksum:8 payload
//! ```
//! Integers are little-endian; text and bytes are a 32-bit length and the bytes; the checksum is XXH3 of the payload.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use xxhash_rust::xxh3::xxh3_64;

use super::entry::{Checked, Content, Entry, StoredResponse};
use super::void::Moment;
use crate::clock::{Wall, millis};
use crate::http::encoding::Coding;
use crate::http::freshness::Lifetimes;

const MAGIC: &[u8; 4] = b"SLUC";
/// Raised whenever the payload changes, so that instances of different versions never misread each other.
const VERSION: u8 = 5;
const HEAD: usize = 4 + 1 + 8 + 8;

/// Why bytes are not an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// They do not begin as an entry does.
    Magic,
    /// They were written by another version.
    Version,
    /// They are shorter or longer than they say.
    Length,
    /// They were changed.
    Checksum,
    /// They are whole but make no sense.
    Content,
}

impl DecodeError {
    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Magic => "decode_magic",
            Self::Version => "decode_version",
            Self::Length => "decode_length",
            Self::Checksum => "decode_checksum",
            Self::Content => "decode_content",
        }
    }
}

/// Writes an entry.
#[must_use]
pub fn encode(entry: &Entry) -> Bytes {
    let mut out = BytesMut::with_capacity(HEAD + usize::try_from(entry.weight()).unwrap_or(0));
    out.put_slice(MAGIC);
    out.put_u8(VERSION);
    out.put_bytes(0, 16);
    put(&mut out, &entry.canonical);
    put(&mut out, entry.readable.as_bytes());
    put_count(&mut out, entry.tags.len());
    entry.tags.iter().for_each(|tag| put(&mut out, tag.as_bytes()));
    out.put_u64_le(entry.target);
    out.put_u64_le(entry.stored_at.as_millis());
    out.put_u32_le(entry.age_when_stored);
    out.put_u32_le(entry.cost);
    let Lifetimes { fresh, stale_while_revalidate, stale_if_error, validatable } = entry.lifetimes;
    for span in [fresh, stale_while_revalidate, stale_if_error, validatable] {
        out.put_u64_le(millis(span));
    }
    match &entry.content {
        Content::Response(response) => {
            out.put_u8(0);
            out.put_u16_le(response.status.as_u16());
            out.put_u8(coding_number(response.coding));
            out.put_u8(coding_number(response.sent_coding));
            put_count(&mut out, response.fields.len());
            for (name, value) in &response.fields {
                put(&mut out, name.as_str().as_bytes());
                put(&mut out, value.as_bytes());
            }
            put(&mut out, &response.body);
        }
        Content::Varies(names) => {
            out.put_u8(1);
            put_count(&mut out, names.len());
            names.iter().for_each(|name| put(&mut out, name.as_str().as_bytes()));
        }
    }
    let (length, checksum) = ((out.len() - HEAD) as u64, xxh3_64(&out[HEAD..]));
    out[5..13].copy_from_slice(&length.to_le_bytes());
    out[13..21].copy_from_slice(&checksum.to_le_bytes());
    out.freeze()
}

fn put(out: &mut BytesMut, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.put_slice(bytes);
}

fn put_count(out: &mut BytesMut, count: usize) {
    // Bodies are bounded by max_object (at most 1 GiB) and everything else is far smaller.
    out.put_u32_le(u32::try_from(count).unwrap_or(u32::MAX));
}

/// Reads an entry. The body shares memory with `bytes`. When it was asked for, the reader says: moments belong to a process.
///
/// # Errors
/// A [`DecodeError`] for anything but what [`encode`] wrote.
pub fn decode(mut bytes: Bytes) -> Result<Entry, DecodeError> {
    if bytes.len() < HEAD || &bytes[..4] != MAGIC {
        return Err(DecodeError::Magic);
    }
    bytes.advance(4);
    let version = bytes.get_u8();
    if version != VERSION {
        return Err(DecodeError::Version);
    }
    let (length, checksum) = (bytes.get_u64_le(), bytes.get_u64_le());
    if length != bytes.len() as u64 {
        return Err(DecodeError::Length);
    }
    if checksum != xxh3_64(&bytes) {
        return Err(DecodeError::Checksum);
    }
    payload(&mut bytes).filter(|_| bytes.is_empty()).ok_or(DecodeError::Content)
}

fn payload(bytes: &mut Bytes) -> Option<Entry> {
    let canonical = take(bytes)?;
    let readable = take_text(bytes)?;
    let tags = (0..take_count(bytes)?).map(|_| take_text(bytes)).collect::<Option<_>>()?;
    let target = bytes.try_get_u64_le().ok()?;
    let stored_at = take_moment(bytes)?;
    let age_when_stored = bytes.try_get_u32_le().ok()?;
    let cost = bytes.try_get_u32_le().ok()?;
    let mut span = || bytes.try_get_u64_le().ok().map(Duration::from_millis);
    let lifetimes = Lifetimes { fresh: span()?, stale_while_revalidate: span()?, stale_if_error: span()?, validatable: span()? };
    let content = match bytes.try_get_u8().ok()? {
        0 => Content::Response(take_response(bytes)?),
        1 => Content::Varies((0..take_count(bytes)?).map(|_| take_name(bytes)).collect::<Option<_>>()?),
        _ => return None,
    };
    Some(Entry {
        canonical,
        readable,
        tags,
        target,
        asked_at: Moment::default(),
        stored_at,
        age_when_stored,
        cost,
        lifetimes,
        content,
        checked: Checked::default(),
    })
}

fn take_response(bytes: &mut Bytes) -> Option<StoredResponse> {
    let status = StatusCode::from_u16(bytes.try_get_u16_le().ok()?).ok()?;
    let coding = take_coding(bytes)?;
    let sent_coding = take_coding(bytes)?;
    let count = take_count(bytes)?;
    let mut fields = HeaderMap::with_capacity(count.min(64) + 8);
    for _ in 0..count {
        let name = take_name(bytes)?;
        fields.try_append(name, HeaderValue::from_maybe_shared(take(bytes)?).ok()?).ok()?;
    }
    Some(StoredResponse::new(status, fields, coding, sent_coding, take(bytes)?))
}

const fn coding_number(coding: Coding) -> u8 {
    match coding {
        Coding::Identity => 0,
        Coding::Gzip => 1,
        Coding::Opaque => 2,
    }
}

fn take_coding(bytes: &mut Bytes) -> Option<Coding> {
    match bytes.try_get_u8().ok()? {
        0 => Some(Coding::Identity),
        1 => Some(Coding::Gzip),
        2 => Some(Coding::Opaque),
        _ => None,
    }
}

/// A moment of wall time.
fn take_moment(bytes: &mut Bytes) -> Option<Wall> {
    bytes.try_get_u64_le().ok().map(Wall::from_millis)
}

fn take_name(bytes: &mut Bytes) -> Option<HeaderName> {
    HeaderName::from_bytes(&take(bytes)?).ok()
}

fn take_text(bytes: &mut Bytes) -> Option<String> {
    String::from_utf8(take(bytes)?.to_vec()).ok()
}

/// A count of things of at least four bytes each, so that a false one cannot make the reader loop or reserve.
fn take_count(bytes: &mut Bytes) -> Option<usize> {
    let count = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
    (count <= bytes.len() / 4).then_some(count)
}

fn take(bytes: &mut Bytes) -> Option<Bytes> {
    let length = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn entry(body: &[u8], tags: &[String], value: &str) -> Entry {
        let mut fields = HeaderMap::new();
        fields.append("content-type", HeaderValue::from_static("application/json"));
        fields.append("x-a", HeaderValue::from_str(value).unwrap());
        fields.append("x-a", HeaderValue::from_static("2"));
        let response = StoredResponse::new(StatusCode::OK, fields, Coding::Identity, Coding::Gzip, Bytes::copy_from_slice(body));
        Entry {
            canonical: Bytes::from_static(b"canonical"),
            readable: "liq:é".into(),
            tags: tags.to_vec(),
            target: 77,
            asked_at: Moment::default(),
            stored_at: Wall::from_millis(1_735_689_600_123),
            age_when_stored: 7,
            cost: 11,
            lifetimes: Lifetimes { fresh: Duration::from_millis(5), ..Lifetimes::default() },
            content: Content::Response(response),
            checked: Checked::default(),
        }
    }

    #[test]
    fn a_variant_marker_reads_back() {
        let marker = Entry { content: Content::Varies(vec![http::header::ORIGIN]), ..entry(b"", &[], "x") };
        assert_eq!(decode(encode(&marker)), Ok(marker));
    }

    #[test]
    fn other_versions_and_foreign_bytes_are_told_apart() {
        let good = encode(&entry(b"body", &[], "x"));
        let mut other = good.to_vec();
        other[4] = VERSION + 1;
        assert_eq!(decode(other.into()), Err(DecodeError::Version));
        assert_eq!(decode(Bytes::from_static(b"[\"json\"]")), Err(DecodeError::Magic));
        assert_eq!(decode(good.slice(..good.len() - 1)), Err(DecodeError::Length));
    }

    proptest! {
        #[test]
        fn what_was_written_reads_back(
            body in proptest::collection::vec(any::<u8>(), 0..300),
            tags in proptest::collection::vec(".{0,9}", 0..3),
            value in "[ -~]{0,20}",
        ) {
            let entry = entry(&body, &tags, &value);
            prop_assert_eq!(decode(encode(&entry)), Ok(entry));
        }

        #[test]
        fn one_flipped_bit_is_noticed(at in 0usize..10_000, bit in 0u8..8) {
            let mut bytes = encode(&entry(b"some body", &["t".into()], "x")).to_vec();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(bytes.into()).is_err());
        }

        #[test]
        fn hostile_payloads_with_a_true_checksum_are_read_calmly(payload in proptest::collection::vec(any::<u8>(), 0..200), version in VERSION - 1..=VERSION) {
            let mut bytes = BytesMut::new();
            bytes.put_slice(MAGIC);
            bytes.put_u8(version);
            bytes.put_u64_le(payload.len() as u64);
            bytes.put_u64_le(xxh3_64(&payload));
            bytes.put_slice(&payload);
            let _ = decode(bytes.freeze());
        }
    }
}
