//! What answers when the cache cannot: an API over HTTP ([`http`]) or the API answered here ([`api`]).

pub mod forward;
pub mod http;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ::http::{Request, Response};
use http_body_util::BodyExt;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::body::{BoxError, Stream, Watched};
use crate::proxy::outcome::Failure;
use crate::telemetry::Metrics;

/// A future that a backend returns.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response<Stream>, BackendError>> + Send>>;

/// Answers requests. What it gets is already fit for it: hop-by-hop fields are gone, its own are set.
pub trait Backend: Send + Sync {
    /// Starts answering. Dropping the future gives the request up.
    fn call(&self, request: Request<Stream>) -> Answering;
}

/// A task on another runtime that ends with whoever waits for it.
pub struct AbortOnDrop<T>(pub tokio::task::JoinHandle<T>);

impl<T> Future for AbortOnDrop<T> {
    type Output = Result<T, tokio::task::JoinError>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub enum BackendError {
    /// No connection could be made.
    Connect(BoxError),
    /// The connection broke before the head of the answer.
    Reset(BoxError),
    /// The head did not come in time.
    Timeout(Duration),
    /// What came was not HTTP.
    Invalid(BoxError),
    /// Too many requests are on their way already.
    Overloaded,
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(_) => f.write_str("no connection to the backend (is it running, is backend.url right?)"),
            Self::Reset(_) => f.write_str("the backend closed the connection before it answered"),
            Self::Timeout(after) => write!(f, "the backend did not answer within {after:?} (backend.timeout)"),
            Self::Invalid(_) => f.write_str("the backend's answer is not valid HTTP"),
            Self::Overloaded => f.write_str("too many requests are on their way to the backend (backend.max_in_flight)"),
        }
    }
}

impl std::error::Error for BackendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect(cause) | Self::Reset(cause) | Self::Invalid(cause) => Some(cause.as_ref()),
            Self::Timeout(_) | Self::Overloaded => None,
        }
    }
}

/// A backend within bounds: so many requests at a time, each with deadlines, all of them counted.
pub struct Upstream {
    backend: Box<dyn Backend>,
    places: Arc<Semaphore>,
    timeout: Duration,
    metrics: Arc<Metrics>,
}

impl Upstream {
    /// Puts bounds around a backend.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>, max_in_flight: usize, timeout: Duration, metrics: Arc<Metrics>) -> Self {
        Self { backend, places: Arc::new(Semaphore::new(max_in_flight)), timeout, metrics }
    }

    /// Asks the backend. The body may be silent for `silence` at most, and keeps its place until it ends.
    ///
    /// # Errors
    /// A [`BackendError`] if there is no head within the deadline.
    pub async fn call(&self, route: &str, request: Request<Stream>, silence: Duration) -> Result<Response<Stream>, BackendError> {
        let started = Instant::now();
        let answer = self.ask(request, silence).await;
        let status = match &answer {
            Ok(answer) => answer.status().as_str().to_owned(),
            Err(error) => kind(error).to_owned(),
        };
        self.metrics.backend_requests.with_label_values(&[route, &status]).inc();
        self.metrics.backend_seconds.with_label_values(&[route]).observe(started.elapsed().as_secs_f64());
        if let Err(error) = &answer {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::debug!(route, %error, cause, "backend");
        }
        answer
    }

    async fn ask(&self, request: Request<Stream>, silence: Duration) -> Result<Response<Stream>, BackendError> {
        let place = timeout(self.timeout, Arc::clone(&self.places).acquire_owned()).await;
        let Ok(Ok(place)) = place else { return Err(BackendError::Overloaded) };
        let late = |_| BackendError::Timeout(self.timeout);
        let answer = timeout(self.timeout, self.backend.call(request)).await.map_err(late)??;
        Ok(answer.map(|body| Watched::new(body, silence, Some(place)).boxed_unsync()))
    }
}

fn kind(error: &BackendError) -> &'static str {
    match error {
        BackendError::Connect(_) => "connect",
        BackendError::Reset(_) => "reset",
        BackendError::Timeout(_) => "timeout",
        BackendError::Invalid(_) => "invalid",
        BackendError::Overloaded => "overloaded",
    }
}

/// Tells how a body that was being read failed.
#[must_use]
pub fn body_failure(error: &BoxError) -> Failure {
    match error.downcast_ref::<crate::body::Broken>() {
        Some(broken) => broken.0,
        None => Failure::Truncated,
    }
}
