//! Warming: asks for what `[warm]` names, and for what was asked for most before, as a client would.
//!
//! It never presses: so many requests at one time, each followed by a rest as long as it took, and by a longer one after a failure.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Limited};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::Proxy;
use crate::body;
use crate::clock::Wall;
use crate::request::Arrival;
use crate::request::secrets::without_secrets;

/// The most targets of one run.
const MOST: usize = 50_000;
/// The largest list of symbols that is read, in bytes.
const LARGEST_LIST: usize = 4 << 20;
/// One target may take no longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest rest after a request.
const LONGEST_REST: Duration = Duration::from_secs(10);

/// Warms the cache of a proxy.
pub struct Warmer {
    runtime: Handle,
    progress: Arc<Progress>,
}

/// How far warming is.
#[derive(Default)]
struct Progress {
    /// Held while it runs.
    running: Mutex<bool>,
    of: AtomicUsize,
    done: AtomicUsize,
    failed: AtomicUsize,
}

/// How far warming is, for `GET /warm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct WarmingState {
    /// Whether it runs.
    pub running: bool,
    /// Targets that were answered, well or not.
    pub done: usize,
    /// Of so many.
    pub of: usize,
    /// Targets whose answer was an error, or none.
    pub failed: usize,
}

impl Progress {
    fn is_running(&self) -> std::sync::MutexGuard<'_, bool> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Warmer {
    /// A warmer whose work is done on `runtime`.
    #[must_use]
    pub fn new(runtime: Handle) -> Self {
        Self { runtime, progress: Arc::default() }
    }

    /// Starts warming, unless that is under way, and returns for how many targets, as far as that is known yet: symbols that the
    /// API lists are asked for first.
    #[must_use]
    pub fn start(&self, proxy: &Arc<Proxy>) -> usize {
        {
            let mut running = self.progress.is_running();
            if *running {
                return self.progress.of.load(Ordering::Relaxed);
            }
            *running = true;
        }
        let warm = &proxy.rules.load().warm;
        let known = warm.expand(&warm.symbols, Wall::now()).len();
        self.progress.of.store(known, Ordering::Relaxed);
        self.progress.done.store(0, Ordering::Relaxed);
        self.progress.failed.store(0, Ordering::Relaxed);
        // What is left to be warmed does not keep a proxy alive that was stopped.
        let (proxy, progress) = (Arc::downgrade(proxy), Arc::clone(&self.progress));
        self.runtime.spawn(async move {
            warm_all(&proxy, &progress).await;
            *progress.is_running() = false;
        });
        known
    }

    /// How far it is.
    #[must_use]
    pub fn state(&self) -> WarmingState {
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let Progress { of, done, failed, .. } = &*self.progress;
        WarmingState { running: *self.progress.is_running(), done: count(done), of: count(of), failed: count(failed) }
    }
}

async fn warm_all(weak: &Weak<Proxy>, progress: &Arc<Progress>) {
    let Some(proxy) = weak.upgrade() else { return };
    let warm = proxy.rules.load().warm.clone();
    let symbols = if warm.needs_symbols() { listed(&proxy, &warm.symbols_from).await } else { warm.symbols.clone() };
    let mut targets = warm.expand(&symbols, Wall::now());
    if warm.hottest > 0 {
        targets.extend(proxy.hottest.known(warm.hottest).await);
    }
    drop(proxy);
    let mut seen = HashSet::new();
    targets.retain(|target| seen.insert(target.clone()));
    targets.truncate(MOST);
    progress.of.store(targets.len(), Ordering::Relaxed);
    let (count, targets) = (targets.len(), Arc::new(Mutex::new(targets.into_iter())));
    let mut workers = JoinSet::new();
    for _ in 0..warm.concurrency {
        let (weak, progress, targets) = (Weak::clone(weak), Arc::clone(progress), Arc::clone(&targets));
        workers.spawn(async move {
            let mut failures = 0_u32;
            loop {
                let next = targets.lock().unwrap_or_else(PoisonError::into_inner).next();
                let (Some(target), Some(proxy)) = (next, weak.upgrade()) else { break };
                let started = Instant::now();
                let status = ask(&proxy, &target, None).await.map(|(status, _)| status);
                drop(proxy);
                let is_fine = status.is_some_and(|status| !status.is_server_error());
                tracing::debug!(target = &*without_secrets(&target), status = status.map(|status| status.as_u16()), "warmed");
                failures = if is_fine { 0 } else { failures.saturating_add(1) };
                progress.done.fetch_add(1, Ordering::Relaxed);
                progress.failed.fetch_add(usize::from(!is_fine), Ordering::Relaxed);
                // A slow backend gets as much rest as it gets work, one that fails gets more and more.
                let rest = started.elapsed().max(Duration::from_millis(if is_fine { 0 } else { 100 }));
                sleep((rest * (1 << failures.min(6))).min(LONGEST_REST)).await;
            }
        });
    }
    while workers.join_next().await.is_some() {}
    tracing::info!(targets = count, failed = progress.failed.load(Ordering::Relaxed), "warmed");
}

/// The symbols that the API lists at a target.
async fn listed(proxy: &Arc<Proxy>, target: &str) -> Vec<String> {
    let symbols = match ask(proxy, target, Some(LARGEST_LIST)).await {
        Some((StatusCode::OK, body)) => serde_json::from_slice::<Vec<String>>(&body).ok(),
        _ => None,
    };
    symbols.unwrap_or_else(|| {
        tracing::warn!(target, "the symbols to warm could not be read (warm.symbols_from must answer with a JSON array of texts)");
        Vec::new()
    })
}

/// Asks as a client would, and reads the whole answer; keeps it if it is no larger than `keep`.
async fn ask(proxy: &Arc<Proxy>, target: &str, keep: Option<usize>) -> Option<(StatusCode, Bytes)> {
    let mut request = Request::new(body::empty());
    *request.uri_mut() = target.parse().ok()?;
    request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
    let arrival = Arrival { peer: IpAddr::V4(Ipv4Addr::LOCALHOST), interim: None, own: true, refused: None };
    let answering = async {
        let (head, mut body) = proxy.handle(request, arrival).await.into_parts();
        if let Some(most) = keep {
            return Some((head.status, Limited::new(body, most).collect().await.ok()?.to_bytes()));
        }
        while let Some(frame) = body.frame().await {
            frame.ok()?;
        }
        Some((head.status, Bytes::new()))
    };
    timeout(PATIENCE, answering).await.ok()?
}
