//! Bodies as every room hands them on: of requests on their way to the upstream, and of responses on their way to clients.

pub mod lent;

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
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
    // What comes in one piece is not copied.
    let (mut first, mut whole) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = stream.frame().await {
        let Ok(data) = frame.ok()?.into_data() else { continue };
        if first.is_empty() && whole.is_empty() {
            first = data;
        } else {
            whole.extend_from_slice(&std::mem::take(&mut first));
            whole.extend_from_slice(&data);
        }
        if first.len() + whole.len() > limit {
            return None;
        }
    }
    Some(if whole.is_empty() { first } else { whole.freeze() })
}

/// What a client did wrong in the body of its request: the error of such a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientFault {
    /// It is malformed, or ended before its time.
    Broken,
    /// It came too slowly, or not at all.
    Slow,
}

impl fmt::Display for ClientFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Broken => "the client's body is malformed, or ended early",
            Self::Slow => "the client stopped sending its body, or sends it too slowly (limits.stall_timeout, limits.min_rate)",
        })
    }
}

impl std::error::Error for ClientFault {}

/// The body of a request on its way to the upstream, which notes what its client did wrong: what comes of that is no failure of
/// the upstream's.
pub struct Noting {
    inner: Stream,
    fault: Arc<OnceLock<ClientFault>>,
}

impl Noting {
    /// The body, and where the fault will stand.
    #[must_use]
    pub fn new(inner: Stream) -> (Self, Arc<OnceLock<ClientFault>>) {
        let fault = Arc::new(OnceLock::new());
        (Self { inner, fault: Arc::clone(&fault) }, fault)
    }
}

impl Body for Noting {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = &polled
            && let Some(&fault) = error.downcast_ref()
        {
            let _ = self.fault.set(fault);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
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
