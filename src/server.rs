//! Listeners: connections in, requests to the proxy, bounds and deadlines around both, and a graceful end.
//!
//! `run(listener, …, shutdown)` takes a bound socket and a future. The program runs one of these on a thread of its
//! own per core, all accepting from one socket: a hit is then answered on the core that read it, and a busy core
//! leaves new connections to the others.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use prometheus::IntGauge;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::aside::{Aside, Either};
use crate::body::{BoxError, Broken, Reply};
use crate::config::Limits;
use crate::interim::{Interim, Outbox};
use crate::outcome::Failure;

/// A client's request body, which may be silent only so long.
pub type RequestBody = Patient<Incoming>;

/// What all listeners of a kind share.
#[derive(Clone)]
pub struct Door {
    limits: Limits,
    places: Arc<Semaphore>,
    open: IntGauge,
}

impl Door {
    /// Lets in as many connections as `limits` say, and shows how many are open.
    #[must_use]
    pub fn new(limits: Limits, open: IntGauge) -> Self {
        let places = Arc::new(Semaphore::new(limits.connections));
        Self { limits, places, open }
    }
}

/// Serves `answer` on `listener` until `shutdown` is ready, then lets open requests finish within the drain timeout.
pub async fn run<F, A>(listener: TcpListener, door: Door, answer: F, shutdown: impl Future<Output = ()>)
where
    F: Fn(Request<RequestBody>, IpAddr, Option<Interim>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Reply>> + Send + 'static,
{
    // Told to the connections that it is time to end; open while one of them is.
    let (drain, draining) = watch::channel(false);
    let (open, mut all_closed) = mpsc::channel::<()>(1);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let (stream, peer, place) = tokio::select! {
            accepted = accept(&listener, &door) => accepted,
            () = &mut shutdown => break,
        };
        let (door, answer, draining, open) = (door.clone(), answer.clone(), draining.clone(), open.clone());
        door.open.inc();
        tokio::spawn(async move {
            connection(stream, peer, &door.limits, answer, draining).await;
            door.open.dec();
            drop((place, open));
        });
    }
    drop((listener, open));
    drain.send_replace(true);
    let drained = timeout(door.limits.drain_timeout, all_closed.recv()).await;
    if drained.is_err() {
        tracing::warn!("some requests did not finish in time and were broken off (limits.drain_timeout)");
    }
}

/// The next connection, once there is a place for it. Out of file descriptors, it waits for some to be closed.
async fn accept(listener: &TcpListener, door: &Door) -> (TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit) {
    loop {
        let Ok(place) = Arc::clone(&door.places).acquire_owned().await else { std::future::pending().await };
        match listener.accept().await {
            Ok((stream, peer)) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY");
                }
                return (stream, peer, place);
            }
            Err(error) => {
                if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
                    tracing::error!(%error, "a connection could not be accepted; is the limit of open files too low?");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn connection<F, A>(stream: TcpStream, peer: SocketAddr, limits: &Limits, answer: F, mut draining: watch::Receiver<bool>)
where
    F: Fn(Request<RequestBody>, IpAddr, Option<Interim>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Reply>> + Send + 'static,
{
    let pulse = Arc::new(Pulse::new());
    let outbox = Arc::new(Outbox::default());
    let io = TokioIo::new(Watched { stream, pulse: Arc::clone(&pulse), outbox: Arc::clone(&outbox) });
    let stall = limits.stall_timeout;
    let service_pulse = Arc::clone(&pulse);
    let service = service_fn(move |request: Request<Incoming>| {
        let busy = Busy::begin(&service_pulse);
        // Interim answers are for HTTP/1.1 (RFC 9110 §15.2); HTTP/2 would frame them otherwise.
        let interim = (request.version() == Version::HTTP_11).then(|| outbox.begin());
        let turn = interim.clone();
        let answering = answer(request.map(|body| Patient::new(body, stall)), peer.ip(), interim);
        async move {
            let response = answering.await;
            if let Some(turn) = turn {
                turn.end().await;
            }
            Ok::<_, Infallible>(response.map(|body| Held { body, _busy: busy }))
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // The watchdog below keeps all deadlines with one timer a connection, instead of one a request.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(limits.header_bytes).max_headers(100);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .keep_alive_timeout(Duration::from_secs(20));
    let mut serving = std::pin::pin!(builder.serve_connection(io, service).into_owned());
    // All that may end a connection from outside; it wakes rarely, and is polled only then.
    let outside = async {
        tokio::select! {
            why = watchdog(&pulse, limits) => Some(why),
            _ = draining.wait_for(|&draining| draining) => None,
        }
    };
    let ended = match Aside::new(serving.as_mut(), std::pin::pin!(outside)).await {
        Either::Main(ended) => Ok(ended),
        Either::Side(Some(why)) => Err(why),
        Either::Side(None) => {
            serving.as_mut().graceful_shutdown();
            match Aside::new(serving.as_mut(), std::pin::pin!(watchdog(&pulse, limits))).await {
                Either::Main(ended) => Ok(ended),
                Either::Side(why) => Err(why),
            }
        }
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%peer, %error, "a connection ended early"),
        Err(why) => tracing::debug!(%peer, why, "a connection was closed"),
    }
}

/// When a connection last moved, and whether it owes or is owed anything.
struct Pulse {
    start: Instant,
    /// Milliseconds after `start`: the last byte read, the end of the last answer, the first byte read
    /// since the last answer.
    read: AtomicU64,
    answered: AtomicU64,
    head_since: AtomicU64,
    /// Since when bytes wait for the client to take them; zero: none do.
    blocked_since: AtomicU64,
    /// Requests being answered.
    busy: AtomicU64,
}

impl Pulse {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self { start: Instant::now(), read: zero(), answered: zero(), head_since: zero(), blocked_since: zero(), busy: zero() }
    }

    /// Milliseconds since the connection was opened, at least one.
    fn now(&self) -> u64 {
        crate::clock::millis(self.start.elapsed()) + 1
    }

    fn did_read(&self) {
        let now = self.now();
        self.read.store(now, Ordering::Relaxed);
        if self.busy.load(Ordering::Relaxed) == 0 && self.head_since.load(Ordering::Relaxed) == 0 {
            self.head_since.store(now, Ordering::Relaxed);
        }
    }

    /// When the connection is to be closed unless it moves, and why.
    fn deadline(&self, limits: &Limits) -> (u64, &'static str) {
        let after = |since: u64, span: Duration| since.saturating_add(crate::clock::millis(span));
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let blocked = match load(&self.blocked_since) {
            0 => (u64::MAX, ""),
            since => (after(since, limits.stall_timeout), "the client takes no bytes (limits.stall_timeout)"),
        };
        let waiting = match (load(&self.busy), load(&self.head_since)) {
            (0, 0) => (after(load(&self.read).max(load(&self.answered)), limits.idle_timeout), "idle (limits.idle_timeout)"),
            (0, since) => (after(since, limits.header_timeout), "the request's head did not come in time (limits.header_timeout)"),
            _ => (u64::MAX, ""),
        };
        blocked.min(waiting)
    }
}

/// Returns when the connection is overdue. It sleeps until the nearest deadline there could be and then looks again,
/// so that requests need not touch a timer.
async fn watchdog(pulse: &Pulse, limits: &Limits) -> &'static str {
    let nap = limits.header_timeout.min(limits.idle_timeout).min(limits.stall_timeout);
    loop {
        let (deadline, why) = pulse.deadline(limits);
        let now = pulse.now();
        if now >= deadline {
            return why;
        }
        let next = Duration::from_millis(deadline - now).min(nap.max(Duration::from_millis(10)));
        sleep_until(Instant::now() + next).await;
    }
}

/// While it lives, a request is being answered.
struct Busy(Arc<Pulse>);

impl Busy {
    fn begin(pulse: &Arc<Pulse>) -> Self {
        pulse.busy.fetch_add(1, Ordering::Relaxed);
        pulse.head_since.store(0, Ordering::Relaxed);
        Self(Arc::clone(pulse))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.answered.store(self.0.now(), Ordering::Relaxed);
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer's body; the request counts as being answered until it is gone.
pub struct Held {
    body: Reply,
    _busy: Busy,
}

impl Body for Held {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A socket whose movements are noted.
struct Watched {
    stream: TcpStream,
    pulse: Arc<Pulse>,
    outbox: Arc<Outbox>,
}

impl Watched {
    fn note<T>(&self, polled: Poll<T>) -> Poll<T> {
        if polled.is_pending() {
            let now = self.pulse.now();
            let _ = self.pulse.blocked_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        } else {
            // Idleness is counted from the last byte read: a client that reads a long answer is not idle but busy.
            self.pulse.blocked_since.store(0, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.pulse.did_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
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
            return this.note(emptied);
        }
        ready!(emptied)?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A request's body that is broken off when the client is silent for too long.
pub struct Patient<B> {
    inner: B,
    silence: Duration,
    timer: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl<B> Patient<B> {
    /// Waits at most `silence` for each piece.
    pub const fn new(inner: B, silence: Duration) -> Self {
        Self { inner, silence, timer: None }
    }
}

impl<B> Body for Patient<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            this.timer = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let silence = this.silence;
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + silence)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Some(Err(Box::new(Broken(Failure::Timeout)))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Binds a listener. A bare `[::]` serves IPv4 too.
///
/// # Errors
/// The address is taken or not ours.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        let checked = crate::config::check("t", "[backend]\nurl='http://127.0.0.1:1'", &|_| None);
        checked.config.unwrap().limits
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_closes_what_does_not_move() {
        let limits = limits();
        let idle = Pulse::new();
        assert!(watchdog(&idle, &limits).await.starts_with("idle"));
        let slow = Pulse::new();
        slow.did_read();
        assert!(watchdog(&slow, &limits).await.starts_with("the request's head"));
        let stuck = Arc::new(Pulse::new());
        let _busy = Busy::begin(&stuck);
        stuck.blocked_since.store(1, Ordering::Relaxed);
        assert!(watchdog(&stuck, &limits).await.starts_with("the client takes no bytes"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_being_answered_is_left_in_peace() {
        let pulse = Arc::new(Pulse::new());
        let _busy = Busy::begin(&pulse);
        let hour = Duration::from_secs(3600);
        assert!(timeout(hour, watchdog(&pulse, &limits())).await.is_err());
    }
}
