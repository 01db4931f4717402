//! The body of an upstream's response, with its deadline.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, sleep_until};

use super::failure::{BrokenBody, Failure};
use crate::body::BoxError;

/// A body that may be silent only so long between two pieces, and that gives back its permit when it ends.
pub struct DeadlineBody<B> {
    inner: B,
    silence: Duration,
    timer: Pin<Box<Sleep>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl<B> DeadlineBody<B> {
    /// Passes `inner` on; a silence longer than `silence` ends it with [`BrokenBody`] of [`Failure::Timeout`].
    pub fn new(inner: B, silence: Duration, permit: Option<OwnedSemaphorePermit>) -> Self {
        Self { inner, silence, timer: Box::pin(sleep_until(Instant::now() + silence)), _permit: permit }
    }
}

impl<B> Body for DeadlineBody<B>
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
                Poll::Ready(Some(Err(Box::new(BrokenBody(Failure::Timeout)))))
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

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    /// A body of which nothing ever comes.
    struct Silent;

    impl Body for Silent {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            Poll::Pending
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_body_is_broken_off() {
        assert!(DeadlineBody::new(Silent, Duration::from_secs(5), None).collect().await.is_err());
    }
}
