//! Responses without an end: streams of events, records or parts, each of which is for the one client that asked for it.

use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderName};

/// Types whose responses last for as long as the client listens.
const ALWAYS: [&str; 2] = ["text/event-stream", "multipart/x-mixed-replace"];
/// Types of records one after the other, which end only where the response announces how long it is.
const UNLESS_BOUNDED: [&str; 13] = [
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "application/x-jsonl",
    "application/jsonlines",
    "application/x-jsonlines",
    "application/json-lines",
    "application/json-seq",
    "application/geo+json-seq",
    "application/stream+json",
    "application/x-json-stream",
    "text/x-ndjson",
    "application/grpc",
];
/// By this field a backend tells proxies that its response is a stream that is not to be buffered (nginx knows it too).
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Whether a response with these fields is a stream without a known end. `length` is what it announces.
///
/// A stream is not shared, since a client that came later would be sent a replay from its first event on; it is not stored, since it is
/// never whole; and it must end at the backend when its client leaves. An export of records that announces its length ends: it is
/// a response like any other.
#[must_use]
pub fn is_endless(fields: &HeaderMap, length: Option<u64>) -> bool {
    let is_one_of = |types: &[&str]| {
        fields.get_all(CONTENT_TYPE).iter().any(|value| {
            let essence = value.as_bytes().split(|&byte| byte == b';' || byte == b',').next().unwrap_or_default().trim_ascii();
            types.iter().any(|known| essence.eq_ignore_ascii_case(known.as_bytes()))
        })
    };
    let unbuffered = || fields.get(ACCEL_BUFFERING).is_some_and(|value| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"no"));
    is_one_of(&ALWAYS) || (length.is_none() && (is_one_of(&UNLESS_BOUNDED) || unbuffered()))
}

/// Whether a request asks for a stream of events, as browsers' `EventSource` does.
#[must_use]
pub fn asks_for_events(request: &HeaderMap) -> bool {
    let mut members = request.get_all(ACCEPT).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    members.any(|member| {
        let essence = member.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
        essence.eq_ignore_ascii_case(ALWAYS[0].as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn streams_are_known_by_their_type_and_bounded_records_are_none() {
        for (field, value, endless, bounded) in [
            ("content-type", "text/event-stream", true, true),
            ("content-type", "Text/Event-Stream ; charset=utf-8", true, true),
            ("content-type", "multipart/x-mixed-replace;boundary=a", true, true),
            ("content-type", "application/x-ndjson", true, false),
            ("content-type", "application/jsonl; charset=utf-8", true, false),
            ("content-type", "application/json-seq", true, false),
            ("content-type", "application/json", false, false),
            ("content-type", "text/plain", false, false),
            ("x-accel-buffering", "no", true, false),
            ("x-accel-buffering", "yes", false, false),
        ] {
            let fields = HeaderMap::from_iter([(HeaderName::from_static(field), HeaderValue::from_static(value))]);
            assert_eq!((is_endless(&fields, None), is_endless(&fields, Some(9))), (endless, bounded), "{value}");
        }
        for (value, asks) in [("text/event-stream", true), ("*/*, TEXT/event-stream;q=0.9", true), ("*/*", false), ("text/*", false)] {
            assert_eq!(asks_for_events(&HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(value))])), asks, "{value}");
        }
    }
}
