//! Attacks over raw sockets. After each: a clean request gets what it got before, and the backend was asked nothing that
//! no client meant.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Asked, Backend, Connection, HANG, Sluice, Step, columns, frames, get, ok, one_rule, reply, rows, unescape, until};

const RULES: &str = "[[route]]\nname='pass'\npath='/pass/*'\ncache=false\n[[route]]\nname='two'\npath='/two'\nquery=['symbol']\nfold_case=['symbol']\nttl='1h'\n[[route]]\nname='all'\npath='/*'\nttl='1h'\nnegative_ttl='1h'\n";

/// Says what it was asked: method, target and every field that is not the connection's own.
fn echo(asked: &Asked) -> Vec<Step> {
    let mut text = format!("{} {} {}\n", asked.method, asked.target, String::from_utf8_lossy(&asked.body));
    for (name, value) in &asked.fields {
        if !["x-request-id", "x-forwarded-for", "host", "via"].contains(&name.as_str()) {
            text.push_str(&format!("{name}: {value}\n"));
        }
    }
    ok("", text.as_bytes())
}

/// Sluice in front of the echo, with something cached.
struct Scene {
    backend: Backend,
    sluice: Sluice,
    clean: String,
}

impl Scene {
    async fn start() -> Self {
        let backend = Backend::start(echo).await;
        let sluice = Sluice::ruled(backend.address, "", RULES).await;
        let clean = sluice.get("/clean").await.text();
        assert!(clean.starts_with("GET /clean"));
        Self { backend, sluice, clean }
    }

    /// What was cached is as it was, what is not cached gets its own answer, and nobody smuggled anything.
    async fn is_unharmed(&self, probe: &str) {
        let hit = self.sluice.get("/clean").await;
        assert!(hit.cache_status().contains("hit") && hit.text() == self.clean, "after {probe:?}: {hit:?}");
        for number in 0..3 {
            let target = format!("/pass/{number}");
            let text = self.sluice.get(&target).await.text();
            assert!(text.starts_with(&format!("GET {target} \n")), "after {probe:?}: {text}");
        }
        let asked = self.backend.asked.lock().unwrap();
        assert!(!asked.iter().any(|asked| asked.target.contains("smuggled")), "after {probe:?}: {asked:?}");
    }

    /// Sends bytes; returns the status of the first answer, and whether the connection still answers a clean request.
    async fn probe(&self, bytes: &[u8]) -> (u16, bool) {
        let mut connection = Connection::open(self.sluice.address).await;
        connection.send(bytes).await;
        let answer = connection.answer(bytes.starts_with(b"HEAD")).await;
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        if answer.is_none_or(|answer| answer.field("connection") == Some("close")) {
            assert!(connection.head().await.is_none(), "nothing follows an answer that closes");
            return (status, false);
        }
        connection.send(b"GET /clean HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
        let Some(next) = connection.answer(false).await else { return (status, false) };
        assert_eq!(next.text(), self.clean, "the answer after {:?}", String::from_utf8_lossy(bytes));
        (status, true)
    }
}

/// What is refused, with which status, and whether the connection lives on.
const REFUSED: &str = include_str!("attacks/refused.txt");

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_harms_nothing() {
    let scene = Scene::start().await;
    let rows = rows(REFUSED);
    assert!(rows.len() >= 74, "{}", rows.len());
    for row in rows {
        let [status, connection, text] = columns(row);
        let asked = scene.backend.count();
        let answered = scene.probe(&unescape(text)).await;
        assert_eq!(answered, (status.parse().unwrap(), connection == "kept"), "{text}");
        assert_eq!(scene.backend.count(), asked, "{text} reached the backend");
        scene.is_unharmed(text).await;
    }
    let many = format!("GET /a HTTP/1.1\r\nHost: h\r\n{}\r\n", "X: y\r\n".repeat(101));
    let large = format!("GET /a HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n", "y".repeat(70_000));
    let long = format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(9_000));
    for (bytes, expected) in [(many, (431, false)), (large, (431, false)), (long, (400, true))] {
        assert_eq!(scene.probe(bytes.as_bytes()).await, expected);
        scene.is_unharmed(&bytes[..40]).await;
    }
    let refused = scene.sluice.metric("requests_total", &["outcome=\"refused\""]).await;
    assert!(refused >= 70.0, "{refused}");
}

/// What a proxy may accept, and must not be confused by.
const ACCEPTED: &str = include_str!("attacks/accepted.txt");

/// RFC 9110 §9.3.2: content in a HEAD has no meaning. A backend that answers to it says nothing about what is stored.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_head_with_a_body_changes_nothing_that_is_stored() {
    let scene = Scene::start().await;
    for _ in 0..20 {
        assert_eq!(scene.probe(b"HEAD /clean HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello").await, (200, true));
    }
    let fetched = |asked: &Asked| asked.method == "GET" && asked.target == "/clean";
    assert_eq!(scene.backend.asked.lock().unwrap().iter().filter(|asked| fetched(asked)).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_confuses_nobody() {
    let scene = Scene::start().await;
    let rows = rows(ACCEPTED);
    assert!(rows.len() >= 20, "{}", rows.len());
    for row in rows {
        let [status, text] = columns(row);
        let answered = scene.probe(&unescape(text)).await;
        assert!(answered == (status.parse().unwrap(), true) || (answered.0 == 206 && text.contains("0-,0-")), "{text}: {answered:?}");
        scene.is_unharmed(text).await;
    }
    // Chunks that are none end the connection; an answer may have been under way.
    for broken in [
        "5\nhello\r\n0\r\n\r\n",
        "-1\r\n\r\n",
        "5\r\nhelloGET /smuggled HTTP/1.1\r\n",
        "fffffffffffffffff\r\nx",
        "0\r\nGET /smuggled\n\r\n",
    ] {
        let mut connection = Connection::open(scene.sluice.address).await;
        connection.send(format!("POST /pass/c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{broken}").as_bytes()).await;
        let mut rest = Vec::new();
        let read = tokio::time::timeout(HANG, connection.0.read_to_end(&mut rest)).await.expect("the connection ends");
        assert!(read.is_err() || !String::from_utf8_lossy(&rest).contains("200 OK"), "{broken:?}");
        scene.is_unharmed(broken).await;
    }
}

/// What a client may claim, and nobody else may feel: first with the claim, then without.
const CLAIMS: &str = include_str!("attacks/claims.txt");

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_claims_does_not_reach_others() {
    let scene = Scene::start().await;
    let claims = rows(CLAIMS);
    assert!(claims.len() >= 40, "{}", claims.len());
    for (number, claim) in claims.into_iter().enumerate() {
        let claim = String::from_utf8(unescape(claim)).unwrap();
        let target = format!("/claimed/{number}");
        let request = format!("GET {target} HTTP/1.1\r\nHost: evil.test\r\n{claim}\r\n\r\n");
        scene.probe(request.as_bytes()).await;
        let others = scene.sluice.get(&target).await;
        assert!(
            others.text().starts_with(&format!("GET {target}")) && !others.text().contains("evil.test"),
            "{claim:?}: {}",
            others.text()
        );
        scene.is_unharmed(&claim).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_cannot_take_away_what_protects() {
    let scene = Scene::start().await;
    let name = |name: &str, value: &str| format!("GET /protected HTTP/1.1\r\nHost: h\r\nConnection: {name}\r\n{name}: {value}\r\n\r\n");
    // Still authorized: neither stored nor answered from what is.
    for _ in 0..2 {
        let before = scene.backend.count();
        scene.probe(name("Authorization", "secret").as_bytes()).await;
        assert_eq!(scene.backend.last().field("authorization"), Some("secret"));
        assert!(scene.backend.count() > before);
    }
    scene.probe(name("Origin", "http://evil.test").as_bytes()).await;
    scene.probe(name("X-Forwarded-For", "1.2.3.4").as_bytes()).await;
    scene.probe(name("Host", "h").as_bytes()).await;
    assert_eq!(scene.backend.last().field("x-forwarded-for"), Some("127.0.0.1"));
    let clean = scene.sluice.get("/protected").await.text();
    assert!(!clean.contains("evil.test") && !clean.contains("secret"), "{clean}");
    // The backend's neither: what it says about storing is heard.
    let backend = Backend::start(|asked| {
        let secret = format!("{}", fastrand::u64(..));
        ok(
            "Connection: Cache-Control, Set-Cookie, Vary\r\nCache-Control: private\r\n",
            [secret.as_bytes(), asked.target.as_bytes()].concat().as_slice(),
        )
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
    assert_ne!(sluice.get("/x").await.text(), sluice.get("/x").await.text());
}

/// Targets that two programs may read in two ways: each gets what the backend says to exactly these bytes, and never what
/// a plain target got or changes what it gets.
#[tokio::test(flavor = "multi_thread")]
async fn deceptive_targets_are_what_the_backend_sees() {
    let scene = Scene::start().await;
    let plain = "/two?symbol=BTC";
    let before = scene.sluice.get(plain).await.text();
    for target in [
        "/two%3fsymbol=BTC",
        "/two%23?symbol=BTC",
        "/two%2f?symbol=BTC",
        "/two;x?symbol=BTC",
        "/two%3bx?symbol=BTC",
        "/two/.css?symbol=BTC",
        "/two/x.css?symbol=BTC",
        "/two.css?symbol=BTC",
        "/two/../two?symbol=BTC",
        "/./two?symbol=BTC",
        "//two?symbol=BTC",
        "/two/%2e%2e/two?symbol=BTC",
        "/%252e%252e/two?symbol=BTC",
        "/two%25%33%66symbol=BTC",
        "/two\\?symbol=BTC",
        "/TWO?symbol=BTC",
        "/two?symbol=BTC;symbol=ETH",
        "/two?utm=1;symbol=ETH&symbol=BTC",
        "/two?symbol=BTC&utm=1;symbol=ETH",
        "/two?symbol=BTC&utm=1%26symbol=ETH",
        "/two?symbol=BTC&symbol=ETH",
        "/two?symbol=ETH&symbol=BTC",
        "/two?symbol=BTC&Symbol=ETH",
        "/two?symbol=BTC&symbol[]=ETH",
        "/two?symbol%5b%5d=BTC",
        "/two?symbol=BTC%20",
        "/two?symbol=BTC+",
        "/two?symbol=BTC%2B",
        "/two?symbol=%42TC%00",
        "/two?symbol",
        "/two?symbol=",
        "/two",
        "/two?symbol=BT%43%26symbol=ETH",
        "/two?symbol=BTC&x={y}",
        "/two?symbol=BTC&x=\u{e9}",
    ] {
        for _ in 0..2 {
            let answer = scene.sluice.get(target).await;
            if answer.status != 400 {
                assert!(answer.text().starts_with(&format!("GET {target} \n")), "{target}: {}", answer.text());
            }
        }
        assert_eq!(scene.sluice.get(plain).await.text(), before, "after {target}");
    }
    scene.is_unharmed("deceptive targets").await;
    // What the operator says does not matter does not.
    for same in ["/two?symbol=btc", "/two?symbol=%42TC", "/two?utm=1&symbol=BTC", "/two?symbol=BTC&utm=a.b", "/tw%6f?symbol=BTC"] {
        assert_eq!(scene.sluice.get(same).await.text(), before, "{same}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_error_that_an_attacker_causes_is_kept() {
    for status in [400, 405, 411, 413, 414, 417, 431, 451, 500, 501, 502, 503, 504] {
        let backend = Backend::start(move |asked| match asked.field("x-attack") {
            Some(_) => reply(&format!("{status} Oops"), "Cache-Control: max-age=600\r\n", b"oops"),
            None => ok("", b"fine"),
        })
        .await;
        let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'\nrequest_headers='all'")).await;
        assert_eq!(sluice.get_with("/x", &[("X-Attack", "1")]).await.status, status);
        assert_eq!(sluice.get("/x").await.text(), "fine", "{status}");
        // Where the rule does not say so, what is not in the key does not even get to the backend.
        let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='1h'")).await;
        assert_eq!(sluice.get_with("/x", &[("X-Attack", "1")]).await.text(), "fine", "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_field_that_is_not_in_the_key_changes_what_others_get() {
    let scene = Scene::start().await;
    let mut random = fastrand::Rng::with_seed(12);
    let mut names: Vec<String> = [
        "Accept",
        "Accept-Language",
        "User-Agent",
        "Cookie",
        "Via",
        "Referer",
        "X-Backend-Host",
        "X-Tenant",
        "X-Debug",
        "Content-Type",
        "Prefer",
        "Forwarded",
        "X-Forwarded-Host",
        "X-Original-URL",
        "TE",
        "Early-Data",
        "Sec-Fetch-Mode",
        "DNT",
    ]
    .map(str::to_owned)
    .into();
    names.extend((0..200).map(|_| {
        let length = random.usize(1..20);
        std::iter::repeat_with(|| random.alphanumeric()).take(length).collect()
    }));
    for (number, name) in names.iter().enumerate() {
        let target = format!("/probe/{number}");
        let attack = scene.sluice.get_with(&target, &[(name, "evil")]).await;
        let clean = scene.sluice.get(&target).await;
        assert_eq!((attack.status, clean.status), (200, 200), "{name}");
        assert!(
            clean.cache_status().contains("hit") && !clean.text().contains("evil") && !attack.text().contains("evil"),
            "{name}: {clean:?}"
        );
    }
}

/// A backend that does not expect a body on GET, and reads what follows the head as the next request.
struct Naive {
    address: std::net::SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Naive {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let naive = Self { address: listener.local_addr().unwrap(), asked: Arc::default() };
        let asked = Arc::clone(&naive.asked);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Self::converse(stream, Arc::clone(&asked)));
            }
        });
        naive
    }

    async fn converse(stream: TcpStream, asked: Arc<Mutex<Vec<String>>>) {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
            let target = line.split(' ').nth(1).unwrap_or("?").to_owned();
            asked.lock().unwrap().push(target.clone());
            while line.trim_end() != "" {
                line.clear();
                if stream.read_line(&mut line).await.is_ok_and(|read| read == 0) {
                    return;
                }
            }
            line.clear();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{target}", target.len());
            if stream.get_mut().write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_the_backend_does_not_expect_contaminates_no_connection() {
    let naive = Naive::start().await;
    let sluice = Sluice::ruled(naive.address, "", RULES).await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
    for target in ["/pass/x", "/x"] {
        for method in ["GET", "DELETE", "OPTIONS", "HEAD"] {
            for round in 0..20 {
                let mut connection = Connection::open(sluice.address).await;
                let length = smuggled.len();
                connection
                    .send(format!("{method} {target} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n{smuggled}").as_bytes())
                    .await;
                connection.answer(method == "HEAD").await;
                let target = format!("/pass/clean{round}");
                assert_eq!(sluice.get(&target).await.text(), target, "after {method} with a body");
            }
        }
    }
    assert!(naive.asked.lock().unwrap().iter().any(|target| target == "/x"));
}

/// What a hostile or broken backend sends: the first answer's bytes, and whether it may be answered with 200.
#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_lies_about_lengths_harms_one_answer_only() {
    let evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let probes: Vec<(String, &[u16])> = vec![
        (format!("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello{evil}"), &[200]),
        (format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n{evil}"), &[200]),
        (format!("HTTP/1.1 204 No Content\r\n\r\n{evil}"), &[204]),
        (format!("HTTP/1.1 304 Not Modified\r\n\r\n{evil}"), &[502]),
        (format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n{evil}"), &[200]),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!".into(), &[502]),
        ("HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello".into(), &[502]),
        ("HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 5\r\n\r\nhello".into(), &[502]),
        ("HTTP/1.1 200 OK\r\nX: a\u{0}b\r\nContent-Length: 5\r\n\r\nhello".into(), &[502]),
        ("HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b=c\r\nContent-Length: 5\r\n\r\nhello".into(), &[502]),
        ("HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 5\r\n\r\nhello".into(), &[502]),
        ("HTTP/1.1 99 Low\r\nContent-Length: 0\r\n\r\n".into(), &[502]),
        ("HTTP/9.9 200 OK\r\nContent-Length: 0\r\n\r\n".into(), &[502]),
        ("ICY 200 OK\r\n\r\n".into(), &[502]),
        ("\u{0}\u{1}\u{2}\r\n\r\n".into(), &[502]),
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n".into(), &[502]),
        (format!("HTTP/1.1 200 OK\r\n{}\r\n\r\n", "X: y\r\n".repeat(300)), &[502]),
        (format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "y".repeat(600_000)), &[502]),
    ];
    for (bytes, statuses) in probes {
        let (script, shown) = (bytes.clone(), bytes.chars().take(80).collect::<String>());
        let backend = Backend::start(move |asked| match asked.target.starts_with("/lie") {
            true => vec![Step::Send(script.clone().into_bytes())],
            false => ok("", asked.target.as_bytes()),
        })
        .await;
        let sluice = Sluice::ruled(backend.address, "", RULES).await;
        sluice.get("/clean").await;
        for (round, prefix) in ["/lie/", "/pass/", "/lie/"].iter().enumerate() {
            let lie = get(sluice.address, &format!("{prefix}{round}"), &[]).await;
            assert!(*prefix == "/pass/" || statuses.contains(&lie.status), "{shown:?}: {lie:?}");
            assert!(lie.field("set-cookie").is_none() && !lie.text().contains("evil"), "{shown:?}: {lie:?}");
            for number in 0..10 {
                let target = format!("/pass/after{round}{number}");
                assert_eq!(sluice.get(&target).await.text(), target, "after {shown:?}");
            }
            assert!(sluice.get("/clean").await.cache_status().contains("hit"), "{shown:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_the_host_that_a_request_named_is_not_kept() {
    // It learns the host from the configured one only; that it names the client's is chance, and enough.
    let backend = Backend::start(|_| reply("302 Found", "Cache-Control: max-age=600\r\nLocation: http://evil.test/x\r\n", b"")).await;
    let sluice = Sluice::ruled(backend.address, "", &one_rule("ttl='0s'")).await;
    for (host, stored) in [("evil.test", false), ("evil.test:80", true), ("api.test", true)] {
        let mut connection = Connection::open(sluice.address).await;
        connection.send(format!("GET /{host} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await;
        let answer = connection.answer(false).await.unwrap();
        assert_eq!((answer.status, answer.cache_status().contains("stored")), (302, stored), "{host}: {}", answer.cache_status());
    }
}

/// What became of stream 1.
#[derive(Debug, PartialEq)]
enum Stream1 {
    Answered(Option<u16>),
    Reset,
    Closed,
}

async fn over_http2(address: std::net::SocketAddr, frames: &[u8]) -> Stream1 {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[&frames::opening(), frames].concat()).await.unwrap();
    let read = async {
        loop {
            let mut head = [0; 9];
            if stream.read_exact(&mut head).await.is_err() {
                return Stream1::Closed;
            }
            let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
            if stream.read_exact(&mut payload).await.is_err() {
                return Stream1::Closed;
            }
            match (head[3], head[8]) {
                (1, 1) => {
                    // A status of the static table, or a literal of three digits under its name.
                    let skip = usize::from(payload[0] & 0xe0 == 0x20);
                    let status = match payload[skip..] {
                        [0x88, ..] => Some(200),
                        [0x8c, ..] => Some(400),
                        [0x8d, ..] => Some(404),
                        [0x8e, ..] => Some(500),
                        _ => None,
                    };
                    return Stream1::Answered(status);
                }
                (3, 1) => return Stream1::Reset,
                (7, _) => return Stream1::Closed,
                _ => {}
            }
        }
    };
    tokio::time::timeout(HANG, read).await.expect("an end of stream 1")
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_abuse_is_reset_or_refused() {
    use frames::{END_HEADERS, END_STREAM, frame};
    let scene = Scene::start().await;
    let address = scene.sluice.address;
    let whole = |fields: &[(&str, &str)]| frame(1, END_HEADERS | END_STREAM, 1, &frames::fields(fields));
    let (method, path, scheme, authority) = ((":method", "GET"), (":path", "/clean"), (":scheme", "http"), (":authority", "h"));
    assert_eq!(over_http2(address, &whole(&[method, path, scheme, authority])).await, Stream1::Answered(Some(200)));
    assert_eq!(over_http2(address, &whole(&[method, path, scheme, ("host", "h")])).await, Stream1::Answered(Some(200)));
    let crumbs = [&[method, path, scheme, authority][..], &[("cookie", "a=b"); 150]].concat();
    assert_eq!(over_http2(address, &whole(&crumbs)).await, Stream1::Answered(Some(200)));
    let refused: &[&[(&str, &str)]] = &[
        &[method, scheme, authority],
        &[method, path, authority],
        &[path, scheme, authority],
        &[method, path, path, scheme, authority],
        &[method, method, path, scheme, authority],
        &[method, path, scheme, authority, (":status", "200")],
        &[method, path, scheme, authority, (":x", "y")],
        &[method, ("x", "y"), path, scheme, authority],
        &[method, path, scheme, authority, ("X", "y")],
        &[method, path, scheme, authority, ("x y", "z")],
        &[method, path, scheme, authority, ("x:y", "z")],
        &[method, path, scheme, authority, ("", "z")],
        &[method, path, scheme, authority, ("x", "a\r\nb: c")],
        &[method, path, scheme, authority, ("x", "a\0b")],
        &[method, path, scheme, authority, ("connection", "close")],
        &[method, path, scheme, authority, ("transfer-encoding", "chunked")],
        &[method, path, scheme, authority, ("upgrade", "h2c")],
        &[method, path, scheme, authority, ("keep-alive", "timeout=5")],
        &[method, path, scheme, authority, ("proxy-connection", "keep-alive")],
        &[method, path, scheme, authority, ("te", "gzip")],
        &[method, path, scheme, authority, ("content-length", "5")],
        &[method, (":path", ""), scheme, authority],
        &[method, (":path", "smuggled"), scheme, authority],
        &[method, (":path", "*"), scheme, authority],
        &[method, (":path", "/a b"), scheme, authority],
        &[method, (":path", "/a HTTP/1.1\r\nx: y\r\n\r\nGET /smuggled"), scheme, authority],
        &[method, (":path", "http://evil.test/x"), scheme, authority],
        &[(":method", "GET /smuggled HTTP/1.1\r\n"), path, scheme, authority],
        &[(":method", ""), path, scheme, authority],
        &[(":method", "CONNECT"), authority],
        &[(":method", "CONNECT"), path, scheme, authority],
        &[(":method", "TRACE"), path, scheme, authority],
        &[method, path, scheme],
        &[method, path, scheme, authority, ("host", "evil.test")],
        &[method, path, scheme, authority, ("host", "h"), ("host", "h")],
        &[method, path, scheme, (":authority", "user@h")],
        &[method, path, scheme, (":authority", "h/evil.test")],
        &[method, path, scheme, (":authority", "")],
        &[method, path, (":scheme", "ftp"), authority],
    ];
    for fields in refused {
        let became = over_http2(address, &whole(fields)).await;
        assert_ne!(became, Stream1::Answered(Some(200)), "{fields:?}");
        scene.is_unharmed(&format!("{fields:?}")).await;
    }
    let block = frames::fields(&[(":method", "POST"), (":path", "/other"), scheme, authority, ("content-length", "3")]);
    let post = frame(1, END_HEADERS, 1, &block);
    for (what, frames) in [
        ("a body longer than its length", [post.clone(), frame(0, END_STREAM, 1, b"hello")].concat()),
        ("a body shorter than its length", [post.clone(), frame(0, END_STREAM, 1, b"h")].concat()),
        ("data on a stream that is not open", frame(0, END_STREAM, 1, b"hello")),
        ("an even stream", frame(1, END_HEADERS | END_STREAM, 2, &block)),
        ("a continuation of nothing", frame(9, END_HEADERS, 1, &block)),
        ("a stream that depends on itself", frame(1, END_HEADERS | END_STREAM | 0x20, 1, &[&[0, 0, 0, 1, 9][..], &block].concat())),
        ("more padding than bytes", frame(1, END_HEADERS | END_STREAM | 8, 1, &[&[255][..], &block[..50]].concat())),
        ("a push", frame(5, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &block].concat())),
        ("data within a block that is malformed", [frame(1, 0, 1, &frames::fields(&[("connection", "x")])), frame(0, 0, 1, b"")].concat()),
        ("empty continuations", [frame(1, 0, 1, &block), frame(9, 0, 1, b"").repeat(100)].concat()),
        ("a frame that is too large", frame(0, 0, 1, &vec![0; 20_000])),
        ("a window update of zero", frame(8, 0, 0, &[0; 4])),
        ("settings of a wrong size", frame(4, 0, 0, &[0; 5])),
        ("headers without end", [frame(1, 0, 1, &block), frame(9, 0, 1, &frames::fields(&[("x", "y")])).repeat(20_000)].concat()),
        (
            "a flood of resets",
            (0..2000_u32)
                .flat_map(|n| {
                    let fields = frames::fields(&[method, (":path", "/pass/reset"), scheme, authority]);
                    [frame(1, END_HEADERS | END_STREAM, 2 * n + 1, &fields), frame(3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat()
                })
                .collect(),
        ),
        ("a flood of settings", [frame(4, 0, 0, &[]).repeat(20_000), frame(8, 0, 0, &[0; 4])].concat()),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // It may be closed before all is written.
        let _ = stream.write_all(&[&frames::opening()[..], &frames].concat()).await;
        let mut rest = Vec::new();
        let read = tokio::time::timeout(HANG, stream.read_to_end(&mut rest));
        if what != "a flood of resets" && !what.starts_with("a body") {
            let _ = read.await.unwrap_or_else(|_| panic!("{what} does not end the connection"));
        }
        scene.is_unharmed(what).await;
    }
    assert_eq!(scene.backend.count_of("/other"), 0, "a body that is not as long as it says");
}

/// Clients that hold connections without using them are closed, whatever they hold them with.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_closed_and_others_served() {
    let backend = Backend::start(|asked| match asked.target.as_str() {
        "/pass/large" => {
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 268435456\r\n\r\n".to_vec();
            vec![Step::Send(head), Step::Repeat(vec![b'x'; 1 << 16], 4096)]
        }
        _ => ok("", asked.target.as_bytes()),
    })
    .await;
    let limits = "[limits]\nheader_timeout='1s'\nidle_timeout='2s'\nstall_timeout='1s'\nmin_rate='1MiB'\n";
    let sluice = Sluice::ruled(backend.address, "", &format!("{limits}{RULES}")).await;
    let get = b"GET /pass/large HTTP/1.1\r\nHost: h\r\n\r\n".to_vec();
    let post = b"POST /pass/x HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n".to_vec();
    let window = [frames::PREFACE, &frames::frame(4, 0, 0, &[0, 4, 0, 0, 0, 0])].concat();
    let fields = frames::fields(&[(":method", "GET"), (":path", "/clean"), (":scheme", "http"), (":authority", "h")]);
    let closed = [window, frames::frame(1, frames::END_HEADERS | frames::END_STREAM, 1, &fields)].concat();
    // What is sent, what is sent again and again, and whether what comes is read, slowly.
    let cases: Vec<(&str, Vec<u8>, &[u8], bool)> = vec![
        ("nothing at all", Vec::new(), b"", false),
        ("half a head", b"GET / HTTP/1.1\r\nHo".to_vec(), b"", false),
        ("a head without end", b"GET / HTTP/1.1\r\n".to_vec(), b"X: y\r\n", false),
        ("a body that stops", post.clone(), b"", false),
        ("a body that drips", post, b"x", false),
        ("an answer that nobody takes", get.clone(), b"", false),
        ("an answer that is taken in drops", get, b"", true),
        ("a stream without a window", closed.clone(), b"", false),
        ("a stream without a window, and pings", closed, &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], false),
    ];
    for (what, first, again, reads) in cases {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(sluice.address).await.unwrap();
        stream.write_all(&first).await.unwrap();
        crate::support::until("it is connected", || async { sluice.metric("connections", &[]).await >= 1.0 }).await;
        let hold = async {
            let mut ticks = tokio::time::interval(std::time::Duration::from_millis(100));
            let mut drops = [0; 1024];
            loop {
                ticks.tick().await;
                let _ = stream.write_all(again).await;
                if reads {
                    let _ = stream.read(&mut drops).await;
                }
            }
        };
        let closed = tokio::time::timeout(HANG, async {
            while sluice.metric("connections", &[]).await >= 1.0 {
                tokio::task::yield_now().await;
            }
        });
        tokio::select! {
            () = hold => {}
            closed = closed => assert!(closed.is_ok(), "{what} holds a connection"),
        }
        assert_eq!(sluice.get("/clean").await.text(), "/clean");
        crate::support::until("no one is connected", || async { sluice.metric("connections", &[]).await < 1.0 }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_only_so_many_connections() {
    let backend = Backend::start(echo).await;
    let limits = "[limits]\nconnections_per_address=3\n";
    let sluice = Sluice::ruled(backend.address, "", &format!("{limits}{RULES}")).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut connection = Connection::open(sluice.address).await;
        assert_eq!(connection.ask("GET", "/x", &[], b"").await.status, 200);
        open.push(connection);
    }
    let mut fourth = Connection::open(sluice.address).await;
    assert!(fourth.head().await.is_none(), "one too many");
    assert!(sluice.metric("connections_refused_total", &[]).await >= 1.0);
    until("the log says so", || async { sluice.logged().contains("limits.connections_per_address") }).await;
    drop(open.pop());
    let again = || async {
        let mut connection = Connection::open(sluice.address).await;
        connection.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await;
        connection.head().await.is_some()
    };
    crate::support::until("there is a place again", again).await;
}

/// Bodies that inflate without measure are neither kept nor inflated for clients, nor do they take memory.
#[tokio::test(flavor = "multi_thread")]
async fn decompression_bombs_are_told() {
    let bomb = sluice::http::encoding::gzip(&vec![0; 8 << 20]);
    assert!(bomb.len() < 10 << 10);
    let body = bomb.to_vec();
    let backend = Backend::start(move |asked| match asked.target.as_str() {
        "/bomb" | "/pass/bomb" => ok("Content-Encoding: gzip\r\n", &body),
        _ => ok("", asked.target.as_bytes()),
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", RULES).await;
    for _ in 0..2 {
        let mut connection = Connection::open(sluice.address).await;
        connection.send(b"GET /bomb HTTP/1.1\r\nHost: h\r\n\r\n").await;
        if let Some(answer) = connection.answer(false).await {
            assert!(!answer.whole && answer.body.len() < 6 << 20 && !answer.cache_status().contains("hit"), "{}", answer.body.len());
        }
    }
    crate::support::until("the log says so", || async { sluice.logged().contains("inflates too far") }).await;
    // Whoever takes gzip gets it as the backend sent it.
    assert_eq!(sluice.get_with("/bomb", &[("Accept-Encoding", "gzip")]).await.body, bomb.to_vec());
    assert_eq!(sluice.get("/clean").await.text(), "/clean");
}
