//! Clients that behave well beside hundreds that do not: none of theirs fails, and what the others cost is given back.
//!
//! Every client draws what it does next from a seed of its own, which comes from `SLUICE_SEED`. By hand, for longer:
//! `SLUICE_SECONDS=600 cargo test --profile tested --test integration -- neighbours --nocapture` prints what the clients that behave waited,
//! alone and beside the others.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::support::{Asked, Backend, Connection, HANG, Sluice, Step, frames, number, ok, one_rule, reply, until};

const WELL_BEHAVED: u64 = 50;
/// An answer that slow readers take.
const LARGE: usize = 2 << 20;

/// What the backend answers: by the first part of the path.
fn answer(asked: &Asked) -> Vec<Step> {
    match asked.target.split(['/', '?']).nth(1).unwrap_or("") {
        "slow" => [Step::Delay(Duration::from_millis(300))].into_iter().chain(ok("", b"slow")).collect(),
        "large" => ok("", &vec![b'x'; LARGE]),
        "events" => vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n6\r\ndata:1\r\n".to_vec()),
            Step::Hang,
        ],
        "hang" => vec![Step::Hang],
        "failing" => reply("503 Service Unavailable", "Retry-After: 1\r\n", b"no"),
        "pass" => ok("Cache-Control: no-store\r\n", asked.target.as_bytes()),
        _ => ok("", asked.target.as_bytes()),
    }
}

/// A connection from an address of this machine's loopback network.
async fn connect(address: SocketAddr, from: Ipv4Addr) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().ok()?;
    socket.set_recv_buffer_size(16 << 10).ok()?;
    socket.bind((IpAddr::V4(from), 0).into()).ok()?;
    timeout(HANG, socket.connect(address)).await.ok()?.ok()
}

/// Clients that share what they note.
struct Scene {
    address: SocketAddr,
    stop: AtomicBool,
    requests: AtomicU64,
    failures: Mutex<Vec<String>>,
    waits: Mutex<Vec<Duration>>,
}

impl Scene {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What is not answered well, or not at all.
    fn note(&self, what: &str, waited: Duration, failure: Option<String>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.waits.lock().unwrap().push(waited);
        if let Some(failure) = failure {
            self.failures.lock().unwrap().push(format!("{what} after {waited:?}: {failure}"));
        }
    }

    /// A percentile of the waits since it was asked last.
    fn percentiles(&self) -> [Duration; 3] {
        let mut waits = std::mem::take(&mut *self.waits.lock().unwrap());
        waits.sort_unstable();
        [50, 99, 100].map(|percent| waits.get((waits.len().max(1) - 1) * percent / 100).copied().unwrap_or_default())
    }
}

/// Asks for what is stored, for what is not, and changes something now and then, and reads each answer whole.
async fn behave(scene: Arc<Scene>, number: u64) {
    let mut random = fastrand::Rng::with_seed(number);
    let from = Ipv4Addr::new(127, 0, 1, u8::try_from(number % 250).unwrap() + 1);
    let Some(stream) = connect(scene.address, from).await else {
        return scene.note("connecting", HANG, Some("refused".to_owned()));
    };
    let mut connection = Connection(BufReader::new(stream));
    while !scene.is_over() {
        let (method, target) = match random.u32(..100) {
            0..80 => ("GET", format!("/page/{}", random.u32(..20))),
            80..90 => ("GET", format!("/page/{number}-{}", random.u32(..))),
            90..95 => ("GET", format!("/pass/{}", random.u32(..))),
            _ => ("POST", format!("/change/{}", random.u32(..))),
        };
        let body: &[u8] = if method == "POST" { b"hello" } else { b"" };
        let began = Instant::now();
        let asking = async {
            let head = format!("{method} {target} HTTP/1.1\r\nHost: api.test\r\nContent-Length: {}\r\n\r\n", body.len());
            connection.0.get_mut().write_all(&[head.as_bytes(), body].concat()).await.ok()?;
            connection.answer(false).await
        };
        let failure = match timeout(HANG, asking).await {
            Ok(Some(answer)) if answer.status == 200 && answer.whole && answer.plain() == target.as_bytes() => None,
            Ok(answer) => Some(format!("{answer:?}")),
            Err(_) => Some("no answer".to_owned()),
        };
        let is_over = failure.is_some();
        scene.note(&format!("{method} {target}"), began.elapsed(), failure);
        if is_over {
            return;
        }
        sleep(Duration::from_millis(random.u64(5..40))).await;
    }
}

/// What a client may do that has no regard for others.
#[derive(Clone, Copy, Debug)]
enum Kind {
    SlowHead,
    NoBody,
    SlowUpload,
    Leaving,
    Pipelining,
    Resetting,
    SlowReading,
    Events,
    Failing,
    Hanging,
    StreamResets,
    ClosedWindows,
    Flood,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::SlowHead,
        Self::NoBody,
        Self::SlowUpload,
        Self::Leaving,
        Self::Pipelining,
        Self::Resetting,
        Self::SlowReading,
        Self::Events,
        Self::Failing,
        Self::Hanging,
        Self::StreamResets,
        Self::ClosedWindows,
        Self::Flood,
    ];
}

/// What a client does that has no regard for others. Each ends within a few seconds, or at its connection's end.
async fn misbehave(scene: &Scene, kind: Kind, random: &mut fastrand::Rng, from: Ipv4Addr) -> Option<()> {
    let mut stream = connect(scene.address, from).await?;
    let any = random.u64(..);
    let nap = Duration::from_millis(random.u64(1..400));
    let get = |path: &str| format!("GET /{path}/{any:x} HTTP/1.1\r\nHost: h\r\n\r\n");
    match kind {
        Kind::SlowHead => drip(&mut stream, get("page").as_bytes(), random).await?,
        Kind::NoBody => {
            stream.write_all(b"POST /change/1 HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n").await.ok()?;
            sleep(nap * 10).await;
        }
        Kind::SlowUpload => {
            stream.write_all(b"POST /change/2 HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n").await.ok()?;
            drip(&mut stream, &vec![b'x'; 500_000], random).await?;
        }
        Kind::Leaving => {
            for _ in 0..20 {
                let mut one = connect(scene.address, from).await?;
                one.write_all(get(&format!("slow/{}", random.u64(..))).as_bytes()).await.ok()?;
            }
            sleep(nap).await;
        }
        Kind::Pipelining => {
            for _ in 0..200 {
                timeout(nap, stream.write_all(get("page").as_bytes())).await.ok()?.ok()?;
            }
            sleep(nap).await;
        }
        Kind::Resetting => {
            stream.write_all(get("large").as_bytes()).await.ok()?;
            read_some(&mut stream, 1000).await;
            sleep(nap).await;
            let _ = stream.set_zero_linger();
        }
        Kind::SlowReading => {
            stream.write_all(get("large").as_bytes()).await.ok()?;
            for _ in 0..20 {
                read_some(&mut stream, random.usize(1..30_000)).await;
                sleep(nap / 2).await;
            }
        }
        Kind::Events => {
            stream.write_all(get("events").as_bytes()).await.ok()?;
            sleep(nap * 10).await;
        }
        Kind::Failing => {
            stream.write_all(get("failing").as_bytes()).await.ok()?;
            read_some(&mut stream, 100_000).await;
            sleep(nap).await;
        }
        Kind::Hanging => {
            stream.write_all(get("hang").as_bytes()).await.ok()?;
            sleep(nap * 10).await;
        }
        Kind::StreamResets => ask_and_reset(&mut stream, random, nap).await?,
        Kind::ClosedWindows => closed_windows(&mut stream, random, nap * 20).await?,
        Kind::Flood => flood(&mut stream, random, nap).await?,
    }
    Some(())
}

/// Sends a few bytes at a time, with rests.
async fn drip(stream: &mut TcpStream, bytes: &[u8], random: &mut fastrand::Rng) -> Option<()> {
    let size = (bytes.len() / 20).max(1);
    for piece in bytes.chunks(size) {
        stream.write_all(piece).await.ok()?;
        sleep(Duration::from_millis(random.u64(1..100))).await;
    }
    Some(())
}

async fn read_some(stream: &mut TcpStream, most: usize) -> usize {
    let mut buffer = vec![0; most];
    let read = timeout(Duration::from_secs(1), stream.read(&mut buffer)).await;
    read.ok().and_then(Result::ok).unwrap_or(0)
}

fn http2_get(stream: u32, target: &str) -> Vec<u8> {
    let head = frames::fields(&[(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", target)]);
    frames::frame(1, frames::END_STREAM | frames::END_HEADERS, stream, &head)
}

/// Streams that are reset as soon as they were opened.
async fn ask_and_reset(stream: &mut TcpStream, random: &mut fastrand::Rng, nap: Duration) -> Option<()> {
    stream.write_all(&frames::opening()).await.ok()?;
    for id in 0..50 {
        let id = 2 * id + 1;
        let get = http2_get(id, &format!("/slow/{:x}", random.u64(..)));
        stream.write_all(&[get, frames::frame(3, 0, id, &8_u32.to_be_bytes())].concat()).await.ok()?;
    }
    read_some(stream, 10_000).await;
    sleep(nap).await;
    Some(())
}

/// Streams whose answers the client never makes room for.
async fn closed_windows(stream: &mut TcpStream, random: &mut fastrand::Rng, nap: Duration) -> Option<()> {
    let settings = frames::frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]);
    stream.write_all(&[frames::PREFACE, &settings].concat()).await.ok()?;
    for id in 0..100 {
        stream.write_all(&http2_get(2 * id + 1, &format!("/large/{}", random.u32(..50)))).await.ok()?;
    }
    sleep(nap).await;
    Some(())
}

/// Frames that cost an answer each.
async fn flood(stream: &mut TcpStream, random: &mut fastrand::Rng, nap: Duration) -> Option<()> {
    let kind = if random.bool() { frames::frame(6, 0, 0, &[1; 8]) } else { frames::frame(4, 0, 0, &[]) };
    stream.write_all(&frames::opening()).await.ok()?;
    let many = kind.repeat(1000);
    for _ in 0..20 {
        timeout(Duration::from_secs(1), stream.write_all(&many)).await.ok()?.ok()?;
    }
    // Until it is closed, or for a while.
    while read_some(stream, 10_000).await > 0 {}
    sleep(nap).await;
    Some(())
}

/// A program before a backend, and the clients that behave.
struct Stage {
    _backend: Backend,
    sluice: Sluice,
    scene: Arc<Scene>,
    good: Vec<JoinHandle<()>>,
    seed: u64,
}

impl Stage {
    async fn set() -> Self {
        let seed = number("SLUICE_SEED", 1);
        let backend = Backend::start(answer).await;
        let rules = format!("[[route]]\nname='pass'\npath='/pass/*'\ncache=false\n{}", one_rule("ttl='1h'\nstale_if_error='1h'"));
        let text = format!("[backend]\nurl='http://{}'\n[cache]\nmemory='32MiB'\nredis=''\n{rules}", backend.address);
        let sluice = Sluice::with(&text, &[]);
        let scene = Arc::new(Scene {
            address: sluice.address,
            stop: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            failures: Mutex::default(),
            waits: Mutex::default(),
        });
        let good = (0..WELL_BEHAVED).map(|number| tokio::spawn(behave(Arc::clone(&scene), seed ^ number))).collect();
        Self { _backend: backend, sluice, scene, good, seed }
    }

    /// Has this many clients misbehave for a time, in one way or in all; returns what those that behave waited meanwhile.
    async fn beside(&self, abusers: u64, kind: Option<Kind>, time: Duration) -> [Duration; 3] {
        let start = |number: u64| {
            let scene = Arc::clone(&self.scene);
            let mut random = fastrand::Rng::with_seed(self.seed.wrapping_mul(7919) ^ number);
            tokio::spawn(async move {
                let from = Ipv4Addr::new(127, 0, 2, u8::try_from(number % 20).unwrap() + 1);
                loop {
                    let kind = kind.unwrap_or_else(|| Kind::ALL[random.usize(..Kind::ALL.len())]);
                    let _ = timeout(Duration::from_secs(20), misbehave(&scene, kind, &mut random, from)).await;
                }
            })
        };
        let bad: Vec<_> = (0..abusers).map(start).collect();
        sleep(time).await;
        let waits = self.scene.percentiles();
        bad.iter().for_each(JoinHandle::abort);
        waits
    }

    /// Ends the clients, and checks that nothing is held for any of them, and that none failed that behaved.
    async fn end(mut self) {
        self.scene.stop.store(true, Ordering::Relaxed);
        for client in self.good.drain(..) {
            client.await.unwrap();
        }
        until("everything that the others had is given back", || async {
            // The admin connection that asks is not counted here.
            let mut left = 0.0;
            for gauge in ["inflight", "connections", "fill_bytes"] {
                left += self.sluice.metric(gauge, &[]).await;
            }
            left == 0.0
        })
        .await;
        // The cache, what is remembered of requests, and what the allocator keeps in parts of pages.
        let most = 128 << 20;
        until("the memory is given back", || async { self.sluice.process.resident() < most }).await;
        eprintln!("resident: {} MiB at the end", mib(self.sluice.process.resident()));
        let failures = self.scene.failures.lock().unwrap();
        assert!(failures.is_empty(), "seed {}: {} failures, the first: {}", self.seed, failures.len(), failures[0]);
    }
}

const fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_behave_do_not_notice_those_that_do_not() {
    let (seconds, abusers) = (number("SLUICE_SECONDS", 10), number("SLUICE_ABUSERS", 500));
    let stage = Stage::set().await;
    sleep(Duration::from_secs(seconds.min(10))).await;
    let (alone, before) = (stage.scene.percentiles(), stage.sluice.process.resident());
    let beside = stage.beside(abusers, None, Duration::from_secs(seconds)).await;
    let peak = stage.sluice.process.resident_peak();
    // The allocator keeps some of what was freed for a while: how much differs from run to run.
    let most = 256 << 20;
    let given_back = timeout(HANG, async {
        while stage.sluice.process.resident() > most {
            sleep(Duration::from_secs(1)).await;
        }
    });
    let given_back = given_back.await.is_ok();
    let (after, cached) = (stage.sluice.process.resident(), stage.sluice.metric("memory_bytes", &[]).await);
    eprintln!(
        "seed {}, {} requests; median, p99, longest: alone {alone:?}, beside {abusers} {beside:?}",
        stage.seed,
        stage.scene.requests.load(Ordering::Relaxed)
    );
    eprintln!(
        "resident: {} MiB before, {} at most, {} after, of which {:.0} in the cache",
        mib(before),
        mib(peak),
        mib(after),
        cached / 1048576.0
    );
    assert!(given_back, "{} MiB after it", mib(after));
    stage.end().await;
}

/// Each way of misbehaving alone, so that what one costs is seen. `SLUICE_KIND` names one.
#[tokio::test(flavor = "multi_thread")]
async fn no_way_to_misbehave_is_felt_by_those_that_do_not() {
    let (seconds, abusers) = (number("SLUICE_SECONDS", 1), number("SLUICE_ABUSERS", 200));
    let only = std::env::var("SLUICE_KIND").unwrap_or_default();
    for kind in Kind::ALL.into_iter().filter(|kind| format!("{kind:?}").contains(&only)) {
        let stage = Stage::set().await;
        sleep(Duration::from_secs(seconds)).await;
        let (alone, before) = (stage.scene.percentiles(), stage.sluice.process.resident());
        let beside = stage.beside(abusers, Some(kind), Duration::from_secs(seconds)).await;
        let (peak, after) = (stage.sluice.process.resident_peak(), stage.sluice.process.resident());
        eprintln!(
            "{kind:?}: alone {alone:?}, beside {abusers} {beside:?}; MiB: {} before, {} at most, {}",
            mib(before),
            mib(peak),
            mib(after)
        );
        stage.end().await;
    }
}
