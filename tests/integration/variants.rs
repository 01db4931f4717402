//! Who gets which variant (RFC 9111 §4.1): the product of the field that `Vary` names, the clients that ask, when they do, what is
//! stored where, and what the rule lets go on.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::BufReader;
use tokio::net::TcpSocket;

use crate::support::{Answer, Asked, Backend, Connection, Redis, Sluice, Step, TOKEN, get, ok, reply, until};

/// A client: its address, and what it says in the field that `Vary` names.
#[derive(Clone, Copy, Debug)]
struct Who {
    address: &'static str,
    says: Option<&'static str>,
}

const CLIENTS: [Who; 6] = [
    Who { address: "127.0.0.1", says: None },
    Who { address: "127.0.0.2", says: None },
    Who { address: "127.0.0.1", says: Some("one") },
    Who { address: "127.0.0.2", says: Some("one") },
    Who { address: "127.0.0.1", says: Some("127.0.0.2") },
    Who { address: "127.0.0.2", says: Some("two") },
];

/// Which fields are told to the backend as the client says them.
const TOLD: [&str; 6] = ["accept", "user-agent", "accept-language", "x-tenant", "x-other", "cookie"];
/// Which are not, or say the same for all.
const NOT_TOLD: [&str; 9] =
    ["host", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "range", "if-none-match", "cache-control", "x-original-url", "te"];

/// What the backend must be told of a client in a field.
fn expected(field: &str, who: Who, all: bool) -> String {
    let said = match field {
        "x-forwarded-for" => Some(who.address),
        "host" => Some("backend"),
        "via" if all && who.says.is_some() => return format!("{}, 1.1 sluice", who.says.unwrap_or_default()),
        "via" => Some("1.1 sluice"),
        "accept" if !all => who.says.or(Some("*/*")),
        "user-agent" if !all => who.says.or(Some(concat!("sluice/", env!("CARGO_PKG_VERSION")))),
        told if TOLD.contains(&told) => who.says,
        _ => None,
    };
    said.unwrap_or("none").to_owned()
}

/// Answers with what it was told in the field that the target ends in, and varies by it.
fn echo(asked: &Asked) -> Vec<Step> {
    let field = asked.target.rsplit('/').next().unwrap();
    let said: Vec<&str> = asked.fields.iter().filter(|(name, _)| name == field).map(|(_, value)| value.as_str()).collect();
    let said = match field {
        "host" => "backend".to_owned(),
        _ if said.is_empty() => "none".to_owned(),
        _ => said.join(", "),
    };
    let mut steps = Vec::new();
    if asked.target.starts_with("/slow") {
        steps.push(Step::Delay(Duration::from_millis(150)));
    }
    steps.extend(ok(&format!("Vary: {field}\r\nCache-Control: max-age=600\r\n"), said.as_bytes()));
    steps
}

async fn ask(address: SocketAddr, who: Who, target: &str, field: &str) -> Answer {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{}:0", who.address).parse().unwrap()).unwrap();
    let mut connection = Connection(BufReader::new(socket.connect(address).await.unwrap()));
    let fields: Vec<_> = who.says.filter(|_| field != "host").map(|says| (field, says)).into_iter().collect();
    connection.ask("GET", target, &fields, b"").await
}

fn config(backend: &Backend, redis: &str, request_headers: &str, cache: &str) -> String {
    format!(
        "[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis='{redis}'\nredis_timeout='5s'\n{cache}\n\
         [[route]]\nname='all'\npath='/*'\nkey='all'\nttl='1h'\nrequest_headers={request_headers}\n",
        backend.address
    )
}

/// Everybody asks for a target, each gets its own, and with `hits` from what is stored.
async fn all_ask(sluice: &Sluice, target: &str, field: &str, all: bool, hits: bool) {
    for who in CLIENTS {
        // What was just answered may not be stored yet.
        until(&format!("{who:?} hits {target}, all={all}"), || async {
            let answer = ask(sluice.address, who, target, field).await;
            assert_eq!(answer.text(), expected(field, who, all), "{target} {who:?} all={all} {}", answer.cache_status());
            !hits || answer.cache_status().contains("hit")
        })
        .await;
    }
}

async fn each_gets_its_own(request_headers: &str, all: bool) {
    let backend = Backend::start(echo).await;
    let redis = Redis::start(&[]).await;
    let sluice = Sluice::with(&config(&backend, &redis.url(), request_headers, ""), &[]);
    let fields = || TOLD.into_iter().chain(NOT_TOLD).chain(["x-forwarded-for", "via"]);
    for field in fields() {
        // All at once, while nothing is known of what the answer varies by; then each by itself.
        let slow = format!("/slow/{field}");
        let address = sluice.address;
        let answers = together(CLIENTS.map(|who| async move { ask(address, who, &format!("/slow/{field}"), field).await })).await;
        for (who, answer) in CLIENTS.into_iter().zip(answers) {
            assert_eq!(answer.text(), expected(field, who, all), "{slow} {who:?} all={all} {}", answer.cache_status());
        }
        all_ask(&sluice, &slow, field, all, true).await;
        let later = format!("/later/{field}");
        all_ask(&sluice, &later, field, all, false).await;
        all_ask(&sluice, &later, field, all, true).await;
    }
    // For each target a marker and an entry a variant; what is listed is part of the key, so that each variant has a marker.
    let variants = |field| CLIENTS.map(|who| expected(field, who, all)).into_iter().collect::<HashSet<_>>().len();
    let markers = |field| if field == "x-tenant" && !all { variants(field) } else { 1 };
    let entries: usize = fields().map(|field| 2 * (markers(field) + variants(field))).sum();
    until("all is written", || async { redis.keys().await.len() == entries }).await;
    // From Redis alone, on an instance that knows nothing yet.
    let count = backend.count();
    let other = Sluice::with(&config(&backend, &redis.url(), request_headers, ""), &[]);
    until("Redis answers", || async { other.logged().contains("Redis answers") }).await;
    for field in fields() {
        all_ask(&other, &format!("/slow/{field}"), field, all, true).await;
        all_ask(&other, &format!("/later/{field}"), field, all, true).await;
    }
    assert_eq!(backend.count(), count);
    // Whatever Redis evicts, a marker or a variant, costs a fetch and nothing else.
    let over_redis = Sluice::with(&config(&backend, &redis.url(), request_headers, "memory='0B'"), &[]);
    for (number, key) in redis.keys().await.into_iter().enumerate() {
        if number % 3 == 0 {
            redis.command(&[b"DEL", key.as_bytes()]).await;
        }
    }
    for field in fields() {
        all_ask(&over_redis, &format!("/later/{field}"), field, all, false).await;
        all_ask(&over_redis, &format!("/later/{field}"), field, all, true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_gets_its_own_variant_where_fields_are_listed() {
    each_gets_its_own("['x-tenant']", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_gets_its_own_variant_where_all_fields_go_on() {
    each_gets_its_own("'all'", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_connection_names_is_not_withheld_from_an_answer_that_others_get() {
    let backend = Backend::start(echo).await;
    for request_headers in ["['x-tenant']", "'all'"] {
        let sluice = Sluice::with(&config(&backend, "", request_headers, ""), &[]);
        for field in ["x-tenant", "accept-language"] {
            let (address, target) = (sluice.address, format!("/{field}"));
            get(address, &target, &[("Connection", field), (field, "mine")]).await;
            for _ in 0..2 {
                assert_eq!(get(address, &target, &[(field, "mine")]).await.text(), "mine", "{request_headers} {field}");
                assert_eq!(get(address, &target, &[]).await.text(), "none", "{request_headers} {field}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_another_one_in_each_request_selects_nothing() {
    let backend = Backend::start(echo).await;
    for request_headers in ["[]", "'all'"] {
        let sluice = Sluice::with(&config(&backend, "", request_headers, ""), &[]);
        for field in ["x-request-id", "traceparent"] {
            for _ in 0..3 {
                let answer = get(sluice.address, &format!("/{field}"), &[(field, "mine")]).await;
                assert!(!answer.cache_status().contains("hit") && !answer.cache_status().contains("stored"), "{}", answer.cache_status());
            }
        }
    }
}

/// Answers that are for all who have credentials, or each for its own.
fn signed(asked: &Asked) -> Vec<Step> {
    let who = asked.field("authorization").unwrap_or("nobody").to_owned();
    let mut steps = vec![Step::Delay(Duration::from_millis(150))];
    steps.extend(match asked.target.as_str() {
        "/shared" => ok("Cache-Control: public, max-age=600\r\nETag: \"v\"\r\n", b"for all"),
        "/language" => {
            let text = asked.field("accept-language").unwrap_or("none").to_owned();
            ok("Cache-Control: public, max-age=600\r\nVary: Accept-Language\r\n", text.as_bytes())
        }
        _ => ok("Cache-Control: max-age=600\r\n", who.as_bytes()),
    });
    steps
}

/// What all of these come to, at the same time.
async fn together<T: Send + 'static>(all: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>) -> Vec<T> {
    let tasks: Vec<_> = all.into_iter().map(tokio::spawn).collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
}

async fn users(address: SocketAddr, target: &'static str, count: usize) -> Vec<(String, Answer)> {
    together((0..count).map(move |number| async move {
        let user = format!("user-{number}");
        let answer = get(address, target, &[("Authorization", &user)]).await;
        (user, answer)
    }))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_one_shared_answer_cause_one_revalidation() {
    let backend = Backend::start(signed).await;
    for stale in ["stale_while_revalidate='0s'\nstale_if_error='1h'", "stale_while_revalidate='0s'\nstale_if_error='0s'"] {
        let rule = format!("[[route]]\nname='all'\npath='/*'\nkey='all'\nttl='1h'\nauthorization='respect'\n{stale}\n");
        let sluice = Sluice::ruled(backend.address, "", &rule).await;
        users(sluice.address, "/shared", 1).await;
        for soft in ["&soft=true", ""] {
            assert_eq!(sluice.manage(&format!("/purge?pattern=*{soft}")).await.status, 200);
            let before = backend.count();
            for (_, answer) in users(sluice.address, "/shared", 50).await {
                assert_eq!((answer.status, answer.text().as_str()), (200, "for all"));
            }
            assert_eq!(backend.count() - before, 1, "{stale} {soft}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_what_was_made_for_other_credentials() {
    let backend = Backend::start(signed).await;
    let text = format!(
        "[backend]\nurl='http://{}'\n[[route]]\nname='all'\npath='/*'\nttl='1h'\nauthorization='respect'\nclient_directives='respect'\n",
        backend.address
    );
    let sluice = Sluice::with(&text, &[]);
    for (user, answer) in users(sluice.address, "/mine", 20).await {
        assert_eq!(answer.text(), user);
    }
    assert_eq!(get(sluice.address, "/mine", &[]).await.text(), "nobody");
    for (user, answer) in users(sluice.address, "/mine", 20).await {
        assert_eq!(answer.text(), user);
    }
    // With the same credentials, each its own variant.
    let languages = ["de", "en", "fr"];
    let address = sluice.address;
    let asking = (0..12).map(move |number| {
        let language = languages[number % 3];
        async move { (language, get(address, "/language", &[("Authorization", "one"), ("Accept-Language", language)]).await) }
    });
    for (language, answer) in together(asking).await {
        assert_eq!(answer.text(), language, "{}", answer.cache_status());
    }
    for language in languages {
        let answer = get(sluice.address, "/language", &[("Authorization", "two"), ("Accept-Language", language)]).await;
        assert!(answer.text() == language && answer.cache_status().contains("hit"), "{}", answer.cache_status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_shared_no_more_goes_to_none_of_those_who_wait() {
    let shared = Arc::new(AtomicBool::new(true));
    let told = Arc::clone(&shared);
    let backend = Backend::start(move |asked| {
        let who = asked.field("authorization").unwrap_or("nobody").to_owned();
        let mut steps = vec![Step::Delay(Duration::from_millis(150))];
        steps.extend(match told.load(Ordering::Relaxed) {
            true => ok("Cache-Control: public, max-age=600\r\n", b"for all"),
            false => ok("Cache-Control: max-age=600\r\n", who.as_bytes()),
        });
        steps
    })
    .await;
    let text = format!(
        "[backend]\nurl='http://{}'\n[[route]]\nname='all'\npath='/*'\nttl='1h'\nauthorization='respect'\nclient_directives='respect'\n",
        backend.address
    );
    let sluice = Sluice::with(&text, &[]);
    assert_eq!(users(sluice.address, "/x", 1).await[0].1.text(), "for all");
    shared.store(false, Ordering::Relaxed);
    let address = sluice.address;
    let asking = (0..20).map(move |number| async move {
        let user = format!("user-{number}");
        let mut fields = vec![("Cache-Control", "no-cache")];
        if number % 4 > 0 {
            fields.push(("Authorization", &user));
        }
        let text = get(address, "/x", &fields).await.text();
        assert_eq!(text, if number % 4 > 0 { &user } else { "nobody" });
    });
    together(asking).await;
}

/// What a backend says to credentials that are wrong, or that have an answer of their own: none of it is for all.
const FOR_THESE_CREDENTIALS: [(&str, &str); 15] = [
    ("500 Internal Server Error", ""),
    ("501 Not Implemented", "Cache-Control: no-store\r\n"),
    ("302 Found", "Location: /login\r\n"),
    ("303 See Other", "Location: /login\r\nCache-Control: no-store\r\n"),
    ("307 Temporary Redirect", "Location: /login\r\nCache-Control: no-cache, no-store, must-revalidate\r\n"),
    ("400 Bad Request", ""),
    ("401 Unauthorized", "WWW-Authenticate: Bearer\r\n"),
    ("403 Forbidden", "Cache-Control: private\r\n"),
    ("404 Not Found", ""),
    ("410 Gone", "Cache-Control: max-age=60\r\n"),
    ("200 OK", ""),
    ("200 OK", "Cache-Control: no-store\r\n"),
    ("200 OK", "Cache-Control: private, max-age=60\r\nSet-Cookie: a=b\r\n"),
    ("200 OK", "Cache-Control: max-age=0, private, must-revalidate\r\n"),
    ("200 OK", "Vary: *\r\n"),
];

/// Answers "for all" to everybody but to what `Authorization: garbage` gets.
async fn for_all_but_garbage(status: &'static str, fields: &'static str) -> Backend {
    Backend::start(move |asked| match asked.field("authorization") {
        Some("garbage") => reply(status, fields, b"garbage"),
        _ => {
            let mut steps = vec![Step::Delay(Duration::from_millis(50))];
            steps.extend(ok("Cache-Control: public, max-age=600\r\n", b"for all"));
            steps
        }
    })
    .await
}

const GARBAGE: [(&str, &str); 1] = [("Authorization", "garbage")];

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_other_credentials_ends_nothing_and_turns_the_cache_off_for_nobody_else() {
    for (status, fields) in FOR_THESE_CREDENTIALS {
        for stale in ["stale_while_revalidate='0s'\nstale_if_error='1h'", "stale_while_revalidate='1h'\nstale_if_error='1h'"] {
            let backend = for_all_but_garbage(status, fields).await;
            let rule = format!("[[route]]\nname='all'\npath='/*'\nkey='all'\nttl='1h'\nauthorization='respect'\n{stale}\n");
            let sluice = Sluice::ruled(backend.address, "", &rule).await;
            until("it is stored", || async { get(sluice.address, "/x", &[]).await.cache_status().contains("hit") }).await;
            assert_eq!(sluice.manage("/purge?pattern=*&soft=true").await.status, 200);
            let before = backend.count();
            get(sluice.address, "/x", &GARBAGE).await;
            until("the backend was asked", || async { backend.count() > before }).await;
            until("no fetch is under way", || async { backend.answering() == 0 }).await;
            assert_eq!(sluice.metric("memory_entries", &[]).await, 1.0, "{status} {fields}");
            until(&format!("others have it refreshed: {status} {fields}"), || async {
                let (_, answer) = users(sluice.address, "/x", 1).await.remove(0);
                assert_eq!(answer.text(), "for all");
                answer.cache_status().contains("hit; ttl=5")
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_other_credentials_leaves_users_of_a_shared_answer_one_fetch() {
    for (status, fields) in FOR_THESE_CREDENTIALS.into_iter().filter(|(status, _)| !status.starts_with('2')) {
        let backend = for_all_but_garbage(status, fields).await;
        let rule = "[[route]]\nname='all'\npath='/*'\nkey='all'\nttl='1h'\nauthorization='respect'\n";
        let sluice = Sluice::ruled(backend.address, "", rule).await;
        users(sluice.address, "/x", 1).await;
        assert_eq!(sluice.manage("/purge?pattern=*").await.status, 200);
        assert_eq!(get(sluice.address, "/x", &GARBAGE).await.text(), "garbage");
        let before = backend.count();
        for (_, answer) in users(sluice.address, "/x", 20).await {
            assert_eq!(answer.text(), "for all");
        }
        assert_eq!(backend.count() - before, 1, "{status} {fields}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_with_an_answer_of_their_own_are_served_no_stale_one_for_long() {
    for (status, fields) in [("404 Not Found", ""), ("200 OK", "Cache-Control: private\r\n"), ("302 Found", "Location: /y\r\n")] {
        let backend = for_all_but_garbage(status, fields).await;
        let rule = "[[route]]\nname='all'\npath='/*'\nkey='all'\nttl='1h'\nauthorization='respect'\nstale_while_revalidate='1h'\n";
        let sluice = Sluice::ruled(backend.address, "", rule).await;
        until("it is stored", || async { get(sluice.address, "/x", &[]).await.cache_status().contains("hit") }).await;
        assert_eq!(sluice.manage("/purge?pattern=*&soft=true").await.status, 200);
        until(&format!("its own is answered: {status}"), || async { get(sluice.address, "/x", &GARBAGE).await.text() == "garbage" }).await;
        // One request each, and no more revalidations beside it.
        let before = backend.count();
        for _ in 0..3 {
            assert_eq!(get(sluice.address, "/x", &GARBAGE).await.text(), "garbage", "{status}");
        }
        assert_eq!(backend.count() - before, 3, "{status}");
        assert_eq!(get(sluice.address, "/x", &[]).await.text(), "for all");
    }
}
