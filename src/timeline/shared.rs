//! Spans that are over in Redis, for other instances and for after a restart: compressed, sealed where a key is set, and found
//! by purges as any entry is.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::codec;
use super::kept::StoredSpan;
use super::piece::Piece;
use crate::aside;
use crate::cache::Cache;
use crate::cache::entry::{Checked, Content, Entry, StoredResponse};
use crate::cache::key::Key;
use crate::clock::{Wall, millis};
use crate::http::encoding::{Coding, gunzip, gzip, inflation_limit};
use crate::http::freshness::Lifetimes;
use crate::request::secrets::text_without_secrets;

/// How long Redis keeps a span, unless it needs the room.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// A span inflates to no more than this, in bytes.
const LARGEST: usize = 64 << 20;

/// The spans in the tier that instances share.
#[derive(Clone)]
pub struct Shared {
    cache: Arc<Cache>,
    span: Duration,
}

impl Shared {
    /// The shared tier for spans of this length; `None` without such a tier.
    #[must_use]
    pub fn new(cache: &Arc<Cache>, span: Duration) -> Option<Self> {
        cache.store().shared().map(|_| Self { cache: Arc::clone(cache), span })
    }

    fn key(&self, symbol: &str, start: i64, tags: Vec<String>) -> Key {
        Piece::Span(start).key(symbol, i64::try_from(millis(self.span)).unwrap_or(i64::MAX), tags)
    }

    /// Writes a span, unless it was purged meanwhile.
    pub async fn put(&self, symbol: &str, start: i64, tags: Vec<String>, span: &Arc<StoredSpan>) {
        let Some(store) = self.cache.store().shared() else { return };
        let packing = aside::run({
            let span = Arc::clone(span);
            move || gzip(&codec::encode(&span.columns))
        });
        let Some(body) = packing.await else { return };
        if body.is_empty() {
            return;
        }
        let key = self.key(symbol, start, tags);
        let lifetimes = Lifetimes { fresh: KEPT, ..Lifetimes::default() };
        let stored = StoredResponse::new(StatusCode::OK, HeaderMap::new(), Coding::Opaque, Coding::Opaque, body);
        let entry = Entry::new(&key, span.asked_at, Wall::now(), 0, lifetimes, Content::Response(stored));
        // What was voided meanwhile is not written.
        store.put(&key, Arc::new(entry)).await;
    }

    /// The spans that are there of those that begin at `starts`.
    pub async fn get(&self, symbol: &str, tags: &[String], starts: &[i64]) -> Vec<(i64, StoredSpan)> {
        let Some(store) = self.cache.store().shared() else { return Vec::new() };
        let mut found = Vec::new();
        for &start in starts {
            let Some(entry) = store.get(&self.key(symbol, start, tags.to_vec())).await else { continue };
            let Content::Response(stored) = &entry.content else { continue };
            let packed = stored.body.clone();
            let unpacking = aside::run(move || {
                let plain = gunzip(&packed, inflation_limit(packed.len(), LARGEST).min(LARGEST)).ok()?;
                codec::decode(&plain)
            });
            match unpacking.await {
                Some(Some(columns)) => found.push((start, StoredSpan { columns, asked_at: entry.asked_at, checked: Checked::default() })),
                _ => {
                    tracing::warn!(key = &*text_without_secrets(&entry.readable), "orders in Redis could not be decoded and were not used")
                }
            }
        }
        found
    }
}
