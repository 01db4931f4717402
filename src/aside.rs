//! Work that keeps a core busy for long, such as packing and unpacking large bodies, beside the threads that serve.
//!
//! As many run at a time as there are cores. More would be no faster, and each thread of the pool keeps some of the memory that its last
//! work took.

use std::sync::LazyLock;
use std::thread::available_parallelism;

use tokio::sync::Semaphore;

static CORES: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(available_parallelism().map_or(2, usize::from).max(2)));

/// Runs work on a thread of its own, after others if need be; `None` if it panics, or the program ends.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let permit = CORES.acquire().await.ok()?;
    let done = tokio::task::spawn_blocking(move || {
        // Also if nobody waits for it any more.
        let _permit = permit;
        work()
    });
    done.await.ok()
}
