//! Responses of which only the beginning is known (RFC 9110 §14, RFC 9111 §3.3), for rules with `parts = "complete"`.
//!
//! Such a rule sends a client's `Range` on where nothing is stored. The beginning of a response that comes so is remembered,
//! and when the whole is asked for next, the upstream is asked for the rest alone. The two are joined only if both carry the
//! same strong validator (§3.4); if not, or if the upstream answers anything else, the beginning is forgotten and the whole is asked for
//! after all.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;

use super::remembered::{Heap, Remembered, remembered};
use crate::body::{self, BoxError, Stream};
use crate::cache::entry::allocated;
use crate::cache::key::Canonical;
use crate::cache::void::{Moment, Voids};
use crate::clock::Wall;
use crate::http::encoding::Coding;
use crate::http::freshness::{FreshnessPolicy, Verdict, verdict};
use crate::http::vary::Vary;
use crate::upstream::failure::{BrokenBody, Failure};
use crate::upstream::response_fields;

/// Longer beginnings are passed on and not remembered, in bytes.
const LARGEST: u64 = 64 << 10;
/// All that are remembered, in bytes, and the room for how many is made.
const BEGINNINGS: (usize, usize) = (16 << 20, 256);

/// The beginning of a response.
#[derive(Debug)]
pub struct Beginning {
    bytes: Bytes,
    /// The length of the whole.
    length: u64,
    /// Its strong validator, if it has one.
    tag: Option<HeaderValue>,
    fresh_until: Wall,
    /// When it was asked for: what was voided since is not used.
    asked_at: Moment,
}

/// `Content-Range: bytes first-last/length` of an uncoded response.
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

fn strong_validator(fields: &HeaderMap) -> Option<HeaderValue> {
    let tag = fields.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\""))?;
    // A copy of its own, for the same reason as the bytes of a beginning.
    HeaderValue::from_bytes(tag.as_bytes()).ok()
}

impl Beginning {
    /// What a response is the beginning of, if that may be stored.
    fn of(status: StatusCode, fields: &HeaderMap, bytes: &Bytes, policy: &FreshnessPolicy, now: Wall, asked_at: Moment) -> Option<Self> {
        let (0, last, length) = span(fields).filter(|_| status == StatusCode::PARTIAL_CONTENT)? else { return None };
        // Judged as the whole would be: by what the upstream says of it, never by the rule's own `ttl`.
        let Verdict::Store(lifetimes) = verdict(&policy.explicit_only(), StatusCode::OK, fields, now) else { return None };
        let fits = bytes.len() as u64 == last + 1 && last + 1 < length && Vary::of(fields) == Vary::Fields(Vec::new());
        // Copied: as they came they are slices of the connection's buffer, which they would keep alive.
        let (bytes, tag) = (Bytes::copy_from_slice(bytes), strong_validator(fields));
        fits.then(|| Self { bytes, length, tag, fresh_until: now + lifetimes.fresh, asked_at })
    }

    /// Makes a request one for the rest alone. Without a strong validator nothing says which rest belongs to it: the request is worth its
    /// price only because many upstreams answer it with the whole.
    pub fn ask_for_rest(&self, request: &mut HeaderMap) {
        if let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", self.bytes.len())) {
            request.insert(RANGE, range);
        }
        if let Some(tag) = &self.tag {
            request.insert(IF_RANGE, tag.clone());
        }
    }

    /// The length of the whole, in bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Whether a part with these fields is the rest of it; `length` is that of its body, in bytes, as far as that is known.
    #[must_use]
    pub fn is_continued_by(&self, fields: &HeaderMap, length: Option<u64>) -> bool {
        let (known, last) = (self.bytes.len() as u64, self.length - 1);
        self.tag.is_some()
            && strong_validator(fields) == self.tag
            && span(fields) == Some((known, last, self.length))
            && length.is_none_or(|length| length == self.length - known)
    }

    /// The whole: this, and then the rest as it comes. It breaks off if the rest has another length than it said.
    #[must_use]
    pub fn join(&self, rest: Stream) -> Stream {
        Joined { first: Some(self.bytes.clone()), rest, left: self.length }.boxed_unsync()
    }
}

/// A beginning and its rest.
struct Joined {
    first: Option<Bytes>,
    rest: Stream,
    /// Bytes of both that are to come.
    left: u64,
}

impl Body for Joined {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let frame = match this.first.take() {
            Some(first) => Some(Ok(Frame::data(first))),
            None => ready!(Pin::new(&mut this.rest).poll_frame(cx)),
        };
        let bytes = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, |data| data.len() as u64);
        let broken = match (&frame, this.left.checked_sub(bytes)) {
            (_, None) => Failure::Invalid,
            (None, Some(1..)) => Failure::Truncated,
            (_, Some(left)) => {
                this.left = left;
                return Poll::Ready(frame);
            }
        };
        Poll::Ready(Some(Err(Box::new(BrokenBody(broken)))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

impl Heap for Arc<Beginning> {
    fn heap(&self) -> usize {
        allocated(size_of::<Beginning>() + 16) + allocated(self.bytes.len()) + self.tag.as_ref().map_or(0, |tag| allocated(tag.len()))
    }
}

/// The beginnings that are known.
pub struct Beginnings(Remembered<Arc<Beginning>>);

impl Default for Beginnings {
    fn default() -> Self {
        Self(remembered(BEGINNINGS))
    }
}

impl Beginnings {
    /// The beginning that is known of the response for a key, unless it is stale or was voided.
    #[must_use]
    pub fn get(&self, key: &Canonical, target: u64, voids: &Voids) -> Option<Arc<Beginning>> {
        let known = self.0.get(&key.0).filter(|known| Wall::now() < known.fresh_until)?;
        (!voids.anything_since(known.asked_at, target)).then_some(known)
    }

    /// How many bytes they take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Forgets what is known for a key.
    pub fn remove(&self, key: &Canonical) {
        self.0.remove(&key.0);
    }

    /// Remembers the response to a request with `Range` that was asked at `asked_at`, if it is a small beginning; that is
    /// read whole first.
    ///
    /// # Errors
    /// [`Failure::Truncated`] if it breaks off meanwhile.
    pub async fn remember(
        &self,
        key: &Canonical,
        policy: &FreshnessPolicy,
        asked_at: Moment,
        mut response: Response<Stream>,
    ) -> Result<Response<Stream>, Failure> {
        response_fields::clean(response.headers_mut());
        // The length that it announces, in one field or the other: no more than that is read.
        let announced = span(response.headers()).map_or(u64::MAX, |(first, last, _)| last - first + 1);
        let length = response.body().size_hint().exact().unwrap_or(announced);
        if response.status() != StatusCode::PARTIAL_CONTENT || length > LARGEST {
            return Ok(response);
        }
        let (mut head, stream) = response.into_parts();
        head.headers.remove(CONTENT_LENGTH);
        let limit = usize::try_from(LARGEST).unwrap_or(usize::MAX);
        let bytes = body::read(stream, limit).await.ok_or(Failure::Truncated)?;
        if let Some(beginning) = Beginning::of(head.status, &head.headers, &bytes, policy, Wall::now(), asked_at) {
            self.0.insert(&key.0, Arc::new(beginning));
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

    fn beginning(range: &'static str, tag: &'static str, bytes: &'static [u8]) -> Option<Beginning> {
        let policy = FreshnessPolicy {
            ttl: Duration::ZERO,
            negative_ttl: Duration::ZERO,
            stale_while_revalidate: Duration::ZERO,
            stale_if_error: Duration::ZERO,
            respect_origin: true,
            heuristic: false,
            set_cookie: false,
            authorized: false,
        };
        Beginning::of(StatusCode::PARTIAL_CONTENT, &fields(range, tag), &Bytes::from_static(bytes), &policy, NOW, Moment::default())
    }

    #[test]
    fn only_the_beginning_of_a_response_is_remembered() {
        for tag in ["\"a\"", "W/\"a\"", ""] {
            assert!(beginning("bytes 0-4/10", tag, b"01234").is_some());
        }
        for (range, tag, bytes) in [
            ("bytes 4-9/10", "\"a\"", &b"012345"[..]),
            ("bytes 0-4/10", "\"a\"", b"0123"),
            ("bytes 0-9/10", "\"a\"", b"0123456789"),
            ("bytes 0-4/*", "\"a\"", b"01234"),
            ("bytes 0-4/4", "\"a\"", b"01234"),
            ("bytes +0-4/10", "\"a\"", b"01234"),
            ("lines 0-4/10", "\"a\"", b"01234"),
        ] {
            assert!(beginning(range, tag, bytes).is_none(), "{range} {tag}");
        }
    }

    #[test]
    fn a_rest_belongs_to_a_beginning_only_under_one_strong_validator() {
        let continued =
            |range, tag, length| beginning("bytes 0-4/10", "\"a\"", b"01234").unwrap().is_continued_by(&fields(range, tag), length);
        assert!(continued("bytes 5-9/10", "\"a\"", Some(5)) && continued("bytes 5-9/10", "\"a\"", None));
        for (range, tag, length) in [
            ("bytes 5-9/10", "", None),
            ("bytes 5-9/10", "\"b\"", None),
            ("bytes 5-9/10", "W/\"a\"", None),
            ("bytes 4-9/10", "\"a\"", None),
            ("bytes 5-8/9", "\"a\"", None),
            ("bytes 5-9/10", "\"a\"", Some(4)),
        ] {
            assert!(!continued(range, tag, length), "{range} {tag} {length:?}");
        }
        for tag in ["", "W/\"a\""] {
            assert!(!beginning("bytes 0-4/10", tag, b"01234").unwrap().is_continued_by(&fields("bytes 5-9/10", tag), Some(5)), "{tag}");
        }
    }

    #[tokio::test]
    async fn beginning_and_rest_are_the_whole_unless_the_rest_has_another_length() {
        for (rest, whole) in [("56789", Some("0123456789")), ("5678", None), ("56789a", None), ("", None)] {
            let joined = beginning("bytes 0-4/10", "\"a\"", b"01234").unwrap().join(body::full(Bytes::from_static(rest.as_bytes())));
            assert_eq!(joined.size_hint().exact(), Some(10));
            let read = joined.collect().await.ok().map(|whole| whole.to_bytes());
            assert_eq!(read.as_deref(), whole.map(str::as_bytes), "{rest}");
        }
    }

    #[test]
    fn the_rest_is_asked_for_on_condition_that_it_is_of_the_same() {
        let mut request = HeaderMap::new();
        beginning("bytes 0-4/10", "\"a\"", b"01234").unwrap().ask_for_rest(&mut request);
        assert_eq!((request[RANGE].as_bytes(), request[IF_RANGE].as_bytes()), (&b"bytes=5-"[..], &b"\"a\""[..]));
    }
}
