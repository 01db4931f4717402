//! The shared tier: entries in Redis, over the one [`RedisLink`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redis::Value;
use tokio::time::sleep;

use super::codec::{self, DecodeError};
use super::entry::Entry;
use super::key::{Canonical, Key};
use super::seal::{SealError, Sealer};
use super::store::{Store, StoreFuture, Tier};
use super::void::view::{Position, Stamp};
use super::void::{Validity, Voids};
use super::void_log::VoidLog;
use crate::breaker::{Backoff, Breaker, Gate};
use crate::clock::{Wall, millis};
use crate::redis_link::RedisLink;
use crate::redis_link::failure::{RedisFailure, refuses_writes};
use crate::redis_link::reads::Kept;
use crate::request::secrets::text_without_secrets;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::seldom::Seldom;

/// Others may write as many of those as are asked for.
static FOREIGN: Seldom = Seldom::new();
static UNREADABLE: Seldom = Seldom::new();

/// How long writes pause after Redis refused one (full, read-only): reads go on.
const WRITE_BACKOFF: Backoff = Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(10), tolerated: 0 };
/// The bytes of a position, in front of each entry: epoch and seq, the higher bytes first, so that scripts can compare them.
const STAMP: usize = 16;
/// How often an entry is checked anew because something was voided while it was being written.
const TRIES: usize = 3;
/// How long a sweep waits before it reads an entry once more that did not come.
const AGAIN: Duration = Duration::from_millis(100);

/// What stands under a name.
pub enum Named {
    /// An entry.
    Entry(Box<Entry>),
    /// Something that cannot be read here: another version wrote it, say, it was sealed with another key, or it never comes in time.
    Unreadable,
    /// No entry.
    Gone,
}

/// Stores entries in Redis.
pub struct RedisStore {
    link: RedisLink,
    namespace: String,
    writes: Breaker,
    sealer: Option<Sealer>,
    log: Arc<VoidLog>,
    voids: Arc<Voids>,
    metrics: Arc<Metrics>,
}

impl RedisStore {
    /// A store of entries whose names begin with `namespace`.
    #[must_use]
    pub fn new(
        link: RedisLink,
        namespace: &str,
        sealer: Option<Sealer>,
        log: Arc<VoidLog>,
        voids: Arc<Voids>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { link, namespace: namespace.to_owned(), writes: Breaker::new(WRITE_BACKOFF), sealer, log, voids, metrics }
    }

    fn count(&self, op: &str, kind: &str) {
        self.metrics.store_errors.with_label_values(&["redis", op, kind]).inc();
    }

    async fn read(&self, key: &Key) -> Option<Arc<Entry>> {
        let name = key.name(&self.namespace);
        // Whatever is voided from now on concerns what is read, on its way into memory too.
        let asked_at = self.voids.ask();
        let Kept { bytes, left } = self.link.get(name.as_bytes()).await.ok()??;
        match self.unpack(name.as_bytes(), bytes) {
            Ok((entry, stamp)) if entry.canonical == key.canonical.0 => {
                let mut entry = match self.log.admit(&entry, stamp, asked_at) {
                    Validity::Valid => entry,
                    Validity::Expired(left) => *left,
                    Validity::Void => return None,
                };
                entry.asked_at = asked_at;
                // Whoever shortens its life in Redis shortens it in memory too.
                if let Some(left) = left {
                    entry.lifetimes = entry.lifetimes.ending_within(Wall::now().since(entry.stored_at), left);
                }
                Some(Arc::new(entry))
            }
            Ok(_) => {
                self.count("read", "foreign");
                if let Some(left_out) = FOREIGN.next() {
                    tracing::warn!(
                        key = shown(name),
                        left_out,
                        "an entry in Redis belongs to another request and was not used; is someone writing to it?"
                    );
                }
                None
            }
            // After an upgrade there are many of those.
            Err(error) if error == DecodeError::Version.label() => {
                self.count("read", error);
                None
            }
            Err(error) => {
                self.count("read", error);
                if let Some(left_out) = UNREADABLE.next() {
                    tracing::warn!(key = shown(name), error, left_out, "an entry in Redis could not be decoded and was not used");
                }
                None
            }
        }
    }

    /// An entry as it is written under a name: the stamp up to which it was checked against voids, then the entry, perhaps sealed
    /// together with that. `None` if it cannot be sealed.
    fn pack(&self, name: &[u8], entry: &Entry, position: Position) -> Option<Vec<u8>> {
        let plain = codec::encode(entry);
        let mut out = Vec::with_capacity(STAMP + plain.len() + 64);
        out.extend_from_slice(&position.epoch.to_be_bytes());
        out.extend_from_slice(&position.seq.to_be_bytes());
        match &self.sealer {
            Some(sealer) => out.extend_from_slice(&sealer.seal(&[name, &out[..]].concat(), &plain)?),
            None => out.extend_from_slice(&plain),
        }
        Some(out)
    }

    /// What is written under a name as an entry, with its stamp, or the metric label of why it is none.
    fn unpack(&self, name: &[u8], bytes: Vec<u8>) -> Result<(Entry, Stamp), &'static str> {
        let mut rest = Bytes::from(bytes);
        if rest.len() < STAMP {
            return Err(DecodeError::Length.label());
        }
        let front = rest.split_to(STAMP);
        let number = |at: usize| front[at..at + 8].iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        let stamp = Stamp { epoch: number(0), seq: number(8) };
        let plain = match &self.sealer {
            Some(sealer) => sealer.open(&[name, &front[..]].concat(), &rest).map_err(SealError::label)?,
            None => rest,
        };
        codec::decode(plain).map(|entry| (entry, stamp)).map_err(|error| error.label())
    }

    async fn write(&self, key: &Key, entry: &Entry) {
        let name = key.name(&self.namespace);
        let size = usize::try_from(entry.weight()).unwrap_or(usize::MAX);
        let Ok(_room) = self.link.room(size) else { return };
        for _ in 0..TRIES {
            let left = entry.lifetimes.kept().saturating_sub(Wall::now().since(entry.stored_at));
            if left.is_zero() || !self.link.is_up() || self.writes.is_sparing() {
                return;
            }
            // First where the log is, then whether the entry is void: what is voided in between is checked for nothing.
            let Some(position) = self.log.position() else { return };
            let expired;
            let standing = match self.voids.check(entry) {
                Validity::Valid => entry,
                Validity::Expired(left) => {
                    expired = left;
                    &*expired
                }
                Validity::Void => return,
            };
            let Some(body) = self.pack(name.as_bytes(), standing, position) else { return };
            let command = self.log.scripts().write(position, name, &body, millis(left).max(1));
            // Only what is sent may be the trial after which writes go on.
            if self.writes.enter() == Gate::Open {
                return;
            }
            match self.link.call_with(&command, size).await {
                Ok(written) => {
                    if self.writes.succeeded() {
                        tracing::info!("Redis takes writes again");
                    }
                    if written == Value::Int(1) {
                        return;
                    }
                    // Something was voided that was not known here when this was written.
                    if self.log.position() == Some(position) && !self.log.catch_up().await {
                        return;
                    }
                }
                Err(RedisFailure::Error(error)) if refuses_writes(&error) => {
                    if let Some(span) = self.writes.failed() {
                        tracing::warn!(%error, pause = ?span, "Redis refuses writes; answers are kept in memory alone meanwhile");
                    }
                    return;
                }
                Err(_) => return,
            }
        }
    }

    /// The names of some entries, and where to go on; 0 at the end. `None`: Redis failed.
    pub async fn scan(&self, cursor: u64, count: usize) -> Option<(u64, Vec<Vec<u8>>)> {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(format!("{}:*", glob_escape(&self.namespace))).arg("COUNT").arg(count);
        redis::from_redis_value(self.link.call(&scan).await.ok()?).ok()
    }

    /// The entry of a name, whatever is void. What is large comes as it does for a request, so that no other command waits behind it.
    ///
    /// # Errors
    /// Redis is away, so that nobody knows.
    pub async fn read_named(&self, name: &[u8]) -> Result<Named, RedisFailure> {
        for attempt in 0..TRIES {
            if attempt > 0 {
                sleep(AGAIN).await;
            }
            match self.link.get(name).await {
                Ok(Some(Kept { bytes, .. })) => {
                    return Ok(self.unpack(name, bytes).map_or(Named::Unreadable, |(entry, _)| Named::Entry(Box::new(entry))));
                }
                Ok(None) => return Ok(Named::Gone),
                // A list or a set: somebody else's.
                Err(RedisFailure::Error(error)) if error.code() == Some("WRONGTYPE") => return Ok(Named::Gone),
                Err(failure) if !self.link.is_up() => return Err(failure),
                Err(_) => {}
            }
        }
        // One that is never read in time does not keep the others from being swept.
        Ok(Named::Unreadable)
    }

    /// The connections.
    #[must_use]
    pub const fn link(&self) -> &RedisLink {
        &self.link
    }

    /// What every name begins with.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    async fn delete(&self, name: &[u8]) -> bool {
        matches!(self.link.call(redis::cmd("UNLINK").arg(name)).await, Ok(Value::Int(1..)))
    }
}

fn glob_escape(text: &str) -> String {
    text.chars().flat_map(|c| matches!(c, '*' | '?' | '[' | ']' | '\\').then_some('\\').into_iter().chain([c])).collect()
}

impl Store for RedisStore {
    fn peek(&self, _: &Canonical) -> Option<Arc<Entry>> {
        None
    }

    fn get<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, Option<Arc<Entry>>> {
        Box::pin(self.read(key))
    }

    fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> StoreFuture<'a, ()> {
        Box::pin(async move { self.write(key, &entry).await })
    }

    fn replace(&self, _: &Arc<Entry>, _: Option<Arc<Entry>>) {}

    fn remove<'a>(&'a self, key: &'a Key) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.delete(key.name(&self.namespace).as_bytes()).await;
        })
    }

    fn work_off(&self, _: &mut dyn FnMut(&Entry) -> Validity) {}

    fn shared(&self) -> Option<&dyn Store> {
        Some(self)
    }

    fn report(&self) -> Vec<Tier> {
        vec![Tier { tier: "redis", up: self.is_up(), entries: None, bytes: None, capacity: None }]
    }

    fn keys_by_prefix(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    fn server_info(&self) -> StoreFuture<'_, Option<BTreeMap<String, String>>> {
        Box::pin(async {
            let info = self.link.call(&redis::cmd("INFO")).await.ok()?;
            let text: String = redis::from_redis_value(info).ok()?;
            let fact = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim_end().to_owned()));
            Some(text.lines().filter_map(fact).collect())
        })
    }

    fn is_up(&self) -> bool {
        self.link.is_up()
    }
}

/// A name as the log tells it: the readable part may hold what a client sent.
fn shown(name: &str) -> String {
    match name.rsplit_once('#') {
        Some((readable, rest)) => format!("{}#{rest}", text_without_secrets(readable)),
        None => text_without_secrets(name).into_owned(),
    }
}
