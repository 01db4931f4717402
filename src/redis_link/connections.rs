//! The connections themselves: made together, given up together, and made anew in the background until Redis answers again.

use std::cell::RefCell;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisError, Value};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::reads::Reads;
use crate::breaker::Backoff;
use crate::telemetry::metrics::Metrics;

/// Connections: the first writes, so that a large object on its way out delays no read; the others read in turn, for threads that
/// have none of their own.
const CONNECTIONS: usize = 3;
/// A new connection must stand and answer within this.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a failing Redis is left alone between attempts. Recovery is seen within the longest.
const RECONNECT: Backoff = Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(800), tolerated: 0 };
/// How long a Redis that fails is asked before it counts as away, for whoever must know what it says.
pub(super) const ASKING: Duration = Duration::from_millis(100);

/// What must happen before requests reach new connections.
pub trait OnConnect: Send + Sync {
    /// Does it over one of them. If it fails, Redis counts as away still.
    fn connected<'a>(
        &'a self,
        client: &'a Client,
        connection: &'a mut MultiplexedConnection,
    ) -> Pin<Box<dyn Future<Output = Result<(), RedisError>> + Send + 'a>>;
}

/// The connections, and what the task that makes them anew needs.
pub(super) struct Connections {
    client: Client,
    /// Those that serve; `None` while Redis is left alone.
    pub(super) sets: ArcSwapOption<Vec<MultiplexedConnection>>,
    next: AtomicUsize,
    broken: Notify,
    /// Whether the connections broke, or were never made, and Redis has not been found to be away since.
    asking: AtomicBool,
    asked: Notify,
    pub(super) metrics: Arc<Metrics>,
}

/// The connections that were made together.
pub(super) type ConnectionSet = Arc<Vec<MultiplexedConnection>>;

/// The connection over which one thread reads.
#[derive(Default)]
struct Own {
    /// The set that it belongs to.
    set: Weak<Vec<MultiplexedConnection>>,
    /// `None` while it is being made, or could not be.
    connection: Option<MultiplexedConnection>,
    /// What is sent next.
    reads: Reads,
}

thread_local!(static OWN: RefCell<Own> = RefCell::default());

impl Own {
    fn is_of(&self, set: &ConnectionSet) -> bool {
        self.set.as_ptr() == Arc::as_ptr(set)
    }
}

impl Connections {
    /// No connections yet.
    pub(super) fn new(client: Client, metrics: Arc<Metrics>) -> Self {
        Self {
            client,
            sets: ArcSwapOption::empty(),
            next: AtomicUsize::new(0),
            broken: Notify::new(),
            asking: AtomicBool::new(true),
            asked: Notify::new(),
            metrics,
        }
    }

    /// Whether connections are being made without which it cannot be known what other instances said meanwhile.
    pub(super) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Acquire)
    }

    /// Waits until new connections are made, or Redis has to be taken for away: it refuses, or does not answer in time.
    pub(super) async fn asked(&self) {
        let mut asked = pin!(self.asked.notified());
        // Before the look, so that what ends in between is not missed.
        asked.as_mut().enable();
        if self.is_asking() && timeout(ASKING, asked).await.is_err() {
            self.end_asking();
        }
    }

    /// A connection to write over, or to read, and the set that it belongs to; `None` while Redis is left alone.
    pub(super) fn pick(self: &Arc<Self>, write: bool) -> Option<(MultiplexedConnection, ConnectionSet)> {
        let set = self.sets.load_full()?;
        if write {
            return Some((set[0].clone(), set));
        }
        let own = self.own(&set, |connection, _| connection.clone());
        Some((own.unwrap_or_else(|| self.next_reader(&set)), set))
    }

    /// The connection over which the next thread reads that has none of its own.
    pub(super) fn next_reader(&self, set: &ConnectionSet) -> MultiplexedConnection {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % (set.len() - 1);
        set[1 + turn].clone()
    }

    /// Does something with the connection of this thread, which is made when the thread reads first. It is driven where its answers
    /// are waited for: over one that another thread drives, each read would wake that one, and be woken by it.
    pub(super) fn own<T>(self: &Arc<Self>, set: &ConnectionSet, with: impl FnOnce(&MultiplexedConnection, &mut Reads) -> T) -> Option<T> {
        OWN.with_borrow_mut(|own| {
            if own.is_of(set) {
                return Some(with(own.connection.as_ref()?, &mut own.reads));
            }
            // Tasks of other runtimes stay on no thread.
            if Handle::try_current().ok()?.runtime_flavor() == RuntimeFlavor::CurrentThread {
                *own = Own { set: Arc::downgrade(set), ..Own::default() };
                tokio::spawn(Arc::clone(self).make_own(Arc::clone(set)));
            }
            None
        })
    }

    /// What this thread is to send next over its connection of this set.
    pub(super) fn take_reads(set: &ConnectionSet) -> Reads {
        OWN.with_borrow_mut(|own| if own.is_of(set) { std::mem::take(&mut own.reads) } else { Reads::default() })
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
    pub(super) fn take_down(&self, set: &ConnectionSet, kind: &str) {
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
    pub(super) async fn keep_connected(self: Arc<Self>, first: Arc<dyn OnConnect>) {
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
