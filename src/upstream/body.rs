//! The body of an upstream's response: with its deadline, and begun before its head goes on.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use super::admission::machine::Phase;
use super::admission::{Place, Work};
use super::failure::{BrokenBody, Failure};
use super::room::Taken;
use crate::body::BoxError;
use crate::clock::millis;

/// A body that may be silent only so long between two pieces, and that gives back its place when it ends.
pub struct DeadlineBody<B> {
    carried: Arc<Carried<B>>,
    silence: Duration,
    timer: Pin<Box<Sleep>>,
    /// Whether the next piece is waited for. While nobody asks for it, the upstream is not to blame.
    is_awaited: bool,
    place: Option<Held>,
    /// Bytes that came since it moved last.
    came: usize,
}

/// A download has moved when so many more bytes of it came: one that comes byte by byte holds its place as one that rests does.
const MOVED: usize = 4 << 10;

/// What a body holds while it is on its way.
pub enum Held {
    /// A place of its phase.
    Place(Place),
    /// Room beside all places.
    Beside(Taken),
}

/// A body on its way, which may have to give up its place while nobody reads it.
struct Carried<B> {
    inner: Mutex<Inner<B>>,
    start: Instant,
    /// When a piece of it came last, in milliseconds since the start.
    moved: AtomicU64,
    /// Whether a reader waits for the next one: then it is the upstream that rests.
    is_awaited: AtomicBool,
}

struct Inner<B> {
    /// `None`: it was given up.
    inner: Option<B>,
    /// Who waits for the next piece.
    reader: Option<Waker>,
}

/// So much longer a body may rest whose reader waits.
const UPSTREAM_RESTS: Duration = Duration::from_secs(9);

impl<B> Carried<B> {
    fn held(&self) -> MutexGuard<'_, Inner<B>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Send> Work for Carried<B> {
    fn give_up(&self) -> bool {
        true
    }

    fn rests_since(&self) -> Option<Instant> {
        let moved = self.start + Duration::from_millis(self.moved.load(Ordering::Relaxed));
        Some(if self.is_awaited.load(Ordering::Relaxed) { moved + UPSTREAM_RESTS } else { moved })
    }

    fn let_go(&self) {
        let mut held = self.held();
        let (inner, reader) = (held.inner.take(), held.reader.take());
        drop(held);
        drop(inner);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

impl<B: Send + 'static> DeadlineBody<B> {
    /// Passes `inner` on; a silence longer than `silence` ends it with [`BrokenBody`] of [`Failure::Timeout`]. Once its place is another's
    /// it ends with one of [`Failure::Overloaded`].
    pub fn new(inner: B, silence: Duration, place: Option<Held>) -> Self {
        let carried = Arc::new(Carried {
            inner: Mutex::new(Inner { inner: Some(inner), reader: None }),
            start: Instant::now(),
            moved: AtomicU64::new(0),
            is_awaited: AtomicBool::new(false),
        });
        if let Some(Held::Place(place)) = &place {
            let work: Weak<Carried<B>> = Arc::downgrade(&carried);
            place.is_for(work);
        }
        Self { carried, silence, timer: Box::pin(sleep_until(Instant::now() + silence)), is_awaited: true, place, came: 0 }
    }
}

impl<B> DeadlineBody<B> {
    /// Notes when it moved. Of a stream each piece counts, however small.
    fn note_moved(&mut self, frame: &Option<Result<Frame<Bytes>, BoxError>>) {
        self.came += frame.iter().flatten().filter_map(Frame::data_ref).map(Bytes::len).sum::<usize>();
        let is_download = matches!(&self.place, Some(Held::Place(place)) if place.phase() == Phase::Download);
        if !is_download || self.came >= MOVED {
            self.came = 0;
            self.carried.moved.store(millis(self.carried.start.elapsed()), Ordering::Relaxed);
        }
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
        let mut held = this.carried.held();
        let Some(inner) = &mut held.inner else {
            drop(held);
            // Said once.
            let end = this.place.take().map(|_| Err(Box::new(BrokenBody(Failure::Overloaded)).into()));
            return Poll::Ready(end);
        };
        if let Poll::Ready(frame) = Pin::new(&mut *inner).poll_frame(cx) {
            let is_over = !matches!(frame, Some(Ok(_))) || inner.is_end_stream();
            drop(held);
            this.note_moved(&frame);
            this.carried.is_awaited.store(false, Ordering::Relaxed);
            this.is_awaited = false;
            if is_over {
                this.place = None;
            }
            return Poll::Ready(frame);
        }
        if !held.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
            held.reader = Some(cx.waker().clone());
        }
        drop(held);
        this.carried.is_awaited.store(true, Ordering::Relaxed);
        if !this.is_awaited {
            this.is_awaited = true;
            this.timer.as_mut().reset(Instant::now() + this.silence);
        }
        ready!(this.timer.as_mut().poll(cx));
        this.place = None;
        Poll::Ready(Some(Err(Box::new(BrokenBody(Failure::Timeout)))))
    }

    fn is_end_stream(&self) -> bool {
        self.carried.held().inner.as_ref().is_some_and(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.carried.held().inner.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

/// How long the first bytes of a body are waited for: one that is broken from the beginning is then told in a response, while there
/// is none yet. The head of one that begins later goes on alone.
const FIRST_BYTES: Duration = Duration::from_millis(20);

/// A body whose first piece, if it came at once, was taken out already.
pub struct Begun<B> {
    first: Option<Frame<Bytes>>,
    inner: B,
}

impl<B> Begun<B>
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    /// Waits a little for the first piece of `inner`.
    ///
    /// # Errors
    /// What the body broke off with, if that is all there is of it.
    pub async fn new(mut inner: B) -> Result<Self, BoxError> {
        let first = match inner.is_end_stream() {
            true => None,
            false => timeout(FIRST_BYTES, inner.frame()).await.unwrap_or(None).transpose()?,
        };
        Ok(Self { first, inner })
    }

    /// Whether all of it came already.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.inner.is_end_stream()
    }
}

impl<B> Body for Begun<B>
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(Ok(first))),
            None => Pin::new(&mut self.inner).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len) as u64;
        let rest = self.inner.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(first));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(first));
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// Every other time there is a piece.
    struct Hesitant(bool);

    impl Body for Hesitant {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            self.0 = !self.0;
            if self.0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_rests_is_no_silence_of_the_upstream() {
        let mut body = DeadlineBody::new(Hesitant(false), Duration::from_secs(5), None);
        for _ in 0..3 {
            assert!(body.frame().await.unwrap().is_ok());
            tokio::time::advance(Duration::from_secs(60)).await;
        }
    }
}
