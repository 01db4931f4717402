//! Stored responses as they are sent: their fields with a place for each that a hit adds, and their heads as bytes.
//!
//! A hit changes four things of a head: `Age`, the rest of its life in `Cache-Status`, the request's id, and `Date` where the
//! upstream sent none. Everything else is the same from hit to hit. As bytes it is made once, when the first one comes, and kept; as fields it
//! would take many times as much memory, and is made for each hit that needs them.

use std::cell::RefCell;

use http::header::{
    AGE, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_LOCATION, CONTENT_TYPE, DATE, LAST_MODIFIED, LOCATION, TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::clock::Wall;
use crate::request::fields::REQUEST_ID;

/// `Cache-Status` (RFC 9211).
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// What stands there for every hit, before the seconds for which it is fresh.
pub const HIT: &str = "sluice; hit; ttl=";

/// A stored response in one of its forms.
#[derive(Clone, Debug, PartialEq)]
pub struct Ready {
    /// Its fields. Those that a hit sets are there already, with no value yet, so that setting them moves nothing.
    pub fields: HeaderMap,
    status: StatusCode,
    /// The length of its body in bytes, if that is known.
    length: Option<usize>,
}

/// What a hit fills in.
#[derive(Clone, Copy, Debug)]
pub struct Moment<'a> {
    /// The age, in whole seconds.
    pub age: u64,
    /// For how many seconds it is fresh.
    pub left: u64,
    /// The request's id.
    pub id: &'a [u8],
    /// `Date`.
    pub now: Wall,
}

/// A head as bytes, with places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    bytes: Vec<u8>,
    /// Where something is filled in, in order.
    places: Vec<(usize, Place)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Age,
    Left,
    Id,
    Date,
}

impl Ready {
    /// A response with these fields and a body of `length` bytes (`None`: not known yet).
    #[must_use]
    pub fn new(status: StatusCode, mut fields: HeaderMap, length: Option<usize>) -> Self {
        for name in [AGE, CACHE_STATUS, REQUEST_ID] {
            fields.insert(name, HeaderValue::from_static(""));
        }
        Self { fields, status, length }
    }

    /// Its head as HTTP/1.1 has it; `None` if a hit of it takes more than filling in what changes.
    #[must_use]
    pub fn head(&self) -> Option<Head> {
        Head::new(self.status, &self.fields, self.length?)
    }

    /// The same as what tells a client that it has the response already (RFC 9110 §15.4.5).
    #[must_use]
    pub fn not_modified(mut fields: HeaderMap) -> Self {
        for name in [CONTENT_TYPE, CONTENT_ENCODING, LAST_MODIFIED] {
            fields.remove(name);
        }
        Self::new(StatusCode::NOT_MODIFIED, fields, Some(0))
    }
}

impl Head {
    /// The head that the HTTP library writes for these fields; `None` where that is not as plain as can be.
    fn new(status: StatusCode, fields: &HeaderMap, length: usize) -> Option<Self> {
        // These depend on the request, on the connection, or on more than the fields.
        let plain = ![LOCATION, CONTENT_LOCATION, CONTENT_LENGTH, TRANSFER_ENCODING].iter().any(|name| fields.contains_key(name));
        let has_body = status != StatusCode::NOT_MODIFIED;
        if !plain || (has_body && (status == StatusCode::NO_CONTENT || !status.is_success() && !status.is_client_error())) {
            return None;
        }
        let mut head = Self { bytes: Vec::with_capacity(64 + fields.len() * 48), places: Vec::with_capacity(4) };
        for text in ["HTTP/1.1 ", status.as_str(), " ", status.canonical_reason()?, "\r\n"] {
            head.text(text);
        }
        for (name, value) in fields {
            head.text(name.as_str());
            head.text(": ");
            match name {
                name if *name == AGE => head.place(Place::Age),
                name if *name == REQUEST_ID => head.place(Place::Id),
                name if *name == CACHE_STATUS => {
                    head.text(HIT);
                    head.place(Place::Left);
                }
                _ => head.bytes.extend_from_slice(value.as_bytes()),
            }
            head.text("\r\n");
        }
        if has_body {
            head.text("content-length: ");
            decimal(length as u64, &mut head.bytes);
            head.text("\r\n");
        }
        if !fields.contains_key(DATE) {
            head.text("date: ");
            head.place(Place::Date);
            head.text("\r\n");
        }
        head.text("\r\n");
        head.bytes.shrink_to_fit();
        Some(head)
    }

    fn text(&mut self, text: &str) {
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn place(&mut self, place: Place) {
        self.places.push((self.bytes.len(), place));
    }

    /// Appends the head of a hit to `out`.
    pub fn write(&self, moment: &Moment<'_>, out: &mut Vec<u8>) {
        let mut from = 0;
        for &(at, place) in &self.places {
            out.extend_from_slice(&self.bytes[from..at]);
            from = at;
            match place {
                Place::Age => decimal(moment.age, out),
                Place::Left => decimal(moment.left, out),
                Place::Id => out.extend_from_slice(moment.id),
                Place::Date => date(moment.now, out),
            }
        }
        out.extend_from_slice(&self.bytes[from..]);
    }
}

/// Appends `Date`, which is made once a second.
fn date(now: Wall, out: &mut Vec<u8>) {
    thread_local!(static MADE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) });
    MADE.with_borrow_mut(|(second, text)| {
        let this = now.as_millis() / 1000;
        if *second != this || text.is_empty() {
            (*second, *text) = (this, now.http_date());
        }
        out.extend_from_slice(text.as_bytes());
    });
}

/// Appends a number, without the machinery of formatting.
fn decimal(number: u64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let (mut at, mut rest) = (digits.len(), number);
    loop {
        at -= 1;
        digits[at] = b"0123456789"[usize::try_from(rest % 10).unwrap_or(0)];
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fields(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    const MOMENT: Moment<'_> = Moment { age: 7, left: 293, id: b"id-1", now: Wall::from_millis(784_111_777_000) };

    fn written(ready: &Ready) -> Option<String> {
        let mut out = Vec::new();
        ready.head()?.write(&MOMENT, &mut out);
        String::from_utf8(out).ok()
    }

    #[test]
    fn a_head_has_all_fields_and_what_changes_in_its_place() {
        let stored = fields(&[("content-type", "text/plain"), ("etag", "\"x\"")]);
        assert_eq!(
            written(&Ready::new(StatusCode::OK, stored, Some(12))).unwrap(),
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\netag: \"x\"\r\nage: 7\r\ncache-status: sluice; hit; ttl=293\r\n\
             x-request-id: id-1\r\ncontent-length: 12\r\ndate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"
        );
        assert_eq!(
            written(&Ready::not_modified(fields(&[("content-type", "text/plain"), ("etag", "\"x\""), ("date", "now")]))).unwrap(),
            "HTTP/1.1 304 Not Modified\r\ndate: now\r\netag: \"x\"\r\nage: 7\r\ncache-status: sluice; hit; ttl=293\r\n\
             x-request-id: id-1\r\n\r\n"
        );
    }

    #[test]
    fn heads_that_depend_on_more_are_left_to_the_library() {
        let head = |status, fields, length| Ready::new(status, fields, length).head();
        let bare = |status| head(status, HeaderMap::new(), Some(1));
        assert!(bare(StatusCode::OK).is_some() && bare(StatusCode::NOT_FOUND).is_some());
        for status in [StatusCode::NO_CONTENT, StatusCode::MOVED_PERMANENTLY, StatusCode::INTERNAL_SERVER_ERROR] {
            assert_eq!(bare(status), None, "{status}");
        }
        for name in ["location", "content-location", "content-length", "transfer-encoding"] {
            assert_eq!(head(StatusCode::OK, fields(&[(name, "1")]), Some(1)), None, "{name}");
        }
        assert_eq!(head(StatusCode::OK, HeaderMap::new(), None), None);
    }

    proptest! {
        #[test]
        fn numbers_are_written_as_everywhere(number: u64) {
            let mut out = Vec::new();
            decimal(number, &mut out);
            prop_assert_eq!(String::from_utf8(out).unwrap(), number.to_string());
        }
    }
}
