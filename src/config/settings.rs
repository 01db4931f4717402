//! The settings, parsed, bounded and ready to use.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use http::uri::Authority;
use ipnet::IpNet;
use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};

use super::own::OwnPaths;
use super::rate_limit::RateLimit;
use super::route::Route;
use super::secret::{Secret, SecretKey};
use super::tokens::Tokens;
use super::warm::Warm;
use crate::request::client::PublicUrl;

/// Everything that the program was told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients are served.
    pub listen: SocketAddr,
    /// How clients reach this listener, if that was said (`public_url`).
    pub public_url: Option<PublicUrl>,
    /// Bounds on what clients may take.
    pub limits: Limits,
    /// The admin listener.
    pub admin: Admin,
    /// Logging.
    pub log: Log,
    /// Traces.
    pub telemetry: Telemetry,
    /// What answers.
    pub backend: Backend,
    /// Whether Sluice answers `/health` and `/api/cache/*` itself (`own.endpoints`).
    pub own_endpoints: bool,
    /// What is kept, and where.
    pub cache: CacheSettings,
    /// Orders kept in spans of time.
    pub timeline: Timeline,
    /// The rules, in the order in which they are tried.
    pub routes: Vec<Route>,
    /// How many requests clients may make: `[[limit]]` tables first, then those of rules.
    pub rate_limits: Vec<RateLimit>,
    /// What is asked for before clients do.
    pub warm: Warm,
    /// The first digits of the SHA-256 of the file.
    pub digest: String,
}

impl Config {
    /// Which paths of the main listener Sluice answers itself.
    #[must_use]
    pub const fn own_paths(&self) -> OwnPaths {
        match (self.own_endpoints, self.backend.is_native()) {
            (false, _) => OwnPaths::None,
            (true, false) => OwnPaths::Management,
            (true, true) => OwnPaths::Whole,
        }
    }

    /// The names of the parts in which another configuration differs that cannot change while the program runs.
    #[must_use]
    pub fn fixed_changes(&self, other: &Self) -> Vec<&'static str> {
        let serves = |config: &Self| config.timeline.enabled && config.routes.iter().any(|route| route.timeline);
        let parts = [
            ("listen", self.listen == other.listen),
            ("public_url", self.public_url == other.public_url),
            ("trusted_proxies", self.limits.trusted_proxies == other.limits.trusted_proxies),
            (
                "[limits]",
                Limits { trusted_proxies: Vec::new(), ..self.limits.clone() }
                    == Limits { trusted_proxies: Vec::new(), ..other.limits.clone() },
            ),
            ("admin.listen", self.admin.listen == other.admin.listen),
            ("admin.watch", self.admin.watch == other.admin.watch),
            ("log.format", self.log.json == other.log.json),
            ("[telemetry]", self.telemetry == other.telemetry),
            ("[backend] or what it reads from", self.backend == other.backend),
            ("[own]", self.own_endpoints == other.own_endpoints),
            ("[cache]", self.cache == other.cache),
            ("[timeline]", self.timeline == other.timeline),
            ("timeline = true in the first or from the last rule", serves(self) == serves(other)),
        ];
        parts.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }
}

/// `[telemetry]`: traces for OpenTelemetry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Telemetry {
    /// The URL of the collector, to which `/v1/traces` is added; `None`: no traces.
    pub otlp: Option<String>,
    /// Of how many requests out of 10,000 there are traces, unless a trusted proxy says which.
    pub sample: u16,
}

/// `[limits]`: bounds on what clients may take.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Whose word about clients is believed (`trusted_proxies`), and whose connections are not counted by address.
    pub trusted_proxies: Vec<IpNet>,
    /// Open client connections.
    pub connections: usize,
    /// Open connections of one address.
    pub connections_per_address: usize,
    /// Bytes of a request's head.
    pub header_bytes: usize,
    /// From the first byte of a request to the end of its head.
    pub header_timeout: Duration,
    /// How long a connection may stay open without a request.
    pub idle_timeout: Duration,
    /// How long a client may take no bytes, or send none of a body it announced.
    pub stall_timeout: Duration,
    /// Bytes a second that a client must take, or send of a body, while it is waited for.
    pub min_rate: u64,
    /// How long open requests get to finish when the program is told to stop.
    pub drain_timeout: Duration,
    /// Requests that may wait for one fetch.
    pub waiters: usize,
    /// How long they wait before they go by themselves.
    pub wait_timeout: Duration,
}

impl Limits {
    /// Whether the other end of a connection is a proxy of the operator's.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies.iter().any(|net| net.contains(&peer))
    }
}

/// `[admin]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    /// Where the admin listener is.
    pub listen: SocketAddr,
    /// Names that it answers to beside its addresses and `localhost`, in lower case, without ports.
    pub hosts: Vec<String>,
    /// Who may manage.
    pub tokens: Tokens,
    /// Whether the configuration file is read again when it changes.
    pub watch: bool,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// One JSON object a line instead of text.
    pub json: bool,
    /// The least severe level that is written.
    pub level: tracing::Level,
    /// Which requests get an access line.
    pub access: Access,
    /// Requests that take so long to the head of their answer get a line that says where the time went; zero: none do.
    pub slow: Duration,
    /// Parameters whose values are told nowhere, beside those whose names or values look like secrets.
    pub redact: Vec<String>,
}

/// Which requests get an access line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Every one.
    All,
    /// Those that failed, were refused, were served stale for a failure, or were given up by their clients.
    Errors,
    /// None.
    Off,
}

/// `[backend]`, with the section of its kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// What answers.
    pub kind: BackendKind,
    /// HEAD is answered from GET; otherwise it is forwarded.
    pub head_as_get: bool,
    /// Whether purges are passed on, for a cache that it has of its own.
    pub forward_invalidation: bool,
    /// To the response's head.
    pub timeout: Duration,
    /// The longest silence within a body that is passed through.
    pub body_timeout: Duration,
    /// Requests on their way to the backend at one time, to the heads of their answers.
    pub max_in_flight: usize,
    /// The same for requests whose bodies are larger than `upload_buffer`.
    pub max_uploads: usize,
    /// Bodies of answers on their way at one time.
    pub max_downloads: usize,
    /// Bodies without an end at one time.
    pub max_streams: usize,
    /// Requests that may wait for one of these places.
    pub queue: usize,
    /// How long a request may wait for a place.
    pub queue_timeout: Duration,
    /// The largest body of a request that is gathered before it is sent, in bytes.
    pub upload_buffer: usize,
    /// All of those together, in bytes.
    pub upload_memory: usize,
}

impl Backend {
    /// Whether the API is answered here.
    #[must_use]
    pub const fn is_native(&self) -> bool {
        !matches!(self.kind, BackendKind::Http { .. })
    }
}

/// What answers.
#[derive(Clone, Debug, PartialEq)]
pub enum BackendKind {
    /// An existing API over HTTP.
    Http {
        /// Its authority.
        authority: Authority,
        /// The `Host` that it is sent.
        host: Authority,
        /// How long a connection may take to be made.
        connect_timeout: Duration,
    },
    /// Orders in a database, answered by the native API.
    Mysql(Mysql),
    /// Orders held in memory, answered by the native API.
    Sample {
        /// A CSV file in the schema's column order; `None`: orders that the program makes up, and that go on arriving.
        orders: Option<PathBuf>,
        /// How long a query pretends to take.
        delay: Duration,
    },
}

/// `[mysql]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Mysql {
    /// Where the server is.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Who asks.
    pub user: String,
    /// The password; may be empty.
    pub password: Secret,
    /// The database.
    pub database: String,
    /// The table of orders, perhaps with its database before a dot.
    pub table: String,
    /// Whether the connection is encrypted.
    pub tls: Tls,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// Connections that are kept open.
    pub pool_min: usize,
    /// Connections at most, which is also how many queries run at one time.
    pub pool_max: usize,
    /// Questions that may wait for one.
    pub queue: usize,
    /// How long they wait.
    pub queue_timeout: Duration,
    /// For a query.
    pub query_timeout: Duration,
    /// For a page, and for each silence of a stream.
    pub long_query_timeout: Duration,
    /// For a stream as a whole.
    pub stream_timeout: Duration,
}

impl Mysql {
    /// How many streams may be under way at one time: half of the connections are for others.
    #[must_use]
    pub fn streams(&self) -> usize {
        (self.pool_max / 2).max(1)
    }
}

/// Whether the connection to the database is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// It is not.
    Off,
    /// It is, with whoever answers.
    Require,
    /// It is, with a server whose certificate is valid for its name.
    Verify {
        /// A file of PEM certificates to trust; `None`: the public authorities.
        ca: Option<PathBuf>,
    },
}

/// `[cache]`.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheSettings {
    /// Bytes of the in-process tier; zero turns it off.
    pub memory: u64,
    /// The shared tier, if there is one.
    pub redis: Option<RedisUrl>,
    /// Every key in Redis begins with it.
    pub namespace: String,
    /// Larger bodies stream through.
    pub max_object: usize,
    /// Bodies from this size on are kept compressed.
    pub compress_above: usize,
    /// Whether what is asked for often is refreshed before it is stale.
    pub refresh_early: bool,
    /// Where what memory holds is left for the process that comes next, without Redis.
    pub handover: Option<PathBuf>,
    /// How long a read from Redis may take.
    pub redis_timeout: Duration,
    /// The key with which entries in Redis are sealed, and the one before it, which still opens them.
    pub encryption: Option<(SecretKey, Option<SecretKey>)>,
}

/// `[timeline]`: orders kept in spans of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// Whether there is one; each rule says besides whether it is answered from it.
    pub enabled: bool,
    /// The length of a span: whole minutes.
    pub span: Duration,
    /// Orders may arrive so late.
    pub settle: Duration,
    /// The newest part is asked for again at most so often.
    pub refresh: Duration,
    /// Bytes that all of it may take.
    pub memory: u64,
    /// Equal answers in a row before an existing service's are not needed any more.
    pub probation: u32,
    /// The fraction of answers that are compared with the service's after that.
    pub verify: f64,
    /// Fetches of spans that are over at one time.
    pub concurrency: usize,
    /// Questions about newest parts at one time.
    pub questions: usize,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            enabled: true,
            span: Duration::from_secs(86_400),
            settle: Duration::from_secs(300),
            refresh: Duration::from_secs(5),
            memory: 128 << 20,
            probation: 20,
            verify: 0.001,
            concurrency: 2,
            questions: 8,
        }
    }
}

/// Where Redis is. Its debug form hides the password.
#[derive(Clone)]
pub struct RedisUrl {
    /// What the client connects with.
    pub info: ConnectionInfo,
    /// The URL and the password that it was made from.
    pub told: (Secret, Option<Secret>),
}

impl RedisUrl {
    /// Reads a URL; a password beside it counts instead of one in it.
    ///
    /// # Errors
    /// It is none, or one that cannot be served. The message never repeats the URL: it may hold a password.
    pub fn parse(text: &str, password: Option<String>) -> Result<Self, String> {
        let info = text
            .into_connection_info()
            .map_err(|_| "this is not a URL such as redis://127.0.0.1:6379/0 or unix:///run/redis.sock".to_owned())?;
        if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
            return Err("this version reaches Redis without TLS only (redis:// or unix://)".into());
        }
        let told = (Secret(text.to_owned()), password.clone().map(Secret));
        let Some(password) = password else { return Ok(Self { info, told }) };
        let settings = info.redis_settings().clone().set_password(password);
        Ok(Self { info: info.set_redis_settings(settings), told })
    }
}

impl PartialEq for RedisUrl {
    fn eq(&self, other: &Self) -> bool {
        self.told == other.told
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.info.addr())
    }
}
