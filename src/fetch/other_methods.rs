//! What answers to other methods teach the cache about GET: a POST's answer that is the representation of its own address
//! (RFC 9110 §9.3.3), and a HEAD's fields (RFC 9111 §4.3.5).
//!
//! Both come from requests that were passed on, and only from those in which nothing could have changed the answer that
//! a GET would not have said too ([`forward::is_plain`]).

use std::sync::Arc;

use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_LOCATION, LAST_MODIFIED};
use http::{HeaderMap, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;

use super::{Fetcher, Job};
use crate::body::Stream;
use crate::cache::entry::{Answer, Content, Entry};
use crate::cache::key::{Canonical, Key};
use crate::clock::Wall;
use crate::http::conditional::validates;
use crate::http::encoding::Coding;
use crate::http::freshness::{Verdict, verdict};
use crate::http::vary::Vary;
use crate::upstream::forward;

/// Whether the answer to a POST is the representation of the address that it was sent to.
#[must_use]
pub fn names_itself(status: StatusCode, fields: &HeaderMap, path_and_query: &str) -> bool {
    let mut locations = fields.get_all(CONTENT_LOCATION).iter();
    let (first, second) = (locations.next(), locations.next());
    status == StatusCode::OK && second.is_none() && first.is_some_and(|location| location == path_and_query)
}

impl Fetcher {
    /// Keeps an answer as if it had been fetched, while whoever asked reads it, if it may be kept.
    #[must_use]
    pub fn adopt(self: &Arc<Self>, job: Job, mut answer: Response<Stream>) -> Response<Stream> {
        forward::clean_answer(answer.headers_mut());
        let (Vary::Fields(names), Verdict::Store(lives), Coding::Identity | Coding::Gzip) =
            (Vary::of(answer.headers()), verdict(&job.grant, answer.status(), answer.headers(), Wall::now()), Coding::of(answer.headers()))
        else {
            return answer;
        };
        let (head, body) = answer.into_parts();
        let (fill, writer) = self.start_fill(&job, head, names, body.size_hint().exact(), true);
        // Nobody has read yet, so the first byte is there.
        let reading = fill.reader().map_or_else(crate::body::empty, BodyExt::boxed_unsync);
        let response = fill.head.response(reading);
        let fetcher = Arc::clone(self);
        self.runtime.spawn(async move { fetcher.pump(&job, None, &fill, writer, body, Some(lives)).await });
        response
    }

    /// A HEAD was answered with these fields: what is stored for GET is as it was and gets them, or it is not fresh any
    /// more.
    pub async fn heard(self: Arc<Self>, job: Job, entry: Arc<Entry>, told: HeaderMap) {
        let Content::Answer(answer) = &entry.content else { return };
        if !is_the_same(&told, answer) {
            let key = Key { canonical: Canonical(entry.canonical.clone()), readable: entry.readable.clone(), tags: entry.tags.clone() };
            return self.store.put(&key, Arc::new(entry.expired(Wall::now()))).await;
        }
        if let Some(revived) = self.revive(&entry, &told).await {
            drop(self.adopt(job, revived));
        }
    }
}

/// Whether the answer to a HEAD has the validators and the length of what is stored, as far as it says them.
fn is_the_same(told: &HeaderMap, answer: &Answer) -> bool {
    let modified = told.get(LAST_MODIFIED).is_none_or(|date| answer.fields.get(LAST_MODIFIED) == Some(date));
    let coding = match Coding::of(told) {
        Coding::Identity if told.contains_key(CONTENT_ENCODING) => None,
        coding => Some(coding),
    };
    // The length is that of the coded bytes; of others it is not known.
    let stored = (coding == Some(answer.coding) && answer.coding == answer.sent_coding).then_some(answer.body.len());
    let length = told.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    validates(told, &answer.fields) && modified && (length.is_none() || stored.is_none() || length == stored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http::HeaderValue;

    fn fields(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|&(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn only_the_very_address_is_its_own() {
        let of = |location| names_itself(StatusCode::OK, &fields(&[("content-location", location)]), "/a?b");
        assert!(of("/a?b") && !of("/a") && !of("/a?B") && !of("http://h/a?b"));
        assert!(!names_itself(StatusCode::CREATED, &fields(&[("content-location", "/a?b")]), "/a?b"));
    }

    #[test]
    fn a_head_tells_whether_the_stored_answer_is_still_the_same() {
        let stored = fields(&[("etag", "\"a\""), ("last-modified", "then")]);
        let answer = Answer::new(StatusCode::OK, stored, Coding::Identity, Coding::Identity, Bytes::from_static(b"hello"));
        for (told, same) in [
            (fields(&[]), true),
            (fields(&[("etag", "\"a\""), ("content-length", "5")]), true),
            (fields(&[("etag", "\"b\"")]), false),
            (fields(&[("last-modified", "now")]), false),
            (fields(&[("content-length", "6")]), false),
            (fields(&[("content-length", "6"), ("content-encoding", "gzip")]), true),
        ] {
            assert_eq!(is_the_same(&told, &answer), same, "{told:?}");
        }
    }
}
