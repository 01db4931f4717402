//! All recorded requests through Sluice, in front of a backend that replays them.

use std::collections::HashMap;

use crate::support::{Answer, Backend, Connection, Recorded, Redis, Sluice, recorded, reply, shipped, until};

/// Replays the recording, compressing from 1,000 bytes on for those who take it, as the legacy service does.
async fn replaying(lines: &[Recorded]) -> Backend {
    let answers: HashMap<(String, String), Recorded> =
        lines.iter().map(|line| ((line.method.clone(), line.target.clone()), line.clone())).collect();
    Backend::start(move |asked| {
        let Some(line) = answers.get(&(asked.method.clone(), asked.target.clone())) else {
            return reply("404 Not Found", "", b"{\"detail\":\"not recorded\"}");
        };
        let mut fields: String = line.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        // The service makes its redirects from the Host that it is sent.
        fields = fields.replace("http://api.test/", &format!("http://{}/", asked.field("host").unwrap()));
        let mut body = line.body.clone().into_bytes();
        if body.len() >= 1000 && asked.field("accept-encoding").is_some_and(|codings| codings.contains("gzip")) {
            body = sluice::http::encoding::gzip(&body).to_vec();
            fields.push_str("content-encoding: gzip\r\nvary: Accept-Encoding\r\n");
        }
        if asked.method == "HEAD" {
            body.clear();
        }
        reply(&format!("{} Recorded", line.status), &fields, &body)
    })
    .await
}

pub fn assert_recorded(answer: &Answer, line: &Recorded, when: &str) {
    let what = format!("{when}: {} {}", line.method, line.target);
    assert!(answer.whole, "{what}");
    assert_eq!(answer.status, line.status, "{what}");
    for (name, value) in &line.headers {
        assert_eq!(answer.field(name), Some(value.as_str()), "{what}: {name}");
    }
    assert_eq!(String::from_utf8_lossy(&answer.plain()), line.body, "{what}");
}

pub async fn ask_all(sluice: &Sluice, lines: &[Recorded], fields: &[(&str, &str)], when: &str) -> Vec<Answer> {
    let mut connection = Connection::open(sluice.address).await;
    let mut answers = Vec::new();
    for line in lines {
        let answer = connection.ask(&line.method, &line.target, fields, b"").await;
        assert_recorded(&answer, line, when);
        if fields.is_empty() {
            assert_eq!(answer.field("content-encoding"), None, "{when}: {}", line.target);
        }
        answers.push(answer);
    }
    answers
}

/// HEAD is answered from GET (deviation D6), so its line has a test of its own below.
fn lines() -> Vec<Recorded> {
    recorded().into_iter().filter(|line| line.method != "HEAD").collect()
}

/// The lines whose answers went through the cache and are kept.
fn kept(lines: &[Recorded], answers: &[Answer]) -> Vec<Recorded> {
    let pairs = lines.iter().zip(answers);
    pairs.filter(|(line, answer)| line.status == 200 && !answer.cache_status().contains("bypass")).map(|(line, _)| line.clone()).collect()
}

const GZIP: &[(&str, &str)] = &[("Accept-Encoding", "gzip, deflate, br")];

#[tokio::test(flavor = "multi_thread")]
async fn miss_hit_and_stale_say_what_was_recorded() {
    let (lines, redis) = (lines(), Redis::start(&[]).await);
    let mut backend = replaying(&lines).await;
    let sluice = Sluice::start(backend.address, &redis.url(), &shipped("2s")).await;
    ask_all(&sluice, &lines, &[], "miss, plain").await;
    let answers = ask_all(&sluice, &lines, GZIP, "again, gzip").await;
    ask_all(&sluice, &lines, &[], "again, plain").await;
    assert!(answers.iter().filter(|answer| answer.cache_status().contains("; hit;")).count() > 100);
    for (answer, line) in answers.iter().zip(&lines) {
        let large = line.body.len() >= 1024 && answer.cache_status().contains("hit");
        assert!(!large || answer.field("content-encoding") == Some("gzip"), "{}", line.target);
        assert!(!large || answer.field("vary").is_some_and(|vary| vary.contains("Accept-Encoding")), "{}", line.target);
    }

    // The backend is gone: what was seen before is still answered, and the rest says so.
    backend.kill().await;
    let kept = kept(&lines, &answers);
    assert!(kept.len() > 120, "{}", kept.len());
    for line in &kept {
        until("entries go stale", || async { sluice.get(&line.target).await.cache_status().contains("ttl=-") }).await;
    }
    for fields in [&[][..], GZIP] {
        let answers = ask_all(&sluice, &kept, fields, "stale").await;
        assert!(answers.iter().all(|answer| answer.cache_status().contains("hit; ttl=-")));
    }
    let unseen = sluice.get("/api/liquidations?symbol=UNSEEN").await;
    assert_eq!(unseen.status, 502);
    assert_eq!(unseen.text(), r#"{"detail":"The backend could not be reached"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_instance_answers_from_redis_alone() {
    let (lines, redis) = (lines(), Redis::start(&[]).await);
    let mut backend = replaying(&lines).await;
    let first = Sluice::start(backend.address, &redis.url(), &shipped("1h")).await;
    until("Redis is connected", || async { first.get("/health").await.text().contains("Redis connection successful") }).await;
    let answers = ask_all(&first, &lines, &[], "through the first").await;
    let stored = answers.iter().filter(|answer| answer.status == 200 && !answer.cache_status().contains("bypass")).count();
    until("entries reach Redis", || async { redis.keys().await.len() >= stored / 2 }).await;
    backend.kill().await;
    let config =
        shipped("1h").replace("memory = \"256MiB\"", "memory = \"0B\"").replace("redis_timeout = \"40ms\"", "redis_timeout = \"5s\"");
    let second = Sluice::start(backend.address, &redis.url(), &config).await;
    until("the second has read Redis", || async { second.get("/api/symbols").await.cache_status().contains("hit") }).await;
    let kept = kept(&lines, &answers);
    for fields in [&[][..], GZIP] {
        for answer in ask_all(&second, &kept, fields, "through the second").await {
            assert!(answer.cache_status().contains("hit"), "{}", answer.cache_status());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_nothing_changes() {
    let lines = lines();
    let backend = replaying(&lines).await;
    let sluice = Sluice::start(backend.address, "redis://127.0.0.1:1/0", &shipped("1h")).await;
    for fields in [&[][..], GZIP, &[]] {
        ask_all(&sluice, &lines, fields, "without Redis").await;
    }
    assert!(sluice.metric("requests_total", &["outcome=\"hit\""]).await > 250.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn head_is_get_without_a_body_unless_it_is_forwarded() {
    let lines = recorded();
    let backend = replaying(&lines).await;
    let sluice = Sluice::start(backend.address, "", &shipped("1h")).await;
    let head = Connection::open(sluice.address).await.ask("HEAD", "/api/symbols", &[], b"").await;
    assert_eq!((head.status, head.field("content-length")), (200, Some("223")));
    let config = shipped("1h").replace("head = \"get\"", "head = \"forward\"");
    let forwarding = Sluice::start(backend.address, "", &config).await;
    let head = Connection::open(forwarding.address).await.ask("HEAD", "/api/symbols", &[], b"").await;
    assert_eq!((head.status, head.field("allow")), (405, Some("GET")));
}
