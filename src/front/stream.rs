//! The deadlines of one stream of HTTP/2. A client that takes nothing of one answer, or takes it too slowly, loses that stream
//! (RFC 9113 §5.4.2); the others of its connection go on.
//!
//! The library asks for the next piece of a body once the client has opened its window for the first byte of the piece before, and for all before that. So a
//! body is given to it in pieces that are small enough to see a client move, larger for one that takes them at once; and the time from one piece to the request
//! for the next is time in which the client is waited for. The last byte is a piece of its own: the stream lasts, and has its deadlines, until there is room
//! for all bytes before it. What there is room for waits for the connection alone, which has deadlines too.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use hyper::rt::Executor;
use prometheus::IntCounterVec;
use tokio::sync::{Notify, Semaphore};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout};

use super::deadlines::{Overdue, is_too_slow};
use super::select::{Either, select};
use crate::body::lent::Cut;
use crate::clock::millis;
use crate::config::Limits;

/// The pieces of a body, at first and after one that took `SLOW`, and at most for a client that takes each within `AT_ONCE`, in bytes and milliseconds.
/// A client's window takes the beginning at once, however slowly the client takes the rest: so a piece is no larger than what was taken before it, and
/// there is more time for a larger one.
const SMALLEST_PIECE: u64 = 1 << 10;
const FIRST_PIECE: u64 = 16 << 10;
const LARGEST_PIECE: u64 = 128 << 10;
const AT_ONCE: u64 = 20;
/// Where any rate will do, this is the least that pieces are made for, in bytes a second.
const SLOWEST: u64 = 64;
const SLOW: u64 = 1000;

/// When a stream's client was last waited for. Moments are milliseconds after `start`, and at least one.
#[derive(Debug)]
pub struct Stream {
    start: Instant,
    silence: Duration,
    min_rate: u64,
    /// Since when bytes wait for the client; zero: none do.
    since: AtomicU64,
    /// For how long bytes waited, in milliseconds, since the rate was last computed, and how many the client took in that time.
    waited: AtomicU64,
    taken: AtomicU64,
    /// How many bytes wait, and how many were in the piece before.
    waiting: AtomicU64,
    before: AtomicU64,
    /// How many bytes the client has taken of all.
    all: AtomicU64,
    /// The next piece of a body.
    piece: AtomicU64,
    /// Whether it is to end, whatever its client takes, and told so.
    is_cut: AtomicBool,
    cut: Notify,
}

impl Stream {
    /// A stream that is opened now.
    #[must_use]
    pub fn new(limits: &Limits) -> Arc<Self> {
        let zero = || AtomicU64::new(0);
        Arc::new(Self {
            start: Instant::now(),
            silence: limits.stall_timeout,
            min_rate: limits.min_rate,
            since: zero(),
            waited: zero(),
            taken: zero(),
            waiting: zero(),
            before: zero(),
            all: zero(),
            piece: AtomicU64::new(first_piece(limits.min_rate, limits.stall_timeout)),
            is_cut: AtomicBool::new(false),
            cut: Notify::new(),
        })
    }

    fn now(&self) -> u64 {
        millis(self.start.elapsed()) + 1
    }

    /// The largest next piece of a body, in bytes.
    #[must_use]
    pub fn piece(&self) -> usize {
        usize::try_from(self.piece.load(Ordering::Relaxed)).unwrap_or(1 << 10)
    }

    /// This many bytes wait for the client from now on.
    pub fn gave(&self, bytes: usize) {
        self.waiting.store(bytes as u64, Ordering::Relaxed);
        self.since.store(self.now(), Ordering::Relaxed);
    }

    /// The client has taken what waited. Returns how many bytes more there is room for in its window: those of the piece before, since of
    /// this one it may be the first byte alone.
    pub fn took(&self) -> u64 {
        let since = self.since.swap(0, Ordering::Relaxed);
        if since == 0 {
            return 0;
        }
        let (waited, bytes) = (self.now().saturating_sub(since), self.waiting.load(Ordering::Relaxed));
        let all = self.all.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let first = || first_piece(self.min_rate, self.silence);
        if waited <= AT_ONCE {
            let larger = |piece: u64| Some((piece * 2).min(LARGEST_PIECE).min(all.max(first())));
            let _ = self.piece.fetch_update(Ordering::Relaxed, Ordering::Relaxed, larger);
        } else if waited >= SLOW {
            self.piece.store(first(), Ordering::Relaxed);
        }
        self.waited.fetch_add(waited, Ordering::Relaxed);
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        self.before.swap(bytes, Ordering::Relaxed)
    }

    /// How much longer than the longest silence a piece may take: nothing is seen of a client before it has all but the last of it.
    fn allowance(&self) -> Duration {
        let bytes = self.waiting.load(Ordering::Relaxed).saturating_sub(first_piece(self.min_rate, self.silence));
        Duration::from_millis(bytes * 1000 / (self.min_rate.max(SLOWEST) * 2))
    }

    /// Why the client is overdue, if it is: it has taken nothing for too long, or too little.
    fn is_overdue(&self) -> Option<Overdue> {
        let since = self.since.load(Ordering::Relaxed);
        let waits = Duration::from_millis(if since == 0 { 0 } else { self.now().saturating_sub(since) });
        if self.is_cut.load(Ordering::Relaxed) {
            return Some(Overdue::Unstored);
        }
        if waits >= self.silence + self.allowance() {
            return Some(Overdue::Stalled);
        }
        // What the client is taking now is not counted before it has all of it, neither bytes nor time.
        let waited = Duration::from_millis(self.waited.load(Ordering::Relaxed));
        if waited < self.silence {
            return None;
        }
        self.waited.store(0, Ordering::Relaxed);
        is_too_slow(self.taken.swap(0, Ordering::Relaxed), waited, self.min_rate).then_some(Overdue::Slow)
    }

    /// Waits until the client is overdue, and returns why.
    async fn overdue(&self) -> Overdue {
        // Often enough to see it soon after.
        let nap = (self.silence / 4).max(Duration::from_millis(10));
        loop {
            if let Some(why) = self.is_overdue() {
                return why;
            }
            let _ = timeout(nap, self.cut.notified()).await;
        }
    }
}

impl Cut for Stream {
    fn cut(&self) {
        self.is_cut.store(true, Ordering::Relaxed);
        self.cut.notify_one();
    }
}

/// A piece of which the slowest client that is tolerated takes two in the longest silence.
fn first_piece(min_rate: u64, silence: Duration) -> u64 {
    (min_rate.saturating_mul(silence.as_secs()) / 2).clamp(SMALLEST_PIECE, FIRST_PIECE)
}

/// Runs the streams of one connection, each until it ends or its client is overdue: then it is dropped, which resets it.
///
/// A connection may open a hundred streams at one time. They begin a few after another, each with a turn of its own at the thread: so those who
/// have one connection each do not wait for all streams of all others.
#[derive(Clone, Debug)]
pub struct Streams {
    opened: Arc<Mutex<Option<Arc<Stream>>>>,
    turns: Arc<Turns>,
    /// Counts those that are reset; `None`: nobody counts.
    closed: Option<IntCounterVec>,
}

/// How many streams of one connection begin at a time.
const AT_A_TIME: usize = 4;

#[derive(Debug)]
struct Turns {
    /// Held by the streams that begin.
    few: Semaphore,
    /// How many streams have not begun.
    waiting: AtomicU64,
}

impl Streams {
    /// Counts those that are reset in `closed`, by [why](Overdue::name).
    #[must_use]
    pub fn new(closed: Option<IntCounterVec>) -> Self {
        let turns = Turns { few: Semaphore::new(AT_A_TIME), waiting: AtomicU64::new(0) };
        Self { opened: Arc::default(), turns: Arc::new(turns), closed }
    }

    /// The library has read a request, and runs its stream next.
    pub fn open(&self, stream: Arc<Stream>) {
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }
}

impl<F> Executor<F> for Streams
where
    F: Future + Send + 'static,
{
    fn execute(&self, work: F) {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (turns, closed) = (Arc::clone(&self.turns), self.closed.clone());
        turns.waiting.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let mut work = pin!(work);
            // It is never closed.
            let turn = turns.few.acquire().await;
            let mut is_over = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx).is_ready())).await;
            if turns.waiting.fetch_sub(1, Ordering::Relaxed) > 1 {
                // The next one begins when all others of this thread have had a turn.
                let mut others = pin!(yield_now());
                poll_fn(|cx| {
                    is_over = is_over || work.as_mut().poll(cx).is_ready();
                    others.as_mut().poll(cx)
                })
                .await;
            }
            drop(turn);
            if is_over {
                return;
            }
            let Some(stream) = opened else {
                work.await;
                return;
            };
            if let Either::Quiet(why) = select(work, pin!(stream.overdue())).await {
                if let Some(closed) = closed {
                    closed.with_label_values(&[why.name()]).inc();
                }
                tracing::debug!(%why, "a stream was reset");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    fn stream() -> Arc<Stream> {
        let limits = crate::config::check("t", "[backend]\nurl='http://127.0.0.1:1'", &|_| None).config.unwrap().limits;
        Stream::new(&limits)
    }

    /// A client that takes `bytes` each time, every so often.
    async fn takes(stream: &Stream, bytes: usize, every: Duration) {
        loop {
            stream.gave(bytes);
            sleep(every).await;
            stream.took();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_or_too_little_is_overdue() {
        let s = Duration::from_secs;
        for (bytes, every, is_overdue) in
            [(1, s(3600), true), (300, s(3), true), (2000, s(3), false), (7000, s(12), false), (1, s(31), true)]
        {
            let stream = stream();
            let ended = timeout(s(600), async {
                tokio::select! {
                    _ = stream.overdue() => (),
                    () = takes(&stream, bytes, every) => (),
                }
            });
            assert_eq!(ended.await.is_ok(), is_overdue, "{bytes} B every {every:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_whose_window_took_the_beginning_at_once_is_not_overdue() {
        for (window, rate) in [(64 << 10, 900), (1 << 20, 900), (16 << 20, 900)] {
            let (stream, mut all) = (stream(), 0);
            let takes = async {
                for _ in 0..10_000 {
                    let piece = stream.piece();
                    stream.gave(piece);
                    all += piece as u64;
                    if all > window {
                        sleep(Duration::from_millis(piece as u64 * 1000 / rate)).await;
                    }
                    stream.took();
                }
            };
            tokio::select! {
                why = stream.overdue() => panic!("{window} and then {rate} a second: {why}"),
                () = takes => (),
            }
        }
    }

    #[tokio::test]
    async fn streams_of_many_connections_take_turns() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let connections = [(); 3].map(|()| Streams::new(None));
        for streams in &connections {
            for stream in 0..10 {
                let order = Arc::clone(&order);
                streams.execute(async move { order.lock().unwrap().push(stream) });
            }
        }
        while order.lock().unwrap().len() < 30 {
            tokio::task::yield_now().await;
        }
        let turns: Vec<_> = order.lock().unwrap().iter().map(|stream| stream / AT_A_TIME).collect();
        assert!(turns.is_sorted(), "{turns:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_upstream_takes_long_for_is_not_the_clients_fault() {
        let stream = stream();
        stream.gave(100);
        stream.took();
        assert!(timeout(Duration::from_secs(3600), stream.overdue()).await.is_err());
    }
}
