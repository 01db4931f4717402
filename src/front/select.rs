//! A future beside another one that is polled far more often.
//!
//! `select!` polls every branch whenever any of them wakes. Beside a connection, which wakes for each request, that
//! is work for nothing: [`Aside`] polls the side only when the side itself was woken.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Which of the two ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Either<M, S> {
    /// The main one.
    Main(M),
    /// The one at its side.
    Side(S),
}

/// Polls `main` always, `side` when it was woken, and ends with whichever ends first.
pub struct Aside<'a, M, S> {
    main: Pin<&'a mut M>,
    side: Pin<&'a mut S>,
    bell: Arc<Bell>,
    waker: Waker,
}

/// Remembers that the side was woken, and wakes the task.
struct Bell {
    rung: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl<'a, M, S> Aside<'a, M, S> {
    /// Both futures, neither polled yet.
    #[must_use]
    pub fn new(main: Pin<&'a mut M>, side: Pin<&'a mut S>) -> Self {
        let bell = Arc::new(Bell { rung: AtomicBool::new(true), task: Mutex::new(None) });
        Self { main, side, waker: Waker::from(Arc::clone(&bell)), bell }
    }
}

impl<M: Future, S: Future> Future for Aside<'_, M, S> {
    type Output = Either<M::Output, S::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if let Poll::Ready(output) = this.main.as_mut().poll(cx) {
            return Poll::Ready(Either::Main(output));
        }
        if this.bell.rung.load(Ordering::Acquire) {
            // The task is noted before the side is polled, so that no ring is lost. A task's waker does not change
            // while the side sleeps: it was polled with this one last.
            *this.bell.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
            this.bell.rung.store(false, Ordering::Release);
            if let Poll::Ready(output) = this.side.as_mut().poll(&mut Context::from_waker(&this.waker)) {
                return Poll::Ready(Either::Side(output));
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::time::Duration;
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn the_side_is_polled_only_when_it_wakes_and_still_ends_it() {
        let polls = Cell::new(0);
        let mut sleeping = std::pin::pin!(sleep(Duration::from_secs(10)));
        let side = std::pin::pin!(std::future::poll_fn(|cx| {
            polls.set(polls.get() + 1);
            sleeping.as_mut().poll(cx)
        }));
        let busy = std::pin::pin!(async {
            loop {
                sleep(Duration::from_millis(1)).await;
            }
        });
        let ended: Either<(), ()> = Aside::new(busy, side).await;
        assert_eq!((ended, polls.get()), (Either::Side(()), 2));
    }

    #[tokio::test]
    async fn the_main_one_ends_it() {
        let ended = Aside::new(std::pin::pin!(async { 7 }), std::pin::pin!(std::future::pending::<()>())).await;
        assert_eq!(ended, Either::Main(7));
    }
}
