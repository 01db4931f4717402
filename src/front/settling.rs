//! Seeing that an HTTP/2 connection has written all that it had.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::deadlines::Activity;

/// A connection that is served: once it has nothing to do, and is not waiting for its client either, nothing is ready any more.
pub struct Settling<F> {
    serving: F,
    activity: Arc<Activity>,
}

impl<F> Settling<F> {
    /// The library's work on a connection.
    pub const fn new(serving: F, activity: Arc<Activity>) -> Self {
        Self { serving, activity }
    }
}

impl<F> Settling<Pin<&mut F>> {
    /// The library's work itself.
    pub fn serving(&mut self) -> Pin<&mut F> {
        self.serving.as_mut()
    }
}

impl<F: Future> Future for Settling<Pin<&mut F>> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let polled = self.serving.as_mut().poll(cx);
        if polled.is_pending() && !self.activity.is_blocked() {
            self.activity.backlog.clear();
        }
        polled
    }
}
