//! A body on its way into the cache, while clients already read it.
//!
//! One writer, any number of readers, each at its own place. While the body may still be stored, all of it is held
//! (bounded by `max_object` and by a budget for all fills together). Once it turns out too large to store, what every
//! reader has passed is let go and the writer waits for the slowest: backpressure, constant memory.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::budget::Budget;
use crate::body::{BoxError, Stream};
use crate::cache::entry::Entry;
use crate::http::encoding::Coding;

use crate::upstream::failure::{BrokenBody, Failure};
use crate::upstream::selecting::Selected;

/// How long a body that cannot be stored waits for its first reader.
const FIRST_READER: Duration = Duration::from_secs(2);
/// A body whose end is not known is read for nobody for so long: it may never come.
const ALONE: Duration = Duration::from_secs(60);
/// How far the writer may be ahead of the slowest reader once the body is too large to store.
const WINDOW: usize = 256 << 10;

/// The head of the response whose body fills, and what is known of it.
#[derive(Debug)]
pub struct Head {
    /// Its status.
    pub status: StatusCode,
    /// Its end-to-end fields.
    pub fields: HeaderMap,
    /// The coding of its body.
    pub coding: Coding,
    /// The length it announces.
    pub length: Option<u64>,
    /// Whether it is meant to be stored.
    pub stored: bool,
    /// The request fields it varies by, and what the request that fetched it said in them.
    pub vary: (Vec<HeaderName>, Selected),
}

impl Head {
    /// This head before a body.
    #[must_use]
    pub fn response(&self, body: Stream) -> Response<Stream> {
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.fields.clone();
        response
    }
}

/// A body that fills.
pub struct Fill {
    /// The head that came before it.
    pub head: Head,
    max_object: usize,
    budget: Arc<Budget>,
    state: Mutex<State>,
    /// Wakes the writer when readers moved on or left.
    room: Notify,
    /// Wakes those who wait for the end.
    ended: Notify,
}

#[derive(Default)]
struct State {
    chunks: VecDeque<Bytes>,
    /// How many chunks were let go from the front.
    gone: usize,
    /// Bytes held now, and in all.
    held: usize,
    total: usize,
    /// Bytes of the budget that are ours.
    charged: usize,
    /// Why it is not held for the cache: what all have read is let go.
    passing: Option<NotHeld>,
    end: Option<Result<(), Failure>>,
    /// What was made of the body, once that is known: an entry, or nothing.
    settled: Option<Option<Arc<Entry>>>,
    readers: HashMap<u64, ReaderState>,
    next_reader: u64,
    /// When the last reader left.
    alone_since: Option<Instant>,
}

#[derive(Default)]
struct ReaderState {
    /// The next chunk to read, counted from the very first.
    next: usize,
    waker: Option<Waker>,
}

/// What became of a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The body is whole.
    Whole,
    /// The body is too large to be held; it passes by.
    Passing,
    /// The body broke off.
    Broken(Failure),
}

impl Fill {
    /// An empty fill and its writer.
    #[must_use]
    pub fn start(head: Head, max_object: usize, budget: Arc<Budget>) -> (Arc<Self>, Writer) {
        let passing = head.length.filter(|&length| length > max_object as u64).map(|_| NotHeld::TooLarge);
        let state = Mutex::new(State { passing, ..State::default() });
        let fill = Arc::new(Self { head, max_object, budget, state, room: Notify::new(), ended: Notify::new() });
        (Arc::clone(&fill), Writer(fill))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader from the first byte on; `None` if that was let go already.
    #[must_use]
    pub fn reader(self: &Arc<Self>) -> Option<Reader> {
        let mut state = self.state();
        if state.gone > 0 {
            return None;
        }
        let id = state.next_reader;
        state.next_reader += 1;
        state.readers.insert(id, ReaderState::default());
        state.alone_since = None;
        drop(state);
        self.room.notify_one();
        Some(Reader { fill: Arc::clone(self), id })
    }

    /// Waits until it is known whether the body is whole.
    pub async fn end(&self) -> End {
        loop {
            let ended = self.ended.notified();
            {
                let state = self.state();
                match state.end {
                    Some(Ok(())) => return End::Whole,
                    Some(Err(failure)) => return End::Broken(failure),
                    None if state.passing.is_some() => return End::Passing,
                    None => {}
                }
            }
            ended.await;
        }
    }

    /// How the body broke off, if it did.
    #[must_use]
    pub fn broken(&self) -> Option<Failure> {
        self.state().end.and_then(Result::err)
    }

    /// Says what was made of the body: the entry that was stored, or nothing.
    pub fn settle(&self, entry: Option<Arc<Entry>>) {
        self.state().settled = Some(entry);
        self.ended.notify_waiters();
    }

    /// Waits until it is known what was made of the body: the entry that was stored, or `None`.
    pub async fn settled(&self) -> Option<Arc<Entry>> {
        loop {
            let ended = self.ended.notified();
            {
                let state = self.state();
                if let Some(settled) = &state.settled {
                    return settled.clone();
                }
                if state.passing.is_some() || matches!(state.end, Some(Err(_))) {
                    return None;
                }
            }
            ended.await;
        }
    }

    fn finish(&self, result: Result<(), Failure>) {
        let mut state = self.state();
        if state.end.is_none() {
            state.end = Some(result);
            state.wake_readers();
        }
        drop(state);
        self.ended.notify_waiters();
    }
}

impl State {
    fn wake_readers(&mut self) {
        self.readers.values_mut().filter_map(|reader| reader.waker.take()).for_each(Waker::wake);
    }

    /// Lets go of what every reader has passed.
    fn let_go(&mut self) {
        let slowest = self.readers.values().map(|reader| reader.next).min().unwrap_or(self.gone);
        while self.gone < slowest {
            let Some(chunk) = self.chunks.pop_front() else { return };
            self.held -= chunk.len();
            self.gone += 1;
        }
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        let charged = self.state().charged;
        self.budget.give_back(charged);
    }
}

/// Fills the body. Dropped without having said how it ended, the body counts as broken off.
pub struct Writer(Arc<Fill>);

/// Why a body is not held for the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHeld {
    /// It is larger than what may be stored.
    TooLarge,
    /// Bodies on their way into the cache had all the room that they may have together. It says nothing of this one.
    NoRoom,
    /// Its end is not known, and nobody read it for long.
    Alone,
}

impl Writer {
    /// Adds bytes; once the body only passes by, waits until the slowest reader is near.
    ///
    /// # Errors
    /// Why it is not held, if nobody reads it either: the bytes are of use to nobody.
    pub async fn push(&self, chunk: Bytes) -> Result<(), NotHeld> {
        if chunk.is_empty() {
            return Ok(());
        }
        let fill = &self.0;
        {
            let mut state = fill.state();
            if fill.head.length.is_none() && state.alone_since.is_some_and(|since| since.elapsed() >= ALONE) {
                return Err(NotHeld::Alone);
            }
            state.total += chunk.len();
            state.held += chunk.len();
            let held = state.passing.is_none();
            if state.total > fill.max_object {
                state.passing = Some(NotHeld::TooLarge);
            } else if held && !fill.budget.take(chunk.len()) {
                state.passing = Some(NotHeld::NoRoom);
            }
            let storable = state.passing.is_none();
            if storable {
                state.charged += chunk.len();
            } else if held {
                fill.ended.notify_waiters();
            }
            // As it arrived it is a slice of the connection's buffer, which it would keep alive with all its slack.
            state.chunks.push_back(if storable { Bytes::copy_from_slice(&chunk) } else { chunk });
            state.wake_readers();
        }
        loop {
            let room = fill.room.notified();
            let why = {
                let mut state = fill.state();
                let Some(why) = state.passing else { return Ok(()) };
                state.let_go();
                if state.held <= WINDOW {
                    return Ok(());
                }
                if state.readers.is_empty() && state.next_reader > 0 {
                    return Err(why);
                }
                why
            };
            // The client that asked is about to read, unless it left before there was anything to read.
            let deadline = if fill.state().next_reader == 0 { FIRST_READER } else { Duration::MAX };
            if timeout(deadline, room).await.is_err() {
                return Err(why);
            }
        }
    }

    /// The body is whole. Returns its bytes.
    ///
    /// # Errors
    /// Why it was not held and only passed by.
    pub fn complete(self) -> Result<Bytes, NotHeld> {
        let whole = {
            let state = self.0.state();
            match (state.passing, state.chunks.front()) {
                (Some(why), _) => Err(why),
                (None, Some(only)) if state.chunks.len() == 1 => Ok(only.clone()),
                (None, _) => {
                    let mut whole = BytesMut::with_capacity(state.held);
                    state.chunks.iter().for_each(|chunk| whole.extend_from_slice(chunk));
                    Ok(whole.freeze())
                }
            }
        };
        self.0.finish(Ok(()));
        whole
    }

    /// The body broke off.
    pub fn fail(self, failure: Failure) {
        self.0.finish(Err(failure));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.finish(Err(Failure::Lost));
    }
}

/// Reads a fill from its first byte.
pub struct Reader {
    fill: Arc<Fill>,
    id: u64,
}

impl Body for Reader {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut guard = self.fill.state();
        let state = &mut *guard;
        let Some(reader) = state.readers.get_mut(&self.id) else { return Poll::Ready(None) };
        if let Some(chunk) = reader.next.checked_sub(state.gone).and_then(|at| state.chunks.get(at)) {
            let chunk = chunk.clone();
            reader.next += 1;
            if state.passing.is_some() {
                drop(guard);
                self.fill.room.notify_one();
            }
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        match state.end {
            Some(Ok(())) => Poll::Ready(None),
            Some(Err(failure)) => Poll::Ready(Some(Err(Box::new(BrokenBody(failure))))),
            None => {
                reader.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.fill.head.length {
            Some(length) => SizeHint::with_exact(length),
            None => SizeHint::default(),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        {
            let mut state = self.fill.state();
            state.readers.remove(&self.id);
            if state.readers.is_empty() {
                state.alone_since = Some(Instant::now());
            }
        }
        self.fill.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;
    use http_body_util::BodyExt;

    fn start(max_object: usize, limit: usize) -> (Arc<Fill>, Writer, Arc<Budget>) {
        let budget = Arc::new(Budget::new(limit, Arc::new(Metrics::new().unwrap())));
        let head = Head {
            status: StatusCode::OK,
            fields: HeaderMap::new(),
            coding: Coding::Identity,
            length: None,
            stored: true,
            vary: (Vec::new(), Selected::NOTHING),
        };
        let (fill, writer) = Fill::start(head, max_object, Arc::clone(&budget));
        (fill, writer, budget)
    }

    fn chunk(size: usize) -> Bytes {
        Bytes::from(vec![7; size])
    }

    #[tokio::test]
    async fn early_and_late_readers_get_every_byte() {
        let (fill, writer, budget) = start(1000, 1000);
        let early = fill.reader().unwrap();
        writer.push(chunk(300)).await.unwrap();
        writer.push(chunk(300)).await.unwrap();
        let late = fill.reader().unwrap();
        assert_eq!(writer.complete().unwrap().len(), 600);
        assert_eq!(early.collect().await.unwrap().to_bytes().len(), 600);
        assert_eq!(late.collect().await.unwrap().to_bytes().len(), 600);
        assert_eq!(fill.end().await, End::Whole);
        drop(fill);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_writer_that_dies_breaks_its_readers_off() {
        let (fill, writer, _) = start(1000, 1000);
        let reader = fill.reader().unwrap();
        writer.push(chunk(10)).await.unwrap();
        drop(writer);
        assert!(reader.collect().await.is_err());
        assert_eq!(fill.end().await, End::Broken(Failure::Lost));
    }

    #[tokio::test]
    async fn too_large_a_body_passes_in_constant_memory_at_the_readers_pace() {
        let (fill, writer, _) = start(WINDOW, usize::MAX);
        let mut reader = fill.reader().unwrap();
        let writing = tokio::spawn(async move {
            for _ in 0..100 {
                writer.push(chunk(WINDOW / 2)).await.unwrap();
            }
            writer.complete()
        });
        let mut read = 0;
        while let Some(frame) = reader.frame().await {
            read += frame.unwrap().into_data().unwrap().len();
            assert!(fill.state().held <= 2 * WINDOW, "{}", fill.state().held);
        }
        assert_eq!(read, 50 * WINDOW);
        assert_eq!(writing.await.unwrap(), Err(NotHeld::TooLarge));
        assert!(fill.reader().is_none());
    }

    #[tokio::test]
    async fn a_body_for_no_one_is_abandoned_and_one_for_the_cache_is_not() {
        let (fill, writer, _) = start(100, 1000);
        drop(fill.reader());
        writer.push(chunk(60)).await.unwrap();
        assert_eq!(writer.push(chunk(2 * WINDOW)).await, Err(NotHeld::TooLarge));
        assert_eq!(fill.end().await, End::Passing);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_without_a_known_end_is_not_read_for_nobody_for_long() {
        let (fill, writer, _) = start(1000, 1000);
        drop(fill.reader());
        tokio::time::advance(ALONE / 2).await;
        writer.push(chunk(1)).await.unwrap();
        let late = fill.reader();
        tokio::time::advance(ALONE).await;
        writer.push(chunk(1)).await.unwrap();
        drop(late);
        tokio::time::advance(ALONE).await;
        assert_eq!(writer.push(chunk(1)).await, Err(NotHeld::Alone));
    }

    #[tokio::test]
    async fn all_fills_together_stay_within_the_budget() {
        let (one, first, budget) = start(1000, 1000);
        first.push(chunk(900)).await.unwrap();
        let (other, second) = Fill::start(
            Head {
                status: StatusCode::OK,
                fields: HeaderMap::new(),
                coding: Coding::Identity,
                length: None,
                stored: true,
                vary: (Vec::new(), Selected::NOTHING),
            },
            1000,
            Arc::clone(&budget),
        );
        let reader = other.reader();
        second.push(chunk(200)).await.unwrap();
        assert_eq!(other.end().await, End::Passing);
        drop(reader);
        assert_eq!(second.complete(), Err(NotHeld::NoRoom));
        drop(one);
    }

    #[tokio::test]
    async fn a_body_without_room_is_too_large_only_if_it_is() {
        for (size, why) in [(50, NotHeld::NoRoom), (51, NotHeld::TooLarge)] {
            let (_fill, writer, _) = start(100, 10);
            writer.push(chunk(50)).await.unwrap();
            writer.push(chunk(size)).await.unwrap();
            assert_eq!(writer.complete(), Err(why), "{size}");
        }
        // Left by its reader before it says which.
        let (fill, writer, _) = start(9 * WINDOW, 10);
        drop(fill.reader());
        assert_eq!(writer.push(chunk(2 * WINDOW)).await, Err(NotHeld::NoRoom));
    }
}
