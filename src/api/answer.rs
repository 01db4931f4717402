//! What endpoints answer with: JSON, and errors in the contract's shapes.

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER, VARY};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde::Serialize;

use super::orders::OrdersError;
use crate::body::{self, Stream};
use crate::telemetry::seldom::Seldom;

/// Why an endpoint did not answer 200.
#[derive(Debug)]
pub enum ApiError {
    /// 422, with everything that is wrong with the parameters.
    Invalid(Vec<Fault>),
    /// 400, with a sentence.
    BadRequest(&'static str),
    /// 404, with a sentence.
    NotFound(&'static str),
    /// 503 or 504.
    Orders(OrdersError),
}

/// One failing parameter, in the contract's shape.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// What kind of fault it is.
    pub r#type: &'static str,
    /// Where: `query` and the parameter's name.
    pub loc: [&'static str; 2],
    /// A sentence.
    pub msg: String,
    /// What was given.
    pub input: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    /// The bound that was broken.
    pub ctx: Option<FaultContext>,
}

/// The bound that a parameter broke.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultContext {
    /// It must be above this.
    Gt(i64),
    /// It must be at most this.
    Le(i64),
}

impl From<OrdersError> for ApiError {
    fn from(error: OrdersError) -> Self {
        Self::Orders(error)
    }
}

#[derive(Serialize)]
struct Detail<T> {
    detail: T,
}

pub(super) fn set_gzip(headers: &mut HeaderMap) {
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
}

/// A database that fails may do so as often as clients ask.
static NOT_ANSWERED: Seldom = Seldom::new();

/// The response to a request that was not answered 200.
#[must_use]
pub fn refuse(error: ApiError) -> Response<Stream> {
    match error {
        ApiError::Invalid(faults) => detail(StatusCode::UNPROCESSABLE_ENTITY, faults),
        ApiError::BadRequest(sentence) => detail(StatusCode::BAD_REQUEST, sentence),
        ApiError::NotFound(sentence) => detail(StatusCode::NOT_FOUND, sentence),
        ApiError::Orders(error) => {
            match &error {
                // The pool of connections has told that once.
                OrdersError::Unreachable(_) => {}
                error => {
                    if let Some(left_out) = NOT_ANSWERED.next() {
                        tracing::warn!(%error, left_out, "a query to the database was not answered");
                    }
                }
            }
            let status = match error {
                OrdersError::TooSlow(_) => StatusCode::GATEWAY_TIMEOUT,
                OrdersError::Unreachable(_) | OrdersError::Unavailable(_) | OrdersError::Busy | OrdersError::NotCovered => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
            };
            let mut response = detail(status, sentence(&error));
            if matches!(error, OrdersError::Busy) {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            response
        }
    }
}

/// What clients are told of trouble with the database; its causes are for the log.
pub(super) fn sentence(error: &OrdersError) -> String {
    match error {
        OrdersError::Unreachable(_) | OrdersError::Unavailable(_) | OrdersError::NotCovered => "Database service unavailable".to_owned(),
        OrdersError::TooSlow(limit) => format!("Query timeout after {} seconds", limit.as_secs_f64()),
        OrdersError::Busy => "Too many queries are waiting for the database".to_owned(),
    }
}

pub(super) fn detail(status: StatusCode, detail: impl Serialize) -> Response<Stream> {
    // A struct of strings always serialises.
    let mut response = json(serde_json::to_string(&Detail { detail }).unwrap_or_default());
    *response.status_mut() = status;
    response
}

pub(super) fn json(text: String) -> Response<Stream> {
    let mut response = Response::new(body::full(Bytes::from(text)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
