//! The configuration read again while it serves: other rules for requests to come, or nothing changed and the reason told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::support::{Answer, Asked, Backend, Connection, Redis, Sluice, TOKEN, get, ok, until};

/// What a file says before its rules.
fn head(backend: &Backend) -> String {
    format!("[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n", backend.address)
}

/// Says what it was asked.
fn echo(asked: &Asked) -> Vec<crate::support::Step> {
    ok("", asked.target.as_bytes())
}

async fn reload(sluice: &Sluice, text: &str) -> Answer {
    std::fs::write(&sluice.file, text).unwrap();
    sluice.manage("/reload").await
}

async fn serving(sluice: &Sluice) -> serde_json::Value {
    let stats: serde_json::Value = serde_json::from_slice(&get(sluice.admin, "/stats", &[]).await.body).unwrap();
    stats["config"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_rules_serve_at_once_and_everything_else_goes_on() {
    let backend = Backend::start(echo).await;
    let before = format!("{}[[route]]\nname='all'\npath='/*'\nttl='1h'\n", head(&backend));
    let sluice = Sluice::with(&before, &[]);
    let mut open = Connection::open(sluice.address).await;
    open.ask("GET", "/x", &[], b"").await;
    let first = serving(&sluice).await;
    assert_eq!((first["rules"].as_u64(), first["digest"].as_str().unwrap().len()), (Some(1), 12));
    assert!(first["since"].as_str().unwrap().starts_with("20"));
    // Unchanged.
    assert_eq!(reload(&sluice, &before).await.text(), format!("{{\"reloaded\":false,\"digest\":{}}}", first["digest"]));
    let after = format!("{}[[route]]\nname='new'\npath='/x'\ncache=false\n[[route]]\nname='all'\npath='/*'\nttl='1h'\n", head(&backend));
    let said = reload(&sluice, &after).await;
    let second = serving(&sluice).await;
    assert_eq!((said.status, said.text()), (200, format!("{{\"reloaded\":true,\"rules\":2,\"digest\":{}}}", second["digest"])));
    assert_ne!(first["digest"], second["digest"]);
    // On the connection that was open before, too.
    assert_eq!(open.ask("GET", "/x", &[], b"").await.cache_status(), "sluice; fwd=bypass; detail=rule");
    assert_eq!(sluice.metric("requests_total", &["route=\"new\"", "outcome=\"pass\""]).await, 1.0);
    assert!(get(sluice.admin, "/explain?target=/x", &[]).await.text().contains("rule       new"));
    // And back: what is stored is there still, and the counts go on.
    assert_eq!(reload(&sluice, &before).await.status, 200);
    assert!(open.ask("GET", "/x", &[], b"").await.cache_status().contains("hit"));
    assert_eq!(serving(&sluice).await["digest"], first["digest"]);
    assert_eq!(sluice.metric("requests_total", &["route=\"all\""]).await, 2.0);
    assert_eq!(sluice.metric("config_reloads_total", &["result=\"applied\""]).await, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_told_and_the_rules_before_go_on() {
    let backend = Backend::start(echo).await;
    let good = format!("{}[[route]]\nname='all'\npath='/*'\nttl='1h'\n", head(&backend));
    let sluice = Sluice::with(&good, &[]);
    sluice.get("/x").await;
    let broken = reload(&sluice, &good.replace("ttl='1h'", "ttl='soon'\ntttl='1h'")).await;
    assert_eq!(broken.status, 400);
    for told in ["The configuration has problems", "proxy.toml:10:5: ttl: ", "did you mean 'ttl'?"] {
        assert!(broken.text().contains(told), "{}", broken.text());
    }
    for (from, to, name) in [
        ("redis=''", "redis=''\nnamespace='other'", "[cache]"),
        ("[backend]", "[log]\nformat='json'\n[backend]", "log.format"),
        ("[admin]", "listen='127.0.0.1:1'\npublic_url='https://a.example'\n[admin]", "public_url"),
        ("[[route]]", "[limits]\nwaiters=5\n[[route]]", "[limits]"),
    ] {
        let refused = reload(&sluice, &good.replace(from, to)).await;
        let expected = format!("{{\"detail\":\"cannot change while Sluice runs, restart it: {name}\"}}");
        assert_eq!((refused.status, refused.text()), (409, expected));
    }
    std::fs::remove_file(&sluice.file).unwrap();
    let gone = sluice.manage("/reload").await;
    assert!(gone.status == 400 && gone.text().contains("cannot be read"), "{}", gone.text());
    assert_eq!(get(sluice.admin, "/reload", &[]).await.status, 405);
    let stranger = Connection::open(sluice.admin).await.ask("POST", "/reload", &[], b"").await;
    assert_eq!(stranger.status, 401);
    assert!(sluice.get("/x").await.cache_status().contains("hit"));
    assert_eq!(sluice.metric("config_reloads_total", &["result=\"refused\""]).await, 6.0);
    let log = sluice.logged();
    assert!(log.contains("proxy.toml:10:5: ttl: ") && !log.contains("another"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_tells_requests_apart_otherwise_takes_nothing_over() {
    let backend = Backend::start(echo).await;
    let rule = |query: &str| format!("{}[[route]]\nname='all'\npath='/*'\nttl='1h'\nquery={query}\n", head(&backend));
    let sluice = Sluice::with(&rule("['a']"), &[]);
    // It does not matter yet, so that it is in an answer that others get.
    assert_eq!(sluice.get("/q?a=1&b=2").await.text(), "/q?a=1&b=2");
    assert_eq!(sluice.get("/q?a=1").await.text(), "/q?a=1&b=2");
    assert_eq!(reload(&sluice, &rule("['a','b']")).await.status, 200);
    assert_eq!(sluice.get("/q?a=1").await.text(), "/q?a=1");
}

/// A Sluice with these rules over a backend whose answers say how often it was asked.
async fn counting(redis: &str, rules: &str) -> (Backend, Sluice, String) {
    let asked = AtomicUsize::new(0);
    let backend = Backend::start(move |_| ok("", asked.fetch_add(1, Ordering::SeqCst).to_string().as_bytes())).await;
    let head = head(&backend).replace("redis=''", &format!("redis='{redis}'"));
    let sluice = Sluice::with(&format!("{head}{rules}"), &[]);
    if !redis.is_empty() {
        until("Redis answers", || async { sluice.logged().contains("Redis answers") }).await;
    }
    (backend, sluice, head)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_by_new_tags_or_a_new_key_leaves_nothing_of_before() {
    let redis = Redis::start(&[]).await;
    for (url, new, purge) in [
        ("", "tags=['new']\n", "/purge?tag=new"),
        ("", "key='new:{a}'\n", "/purge?pattern=new:*"),
        (&redis.url(), "tags=['new']\n", "/purge?tag=new"),
        (&redis.url(), "key='new:{a}'\n", "/purge?pattern=new:*"),
    ] {
        let rule = format!("[[route]]\nname='r'\npath='/r/*'\nttl='1h'\nkey='old:{{a}}'\ntags=['old']\n# {url} {purge}\n");
        let (_backend, sluice, head) = counting(url, &rule).await;
        let target = format!("/r/x?a={}", fastrand::u64(..));
        let first = sluice.get(&target).await.text();
        assert_eq!(sluice.get(&target).await.text(), first);
        let line = if new.starts_with("tags") { "tags=['old']\n" } else { "key='old:{a}'\n" };
        assert_eq!(reload(&sluice, &format!("{head}{}", rule.replace(line, new))).await.status, 200);
        assert!(sluice.manage(purge).await.status < 300);
        let second = sluice.get(&target).await.text();
        assert_ne!(second, first, "{url} {new}");
        // What the purge could not name is not there either when the rule is what it was.
        assert!(sluice.manage(purge).await.status < 300);
        assert_eq!(reload(&sluice, &format!("{head}{rule}")).await.status, 200);
        let third = sluice.get(&target).await.text();
        assert!(third != first && third != second, "{url} {new}: {first} {second} {third}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_was_away_or_hidden_serves_nothing_from_before_a_change() {
    let redis = Redis::start(&[]).await;
    let rule = "[[route]]\nname='r'\npath='/r/*'\nttl='1h'\n";
    for url in ["", &redis.url()] {
        for meanwhile in [
            String::new(),
            format!("{rule}cache=false\n"),
            rule.replace("'r'", "'s'"),
            rule.replace("/r/", "/other/"),
            format!("[[route]]\nname='above'\npath='/r/x'\ncache=false\n{rule}"),
            format!("[[route]]\nname='above'\npath='/*'\nttl='1h'\n{rule}"),
        ] {
            let (_backend, sluice, head) = counting(url, rule).await;
            let target = format!("/r/x?a={}", fastrand::u64(..));
            let first = sluice.get(&target).await.text();
            assert_eq!(sluice.get(&target).await.text(), first);
            assert_eq!(reload(&sluice, &format!("{head}{meanwhile}")).await.status, 200);
            let changed = Connection::open(sluice.address).await.ask("POST", &target, &[], b"").await;
            assert_eq!(changed.status, 200);
            assert_eq!(reload(&sluice, &format!("{head}{rule}")).await.status, 200);
            let answer = sluice.get(&target).await;
            assert_ne!(answer.text(), first, "{url} {meanwhile}: {}", answer.cache_status());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_under_load_fail_no_request() {
    let backend = Backend::start(echo).await;
    let rules = |ttl: u32| format!("{}[[route]]\nname='all'\npath='/*'\nttl='{ttl}h'\n", head(&backend));
    let sluice = Sluice::with(&rules(1), &[]);
    for number in 0..50 {
        sluice.get(&format!("/{number}")).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let (stop, address) = (Arc::clone(&stop), sluice.address);
            tokio::spawn(async move {
                let (mut connection, mut asked) = (Connection::open(address).await, 0);
                while !stop.load(Ordering::Acquire) {
                    let target = format!("/{}", (asked + number) % 50);
                    let answer = connection.ask("GET", &target, &[], b"").await;
                    assert_eq!((answer.status, answer.text()), (200, target));
                    asked += 1;
                }
                asked
            })
        })
        .collect();
    for round in 0..100 {
        assert_eq!(reload(&sluice, &rules(round % 2 + 1)).await.status, 200);
    }
    // By signal as well.
    std::fs::write(&sluice.file, rules(3)).unwrap();
    let applied = sluice.metric("config_reloads_total", &["applied"]).await;
    sluice.process.signal("HUP");
    until("the signal is acted on", || async { sluice.metric("config_reloads_total", &["applied"]).await > applied }).await;
    stop.store(true, Ordering::Release);
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
    assert_eq!(backend.count(), 50, "nothing that was stored is lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_the_log_change_too_and_every_change_leaves_an_audit_line() {
    let backend = Backend::start(echo).await;
    let rules = "[[route]]\nname='all'\npath='/*'\nttl='1h'\ntags=['t']\n";
    let text = |admin: &str, log: &str| {
        let url = format!("url='http://{}'", backend.address);
        format!("[admin]\ntoken='{TOKEN}'\n{admin}[log]\nlevel='{log}'\n[backend]\n{url}\n[cache]\nredis=''\n{rules}")
    };
    let sluice = Sluice::with(&text("", "error"), &[]);
    sluice.get("/x").await;
    let dash = "[[admin.tokens]]\nname='dash'\ntoken='secret-of-dash'\nmay=['warm']\n";
    assert_eq!(reload(&sluice, &text(dash, "error")).await.status, 200);
    let post = |target: &'static str, token: &'static str| {
        let admin = sluice.admin;
        async move { Connection::open(admin).await.ask("POST", target, &[("Authorization", &format!("Bearer {token}"))], b"").await }
    };
    let denied = post("/purge?tag=t", "secret-of-dash").await;
    assert_eq!((denied.status, denied.text().contains("may not do that")), (403, true), "{}", denied.text());
    assert_eq!(post("/warm", "secret-of-dash").await.status, 200);
    assert_eq!(post("/warm", "guess").await.status, 401);
    assert_eq!(sluice.manage("/purge?tag=t").await.text(), "{\"purged\":1}");
    let lines = [
        "audit action=\"reload\" what=\"\" result=\"applied ",
        "by=127.0.0.1 token=\"admin\"",
        "audit action=\"purge\" by=127.0.0.1 refused=\"not-allowed\"",
        "audit action=\"warm\" what=\"\" result=\"0 targets\" by=127.0.0.1 token=\"dash\"",
        "audit action=\"warm\" by=127.0.0.1 refused=\"forbidden\"",
        "audit action=\"purge\" what=\"tag t\" result=\"1 entries\" by=127.0.0.1 token=\"admin\"",
    ];
    until("all is logged", || async { lines.iter().all(|line| sluice.logged().contains(line)) }).await;
    let logged = sluice.logged();
    assert!(!logged.contains("secret-of-dash") && !logged.contains("the configuration was reloaded"), "{logged}");
    assert_eq!(reload(&sluice, &text("", "info")).await.status, 200);
    until("the level changed", || async { sluice.logged().contains("the configuration was reloaded") }).await;
    assert_eq!(post("/warm", "secret-of-dash").await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_is_read_again_where_it_says_so() {
    let backend = Backend::start(echo).await;
    let text = |cache: &str| {
        format!("{}[[route]]\nname='all'\npath='/*'\nttl='1h'\ncache={cache}\n", head(&backend).replace("[admin]", "[admin]\nwatch=true"))
    };
    let sluice = Sluice::with(&text("true"), &[]);
    assert!(sluice.get("/x").await.cache_status().contains("miss"));
    std::fs::write(&sluice.file, text("false")).unwrap();
    until("it is read", || async { sluice.get("/x").await.cache_status().contains("detail=rule") }).await;
    // As editors do: a new file in its place. One with problems changes nothing.
    let other = sluice.file.with_extension("new");
    std::fs::write(&other, text("perhaps")).unwrap();
    std::fs::rename(&other, &sluice.file).unwrap();
    until("it is refused", || async { sluice.metric("config_reloads_total", &["result=\"refused\""]).await >= 1.0 }).await;
    assert!(sluice.get("/x").await.cache_status().contains("detail=rule"));
    std::fs::write(&sluice.file, text("true")).unwrap();
    until("it is read", || async { sluice.get("/x").await.cache_status().contains("hit") }).await;
    until("it is audited", || async { sluice.logged().contains("by=\"the changed file\"") }).await;
}
