//! One connection: requests out of it, responses into it, until it is closed, overdue, or told to end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::body::{RequestBody, ResponseBody};
use super::deadlines::{Activity, InFlight, watchdog};
use super::select::{Either, select};
use super::socket::{RefusedRequest, ShortWay, Socket};
use crate::body::Reply;
use crate::config::Limits;
use crate::request::Arrival;
use crate::request::interim::InterimQueue;

/// The most fields of a request's head.
const MAX_FIELDS: usize = 100;
/// Streams of one HTTP/2 connection that may be open at a time.
const MAX_STREAMS: u32 = 256;
/// How often an HTTP/2 client is pinged, and how long it has to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long an idle HTTP/1 connection may bring one more request once the program is told to stop.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// Serves a connection. What ends it is logged at debug: clients come and go.
///
/// Plain requests go the `short` way, if there is one: what it does not answer is answered by `answer`.
pub async fn serve<F, A>(
    stream: TcpStream,
    peer: SocketAddr,
    limits: &Limits,
    (answer, short): (F, Option<ShortWay>),
    mut draining: watch::Receiver<bool>,
) where
    F: Fn(Request<RequestBody>, Arrival) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Reply>> + Send + 'static,
{
    let (activity, interim, refused) = (Arc::new(Activity::default()), Arc::new(InterimQueue::default()), RefusedRequest::default());
    let ending = Arc::new(AtomicBool::new(false));
    let shared = (Arc::clone(&activity), Arc::clone(&interim), Arc::clone(&refused), Arc::clone(&ending));
    let mut socket = Socket::new(stream, limits.header_bytes, short, shared);
    let (counted, end) = (Arc::clone(&activity), Arc::clone(&ending));
    let speaks_http2 = Arc::new(AtomicBool::new(false));
    let http2 = Arc::clone(&speaks_http2);
    let service = service_fn(move |request: Request<Incoming>| {
        let (version, ending) = (request.version(), Arc::clone(&ending));
        if version == Version::HTTP_2 {
            speaks_http2.store(true, Ordering::Relaxed);
        }
        let in_flight = InFlight::begin(&counted, version);
        let number = counted.did_read_request();
        let refused = refused.get().filter(|(at, _)| *at == number).map(|&(_, refusal)| refusal);
        // Interim responses are for HTTP/1.1 (RFC 9110 §15.2); HTTP/2 would frame them otherwise.
        let sender = (version == Version::HTTP_11).then(|| interim.open());
        let arrival = Arrival { peer: peer.ip(), interim: sender.clone(), own: false, refused };
        let answering = answer(request.map(|body| RequestBody::new(body, limits)), arrival);
        async move {
            let mut response = answering.await;
            if refused.is_some() || (ending.load(Ordering::Relaxed) && version == Version::HTTP_11) {
                // What follows has no meaning, or is for another process.
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            if let Some(sender) = sender {
                sender.close().await;
            }
            Ok::<_, Infallible>(response.map(|body| ResponseBody::new(body, in_flight)))
        }
    });
    let mut outside = pin!(async {
        tokio::select! {
            why = watchdog(&activity, limits) => Some(why),
            _ = draining.wait_for(|&draining| draining) => None,
        }
    });
    let told = match select(pin!(socket.answer_plain()), outside.as_mut()).await {
        Either::Busy(Ok(())) => Either::Busy(()),
        Either::Busy(Err(error)) => return tracing::debug!(%peer, %error, "a connection ended early"),
        Either::Quiet(Some(why)) => return tracing::debug!(%peer, why, "a connection was closed"),
        Either::Quiet(None) => Either::Quiet(None),
    };
    // Made only now, and apart, since many a connection never needs it.
    let mut serving = Box::pin(http_builder(limits).serve_connection(TokioIo::new(socket), service).into_owned());
    let told = match told {
        Either::Busy(()) => select(serving.as_mut(), outside).await,
        Either::Quiet(told) => Either::Quiet(told),
    };
    let ended = match told {
        Either::Busy(ended) => Ok(ended),
        Either::Quiet(Some(why)) => Err(why),
        Either::Quiet(None) => {
            // A client may be sending a request right now, which would be lost: it is answered, and told to come again anew.
            // (HTTP/2 has a message for that.)
            end.store(true, Ordering::Relaxed);
            let ended = if http2.load(Ordering::Relaxed) {
                None
            } else {
                timeout(LAST_REQUEST, select(serving.as_mut(), pin!(watchdog(&activity, limits)))).await.ok()
            };
            let ended = match ended {
                Some(ended) => ended,
                None => {
                    serving.as_mut().graceful_shutdown();
                    select(serving.as_mut(), pin!(watchdog(&activity, limits))).await
                }
            };
            match ended {
                Either::Busy(ended) => Ok(ended),
                Either::Quiet(why) => Err(why),
            }
        }
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%peer, %error, "a connection ended early"),
        Err(why) => tracing::debug!(%peer, why, "a connection was closed"),
    }
}

/// HTTP/1 and HTTP/2 by what the client speaks. The watchdog keeps the deadlines of HTTP/1, with one timer a connection
/// instead of one a request.
fn http_builder(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(limits.header_bytes).max_headers(MAX_FIELDS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(PING_INTERVAL))
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}
