//! Bodies: of requests on their way to the backend, and of answers on their way to clients.

use std::io::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use flate2::write::MultiGzDecoder;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::http::encoding::{ALWAYS, MAX_RATIO};
use crate::proxy::outcome::Failure;

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body that arrives piece by piece.
pub type Stream = UnsyncBoxBody<Bytes, BoxError>;

/// A stream without bytes.
#[must_use]
pub fn empty() -> Stream {
    http_body_util::Empty::new().map_err(|never: std::convert::Infallible| match never {}).boxed_unsync()
}

/// A stream of bytes that are all there.
#[must_use]
pub fn full(bytes: Bytes) -> Stream {
    http_body_util::Full::new(bytes).map_err(|never: std::convert::Infallible| match never {}).boxed_unsync()
}

/// Reads a whole body of at most `limit` bytes; `None` if it is longer or breaks off.
pub async fn read(mut stream: Stream, limit: usize) -> Option<Bytes> {
    let mut whole = BytesMut::new();
    while let Some(frame) = stream.frame().await {
        whole.extend_from_slice(frame.ok()?.data_ref().map_or(&[], |data| data));
        if whole.len() > limit {
            return None;
        }
    }
    Some(whole.freeze())
}

/// The body of an answer. Hits are [`Reply::Full`] and cost no allocation.
pub enum Reply {
    /// Bytes that are all there; `None` once they were sent.
    Full(Option<Bytes>),
    /// Bytes that arrive.
    Stream(Stream),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().filter(Bytes::has_remaining).map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream(stream) => Pin::new(stream).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Self::Stream(stream) => stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Stream(stream) => stream.size_hint(),
        }
    }
}

/// A body that ended before its time.
#[derive(Debug)]
pub struct Broken(pub Failure);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the body broke off: {}", self.0.answer().1)
    }
}

impl std::error::Error for Broken {}

/// A body that may be silent only so long, and that gives back its place at the backend when it ends.
pub struct Watched<B> {
    inner: B,
    silence: Duration,
    timer: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl<B> Watched<B> {
    /// Watches `inner`: a silence of more than `silence` breaks it off.
    pub fn new(inner: B, silence: Duration, place: Option<OwnedSemaphorePermit>) -> Self {
        Self { inner, silence, timer: Box::pin(sleep_until(Instant::now() + silence)), _place: place }
    }
}

impl<B> Body for Watched<B>
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(frame) => {
                this.timer.as_mut().reset(Instant::now() + this.silence);
                Poll::Ready(frame)
            }
            Poll::Pending => {
                ready!(this.timer.as_mut().poll(cx));
                Poll::Ready(Some(Err(Box::new(Broken(Failure::Timeout)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Inflates a gzip stream for a client that does not take gzip, in constant memory.
pub struct Inflate<B> {
    inner: B,
    decoder: Option<MultiGzDecoder<Vec<u8>>>,
    pending: Bytes,
    /// Coded bytes read, and plain bytes given out.
    read: u64,
    given: u64,
}

/// Coded bytes that are inflated at one time: with gzip's largest ratio of about 1,000 that stays under 5 MiB.
const SLICE: usize = 4096;

impl<B> Inflate<B> {
    /// Inflates `inner`. If it inflates too far for its size (see [`MAX_RATIO`]) it is a bomb, and the stream breaks off.
    pub fn new(inner: B) -> Self {
        Self { inner, decoder: Some(MultiGzDecoder::new(Vec::new())), pending: Bytes::new(), read: 0, given: 0 }
    }
}

impl<B> Body for Inflate<B>
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        loop {
            let Some(decoder) = &mut this.decoder else { return Poll::Ready(None) };
            let plain = if this.pending.is_empty() {
                match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                    Some(Ok(frame)) => {
                        this.pending = frame.into_data().unwrap_or_default();
                        continue;
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    None => {
                        let decoder = this.decoder.take();
                        decoder.map_or_else(|| Ok(Vec::new()), |decoder| decoder.finish())?
                    }
                }
            } else {
                let slice = this.pending.split_to(this.pending.len().min(SLICE));
                this.read += slice.len() as u64;
                decoder.write_all(&slice)?;
                std::mem::take(decoder.get_mut())
            };
            this.given += plain.len() as u64;
            if this.given > this.read.saturating_mul(MAX_RATIO).max(ALWAYS) {
                return Poll::Ready(Some(Err(Box::new(Broken(Failure::Invalid)))));
            }
            if !plain.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(Bytes::from(plain)))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::encoding::gzip;

    #[tokio::test]
    async fn inflating_gives_back_what_was_packed_and_stops_bombs() {
        let plain: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let whole = Inflate::new(full(gzip(&plain))).collect().await.unwrap().to_bytes();
        assert_eq!(whole, plain);
        assert!(Inflate::new(full(gzip(&vec![0; 5 << 20]))).collect().await.is_err());
        let cut = gzip(&plain);
        assert!(Inflate::new(full(cut.slice(..cut.len() - 9))).collect().await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_body_is_broken_off() {
        struct Silent;
        impl Body for Silent {
            type Data = Bytes;
            type Error = BoxError;
            fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
                Poll::Pending
            }
        }
        assert!(Watched::new(Silent, Duration::from_secs(5), None).collect().await.is_err());
    }
}
