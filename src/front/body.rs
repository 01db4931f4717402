//! Bodies of requests and responses as a connection sees them: with deadlines, and counted as being answered.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::deadlines::{InFlight, is_too_slow};
use super::message::has_outer_space;
use super::socket::Notes;
use super::stream::Stream;
use crate::body::{BoxError, ClientFault, Reply};
use crate::config::Limits;

/// Of this many bytes on, a frame more costs nothing that would be seen.
const APART: usize = 4 << 10;

/// A response's body. The request counts as being answered until the body is dropped.
pub struct ResponseBody {
    body: Reply,
    in_flight: InFlight,
    /// Over HTTP/2: the stream, and what of the last piece is still to be given to the library.
    stream: Option<(Arc<Stream>, Bytes)>,
    /// What the body broke off with, until what came before it was written.
    broken: Option<BoxError>,
    /// Over HTTP/1: the connection's notes.
    notes: Option<Arc<Notes>>,
    /// Whether the connection's end alone tells the client that the body is whole: it must be reset if the body breaks off.
    is_ended_by_close: bool,
}

impl ResponseBody {
    /// The body of the response to a request, on this stream if it came over HTTP/2.
    #[must_use]
    pub fn new(body: Reply, in_flight: InFlight, stream: Option<Arc<Stream>>) -> Self {
        let stream = stream.map(|stream| (stream, Bytes::new()));
        Self { body, in_flight, stream, broken: None, notes: None, is_ended_by_close: false }
    }

    /// The same over HTTP/1. In version 1.0 the connection's end is the end of a body whose length is not known.
    #[must_use]
    pub fn over_http1(self, version: Version, notes: Arc<Notes>) -> Self {
        let is_ended_by_close = version == Version::HTTP_10 && self.body.size_hint().exact().is_none();
        Self { notes: Some(notes), is_ended_by_close, ..self }
    }

    /// Keeps an error until what came before it was written: the library throws that away when it sees the error.
    fn break_off(&mut self, error: BoxError, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.broken = Some(error);
        match &self.notes {
            Some(notes) => {
                notes.cut.store(self.is_ended_by_close, Ordering::Relaxed);
                // The socket wakes us once the library has written all.
                notes.is_flush_awaited.store(true, Ordering::Relaxed);
            }
            // The connection's task sends what it can before it is our turn again.
            None => cx.waker().wake_by_ref(),
        }
        Poll::Pending
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.broken.is_some() && this.notes.as_ref().is_some_and(|notes| notes.is_flush_awaited.load(Ordering::Relaxed)) {
            return Poll::Pending;
        }
        if let Some(error) = this.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        if let Some((stream, rest)) = &mut this.stream {
            // The library asks for more only once the client has room for it; whether the connection has is asked here.
            let backlog = this.in_flight.backlog();
            backlog.add(stream.took());
            ready!(backlog.poll_room(cx));
            if !rest.is_empty() {
                return Poll::Ready(Some(Ok(give(stream, rest))));
            }
        }
        match (Pin::new(&mut this.body).poll_frame(cx), &mut this.stream) {
            (Poll::Ready(Some(Err(error))), _) => this.break_off(error, cx),
            (Poll::Ready(Some(Ok(frame))), Some((stream, rest))) => Poll::Ready(Some(Ok(match frame.into_data() {
                Ok(data) => {
                    *rest = data;
                    give(stream, rest)
                }
                Err(frame) => frame,
            }))),
            (polled, _) => polled,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.as_ref().is_none_or(|(_, rest)| rest.is_empty()) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.stream.as_ref().map_or(0, |(_, rest)| rest.len()) as u64;
        match self.body.size_hint().exact() {
            Some(length) => SizeHint::with_exact(length + rest),
            None => SizeHint::default(),
        }
    }
}

/// The next piece of what is there. The last byte of much is a piece of its own.
fn give(stream: &Stream, rest: &mut Bytes) -> Frame<Bytes> {
    let most = stream.piece();
    let is_apart = rest.len() <= most && rest.len() > APART;
    let piece = rest.split_to(if is_apart { rest.len() - 1 } else { rest.len().min(most) });
    stream.gave(piece.len());
    Frame::data(piece)
}

/// A request's body. What its client does wrong ends it with a [`ClientFault`]: a body that breaks off, and one that comes too slowly.
pub struct RequestBody<B = Incoming> {
    inner: B,
    silence: Duration,
    min_rate: u64,
    timer: Option<Pin<Box<Sleep>>>,
    /// Since when the client is waited for.
    since: Option<Instant>,
    /// For how long it was, since the rate was last computed, and how many bytes came meanwhile.
    waited: Duration,
    came: u64,
}

impl<B> RequestBody<B> {
    /// Waits for each piece for at most `limits.stall_timeout`, and in that time for `limits.min_rate` bytes a second.
    pub const fn new(inner: B, limits: &Limits) -> Self {
        let (silence, min_rate) = (limits.stall_timeout, limits.min_rate);
        Self { inner, silence, min_rate, timer: None, since: None, waited: Duration::ZERO, came: 0 }
    }

    /// Counts bytes that came, and says whether they came too slowly.
    fn count(&mut self, bytes: usize) -> bool {
        self.waited += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.came += bytes as u64;
        if self.waited < self.silence {
            return false;
        }
        is_too_slow(std::mem::take(&mut self.came), std::mem::take(&mut self.waited), self.min_rate)
    }
}

impl<B> Body for RequestBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let fault = |fault: ClientFault| Poll::Ready(Some(Err(Box::new(fault) as BoxError)));
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            this.timer = None;
            let bytes = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map(Bytes::len);
            return match (bytes, frame) {
                (Some(bytes), _) if this.count(bytes) => fault(ClientFault::Slow),
                (_, Some(Err(_))) => fault(ClientFault::Broken),
                (_, Some(Ok(frame))) if frame.trailers_ref().is_some_and(has_bad_value) => fault(ClientFault::Broken),
                (_, frame) => Poll::Ready(frame.map(|frame| frame.map_err(Into::into))),
            };
        }
        let silence = this.silence;
        this.since.get_or_insert_with(Instant::now);
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + silence)));
        ready!(timer.as_mut().poll(cx));
        fault(ClientFault::Slow)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Whether trailers have a value that HTTP/2 forbids; HTTP/1's were checked as bytes.
fn has_bad_value(trailers: &HeaderMap) -> bool {
    trailers.values().any(|value| has_outer_space(value.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::deadlines::Activity;
    use tokio::time::timeout;

    fn limits() -> Limits {
        let checked = crate::config::check("t", "[backend]\nurl='http://127.0.0.1:1'", &|_| None);
        checked.config.unwrap().limits
    }

    #[tokio::test]
    async fn over_http2_a_body_comes_in_pieces_and_loses_nothing() {
        use http_body_util::BodyExt;
        let activity = Arc::new(Activity::default());
        let stream = Stream::new(&limits());
        for length in [0, 1, stream.piece(), stream.piece() * 5 + 3] {
            let bytes: Bytes = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let in_flight = InFlight::begin(&activity, Version::HTTP_2);
            let mut body = ResponseBody::new(Reply::Full(Some(bytes.clone())), in_flight, Some(Arc::clone(&stream)));
            assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(length as u64), length == 0));
            let mut came = Vec::new();
            while let Some(frame) = body.frame().await {
                let piece = frame.unwrap().into_data().unwrap();
                assert!(piece.len() <= 128 << 10);
                came.extend_from_slice(&piece);
                assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some((length - came.len()) as u64), came.len() == length));
            }
            assert_eq!(came, bytes);
        }
    }

    /// One byte a second, without end.
    struct Drip(Pin<Box<Sleep>>);

    impl Body for Drip {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            ready!(self.0.as_mut().poll(cx));
            self.0 = Box::pin(tokio::time::sleep(Duration::from_secs(1)));
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_broken_off() {
        use http_body_util::BodyExt;
        let drip = Drip(Box::pin(tokio::time::sleep(Duration::from_secs(1))));
        let reading = RequestBody::new(drip, &limits()).collect();
        let error = timeout(Duration::from_secs(3600), reading).await.unwrap().unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&ClientFault::Slow));
    }
}
