//! Large bodies that are stored, and lent to the clients that read them.
//!
//! A client that reads slowly keeps a body in memory that the cache has let go of: evicted, replaced or voided. Such bodies are bounded in
//! bytes for the whole process. Beyond that the clients that read the oldest ones are cut off.
//!
//! ```text
//! stored response ── Lender ─┐
//!                            ├─ Body: size, readers ── Let go of with its last Lender, gone with its last Reading
//! a client's answer ─ Reading┘
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};

/// Smaller bodies are not counted: what is sent of them mostly lies in the kernel.
pub const LARGE: usize = 64 << 10;
/// Bytes of all bodies that are read and not stored any more.
pub const MOST: usize = 64 << 20;
/// Clients have this much time for a body that was let go of, whatever else needs room.
const TIME_TO_READ: Duration = Duration::from_secs(2);
/// A list is tidied when it has this many more than were left the last time.
const UNTIDY: usize = 64;

/// What can be cut off because it reads too slowly: a connection, or a stream of one.
pub trait Cut: Send + Sync {
    /// Ends it, soon.
    fn cut(&self);
}

impl<C: Cut> Cut for Weak<C> {
    fn cut(&self) {
        if let Some(reader) = self.upgrade() {
            reader.cut();
        }
    }
}

/// A body for as long as it is stored. Clones are of one body.
#[derive(Clone)]
pub struct Lender(Arc<Stored>);

/// A body that a client reads.
pub struct Reading {
    body: Arc<Body>,
    /// What is cut off if the body has to go.
    reader: OnceLock<Box<dyn Cut>>,
}

struct Stored(Arc<Body>);

struct Body {
    size: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Those who can be cut off. Those that are over are taken out when there are `tidy_at`.
    readers: Vec<Weak<Reading>>,
    tidy_at: usize,
    /// Whether it is counted: let go of, and not cut.
    is_counted: bool,
}

/// Bytes, and the reading of them.
struct Lent(Bytes, #[expect(dead_code, reason = "held for its drop")] Arc<Reading>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Lender {
    /// A body of `size` bytes is stored; `None` if it is not large.
    #[must_use]
    pub fn new(size: usize) -> Option<Self> {
        let body = || Body { size, state: Mutex::default() };
        (size >= LARGE).then(|| Self(Arc::new(Stored(Arc::new(body())))))
    }

    /// The body for a client. It counts as read for as long as any part of the bytes that are returned is held.
    #[must_use]
    pub fn lend(&self, bytes: &Bytes) -> (Bytes, Arc<Reading>) {
        let reading = Arc::new(Reading { body: Arc::clone(&self.0.0), reader: OnceLock::new() });
        (Bytes::from_owner(Lent(bytes.clone(), Arc::clone(&reading))), reading)
    }
}

impl fmt::Debug for Lender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lender").field(&self.0.0.size).finish()
    }
}

/// It is no part of what two responses are compared by.
impl PartialEq for Lender {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        // With no client but this one it is gone now.
        if Arc::strong_count(&self.0) > 1 {
            LET_GO.add(&self.0);
        }
    }
}

impl Reading {
    /// Says what is to be cut off if the body has to go.
    pub fn is_for(self: &Arc<Self>, reader: impl Cut + 'static) {
        if self.reader.set(Box::new(reader)).is_err() {
            return;
        }
        let state = &mut *self.body.state();
        if state.readers.len() >= state.tidy_at {
            state.readers.retain(|reading| reading.strong_count() > 0);
            state.tidy_at = state.readers.len() * 2 + UNTIDY;
        }
        state.readers.push(Arc::downgrade(self));
    }
}

impl Body {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts off those that read it. It is not counted any more.
    fn cut(&self) {
        let readers = {
            let mut state = self.state();
            state.is_counted = false;
            std::mem::take(&mut state.readers)
        };
        let readers = readers.iter().filter_map(Weak::upgrade);
        readers.for_each(|reading| reading.reader.get().into_iter().for_each(|reader| reader.cut()));
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if self.state().is_counted {
            LET_GO.list().bytes -= self.size;
        }
    }
}

/// The bodies of this process that are read and not stored any more.
static LET_GO: LetGo = LetGo(Mutex::new(List { bytes: 0, bodies: VecDeque::new(), tidy_at: UNTIDY, is_timed: false }));

struct LetGo(Mutex<List>);

struct List {
    bytes: usize,
    /// The oldest first.
    bodies: VecDeque<(Instant, Weak<Body>)>,
    tidy_at: usize,
    /// Whether a task waits until the oldest ones have had their time.
    is_timed: bool,
}

impl List {
    /// Takes the oldest ones off that have had their time, if there are too many bytes.
    fn take_over(&mut self) -> Vec<Arc<Body>> {
        let mut over = Vec::new();
        while self.bytes > MOST && self.bodies.front().is_some_and(|(since, _)| since.elapsed() >= TIME_TO_READ) {
            let Some(oldest) = self.bodies.pop_front().and_then(|(_, body)| body.upgrade()) else { continue };
            self.bytes -= oldest.size;
            over.push(oldest);
        }
        over
    }

    /// When the oldest one will have had its time; `None` if there are not too many bytes, for which nobody waits then.
    fn due(&mut self) -> Option<Instant> {
        while self.bodies.front().is_some_and(|(_, body)| body.strong_count() == 0) {
            self.bodies.pop_front();
        }
        let due = self.bodies.front().filter(|_| self.bytes > MOST).map(|(since, _)| *since + TIME_TO_READ);
        self.is_timed = due.is_some();
        due
    }
}

/// The task that waits. If its runtime ends before it is done, what is let go of next begins another one.
struct Timed {
    is_done: bool,
}

impl Timed {
    /// Cuts off those that read the oldest bodies, once these have had their time, until there are not too many bytes.
    async fn wait(mut self) {
        while let Some(due) = LET_GO.due() {
            sleep_until(due).await;
            LET_GO.take_over().into_iter().for_each(|body| body.cut());
        }
        self.is_done = true;
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        if !self.is_done {
            LET_GO.list().is_timed = false;
        }
    }
}

/// Bytes of all bodies that are read and not stored any more.
#[must_use]
pub fn bytes() -> usize {
    LET_GO.list().bytes
}

impl LetGo {
    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn due(&self) -> Option<Instant> {
        self.list().due()
    }

    fn take_over(&self) -> Vec<Arc<Body>> {
        self.list().take_over()
    }

    /// A body is stored no more. Cuts off those that read the oldest ones, if there are too many bytes, now or when these have had their
    /// time.
    fn add(&self, body: &Arc<Body>) {
        body.state().is_counted = true;
        let mut list = self.list();
        list.bytes += body.size;
        list.bodies.push_back((Instant::now(), Arc::downgrade(body)));
        if list.bodies.len() >= list.tidy_at {
            list.bodies.retain(|(_, body)| body.strong_count() > 0);
            list.tidy_at = list.bodies.len() + UNTIDY;
        }
        let (over, was_timed) = (list.take_over(), list.is_timed);
        // Nothing may be let go of after this one.
        let begins = !was_timed && list.due().is_some();
        // What is dropped, or cut, may need the list itself.
        drop(list);
        over.into_iter().for_each(|body| body.cut());
        if begins {
            let timed = Timed { is_done: false };
            // A thread without a runtime has none to wait on: what is let go of next looks again.
            if let Ok(runtime) = Handle::try_current() {
                runtime.spawn(timed.wait());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Client(AtomicBool);

    impl Cut for Client {
        fn cut(&self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// One test alone, since the list is that of the process.
    #[tokio::test(start_paused = true)]
    async fn bodies_that_were_let_go_are_bounded_and_the_oldest_lose_their_readers() {
        let size = MOST / 4;
        let stored = Bytes::from(vec![7; LARGE]);
        assert!(Lender::new(LARGE - 1).is_none());
        let read = || {
            let client = Arc::new(Client::default());
            let lender = Lender::new(size).unwrap();
            let (bytes, reading) = lender.lend(&stored);
            reading.is_for(Arc::downgrade(&client));
            (client, lender, bytes)
        };
        // A client that has read all is not cut off for what others read.
        let done = Arc::new(Client::default());
        let of_done = Arc::downgrade(&done);
        let is_cut = |client: &Client| client.0.load(Ordering::Relaxed);
        let mut clients: Vec<_> = (0..6).map(|_| read()).collect();
        assert_eq!(bytes(), 0, "what is stored costs nothing");
        let (kept, (of_bytes, reading)) = (clients[0].1.clone(), clients[0].1.lend(&stored));
        reading.is_for(of_done);
        drop((kept, of_bytes, reading));
        assert_eq!(bytes(), 0, "it is stored still");
        let mut rest = Vec::new();
        for (client, lender, bytes) in clients.drain(..) {
            drop(lender);
            rest.push((client, bytes));
        }
        assert!(bytes() == size * 6 && rest.iter().all(|(client, _)| !is_cut(client)), "they have had no time");
        tokio::time::advance(TIME_TO_READ).await;
        let (client, lender, _last) = read();
        drop(lender);
        let cut: Vec<bool> = rest.iter().map(|(client, _)| is_cut(client)).collect();
        assert_eq!(cut, [true, true, true, false, false, false]);
        assert!(!is_cut(&client) && !is_cut(&done) && bytes() == MOST);
        // What was cut is counted no more; what was not is, until it is dropped.
        rest.truncate(4);
        assert_eq!(bytes(), 2 * size);
        drop((rest, _last));
        assert_eq!(bytes(), 0);
        // Many at once, and none after them.
        let burst: Vec<_> = (0..10).map(|_| read()).map(|(client, lender, bytes)| (client, bytes, drop(lender))).collect();
        assert_eq!(bytes(), size * 10);
        tokio::time::sleep(TIME_TO_READ * 2).await;
        assert_eq!(burst.iter().filter(|(client, ..)| is_cut(client)).count(), 6);
        assert_eq!(bytes(), MOST);
        drop(burst);
        // One that nobody reads is gone with what stores it.
        drop(Lender::new(size));
        assert_eq!(bytes(), 0);
    }
}
