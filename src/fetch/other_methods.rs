//! What responses to other methods say about the stored response to GET: a POST's that is the representation of its own target
//! URI (RFC 9110 §9.3.3) is stored, and a HEAD's fields freshen or invalidate what is stored (RFC 9111 §4.3.5).
//!
//! Both come from requests that were passed, and only from those that said nothing beyond what the key holds
//! ([`is_fully_keyed`](crate::upstream::request_fields::is_fully_keyed)).

use std::sync::Arc;

use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_LOCATION, LAST_MODIFIED};
use http::{HeaderMap, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::lead::Arrived;
use super::{Fetcher, Job};
use crate::body::Stream;
use crate::cache::entry::{Content, Entry, StoredResponse};
use crate::cache::void::Effect;
use crate::clock::Wall;
use crate::http::conditional::validates;
use crate::http::encoding::Coding;
use crate::http::endless::is_endless;
use crate::http::freshness::{Verdict, verdict};
use crate::http::vary::Vary;
use crate::upstream::response_fields;

/// Whether the response to a POST is the representation of the target that it was sent to.
#[must_use]
pub fn represents_its_target(status: StatusCode, fields: &HeaderMap, path_and_query: &str) -> bool {
    let mut locations = fields.get_all(CONTENT_LOCATION).iter();
    let (first, second) = (locations.next(), locations.next());
    status == StatusCode::OK && second.is_none() && first.is_some_and(|location| location == path_and_query)
}

impl Fetcher {
    /// Stores a response as if it had been fetched, if it may be stored, while whoever asked reads it.
    pub async fn store_passing(self: &Arc<Self>, job: Job, mut response: Response<Stream>) -> Response<Stream> {
        response_fields::clean(response.headers_mut());
        let (response, may_be_stored) = self.as_contracted(&job, response).await;
        if !may_be_stored || is_endless(response.headers(), response.body().size_hint().exact()) {
            return response;
        }
        let (Vary::Fields(names), Verdict::Store(lifetimes), Coding::Identity | Coding::Gzip) = (
            Vary::of(response.headers()),
            verdict(&job.policy, response.status(), response.headers(), Wall::now()),
            Coding::of(response.headers()),
        ) else {
            return response;
        };
        let (head, body) = response.into_parts();
        let arrived = Arrived { head, came: Instant::now(), names, length: body.size_hint().exact(), stored: Some(lifetimes) };
        let (fill, writer) = self.start_fill(&job, arrived);
        // Nobody has read yet, so the first byte is still there.
        let reading = fill.reader().map_or_else(crate::body::empty, BodyExt::boxed_unsync);
        let response = fill.head.response(reading);
        let fetcher = Arc::clone(self);
        self.runtime.spawn(async move { fetcher.transfer(&job, None, &fill, writer, body, Some(lifetimes)).await });
        response
    }

    /// A HEAD was answered with these fields. What is stored for GET gets them if it is still the same, and is stale if not.
    pub async fn update_from_head(self: Arc<Self>, job: Job, entry: Arc<Entry>, head: HeaderMap) {
        let Content::Response(response) = &entry.content else { return };
        if !is_the_same(&head, response) {
            let stale = Arc::new(entry.expired(Wall::now(), job.asked_at, Effect::Expire));
            return self.cache.put(&entry.key(), stale).await;
        }
        let Some(fresh) = self.freshen(&entry, &head).await else { return };
        match verdict(&job.policy, fresh.status(), fresh.headers(), Wall::now()) {
            Verdict::Private(_) => self.cache.end(&entry.key()).await,
            _ => drop(self.store_passing(job, fresh).await),
        }
    }
}

/// Whether the response to a HEAD has the validators and the length of what is stored, as far as it says them.
fn is_the_same(head: &HeaderMap, stored: &StoredResponse) -> bool {
    let modified = head.get(LAST_MODIFIED).is_none_or(|date| stored.fields.get(LAST_MODIFIED) == Some(date));
    let coding = match Coding::of(head) {
        Coding::Identity if head.contains_key(CONTENT_ENCODING) => None,
        coding => Some(coding),
    };
    // The length is that of the coded bytes; of others it is not known.
    let known = (coding == Some(stored.coding) && stored.coding == stored.sent_coding).then_some(stored.body.len());
    let length = head.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    validates(head, &stored.fields) && modified && (length.is_none() || known.is_none() || length == known)
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
    fn only_the_very_target_counts() {
        let of = |location| represents_its_target(StatusCode::OK, &fields(&[("content-location", location)]), "/a?b");
        assert!(of("/a?b") && !of("/a") && !of("/a?B") && !of("http://h/a?b"));
        assert!(!represents_its_target(StatusCode::CREATED, &fields(&[("content-location", "/a?b")]), "/a?b"));
    }

    #[test]
    fn a_head_tells_whether_the_stored_answer_is_still_the_same() {
        let stored = fields(&[("etag", "\"a\""), ("last-modified", "then")]);
        let response = StoredResponse::new(StatusCode::OK, stored, Coding::Identity, Coding::Identity, Bytes::from_static(b"hello"));
        for (told, same) in [
            (fields(&[]), true),
            (fields(&[("etag", "\"a\""), ("content-length", "5")]), true),
            (fields(&[("etag", "\"b\"")]), false),
            (fields(&[("last-modified", "now")]), false),
            (fields(&[("content-length", "6")]), false),
            (fields(&[("content-length", "6"), ("content-encoding", "gzip")]), true),
        ] {
            assert_eq!(is_the_same(&told, &response), same, "{told:?}");
        }
    }
}
