//! Listeners: connections in, a task for each, and a graceful end.
//!
//! [`run`] takes a bound socket and a future that says when to stop. The program runs one of these on a thread of its own per
//! core, all accepting from one socket: a hit is then answered on the core that read it, and a busy core leaves new
//! connections to the others.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http::{Request, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::timeout;

use super::body::RequestBody;
use super::connection;
use super::connection_limits::ConnectionLimits;
use crate::body::Reply;
use crate::request::Arrival;

/// Serves `answer` on `listener` until `shutdown` is ready, then lets open requests finish within `limits.drain_timeout`.
pub async fn run<F, A>(listener: TcpListener, limits: ConnectionLimits, answer: F, shutdown: impl Future<Output = ()>)
where
    F: Fn(Request<RequestBody>, Arrival) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Reply>> + Send + 'static,
{
    // Tells connections to end, and is told when all have.
    let (drain, draining) = watch::channel(false);
    let (open, mut all_closed) = mpsc::channel::<()>(1);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let (stream, peer, permit) = tokio::select! {
            accepted = accept(&listener, &limits) => accepted,
            () = &mut shutdown => break,
        };
        let Some(admitted) = limits.admit(peer.ip(), permit) else { continue };
        let (answer, draining, open) = (answer.clone(), draining.clone(), open.clone());
        tokio::spawn(async move {
            connection::serve(stream, peer, admitted.limits(), answer, draining).await;
            drop((admitted, open));
        });
    }
    drop((listener, open));
    drain.send_replace(true);
    let drained = timeout(limits.limits.drain_timeout, all_closed.recv()).await;
    if drained.is_err() {
        tracing::warn!("some requests did not finish in time and were broken off (limits.drain_timeout)");
    }
}

/// The next connection, once there may be another. Out of file descriptors, it waits for some to be closed.
async fn accept(listener: &TcpListener, limits: &ConnectionLimits) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    loop {
        let permit = limits.free().await;
        match listener.accept().await {
            Ok((stream, peer)) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY");
                }
                return (stream, peer, permit);
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
