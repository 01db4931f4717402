//! Purging what is stored, here and in the cache that the backend has of its own (`backend.forward_invalidation`).

use std::sync::Arc;
use std::time::Duration;

use http::header::HOST;
use http::{HeaderValue, Method, Request};

use super::Proxy;
use super::effect::Effect;
use crate::body;
use crate::cache::Purged;
use crate::cache::void::Selection;
use crate::config::template::escape_in_url;
use crate::upstream::admission::machine::Party;
use crate::upstream::failure::Failure;

/// How long the backend may take to empty its cache.
const DEADLINE: Duration = Duration::from_secs(5);
/// What tags of symbols begin with.
const SYMBOL_TAG: &str = "symbol:";

impl Proxy {
    /// Purges what `what` selects, or with `soft` makes it stale: see [`Cache::purge`](crate::cache::Cache::purge). If the backend
    /// is to be told, what is fetched until it has emptied its own cache is purged too.
    pub async fn purge(self: &Arc<Self>, what: Selection, soft: bool) -> Purged {
        let purged = self.cache.purge(what.clone(), soft).await;
        if self.forward_invalidation {
            let proxy = Arc::clone(self);
            self.fetcher.spawn(async move {
                if proxy.tell_backend(&what).await {
                    proxy.cache.purge(what, soft).await;
                }
            });
        }
        purged
    }

    /// Has the backend empty its own cache of what a purge selects, or of more. Whether it may have done so.
    async fn tell_backend(&self, what: &Selection) -> bool {
        let target = backend_target(what);
        let Ok(uri) = target.parse() else { return false };
        let mut request = Request::new(body::empty());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
        match self.upstream.call(&Party::own("none"), request, DEADLINE).await {
            Ok(response) if response.status().is_success() => true,
            Ok(response) => {
                tracing::warn!(
                    target,
                    status = response.status().as_u16(),
                    "the backend did not empty its own cache (forward_invalidation)"
                );
                Effect::of(Ok(response.status())).voids()
            }
            Err(error) => {
                tracing::warn!(target, %error, "the backend could not be told to empty its own cache (forward_invalidation)");
                Effect::of(Err(Failure::from(&error))).voids()
            }
        }
    }
}

/// The endpoint of the API with which its own cache is emptied of this, or of everything where it knows no such selection.
fn backend_target(what: &Selection) -> String {
    match what {
        Selection::Pattern(pattern) => format!("/api/cache/clear?pattern={}", escape_in_url(pattern)),
        Selection::Tag(tag) if tag.starts_with(SYMBOL_TAG) => {
            format!("/api/cache/invalidate/symbol/{}", escape_in_url(&tag[SYMBOL_TAG.len()..]))
        }
        Selection::Tag(_) | Selection::Target(_) | Selection::Entry(_) => "/api/cache/clear".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backend_is_asked_in_its_own_words() {
        for (what, target) in [
            (Selection::Pattern("liq:BTC*+".into()), "/api/cache/clear?pattern=liq%3ABTC%2A%2B"),
            (Selection::Tag("symbol:BTCUSDT".into()), "/api/cache/invalidate/symbol/BTCUSDT"),
            (Selection::Tag("symbol:A+B".into()), "/api/cache/invalidate/symbol/A%2BB"),
            (Selection::Tag("all".into()), "/api/cache/clear"),
        ] {
            assert_eq!(backend_target(&what), target);
        }
    }
}
