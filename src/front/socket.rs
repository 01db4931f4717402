//! A client's connection as the HTTP library sees it: its reads and writes noted, its framing checked, interim responses let
//! in.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::deadlines::Activity;
use super::framing::{Framing, Next};
use crate::request::interim::InterimQueue;
use crate::request::refusal::Refusal;

/// What the library reads instead of a head that is refused: the request that comes of it is answered with the refusal.
/// Nothing of what the client sent gets further than here.
const PLACEHOLDER: &[u8] = b"REFUSED / HTTP/1.1\r\n\r\n";
/// How many bytes of the rest of a refused connection are read and thrown away, and for how long (RFC 9112 §9.6): closing
/// while the client is still sending would reset the connection, and the client might lose the answer.
const LINGER_BYTES: usize = 256 << 10;
const LINGER: Duration = Duration::from_secs(2);

/// The request of a connection, counted from one, that was refused, and why.
pub type RefusedRequest = Arc<OnceLock<(u64, Refusal)>>;

/// A client's connection.
pub struct Socket {
    stream: TcpStream,
    activity: Arc<Activity>,
    interim: Arc<InterimQueue>,
    framing: Framing,
    refused: RefusedRequest,
    /// Bytes that were read and not handed out: the beginning of a head that is not whole yet, mostly.
    held: BytesMut,
    /// How many of those may be handed out.
    checked: usize,
    linger: Option<(Pin<Box<Sleep>>, usize)>,
}

impl Socket {
    /// A connection whose requests have heads of at most `max_head` bytes. What is refused is said in `refused`.
    #[must_use]
    pub fn new(stream: TcpStream, activity: Arc<Activity>, interim: Arc<InterimQueue>, max_head: usize, refused: RefusedRequest) -> Self {
        Self { stream, activity, interim, framing: Framing::new(max_head), refused, held: BytesMut::new(), checked: 0, linger: None }
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
        let _ = self.refused.set((self.framing.heads() + 1, refusal));
        self.held.truncate(self.checked);
        self.held.extend_from_slice(PLACEHOLDER);
        self.checked = self.held.len();
    }

    /// Acts on what the framing says of bytes: `count` of those that are held may be handed out.
    fn apply(&mut self, count: usize, next: Next) -> io::Result<()> {
        self.checked = count;
        match next {
            Next::More => {}
            Next::Refuse(refusal) => self.refuse(refusal),
            Next::Broken => return Err(io::Error::new(io::ErrorKind::InvalidData, "a chunked body is malformed")),
        }
        Ok(())
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.checked > 0 {
                this.hand_out(buffer);
                return Poll::Ready(Ok(()));
            }
            if this.refused.get().is_some() {
                // Whatever else comes is not read. The answer's end closes the connection.
                return Poll::Pending;
            }
            if this.held.is_empty() {
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
                    return Poll::Ready(Ok(()));
                }
                this.held.extend_from_slice(&read[count..]);
                buffer.set_filled(before + count);
                this.apply(0, next)?;
                if count > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                let mut more = [0; 4096];
                let mut piece = ReadBuf::new(&mut more);
                ready!(Pin::new(&mut this.stream).poll_read(cx, &mut piece))?;
                if piece.filled().is_empty() {
                    return Poll::Ready(Ok(()));
                }
                this.held.extend_from_slice(piece.filled());
                let (count, next) = this.framing.inspect(&this.held);
                this.activity.did_read(this.framing.is_http2());
                this.apply(count, next)?;
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note_write(polled)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.note_write(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // The library flushes when all that it had to write is written.
        let drained = this.interim.poll_drain(&mut this.stream, cx);
        if drained.is_pending() {
            this.activity.did_write(Poll::Pending, false);
            return Poll::Pending;
        }
        ready!(drained)?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.refused.get().is_none() {
            return Pin::new(&mut this.stream).poll_shutdown(cx);
        }
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let (timer, read) = this.linger.get_or_insert_with(|| (Box::pin(sleep_until(Instant::now() + LINGER)), 0));
        let mut rest = [0; 4096];
        while *read < LINGER_BYTES && timer.as_mut().poll(cx).is_pending() {
            let mut piece = ReadBuf::new(&mut rest);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut piece))?;
            if piece.filled().is_empty() {
                break;
            }
            *read += piece.filled().len();
        }
        Poll::Ready(Ok(()))
    }
}

impl Socket {
    fn note_write(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &polled {
            Poll::Pending => self.activity.did_write(Poll::Pending, false),
            Poll::Ready(Ok(taken)) => self.activity.did_write(Poll::Ready(*taken), self.framing.is_http2()),
            Poll::Ready(Err(_)) => {}
        }
        polled
    }
}
