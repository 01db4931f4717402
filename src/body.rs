//! Bodies as every room hands them on: of requests on their way to the upstream, and of responses on their way to clients.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body that arrives piece by piece.
pub type Stream = UnsyncBoxBody<Bytes, BoxError>;

/// A stream without bytes.
#[must_use]
pub fn empty() -> Stream {
    http_body_util::Empty::new().map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// A stream of bytes that are all there.
#[must_use]
pub fn full(bytes: Bytes) -> Stream {
    http_body_util::Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync()
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

/// The body of a response to a client. A hit's is [`Reply::Full`], which costs no allocation.
pub enum Reply {
    /// Bytes that are all there; `None` once they were sent.
    Full(Option<Bytes>),
    /// Bytes that arrive piece by piece.
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
