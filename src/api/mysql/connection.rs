//! One connection to the server: how it is made, what was said to it, and how it ends.
//!
//! A connection that was left in the middle of an answer is never used again. Its query is killed from another
//! connection first, because a server notices that nobody listens only when it next writes.

use std::sync::Arc;
use std::time::Duration;

use deadpool::managed::{Manager, Metrics, RecycleError, RecycleResult};
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, Opts, OptsBuilder, SslOpts};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::config::{Mysql as Config, Tls};

/// A connection is replaced after this long, so that a fail-over or a new password reaches all of them.
const LIFETIME: Duration = Duration::from_secs(30 * 60);
/// One that was not used for this long is asked whether it is alive.
const CHECK_AFTER: Duration = Duration::from_secs(1);
/// How long goodbyes may take.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the server may wait to write to a client that takes its time. Its own default is a minute.
const NET_WRITE_TIMEOUT: u32 = 3600;
/// Connections that end queries of others, at one time.
const KILLERS: usize = 2;
/// Prepared statements that each connection keeps.
const STATEMENTS: usize = 32;

/// Whose server it is, since the two differ in how a statement's time is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// `max_statement_time`, in seconds.
    MariaDb,
    /// `max_execution_time`, in milliseconds; since 5.7.8.
    MySql,
}

/// A connection.
pub struct Connection {
    conn: Option<Conn>,
    /// How the server calls it.
    id: u64,
    /// Which server this is, so that no other one's query is ever killed.
    server: String,
    /// What the server said of its version.
    pub version: String,
    flavor: Flavor,
    /// What bounds its statements now.
    limit: Option<Duration>,
    state: State,
    killer: QueryKiller,
    /// Places that stay taken until it is gone from the server too.
    permits: Vec<OwnedSemaphorePermit>,
}

/// What becomes of a connection when it is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It may be used again.
    Idle,
    /// A statement is under way.
    Running,
    /// It is broken.
    Broken,
}

impl Connection {
    /// The connection, for a statement that bounds its own time. Until [`Connection::finish`] says how it went, letting the
    /// connection go kills the statement.
    ///
    /// # Errors
    /// There is none any more.
    pub fn begin(&mut self) -> Result<&mut Conn, Error> {
        self.state = State::Running;
        self.conn.as_mut().ok_or(Error::Driver(mysql_async::DriverError::ConnectionClosed))
    }

    /// A statement came to its end: well, or with the server's error, or by breaking the connection.
    pub fn finish<T>(&mut self, result: &Result<T, Error>) {
        self.state = match result {
            Err(error) if error.is_fatal() => State::Broken,
            _ => State::Idle,
        };
    }

    /// Has the server end each of the following statements after `limit`.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn limit(&mut self, limit: Duration) -> Result<(), Error> {
        if self.limit == Some(limit) {
            return Ok(());
        }
        let statement = match self.flavor {
            Flavor::MariaDb => format!("SET SESSION max_statement_time = {:.3}", limit.as_secs_f64()),
            Flavor::MySql => format!("SET SESSION max_execution_time = {}", limit.as_millis()),
        };
        let said = self.begin()?.query_drop(statement).await;
        self.finish(&said);
        match said {
            // A server too old for it; the limit on this side holds.
            Ok(()) | Err(Error::Server(_)) => self.limit = Some(limit),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Keeps these permits until it is gone from the server too, so that no more connections stand than there are permits.
    pub fn hold(&mut self, permits: Vec<OwnedSemaphorePermit>) {
        self.permits = permits;
    }

    /// Whether it may be used again.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.state == State::Idle && self.conn.is_some()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(conn) = self.conn.take() else { return };
        let killer = self.killer.clone();
        let (id, server, running) = (self.id, std::mem::take(&mut self.server), self.state == State::Running);
        let permits = std::mem::take(&mut self.permits);
        self.killer.runtime.spawn(async move {
            if running {
                killer.kill(id, &server).await;
            }
            // The driver reads what is left of an answer before it says goodbye; past the deadline the socket is
            // closed without.
            let _ = timeout(DISCONNECT_TIMEOUT, conn.disconnect()).await;
            drop(permits);
        });
    }
}

/// Ends queries on the server.
#[derive(Clone)]
struct QueryKiller {
    opts: Opts,
    connect_timeout: Duration,
    runtime: Handle,
    /// Connections that kill at one time, beside those of the pool.
    permits: Arc<Semaphore>,
}

impl QueryKiller {
    /// Kills a connection on the server, unless another server answers now. Failing is fine: the statement's own
    /// limit ends it then.
    async fn kill(&self, id: u64, server: &str) {
        let killing = async {
            let _killer = self.permits.acquire().await;
            let mut conn = Conn::new(self.opts.clone()).await?;
            let (identity, ..) = identity(&mut conn).await?;
            if identity == server {
                conn.query_drop(format!("KILL {id}")).await?;
            }
            conn.disconnect().await
        };
        match timeout(self.connect_timeout + DISCONNECT_TIMEOUT, killing).await {
            Ok(Ok(())) => tracing::debug!(id, "ended a query on the server"),
            Ok(Err(error)) => tracing::debug!(id, %error, "a query could not be ended on the server"),
            Err(_) => tracing::debug!(id, "a query could not be ended on the server in time"),
        }
    }
}

/// Which server this is, how it calls the connection, and its version.
async fn identity(conn: &mut Conn) -> Result<(String, u64, String), Error> {
    let row: Option<(String, u64, String)> =
        conn.query_first("SELECT CONCAT_WS('/', @@hostname, @@port, @@server_id, @@datadir), CONNECTION_ID(), VERSION()").await?;
    row.ok_or_else(|| Error::Other("the server does not tell what it is".into()))
}

/// Makes connections.
pub struct Connector {
    killer: QueryKiller,
}

impl Connector {
    /// For the server that a configuration names.
    #[must_use]
    pub fn new(config: &Config, runtime: Handle) -> Self {
        let opts = OptsBuilder::default()
            .ip_or_hostname(config.host.clone())
            .tcp_port(config.port)
            .user(Some(config.user.clone()))
            .pass(Some(config.password.0.clone()))
            .db_name(Some(config.database.clone()))
            .prefer_socket(false)
            .stmt_cache_size(STATEMENTS)
            .max_allowed_packet(Some(64 << 20))
            .wait_timeout(Some(28_800))
            .tcp_keepalive(Some(Duration::from_secs(30)))
            .ssl_opts(ssl(&config.tls))
            // Nothing here ever writes.
            .setup(vec![format!("SET SESSION net_write_timeout = {NET_WRITE_TIMEOUT}"), "SET SESSION TRANSACTION READ ONLY".to_owned()]);
        Self {
            killer: QueryKiller {
                opts: opts.into(),
                connect_timeout: config.connect_timeout,
                runtime,
                permits: Arc::new(Semaphore::new(KILLERS)),
            },
        }
    }

    /// A new connection.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub async fn connect(&self) -> Result<Connection, Error> {
        let connecting = async {
            let mut conn = Conn::new(self.killer.opts.clone()).await?;
            let (server, id, version) = identity(&mut conn).await?;
            let flavor = if version.contains("MariaDB") { Flavor::MariaDb } else { Flavor::MySql };
            Ok(Connection {
                conn: Some(conn),
                id,
                server,
                version,
                flavor,
                limit: None,
                state: State::Idle,
                killer: self.killer.clone(),
                permits: Vec::new(),
            })
        };
        let limit = self.killer.connect_timeout;
        timeout(limit, connecting).await.unwrap_or_else(|_| Err(Error::Other(format!("no connection within {limit:?}").into())))
    }
}

fn ssl(tls: &Tls) -> Option<SslOpts> {
    match tls {
        Tls::Off => None,
        Tls::Require => Some(SslOpts::default().with_danger_accept_invalid_certs(true)),
        Tls::Verify { ca: None } => Some(SslOpts::default()),
        // Whoever names an authority trusts that one and not the whole world.
        Tls::Verify { ca: Some(file) } => {
            Some(SslOpts::default().with_root_certs(vec![file.clone().into()]).with_disable_built_in_roots(true))
        }
    }
}

impl Manager for Connector {
    type Type = Connection;
    type Error = Error;

    async fn create(&self) -> Result<Connection, Error> {
        self.connect().await
    }

    async fn recycle(&self, connection: &mut Connection, metrics: &Metrics) -> RecycleResult<Error> {
        if !connection.is_idle() || metrics.age() > LIFETIME {
            return Err(RecycleError::message("used up"));
        }
        if metrics.last_used() > CHECK_AFTER {
            let alive = connection.begin()?.ping().await;
            connection.finish(&alive);
            alive?;
        }
        Ok(())
    }
}
