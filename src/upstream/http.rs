//! An existing API, reached over HTTP/1.1 through a pool of kept-alive connections.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::rt::Executor;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioTimer;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};
use tower_service::Service;

use super::resolve::Resolver;
use super::upload::{Progress, Watched};
use super::{AbortOnDrop, Backend, BackendError, ResponseFuture};
use crate::body::{self, BoxError, Stream};
use crate::request::interim::InterimSender;

/// Python servers close a connection after five idle seconds; it is not used for longer than this, so that few
/// requests meet one that is just being closed.
const POOL_IDLE: Duration = Duration::from_secs(4);

/// A kept connection that was closed is noticed as soon as a request is sent over it, well within this.
const SOON: Duration = Duration::from_secs(2);

/// The most that is read of an answer at one time, and the longest head of one, in bytes.
const MAX_BUFFER: usize = 128 << 10;

/// An API over HTTP.
pub struct HttpBackend {
    /// Asks over connections that are kept.
    client: Client<Connector, Stream>,
    /// Asks over a new connection each time.
    anew: Client<Connector, Stream>,
    runtime: Handle,
    authority: Authority,
    host: HeaderValue,
    connect_timeout: Duration,
}

/// Spawns on the background runtime: a pooled connection must outlive the serving thread that asked for it first.
#[derive(Clone)]
struct BackgroundExecutor(Handle);

impl<F> Executor<F> for BackgroundExecutor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// Makes connections within a deadline, which covers the resolution of the name too.
#[derive(Clone)]
struct Connector<C = HttpConnector<Resolver>> {
    inner: C,
    deadline: Duration,
}

impl Connector {
    fn new(deadline: Duration) -> Self {
        let mut inner = HttpConnector::new_with_resolver(Resolver::default());
        inner.set_connect_timeout(Some(deadline));
        inner.set_nodelay(true);
        inner.set_keepalive(Some(Duration::from_secs(15)));
        Self { inner, deadline }
    }
}

impl<C> Service<Uri> for Connector<C>
where
    C: Service<Uri, Error: Into<BoxError>, Future: Send + 'static>,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, deadline) = (self.inner.call(uri), self.deadline);
        Box::pin(async move {
            let late = || format!("no connection, or no address for its name, within {deadline:?} (backend.connect_timeout)");
            timeout(deadline, connecting).await.map_err(|_| late())?.map_err(Into::into)
        })
    }
}

impl HttpBackend {
    /// A client for the API at `authority`, which is sent `host` as `Host`. Connections live on `runtime` and must stand
    /// within `connect_timeout`.
    #[must_use]
    pub fn new(authority: &Authority, host: &Authority, connect_timeout: Duration, runtime: Handle) -> Self {
        let connector = Connector::new(connect_timeout);
        let client = |kept| {
            let mut builder = Client::builder(BackgroundExecutor(runtime.clone()));
            builder.pool_idle_timeout(POOL_IDLE).pool_timer(TokioTimer::new()).pool_max_idle_per_host(kept);
            builder.http1_max_headers(200).http1_max_buf_size(MAX_BUFFER).build(connector.clone())
        };
        let (client, anew) = (client(64), client(0));
        let host = HeaderValue::from_str(host.as_str()).unwrap_or_else(|_| HeaderValue::from_static("localhost"));
        Self { client, anew, runtime, authority: authority.clone(), host, connect_timeout }
    }
}

impl Backend for HttpBackend {
    fn call(&self, request: Request<Stream>, progress: &Arc<Progress>) -> ResponseFuture {
        let (mut parts, body) = request.into_parts();
        let target = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let uri = Uri::builder().scheme(Scheme::HTTP).authority(self.authority.clone()).path_and_query(target).build();
        let uri = match uri {
            Ok(uri) => uri,
            Err(error) => return Box::pin(std::future::ready(Err(BackendError::Invalid(error.into())))),
        };
        parts.uri = uri;
        parts.version = Version::HTTP_11;
        parts.headers.insert(HOST, self.host.clone());
        if !body.is_end_stream() && body.size_hint().exact().is_none() && !parts.headers.contains_key(CONTENT_LENGTH) {
            // Said where the library would take a body with GET or HEAD for none.
            parts.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        // A request without a body that can be repeated is repeated if a kept-alive connection turns out to be closed: the backend
        // may have closed it while the request was on its way. It goes over a new connection, since the others that are kept
        // may be closed too. What is closed later was being worked on, and may have been what made the backend fail.
        let (progress, connect_deadline) = (Arc::clone(progress), self.connect_timeout * 2);
        let empty = || Watched::new(body::empty(), Arc::clone(&progress)).boxed_unsync();
        let repeatable = (matches!(parts.method, Method::GET | Method::HEAD) && body.is_end_stream())
            .then(|| Request::from_parts(parts.clone(), empty()));
        let body = if body.is_end_stream() { empty() } else { body };
        let (client, anew) = (self.client.clone(), self.anew.clone());
        let interim = parts.extensions.remove::<InterimSender>();
        let mut request = Request::from_parts(parts, body);
        if let Some(interim) = interim {
            hyper::ext::on_informational(&mut request, move |response| interim.send(response.status(), response.headers()));
        }
        let work = async move {
            progress.connects(connect_deadline);
            let began = Instant::now();
            match (client.request(request).await, repeatable) {
                (Err(error), Some(request)) if was_closed(&error) && began.elapsed() < SOON => {
                    progress.connects(connect_deadline);
                    anew.request(request).await
                }
                (result, _) => result,
            }
        };
        // On the background runtime, with its reactor; aborted when the caller is dropped.
        let task = AbortOnDrop(self.runtime.spawn(work));
        Box::pin(async move {
            let result = task.await.map_err(|error| BackendError::Reset(error.into()))?;
            let mut response: Response<_> = result.map_err(classify)?;
            if response.status().is_informational() {
                return Err(BackendError::Invalid("it switched protocols, which nobody asked for".into()));
            }
            if !is_plainly_framed(response.headers()) {
                return Err(BackendError::Invalid("its Transfer-Encoding is not chunked alone".into()));
            }
            if !settle_length(response.headers_mut()) {
                return Err(BackendError::Invalid("its Content-Length is not one number".into()));
            }
            Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
        })
    }
}

/// Leaves one length at most. One beside a transfer coding says nothing (RFC 9112 §6.3), and one that is repeated is one (RFC 9110 §8.6).
/// `false`: it is no number, or they contradict one another.
fn settle_length(headers: &mut HeaderMap) -> bool {
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
        return true;
    }
    let mut lengths =
        headers.get_all(CONTENT_LENGTH).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b',')).map(<[u8]>::trim_ascii);
    let Some(first) = lengths.next() else { return true };
    let is_number = !first.is_empty() && first.len() <= 19 && first.iter().all(u8::is_ascii_digit);
    let Some(only) = HeaderValue::from_bytes(first).ok().filter(|_| is_number && lengths.all(|other| other == first)) else { return false };
    headers.insert(CONTENT_LENGTH, only);
    true
}

/// Whether a response has no transfer coding but `chunked`, named once: the library undoes that one alone, and takes what ends in
/// it for that one (RFC 9112 §6.1). A length beside it says nothing (§6.3), and does not go on. One word that is no registered coding
/// and cannot be taken for `chunked` names nothing that was done to the body, which ends with the connection.
fn is_plainly_framed(headers: &HeaderMap) -> bool {
    const CODINGS: [&[u8]; 8] = [b"gzip", b"x-gzip", b"deflate", b"compress", b"x-compress", b"br", b"zstd", b"identity"];
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_plain = |coding: &HeaderValue| {
        let word = coding.as_bytes().trim_ascii().to_ascii_lowercase();
        let is_word = !word.is_empty() && word.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte));
        word == b"chunked" || (is_word && !word.windows(7).any(|part| part == b"chunked") && !CODINGS.contains(&&word[..]))
    };
    codings.next().is_none_or(is_plain) && codings.next().is_none()
}

/// The HTTP library's error within the connection pool's.
fn library_error(error: &Error) -> Option<&hyper::Error> {
    std::error::Error::source(error)?.downcast_ref()
}

/// Whether the connection was closed with nothing of an answer on it.
fn was_closed(error: &Error) -> bool {
    library_error(error).is_some_and(|error| error.is_incomplete_message() || error.is_canceled() || is_reset(error))
}

fn is_reset(error: &hyper::Error) -> bool {
    let io = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| matches!(io.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe))
}

fn classify(error: Error) -> BackendError {
    if error.is_connect() {
        return BackendError::Connect(error.into());
    }
    if library_error(&error).is_some_and(|error| error.is_parse() || error.is_parse_too_large()) {
        return BackendError::Invalid(error.into());
    }
    BackendError::Reset(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{Pending, pending};

    /// What waits for the address of a name that nobody answers for.
    #[derive(Clone)]
    struct Unresolved;

    impl Service<Uri> for Unresolved {
        type Response = ();
        type Error = BoxError;
        type Future = Pending<Result<(), BoxError>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Uri) -> Self::Future {
            pending()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_is_not_resolved_in_time_is_given_up() {
        let mut connector = Connector { inner: Unresolved, deadline: Duration::from_secs(1) };
        let error = timeout(Duration::from_secs(10), connector.call(Uri::from_static("http://api.test/"))).await.expect("it hangs");
        assert!(error.unwrap_err().to_string().contains("backend.connect_timeout"));
    }
}
