//! Puts the parts together, and runs them until told to stop.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::uri::Authority;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::admin::own::Endpoints;
use crate::admin::own::health::Health;
use crate::admin::own::recent::Recent;
use crate::admin::{self, AdminState};
use crate::api::mysql::Mysql;
use crate::api::mysql::pool::Lane;
use crate::api::orders::Orders;
use crate::api::sample::Sample;
use crate::api::{AUTHORITY, Api};
use crate::body::BoxError;
use crate::cache::Cache;
use crate::cache::handover::{self, PeerSocket};
use crate::cache::hot_file::HotFile;
use crate::cache::memory::Memory;
use crate::cache::redis::RedisStore;
use crate::cache::seal::Sealer;
use crate::cache::store::Store;
use crate::cache::tiered::Tiered;
use crate::cache::void::{Moment, Voids};
use crate::cache::void_log::VoidLog;
use crate::cache::void_worker;
use crate::config::{BackendKind, Config};
use crate::control::reload::{self, Reloader};
use crate::fetch::{Fetcher, Settings};
use crate::front::connection_limits::{ConnectionLimits, Counted};
use crate::front::listener::{self, Stop};
use crate::front::sockets::{self, Listener};
use crate::limit::shared::SharedCounts;
use crate::proxy::Proxy;
use crate::proxy::changes::Changes;
use crate::proxy::hottest::Hottest;
use crate::proxy::rules::Rules;
use crate::proxy::warm::Warmer;
use crate::redis_link::RedisLink;
use crate::request::secrets;
use crate::request::short_way::ShortWay;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::Tracer;
use crate::timeline::answers::Answers;
use crate::timeline::engine::{self, Engine};
use crate::timeline::heal::Checks;
use crate::timeline::service::Service;
use crate::timeline::verify::Verifier;
use crate::timeline::{self, Timeline};
use crate::upstream::admission::machine::Bounds;
use crate::upstream::http::HttpBackend;
use crate::upstream::{self, Backend, Upstream};

/// The most bytes that are left in a file for the next process.
const HOT_BYTES: u64 = 256 << 20;

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
    /// Where answers are computed.
    computing: Computing,
}

fn upstream_settings(config: &Config, timeout: Duration) -> upstream::Settings {
    let backend = &config.backend;
    // A stream from the database holds a connection to it: those are given in shares too.
    let streams = match &backend.kind {
        BackendKind::Mysql(mysql) => mysql.streams(),
        BackendKind::Http { .. } | BackendKind::Sample { .. } => usize::MAX,
    };
    let bounds = Bounds {
        ask: backend.max_in_flight,
        upload: backend.max_uploads,
        download: backend.max_downloads.min(streams),
        stream: backend.max_streams.min(streams),
        queue: backend.queue,
    };
    let (queue_timeout, upload_buffer, upload_memory) = (backend.queue_timeout, backend.upload_buffer, backend.upload_memory);
    upstream::Settings { bounds, queue_timeout, timeout, upload_buffer, upload_memory }
}

/// Builds all parts, over `own` instead of what `[backend]` names if there is one. Their background work runs on the current runtime.
///
/// # Errors
/// The sample orders cannot be read, or a part refuses its configuration.
pub fn build(config: &Config, own: Option<Box<dyn Backend>>) -> Result<Parts, StartError> {
    let metrics = Arc::new(Metrics::new().map_err(while_doing("making the metrics"))?);
    let runtime = Handle::current();
    let link = redis_link(config, &metrics)?;
    let voids = Arc::new(Voids::default());
    let log = link.as_ref().map(|link| VoidLog::new(link.clone(), &config.cache.namespace, Arc::clone(&voids), runtime.clone()));
    let store = store(config, link.as_ref().zip(log.as_ref()), &voids, &metrics)?;
    let cache = Cache::new(store, voids, log, runtime.clone(), Arc::clone(&metrics));
    let (backend, authorities, source) = match own {
        Some(own) => (own, Vec::new(), None),
        None => backend(config, &runtime, &metrics).map(|(backend, authorities, source)| (backend, authorities, Some(source)))?,
    };
    let timeout = head_timeout(config);
    let upstream = Arc::new(Upstream::new(backend, upstream_settings(config, timeout), Arc::clone(&metrics)));
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
    let computing = Computing::start().map_err(while_doing("starting the threads of [timeline]"))?;
    let timeline = timeline(config, source, &upstream, &cache, &metrics, computing.handle())?;
    let endpoints = Arc::new(Endpoints {
        warmer: Warmer::new(runtime),
        health: Health::default(),
        server: Recent::default(),
        paths: config.own_paths(),
    });
    // Targets stand in Redis as they are, so not where entries are sealed.
    let remembering = link.clone().filter(|_| config.warm.hottest > 0 && config.cache.encryption.is_none());
    let hottest = Hottest::start(remembering, &config.cache.namespace);
    let shared_counts = link.map(|link| SharedCounts::new(link, &config.cache.namespace));
    let proxy = Arc::new(Proxy {
        rules: ArcSwap::from_pointee(Rules::new(config, shared_counts.as_ref(), &metrics, None)),
        shared_counts,
        hottest,
        refresh_early: config.cache.refresh_early,
        cache,
        fetcher,
        upstream,
        changes: Changes::default(),
        stores: config.cache.memory > 0 || config.cache.redis.is_some(),
        timeline,
        own: Arc::clone(&endpoints) as _,
        metrics,
        limits: config.limits.clone(),
        public: config.public_url.clone(),
        authorities,
        head_as_get: config.backend.head_as_get,
        forward_invalidation: config.backend.forward_invalidation,
        timeout,
        body_timeout: config.backend.body_timeout,
        max_object: config.cache.max_object,
        samples: Arc::default(),
        tracer: Tracer::start(&config.telemetry, Handle::current()).map_err(while_doing("reading telemetry.otlp"))?.map(Arc::new),
    });
    Ok(Parts { proxy, endpoints, computing })
}

/// Where the timeline gets its orders from.
enum Source {
    Service,
    Mysql(Arc<Mysql>),
    Sample(Arc<Sample>),
}

type Answering = (Box<dyn Backend>, Vec<Authority>, Source);

/// What answers, the names by which it may call itself, and where its orders are.
fn backend(config: &Config, runtime: &Handle, metrics: &Arc<Metrics>) -> Result<Answering, StartError> {
    let native = || vec![Authority::from_static(AUTHORITY)];
    Ok(match &config.backend.kind {
        BackendKind::Http { authority, host, connect_timeout } => {
            let backend = HttpBackend::new(authority, host, *connect_timeout, runtime.clone());
            (Box::new(backend), vec![authority.clone(), host.clone()], Source::Service)
        }
        BackendKind::Mysql(mysql) => {
            let orders = Arc::new(Mysql::start(mysql, Arc::clone(metrics)).map_err(while_doing("making the pool of [mysql]"))?);
            (Box::new(Api::new(Arc::clone(&orders), runtime.clone())), native(), Source::Mysql(orders))
        }
        BackendKind::Sample { orders, delay } => {
            let sample = Arc::new(Sample::load(orders.as_deref(), *delay).map_err(while_doing("reading the orders of [sample]"))?);
            (Box::new(Api::new(Arc::clone(&sample), runtime.clone())), native(), Source::Sample(sample))
        }
    })
}

/// The timeline, if it is on and some rule wants it. It computes on `computing`.
fn timeline(
    config: &Config,
    source: Option<Source>,
    upstream: &Arc<Upstream>,
    cache: &Arc<Cache>,
    metrics: &Arc<Metrics>,
    computing: Handle,
) -> Result<Option<Arc<dyn Timeline>>, StartError> {
    let Some(source) = source.filter(|_| config.timeline.enabled && config.routes.iter().any(|route| route.timeline)) else {
        return Ok(None);
    };
    let settings = &config.timeline;
    let service = || Arc::new(Service::new(Arc::clone(upstream), config.backend.timeout));
    let build = TimelineBuilder { config, cache, metrics, computing };
    let built = match source {
        Source::Mysql(orders) => {
            build.over(engine::Source { newest: orders.in_lane(Lane::Newest), past: orders.in_lane(Lane::Past) }, None)
        }
        Source::Sample(orders) => build.over(engine::Source { newest: Arc::clone(&orders), past: orders }, None),
        Source::Service => {
            let verifier = Verifier::new(service(), settings);
            build.over(engine::Source { newest: service(), past: service() }, Some(verifier))
        }
    };
    built.map(Some).map_err(while_doing("making the timeline"))
}

struct TimelineBuilder<'a> {
    config: &'a Config,
    cache: &'a Arc<Cache>,
    metrics: &'a Arc<Metrics>,
    computing: Handle,
}

impl TimelineBuilder<'_> {
    /// A timeline over a source of orders, which is held against its own word if there is a verifier.
    fn over<S: Orders>(self, source: engine::Source<S>, verifier: Option<Verifier>) -> Result<Arc<dyn Timeline>, BoxError> {
        let Self { config, cache, metrics, computing } = self;
        let settings = config.timeline.clone();
        let engine = Engine::new(source, verifier.is_some(), settings.clone(), Arc::clone(cache), computing.clone(), Arc::clone(metrics))?;
        let answers = Answers::new(timeline::answers::Parts {
            engine,
            routes: config.routes.clone(),
            settings,
            checks: Checks::new(verifier, Arc::clone(metrics)),
            compress_above: config.cache.compress_above,
            cache: Arc::clone(cache),
            runtime: computing,
            metrics: Arc::clone(metrics),
        })?;
        Ok(Arc::new(answers))
    }
}

/// The threads on which answers are computed, so that no hit waits for a computation. They end with this.
struct Computing(Option<Runtime>);

impl Computing {
    fn start() -> io::Result<Self> {
        // At least two, so that a long computation leaves one to the others.
        let threads = thread::available_parallelism().map_or(2, usize::from).max(2);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().thread_name("timeline").build()?;
        Ok(Self(Some(runtime)))
    }

    fn handle(&self) -> Handle {
        // There is one until this is dropped.
        self.0.as_ref().map_or_else(Handle::current, |runtime| runtime.handle().clone())
    }
}

impl Drop for Computing {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
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

/// The connections to Redis, if it is configured.
fn redis_link(config: &Config, metrics: &Arc<Metrics>) -> Result<Option<RedisLink>, StartError> {
    let Some(url) = &config.cache.redis else { return Ok(None) };
    RedisLink::new(url, config.cache.redis_timeout, Arc::clone(metrics)).map(Some).map_err(while_doing("reading cache.redis"))
}

fn store(
    config: &Config,
    redis: Option<(&RedisLink, &Arc<VoidLog>)>,
    voids: &Arc<Voids>,
    metrics: &Arc<Metrics>,
) -> Result<Arc<dyn Store>, StartError> {
    let cache = &config.cache;
    let memory = || Memory::new(cache.memory, cache.max_object, Arc::clone(metrics)).map_err(while_doing("making the memory tier"));
    let Some((link, log)) = redis else { return Ok(Arc::new(memory()?)) };
    let sealer = match &cache.encryption {
        Some((current, previous)) => {
            let sealer = Sealer::new(current, previous.as_ref()).ok_or("the key was refused");
            Some(sealer.map_err(while_doing("reading cache.encryption_key"))?)
        }
        None => None,
    };
    let shared = RedisStore::new(link.clone(), &cache.namespace, sealer, Arc::clone(log), Arc::clone(voids), Arc::clone(metrics));
    let redis = Arc::new(shared);
    link.keep_connected(Arc::clone(log) as _);
    tokio::spawn(void_worker::run(Arc::clone(&redis), Arc::clone(log)));
    if cache.memory == 0 {
        return Ok(redis);
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
    /// Reads the configuration again, if it came from a file.
    pub reloader: Option<Arc<Reloader>>,
    /// Whether another process takes over.
    handing_over: watch::Receiver<bool>,
    hot: Option<Arc<HotFile>>,
    /// Where the process finds this one that takes over.
    found_at: Option<PeerSocket>,
    drain_timeout: Duration,
    admin_ends: JoinHandle<()>,
    /// When this process began: what it takes over from another counts as asked for then.
    began: Moment,
    _computing: Computing,
    stop: watch::Sender<Stop>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// The sockets to serve on.
struct Sockets {
    main: Listener,
    admin: Listener,
}

/// Those that systemd opened for this process, or else new ones. With `beside`, another process serves there still.
fn sockets(config: &Config, beside: bool) -> Result<Sockets, StartError> {
    let bind =
        |address: SocketAddr, key: &str| sockets::bind(address, beside).map_err(while_doing(format!("listening on {address} ({key})")));
    let mut inherited = sockets::inherited().into_iter();
    let main = inherited.next().map_or_else(|| bind(config.listen, "listen"), Ok)?;
    let admin = inherited.next().map_or_else(|| bind(config.admin.listen, "admin.listen"), Ok)?;
    Ok(Sockets { main, admin })
}

/// Binds both listeners and serves a configuration, which came from `source`: one thread a core for clients; everything else
/// stays on the current runtime. With `beside`, another process serves the same addresses still.
///
/// # Errors
/// An address cannot be bound, or [`build`] fails.
pub async fn start(config: &Config, source: Option<reload::Source>, beside: bool) -> Result<Running, StartError> {
    run(config, None, source, beside).await
}

/// The same over a backend of one's own, for programs that have Sluice in them. What `[backend]` says of where it is does not matter,
/// its deadlines and bounds do; nothing is computed from orders.
///
/// # Errors
/// An address cannot be bound, or [`build`] fails.
pub async fn start_over(config: &Config, backend: Box<dyn Backend>) -> Result<Running, StartError> {
    run(config, Some(backend), None, false).await
}

async fn run(config: &Config, own: Option<Box<dyn Backend>>, source: Option<reload::Source>, beside: bool) -> Result<Running, StartError> {
    secrets::leave_out(&config.log.redact);
    let Sockets { main, admin } = sockets(config, beside)?;
    let Parts { proxy, endpoints, computing } = build(config, own)?;
    let began = proxy.cache.ask();
    let bytes = (config.cache.memory / 2).min(HOT_BYTES);
    let path = config.cache.handover.clone().filter(|_| config.cache.redis.is_none());
    let hot = path.map(|path| Arc::new(HotFile::new(path, bytes)));
    let found_at = match &hot {
        Some(hot) => meet(hot, &proxy, beside).await,
        None => None,
    };
    let (stop, stopped) = watch::channel(Stop::No);
    let local = |listener: &Listener| listener.socket.local_addr().map_err(while_doing("asking for the bound address"));
    let (address, admin_address) = (local(&main)?, local(&admin)?);
    let reloader = source.map(|source| Arc::new(Reloader::new(source, Arc::clone(&proxy), Handle::current(), config.clone())));
    let (hand_over, handing_over) = watch::channel(false);
    let warming = Arc::clone(&endpoints);
    let state = AdminState::new(Arc::clone(&proxy), endpoints, config, reloader.clone(), hand_over, hot.clone());
    let admin_ends = tokio::spawn({
        let stopped = stopped.clone();
        async move {
            if let Err(error) = admin::serve(admin, state, stopped).await {
                tracing::error!(%error, "the admin listener could not start");
            }
        }
    });
    let (open, refused) = (proxy.metrics.connections.clone(), proxy.metrics.connections_refused.clone());
    let counted = Counted { open, refused, closed: proxy.metrics.connections_closed.clone() };
    let limits = ConnectionLimits::new(config.limits.clone(), counted);
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut threads = Vec::with_capacity(cores);
    for core in 0..cores {
        let listener = main.try_clone().map_err(while_doing("sharing the listener"))?;
        let (proxy, limits, stopped) = (Arc::clone(&proxy), limits.clone(), stopped.clone());
        let stores = proxy.stores;
        let thread = thread::Builder::new().name(format!("serve-{core}")).spawn(move || {
            if let Err(error) = serve(listener, &proxy, stores, limits, stopped) {
                tracing::error!(%error, "a serving thread could not start");
            }
        });
        threads.push(thread.map_err(while_doing("starting a serving thread"))?);
    }
    // The threads hold it now: once they close it, it is closed.
    drop(main);
    let running = Running {
        address,
        admin: admin_address,
        proxy,
        reloader,
        handing_over,
        hot,
        found_at,
        drain_timeout: config.limits.drain_timeout,
        admin_ends,
        began,
        _computing: computing,
        stop,
        threads,
    };
    // Beside another process, what lies there is older than that one: it leaves its own once it is told to.
    if !beside {
        running.take_over().await;
    }
    if config.warm.at_start {
        let targets = warming.warmer.start(&running.proxy);
        tracing::info!(targets, "warming");
    }
    Ok(running)
}

/// Has the process that is served beside, and the next one, tell this one what they void, and the other way around.
async fn meet(hot: &HotFile, proxy: &Arc<Proxy>, beside: bool) -> Option<PeerSocket> {
    let path = PeerSocket::beside(hot.path());
    if beside && let Err(error) = handover::connect(&path, &proxy.cache, proxy.rules.load().shapes()).await {
        tracing::warn!(%error, "the process before does not say what it voids while it ends; purge what changes meanwhile");
    }
    let rules = Arc::downgrade(proxy);
    let rules = move || rules.upgrade().map_or(0, |proxy| proxy.rules.load().shapes());
    let listening = PeerSocket::listen(path, &proxy.cache, rules);
    listening
        .inspect_err(
            |error| tracing::warn!(%error, "the next process will not be told what is voided while it takes over (cache.handover)"),
        )
        .ok()
}

/// One serving thread: a runtime of its own, so that a hit never leaves its core. Where nothing is stored, no request takes the
/// short way.
fn serve(listener: Listener, proxy: &Arc<Proxy>, stores: bool, limits: ConnectionLimits, stopped: watch::Receiver<Stop>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (proxy, short): (_, Arc<dyn ShortWay>) = (Arc::clone(proxy), Arc::clone(proxy) as _);
        let answer = move |request, arrival| {
            let proxy = Arc::clone(&proxy);
            async move { proxy.handle_traced(request, arrival).await }
        };
        listener::run(listener, limits, (answer, stores.then_some(short)), stopped).await
    })
}

impl Running {
    /// Takes over what a process before has left for this one.
    pub async fn take_over(&self) {
        let Some(hot) = &self.hot else { return };
        let taken = hot.read(&self.proxy.cache, self.began).await;
        if taken > 0 {
            tracing::info!(entries = taken, "the process before has left what it had in memory");
        }
    }

    /// Waits until another process takes over.
    pub async fn handed_over(&self) {
        let mut handing_over = self.handing_over.clone();
        if handing_over.wait_for(|&handing_over| handing_over).await.is_err() {
            std::future::pending().await
        }
    }

    /// Stops accepting, lets open requests finish, and returns when all is over. What may have been changed is void then, and what
    /// memory holds is left for the next process.
    pub async fn stop(self) {
        let (handed_over, deadline) = (*self.handing_over.borrow(), Instant::now() + self.drain_timeout);
        self.stop.send_replace(if handed_over { Stop::HandOver } else { Stop::End });
        let threads = self.threads;
        let joined = tokio::task::spawn_blocking(move || threads.into_iter().filter_map(|thread| thread.join().err()).count());
        if joined.await.unwrap_or(1) > 0 {
            tracing::error!("a serving thread had panicked");
        }
        // A purge that is under way there counts too. Its listener ends in time by itself.
        let _ = self.admin_ends.await;
        let changes = &self.proxy.changes;
        if !changes.settled(deadline.saturating_duration_since(Instant::now())).await {
            tracing::warn!("some changes were not answered in time and count as done (limits.drain_timeout)");
        }
        let open = changes.take();
        if !open.is_empty() {
            drop(self.proxy.cache.invalidate(open).1.await);
        }
        if let Some(hot) = &self.hot {
            // Of a process that takes over by itself, the file was read when that had begun.
            let is_read = handed_over && (self.proxy.cache.peers().are_there() || !hot.take_back());
            if !is_read {
                hot.write(&self.proxy.cache).await;
            }
        }
        self.proxy.cache.peers().leave().await;
        drop(self.found_at);
        if let Some(tracer) = self.proxy.tracer.clone() {
            // It waits for what is on its way; that it panics is no reason not to stop.
            let _ = tokio::task::spawn_blocking(move || tracer.stop()).await;
        }
    }
}
