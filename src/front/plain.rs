//! What is under way of a request that is answered before the HTTP library sees it: something that is waited for, or an answer that
//! the client has not taken yet. Most often there is nothing.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::{Extensions, Version};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::deadlines::{Activity, InFlight, limit_unsent};
use crate::body::lent::Reading;
use crate::request::short_way::{ShortWay, Waiting, Way};

/// A response of more bytes may take a slow client long.
const LARGE: usize = 64 << 10;
/// Bodies of up to this many bytes are copied behind their heads: one write is cheaper than a vectored one.
const COPIED: usize = 1024;

thread_local!(
    /// The head that is being written, in memory that is used again.
    static HEAD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
);

/// The short way of one connection, and what is under way there.
pub struct Plain {
    short: Arc<dyn ShortWay>,
    under_way: UnderWay,
    /// Whether the kernel was told how much it may hold unsent.
    is_limited: bool,
}

enum UnderWay {
    Nothing,
    Waiting(Box<Waited>),
    Sending(Box<Unsent>),
}

/// A request that waits for something.
struct Waited {
    bytes: Vec<u8>,
    began: Instant,
    waiting: Waiting,
    in_flight: InFlight,
}

/// The rest of an answer.
struct Unsent {
    head: Bytes,
    body: Bytes,
    /// The request counts as being answered for so long.
    _in_flight: InFlight,
}

/// A request that was not answered: its bytes, and what was brought for it.
pub type Unanswered = (Vec<u8>, Extensions);

impl Plain {
    /// A connection whose plain requests `short` may answer.
    #[must_use]
    pub const fn new(short: Arc<dyn ShortWay>) -> Self {
        Self { short, under_way: UnderWay::Nothing, is_limited: false }
    }

    /// Whether anything is under way.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        !matches!(self.under_way, UnderWay::Nothing)
    }

    /// Answers a request, or begins to; `false`: it is for the library.
    ///
    /// # Errors
    /// The connection's own.
    pub fn answer(&mut self, cx: &mut Context<'_>, stream: &mut TcpStream, activity: &Arc<Activity>, bytes: &[u8]) -> io::Result<bool> {
        let began = Instant::now();
        HEAD.with_borrow_mut(|head| {
            head.clear();
            match self.short.answer(bytes, began, None, head) {
                Way::Answered(body, reading) => {
                    activity.did_answer(began);
                    self.send(cx, stream, activity, head, (body, reading))?;
                }
                Way::Wait(waiting) => {
                    let in_flight = InFlight::begin(activity, Version::HTTP_11);
                    self.under_way = UnderWay::Waiting(Box::new(Waited { bytes: bytes.to_vec(), began, waiting, in_flight }));
                }
                Way::Library => return Ok(false),
            }
            Ok(true)
        })
    }

    /// Finishes what is under way, before which nothing else is read or written. What could not be answered after all is returned.
    ///
    /// # Errors
    /// The connection's own.
    pub fn poll_finish(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut TcpStream,
        activity: &Arc<Activity>,
    ) -> Poll<io::Result<Option<Unanswered>>> {
        loop {
            match &mut self.under_way {
                UnderWay::Nothing => return Poll::Ready(Ok(None)),
                UnderWay::Waiting(waited) => {
                    let brought = ready!(waited.waiting.as_mut().poll(cx));
                    let UnderWay::Waiting(waited) = std::mem::replace(&mut self.under_way, UnderWay::Nothing) else { continue };
                    let Waited { bytes, began, in_flight, .. } = *waited;
                    drop(in_flight);
                    let answered = HEAD.with_borrow_mut(|head| {
                        head.clear();
                        let Way::Answered(body, reading) = self.short.answer(&bytes, began, Some(&brought), head) else { return Ok(false) };
                        self.send(cx, stream, activity, head, (body, reading)).map(|()| true)
                    })?;
                    if !answered {
                        return Poll::Ready(Ok(Some((bytes, brought))));
                    }
                }
                UnderWay::Sending(unsent) => {
                    ready!(unsent.poll_send(cx, stream, activity))?;
                    self.under_way = UnderWay::Nothing;
                }
            }
        }
    }

    /// Writes an answer. What the client does not take now waits.
    fn send(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut TcpStream,
        activity: &Arc<Activity>,
        head: &mut Vec<u8>,
        (mut body, reading): (Bytes, Option<Arc<Reading>>),
    ) -> io::Result<()> {
        if body.len() <= COPIED {
            head.extend_from_slice(&body);
            body = Bytes::new();
        }
        if body.len() > LARGE && !self.is_limited {
            limit_unsent(stream);
            self.is_limited = true;
        }
        let polled = if body.is_empty() {
            Pin::new(stream).poll_write(cx, head)
        } else {
            Pin::new(stream).poll_write_vectored(cx, &[IoSlice::new(head), IoSlice::new(&body)])
        };
        let sent = match polled {
            Poll::Ready(sent) => sent?,
            Poll::Pending => 0,
        };
        if sent < head.len() + body.len() {
            let in_flight = InFlight::begin(activity, Version::HTTP_11);
            let mut unsent = Unsent { head: Bytes::copy_from_slice(head), body, _in_flight: in_flight };
            unsent.advance(sent);
            if let Some(reading) = reading {
                reading.is_for(Arc::downgrade(activity));
            }
            self.under_way = UnderWay::Sending(Box::new(unsent));
        }
        Ok(())
    }
}

impl Unsent {
    fn poll_send(&mut self, cx: &mut Context<'_>, stream: &mut TcpStream, activity: &Activity) -> Poll<io::Result<()>> {
        while !(self.head.is_empty() && self.body.is_empty()) {
            let polled = Pin::new(&mut *stream).poll_write_vectored(cx, &[IoSlice::new(&self.head), IoSlice::new(&self.body)]);
            let Poll::Ready(sent) = polled else {
                activity.did_write(Poll::Pending, false);
                return Poll::Pending;
            };
            let sent = sent?;
            activity.did_write(Poll::Ready(sent), false);
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(sent);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, sent: usize) {
        let of_head = sent.min(self.head.len());
        self.head.advance(of_head);
        self.body.advance(sent - of_head);
    }
}
