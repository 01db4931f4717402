//! Keep-alive and stall deadlines: when a connection last moved, what it waits for, and when it is therefore overdue.
//!
//! Sockets and bodies note what happens in the connection's [`Activity`]. One [`watchdog`] a connection looks at that now and
//! then, so that requests need not touch a timer. Over HTTP/2 each stream has deadlines of its own ([`Stream`](super::stream::Stream)).
//!
//! That the kernel takes bytes says that the client takes them only while it holds few that are not sent: [`limit_unsent`].

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use http::Version;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::backlog::Backlog;
use crate::body::lent::Cut;
use crate::clock::millis;
use crate::config::Limits;

/// Writes of fewer bytes are no sign that an HTTP/2 client takes its responses: the reply to a ping may be as large.
const PING: usize = 256;

/// Bytes that the kernel may hold unsent. It asks for more once half of them are sent: a client at four times `min_rate` takes
/// that many within `stall_timeout`, by the defaults of both. Fewer would cost fast clients more turns.
const MOST_UNSENT: u32 = 96 << 10;

/// Why a connection, or a stream of one, is ended by Sluice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// A request's head does not come.
    Head,
    /// Nothing is asked.
    Idle,
    /// The client takes nothing of an answer.
    Stalled,
    /// It takes too little.
    Slow,
    /// It was idle, and another needs its place.
    GaveWay,
    /// What it reads is stored no more, and too much of that is held.
    Unstored,
}

impl Overdue {
    /// Every reason.
    pub const ALL: [Self; 6] = [Self::Head, Self::Idle, Self::Stalled, Self::Slow, Self::GaveWay, Self::Unstored];

    /// The value of the metric label `why`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Head => "header_timeout",
            Self::Idle => "idle_timeout",
            Self::Stalled => "stall_timeout",
            Self::Slow => "min_rate",
            Self::GaveWay => "gave_way",
            Self::Unstored => "unstored",
        }
    }
}

impl fmt::Display for Overdue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Head => "the request's head did not come in time (limits.header_timeout)",
            Self::Idle => "idle (limits.idle_timeout)",
            Self::Stalled => "the client takes no bytes (limits.stall_timeout)",
            Self::Slow => "the client takes bytes too slowly (limits.min_rate)",
            Self::GaveWay => "it was idle, and another needs its place (limits.connections)",
            Self::Unstored => "what it reads is stored no more, and too many bytes are kept for slow clients",
        })
    }
}

/// When a connection last moved, and what it waits for. Moments are milliseconds after `start`; zero means never.
pub struct Activity {
    start: Instant,
    /// The last byte read (HTTP/2: the last bytes of a response written).
    moved: AtomicU64,
    /// The end of the last response.
    answered: AtomicU64,
    /// The first byte read since the last response: a head is on its way. Over HTTP/2: the first byte of a block of fields that is not
    /// whole, whatever else is under way.
    head_since: AtomicU64,
    /// Since when bytes wait for the client to take them.
    blocked_since: AtomicU64,
    /// For how long bytes waited, in milliseconds, since the rate was last computed.
    waited: AtomicU64,
    /// How many bytes the client took since then.
    taken: AtomicU64,
    /// Requests being answered.
    in_flight: AtomicU64,
    /// Requests that the HTTP library has read.
    read: AtomicU64,
    /// Over HTTP/1: whether the library may have something of an answer that is not written.
    is_unwritten: AtomicBool,
    /// Whether the library's part of the connection is to end the next time that nothing is under way.
    to_rest: AtomicBool,
    /// Whether it is to end, whatever is under way.
    is_cut: AtomicBool,
    /// Told when it is to end: at once, or if it is idle.
    way: Notify,
    /// Over HTTP/2: what is ready to be written.
    pub backlog: Backlog,
}

impl Default for Activity {
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
            in_flight: zero(),
            read: zero(),
            is_unwritten: AtomicBool::new(false),
            to_rest: AtomicBool::new(false),
            is_cut: AtomicBool::new(false),
            way: Notify::new(),
            backlog: Backlog::default(),
        }
    }
}

impl Activity {
    /// Milliseconds since the connection was opened, at least one.
    fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    fn at(&self, moment: Instant) -> u64 {
        millis(moment.saturating_duration_since(self.start)) + 1
    }

    /// The HTTP library has read a request: its number on this connection, counted from one. Over HTTP/1 its answer is under way until
    /// it [is written](Self::did_flush): the library takes the whole of it long before.
    pub fn did_read_request(&self, http2: bool) -> u64 {
        if !http2 {
            self.is_unwritten.store(true, Ordering::Relaxed);
        }
        // Only the connection's own task counts, so that load and store suffice.
        let number = self.read.load(Ordering::Relaxed) + 1;
        self.read.store(number, Ordering::Relaxed);
        number
    }

    /// How many requests the HTTP library has answered, if none is being answered.
    #[must_use]
    pub fn all_answered(&self) -> Option<u64> {
        (self.in_flight.load(Ordering::Relaxed) == 0).then(|| self.read.load(Ordering::Relaxed))
    }

    /// The library has written all that it had. How many requests it has answered, if none is being answered.
    pub fn did_flush(&self) -> Option<u64> {
        let answered = self.all_answered();
        if answered.is_some() && self.is_unwritten.load(Ordering::Relaxed) {
            self.is_unwritten.store(false, Ordering::Relaxed);
            self.answered.store(self.now(), Ordering::Relaxed);
        }
        answered
    }

    /// Waits until no request has been under way, and no byte has come, for so long.
    pub async fn quiet_for(&self, span: Duration) {
        let mut left = millis(span);
        while left > 0 {
            sleep_until(Instant::now() + Duration::from_millis(left)).await;
            let since = self.idle_since().unwrap_or_else(|| self.now());
            left = millis(span).saturating_sub(self.now().saturating_sub(since));
        }
    }

    /// The library's part of the connection is to end, unless something comes first.
    pub fn rest(&self) {
        self.to_rest.store(true, Ordering::Relaxed);
    }

    /// Whether it is to end; asked once.
    pub fn is_to_rest(&self) -> bool {
        self.to_rest.load(Ordering::Relaxed) && self.to_rest.swap(false, Ordering::Relaxed)
    }

    /// The connection is to end if it is idle, since another needs its place.
    pub fn make_way(&self) {
        self.way.notify_one();
    }

    /// Waits until the connection is to end for others' sake, and returns why.
    pub async fn gives_way(&self) -> Overdue {
        loop {
            self.way.notified().await;
            if self.is_cut.load(Ordering::Relaxed) {
                return Overdue::Unstored;
            }
            if self.idle_for().is_some() {
                return Overdue::GaveWay;
            }
        }
    }

    /// A request that was read at `moment` was answered at once.
    pub fn did_answer(&self, moment: Instant) {
        let now = self.at(moment);
        self.moved.store(now, Ordering::Relaxed);
        self.answered.store(now, Ordering::Relaxed);
    }

    /// Bytes were read. Over HTTP/2 they may be pings, which keep nothing alive.
    pub fn did_read(&self, http2: bool) {
        if http2 {
            return;
        }
        let now = self.now();
        self.moved.store(now, Ordering::Relaxed);
        if self.in_flight.load(Ordering::Relaxed) == 0 && self.head_since.load(Ordering::Relaxed) == 0 {
            self.head_since.store(now, Ordering::Relaxed);
        }
    }

    /// Over HTTP/2: whether the bytes that were read end within a block of fields.
    pub fn is_within_fields(&self, within: bool) {
        let since = self.head_since.load(Ordering::Relaxed);
        if within && since == 0 {
            self.head_since.store(self.now(), Ordering::Relaxed);
        } else if !within && since != 0 {
            self.head_since.store(0, Ordering::Relaxed);
        }
    }

    /// Since when nothing has been under way, in milliseconds after the connection was opened; `None`: something is.
    fn idle_since(&self) -> Option<u64> {
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let is_written = load(&self.blocked_since) == 0 && !self.is_unwritten.load(Ordering::Relaxed);
        let is_idle = is_written && load(&self.in_flight) == 0 && load(&self.head_since) == 0;
        is_idle.then(|| load(&self.moved).max(load(&self.answered)))
    }

    /// For how long nothing has been under way; `None`: something is.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        self.idle_since().map(|since| Duration::from_millis(self.now().saturating_sub(since)))
    }

    /// Whether bytes wait for the client to take them.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked_since.load(Ordering::Relaxed) != 0
    }

    /// The client was sent bytes: how many it took, or that it takes none for now.
    pub fn did_write(&self, taken: Poll<usize>, http2: bool) {
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
        if http2 {
            self.backlog.wrote(taken as u64);
        }
        if http2 && taken >= PING {
            self.moved.store(self.now(), Ordering::Relaxed);
        }
    }

    /// When the connection is to be closed unless it moves, and why.
    fn deadline(&self, limits: &Limits) -> (u64, Overdue) {
        let after = |since: u64, span: Duration| since.saturating_add(millis(span));
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let blocked = match load(&self.blocked_since) {
            0 => (u64::MAX, Overdue::Stalled),
            since => (after(since, limits.stall_timeout), Overdue::Stalled),
        };
        let waiting = match (self.idle_since(), load(&self.head_since)) {
            (Some(since), _) => (after(since, limits.idle_timeout), Overdue::Idle),
            // Over HTTP/1 a head is on its way only while nothing is answered.
            (None, since) if since != 0 => (after(since, limits.header_timeout), Overdue::Head),
            (None, _) => (u64::MAX, Overdue::Idle),
        };
        if blocked.0 <= waiting.0 { blocked } else { waiting }
    }

    /// Whether the client, while it was waited for, took fewer bytes a second than `limits.min_rate`. Computed anew after
    /// every `stall_timeout` of waiting.
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

impl Cut for Activity {
    fn cut(&self) {
        self.is_cut.store(true, Ordering::Relaxed);
        self.way.notify_one();
    }
}

/// Whether this many bytes in this span are fewer than `rate` a second.
pub(super) fn is_too_slow(bytes: u64, span: Duration, rate: u64) -> bool {
    u128::from(bytes) * 1000 < u128::from(rate) * span.as_millis()
}

/// Returns why a connection is overdue, as soon as it is. Sleeps until the nearest deadline that there could be, then looks
/// again.
pub async fn watchdog(activity: &Activity, limits: &Limits) -> Overdue {
    let nap = limits.header_timeout.min(limits.idle_timeout).min(limits.stall_timeout);
    loop {
        let (deadline, why) = activity.deadline(limits);
        let now = activity.now();
        if now >= deadline {
            return why;
        }
        if activity.takes_too_little(limits) {
            return Overdue::Slow;
        }
        let next = Duration::from_millis(deadline - now).min(nap.max(Duration::from_millis(10)));
        sleep_until(Instant::now() + next).await;
    }
}

/// Has the kernel take bytes only while it holds few unsent: then that it takes some says that the client, or its kernel, has taken
/// others. Its buffer may hold megabytes, which a slow client takes minutes for.
pub fn limit_unsent(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_tcp_notsent_lowat(MOST_UNSENT) {
        tracing::debug!(%error, "TCP_NOTSENT_LOWAT");
    }
}

/// A request that is being answered, until this is dropped.
pub struct InFlight {
    activity: Arc<Activity>,
}

impl InFlight {
    /// What the connection has to write.
    #[must_use]
    pub fn backlog(&self) -> &Backlog {
        &self.activity.backlog
    }

    /// A request came.
    #[must_use]
    pub fn begin(activity: &Arc<Activity>, version: Version) -> Self {
        activity.in_flight.fetch_add(1, Ordering::Relaxed);
        if version != Version::HTTP_2 {
            activity.head_since.store(0, Ordering::Relaxed);
        }
        Self { activity: Arc::clone(activity) }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.activity.answered.store(self.activity.now(), Ordering::Relaxed);
        self.activity.in_flight.fetch_sub(1, Ordering::Relaxed);
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
        let idle = Activity::default();
        assert_eq!(watchdog(&idle, &limits).await, Overdue::Idle);
        let slow = Activity::default();
        slow.did_read(false);
        assert_eq!(watchdog(&slow, &limits).await, Overdue::Head);
        let stuck = Arc::new(Activity::default());
        let _in_flight = InFlight::begin(&stuck, Version::HTTP_11);
        stuck.did_write(Poll::Pending, false);
        assert_eq!(watchdog(&stuck, &limits).await, Overdue::Stalled);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_being_answered_is_left_in_peace() {
        let activity = Arc::new(Activity::default());
        let _in_flight = InFlight::begin(&activity, Version::HTTP_11);
        let hour = Duration::from_secs(3600);
        assert!(timeout(hour, watchdog(&activity, &limits())).await.is_err());
    }

    /// Takes `bytes` every other second, having been waited for in the second between.
    async fn takes(activity: &Activity, bytes: usize) {
        loop {
            activity.did_write(Poll::Pending, false);
            tokio::time::sleep(Duration::from_secs(1)).await;
            activity.did_write(Poll::Ready(bytes), false);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_counts_only_while_the_client_is_waited_for() {
        let limits = limits();
        let rate = usize::try_from(limits.min_rate).unwrap();
        for (bytes, closed) in [(rate / 2, true), (rate * 2, false)] {
            let activity = Arc::new(Activity::default());
            let _in_flight = InFlight::begin(&activity, Version::HTTP_11);
            let ended = tokio::select! {
                why = watchdog(&activity, &limits) => Some(why),
                () = takes(&activity, bytes) => None,
                () = tokio::time::sleep(Duration::from_secs(600)) => None,
            };
            assert_eq!(ended == Some(Overdue::Slow), closed, "{bytes}");
        }
    }
}
