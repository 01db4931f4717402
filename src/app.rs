//! Puts the parts together, and runs them until told to stop.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use http::uri::Authority;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::admin::own::Endpoints;
use crate::admin::own::health::Health;
use crate::admin::token::Token;
use crate::admin::{self, AdminState};
use crate::api::mysql::Mysql;
use crate::api::sample::Sample;
use crate::api::{AUTHORITY, Api};
use crate::body::BoxError;
use crate::cache::Cache;
use crate::cache::memory::Memory;
use crate::cache::redis::RedisStore;
use crate::cache::seal::Sealer;
use crate::cache::store::Store;
use crate::cache::tiered::Tiered;
use crate::config::{BackendKind, Config};
use crate::fetch::{Fetcher, Settings};
use crate::front::connection_limits::ConnectionLimits;
use crate::front::listener;
use crate::proxy::Proxy;
use crate::proxy::warm::Warmer;
use crate::telemetry::metrics::Metrics;
use crate::upstream::http::HttpBackend;
use crate::upstream::{Backend, Upstream};

/// Why the program could not start.
#[derive(Debug)]
pub struct StartError {
    /// What was being done.
    pub doing: String,
    /// Why it failed.
    pub cause: BoxError,
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.doing, self.cause)
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.cause.as_ref())
    }
}

fn while_doing<E: Into<BoxError>>(doing: impl Into<String>) -> impl FnOnce(E) -> StartError {
    |cause| StartError { doing: doing.into(), cause: cause.into() }
}

/// What a configuration describes, built and not serving yet.
pub struct Parts {
    /// The proxy.
    pub proxy: Arc<Proxy>,
    /// What Sluice answers itself.
    pub endpoints: Arc<Endpoints>,
}

/// Builds all parts. Their background work runs on the current runtime.
///
/// # Errors
/// The sample orders cannot be read, or a part refuses its configuration.
pub fn build(config: &Config) -> Result<Parts, StartError> {
    let names: Vec<String> = config.routes.iter().map(|route| route.name.clone()).collect();
    let metrics = Arc::new(Metrics::new(&names).map_err(while_doing("making the metrics"))?);
    let runtime = Handle::current();
    let cache = Cache::new(store(config, &metrics)?, runtime.clone(), Arc::clone(&metrics));
    let (backend, authorities) = backend(config, &runtime, &metrics)?;
    let timeout = head_timeout(config);
    let upstream = Arc::new(Upstream::new(backend, config.backend.max_in_flight, timeout, Arc::clone(&metrics)));
    let settings = Settings {
        max_object: config.cache.max_object,
        compress_above: config.cache.compress_above,
        fill_budget: fill_budget(config),
        silence: timeout,
        waiters: config.limits.waiters,
        wait_timeout: config.limits.wait_timeout,
    };
    // A redirect to the public name was not made up by a client either.
    let known = authorities.iter().chain(config.public_url.as_ref().map(|public| &public.authority)).cloned().collect();
    let fetcher = Fetcher::new(Arc::clone(&upstream), Arc::clone(&cache), settings, known, runtime.clone(), Arc::clone(&metrics));
    let endpoints = Arc::new(Endpoints {
        token: Token(config.admin.token.clone()),
        warmer: Warmer { targets: config.warm.clone(), runtime },
        health: Health::default(),
        native: config.backend.is_native(),
    });
    let proxy = Arc::new(Proxy {
        routes: config.routes.clone(),
        cache,
        fetcher,
        upstream,
        own: Arc::clone(&endpoints) as _,
        metrics,
        limits: config.limits.clone(),
        public: config.public_url.clone(),
        authorities,
        head_as_get: config.backend.head_as_get,
        timeout,
        body_timeout: config.backend.body_timeout,
        max_object: config.cache.max_object,
        access: config.log.access,
    });
    Ok(Parts { proxy, endpoints })
}

/// What answers, and the names by which it may call itself.
fn backend(config: &Config, runtime: &Handle, metrics: &Arc<Metrics>) -> Result<(Box<dyn Backend>, Vec<Authority>), StartError> {
    let native = || vec![Authority::from_static(AUTHORITY)];
    Ok(match &config.backend.kind {
        BackendKind::Http { authority, host, connect_timeout } => {
            let backend = HttpBackend::new(authority, host, *connect_timeout, runtime.clone());
            (Box::new(backend), vec![authority.clone(), host.clone()])
        }
        BackendKind::Mysql(mysql) => {
            let orders = Mysql::start(mysql, Arc::clone(metrics)).map_err(while_doing("making the pool of [mysql]"))?;
            (Box::new(Api::new(orders, runtime.clone())), native())
        }
        BackendKind::Sample { orders, delay } => {
            let sample = Sample::load(orders.as_deref(), *delay).map_err(while_doing("reading the orders of [sample]"))?;
            (Box::new(Api::new(sample, runtime.clone())), native())
        }
    })
}

/// How long the upstream may take to the head of its response. The native API keeps its own time and says 504 itself, so
/// it is given a little more than its longest query, the wait for a connection included.
fn head_timeout(config: &Config) -> Duration {
    match &config.backend.kind {
        BackendKind::Mysql(mysql) => {
            let longest = mysql.query_timeout.max(mysql.long_query_timeout);
            longest + mysql.queue_timeout * 2 + mysql.connect_timeout * 4 + Duration::from_secs(2)
        }
        BackendKind::Http { .. } | BackendKind::Sample { .. } => config.backend.timeout,
    }
}

/// Bodies on their way into the cache may take a quarter of its memory together, but at least two of the largest.
fn fill_budget(config: &Config) -> usize {
    let quarter = usize::try_from(config.cache.memory / 4).unwrap_or(usize::MAX);
    quarter.max(config.cache.max_object.saturating_mul(2))
}

fn store(config: &Config, metrics: &Arc<Metrics>) -> Result<Arc<dyn Store>, StartError> {
    let cache = &config.cache;
    let memory = || Memory::new(cache.memory, cache.max_object, Arc::clone(metrics)).map_err(while_doing("making the memory tier"));
    let Some(url) = &cache.redis else { return Ok(Arc::new(memory()?)) };
    let sealer = match &cache.encryption {
        Some((current, previous)) => {
            let sealer = Sealer::new(current, previous.as_ref()).ok_or("the key was refused");
            Some(sealer.map_err(while_doing("reading cache.encryption_key"))?)
        }
        None => None,
    };
    let redis = RedisStore::start(url, &cache.namespace, cache.redis_timeout, sealer, Arc::clone(metrics))
        .map_err(while_doing("reading cache.redis"))?;
    if cache.memory == 0 {
        return Ok(Arc::new(redis));
    }
    Ok(Arc::new(Tiered::new(memory()?, redis)))
}

/// A program that serves: its addresses, and how to stop it.
pub struct Running {
    /// Where clients are served.
    pub address: SocketAddr,
    /// Where the admin listener is.
    pub admin: SocketAddr,
    /// The proxy.
    pub proxy: Arc<Proxy>,
    stop: watch::Sender<bool>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// Binds both listeners and serves, one thread a core for clients; everything else stays on the current runtime.
///
/// # Errors
/// An address cannot be bound, or [`build`] fails.
pub fn start(config: &Config) -> Result<Running, StartError> {
    let bind = |address: SocketAddr, key: &str| listener::bind(address).map_err(while_doing(format!("listening on {address} ({key})")));
    let main = bind(config.listen, "listen")?;
    let admin = bind(config.admin.listen, "admin.listen")?;
    let Parts { proxy, endpoints } = build(config)?;
    let (stop, stopped) = watch::channel(false);
    let local = |listener: &std::net::TcpListener| listener.local_addr().map_err(while_doing("asking for the bound address"));
    let (address, admin_address) = (local(&main)?, local(&admin)?);
    let state = AdminState::new(Arc::clone(&proxy), endpoints, config);
    let admin = TcpListener::from_std(admin).map_err(while_doing("starting the admin listener"))?;
    tokio::spawn(admin::serve(admin, state, wait(stopped.clone())));
    let limits = ConnectionLimits::new(config.limits.clone(), proxy.metrics.connections.clone(), proxy.metrics.connections_refused.clone());
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut threads = Vec::with_capacity(cores);
    for core in 0..cores {
        let listener = main.try_clone().map_err(while_doing("sharing the listener"))?;
        let (proxy, limits, stopped) = (Arc::clone(&proxy), limits.clone(), stopped.clone());
        let thread = thread::Builder::new().name(format!("serve-{core}")).spawn(move || {
            if let Err(error) = serve(listener, &proxy, limits, stopped) {
                tracing::error!(%error, "a serving thread could not start");
            }
        });
        threads.push(thread.map_err(while_doing("starting a serving thread"))?);
    }
    Ok(Running { address, admin: admin_address, proxy, stop, threads })
}

/// One serving thread: a runtime of its own, so that a hit never leaves its core.
fn serve(listener: std::net::TcpListener, proxy: &Arc<Proxy>, limits: ConnectionLimits, stopped: watch::Receiver<bool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listener)?;
        let proxy = Arc::clone(proxy);
        let answer = move |request, arrival| {
            let proxy = Arc::clone(&proxy);
            async move { proxy.handle(request, arrival).await }
        };
        listener::run(listener, limits, answer, wait(stopped)).await;
        Ok(())
    })
}

async fn wait(mut stopped: watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = stopped.wait_for(|&stopped| stopped).await;
}

impl Running {
    /// Stops accepting, lets open requests finish, and returns when all is over.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        let threads = self.threads;
        let joined = tokio::task::spawn_blocking(move || threads.into_iter().filter_map(|thread| thread.join().err()).count());
        if joined.await.unwrap_or(1) > 0 {
            tracing::error!("a serving thread had panicked");
        }
    }
}
