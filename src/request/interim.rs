//! Interim answers (1xx, RFC 9110 §15.2) on their way to a client that waits for the final one.
//!
//! The HTTP library sends only final answers. What the backend says before them is put into the connection's [`Outbox`],
//! which the connection empties when it flushes: its own buffer is empty then, so nothing is cut in two. A request's
//! turn ends before its final answer is handed over, and only after all that came for it has left; what comes later is
//! dropped, so it never reaches the next request's answer.

use std::io::Write as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use http::{Extensions, HeaderMap, StatusCode};
use tokio::io::AsyncWrite;

use crate::http::headers::strip_hop_by_hop;

/// More bytes of interim answers than this are not kept for one client.
const ROOM: usize = 16 << 10;

/// Interim answers of one connection.
#[derive(Default)]
pub struct Outbox {
    /// Whose turn it is.
    turn: AtomicU64,
    /// Whether there is anything: most connections never see an interim answer.
    any: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    sent: usize,
    /// The connection's task.
    task: Option<Waker>,
}

/// One request's way to the outbox.
#[derive(Clone)]
pub struct Interim {
    outbox: Arc<Outbox>,
    turn: u64,
}

impl Outbox {
    /// A request's turn begins.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> Interim {
        Interim { turn: self.turn.fetch_add(1, Ordering::AcqRel) + 1, outbox: Arc::clone(self) }
    }

    /// Writes what there is. Only to be called when the connection's own buffer is empty.
    ///
    /// # Errors
    /// The connection's.
    pub fn poll_empty<W: AsyncWrite + Unpin>(&self, stream: &mut W, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
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
        // The request may be waiting for this.
        if let Some(task) = state.task.take() {
            task.wake();
        }
        Poll::Ready(Ok(()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interim {
    /// The turn ends: nothing more is taken, and what was taken has left.
    pub async fn end(self) {
        self.outbox.turn.fetch_add(1, Ordering::AcqRel);
        if !self.outbox.any.load(Ordering::Acquire) {
            return;
        }
        std::future::poll_fn(|cx| {
            let mut state = self.outbox.state();
            if state.bytes.is_empty() {
                return Poll::Ready(());
            }
            state.task = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Goes along with a request to the backend. To be called within the connection's own task, which is woken by what
    /// comes.
    pub async fn accompany(&self, request: &mut Extensions) {
        std::future::poll_fn(|cx| {
            self.outbox.state().task = Some(cx.waker().clone());
            Poll::Ready(())
        })
        .await;
        request.insert(self.clone());
    }

    /// Takes an interim answer, unless it is too late or too much. 100 and 101 are about a connection, not an answer.
    pub fn send(&self, status: StatusCode, fields: &HeaderMap) {
        if !(102..200).contains(&status.as_u16()) {
            return;
        }
        let mut fields = fields.clone();
        strip_hop_by_hop(&mut fields);
        let mut state = self.outbox.state();
        if self.outbox.turn.load(Ordering::Acquire) != self.turn || state.bytes.len() > ROOM {
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
        self.outbox.any.store(true, Ordering::Release);
        if let Some(task) = state.task.take() {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    async fn emptied(outbox: &Outbox) -> String {
        let mut stream = Vec::new();
        std::future::poll_fn(|cx| outbox.poll_empty(&mut stream, cx)).await.unwrap();
        String::from_utf8(stream).unwrap()
    }

    #[tokio::test]
    async fn what_comes_in_time_leaves_and_what_comes_late_does_not() {
        let outbox = Arc::new(Outbox::default());
        let (first, mut fields) = (outbox.begin(), HeaderMap::new());
        fields.insert("link", HeaderValue::from_static("</a>"));
        fields.insert("connection", HeaderValue::from_static("close"));
        first.send(StatusCode::CONTINUE, &fields);
        first.send(StatusCode::EARLY_HINTS, &fields);
        assert_eq!(emptied(&outbox).await, "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n");
        first.clone().end().await;
        first.send(StatusCode::EARLY_HINTS, &fields);
        let second = outbox.begin();
        first.send(StatusCode::EARLY_HINTS, &fields);
        assert_eq!(emptied(&outbox).await, "");
        second.send(StatusCode::PROCESSING, &HeaderMap::new());
        assert_eq!(emptied(&outbox).await, "HTTP/1.1 102 Processing\r\n\r\n");
    }

    #[tokio::test]
    async fn a_turn_does_not_end_before_all_has_left() {
        let outbox = Arc::new(Outbox::default());
        let turn = outbox.begin();
        turn.send(StatusCode::PROCESSING, &HeaderMap::new());
        let ending = tokio::spawn(turn.end());
        tokio::task::yield_now().await;
        assert!(!ending.is_finished());
        assert_ne!(emptied(&outbox).await, "");
        ending.await.unwrap();
    }
}
