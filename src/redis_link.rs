//! Connections to Redis, for everything that is shared between instances.
//!
//! Redis is never in the way: every call has a deadline in tens of milliseconds, and after a failure nothing touches Redis until
//! a task in the background has seen it answer again. Connections are multiplexed and pipelined; no blocking command, no
//! `KEYS`, no `FLUSHDB`.
//!
//! Knows commands and answers. Knows nothing of what they mean.

use std::cell::RefCell;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, Pipeline, RedisError, Value};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::breaker::Backoff;
use crate::config::RedisUrl;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace;

/// Connections: the first writes, so that a large object on its way out delays no read; the others read in turn, for threads that
/// have none of their own.
const CONNECTIONS: usize = 3;
/// A new connection must stand and answer within this.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a failing Redis is left alone between attempts. Recovery is seen within the longest.
const RECONNECT: Backoff = Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(800), tolerated: 0 };
/// How long a Redis that fails is asked before it counts as away, for whoever must know what it says.
const ASKING: Duration = Duration::from_millis(100);
/// A write may take this many times as long as a read: no client waits for it.
const WRITE_FACTOR: u32 = 10;

/// Redis, as everything that needs it reaches it. Cheap to clone.
#[derive(Clone)]
pub struct RedisLink {
    connections: Arc<Connections>,
    read_timeout: Duration,
}

/// The connections, and what the task that makes them anew needs.
struct Connections {
    client: Client,
    sets: ArcSwapOption<Vec<MultiplexedConnection>>,
    next: AtomicUsize,
    broken: Notify,
    /// Whether the connections broke, or were never made, and Redis has not been found to be away since.
    asking: AtomicBool,
    asked: Notify,
    metrics: Arc<Metrics>,
}

/// Why a call to Redis brought nothing.
pub enum RedisFailure {
    /// Redis is being left alone.
    Down,
    /// Redis did not answer in time.
    Timeout,
    /// Redis or the connection said no.
    Error(RedisError),
}

/// What must happen before requests reach new connections.
pub trait OnConnect: Send + Sync {
    /// Does it over one of them. If it fails, Redis counts as away still.
    fn connected<'a>(
        &'a self,
        client: &'a Client,
        connection: &'a mut MultiplexedConnection,
    ) -> Pin<Box<dyn Future<Output = Result<(), RedisError>> + Send + 'a>>;
}

impl RedisLink {
    /// A link that is not connected yet. Reads may take `read_timeout`, writes ten times that.
    ///
    /// # Errors
    /// The URL makes no sense to the client.
    pub fn new(url: &RedisUrl, read_timeout: Duration, metrics: Arc<Metrics>) -> Result<Self, RedisError> {
        let connections = Arc::new(Connections {
            client: Client::open(url.info.clone())?,
            sets: ArcSwapOption::empty(),
            next: AtomicUsize::new(0),
            broken: Notify::new(),
            asking: AtomicBool::new(true),
            asked: Notify::new(),
            metrics,
        });
        Ok(Self { connections, read_timeout })
    }

    /// Connects in the background, on the current runtime, and again whenever connections broke. Returns at once, whether Redis is
    /// there or not.
    pub fn keep_connected(&self, first: Arc<dyn OnConnect>) {
        tokio::spawn(Arc::clone(&self.connections).keep_connected(first));
    }

    /// Gives the connections up: something is wrong with what came over another one.
    pub fn give_up(&self, kind: &str) {
        if let Some(set) = self.connections.sets.load_full() {
            self.connections.take_down(&set, kind);
        }
    }

    /// Whether Redis answered last.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.connections.sets.load().is_some()
    }

    /// Whether connections are being made without which it cannot be known what other instances said meanwhile.
    #[must_use]
    pub fn is_asking(&self) -> bool {
        self.connections.asking.load(Ordering::Acquire)
    }

    /// Waits until new connections are made, or Redis has to be taken for away: it refuses, or does not answer in time.
    pub async fn asked(&self) {
        let mut asked = pin!(self.connections.asked.notified());
        // Before the look, so that what ends in between is not missed.
        asked.as_mut().enable();
        if self.is_asking() && timeout(ASKING, asked).await.is_err() {
            self.connections.end_asking();
        }
    }

    /// Runs a command, mostly a write, within a deadline.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn call(&self, command: &Cmd) -> Result<Value, RedisFailure> {
        let (mut connection, set) = self.connections.pick(true).ok_or(RedisFailure::Down)?;
        let answering = async { connection.send_packed_command(command).await.and_then(Value::extract_error) };
        self.within("write", self.read_timeout * WRITE_FACTOR, &set, answering).await
    }

    /// Runs commands that a request waits for, in one round trip.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn read(&self, commands: &Pipeline) -> Result<Vec<Value>, RedisFailure> {
        let (mut connection, set) = self.connections.pick(false).ok_or(RedisFailure::Down)?;
        let answering = async {
            let answers = connection.send_packed_commands(commands, 0, commands.len()).await?;
            answers.into_iter().map(Value::extract_error).collect::<Result<Vec<_>, _>>()
        };
        self.within("read", self.read_timeout, &set, answering).await
    }

    /// Waits for an answer within a deadline; any failure of the connection takes Redis out of the way.
    async fn within<T>(
        &self,
        op: &'static str,
        deadline: Duration,
        set: &ConnectionSet,
        answering: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, RedisFailure> {
        let started = Instant::now();
        let answer = timeout(deadline, answering).await;
        let took = started.elapsed();
        self.connections.metrics.store_seconds.with_label_values(&["redis", op]).observe(took.as_secs_f64());
        let answer = answer.map_err(|_| RedisFailure::Timeout).and_then(|answer| answer.map_err(RedisFailure::Error));
        trace::note(SpanKind::Client, "redis", took, || {
            let attributes = vec![KeyValue::new("db.system.name", "redis"), KeyValue::new("db.operation.name", op)];
            (attributes, answer.as_ref().map(drop).map_err(|failure| classify(failure).0.to_owned()))
        });
        if let Err(failure) = &answer {
            let (kind, fatal) = classify(failure);
            self.connections.metrics.store_errors.with_label_values(&["redis", op, kind]).inc();
            if fatal {
                self.connections.take_down(set, kind);
            }
        }
        answer
    }
}

/// The metric label of a failure, and whether the connection is to be given up.
fn classify(failure: &RedisFailure) -> (&'static str, bool) {
    match failure {
        RedisFailure::Down => ("down", false),
        RedisFailure::Timeout => ("timeout", true),
        RedisFailure::Error(error) if refuses_writes(error) => ("refused_write", false),
        // This user may not run this command. Others may work.
        RedisFailure::Error(error) if error.code() == Some("NOPERM") => ("forbidden", false),
        RedisFailure::Error(error) if error.is_io_error() || error.is_connection_dropped() => ("connection", true),
        RedisFailure::Error(error) if error.kind() == ErrorKind::Parse => ("protocol", true),
        RedisFailure::Error(_) => ("refused", true),
    }
}

/// Full, a replica, short of good replicas, or unable to save: Redis reads but does not write.
#[must_use]
pub fn refuses_writes(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "READONLY" | "MISCONF" | "NOREPLICAS"))
}

/// The connections that were made together.
type ConnectionSet = Arc<Vec<MultiplexedConnection>>;

/// The connection over which one thread reads.
#[derive(Default)]
struct Own {
    /// The set that it belongs to.
    set: Weak<Vec<MultiplexedConnection>>,
    /// `None` while it is being made, or could not be.
    connection: Option<MultiplexedConnection>,
}

thread_local!(static OWN: RefCell<Own> = RefCell::default());

impl Own {
    fn is_of(&self, set: &ConnectionSet) -> bool {
        self.set.as_ptr() == Arc::as_ptr(set)
    }
}

impl Connections {
    fn pick(self: &Arc<Self>, write: bool) -> Option<(MultiplexedConnection, ConnectionSet)> {
        let set = self.sets.load_full()?;
        if write {
            return Some((set[0].clone(), set));
        }
        let connection = self.own(&set).unwrap_or_else(|| {
            let turn = self.next.fetch_add(1, Ordering::Relaxed) % (set.len() - 1);
            set[1 + turn].clone()
        });
        Some((connection, set))
    }

    /// The connection of this thread, which is made when the thread reads first. It is driven where its answers are waited for:
    /// over one that another thread drives, each read would wake that one, and be woken by it.
    fn own(self: &Arc<Self>, set: &ConnectionSet) -> Option<MultiplexedConnection> {
        OWN.with_borrow_mut(|own| {
            if own.is_of(set) {
                return own.connection.clone();
            }
            // Tasks of other runtimes stay on no thread.
            if Handle::try_current().ok()?.runtime_flavor() == RuntimeFlavor::CurrentThread {
                *own = Own { set: Arc::downgrade(set), connection: None };
                tokio::spawn(Arc::clone(self).make_own(Arc::clone(set)));
            }
            None
        })
    }

    async fn make_own(self: Arc<Self>, set: ConnectionSet) {
        let Ok(connection) = self.client.get_multiplexed_async_connection_with_config(&connection_config()).await else { return };
        OWN.with_borrow_mut(|own| {
            if own.is_of(&set) {
                own.connection = Some(connection);
            }
        });
    }

    /// Takes Redis out of the way, unless others did or it was mended since.
    fn take_down(&self, set: &ConnectionSet, kind: &str) {
        let previous = self.sets.compare_and_swap(set, None);
        if previous.as_ref().is_some_and(|current| Arc::ptr_eq(current, set)) {
            self.asking.store(true, Ordering::Release);
            self.metrics.breaker_open.with_label_values(&["redis"]).set(1);
            tracing::warn!(kind, "Redis failed; requests go on without it until it answers again");
            self.broken.notify_one();
        }
    }

    /// Redis has answered, or is away.
    fn end_asking(&self) {
        self.asking.store(false, Ordering::Release);
        self.asked.notify_waiters();
    }

    /// Connects, and connects again whenever the connections broke, for as long as the program runs.
    async fn keep_connected(self: Arc<Self>, first: Arc<dyn OnConnect>) {
        let mut failures = 0;
        loop {
            let made = timeout(CONNECT_TIMEOUT * 2, self.connect(&*first)).await;
            self.end_asking();
            match made {
                Ok(Ok(set)) => {
                    self.sets.store(Some(Arc::new(set)));
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

    async fn connect(&self, first: &dyn OnConnect) -> Result<Vec<MultiplexedConnection>, RedisError> {
        let config = connection_config();
        let mut set = Vec::with_capacity(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            let mut connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
            // A Redis that is loading its data, or wants a password, says so here and not to a request.
            connection.send_packed_command(&redis::cmd("PING")).await.and_then(Value::extract_error)?;
            set.push(connection);
        }
        if let Some(connection) = set.first_mut() {
            first.connected(&self.client, connection).await?;
        }
        Ok(set)
    }
}

fn connection_config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None).set_pipeline_buffer_size(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// A server that says OK to every command.
    async fn agree(listener: TcpListener) {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut bytes).await {
                    let commands = bytes[..read].iter().filter(|&&byte| byte == b'*').count();
                    if stream.write_all("+OK\r\n".repeat(commands).as_bytes()).await.is_err() {
                        break;
                    }
                }
            });
        }
    }

    /// Connections wait for it.
    struct Door(Notify);

    impl OnConnect for Door {
        fn connected<'a>(
            &'a self,
            _: &'a Client,
            _: &'a mut MultiplexedConnection,
        ) -> Pin<Box<dyn Future<Output = Result<(), RedisError>> + Send + 'a>> {
            Box::pin(async {
                self.0.notified().await;
                Ok(())
            })
        }
    }

    #[tokio::test]
    async fn who_must_know_waits_for_new_connections_but_not_for_a_redis_that_is_away() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = RedisUrl::parse(&format!("redis://{}", listener.local_addr().unwrap()), None).unwrap();
        let serving = tokio::spawn(agree(listener));
        let link = RedisLink::new(&url, Duration::from_secs(5), Arc::new(Metrics::new().unwrap())).unwrap();
        let door = Arc::new(Door(Notify::new()));
        link.keep_connected(Arc::clone(&door) as _);
        door.0.notify_one();
        while !link.is_up() {
            tokio::task::yield_now().await;
        }
        assert!(!link.is_asking());
        link.asked().await;
        loop {
            while !link.is_up() {
                tokio::task::yield_now().await;
            }
            let lost = Instant::now();
            link.give_up("test");
            let asking = tokio::spawn({
                let link = link.clone();
                async move {
                    link.asked().await;
                    link.is_up()
                }
            });
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            assert!(link.is_asking() && !asking.is_finished() || lost.elapsed() >= ASKING);
            door.0.notify_one();
            let answered = asking.await.unwrap();
            // On a machine that was busy for so long, it is tried again.
            if lost.elapsed() < ASKING {
                assert!(answered, "whoever waited knows what new connections said");
                break;
            }
        }
        // It hangs: nobody waits for long, and then nobody waits at all.
        link.give_up("test");
        link.asked().await;
        assert!(!link.is_up() && !link.is_asking());
        // It is gone.
        door.0.notify_one();
        while !link.is_up() {
            tokio::task::yield_now().await;
        }
        serving.abort();
        link.give_up("test");
        link.asked().await;
        assert!(!link.is_asking());
    }
}
