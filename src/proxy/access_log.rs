//! The access log: one line a request, with what became of it and how long it took.

use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http::header::CONTENT_LENGTH;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::spent::{Spent, Step};
use crate::body::{BoxError, Reply, Stream};

/// A line of the access log, all but what is known when the body has been sent.
pub struct Line {
    /// The request's id.
    pub id: String,
    /// Who asked.
    pub client: IpAddr,
    /// The method.
    pub method: String,
    /// The path and query.
    pub target: String,
    /// The rule's name, or `none`.
    pub route: String,
    /// What became of it, as metrics call it.
    pub outcome: &'static str,
    /// Why.
    pub detail: &'static str,
    /// The status.
    pub status: u16,
    /// When the request came.
    pub started: Instant,
    /// How long it took to the head of the response.
    pub head: Duration,
}

/// A line about a request: what names it, then what else there is to say, then what kind of line it is.
macro_rules! log_line {
    ($line:expr, $kind:literal, $($more:tt)+) => {
        tracing::info!(
            id = $line.id,
            client = %$line.client,
            method = $line.method,
            target = $line.target,
            route = $line.route,
            outcome = $line.outcome,
            detail = $line.detail,
            status = $line.status,
            $($more)+,
            $kind
        )
    };
}

/// Bytes that are all there are handed out in pieces of this size if there are more, so that the line tells how many a client took that left.
const PIECE: usize = 64 << 10;

impl Line {
    /// Writes the line once the body of a response has been sent: now if it is all there, else when it ends.
    #[must_use]
    pub fn write_with(self, response: Response<Reply>) -> Response<Reply> {
        let announced = response.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        response.map(|body| self.write_with_body(body, announced))
    }

    fn write_with_body(self, body: Reply, announced: Option<u64>) -> Reply {
        match body {
            Reply::Full(Some(bytes)) if bytes.len() > PIECE && self.method != "HEAD" => {
                let length = Some(bytes.len() as u64);
                let inner = Pieces(bytes).boxed_unsync();
                Reply::Stream(CountedBody { inner, bytes: 0, length, whole: false, line: self }.boxed_unsync())
            }
            Reply::Full(bytes) => {
                self.write(bytes.as_ref().map_or(0, Bytes::len) as u64, true);
                Reply::Full(bytes)
            }
            Reply::Stream(inner) => {
                // A body that is not sent is all there.
                let whole = self.method == "HEAD" || inner.is_end_stream();
                let length = inner.size_hint().exact().or(announced);
                Reply::Stream(CountedBody { inner, bytes: 0, length, whole, line: self }.boxed_unsync())
            }
        }
    }

    /// Writes where the time of a slow request went until the head of its response.
    pub fn write_slow(&self, spent: &Spent) {
        let of = |step| milliseconds(spent.of(step));
        log_line!(
            self,
            "slow",
            head_ms = milliseconds(self.head),
            limit_ms = of(Step::Limit),
            redis_ms = of(Step::Redis),
            timeline_ms = of(Step::Timeline),
            fetch_ms = of(Step::Fetch),
            pass_ms = of(Step::Pass)
        );
    }

    /// Writes the line, with how many bytes of the body were sent, and whether that is all of it.
    pub fn write(&self, bytes: u64, whole: bool) {
        let (head_ms, total_ms) = (milliseconds(self.head), milliseconds(self.started.elapsed()));
        log_line!(self, "access", bytes, whole, head_ms, total_ms);
    }
}

fn milliseconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}

/// Bytes that are handed out in pieces.
struct Pieces(Bytes);

impl Body for Pieces {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let size = self.0.len().min(PIECE);
        let piece = self.0.split_to(size);
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

/// A body whose bytes are counted for its access line, which is written when it is dropped.
struct CountedBody {
    inner: Stream,
    bytes: u64,
    /// How long it is, so far as that is known: the library does not ask for the end of one whose length it has announced.
    length: Option<u64>,
    whole: bool,
    line: Line,
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
                self.whole |= self.inner.is_end_stream() || self.length == Some(self.bytes);
            }
            Poll::Ready(None) => self.whole = true,
            _ => {}
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

impl Drop for CountedBody {
    fn drop(&mut self) {
        self.line.write(self.bytes, self.whole);
    }
}
