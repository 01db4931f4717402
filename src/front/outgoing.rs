//! What leaves for a client: whether a response has a body, and which length it announces. **The one function** for every
//! response, from whatever it was made, over either protocol and on both listeners ([`fit`]).

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, TRAILER};
use http::{HeaderValue, Response, StatusCode};
use http_body::Body as _;

use crate::body::Reply;

/// A response as it leaves for a client that asked with HEAD or not. Where the protocol allows no body (RFC 9110 §6.4.1) there is
/// none, and the length is the one that the response to GET announces, as far as it is known (§8.6).
#[must_use]
pub fn fit(is_head: bool, mut response: Response<Reply>) -> Response<Reply> {
    let status = response.status();
    let has_no_content = status == StatusCode::NO_CONTENT || status.is_informational();
    if has_no_content {
        response.headers_mut().remove(CONTENT_LENGTH);
    }
    if !is_head && !has_no_content && status != StatusCode::NOT_MODIFIED {
        return response;
    }
    let length = known_length(response.body()).filter(|_| is_head && !has_no_content && status != StatusCode::NOT_MODIFIED);
    if let Some(length) = length {
        response.headers_mut().entry(CONTENT_LENGTH).or_insert(HeaderValue::from(length));
    }
    // No trailers follow what has no body.
    response.headers_mut().remove(TRAILER);
    *response.body_mut() = Reply::Full(None);
    response
}

/// The length of what GET would get. An empty stream says nothing: it is the backend's answer to HEAD, whose fields tell.
fn known_length(body: &Reply) -> Option<u64> {
    match body {
        Reply::Full(bytes) => Some(bytes.as_ref().map_or(0, Bytes::len) as u64),
        Reply::Stream(stream) => stream.size_hint().exact().filter(|_| !stream.is_end_stream()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body;

    #[test]
    fn what_may_have_no_body_has_none_and_the_length_that_get_has() {
        let full = |text: &'static str| Reply::Full(Some(Bytes::from_static(text.as_bytes())));
        let stream = |text: &'static str| Reply::Stream(body::full(Bytes::from_static(text.as_bytes())));
        for (is_head, status, made, said, left, length) in [
            (false, 200, full("hello"), None, 5, None),
            (false, 200, stream("hello"), Some("5"), 5, Some("5")),
            (true, 200, full("hello"), None, 0, Some("5")),
            (true, 200, full(""), None, 0, Some("0")),
            (true, 404, full("{}"), None, 0, Some("2")),
            (true, 200, stream("hello"), None, 0, Some("5")),
            // The backend's own answer to HEAD.
            (true, 200, stream(""), Some("7"), 0, Some("7")),
            (true, 200, stream(""), None, 0, None),
            (false, 204, full(""), Some("0"), 0, None),
            (true, 204, full(""), Some("0"), 0, None),
            (false, 304, full("hello"), None, 0, None),
            (false, 304, stream(""), Some("5"), 0, Some("5")),
        ] {
            let mut response = Response::new(made);
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            if let Some(said) = said {
                response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static(said));
            }
            let fitted = fit(is_head, response);
            let told = fitted.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
            assert_eq!((fitted.body().size_hint().exact(), told), (Some(left), length), "HEAD {is_head}, {status}");
        }
    }
}
