//! Listeners: connections in, a task for each, and a graceful end.
//!
//! [`run`] takes a bound socket and a future that says when to stop. The program runs one of these on a thread of its own per
//! core, all accepting from one socket: a hit is then answered on the core that read it, and a busy core leaves new
//! connections to the others.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::body::RequestBody;
use super::connection;
use super::connection_limits::{Admitted, ConnectionLimits};
use super::sockets::{Listener, retire};
use crate::body::Reply;
use crate::request::Arrival;
use crate::request::short_way::ShortWay;

/// What ends a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stop {
    /// Nothing yet.
    #[default]
    No,
    /// It ends.
    End,
    /// Another process listens at the same address, and takes over.
    HandOver,
}

/// How long connections are accepted that had begun when another process took over.
const HANDING_OVER: Duration = Duration::from_millis(200);

/// Waits until a listener is to end.
async fn stopped(told: &mut watch::Receiver<Stop>) -> Stop {
    // A sender that is gone means the end too.
    told.wait_for(|stop| *stop != Stop::No).await.map_or(Stop::End, |stop| *stop)
}

/// Serves `answer` on `listener` until `told` to stop, then lets open requests finish within `limits.drain_timeout`. Plain requests
/// go the `short` way, if there is one.
///
/// # Errors
/// The socket cannot be used.
pub async fn run<F, A>(
    listener: Listener,
    limits: ConnectionLimits,
    (answer, short): (F, Option<Arc<dyn ShortWay>>),
    mut told: watch::Receiver<Stop>,
) -> io::Result<()>
where
    F: Fn(Request<RequestBody>, Arrival) -> A + Clone + Send + Unpin + 'static,
    A: Future<Output = Response<Reply>> + Send + 'static,
{
    // Tells connections to end, and is told when all have.
    let (drain, draining) = watch::channel(false);
    let (open, mut all_closed) = mpsc::channel::<()>(1);
    let inherited = listener.inherited;
    let listener = TcpListener::from_std(listener.socket)?;
    let begin = |(stream, peer, admitted): (TcpStream, SocketAddr, Admitted)| {
        let (answering, draining, open) = ((answer.clone(), short.clone()), draining.clone(), open.clone());
        tokio::spawn(async move {
            connection::serve(stream, peer, &admitted, answering, draining).await;
            drop((admitted, open));
        });
    };
    let stop = {
        let mut stopped = std::pin::pin!(stopped(&mut told));
        loop {
            tokio::select! {
                accepted = accept(&listener, &limits) => begin(accepted),
                stop = &mut stopped => break stop,
            }
        }
    };
    if stop == Stop::HandOver && !inherited {
        match retire(&listener) {
            Ok(()) => {
                drain.send_replace(true);
                let end = Instant::now() + HANDING_OVER;
                while let Ok(accepted) = timeout_at(end, accept(&listener, &limits)).await {
                    begin(accepted);
                }
            }
            Err(error) => tracing::warn!(%error, "connections may be lost: the old socket cannot be retired"),
        }
    }
    drop((listener, open));
    drain.send_replace(true);
    let drained = timeout(limits.limits.drain_timeout, all_closed.recv()).await;
    if drained.is_err() {
        tracing::warn!("some requests did not finish in time and were broken off (limits.drain_timeout)");
    }
    Ok(())
}

/// The next connection that is admitted. Out of file descriptors, it waits for some to be closed.
async fn accept(listener: &TcpListener, limits: &ConnectionLimits) -> (TcpStream, SocketAddr, Admitted) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY");
                }
                if let Some(admitted) = limits.admit(peer.ip()).await {
                    return (stream, peer, admitted);
                }
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
