//! Purges and changes over several instances that share a Redis: what was void when a request came is not served, whoever stored
//! it, and whatever becomes of Redis and of messages meanwhile.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::support::relay::Relay;
use crate::support::{Answer, Backend, Connection, Redis, Sluice, TOKEN, get, number, ok, until};

const RULES: &str = "[[route]]\nname='a'\npath='/a/*'\nttl='1h'\nkey='a:{symbol}:{n}'\ntags=['symbol:{symbol}','all']\n\
                     [[route]]\nname='b'\npath='/b/*'\nttl='1h'\nkey='b:{symbol}:{n}'\ntags=['symbol:{symbol}']\n";
const SYMBOLS: [&str; 3] = ["BTC", "ETH", "SOL"];

/// A backend whose answers say how often it was asked so far: later answers have larger numbers.
async fn counting() -> (Backend, Arc<AtomicU64>) {
    let asked = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&asked);
    let backend = Backend::start(move |_| ok("", counting.fetch_add(1, Ordering::SeqCst).to_string().as_bytes())).await;
    (backend, asked)
}

fn over(backend: &Backend, redis: &str) -> Sluice {
    let url = format!("url='http://{}'", backend.address);
    Sluice::with(&format!("own.endpoints=true\n[admin]\ntoken='{TOKEN}'\n[backend]\n{url}\n[cache]\nredis='{redis}'\n{RULES}"), &[])
}

async fn connected(sluice: &Sluice) {
    until("Redis answers", || async {
        sluice.metric("breaker_open", &["of=\"redis\""]).await == 0.0 && sluice.logged().contains("Redis answers")
    })
    .await;
}

/// One of eighteen targets, with its rule, symbol and number.
fn pick(random: &mut fastrand::Rng) -> (String, &'static str, &'static str, u8) {
    let (rule, symbol, number) = (["a", "b"][random.usize(..2)], SYMBOLS[random.usize(..3)], random.u8(..3));
    (format!("/{rule}/x?symbol={symbol}&n={number}"), rule, symbol, number)
}

/// Whatever is served must have been asked for after the newest void that concerns it.
#[derive(Default)]
struct Truth(HashMap<String, u64>);

impl Truth {
    fn void(&mut self, now: u64, concerns: impl Fn(&str, &str, u8) -> bool) {
        for rule in ["a", "b"] {
            for symbol in SYMBOLS {
                for number in 0..3 {
                    if concerns(rule, symbol, number) {
                        self.0.insert(format!("/{rule}/x?symbol={symbol}&n={number}"), now);
                    }
                }
            }
        }
    }

    fn check(&self, target: &str, answer: &Answer, when: &str) {
        let (served, least) = (answer.text().parse::<u64>().unwrap(), self.0.get(target).copied().unwrap_or(0));
        assert!(served >= least, "{when}: {target}: answer {served} is from before {least}; {}", answer.cache_status());
    }
}

/// A purge or change of a random kind through `sluice`.
async fn void(random: &mut fastrand::Rng, sluice: &Sluice, truth: &mut Truth, asked: &AtomicU64) {
    let (target, rule, symbol, number) = pick(random);
    let now = match random.u8(..5) {
        0 => {
            let now = asked.load(Ordering::SeqCst);
            assert!(sluice.manage(&format!("/purge?symbol={symbol}")).await.status < 300);
            truth.void(now, |_, other, _| other == symbol);
            return;
        }
        1 => {
            let now = asked.load(Ordering::SeqCst);
            assert!(sluice.manage(&format!("/purge?pattern={rule}:{symbol}:*")).await.status < 300);
            truth.void(now, |r, s, _| r == rule && s == symbol);
            return;
        }
        2 => {
            let now = asked.load(Ordering::SeqCst);
            assert!(sluice.manage("/purge?tag=all").await.status < 300);
            truth.void(now, |rule, _, _| rule == "a");
            return;
        }
        3 => {
            let now = asked.load(Ordering::SeqCst);
            let field = format!("Bearer {TOKEN}");
            let mut open = Connection::open(sluice.address).await;
            let answer = open.ask("POST", &format!("/api/cache/invalidate/symbol/{symbol}"), &[("Authorization", &field)], b"").await;
            assert_eq!(answer.status, 200);
            truth.void(now, |_, other, _| other == symbol);
            return;
        }
        _ => {
            // What the change itself is answered with is not stored.
            let now = asked.load(Ordering::SeqCst);
            let answer = Connection::open(sluice.address).await.ask("DELETE", &target, &[], b"").await;
            assert_eq!(answer.status, 200);
            now
        }
    };
    truth.void(now, |r, s, n| (r, s, n) == (rule, symbol, number));
}

#[tokio::test(flavor = "multi_thread")]
async fn random_purges_changes_and_fills_over_two_instances_serve_nothing_void() {
    let (backend, asked) = counting().await;
    let mut redis = Redis::start(&[]).await;
    let sluices = [over(&backend, &redis.url()), over(&backend, &redis.url())];
    for sluice in &sluices {
        connected(sluice).await;
    }
    let mut random = fastrand::Rng::with_seed(number("SLUICE_SEED", 11));
    let mut truth = Truth::default();
    let mut open = [Connection::open(sluices[0].address).await, Connection::open(sluices[1].address).await];
    let steps = number("SLUICE_INTERLEAVINGS", 1000);
    let (mut hits, mut away) = (0, 0);
    for step in 0..steps {
        let at = random.usize(..2);
        match random.u16(..1000) {
            0..30 => {
                void(&mut random, &sluices[at], &mut truth, &asked).await;
                // The other one knows within a second; this one, at once.
                let (target, ..) = pick(&mut random);
                truth.check(&target, &open[at].ask("GET", &target, &[], b"").await, "at once");
                settle(&sluices, &redis).await;
            }
            30..35 => {
                // Messages are lost: the subscriptions are cut off.
                redis.command(&[b"CLIENT", b"KILL", b"TYPE", b"pubsub"]).await;
                void(&mut random, &sluices[at], &mut truth, &asked).await;
                settle(&sluices, &redis).await;
            }
            35..37 => {
                // Redis dies, with all that it holds or without; something is voided while it is away.
                away += 1;
                let port = redis.port;
                drop(redis);
                until("it is noticed", || async {
                    for open in &mut open_again(&sluices).await {
                        open.ask("GET", &format!("/b/x?symbol=BTC&n={}", fastrand::u32(10..)), &[], b"").await;
                    }
                    let mut down = true;
                    for sluice in &sluices {
                        down &= sluice.metric("breaker_open", &["of=\"redis\""]).await == 1.0;
                    }
                    down
                })
                .await;
                void(&mut random, &sluices[at], &mut truth, &asked).await;
                let (target, ..) = pick(&mut random);
                truth.check(&target, &open[at].ask("GET", &target, &[], b"").await, "while Redis is away");
                redis = Redis::on(port, Vec::new()).await;
                for sluice in &sluices {
                    until("Redis is back", || async { sluice.metric("breaker_open", &["of=\"redis\""]).await == 0.0 }).await;
                }
                settle(&sluices, &redis).await;
            }
            _ => {
                let (target, ..) = pick(&mut random);
                let answer = open[at].ask("GET", &target, &[], b"").await;
                truth.check(&target, &answer, &format!("step {step}, instance {at}"));
                hits += u64::from(answer.cache_status().contains("hit"));
            }
        }
    }
    assert!(hits * 2 > steps, "{hits} hits of {steps}");
    assert!(away > 0 || steps < 1000);
}

async fn open_again(sluices: &[Sluice; 2]) -> [Connection; 2] {
    [Connection::open(sluices[0].address).await, Connection::open(sluices[1].address).await]
}

/// Waits until both know all that the log in Redis has, and nothing waits for it.
async fn settle(sluices: &[Sluice; 2], redis: &Redis) {
    until("both know what the log has", || async {
        let head = String::from_utf8(redis.command(&[b"HMGET", b"sluice!voids", b"epoch", b"seq"]).await).unwrap();
        let mut settled = true;
        for sluice in sluices {
            let page: serde_json::Value = serde_json::from_slice(&get(sluice.admin, "/stats", &[]).await.body).unwrap();
            let said: Vec<&str> = head.lines().filter(|line| !line.starts_with(['*', '$'])).collect();
            let known = [page["voids"]["epoch"].as_str().unwrap().to_owned(), page["voids"]["seq"].to_string()];
            settled &= page["voids"]["waiting"] == 0
                && page["breakers"]["redis"] == "closed"
                && (said == known || (said.len() == 1 && known[1] == "0"));
        }
        settled
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_reaches_the_other_instance_within_a_second_and_fills_under_way_too() {
    let slow = Arc::new(Mutex::new(Duration::ZERO));
    let delay = Arc::clone(&slow);
    let backend = Backend::start(move |asked| {
        let mut steps = vec![crate::support::Step::Delay(*delay.lock().unwrap())];
        steps.extend(ok("", asked.target.as_bytes()));
        steps
    })
    .await;
    let redis = Redis::start(&[]).await;
    let (one, two) = (over(&backend, &redis.url()), over(&backend, &redis.url()));
    connected(&one).await;
    connected(&two).await;
    let hit = |sluice: &Sluice| {
        let address = sluice.address;
        async move { get(address, "/a/x?symbol=BTC&n=1", &[]).await.cache_status().contains("hit") }
    };
    until("both have it", || async { hit(&one).await && hit(&two).await }).await;
    assert_eq!(one.manage("/purge?symbol=BTC").await.text(), "{\"purged\":1}");
    let began = Instant::now();
    until("the other one asks again", || async { !hit(&two).await }).await;
    assert!(began.elapsed() < Duration::from_secs(1));
    // Softly: stale, and refreshed behind the client's back, on both.
    until("both have it", || async { hit(&one).await && hit(&two).await }).await;
    // A fetch that is under way at one instance while the other one purges.
    *slow.lock().unwrap() = Duration::from_millis(700);
    let before = backend.count();
    let address = two.address;
    let filling = tokio::spawn(async move { get(address, "/a/x?symbol=ETH&n=1", &[]).await });
    until("it is under way", || async { backend.count() > before }).await;
    assert!(one.manage("/purge?symbol=ETH").await.status < 300);
    until("the other one knows", || async { log_seq(&two).await == log_seq(&one).await }).await;
    assert_eq!(filling.await.unwrap().status, 200);
    *slow.lock().unwrap() = Duration::ZERO;
    let again = two.get("/a/x?symbol=ETH&n=1").await;
    assert!(!again.cache_status().contains("hit"), "{}", again.cache_status());
}

async fn log_seq(sluice: &Sluice) -> u64 {
    let page: serde_json::Value = serde_json::from_slice(&get(sluice.admin, "/stats", &[]).await.body).unwrap();
    page["voids"]["seq"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_starts_later_or_was_away_knows_what_was_voided() {
    let (backend, _) = counting().await;
    let redis = Redis::start(&[]).await;
    let one = over(&backend, &redis.url());
    connected(&one).await;
    let first = one.get("/a/x?symbol=BTC&n=1").await.text();
    until("it is in Redis", || async { redis.keys().await.len() == 1 }).await;
    // Softly, so that it stays in Redis: only the log says that it is stale.
    assert_eq!(one.manage("/purge?symbol=BTC&soft=true").await.text(), "{\"purged\":1}");
    assert_eq!(redis.keys().await.len(), 1);
    let late = over(&backend, &redis.url());
    connected(&late).await;
    let answer = late.get("/a/x?symbol=BTC&n=1").await;
    assert!(!answer.cache_status().contains("hit; ttl=3"), "{}", answer.cache_status());
    until("a newer one", || async { late.get("/a/x?symbol=BTC&n=1").await.text() != first }).await;
    // Hard: it leaves Redis, and its number says how many there were.
    until("it is in Redis again", || async {
        assert!(one.manage("/purge?pattern=nothing").await.status < 300);
        redis.keys().await.len() == 1
    })
    .await;
    one.manage("/purge?symbol=BTC").await;
    until("it left Redis", || async { redis.keys().await.is_empty() }).await;
    let number = log_seq(&one).await;
    until("any instance knows", || async { get(late.admin, &format!("/purge?number={number}"), &[]).await.text() == "{\"purged\":1}" })
        .await;
    // A log that nobody works off begins anew, and purges reach everybody all the same.
    let fill = "for i = 1, 100000 do redis.call('ZADD', KEYS[1], i, i .. ' {\"what\":{\"tag\":\"none\"}}') end";
    redis.command(&[b"EVAL", fill.as_bytes(), b"1", b"sluice!voids:log"]).await;
    connected(&one).await;
    connected(&late).await;
    until("both have it", || async {
        one.get("/a/x?symbol=BTC&n=1").await;
        late.get("/a/x?symbol=BTC&n=1").await.cache_status().contains("hit")
    })
    .await;
    assert!(one.manage("/purge?symbol=BTC").await.status < 300);
    until("the other one asks again", || async { !late.get("/a/x?symbol=BTC&n=1").await.cache_status().contains("hit") }).await;
    // Other keys of that Redis are not touched.
    redis.command(&[b"SET", b"sluice2:a:BTC:1", b"x"]).await;
    one.manage("/purge?pattern=*").await;
    assert_eq!(redis.keys().await, ["sluice2:a:BTC:1"]);
}

/// The million keys of the issue by hand (`SLUICE_VOID_KEYS=1000000`); fewer otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn a_purge_of_very_many_keys_reads_no_body_and_holds_nobody_up() {
    let keys = number("SLUICE_VOID_KEYS", 100_000);
    let (backend, _) = counting().await;
    let redis = Redis::start(&[]).await;
    let sluice = over(&backend, &redis.url());
    connected(&sluice).await;
    sluice.get("/a/x?symbol=BTC&n=1").await;
    until("it is in Redis", || async { redis.keys().await.len() == 1 }).await;
    // As many more as are wanted, a tenth of them of that symbol, made from those of one entry.
    let name = redis.keys().await.remove(0);
    let script = "local stamp = redis.call('GET', KEYS[1]) local name, of, other = ARGV[1], tonumber(ARGV[2]), ARGV[3] \
                  for i = 1, of do local n = i % 10 == 0 and name or other \
                  redis.call('SET', n .. string.format('%064x', i), stamp, 'PX', 3600000) end return of";
    let stem = &name[..name.len() - 64];
    // The marks are those of the target, the symbol and the other tag.
    let marks = stem.find('#').unwrap() + 1;
    let other = format!("{}zzzzz{}", stem[..marks + 5].replace("BTC", "ETH"), &stem[marks + 10..]);
    for part in 0..keys / 1000 {
        let script = script.replace("string.format('%064x', i)", &format!("string.format('%064x', i + {})", part * 1000));
        redis.command(&[b"EVAL", script.as_bytes(), b"1", name.as_bytes(), stem.as_bytes(), b"1000", other.as_bytes()]).await;
    }
    let reads = |text: Vec<u8>| {
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find(|line| line.starts_with("cmdstat_get:")).map(str::to_owned);
        line.and_then(|line| line.split(['=', ',']).nth(1)?.parse::<u64>().ok()).unwrap_or(0)
    };
    connected(&sluice).await;
    redis.command(&[b"CONFIG", b"RESETSTAT"]).await;
    let began = Instant::now();
    let size = async || redis.command(&[b"DBSIZE"]).await;
    let whole = size().await;
    let interrupted = async {
        // Redis falls silent half-way: what was removed before that is not forgotten.
        if keys <= 100_000 {
            until("some are gone", || async { size().await != whole }).await;
            redis.command(&[b"CLIENT", b"PAUSE", b"500"]).await;
        }
    };
    let (answer, ()) = tokio::join!(sluice.manage("/purge?symbol=BTC"), interrupted);
    assert!(began.elapsed() < Duration::from_secs(if keys > 100_000 { 2 } else { 60 }), "{:?}", began.elapsed());
    assert!(answer.status == 200 || answer.status == 202, "{}", answer.text());
    let number = log_seq(&sluice).await;
    let times = Mutex::new(Vec::new());
    until("all are gone", || async {
        let asked = Instant::now();
        redis.command(&[b"PING"]).await;
        let took = asked.elapsed();
        let said: serde_json::Value =
            serde_json::from_slice(&get(sluice.admin, &format!("/purge?number={number}"), &[]).await.body).unwrap();
        times.lock().unwrap().push(took);
        said["purged"].as_u64() == Some(keys / 10 + 1)
    })
    .await;
    let stats = redis.command(&[b"INFO", b"commandstats"]).await;
    // Its own lock is looked at now and then.
    let read = reads(stats);
    assert!(read < keys / 5000 + 20, "{read} bodies are read");
    let mut times = times.into_inner().unwrap();
    times.sort_unstable();
    eprintln!("{keys} keys: answered in {:?}, other calls p99 {:?} of {}", began.elapsed(), times[times.len() * 99 / 100], times.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_gets_past_what_is_large_and_holds_no_write_up() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/large" => {
            let mut random = fastrand::Rng::with_seed(7);
            ok("", &(0..4 << 20).map(|_| random.u8(..)).collect::<Vec<u8>>())
        }
        target => ok("", target.as_bytes()),
    })
    .await;
    let redis = Redis::start(&[]).await;
    // What is large takes a second here, more than a write may.
    let relay = Relay::slow(redis.port, 4 << 20).await;
    // So many tags stand in no name: the entry is read to know what concerns it.
    let rules = "[[route]]\nname='all'\npath='/*'\nttl='1h'\nkey='all'\ntags=['1','2','3','4','5','6','7','8','9']\n";
    let cache = format!("[cache]\nmemory='0B'\nmax_object='16MiB'\nredis_timeout='50ms'\nredis='{}'", relay.url());
    let sluice = Sluice::with(&format!("[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n{cache}\n{rules}", backend.address), &[]);
    connected(&sluice).await;
    until("it is in Redis", || async { sluice.get("/large").await.cache_status().contains("hit") }).await;
    let writes_late = async || sluice.metric("store_errors_total", &["op=\"write\"", "kind=\"timeout\""]).await;
    let late = writes_late().await;
    assert!(sluice.manage("/purge?tag=another").await.status < 300);
    let head: [&[u8]; 3] = [b"HGET", b"sluice!voids", b"swept"];
    until("Redis is swept", || async {
        let number = fastrand::u32(..);
        assert_eq!(sluice.get(&format!("/{number}")).await.status, 200);
        redis.command(&head).await.ends_with(b"1\r\n")
    })
    .await;
    assert_eq!(writes_late().await, late);
    let mut sizes = Vec::new();
    for key in redis.keys().await {
        let said = redis.command(&[b"STRLEN", key.as_bytes()]).await;
        sizes.push(std::str::from_utf8(&said[1..]).unwrap().trim().parse::<u64>().unwrap_or(0));
    }
    assert!(sizes.iter().any(|&size| size > 1 << 20), "it was not concerned: {sizes:?}");
    assert!(sluice.manage("/purge?tag=9").await.status < 300);
    until("it is removed", || async { redis.keys().await.is_empty() }).await;
}
