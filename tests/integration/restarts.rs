//! A new process takes over from the old one: no request fails, and what was in memory is there again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::{Backend, Connection, HANG, Redis, Sluice, Step, TOKEN, frames, get, ok, until};

fn config(backend: &Backend, redis: &str, handover: &str) -> String {
    format!(
        "[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis='{redis}'\nhandover='{handover}'\n[[route]]\nname='all'\npath='/*'\nttl='1h'\ntags=['t']\n",
        backend.address
    )
}

fn path() -> String {
    std::env::temp_dir().join(format!("sluice-handover-{}-{}", std::process::id(), fastrand::u64(..))).to_str().unwrap().to_owned()
}

/// A new process in the place of `old`, which ends.
async fn replace(mut old: Sluice, text: &str) -> Sluice {
    let new = Sluice::at(text, old.address, old.admin, &["--take-over"]);
    assert_eq!((new.address, new.admin), (old.address, old.admin));
    ends(&mut old).await;
    new
}

/// Waits until a process has ended, as it should.
async fn ends(sluice: &mut Sluice) {
    until("it ends", || {
        let ended = sluice.process.child.try_wait().unwrap();
        async move { ended.is_some_and(|status| status.success()) }
    })
    .await;
}

/// Clients that ask for fifty targets: some by one connection after another, some over connections that stay open for as long as they
/// are let.
struct Load {
    asked: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let (asked, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut clients = JoinSet::new();
        for client in 0..8 {
            let (asked, stop) = (Arc::clone(&asked), Arc::clone(&stop));
            clients.spawn(async move {
                let mut open: Option<Connection> = None;
                for number in client.. {
                    let target = format!("/{}", number % 50);
                    let answer = if client % 2 == 0 {
                        get(address, &target, &[]).await
                    } else {
                        let mut connection = match open.take() {
                            Some(connection) => connection,
                            None => Connection::open(address).await,
                        };
                        let answer = connection.ask("GET", &target, &[], b"").await;
                        open = (answer.field("connection") != Some("close")).then_some(connection);
                        answer
                    };
                    assert_eq!((answer.status, answer.text()), (200, target));
                    asked.fetch_add(1, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            });
        }
        Self { asked, stop, clients }
    }

    async fn more(&self, count: usize) {
        let from = self.asked.load(Ordering::SeqCst);
        until("requests go on", || async { self.asked.load(Ordering::SeqCst) >= from + count }).await;
    }

    async fn end(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_restarts_under_load_fail_no_request_and_lose_no_hit() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let path = path();
    let text = config(&backend, "", &path);
    let mut sluice = Sluice::with(&text, &[]);
    let load = Load::start(sluice.address);
    load.more(500).await;
    assert_eq!(backend.count(), 50);
    for _ in 0..10 {
        sluice = replace(sluice, &text).await;
        load.more(200).await;
    }
    load.end().await;
    let misses = backend.count() - 50;
    // What was asked for in the moment before the new one had read what the old one left.
    assert!(misses <= 500, "{misses} fetches more");
    let before = backend.count();
    for number in 0..50 {
        assert!(sluice.get(&format!("/{number}")).await.cache_status().contains("hit"));
    }
    assert_eq!(backend.count(), before);
    assert!(!std::path::Path::new(&path).exists(), "it was read");
    drop(sluice);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_there_again_after_a_plain_restart_and_what_was_purged_is_not() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let path = path();
    let text = config(&backend, "", &path);
    let mut old = Sluice::with(&text, &[]);
    for target in ["/a", "/b"] {
        old.get(target).await;
    }
    assert_eq!(old.manage("/purge?pattern=all").await.status, 200);
    old.get("/a").await;
    old.process.signal("TERM");
    ends(&mut old).await;
    assert!(std::path::Path::new(&path).exists());
    let new = Sluice::with(&text, &[]);
    assert!(new.get("/a").await.cache_status().contains("hit"));
    assert!(new.get("/b").await.cache_status().contains("fwd=uri-miss"));
    // A purge finds what was taken over.
    assert_eq!(new.manage("/purge?tag=t").await.text(), "{\"purged\":2}");
    assert!(new.get("/a").await.cache_status().contains("fwd=uri-miss"));
    drop(new);
    // Whatever lies there instead harms nothing.
    std::fs::write(&path, b"SLUHOT\0\x01 nonsense").unwrap();
    let again = Sluice::with(&text, &[]);
    assert!(again.get("/a").await.cache_status().contains("fwd=uri-miss"));
    until("it is told", || async { again.logged().contains("could not be read and was not used") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_redis_a_new_process_has_what_the_old_one_had() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let redis = Redis::start(&[]).await;
    let text = config(&backend, &redis.url(), "");
    let old = Sluice::with(&text, &[]);
    until("Redis answers", || async { old.logged().contains("Redis answers") }).await;
    until("it is in Redis", || async {
        old.get(&format!("/{}", fastrand::u32(..5))).await;
        redis.keys().await.len() == 5
    })
    .await;
    let asked = backend.count();
    let new = replace(old, &text).await;
    for number in 0..5 {
        assert!(new.get(&format!("/{number}")).await.cache_status().contains("hit"));
    }
    assert_eq!(backend.count(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_taken_over_by_mistake() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::with(&config(&backend, "", ""), &[]);
    let file = sluice.file.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let (address, admin) = (sluice.address.to_string(), sluice.admin.to_string());
        let output = crate::support::program()
            .args([&["serve", "--config", file, "--listen", &address, "--admin-listen", &admin], arguments].concat())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, told) = run(&[]);
    assert!(code == Some(3) && told.contains("listening on") && told.contains("in use"), "{told}");
    assert_eq!(sluice.get("/x").await.status, 200);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let output = crate::support::program()
        .args(["serve", "--config", file, "--listen", &free, "--admin-listen", &free, "--take-over"])
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(3) && told.contains("nothing to take over"), "{told}");
}

/// A backend with one value: a POST raises it at once, and is answered after `delay`, or never.
async fn counting(delay: Option<Duration>) -> (Backend, Arc<AtomicUsize>) {
    let value = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&value);
    let backend = Backend::start(move |asked| {
        if asked.method == "GET" {
            return ok("", counting.load(Ordering::SeqCst).to_string().as_bytes());
        }
        counting.fetch_add(1, Ordering::SeqCst);
        let waiting = delay.map_or(Step::Hang, Step::Delay);
        [vec![waiting], ok("", b"done")].into_iter().flatten().collect()
    })
    .await;
    (backend, value)
}

async fn keep(sluice: &Sluice, target: &str) {
    until("it is kept", || async { sluice.get(target).await.cache_status().contains("; hit") }).await;
}

/// A change that the backend has, and whose answer is waited for elsewhere.
async fn change(sluice: &Sluice, value: &AtomicUsize) -> tokio::task::JoinHandle<Option<u16>> {
    let (address, before) = (sluice.address, value.load(Ordering::SeqCst));
    let changing = tokio::spawn(async move {
        let mut open = Connection::open(address).await;
        open.send(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
        open.answer(false).await.map(|answer| answer.status)
    });
    until("the backend has it", || async { value.load(Ordering::SeqCst) > before }).await;
    changing
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_an_http2_client_that_is_gone() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let mut sluice = Sluice::with(&format!("[limits]\ndrain_timeout='1h'\n{}", config(&backend, "", &path())), &[]);
    let mut client = TcpStream::connect(sluice.address).await.unwrap();
    let head = frames::fields(&[(":method", "GET"), (":scheme", "http"), (":authority", "h"), (":path", "/x")]);
    let get = frames::frame(1, frames::END_STREAM | frames::END_HEADERS, 1, &head);
    client.write_all(&[frames::opening(), get].concat()).await.unwrap();
    until("it is answered", || async { sluice.metric("requests_total", &[]).await >= 1.0 }).await;
    // It answers no ping from here on. The library would wait 50 seconds for that.
    sluice.process.signal("TERM");
    timeout(HANG / 2, ends(&mut sluice)).await.expect("it ends");
    drop(client);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_is_under_way_when_the_process_ends_is_not_undone_by_the_next() {
    // Answered while requests are drained, answered never, and answered while it stops without a successor.
    for (delay, how) in [(Some(Duration::from_millis(700)), "TERM"), (None, "TERM"), (Some(Duration::from_millis(700)), "/stop")] {
        let (backend, value) = counting(delay).await;
        let text =
            format!("[limits]\ndrain_timeout='{}'\n{}", if delay.is_some() { "30s" } else { "500ms" }, config(&backend, "", &path()));
        let mut old = Sluice::with(&text, &[]);
        keep(&old, "/x").await;
        keep(&old, "/other").await;
        let changing = change(&old, &value).await;
        match how {
            "TERM" => old.process.signal("TERM"),
            target => assert_eq!(old.manage(target).await.status, 200),
        }
        ends(&mut old).await;
        assert_eq!(changing.await.unwrap(), delay.map(|_| 200), "{how}");
        let new = Sluice::with(&text, &[]);
        let answer = new.get("/x").await;
        assert_eq!(answer.text(), "1", "{how}: {}", answer.cache_status());
        assert!(new.get("/other").await.cache_status().contains("; hit"), "{how}: what nobody changed is there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_old_process_voids_while_it_ends_is_void_at_the_new_one() {
    let (backend, value) = counting(Some(Duration::from_millis(1500))).await;
    let text = config(&backend, "", &path());
    let mut old = Sluice::with(&text, &[]);
    keep(&old, "/x").await;
    keep(&old, "/other").await;
    let changing = change(&old, &value).await;
    let new = Sluice::at(&text, old.address, old.admin, &["--take-over"]);
    assert!(!changing.is_finished(), "it takes longer than taking over");
    let address = new.address;
    // What the new one has of its own, and what it was left, is void alike.
    let served = || async move { get(address, "/x", &[]).await };
    until("it was left", || async { served().await.cache_status().contains("; hit") }).await;
    assert_eq!(changing.await.unwrap(), Some(200));
    assert_eq!(served().await.text(), "1");
    assert!(new.get("/other").await.cache_status().contains("; hit"), "what nobody changed is there");
    ends(&mut old).await;
    assert!(new.get("/other").await.cache_status().contains("; hit"), "also after its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_at_either_process_hold_at_both_while_one_takes_over() {
    let (backend, value) = counting(None).await;
    let text = config(&backend, "", &path());
    let purge = format!("POST /purge?tag=t HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    for by_old in [true, false] {
        let mut is_seen = false;
        // An idle connection may bring one more request within a second of the end: where that is over, it is tried again.
        for _ in 0..30 {
            let mut old = Sluice::with(&text, &[]);
            keep(&old, "/x").await;
            let mut to_old = Connection::open(if by_old { old.admin } else { old.address }).await;
            assert!(to_old.ask("GET", "/livez", &[], b"").await.status < 300);
            let new = Sluice::at(&text, old.address, old.admin, &["--take-over"]);
            value.fetch_add(1, Ordering::SeqCst);
            let answer = if by_old {
                to_old.send(purge.as_bytes()).await;
                let purged = to_old.answer(false).await;
                let answer = new.get("/x").await;
                purged.map(|_| answer)
            } else {
                assert!(new.manage("/purge?tag=t").await.status < 300);
                to_old.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n").await;
                to_old.answer(false).await
            };
            drop(to_old);
            ends(&mut old).await;
            if let Some(answer) = answer {
                assert_eq!(answer.text(), value.load(Ordering::SeqCst).to_string(), "{}", answer.cache_status());
                is_seen = true;
                break;
            }
        }
        assert!(is_seen, "the old process never answered in time");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_reads_what_it_wrote_through_restarts_under_load() {
    let values: Arc<[AtomicUsize; 4]> = Arc::default();
    let counting = Arc::clone(&values);
    let backend = Backend::start(move |asked| {
        let value = &counting[asked.target[1..].parse::<usize>().unwrap()];
        let value = if asked.method == "GET" { value.load(Ordering::SeqCst) } else { value.fetch_add(1, Ordering::SeqCst) + 1 };
        [vec![Step::Delay(Duration::from_millis(fastrand::u64(..3)))], ok("", value.to_string().as_bytes())].into_iter().flatten().collect()
    })
    .await;
    let text = config(&backend, "", &path());
    let mut sluice = Sluice::with(&text, &[]);
    let (address, rounds, stop) = (sluice.address, Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let mut clients = JoinSet::new();
    for client in 0..4 {
        let (rounds, stop) = (Arc::clone(&rounds), Arc::clone(&stop));
        clients.spawn(async move {
            let target = format!("/{client}");
            // Of two connections either process may have either.
            let mut open: [Option<Connection>; 2] = [None, None];
            while !stop.load(Ordering::SeqCst) {
                let mut said = [0_usize; 2];
                for (method, at) in [("POST", 0), ("GET", 1)] {
                    let mut connection = match open[at].take() {
                        Some(connection) => connection,
                        None => Connection::open(address).await,
                    };
                    let request = format!("{method} {target} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
                    if connection.0.get_mut().write_all(request.as_bytes()).await.is_err() {
                        break;
                    }
                    // One that was idle for long when its process ended is closed instead.
                    let Some(answer) = connection.answer(false).await else { break };
                    said[at] = answer.text().parse().unwrap();
                    open[at] = (answer.field("connection") != Some("close")).then_some(connection);
                    assert!(at == 0 || said[1] >= said[0], "{target}: {said:?} {}", answer.cache_status());
                }
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    for _ in 0..6 {
        let from = rounds.load(Ordering::SeqCst);
        until("rounds go on", || async { rounds.load(Ordering::SeqCst) >= from + 50 }).await;
        sluice = replace(sluice, &text).await;
    }
    stop.store(true, Ordering::SeqCst);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dies_while_it_hands_over_leaves_nothing_that_it_may_have_changed() {
    let (backend, value) = counting(None).await;
    let text = config(&backend, "", &path());
    let mut old = Sluice::with(&text, &[]);
    keep(&old, "/x").await;
    let changing = change(&old, &value).await;
    let new = Sluice::at(&text, old.address, old.admin, &["--take-over"]);
    until("it was left", || async { new.get("/x").await.cache_status().contains("; hit") }).await;
    old.process.signal("KILL");
    old.process.child.wait().unwrap();
    until("it is asked for again", || async { new.get("/x").await.text() == "1" }).await;
    assert!(new.logged().contains("ended without a word"));
    assert_eq!(changing.await.unwrap(), None);
}

/// As systemd starts a service with a socket of its own: it is open already, as the third descriptor.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_systemd_opened_is_served_and_stays_open_while_nobody_serves() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let start = || {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_sluice")]);
        command.stdin(std::os::fd::OwnedFd::from(socket.try_clone().unwrap()));
        Sluice::run(&config(&backend, "", ""), &[], command, &["--admin-listen", "127.0.0.1:0"])
    };
    let mut old = start();
    assert_eq!((old.address, old.get("/x").await.status), (address, 200));
    old.process.signal("TERM");
    ends(&mut old).await;
    // Whoever connects meanwhile is served by the next one.
    let waiting = tokio::spawn(async move { get(address, "/y", &[]).await.status });
    let new = start();
    assert_eq!((waiting.await.unwrap(), new.get("/x").await.status), (200, 200));
}
