//! Connections within bounds: so many queries at a time, few that wait, none without a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{Object, Pool as Connections, PoolError, Timeouts};
use futures_core::Stream as _;
use mysql_async::prelude::Queryable;
use mysql_async::{Error, Params, Row};
use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::connection::{Connection, Connector};
use crate::api::orders::OrdersError;
use crate::breaker::{Backoff, Breaker, Gate};
use crate::config::Mysql as Config;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace;

/// How long a server that cannot be reached is left alone between attempts.
const RECONNECT: Backoff = Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(2), tolerated: 0 };
/// Attempts to connect for one query, and the pauses between them: nothing was sent yet.
const ATTEMPTS: u32 = 3;
const PAUSE: Backoff = Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(200), tolerated: 0 };
/// The server ends a statement at its limit and says so. If it has said nothing this long after, it is not waited for.
const GRACE: Duration = Duration::from_millis(500);
/// Rows that a stream hands over at a time: a few at first, so that the client sees them soon.
const FIRST_BATCH: usize = 16;
const BATCH: usize = 256;
/// An idle connection beyond the least number is closed after this long.
const IDLE: Duration = Duration::from_secs(5 * 60);

/// Why a query was not answered.
#[derive(Debug)]
pub enum QueryError {
    /// What the client is to be told.
    Orders(OrdersError),
    /// A column, index or the table itself is not what it was: look at it again.
    TableChanged(Error),
}

impl From<OrdersError> for QueryError {
    fn from(error: OrdersError) -> Self {
        Self::Orders(error)
    }
}

impl From<QueryError> for OrdersError {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Orders(error) => error,
            QueryError::TableChanged(error) => Self::Unavailable(error.into()),
        }
    }
}

/// Whose a query is. Each leaves connections to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// A client's. Their streams have half of the connections at most.
    Clients,
    /// The timeline's own about the newest orders: a quarter.
    Newest,
    /// The timeline's own about orders of the past, in long streams: an eighth.
    Past,
}

/// Lends connections.
pub struct Pool {
    connections: Connections<Connector>,
    /// A query holds a permit; there are as many as connections.
    permits: Arc<Semaphore>,
    /// A stream holds one of these too, so that downloads leave half of the permits to others.
    streams: Arc<Semaphore>,
    /// Queries of the timeline's own hold one of these too.
    newest: Arc<Semaphore>,
    past: Arc<Semaphore>,
    waiting: AtomicUsize,
    queue: usize,
    queue_timeout: Duration,
    least: usize,
    breaker: Breaker,
    metrics: Arc<Metrics>,
}

impl Pool {
    /// A pool without connections; they are made when they are needed, on the current runtime.
    ///
    /// # Errors
    /// Never, as long as the configuration was checked.
    pub fn new(config: &Config, metrics: Arc<Metrics>) -> Result<Self, deadpool::managed::BuildError> {
        let connector = Connector::new(config, tokio::runtime::Handle::current());
        let timeouts = Timeouts { wait: Some(config.queue_timeout), create: None, recycle: Some(config.connect_timeout) };
        Ok(Self {
            connections: Connections::builder(connector).max_size(config.pool_max).timeouts(timeouts).runtime(Runtime::Tokio1).build()?,
            permits: Arc::new(Semaphore::new(config.pool_max)),
            streams: Arc::new(Semaphore::new(config.streams())),
            newest: Arc::new(Semaphore::new((config.pool_max / 4).max(1))),
            past: Arc::new(Semaphore::new((config.pool_max / 8).max(1))),
            waiting: AtomicUsize::new(0),
            queue: config.queue,
            queue_timeout: config.queue_timeout,
            least: config.pool_min,
            breaker: Breaker::new(RECONNECT),
            metrics,
        })
    }

    /// A connection for one query, all of which must be answered within `limit`.
    ///
    /// # Errors
    /// [`OrdersError::Busy`] if too many wait or none becomes free in time; [`OrdersError::Unreachable`] if no
    /// connection can be made.
    pub async fn ask(&self, lane: Lane, limit: Duration) -> Result<Lease, OrdersError> {
        let permits = match lane {
            Lane::Clients => vec![self.queue(&self.permits).await?],
            Lane::Newest => self.wait(&self.newest, limit).await?,
            Lane::Past => self.wait(&self.past, limit).await?,
        };
        self.lend(permits, limit, limit).await
    }

    /// A connection for a stream: `silence` bounds each wait for the server, `whole` all of it.
    ///
    /// # Errors
    /// As [`Pool::ask`].
    pub async fn ask_stream(&self, lane: Lane, silence: Duration, whole: Duration) -> Result<Lease, OrdersError> {
        let permits = match lane {
            Lane::Clients => vec![self.queue(&self.streams).await?, self.queue(&self.permits).await?],
            Lane::Newest => self.wait(&self.newest, silence).await?,
            Lane::Past => self.wait(&self.past, silence).await?,
        };
        self.lend(permits, silence, whole).await
    }

    /// Waits for the timeline's own turn and then for a connection. It has no place in the clients' queue: it bounds itself how much it asks.
    async fn wait(&self, lane: &Arc<Semaphore>, limit: Duration) -> Result<Vec<OwnedSemaphorePermit>, OrdersError> {
        let waiting = async {
            let turn = Arc::clone(lane).acquire_owned().await?;
            Ok::<_, AcquireError>(vec![turn, Arc::clone(&self.permits).acquire_owned().await?])
        };
        timeout(limit, waiting).await.ok().and_then(Result::ok).ok_or(OrdersError::Busy)
    }

    /// A second connection for a query that has one, if a permit is free at this moment: nobody waits while holding
    /// what others wait for.
    pub async fn help(&self, limit: Duration) -> Option<Lease> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        self.lend(vec![permit], limit, limit).await.ok()
    }

    /// Waits for a permit in a short queue.
    async fn queue(&self, permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, OrdersError> {
        if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
            return Ok(permit);
        }
        let _waiting = Waiting::enter(self).ok_or(OrdersError::Busy)?;
        match timeout(self.queue_timeout, Arc::clone(permits).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(OrdersError::Busy),
        }
    }

    async fn lend(&self, permits: Vec<OwnedSemaphorePermit>, limit: Duration, on_server: Duration) -> Result<Lease, OrdersError> {
        let mut attempt = 1;
        let connection = loop {
            if self.connections.status().available == 0 && self.breaker.enter() == Gate::Open {
                return Err(OrdersError::Unreachable("it could not be reached lately and is left alone for a moment".into()));
            }
            let lent = match self.connections.get().await {
                Ok(mut connection) => connection.limit(on_server).await.map(|()| connection),
                Err(PoolError::Backend(error)) => Err(error),
                Err(PoolError::Timeout(_)) => return Err(OrdersError::Busy),
                Err(error) => return Err(OrdersError::Unavailable(error.to_string().into())),
            };
            match lent {
                Ok(connection) => break connection,
                // Refused by the server itself (a wrong password, too many connections): trying again does not help.
                Err(error) if attempt == ATTEMPTS || matches!(error, Error::Server(_)) => return Err(self.unreachable(error)),
                Err(_) => sleep(PAUSE.after(attempt)).await,
            }
            attempt += 1;
        };
        if self.breaker.succeeded() {
            self.metrics.breaker_open.with_label_values(&["mysql"]).set(0);
            tracing::info!("the database answers again");
        }
        Ok(Lease { connection: Some(connection), deadline: Instant::now() + limit, limit, permits })
    }

    fn unreachable(&self, error: Error) -> OrdersError {
        if let Some(pause) = self.breaker.failed() {
            self.metrics.breaker_open.with_label_values(&["mysql"]).set(1);
            tracing::warn!(%error, ?pause, "the database cannot be reached ([mysql] says where it is and who asks)");
        }
        OrdersError::Unreachable(error.into())
    }

    /// Whether the server takes connections and answers, whatever the pool is busy with.
    ///
    /// # Errors
    /// Why not.
    pub async fn check(&self) -> Result<(), OrdersError> {
        self.connections.manager().connect().await.map(drop).map_err(|error| OrdersError::Unavailable(error.into()))
    }

    /// Closes what was idle for long, and makes connections up to the least number.
    pub async fn maintain(&self) {
        let mut surplus = self.connections.status().size.saturating_sub(self.least);
        // Removed connections say goodbye in a task of their own.
        drop(self.connections.retain(|_, metrics| {
            let keep = surplus == 0 || metrics.last_used() < IDLE;
            surplus -= usize::from(!keep);
            keep
        }));
        let mut fresh = Vec::new();
        self.metrics.mysql_connections.set(i64::try_from(self.connections.status().size).unwrap_or(i64::MAX));
        while self.connections.status().size < self.least && !self.breaker.is_open() {
            match self.connections.get().await {
                Ok(connection) => fresh.push(connection),
                Err(_) => return,
            }
        }
    }
}

/// A permit in the queue, given back when dropped.
struct Waiting<'a>(&'a Pool);

impl<'a> Waiting<'a> {
    fn enter(pool: &'a Pool) -> Option<Self> {
        let more = |waiting| (waiting < pool.queue).then_some(waiting + 1);
        pool.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        pool.metrics.mysql_waiting.inc();
        Some(Self(pool))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.mysql_waiting.dec();
    }
}

/// Tells of a statement in the trace to which it belongs: without the values, which are no part of it.
fn note_query(statement: &str, began: Instant, result: impl FnOnce() -> Result<(), String>) {
    trace::note(SpanKind::Client, "mysql", began.elapsed(), || {
        let attributes = vec![KeyValue::new("db.system.name", "mysql"), KeyValue::new("db.query.text", statement.to_owned())];
        (attributes, result())
    });
}

/// A query that is being asked. Dropped in the middle of a statement, it has the statement killed on the server.
pub struct Lease {
    connection: Option<Object<Connector>>,
    deadline: Instant,
    limit: Duration,
    permits: Vec<OwnedSemaphorePermit>,
}

impl Lease {
    /// All rows of a prepared statement.
    ///
    /// # Errors
    /// The time is up, or the server failed.
    pub async fn rows(&mut self, statement: &str, params: Params) -> Result<Vec<Row>, QueryError> {
        let (limit, deadline) = (self.limit, self.deadline + GRACE);
        let (connection, began) = (self.connection()?, Instant::now());
        let lease = async { connection.begin()?.exec::<Row, _, _>(statement, params).await };
        let asked = timeout_at(deadline, lease).await;
        note_query(statement, began, || match &asked {
            Ok(result) => result.as_ref().map(drop).map_err(ToString::to_string),
            Err(late) => Err(late.to_string()),
        });
        let Ok(result) = asked else { return Err(OrdersError::TooSlow(limit).into()) };
        connection.finish(&result);
        result.map_err(|error| query_error(error, limit))
    }

    /// Sends what `read` makes of the rows of a prepared statement, some at a time, as fast as they are taken. Ends
    /// the query when nobody takes them any more. The server may be silent for as long as the limit.
    pub async fn stream<T>(
        mut self,
        statement: &str,
        params: Params,
        mut read: impl FnMut(Row) -> T,
        out: mpsc::Sender<Result<Vec<T>, QueryError>>,
    ) {
        let began = Instant::now();
        let end = tokio::select! {
            end = self.read_batches(statement, params, &mut read, &out) => end,
            () = out.closed() => return note_query(statement, began, || Ok(())),
        };
        note_query(statement, began, || end.as_ref().map(drop).map_err(|error| format!("{error:?}")));
        if let Err(error) = end {
            // Whoever took the rows may have left.
            let _ = out.send(Err(error)).await;
        }
    }

    async fn read_batches<T>(
        &mut self,
        statement: &str,
        params: Params,
        read: &mut impl FnMut(Row) -> T,
        out: &mpsc::Sender<Result<Vec<T>, QueryError>>,
    ) -> Result<(), QueryError> {
        let limit = self.limit;
        let late = |_| QueryError::from(OrdersError::TooSlow(limit));
        let connection = self.connection()?;
        let conn = connection.begin().map_err(|error| query_error(error, limit))?;
        {
            let lease = timeout(limit + GRACE, conn.exec_stream::<Row, _, _>(statement, params)).await.map_err(late)?;
            let mut rows = std::pin::pin!(lease.map_err(|error| query_error(error, limit))?);
            let mut size = FIRST_BATCH;
            loop {
                let mut batch = Vec::with_capacity(size);
                let reading = async {
                    while batch.len() < size {
                        match std::future::poll_fn(|cx| rows.as_mut().poll_next(cx)).await {
                            Some(row) => batch.push(read(row?)),
                            None => return Ok(false),
                        }
                    }
                    Ok(true)
                };
                let more = timeout(limit + GRACE, reading).await.map_err(late)?;
                if !batch.is_empty() && out.send(Ok(batch)).await.is_err() {
                    return Ok(());
                }
                if !more.map_err(|error| query_error(error, limit))? {
                    break;
                }
                size = BATCH;
            }
        }
        // Read to its end: the connection can be used again.
        connection.finish::<()>(&Ok(()));
        Ok(())
    }

    fn connection(&mut self) -> Result<&mut Connection, OrdersError> {
        self.connection.as_deref_mut().ok_or_else(|| OrdersError::Unavailable("the connection is gone".into()))
    }

    /// What the server said of its version.
    #[must_use]
    pub fn version(&self) -> &str {
        self.connection.as_ref().map_or("", |connection| &connection.version)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // What cannot be used again leaves the pool now, and not when it is next looked at: its query goes on.
        if let Some(connection) = self.connection.take()
            && !connection.is_idle()
        {
            let mut connection = Object::take(connection);
            connection.hold(std::mem::take(&mut self.permits));
        }
    }
}

/// What a failed statement means. The numbers are the servers' own.
fn query_error(error: Error, limit: Duration) -> QueryError {
    let code = match &error {
        Error::Server(server) => server.code,
        _ => 0,
    };
    match code {
        // MariaDB: ER_STATEMENT_TIMEOUT; MySQL: ER_QUERY_TIMEOUT.
        1969 | 3024 => OrdersError::TooSlow(limit).into(),
        // ER_BAD_FIELD_ERROR, ER_NO_SUCH_TABLE, ER_KEY_DOES_NOT_EXITS, ER_BAD_TABLE_ERROR.
        1054 | 1146 | 1176 | 1051 => QueryError::TableChanged(error),
        _ => OrdersError::Unavailable(error.into()).into(),
    }
}
