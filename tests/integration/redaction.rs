//! What is said of requests: no cookie, credential, body or value that may be a secret, in lines, spans, samples, statistics and
//! explanations. And audit lines, which are written whatever becomes of others.

use std::io::Read as _;
use std::process::Stdio;
use std::time::Duration;

use crate::support::client::{forget_admin, note_admin};
use crate::support::process::{Process, scratch};
use crate::support::sluice::program;
use crate::support::{Backend, Connection, Sluice, Step, TOKEN, get, ok, reply, until};

const JWT: &str = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJoaWRkZW4ifQ.c2lnbmF0dXJlLWhpZGRlbg";

/// Targets that hold `hidden` where a secret may be.
const TARGETS: [&str; 20] = [
    "/a?code=hidden",
    "/a?session=hidden&x=1",
    "/a?jwt=hidden",
    "/a?db_password=hidden",
    "/a?passwd=hidden",
    "/a?%63ode=hidden",
    "/a?%43%4f%44%45=hidden",
    "/a?CODE[]=hidden",
    "/a?user[code]=hidden",
    "/a?x=1;token=hidden",
    "/a;jsessionid=hidden/b",
    "/a/b;v=1;JSESSIONID=hidden?x=1",
    "/a%3bjsessionid%3dhidden",
    "/a?next=https%3A%2F%2Fx%2F%3Fcode%3Dhidden",
    "/a?next=https://me:hidden@x/",
    "/a?customer=hidden",
    "/a?CUSTOMER[0]=hidden",
    "/a?authorization=Bearer+hidden",
    "/a?q=Bearer%20hidden",
    "/reset/token/hidden",
];

const HOT: usize = 700;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_said_of_a_request_holds_a_secret() {
    let collector = Backend::start(|_| ok("Content-Type: application/x-protobuf\r\n", b"")).await;
    let backend = Backend::start(|asked| {
        let fails = asked.target.starts_with("/fail");
        let mut steps = reply(if fails { "500 Oh" } else { "200 OK" }, "Set-Cookie: sid=hidden\r\nX-Token: hidden\r\n", b"hidden body");
        // Slow enough for a line that says so.
        steps.insert(0, Step::Delay(Duration::from_millis(2)));
        steps
    })
    .await;
    let text = format!(
        "trusted_proxies=['127.0.0.1']\n[admin]\ntoken='{TOKEN}'\n[log]\naccess='all'\nslow='1ms'\nlevel='debug'\nredact=['customer']\n\
         [telemetry]\notlp='http://{}'\nsample='100%'\n[backend]\nurl='http://{}'\n[cache]\nredis=''\n\
         [[route]]\nname='r'\npath='/*'\nttl='1h'\nset_cookie='store'\nkey='r:{{code}}:{{q}}'\ntags=['t:{{code}}']\n",
        collector.address, backend.address
    );
    let mut sluice = Sluice::with(&text, &[]);
    let secret = ["Cookie", "Authorization", "X-Api-Key", "Referer", "Proxy-Authorization", "X-Whatever"].map(|name| (name, "hidden"));
    let mut asked = 0;
    for target in TARGETS {
        for target in [target.to_owned(), target.replace("hidden", JWT), format!("/fail{target}")] {
            get(sluice.address, &target, &[]).await;
            get(sluice.address, &target, &secret).await;
            Connection::open(sluice.address).await.ask("POST", &target, &secret, b"hidden").await;
            asked += 3;
            let explained =
                get(sluice.admin, &format!("/explain?target={}", target.replace('%', "%25").replace(['&', ';', '+'], "")), &[]).await;
            let said = explained.text();
            assert!(!said.contains("hidden") && !said.contains("eyJ"), "{target}: {said}");
        }
    }
    get(sluice.address, &format!("/plain?token={}", "hidden".repeat(1000)), &[]).await;
    get(sluice.address, &format!("/plain?x={}&symbol=BTCUSDT", "1".repeat(6000)), &[]).await;
    // Often, since statistics count some of many.
    let mut open = Connection::open(sluice.address).await;
    for number in 0..HOT {
        let target = if number % 3 == 0 { "/hot?code=hidden" } else { "/plain?symbol=BTCUSDT&start_timestamp=1735689600000" };
        open.ask("GET", target, &[], b"").await;
    }
    until("all is logged", || async { sluice.logged().matches(" access ").count() >= asked + 2 + HOT }).await;
    let stats = get(sluice.admin, "/stats", &[]).await.text();
    sluice.process.signal("TERM");
    until("it has ended", || {
        let ended = sluice.process.child.try_wait().unwrap().is_some();
        async move { ended }
    })
    .await;
    let spans: Vec<u8> = collector.asked.lock().unwrap().iter().flat_map(|asked| asked.body.clone()).collect();
    let said = [("the log", sluice.logged()), ("statistics", stats), ("spans", String::from_utf8_lossy(&spans).into_owned())];
    for (what, text) in &said {
        for hidden in ["hidden", "eyJ", "aGlkZGVu"] {
            let at = text.find(hidden).map(|at| text[at.saturating_sub(200)..].chars().take(300).collect::<String>());
            assert!(at.is_none(), "{what}: {}", at.unwrap_or_default());
        }
        // What is no secret is told.
        assert!(text.contains("1735689600000"), "{what}");
    }
    assert!(said[0].1.lines().all(|line| line.len() < 2500), "lines have an upper bound");
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_of_shadow_say_where_answers_differ_and_not_what_they_hold() {
    let backend = Backend::start(|asked| {
        let number = fastrand::u64(..);
        match asked.target.as_str() {
            "/fields" => ok(&format!("Set-Cookie: sid=hidden{number}\r\nX-Other: hidden{number}\r\n"), b"same"),
            _ => ok("", format!("{{\"password\":\"hidden\",\"n\":{number:020}}}").as_bytes()),
        }
    })
    .await;
    let text = format!(
        "[backend]\nurl='http://{}'\n[cache]\nredis=''\n[[route]]\nname='r'\npath='/*'\nttl='1h'\nshadow=true\nset_cookie='store'\n",
        backend.address
    );
    let sluice = Sluice::with(&text, &[]);
    for (target, how) in [("/fields", "in set-cookie, x-other"), ("/body", "46 bytes instead of 46")] {
        until("a sample is logged", || async {
            sluice.get(target).await;
            sluice.logged().contains(how)
        })
        .await;
    }
    assert!(!sluice.logged().contains("hidden"), "{}", sluice.logged());
}

#[tokio::test(flavor = "multi_thread")]
async fn audit_lines_are_written_whatever_becomes_of_other_lines() {
    const REQUESTS: usize = 24_000;
    let backend = Backend::start(|_| ok("", b"{}")).await;
    let dir = scratch();
    let file = dir.join("proxy.toml");
    let rules = "[[route]]\nname='all'\npath='/*'\nttl='1h'\n";
    let log = "[log]\naccess='all'\nformat='json'\n";
    let text = format!("[admin]\ntoken='{TOKEN}'\n{log}[backend]\nurl='http://{}'\n[cache]\nredis=''\n{rules}", backend.address);
    std::fs::write(&file, text).unwrap();
    let mut command = program();
    command.args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--config"]).arg(&file);
    let mut process = Process::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()), dir);
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(process.child.stdout.take().unwrap()));
    let mut address = |begin: &str| lines.next().unwrap().unwrap().strip_prefix(begin).unwrap().parse().unwrap();
    let (main, admin): (std::net::SocketAddr, std::net::SocketAddr) = (address("listening on http://"), address("admin on http://"));
    note_admin(admin);
    // Nobody reads standard error: the pipe is full soon, then the queue, and lines are dropped.
    let clients = (0..4).map(|_| {
        tokio::spawn(async move {
            let mut connection = Connection::open(main).await;
            for _ in 0..REQUESTS / 4 {
                assert_eq!(connection.ask("GET", "/x", &[], b"").await.status, 200);
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let ask = |target: &'static str, token: &'static str| async move {
        let token = format!("Bearer {token}");
        Connection::open(admin).await.ask("POST", target, &[("Authorization", &token)], b"").await.status
    };
    assert_eq!(ask("/purge?tag=first", TOKEN).await, 200);
    for _ in 0..400 {
        assert_eq!(ask("/purge?tag=stranger", "guess").await, 401);
    }
    assert_eq!(ask("/purge?tag=second", TOKEN).await, 200);
    forget_admin(admin);
    let mut read = process.child.stderr.take().unwrap();
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        text
    });
    process.signal("TERM");
    process.child.wait().unwrap();
    let text = reading.join().unwrap();
    let of = |sign: &str| text.lines().filter(|line| line.contains(sign)).count();
    assert!(of("\"access\"") < REQUESTS, "others are dropped");
    assert_eq!((of("\"what\":\"tag first\""), of("\"what\":\"tag second\"")), (1, 1));
    let told: u64 = text.lines().filter_map(|line| line.split_once("\"missed\":")?.1.split([',', '}']).next()?.parse::<u64>().ok()).sum();
    assert_eq!(of("\"refused\":\"forbidden\"") as u64 + told, 400, "attempts have a line, or are counted in one");
    for line in text.lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "lines are whole: {line}");
    }
}
