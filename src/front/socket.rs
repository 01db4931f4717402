//! A client's connection as the HTTP library sees it: its reads and writes noted, its framing checked, interim responses let
//! in. What can be answered from its bytes the library does not see ([`Plain`]).

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http::Extensions;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::deadlines::{Activity, limit_unsent};
use super::frames::with_fault;
use super::framing::{Framing, Next};
use super::plain::Plain;
use crate::config::Limits;
use crate::request::interim::InterimQueue;
use crate::request::refusal::Refusal;
use crate::request::short_way::ShortWay;

/// What the library reads instead of a head that is refused: the request that comes of it is answered with the refusal.
/// Nothing of what the client sent gets further than here, but for HEAD: its answer has no body, a refusal neither.
const PLACEHOLDER: &[u8] = b"REFUSED / HTTP/1.1\r\n\r\n";
const PLACEHOLDER_HEAD: &[u8] = b"HEAD / HTTP/1.1\r\n\r\n";
/// How many bytes of the rest of a connection are read and thrown away, for how long, and how long none may come (RFC 9112 §9.6): closing while the
/// client is still sending would reset the connection, and the client might lose the answer.
const LINGER_BYTES: usize = 64 << 20;
const LINGER: Duration = Duration::from_secs(30);
const LINGER_SILENCE: Duration = Duration::from_secs(2);
/// Larger requests go to the library, in bytes.
const MAX_PLAIN: usize = 4096;

/// What the socket noted of a request for whoever answers it.
#[derive(Debug, Default)]
pub struct Notes {
    /// The request of the connection, counted from one, that was refused, and why.
    pub refused: OnceLock<(u64, Refusal)>,
    /// The request for which something was brought, and what, until that is taken.
    pub brought: Mutex<Option<(u64, Extensions)>>,
    /// A response whose end is the connection's broke off: the connection is reset, so that it does not look whole.
    pub cut: AtomicBool,
    /// A response that broke off waits until all that the library has of it is written.
    pub is_flush_awaited: AtomicBool,
}

impl Notes {
    /// Takes what was brought for a request.
    pub fn brought_for(&self, number: u64) -> Option<Extensions> {
        let mut brought = self.brought.lock().unwrap_or_else(PoisonError::into_inner);
        brought.take_if(|(at, _)| *at <= number).filter(|(at, _)| *at == number).map(|(_, brought)| brought)
    }
}

/// What a connection's parts share: its activity, interim responses, what was noted, and whether it is to end.
pub type Shared = (Arc<Activity>, Arc<InterimQueue>, Arc<Notes>, Arc<AtomicBool>);

/// A client's connection.
pub struct Socket {
    stream: TcpStream,
    plain: Option<Plain>,
    /// How many requests the library had answered when it last had written everything.
    settled: u64,
    /// Whether the connection is to end.
    ending: Arc<AtomicBool>,
    activity: Arc<Activity>,
    interim: Arc<InterimQueue>,
    framing: Framing,
    notes: Arc<Notes>,
    /// Bytes that were read and not handed out: the beginning of a head that is not whole yet, mostly.
    held: BytesMut,
    /// How many of those may be handed out.
    checked: usize,
    linger: Option<Linger>,
    /// Whether the kernel was told how much it may hold unsent.
    is_limited: bool,
    /// Whether a body was malformed: nothing after it is read, but to be thrown away.
    broken: bool,
    /// Whether the library was told that the connection ended, which it has not.
    rested: bool,
}

impl Socket {
    /// A connection whose requests have heads of at most `limits.header_bytes`.
    #[must_use]
    pub fn new(stream: TcpStream, limits: &Limits, short: Option<Arc<dyn ShortWay>>, shared: Shared) -> Self {
        let (activity, interim, notes, ending) = shared;
        let max_head = limits.header_bytes;
        Self {
            stream,
            plain: short.filter(|_| max_head >= MAX_PLAIN).map(Plain::new),
            settled: 0,
            ending,
            activity,
            interim,
            framing: Framing::new(max_head),
            notes,
            held: BytesMut::new(),
            checked: 0,
            linger: None,
            is_limited: false,
            broken: false,
            rested: false,
        }
    }

    /// Whether the client speaks HTTP/2. Known once there is something for the library.
    #[must_use]
    pub const fn is_http2(&self) -> bool {
        self.framing.is_http2()
    }

    /// Whether the library was told that the connection ended so that it gives back what it holds, while the connection goes on.
    pub const fn has_rested(&mut self) -> bool {
        std::mem::replace(&mut self.rested, false)
    }

    /// Whether the next request may be answered at once: nothing of the one before is being read, answered or written.
    fn is_at_rest(&self) -> bool {
        let read = self.framing.is_between_requests() && self.held.is_empty();
        read && self.settled == self.framing.heads() && !self.ending.load(Ordering::Relaxed)
    }

    /// Whether what comes next may be answered before the library sees it.
    fn may_be_plain(&self) -> bool {
        self.plain.is_some() && self.is_at_rest()
    }

    /// Answers plain requests for as long as nothing else comes; returns as soon as there is a whole head for the library, or the end:
    /// the library costs memory that a connection need not have before.
    ///
    /// # Errors
    /// The connection's own, and a body that is malformed.
    pub async fn answer_plain(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            loop {
                ready!(self.poll_finish(cx))?;
                self.fail_if_broken()?;
                if self.checked > 0 {
                    return Poll::Ready(Ok(()));
                }
                let is_end = if self.may_be_plain() {
                    ready!(self.poll_read_plain(cx, &mut ReadBuf::new(&mut [])))?
                } else {
                    ready!(self.poll_hold_more(cx))?
                };
                if is_end || self.checked > 0 {
                    return Poll::Ready(Ok(()));
                }
            }
        })
        .await
    }

    /// Reads more of a head that is not whole. Whether the client has ended.
    fn poll_hold_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut more = [0; 4096];
        let mut piece = ReadBuf::new(&mut more);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut piece))?;
        if piece.filled().is_empty() {
            return Poll::Ready(Ok(true));
        }
        self.hold(piece.filled());
        Poll::Ready(Ok(false))
    }

    /// Holds bytes that were read for the library, as far as they may be handed out.
    fn hold(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
        let (count, next) = self.framing.inspect(&self.held);
        self.activity.did_read(self.framing.is_http2());
        self.apply(count, next);
    }

    /// Reads where the short way may be taken, and takes it if it can. Whether there is something for the library, be it the end.
    fn poll_read_plain(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let mut bytes = [const { MaybeUninit::uninit() }; MAX_PLAIN];
        let mut piece = ReadBuf::uninit(&mut bytes);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut piece))?;
        let read = piece.filled();
        if read.is_empty() {
            return Poll::Ready(Ok(true));
        }
        if let Some(plain) = &mut self.plain
            && plain.answer(cx, &mut self.stream, &self.activity, read)?
        {
            return Poll::Ready(Ok(false));
        }
        let (count, next) = self.framing.inspect(read);
        self.activity.did_read(self.framing.is_http2());
        let fits = count.min(buffer.remaining());
        buffer.put_slice(&read[..fits]);
        self.held.extend_from_slice(&read[fits..]);
        self.apply(count - fits, next);
        Poll::Ready(Ok(fits > 0))
    }

    /// Finishes what is under way of a request that goes the short way; one that could not be answered there is for the library.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(plain) = &mut self.plain else { return Poll::Ready(Ok(())) };
        if let Some((bytes, brought)) = ready!(plain.poll_finish(cx, &mut self.stream, &self.activity))? {
            *self.notes.brought.lock().unwrap_or_else(PoisonError::into_inner) = Some((self.framing.heads() + 1, brought));
            self.hold(&bytes);
        }
        Poll::Ready(Ok(()))
    }

    /// [`poll_finish`](Self::poll_finish) for the library's writes.
    fn poll_finish_before_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.plain.as_ref().is_some_and(Plain::is_busy) {
            ready!(self.poll_finish(cx))?;
            // The library's read waited for the same, and nothing else would wake it.
            cx.waker().wake_by_ref();
        }
        Poll::Ready(Ok(()))
    }

    /// Fails once all is handed out that came before what is malformed.
    fn fail_if_broken(&self) -> io::Result<()> {
        if !self.broken || self.checked > 0 {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "a body or a block of fields is malformed"))
    }

    /// Hands out bytes that were checked.
    fn hand_out(&mut self, buffer: &mut ReadBuf<'_>) {
        let count = self.checked.min(buffer.remaining());
        buffer.put_slice(&self.held[..count]);
        self.held.advance(count);
        self.checked -= count;
        if self.held.is_empty() {
            // Idle connections hold no memory.
            self.held = BytesMut::new();
        }
    }

    /// Notes a refusal for the request that the placeholder becomes.
    fn refuse(&mut self, refusal: Refusal) {
        let _ = self.notes.refused.set((self.framing.heads() + 1, refusal));
        let head = self.held.get(self.checked..).unwrap_or_default();
        let is_head = head.strip_prefix(b"\r\n").unwrap_or(head).starts_with(b"HEAD ");
        self.held.truncate(self.checked);
        self.held.extend_from_slice(if is_head { PLACEHOLDER_HEAD } else { PLACEHOLDER });
        self.checked = self.held.len();
    }

    /// Acts on what the framing says of bytes: `count` of those that are held may be handed out.
    fn apply(&mut self, count: usize, mut next: Next) {
        self.checked = count;
        if self.framing.is_http2() {
            // What is held beyond that begins a block of fields, or a frame's head.
            let is_beginning = self.framing.is_beginning_http2();
            if count > 0 && !is_beginning {
                // Whatever was partial is whole.
                self.activity.is_within_fields(false);
            }
            let is_partial = is_beginning || self.held.len() > count;
            self.activity.is_within_fields(is_partial && next == Next::More);
        }
        loop {
            match next {
                Next::More => return,
                Next::Refuse(refusal) => return self.refuse(refusal),
                // What came before is handed out first: it is a request that can be answered.
                Next::Broken => {
                    self.broken = true;
                    return self.held.truncate(self.checked);
                }
                Next::Fault(length, fault) => {
                    let mut block = self.held.split_off(self.checked);
                    let rest = block.split_off(length);
                    self.held.extend_from_slice(&with_fault(&block, fault));
                    let count = self.held.len();
                    self.held.extend_from_slice(&rest);
                    let following = self.framing.inspect(&rest);
                    (self.checked, next) = (count + following.0, following.1);
                }
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            ready!(this.poll_finish(cx))?;
            if this.checked > 0 {
                this.hand_out(buffer);
                return Poll::Ready(Ok(()));
            }
            this.fail_if_broken()?;
            if this.notes.refused.get().is_some() {
                // Whatever else comes is not read. The answer's end closes the connection.
                return Poll::Pending;
            }
            if this.activity.is_to_rest() && this.is_at_rest() {
                this.rested = true;
                return Poll::Ready(Ok(()));
            }
            if this.may_be_plain() {
                if ready!(this.poll_read_plain(cx, buffer))? {
                    return Poll::Ready(Ok(()));
                }
            } else if this.held.is_empty() {
                // Nearly always whole heads come at once: they are looked at where the library wants them.
                let before = buffer.filled().len();
                ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
                let read = &buffer.filled()[before..];
                if read.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                let (count, next) = this.framing.inspect(read);
                this.activity.did_read(this.framing.is_http2());
                if count == read.len() && next == Next::More {
                    if this.framing.is_http2() {
                        this.activity.is_within_fields(this.framing.is_beginning_http2());
                    }
                    return Poll::Ready(Ok(()));
                }
                this.held.extend_from_slice(&read[count..]);
                buffer.set_filled(before + count);
                this.apply(0, next);
                if count > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                if ready!(this.poll_hold_more(cx))? {
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_finish_before_write(cx))?;
        self.limit_unsent();
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note_write(polled)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_finish_before_write(cx))?;
        self.limit_unsent();
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.note_write(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_finish_before_write(cx))?;
        // The library flushes when all that it had to write is written.
        let drained = this.interim.poll_drain(&mut this.stream, cx);
        if drained.is_pending() {
            this.activity.did_write(Poll::Pending, false);
            return Poll::Pending;
        }
        ready!(drained)?;
        // An interim response may have waited for the client.
        this.activity.did_write(Poll::Ready(0), false);
        this.settled = this.activity.did_flush().unwrap_or(this.settled);
        if this.notes.is_flush_awaited.load(Ordering::Relaxed) {
            this.notes.is_flush_awaited.store(false, Ordering::Relaxed);
            cx.waker().wake_by_ref();
        }
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_finish_before_write(cx))?;
        if this.rested {
            return Poll::Ready(Ok(()));
        }
        // The client may be sending a body that was answered before its end, or more requests than it may.
        let is_read = this.framing.is_between_requests() || this.framing.is_http2();
        if this.notes.refused.get().is_none() && !this.broken && is_read {
            return Pin::new(&mut this.stream).poll_shutdown(cx);
        }
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        this.linger.get_or_insert_with(Linger::begin).poll(cx, &mut this.stream)
    }
}

/// Reading what a client still sends, to throw it away.
struct Linger {
    until: Instant,
    silence: Pin<Box<Sleep>>,
    read: usize,
}

impl Linger {
    fn begin() -> Self {
        Self { until: Instant::now() + LINGER, silence: Box::pin(sleep_until(Instant::now() + LINGER_SILENCE)), read: 0 }
    }

    fn poll(&mut self, cx: &mut Context<'_>, stream: &mut TcpStream) -> Poll<io::Result<()>> {
        let mut rest = [0; 16 << 10];
        while self.read < LINGER_BYTES && Instant::now() < self.until && self.silence.as_mut().poll(cx).is_pending() {
            let mut piece = ReadBuf::new(&mut rest);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut piece))?;
            if piece.filled().is_empty() {
                break;
            }
            self.read += piece.filled().len();
            self.silence.as_mut().reset(Instant::now() + LINGER_SILENCE);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.notes.cut.load(Ordering::Relaxed) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl Socket {
    /// Once a connection: what the library writes may be long.
    fn limit_unsent(&mut self) {
        if !self.is_limited {
            self.is_limited = true;
            limit_unsent(&self.stream);
        }
    }

    fn note_write(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &polled {
            Poll::Pending => self.activity.did_write(Poll::Pending, false),
            Poll::Ready(Ok(taken)) => self.activity.did_write(Poll::Ready(*taken), self.framing.is_http2()),
            Poll::Ready(Err(_)) => {}
        }
        polled
    }
}
