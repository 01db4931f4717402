//! The API answered here, one file an endpoint, over [`Orders`]: nothing in an endpoint knows where orders come from.
//!
//! ```text
//! GET /api/symbols                     symbols
//! GET /api/liquidations                liquidations
//! GET /api/liquidation-orders          liquidation_orders
//! GET /api/liquidation-orders/stream   stream
//! GET /health                          what the database says of itself (the rest of it is the proxy's)
//! ```

pub mod answer;
pub mod decimal;
pub mod json;
pub mod liquidation_orders;
pub mod liquidations;
pub mod mysql;
pub mod orders;
pub mod params;
pub mod sample;
pub mod schema;
pub mod stream;
pub mod symbols;
pub mod texts;
pub mod usd;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, LOCATION};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::runtime::Handle;

use crate::aside;
use crate::body::{self, Stream};
use crate::http::encoding::{accepts_gzip, gzip};
use crate::request::target::Target;
use crate::telemetry::seldom::Once;
use crate::telemetry::trace::carry;
use crate::upstream::upload::Progress;
use crate::upstream::{AbortOnDrop, Backend, BackendError, ResponseFuture};
use answer::{detail, json, refuse, set_gzip};
use orders::Orders;

/// Answers the API from orders.
pub struct Api<O> {
    orders: Arc<O>,
    runtime: Handle,
}

impl<O: Orders> Api<O> {
    /// Over these orders; queries are answered on `runtime`, so that no thread that serves clients waits or computes.
    pub fn new(orders: O, runtime: Handle) -> Self {
        Self { orders: Arc::new(orders), runtime }
    }
}

impl<O: Orders> Backend for Api<O> {
    fn call(&self, request: Request<Stream>, _: &Arc<Progress>) -> ResponseFuture {
        let orders = Arc::clone(&self.orders);
        let request = request.map(drop);
        let answering = AbortOnDrop(self.runtime.spawn(carry(async move { answer(&*orders, &request).await })));
        Box::pin(async move { answering.await.map_err(|error| BackendError::Reset(error.into())) })
    }
}

/// The paths, without their last slash.
const PATHS: [&str; 5] = ["/api/symbols", "/api/liquidations", "/api/liquidation-orders", "/api/liquidation-orders/stream", "/health"];

async fn answer<O: Orders>(orders: &O, request: &Request<()>) -> Response<Stream> {
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    let Ok(target) = Target::parse(target) else { return detail(StatusCode::BAD_REQUEST, "Invalid request target") };
    let path = &*target.path;
    if path.strip_suffix('/').is_some_and(|path| PATHS.contains(&path)) {
        return without_slash(request, path);
    }
    if PATHS.contains(&path) && !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = detail(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    let gzip = accepts_gzip(request.headers());
    let answer = match path {
        "/api/symbols" => symbols::get(orders).await,
        "/api/liquidations" => liquidations::get(orders, &target).await,
        "/api/liquidation-orders" => liquidation_orders::get(orders, &target).await,
        "/api/liquidation-orders/stream" => stream::get(orders, &target, gzip).await,
        "/health" => Ok(health(orders).await),
        _ => return detail(StatusCode::NOT_FOUND, "Not Found"),
    };
    let answer = answer.unwrap_or_else(refuse);
    if gzip { packed(answer).await } else { answer }
}

/// Bodies of so many bytes and more are sent as gzip to those who take it.
const PACKED_FROM: u64 = 1000;

/// Packs a body that is all there. The time that takes is not the runtime's.
async fn packed(answer: Response<Stream>) -> Response<Stream> {
    if answer.body().size_hint().exact().is_none_or(|length| length < PACKED_FROM) {
        return answer;
    }
    let (mut head, body) = answer.into_parts();
    let plain = body::read(body, usize::MAX).await.unwrap_or_default();
    let body = match aside::run(move || (gzip(&plain), plain)).await {
        Some((packed, plain)) if packed.is_empty() => plain,
        Some((packed, _)) => {
            set_gzip(&mut head.headers);
            packed
        }
        None => Bytes::new(),
    };
    Response::from_parts(head, body::full(body))
}

/// Load balancers ask again and again.
static UNHEALTHY: Once = Once::new();

/// The database's part of `/health`, which the proxy asks for.
async fn health<O: Orders>(orders: &O) -> Response<Stream> {
    let (status, message) = match orders.check().await {
        Ok(()) => {
            UNHEALTHY.ends();
            ("healthy", "Database connection successful")
        }
        Err(error) => {
            if UNHEALTHY.begins() {
                tracing::warn!(%error, "the database is unhealthy");
            }
            ("unhealthy", "Database connection failed")
        }
    };
    json(serde_json::json!({ "components": { "database": { "status": status, "message": message } } }).to_string())
}

/// How this backend calls itself in a `Location`. Like any backend's name there, it reaches the client as the host that
/// the request named; what is stored names no host that a client made up.
pub const AUTHORITY: &str = "api.sluice.invalid";

/// 307 to the path without its last slash.
fn without_slash(request: &Request<()>, path: &str) -> Response<Stream> {
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let mut response = Response::new(body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    if let Ok(location) = HeaderValue::from_str(&format!("http://{AUTHORITY}{}{query}", path.trim_end_matches('/'))) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use sample::Sample;
    use serde_json::Value;
    use std::time::Duration;

    const ORDERS: &str = include_str!("../../tests/contract/orders.csv");
    const GOLDEN: &str = include_str!("../../tests/contract/golden.jsonl");

    /// Every recorded answer, deviations aside.
    #[tokio::test]
    async fn the_recorded_answers_are_given_byte_for_byte() {
        let sample = Sample::parse(ORDERS, Duration::ZERO).unwrap();
        let mut checked = 0;
        for line in GOLDEN.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let (target, method) = (line["target"].as_str().unwrap(), line["method"].as_str().unwrap());
            // What the proxy answers, and what the contract says must be answered better.
            if target.starts_with("/api/cache/") || line.get("deviates").is_some() {
                continue;
            }
            let request = Request::builder().method(method).uri(target).body(()).unwrap();
            let response = answer(&sample, &request).await;
            assert_eq!(u64::from(response.status().as_u16()), line["status"].as_u64().unwrap(), "{target}");
            for (name, value) in line["headers"].as_object().unwrap() {
                let given = response.headers().get(name).unwrap().to_str().unwrap().replace(AUTHORITY, "api.test");
                assert_eq!(given, value.as_str().unwrap(), "{target}");
            }
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, line["body"].as_str().unwrap(), "{target}");
            checked += 1;
        }
        assert!(checked >= 240, "{checked}");
    }
}
