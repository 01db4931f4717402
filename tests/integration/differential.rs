//! Mutated requests: whatever is answered from the cache is what the backend says to the same bytes.
//!
//! `SLUICE_MUTATIONS=10000 tests/run mutated` asks more often; `SLUICE_SEED` repeats a run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{Asked, Backend, Connection, Sluice, Step, ok, reply};

/// What the API reads of a query, as a form: the last of a name counts, `+` is a space, text is UTF-8.
fn form(query: &str) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        values.insert(unescape(&name.replace('+', " ")), unescape(&value.replace('+', " ")));
    }
    values
}

fn unescape(text: &str) -> String {
    let (mut bytes, text) = (Vec::new(), text.as_bytes());
    let mut at = 0;
    while at < text.len() {
        let digits = text.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        match (text[at], digits.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                at += 3;
            }
            (byte, _) => {
                bytes.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// An API that says what it understood. Symbols are blind to case; languages are told apart.
fn api(asked: &Asked) -> Vec<Step> {
    let (path, query) = asked.target.split_once('?').unwrap_or((&asked.target, ""));
    let (path, form) = (unescape(path), form(query));
    let names: &[&str] = match path.as_str() {
        "/api/symbols" => &[],
        "/api/liquidations" => &["symbol", "timeframe", "start_timestamp", "end_timestamp"],
        "/api/liquidation-orders" => &["symbol", "start_timestamp", "end_timestamp", "limit", "page", "page_size"],
        _ => return reply("404 Not Found", "", format!("no {path}").as_bytes()),
    };
    let mut text = format!("{} {path} {}\n", asked.method.replace("HEAD", "GET"), String::from_utf8_lossy(&asked.body));
    for name in names {
        let value = form.get(*name).map(|value| if *name == "symbol" { value.to_ascii_uppercase() } else { value.clone() });
        text.push_str(&format!("{name}={value:?}\n"));
    }
    text.push_str(&format!("{:?} {:?}", languages(asked), asked.field("origin")));
    ok("Vary: Accept-Language\r\n", text.as_bytes())
}

/// What is preferred, by weight and not by order, if that is said in one line and makes sense; else the words.
fn languages(asked: &Asked) -> Vec<String> {
    let lines: Vec<&str> = asked.fields.iter().filter(|(name, _)| name == "accept-language").map(|(_, value)| value.as_str()).collect();
    let [line] = lines[..] else { return lines.into_iter().map(str::to_owned).collect() };
    let weighed = |member: &str| match member.split_once(";q=") {
        None => format!("{member};q=1"),
        Some((tag, weight)) if ["0", "1", "0.5"].contains(&weight) => format!("{tag};q={weight}"),
        Some(_) => member.to_owned(),
    };
    let mut members: Vec<String> =
        line.split(',').map(|member| weighed(&member.trim().to_ascii_lowercase())).filter(|m| m != ";q=1").collect();
    members.sort_unstable();
    members
}

const TARGETS: [&str; 9] = [
    "/api/symbols",
    "/api/symbols?x=1",
    "/api/liquidations?symbol=BTCUSDT&timeframe=1h&start_timestamp=1735689600000&end_timestamp=1735776000000",
    "/api/liquidations?timeframe=1h&symbol=BTCUSDT&end_timestamp=1735776000000&start_timestamp=1735689600000",
    "/api/liquidations?symbol=ethusdt&timeframe=5m&start_timestamp=2025-01-01&end_timestamp=2025-01-02T00:00:00%2B00:00",
    "/api/liquidation-orders?symbol=BTCUSDT&limit=10",
    "/api/liquidation-orders?symbol=BTCUSDT&start_timestamp=1&end_timestamp=2&page=2&page_size=50",
    "/api/liquidation-orders?symbol=BTC%20USDT&start_timestamp=1&end_timestamp=2",
    "/api/liquidation-orders?symbol=BTC+USDT&start_timestamp=1&end_timestamp=2",
];

const LINES: [&str; 21] = [
    "Accept-Language: de",
    "Accept-Language: de, en;q=0.5",
    "Origin: http://a.test",
    "Accept: text/html",
    "X-Forwarded-Host: evil.test",
    "X-Original-URL: /api/symbols",
    "X-HTTP-Method-Override: DELETE",
    "Cookie: a=b",
    "Authorization: Bearer x",
    "Range: bytes=0-3",
    "If-None-Match: \"x\"",
    "Accept-Encoding: gzip",
    "Cache-Control: no-cache",
    "Connection: keep-alive, Origin, Accept-Language",
    "Content-Length: 5",
    "Content-Length: 0",
    "Transfer-Encoding: chunked",
    "Host: other.test",
    "Upgrade: h2c",
    "X_Forwarded_For: 1.1.1.1",
    " folded: line",
];

const PIECES: [&str; 24] = [
    "&symbol=ETHUSDT",
    "&symbol[]=X",
    "&Symbol=X",
    "&utm=1",
    "&utm=1;symbol=X",
    ";symbol=X",
    "%26symbol=X",
    "&limit=10",
    "&symbol",
    "&=",
    "&&",
    "%00",
    "%2f",
    "%3f",
    "%23",
    "#",
    "/..",
    "//",
    "/",
    "%",
    "+",
    "%20",
    ".css",
    "\\",
];

/// One request, mutated a few times.
fn mutated(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut target = (*random.choice(&TARGETS).unwrap()).to_owned();
    let method = if random.u8(..) < 240 { "GET" } else { *random.choice(&["HEAD", "POST", "get", "OPTIONS"]).unwrap() };
    for _ in 0..random.usize(..3) {
        let at = random.usize(1..=target.len());
        match random.u8(..6) {
            0 => target.insert_str(at, random.choice(&PIECES).unwrap()),
            1 => target.push_str(random.choice(&PIECES).unwrap()),
            2 => target.replace_range(at - 1..at, &format!("%{:02x}", target.as_bytes()[at - 1])),
            3 => target = target.to_ascii_uppercase(),
            4 => drop(target.remove(at - 1)),
            _ => target.insert(at, char::from(random.u8(0x20..0x7f))),
        }
        if target.is_empty() {
            target.push('/');
        }
    }
    let mut request = format!("{method} {target} HTTP/1.1\r\nHost: api.test\r\n");
    for _ in 0..random.usize(..3) {
        request.push_str(random.choice(&LINES).unwrap());
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    let mut bytes = request.into_bytes();
    if random.u8(..) < 25 {
        bytes.extend_from_slice(b"hello");
    }
    if random.u8(..) < 40 {
        let at = random.usize(..bytes.len());
        match random.u8(..3) {
            0 => bytes[at] = random.u8(..),
            1 => bytes.insert(at, random.u8(..)),
            _ => drop(bytes.remove(at)),
        }
    }
    bytes
}

/// The body that the backend itself gives to these bytes.
async fn direct(backend: std::net::SocketAddr, bytes: &[u8]) -> String {
    let mut connection = Connection::open(backend).await;
    connection.send(bytes).await;
    let head = bytes.starts_with(b"HEAD");
    let asked = if head { [b"GET", &bytes[4..]].concat() } else { bytes.to_vec() };
    let mut connection = if head { Connection::open(backend).await } else { connection };
    if head {
        connection.send(&asked).await;
    }
    connection.answer(false).await.map_or_else(String::new, |answer| answer.text())
}

#[tokio::test(flavor = "multi_thread")]
async fn mutated_requests_get_from_the_cache_what_the_backend_says() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (count, seed) = (number("SLUICE_MUTATIONS", 2000), number("SLUICE_SEED", 4711));
    let backend = Backend::start(api).await;
    let text = include_str!("../../proxy.toml").replace("[limits] ", "[limits]");
    let text =
        text.replace("header_timeout = \"10s\"", "header_timeout = \"1s\"").replace("stall_timeout = \"30s\"", "stall_timeout = \"1s\"");
    let sluice = Arc::new(Sluice::start(backend.address, "", &text).await);
    let (hits, answered) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut tasks = tokio::task::JoinSet::new();
    const TASKS: u64 = 8;
    for task in 0..TASKS {
        let (sluice, hits, answered, address) = (Arc::clone(&sluice), Arc::clone(&hits), Arc::clone(&answered), backend.address);
        tasks.spawn(async move {
            let mut random = fastrand::Rng::with_seed(seed.wrapping_mul(TASKS) + task);
            for _ in 0..count / TASKS {
                let bytes = mutated(&mut random);
                let shown = String::from_utf8_lossy(&bytes).into_owned();
                let mut connection = Connection::open(sluice.address).await;
                connection.send(&[&bytes[..], b"GET /end HTTP/1.1\r\nHost: api.test\r\n\r\n"].concat()).await;
                let Some(answer) = connection.answer(bytes.starts_with(b"HEAD")).await else { continue };
                answered.fetch_add(1, Ordering::Relaxed);
                if answer.cache_status().contains("hit") {
                    hits.fetch_add(1, Ordering::Relaxed);
                    let said = direct(address, &bytes).await;
                    match answer.status {
                        200 if bytes.starts_with(b"HEAD") => {
                            assert_eq!(answer.field("content-length"), Some(said.len().to_string().as_str()), "{shown:?}")
                        }
                        200 => assert_eq!(answer.text(), said, "seed {seed}: {shown:?}"),
                        206 => assert!(said.contains(&answer.text()), "{shown:?}"),
                        304 | 416 => {}
                        404 => assert_eq!(answer.text(), said, "{shown:?}"),
                        other => panic!("{other} from the cache: {shown:?}"),
                    }
                }
                // Whatever comes next on the connection is the answer to what came next.
                if answer.field("connection") != Some("close")
                    && let Some(next) = connection.answer(false).await
                {
                    assert!(next.text() == "no /end" || next.status == 400, "after {shown:?}: {next:?}");
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let (hits, answered) = (hits.load(Ordering::Relaxed), answered.load(Ordering::Relaxed));
    eprintln!("{count} mutated requests, {answered} answered, {hits} of them from the cache");
    assert!(hits as u64 > count / 20, "only {hits} of {count} were hits: the mutations are too wild to mean anything");
}
