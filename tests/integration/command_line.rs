//! The command line, as a stranger meets it.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use sluice::clock::Wall;

use crate::support::{Backend, Sluice, TOKEN, get, ok, program, scratch, until};

fn file(name: &str, text: &str) -> PathBuf {
    let base = std::env::var_os("SLUICE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let path = base.join(format!("{name}-{}.toml", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

/// What a command shows where somebody looks at it.
fn on_terminal(arguments: &[&str]) -> String {
    let command = [&[env!("CARGO_BIN_EXE_sluice")], arguments].concat().join(" ");
    let output = Command::new("script").args(["--quiet", "--return", "--command", &command, "/dev/null"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stdout));
    text(&output.stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Twenty broken files: where a problem is, and words that say what it is.
const BROKEN: [(&str, &str, &str); 20] = [
    ("[backend]\nurl = \n", ":2:7:", ""),
    ("[backend\nurl='x'\n", ":1:9:", ""),
    ("[backend]\nurl='http://127.0.0.1:1'\nurl='http://127.0.0.1:1'\n", ":3:1:", "duplicate"),
    ("listen='8080'\n[backend]\nurl='http://127.0.0.1:1'\n", ":1:8:", "not an address such as"),
    ("[backend]\nurl='ftp://x'\n", ":2:5:", "not a URL such as"),
    ("[backend]\nurl='https://x'\n", ":2:5:", "plain http only"),
    ("[backend]\n", ":1:1:", "url: missing"),
    ("[backend]\nurll='http://127.0.0.1:1'\n", ":2:1:", "did you mean 'url'?"),
    ("[backend]\nurl='http://127.0.0.1:1'\nkind='htpp'\n", ":3:6:", "did you mean 'http'?"),
    ("[backend]\nurl='http://127.0.0.1:1'\ntimeout='30'\n", ":3:9:", "such as \"30s\""),
    ("[backend]\nurl='http://127.0.0.1:1'\ntimeout=['30s']\n", ":3:9:", "expected a string"),
    ("[backend]\nurl='http://127.0.0.1:1'\n[cache]\nmemory='256MB'\n", ":4:8:", "powers of 1024"),
    ("[backend]\nurl='http://127.0.0.1:1'\n[cache]\nredis='localhost'\n", ":4:7:", "not a URL such as redis://"),
    ("[backend]\nurl='${NOT_SET_ANYWHERE}'\n", ":2:5:", "is not set; write ${NOT_SET_ANYWHERE:-default}"),
    ("[backend]\nurl='http://127.0.0.1:1'\n[[route]]\nname='a'\n", ":3:1:", "path: missing"),
    ("[backend]\nurl='http://127.0.0.1:1'\n[[route]]\nname='a'\npath='/a*'\n", ":5:6:", "ends in \"/*\""),
    ("[backend]\nurl='http://127.0.0.1:1'\n[[route]]\nname='a'\npath='/a'\nkey='{'\n", ":6:5:", "without a '}'"),
    ("[backend]\nurl='http://127.0.0.1:1'\n[[route]]\nname='a'\npath='/a'\nquery=['x']\nkey='{y}'\n", ":6:7:", "does not list 'y'"),
    ("[backend]\nurl='http://127.0.0.1:1'\n[[route]]\nname='a'\npath='/a'\nmethods=['POST']\n", ":6:9:", "cannot be cached"),
    (
        "[backend]\nurl='http://127.0.0.1:1'\n[[route]]\nname='a'\npath='/a'\n[route.history]\nparameter='end'\n",
        ":6:1:",
        "older_than: missing",
    ),
];

#[test]
fn twenty_broken_files_are_told_with_their_places() {
    for (index, (broken, place, words)) in BROKEN.into_iter().enumerate() {
        let path = file(&format!("broken-{index}"), broken);
        let output = run(&["check", "--config", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{broken}");
        let told = text(&output.stderr);
        assert!(told.lines().any(|line| line.starts_with(&format!("{}{place}", path.display()))), "{broken}\n→ {told}");
        assert!(told.contains(words), "{broken}\n→ {told}");
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn the_shipped_file_is_fine_from_where_one_stands() {
    let output = program().current_dir(env!("CARGO_MANIFEST_DIR")).arg("check").output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
    assert_eq!(text(&output.stdout), "proxy.toml: fine, 5 rules\n");
}

#[test]
fn exit_codes() {
    assert_eq!(run(&["check", "--config", "/nowhere.toml"]).status.code(), Some(3));
    assert_eq!(run(&["--nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["purge"]).status.code(), Some(2));
    let path = file("nobody", "[admin]\nlisten='127.0.0.1:1'\n[backend]\nurl='http://127.0.0.1:1'\n");
    let output = run(&["stats", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("no proxy answers at 127.0.0.1:1 (admin.listen)"));
    std::fs::remove_file(path).unwrap();
}

const COMMANDS: [&str; 10] = ["serve", "check", "explain", "demo", "stats", "purge", "reload", "warm", "completions", "man"];

#[test]
fn every_command_has_help() {
    for command in [""].into_iter().chain(COMMANDS) {
        let output = program().args(command.split_whitespace()).arg("--help").output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{command}");
        let help = text(&output.stdout);
        assert!(help.contains("Usage: sluice"), "{command}: {help}");
    }
    assert!(text(&run(&["--version"]).stdout).starts_with("sluice "));
}

#[test]
fn completions_and_man_pages_know_every_command() {
    let folder = scratch();
    let output = run(&["man", folder.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let page = std::fs::read_to_string(folder.join("sluice.1")).unwrap();
    for command in COMMANDS {
        assert!(page.contains(command) && folder.join(format!("sluice-{command}.1")).exists(), "{command}");
        for shell in ["bash", "zsh", "fish"] {
            assert!(text(&run(&["completions", shell]).stdout).contains(command), "{command} in {shell}");
        }
    }
    assert_eq!(run(&["man", "/nowhere/at/all"]).status.code(), Some(3));
    assert_eq!(run(&["completions", "command.com"]).status.code(), Some(2));
}

#[test]
fn explaining_needs_nobody() {
    let explain = |arguments: &[&str]| {
        let output = program().current_dir(env!("CARGO_MANIFEST_DIR")).arg("explain").args(arguments).output().unwrap();
        (output.status.code(), text(&output.stdout))
    };
    let (code, told) = explain(&["/api/liquidations?symbol=btcusdt&timeframe=1h&start_timestamp=1&end_timestamp=2025-01-01&x=1"]);
    assert_eq!(code, Some(0));
    for part in [
        "rule       liquidations",
        "key        liq:BTCUSDT:1h:1:2025-01-01",
        "fresh      1d (history: end_timestamp ended over 1h ago)",
        "ignored    x",
        "in Redis   sluice:liq:",
    ] {
        assert!(told.contains(part), "{part} is not in\n{told}");
    }
    assert!(explain(&["-H", "Authorization: x", "/api/symbols"]).1.contains("uncached (authorization)"));
    assert!(explain(&["/api%2Fsymbols"]).1.contains("uncached (doubtful-path)"));
    assert!(explain(&["/api/liquidation-orders/stream"]).1.contains("uncached (rule)"));
    let (code, told) = explain(&["/a%00"]);
    assert_eq!(code, Some(1));
    assert!(told.contains("refused with 400"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_reach_the_running_proxy() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let sluice =
        Sluice::ruled(backend.address, "", "[[route]]\nname='all'\npath='/*'\nttl='1h'\nkey='all'\ntags=['t']\n[warm]\ntargets=['/w']\n")
            .await;
    sluice.get("/x").await;
    let config = format!("[admin]\nlisten='{}'\ntoken='{TOKEN}'\n[backend]\nurl='http://127.0.0.1:1'\n", sluice.admin);
    let path = file("reaching", &config);
    let path = path.to_str().unwrap();
    let said = |arguments: &[&str]| {
        let output = run(&[arguments, &["--config", path]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(said(&["stats", "--json"]).contains("\"misses\": 1"));
    assert!(said(&["stats"]).lines().any(|line| line.starts_with("all ") && line.contains("0.0 %")), "{}", said(&["stats"]));
    assert_eq!(said(&["purge", "--tag", "t", "--soft"]), "{\"purged\":1}\n");
    assert_eq!(said(&["purge", "--pattern", "a?l"]), "{\"purged\":1}\n");
    let explained = said(&["explain", "--running", "/x?a=1+2"]);
    assert!(explained.contains("request    GET /x?a=1+2") && explained.contains("voided     by pattern a?l"), "{explained}");
    assert_eq!(said(&["warm"]), "{\"warming\":1}\n");
    let watched = on_terminal(&["warm", "--config", path]);
    assert!(watched.contains("1 of 1 asked for, 0 failed"), "{watched}");
    let mut watching = program().args(["stats", "--watch", "--config", path]).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(watching.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.filter(|line| line.starts_with("\x1b[2J")).take(2).count(), 2);
    watching.kill().unwrap();
    watching.wait().unwrap();
    assert!(said(&["reload"]).contains("\"reloaded\":false"));
    std::fs::write(path, config.replace(TOKEN, "wrong")).unwrap();
    assert_eq!(run(&["warm", "--config", path]).status.code(), Some(1));
    std::fs::remove_file(path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demonstration_needs_no_service() {
    let mut child =
        program().args(["demo", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let address = lines.next().unwrap().strip_prefix("listening on http://").unwrap().parse().unwrap();
    let mut urls = Vec::new();
    for line in lines.by_ref().take_while(|line| !line.starts_with("hits")) {
        urls.extend(line.split('\'').nth(1).map(str::to_owned));
    }
    assert_eq!(urls.len(), 3);
    for url in urls {
        let target = &url["http://".len()..];
        let target = &target[target.find('/').unwrap()..];
        assert_eq!(get(address, target, &[]).await.cache_status(), "sluice; fwd=uri-miss; stored", "{target}");
        assert!(get(address, target, &[]).await.cache_status().contains("hit"), "{target}");
    }
    let counted = lines.find(|line| line.starts_with("hits 3   misses 3")).unwrap();
    assert!(counted.contains("stale 0"));
    // Another window each time.
    until("windows come from the timeline", || async {
        let now = Wall::now().as_millis();
        let times = format!("start_timestamp={}&end_timestamp={now}", now - 86_400_000);
        let answer = get(address, &format!("/api/liquidations?symbol=BTCUSDT&timeframe=1m&{times}"), &[]).await;
        answer.cache_status() == "sluice; hit; detail=timeline"
    })
    .await;
    assert!(lines.any(|line| !line.ends_with("from the timeline 0")));
    let newest = || async { get(address, "/api/liquidation-orders?symbol=BTCUSDT&limit=1", &[]).await.text() };
    let first = newest().await;
    until("orders go on arriving", || async { newest().await != first }).await;
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_taken_address_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(&["demo", "--listen", &address, "--admin-listen", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains(&format!("listening on {address} (listen): Address already in use")));
}
