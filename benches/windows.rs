//! What dashboards ask, through Sluice and through nginx with a cache of five minutes: windows of 24 hours that end now, and lists
//! of the newest 50 orders, of five symbols, while orders keep arriving.
//!
//! `benches/windows [SECONDS] [A_SECOND]` replays so many requests a second for so long, in front of an existing service that takes
//! 50 ms for each answer, and then over MariaDB. Each request goes to both, one after the other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    dead_code,
    unused_imports,
    missing_docs,
    reason = "a benchmark"
)]

#[path = "../tests/integration/support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;

use sluice::clock::Wall;
use support::process::Process;
use support::{Answer, Connection, MariaDb, Service, Sluice, get, recorded_dir, scratch, until};
use tokio::time::{Duration, Instant, interval};

const DAY: i64 = 86_400_000;
const SYMBOLS: [&str; 5] = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT"];
const TIMEFRAMES: [&str; 8] = ["1m", "5m", "15m", "30m", "1h", "4h", "12h", "1d"];
/// How long the existing service takes for an answer.
const DELAY: Duration = Duration::from_millis(50);
/// The shipped `refresh`.
const REFRESH: f64 = 5.0;

fn main() {
    let numbers: Vec<u64> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let (seconds, a_second) = (numbers.first().copied().unwrap_or(120), numbers.get(1).copied().unwrap_or(40));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut report =
            format!("benches/windows {seconds} {a_second}: {a_second} requests a second for {seconds} s, 60 % windows, 40 % lists\n");
        over_a_service(seconds, a_second, &mut report).await;
        over_mariadb(seconds, a_second, &mut report).await;
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/windows.txt"), report).unwrap();
    });
}

fn now() -> i64 {
    i64::try_from(Wall::now().as_millis()).unwrap()
}

fn row(random: &mut fastrand::Rng, time: i64) -> String {
    let (symbol, side) = (SYMBOLS[random.usize(..5).min(random.usize(..5))], if random.bool() { "buy" } else { "sell" });
    let (average, filled) = (random.f64() * 100_000.0, random.f64() * 3.0);
    format!("{symbol},{side},LIMIT,IOC,{filled:.3},{average:.1},{average:.5},FILLED,{filled:.3},{filled:.8},{time}")
}

/// Orders of the last days.
fn orders(count: usize) -> Vec<String> {
    let mut random = fastrand::Rng::with_seed(5);
    (0..count)
        .map(|_| {
            let time = now() - random.i64(1000..4 * DAY);
            row(&mut random, time)
        })
        .collect()
}

fn target(random: &mut fastrand::Rng) -> (bool, String) {
    let symbol = SYMBOLS[random.usize(..5)];
    if random.u8(..10) < 4 {
        return (false, format!("/api/liquidation-orders?symbol={symbol}&limit=50"));
    }
    let (timeframe, end) = (TIMEFRAMES[random.usize(..8)], now());
    let times = format!("start_timestamp={}&end_timestamp={end}", end - DAY);
    (true, format!("/api/liquidations?symbol={symbol}&timeframe={timeframe}&{times}"))
}

/// nginx in front of a service, with what it takes to cache every answer for five minutes.
fn nginx(backend: SocketAddr) -> (Process, SocketAddr) {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).unwrap().port();
    let dir = scratch();
    let home = dir.display();
    let text = format!(
        "daemon off; master_process off; worker_processes 1; pid {home}/pid; error_log {home}/error.log;\n\
         events {{ worker_connections 1024; }}\n\
         http {{ access_log off; keepalive_requests 100000000;\n\
         client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c; uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;\n\
         proxy_cache_path {home}/cache keys_zone=z:10m use_temp_path=off;\n\
         server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{backend}; proxy_cache z; proxy_cache_valid 200 5m;\n\
         proxy_cache_lock on; add_header X-Cache $upstream_cache_status; }} }} }}\n"
    );
    let file = dir.join("nginx.conf");
    std::fs::write(&file, text).unwrap();
    let process = Process::start(Command::new("nginx").arg("-c").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()), dir);
    (process, SocketAddr::from(([127, 0, 0, 1], port)))
}

/// What became of the requests to one of the two.
#[derive(Default)]
struct Tally {
    windows: u32,
    window_hits: u32,
    lists: u32,
    list_hits: u32,
    times: Vec<Duration>,
}

impl Tally {
    fn note(&mut self, window: bool, hit: bool, took: Duration) {
        let (all, hits) = if window { (&mut self.windows, &mut self.window_hits) } else { (&mut self.lists, &mut self.list_hits) };
        (*all, *hits) = (*all + 1, *hits + u32::from(hit));
        self.times.push(took);
    }

    fn say(&mut self, name: &str) -> String {
        self.times.sort_unstable();
        let ms = |percent: usize| self.times[(self.times.len() - 1) * percent / 100].as_secs_f64() * 1e3;
        let share = f64::from(self.window_hits + self.list_hits) / f64::from(self.windows + self.lists) * 100.0;
        format!(
            "  {name:<8} without waiting: {share:5.1} % of all, {} of {} windows, {} of {} lists; median {:.2} ms, p99 {:.2} ms\n",
            self.window_hits,
            self.windows,
            self.list_hits,
            self.lists,
            ms(50),
            ms(99)
        )
    }
}

/// Replays the trace; returns the tallies of Sluice and nginx, and how long it took in seconds. Every answer of Sluice's must be 200.
async fn replay(sluice: &Sluice, nginx: SocketAddr, seconds: u64, a_second: u64) -> ([Tally; 2], f64) {
    // Longer than `seconds` where the service is slow: both are asked in turns.
    let begun = Instant::now();
    let mut tallies = [Tally::default(), Tally::default()];
    let mut connections = [Connection::open(sluice.address).await, Connection::open(nginx).await];
    let (mut random, mut ticks) = (fastrand::Rng::with_seed(2), interval(Duration::from_secs(1) / u32::try_from(a_second).unwrap()));
    for _ in 0..seconds * a_second {
        ticks.tick().await;
        let (window, target) = target(&mut random);
        for (tally, connection) in tallies.iter_mut().zip(&mut connections) {
            let asked = Instant::now();
            let answer = connection.ask("GET", &target, &[], b"").await;
            assert_eq!(answer.status, 200, "{target}");
            let hit = answer.cache_status().contains("; hit") || answer.field("x-cache") == Some("HIT");
            tally.note(window, hit, asked.elapsed());
        }
    }
    (tallies, begun.elapsed().as_secs_f64())
}

/// Asks until every symbol is known and both endpoints are answered from the timeline.
async fn prove(sluice: &Sluice) {
    for symbol in SYMBOLS {
        until("lists are computed", || async {
            let answer = sluice.get(&format!("/api/liquidation-orders?symbol={symbol}&limit={}", fastrand::u16(1..900))).await;
            answer.cache_status().contains("timeline")
        })
        .await;
        until("windows are computed", || async {
            let times = format!("start_timestamp={}&end_timestamp={}", now() - DAY, now());
            let answer = sluice.get(&format!("/api/liquidations?symbol={symbol}&timeframe=1h&{times}")).await;
            answer.cache_status().contains("timeline")
        })
        .await;
    }
}

async fn questions(sluice: &Sluice) -> f64 {
    sluice.metric("backend_requests_total", &[]).await
}

/// Adds two orders a second, of which some are late, for ever.
async fn arrive<F: Future<Output = ()>>(mut add: impl FnMut(String) -> F) {
    let (mut random, mut ticks) = (fastrand::Rng::with_seed(3), interval(Duration::from_millis(500)));
    loop {
        ticks.tick().await;
        let late = random.i64(0..3000);
        add(row(&mut random, now() - late)).await;
    }
}

fn conclude(report: &mut String, title: &str, mut tallies: [Tally; 2], questions: f64, seconds: f64) {
    let rate = questions / (seconds / REFRESH * SYMBOLS.len() as f64);
    let mut text = format!("{title}\n");
    text += &tallies[0].say("sluice");
    text += &tallies[1].say("nginx");
    let _ = writeln!(text, "  Sluice asked {questions} questions in {seconds:.0} s: {rate:.2} for each symbol and refresh of {REFRESH} s");
    eprint!("{text}");
    report.push_str(&text);
}

async fn over_a_service(seconds: u64, a_second: u64, report: &mut String) {
    let service = Arc::new(Service::start_slow(orders(10_000), DELAY).await);
    let url = format!("http://{}", service.backend.address);
    let text = include_str!("../proxy.toml").replace("verify = 0.001", "verify = 0.0");
    let sluice = Sluice::with(&text, &[("BACKEND_URL", &url), ("REDIS_URL", "")]);
    let (_nginx, address) = nginx(service.backend.address);
    until("nginx listens", || async { tokio::net::TcpStream::connect(address).await.is_ok() }).await;
    prove(&sluice).await;
    let arriving = tokio::spawn(arrive({
        let service = Arc::clone(&service);
        move |row| {
            service.add(row);
            std::future::ready(())
        }
    }));
    let before = questions(&sluice).await;
    let (tallies, took) = replay(&sluice, address, seconds, a_second).await;
    arriving.abort();
    let asked = questions(&sluice).await - before;
    conclude(report, "In front of an existing service", tallies, asked, took);
}

async fn over_mariadb(seconds: u64, a_second: u64, report: &mut String) {
    let database = Arc::new(MariaDb::empty(&[]).await);
    database.feed(&recorded_dir().join("schema.sql"));
    insert(&database, &orders(10_000)).await;
    database.index();
    let (sluice, service) = (database.sluice(&[]), database.uncached(&[], &[]));
    let (_nginx, address) = nginx(service.address);
    until("nginx listens", || async { tokio::net::TcpStream::connect(address).await.is_ok() }).await;
    prove(&sluice).await;
    let arriving = tokio::spawn(arrive({
        let database = Arc::clone(&database);
        move |row| {
            let database = Arc::clone(&database);
            async move { insert(&database, &[row]).await }
        }
    }));
    let of_timeline = || async { sluice.metric("timeline_fetches_total", &[]).await + questions(&sluice).await };
    let before = of_timeline().await;
    let (tallies, took) = replay(&sluice, address, seconds, a_second).await;
    arriving.abort();
    let asked = of_timeline().await - before;
    conclude(report, "Over MariaDB, nginx in front of Sluice without rules", tallies, asked, took);
}

async fn insert(database: &MariaDb, rows: &[String]) {
    for rows in rows.chunks(1000) {
        let values: Vec<String> = rows.iter().map(|row| format!("('{}')", row.replace(',', "','"))).collect();
        database.run(&format!("INSERT INTO api.binance_liqs VALUES {}", values.join(","))).await;
    }
}
