//! `sluice explain --running` says what the program does: random rules and requests, each explained and then asked.

use std::collections::HashMap;
use std::fmt::Write as _;

use crate::support::{Asked, Backend, Connection, Sluice, Step, get, number, ok, reply};

/// Requests that are explained and asked, for each set of rules.
const REQUESTS: u64 = 150;

/// Answers by the second segment of the path.
fn answer(asked: &Asked) -> Vec<Step> {
    match asked.target.split(['/', '?']).nth(2).unwrap_or("") {
        "private" => ok("Cache-Control: private\r\n", b"x"),
        "cookie" => ok("Set-Cookie: a=b\r\n", b"x"),
        "vary" => ok("Vary: Accept-Language\r\n", b"x"),
        "public" => ok("Cache-Control: public, max-age=600\r\n", b"x"),
        "stale" => ok("Cache-Control: max-age=0, stale-while-revalidate=600\r\nETag: \"a\"\r\n", b"x"),
        "none" => reply("404 None", "", b"x"),
        "error" => reply("500 Oh No", "", b"x"),
        _ => ok("", b"x"),
    }
}

/// Chooses one.
fn one<'a>(random: &mut fastrand::Rng, of: &[&'a str]) -> &'a str {
    of[random.usize(..of.len())]
}

fn rules(random: &mut fastrand::Rng) -> String {
    let mut text = String::from("own.endpoints=true\n");
    for name in ["a", "b", "c"] {
        let path = one(random, &["/a/*", "/b/*", "/*", "/a/plain", "/health", "/b/cookie"]);
        write!(text, "[[route]]\nname='{name}'\npath='{path}'\n").unwrap();
        for line in [
            one(random, &["ttl='1h'", "ttl='1h'", "ttl='0s'"]),
            one(random, &["", "query=['symbol','cb']", "query=[]", "query=['symbol']\nfold_case=['symbol']"]),
            one(random, &["", "", "with=['symbol']", "without=['cb']"]),
            one(random, &["", "", "", "cache=false", "rollout='50%'", "shadow=true"]),
            one(random, &["", "request_headers=['x-tenant']", "request_headers='all'", "authorization='respect'"]),
            one(random, &["", "set_cookie='store'", "negative_ttl='1h'", "client_directives='respect'"]),
        ] {
            writeln!(text, "{line}").unwrap();
        }
    }
    text
}

fn target(random: &mut fastrand::Rng) -> String {
    let path = one(random, &["/a/", "/b/", "/c/", "/health", "/a%2F", "/a/../", "/a/%2C"]);
    let kind = one(random, &["plain", "private", "cookie", "vary", "public", "stale", "none", "error"]);
    let mut target = if path == "/health" { path.to_owned() } else { format!("{path}{kind}") };
    for number in 0..random.usize(..3) {
        let name = one(random, &["symbol", "Symbol", "cb", "x", "s%79mbol", "symbol[]", "a%2Cb"]);
        let value = one(random, &["=A", "=B", "=a", "=(1)", "=(2)", "=a%20b", "=a+b", "=%2C", "=,", "", "="]);
        write!(target, "{}{name}{value}", if number == 0 { '?' } else { '&' }).unwrap();
    }
    target
}

fn fields(random: &mut fastrand::Rng) -> Vec<(&'static str, &'static str)> {
    let all = [
        ("Origin", "http://o"),
        ("Origin", "http://p"),
        ("X-Tenant", "one"),
        ("X-Tenant", "two"),
        ("Authorization", "Bearer x"),
        ("X-Api-Key", "k"),
        ("Accept-Language", "de"),
        ("Cookie", "a=b"),
        ("Cache-Control", "no-cache"),
        ("Cache-Control", "only-if-cached"),
    ];
    let mut chosen: Vec<(&str, &str)> = Vec::new();
    for _ in 0..random.usize(..3) {
        let field = all[random.usize(..all.len())];
        if !chosen.iter().any(|(name, _)| *name == field.0) {
            chosen.push(field);
        }
    }
    chosen
}

/// Percent-encodes everything.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// What became of a request, in the words of the explanation.
fn became(status: &str) -> &'static str {
    let detail = status.split("detail=").nth(1).unwrap_or("");
    match () {
        () if detail == "local" => "Sluice's own",
        () if detail == "only-if-cached" => "refused with 504",
        () if status.contains("; hit; ttl=-") => "a stale hit",
        () if status.contains("; hit;") => "a hit",
        () if status.contains("fwd=bypass") && !detail.starts_with("uncacheable") => "passed",
        () => "not a hit",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_explained_is_what_happens() {
    let seed = number("SLUICE_SEED", fastrand::u64(..));
    let random = &mut fastrand::Rng::with_seed(seed);
    for _ in 0..number("SLUICE_EXPLAINED", 600) / REQUESTS {
        let backend = Backend::start(answer).await;
        let text = rules(random);
        let sluice = Sluice::with(&format!("{text}[backend]\nurl='http://{}'\n[cache]\nredis=''\n", backend.address), &[]);
        let mut asking = Connection::open(sluice.address).await;
        // The key by what is shown of it, and the other way around.
        let (mut shown_by_key, mut key_by_shown) = (HashMap::new(), HashMap::new());
        for _ in 0..REQUESTS {
            let (target, fields) = (target(random), fields(random));
            let headers: String = fields.iter().map(|(name, value)| format!("&header={}", encoded(&format!("{name}: {value}")))).collect();
            let explained = get(sluice.admin, &format!("/explain?target={}{headers}", encoded(&target)), &[]).await.text();
            let answer = asking.ask("GET", &target, &fields, b"").await;
            let case = format!("SLUICE_SEED={seed}\n{text}\n{target} {fields:?}\n{}\n{explained}", answer.cache_status());
            let said = explained.lines().last().and_then(|line| line.strip_prefix("answer     ")).unwrap_or_else(|| panic!("{case}"));
            match became(answer.cache_status()) {
                "passed" => {
                    // An error of the backend's own stands behind the reason.
                    let detail = answer.cache_status().split("detail=").nth(1).unwrap().split(';').next().unwrap();
                    assert!(said.starts_with("not a hit: passed to ") && said.contains(&format!("({detail})")), "{case}");
                }
                other => assert!(said.starts_with(other), "{case}"),
            }
            if let Some(left) = answer.cache_status().strip_prefix("sluice; hit; ttl=").and_then(|left| left.parse::<u64>().ok()) {
                assert!(said.contains(" more, until 20") && left > 0, "{case}");
            }
            // Two requests have one key if and only if the same is shown of them.
            let shown: Vec<&str> =
                explained.lines().filter(|line| ["canonical", "keyed  ", "rule   "].iter().any(|one| line.starts_with(one))).collect();
            if let Some(key) = explained.lines().find(|line| line.starts_with("in Redis")).map(str::to_owned) {
                let shown = shown.join("\n");
                assert_eq!(shown_by_key.entry(key.clone()).or_insert_with(|| shown.clone()), &shown, "{case}");
                // The values of fields are not shown.
                if !shown.contains("keyed") {
                    assert_eq!(key_by_shown.entry(shown).or_insert_with(|| key.clone()), &key, "{case}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn why_a_url_is_not_a_hit_is_said_in_one_sentence() {
    let backend = Backend::start(answer).await;
    let rules = "[[route]]\nname='other'\npath='/b/*'\n[[route]]\nname='picky'\npath='/a/*'\nwith=['limit']\n\
                 [[route]]\nname='a'\npath='/a/*'\nttl='1h'\nkey='a:{symbol}'\nquery=['symbol']\n";
    let sluice = Sluice::ruled(backend.address, "", rules).await;
    let explain = async |target: &str| get(sluice.admin, &format!("/explain?target={}", encoded(target)), &[]).await.text();
    let said = explain("/a/plain?symbol=A").await;
    for line in [
        "not        other (it is for /b/*)\n",
        "not        picky ('limit' is absent)\n",
        "rule       a (path = \"/a/*\")\n",
        "stored     nothing\n",
    ] {
        assert!(said.contains(line), "{line}{said}");
    }
    assert!(said.ends_with("once for all who wait at the same time\n"), "{said}");
    sluice.get("/a/plain?symbol=A").await;
    let said = explain("/a/plain?symbol=A").await;
    assert!(said.contains("stored     in memory: 200, 1 bytes, since 20") && said.contains("answer     a hit for "), "{said}");
    // Old voids do not matter, new ones once.
    sluice.manage("/purge?pattern=a:A").await;
    sluice.manage("/purge?pattern=a:A").await;
    let said = explain("/a/plain?symbol=A").await;
    assert_eq!(said.matches("voided     by pattern a:A").count(), 1, "{said}");
    assert!(said.contains("answer     not a hit: the purge of pattern a:A voided what was stored at 20"), "{said}");
    sluice.get("/a/plain?symbol=A").await;
    assert!(!explain("/a/plain?symbol=A").await.contains("voided"));
    sluice.manage("/purge?pattern=a:A&soft=true").await;
    assert!(explain("/a/plain?symbol=A").await.contains("what is stored was voided by the purge of pattern a:A at 20"));
    for (target, why, change) in [
        ("/a/private", "says private", "change it at the backend"),
        ("/a/cookie", "sets a cookie (Set-Cookie)", "set_cookie = \"store\""),
        ("/a/none", "negative_ttl is 0s", "a negative_ttl keeps it"),
        ("/a/error", "a 500 says that the backend failed", "mend that"),
    ] {
        sluice.get(target).await;
        let said = explain(target).await;
        let last = said.lines().last().unwrap();
        assert!(last.starts_with("answer     not a hit: the last answer (") && last.contains(why) && last.contains(change), "{said}");
    }
    assert!(explain("/a/private").await.contains("; each request is passed to http://"));
    // Names that some program takes for another are part of the key, and it is said.
    let said = explain("/a/plain?Symbol=A&cb=(1)&x=1").await;
    for line in ["kept       Symbol (not in the rule's query, but some programs take it for symbol)", "kept       cb (", "ignored    x ("] {
        assert!(said.contains(line), "{line}\n{said}");
    }
    assert!(said.contains("  Symbol=\"A\"") && said.contains("  cb=\"(1)\""), "{said}");
}
