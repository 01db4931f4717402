//! Interim (1xx) responses (RFC 9110 §15.2) on their way to a client that waits for the final one.
//!
//! The HTTP library sends only final responses. What the upstream says before its final one is put into the connection's
//! [`InterimQueue`], which the connection writes out when it flushes: its own buffer is empty then, so nothing is cut in
//! two. A request's sender is closed before the final response is handed over, and only after all that was sent has left;
//! what comes later is dropped, so that it never lands before the next request's response.

use std::io::Write as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use http::{Extensions, HeaderMap, StatusCode};
use tokio::io::AsyncWrite;

use crate::http::headers::strip_hop_by_hop;

/// Bytes of interim responses that may wait for one client; more are dropped.
const CAPACITY: usize = 16 << 10;

/// The interim responses of one connection.
#[derive(Default)]
pub struct InterimQueue {
    /// Raised whenever a sender is opened or closed: only the sender that holds this very number may send.
    turn: AtomicU64,
    /// Whether anything waits: most connections never see an interim response.
    any: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    sent: usize,
    /// The connection's task, which writes what waits.
    task: Option<Waker>,
}

/// By which one request's interim responses are sent.
#[derive(Clone)]
pub struct InterimSender {
    queue: Arc<InterimQueue>,
    turn: u64,
}

impl InterimQueue {
    /// A sender for the request that is answered now.
    #[must_use]
    pub fn open(self: &Arc<Self>) -> InterimSender {
        InterimSender { turn: self.turn.fetch_add(1, Ordering::AcqRel) + 1, queue: Arc::clone(self) }
    }

    /// Writes what waits. Only to be called when the connection's own buffer is empty.
    ///
    /// # Errors
    /// The connection's.
    pub fn poll_drain<W: AsyncWrite + Unpin>(&self, stream: &mut W, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if !self.any.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.state();
        while state.sent < state.bytes.len() {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, &state.bytes[state.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            state.sent += written;
        }
        state.bytes.clear();
        state.sent = 0;
        self.any.store(false, Ordering::Release);
        // The request may be waiting for this to end.
        if let Some(task) = state.task.take() {
            task.wake();
        }
        Poll::Ready(Ok(()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InterimSender {
    /// Ends it: nothing more is taken, and what was taken has left when this returns.
    pub async fn close(self) {
        {
            // Locked, so that none is being added that was let in before.
            let state = self.queue.state();
            self.queue.turn.fetch_add(1, Ordering::AcqRel);
            if state.bytes.is_empty() {
                return;
            }
        }
        std::future::poll_fn(|cx| {
            let mut state = self.queue.state();
            if state.bytes.is_empty() {
                return Poll::Ready(());
            }
            state.task = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Goes along with a request to the upstream. To be called within the connection's own task, which is woken by what
    /// comes.
    pub async fn attach(&self, request: &mut Extensions) {
        std::future::poll_fn(|cx| {
            self.queue.state().task = Some(cx.waker().clone());
            Poll::Ready(())
        })
        .await;
        request.insert(self.clone());
    }

    /// Takes an interim response, unless it is too late or too much. 100 and 101 are about the connection to the upstream.
    pub fn send(&self, status: StatusCode, fields: &HeaderMap) {
        if !(102..200).contains(&status.as_u16()) {
            return;
        }
        let mut fields = fields.clone();
        strip_hop_by_hop(&mut fields);
        let mut state = self.queue.state();
        if self.queue.turn.load(Ordering::Acquire) != self.turn || state.bytes.len() > CAPACITY {
            return;
        }
        // Writing to a Vec does not fail.
        let _ = write!(state.bytes, "HTTP/1.1 {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or_default());
        for (name, value) in &fields {
            state.bytes.extend_from_slice(name.as_str().as_bytes());
            state.bytes.extend_from_slice(b": ");
            state.bytes.extend_from_slice(value.as_bytes());
            state.bytes.extend_from_slice(b"\r\n");
        }
        state.bytes.extend_from_slice(b"\r\n");
        self.queue.any.store(true, Ordering::Release);
        if let Some(task) = state.task.take() {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    async fn drained(queue: &InterimQueue) -> String {
        let mut stream = Vec::new();
        std::future::poll_fn(|cx| queue.poll_drain(&mut stream, cx)).await.unwrap();
        String::from_utf8(stream).unwrap()
    }

    #[tokio::test]
    async fn what_comes_in_time_is_written_and_what_comes_late_is_dropped() {
        let queue = Arc::new(InterimQueue::default());
        let (first, mut fields) = (queue.open(), HeaderMap::new());
        fields.insert("link", HeaderValue::from_static("</a>"));
        fields.insert("connection", HeaderValue::from_static("close"));
        first.send(StatusCode::CONTINUE, &fields);
        first.send(StatusCode::EARLY_HINTS, &fields);
        assert_eq!(drained(&queue).await, "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n");
        first.clone().close().await;
        first.send(StatusCode::EARLY_HINTS, &fields);
        let second = queue.open();
        first.send(StatusCode::EARLY_HINTS, &fields);
        assert_eq!(drained(&queue).await, "");
        second.send(StatusCode::PROCESSING, &HeaderMap::new());
        assert_eq!(drained(&queue).await, "HTTP/1.1 102 Processing\r\n\r\n");
    }

    #[tokio::test]
    async fn a_sender_does_not_close_before_all_has_left() {
        let queue = Arc::new(InterimQueue::default());
        let sender = queue.open();
        sender.send(StatusCode::PROCESSING, &HeaderMap::new());
        let closing = tokio::spawn(sender.close());
        tokio::task::yield_now().await;
        assert!(!closing.is_finished());
        assert_ne!(drained(&queue).await, "");
        closing.await.unwrap();
    }
}
