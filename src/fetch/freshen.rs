//! Freshening a stored response upon validation (RFC 9111 §4.3.4).

use http::{HeaderMap, Response};

use super::Fetcher;
use crate::body::{self, Stream};
use crate::cache::entry::{Content, Entry};
use crate::http::conditional::validates;
use crate::http::headers::freshened;
use crate::upstream::response_fields;

impl Fetcher {
    /// A stored response that the upstream says still holds, as if it had come anew with the fields that the 304 updates.
    /// `None` if the 304 is about another response.
    pub(super) async fn freshen(&self, stored: &Entry, not_modified: &HeaderMap) -> Option<Response<Stream>> {
        let Content::Response(response) = &stored.content else { return None };
        if !validates(not_modified, &response.fields) {
            return None;
        }
        let plain = response.inflated(self.settings.max_object).await?;
        let mut fields = response.fields.clone();
        response_fields::remove_own_via(&mut fields);
        let mut fresh = Response::new(body::full(plain));
        *fresh.status_mut() = response.status;
        *fresh.headers_mut() = freshened(&fields, not_modified);
        Some(fresh)
    }
}
