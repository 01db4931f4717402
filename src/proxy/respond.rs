//! From what is stored, or is filling, to an answer.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{AGE, ALLOW, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, ETAG, LAST_MODIFIED, RANGE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode, request};
use http_body_util::BodyExt;

use crate::body::{Inflate, Reply, Stream};
use crate::cache::entry::{Answer, Content, Form, vary_by_encoding};
use crate::cache::{Entry, Store};
use crate::clock::Wall;
use crate::fetch::fill::Fill;
use crate::http::conditional::{not_modified, weaken};
use crate::http::encoding::{Coding, InflateError, accepts_gzip, gunzip, inflation_limit};
use crate::http::range;
use crate::proxy::outcome::Failure;
use crate::request::refusal::Refusal;

/// Coded bodies of up to this size are inflated on the spot, larger ones elsewhere: they may be hundreds of times as large.
const INFLATE_HERE: usize = 4 << 10;
/// Room for the fields that every answer gets besides its own.
const EXTRA_FIELDS: usize = 4;

/// The stored answer for this client: its coding, a part of it (`parts` says whether the method allows that), or 304 if
/// the client holds the answer already.
///
/// # Errors
/// The stored bytes do not inflate, which only a forged entry's do.
pub async fn from_entry(
    store: &dyn Store,
    entry: &Arc<Entry>,
    answer: &Answer,
    request: &HeaderMap,
    parts: bool,
    now: Wall,
    max_object: usize,
) -> Result<Response<Reply>, InflateError> {
    let ranged = parts && answer.status == StatusCode::OK && answer.coding != Coding::Opaque && request.contains_key(RANGE);
    let gzip = answer.coding == Coding::Gzip && !ranged && accepts_gzip(request);
    let (fields, form) = answer.form(gzip);
    let mut headers = HeaderMap::with_capacity(fields.len() + EXTRA_FIELDS);
    for (name, value) in fields {
        headers.append(name, value.clone());
    }
    headers.insert(AGE, HeaderValue::from(entry.age(now)));
    if answer.status == StatusCode::OK && not_modified(request, fields.get(ETAG), fields) {
        for name in [CONTENT_TYPE, CONTENT_ENCODING, LAST_MODIFIED] {
            headers.remove(name);
        }
        return Ok(build(StatusCode::NOT_MODIFIED, headers, Bytes::new()));
    }
    let body = match form {
        Form::Ready(body) => body.clone(),
        Form::Inflate(coded) => Box::pin(inflate(store, entry, answer, coded.clone(), inflation_limit(coded.len(), max_object))).await?,
    };
    if ranged {
        let (status, part) = range::cut(&range::parts(request, fields, body.len()), &mut headers, &body);
        return Ok(build(status, headers, part));
    }
    Ok(build(answer.status, headers, body))
}

/// Inflates a stored body, and has it kept inflated: whoever asks without gzip asks again.
async fn inflate(store: &dyn Store, entry: &Arc<Entry>, answer: &Answer, coded: Bytes, limit: usize) -> Result<Bytes, InflateError> {
    let plain = if coded.len() <= INFLATE_HERE {
        gunzip(&coded, limit)?
    } else {
        let inflating = tokio::task::spawn_blocking(move || gunzip(&coded, limit));
        inflating.await.map_err(|_| InflateError::Corrupt)??
    };
    let content = Content::Answer(answer.with_plain(plain.clone()));
    store.improve(Arc::new(Entry { content, ..Entry::clone(entry) }));
    Ok(plain)
}

/// An answer whose body is still filling; `None` if its first bytes are gone already.
#[must_use]
pub fn from_fill(fill: &Arc<Fill>, request: &HeaderMap) -> Option<Response<Reply>> {
    let reader = fill.reader()?;
    let mut response = fill.head.response(reader.boxed_unsync());
    response.headers_mut().append(http::header::VIA, HeaderValue::from_static(crate::proxy::VIA));
    if fill.head.coding == Coding::Gzip {
        vary_by_encoding(response.headers_mut());
    }
    Some(fit(response, request).map(Reply::Stream))
}

/// An answer of the backend's for a client that may not take the coding in which Sluice asked for it.
#[must_use]
pub fn fit(response: Response<Stream>, request: &HeaderMap) -> Response<Stream> {
    if accepts_gzip(request) || Coding::of(response.headers()) != Coding::Gzip {
        return response;
    }
    let mut plain = response.map(|body| Inflate::new(body).boxed_unsync());
    let headers = plain.headers_mut();
    headers.remove(CONTENT_ENCODING);
    headers.remove(CONTENT_LENGTH);
    vary_by_encoding(headers);
    if let Some(tag) = headers.get(ETAG).map(weaken) {
        headers.insert(ETAG, tag);
    }
    plain
}

fn build(status: StatusCode, headers: HeaderMap, body: Bytes) -> Response<Reply> {
    let mut response = Response::new(Reply::Full(Some(body)));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// A JSON answer.
#[must_use]
pub fn json(status: u16, body: impl Into<Bytes>) -> Response<Reply> {
    let mut headers = HeaderMap::with_capacity(EXTRA_FIELDS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    build(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), headers, body.into())
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
        response.headers_mut().insert(http::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if row.closes {
        response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The answer when the backend failed and nothing stands in.
#[must_use]
pub fn failed(failure: Failure) -> Response<Reply> {
    let (status, sentence) = failure.answer();
    detail(status, sentence)
}

/// Whether a request announces or may have a body.
#[must_use]
pub fn has_body(parts: &request::Parts, ended: bool) -> bool {
    !ended || parts.headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0")
}
