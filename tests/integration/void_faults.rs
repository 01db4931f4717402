//! What is void stays void whatever becomes of Redis: full, read-only, emptied, evicting, gone on from an older state, out of reach.
//! The protocol itself is driven through many more interleavings by the simulator in `cache::void`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::relay::Relay;
use crate::support::{Backend, Connection, Redis, Sluice, Step, TOKEN, get, ok, until};

const RULES: &str = "[[route]]\nname='a'\npath='/a/*'\nttl='1h'\nkey='a:{symbol}'\ntags=['symbol:{symbol}']\n\
                     [[route]]\nname='slow'\npath='/slow/*'\nttl='1h'\nkey='slow:{symbol}'\ntags=['symbol:{symbol}']\n";
const TARGET: &str = "/a/x?symbol=BTC";

/// A backend that says how often it was asked so far, and takes a while for `/slow/`.
async fn counting() -> (Backend, Arc<AtomicU64>) {
    let asked = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&asked);
    let backend = Backend::start(move |request| {
        let mut steps = Vec::new();
        let answer = ok("", counting.fetch_add(1, Ordering::SeqCst).to_string().as_bytes());
        if request.target.starts_with("/slow/") {
            steps.push(Step::Delay(Duration::from_millis(600)));
        }
        steps.extend(answer);
        steps
    })
    .await;
    (backend, asked)
}

async fn over(backend: &Backend, redis: &str) -> Sluice {
    let sluice = Sluice::with(
        &format!("[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis='{redis}'\n{RULES}", backend.address),
        &[],
    );
    connected(&sluice, 1).await;
    sluice
}

/// Waits until an instance has connected to Redis this many times.
async fn connected(sluice: &Sluice, times: usize) {
    until("Redis answers", || async { sluice.logged().matches("Redis answers").count() >= times }).await;
}

/// Has an instance store the target, and says which answer it has.
async fn keep(sluice: &Sluice) -> u64 {
    until("it is stored", || async { sluice.get(TARGET).await.cache_status().contains("hit") }).await;
    sluice.get(TARGET).await.text().parse().unwrap()
}

async fn purge(sluice: &Sluice) -> String {
    let answer = sluice.manage("/purge?symbol=BTC").await;
    assert!(answer.status < 300, "{}", answer.text());
    answer.text()
}

/// The next answers are all from after the purge.
async fn serves_nothing_before(sluice: &Sluice, old: u64, when: &str) {
    for _ in 0..5 {
        let answer = sluice.get(TARGET).await;
        assert!(answer.text().parse::<u64>().unwrap() > old, "{when}: {} {}", answer.text(), answer.cache_status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_after_a_purge_or_a_change_joins_no_fetch_from_before() {
    let (backend, _) = counting().await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for (number, how) in ["/purge?symbol=S", "/purge?pattern=slow:*", "/purge?tag=symbol:S", "/purge?symbol=S&soft=true", "POST", "DELETE"]
        .into_iter()
        .enumerate()
    {
        let target = format!("/slow/{number}?symbol=S{number}");
        let how = how.replace("=S", &format!("=S{number}")).replace("symbol:S", &format!("symbol:S{number}"));
        let (address, asked) = (sluice.address, target.clone());
        let before = backend.count_of(&target);
        let first = tokio::spawn(async move { get(address, &asked, &[]).await });
        until("the fetch is under way", || async { backend.count_of(&target) > before }).await;
        match how.strip_prefix('/') {
            Some(_) => assert!(sluice.manage(&how).await.status < 300),
            None => assert_eq!(Connection::open(address).await.ask(&how, &target, &[], b"").await.status, 200),
        }
        let second = sluice.get(&target).await;
        let first = first.await.unwrap();
        let [old, new] = [&first, &second].map(|answer| answer.text().parse::<u64>().unwrap());
        assert!(new > old, "{how}: {old}, then {new}: {}", second.cache_status());
        // Nor does what the first one brings take the place of what came after.
        let third: u64 = sluice.get(&target).await.text().parse().unwrap();
        assert!(third >= new, "{how}: {third} after {new}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_redis_refuses_writes_what_is_void_stays_void_on_all_that_listen() {
    for refuse in [&[&b"CONFIG"[..], b"SET", b"maxmemory", b"1"][..], &[b"REPLICAOF", b"127.0.0.1", b"1"]] {
        let (backend, _) = counting().await;
        let redis = Redis::start(&["--maxmemory-policy", "noeviction"]).await;
        let (one, two) = (over(&backend, &redis.url()).await, over(&backend, &redis.url()).await);
        let old = keep(&one).await;
        until("it is in Redis", || async { !redis.keys().await.is_empty() }).await;
        keep(&two).await;
        redis.command(refuse).await;
        assert!(purge(&one).await.contains("\"waits\":true"));
        serves_nothing_before(&one, old, "the one that was asked").await;
        let new: u64 = one.get(TARGET).await.text().parse().unwrap();
        until("the other one hears of it", || async { two.get(TARGET).await.text().parse::<u64>().unwrap() > old }).await;
        serves_nothing_before(&two, old, "the other one").await;
        assert_eq!(Connection::open(one.address).await.ask("POST", TARGET, &[], b"x").await.status, 200);
        serves_nothing_before(&one, new, "after a change").await;
        // When it takes writes again, all of it is said.
        redis.command(&[b"CONFIG", b"SET", b"maxmemory", b"0"]).await;
        redis.command(&[b"REPLICAOF", b"NO", b"ONE"]).await;
        until("nothing waits", || async {
            let page: serde_json::Value = serde_json::from_slice(&get(one.admin, "/stats", &[]).await.body).unwrap();
            page["voids"]["waiting"] == 0
        })
        .await;
        let late = over(&backend, &redis.url()).await;
        serves_nothing_before(&late, new, "one that starts").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_lost_while_an_instance_is_away_is_noticed() {
    for lose in
        [&[&b"DEL"[..], b"sluice!voids"][..], &[b"FLUSHALL"], &[b"HDEL", b"sluice!voids", b"1"], &[b"HDEL", b"sluice!voids", b"epoch"]]
    {
        let (backend, _) = counting().await;
        let redis = Redis::start(&[]).await;
        let mut relay = Relay::to(redis.port).await;
        let (away, one) = (over(&backend, &relay.url()).await, over(&backend, &redis.url()).await);
        let old = keep(&away).await;
        until("it is in Redis", || async { !redis.keys().await.is_empty() }).await;
        relay.cut().await;
        until("it is cut off", || async { away.metric("breaker_open", &["of=\"redis\""]).await == 1.0 }).await;
        purge(&one).await;
        redis.command(lose).await;
        relay.mend().await;
        connected(&away, 2).await;
        serves_nothing_before(&away, old, &String::from_utf8_lossy(lose[0])).await;
        let late = over(&backend, &redis.url()).await;
        serves_nothing_before(&late, old, "one that starts").await;
        // The new log works.
        let old = keep(&away).await;
        keep(&one).await;
        purge(&one).await;
        until("the other one hears of it", || async { away.get(TARGET).await.text().parse::<u64>().unwrap() > old }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_doubt_is_served_only_if_the_backend_fails_too() {
    let (mut backend, _) = counting().await;
    let redis = Redis::start(&[]).await;
    let rules = RULES.replace("ttl='1h'", "ttl='1h'\nstale_while_revalidate='1h'\nstale_if_error='1h'");
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nredis='{}'\n{rules}", backend.address, redis.url());
    let sluice = Sluice::with(&text, &[]);
    connected(&sluice, 1).await;
    let old = keep(&sluice).await;
    redis.command(&[b"FLUSHALL"]).await;
    until("it is fetched anew", || async { sluice.get(TARGET).await.text().parse::<u64>().unwrap() > old }).await;
    keep(&sluice).await;
    backend.kill().await;
    redis.command(&[b"FLUSHALL"]).await;
    until("it is in doubt", || async { sluice.get(TARGET).await.cache_status().contains("stale-if-error") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_state_of_redis_brings_nothing_back() {
    let (backend, _) = counting().await;
    let dir = crate::support::scratch();
    let extra = ["--dir", dir.to_str().unwrap(), "--dbfilename", "old.rdb"];
    let redis = Redis::start(&extra).await;
    let one = over(&backend, &redis.url()).await;
    let old = keep(&one).await;
    until("it is in Redis", || async { !redis.keys().await.is_empty() }).await;
    redis.command(&[b"SAVE"]).await;
    // The number of this void is used again by the state that is restored.
    purge(&one).await;
    let mut redis = redis.restart().await;
    connected(&one, 2).await;
    serves_nothing_before(&one, old, "after the restart").await;
    let late = over(&backend, &redis.url()).await;
    serves_nothing_before(&late, old, "one that starts").await;
    // And once more, with another void under that number before the instance that knows is back.
    redis = redis.restart().await;
    connected(&one, 3).await;
    connected(&late, 2).await;
    serves_nothing_before(&one, old, "after another restart").await;
    serves_nothing_before(&late, old, "after another restart").await;
    drop(redis);
}

#[tokio::test(flavor = "multi_thread")]
async fn four_hundred_purges_over_two_instances_under_load_are_followed_by_nothing_void() {
    let (backend, asked) = counting().await;
    let redis = Redis::start(&[]).await;
    let sluices = [over(&backend, &redis.url()).await, over(&backend, &redis.url()).await];
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let load: Vec<_> = (0..8)
        .map(|client| {
            let (address, done) = (sluices[client % 2].address, Arc::clone(&done));
            tokio::spawn(async move {
                let mut connection = Connection::open(address).await;
                while !done.load(Ordering::Relaxed) {
                    connection.ask("GET", TARGET, &[], b"").await;
                }
            })
        })
        .collect();
    for number in 0..crate::support::number("SLUICE_PURGES", 400) {
        let at = usize::try_from(number % 2).unwrap();
        let least = asked.load(Ordering::SeqCst);
        purge(&sluices[at]).await;
        let answer = sluices[at].get(TARGET).await;
        assert!(answer.text().parse::<u64>().unwrap() >= least, "purge {number}: {} of {least}: {}", answer.text(), answer.cache_status());
        until("the other one knows", || async { sluices[1 - at].get(TARGET).await.text().parse::<u64>().unwrap() >= least }).await;
    }
    done.store(true, Ordering::Relaxed);
    for client in load {
        client.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_swept_together_and_cost_no_walk_each() {
    let (backend, _) = counting().await;
    let redis = Redis::start(&[]).await;
    let fill = "for i = 1, 20000 do redis.call('SET', 'other:' .. i, i) end";
    redis.command(&[b"EVAL", fill.as_bytes(), b"0"]).await;
    let sluice = over(&backend, &redis.url()).await;
    let scans = async || {
        let text = String::from_utf8_lossy(&redis.command(&[b"INFO", b"commandstats"]).await).into_owned();
        text.lines().find_map(|line| line.strip_prefix("cmdstat_scan:calls=")?.split(',').next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let before = scans().await;
    for _ in 0..40 {
        assert_eq!(Connection::open(sluice.address).await.ask("POST", TARGET, &[], b"x").await.status, 200);
    }
    // A purge is swept at once, and what waited with it: one walk of fifty steps, or two if it came between.
    purge(&sluice).await;
    until("it is counted", || async { scans().await > before }).await;
    let walk = 20_000 / 400 + 2;
    assert!(scans().await - before <= 3 * walk, "{} steps", scans().await - before);
}
