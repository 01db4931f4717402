//! Redis fails in every way there is; requests go on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::relay::Relay;
use crate::support::{Backend, Connection, Redis, Sluice, ok, one_rule, until};

async fn over(redis: &str) -> (Backend, Sluice) {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::over_redis(backend.address, redis, "");
    (backend, sluice)
}

/// Clients that ask for ten URLs over and over, and must always get the right answer.
struct Load {
    asked: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(address: SocketAddr) -> Self {
        let (asked, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let clients = (0..8)
            .map(|client| {
                let (asked, stop) = (Arc::clone(&asked), Arc::clone(&stop));
                tokio::spawn(async move {
                    let mut connection = Connection::open(address).await;
                    for number in client.. {
                        let target = format!("/{}", number % 10);
                        let answer = connection.ask("GET", &target, &[], b"").await;
                        assert_eq!((answer.status, answer.text()), (200, target));
                        asked.fetch_add(1, Ordering::SeqCst);
                        if stop.load(Ordering::SeqCst) {
                            return;
                        }
                    }
                })
            })
            .collect();
        Self { asked, stop, clients }
    }

    async fn more(&self, count: usize) {
        let from = self.asked.load(Ordering::SeqCst);
        until("requests go on", || async { self.asked.load(Ordering::SeqCst) >= from + count }).await;
    }

    async fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

async fn hits(sluice: &Sluice) -> f64 {
    sluice.metric("requests_total", &["outcome=\"hit\""]).await
}

async fn hits_grow(sluice: &Sluice) {
    let before = hits(sluice).await;
    until("hits from Redis", || async { hits(sluice).await > before }).await;
}

async fn is_out_of_the_way(sluice: &Sluice) {
    until("Redis is out of the way", || async { sluice.metric("breaker_open", &["of=\"redis\""]).await == 1.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_restarted_under_load() {
    let redis = Redis::start(&[]).await;
    let (_backend, sluice) = over(&redis.url()).await;
    let load = Load::start(sluice.address);
    hits_grow(&sluice).await;
    let redis = redis.restart().await;
    load.more(200).await;
    hits_grow(&sluice).await;
    load.end().await;
    drop(redis);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_and_continued_under_load() {
    let redis = Redis::start(&[]).await;
    let (_backend, sluice) = over(&redis.url()).await;
    let load = Load::start(sluice.address);
    hits_grow(&sluice).await;
    redis.process.signal("STOP");
    is_out_of_the_way(&sluice).await;
    load.more(500).await;
    redis.process.signal("CONT");
    hits_grow(&sluice).await;
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_at_the_start_and_there_later() {
    let redis = Redis::start(&[]).await;
    let (port, url) = (redis.port, redis.url());
    drop(redis);
    let (_backend, sluice) = over(&url).await;
    assert_eq!(sluice.get("/1").await.text(), "/1");
    is_out_of_the_way(&sluice).await;
    let _redis = Redis::on(port, Vec::new()).await;
    let load = Load::start(sluice.address);
    hits_grow(&sluice).await;
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_it_still_answers_what_it_holds() {
    let redis = Redis::start(&["--maxmemory-policy", "noeviction"]).await;
    let (_backend, sluice) = over(&redis.url()).await;
    until("an entry is in Redis", || async { sluice.get("/1").await.cache_status().contains("hit") }).await;
    redis.command(&[b"CONFIG", b"SET", b"maxmemory", b"1"]).await;
    until("a write is refused", || async {
        assert_eq!(sluice.get("/2").await.text(), "/2");
        sluice.metric("store_errors_total", &["kind=\"refused_write\""]).await > 0.0
    })
    .await;
    assert!(sluice.get("/1").await.cache_status().contains("hit"), "reads go on");
    redis.command(&[b"CONFIG", b"SET", b"maxmemory", b"0"]).await;
    until("writes go on", || async { sluice.get("/2").await.cache_status().contains("hit") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_it_still_answers_what_it_holds() {
    let redis = Redis::start(&[]).await;
    let (_backend, sluice) = over(&redis.url()).await;
    until("an entry is in Redis", || async { sluice.get("/1").await.cache_status().contains("hit") }).await;
    redis.command(&[b"CONFIG", b"SET", b"replica-serve-stale-data", b"yes"]).await;
    redis.command(&[b"REPLICAOF", b"127.0.0.1", b"1"]).await;
    until("a write is refused", || async {
        assert_eq!(sluice.get("/2").await.text(), "/2");
        sluice.metric("store_errors_total", &["kind=\"refused_write\""]).await > 0.0
    })
    .await;
    assert!(sluice.get("/1").await.cache_status().contains("hit"), "reads go on");
    redis.command(&[b"REPLICAOF", b"NO", b"ONE"]).await;
    until("writes go on", || async { sluice.get("/2").await.cache_status().contains("hit") }).await;
}

/// Two hundred answers that are in Redis, which stay hits while `meanwhile` happens.
async fn hits_of_others_stay_hits(redis: &Redis, max_object: &str, meanwhile: impl AsyncFnOnce(&Sluice)) {
    let backend = Backend::start(|asked| match asked.target.strip_prefix("/large") {
        // Nothing that packs well.
        Some(_) => {
            let mut random = fastrand::Rng::with_seed(7);
            ok("", &(0..4 << 20).map(|_| random.u8(..)).collect::<Vec<u8>>())
        }
        None => ok("", asked.target.as_bytes()),
    })
    .await;
    let sluice = Sluice::over_redis(backend.address, &redis.url(), &format!("redis_timeout='1s'\nmax_object='{max_object}'"));
    for number in 0..200 {
        let target = format!("/{number}");
        until("it is in Redis", || async { sluice.get(&target).await.cache_status().contains("hit") }).await;
    }
    let misses = async || sluice.metric("requests_total", &["outcome=\"miss\"", "status=\"200\""]).await;
    meanwhile(&sluice).await;
    let before = misses().await;
    let mut connection = Connection::open(sluice.address).await;
    for number in 0..200 {
        let answer = connection.ask("GET", &format!("/{number}"), &[], b"").await;
        assert!(answer.cache_status().contains("hit"), "/{number}: {}", answer.cache_status());
    }
    assert_eq!(misses().await, before);
    assert_eq!(sluice.metric("breaker_open", &["of=\"redis\""]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_redis_does_not_take_breaks_nothing_else() {
    let redis = Redis::start(&["--proto-max-bulk-len", "1mb"]).await;
    hits_of_others_stay_hits(&redis, "16MiB", async |sluice| {
        for number in 0..3 {
            assert_eq!(sluice.get(&format!("/large/{number}")).await.body.len(), 4 << 20);
        }
        until("it is refused", || async { sluice.metric("store_errors_total", &["op=\"write\""]).await >= 3.0 }).await;
        assert!(sluice.metric("store_errors_total", &["kind=\"too_large\""]).await >= 1.0, "it is not tried again");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_type_is_a_miss_alone() {
    let redis = Redis::start(&[]).await;
    hits_of_others_stay_hits(&redis, "16MiB", async |sluice| {
        until("it is in Redis", || async { sluice.get("/typed").await.cache_status().contains("hit") }).await;
        let all = redis.keys().await;
        let mut values = Vec::new();
        for key in &all {
            values.push(redis.command(&[b"STRLEN", key.as_bytes()]).await);
        }
        // Whichever it is: each is made a list, asked for, and made what it was.
        let key = all.iter().zip(&values).max_by_key(|(_, length)| length.len()).map(|(key, _)| key.clone()).unwrap();
        let kept = redis.command(&[b"RENAME", key.as_bytes(), b"kept"]).await;
        assert!(kept.starts_with(b"+OK"), "{kept:?}");
        redis.command(&[b"RPUSH", key.as_bytes(), b"x"]).await;
        for number in 0..200 {
            assert_eq!(sluice.get(&format!("/{number}")).await.status, 200);
        }
        sluice.get("/typed").await;
        assert!(sluice.metric("store_errors_total", &["kind=\"refused\""]).await >= 1.0);
        redis.command(&[b"RENAME", b"kept", key.as_bytes()]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_redis_ends_cost_no_miss() {
    let redis = Redis::start(&["--timeout", "1"]).await;
    hits_of_others_stay_hits(&redis, "16MiB", async |sluice| {
        // Longer than Redis lets a connection be idle.
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        assert!(sluice.get("/1").await.cache_status().contains("hit"));
        redis.command(&[b"CLIENT", b"KILL", b"TYPE", b"normal", b"SKIPME", b"yes"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_large_has_time_by_its_size_and_holds_up_nothing_else() {
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/large" => {
            let mut random = fastrand::Rng::with_seed(7);
            ok("", &(0..2 << 20).map(|_| random.u8(..)).collect::<Vec<u8>>())
        }
        target => ok("", target.as_bytes()),
    })
    .await;
    // What is large takes half a second here, what is not a tenth of its deadline.
    let relay = Relay::slow(redis.port, 4 << 20).await;
    let sluice = Sluice::over_redis(backend.address, &relay.url(), "redis_timeout='300ms'\nmax_object='16MiB'");
    for target in ["/large", "/small"] {
        until("it is a hit from Redis", || async { sluice.get(target).await.cache_status().contains("hit") }).await;
    }
    let count = backend.count();
    let beside = async {
        let mut connection = Connection::open(sluice.address).await;
        for _ in 0..100 {
            let answer = connection.ask("GET", "/small", &[], b"").await;
            assert!(answer.cache_status().contains("hit"), "{}", answer.cache_status());
        }
    };
    let large = async {
        for _ in 0..3 {
            let answer = sluice.get("/large").await;
            assert!(answer.cache_status().contains("hit") && answer.body.len() == 2 << 20, "{}", answer.cache_status());
        }
    };
    tokio::join!(beside, large);
    assert_eq!(backend.count(), count);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_are_written_though_redis_ended_their_connection() {
    let redis = Redis::start(&["--timeout", "1"]).await;
    hits_of_others_stay_hits(&redis, "16MiB", async |sluice| {
        for number in 0..3 {
            // The connection for large values is idle for longer than Redis lets it be.
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
            let target = format!("/large/{number}");
            sluice.get(&target).await;
            until("it is in Redis", || async { sluice.get(&target).await.cache_status().contains("hit") }).await;
        }
        assert_eq!(sluice.metric("store_errors_total", &["kind=\"too_large\""]).await, 0.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_stand_are_used_while_no_new_ones_can_be_made() {
    let redis = Redis::start(&[]).await;
    hits_of_others_stay_hits(&redis, "16MiB", async |sluice| {
        let list = redis.command(&[b"CLIENT", b"LIST", b"TYPE", b"normal"]).await;
        let list = String::from_utf8_lossy(&list).into_owned();
        let ids = list.lines().filter_map(|line| line.split(' ').find_map(|field| field.strip_prefix("id=")?.parse::<u64>().ok()));
        // The first that was made writes.
        let commands = format!("CONFIG SET maxclients 1\r\nCLIENT KILL ID {}\r\n", ids.min().unwrap());
        TcpStream::connect(("127.0.0.1", redis.port)).await.unwrap().write_all(commands.as_bytes()).await.unwrap();
        until("it is seen", || async { sluice.metric("store_errors_total", &["op=\"connect\""]).await >= 2.0 }).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_or_read_only_at_the_start_it_is_read() {
    for (refuse, allow) in [
        ([&b"CONFIG"[..], b"SET", b"maxmemory", b"1"].to_vec(), [&b"CONFIG"[..], b"SET", b"maxmemory", b"0"].to_vec()),
        ([&b"REPLICAOF"[..], b"127.0.0.1", b"1"].to_vec(), [&b"REPLICAOF"[..], b"NO", b"ONE"].to_vec()),
    ] {
        let redis = Redis::start(&["--maxmemory-policy", "noeviction"]).await;
        let (backend, first) = over(&redis.url()).await;
        until("an entry is in Redis", || async { first.get("/1").await.cache_status().contains("hit") }).await;
        drop(first);
        redis.command(&refuse).await;
        let sluice = Sluice::over_redis(backend.address, &redis.url(), "");
        until("it is read", || async { sluice.get("/1").await.cache_status().contains("hit") }).await;
        assert_eq!(backend.count_of("/2"), 0);
        redis.command(&allow).await;
        until("writes go on", || async { sluice.get("/2").await.cache_status().contains("hit") }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn evicting_is_a_miss() {
    let redis = Redis::start(&[]).await;
    let (backend, sluice) = over(&redis.url()).await;
    until("an entry is in Redis", || async { sluice.get("/1").await.cache_status().contains("hit") }).await;
    let before = backend.count();
    redis.command(&[b"FLUSHALL"]).await;
    assert_eq!(sluice.get("/1").await.cache_status(), "sluice; fwd=uri-miss; stored");
    assert_eq!(backend.count(), before + 1);
}

/// A server that answers everything with these bytes.
async fn speaking(nonsense: &'static [u8]) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                while matches!(stream.read(&mut buffer).await, Ok(1..)) {
                    let _ = stream.write_all(nonsense).await;
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_silence_and_refusals_are_not_in_the_way() {
    for nonsense in [
        &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
        b"",
        b"-NOAUTH Authentication required.\r\n",
        b"-LOADING dataset\r\n",
        b"$-7\r\n",
        b"*99999999\r\n",
    ] {
        let address = speaking(nonsense).await;
        let (_backend, sluice) = over(&format!("redis://{address}/0")).await;
        for _ in 0..5 {
            assert_eq!(sluice.get("/1").await.text(), "/1");
        }
        is_out_of_the_way(&sluice).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_were_swapped_cut_or_changed_are_misses() {
    let redis = Redis::start(&[]).await;
    let (backend, sluice) = over(&redis.url()).await;
    // What was fetched is written after it was answered: a write under way would take a forgery's place.
    let written = || async {
        sluice.get("/1").await;
        sluice.get("/2").await.cache_status().contains("hit") && sluice.get("/1").await.cache_status().contains("hit")
    };
    until("entries are in Redis", written).await;
    let keys = redis.keys().await;
    let value = |raw: Vec<u8>| {
        let start = raw.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        raw[start..raw.len() - 2].to_vec()
    };
    let (one, two) = (value(redis.command(&[b"GET", keys[0].as_bytes()]).await), value(redis.command(&[b"GET", keys[1].as_bytes()]).await));
    let mut flipped = one.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for forged in [two.clone(), one[..one.len() - 1].to_vec(), flipped, b"junk".to_vec(), Vec::new()] {
        redis.command(&[b"SET", keys[0].as_bytes(), &forged]).await;
        redis.command(&[b"SET", keys[1].as_bytes(), &two]).await;
        let before = backend.count();
        for target in ["/1", "/2"] {
            assert_eq!(sluice.get(target).await.text(), target);
        }
        assert_eq!(backend.count(), before + 1, "one of the two was fetched anew");
        until("it is in Redis again", written).await;
    }
    assert_eq!(sluice.metric("store_errors_total", &["kind=\"foreign\""]).await, 1.0);
    assert!(sluice.metric("store_errors_total", &["kind=\"decode"]).await >= 4.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_reads_from_redis_lives_no_longer_than_there() {
    let redis = Redis::start(&[]).await;
    let (backend, first) = over(&redis.url()).await;
    until("an entry is in Redis", || async { first.get("/1").await.cache_status().contains("hit") }).await;
    let key = redis.keys().await.remove(0);
    redis.command(&[b"PEXPIRE", key.as_bytes(), b"100000"]).await;
    let rules = "[[route]]\nname='all'\npath='/*'\nttl='1h'\nkey='all'\n";
    let second = Sluice::ruled(backend.address, &redis.url(), rules).await;
    // Not before it is connected: a miss would be fetched and stored anew, for an hour.
    until("the second is connected", || async { second.get("/health").await.text().contains("Redis connection successful") }).await;
    let said = second.get("/1").await.cache_status().to_owned();
    let left: u64 = said.rsplit('=').next().unwrap().parse().unwrap_or_else(|_| panic!("{said}"));
    assert!(left <= 100, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_expire_in_redis_and_names_are_readable() {
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let rules = "[[route]]\nname='all'\npath='/*'\nttl='10s'\nstale_if_error='20s'\nkey='k:{symbol}'\nfold_case=['symbol']\n";
    let sluice = Sluice::ruled(backend.address, &redis.url(), rules).await;
    until("an entry is in Redis", || async {
        sluice.get("/a?symbol=btc%3Ausdt").await;
        sluice.manage("/purge?pattern=nothing").await;
        !redis.keys().await.is_empty() || sluice.manage("/purge?pattern=*").await.status != 200
    })
    .await;
    let key = redis.keys().await.remove(0);
    assert!(key.starts_with("sluice:k:BTC%3AUSDT#") && key.len() == "sluice:k:BTC%3AUSDT#abcde:".len() + 64, "{key}");
    let life = String::from_utf8(redis.command(&[b"PTTL", key.as_bytes()]).await).unwrap();
    let life: i64 = life.trim().trim_start_matches(':').parse().unwrap();
    assert!((20_000..=30_000).contains(&life), "fresh and stale time together: {life}");
}

/// With a key, what lies in Redis can neither be read nor moved, changed or brought in by others; a new key takes over
/// from an old one.
#[tokio::test(flavor = "multi_thread")]
async fn sealed_entries_are_read_and_forged_by_nobody() {
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|asked| ok("", format!("the words of {}", asked.target).as_bytes())).await;
    let start = async |lines: &str| {
        let text = format!(
            "own.endpoints=true\n[backend]\nurl='http://{}'\n[cache]\nmemory='0B'\nredis_timeout='5s'\nredis='{}'\n{lines}\n{}",
            backend.address,
            redis.url(),
            one_rule("ttl='1h'")
        );
        let sluice = Sluice::with(&text, &[]);
        until("it is connected", || async { sluice.get("/health").await.text().contains("Redis connection successful") }).await;
        sluice
    };
    let (old, new) = ("0a".repeat(32), "0b".repeat(32));
    let first = start(&format!("encryption_key='{old}'")).await;
    for target in ["/1", "/2"] {
        first.get(target).await;
        until("it is kept", || async { first.get(target).await.cache_status().contains("; hit") }).await;
    }
    let keys = redis.keys().await;
    let value = |answer: Vec<u8>| answer[answer.iter().position(|&byte| byte == b'\n').unwrap() + 1..answer.len() - 2].to_vec();
    let (one, two) = (value(redis.command(&[b"GET", keys[0].as_bytes()]).await), value(redis.command(&[b"GET", keys[1].as_bytes()]).await));
    assert!(!one.windows(5).any(|window| window == b"words"), "it can be read");
    let mut flipped = one.clone();
    flipped[40] ^= 1;
    // The position in the log of voids, without which a purge could be undone, is sealed too.
    let mut moved = one.clone();
    moved[15] ^= 1;
    let open = Sluice::ruled(backend.address, &redis.url(), &one_rule("ttl='1h'")).await;
    until("it is connected", || async { open.get("/health").await.text().contains("Redis connection successful") }).await;
    let unsealed = [&one[..16], b"SLX1"].concat();
    for forged in [two.clone(), one[..one.len() - 1].to_vec(), flipped, moved, unsealed, Vec::new()] {
        redis.command(&[b"SET", keys[0].as_bytes(), &forged]).await;
        redis.command(&[b"SET", keys[1].as_bytes(), &two]).await;
        let before = backend.count();
        for target in ["/1", "/2"] {
            assert_eq!(first.get(target).await.text(), format!("the words of {target}"));
        }
        assert_eq!(backend.count(), before + 1, "one of the two was fetched anew");
        until("it is kept again", || async {
            first.get("/1").await.cache_status().contains("; hit") && first.get("/2").await.cache_status().contains("; hit")
        })
        .await;
    }
    assert!(first.metric("store_errors_total", &["kind=\"forged\""]).await >= 3.0);
    assert!(first.metric("store_errors_total", &["kind=\"unsealed\""]).await >= 1.0);
    // Whoever has no key, or another one, has no use for them; whoever has the old one beside the new one reads on.
    assert!(!open.get("/1").await.cache_status().contains("; hit"));
    first.get("/2").await;
    until("it is kept", || async { first.get("/2").await.cache_status().contains("; hit") }).await;
    let second = start(&format!("encryption_key='{new}'\nencryption_key_previous='{old}'")).await;
    assert!(second.get("/2").await.cache_status().contains("; hit"));
    let third = start(&format!("encryption_key='{new}'")).await;
    assert!(!third.get("/2").await.cache_status().contains("; hit"));
    assert!(third.metric("store_errors_total", &["kind=\"unknown_key\""]).await >= 1.0);
}
