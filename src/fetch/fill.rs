//! A body on its way into the cache, while clients already read it.
//!
//! One writer, any number of readers, each at its own place; none of them waits for another. While the body may still be stored, all of
//! it is held (bounded by `max_object` and by a budget for all fills together). Once it turns out too large to store, or finds no room, it
//! passes by: the fastest reader says how fast it is read, and nothing is let go that this one has not read. What all have passed is let
//! go, and gives back its part of the budget. What the fastest reader has not read yet keeps its part, however slowly that one reads. Readers
//! that are behind have what else the body had of the budget, and a bounded overdraft of it; one that is further behind is cut off.
//!
//! What is held of a body that is stored, or will not be, is kept for those that still read it, and gives way to bodies on their way. So does
//! a body on its way that nobody reads any more: it goes on for the cache alone as long as nothing else needs its room.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::AGE;
use http::{HeaderMap, HeaderName, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::budget::{Budget, ForReaders, TIME_TO_READ};
use crate::body::{BoxError, Stream};
use crate::cache::entry::Entry;
use crate::http::encoding::Coding;
use crate::http::headers::age;
use crate::upstream::failure::{BrokenBody, Failure};
use crate::upstream::selecting::Selected;

/// How long a body that cannot be stored waits for its first reader.
const FIRST_READER: Duration = Duration::from_secs(2);
/// How long a body that will be stored is read for nobody: it may never end.
const ALONE: Duration = Duration::from_secs(60);
/// The same for one that says how long it is.
const ALONE_WITH_LENGTH: Duration = Duration::from_secs(300);
/// After this long a body that is on its way for nobody gives way to others that need its room.
const ALONE_AT_EASE: Duration = Duration::from_secs(2);
/// How far the writer may be ahead of the fastest reader once the body passes by, and another reader behind it with no room of its own.
const WINDOW: usize = 64 << 10;

/// The head of the response whose body fills, and what is known of it.
#[derive(Debug)]
pub struct Head {
    /// Its status.
    pub status: StatusCode,
    /// Its end-to-end fields.
    pub fields: HeaderMap,
    /// When it came.
    pub came: Instant,
    /// For how long from then those who come may have it; `None`: it is not stored, and has no life of its own.
    pub life: Option<Duration>,
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
    /// Whether its life is over, so that those who come now may not have it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.life.is_some_and(|life| self.came.elapsed() >= life)
    }

    /// This head before a body. Who gets it later than it came is told its age (RFC 9111 §5.1), and keeps it no longer than is right.
    #[must_use]
    pub fn response(&self, body: Stream) -> Response<Stream> {
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        let mut fields = self.fields.clone();
        let elapsed = self.came.elapsed();
        if elapsed >= Duration::from_secs(1) {
            fields.insert(AGE, age(&fields).saturating_add(elapsed).as_secs().into());
        }
        *response.headers_mut() = fields;
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
    /// Told when the last reader leaves.
    left: Notify,
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
    /// Bytes beyond the budget that are ours, for readers that are behind the fastest one.
    overdrawn: usize,
    /// Whether the budget knows it as one that may give way.
    queued: bool,
    /// Since when it is for its readers alone.
    for_readers_since: Option<Instant>,
    /// Why it is not held for the cache.
    passing: Option<NotHeld>,
    end: Option<Result<(), Failure>>,
    /// What was made of the body, once that is known: an entry, or nothing.
    settled: Option<Option<Arc<Entry>>>,
    readers: HashMap<u64, ReaderState>,
    next_reader: u64,
    /// Since when it has had no reader.
    alone_since: Option<Instant>,
    /// It was given up, since nobody read it. There are no readers from then on.
    given_up: bool,
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
    /// An empty fill and its writer. If the body is meant to be stored and says its length, it gets all its room now or none: then
    /// `head.stored` is no longer true.
    #[must_use]
    pub fn start(mut head: Head, max_object: usize, budget: Arc<Budget>) -> (Arc<Self>, Writer) {
        let length = head.length.map(|length| usize::try_from(length).unwrap_or(usize::MAX));
        let mut passing = length.filter(|&length| length > max_object).map(|_| NotHeld::TooLarge);
        let mut charged = 0;
        if let Some(length) = length.filter(|_| head.stored && passing.is_none()) {
            match budget.take(length, length) {
                true => charged = length,
                false => passing = Some(NotHeld::NoRoom),
            }
        }
        head.stored &= passing.is_none();
        // Nobody waits for what is made of a body that is not meant to be stored: once it is whole, it is for its readers alone.
        let settled = (!head.stored).then_some(None);
        let state = Mutex::new(State { charged, passing, settled, alone_since: Some(Instant::now()), ..State::default() });
        let (room, ended, left) = (Notify::new(), Notify::new(), Notify::new());
        let fill = Arc::new(Self { head, max_object, budget, state, room, ended, left });
        (Arc::clone(&fill), Writer(fill))
    }

    /// Why the body is not held for the cache, as far as that is known.
    #[must_use]
    pub fn passing(&self) -> Option<NotHeld> {
        self.state().passing
    }

    /// Waits until the body is of no use to anybody, and gives it up: nobody reads it, and it will not be stored (`is_stored`), or is
    /// read for nobody for too long.
    pub async fn useless(self: &Arc<Self>, is_stored: bool) {
        loop {
            let left = self.left.notified();
            let wait = {
                let mut state = self.state();
                if state.given_up {
                    return;
                }
                let patience = match (is_stored && state.passing.is_none(), state.next_reader) {
                    (true, _) if self.head.length.is_some() => ALONE_WITH_LENGTH,
                    (true, _) => ALONE,
                    (false, 0) => FIRST_READER,
                    (false, _) => Duration::ZERO,
                };
                let wait = state.alone_since.map(|since| patience.saturating_sub(since.elapsed()));
                if wait == Some(Duration::ZERO) {
                    state.given_up = true;
                    return;
                }
                if wait.is_some() {
                    self.queue(state);
                }
                wait
            };
            match wait {
                None => left.await,
                Some(wait) => drop(timeout(wait, left).await),
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader from the first byte on; `None` if that was let go already.
    #[must_use]
    pub fn reader(self: &Arc<Self>) -> Option<Reader> {
        let mut state = self.state();
        if state.gone > 0 || state.given_up {
            return None;
        }
        let id = state.next_reader;
        state.next_reader += 1;
        state.readers.insert(id, ReaderState::default());
        state.alone_since = None;
        drop(state);
        self.room.notify_one();
        Some(Reader { fill: Arc::clone(self), id, read: 0 })
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
    pub fn settle(self: &Arc<Self>, entry: Option<Arc<Entry>>) {
        let is_first = self.state().settled.replace(entry).is_none();
        self.ended.notify_waiters();
        if is_first {
            self.keep_for_readers();
        }
    }

    /// Gives back what it had of the budget, or keeps it until it is needed if there are readers. A body that is not stored yet has its
    /// bytes as before.
    fn keep_for_readers(self: &Arc<Self>) {
        let mut state = self.state();
        if !state.is_over() {
            return;
        }
        if state.readers.is_empty() {
            self.give_back(&mut state);
        } else {
            state.for_readers_since = Some(Instant::now());
            self.queue(state);
        }
    }

    /// Has its bytes of the budget kept until they are needed.
    fn queue(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.charged > 0 && !state.queued {
            state.queued = true;
            drop(state);
            let body = Arc::downgrade(self);
            self.budget.keep_for_readers(body);
        }
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

    /// Lets go of the first chunk that is held.
    fn drop_first(&mut self) -> bool {
        let Some(chunk) = self.chunks.pop_front() else { return false };
        self.held -= chunk.len();
        self.gone += 1;
        true
    }

    /// Lets go of what every reader has passed that was not cut off.
    fn let_go_of_passed(&mut self) {
        let slowest = self.readers.values().map(|reader| reader.next).filter(|&next| next >= self.gone).min().unwrap_or(self.gone);
        while self.gone < slowest && self.drop_first() {}
    }

    /// Lets go of what the fastest reader has passed, until readers are no more than `most` bytes behind it.
    fn cut_off_behind(&mut self, most: usize) {
        let fastest = self.fastest();
        while self.gone < fastest && self.behind() > most && self.drop_first() {}
    }

    /// Bytes that the fastest reader has read, and another has not.
    fn behind(&self) -> usize {
        self.held.saturating_sub(self.ahead())
    }

    /// The next chunk of the reader that has read most.
    fn fastest(&self) -> usize {
        self.readers.values().map(|reader| reader.next).max().unwrap_or(self.gone)
    }

    /// Whether its bytes are of use to its readers alone: no more will come, and none will be stored.
    fn is_over(&self) -> bool {
        match self.end {
            Some(Ok(())) => self.settled.is_some() || self.passing.is_some(),
            Some(Err(_)) => true,
            None => false,
        }
    }

    /// Whether it is on its way for nobody, and has been for a while.
    fn is_for_nobody(&self) -> bool {
        !self.is_over() && self.alone_since.is_some_and(|since| since.elapsed() >= ALONE_AT_EASE)
    }

    /// Bytes of the budget that it keeps while it passes by: for what the fastest reader has not read. Those would otherwise stay in memory
    /// and in no account, for as long as that reader likes.
    fn kept_for_fastest(&self) -> usize {
        self.charged.min(self.ahead().saturating_sub(WINDOW))
    }

    /// Bytes of the budget that readers have who are behind the fastest one.
    fn charged_for_behind(&self) -> usize {
        self.charged - self.kept_for_fastest()
    }

    /// Bytes that no reader has read.
    fn ahead(&self) -> usize {
        let fastest = self.fastest();
        self.chunks.iter().skip(fastest.saturating_sub(self.gone)).map(Bytes::len).sum()
    }
}

impl Fill {
    /// Gives back what it had of the budget, and beyond.
    fn give_back(&self, state: &mut State) {
        self.budget.give_back(std::mem::take(&mut state.charged));
        self.budget.give_back_overdrawn(std::mem::take(&mut state.overdrawn));
    }

    /// Lets go of what is not needed of a body that passes by, and gives back what it had for that.
    fn make_room(&self, state: &mut State) {
        state.let_go_of_passed();
        let most = WINDOW + state.charged_for_behind() + state.overdrawn;
        let missing = state.behind().saturating_sub(most);
        if missing > 0 {
            let is_bounded = state.charged + state.overdrawn + missing <= self.max_object;
            match is_bounded && self.budget.overdraw(missing) {
                true => state.overdrawn += missing,
                false => state.cut_off_behind(most),
            }
        }
        let charged = state.charged.min(state.held);
        self.budget.give_back(std::mem::replace(&mut state.charged, charged) - charged);
        let overdrawn = state.overdrawn.min(state.behind().saturating_sub(WINDOW + state.charged_for_behind()));
        self.budget.give_back_overdrawn(std::mem::replace(&mut state.overdrawn, overdrawn) - overdrawn);
    }
}

impl ForReaders for Fill {
    fn let_go(&self) {
        let mut state = self.state();
        if state.passing.is_some() {
            // Of a download that is under way nobody is cut off who keeps up with it.
            state.let_go_of_passed();
            let kept = state.kept_for_fastest();
            self.budget.give_back(std::mem::replace(&mut state.charged, kept) - kept);
            self.make_room(&mut state);
        } else if state.is_over() || state.is_for_nobody() {
            if !state.is_over() {
                // Its beginning is gone: it must not be stored, nor read.
                (state.given_up, state.passing) = (true, Some(NotHeld::NoRoom));
                self.left.notify_one();
            }
            while state.drop_first() {}
            self.give_back(&mut state);
        }
        state.wake_readers();
        drop(state);
        self.room.notify_one();
        self.ended.notify_waiters();
    }

    fn bytes(&self) -> usize {
        let state = self.state();
        let had_their_time = || state.for_readers_since.is_none_or(|since| since.elapsed() >= TIME_TO_READ);
        match state.passing {
            Some(_) if had_their_time() => state.charged_for_behind(),
            None if state.is_over() && had_their_time() || state.is_for_nobody() => state.charged,
            _ => 0,
        }
    }

    fn has_any(&self) -> bool {
        self.state().charged > 0
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.give_back(&mut state);
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
}

impl Writer {
    /// Adds bytes; once the body only passes by, waits until the fastest reader is near.
    ///
    /// # Errors
    /// Why it is not held, if nobody reads it either: the bytes are of use to nobody.
    pub async fn push(&self, chunk: Bytes) -> Result<(), NotHeld> {
        if chunk.is_empty() {
            return Ok(());
        }
        let fill = &self.0;
        self.add(chunk);
        loop {
            let room = fill.room.notified();
            let why = {
                let mut state = fill.state();
                let Some(why) = state.passing else { return Ok(()) };
                fill.make_room(&mut state);
                if state.ahead() <= WINDOW {
                    return Ok(());
                }
                if state.readers.is_empty() && state.next_reader > 0 {
                    return Err(why);
                }
                why
            };
            // The client that asked is about to read, unless it left before there was anything to read.
            let is_awaited = fill.state().next_reader == 0;
            tokio::select! {
                () = room => {}
                () = sleep(FIRST_READER), if is_awaited => return Err(why),
            }
        }
    }

    /// Adds bytes to what is held.
    fn add(&self, chunk: Bytes) {
        let fill = &self.0;
        let (total, missing) = {
            let state = fill.state();
            let total = state.total + chunk.len();
            let is_held = state.passing.is_none() && total <= fill.max_object;
            (total, if is_held { total.saturating_sub(state.charged) } else { 0 })
        };
        // Unlocked: to find room the budget looks at bodies that nobody reads, and this may be one of them.
        let size = fill.head.length.map_or(total, |length| usize::try_from(length).unwrap_or(usize::MAX));
        let has_room = missing == 0 || fill.budget.take(missing, size);
        let mut state = fill.state();
        state.total = total;
        state.held += chunk.len();
        let held = state.passing.is_none();
        if total > fill.max_object {
            state.passing = Some(NotHeld::TooLarge);
        } else if held && !has_room {
            state.passing = Some(NotHeld::NoRoom);
        }
        let storable = state.passing.is_none();
        if storable {
            state.charged += missing;
        } else {
            // It gave way meanwhile, or found no room.
            fill.budget.give_back(if has_room { missing } else { 0 });
            if held {
                fill.ended.notify_waiters();
            }
        }
        // As it arrived it is a slice of the connection's buffer, which it would keep alive with all its slack.
        state.chunks.push_back(if storable { Bytes::copy_from_slice(&chunk) } else { chunk });
        state.wake_readers();
        if held && !storable {
            // What it has of the budget is of use to its readers alone.
            state.for_readers_since = Some(Instant::now());
            fill.queue(state);
        }
    }

    /// The body is whole. Returns its bytes; none if it was not meant to be stored.
    ///
    /// # Errors
    /// Why it was not held and only passed by.
    pub fn complete(self) -> Result<Bytes, NotHeld> {
        let fill = &self.0;
        let whole = {
            let state = fill.state();
            match (state.passing, state.chunks.front()) {
                (Some(why), _) => Err(why),
                (None, _) if !fill.head.stored => Ok(Bytes::new()),
                (None, Some(only)) if state.chunks.len() == 1 => Ok(only.clone()),
                (None, _) => {
                    let mut whole = BytesMut::with_capacity(state.held);
                    state.chunks.iter().for_each(|chunk| whole.extend_from_slice(chunk));
                    // Readers read on in what came: a slice of the whole would keep all of it for one that is slow.
                    Ok(whole.freeze())
                }
            }
        };
        fill.finish(Ok(()));
        fill.keep_for_readers();
        whole
    }

    /// The body broke off.
    pub fn fail(self, failure: Failure) {
        self.0.finish(Err(failure));
        self.0.keep_for_readers();
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
    /// How many bytes it has read.
    read: u64,
}

impl Body for Reader {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let mut guard = this.fill.state();
        let state = &mut *guard;
        let Some(reader) = state.readers.get_mut(&this.id) else { return Poll::Ready(None) };
        if reader.next < state.gone {
            let why = if state.passing.is_some() { Failure::Lost } else { Failure::Overloaded };
            return Poll::Ready(Some(Err(Box::new(BrokenBody(why)))));
        }
        if let Some(chunk) = state.chunks.get(reader.next - state.gone) {
            let chunk = chunk.clone();
            reader.next += 1;
            this.read += chunk.len() as u64;
            if state.passing.is_some() {
                if state.end.is_some() {
                    // The writer does it no more.
                    this.fill.make_room(state);
                }
                drop(guard);
                this.fill.room.notify_one();
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
            Some(length) => SizeHint::with_exact(length.saturating_sub(self.read)),
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
                if state.is_over() {
                    self.fill.give_back(&mut state);
                }
            } else if state.passing.is_some() {
                self.fill.make_room(&mut state);
            }
        }
        self.fill.room.notify_one();
        self.fill.left.notify_one();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;
    use http_body_util::BodyExt;

    /// The head of a response that is meant to be stored.
    pub fn head() -> Head {
        Head {
            status: StatusCode::OK,
            fields: HeaderMap::new(),
            came: Instant::now(),
            life: None,
            coding: Coding::Identity,
            length: None,
            stored: true,
            vary: (Vec::new(), Selected::NOTHING),
        }
    }

    fn start(max_object: usize, limit: usize) -> (Arc<Fill>, Writer, Arc<Budget>) {
        let budget = Arc::new(Budget::new(limit, Arc::new(Metrics::new().unwrap())));
        let (fill, writer) = Fill::start(head(), max_object, Arc::clone(&budget));
        (fill, writer, budget)
    }

    /// After this long a body that is for its readers alone gives way.
    const TIME: Duration = Duration::from_secs(2);

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

    /// A body of unknown length that nobody reads gives way to others, and so to itself. It must not wait for itself.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_body_that_nobody_reads_finds_itself_when_it_looks_for_room() {
        let (fill, writer, budget) = start(1000, 1000);
        writer.push(chunk(400)).await.unwrap();
        let useless = tokio::spawn({
            let fill = Arc::clone(&fill);
            async move { fill.useless(true).await }
        });
        while !fill.state().queued {
            tokio::task::yield_now().await;
        }
        let past = Instant::now().checked_sub(TIME * 2).unwrap();
        fill.state().alone_since = Some(past);
        budget.age(TIME * 2);
        assert!(budget.take(600, usize::MAX));
        let (told, pushed) = std::sync::mpsc::channel();
        // A thread of its own: one that waits for itself would take a worker with it.
        std::thread::spawn(move || {
            writer.add(chunk(600));
            told.send(writer).unwrap();
        });
        let writer = pushed.recv_timeout(Duration::from_secs(20)).expect("the writer waits for itself");
        assert_eq!((fill.passing(), budget.used()), (Some(NotHeld::NoRoom), 600));
        useless.await.unwrap();
        drop((writer, fill));
        assert_eq!(budget.used(), 600);
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

    #[tokio::test(start_paused = true)]
    async fn a_body_on_its_way_for_nobody_gives_way_to_one_that_is_read() {
        let (slow, writer, budget) = start(1000, 1000);
        writer.push(chunk(800)).await.unwrap();
        let reader = slow.reader().unwrap();
        let useless = tokio::spawn({
            let slow = Arc::clone(&slow);
            async move { slow.useless(true).await }
        });
        let other = || Fill::start(Head { length: Some(500), ..head() }, 1000, Arc::clone(&budget));
        tokio::time::sleep(TIME * 2).await;
        assert!(!other().0.head.stored, "it is read");
        drop(reader);
        tokio::time::sleep(TIME / 2).await;
        assert!(!other().0.head.stored, "another reader may come");
        let reader = slow.reader().unwrap();
        tokio::time::sleep(TIME * 2).await;
        assert!(!other().0.head.stored, "one came");
        drop(reader);
        tokio::time::sleep(TIME).await;
        assert!(!useless.is_finished(), "nothing else needs its room");
        let (stored, _writer) = other();
        assert!(stored.head.stored && budget.used() == 500);
        useless.await.unwrap();
        assert!(slow.reader().is_none());
        writer.push(chunk(10)).await.unwrap();
        assert_eq!(writer.complete(), Err(NotHeld::NoRoom), "its beginning is gone");
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
    async fn a_body_that_is_of_no_use_is_given_up() {
        let useless = |fill: Arc<Fill>, is_stored| async move {
            let since = Instant::now();
            fill.useless(is_stored).await;
            assert!(fill.reader().is_none(), "nobody joins it any more");
            since.elapsed()
        };
        // Without a reader, and after the last has left; to be stored, or not.
        let (fill, _writer, _) = start(1000, 1000);
        assert_eq!(useless(Arc::clone(&fill), false).await, FIRST_READER);
        for (is_stored, patience) in [(false, Duration::ZERO), (true, ALONE)] {
            let (fill, _writer, _) = start(1000, 1000);
            let reader = fill.reader();
            assert!(timeout(ALONE * 10, fill.useless(is_stored)).await.is_err(), "it is read");
            drop(reader);
            assert_eq!(useless(fill, is_stored).await, patience);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_late_is_told_the_age_of_the_head() {
        let mut head = head();
        let told = |head: &Head| head.response(crate::body::empty()).headers().get(AGE).map(|age| age.to_str().unwrap().to_owned());
        tokio::time::advance(Duration::from_millis(999)).await;
        assert_eq!(told(&head), None);
        tokio::time::advance(Duration::from_secs(50)).await;
        assert_eq!(told(&head).as_deref(), Some("50"));
        head.fields.insert(AGE, 7.into());
        assert_eq!(told(&head).as_deref(), Some("57"));
    }

    #[tokio::test]
    async fn chunks_larger_than_the_window_reach_a_reader_that_keeps_up() {
        let (fill, writer, _) = start(WINDOW, usize::MAX);
        let mut reader = fill.reader().unwrap();
        let writing = tokio::spawn(async move {
            for _ in 0..20 {
                writer.push(chunk(5 * WINDOW)).await.unwrap();
            }
            writer.complete()
        });
        let mut read = 0;
        while let Some(frame) = reader.frame().await {
            read += frame.expect("no reader is cut off that is the fastest").into_data().unwrap().len();
        }
        assert_eq!((read, writing.await.unwrap()), (100 * WINDOW, Err(NotHeld::TooLarge)));
    }

    #[tokio::test]
    async fn a_reader_that_is_too_far_behind_is_cut_off_and_the_other_does_not_wait() {
        let (fill, writer, _) = start(WINDOW, usize::MAX);
        let (mut fast, mut slow) = (fill.reader().unwrap(), fill.reader().unwrap());
        for _ in 0..100 {
            writer.push(chunk(WINDOW / 2)).await.unwrap();
            assert!(fast.frame().await.unwrap().is_ok());
            assert!(fill.state().held <= 3 * WINDOW, "{}", fill.state().held);
        }
        assert!(slow.frame().await.unwrap().is_err(), "a gap is no body");
        assert_eq!(writer.complete(), Err(NotHeld::TooLarge));
        assert!(fast.frame().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_whole_gives_way_to_one_on_its_way() {
        const LARGE: usize = 1 << 20;
        let (one, first, budget) = start(LARGE, LARGE);
        let (mut idle, mut done) = (one.reader().unwrap(), one.reader().unwrap());
        first.push(chunk(LARGE)).await.unwrap();
        assert!(done.frame().await.unwrap().is_ok());
        assert_eq!(first.complete().unwrap().len(), LARGE);
        assert_eq!(budget.used(), LARGE);
        let head = |length| Head { length: Some(length), ..head() };
        // Not before it is stored, and its readers had their time. Small ones have room in any case.
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(!Fill::start(head(200_000), LARGE, Arc::clone(&budget)).0.head.stored);
        one.settle(None);
        assert!(Fill::start(head(200), LARGE, Arc::clone(&budget)).0.head.stored);
        assert!(!Fill::start(head(200_000), LARGE, Arc::clone(&budget)).0.head.stored);
        tokio::time::advance(Duration::from_secs(2)).await;
        let (other, second) = Fill::start(head(200_000), LARGE, Arc::clone(&budget));
        assert!(other.head.stored && budget.used() == 200_000);
        assert!(idle.frame().await.unwrap().is_err() && done.frame().await.is_none());
        drop((second, other));
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_download_under_way_gives_its_room_back_and_loses_nothing_that_nobody_has_read() {
        const LARGE: usize = 20 * WINDOW;
        let (passing, writer, budget) = start(LARGE, LARGE);
        let mut reader = passing.reader().unwrap();
        for _ in 0..40 {
            writer.push(chunk(WINDOW / 2)).await.unwrap();
        }
        for _ in 0..39 {
            assert!(reader.frame().await.unwrap().is_ok());
        }
        // One chunk more, and it is too large.
        writer.push(chunk(WINDOW / 2)).await.unwrap();
        assert_eq!((passing.end().await, budget.used()), (End::Passing, WINDOW), "what is held still");
        tokio::time::advance(TIME).await;
        let (other, _second) = Fill::start(Head { length: Some(LARGE as u64), ..head() }, LARGE, Arc::clone(&budget));
        assert!(other.head.stored && budget.used() == LARGE);
        for _ in 0..2 {
            assert!(reader.frame().await.unwrap().is_ok(), "it was read by nobody yet");
        }
        assert_eq!(writer.complete(), Err(NotHeld::TooLarge));
        assert!(reader.frame().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_fastest_reader_has_not_read_stays_charged_until_it_has() {
        const LARGE: usize = 20 * WINDOW;
        let (passing, writer, budget) = start(LARGE, LARGE);
        let (mut reader, mut slow) = (passing.reader().unwrap(), passing.reader().unwrap());
        for _ in 0..20 {
            writer.push(chunk(WINDOW)).await.unwrap();
        }
        let writing = tokio::spawn(async move { writer.push(chunk(WINDOW)).await });
        assert_eq!(passing.end().await, End::Passing);
        let begin = || Fill::start(Head { length: Some(5 * WINDOW as u64), ..head() }, LARGE, Arc::clone(&budget));
        let is_accounted = || {
            let state = passing.state();
            assert_eq!(state.charged, budget.used());
            assert!(state.held <= state.charged + state.overdrawn + 3 * WINDOW, "{} {}", state.held, state.charged);
        };
        for _ in 0..2 {
            tokio::time::advance(TIME).await;
            passing.let_go();
            assert!(!begin().0.head.stored, "nothing of it can be let go");
            is_accounted();
        }
        // What was read by one of them can be had, although it could not before.
        for _ in 0..6 {
            assert!(reader.frame().await.unwrap().is_ok());
        }
        tokio::time::advance(TIME).await;
        assert!(begin().0.head.stored);
        is_accounted();
        assert!(slow.frame().await.unwrap().is_ok(), "it has the overdraft");
        for _ in 0..15 {
            assert!(reader.frame().await.unwrap().is_ok(), "it was read by nobody yet");
        }
        assert!(writing.await.unwrap().is_ok());
        drop((reader, slow, passing));
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_download_waits_for_its_reader_whatever_is_stored_meanwhile() {
        const LARGE: usize = 20 * WINDOW;
        let (passing, writer, budget) = start(WINDOW, LARGE);
        let mut reader = passing.reader().unwrap();
        writer.push(chunk(WINDOW)).await.unwrap();
        assert!(reader.frame().await.unwrap().is_ok());
        writer.push(chunk(WINDOW)).await.unwrap();
        assert_eq!(writer.complete(), Err(NotHeld::TooLarge));
        tokio::time::advance(TIME).await;
        assert!(Fill::start(Head { length: Some(LARGE as u64), ..head() }, LARGE, Arc::clone(&budget)).0.head.stored);
        assert!(reader.frame().await.unwrap().is_ok() && reader.frame().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_shared_and_not_stored_gives_way_once_it_is_whole() {
        const LARGE: usize = 1 << 20;
        let budget = Arc::new(Budget::new(LARGE, Arc::new(Metrics::new().unwrap())));
        let (shared, writer) = Fill::start(Head { stored: false, ..head() }, LARGE, Arc::clone(&budget));
        let _idle = shared.reader().unwrap();
        writer.push(chunk(LARGE)).await.unwrap();
        assert!(writer.complete().unwrap().is_empty() && budget.used() == LARGE);
        assert!(timeout(TIME, shared.settled()).await.is_ok_and(|entry| entry.is_none()));
        tokio::time::advance(TIME).await;
        assert!(Fill::start(Head { length: Some(LARGE as u64), ..head() }, LARGE, Arc::clone(&budget)).0.head.stored);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_cut_off_where_that_would_not_do() {
        const LARGE: usize = 1 << 20;
        let (idle, first, budget) = start(LARGE, LARGE);
        let reader = idle.reader().unwrap();
        first.push(chunk(LARGE / 4)).await.unwrap();
        first.complete().unwrap();
        idle.settle(None);
        let begin = |length: usize| Fill::start(Head { length: Some(length as u64), ..head() }, 2 * LARGE, Arc::clone(&budget));
        let under_way = begin(LARGE / 2);
        tokio::time::advance(TIME).await;
        assert!(!begin(LARGE * 3 / 4).0.head.stored && !begin(LARGE * 2).0.head.stored);
        assert_eq!(reader.collect().await.unwrap().to_bytes().len(), LARGE / 4);
        drop((under_way, idle));
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn those_who_follow_a_body_without_room_may_be_behind_by_a_bounded_overdraft() {
        let (fill, writer, budget) = start(64 * WINDOW, 16 * WINDOW);
        // All the room, but for a little.
        assert!(budget.take(15 * WINDOW, usize::MAX));
        let (mut fast, mut slow, mut slower) = (fill.reader().unwrap(), fill.reader().unwrap(), fill.reader().unwrap());
        for number in 0..6 {
            writer.push(chunk(WINDOW)).await.unwrap();
            assert!(fast.frame().await.unwrap().is_ok(), "{number}");
        }
        assert_eq!(fill.end().await, End::Passing);
        for _ in 0..6 {
            assert!(slow.frame().await.unwrap().is_ok(), "it was there when the body turned passing");
        }
        for _ in 0..10 {
            writer.push(chunk(WINDOW)).await.unwrap();
            assert!(fast.frame().await.unwrap().is_ok() && slow.frame().await.unwrap().is_ok());
            assert!(fill.state().held <= 8 * WINDOW, "{}", fill.state().held);
        }
        assert!(slower.frame().await.unwrap().is_err(), "it is further behind than that");
        assert_eq!(writer.complete(), Err(NotHeld::NoRoom));
        assert!(fast.frame().await.is_none() && slow.frame().await.is_none());
        drop((fast, slow, slower, fill));
        assert!(budget.used() == 15 * WINDOW && budget.overdraw(4 * WINDOW), "all of it was given back");
    }

    #[tokio::test]
    async fn room_for_a_length_that_is_known_is_taken_at_once_or_not_at_all() {
        let budget = Arc::new(Budget::new(1 << 20, Arc::new(Metrics::new().unwrap())));
        let start = |length| Fill::start(Head { length: Some(length), ..head() }, 900_000, Arc::clone(&budget));
        let (first, _writing) = start(800_000);
        assert!(first.head.stored && first.passing().is_none() && budget.used() == 800_000);
        for (length, why) in [(300_000, NotHeld::NoRoom), (900_001, NotHeld::TooLarge)] {
            let (other, _writer) = start(length);
            assert!(!other.head.stored && other.passing() == Some(why) && budget.used() == 800_000);
        }
    }

    #[tokio::test]
    async fn all_fills_together_stay_within_the_budget() {
        let (one, first, budget) = start(1000, 1000);
        first.push(chunk(900)).await.unwrap();
        let (other, second) = Fill::start(head(), 1000, Arc::clone(&budget));
        let reader = other.reader();
        second.push(chunk(400)).await.unwrap();
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
