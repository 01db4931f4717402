//! Answering everything from the upstream while the cache fills (`shadow = true`), and holding each answer against what the cache
//! would have said: for a rule that is to be trusted before it serves.
//!
//! Bodies are compared as they pass, in constant memory and without their coding; fields but for those that name the moment or the
//! way. What differs is counted, and a few samples are logged.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use http::header::{AGE, CONTENT_ENCODING, CONTENT_LENGTH, DATE, ETAG, EXPIRES, TRAILER, VIA};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;

use super::Proxy;
use super::answer::Answer;
use super::asked::{Asked, CacheableRequest};
use super::decide::Decision;
use super::outcome::{Outcome, PassWhy};
use super::spent::Step;
use crate::body::{BoxError, Reply, Stream};
use crate::cache::entry::{Content, Entry, StoredResponse};
use crate::cache::ready::CACHE_STATUS;
use crate::http::conditional::opaque;
use crate::http::encoding::Coding;
use crate::request::fields::REQUEST_ID;
use crate::request::secrets::without_secrets;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::samples::Samples;
use crate::timeline::times::Numbering;

/// Fields that name the moment or the way of an answer, or how its bytes are coded and framed.
const NOT_COMPARED: [HeaderName; 10] = [AGE, CACHE_STATUS, CONTENT_ENCODING, CONTENT_LENGTH, DATE, ETAG, EXPIRES, REQUEST_ID, TRAILER, VIA];
/// Differing fields that a sample names.
const NAMED: usize = 10;

/// How an answer compares with what the cache would have said: the label of a metric, in the order of what is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Result {
    Same,
    Status,
    Fields,
    Body,
    /// The cache would have asked the upstream itself.
    NotStored,
    /// A conditional or partial answer, one that broke off, or one in a coding that is not known here.
    NotCompared,
}

impl Result {
    const fn label(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Status => "status",
            Self::Fields => "fields",
            Self::Body => "body",
            Self::NotStored => "not_stored",
            Self::NotCompared => "not_compared",
        }
    }
}

impl Proxy {
    /// Answers from the upstream, as if the rule did not cache, and compares.
    pub(super) async fn answer_in_shadow(self: &Arc<Self>, asked: Asked<'_>, mut request: CacheableRequest<'_>, body: Stream) -> Answer {
        let parts = asked.parts;
        let canonical = request.canonical.clone();
        let orders = request.for_timeline(&canonical);
        let are_buckets = request.is_for_buckets();
        let timeline = self.timeline.as_deref().filter(|_| request.route.timeline && !request.authorized);
        let computed = match timeline {
            Some(timeline) => request.spent.on(Step::Timeline, timeline.answer(orders)).await.ok().map(|answered| answered.entry),
            None => None,
        };
        let expected = match computed {
            Some(entry) => Some(entry),
            None => self.would_be_served(&mut request).await,
        };
        let answer = self.pass(asked, PassWhy::Shadow, body).await;
        if !matches!(answer.outcome, Outcome::Pass(_)) {
            return answer;
        }
        if let Some(timeline) = timeline {
            timeline.observe(orders, answer.response.status(), answer.response.headers());
        }
        let comparing = Comparing {
            route: request.route.name.clone(),
            target: orders.text.to_owned(),
            are_buckets,
            samples: Arc::clone(&self.samples),
            metrics: Arc::clone(&self.metrics),
        };
        let Some(entry) = expected else {
            comparing.count(Result::NotStored);
            return answer;
        };
        let Content::Response(stored) = &entry.content else { return answer };
        let whole = parts.method == Method::GET && !matches!(answer.response.status().as_u16(), 206 | 304);
        let comparable = whole && stored.coding != Coding::Opaque;
        let plain = if comparable { stored.inflated(self.max_object).await } else { None };
        let Some(plain) = plain else {
            comparing.count(Result::NotCompared);
            return answer;
        };
        Answer { response: comparing.watch(answer.response, stored, plain), outcome: answer.outcome }
    }

    /// What the cache would serve. If it would ask the upstream first, it does so behind the client's back.
    async fn would_be_served(&self, request: &mut CacheableRequest<'_>) -> Option<Arc<Entry>> {
        let found = self.look_up(request).await;
        let decision = self.decide(request, &found);
        if matches!(decision, Decision::Fetch { .. } | Decision::StaleAndRevalidate(_)) && request.parts.method == Method::GET {
            self.revalidate(request, &found);
        }
        let serves = matches!(decision, Decision::Hit(_) | Decision::StaleAndRevalidate(_) | Decision::StaleWhileFailing(_));
        found.ok().filter(|_| serves)
    }
}

/// One comparison: where it is counted, and what it is about.
struct Comparing {
    route: String,
    target: String,
    are_buckets: bool,
    samples: Arc<Samples>,
    metrics: Arc<Metrics>,
}

impl Comparing {
    fn count(&self, result: Result) {
        self.metrics.shadow.with_label_values(&[&self.route, result.label()]).inc();
    }

    fn differs(&self, result: Result, how: &str) {
        self.count(result);
        if self.samples.take() {
            tracing::warn!(
                route = self.route,
                target = &*without_secrets(&self.target),
                how,
                "in shadow: the backend's answer is not what the cache would have said"
            );
        }
    }

    /// Compares status and fields at once, and the body as it passes.
    fn watch(self, response: Response<Reply>, stored: &StoredResponse, expected: Bytes) -> Response<Reply> {
        let (status, fields) = (response.status(), response.headers());
        if status != stored.status {
            self.differs(Result::Status, &format!("{} instead of {}", status.as_u16(), stored.status.as_u16()));
            return response;
        }
        let differing = differing_fields(fields, &stored.fields);
        if !differing.is_empty() {
            // Their values may be a cookie or a credential.
            let more = if differing.len() > NAMED { " and others" } else { "" };
            let names: Vec<&str> = differing.iter().take(NAMED).map(HeaderName::as_str).collect();
            self.differs(Result::Fields, &format!("in {}{more}", names.join(", ")));
            return response;
        }
        let numbering = self.are_buckets.then(Numbering::default);
        let position = Position { expected, at: 0, differs: false, passed: 0, numbering };
        let reader = match Coding::of(fields) {
            Coding::Identity => Reading::Plain(position),
            Coding::Gzip => Reading::Gzip(Box::new(MultiGzDecoder::new(position))),
            Coding::Opaque => {
                self.count(Result::NotCompared);
                return response;
            }
        };
        response.map(|body| {
            let left = body.size_hint().exact();
            Reply::Stream(Compared { inner: body, left, watching: Some((self, reader)) }.boxed_unsync())
        })
    }

    fn finish(self, reading: Reading, whole: bool) {
        let position = match reading {
            Reading::Plain(position) => Some(position),
            Reading::Gzip(decoder) => decoder.finish().ok(),
        };
        match position.map(Position::ended) {
            Some(Position { differs: true, at, expected, passed, .. }) => {
                let more = if whole { "" } else { " or more" };
                self.differs(Result::Body, &format!("from byte {at} on; {passed} bytes{more} instead of {}", expected.len()));
            }
            Some(position) if whole && position.at < position.expected.len() => {
                self.differs(Result::Body, &format!("{} bytes instead of {}", position.at, position.expected.len()));
            }
            Some(_) if whole => self.count(Result::Same),
            _ => self.count(Result::NotCompared),
        }
    }
}

/// The fields that are not the same in both. `ETag` counts only where the upstream sends one: without it the cache makes its own.
fn differing_fields(fields: &HeaderMap, stored: &HeaderMap) -> Vec<HeaderName> {
    let names: BTreeMap<&str, &HeaderName> = fields.keys().chain(stored.keys()).map(|name| (name.as_str(), name)).collect();
    let compared = names.into_values().filter(|name| !NOT_COMPARED.contains(name));
    let differing = compared.filter(|name| !fields.get_all(*name).iter().eq(stored.get_all(*name).iter()));
    let same_tag = |tag: &HeaderValue| stored.get(ETAG).is_some_and(|stored| opaque(stored.as_bytes()) == opaque(tag.as_bytes()));
    let tag = fields.get(ETAG).filter(|tag| !same_tag(tag)).map(|_| ETAG);
    differing.cloned().chain(tag).collect()
}

/// How far a body is the expected one.
struct Position {
    expected: Bytes,
    /// It is, as far as this.
    at: usize,
    /// From there on it is not.
    differs: bool,
    /// This many bytes have passed.
    passed: u64,
    /// Buckets are stored with numbers for timestamps, whatever the upstream's own cache makes of them.
    numbering: Option<Numbering>,
}

impl Write for Position {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.passed += bytes.len() as u64;
        match &mut self.numbering {
            Some(numbering) => {
                let numbered = numbering.push(bytes);
                self.compare(&numbered);
            }
            None => self.compare(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Position {
    fn compare(&mut self, bytes: &[u8]) {
        if !self.differs {
            let rest = self.expected.get(self.at..).unwrap_or_default();
            let same = bytes.iter().zip(rest).take_while(|(one, other)| one == other).count();
            self.differs = same < bytes.len();
            self.at += same;
        }
    }

    /// The same once nothing more comes.
    fn ended(mut self) -> Self {
        let held = self.numbering.take().map(|mut numbering| numbering.finish()).unwrap_or_default();
        self.compare(&held);
        self
    }
}

enum Reading {
    Plain(Position),
    Gzip(Box<MultiGzDecoder<Position>>),
}

/// A body that is compared as it passes.
struct Compared {
    inner: Reply,
    /// Bytes to come, where that was said.
    left: Option<u64>,
    watching: Option<(Comparing, Reading)>,
}

impl Body for Compared {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<std::result::Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                let data = frame.data_ref().map_or(&[][..], |data| data);
                this.left = this.left.map(|left| left.saturating_sub(data.len() as u64));
                if let Some((_, reading)) = &mut this.watching {
                    let written = match reading {
                        Reading::Plain(position) => position.write_all(data),
                        Reading::Gzip(decoder) => decoder.write_all(data),
                    };
                    if written.is_err() {
                        this.end(false);
                    }
                }
            }
            Some(Err(_)) => this.end(false),
            None => this.end(true),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Compared {
    fn end(&mut self, whole: bool) {
        if let Some((comparing, reading)) = self.watching.take() {
            comparing.finish(reading, whole);
        }
    }
}

impl Drop for Compared {
    fn drop(&mut self) {
        // Whoever knows how long a body is may not ask for more than that.
        self.end(self.left == Some(0) || self.inner.is_end_stream());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::encoding::gzip;
    use http::{HeaderValue, StatusCode};
    use proptest::prelude::*;

    fn stored(body: &'static [u8]) -> StoredResponse {
        let fields = HeaderMap::from_iter([(HeaderName::from_static("x-a"), HeaderValue::from_static("1"))]);
        StoredResponse::new(StatusCode::OK, fields, Coding::Identity, Coding::Identity, Bytes::from_static(body))
    }

    async fn compare(response: Response<Reply>, expected: &StoredResponse) -> String {
        let metrics = Arc::new(Metrics::new().unwrap());
        let comparing =
            Comparing { route: "r".into(), target: "/x".into(), are_buckets: true, samples: Arc::default(), metrics: Arc::clone(&metrics) };
        let watched = comparing.watch(response, expected, expected.body.clone());
        drop(watched.into_body().collect().await);
        let of = |label: &&str| metrics.shadow.with_label_values(&["r", label]).get() == 1;
        let found: Vec<&str> = ["same", "status", "fields", "body", "not_compared"].into_iter().filter(of).collect();
        found.join(",")
    }

    fn response(fields: &[(&'static str, &'static str)], body: Bytes) -> Response<Reply> {
        let mut response = Response::new(Reply::Stream(crate::body::full(body)));
        for (name, value) in fields {
            response.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        response
    }

    #[tokio::test]
    async fn answers_are_the_same_but_for_moment_way_and_coding() {
        let body = Bytes::from_static(b"[1,2,3]");
        let expected = stored(b"[1,2,3]");
        let moment = [("date", "now"), ("age", "3"), ("via", "1.1 x"), ("cache-status", "other; hit; ttl=3"), ("x-request-id", "1")];
        let plain = [("x-a", "1")].into_iter().chain(moment).collect::<Vec<_>>();
        assert_eq!(compare(response(&plain, body.clone()), &expected).await, "same");
        assert_eq!(compare(response(&[("x-a", "1"), ("content-encoding", "gzip")], gzip(&body)), &expected).await, "same");
        assert_eq!(compare(response(&[("x-a", "2")], body.clone()), &expected).await, "fields");
        assert_eq!(compare(response(&[("x-a", "1"), ("x-a", "1")], body.clone()), &expected).await, "fields");
        assert_eq!(compare(response(&[("x-a", "1"), ("etag", "\"b\"")], body.clone()), &expected).await, "fields");
        assert_eq!(compare(response(&plain, body.slice(..6)), &expected).await, "body");
        assert_eq!(compare(response(&plain, Bytes::from_static(b"[1,2,3]]")), &expected).await, "body");
        assert_eq!(compare(response(&[("x-a", "1"), ("content-encoding", "gzip")], body.clone()), &expected).await, "not_compared");
        let mut failed = response(&plain, body);
        *failed.status_mut() = StatusCode::NOT_FOUND;
        assert_eq!(compare(failed, &expected).await, "status");
    }

    proptest! {
        #[test]
        fn one_byte_of_many_is_found_wherever_it_is(len in 1_usize..3000, at in 0_usize..3000, piece in 1_usize..700) {
            let at = at % len;
            let expected: Bytes = (0..len).map(|number| u8::try_from(number % 251).unwrap()).collect();
            let mut found = expected.to_vec();
            found[at] ^= 1;
            let mut position = Position { expected: expected.clone(), at: 0, differs: false, passed: 0, numbering: None };
            found.chunks(piece).for_each(|piece| position.write_all(piece).unwrap());
            prop_assert!(position.differs && position.at == at && position.passed == len as u64);
            let mut position = Position { expected: expected.clone(), at: 0, differs: false, passed: 0, numbering: None };
            expected.chunks(piece).for_each(|piece| position.write_all(piece).unwrap());
            prop_assert!(!position.differs && position.at == len);
        }
    }
}
