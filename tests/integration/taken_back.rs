//! What the backend takes back must end: an answer that is not stored ends what is, unless it says that the backend failed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Answer, Backend, Connection, Redis, Sluice, Step, TOKEN, get, ok, one_rule, reply, until};

/// What the backend says next, whatever it is asked.
type Says = Arc<Mutex<(&'static str, &'static str, &'static [u8])>>;

async fn backend() -> (Backend, Says) {
    let says: Says = Arc::new(Mutex::new(("200 OK", "ETag: \"old\"\r\n", b"old")));
    let told = Arc::clone(&says);
    let backend = Backend::start(move |_| {
        let (status, fields, body) = *told.lock().unwrap();
        reply(status, fields, body)
    })
    .await;
    (backend, says)
}

fn rule(more: &str) -> String {
    format!(
        "[[route]]\nname='all'\npath='/*'\nkey='all'\nttl='1h'\nstale_while_revalidate='1h'\nstale_if_error='1h'\nnegative_ttl='0s'\n{more}\n"
    )
}

async fn make_stale(sluice: &Sluice) {
    assert_eq!(sluice.manage("/purge?pattern=*&soft=true").await.status, 200);
}

/// Asks until the old answer is not served any more.
async fn until_it_ended(sluice: &Sluice, fields: &[(&str, &str)]) -> Answer {
    let last = Mutex::new(None);
    until("the old answer ends", || async {
        let answer = get(sluice.address, "/x", fields).await;
        let ended = answer.text() != "old";
        *last.lock().unwrap() = Some(answer);
        ended
    })
    .await;
    last.into_inner().unwrap().unwrap()
}

const TAKING_BACK: [(&str, &str); 10] = [
    ("404 Not Found", ""),
    ("410 Gone", ""),
    ("200 OK", "Cache-Control: no-store\r\n"),
    ("200 OK", "Cache-Control: private\r\n"),
    ("200 OK", "Set-Cookie: a=b\r\n"),
    ("200 OK", "Vary: *\r\n"),
    ("302 Found", "Location: /y\r\n"),
    ("301 Moved Permanently", "Location: /y\r\n"),
    ("307 Temporary Redirect", "Location: /y\r\n"),
    ("451 Unavailable For Legal Reasons", ""),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_the_backend_takes_back_is_served_no_more_not_even_in_an_outage() {
    let redis = Redis::start(&[]).await;
    for (number, (status, fields)) in TAKING_BACK.into_iter().enumerate() {
        for revalidates in [true, false] {
            let (mut backend, says) = backend().await;
            if !revalidates {
                *says.lock().unwrap() = ("200 OK", "", b"old");
            }
            let namespace = format!("namespace='n{number}{revalidates}'\n");
            let text = format!("{namespace}{}", rule(""));
            let (one, two) =
                (Sluice::ruled(backend.address, &redis.url(), &text).await, Sluice::ruled(backend.address, &redis.url(), &text).await);
            for sluice in [&one, &two] {
                until("it is stored", || async { get(sluice.address, "/x", &[]).await.cache_status().contains("hit") }).await;
            }
            make_stale(&one).await;
            *says.lock().unwrap() = (status, fields, b"new");
            assert_eq!(until_it_ended(&one, &[]).await.text(), "new", "{status} {fields}");
            // No more of it in Redis either.
            let count = backend.count();
            assert_eq!(get(one.address, "/x", &[]).await.text(), "new");
            assert_eq!(backend.count(), count + 1);
            until("the other instance notices", || async { get(two.address, "/x", &[]).await.text() == "new" }).await;
            backend.kill().await;
            for sluice in [&one, &two] {
                for _ in 0..3 {
                    let answer = get(sluice.address, "/x", &[]).await;
                    assert!(answer.status >= 500, "{status} {fields}: {} {}", answer.status, answer.text());
                }
            }
            let third = Sluice::ruled(backend.address, &redis.url(), &text).await;
            assert!(get(third.address, "/x", &[]).await.status >= 500, "{status} {fields}");
        }
    }
}

/// What says that the backend failed, or that one client did something wrong.
const TAKING_NOTHING_BACK: [&str; 17] = [
    "400 Bad Request",
    "401 Unauthorized",
    "402 Payment Required",
    "403 Forbidden",
    "405 Method Not Allowed",
    "406 Not Acceptable",
    "409 Conflict",
    "412 Precondition Failed",
    "414 URI Too Long",
    "418 I'm a teapot",
    "422 Unprocessable Content",
    "429 Too Many Requests",
    "431 Request Header Fields Too Large",
    "500 Internal Server Error",
    "502 Bad Gateway",
    "503 Service Unavailable",
    "504 Gateway Timeout",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_one_client_did_wrong_ends_nothing_for_the_others() {
    let redis = Redis::start(&[]).await;
    for (number, status) in TAKING_NOTHING_BACK.into_iter().enumerate() {
        let backend = Backend::start(move |asked| match asked.target.contains("bad") {
            true => reply(status, "", b"new"),
            false => ok("", b"old"),
        })
        .await;
        let rule = rule("client_directives='respect'\nquery=['a']");
        let text = format!("namespace='n{number}'\n{rule}");
        let (one, two) =
            (Sluice::ruled(backend.address, &redis.url(), &text).await, Sluice::ruled(backend.address, &redis.url(), &text).await);
        for sluice in [&one, &two] {
            until("it is stored", || async { get(sluice.address, "/x?a=1", &[]).await.cache_status().contains("hit") }).await;
        }
        // What is fresh, by a client that asks past it with a parameter that the key ignores.
        let count = backend.count();
        let answer = get(one.address, "/x?a=1&bad=1", &[("Cache-Control", "no-cache")]).await;
        assert!(status.starts_with('5') || answer.text() == "new", "{status} {} {}", answer.text(), answer.cache_status());
        assert_eq!(backend.count(), count + 1, "{status}");
        let third = Sluice::ruled(backend.address, &redis.url(), &text).await;
        until("Redis answers", || async { third.logged().contains("Redis answers") }).await;
        for sluice in [&one, &two, &third] {
            let answer = get(sluice.address, "/x?a=1", &[]).await;
            assert!(answer.text() == "old" && answer.cache_status().contains("hit"), "{status} {}", answer.cache_status());
        }
        assert_eq!(backend.count(), count + 1, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_takes_nothing_back() {
    for status in TAKING_NOTHING_BACK {
        let (mut backend, says) = backend().await;
        let sluice = Sluice::ruled(backend.address, "", &rule("")).await;
        get(sluice.address, "/x", &[]).await;
        make_stale(&sluice).await;
        *says.lock().unwrap() = (status, "Cache-Control: no-store\r\n", b"new");
        let count = backend.count();
        assert_eq!(get(sluice.address, "/x", &[]).await.text(), "old", "{status}");
        until("it is revalidated", || async { backend.count() > count }).await;
        backend.kill().await;
        for _ in 0..5 {
            assert_eq!(get(sluice.address, "/x", &[]).await.text(), "old", "{status}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_variant_that_was_asked_for_ends() {
    let gone = Arc::new(Mutex::new(""));
    let told = Arc::clone(&gone);
    let backend = Backend::start(move |asked| {
        let language = asked.field("accept-language").unwrap_or("none").to_owned();
        match *told.lock().unwrap() == language {
            true => reply("404 Not Found", "Vary: Accept-Language\r\n", b"new"),
            false => ok("Vary: Accept-Language\r\n", language.as_bytes()),
        }
    })
    .await;
    let sluice =
        Sluice::ruled(backend.address, "", &rule("stale_while_revalidate='0s'").replacen("stale_while_revalidate='1h'\n", "", 1)).await;
    let ask = |language: &'static str| get(sluice.address, "/x", Box::leak(Box::new([("Accept-Language", language)])));
    for language in ["de", "en"] {
        assert_eq!(ask(language).await.text(), language);
    }
    make_stale(&sluice).await;
    *gone.lock().unwrap() = "de";
    assert_eq!(ask("de").await.text(), "new");
    assert_eq!((ask("en").await.text().as_str(), ask("de").await.text().as_str()), ("en", "new"));
    assert!(ask("en").await.cache_status().contains("hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_older_fetch_does_not_bring_it_back() {
    let backend = Backend::start(|asked| match asked.field("authorization") {
        Some("slow") => {
            let mut steps =
                vec![Step::Send(b"HTTP/1.1 200 OK\r\nCache-Control: public, max-age=600\r\nContent-Length: 3\r\n\r\n".to_vec())];
            steps.extend([Step::Delay(Duration::from_secs(1)), Step::Send(b"old".to_vec())]);
            steps
        }
        Some("first") => ok("Cache-Control: public, max-age=600\r\n", b"old"),
        _ => reply("410 Gone", "", b"new"),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &rule("authorization='respect'\nclient_directives='respect'")).await;
    let address = sluice.address;
    // The slow one begins while nothing is stored, so that it is a fetch of its own.
    let mut slow = Connection::open(address).await;
    slow.send(b"GET /x HTTP/1.1\r\nHost: h\r\nAuthorization: slow\r\n\r\n").await;
    until("it began", || async { backend.count() == 1 }).await;
    until("another one is stored", || async {
        let answer = get(address, "/x", &[("Authorization", "first")]).await;
        assert_eq!(answer.text(), "old");
        answer.cache_status().contains("hit")
    })
    .await;
    assert_eq!(get(address, "/x", &[("Cache-Control", "no-cache")]).await.status, 410);
    assert_eq!(slow.answer(false).await.unwrap().text(), "old");
    for _ in 0..3 {
        assert_eq!(get(address, "/x", &[]).await.status, 410);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_gets_no_response_that_came_before_it_and_a_slow_older_one_does_not_replace_it() {
    let number = AtomicUsize::new(0);
    let backend = Backend::start(move |_| match number.fetch_add(1, Ordering::Relaxed) {
        0 => vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\no".to_vec()),
            Step::Delay(Duration::from_secs(1)),
            Step::Send(b"ld.".to_vec()),
        ],
        _ => ok("", b"new"),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &rule("client_directives='respect'")).await;
    let mut slow = Connection::open(sluice.address).await;
    slow.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await;
    let head = slow.head().await.expect("a head");
    for directive in [("Cache-Control", "no-cache"), ("Cache-Control", "max-age=0"), ("Pragma", "no-cache")] {
        assert_eq!(get(sluice.address, "/x", &[directive]).await.text(), "new", "{directive:?}");
    }
    assert_eq!(slow.body(&head).await.0, b"old.");
    until("the older fetch ended", || async { sluice.metric("fill_bytes", &[]).await == 0.0 }).await;
    for _ in 0..20 {
        let answer = get(sluice.address, "/x", &[]).await;
        assert!(answer.text() == "new" && answer.cache_status().contains("hit"), "{} {}", answer.text(), answer.cache_status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_instance_hears_is_taken_back_ends_on_the_other() {
    let redis = Redis::start(&[]).await;
    let (backend, says) = backend().await;
    let text = format!(
        "[admin]\ntoken='{}'\n[backend]\nurl='http://{}'\n[cache]\nredis='{}'\n{}",
        crate::support::TOKEN,
        backend.address,
        redis.url(),
        rule("")
    );
    let (one, other) = (Sluice::with(&text, &[]), Sluice::with(&text, &[]));
    for sluice in [&one, &other] {
        until("Redis answers", || async { sluice.logged().contains("Redis answers") }).await;
        until("it is stored", || async { sluice.get("/x").await.cache_status().contains("hit") }).await;
    }
    make_stale(&one).await;
    *says.lock().unwrap() = ("404 Not Found", "", b"gone");
    until_it_ended(&one, &[]).await;
    *says.lock().unwrap() = ("503 Service Unavailable", "", b"");
    assert_eq!(until_it_ended(&other, &[]).await.status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_kept_for_want_of_room_ends_nothing() {
    for stale in ["stale_while_revalidate='1h'", "stale_while_revalidate='0s'\nstale_if_error='1h'"] {
        // One that is whole before it must wait for its readers, and one that must wait.
        for size in [100 << 10, 600 << 10] {
            let byte: Arc<Mutex<u8>> = Arc::new(Mutex::new(b'a'));
            let told = Arc::clone(&byte);
            let mut backend = Backend::start(move |asked| match asked.target.as_str() {
                "/x" => ok("", &vec![*told.lock().unwrap(); size]),
                _ => {
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 4 << 20);
                    vec![Step::Send(head.into_bytes()), Step::Send(vec![b'h'; (4 << 20) - 1000]), Step::Hang]
                }
            })
            .await;
            let rules = one_rule(&format!("ttl='1h'\n{stale}"));
            let text = format!(
                "[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\ntimeout='60s'\n[cache]\nredis=''\nmemory='16MiB'\nmax_object='4MiB'\n{rules}",
                backend.address
            );
            let sluice = Sluice::with(&text, &[]);
            let begins_with = |answer: &Answer| answer.body.first().copied();
            until("it is stored", || async { get(sluice.address, "/x", &[]).await.cache_status().contains("hit") }).await;
            make_stale(&sluice).await;
            *byte.lock().unwrap() = b'b';
            // Two bodies that do not end take the room of all.
            let mut holding = Vec::new();
            for target in ["/one", "/two"] {
                let mut client = Connection::open(sluice.address).await;
                client.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await;
                holding.push(client);
            }
            until("no room is left", || async { sluice.metric("fill_bytes", &[]).await > f64::from((8 << 20) - 4000) }).await;
            // A second fetch begins when the first one has ended.
            for _ in 0..2 {
                let before = backend.count();
                until("it is asked for", || async {
                    let answer = get(sluice.address, "/x", &[]).await;
                    assert_eq!(answer.body.len(), size);
                    assert!(answer.cache_status().contains("stale"), "{stale} {size} {}", answer.cache_status());
                    backend.count() > before
                })
                .await;
                assert_eq!(sluice.metric("memory_entries", &[]).await, 1.0, "{stale} {size}");
            }
            // With room it is kept again at once.
            drop(holding);
            backend.kill().await;
            backend.revive().await;
            until("room is left", || async { sluice.metric("fill_bytes", &[]).await < f64::from(4 << 20) }).await;
            until("the new one is kept", || async {
                let answer = get(sluice.address, "/x", &[]).await;
                assert!(!answer.cache_status().contains("bypass"), "{}", answer.cache_status());
                begins_with(&answer) == Some(b'b') && answer.cache_status().contains("hit; ttl=3")
            })
            .await;
        }
    }
}
