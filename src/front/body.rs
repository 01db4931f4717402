//! Bodies of requests and responses as a connection sees them: with deadlines, and counted as being answered.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::deadlines::{InFlight, is_too_slow};
use crate::body::{BoxError, Reply};
use crate::config::Limits;

/// A response's body. The request counts as being answered until the body is dropped.
pub struct ResponseBody {
    body: Reply,
    in_flight: InFlight,
}

impl ResponseBody {
    /// The body of the response to a request.
    #[must_use]
    pub fn new(body: Reply, in_flight: InFlight) -> Self {
        in_flight.bytes_wait(true);
        Self { body, in_flight }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        // The library asks for more only once the client has room for it.
        self.in_flight.bytes_wait(matches!(polled, Poll::Ready(Some(Ok(_)))));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request's body. It ends with [`StalledBody`] when the client is silent for too long, or sends too slowly.
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
        let late = || Poll::Ready(Some(Err(Box::new(StalledBody) as BoxError)));
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            this.timer = None;
            let bytes = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map(Bytes::len);
            return match bytes {
                Some(bytes) if this.count(bytes) => late(),
                _ => Poll::Ready(frame.map(|frame| frame.map_err(Into::into))),
            };
        }
        let silence = this.silence;
        this.since.get_or_insert_with(Instant::now);
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + silence)));
        ready!(timer.as_mut().poll(cx));
        late()
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The error of a request's body whose client stalled.
#[derive(Debug)]
pub struct StalledBody;

impl fmt::Display for StalledBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the client stopped sending its body, or sends it too slowly (limits.stall_timeout, limits.min_rate)")
    }
}

impl std::error::Error for StalledBody {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::deadlines::{Activity, watchdog};
    use http::Version;
    use std::sync::Arc;
    use tokio::time::timeout;

    fn limits() -> Limits {
        let checked = crate::config::check("t", "[backend]\nurl='http://127.0.0.1:1'", &|_| None);
        checked.config.unwrap().limits
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_its_client_does_not_take_ends_the_connection() {
        let (activity, limits) = (Arc::new(Activity::default()), limits());
        let body = ResponseBody::new(Reply::Full(Some(Bytes::from_static(b"x"))), InFlight::begin(&activity, Version::HTTP_2));
        let _other = InFlight::begin(&activity, Version::HTTP_2);
        assert!(watchdog(&activity, &limits).await.starts_with("the client takes no bytes"));
        drop(body);
        assert!(timeout(Duration::from_secs(3600), watchdog(&activity, &limits)).await.is_err());
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
        assert!(timeout(Duration::from_secs(3600), reading).await.unwrap().is_err());
    }
}
