//! Parts of what is over in Redis, for other instances and for after a restart: compressed, sealed where a key is set, and found
//! by purges as any entry is.
//!
//! A part is found by where it ends, and says where it begins: which is where the one before it ends. Each day has a part that ends with it.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::codec::{self, Part};
use super::piece::part_key;
use crate::aside;
use crate::cache::Cache;
use crate::cache::entry::{Content, Entry, StoredResponse};
use crate::cache::key::Key;
use crate::cache::void::Moment;
use crate::clock::{Wall, millis};
use crate::http::encoding::{Coding, gunzip, gzip, inflation_limit};
use crate::http::freshness::Lifetimes;
use crate::request::secrets::text_without_secrets;
use crate::telemetry::seldom::Seldom;

static UNREADABLE: Seldom = Seldom::new();

/// How long Redis keeps a part, unless it needs the room.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// A part inflates to no more than this, in bytes: four blocks do.
const LARGEST: usize = 8 << 20;
/// Parts that are written at a time. Who fetches many waits for that.
const WRITTEN: usize = 16;

/// The parts in the tier that instances share.
#[derive(Clone)]
pub struct Shared {
    cache: Arc<Cache>,
    /// The length of a span, in milliseconds.
    span: i64,
    writing: Arc<Semaphore>,
}

impl Shared {
    /// The shared tier, where spans have this length; `None` without such a tier.
    #[must_use]
    pub fn new(cache: &Arc<Cache>, span: Duration) -> Option<Self> {
        let span = i64::try_from(millis(span)).unwrap_or(i64::MAX);
        cache.store().shared().map(|_| Self { cache: Arc::clone(cache), span, writing: Arc::new(Semaphore::new(WRITTEN)) })
    }

    fn key(&self, symbol: &str, to: i64, tags: Vec<String>) -> Key {
        part_key(symbol, self.span, to, tags)
    }

    /// A turn to write a part; `None` if the program ends.
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.writing).acquire_owned().await.ok()
    }

    /// Writes a part that was asked for at `asked_at`, unless it was purged meanwhile.
    pub async fn put(&self, symbol: &str, tags: Vec<String>, part: Part, asked_at: Moment) {
        let Some(store) = self.cache.store().shared() else { return };
        let key = self.key(symbol, part.to, tags);
        let Some(body) = aside::run(move || gzip(&codec::encode(&part))).await else { return };
        if body.is_empty() {
            return;
        }
        let lifetimes = Lifetimes { fresh: KEPT, ..Lifetimes::default() };
        let stored = StoredResponse::new(StatusCode::OK, HeaderMap::new(), Coding::Opaque, Coding::Opaque, body);
        let entry = Entry::new(&key, asked_at, Wall::now(), 0, lifetimes, Content::Response(stored));
        // What was voided meanwhile is not written.
        store.put(&key, Arc::new(entry)).await;
    }

    /// The part that ends at `to`, and when it was asked for.
    pub async fn get(&self, symbol: &str, tags: &[String], to: i64) -> Option<(Part, Moment)> {
        let store = self.cache.store().shared()?;
        let entry = store.get(&self.key(symbol, to, tags.to_vec())).await?;
        let Content::Response(stored) = &entry.content else { return None };
        let packed = stored.body.clone();
        let unpacking = aside::run(move || {
            let plain = gunzip(&packed, inflation_limit(packed.len(), LARGEST).min(LARGEST)).ok()?;
            codec::decode(&plain)
        });
        match unpacking.await.flatten().filter(|part| part.to == to) {
            Some(part) => Some((part, entry.asked_at)),
            None => {
                if let Some(left_out) = UNREADABLE.next() {
                    let key = &*text_without_secrets(&entry.readable);
                    tracing::warn!(key, left_out, "orders in Redis could not be decoded and were not used");
                }
                None
            }
        }
    }
}
