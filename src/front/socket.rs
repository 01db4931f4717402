//! A client's connection as the HTTP library sees it: its movements noted, its framing checked, interim answers let in.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::front::deadlines::Pulse;
use crate::front::framing::{Framing, Next};
use crate::request::interim::Outbox;
use crate::request::refusal::Refusal;

/// What stands for a head that is refused: the library reads it, and the request that comes of it is answered with the
/// refusal. Nothing of what the client sent gets further than here.
const STAND_IN: &[u8] = b"REFUSED / HTTP/1.1\r\n\r\n";
/// How many bytes of the rest of a refused connection are read and thrown away, and for how long, so that the answer
/// reaches a client that is still sending: closing before that would reset the connection.
const LINGER_BYTES: usize = 256 << 10;
const LINGER: Duration = Duration::from_secs(2);

/// The request of a connection, counted from one, that was refused, and why.
pub type Refused = Arc<OnceLock<(u64, Refusal)>>;

/// A client's connection.
pub struct Socket {
    stream: TcpStream,
    pulse: Arc<Pulse>,
    outbox: Arc<Outbox>,
    framing: Framing,
    refused: Refused,
    /// Bytes that came and may not go on yet: the beginning of a head.
    held: BytesMut,
    /// How many of those may.
    passed: usize,
    linger: Option<(Pin<Box<Sleep>>, usize)>,
}

impl Socket {
    /// A connection whose requests have heads of at most `max_head` bytes. What is refused is said in `refused`.
    #[must_use]
    pub fn new(stream: TcpStream, pulse: Arc<Pulse>, outbox: Arc<Outbox>, max_head: usize, refused: Refused) -> Self {
        Self { stream, pulse, outbox, framing: Framing::new(max_head), refused, held: BytesMut::new(), passed: 0, linger: None }
    }

    /// Hands out bytes that may go on.
    fn hand_out(&mut self, buffer: &mut ReadBuf<'_>) {
        let count = self.passed.min(buffer.remaining());
        buffer.put_slice(&self.held[..count]);
        self.held.advance(count);
        self.passed -= count;
        if self.held.is_empty() {
            // Idle connections hold no memory.
            self.held = BytesMut::new();
        }
    }

    /// Notes a refusal, for the request that the stand-in becomes.
    fn refuse(&mut self, refusal: Refusal) {
        let _ = self.refused.set((self.framing.heads() + 1, refusal));
        self.held.truncate(self.passed);
        self.held.extend_from_slice(STAND_IN);
        self.passed = self.held.len();
    }

    /// What comes after inspected bytes; `count` of what is held may go on.
    fn follow(&mut self, count: usize, next: Next) -> io::Result<()> {
        self.passed = count;
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
            if this.passed > 0 {
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
                let came = &buffer.filled()[before..];
                if came.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                let (count, next) = this.framing.inspect(came);
                this.pulse.did_read(this.framing.is_foreign());
                if count == came.len() && next == Next::More {
                    return Poll::Ready(Ok(()));
                }
                this.held.extend_from_slice(&came[count..]);
                buffer.set_filled(before + count);
                this.follow(0, next)?;
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
                this.pulse.did_read(this.framing.is_foreign());
                this.follow(count, next)?;
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note(polled)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.note(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // The library flushes when all that it had to write is written.
        let emptied = this.outbox.poll_empty(&mut this.stream, cx);
        if emptied.is_pending() {
            this.pulse.did_write(Poll::Pending, false);
            return Poll::Pending;
        }
        ready!(emptied)?;
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
    fn note(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &polled {
            Poll::Pending => self.pulse.did_write(Poll::Pending, false),
            Poll::Ready(Ok(taken)) => self.pulse.did_write(Poll::Ready(*taken), self.framing.is_foreign()),
            Poll::Ready(Err(_)) => {}
        }
        polled
    }
}
