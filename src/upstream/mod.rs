//! Whatever answers when the cache cannot: the trait ([`Backend`]), its implementation over HTTP ([`http`]), the bounds around
//! either ([`Upstream`]: places by [`admission`], deadlines by phase), and the fields of requests and responses on their way ([`request_fields`], [`response_fields`], [`locations`]).
//! By which of them a response is chosen says [`selecting`].
//!
//! Knows requests and responses. Knows neither routes nor the cache: whether an answer may be kept is not asked here.

pub mod admission;
pub mod body;
pub mod failure;
pub mod http;
pub mod locations;
pub mod request_fields;
pub mod resolve;
pub mod response_fields;
pub mod room;
pub mod selecting;
pub mod upload;

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use ::http::{Request, Response};
use http_body::Body as _;
use http_body_util::BodyExt;
use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;

use crate::body::{BoxError, ClientFault, Noting, Stream};
use crate::http::endless::is_endless;
use crate::request::secrets::{shown_method, without_secrets};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace;
use admission::machine::{Bounds, Party, Phase};
use admission::{Admission, Askers, Place, Work};
use body::{Begun, DeadlineBody, Held};
use failure::Failure;
use room::Room;
use upload::{Progress, UploadRoom, Watched};

/// The future of a response.
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response<Stream>, BackendError>> + Send>>;

/// Answers requests. What it gets is ready to be sent: hop-by-hop fields are gone, Sluice's own are set.
pub trait Backend: Send + Sync {
    /// Starts answering. Dropping the future gives the request up. While it waits for a connection it tells `progress`, since the time to the
    /// head of the answer does not run then.
    fn call(&self, request: Request<Stream>, progress: &Arc<Progress>) -> ResponseFuture;
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
    /// Too many bodies are on their way already, and the request was carried out: it must not be repeated as if it was not.
    Unplaced,
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
            Self::Overloaded | Self::Unplaced => "overloaded",
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
            Self::Overloaded => {
                f.write_str("too many requests are on their way to the backend, or wait for it (backend.max_in_flight, backend.queue)")
            }
            Self::Unplaced => {
                f.write_str("the backend answered, and too many bodies are on their way from it (backend.max_downloads, max_streams)")
            }
            Self::Client(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for BackendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect(cause) | Self::Reset(cause) | Self::Invalid(cause) | Self::Truncated(cause) => Some(cause.as_ref()),
            Self::Timeout(_) | Self::Overloaded | Self::Unplaced | Self::Client(_) => None,
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
            // What became of the request is not known to its client.
            BackendError::Unplaced => Self::Lost,
            // For whom nothing is said of the client: nobody who shares an answer sends a body.
            BackendError::Client(_) => Self::Lost,
        }
    }
}

/// Bounds and deadlines of requests to a backend.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How many places there are.
    pub bounds: Bounds,
    /// How long a request may wait for a place.
    pub queue_timeout: Duration,
    /// How long the backend may take for the head of its answer, from the end of the request.
    pub timeout: Duration,
    /// The largest body of a request that is gathered before it is sent, in bytes.
    pub upload_buffer: usize,
    /// All of those together, in bytes.
    pub upload_memory: usize,
}

/// Answers that go on beside all places are this part of those that have one.
const BESIDE: usize = 4;

/// A backend within bounds: a place for each request by its phase ([`admission`]), each with deadlines, all of them counted.
pub struct Upstream {
    backend: Box<dyn Backend>,
    admission: Arc<Admission>,
    uploads: UploadRoom,
    /// For answers that found no place, and go on all the same.
    beside: Room,
    timeout: Duration,
    metrics: Arc<Metrics>,
}

/// A request that may be sent.
pub struct Admitted {
    request: Request<Stream>,
    askers: Arc<Askers>,
    /// `None`: it goes beside all others.
    place: Option<Place>,
    /// Since when it has been waiting.
    since: Instant,
}

impl Admitted {
    /// Says what it is sent for. If that is of use to nobody when another request needs the place, it is [given up](Work::give_up).
    pub fn is_for(&self, work: Weak<dyn Work>) {
        if let Some(place) = &self.place {
            place.is_for(work);
        }
    }
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
    /// Lets requests reach `backend` as far as `settings` allow.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>, settings: Settings, metrics: Arc<Metrics>) -> Self {
        let Settings { bounds, queue_timeout, timeout, upload_buffer, upload_memory } = settings;
        let admission = Admission::new(bounds, queue_timeout.min(timeout), Arc::clone(&metrics));
        let uploads = UploadRoom::new(upload_buffer, upload_memory, metrics.upload_bytes.clone());
        let beside = Room::new(bounds.download.div_ceil(BESIDE), metrics.bodies_beside.clone());
        Self { backend, admission, uploads, beside, timeout, metrics }
    }

    /// Sends a request once there is a place for it. The response's body may be silent for `silence` at most.
    ///
    /// # Errors
    /// A [`BackendError`] if there is no head within the deadline. What the client did wrong is one too, but no failure of the
    /// backend's: it is not counted as its answer.
    pub async fn call(&self, party: &Party, request: Request<Stream>, silence: Duration) -> Result<Response<Stream>, BackendError> {
        self.call_admitted(self.admit(&Arc::new(Askers::one(party)), request).await?, silence).await
    }

    /// Another asks for what a request is for that may be waiting for a place: it need not wait behind the first one's share.
    pub fn join(&self, askers: &Askers, party: &Party) {
        self.admission.join(askers, party);
    }

    /// Gathers the body of a request, and waits for a place for it. Nothing is sent before both are there, so a caller that leaves has
    /// asked for nothing.
    ///
    /// # Errors
    /// [`BackendError::Overloaded`] if the queue is full, or no place becomes free in time; [`BackendError::Client`] for what the client
    /// did wrong.
    pub async fn admit(&self, askers: &Arc<Askers>, request: Request<Stream>) -> Result<Admitted, BackendError> {
        let (parts, body) = request.into_parts();
        let gathered = self.uploads.gather(askers.address(), body).await.map_err(BackendError::Client)?;
        let since = Instant::now();
        let phase = if gathered.is_whole { Phase::Ask } else { Phase::Upload };
        let Some(place) = self.admission.admit(phase, askers).await else {
            self.count(askers.rule(), BackendError::Overloaded.label(), since);
            return Err(BackendError::Overloaded);
        };
        let request = Request::from_parts(parts, gathered.body);
        Ok(Admitted { request, askers: Arc::clone(askers), place: Some(place), since })
    }

    /// The same as [`call`](Self::call) for a request that has a place.
    ///
    /// # Errors
    /// A [`BackendError`] if there is no head within the deadline.
    pub async fn call_admitted(&self, admitted: Admitted, silence: Duration) -> Result<Response<Stream>, BackendError> {
        let Admitted { request, askers, place, since } = admitted;
        let told = if trace::is_on() { asked_for(askers.rule(), &request) } else { Vec::new() };
        let (parts, body) = request.into_parts();
        let progress = Progress::begin();
        let (body, fault) = if body.is_end_stream() {
            (body, None)
        } else {
            let (noting, fault) = Noting::new(body);
            (Watched::new(noting.boxed_unsync(), Arc::clone(&progress)).boxed_unsync(), Some(fault))
        };
        let mut request = Request::from_parts(parts, body);
        let asking = async {
            trace::inject(request.headers_mut());
            self.call_within_bounds((&askers, place), request, progress, silence).await
        };
        let result = trace::within(SpanKind::Client, "upstream", told, asking, |result| match result {
            Ok(response) => Ok(KeyValue::new("http.response.status_code", i64::from(response.status().as_u16()))),
            Err(error) => Err(error.to_string()),
        });
        let (result, route) = (result.await, askers.rule());
        if let (Err(_), Some(&fault)) = (&result, fault.as_ref().and_then(|fault| fault.get())) {
            tracing::debug!(route, %fault, "a request could not be sent whole");
            return Err(BackendError::Client(fault));
        }
        match &result {
            Ok(response) => self.count(route, response.status().as_str(), since),
            Err(error) => self.count(route, error.label(), since),
        }
        if let Err(error) = &result {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::debug!(route, %error, cause, "backend");
        }
        result
    }

    /// Sends a request of Sluice's own beside all others: it takes no place and waits for none. For what must be known also while
    /// all places are taken; the caller sees to it that there is one at a time.
    ///
    /// # Errors
    /// A [`BackendError`] if there is no head within the deadline.
    pub async fn call_beside(&self, rule: &str, request: Request<Stream>, silence: Duration) -> Result<Response<Stream>, BackendError> {
        let askers = Arc::new(Askers::one(&Party::own(rule)));
        let admitted = Admitted { request, askers, place: None, since: Instant::now() };
        self.call_admitted(admitted, silence).await
    }

    /// Counts a request that was sent and [given up](Work::give_up) at some moment `since` which it waited or was on its way.
    pub fn count_given_up(&self, route: &str, since: Instant) {
        self.count(route, "given-up", since);
    }

    fn count(&self, route: &str, status: &str, since: Instant) {
        self.metrics.backend_requests.with_label_values(&[route, status]).inc();
        self.metrics.backend_seconds.with_label_values(&[route]).observe(since.elapsed().as_secs_f64());
    }

    async fn call_within_bounds(
        &self,
        (askers, place): (&Askers, Option<Place>),
        request: Request<Stream>,
        progress: Arc<Progress>,
        silence: Duration,
    ) -> Result<Response<Stream>, BackendError> {
        let late = || BackendError::Timeout(self.timeout);
        let is_beside = place.is_none();
        let may_change = !request.method().is_safe();
        // What may change something is not given up once it is sent: nobody would know what became of it.
        let may_end = |place: &&Place| place.phase() == Phase::Upload || !may_change;
        if let Some(place) = place.as_ref().filter(may_end) {
            let work: Weak<Progress> = Arc::downgrade(&progress);
            place.is_for(work);
        }
        let response = tokio::select! {
            // What was answered is no more to be given up.
            biased;
            response = self.backend.call(request, &progress) => response?,
            () = progress.overdue(self.timeout) => return Err(late()),
            () = progress.given_up() => return Err(BackendError::Overloaded),
        };
        // The next one may be asked: what is left of this one is a body on its way.
        drop(place);
        let (head, body) = response.into_parts();
        let body = Begun::new(body).await.map_err(BackendError::Truncated)?;
        let length = body.size_hint().exact();
        let place = if body.is_whole() || is_beside {
            None
        } else {
            let phase = if is_endless(&head.headers, length) { Phase::Stream } else { Phase::Download };
            match self.admission.try_admit(phase, askers) {
                Some(place) => Some(Held::Place(place)),
                None if !may_change => return Err(BackendError::Overloaded),
                // What was carried out must not be repeated as if it was not: such an answer goes on beside the others, if there are few.
                None => {
                    let mut beside = self.beside.of(askers.address());
                    if !beside.take(1) {
                        return Err(BackendError::Unplaced);
                    }
                    Some(Held::Beside(beside))
                }
            }
        };
        Ok(Response::from_parts(head, DeadlineBody::new(body, silence, place).boxed_unsync()))
    }
}
