//! The shared tier. Redis is never in the way: every call has a deadline in tens of milliseconds, and after a failure
//! no request touches Redis until a task in the background has seen it answer again.
//!
//! Connections are multiplexed and pipelined; no blocking command, no `KEYS`, no `FLUSHDB`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, RedisError, Value};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::codec;
use super::entry::Entry;
use super::key::{Canonical, Key};
use super::seal::{SealError, Sealer};
use super::store::{Store, StoreFuture, Tier};
use super::void::{Purge, Selection, glob};
use crate::breaker::{Backoff, Breaker, Gate};
use crate::clock::{Wall, millis};
use crate::config::RedisUrl;
use crate::telemetry::metrics::Metrics;

/// Connections: the first writes, so that a large object on its way out delays no read; the others read in turn.
const CONNECTIONS: usize = 3;
/// A new connection must stand and answer within this.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a failing Redis is left alone between attempts. Recovery is seen within the longest.
const RECONNECT: Backoff = Backoff { first: Duration::from_millis(50), longest: Duration::from_secs(2), tolerated: 0 };
/// How long writes pause after Redis refused one (full, read-only): reads go on.
const WRITE_BACKOFF: Backoff = Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(10), tolerated: 0 };
/// A write may take this many times as long as a read: no client waits for it.
const WRITE_FACTOR: u32 = 10;
/// Keys a `SCAN` call looks at.
const SCAN_COUNT: usize = 500;

/// Stores entries in Redis.
pub struct RedisStore {
    link: Arc<Link>,
    namespace: String,
    read_timeout: Duration,
    writes: Breaker,
    sealer: Option<Sealer>,
    metrics: Arc<Metrics>,
}

/// The connections, and what the task that makes them anew needs.
struct Link {
    client: Client,
    connections: ArcSwapOption<Vec<MultiplexedConnection>>,
    next: AtomicUsize,
    broken: Notify,
    metrics: Arc<Metrics>,
}

/// Why a call to Redis brought nothing.
enum RedisFailure {
    /// Redis is being left alone.
    Down,
    /// Redis did not answer in time.
    Timeout,
    /// Redis or the connection said no.
    Error(RedisError),
}

impl RedisStore {
    /// A store that connects in the background, on the current runtime. Returns at once, whether Redis is there or not.
    ///
    /// # Errors
    /// The URL makes no sense to the client.
    pub fn start(
        url: &RedisUrl,
        namespace: &str,
        read_timeout: Duration,
        sealer: Option<Sealer>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, RedisError> {
        let link = Arc::new(Link {
            client: Client::open(url.info.clone())?,
            connections: ArcSwapOption::empty(),
            next: AtomicUsize::new(0),
            broken: Notify::new(),
            metrics: Arc::clone(&metrics),
        });
        tokio::spawn(Arc::clone(&link).keep_connected());
        Ok(Self { link, namespace: namespace.to_owned(), read_timeout, writes: Breaker::new(WRITE_BACKOFF), sealer, metrics })
    }

    /// Runs a command, mostly a write, within a deadline.
    async fn call(&self, command: &Cmd) -> Result<Value, RedisFailure> {
        let (mut connection, set) = self.link.pick(true).ok_or(RedisFailure::Down)?;
        let answering = async { connection.send_packed_command(command).await.and_then(Value::extract_error) };
        self.within("write", self.read_timeout * WRITE_FACTOR, &set, answering).await
    }

    /// The bytes under a name and how long Redis will keep them (`None`: for ever), in one round trip.
    async fn fetch(&self, name: &str) -> Result<(Value, Option<Duration>), RedisFailure> {
        let (mut connection, set) = self.link.pick(false).ok_or(RedisFailure::Down)?;
        let mut pair = redis::pipe();
        pair.get(name).pttl(name);
        let answering = async {
            let answers = connection.send_packed_commands(&pair, 0, 2).await?;
            answers.into_iter().map(Value::extract_error).collect::<Result<Vec<_>, _>>()
        };
        let mut answers = self.within("read", self.read_timeout, &set, answering).await?;
        let left = match answers.pop() {
            Some(Value::Int(left)) => u64::try_from(left).ok().map(Duration::from_millis),
            _ => None,
        };
        Ok((answers.pop().unwrap_or(Value::Nil), left))
    }

    /// Waits for an answer within a deadline; any failure of the connection takes Redis out of the way.
    async fn within<T>(
        &self,
        op: &str,
        deadline: Duration,
        set: &ConnectionSet,
        answering: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, RedisFailure> {
        let started = Instant::now();
        let answer = timeout(deadline, answering).await;
        self.metrics.store_seconds.with_label_values(&["redis", op]).observe(started.elapsed().as_secs_f64());
        let answer = answer.map_err(|_| RedisFailure::Timeout).and_then(|answer| answer.map_err(RedisFailure::Error));
        if let Err(failure) = &answer {
            let (kind, fatal) = classify(failure);
            self.count(op, kind);
            if fatal {
                self.link.take_down(set, kind);
            }
        }
        answer
    }

    fn count(&self, op: &str, kind: &str) {
        self.metrics.store_errors.with_label_values(&["redis", op, kind]).inc();
    }

    async fn read(&self, key: &Key) -> Option<Arc<Entry>> {
        let name = key.name(&self.namespace);
        let (Value::BulkString(bytes), left) = self.fetch(&name).await.ok()? else { return None };
        match self.unpack(name.as_bytes(), bytes) {
            Ok(mut entry) if entry.canonical == key.canonical.0 => {
                // Whoever shortens its life in Redis shortens it in memory too.
                if let Some(left) = left {
                    entry.lifetimes = entry.lifetimes.ending_within(Wall::now().since(entry.stored_at), left);
                }
                Some(Arc::new(entry))
            }
            Ok(_) => {
                self.count("read", "foreign");
                tracing::warn!(key = %name, "an entry in Redis belongs to another request and was not used; is someone writing to it?");
                None
            }
            Err(error) => {
                self.count("read", error);
                tracing::warn!(key = %name, error, "an entry in Redis could not be decoded and was not used");
                None
            }
        }
    }

    /// An entry as it is written under a name; `None` if it cannot be sealed.
    fn pack(&self, name: &[u8], entry: &Entry) -> Option<Bytes> {
        let plain = codec::encode(entry);
        match &self.sealer {
            Some(sealer) => sealer.seal(name, &plain),
            None => Some(plain),
        }
    }

    /// What is written under a name as an entry, or the metric label of why it is none.
    fn unpack(&self, name: &[u8], bytes: Vec<u8>) -> Result<Entry, &'static str> {
        let plain = match &self.sealer {
            Some(sealer) => sealer.open(name, &bytes).map_err(SealError::label)?,
            None => Bytes::from(bytes),
        };
        codec::decode(plain).map_err(|error| error.label())
    }

    async fn write(&self, key: &Key, entry: &Entry) {
        let left = entry.lifetimes.kept().saturating_sub(Wall::now().since(entry.stored_at));
        if left.is_zero() || self.link.connections.load().is_none() || self.writes.enter() == Gate::Open {
            return;
        }
        let name = key.name(&self.namespace);
        let Some(body) = self.pack(name.as_bytes(), entry) else { return };
        let mut command = redis::cmd("SET");
        command.arg(&name).arg(&body[..]).arg("PX").arg(millis(left).max(1));
        match self.call(&command).await {
            Ok(_) => {
                if self.writes.succeeded() {
                    tracing::info!("Redis takes writes again");
                }
            }
            Err(RedisFailure::Error(error)) if refuses_writes(&error) => {
                if let Some(span) = self.writes.failed() {
                    tracing::warn!(%error, pause = ?span, "Redis refuses writes; answers are kept in memory alone meanwhile");
                }
            }
            Err(_) => {}
        }
    }

    /// Walks the namespace with `SCAN`. A Redis that fails half-way ends the walk.
    async fn purge_all(&self, purge: &Purge) -> usize {
        let (mut cursor, mut purged) = (0_u64, 0);
        let pattern = format!("{}:*", glob_escape(&self.namespace));
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(SCAN_COUNT);
            let Ok(page) = self.call(&scan).await else { return purged };
            let Ok((next, names)) = redis::from_redis_value::<(u64, Vec<Vec<u8>>)>(page) else { return purged };
            for name in names {
                purged += usize::from(self.purge_one(&name, purge).await);
            }
            cursor = next;
            if cursor == 0 {
                return purged;
            }
        }
    }

    async fn purge_one(&self, name: &[u8], purge: &Purge) -> bool {
        // The readable part stands in the name, so most keys need not be read; tags and soft purges need the entry.
        if let (Selection::Pattern(pattern), false) = (&purge.what, purge.soft) {
            let readable = name.get(self.namespace.len() + 1..name.len().saturating_sub(65)).unwrap_or_default();
            return glob(pattern.as_bytes(), readable) && self.delete(name).await;
        }
        let Ok(Value::BulkString(bytes)) = self.call(redis::cmd("GET").arg(name)).await else { return false };
        let Ok(entry) = self.unpack(name, bytes) else { return false };
        if !purge.what.matches(&entry.readable, &entry.tags) {
            return false;
        }
        if !purge.soft {
            return self.delete(name).await;
        }
        let Some(stale) = self.pack(name, &purge.expire(&entry)) else { return false };
        let mut command = redis::cmd("SET");
        command.arg(name).arg(&stale[..]).arg("XX").arg("KEEPTTL");
        self.call(&command).await.is_ok()
    }

    async fn delete(&self, name: &[u8]) -> bool {
        matches!(self.call(redis::cmd("UNLINK").arg(name)).await, Ok(Value::Int(1..)))
    }
}

fn glob_escape(text: &str) -> String {
    text.chars().flat_map(|c| matches!(c, '*' | '?' | '[' | ']' | '\\').then_some('\\').into_iter().chain([c])).collect()
}

/// The metric label of a failure, and whether the connection is to be given up.
fn classify(failure: &RedisFailure) -> (&'static str, bool) {
    match failure {
        RedisFailure::Down => ("down", false),
        RedisFailure::Timeout => ("timeout", true),
        RedisFailure::Error(error) if refuses_writes(error) => ("refused_write", false),
        RedisFailure::Error(error) if error.is_io_error() || error.is_connection_dropped() => ("connection", true),
        RedisFailure::Error(error) if error.kind() == ErrorKind::Parse => ("protocol", true),
        RedisFailure::Error(_) => ("refused", true),
    }
}

/// Full, a replica, short of good replicas, or unable to save: Redis reads but does not write.
fn refuses_writes(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "READONLY" | "MISCONF" | "NOREPLICAS"))
}

/// The connections that were made together.
type ConnectionSet = Arc<Vec<MultiplexedConnection>>;

impl Link {
    fn pick(&self, write: bool) -> Option<(MultiplexedConnection, ConnectionSet)> {
        let set = self.connections.load_full()?;
        let turn = if write { 0 } else { 1 + self.next.fetch_add(1, Ordering::Relaxed) % (set.len() - 1) };
        Some((set[turn].clone(), set))
    }

    /// Takes Redis out of the way, unless others did or it was mended since.
    fn take_down(&self, set: &ConnectionSet, kind: &str) {
        let previous = self.connections.compare_and_swap(set, None);
        if previous.as_ref().is_some_and(|current| Arc::ptr_eq(current, set)) {
            self.metrics.breaker_open.with_label_values(&["redis"]).set(1);
            tracing::warn!(kind, "Redis failed; requests go on without it until it answers again");
            self.broken.notify_one();
        }
    }

    /// Connects, and connects again whenever the connections broke, for as long as the program runs.
    async fn keep_connected(self: Arc<Self>) {
        let mut failures = 0;
        loop {
            match timeout(CONNECT_TIMEOUT * 2, self.connect()).await {
                Ok(Ok(set)) => {
                    self.connections.store(Some(Arc::new(set)));
                    self.metrics.breaker_open.with_label_values(&["redis"]).set(0);
                    tracing::info!(address = %self.client.get_connection_info().addr(), "Redis answers");
                    let since = Instant::now();
                    self.broken.notified().await;
                    // One that breaks again soon after it was mended counts as failing all the while.
                    if since.elapsed() > RECONNECT.longest * 2 {
                        failures = 0;
                        continue;
                    }
                }
                Ok(Err(error)) => self.report_failure(failures, &error.to_string()),
                Err(_) => self.report_failure(failures, "no answer in time"),
            }
            failures += 1;
            sleep(RECONNECT.after(failures)).await;
        }
    }

    fn report_failure(&self, failures: u32, error: &str) {
        self.metrics.breaker_open.with_label_values(&["redis"]).set(1);
        self.metrics.store_errors.with_label_values(&["redis", "connect", "failed"]).inc();
        if failures == 0 {
            let address = self.client.get_connection_info().addr();
            tracing::warn!(%address, error, "Redis cannot be reached; requests go on without it (cache.redis says where it is)");
        }
    }

    async fn connect(&self) -> Result<Vec<MultiplexedConnection>, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(None)
            .set_pipeline_buffer_size(1024);
        let mut set = Vec::with_capacity(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            let mut connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
            // A Redis that is loading its data, or wants a password, says so here and not to a request.
            connection.send_packed_command(&redis::cmd("PING")).await.and_then(Value::extract_error)?;
            set.push(connection);
        }
        Ok(set)
    }
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

    fn purge<'a>(&'a self, purge: &'a Purge) -> StoreFuture<'a, usize> {
        Box::pin(self.purge_all(purge))
    }

    fn report(&self) -> Vec<Tier> {
        vec![Tier { tier: "redis", up: self.is_up(), entries: None, bytes: None, capacity: None }]
    }

    fn keys_by_prefix(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    fn server_info(&self) -> StoreFuture<'_, Option<BTreeMap<String, String>>> {
        Box::pin(async {
            let info = self.call(&redis::cmd("INFO")).await.ok()?;
            let text: String = redis::from_redis_value(info).ok()?;
            let fact = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim_end().to_owned()));
            Some(text.lines().filter_map(fact).collect())
        })
    }

    fn is_up(&self) -> bool {
        self.link.connections.load().is_some()
    }
}
