//! Listeners: connections in, requests to the proxy, bounds and deadlines around both, and a graceful end.
//!
//! `run(listener, …, shutdown)` takes a bound socket and a future. The program runs one of these on a thread of its
//! own per core, all accepting from one socket: a hit is then answered on the core that read it, and a busy core
//! leaves new connections to the others.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use prometheus::{IntCounter, IntGauge};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout};

use crate::body::Reply;
use crate::config::Limits;
use crate::front::deadlines::{Busy, Held, Patient, Pulse, watchdog};
use crate::front::select::{Aside, Either};
use crate::front::socket::{Refused, Socket};
use crate::request::interim::{Interim, Outbox};
use crate::request::refusal::Refusal;

/// A client's request body, which may be silent only so long.
pub type RequestBody = Patient<Incoming>;

/// How a request came.
pub struct Arrival {
    /// The other end of the connection.
    pub peer: IpAddr,
    /// Where interim answers go, if the client may have any.
    pub interim: Option<Interim>,
    /// What was sent was no request: this is the only answer there may be.
    pub refused: Option<Refusal>,
}

/// What all listeners of a kind share.
#[derive(Clone)]
pub struct Door {
    limits: Limits,
    places: Arc<Semaphore>,
    /// Open connections by address, of those whose number is bounded.
    guests: Arc<Mutex<HashMap<IpAddr, usize>>>,
    /// When it was last said that an address has too many.
    warned: Arc<Mutex<Option<Instant>>>,
    /// Open connections, and those that were turned away; `None`: nobody counts.
    counted: Option<(IntGauge, IntCounter)>,
}

/// How often the log says that an address has too many connections.
const WARN_EVERY: Duration = Duration::from_secs(60);

impl Door {
    /// Lets in as many connections as `limits` say, shows how many are open, and counts those that an address has too
    /// many.
    #[must_use]
    pub fn new(limits: Limits, open: IntGauge, turned_away: IntCounter) -> Self {
        Self { counted: Some((open, turned_away)), ..Self::unseen(limits) }
    }

    /// Lets in as many connections as `limits` say.
    #[must_use]
    pub fn unseen(limits: Limits) -> Self {
        let places = Arc::new(Semaphore::new(limits.connections));
        Self { limits, places, guests: Arc::default(), warned: Arc::default(), counted: None }
    }

    /// Lets a connection in, unless its address has as many as it may.
    fn admit(&self, peer: IpAddr, place: OwnedSemaphorePermit) -> Option<Guest> {
        let address = (!self.limits.trusts(peer)).then(|| household(peer));
        if let Some(address) = address {
            let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
            let count = guests.entry(address).or_insert(0);
            if *count >= self.limits.connections_per_address {
                drop(guests);
                self.turn_away(peer);
                return None;
            }
            *count += 1;
        }
        if let Some((open, _)) = &self.counted {
            open.inc();
        }
        Some(Guest { door: self.clone(), address, _place: place })
    }

    fn turn_away(&self, peer: IpAddr) {
        if let Some((_, turned_away)) = &self.counted {
            turned_away.inc();
        }
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            let limit = self.limits.connections_per_address;
            tracing::warn!(%peer, limit, "an address has too many connections; more are closed (limits.connections_per_address, or trusted_proxies if it is a proxy of yours)");
        }
    }
}

/// Addresses that one client can choose among freely: those of one /64 of IPv6 count as one.
fn household(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address @ IpAddr::V4(_) => address,
    }
}

/// A connection that was let in, until it is closed.
struct Guest {
    door: Door,
    address: Option<IpAddr>,
    _place: OwnedSemaphorePermit,
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some((open, _)) = &self.door.counted {
            open.dec();
        }
        let Some(address) = self.address else { return };
        let mut guests = self.door.guests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = guests.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                guests.remove(&address);
            }
        }
    }
}

/// Serves `answer` on `listener` until `shutdown` is ready, then lets open requests finish within the drain timeout.
pub async fn run<F, A>(listener: TcpListener, door: Door, answer: F, shutdown: impl Future<Output = ()>)
where
    F: Fn(Request<RequestBody>, Arrival) -> A + Clone + Send + 'static,
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
        let Some(guest) = door.admit(peer.ip(), place) else { continue };
        let (answer, draining, open) = (answer.clone(), draining.clone(), open.clone());
        tokio::spawn(async move {
            connection(stream, peer, &guest.door.limits, answer, draining).await;
            drop((guest, open));
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
async fn accept(listener: &TcpListener, door: &Door) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
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
    F: Fn(Request<RequestBody>, Arrival) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Reply>> + Send + 'static,
{
    let (pulse, outbox, refused) = (Arc::new(Pulse::default()), Arc::new(Outbox::default()), Refused::default());
    let socket = Socket::new(stream, Arc::clone(&pulse), Arc::clone(&outbox), limits.header_bytes, Arc::clone(&refused));
    let io = TokioIo::new(socket);
    let (service_pulse, count) = (Arc::clone(&pulse), AtomicU64::new(0));
    let service = service_fn(move |request: Request<Incoming>| {
        let busy = Busy::begin(&service_pulse, request.version());
        // Nobody else counts.
        let number = count.load(Ordering::Relaxed) + 1;
        count.store(number, Ordering::Relaxed);
        let refused = refused.get().filter(|(at, _)| *at == number).map(|&(_, refusal)| refusal);
        // Interim answers are for HTTP/1.1 (RFC 9110 §15.2); HTTP/2 would frame them otherwise.
        let interim = (request.version() == Version::HTTP_11).then(|| outbox.begin());
        let turn = interim.clone();
        let answering = answer(request.map(|body| Patient::new(body, limits)), Arrival { peer: peer.ip(), interim, refused });
        async move {
            let mut response = answering.await;
            if refused.is_some() {
                // What follows has no meaning.
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            if let Some(turn) = turn {
                turn.end().await;
            }
            Ok::<_, Infallible>(response.map(|body| Held::new(body, busy)))
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

    #[tokio::test]
    async fn an_address_has_so_many_connections_and_a_trusted_proxy_any_number() {
        let text = "trusted_proxies=['192.0.2.0/24']\n[backend]\nurl='http://127.0.0.1:1'\n[limits]\nconnections_per_address=2";
        let limits = crate::config::check("t", text, &|_| None).config.unwrap().limits;
        let (open, away) = (IntGauge::new("a", "a").unwrap(), IntCounter::new("b", "b").unwrap());
        let door = Door::new(limits, open.clone(), away.clone());
        let admit = |peer: &str| door.admit(peer.parse().unwrap(), Arc::clone(&door.places).try_acquire_owned().unwrap());
        let (first, _second) = (admit("198.51.100.1"), admit("::ffff:198.51.100.1"));
        assert!(first.is_some() && admit("198.51.100.1").is_none() && away.get() == 1);
        drop(first);
        let _third = admit("198.51.100.1").unwrap();
        // Whoever has one address of a /64 has all of them.
        let _sixth = (admit("2001:db8::1").unwrap(), admit("2001:db8::2").unwrap());
        assert!(admit("2001:db8::3").is_none() && admit("2001:db8:0:1::3").is_some());
        let _proxies: Vec<_> = (0..5).map(|_| admit("192.0.2.9").unwrap()).collect();
        assert_eq!(open.get(), 9);
        drop((_second, _third, _sixth, _proxies));
        assert!(door.guests.lock().unwrap().is_empty());
    }
}
