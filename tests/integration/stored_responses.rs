//! Freshness, validators, variants and codings as clients see them.

use crate::support::{Backend, Connection, Redis, Sluice, get, ok, one_rule, reply, until};

#[tokio::test(flavor = "multi_thread")]
async fn hits_say_their_age_and_their_validator() {
    let backend = Backend::start(|_| ok("Age: 7\r\nContent-Type: application/json\r\n", b"[]")).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let miss = sluice.get("/x").await;
    let hit = sluice.get("/x").await;
    assert_eq!(miss.cache_status(), "sluice; fwd=uri-miss; stored");
    assert!(hit.cache_status().starts_with("sluice; hit; ttl=3"));
    assert_eq!(hit.field("age"), Some("7"));
    assert_eq!((miss.field("etag"), hit.field("etag")), (Some("\"4f53cda18c2baa0c0354bb5f9a3ecbe5\""), miss.field("etag")));
    let tag = hit.field("etag").unwrap().to_owned();
    let same = sluice.get_with("/x", &[("If-None-Match", &format!("\"no\", W/{tag}"))]).await;
    assert_eq!((same.status, same.field("etag"), same.field("content-type")), (304, Some(tag.as_str()), None));
    assert_eq!(sluice.get_with("/x", &[("If-None-Match", "\"no\"")]).await.status, 200);
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_answers_are_refreshed_once_behind_the_clients_back() {
    let backend = Backend::start(|asked| ok("", format!("{} {}", asked.target, asked.method).as_bytes())).await;
    // A refresh ahead of time would be one more.
    let rule = format!("refresh_early=false\n{}", one_rule("ttl='3s'\nstale_while_revalidate='1h'"));
    let sluice = Sluice::ruled(backend.address, "", &rule).await;
    sluice.get("/x").await;
    until("a stale answer", || async { sluice.get("/x").await.cache_status().ends_with("detail=stale-while-revalidate") }).await;
    until("a fresh one again", || async { sluice.get("/x").await.cache_status().starts_with("sluice; hit; ttl=2") }).await;
    assert_eq!(backend.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_one_client_is_never_shared() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/cookie" => ok("Set-Cookie: a=b\r\n", b"x"),
        "/private" => ok("Cache-Control: private\r\n", b"x"),
        "/no-store" => ok("Cache-Control: no-store\r\n", b"x"),
        "/vary" => ok("Vary: *\r\n", b"x"),
        _ => ok("", b"x"),
    })
    .await;
    for headers in ["respect", "ignore"] {
        let sluice = Sluice::ruled(backend.address, "", &one_rule(&format!("ttl='1h'\norigin_headers='{headers}'"))).await;
        for target in ["/cookie", "/private", "/no-store", "/vary"] {
            for _ in 0..3 {
                assert!(!sluice.get(target).await.cache_status().contains("hit"), "{target}");
            }
        }
        for _ in 0..2 {
            let answer = sluice.get_with("/plain", &[("Authorization", "Bearer x")]).await;
            assert_eq!(answer.cache_status(), "sluice; fwd=bypass; detail=authorization");
        }
        assert_eq!(sluice.metric("memory_entries", &[]).await, 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_are_kept_apart() {
    let backend = Backend::start(|asked| {
        ok("Vary: Accept-Language, Accept-Encoding\r\n", asked.field("accept-language").unwrap_or("none").as_bytes())
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    for round in 0..3 {
        for language in ["de", "en", "fr"] {
            let answer = sluice.get_with("/x", &[("Accept-Language", language)]).await;
            assert_eq!(answer.text(), language);
            assert_eq!(answer.cache_status().contains("hit"), round > 0, "{}", answer.cache_status());
        }
        assert_eq!(sluice.get("/x").await.text(), "none");
    }
    // The first was asked for twice: what the backend varies by is told to it only once it says so.
    assert_eq!(backend.count(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rule_lists_is_sent_on_and_kept_apart() {
    let said = |asked: &crate::support::Asked, name: &str| asked.field(name).unwrap_or("none").to_owned();
    let backend = Backend::start(move |asked| {
        let text = format!("{} {} {}", said(asked, "x-tenant"), said(asked, "x-api-key"), said(asked, "x-other"));
        match asked.target.as_str() {
            "/private" => ok("Cache-Control: private\r\n", text.as_bytes()),
            _ => ok("", text.as_bytes()),
        }
    })
    .await;
    let get = |sluice: &Sluice, target: &'static str, fields: &'static [(&'static str, &'static str)]| {
        let address = sluice.address;
        async move { crate::support::get(address, target, fields).await }
    };
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'\nrequest_headers=['X-Tenant']")).await;
    for round in 0..2 {
        for (fields, text) in
            [(&[("X-Tenant", "a"), ("X-Other", "o")][..], "a none none"), (&[("X-Tenant", "b")], "b none none"), (&[], "none none none")]
        {
            let answer = get(&sluice, "/x", fields).await;
            assert_eq!((answer.text().as_str(), answer.cache_status().contains("hit")), (text, round > 0), "{fields:?}");
        }
        // Credentials: for whoever has them alone.
        let answer = get(&sluice, "/x", &[("X-Tenant", "a"), ("X-Api-Key", "secret")]).await;
        assert_eq!((answer.text().as_str(), answer.cache_status()), ("a secret none", "sluice; fwd=bypass; detail=authorization"));
        // A private answer is made for its client, with all that it said.
        assert_eq!(get(&sluice, "/private", &[("X-Other", "o")]).await.text(), "none none o");
    }
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'\nrequest_headers=['x-api-key']")).await;
    for round in 0..2 {
        for key in ["one", "two"] {
            let answer = sluice.get_with("/x", &[("X-Api-Key", key)]).await;
            assert_eq!((answer.text(), answer.cache_status().contains("hit")), (format!("none {key} none"), round > 0));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_backend_stops_naming_is_not_sent_on_any_more() {
    let backend = Backend::start(|asked| {
        let text = asked.field("x-mood").unwrap_or("none").to_owned();
        let vary = if asked.field("x-mood") == Some("fickle") { "" } else { "Vary: X-Mood\r\n" };
        ok(&format!("Cache-Control: max-age=600\r\n{vary}"), text.as_bytes())
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    for _ in 0..2 {
        assert_eq!(sluice.get_with("/x", &[("X-Mood", "good")]).await.text(), "good");
        assert_eq!(sluice.get_with("/x", &[("X-Mood", "fickle")]).await.text(), "fickle", "for this client alone");
        assert_eq!(sluice.get("/x").await.text(), "none");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_wait_together_get_their_own_variant() {
    let backend = Backend::start(|asked| {
        let mut steps = vec![crate::support::Step::Delay(std::time::Duration::from_millis(200))];
        steps.extend(ok("Vary: Accept-Language\r\n", asked.field("accept-language").unwrap_or("none").as_bytes()));
        steps
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let asking: Vec<_> = (0..40)
        .map(|number| {
            let address = sluice.address;
            tokio::spawn(async move {
                let language = ["de", "en"][number % 2];
                let answer = crate::support::get(address, "/x", &[("Accept-Language", language)]).await;
                assert_eq!(answer.text(), language);
            })
        })
        .collect();
    for asked in asking {
        asked.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn origins_do_not_share_answers() {
    // As common frameworks do: allowed only if asked, and without saying Vary.
    let backend = Backend::start(|asked| match asked.field("origin") {
        Some(_) => ok("Access-Control-Allow-Origin: *\r\n", b"x"),
        None => ok("", b"x"),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    sluice.get("/x").await;
    assert_eq!(sluice.get_with("/x", &[("Origin", "https://a.example")]).await.field("access-control-allow-origin"), Some("*"));
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_compressed_once_and_inflated_for_those_who_want_it() {
    let body = "0123456789abcdef".repeat(1000);
    let sent = body.clone();
    let backend = Backend::start(move |_| ok("ETag: \"v1\"\r\n", sent.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let gzip = [("Accept-Encoding", "gzip")];
    assert_eq!(sluice.get("/x").await.text(), body);
    let packed = sluice.get_with("/x", &gzip).await;
    assert_eq!(
        (packed.field("content-encoding"), packed.field("vary"), packed.field("etag")),
        (Some("gzip"), Some("Accept-Encoding"), Some("W/\"v1\""))
    );
    assert!(packed.body.len() < 1000 && packed.text() == body);
    for _ in 0..2 {
        let plain = sluice.get("/x").await;
        assert_eq!((plain.text(), plain.field("etag"), plain.field("vary")), (body.clone(), Some("\"v1\""), Some("Accept-Encoding")));
    }
    assert_eq!(sluice.get_with("/x", &[("If-None-Match", "\"v1\""), gzip[0]]).await.status, 304);
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gzip_body_that_is_not_one_passes_and_is_not_kept() {
    let backend = Backend::start(|_| ok("Content-Encoding: gzip\r\n", &[7; 5000])).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    for _ in 0..2 {
        let answer = sluice.get_with("/x", &[("Accept-Encoding", "gzip")]).await;
        assert_eq!(answer.body, vec![7; 5000]);
        assert!(!answer.cache_status().contains("hit"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_pasts_live_longer() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let rules = "[[route]]\nname='all'\npath='/*'\nttl='1m'\nkey='all'\n[route.history]\nparameter='end'\nolder_than='1h'\nttl='24h'\n";
    let sluice = Sluice::ruled(backend.address, "", rules).await;
    for (target, at_least) in
        [("/x?end=2025-01-01", 86_000), ("/x?end=1735689600000", 86_000), ("/x?end=2999-01-01", 50), ("/x?end=soon", 50)]
    {
        sluice.get(target).await;
        let hit = sluice.get(target).await;
        let left: u64 = hit.cache_status().rsplit('=').next().unwrap().parse().unwrap();
        assert!(left >= at_least && left < at_least + 1000, "{target}: {left}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_alive_client_gets_each_answer_in_turn() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let mut connection = Connection::open(sluice.address).await;
    let pipelined: String = (0..50).map(|number| format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", number % 5)).collect();
    connection.send(pipelined.as_bytes()).await;
    for number in 0..50 {
        assert_eq!(connection.answer(false).await.unwrap().text(), format!("/{}", number % 5));
    }
}

/// Answers 304 to the right condition, with a field that changed; counts what it was asked in full.
async fn validating(control: &'static str) -> Backend {
    Backend::start(move |asked| {
        let fields = format!("ETag: \"v1\"\r\nCache-Control: {control}\r\n");
        if asked.field("if-none-match") == Some("\"v1\"") {
            return reply("304 Not Modified", &format!("{fields}X-Told: anew\r\nContent-Type: text/odd\r\n"), b"");
        }
        ok(&format!("{fields}X-Told: first\r\nX-Kept: yes\r\nContent-Type: text/plain\r\n"), b"the body")
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_went_stale_is_validated_and_freshened() {
    let backend = validating("max-age=1").await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='0s'")).await;
    assert_eq!(sluice.get("/x").await.field("x-told"), Some("first"));
    until("it was validated", || async { sluice.get("/x").await.field("x-told") == Some("anew") }).await;
    let freshened = sluice.get("/x").await;
    assert_eq!((freshened.status, freshened.text().as_str(), freshened.field("x-kept")), (200, "the body", Some("yes")));
    assert_eq!((freshened.field("content-type"), freshened.field("via")), (Some("text/plain"), Some("1.1 sluice")));
    let full = backend.asked.lock().unwrap().iter().filter(|asked| asked.field("if-none-match").is_none()).count();
    assert_eq!(full, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_cache_is_validated_each_time_and_never_served_without() {
    let mut backend = validating("no-cache").await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'\nstale_if_error='1h'")).await;
    for asked in 1..=3 {
        let answer = sluice.get("/x").await;
        assert_eq!((answer.status, answer.text().as_str(), backend.count()), (200, "the body", asked));
        assert!(answer.cache_status().contains("fwd="), "{}", answer.cache_status());
        until("it is kept", || async { sluice.metric("memory_entries", &[]).await == 1.0 }).await;
    }
    assert_eq!(backend.last().field("if-none-match"), Some("\"v1\""));
    backend.kill().await;
    assert_eq!(sluice.get("/x").await.status, 502);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_that_says_it_is_fresh_does_not_take_a_good_answers_place() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/x?good" => ok("Cache-Control: max-age=1\r\n", b"good"),
        _ => reply("503 Oops", "Cache-Control: max-age=600\r\n", b"bad"),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='0s'\nstale_if_error='1h'\nquery=[]")).await;
    assert_eq!(sluice.get("/x?good").await.text(), "good");
    until("it goes stale", || async { sluice.get("/x").await.cache_status().contains("ttl=-") }).await;
    let stale = sluice.get("/x").await;
    assert_eq!((stale.status, stale.text().as_str()), (200, "good"));
    // Where there is nothing to lose, the backend's word counts.
    assert_eq!(sluice.get("/y").await.status, 503);
    assert!(sluice.get("/y").await.cache_status().contains("sluice; hit"), "{}", sluice.get("/y").await.cache_status());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_for_one_client_comes_in_a_coding_that_it_takes() {
    let backend = Backend::start(|asked| {
        let packed = asked.field("accept-encoding").is_some_and(|codings| codings.contains("gzip"));
        if packed {
            ok("Cache-Control: private\r\nContent-Encoding: gzip\r\n", &sluice::http::encoding::gzip(b"plain words"))
        } else {
            ok("Cache-Control: private\r\n", b"plain words")
        }
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    for _ in 0..3 {
        let answer = sluice.get("/x").await;
        assert_eq!((answer.field("content-encoding"), answer.body.as_slice()), (None, &b"plain words"[..]));
        let packed = sluice.get_with("/x", &[("Accept-Encoding", "gzip")]).await;
        assert_eq!((packed.field("content-encoding"), packed.text().as_str()), (Some("gzip"), "plain words"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successful_change_invalidates_and_a_failed_one_does_not() {
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|asked| match (asked.method.as_str(), asked.target.as_str()) {
        ("GET", _) => ok("Vary: X-Kind\r\n", asked.field("x-kind").unwrap_or("none").as_bytes()),
        ("PUT", _) => reply("500 Oops", "", b""),
        ("PATCH", _) => ok("Location: /b\r\nContent-Location: http://elsewhere.test/c\r\n", b""),
        _ => ok("", b""),
    })
    .await;
    let rules = "[[route]]\nname='all'\npath='/*'\nkey='all:{q}'\nttl='1h'\n";
    let sluice = Sluice::ruled(backend.address, &redis.url(), rules).await;
    until("Redis is connected", || async { sluice.get("/health").await.text().contains("Redis connection successful") }).await;
    let is_hit = async |target: &str, fields: &[(&str, &str)]| sluice.get_with(target, fields).await.cache_status().contains("; hit");
    let change = async |method: &str, target: &str| Connection::open(sluice.address).await.ask(method, target, &[], b"x").await.status;
    let forms: [&[(&str, &str)]; 3] = [&[], &[("X-Kind", "one")], &[("Origin", "http://o.test")]];
    for target in ["/a", "/b", "/c"] {
        for fields in forms {
            sluice.get_with(target, fields).await;
            assert!(is_hit(target, fields).await, "{target}");
        }
    }
    assert_eq!(change("PUT", "/a").await, 500);
    assert!(is_hit("/a", &[]).await);
    assert_eq!(change("PATCH", "/a").await, 200);
    for fields in forms {
        assert!(!is_hit("/a", fields).await && !is_hit("/b", fields).await, "{fields:?}");
        assert!(is_hit("/c", fields).await, "another origin's address is not theirs to invalidate");
        until("it is kept again", || async { is_hit("/a", fields).await }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_are_cut_from_what_is_kept() {
    let body: Vec<u8> = (0..5000_u32).flat_map(|number| format!("{number:04}").into_bytes()).collect();
    let whole = body.clone();
    let backend =
        Backend::start(
            move |asked| if asked.method == "GET" { ok("ETag: \"v1\"\r\nContent-Type: text/plain\r\n", &body) } else { ok("", b"") },
        )
        .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    sluice.get("/x").await;
    let part = async |fields: &[(&str, &str)]| sluice.get_with("/x", fields).await;
    let one = part(&[("Range", "bytes=4-7"), ("Accept-Encoding", "gzip")]).await;
    assert_eq!((one.status, one.body.as_slice(), one.field("content-range")), (206, &b"0001"[..], Some("bytes 4-7/20000")));
    assert_eq!((one.field("content-encoding"), one.field("content-length")), (None, Some("4")));
    assert!(one.cache_status().contains("; hit"), "{}", one.cache_status());
    assert_eq!(part(&[("Range", "bytes=-4")]).await.body, b"4999");
    assert_eq!(part(&[("Range", "bytes=19996-")]).await.body, b"4999");
    let several = part(&[("Range", "bytes=0-3,19996-")]).await;
    assert!(several.field("content-type").unwrap().starts_with("multipart/byteranges; boundary="), "{several:?}");
    let none = part(&[("Range", "bytes=20000-")]).await;
    assert_eq!((none.status, none.field("content-range")), (416, Some("bytes */20000")));
    for (fields, status) in [
        ([("Range", "bytes=0-3"), ("If-Range", "\"v1\"")], 206),
        ([("Range", "bytes=0-3"), ("If-Range", "\"v2\"")], 200),
        ([("Range", "bytes=0-3"), ("If-None-Match", "\"v1\"")], 304),
        ([("Range", "lines=0-3"), ("X-Y", "z")], 200),
    ] {
        let answer = part(&fields).await;
        assert_eq!(answer.status, status, "{fields:?}");
        assert!(status != 200 || answer.body == whole, "{fields:?}");
    }
    let head = Connection::open(sluice.address).await.ask("HEAD", "/x", &[("Range", "bytes=0-3")], b"").await;
    assert_eq!((head.status, head.field("content-length")), (200, Some("20000")));
    assert_eq!(backend.count(), 1);
    // The backend was never asked for a part, so none can be taken for the whole.
    assert!(backend.last().field("range").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_authorized_requests_are_shared_only_where_rule_and_answer_say_so() {
    let backend = Backend::start(|asked| {
        let user = asked.field("authorization").unwrap_or("nobody").to_owned();
        let control = if asked.target.starts_with("/public") { "public, max-age=60" } else { "max-age=60" };
        ok(&format!("Cache-Control: {control}\r\n"), user.as_bytes())
    })
    .await;
    let as_user = |user: &'static str| [("Authorization", user)];
    for (rule, shared) in [("ttl='0s'", false), ("ttl='0s'\nauthorization='respect'", true)] {
        let sluice = Sluice::ruled(backend.address, "", &one_rule(rule)).await;
        for user in ["anne", "bert", "anne"] {
            assert_eq!(sluice.get_with("/own", &as_user(user)).await.text(), user, "never another's");
        }
        assert_eq!(sluice.get("/own").await.text(), "nobody");
        assert!(sluice.get("/own").await.cache_status().contains("; hit"));
        assert_eq!(sluice.get_with("/own", &as_user("anne")).await.text(), "anne", "nor nobody's");
        assert_eq!(sluice.get_with("/public", &as_user("anne")).await.text(), "anne");
        until("it is kept, if it may be", || async {
            !shared || sluice.get_with("/public", &as_user("anne")).await.cache_status().contains("; hit")
        })
        .await;
        let other = sluice.get_with("/public", &as_user("bert")).await.text();
        assert_eq!(other, if shared { "anne" } else { "bert" });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_ask_of_the_cache_is_heeded_where_the_rule_says_so() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let ignoring = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    ignoring.get("/x").await;
    for value in ["no-cache", "no-store", "max-age=0", "only-if-cached"] {
        assert!(ignoring.get_with("/x", &[("Cache-Control", value)]).await.cache_status().contains("; hit"), "{value}");
    }
    let heeding = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'\nclient_directives='respect'")).await;
    let ask = async |target: &str, value: &str| heeding.get_with(target, &[("Cache-Control", value)]).await;
    let nothing = ask("/x", "only-if-cached").await;
    assert_eq!((nothing.status, nothing.cache_status()), (504, "sluice; fwd=bypass; detail=only-if-cached"));
    assert_eq!(ask("/x", "no-store").await.cache_status(), "sluice; fwd=bypass; detail=no-store");
    assert_eq!(heeding.get("/x").await.cache_status(), "sluice; fwd=uri-miss; stored", "nothing was kept");
    for (value, status) in [
        ("only-if-cached", "sluice; hit; ttl=3"),
        ("no-store", "sluice; hit; ttl=3"),
        ("max-age=600", "sluice; hit; ttl=3"),
        ("min-fresh=600", "sluice; hit; ttl=3"),
        ("min-fresh=7200", "sluice; fwd=request; stored"),
        ("no-cache", "sluice; fwd=request; stored"),
    ] {
        let answer = ask("/x", value).await;
        assert!(answer.cache_status().starts_with(status), "{value}: {}", answer.cache_status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coding_that_cannot_be_undone_is_kept_as_it_is_where_the_backend_says_how_long() {
    let backend = Backend::start(|asked| {
        let control = if asked.target == "/said" { "Cache-Control: max-age=60\r\n" } else { "" };
        ok(&format!("{control}Content-Encoding: br\r\n"), b"\x0b\x02\x80coded\x03")
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    for _ in 0..2 {
        for target in ["/said", "/silent"] {
            let answer = sluice.get(target).await;
            assert_eq!((answer.field("content-encoding"), answer.body.as_slice()), (Some("br"), &b"\x0b\x02\x80coded\x03"[..]), "{target}");
        }
    }
    assert_eq!((backend.count_of("/said"), backend.count_of("/silent")), (1, 2));
    assert_eq!(sluice.get_with("/said", &[("Range", "bytes=0-1")]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn reserved_characters_and_encoded_ones_are_different_targets() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    let mut pairs: Vec<(String, String)> =
        ":/?@!$'()*,=[]&+".chars().map(|reserved| (format!("/q?a=1{reserved}2"), format!("/q?a=1%{:02X}2", reserved as u32))).collect();
    pairs.extend(":@!$&'()*+,=[]".chars().map(|reserved| (format!("/p1{reserved}2"), format!("/p1%{:02x}2", reserved as u32))));
    pairs.extend(":/@,[]".chars().map(|reserved| (format!("/n?a{reserved}b=1"), format!("/n?a%{:02X}b=1", reserved as u32))));
    for (plain, encoded) in &pairs {
        for target in [plain, encoded, plain, encoded] {
            assert_eq!(sluice.get(target).await.text(), *target);
        }
        assert!(sluice.get(encoded).await.cache_status().contains("hit"), "{encoded}");
    }
    assert_eq!(backend.count(), 2 * pairs.len());
    // Unreserved characters are the same either way, and so are the digits of an escape.
    for (one, same) in [("/u?a=b-._~", "/u?%61=%62%2d%2E%5f%7E"), ("/u%7Ev", "/u~v"), ("/h?a=%2f%c3%a9", "/h?a=%2F%C3%A9")] {
        let first = sluice.get(one).await;
        let second = sluice.get(same).await;
        assert!(second.text() == first.text() && second.cache_status().contains("hit"), "{same}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_are_hits_before_they_are_packed_and_are_packed_however_many_come_at_once() {
    const SIZE: usize = 1 << 20;
    let backend = Backend::start(|asked| ok("", asked.target.repeat(SIZE / asked.target.len()).as_bytes())).await;
    let text = format!("[backend]\nurl='http://{}'\n[cache]\nredis=''\n{}", backend.address, one_rule("ttl='1h'"));
    let sluice = Sluice::with(&text, &[]);
    let targets: Vec<String> = (10..90).map(|number| format!("/{number}")).collect();
    for some in targets.chunks(8) {
        let ask = |target: &String| {
            let (address, target) = (sluice.address, target.clone());
            tokio::spawn(async move { get(address, &target, &[]).await.plain() == target.repeat(SIZE / 3).as_bytes() })
        };
        for asking in some.iter().map(ask).collect::<Vec<_>>() {
            assert!(asking.await.unwrap());
        }
    }
    for target in &targets {
        until("it is packed", || async {
            let answer = sluice.get_with(target, &[("Accept-Encoding", "gzip")]).await;
            assert!(answer.status == 200 && answer.plain() == target.repeat(SIZE / 3).as_bytes());
            answer.field("content-encoding") == Some("gzip") && answer.cache_status().starts_with("sluice; hit")
        })
        .await;
    }
    assert_eq!(backend.count(), targets.len());
}
