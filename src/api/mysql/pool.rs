//! Connections within bounds: so many questions at a time, few that wait, none without a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{Object, Pool as Connections, PoolError, Timeouts};
use futures_core::Stream as _;
use mysql_async::prelude::Queryable;
use mysql_async::{Error, Params, Row};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::link::{Connector, Link};
use crate::api::orders::OrdersError;
use crate::breaker::{Backoff, Breaker, Gate};
use crate::config::Mysql as Config;
use crate::telemetry::metrics::Metrics;

/// How long a server that cannot be reached is left alone between attempts.
const RECONNECT: Backoff = Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(2), tolerated: 0 };
/// Attempts to connect for one question, and the pauses between them: nothing was sent yet.
const ATTEMPTS: u32 = 3;
const PAUSE: Backoff = Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(200), tolerated: 0 };
/// The server ends a statement at its limit and says so. If it has said nothing this long after, it is not waited for.
const GRACE: Duration = Duration::from_millis(500);
/// Rows that a stream hands over at a time: a few at first, so that the client sees them soon.
const FIRST_BATCH: usize = 16;
const BATCH: usize = 256;
/// An idle connection beyond the least number is closed after this long.
const IDLE: Duration = Duration::from_secs(5 * 60);

/// Why a question was not answered.
#[derive(Debug)]
pub enum Trouble {
    /// What the client is to be told.
    Orders(OrdersError),
    /// A column, index or the table itself is not what it was: look at it again.
    TableChanged(Error),
}

impl From<OrdersError> for Trouble {
    fn from(error: OrdersError) -> Self {
        Self::Orders(error)
    }
}

impl From<Trouble> for OrdersError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Orders(error) => error,
            Trouble::TableChanged(error) => Self::Unavailable(error.into()),
        }
    }
}

/// Lends connections.
pub struct Pool {
    connections: Connections<Connector>,
    /// A question holds a place; there are as many as connections.
    places: Arc<Semaphore>,
    /// A stream holds one of these too, so that downloads leave half of the places to others.
    streams: Arc<Semaphore>,
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
            places: Arc::new(Semaphore::new(config.pool_max)),
            streams: Arc::new(Semaphore::new((config.pool_max / 2).max(1))),
            waiting: AtomicUsize::new(0),
            queue: config.queue,
            queue_timeout: config.queue_timeout,
            least: config.pool_min,
            breaker: Breaker::new(RECONNECT),
            metrics,
        })
    }

    /// A connection for one question, all of which must be answered within `limit`.
    ///
    /// # Errors
    /// [`OrdersError::Busy`] if too many wait or none becomes free in time; [`OrdersError::Unavailable`] if no
    /// connection can be made.
    pub async fn ask(&self, limit: Duration) -> Result<Asking, OrdersError> {
        let place = self.queue(&self.places).await?;
        self.lend(vec![place], limit, limit).await
    }

    /// A connection for a stream: `silence` bounds each wait for the server, `whole` all of it.
    ///
    /// # Errors
    /// As [`Pool::ask`].
    pub async fn ask_stream(&self, silence: Duration, whole: Duration) -> Result<Asking, OrdersError> {
        let stream = self.queue(&self.streams).await?;
        let place = self.queue(&self.places).await?;
        self.lend(vec![stream, place], silence, whole).await
    }

    /// A second connection for a question that has one, if a place is free at this moment: nobody waits while holding
    /// what others wait for.
    pub async fn help(&self, limit: Duration) -> Option<Asking> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        self.lend(vec![place], limit, limit).await.ok()
    }

    /// Waits for a place in a short queue.
    async fn queue(&self, places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, OrdersError> {
        if let Ok(place) = Arc::clone(places).try_acquire_owned() {
            return Ok(place);
        }
        let _waiting = Waiting::enter(self).ok_or(OrdersError::Busy)?;
        match timeout(self.queue_timeout, Arc::clone(places).acquire_owned()).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(OrdersError::Busy),
        }
    }

    async fn lend(&self, places: Vec<OwnedSemaphorePermit>, limit: Duration, on_server: Duration) -> Result<Asking, OrdersError> {
        let mut attempt = 1;
        let link = loop {
            if self.connections.status().available == 0 && self.breaker.enter() == Gate::Open {
                return Err(OrdersError::Unavailable("it could not be reached lately and is left alone for a moment".into()));
            }
            let lent = match self.connections.get().await {
                Ok(mut link) => link.limit(on_server).await.map(|()| link),
                Err(PoolError::Backend(error)) => Err(error),
                Err(PoolError::Timeout(_)) => return Err(OrdersError::Busy),
                Err(error) => return Err(OrdersError::Unavailable(error.to_string().into())),
            };
            match lent {
                Ok(link) => break link,
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
        Ok(Asking { link: Some(link), deadline: Instant::now() + limit, limit, places })
    }

    fn unreachable(&self, error: Error) -> OrdersError {
        if let Some(pause) = self.breaker.failed() {
            self.metrics.breaker_open.with_label_values(&["mysql"]).set(1);
            tracing::warn!(%error, ?pause, "the database cannot be reached ([mysql] says where it is and who asks)");
        }
        OrdersError::Unavailable(error.into())
    }

    /// Whether the server takes connections and answers, whatever the pool is busy with.
    ///
    /// # Errors
    /// Why not.
    pub async fn check(&self) -> Result<(), OrdersError> {
        self.connections.manager().connect().await.map(drop).map_err(|error| OrdersError::Unavailable(error.into()))
    }

    /// Closes what was idle for long, and makes connections up to the least number.
    pub async fn tend(&self) {
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
                Ok(link) => fresh.push(link),
                Err(_) => return,
            }
        }
    }
}

/// A place in the queue, given back when dropped.
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

/// A question that is being asked. Dropped in the middle of a statement, it has the statement killed on the server.
pub struct Asking {
    link: Option<Object<Connector>>,
    deadline: Instant,
    limit: Duration,
    places: Vec<OwnedSemaphorePermit>,
}

impl Asking {
    /// All rows of a prepared statement.
    ///
    /// # Errors
    /// The time is up, or the server failed.
    pub async fn rows(&mut self, statement: &str, params: Params) -> Result<Vec<Row>, Trouble> {
        let (limit, deadline) = (self.limit, self.deadline + GRACE);
        let link = self.link()?;
        let asking = async { link.begin()?.exec::<Row, _, _>(statement, params).await };
        let Ok(result) = timeout_at(deadline, asking).await else { return Err(OrdersError::TooSlow(limit).into()) };
        link.settle(&result);
        result.map_err(|error| trouble(error, limit))
    }

    /// Sends what `read` makes of the rows of a prepared statement, some at a time, as fast as they are taken. Ends
    /// the query when nobody takes them any more. The server may be silent for as long as the limit.
    pub async fn stream<T>(
        mut self,
        statement: &str,
        params: Params,
        mut read: impl FnMut(Row) -> T,
        out: mpsc::Sender<Result<Vec<T>, Trouble>>,
    ) {
        let end = tokio::select! {
            end = self.pump(statement, params, &mut read, &out) => end,
            () = out.closed() => return,
        };
        if let Err(trouble) = end {
            // Whoever took the rows may have left.
            let _ = out.send(Err(trouble)).await;
        }
    }

    async fn pump<T>(
        &mut self,
        statement: &str,
        params: Params,
        read: &mut impl FnMut(Row) -> T,
        out: &mpsc::Sender<Result<Vec<T>, Trouble>>,
    ) -> Result<(), Trouble> {
        let limit = self.limit;
        let late = |_| Trouble::from(OrdersError::TooSlow(limit));
        let link = self.link()?;
        let conn = link.begin().map_err(|error| trouble(error, limit))?;
        {
            let asking = timeout(limit + GRACE, conn.exec_stream::<Row, _, _>(statement, params)).await.map_err(late)?;
            let mut rows = std::pin::pin!(asking.map_err(|error| trouble(error, limit))?);
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
                if !more.map_err(|error| trouble(error, limit))? {
                    break;
                }
                size = BATCH;
            }
        }
        // Read to its end: the connection can be used again.
        link.settle::<()>(&Ok(()));
        Ok(())
    }

    fn link(&mut self) -> Result<&mut Link, OrdersError> {
        self.link.as_deref_mut().ok_or_else(|| OrdersError::Unavailable("the connection is gone".into()))
    }

    /// What the server said of its version.
    #[must_use]
    pub fn version(&self) -> &str {
        self.link.as_ref().map_or("", |link| &link.version)
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // What cannot be used again leaves the pool now, and not when it is next looked at: its query goes on.
        if let Some(link) = self.link.take()
            && !link.is_idle()
        {
            let mut link = Object::take(link);
            link.hold(std::mem::take(&mut self.places));
        }
    }
}

/// What a failed statement means. The numbers are the servers' own.
fn trouble(error: Error, limit: Duration) -> Trouble {
    let code = match &error {
        Error::Server(server) => server.code,
        _ => 0,
    };
    match code {
        // MariaDB: ER_STATEMENT_TIMEOUT; MySQL: ER_QUERY_TIMEOUT.
        1969 | 3024 => OrdersError::TooSlow(limit).into(),
        // ER_BAD_FIELD_ERROR, ER_NO_SUCH_TABLE, ER_KEY_DOES_NOT_EXITS, ER_BAD_TABLE_ERROR.
        1054 | 1146 | 1176 | 1051 => Trouble::TableChanged(error),
        _ => OrdersError::Unavailable(error.into()).into(),
    }
}
