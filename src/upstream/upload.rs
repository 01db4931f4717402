//! The body of a request on its way to the upstream: gathered first, so that a slow client takes nothing of the upstream's; and
//! with deadlines of the upstream's own, which do not run while it is the client that is waited for.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use prometheus::IntGauge;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::admission::Work;
use super::room::{Room, Taken};
use crate::body::{BoxError, ClientFault, Stream};

/// Bytes are added to a piece of a body until it has this size: many small ones would cost more than they hold.
const PIECE: usize = 16 << 10;

/// What a body is counted as besides its bytes: its request holds about so much while it is gathered, and over HTTP/2 one connection may bring
/// a hundred of them.
const FLOOR: usize = 16 << 10;

/// Memory for bodies that are gathered. One address may hold as much of it as it leaves free.
pub struct UploadRoom {
    /// The largest body that is gathered, in bytes.
    buffer: usize,
    room: Room,
}

/// The body of a request, as far as it was waited for.
pub struct Gathered {
    /// The body. It begins with what came.
    pub body: Stream,
    /// Whether all of it came.
    pub is_whole: bool,
}

impl UploadRoom {
    /// Room for bodies of up to `buffer` bytes, and of `memory` bytes together. `used` says how many are used.
    #[must_use]
    pub fn new(buffer: usize, memory: usize, used: IntGauge) -> Self {
        Self { buffer, room: Room::new(memory, used) }
    }

    /// Reads a body of a client at `address` until it ends, or is larger than is gathered, or there is no room for more of it.
    ///
    /// # Errors
    /// What the client did wrong.
    pub async fn gather(&self, address: Option<IpAddr>, mut body: Stream) -> Result<Gathered, ClientFault> {
        if body.is_end_stream() {
            return Ok(Gathered { body, is_whole: true });
        }
        let left = body.size_hint().exact();
        let taken = self.room.of(address);
        let mut came = Came { pieces: VecDeque::new(), trailers: None, rest: None, left, taken };
        // Of one that says that it is too large the beginning is waited for: its client sends.
        let (mut is_whole, most) = match left {
            Some(length) if length > self.buffer as u64 => (false, PIECE.min(self.buffer)),
            _ => (true, self.buffer),
        };
        let (mut read, mut has_room) = (0, came.taken.take(FLOOR));
        while has_room && read < most + usize::from(is_whole) && !body.is_end_stream() {
            let Some(frame) = body.frame().await else { break };
            match frame.map_err(|error| error.downcast_ref().copied().unwrap_or(ClientFault::Broken))?.into_data() {
                Ok(data) => {
                    read += data.len();
                    has_room = came.taken.take(data.len());
                    came.add(&data);
                }
                Err(frame) => came.trailers = frame.into_trailers().ok(),
            }
        }
        is_whole = is_whole && has_room && read <= self.buffer;
        if !is_whole {
            came.rest = Some(body);
        }
        Ok(Gathered { body: came.boxed_unsync(), is_whole })
    }
}

/// What came of a body, and the rest of it.
struct Came {
    pieces: VecDeque<BytesMut>,
    trailers: Option<HeaderMap>,
    rest: Option<Stream>,
    /// The bytes that are still to be read, if the body says its length.
    left: Option<u64>,
    taken: Taken,
}

impl Came {
    /// Copies bytes: as they arrived they are a slice of the connection's buffer, which they would keep alive.
    fn add(&mut self, bytes: &[u8]) {
        match self.pieces.back_mut() {
            Some(last) if last.len() + bytes.len() <= PIECE => last.extend_from_slice(bytes),
            _ if bytes.is_empty() => {}
            _ => self.pieces.push_back(BytesMut::from(bytes)),
        }
    }
}

impl Body for Came {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = if let Some(piece) = self.pieces.pop_front() {
            // What is sent is no longer held for a client that is slow to send the rest.
            self.taken.give_back(piece.len());
            Poll::Ready(Some(Ok(Frame::data(piece.freeze()))))
        } else if let Some(rest) = &mut self.rest {
            Pin::new(rest).poll_frame(cx)
        } else {
            Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
        };
        if let (Poll::Ready(Some(Ok(frame))), Some(left)) = (&polled, self.left) {
            self.left = Some(left.saturating_sub(frame.data_ref().map_or(0, Bytes::len) as u64));
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty() && self.trailers.is_none() && self.rest.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Whom a request waits for, and since when.
#[derive(Clone, Copy, Debug)]
enum Side {
    /// A connection, for which there is a deadline of its own.
    Connection(Instant),
    /// The client is to send more of its body, since this moment.
    Client(Instant),
    /// The upstream is to take what there is of the request, and to answer once it has all.
    Upstream(Instant),
}

/// How far a request is on its way. It goes along with the request to a [`Backend`](super::Backend), which may tell when it waits for a
/// connection.
#[derive(Debug)]
pub struct Progress {
    side: Mutex<Side>,
    gives_up: Notify,
}

/// An upload whose client sends nothing may have to give up its place, and so may a request that lasts.
impl Work for Progress {
    fn give_up(&self) -> bool {
        false
    }

    fn take_away(&self) -> bool {
        self.gives_up.notify_one();
        true
    }

    fn rests_since(&self) -> Option<Instant> {
        match *self.side() {
            Side::Client(since) => Some(since),
            Side::Connection(_) | Side::Upstream(_) => None,
        }
    }
}

impl Progress {
    /// The request begins now.
    #[must_use]
    pub fn begin() -> Arc<Self> {
        Arc::new(Self { side: Mutex::new(Side::Upstream(Instant::now())), gives_up: Notify::new() })
    }

    /// It waits for a connection, for which the backend gives itself so long.
    pub fn connects(&self, deadline: Duration) {
        self.set(Side::Connection(Instant::now() + deadline));
    }

    /// It has one, and is sent.
    pub fn is_sent(&self) {
        let mut side = self.side();
        // The connection may be reading the body by now, and wait for the client.
        if matches!(*side, Side::Connection(_)) {
            *side = Side::Upstream(Instant::now());
        }
    }

    fn set(&self, side: Side) {
        *self.side() = side;
    }

    /// The body's next piece came, or is waited for.
    fn moves(&self, is_awaited: bool) {
        let mut side = self.side();
        match *side {
            Side::Client(_) if is_awaited => {}
            _ if is_awaited => *side = Side::Client(Instant::now()),
            _ => *side = Side::Upstream(Instant::now()),
        }
    }

    /// Waits until the request has to give up its place.
    pub async fn given_up(&self) {
        self.gives_up.notified().await;
    }

    fn side(&self) -> MutexGuard<'_, Side> {
        self.side.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the upstream has been waited for longer than `patience`: without taking a byte of the request, or from the
    /// request's end on.
    pub async fn overdue(&self, patience: Duration) {
        loop {
            let now = Instant::now();
            // Whatever the upstream is waited for next began after now, so that this is early enough to look again.
            let mut next = now + patience;
            let side = *self.side();
            if let Side::Upstream(since) | Side::Connection(since) = side {
                if now >= since + patience {
                    return;
                }
                if matches!(side, Side::Upstream(_)) {
                    next = since + patience;
                }
            }
            sleep_until(next).await;
        }
    }
}

/// A body that notes how far it is.
pub struct Watched {
    inner: Stream,
    progress: Arc<Progress>,
}

impl Watched {
    /// The body of a request that is so far.
    #[must_use]
    pub const fn new(inner: Stream, progress: Arc<Progress>) -> Self {
        Self { inner, progress }
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        self.progress.moves(polled.is_pending());
        polled
    }

    /// The library asks this when it begins to send the request. Of a body without bytes it asks nothing else.
    fn is_end_stream(&self) -> bool {
        self.progress.is_sent();
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

    /// A body of pieces. After them it is silent, unless it ends there.
    struct Pieces(VecDeque<&'static [u8]>, bool);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            match self.0.pop_front() {
                Some(piece) => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(piece))))),
                None if self.1 => Poll::Ready(None),
                None => Poll::Pending,
            }
        }
    }

    fn body(pieces: &[&'static [u8]]) -> Stream {
        Pieces(pieces.iter().copied().collect(), true).boxed_unsync()
    }

    #[tokio::test]
    async fn what_fits_is_gathered_and_the_rest_follows_in_order() {
        for (buffer, memory, is_whole) in
            [(100, 4 * FLOOR, true), (6, 4 * FLOOR, true), (5, 4 * FLOOR, false), (100, 2 * FLOOR + 2, false), (0, 0, false)]
        {
            let used = IntGauge::new("a", "a").unwrap();
            let room = UploadRoom::new(buffer, memory, used.clone());
            let gathered = room.gather(None, body(&[b"ab", b"", b"cd", b"ef"])).await.unwrap();
            assert_eq!(gathered.is_whole, is_whole, "{buffer} {memory}");
            assert!(used.get() <= i64::try_from(memory).unwrap());
            assert_eq!(gathered.body.collect().await.unwrap().to_bytes(), "abcdef");
            assert_eq!(used.get(), 0);
        }
    }

    #[tokio::test]
    async fn of_one_that_is_too_large_the_beginning_is_waited_for() {
        let used = IntGauge::new("a", "a").unwrap();
        let room = UploadRoom::new(3, 1 << 20, used.clone());
        let gathered = room.gather(None, crate::body::full(Bytes::from_static(b"four"))).await.unwrap();
        assert!(!gathered.is_whole && gathered.body.size_hint().exact() == Some(4));
        assert!(timeout(Duration::from_secs(5), room.gather(None, Pieces([&b"ab"[..]].into(), false).boxed_unsync())).await.is_err());
        drop(gathered);
        assert!(used.get() == 0 && room.room.is_free());
    }

    #[tokio::test]
    async fn what_was_sent_is_held_no_longer() {
        let used = IntGauge::new("a", "a").unwrap();
        let room = UploadRoom::new(3, 1 << 20, used.clone());
        let mut gathered = room.gather(None, Pieces([&b"abc"[..], b"d"].into(), false).boxed_unsync()).await.unwrap();
        assert!(!gathered.is_whole && used.get() == 4 + i64::try_from(FLOOR).unwrap());
        assert!(gathered.body.frame().await.is_some() && used.get() == i64::try_from(FLOOR).unwrap());
    }

    #[tokio::test]
    async fn one_address_leaves_room_to_others() {
        let used = IntGauge::new("a", "a").unwrap();
        let room = UploadRoom::new(100, 4 * FLOOR + 400, used.clone());
        let address = |number: u8| Some(IpAddr::from([10, 0, 0, number]));
        let mut held = Vec::new();
        for (number, is_whole) in [(1, true), (1, true), (1, false), (2, true), (2, false)] {
            let gathered = room.gather(address(number), body(&[&b"ten bytes."[..]; 2])).await.unwrap();
            assert_eq!(gathered.is_whole, is_whole, "{number}, of {} used", used.get());
            held.push(gathered);
        }
        drop(held);
        assert!(used.get() == 0 && room.room.is_free());
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_of_the_upstream_runs_while_it_takes_nothing() {
        let (patience, hour) = (Duration::from_secs(3), Duration::from_secs(3600));
        let progress = Progress::begin();
        let mut watched = Watched::new(Pieces([&b"a"[..]].into(), false).boxed_unsync(), Arc::clone(&progress));
        assert!(timeout(hour, progress.overdue(patience)).await.is_ok(), "it was not asked for its first byte");
        assert!(watched.frame().await.is_some());
        assert!(timeout(hour, progress.overdue(patience)).await.is_ok(), "nor for the next");
        assert!(timeout(patience, watched.frame()).await.is_err());
        assert!(timeout(hour, progress.overdue(patience)).await.is_err(), "the client is waited for");
        progress.connects(hour * 2);
        assert!(timeout(hour, progress.overdue(patience)).await.is_err(), "a connection is waited for");
        let empty = Watched::new(crate::body::empty(), Arc::clone(&progress));
        let began = Instant::now();
        assert!(empty.is_end_stream(), "it is sent");
        progress.overdue(patience).await;
        assert_eq!(began.elapsed().as_secs(), 3);
        progress.connects(hour);
        assert!(timeout(hour * 2, progress.overdue(patience)).await.is_ok(), "no connection takes for ever");
    }
}
