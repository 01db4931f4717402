//! Content codings: what a client takes (RFC 9110 §12.5.3), and gzip (RFC 1952) by flate2.

use std::io::{Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use http::{HeaderMap, HeaderValue};

/// The coding in which a body is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// As the representation is.
    Identity,
    /// gzip.
    Gzip,
    /// One that Sluice cannot undo, or several. Such bytes are passed on as they are.
    Opaque,
}

impl Coding {
    /// The coding of a response.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut values = headers.get_all(CONTENT_ENCODING).iter();
        let coding = match values.next() {
            None => Self::Identity,
            Some(value) if value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity") => Self::Identity,
            Some(value) if is_gzip(value.as_bytes().trim_ascii()) => Self::Gzip,
            Some(_) => Self::Opaque,
        };
        if values.next().is_none() { coding } else { Self::Opaque }
    }
}

fn is_gzip(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"gzip") || name.eq_ignore_ascii_case(b"x-gzip")
}

/// Whether a request takes gzip: named, or covered by `*`, and not with `q=0`. No field at all means no.
#[must_use]
pub fn accepts_gzip(headers: &HeaderMap) -> bool {
    takes_gzip(headers.get_all(ACCEPT_ENCODING).iter().map(HeaderValue::as_bytes))
}

/// The same for the values of `Accept-Encoding`.
#[must_use]
pub fn takes_gzip<'a>(values: impl Iterator<Item = &'a [u8]>) -> bool {
    let (mut named, mut any) = (None, None);
    for value in values {
        for member in value.split(|&byte| byte == b',') {
            let mut parts = member.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
            let name = parts.next().unwrap_or_default();
            let wanted = !parts.any(is_zero_weight);
            if is_gzip(name) {
                named = Some(named.unwrap_or(false) || wanted);
            } else if name == b"*" {
                any = Some(wanted);
            }
        }
    }
    named.or(any).unwrap_or(false)
}

/// `q=0`, `q=0.0`, `q=0.000` (RFC 9110 §12.4.2).
fn is_zero_weight(parameter: &[u8]) -> bool {
    let Some(at) = parameter.iter().position(|&byte| byte == b'=') else { return false };
    let (name, value) = (parameter[..at].trim_ascii(), parameter[at + 1..].trim_ascii());
    name.eq_ignore_ascii_case(b"q") && value.first() == Some(&b'0') && value[1..].iter().all(|&byte| byte == b'0' || byte == b'.')
}

/// Compresses `plain`. CPU-bound: keep large bodies off the runtime's own threads.
#[must_use]
pub fn gzip(plain: &[u8]) -> Bytes {
    pack(plain, Compression::new(5))
}

/// The same for what is sent once: packing and sending together take the least time.
#[must_use]
pub fn gzip_fast(plain: &[u8]) -> Bytes {
    pack(plain, Compression::fast())
}

fn pack(plain: &[u8], level: Compression) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(plain.len() / 4 + 64), level);
    // Writing to a Vec fails only when memory does; an empty result is then told apart by its length.
    let written = encoder.write_all(plain).and_then(|()| encoder.finish());
    written.map(without_slack).unwrap_or_default()
}

/// Why a gzip body was not inflated.
#[derive(Debug, PartialEq, Eq)]
pub enum InflateError {
    /// The bytes are not whole, valid gzip.
    Corrupt,
    /// The result would exceed the limit: a decompression bomb, or an object that is too large.
    TooLarge,
}

/// A body that inflates to more than this many times its size is a bomb: text does not, and gzip goes up to 1,030.
pub const MAX_RATIO: u64 = 500;
/// What any body may inflate to, however small it is.
pub const ALWAYS: u64 = 64 << 10;

/// The most bytes to which a stored body of `coded` bytes may inflate: by its ratio, and four times `max_object`.
#[must_use]
pub fn inflation_limit(coded: usize, max_object: usize) -> usize {
    let by_ratio = (coded as u64).saturating_mul(MAX_RATIO).max(ALWAYS);
    max_object.saturating_mul(4).min(usize::try_from(by_ratio).unwrap_or(usize::MAX))
}

/// Inflates a whole gzip body to at most `limit` bytes. No bytes are an empty body, as servers send it to HEAD and elsewhere.
///
/// # Errors
/// [`InflateError`] if the bytes are not valid gzip or inflate to more than `limit`.
pub fn gunzip(body: &[u8], limit: usize) -> Result<Bytes, InflateError> {
    if body.is_empty() {
        return Ok(Bytes::new());
    }
    let mut plain = Vec::with_capacity(told_length(body).min(limit).min(1 << 20));
    let cap = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    let read = MultiGzDecoder::new(body).take(cap).read_to_end(&mut plain);
    match read {
        Ok(_) if plain.len() > limit => Err(InflateError::TooLarge),
        Ok(_) => Ok(without_slack(plain)),
        Err(_) => Err(InflateError::Corrupt),
    }
}

/// Bytes that take no more memory than they say.
fn without_slack(mut bytes: Vec<u8>) -> Bytes {
    bytes.shrink_to_fit();
    Bytes::from(bytes)
}

/// The length that a gzip body of one member says that it inflates to (RFC 1952 §2.3.1), which need not be true.
#[must_use]
pub fn told_length(body: &[u8]) -> usize {
    body.last_chunk().map_or(0, |&length| u32::from_le_bytes(length) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    fn accepts(value: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_str(value).unwrap());
        accepts_gzip(&headers)
    }

    #[test]
    fn gzip_is_accepted_only_when_it_is_asked_for() {
        for yes in ["gzip", "br, GZIP;q=0.5", "x-gzip", "*", "gzip;q=0.001", "deflate, gzip;q=1.0, *;q=0"] {
            assert!(accepts(yes), "{yes}");
        }
        for no in ["", "br", "gzip;q=0", "gzip; q=0.000", "*;q=0", "gzip;q=0, *", "identity"] {
            assert!(!accepts(no), "{no}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    #[test]
    fn a_bomb_and_a_cut_body_are_told_apart() {
        let packed = gzip(&vec![0; 100_000]);
        assert_eq!(gunzip(&packed, 99_999), Err(InflateError::TooLarge));
        assert_eq!(gunzip(&packed, 100_000).unwrap().len(), 100_000);
        assert_eq!(gunzip(&packed[..packed.len() - 3], 1 << 20), Err(InflateError::Corrupt));
    }

    #[test]
    fn what_a_body_may_inflate_to_is_bounded_by_ratio_and_by_size() {
        for (coded, limit) in [(0, 65_536), (1000, 500_000), (1 << 30, 4 << 20)] {
            assert_eq!(inflation_limit(coded, 1 << 20), limit, "{coded}");
        }
    }

    proptest! {
        #[test]
        fn what_was_packed_unpacks(plain in proptest::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert_eq!(gunzip(&gzip(&plain), plain.len()).unwrap(), plain);
        }

        #[test]
        fn hostile_bytes_are_refused_calmly(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            let _ = gunzip(&bytes, 1 << 16);
        }
    }
}
