//! Whatever answers when the cache cannot: the trait ([`Backend`]), its implementation over HTTP ([`http`]), the bounds around
//! either ([`Upstream`]), and the fields of requests and responses on their way ([`request_fields`], [`response_fields`], [`locations`]).
//! By which of them a response is chosen says [`selecting`].
//!
//! Knows requests and responses. Knows neither routes nor the cache: whether an answer may be kept is not asked here.

pub mod body;
pub mod failure;
pub mod http;
pub mod locations;
pub mod request_fields;
pub mod response_fields;
pub mod selecting;

use std::fmt;
use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ::http::{Request, Response};
use http_body::Body as _;
use http_body_util::BodyExt;
use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, timeout};

use crate::body::{BoxError, ClientFault, Noting, Stream};
use crate::request::secrets::{shown_method, without_secrets};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace;
use body::{Begun, DeadlineBody};
use failure::Failure;

/// The future of a response.
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response<Stream>, BackendError>> + Send>>;

/// Answers requests. What it gets is ready to be sent: hop-by-hop fields are gone, Sluice's own are set.
pub trait Backend: Send + Sync {
    /// Starts answering. Dropping the future gives the request up.
    fn call(&self, request: Request<Stream>) -> ResponseFuture;
}

/// A task that is aborted when nobody waits for it any more.
pub struct AbortOnDrop<T>(pub JoinHandle<T>);

impl<T> Future for AbortOnDrop<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why there is no response.
#[derive(Debug)]
pub enum BackendError {
    /// No connection could be made.
    Connect(BoxError),
    /// The connection broke before the head of the response.
    Reset(BoxError),
    /// The head did not come in time.
    Timeout(Duration),
    /// What came was not HTTP.
    Invalid(BoxError),
    /// The body broke off before its first byte.
    Truncated(BoxError),
    /// Too many requests are on their way already.
    Overloaded,
    /// The request could not be sent whole, for what its client did wrong.
    Client(ClientFault),
}

impl BackendError {
    /// The value of the metric label `status`.
    const fn label(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::Reset(_) => "reset",
            Self::Timeout(_) => "timeout",
            Self::Invalid(_) => "invalid",
            Self::Truncated(_) => "truncated",
            Self::Overloaded => "overloaded",
            Self::Client(_) => "client",
        }
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(_) => f.write_str("no connection to the backend (is it running, is backend.url right?)"),
            Self::Reset(_) => f.write_str("the backend closed the connection before it answered"),
            Self::Timeout(after) => write!(f, "the backend did not answer within {after:?} (backend.timeout)"),
            Self::Invalid(_) => f.write_str("the backend's answer is not valid HTTP"),
            Self::Truncated(_) => f.write_str("the backend's answer ended before its body began, or its chunks are malformed"),
            Self::Overloaded => f.write_str("too many requests are on their way to the backend (backend.max_in_flight)"),
            Self::Client(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for BackendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect(cause) | Self::Reset(cause) | Self::Invalid(cause) | Self::Truncated(cause) => Some(cause.as_ref()),
            Self::Timeout(_) | Self::Overloaded | Self::Client(_) => None,
        }
    }
}

impl From<&BackendError> for Failure {
    fn from(error: &BackendError) -> Self {
        match error {
            BackendError::Connect(_) => Self::Connect,
            BackendError::Reset(_) => Self::Reset,
            BackendError::Timeout(_) => Self::Timeout,
            BackendError::Invalid(_) => Self::Invalid,
            BackendError::Truncated(_) => Self::Truncated,
            BackendError::Overloaded => Self::Overloaded,
            // For whom nothing is said of the client: nobody who shares an answer sends a body.
            BackendError::Client(_) => Self::Lost,
        }
    }
}

/// A backend within bounds: so many requests at a time, each with deadlines, all of them counted.
pub struct Upstream {
    backend: Box<dyn Backend>,
    permits: Arc<Semaphore>,
    timeout: Duration,
    metrics: Arc<Metrics>,
}

/// The permit to send one request.
pub struct Admitted {
    permit: OwnedSemaphorePermit,
    /// Since when it was waited for.
    since: Instant,
}

/// What the span of a request to the upstream says of it.
fn asked_for(route: &str, request: &Request<Stream>) -> Vec<KeyValue> {
    let text = |key, text: &str| KeyValue::new(key, text.to_owned());
    vec![
        text("http.request.method", shown_method(request.method())),
        text("url.path", &without_secrets(request.uri().path())),
        text("sluice.rule", route),
    ]
}

impl Upstream {
    /// Lets `max_in_flight` requests at a time reach `backend`, and gives each of them `timeout` to the head of its
    /// response. A request that finds no free permit waits for one for at most `timeout`.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>, max_in_flight: usize, timeout: Duration, metrics: Arc<Metrics>) -> Self {
        Self { backend, permits: Arc::new(Semaphore::new(max_in_flight)), timeout, metrics }
    }

    /// Sends a request. The response's body may be silent for `silence` at most, and keeps its permit until it ends.
    ///
    /// # Errors
    /// A [`BackendError`] if there is no head within the deadline. What the client did wrong is one too, but no failure of the
    /// backend's: it is not counted as its answer.
    pub async fn call(&self, route: &str, request: Request<Stream>, silence: Duration) -> Result<Response<Stream>, BackendError> {
        self.call_once(route, Instant::now(), self.admit(), request, silence).await
    }

    /// Waits for the permit to send a request. Nothing is sent before it is there, so a caller that leaves has asked for nothing.
    ///
    /// # Errors
    /// [`BackendError::Overloaded`] if none becomes free in time.
    pub async fn admit(&self) -> Result<Admitted, BackendError> {
        let since = Instant::now();
        match timeout(self.timeout, Arc::clone(&self.permits).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(Admitted { permit, since }),
            _ => Err(BackendError::Overloaded),
        }
    }

    /// The same as [`call`](Self::call) with a permit from before, or the reason why there is none.
    ///
    /// # Errors
    /// A [`BackendError`] if there is no head within the deadline.
    pub async fn call_admitted(
        &self,
        route: &str,
        admitted: Result<Admitted, BackendError>,
        request: Request<Stream>,
        silence: Duration,
    ) -> Result<Response<Stream>, BackendError> {
        let started = admitted.as_ref().map_or_else(|_| Instant::now(), |admitted| admitted.since);
        self.call_once(route, started, ready(admitted), request, silence).await
    }

    async fn call_once(
        &self,
        route: &str,
        started: Instant,
        admitting: impl Future<Output = Result<Admitted, BackendError>>,
        request: Request<Stream>,
        silence: Duration,
    ) -> Result<Response<Stream>, BackendError> {
        let told = if trace::is_on() { asked_for(route, &request) } else { Vec::new() };
        let (parts, body) = request.into_parts();
        let (body, fault) = if body.is_end_stream() {
            (body, None)
        } else {
            let (noting, fault) = Noting::new(body);
            (noting.boxed_unsync(), Some(fault))
        };
        let mut request = Request::from_parts(parts, body);
        let asking = async {
            trace::inject(request.headers_mut());
            self.call_within_bounds(admitting.await?.permit, request, silence).await
        };
        let result = trace::within(SpanKind::Client, "upstream", told, asking, |result| match result {
            Ok(response) => Ok(KeyValue::new("http.response.status_code", i64::from(response.status().as_u16()))),
            Err(error) => Err(error.to_string()),
        });
        let result = result.await;
        if let (Err(_), Some(&fault)) = (&result, fault.as_ref().and_then(|fault| fault.get())) {
            tracing::debug!(route, %fault, "a request could not be sent whole");
            return Err(BackendError::Client(fault));
        }
        let status = match &result {
            Ok(response) => response.status().as_str().to_owned(),
            Err(error) => error.label().to_owned(),
        };
        self.metrics.backend_requests.with_label_values(&[route, &status]).inc();
        self.metrics.backend_seconds.with_label_values(&[route]).observe(started.elapsed().as_secs_f64());
        if let Err(error) = &result {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::debug!(route, %error, cause, "backend");
        }
        result
    }

    async fn call_within_bounds(
        &self,
        permit: OwnedSemaphorePermit,
        request: Request<Stream>,
        silence: Duration,
    ) -> Result<Response<Stream>, BackendError> {
        let late = |_| BackendError::Timeout(self.timeout);
        let response = timeout(self.timeout, self.backend.call(request)).await.map_err(late)??;
        let (head, body) = response.into_parts();
        let body = Begun::new(DeadlineBody::new(body, silence, Some(permit))).await.map_err(BackendError::Truncated)?;
        Ok(Response::from_parts(head, body.boxed_unsync()))
    }
}
