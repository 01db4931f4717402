//! What the streams of one HTTP/2 connection have ready for it, in bytes.
//!
//! The library takes the next piece of a body as soon as the client has opened its window for the one before, also while the connection takes nothing:
//! a client that opens all windows and reads nothing would have pieces of a hundred answers made and kept. So a stream makes no more while its
//! connection has much to write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// While more bytes than this are ready, no stream makes more. Less than the kernel takes at one time would cost fast clients more turns.
const MOST: u64 = 512 << 10;

/// Bytes that there is room for in the clients' windows, and that are not written.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: AtomicU64,
    /// Whether any stream waits.
    is_awaited: AtomicBool,
    streams: Mutex<Vec<Waker>>,
}

impl Backlog {
    /// These bytes of a stream are ready.
    pub fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    /// The connection has written bytes. Some of them may be of frames that are none of a body's: so it counts no further than to zero.
    pub fn wrote(&self, bytes: u64) {
        let less = |ready: u64| Some(ready.saturating_sub(bytes));
        let before = self.bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).unwrap_or(0);
        if before.saturating_sub(bytes) <= MOST && self.is_awaited.load(Ordering::SeqCst) {
            let streams = std::mem::take(&mut *self.streams());
            streams.into_iter().for_each(Waker::wake);
        }
    }

    /// All that was ready is written, or belonged to streams that are reset.
    pub fn clear(&self) {
        self.wrote(u64::MAX);
    }

    /// Ready once a stream may make more.
    pub fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        let has_room = || self.bytes.load(Ordering::SeqCst) <= MOST;
        if has_room() {
            return Poll::Ready(());
        }
        let mut streams = self.streams();
        self.is_awaited.store(true, Ordering::SeqCst);
        // Once more: it may have been written before anybody knew of this one.
        if has_room() {
            return Poll::Ready(());
        }
        if !streams.iter().any(|stream| stream.will_wake(cx.waker())) {
            streams.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn streams(&self) -> std::sync::MutexGuard<'_, Vec<Waker>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test(start_paused = true)]
    async fn a_stream_waits_while_much_is_ready() {
        let backlog = Arc::new(Backlog::default());
        let room = || poll_fn(|cx| backlog.poll_room(cx));
        backlog.add(MOST);
        room().await;
        backlog.add(1);
        assert!(timeout(Duration::from_secs(1), room()).await.is_err());
        let waiting = tokio::spawn({
            let backlog = Arc::clone(&backlog);
            async move { poll_fn(|cx| backlog.poll_room(cx)).await }
        });
        tokio::task::yield_now().await;
        backlog.wrote(1);
        waiting.await.unwrap();
        backlog.clear();
        backlog.wrote(100);
        backlog.add(MOST);
        room().await;
    }
}
