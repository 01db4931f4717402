//! Answers that Sluice makes itself: JSON in the shape of the API's own, and what it says of refusals and failures.

use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use crate::body::Reply;
use crate::request::refusal::Refusal;
use crate::upstream::failure::Failure;

/// A JSON answer.
#[must_use]
pub fn json(status: u16, body: impl Into<Bytes>) -> Response<Reply> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let mut response = Response::new(Reply::Full(Some(body.into())));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.headers_mut() = headers;
    response
}

/// 405, with the method that is allowed.
#[must_use]
pub fn wrong_method(allowed: &'static str) -> Response<Reply> {
    let mut response = detail(405, "Method Not Allowed");
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

/// `{"detail":"…"}`, the shape of the API's own errors.
fn detail(status: u16, sentence: &str) -> Response<Reply> {
    let mut response = json(status, serde_json::json!({ "detail": sentence }).to_string());
    if status == 503 {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// The answer to a refused request.
#[must_use]
pub fn refused(refusal: Refusal) -> Response<Reply> {
    let row = refusal.row();
    let mut response = detail(row.status, row.sentence);
    if row.status == 401 {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if row.closes {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The answer when the upstream failed and nothing can be served instead.
#[must_use]
pub fn failed(failure: Failure) -> Response<Reply> {
    let (status, sentence) = failure.answer();
    detail(status, sentence)
}
