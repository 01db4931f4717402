//! One request's visit: its id, how long it took, and its line in the access log.

use std::cell::Cell;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, request};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use prometheus::IntGauge;
use tokio::time::Instant;

use crate::body::{BoxError, Reply};
use crate::config::{Access, PublicUrl};
use crate::proxy::outcome::Outcome;
use crate::request::interim::Interim;
use crate::telemetry::Metrics;
use crate::upstream::forward::{Client, Origin, REQUEST_ID};

/// The longest id that is taken over from a client.
const MAX_ID: usize = 128;

/// A request being answered.
pub struct Visit<'m> {
    id: HeaderValue,
    started: Instant,
    inflight: &'m IntGauge,
}

impl<'m> Visit<'m> {
    /// A request came.
    #[must_use]
    pub fn begin(metrics: &'m Metrics, parts: &request::Parts) -> Self {
        metrics.inflight.inc();
        let given = parts.headers.get(REQUEST_ID).filter(|id| !id.is_empty() && id.len() <= MAX_ID && id.to_str().is_ok());
        Self { id: given.cloned().unwrap_or_else(new_id), started: Instant::now(), inflight: &metrics.inflight }
    }

    /// Its id (the client's, or one made for it), to be put into the answer.
    #[must_use]
    pub fn take_id(&mut self) -> HeaderValue {
        std::mem::replace(&mut self.id, HeaderValue::from_static(""))
    }

    /// What is known of its way here.
    #[must_use]
    pub const fn origin<'a>(&'a self, client: &'a Client, public: Option<&'a PublicUrl>, interim: Option<&'a Interim>) -> Origin<'a> {
        Origin { client, id: &self.id, public, interim }
    }

    /// How long it has taken so far.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// It was answered: logs it, if it is one of those that are logged. A streamed answer's line is written when its
    /// body ends, with the bytes that were sent.
    #[must_use]
    pub fn end(
        &self,
        access: Access,
        route: &str,
        parts: &request::Parts,
        peer: IpAddr,
        response: Response<Reply>,
        outcome: &Outcome,
    ) -> Response<Reply> {
        let wanted = match access {
            Access::All => true,
            Access::Errors => outcome.is_trouble() || response.status().is_server_error(),
            Access::Off => false,
        };
        if !wanted {
            return response;
        }
        let line = Line {
            id: response.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned(),
            peer,
            method: parts.method.to_string(),
            target: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            route: route.to_owned(),
            outcome: outcome.label(),
            detail: outcome.detail(),
            status: response.status().as_u16(),
            started: self.started,
            head: self.elapsed(),
        };
        response.map(|body| match body {
            Reply::Full(bytes) => {
                line.write(bytes.as_ref().map_or(0, Bytes::len) as u64, true);
                Reply::Full(bytes)
            }
            Reply::Stream(inner) => Reply::Stream(Counted { inner, bytes: 0, whole: false, line: Some(line) }.boxed_unsync()),
        })
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.inflight.dec();
    }
}

/// Sixteen hexadecimal digits that differ from every other request's: a random start for the process and thread, and
/// a count.
fn new_id() -> HeaderValue {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    thread_local!(static NEXT: Cell<u64> = Cell::new(PROCESS.get_or_init(|| fastrand::u64(..)) ^ fastrand::u64(..)));
    let number = NEXT.with(|next| next.replace(next.get().wrapping_add(1)));
    let mut text = [0; 16];
    for (at, digit) in text.iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[usize::from(number.to_be_bytes()[at / 2] >> (4 * (1 - at % 2)) & 15)];
    }
    HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("0"))
}

/// An access line, all but its end.
struct Line {
    id: String,
    peer: IpAddr,
    method: String,
    target: String,
    route: String,
    outcome: &'static str,
    detail: &'static str,
    status: u16,
    started: Instant,
    head: Duration,
}

impl Line {
    fn write(&self, bytes: u64, whole: bool) {
        tracing::info!(
            id = self.id,
            client = %self.peer,
            method = self.method,
            target = self.target,
            route = self.route,
            outcome = self.outcome,
            detail = self.detail,
            status = self.status,
            bytes,
            whole,
            head_ms = milliseconds(self.head),
            total_ms = milliseconds(self.started.elapsed()),
            "access"
        );
    }
}

fn milliseconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}

/// A body whose bytes are counted for its access line.
struct Counted<B> {
    inner: B,
    bytes: u64,
    whole: bool,
    line: Option<Line>,
}

impl<B: Body<Data = Bytes, Error = BoxError> + Unpin> Body for Counted<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => this.bytes += frame.data_ref().map_or(0, Bytes::len) as u64,
            Poll::Ready(None) => this.whole = true,
            _ => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B> Drop for Counted<B> {
    fn drop(&mut self) {
        if let Some(line) = self.line.take() {
            line.write(self.bytes, self.whole);
        }
    }
}
