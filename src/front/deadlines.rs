//! When a connection last moved, what it owes and is owed, and when it is therefore overdue.
//!
//! Sockets and bodies note what happens in a [`Pulse`]; one [`watchdog`] a connection looks at it now and then, so that
//! requests need not touch a timer.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::Version;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, sleep_until};

use crate::body::{BoxError, Broken, Reply};
use crate::config::Limits;
use crate::proxy::outcome::Failure;

/// Writes of fewer bytes are no sign that a client of HTTP/2 takes its answers: the reply to a ping is as large.
const PING: usize = 256;

/// When a connection last moved, and whether it owes or is owed anything.
pub struct Pulse {
    start: Instant,
    /// Milliseconds after `start`: the last byte read (HTTP/2: the last answer's bytes written), the end of the last
    /// answer, the first byte read since the last answer.
    moved: AtomicU64,
    answered: AtomicU64,
    head_since: AtomicU64,
    /// Since when bytes wait for the client to take them; zero: none do.
    blocked_since: AtomicU64,
    /// How long bytes waited in all since the rate was last reckoned, and how many were taken meanwhile.
    waited: AtomicU64,
    taken: AtomicU64,
    /// Requests being answered.
    busy: AtomicU64,
    /// Answers over HTTP/2, where each stream has a window of its own: since when the client is to take its bytes.
    offers: Mutex<Vec<Weak<AtomicU64>>>,
}

impl Default for Pulse {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            start: Instant::now(),
            moved: zero(),
            answered: zero(),
            head_since: zero(),
            blocked_since: zero(),
            waited: zero(),
            taken: zero(),
            busy: zero(),
            offers: Mutex::default(),
        }
    }
}

impl Pulse {
    /// Milliseconds since the connection was opened, at least one.
    fn now(&self) -> u64 {
        crate::clock::millis(self.start.elapsed()) + 1
    }

    /// Bytes came. Frames of HTTP/2 may be pings, which keep nothing alive.
    pub fn did_read(&self, framed: bool) {
        if framed {
            return;
        }
        let now = self.now();
        self.moved.store(now, Ordering::Relaxed);
        if self.busy.load(Ordering::Relaxed) == 0 && self.head_since.load(Ordering::Relaxed) == 0 {
            self.head_since.store(now, Ordering::Relaxed);
        }
    }

    /// The client was offered bytes and took so many, or none for now.
    pub fn did_write(&self, taken: Poll<usize>, framed: bool) {
        let Poll::Ready(taken) = taken else {
            let now = self.now();
            let _ = self.blocked_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
            return;
        };
        let since = self.blocked_since.load(Ordering::Relaxed);
        if since != 0 {
            self.blocked_since.store(0, Ordering::Relaxed);
            self.waited.fetch_add(self.now().saturating_sub(since), Ordering::Relaxed);
        }
        if self.waited.load(Ordering::Relaxed) != 0 {
            self.taken.fetch_add(taken as u64, Ordering::Relaxed);
        }
        if framed && taken >= PING {
            self.moved.store(self.now(), Ordering::Relaxed);
        }
    }

    /// When the connection is to be closed unless it moves, and why.
    fn deadline(&self, limits: &Limits) -> (u64, &'static str) {
        let after = |since: u64, span: Duration| since.saturating_add(crate::clock::millis(span));
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let stalled = [load(&self.blocked_since), self.oldest_offer()].into_iter().filter(|&since| since != 0).min();
        let blocked = match stalled {
            None => (u64::MAX, ""),
            Some(since) => (after(since, limits.stall_timeout), "the client takes no bytes (limits.stall_timeout)"),
        };
        let waiting = match (load(&self.busy), load(&self.head_since)) {
            (0, 0) => (after(load(&self.moved).max(load(&self.answered)), limits.idle_timeout), "idle (limits.idle_timeout)"),
            (0, since) => (after(since, limits.header_timeout), "the request's head did not come in time (limits.header_timeout)"),
            _ => (u64::MAX, ""),
        };
        blocked.min(waiting)
    }

    /// Since when the stream that waits longest for its client does.
    fn oldest_offer(&self) -> u64 {
        let mut offers = self.offers.lock().unwrap_or_else(PoisonError::into_inner);
        offers.retain(|offer| offer.strong_count() > 0);
        let since = |offer: &Weak<AtomicU64>| offer.upgrade().map_or(0, |offer| offer.load(Ordering::Relaxed));
        offers.iter().map(since).filter(|&since| since != 0).min().unwrap_or(0)
    }

    /// Whether the client, while it was waited for, took fewer bytes a second than it must. Reckoned anew after every
    /// `stall_timeout` of waiting.
    fn takes_too_little(&self, limits: &Limits) -> bool {
        let since = self.blocked_since.load(Ordering::Relaxed);
        let now = if since == 0 { 0 } else { self.now().saturating_sub(since) };
        let waited = Duration::from_millis(self.waited.load(Ordering::Relaxed).saturating_add(now));
        if waited < limits.stall_timeout {
            return false;
        }
        self.waited.store(0, Ordering::Relaxed);
        is_too_slow(self.taken.swap(0, Ordering::Relaxed), waited, limits.min_rate)
    }
}

/// Whether so many bytes in so long are fewer than `rate` a second.
fn is_too_slow(bytes: u64, span: Duration, rate: u64) -> bool {
    u128::from(bytes) * 1000 < u128::from(rate) * span.as_millis()
}

/// Returns why a connection is overdue, when it is. It sleeps until the nearest deadline there could be and then looks
/// again.
pub async fn watchdog(pulse: &Pulse, limits: &Limits) -> &'static str {
    let nap = limits.header_timeout.min(limits.idle_timeout).min(limits.stall_timeout);
    loop {
        let (deadline, why) = pulse.deadline(limits);
        let now = pulse.now();
        if now >= deadline {
            return why;
        }
        if pulse.takes_too_little(limits) {
            return "the client takes bytes too slowly (limits.min_rate)";
        }
        let next = Duration::from_millis(deadline - now).min(nap.max(Duration::from_millis(10)));
        sleep_until(Instant::now() + next).await;
    }
}

/// While it lives, a request is being answered.
pub struct Busy {
    pulse: Arc<Pulse>,
    /// Over HTTP/2: since when the client is to take what is offered to this stream; zero: nothing is.
    offer: Option<Arc<AtomicU64>>,
}

impl Busy {
    /// A request came.
    #[must_use]
    pub fn begin(pulse: &Arc<Pulse>, version: Version) -> Self {
        pulse.busy.fetch_add(1, Ordering::Relaxed);
        pulse.head_since.store(0, Ordering::Relaxed);
        let offer = (version == Version::HTTP_2).then(|| {
            let offer = Arc::new(AtomicU64::new(0));
            pulse.offers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&offer));
            offer
        });
        Self { pulse: Arc::clone(pulse), offer }
    }

    /// Bytes are there for the client, or not.
    fn offers(&self, any: bool) {
        if let Some(offer) = &self.offer {
            offer.store(if any { self.pulse.now() } else { 0 }, Ordering::Relaxed);
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.pulse.answered.store(self.pulse.now(), Ordering::Relaxed);
        self.pulse.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer's body; the request counts as being answered until it is gone.
pub struct Held {
    body: Reply,
    busy: Busy,
}

impl Held {
    /// Holds an answer's body.
    #[must_use]
    pub fn new(body: Reply, busy: Busy) -> Self {
        busy.offers(true);
        Self { body, busy }
    }
}

impl Body for Held {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        // The library asks for more only once the client has room for it.
        self.busy.offers(matches!(polled, Poll::Ready(Some(Ok(_)))));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request's body that is broken off when the client is silent for too long, or sends too slowly.
pub struct Patient<B> {
    inner: B,
    silence: Duration,
    min_rate: u64,
    timer: Option<Pin<Box<tokio::time::Sleep>>>,
    /// Since when it is being waited for, how long it was in all, and what came meanwhile.
    since: Option<Instant>,
    waited: Duration,
    came: u64,
}

impl<B> Patient<B> {
    /// Waits at most `stall_timeout` for each piece, and as long for `min_rate` times as many bytes.
    pub const fn new(inner: B, limits: &Limits) -> Self {
        let (silence, min_rate) = (limits.stall_timeout, limits.min_rate);
        Self { inner, silence, min_rate, timer: None, since: None, waited: Duration::ZERO, came: 0 }
    }

    /// Bytes came; whether they came too slowly.
    fn reckon(&mut self, bytes: usize) -> bool {
        self.waited += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.came += bytes as u64;
        if self.waited < self.silence {
            return false;
        }
        is_too_slow(std::mem::take(&mut self.came), std::mem::take(&mut self.waited), self.min_rate)
    }
}

impl<B> Body for Patient<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let late = || Poll::Ready(Some(Err(Box::new(Broken(Failure::Timeout)) as BoxError)));
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            this.timer = None;
            let bytes = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map(Bytes::len);
            return match bytes {
                Some(bytes) if this.reckon(bytes) => late(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    fn limits() -> Limits {
        let checked = crate::config::check("t", "[backend]\nurl='http://127.0.0.1:1'", &|_| None);
        checked.config.unwrap().limits
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_closes_what_does_not_move() {
        let limits = limits();
        let idle = Pulse::default();
        assert!(watchdog(&idle, &limits).await.starts_with("idle"));
        let slow = Pulse::default();
        slow.did_read(false);
        assert!(watchdog(&slow, &limits).await.starts_with("the request's head"));
        let stuck = Arc::new(Pulse::default());
        let _busy = Busy::begin(&stuck, Version::HTTP_11);
        stuck.did_write(Poll::Pending, false);
        assert!(watchdog(&stuck, &limits).await.starts_with("the client takes no bytes"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_being_answered_is_left_in_peace() {
        let pulse = Arc::new(Pulse::default());
        let _busy = Busy::begin(&pulse, Version::HTTP_11);
        let hour = Duration::from_secs(3600);
        assert!(timeout(hour, watchdog(&pulse, &limits())).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_its_client_does_not_take_ends_the_connection() {
        let (pulse, limits) = (Arc::new(Pulse::default()), limits());
        let held = Held::new(Reply::Full(Some(Bytes::from_static(b"x"))), Busy::begin(&pulse, Version::HTTP_2));
        let _other = Busy::begin(&pulse, Version::HTTP_2);
        assert!(watchdog(&pulse, &limits).await.starts_with("the client takes no bytes"));
        drop(held);
        assert!(timeout(Duration::from_secs(3600), watchdog(&pulse, &limits)).await.is_err());
    }

    /// Takes `bytes` every other second, having been waited for in the second between.
    async fn takes(pulse: &Pulse, bytes: usize) {
        loop {
            pulse.did_write(Poll::Pending, false);
            tokio::time::sleep(Duration::from_secs(1)).await;
            pulse.did_write(Poll::Ready(bytes), false);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_counts_only_while_the_client_is_waited_for() {
        let limits = limits();
        let rate = usize::try_from(limits.min_rate).unwrap();
        for (bytes, closed) in [(rate / 2, true), (rate * 2, false)] {
            let pulse = Arc::new(Pulse::default());
            let _busy = Busy::begin(&pulse, Version::HTTP_11);
            let ended = tokio::select! {
                why = watchdog(&pulse, &limits) => Some(why),
                () = takes(&pulse, bytes) => None,
                () = tokio::time::sleep(Duration::from_secs(600)) => None,
            };
            assert_eq!(ended.is_some_and(|why| why.contains("too slowly")), closed, "{bytes}");
        }
    }

    /// One byte a second, without end.
    struct Drip(Pin<Box<tokio::time::Sleep>>);

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
        let reading = Patient::new(drip, &limits()).collect();
        assert!(timeout(Duration::from_secs(3600), reading).await.unwrap().is_err());
    }
}
