//! Room to compute answers in: memory, until clients have taken them, and turns on the cores.
//!
//! An answer takes the memory that it can need at most before anything of it is made, and gives back what it turned out not to need. Who finds
//! none waits a little, in a queue that is bounded in bytes as the memory is, and then is told: computing first and throwing away when there is
//! no room would make work of overload.
//!
//! Small answers have memory, and a core, that large ones never take. So they go on while large ones pile up before clients that are slow to take
//! theirs.

use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::body::lent;

/// Answers that need no more than this are small, in KiB: a day of minutes, or a page of 1,000 orders.
const SMALL: u32 = 2 << 10;
/// An answer waits so long for memory, and for its turn.
const WAIT: Duration = Duration::from_millis(500);
/// Memory for small answers that are being made and sent, in bytes.
const FOR_SMALL: usize = 16 << 20;
/// The same for large ones: what slow clients may keep of them. The longest answer has room in it.
const FOR_LARGE: usize = lent::MOST;

/// Memory for answers of one class, in permits of a KiB.
struct Class {
    memory: Arc<Semaphore>,
    /// What those who wait want together, at most as much as there is.
    queue: Arc<Semaphore>,
    size: usize,
}

/// Room for answers that are made, and for those that clients take.
pub struct Room {
    small: Class,
    large: Class,
    /// As many answers are computed at a time as there are cores, and all but one of these may be large.
    turns: Arc<Semaphore>,
    large_turns: Arc<Semaphore>,
    cores: usize,
}

/// Room of one answer.
pub struct Place {
    memory: OwnedSemaphorePermit,
    turn: Vec<OwnedSemaphorePermit>,
    is_large: bool,
}

/// How much of the room is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Bytes that answers take, or may need.
    pub bytes: usize,
    /// Bytes that those who wait want.
    pub waiting: usize,
    /// Answers that are being computed.
    pub computing: usize,
}

impl Class {
    fn new(kibibytes: usize) -> Self {
        let size = kibibytes.min(Semaphore::MAX_PERMITS);
        Self { memory: Arc::new(Semaphore::new(size)), queue: Arc::new(Semaphore::new(size)), size }
    }

    fn take_now(&self, kibibytes: u32) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.memory).try_acquire_many_owned(kibibytes).ok()
    }

    async fn take(&self, kibibytes: u32) -> Option<OwnedSemaphorePermit> {
        let _queued = self.queue.try_acquire_many(kibibytes).ok()?;
        timeout(WAIT, Arc::clone(&self.memory).acquire_many_owned(kibibytes)).await.ok()?.ok()
    }

    fn taken(&self) -> usize {
        self.size.saturating_sub(self.memory.available_permits())
    }

    fn waiting(&self) -> usize {
        self.size.saturating_sub(self.queue.available_permits())
    }
}

impl Room {
    /// Room for answers of which `kept` bytes are kept for a moment: these may be of either class, and never take what is for those that are being
    /// made and sent.
    #[must_use]
    pub fn new(kept: u64) -> Self {
        let kept = usize::try_from(kept).unwrap_or(usize::MAX);
        let cores = available_parallelism().map_or(2, usize::from).max(2);
        Self::with([FOR_SMALL, FOR_LARGE].map(|bytes| bytes.saturating_add(kept)), cores)
    }

    fn with([small, large]: [usize; 2], cores: usize) -> Self {
        Self {
            small: Class::new(small / 1024),
            large: Class::new(large / 1024),
            turns: Arc::new(Semaphore::new(cores)),
            large_turns: Arc::new(Semaphore::new(cores - 1)),
            cores,
        }
    }

    /// Memory for an answer that needs at most `bytes` while it is made. `None`: there is none, and none came free in a while.
    pub async fn reserve(&self, bytes: usize) -> Option<Place> {
        let kibibytes = u32::try_from(bytes.div_ceil(1024).max(1)).ok()?;
        let is_large = kibibytes > SMALL;
        let (class, other) = if is_large { (&self.large, None) } else { (&self.small, Some(&self.large)) };
        let now = class.take_now(kibibytes).or_else(|| other?.take_now(kibibytes));
        let memory = match now {
            Some(memory) => memory,
            None => class.take(kibibytes).await?,
        };
        Some(Place { memory, turn: Vec::new(), is_large })
    }

    /// Waits for the turn to compute, for an answer that has memory. `None`: it did not come in a while.
    pub async fn turn(&self, mut place: Place) -> Option<Place> {
        let taking = async {
            let large = if place.is_large { Some(Arc::clone(&self.large_turns).acquire_owned().await.ok()?) } else { None };
            let turn = Arc::clone(&self.turns).acquire_owned().await.ok()?;
            Some(large.into_iter().chain([turn]).collect())
        };
        place.turn = timeout(WAIT, taking).await.ok()??;
        Some(place)
    }

    /// How much of it is taken.
    #[must_use]
    pub fn taken(&self) -> Taken {
        Taken {
            bytes: (self.small.taken() + self.large.taken()) * 1024,
            waiting: (self.small.waiting() + self.large.waiting()) * 1024,
            computing: self.cores.saturating_sub(self.turns.available_permits()),
        }
    }
}

impl Place {
    /// The answer is made. Its body takes the room that it needs until nobody holds it any more; the rest is given back, and the turn. `None`: it
    /// is larger than was said, and there is no room for that.
    #[must_use]
    pub fn hold(self, body: Bytes) -> Option<Bytes> {
        struct Held(Bytes, #[expect(dead_code, reason = "given back when it is dropped")] OwnedSemaphorePermit);
        impl AsRef<[u8]> for Held {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let Self { mut memory, .. } = self;
        let needed = body.len().div_ceil(1024);
        match needed.checked_sub(memory.num_permits()) {
            None | Some(0) => drop(memory.split(memory.num_permits() - needed)),
            Some(more) => memory.merge(Arc::clone(memory.semaphore()).try_acquire_many_owned(u32::try_from(more).ok()?).ok()?),
        }
        Some(Bytes::from_owner(Held(body, memory)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    const MIB: usize = 1 << 20;

    fn body(bytes: usize) -> Bytes {
        Bytes::from(vec![7; bytes])
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_gives_back_what_it_did_not_need_and_the_rest_with_its_last_part() {
        let room = Room::with([4 * MIB, 12 * MIB], 2);
        let place = room.turn(room.reserve(3 * MIB).await.unwrap()).await.unwrap();
        assert_eq!(room.taken(), Taken { bytes: 3 * MIB, waiting: 0, computing: 1 });
        let made = place.hold(body(1025)).unwrap();
        assert_eq!(room.taken(), Taken { bytes: 2048, waiting: 0, computing: 0 });
        let part = made.slice(5..6);
        drop(made);
        assert_eq!(room.taken().bytes, 2048, "a part of it is still held");
        drop(part);
        assert_eq!(room.taken().bytes, 0);
        // One that is larger than was said.
        let larger = room.reserve(1024).await.unwrap().hold(body(3 * MIB)).unwrap();
        assert_eq!(room.taken().bytes, 3 * MIB);
        assert!(room.reserve(1024).await.unwrap().hold(body(13 * MIB)).is_none());
        drop(larger);
        assert_eq!(room.taken().bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_room_waits_a_little_in_a_bounded_queue() {
        let room = Room::with([4 * MIB, 12 * MIB], 2);
        let held = room.reserve(8 * MIB).await.unwrap();
        let began = Instant::now();
        assert!(room.reserve(5 * MIB).await.is_none());
        assert_eq!(began.elapsed(), WAIT);
        // Ten that want 50 MiB: two wait, and the others are told at once.
        let waiting: Vec<_> = (0..10).map(|_| room.reserve(5 * MIB)).collect();
        let mut told = 0;
        let mut left = Vec::new();
        for future in waiting {
            let mut future = Box::pin(future);
            match futures_poll(&mut future).await {
                Some(place) => told += usize::from(place.is_none()),
                None => left.push(future),
            }
        }
        assert_eq!((told, left.len(), room.taken().waiting), (8, 2, 10 * MIB));
        // One that is given back in time goes to the first of them.
        drop(held);
        assert!(left.remove(0).await.is_some());
        drop(left);
        assert_eq!(room.taken(), Taken { bytes: 0, waiting: 0, computing: 0 });
    }

    /// Polls once.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        std::future::poll_fn(|cx| match std::pin::Pin::new(&mut *future).poll(cx) {
            std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
            std::task::Poll::Pending => std::task::Poll::Ready(None),
        })
        .await
    }

    #[tokio::test(start_paused = true)]
    async fn large_answers_leave_memory_and_a_core_to_small_ones() {
        let room = Room::with([4 * MIB, 12 * MIB], 2);
        let mut held = Vec::new();
        while let Some(place) = room.reserve(3 * MIB).await {
            held.push(place);
        }
        assert_eq!(held.len(), 4);
        let large = room.turn(held.pop().unwrap()).await.unwrap();
        assert!(room.turn(held.pop().unwrap()).await.is_none(), "all cores but one are taken by large ones");
        let small = room.turn(room.reserve(MIB).await.unwrap()).await.unwrap();
        assert_eq!(room.taken().computing, 2);
        drop(large);
        // Small ones take what is free of the others' memory too.
        let more: Vec<_> = futures_all(&room, 20).await;
        assert_eq!(more.len() + 1 + held.len() * 3, 16);
        drop(small);
    }

    async fn futures_all(room: &Room, most: usize) -> Vec<Place> {
        let mut places = Vec::new();
        for _ in 0..most {
            places.extend(room.reserve(MIB).await);
        }
        places
    }
}
