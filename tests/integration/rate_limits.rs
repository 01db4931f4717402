//! Rate limits: who is refused and told what, alone and together with other instances.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::support::{Answer, Backend, Connection, Redis, Sluice, TOKEN, get, ok, until};

const RULE: &str = "[[route]]\nname='all'\npath='/api/*'\nttl='1h'\n";

fn limited(backend: &Backend, redis: &str, rules: &str) -> String {
    format!(
        "own.endpoints=true\ntrusted_proxies=['127.0.0.0/8']\n[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{}'\n[cache]\nredis='{redis}'\n{rules}",
        backend.address
    )
}

async fn from(sluice: &Sluice, client: &str, target: &str) -> Answer {
    get(sluice.address, target, &[("X-Forwarded-For", client)]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_much_is_refused_and_told_when_to_come_again() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let rules = format!("{RULE}[[limit]]\nname='clients'\nrate='2/m'\nburst=3\n");
    let sluice = Sluice::with(&limited(&backend, "", &rules), &[]);
    for left in [2, 1, 0] {
        let answer = from(&sluice, "192.0.2.1", "/api/x").await;
        assert_eq!((answer.status, answer.field("ratelimit-policy")), (200, Some("\"clients\";q=2;w=60")));
        assert!(answer.field("ratelimit").unwrap().starts_with(&format!("\"clients\";r={left};t=")));
    }
    let refused = from(&sluice, "192.0.2.1", "/api/x").await;
    assert_eq!((refused.status, refused.cache_status()), (429, "sluice; fwd=bypass; detail=rate-limited"));
    assert_eq!(refused.text(), "{\"detail\":\"Too many requests; Retry-After says when to try again\"}");
    let wait: u64 = refused.field("retry-after").unwrap().parse().unwrap();
    assert!((25..=30).contains(&wait), "{wait}");
    // Others are not concerned, and neither are health and management.
    assert_eq!(from(&sluice, "192.0.2.2", "/api/x").await.status, 200);
    assert_eq!(from(&sluice, "192.0.2.1", "/health").await.status, 200);
    assert_ne!(from(&sluice, "192.0.2.1", "/api/cache/stats").await.status, 429);
    assert_eq!(sluice.metric("rate_limited_total", &["route=\"all\""]).await, 1.0);
    assert_eq!(sluice.metric("limit_requests_total", &["limit=\"clients\"", "result=\"allowed\""]).await, 4.0);
    let explained = get(sluice.admin, "/explain?target=/api/x", &[]).await.text();
    assert!(explained.contains("limited    clients: 2/m, 3 at once, for each client address; every request counts\n"), "{explained}");
    // Counts survive a reload, and go with their limit.
    std::fs::write(&sluice.file, limited(&backend, "", &format!("{rules}[[limit]]\nname='other'\nrate='100/s'\n"))).unwrap();
    assert_eq!(sluice.manage("/reload").await.status, 200);
    assert_eq!(from(&sluice, "192.0.2.1", "/api/x").await.status, 429);
    std::fs::write(&sluice.file, limited(&backend, "", RULE)).unwrap();
    assert_eq!(sluice.manage("/reload").await.status, 200);
    let answer = from(&sluice, "192.0.2.1", "/api/x").await;
    assert_eq!((answer.status, answer.field("ratelimit")), (200, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn hits_are_free_where_only_the_backend_counts_and_stale_answers_are_better_than_none() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let rules = "[[route]]\nname='all'\npath='/api/*'\nttl='1s'\nstale_if_error='1h'\n[route.limit]\nrate='1/h'\nburst=2\ncount='backend'\nby='api-key'\n";
    let sluice = Sluice::with(&limited(&backend, "", &rules.replace("ttl='1s'", "ttl='1s'\nrequest_headers=['x-api-key']")), &[]);
    let address = sluice.address;
    let ask = |target: &'static str, key: &'static str| async move { get(address, target, &[("X-Api-Key", key)]).await };
    for _ in 0..20 {
        assert_eq!(ask("/api/x", "one").await.status, 200);
    }
    let other = ask("/api/y", "one").await;
    assert!(other.status == 200 && other.field("ratelimit").unwrap().starts_with("\"all\";r=0;t="), "{other:?}");
    assert_eq!(ask("/api/z", "one").await.status, 429);
    assert_eq!(ask("/api/z", "two").await.status, 200);
    until("a stale answer instead of none", || async {
        let answer = ask("/api/x", "one").await;
        assert_eq!(answer.status, 200);
        answer.cache_status().ends_with("detail=stale-rate-limited")
    })
    .await;
    assert_eq!(backend.count_of("/api/z"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_reported_refuses_nobody() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let rules = format!("{RULE}[[limit]]\nname='trial'\nrate='1/h'\nreport_only=true\n");
    let sluice = Sluice::with(&limited(&backend, "", &rules), &[]);
    for _ in 0..3 {
        let answer = from(&sluice, "192.0.2.1", "/api/x").await;
        assert_eq!((answer.status, answer.field("ratelimit")), (200, None));
    }
    assert_eq!(sluice.metric("limit_requests_total", &["limit=\"trial\"", "result=\"reported\""]).await, 2.0);
    until("it is logged", || async { sluice.logged().contains("beyond a limit that is only reported") }).await;
}

/// Asks as fast as it can for a while, and says how many requests were let through.
async fn let_through(sluices: &[&Sluice], span: Duration) -> f64 {
    let end = Instant::now() + span;
    let mut clients = JoinSet::new();
    for address in sluices.iter().map(|sluice| sluice.address).cycle().take(4) {
        clients.spawn(async move {
            let (mut open, mut through) = (Connection::open(address).await, 0);
            while Instant::now() < end {
                match open.ask("GET", "/api/x", &[], b"").await.status {
                    200 => through += 1,
                    status => assert_eq!(status, 429),
                }
            }
            through
        });
    }
    let mut sum = 0;
    while let Some(through) = clients.join_next().await {
        sum += through.unwrap();
    }
    f64::from(sum)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_instances_let_through_what_one_would_and_count_alone_without_redis() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let redis = Redis::start(&[]).await;
    let rules = format!("{RULE}[[limit]]\nname='shared'\nby='route'\nrate='100/s'\nburst=5\nshared=true\n");
    let text = limited(&backend, &redis.url(), &rules);
    let (one, two) = (Sluice::with(&text, &[]), Sluice::with(&text, &[]));
    for sluice in [&one, &two] {
        until("Redis answers", || async {
            sluice.metric("breaker_open", &["of=\"redis\""]).await == 0.0 && sluice.logged().contains("Redis answers")
        })
        .await;
    }
    let began = Instant::now();
    let through = let_through(&[&one, &two], Duration::from_secs(4)).await;
    let allowed = 5.0 + 100.0 * began.elapsed().as_secs_f64();
    // Less where the clients ask too slowly: what is not asked for within 50 ms is lost.
    assert!(through < 1.05 * allowed && through > 0.6 * allowed, "{through} of {allowed}");
    drop(redis);
    until("it is noticed", || async {
        one.metric("breaker_open", &["of=\"redis\""]).await == 1.0 || {
            one.get("/api/x").await;
            false
        }
    })
    .await;
    let began = Instant::now();
    let through = let_through(&[&one], Duration::from_secs(1)).await;
    let allowed = 5.0 + 100.0 * began.elapsed().as_secs_f64();
    assert!(through < 1.1 * allowed && through > 0.6 * allowed, "{through} of {allowed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_path_is_free_of_the_limit_of_its_rule() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let spellings = [
        "/api/orders",
        "/api/./orders",
        "/api//orders",
        "/api/x/../orders",
        "/api/x/..;/orders",
        "/api/orders?a;b",
        "/api/orders;v=1",
        "/api%2Forders",
        "/api/%2e/orders",
        "/api/x/%2e%2e/orders",
        "/api%252Forders",
        "/api\\orders",
        "/api/orders%3Fx",
        "/api/%6frders",
        "/api/orders?x={1}",
        "/api/orders/",
        "/api/%6frders/?x=1",
        "/api/./orders/",
    ];
    let rule = "[[route]]\nname='orders'\npath='/api/orders'\nttl='1h'\n";
    for limit in [
        "[[limit]]\nname='few'\nroutes=['orders']\nrate='1/h'\nburst=1\n",
        "[[limit]]\nname='few'\nroutes=['orders']\nrate='1/h'\nburst=1\nby='route'\n",
        "[route.limit]\nrate='1/h'\nburst=1\ncount='backend'\n",
    ] {
        for first in [spellings[0], spellings[1]] {
            let text = if limit.starts_with("[route") { format!("{rule}{limit}{RULE}") } else { format!("{rule}{RULE}{limit}") };
            let sluice = Sluice::with(&limited(&backend, "", &text), &[]);
            assert_eq!(from(&sluice, "192.0.2.1", first).await.status, 200);
            // What is stored is for those whom only the backend's requests count.
            for spelling in &spellings[usize::from(limit.contains("backend"))..] {
                let answer = from(&sluice, "192.0.2.1", spelling).await;
                let is_stored = answer.cache_status().contains("hit");
                assert!(answer.status == 429 || is_stored, "{limit} {first} {spelling}: {}", answer.cache_status());
            }
            // Paths of other rules do not count.
            for other in ["/api/others", "/api//others", "/api/orders2/./x"] {
                assert_eq!(from(&sluice, "192.0.2.1", other).await.status, 200, "{other}");
            }
        }
    }
    let sluice = Sluice::with(&limited(&backend, "", &format!("{rule}{RULE}[[limit]]\nname='few'\nroutes=['orders']\nrate='1/h'\n")), &[]);
    for target in ["/api/./orders", "/api/orders/"] {
        let explained = get(sluice.admin, &format!("/explain?target={target}"), &[]).await.text();
        assert!(explained.contains("limited    few: 1/h"), "{explained}");
    }
    for status in [200, 429, 429] {
        assert_eq!(from(&sluice, "192.0.2.3", "/api/orders/").await.status, status, "a hit counts too");
    }
    let long = format!("/{}x", "%255c..;/%2f//.".repeat(500));
    assert_eq!(from(&sluice, "192.0.2.2", &long).await.status, 200);
    assert_eq!(from(&sluice, "192.0.2.2", "/api/orders").await.status, 429, "a long path may be any");
}
