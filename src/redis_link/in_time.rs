//! Waiting for an answer until a deadline, on a thread that may be late to look.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::timeout;

/// Turns of the runtime from the socket to the task that waits: one reads, one hands out, and one to spare.
const TURNS: usize = 3;

/// Waits until the deadline, and no longer than it takes to read what has come by then: a thread with thousands of busy connections
/// may be late to look, for which Redis is not to blame.
pub(super) async fn in_time<T>(deadline: Duration, answering: impl Future<Output = T>) -> Option<T> {
    let mut answering = pin!(answering);
    if let Ok(answer) = timeout(deadline, answering.as_mut()).await {
        return Some(answer);
    }
    for _ in 0..TURNS {
        yield_now().await;
        if let Poll::Ready(answer) = poll_fn(|cx| Poll::Ready(answering.as_mut().poll(cx))).await {
            return Some(answer);
        }
    }
    None
}
