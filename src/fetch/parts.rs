//! Parts of answers that are not stored whole (RFC 9110 §14, RFC 9111 §3.3), for rules with `parts = "complete"`.
//!
//! Such a rule sends a client's `Range` on where nothing is stored. The beginning of an answer that comes so is
//! remembered, and whoever asks for the whole next has the backend asked for the rest alone. The two are joined only if
//! both carry the same strong validator (§3.4); if not, the whole is asked for after all.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::Body as _;
use tokio::time::Instant;

use super::{Fetcher, Job};
use crate::body::{self, Stream};
use crate::clock::Wall;
use crate::http::encoding::Coding;
use crate::http::freshness::{Grant, Verdict, verdict};
use crate::http::vary::Vary;
use crate::proxy::outcome::Failure;
use crate::upstream::forward;

/// Longer parts are passed on and not remembered.
const LARGEST: u64 = 64 << 10;
/// Parts that are remembered.
pub(super) const REMEMBERED: usize = 256;

/// The beginning of an answer.
#[derive(Debug)]
pub(super) struct Part {
    bytes: Bytes,
    /// The length of the whole.
    length: u64,
    /// Its strong validator, if it has one.
    tag: Option<HeaderValue>,
    until: Wall,
    /// When it was asked for: a change after that makes it void.
    asked: Instant,
}

/// `Content-Range: bytes first-last/length` of an uncoded answer.
fn span(fields: &HeaderMap) -> Option<(u64, u64, u64)> {
    if Coding::of(fields) != Coding::Identity {
        return None;
    }
    let mut ranges = fields.get_all(CONTENT_RANGE).iter();
    let (text, None) = (ranges.next()?.to_str().ok()?, ranges.next()) else { return None };
    let (span, length) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = span.split_once('-')?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    let (first, last, length) = (number(first)?, number(last)?, number(length)?);
    (first <= last && last < length).then_some((first, last, length))
}

fn strong_tag(fields: &HeaderMap) -> Option<HeaderValue> {
    fields.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\"")).cloned()
}

impl Part {
    /// The part that an answer is, if it is the beginning of one that may be stored.
    fn of(status: StatusCode, fields: &HeaderMap, bytes: &Bytes, grant: &Grant, now: Wall, asked: Instant) -> Option<Self> {
        let (0, last, length) = span(fields).filter(|_| status == StatusCode::PARTIAL_CONTENT)? else { return None };
        // Judged as the whole would be: by what the backend says of it, never by the rule's own `ttl`.
        let Verdict::Store(lives) = verdict(&grant.on_the_backends_word(), StatusCode::OK, fields, now) else { return None };
        let fits = bytes.len() as u64 == last + 1 && last + 1 < length && Vary::of(fields) == Vary::Fields(Vec::new());
        fits.then(|| Self { bytes: bytes.clone(), length, tag: strong_tag(fields), until: now + lives.fresh, asked })
    }

    /// Asks for the rest alone.
    pub(super) fn ask(&self, request: &mut HeaderMap) {
        if let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", self.bytes.len())) {
            request.insert(RANGE, range);
        }
        if let Some(tag) = &self.tag {
            request.insert(IF_RANGE, tag.clone());
        }
    }

    /// The whole, if this is the rest of it.
    pub(super) fn join(&self, fields: &HeaderMap, rest: &Bytes) -> Option<Bytes> {
        let same = self.tag.is_some() && strong_tag(fields) == self.tag;
        let expected = (self.bytes.len() as u64, self.length - 1, self.length);
        if !same || span(fields) != Some(expected) || (self.bytes.len() + rest.len()) as u64 != self.length {
            return None;
        }
        let mut whole = BytesMut::with_capacity(self.bytes.len() + rest.len());
        whole.extend_from_slice(&self.bytes);
        whole.extend_from_slice(rest);
        Some(whole.freeze())
    }
}

impl Fetcher {
    /// What is remembered of the answer that a job is about.
    pub(super) fn part(&self, job: &Job) -> Option<Arc<Part>> {
        let part = self.parts.get(&job.flight.0).filter(|part| job.by_parts && Wall::now() < part.until)?;
        let changed = self.invalidated.any() && self.invalidated.asked(&job.address.0, part.asked);
        (!changed).then_some(part)
    }

    /// Remembers an answer to a request with `Range`, if it is the beginning of one. Small ones are read whole.
    ///
    /// # Errors
    /// [`Failure::Truncated`] if it breaks off meanwhile.
    pub async fn remember_part(&self, job: &Job, mut answer: Response<Stream>) -> Result<Response<Stream>, Failure> {
        forward::clean_answer(answer.headers_mut());
        // The length that it says it has, in one place or the other, so that what is read is no more than that.
        let said = span(answer.headers()).map_or(u64::MAX, |(first, last, _)| last - first + 1);
        let length = answer.body().size_hint().exact().unwrap_or(said);
        if answer.status() != StatusCode::PARTIAL_CONTENT || length > LARGEST {
            return Ok(answer);
        }
        let (mut head, stream) = answer.into_parts();
        head.headers.remove(CONTENT_LENGTH);
        let limit = usize::try_from(LARGEST).unwrap_or(usize::MAX);
        let bytes = body::read(stream, limit).await.ok_or(Failure::Truncated)?;
        if let Some(part) = Part::of(head.status, &head.headers, &bytes, &job.grant, Wall::now(), job.asked) {
            self.parts.insert(job.flight.0.clone(), Arc::new(part));
        }
        Ok(Response::from_parts(head, body::full(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const NOW: Wall = Wall::from_millis(1_735_689_600_000);

    fn fields(range: &'static str, tag: &'static str) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(CONTENT_RANGE, HeaderValue::from_static(range));
        map.insert("cache-control", HeaderValue::from_static("max-age=60"));
        if !tag.is_empty() {
            map.insert(ETAG, HeaderValue::from_static(tag));
        }
        map
    }

    fn part(range: &'static str, tag: &'static str, bytes: &'static [u8]) -> Option<Part> {
        let grant = Grant {
            ttl: Duration::ZERO,
            negative_ttl: Duration::ZERO,
            stale_while_revalidate: Duration::ZERO,
            stale_if_error: Duration::ZERO,
            respect_origin: true,
            heuristic: false,
            set_cookie: false,
            authorized: false,
        };
        Part::of(StatusCode::PARTIAL_CONTENT, &fields(range, tag), &Bytes::from_static(bytes), &grant, NOW, Instant::now())
    }

    #[test]
    fn only_the_beginning_of_an_answer_is_remembered() {
        assert!(part("bytes 0-4/10", "", b"01234").is_some());
        for (range, bytes) in [
            ("bytes 4-9/10", &b"012345"[..]),
            ("bytes 0-4/10", b"0123"),
            ("bytes 0-9/10", b"0123456789"),
            ("bytes 0-4/*", b"01234"),
            ("bytes 0-4/4", b"01234"),
            ("bytes +0-4/10", b"01234"),
            ("lines 0-4/10", b"01234"),
        ] {
            assert!(part(range, "", bytes).is_none(), "{range}");
        }
    }

    #[test]
    fn parts_are_joined_only_under_one_strong_validator() {
        let rest = Bytes::from_static(b"56789");
        let join = |ours, range, theirs, rest: &Bytes| part("bytes 0-4/10", ours, b"01234").unwrap().join(&fields(range, theirs), rest);
        assert_eq!(join("\"a\"", "bytes 5-9/10", "\"a\"", &rest), Some(Bytes::from_static(b"0123456789")));
        for (ours, range, theirs) in [
            ("", "bytes 5-9/10", ""),
            ("\"a\"", "bytes 5-9/10", "\"b\""),
            ("W/\"a\"", "bytes 5-9/10", "W/\"a\""),
            ("\"a\"", "bytes 4-9/10", "\"a\""),
            ("\"a\"", "bytes 5-8/9", "\"a\""),
        ] {
            assert_eq!(join(ours, range, theirs, &rest), None, "{ours} {range} {theirs}");
        }
        assert_eq!(join("\"a\"", "bytes 5-9/10", "\"a\"", &rest.slice(1..)), None);
    }

    #[test]
    fn the_rest_is_asked_for_on_condition_that_it_is_of_the_same() {
        let mut request = HeaderMap::new();
        part("bytes 0-4/10", "\"a\"", b"01234").unwrap().ask(&mut request);
        assert_eq!((request[RANGE].as_bytes(), request[IF_RANGE].as_bytes()), (&b"bytes=5-"[..], &b"\"a\""[..]));
    }
}
