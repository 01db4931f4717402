//! Plain hits, from memory and from Redis, are answered before the HTTP library sees the request: by the same bytes as by the library, wherever the request is
//! cut, however slowly its answer is taken, and whatever is changed in it.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt};
use tokio::time::{Instant, timeout};

use crate::support::{Asked, Backend, Connection, Redis, Sluice, Step, number, one_rule, reply, until};

/// Answers of every kind that is stored: plain and gzip, with and without date, with other statuses, and some that vary.
fn answer(asked: &Asked) -> Vec<Step> {
    let path = asked.target.split('?').next().unwrap_or_default();
    let body = format!("{{\"path\":\"{path}\"}}");
    let date = "Date: Wed, 01 Jan 2025 00:00:00 GMT\r\n";
    match path {
        "/large" => reply("200 OK", &format!("{date}Content-Type: application/json\r\n"), body.repeat(500).as_bytes()),
        "/dateless" => reply("200 OK", "ETag: \"x\"\r\nLast-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n", body.as_bytes()),
        "/missing" => reply("404 Not Found", "Content-Type: text/plain\r\n", b"no"),
        "/empty" => reply("200 OK", date, b""),
        "/varies" => reply("200 OK", &format!("{date}Vary: Accept-Language\r\n"), body.as_bytes()),
        "/moved" => reply("301 Moved Permanently", "Location: /large\r\n", b""),
        "/aged" => reply("200 OK", "Age: 3\r\nCache-Status: other; hit\r\nX-Many: 1\r\nX-Many: 2\r\n", body.as_bytes()),
        _ => reply("200 OK", &format!("{date}Content-Type: text/plain\r\n"), body.as_bytes()),
    }
}

const TARGETS: [&str; 10] =
    ["/large", "/dateless", "/missing", "/empty", "/varies", "/moved", "/aged", "/p?a=1&b=2", "/p?b=2&a=1", "/p/%41"];
const FIELDS: [&str; 26] = [
    "Accept-Encoding: gzip, deflate, br",
    "accept-encoding: gzip;q=0, *",
    "Accept-Encoding: identity",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64)",
    "Accept: application/json, */*;q=0.1",
    "ACCEPT-LANGUAGE: de, en;q=0.5",
    "If-None-Match: \"x\"",
    "if-none-match: W/\"x\", \"y\"",
    "If-None-Match: *",
    "If-Modified-Since: Wed, 01 Jan 2025 00:00:00 GMT",
    "Origin: https://dash.example",
    "X-Request-Id: given-1",
    "X-Request-Id:",
    "Cookie: a=b; c=d",
    "Connection: keep-alive",
    "Cache-Control: max-age=0",
    "Pragma: no-cache",
    "Range: bytes=0-3",
    "X-Forwarded-For: 192.0.2.7",
    "X-Unknown: 1",
    "Host: other.test",
    "Content-Length: 0",
    "Sec-Fetch-Mode:   cors  ",
    "Authorization: Bearer x",
    "Transfer-Encoding: gzip, chunked",
    "Expect: nonsense",
];

/// A request with some fields and, mostly, a few bytes changed.
fn request(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut text = format!("GET {} HTTP/1.1\r\nHost: api.test\r\n", TARGETS[random.usize(..TARGETS.len())]);
    for _ in 0..random.usize(..6) {
        text.push_str(FIELDS[random.usize(..FIELDS.len())]);
        text.push_str("\r\n");
    }
    let mut bytes = text.into_bytes();
    for _ in 0..random.usize(..3) {
        let at = random.usize(..bytes.len());
        match random.u8(..5) {
            0 => bytes[at] = random.u8(..),
            1 => drop(bytes.remove(at)),
            2 => bytes.insert(at, b" \t\r\n:%\0\x80/"[random.usize(..9)]),
            3 => bytes[at] ^= 0x20,
            _ => bytes.truncate(bytes.len() - 2),
        }
    }
    bytes.extend_from_slice(b"\r\n\r\n");
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
    bytes.truncate(end);
    bytes
}

/// Everything that answers a request, with what differs from moment to moment taken out; empty if nothing does.
async fn exchange(connection: &mut Connection, request: &[u8]) -> String {
    connection.send(request).await;
    let mut text = String::new();
    let reading = async {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if connection.0.read_line(&mut line).await.unwrap_or(0) == 0 {
                return;
            }
            if let Some(said) = line.strip_prefix("content-length: ") {
                length = said.trim().parse().unwrap();
            }
            let changes = [("date: ", !request_has_date(&line)), ("x-request-id: ", !line.contains("given"))];
            match changes.iter().find(|(name, changes)| *changes && line.starts_with(name)) {
                Some((name, _)) => text.push_str(name),
                None => text.push_str(&line),
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        connection.0.read_exact(&mut body).await.unwrap();
        text.push_str(&String::from_utf8_lossy(&body));
    };
    // What is not whole, like a body that does not come, is not answered.
    let _ = timeout(Duration::from_secs(2), reading).await;
    text
}

/// The date that the backend gave, not one of the moment.
fn request_has_date(line: &str) -> bool {
    line.contains("2025 00:00:00")
}

/// The same but for a second that passed in between.
fn alike(one: &str, other: &str) -> bool {
    // What was fetched took the long way both times. Whether it met another fetch depends on the moment, and whether a request's
    // body that does not come ends the connection, too.
    for timing in ["connection: close\r\n", "; collapsed"] {
        if one.contains("sluice; fwd=") && one.contains(timing) != other.contains(timing) {
            return alike(&one.replace(timing, ""), &other.replace(timing, ""));
        }
    }
    let seconds = |line: &str| line.rsplit(['=', ' ']).next().and_then(|digits| digits.trim().parse::<i64>().ok());
    one.lines().count() == other.lines().count()
        && one.lines().zip(other.lines()).all(|(one, other)| {
            let ticks = ["age: ", "cache-status: "].iter().any(|name| one.starts_with(name) && other.starts_with(name));
            let near = || seconds(one).zip(seconds(other)).is_some_and(|(a, b)| (a - b).abs() <= 1);
            one == other || (ticks && near())
        })
}

/// A hundred thousand by hand (`SLUICE_REQUESTS=100000`); fewer otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn both_ways_give_the_same_bytes() {
    both_ways_from("", "").await;
}

/// Likewise, where every hit comes from Redis.
#[tokio::test(flavor = "multi_thread")]
async fn both_ways_give_the_same_bytes_from_redis() {
    let redis = Redis::start(&[]).await;
    both_ways_from(&redis.url(), "[cache]\nmemory='0B'\nredis='${REDIS_URL}'\nredis_timeout='5s'\n").await;
}

async fn both_ways_from(redis: &str, cache: &str) {
    let backend = Backend::start(answer).await;
    let rule = one_rule("ttl = '1h'\nclient_directives = 'respect'").replace("key = 'all'", "key = 'all:{a}'");
    let sluice = Sluice::start(backend.address, redis, &format!("[backend]\nurl='${{BACKEND_URL}}'\n{cache}{rule}")).await;
    let mut random = fastrand::Rng::with_seed(number("SLUICE_SEED", 12));
    let (mut hits, mut others) = (0, 0);
    let mut ways = [Connection::open(sluice.address).await, Connection::open(sluice.address).await];
    for turn in 0..number("SLUICE_REQUESTS", 4000) {
        let request = request(&mut random);
        // An empty line in front, which RFC 9112 §2.2 allows, sends it the long way.
        let long = [b"\r\n", &request[..]].concat();
        let mut tries = 0;
        let (short, long) = loop {
            let (one, other) = ways.split_at_mut(1);
            let answers = (exchange(&mut one[0], &request).await, exchange(&mut other[0], &long).await);
            tries += 1;
            let same = alike(&answers.0, &answers.1);
            // After what was refused nothing more is read; and what is not a hit fetches something, so that it may differ at first.
            let is_hit = |answer: &str| answer.contains("sluice; hit");
            if !(same && is_hit(&answers.0) && is_hit(&answers.1)) {
                ways = [Connection::open(sluice.address).await, Connection::open(sluice.address).await];
            }
            if tries == 3 || same {
                break answers;
            }
        };
        assert!(alike(&short, &long), "{turn}: {}\n{short}\n{long}", String::from_utf8_lossy(&request));
        if short.contains("sluice; hit") { hits += 1 } else { others += 1 }
    }
    assert!(hits > others / 4 && others > hits / 4, "{hits} hits, {others} others");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_answered_wherever_they_are_cut_and_one_after_the_other() {
    let backend = Backend::start(answer).await;
    let sluice = Sluice::start(backend.address, "", &format!("[backend]\nurl='${{BACKEND_URL}}'\n{}", one_rule("ttl = '1h'"))).await;
    let mut connection = Connection::open(sluice.address).await;
    let whole = b"GET /dateless HTTP/1.1\r\nHost: api.test\r\nUser-Agent: x\r\n\r\n";
    let mut expected = connection.ask("GET", "/dateless", &[], b"").await.body;
    for cut in 1..whole.len() {
        connection.send(&whole[..cut]).await;
        tokio::task::yield_now().await;
        connection.send(&whole[cut..]).await;
        assert_eq!(connection.answer(false).await.unwrap().body, expected, "cut at {cut}");
    }
    // Several at once, a plain one behind and before one that is not, and a miss between hits.
    let odd = b"GET /dateless HTTP/1.1\r\nHost: api.test\r\nX-Unknown: 1\r\n\r\n";
    let head = b"HEAD /dateless HTTP/1.1\r\nHost: api.test\r\n\r\n";
    connection.send(&[&whole[..], odd, whole, whole].concat()).await;
    for _ in 0..4 {
        assert_eq!(connection.answer(false).await.unwrap().body, expected);
    }
    for number in 0..50 {
        let miss = format!("GET /new?{number} HTTP/1.1\r\nHost: api.test\r\n\r\n");
        connection.send(miss.as_bytes()).await;
        connection.send(whole).await;
        connection.send(head).await;
        connection.send(odd).await;
        let new = connection.answer(false).await.unwrap();
        assert!(new.cache_status().contains("fwd=uri-miss"), "{}", new.cache_status());
        assert_eq!(connection.answer(false).await.unwrap().body, expected);
        assert!(connection.answer(true).await.unwrap().body.is_empty());
        assert_eq!(connection.answer(false).await.unwrap().body, expected);
    }
    // Very many on one connection (a million by hand).
    for _ in 0..number("SLUICE_REQUESTS", 4000) {
        connection.send(whole).await;
        expected = connection.answer(false).await.unwrap().body;
    }
    assert_eq!(expected, b"{\"path\":\"/dateless\"}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_taken_slowly_comes_whole_and_counts_as_being_answered() {
    let large = vec![b'x'; 12 << 20];
    let body = large.clone();
    let backend = Backend::start(move |_| reply("200 OK", "", &body)).await;
    let sluice = Sluice::start(
        backend.address,
        "",
        &format!("[backend]\nurl='${{BACKEND_URL}}'\n[cache]\ncompress_above='64MiB'\n{}", one_rule("ttl = '1h'")),
    )
    .await;
    assert_eq!(sluice.get("/x").await.body, large);
    until("it is stored", || async { sluice.get("/x").await.cache_status().contains("sluice; hit") }).await;
    let mut slow = Connection::open(sluice.address).await;
    // Two requests, the second one while the answer to the first is stuck in the connection.
    let request = b"GET /x HTTP/1.1\r\nHost: api.test\r\n\r\n";
    slow.send(request).await;
    let first = slow.head().await.unwrap();
    slow.send(request).await;
    slow.send(b"GET /x HTTP/1.1\r\nHost: api.test\r\nX-Unknown: 1\r\n\r\n").await;
    // Others are served meanwhile.
    assert_eq!(sluice.get("/x").await.body, large);
    assert_eq!(slow.body(&first).await, (large.clone(), true));
    for _ in 0..2 {
        let answer = slow.answer(false).await.unwrap();
        assert!(answer.cache_status().contains("sluice; hit") && answer.body == large);
    }
}

/// Answers come from Redis, which may take its time.
async fn over(redis: &Redis, lines: &str) -> (Backend, Sluice) {
    let backend = Backend::start(|asked| reply("200 OK", "Content-Type: text/plain\r\n", asked.target.as_bytes())).await;
    let sluice = Sluice::over_redis(backend.address, &redis.url(), lines);
    until("a hit from Redis", || async { sluice.get("/x").await.cache_status().contains("sluice; hit") }).await;
    (backend, sluice)
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_asked_once_for_a_hit_and_once_for_a_miss() {
    let redis = Redis::start(&[]).await;
    let (backend, sluice) = over(&redis, "redis_timeout='5s'").await;
    let gets = || async {
        let text = String::from_utf8(redis.command(&[b"INFO", b"commandstats"]).await).unwrap();
        let calls = text.split("cmdstat_getrange:calls=").nth(1).unwrap().split(',').next().unwrap();
        calls.parse::<usize>().unwrap()
    };
    for (target, asks) in [("/x", 0), ("/new", 20)] {
        let (before, asked) = (gets().await, backend.count());
        for number in 0..20 {
            let query = if asks == 0 { String::new() } else { format!("?{number}") };
            let target = format!("{target}{query}");
            assert_eq!(sluice.get(&target).await.text(), target);
        }
        assert_eq!((gets().await - before, backend.count() - asked), (20, asks), "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_at_the_same_time_is_not_mixed_up() {
    let redis = Redis::start(&[]).await;
    let (_backend, sluice) = over(&redis, "redis_timeout='5s'").await;
    let clients = (0..100).map(|client: usize| {
        let address = sluice.address;
        tokio::spawn(async move {
            let mut connection = Connection::open(address).await;
            for turn in 0..50 {
                // By both ways, some of it kept and some not, and some clients gone before they get it.
                let fields: &[_] = if turn % 7 == 0 { &[("X-Unknown", "1")] } else { &[] };
                let target = format!("/{}", (client * 7 + turn) % 60);
                if (client + turn) % 20 == 19 {
                    connection.send(format!("GET {target} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
                    connection = Connection::open(address).await;
                }
                assert_eq!(connection.ask("GET", &target, fields, b"").await.text(), target);
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_says_of_a_slow_request_how_long_it_waited_for_redis() {
    let redis = Redis::start(&[]).await;
    let (_backend, sluice) = over(&redis, "redis_timeout='5s'\n[log]\nslow='200ms'").await;
    let mut waiting = Connection::open(sluice.address).await;
    for (target, outcome) in [("/x", "hit"), ("/new", "miss")] {
        waiting.ask("GET", "/x", &[], b"").await;
        redis.process.signal("STOP");
        let sent = Instant::now();
        waiting.send(format!("GET {target} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
        until("it is in flight", || async { sluice.metric("inflight", &[]).await == 1.0 }).await;
        until("it waits long", || async { sent.elapsed() > Duration::from_millis(300) }).await;
        redis.process.signal("CONT");
        assert_eq!(waiting.answer(false).await.unwrap().text(), target);
        let line = format!("outcome=\"{outcome}\"");
        until("it is logged", || async { sluice.logged().lines().any(|text| text.contains(" slow ") && text.contains(&line)) }).await;
        let log = sluice.logged();
        let line = log.lines().find(|text| text.contains(" slow ") && text.contains(&line)).unwrap();
        let ms = |name: &str| line.split(name).nth(1).unwrap().split([' ', '.']).next().unwrap().parse::<u64>().unwrap();
        assert!(ms("redis_ms=") >= 200 && ms("head_ms=") >= ms("redis_ms="), "{line}");
    }
    assert_eq!(sluice.metric("inflight", &[]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_for_a_hung_redis_is_answered_also_while_the_program_stops() {
    let redis = Redis::start(&[]).await;
    // Longer than an idle connection has for one more request.
    let (_backend, sluice) = over(&redis, "redis_timeout='3s'").await;
    let mut waiting = Connection::open(sluice.address).await;
    waiting.ask("GET", "/x", &[], b"").await;
    redis.process.signal("STOP");
    waiting.send(b"GET /x HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    sluice.process.signal("TERM");
    let answer = waiting.answer(false).await.expect("an answer");
    assert_eq!((answer.status, answer.text().as_str()), (200, "/x"));
}
