//! The API answered here, one file an endpoint, over [`Orders`]: nothing in an endpoint knows where orders come from.
//!
//! ```text
//! GET /api/symbols               symbols
//! GET /api/liquidations          liquidations
//! GET /api/liquidation-orders    liquidation_orders (the newest `limit`)
//! ```

pub mod decimal;
pub mod liquidation_orders;
pub mod liquidations;
pub mod orders;
pub mod params;
pub mod sample;
pub mod symbols;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HOST, LOCATION};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use serde::Serialize;

use super::{Answering, Backend};
use crate::body::{self, Stream};
use crate::target::Target;
use orders::Orders;

/// Answers the API from orders.
pub struct Api<O> {
    orders: Arc<O>,
}

impl<O: Orders> Api<O> {
    /// Over these orders.
    pub fn new(orders: O) -> Self {
        Self { orders: Arc::new(orders) }
    }
}

/// Why an endpoint did not answer 200.
#[derive(Debug)]
pub enum ApiError {
    /// 422, with everything that is wrong with the parameters.
    Invalid(Vec<params::Fault>),
    /// 400, with a sentence.
    BadRequest(&'static str),
    /// 404, with a sentence.
    NotFound(&'static str),
}

#[derive(Serialize)]
struct Detail<T> {
    detail: T,
}

impl<O: Orders> Backend for Api<O> {
    fn call(&self, request: Request<Stream>) -> Answering {
        let orders = Arc::clone(&self.orders);
        Box::pin(async move { Ok(answer(&*orders, &request.map(drop)).await) })
    }
}

async fn answer<O: Orders>(orders: &O, request: &Request<()>) -> Response<Stream> {
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    let Ok(target) = Target::parse(target) else { return detail(StatusCode::BAD_REQUEST, "Invalid request target") };
    let result = match (&*target.path, request.method()) {
        ("/api/symbols" | "/api/liquidations" | "/api/liquidation-orders", method) if method != Method::GET => {
            let mut response = detail(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
            return response;
        }
        ("/api/symbols", _) => symbols::get(orders).await,
        ("/api/liquidations", _) => liquidations::get(orders, &target).await,
        ("/api/liquidation-orders", _) => liquidation_orders::get(orders, &target).await,
        ("/api/symbols/" | "/api/liquidations/" | "/api/liquidation-orders/", _) => return without_slash(request),
        _ => return detail(StatusCode::NOT_FOUND, "Not Found"),
    };
    match result {
        Ok(body) => json(StatusCode::OK, body),
        Err(ApiError::Invalid(faults)) => detail(StatusCode::UNPROCESSABLE_ENTITY, faults),
        Err(ApiError::BadRequest(sentence)) => detail(StatusCode::BAD_REQUEST, sentence),
        Err(ApiError::NotFound(sentence)) => detail(StatusCode::NOT_FOUND, sentence),
    }
}

/// 307 to the path without its last slash, made from the request's `Host`.
fn without_slash(request: &Request<()>) -> Response<Stream> {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let location = format!("http://{host}{}{query}", request.uri().path().trim_end_matches('/'));
    let mut response = Response::new(body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn detail(status: StatusCode, detail: impl Serialize) -> Response<Stream> {
    // A struct of strings always serialises.
    json(status, serde_json::to_string(&Detail { detail }).unwrap_or_default())
}

fn json(status: StatusCode, text: String) -> Response<Stream> {
    let mut response = Response::new(body::full(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use sample::Sample;
    use serde_json::Value;
    use std::time::Duration;

    const ORDERS: &str = include_str!("../../../tests/contract/orders.csv");
    const GOLDEN: &str = include_str!("../../../tests/contract/golden.jsonl");

    /// Every recorded answer of the endpoints that are here, deviations aside.
    #[tokio::test]
    async fn the_recorded_answers_are_given_byte_for_byte() {
        let sample = Sample::parse(ORDERS, Duration::ZERO).unwrap();
        let mut checked = 0;
        for line in GOLDEN.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let (target, method) = (line["target"].as_str().unwrap(), line["method"].as_str().unwrap());
            let known = target.starts_with("/api/symbols")
                || target.starts_with("/api/liquidations")
                || (target.starts_with("/api/liquidation-orders?") && !target.contains("page_size=1001") && line["status"] != 200)
                || target.contains("limit=");
            if !known
                || line.get("deviates").is_some()
                || (line["status"] == 404 && !target.contains("limit=") && target.contains("-orders"))
            {
                continue;
            }
            let request = Request::builder().method(method).uri(target).header(HOST, "api.test").body(()).unwrap();
            let response = answer(&sample, &request).await;
            assert_eq!(u64::from(response.status().as_u16()), line["status"].as_u64().unwrap(), "{target}");
            for (name, value) in line["headers"].as_object().unwrap() {
                assert_eq!(response.headers().get(name).unwrap(), value.as_str().unwrap(), "{target}");
            }
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, line["body"].as_str().unwrap(), "{target}");
            checked += 1;
        }
        assert!(checked >= 160, "{checked}");
    }
}
