//! Answers that the backend's own cache changed, given back as the API's contract has them: buckets whose timestamps are numbers
//! (deviation D3, see [`times`](crate::timeline::times)).
//!
//! An answer is looked at before its head goes on: its first bucket shows whether it is one of those. All others go on as they came, byte
//! for byte. Those are changed as they pass, in constant memory, however long they are: they lose what is said of other bytes (their
//! length, their validator, their coding).

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use http::header::{ACCEPT_RANGES, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, ETAG, TRAILER};
use http::{HeaderMap, HeaderName, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;

use super::Fetcher;
use super::inflate::Inflate;
use crate::body::{BoxError, Stream};
use crate::cache::entry::vary_by_encoding;
use crate::http::cache_control::CacheControl;
use crate::http::encoding::Coding;
use crate::timeline::times::{LOOKED_AT, Numbering, begins_with_text};

/// Fields that are about the bytes as they came.
const OF_ITS_BYTES: [HeaderName; 8] = [
    ACCEPT_RANGES,
    CONTENT_LENGTH,
    ETAG,
    TRAILER,
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("content-md5"),
    HeaderName::from_static("digest"),
    HeaderName::from_static("repr-digest"),
];

/// Whether it was told already: once is enough.
static TOLD: AtomicBool = AtomicBool::new(false);

impl Fetcher {
    /// A response that should be buckets, as the contract has it; and whether it may be stored. One that is not as the contract has it and
    /// may not be changed (`no-transform`), or whose coding cannot be undone to see that, goes on as it is and is not stored.
    ///
    /// Waits until the beginning of its body is there.
    pub async fn contracted(&self, response: Response<Stream>) -> (Response<Stream>, bool) {
        let coding = Coding::of(response.headers());
        if response.status() != StatusCode::OK || !is_json(response.headers()) {
            return (response, true);
        }
        if coding == Coding::Opaque {
            return (response, false);
        }
        let (head, body) = response.into_parts();
        let (has_text, body) = Seen::look(body, coding).await;
        let mut response = Response::from_parts(head, body.boxed_unsync());
        if !has_text {
            return (response, true);
        }
        if CacheControl::of(response.headers()).no_transform {
            return (response, false);
        }
        self.metrics.timeline_texts.inc();
        if !TOLD.swap(true, Ordering::Relaxed) {
            tracing::info!(
                "the backend's own cache makes text of timestamps; clients get numbers. deploy/timeline.md says how to switch it off"
            );
        }
        for name in OF_ITS_BYTES {
            response.headers_mut().remove(name);
        }
        if coding == Coding::Gzip {
            response.headers_mut().remove(CONTENT_ENCODING);
            vary_by_encoding(response.headers_mut());
            response = response.map(|body| Inflate::new(body).boxed_unsync());
        }
        (response.map(|inner| Numbered { inner, numbering: Some(Numbering::default()) }.boxed_unsync()), true)
    }
}

fn is_json(fields: &HeaderMap) -> bool {
    let kind = fields.get(CONTENT_TYPE).map_or(&[][..], |kind| kind.as_bytes());
    let kind = kind.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
    kind.eq_ignore_ascii_case(b"application/json")
}

/// A body whose beginning was looked at, and comes again.
struct Seen {
    frames: VecDeque<Result<Frame<Bytes>, BoxError>>,
    rest: Stream,
}

impl Seen {
    /// Reads a body until it is known whether it begins with text timestamps. One that is not known by then, or breaks off, does not.
    async fn look(rest: Stream, coding: Coding) -> (bool, Self) {
        let mut seen = Self { frames: VecDeque::new(), rest };
        let mut beginning = Vec::new();
        let has_text = loop {
            let Some(frame) = seen.rest.frame().await else { break false };
            let data = frame.as_ref().ok().and_then(Frame::data_ref);
            let data = data.map(|data| data.slice(..data.len().min(LOOKED_AT)));
            seen.frames.push_back(frame);
            let Some(data) = data else { break false };
            beginning.extend_from_slice(&data);
            let known = match coding {
                Coding::Gzip => inflated(&beginning).as_deref().map_or(Some(false), begins_with_text),
                Coding::Identity | Coding::Opaque => begins_with_text(&beginning),
            };
            match known {
                Some(has_text) => break has_text,
                // Coded, they say more than that.
                None if beginning.len() >= LOOKED_AT => break false,
                None => {}
            }
        };
        (has_text, seen)
    }
}

/// What a gzip body begins with says, as far as it is there; `None`: it is no gzip.
fn inflated(coded: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    match MultiGzDecoder::new(coded).take(LOOKED_AT as u64).read_to_end(&mut plain) {
        Ok(_) => Some(plain),
        Err(error) => (error.kind() == ErrorKind::UnexpectedEof).then_some(plain),
    }
}

impl Body for Seen {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match this.frames.pop_front() {
            Some(frame) => Poll::Ready(Some(frame)),
            None => Pin::new(&mut this.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let data = self.frames.iter().filter_map(|frame| frame.as_ref().ok()?.data_ref());
        let held: u64 = data.map(|data| data.len() as u64).sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(held));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(held));
        }
        hint
    }
}

/// A body whose text timestamps become numbers as it passes.
struct Numbered {
    inner: Stream,
    /// `None`: it is at its end.
    numbering: Option<Numbering>,
}

impl Body for Numbered {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        loop {
            let Some(numbering) = &mut this.numbering else { return Poll::Ready(None) };
            let said = match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => numbering.push(&piece),
                    // What trailers say may be about other bytes.
                    Err(_trailers) => continue,
                },
                Some(Err(error)) => {
                    this.numbering = None;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    let rest = numbering.finish();
                    this.numbering = None;
                    rest
                }
            };
            if !said.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(said.into()))));
            }
        }
    }
}
