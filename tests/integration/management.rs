//! The admin listener, and what an operator sees.

use std::time::Duration;

use crate::support::{Backend, Connection, Redis, Sluice, TOKEN, get, ok, one_rule, until};

const RULES: &str = "[[route]]\nname='symbols'\npath='/s'\nttl='1h'\nkey='symbols:all'\n[[route]]\nname='liq'\npath='/l'\nttl='1h'\nstale_while_revalidate='1h'\nkey='liq:{symbol}:{tf}'\nfold_case=['symbol']\ntags=['symbol:{symbol}']\n[warm]\ntargets=['/s','/l?symbol=BTC']\n";

async fn filled() -> (Backend, Sluice) {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for target in ["/s", "/l?symbol=BTC&tf=1m", "/l?symbol=btc&tf=1h", "/l?symbol=ETH&tf=1m"] {
        sluice.get(target).await;
        assert!(sluice.get(target).await.cache_status().contains("hit"));
    }
    (backend, sluice)
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_take_what_they_name() {
    let (_backend, sluice) = filled().await;
    assert_eq!(sluice.manage("/purge?symbol=Btc").await.text(), "{\"purged\":2}");
    assert!(sluice.get("/l?symbol=BTC&tf=1m").await.cache_status().contains("uri-miss"));
    assert!(sluice.get("/l?symbol=ETH&tf=1m").await.cache_status().contains("hit"));
    assert_eq!(sluice.manage("/purge?pattern=liq:ETH:*&soft=true").await.text(), "{\"purged\":1}");
    assert!(sluice.get("/l?symbol=ETH&tf=1m").await.cache_status().contains("stale-while-revalidate"));
    assert_eq!(sluice.manage("/purge?pattern=*").await.status, 200);
    assert_eq!(sluice.metric("memory_entries", &[]).await, 0.0);
    assert_eq!(sluice.manage("/purge").await.status, 400);
    assert_eq!(sluice.manage("/purge?pattern=a&tag=b").await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn management_needs_the_token() {
    let (backend, sluice) = filled().await;
    for fields in [&[][..], &[("Authorization", "Bearer wrong")], &[("Authorization", TOKEN)]] {
        let refused = Connection::open(sluice.admin).await.ask("POST", "/purge?pattern=*", fields, b"").await;
        assert_eq!((refused.status, refused.field("www-authenticate")), (401, Some("Bearer")));
    }
    assert!(sluice.get("/s").await.cache_status().contains("hit"));
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let open = Sluice::with(&text, &[]);
    let refused = Connection::open(open.admin).await.ask("POST", "/purge?pattern=*", &[("Authorization", "Bearer ")], b"").await;
    assert_eq!(refused.status, 403);
    assert_eq!(get(open.admin, "/purge", &[]).await.status, 405);
    assert_eq!(get(open.admin, "/nope", &[]).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_metrics_and_explanations() {
    let (_backend, sluice) = filled().await;
    let stats: serde_json::Value = serde_json::from_str(&get(sluice.admin, "/stats", &[]).await.text()).unwrap();
    assert_eq!((&stats["total"]["hits"], &stats["total"]["misses"], &stats["total"]["hit_ratio"]), (&4.into(), &4.into(), &0.5.into()));
    assert_eq!(stats["routes"]["liq"]["misses"], 3);
    assert_eq!((&stats["tiers"][0]["entries"], &stats["breakers"]["backend"]), (&4.into(), &"closed".into()));
    assert_eq!(stats["keys"]["liq"], 3);
    for (name, labels) in [
        ("requests_total", &["route=\"liq\"", "outcome=\"hit\"", "status=\"200\""][..]),
        ("request_seconds_count", &["route=\"symbols\"", "outcome=\"miss\""]),
        ("backend_requests_total", &["route=\"liq\"", "status=\"200\""]),
        ("backend_seconds_count", &["route=\"symbols\""]),
        ("memory_entries", &[]),
        ("memory_bytes", &[]),
        ("build_info", &["version=\""]),
    ] {
        assert!(sluice.metric(name, labels).await > 0.0, "{name}");
    }
    let explained = get(sluice.admin, "/explain?target=/l%3Fsymbol=btc%26tf=1m", &[]).await.text();
    for part in ["rule       liq", "key        liq:BTC:1m", "fresh      1h", "tags       symbol:BTC"] {
        assert!(explained.contains(part), "{explained}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn warming_asks_as_a_client_would() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    assert_eq!(sluice.manage("/warm").await.text(), "{\"warming\":2}");
    until("both are warm", || async { sluice.metric("memory_entries", &[]).await == 2.0 }).await;
    assert!(sluice.get("/s").await.cache_status().contains("hit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_readiness_follow_the_backend() {
    let health = br#"{"status":"healthy","components":{"database":{"status":"healthy","message":"Database connection successful"}}}"#;
    let mut backend = Backend::start(|asked| if asked.target == "/health" { ok("", health) } else { ok("", b"x") }).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    assert_eq!(get(sluice.admin, "/livez", &[]).await.status, 200);
    assert_eq!(get(sluice.admin, "/readyz", &[]).await.status, 200);
    let page = sluice.get("/health").await;
    assert_eq!(page.status, 200);
    let page: serde_json::Value = serde_json::from_str(&page.text()).unwrap();
    assert_eq!((&page["status"], &page["components"]["redis"]["status"]), (&"healthy".into(), &"degraded".into()));
    assert_eq!(page["timestamp"].as_str().unwrap().len(), "2026-11-22T17:55:25.897829+00:00".len());
    backend.kill().await;
    until("health says so", || async { sluice.get("/health").await.status == 503 }).await;
    until("neither the backend nor the empty cache can answer", || async {
        sluice.get("/x").await;
        get(sluice.admin, "/readyz", &[]).await.status == 503
    })
    .await;
    assert_eq!(get(sluice.admin, "/livez", &[]).await.status, 200);
    backend.revive().await;
    until("ready again", || async {
        sluice.get("/x").await;
        get(sluice.admin, "/readyz", &[]).await.status == 200
    })
    .await;
}

/// The API's own management endpoints, in the contract's shapes, on the listener that clients reach.
#[tokio::test(flavor = "multi_thread")]
async fn the_apis_own_cache_endpoints_are_sluices() {
    let (backend, sluice) = filled().await;
    let bearer = format!("Bearer {TOKEN}");
    let token = [("Authorization", bearer.as_str())];
    let asked_before = backend.count();
    let post = async |target: &str, fields: &[(&str, &str)]| Connection::open(sluice.address).await.ask("POST", target, fields, b"").await;
    for target in ["clear", "invalidate/symbol/BTC", "invalidate/symbols", "warm"] {
        let target = format!("/api/cache/{target}");
        assert_eq!(post(&target, &[]).await.status, 401, "{target}");
        assert_eq!(post(&target, &[("Authorization", "Bearer wrong")]).await.status, 401, "{target}");
        let wrong = sluice.get(&target).await;
        assert_eq!((wrong.status, wrong.field("allow"), wrong.text().as_str()), (405, Some("POST"), "{\"detail\":\"Method Not Allowed\"}"));
    }
    assert!(sluice.get("/s").await.cache_status().contains("hit"), "nothing was lost");
    for (target, said) in [
        (
            "/api/cache/invalidate/symbol/btc",
            r#"{"deleted_keys":2,"symbol":"btc","message":"Successfully invalidated 2 cache entries for symbol btc"}"#,
        ),
        ("/api/cache/invalidate/symbols", r#"{"success":true,"message":"Symbols cache invalidated successfully"}"#),
        ("/api/cache/clear?pattern=liq:*", r#"{"deleted_keys":1,"pattern":"liq:*","message":"Successfully cleared 1 cache entries"}"#),
        ("/api%2Fcache/clear", r#"{"deleted_keys":0,"pattern":"*","message":"Successfully cleared 0 cache entries"}"#),
        ("/api/cache/warm", r#"{"message":"Cache warming started in background","status":"initiated"}"#),
    ] {
        let answer = post(target, &token).await;
        assert_eq!((answer.status, answer.text().as_str()), (200, said), "{target}");
    }
    until("warming filled the cache", || async { sluice.metric("memory_entries", &[]).await == 2.0 }).await;
    let stats: serde_json::Value = serde_json::from_str(&sluice.get("/api/cache/stats").await.text()).unwrap();
    let names: Vec<_> = stats["cache_stats"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "available",
            "connected_clients",
            "used_memory",
            "used_memory_human",
            "keyspace_hits",
            "keyspace_misses",
            "total_commands_processed",
            "hit_rate"
        ]
    );
    assert_eq!(stats["message"], "Cache statistics retrieved successfully");
    let moved = sluice.get("/api/cache/stats/").await;
    assert_eq!((moved.status, moved.field("location")), (307, Some("http://api.test/api/cache/stats")));
    let none = Sluice::ruled(backend.address, "", &format!("memory='0B'\n{RULES}")).await;
    assert_eq!(
        none.get("/api/cache/stats").await.text(),
        r#"{"cache_stats":{"available":false,"error":"Redis not available - running in fallback mode"},"message":"Cache not available"}"#
    );
    assert_eq!(backend.count(), asked_before + 2, "only warming asked the backend");
}

/// Sluice takes no path of the backend's unless it is asked to.
#[tokio::test(flavor = "multi_thread")]
async fn without_own_endpoints_every_path_is_the_backends() {
    let backend = Backend::start(|asked| ok("", format!("{} {}", asked.method, asked.target).as_bytes())).await;
    let rules = "[[route]]\nname='health'\npath='/health'\nttl='1h'\n[[route]]\nname='stats'\npath='/api/cache/stats'\nttl='1h'\n";
    let plain = format!("[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n{rules}", backend.address);
    for text in [plain.clone(), format!("own.endpoints=false\n{plain}")] {
        let sluice = Sluice::with(&text, &[]);
        for target in ["/health", "/api/cache/stats"] {
            assert_eq!(sluice.get(target).await.text(), format!("GET {target}"));
            assert!(sluice.get(target).await.cache_status().contains("hit"), "{target} is cached by its rule");
        }
        for target in ["/health/", "/livez", "/readyz", "/openapi.json", "/docs", "/api/cache/warm", "/api/cache/clear"] {
            for method in ["GET", "POST"] {
                let answer = Connection::open(sluice.address).await.ask(method, target, &[], b"").await;
                assert_eq!((answer.status, answer.text()), (200, format!("{method} {target}")));
            }
        }
        let explained = get(sluice.admin, "/explain?target=/health", &[]).await.text();
        assert!(explained.contains("rule       health"), "{explained}");
        // Whether they are taken is fixed while it runs.
        std::fs::write(&sluice.file, format!("own.endpoints=true\n{plain}")).unwrap();
        let refused = sluice.manage("/reload").await;
        assert!(refused.status == 409 && refused.text().contains("[own]"), "{} {}", refused.status, refused.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_redis_the_cache_endpoints_tell_of_it() {
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, &redis.url(), RULES).await;
    until("Redis is connected", || async { sluice.get("/health").await.text().contains("Redis connection successful") }).await;
    let stats: serde_json::Value = serde_json::from_str(&sluice.get("/api/cache/stats").await.text()).unwrap();
    assert!(stats["cache_stats"]["connected_clients"].as_u64().unwrap() >= 1, "{stats}");
    assert!(stats["cache_stats"]["used_memory"].as_u64().unwrap() > 100_000, "{stats}");
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_empty_the_backends_own_cache_too_where_that_is_wanted() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/api/cache/clear?pattern=liq%3A%2A" => crate::support::reply("500 Oh No", "", b""),
        target => ok("", target.as_bytes()),
    })
    .await;
    let text = format!(
        "[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\nforward_invalidation=true\n[cache]\nredis=''\n{RULES}",
        backend.address
    );
    let sluice = Sluice::with(&text, &[]);
    sluice.get("/l?symbol=BTC").await;
    assert_eq!(sluice.manage("/purge?symbol=btc").await.text(), "{\"purged\":1}");
    until("it is told", || async { backend.count_of("/api/cache/invalidate/symbol/BTC") == 1 }).await;
    // One that fails is told to the operator, and changes nothing here.
    assert_eq!(sluice.manage("/purge?pattern=liq:*").await.status, 200);
    until("it is logged", || async { sluice.logged().contains("the backend did not empty its own cache") }).await;
    assert_eq!(sluice.get("/l?symbol=BTC").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_comes_whole_from_the_admin_listener_alone() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl = '1h'")).await;
    let page = get(sluice.admin, "/", &[]).await;
    assert_eq!((page.status, page.field("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.field("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'") && !policy.contains("unsafe")
    );
    let html = page.text();
    // Nothing in it needs more than that: no script or style within, nothing from elsewhere.
    for forbidden in ["<style", "style=", "onclick", "javascript:", "//", "<img", "<iframe"] {
        assert!(!html.contains(forbidden), "{forbidden}");
    }
    let named =
        |name: &str| html.split(&format!("{name}=\"")).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect::<Vec<_>>();
    let ids = named("id");
    for file in [named("src"), named("href")].concat().iter().filter(|file| !file.starts_with('#')) {
        let answer = get(sluice.admin, &format!("/{file}"), &[]).await;
        assert!(answer.status == 200 && answer.field("x-content-type-options") == Some("nosniff"), "{file}");
        assert!(!answer.text().contains("http://") || file == "page.js", "{file}");
        for place in answer.text().split("at(\"").skip(1).filter_map(|rest| rest.split('"').next().map(str::to_owned)) {
            assert!(ids.contains(&place), "the page has no {place}");
        }
    }
    // Every field has a label, and every label a field.
    for label in named("for") {
        assert!(ids.contains(&label), "{label}");
    }
    // The main listener has none of it.
    assert_eq!(sluice.get("/page.js").await.text(), "x");
    assert_eq!(Connection::open(sluice.admin).await.ask("POST", "/page.js", &[], b"").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_requests_are_told_with_what_they_waited_for() {
    let backend = Backend::slow(Duration::from_millis(300)).await;
    let text = format!("[log]\nslow='200ms'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl = '1h'"));
    let sluice = Sluice::with(&text, &[]);
    let millis = |line: &str, name: &str| {
        let value = line.split(&format!("{name}_ms=")).nth(1).unwrap().split(' ').next().unwrap();
        value.parse::<f64>().unwrap()
    };
    let told = async |target: &str| {
        until("it is told", || async { sluice.logged().contains(&format!("target=\"{target}\"")) }).await;
        let logged = sluice.logged();
        logged.lines().find(|line| line.contains(" slow ") && line.contains(&format!("target=\"{target}\""))).unwrap().to_owned()
    };
    assert_eq!(sluice.get("/fetched").await.text(), "/fetched");
    let line = told("/fetched").await;
    assert!(millis(&line, "head") >= 300.0 && millis(&line, "fetch") >= 300.0 && millis(&line, "pass") == 0.0, "{line}");
    assert!(line.contains("outcome=\"miss\"") && line.contains("route=\"all\""), "{line}");
    // A hit is none.
    assert!(sluice.get("/fetched").await.cache_status().contains("hit"));
    sluice.get_with("/passed?a=1&api_key=hidden", &[("Authorization", "x")]).await;
    let line = told("/passed?a=1&api_key=…").await;
    assert!(!sluice.logged().contains("hidden"), "{}", sluice.logged());
    assert!(millis(&line, "pass") >= 300.0 && millis(&line, "fetch") == 0.0, "{line}");
    assert_eq!(sluice.logged().lines().filter(|line| line.contains(" slow ")).count(), 2, "{}", sluice.logged());
}

/// What is answered to bytes.
async fn raw(address: std::net::SocketAddr, bytes: &str) -> crate::support::Answer {
    let mut connection = Connection::open(address).await;
    connection.send(bytes.as_bytes()).await;
    connection.answer(false).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_listener_answers_to_its_own_names_alone() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let hosts = |names: &str| {
        let url = format!("url='http://{}'", backend.address);
        format!("[admin]\ntoken='{TOKEN}'\nhosts={names}\n[backend]\n{url}\n[cache]\nredis=''\n{}", one_rule("ttl='1h'"))
    };
    let sluice = Sluice::with(&hosts("['Metrics.example, sluice']"), &[]);
    let port = sluice.admin.port();
    let ask = |method: &str, target: &str, host: &str| {
        let token = if method == "POST" { format!("Authorization: Bearer {TOKEN}\r\n") } else { String::new() };
        let bytes = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n{token}\r\n");
        let admin = sluice.admin;
        async move { raw(admin, &bytes).await }
    };
    for host in
        [format!("127.0.0.1:{port}"), format!("localhost:{port}"), "LOCALHOST".into(), "metrics.example".into(), "Sluice:9090".into()]
    {
        for target in ["/", "/stats", "/metrics", "/livez"] {
            assert_eq!(ask("GET", target, &host).await.status, 200, "{host} {target}");
        }
        assert_eq!(ask("POST", "/purge?tag=t", &host).await.status, 200, "{host}");
    }
    for host in ["evil.example", "evil.example:9090", "localhost.evil.example", "127.0.0.1.nip.io", "api.test", "other.metrics.example"] {
        for target in ["/", "/page.js", "/stats", "/metrics", "/explain?target=/", "/purge?number=1", "/warm", "/livez", "/readyz", "/none"]
        {
            let answer = ask("GET", target, host).await;
            assert_eq!(answer.status, 421, "{host} {target}: {}", answer.text());
            let told: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
            assert!(told["detail"].as_str().unwrap().contains("hosts in [admin]"), "{told}");
        }
        assert_eq!(ask("POST", "/purge?tag=t", host).await.status, 421, "{host}");
    }
    // Two names, none, and one in the target.
    for (bytes, status) in [
        ("GET /stats HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        ("GET /stats HTTP/1.1\r\n\r\n", 400),
        ("GET /stats HTTP/1.0\r\n\r\n", 200),
        ("GET http://localhost/stats HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400),
        ("GET http://evil.example/stats HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        ("GET http://localhost/stats HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    ] {
        assert_eq!(raw(sluice.admin, bytes).await.status, status, "{bytes}");
    }
    // The main listener is asked by any name. Other names are taken over without a restart.
    assert_eq!(raw(sluice.address, "GET /x HTTP/1.1\r\nHost: evil.example\r\n\r\n").await.status, 200);
    std::fs::write(&sluice.file, hosts("['other']")).unwrap();
    assert_eq!(sluice.manage("/reload").await.status, 200);
    assert_eq!((ask("GET", "/livez", "other:1").await.status, ask("GET", "/livez", "sluice").await.status), (200, 421));
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_for_everyone_ask_redis_once_a_second() {
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|_| ok("", b"x")).await;
    let sluice = Sluice::ruled(backend.address, &redis.url(), &one_rule("ttl='1h'")).await;
    until("Redis answers", || async { sluice.logged().contains("Redis answers") }).await;
    let began = tokio::time::Instant::now();
    let clients = (0..8).map(|_| {
        let address = sluice.address;
        tokio::spawn(async move {
            let mut connection = Connection::open(address).await;
            for _ in 0..50 {
                let stats: serde_json::Value =
                    serde_json::from_str(&connection.ask("GET", "/api/cache/stats", &[], b"").await.text()).unwrap();
                assert_eq!(stats["cache_stats"]["available"], true, "{stats}");
                assert!(stats["cache_stats"]["connected_clients"].as_u64().unwrap() > 0, "{stats}");
            }
            // And some that do not wait.
            for _ in 0..50 {
                Connection::open(address).await.send(b"GET /api/cache/stats HTTP/1.1\r\nHost: h\r\n\r\n").await;
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let said = String::from_utf8(redis.command(&[b"INFO", b"commandstats"]).await).unwrap();
    let calls = said.lines().find_map(|line| line.strip_prefix("cmdstat_info:calls=")?.split(',').next()?.parse::<u64>().ok()).unwrap_or(0);
    // Once a second while it was asked, and this test itself.
    assert!((1..=began.elapsed().as_secs() + 3).contains(&calls), "{calls}");
}
