//! A new process takes over from the old one: no request fails, and what was in memory is there again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::task::JoinSet;

use crate::support::{Backend, Connection, Redis, Sluice, TOKEN, get, ok, until};

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
