//! CPU time a hit: Sluice beside nginx's `proxy_cache`, Varnish, and a bare tokio socket loop that writes canned bytes.
//!
//! `benches/compare [SECONDS] [ROUNDS] [CASE]` runs it, all cases or those whose title begins so. Each server has core 0 to itself and
//! wrk core 1. What is compared is the CPU time that the operating system charged to the server, a request: the load generator saturates
//! first, so requests a second say little. Every figure is the median of several rounds, in which the servers take turns.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a benchmark that cannot go on stops")]

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const SMALL: &str = "/api/symbols";
const LARGE: &str = "/api/liquidation-orders?symbol=BTCUSDT&limit=50";
const SERVER_CORE: &str = "0";
const LOAD_CORE: &str = "1";
const HUGE: &str = "/huge";
const HUGE_BYTES: usize = 256 << 10;
/// Prints the latency that wrk itself does not.
const TAIL: &str = "done = function(_, latency) io.write(string.format('tail %d\\n', latency:percentile(99.9))) end\n";
/// Asks for something new each hundredth time.
const MISSES: &str = "local count, run, hit = 0, os.time(), nil\n\
    request = function()\n\
      count = count + 1\n\
      hit = hit or wrk.format('GET')\n\
      return count % 100 == 0 and wrk.format('GET', string.format('/miss/%d/%d', run, count)) or hit\n\
    end\n";
/// What a browser sends with a poll.
const BROWSER: [&str; 9] = [
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Accept: application/json, text/plain, */*",
    "Accept-Language: en-US,en;q=0.5",
    "Referer: https://dash.example/charts/BTCUSDT",
    "DNT: 1",
    "Sec-Fetch-Dest: empty",
    "Sec-Fetch-Mode: cors",
    "Sec-Fetch-Site: same-site",
    "Priority: u=4",
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.first().map(String::as_str) {
        Some("loop") => socket_loop(),
        Some("backend") => backend(),
        _ => {
            let number = |at: usize, default| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(default);
            compare(number(0, 4), number(1, 5), arguments.get(2).map_or("", String::as_str));
        }
    }
}

/// A server under test, ended when dropped.
struct Server {
    name: &'static str,
    child: Child,
    port: u16,
    /// In which cases it takes part.
    plain: bool,
    gzip: bool,
    /// Whether it is a cache, which can miss.
    caches: bool,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only what was started here is ended, by its pid.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Figure {
    cpu_us: f64,
    hits_a_second: f64,
    p50_us: f64,
    p99_us: f64,
    tail_us: f64,
}

/// What is asked for, and how.
struct Case {
    title: &'static str,
    target: &'static str,
    fields: &'static [&'static str],
    connections: u16,
    /// Whether one request in a hundred is for something new.
    misses: bool,
}

impl Case {
    const fn new(title: &'static str, target: &'static str, fields: &'static [&'static str], connections: u16) -> Self {
        Self { title, target, fields, connections, misses: false }
    }
}

const CASES: [Case; 11] = [
    Case::new("223 B", SMALL, &[], 64),
    Case::new("14 KB", LARGE, &[], 64),
    Case::new("256 KB", HUGE, &[], 64),
    Case::new("14 KB gzip", LARGE, &[GZIP], 64),
    Case::new("223 B, a browser's head", SMALL, &BROWSER, 64),
    Case::new("223 B, one connection", SMALL, &[], 1),
    Case::new("14 KB, one connection", LARGE, &[], 1),
    Case::new("223 B, 1,000 connections", SMALL, &[], 1000),
    Case::new("14 KB, 1,000 connections", LARGE, &[], 1000),
    Case { misses: true, ..Case::new("223 B, one in a hundred misses", SMALL, &[], 64) },
    Case { misses: true, ..Case::new("223 B, 1,000 connections, one in a hundred misses", SMALL, &[], 1000) },
];
const GZIP: &str = "Accept-Encoding: gzip";

fn compare(seconds: u64, rounds: u64, wanted: &str) {
    let dir = PathBuf::from(format!("/dev/shm/sluice-compare-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder on tmpfs");
    let me = std::env::current_exe().expect("this program");
    let backend = start("backend", Command::new("taskset").args(["-c", LOAD_CORE]).arg(&me).arg("backend"), None);
    let sluice = env!("CARGO_BIN_EXE_sluice");
    let memory = write(&dir, "memory.toml", &sluice_config(backend.port, "256MiB", ""));
    let redis_port = free_port();
    let redis = Command::new("taskset")
        .args(["-c", LOAD_CORE, "redis-server", "--save", "", "--port"])
        .arg(redis_port.to_string())
        .args(["--bind", "127.0.0.1"])
        .stdout(Stdio::null())
        .spawn();
    let redis = Server { name: "redis", child: redis.expect("redis-server"), port: redis_port, plain: false, gzip: false, caches: true };
    let shared = write(&dir, "redis.toml", &sluice_config(backend.port, "0B", &format!("redis://127.0.0.1:{redis_port}/0")));
    let serve = |file: &Path| {
        let mut command = pinned(sluice);
        command.arg("serve").arg("--config").arg(file);
        command
    };
    let nginx_plain = nginx(&dir, "plain", backend.port, &Nginx { title: "nginx", keeps_open: false, gzip: false });
    let nginx_open = nginx(&dir, "open", backend.port, &Nginx { title: "nginx, open files", keeps_open: true, gzip: false });
    let nginx_gzip = nginx(&dir, "gzip", backend.port, &Nginx { title: "nginx, gzip on", keeps_open: true, gzip: true });
    let over_redis = start("sluice, Redis only", &mut serve(&shared), None);
    let mut in_memory = start("sluice", &mut serve(&memory), None);
    in_memory.gzip = true;
    let mut bare = start("loop", pinned(me.to_str().expect("a path in UTF-8")).arg("loop"), None);
    bare.caches = false;
    let servers = [in_memory, nginx_plain, nginx_open, nginx_gzip, varnish(&dir, backend.port), bare, over_redis];
    let (tail, misses) = (write(&dir, "tail.lua", TAIL), write(&dir, "misses.lua", &format!("{TAIL}{MISSES}")));
    let mut report = heading(seconds, rounds);
    for case in CASES.iter().filter(|case| case.title.starts_with(wanted)) {
        let gzip = case.fields.contains(&GZIP);
        let script = if case.misses { &misses } else { &tail };
        let taking_part = |server: &Server| (if gzip { server.gzip } else { server.plain }) && (server.caches || !case.misses);
        let mut figures: Vec<Vec<Figure>> = servers.iter().map(|_| Vec::new()).collect();
        for round in 0..=rounds {
            for (server, figures) in servers.iter().zip(&mut figures).filter(|(server, _)| taking_part(server)) {
                let figure = measure(server, case, script, if round == 0 { 1 } else { seconds });
                // The first round warms caches and connections and does not count.
                if round > 0 {
                    figures.push(figure);
                }
            }
        }
        let page = write_case(case.title, &servers, &figures);
        std::io::stdout().write_all(page.as_bytes()).expect("standard output");
        report.push_str(&page);
    }
    drop(redis);
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    std::fs::create_dir_all(&results).expect("benches/results");
    if wanted.is_empty() {
        std::fs::write(results.join("compare.txt"), &report).expect("benches/results/compare.txt");
    }
    std::fs::remove_dir_all(&dir).expect("removing the folder on tmpfs");
}

fn write_case(title: &str, servers: &[Server], figures: &[Vec<Figure>]) -> String {
    let mut report = String::new();
    let median = |figures: &[Figure], of: fn(&Figure) -> f64| {
        let mut values: Vec<f64> = figures.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let ours = median(&figures[0], |figure| figure.cpu_us);
    let _ = writeln!(
        &mut report,
        "\n{title}\n  server                 CPU µs/hit  ÷ sluice     hits/s    p50 µs    p99 µs  p99.9 µs   raw CPU µs/hit"
    );
    for (server, figures) in servers.iter().zip(figures).filter(|(_, figures)| !figures.is_empty()) {
        let raw: Vec<String> = figures.iter().map(|figure| format!("{:.2}", figure.cpu_us)).collect();
        let cpu = median(figures, |figure| figure.cpu_us);
        let _ = writeln!(
            &mut report,
            "  {:<22} {:>10.2} {:>9.2} {:>10.0} {:>9.0} {:>9.0} {:>9.0}   {}",
            server.name,
            cpu,
            cpu / ours,
            median(figures, |figure| figure.hits_a_second),
            median(figures, |figure| figure.p50_us),
            median(figures, |figure| figure.p99_us),
            median(figures, |figure| figure.tail_us),
            raw.join(" ")
        );
    }
    report
}

fn heading(seconds: u64, rounds: u64) -> String {
    let said = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().expect("a version");
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned()
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu =
        cpu.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown").to_owned();
    format!(
        "benches/compare {seconds} {rounds}\nsluice {} · {} · {} · {} · {}\nCPU: {cpu}; server on core {SERVER_CORE}, wrk -t1 on core {LOAD_CORE}, 64 connections where nothing else is said; medians of {rounds} rounds of {seconds} s, servers taking turns\n",
        env!("CARGO_PKG_VERSION"),
        said("nginx", "-v"),
        said("varnishd", "-V"),
        said("wrk", "-v"),
        said("redis-server", "--version"),
    )
}

fn measure(server: &Server, case: &Case, script: &Path, seconds: u64) -> Figure {
    let url = format!("http://127.0.0.1:{}{}", server.port, case.target);
    let mut wrk = Command::new("taskset");
    wrk.args(["-c", LOAD_CORE, "wrk", "-t1", "-c"]).arg(case.connections.to_string());
    wrk.args(["--latency", "-d"]).arg(format!("{seconds}s")).arg("-s").arg(script);
    for field in case.fields {
        wrk.args(["-H", field]);
    }
    let before = cpu_seconds(server.child.id());
    let output = wrk.arg(&url).output().expect("wrk");
    let used = cpu_seconds(server.child.id()) - before;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("Non-2xx"), "{}: {text}", server.name);
    let requests: f64 = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))
        .and_then(|(count, _)| count.parse().ok())
        .expect("wrk's count");
    let value = |label: &str| text.lines().find_map(|line| line.trim().strip_prefix(label)).map(str::trim).unwrap_or_default().to_owned();
    Figure {
        cpu_us: used / requests * 1e6,
        hits_a_second: value("Requests/sec:").parse().unwrap_or(f64::NAN),
        p50_us: micros(&value("50%")),
        p99_us: micros(&value("99%")),
        tail_us: value("tail ").parse().unwrap_or(f64::NAN),
    }
}

fn micros(text: &str) -> f64 {
    let at = text.find(|c: char| c.is_alphabetic()).unwrap_or(text.len());
    let number: f64 = text[..at].parse().unwrap_or(f64::NAN);
    number
        * match &text[at..] {
            "s" => 1e6,
            "ms" => 1e3,
            _ => 1.0,
        }
}

/// User and system time of a process, its threads and its children, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let of_children: f64 = children.split_whitespace().filter_map(|child| child.parse().ok()).map(cpu_seconds).sum();
    let mut nanoseconds = of_children * 1e9;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).expect("a running server").flatten() {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split(' ').next().and_then(|first| first.parse::<f64>().ok()).unwrap_or(0.0);
    }
    nanoseconds / 1e9
}

fn pinned(program: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", SERVER_CORE, program]);
    command
}

/// Starts a server and learns its port from the first line that names one.
fn start(name: &'static str, command: &mut Command, port: Option<u16>) -> Server {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut line = String::new();
    let port = port.unwrap_or_else(|| {
        let out = child.stdout.as_mut().expect("its output");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("its first line");
        line.trim().rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or_else(|| panic!("{name} said {line:?}"))
    });
    wait_for(port);
    Server { name, child, port, plain: true, gzip: false, caches: true }
}

fn wait_for(port: u16) {
    let mut tries = 0;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        tries += 1;
        assert!(tries < 1_000_000, "nothing listens on {port}");
        std::thread::yield_now();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).map(|address| address.port()).expect("a free port")
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("a file on tmpfs");
    path
}

/// The shipped rules, with fresh times long enough for a run.
fn sluice_config(backend: u16, memory: &str, redis: &str) -> String {
    format!(
        "listen = '127.0.0.1:0'\n[admin]\nlisten = '127.0.0.1:0'\n[backend]\nurl = 'http://127.0.0.1:{backend}'\n[cache]\nmemory = '{memory}'\nredis = '{redis}'\n\
         [[route]]\nname = 'symbols'\npath = '/api/symbols'\nttl = '1h'\nquery = []\nkey = 'symbols:all'\n\
         [[route]]\nname = 'huge'\npath = '/huge'\nttl = '1h'\n\
         [[route]]\nname = 'misses'\npath = '/miss/*'\nttl = '1h'\n\
         [[route]]\nname = 'orders-latest'\npath = '/api/liquidation-orders'\nwith = ['limit']\nttl = '1h'\nfold_case = ['symbol']\nkey = 'orders:{{symbol}}:latest:{{limit}}'\ntags = ['symbol:{{symbol}}']\n"
    )
}

/// How nginx is set up. What is not said here is as in Debian's own `nginx.conf` (`sendfile`, `tcp_nopush`), but for the access log.
struct Nginx {
    title: &'static str,
    /// `open_file_cache`, which few set: a hit then opens no file.
    keeps_open: bool,
    gzip: bool,
}

fn nginx(dir: &Path, name: &str, backend: u16, setup: &Nginx) -> Server {
    let &Nginx { title, keeps_open, gzip } = setup;
    let port = free_port();
    let home = dir.join(name);
    std::fs::create_dir_all(&home).expect("a folder for nginx");
    let home = home.display();
    let gzip_lines = if gzip { "gzip on; gzip_types application/json; gzip_min_length 1000; gzip_comp_level 5;" } else { "gzip off;" };
    let files = if keeps_open { "open_file_cache max=1000;" } else { "" };
    let text = format!(
        "daemon off; master_process off; worker_processes 1; pid {home}/pid; error_log {home}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 100000000; sendfile on; tcp_nopush on; {files} {gzip_lines}\n\
         client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c; uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;\n\
         proxy_cache_path {home}/cache keys_zone=z:10m use_temp_path=off;\n\
         server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{backend}; proxy_cache z; proxy_cache_valid 200 1h;\n\
         proxy_cache_lock on; add_header X-Cache $upstream_cache_status; }} }} }}\n"
    );
    let file = write(dir, &format!("{name}.conf"), &text);
    let mut server = start(title, pinned("nginx").arg("-c").arg(&file), Some(port));
    (server.plain, server.gzip) = (!gzip, gzip);
    server
}

fn varnish(dir: &Path, backend: u16) -> Server {
    let port = free_port();
    let text = format!(
        "vcl 4.1; backend default {{ .host = \"127.0.0.1\"; .port = \"{backend}\"; }}\n\
         sub vcl_backend_response {{ set beresp.ttl = 1h; set beresp.http.X-Cache = \"varnish\"; }}\n"
    );
    let file = write(dir, "varnish.vcl", &text);
    let mut command = pinned("varnishd");
    command.args(["-F", "-j", "none", "-s", "malloc,256m", "-p", "thread_pools=1", "-n"]).arg(dir.join("varnish"));
    command.arg("-a").arg(format!("127.0.0.1:{port}")).arg("-f").arg(&file);
    start("varnish", &mut command, Some(port))
}

fn body_of(target: &str) -> Vec<u8> {
    match target {
        HUGE => b"{\"filled\":1.25},".repeat(HUGE_BYTES / 16),
        target => recorded(target),
    }
}

fn recorded(target: &str) -> Vec<u8> {
    let golden = include_str!("../tests/contract/golden.jsonl");
    let line = golden.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a recorded line"));
    let line = line.into_iter().find(|line| line["target"] == target).expect("a recorded target");
    line["body"].as_str().expect("a body").as_bytes().to_vec()
}

fn canned(target: &str) -> Vec<u8> {
    let body = body_of(target);
    // As many fields as Sluice sends.
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nvia: 1.1 sluice\r\netag: \"213a0bbea56aa1c169a27c15186365f8\"\r\nage: 0\r\n\
         cache-status: sluice; hit; ttl=3599\r\nx-request-id: 6b834cb58849ddb3\r\ncontent-length: {}\r\ndate: Sun, 22 Nov 2026 20:33:33 GMT\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), &body].concat()
}

/// The limit: reads until a request's end and writes canned bytes.
fn socket_loop() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (small, large, huge) = (canned(SMALL), canned(LARGE), canned(HUGE));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        announce(listener.local_addr().expect("an address"));
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { continue };
            let _ = stream.set_nodelay(true);
            let (small, large, huge) = (small.clone(), large.clone(), huge.clone());
            tokio::spawn(async move {
                let mut buffer = vec![0; 8192];
                let mut held = 0;
                while let Ok(read @ 1..) = stream.read(&mut buffer[held..]).await {
                    held += read;
                    if !buffer[..held].ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let answer = match &buffer[..held] {
                        head if head.starts_with(b"GET /api/symbols") => &small,
                        head if head.starts_with(b"GET /huge") => &huge,
                        _ => &large,
                    };
                    held = 0;
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// The scripted backend, one connection after the other.
fn backend() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    announce(listener.local_addr().expect("an address"));
    let bodies = [SMALL, LARGE, HUGE].map(|target| (target, body_of(target)));
    for mut stream in listener.incoming().flatten() {
        let mut buffer = [0; 8192];
        let read = stream.read(&mut buffer).unwrap_or(0);
        let target = buffer[..read].strip_prefix(b"GET ").unwrap_or_default();
        // What is new each time is as small as can be.
        let (_, body) = bodies.iter().find(|(known, _)| target.starts_with(known.as_bytes())).unwrap_or(&bodies[0]);
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    }
}

fn announce(address: SocketAddr) {
    let mut out = std::io::stdout();
    writeln!(out, "listening on http://{address}").and_then(|()| out.flush()).expect("standard output");
}
