//! Work that keeps a core busy for long, such as packing and unpacking large bodies, beside the threads that serve.
//!
//! As many run at a time as there are cores. More would be no faster, and each thread of the pool keeps some of the memory that its last
//! work took. What nobody waits for has a queue of its own, and leaves a core to the others.

use std::sync::LazyLock;
use std::thread::available_parallelism;

use tokio::sync::{Semaphore, SemaphorePermit};

/// Bytes for each core that may wait to be packed, in KiB: what a core does in about a quarter of a second.
const TO_PACK: usize = 8 << 10;

static CORES: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(cores()));
static PACKERS: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(cores() - 1));
static UNPACKED: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(cores() * TO_PACK));

fn cores() -> usize {
    available_parallelism().map_or(2, usize::from).max(2)
}

/// A body's room among those that wait to be packed, or are being packed.
pub struct ToPack(#[expect(dead_code, reason = "given back when it is dropped")] SemaphorePermit<'static>);

impl ToPack {
    /// Room for so many bytes. `None`: so many wait that these better stay as they are.
    #[must_use]
    pub fn new(bytes: usize) -> Option<Self> {
        UNPACKED.try_acquire_many(u32::try_from(bytes.div_ceil(1024)).ok()?).ok().map(Self)
    }

    /// Packs it, as [`pack`] does.
    pub async fn pack<T: Send + 'static>(self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        pack(move || {
            let _room = self;
            work()
        })
        .await
    }
}

/// Runs packing on a thread of its own, when it is its turn; `None` if it panics, or the program ends.
pub async fn pack<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let permit = PACKERS.acquire().await.ok()?;
    on_a_thread(permit, work).await
}

/// Runs work on a thread of its own, after others if need be; `None` if it panics, or the program ends.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let permit = CORES.acquire().await.ok()?;
    on_a_thread(permit, work).await
}

/// Runs work, and holds `room` until it is done, also if nobody waits for it any more.
async fn on_a_thread<T: Send + 'static>(room: impl Send + 'static, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let done = tokio::task::spawn_blocking(move || {
        let _room = room;
        work()
    });
    done.await.ok()
}
