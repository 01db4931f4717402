//! Spans for OpenTelemetry: of a request, of what it waits for, and of each request to the upstream, Redis and MySQL.
//!
//! A request that is sampled ([`Tracer::request`]) has a span, which is the current one wherever the request is worked on
//! ([`Span::scope`]; tasks of their own carry it on, [`carry`]). Work that deserves a span of its own is wrapped in [`within`]. Where
//! no span is current all this does nothing, and where traces are off no request has one.
//!
//! A client's `traceparent` and `tracestate` (W3C Trace Context) say which trace a request belongs to. Whether it is sampled they
//! say only where they come from a trusted proxy: anybody else could have every request traced. Spans are sent in batches by a
//! thread of their own; what does not fit into its queue is dropped.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    FutureExt as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, TraceId, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{HeaderExtractor, HeaderInjector, HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SamplingDecision, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample};
use tokio::runtime::Handle;

use crate::body::BoxError;
use crate::config::Telemetry;
use crate::request::secrets::shown_method;

/// How long the collector may take to a batch, and what is left of spans to be sent when the program ends.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
const LAST_BATCH: Duration = Duration::from_secs(2);

/// Makes the spans of requests, and sends them.
pub struct Tracer {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// Of so many requests out of 10,000.
    sample: u16,
}

/// What spans below the current one are made with.
struct Below(SdkTracer);

/// A span that is open until it is dropped or ended.
pub struct Span(Context);

impl Tracer {
    /// Sends spans as `config` says, over the runtime of `handle`; `None` where traces are off.
    ///
    /// # Errors
    /// The exporter refuses its configuration.
    pub fn start(config: &Telemetry, handle: Handle) -> Result<Option<Self>, BoxError> {
        let Some(collector) = &config.otlp else { return Ok(None) };
        let client = Client { inner: HyperClient::with_default_connector(SEND_TIMEOUT, None), handle, is_failing: AtomicBool::default() };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{collector}/v1/traces"))
            .with_timeout(SEND_TIMEOUT)
            .build()?;
        let resource = Resource::builder().with_service_name("sluice").with_attribute(version()).build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_sampler(Always).with_resource(resource).build();
        let tracer = provider.tracer("sluice");
        Ok(Some(Self { provider, tracer, sample: config.sample }))
    }

    /// The span of a request with these fields; `None` if it is not sampled. A `trusted` peer says itself whether it is.
    #[must_use]
    pub fn request(&self, method: &http::Method, headers: &HeaderMap, trusted: bool) -> Option<Span> {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let said = parent.span().span_context().clone();
        let is_sampled = if trusted && said.is_valid() { said.is_sampled() } else { self.picks() };
        is_sampled.then(|| self.open(&parent, opentelemetry::time::now(), shown_method(method)))
    }

    /// Whether one more request, which says nothing about traces, is sampled.
    #[must_use]
    pub fn picks(&self) -> bool {
        fastrand::u16(..10_000) < self.sample
    }

    /// Tells of a GET that took so long and is over.
    pub fn over(&self, took: Duration, name: String, attributes: Vec<KeyValue>) {
        let span = self.open(&Context::new(), opentelemetry::time::now() - took, "GET");
        span.0.span().update_name(name);
        span.0.span().set_attributes(attributes);
    }

    fn open(&self, parent: &Context, start: SystemTime, method: &str) -> Span {
        let span = SpanBuilder::from_name(method.to_owned())
            .with_kind(SpanKind::Server)
            .with_start_time(start)
            .with_attributes([KeyValue::new("http.request.method", method.to_owned())]);
        Span(parent.with_span(self.tracer.build_with_context(span, parent)).with_value(Below(self.tracer.clone())))
    }

    /// Sends what is left. Blocks for a moment.
    pub fn stop(&self) {
        // What cannot be sent now is lost, which was logged.
        let _ = self.provider.shutdown_with_timeout(LAST_BATCH);
    }
}

impl Span {
    /// Does `work` with this span as the current one; it ends with the work.
    pub async fn scope<T>(self, work: impl Future<Output = T>) -> T {
        work.with_context(self.0.clone()).await
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        self.0.span().end();
    }
}

/// What makes spans below the current one, if there is one.
fn current() -> Option<SdkTracer> {
    Context::map_current(|context| context.get::<Below>().map(|below| below.0.clone()))
}

/// Whether there is a current span.
#[must_use]
pub fn is_on() -> bool {
    Context::map_current(|context| context.get::<Below>().is_some())
}

/// Names the current span, and says more of it.
pub fn describe(name: String, attributes: Vec<KeyValue>, is_error: bool) {
    Here(Context::current()).describe(name, attributes, is_error);
}

/// The span that was current at some moment.
pub struct Here(Context);

/// The current span, if there is one, so that it can be described where it is not the current one any more.
#[must_use]
pub fn here() -> Option<Here> {
    is_on().then(|| Here(Context::current()))
}

impl Here {
    /// Names the span, and says more of it.
    pub fn describe(&self, name: String, attributes: Vec<KeyValue>, is_error: bool) {
        let span = self.0.span();
        span.update_name(name);
        span.set_attributes(attributes);
        if is_error {
            span.set_status(Status::error(""));
        }
    }
}

/// Tells of work that took so long and is over: a span below the current one, if there is one. `Err` says why it failed.
pub fn note(kind: SpanKind, name: &'static str, took: Duration, told: impl FnOnce() -> (Vec<KeyValue>, Result<(), String>)) {
    let Some(tracer) = current() else { return };
    let (attributes, result) = told();
    let span = SpanBuilder::from_name(name).with_kind(kind).with_start_time(opentelemetry::time::now() - took).with_attributes(attributes);
    let mut span = tracer.build_with_context(span, &Context::current());
    if let Err(why) = result {
        opentelemetry::trace::Span::set_status(&mut span, Status::error(why));
    }
    // It ends as it is dropped.
}

/// Has a task of its own belong to the span that is current now.
pub fn carry<F: Future>(work: F) -> impl Future<Output = F::Output> {
    work.with_current_context()
}

/// Does `work` in a span of its own below the current one, if there is one; `told` says of its result what belongs into the span.
pub async fn within<T>(
    kind: SpanKind,
    name: &'static str,
    attributes: Vec<KeyValue>,
    work: impl Future<Output = T>,
    told: impl FnOnce(&T) -> Result<KeyValue, String>,
) -> T {
    let Some(tracer) = current() else { return work.await };
    let parent = Context::current();
    let span = SpanBuilder::from_name(name).with_kind(kind).with_attributes(attributes);
    let span = Span(parent.with_span(tracer.build_with_context(span, &parent)));
    let done = work.with_context(span.0.clone()).await;
    match told(&done) {
        Ok(attribute) => span.0.span().set_attribute(attribute),
        Err(why) => span.0.span().set_status(Status::error(why)),
    }
    done
}

/// Adds the current span to the fields of a request, so that whoever gets it can go on with the trace.
pub fn inject(headers: &mut HeaderMap) {
    if is_on() {
        TraceContextPropagator::new().inject_context(&Context::current(), &mut HeaderInjector(headers));
    }
}

fn version() -> KeyValue {
    KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))
}

/// Samples every span that is made: whether there is any was decided before.
#[derive(Clone, Debug)]
struct Always;

impl ShouldSample for Always {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        _: TraceId,
        _: &str,
        _: &SpanKind,
        _: &[KeyValue],
        _: &[opentelemetry::trace::Link],
    ) -> SamplingResult {
        let trace_state = parent.map(|parent| parent.span().span_context().trace_state().clone()).unwrap_or_default();
        SamplingResult { decision: SamplingDecision::RecordAndSample, attributes: Vec::new(), trace_state }
    }
}

/// Sends batches on the program's runtime: the thread that makes them has none. Says once when they begin to fail.
struct Client {
    inner: HyperClient,
    handle: Handle,
    is_failing: AtomicBool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let inner = self.inner.clone();
        let sent = self.handle.spawn(async move { inner.send_bytes(request).await }).await.map_err(HttpError::from).flatten();
        let problem = match &sent {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("it answered {}", response.status().as_u16())),
            Err(error) => Some(error.to_string()),
        };
        let was_failing = self.is_failing.swap(problem.is_some(), Ordering::Relaxed);
        match problem {
            Some(error) if !was_failing => {
                tracing::warn!(error, "the collector takes no traces (telemetry.otlp); they are dropped until it does");
            }
            None if was_failing => tracing::info!("the collector takes traces again"),
            _ => {}
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracer(sample: u16) -> Tracer {
        let provider = SdkTracerProvider::builder().with_sampler(Always).build();
        Tracer { tracer: provider.tracer("t"), provider, sample }
    }

    fn fields(traceparent: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static("traceparent"), http::HeaderValue::from_static(traceparent))])
    }

    const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const UNSAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    #[test]
    fn who_is_trusted_says_what_is_sampled_and_of_others_a_share_is() {
        for (sample, traceparent, trusted, expected) in [
            (0, SAMPLED, true, true),
            (0, SAMPLED, false, false),
            (10_000, UNSAMPLED, true, false),
            (10_000, UNSAMPLED, false, true),
            (10_000, "nonsense", true, true),
            (0, "nonsense", true, false),
        ] {
            let span = tracer(sample).request(&http::Method::GET, &fields(traceparent), trusted);
            assert_eq!(span.is_some(), expected, "{sample} {traceparent} {trusted}");
        }
    }

    #[tokio::test]
    async fn a_trace_goes_on_where_the_client_began_it_and_is_passed_on() {
        let span = tracer(10_000).request(&http::Method::GET, &fields(SAMPLED), false).unwrap();
        let passed = span
            .scope(async {
                let asking = async {
                    let mut headers = HeaderMap::new();
                    inject(&mut headers);
                    headers["traceparent"].to_str().unwrap().to_owned()
                };
                within(SpanKind::Client, "GET", Vec::new(), tokio::spawn(carry(asking)), |_| Ok(version())).await.unwrap()
            })
            .await;
        assert!(passed.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && passed.ends_with("-01"), "{passed}");
        assert!(!passed.contains("00f067aa0ba902b7"), "the span of the request to the upstream is its own: {passed}");
    }

    #[tokio::test]
    async fn where_nothing_is_sampled_nothing_is_added() {
        let mut headers = HeaderMap::new();
        let done = within(SpanKind::Client, "GET", Vec::new(), async { 7 }, |_| panic!("told of nothing")).await;
        inject(&mut headers);
        assert!(done == 7 && headers.is_empty() && !is_on());
    }
}
