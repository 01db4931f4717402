//! Waiting for two futures of which one wakes far more often than the other.
//!
//! `tokio::select!` polls every branch whenever any of them wakes. Beside a connection, which wakes for each request, that is
//! work for nothing: [`select`] polls the quiet future only when that one itself was woken.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Which of the two ended, and with what.
#[derive(Debug, PartialEq, Eq)]
pub enum Either<B, Q> {
    /// The one that wakes often.
    Busy(B),
    /// The one that wakes rarely.
    Quiet(Q),
}

/// Waits for whichever ends first. `busy` is polled whenever the task wakes, `quiet` only when it was woken itself.
pub fn select<'a, B, Q>(busy: Pin<&'a mut B>, quiet: Pin<&'a mut Q>) -> Select<'a, B, Q> {
    let flag = Arc::new(WakeFlag { woken: AtomicBool::new(true), task: Mutex::new(None) });
    Select { busy, quiet, waker: Waker::from(Arc::clone(&flag)), flag }
}

/// The future of [`select`].
pub struct Select<'a, B, Q> {
    busy: Pin<&'a mut B>,
    quiet: Pin<&'a mut Q>,
    flag: Arc<WakeFlag>,
    waker: Waker,
}

/// Remembers that the quiet future was woken, and wakes the task.
struct WakeFlag {
    woken: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl Wake for WakeFlag {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl<B: Future, Q: Future> Future for Select<'_, B, Q> {
    type Output = Either<B::Output, Q::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if let Poll::Ready(output) = this.busy.as_mut().poll(cx) {
            return Poll::Ready(Either::Busy(output));
        }
        if this.flag.woken.load(Ordering::Acquire) {
            // The task is noted before the quiet future is polled, so that no wake-up is lost. The task's waker does not
            // change while that future sleeps: it was polled with this one last.
            *this.flag.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
            this.flag.woken.store(false, Ordering::Release);
            if let Poll::Ready(output) = this.quiet.as_mut().poll(&mut Context::from_waker(&this.waker)) {
                return Poll::Ready(Either::Quiet(output));
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::pin::pin;
    use std::time::Duration;
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn the_quiet_one_is_polled_only_when_it_wakes_and_still_ends_it() {
        let polls = Cell::new(0);
        let mut sleeping = pin!(sleep(Duration::from_secs(10)));
        let quiet = pin!(std::future::poll_fn(|cx| {
            polls.set(polls.get() + 1);
            sleeping.as_mut().poll(cx)
        }));
        let busy = pin!(async {
            loop {
                sleep(Duration::from_millis(1)).await;
            }
        });
        let ended: Either<(), ()> = select(busy, quiet).await;
        assert_eq!((ended, polls.get()), (Either::Quiet(()), 2));
    }

    #[tokio::test]
    async fn the_busy_one_ends_it() {
        assert_eq!(select(pin!(async { 7 }), pin!(std::future::pending::<()>())).await, Either::Busy(7));
    }
}
