//! Starting servers, asking them, and waiting for what they do.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader as StdReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// The longest that anything may take: past it, it hangs.
pub const HANG: Duration = Duration::from_secs(60);

/// Waits until `condition` holds, looking again every few milliseconds; panics with `what` if it hangs.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let work = async {
        while !condition().await {
            ticks.tick().await;
        }
    };
    assert!(tokio::time::timeout(HANG, work).await.is_ok(), "never happened: {what}");
}

/// Where this test run keeps its files.
pub fn scratch() -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let base = std::env::var_os("SLUICE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = base.join(format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A program that was started here and ends with its value.
pub struct Process {
    pub child: Child,
    dir: PathBuf,
}

impl Process {
    pub fn start(command: &mut Command, dir: PathBuf) -> Self {
        let name = command.get_program().to_owned();
        let child = command.spawn().unwrap_or_else(|error| panic!("{} cannot be started: {error}", name.display()));
        if let Some(base) = std::env::var_os("SLUICE_TEST_DIR") {
            // So that tests/run can end it should this process be interrupted.
            let pids = PathBuf::from(base).join("pids");
            std::fs::create_dir_all(&pids).and_then(|()| std::fs::write(pids.join(child.id().to_string()), "")).unwrap();
        }
        Self { child, dir }
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").arg(format!("-{signal}")).arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success(), "kill -{signal}");
        // Threads stop one by one; until the last has, it may still answer.
        while signal == "STOP" && !self.stands_still() {
            std::thread::yield_now();
        }
    }

    /// Whether every thread is stopped.
    fn stands_still(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks.flatten().all(|task| {
            let line = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            line.rsplit(") ").next().is_none_or(|state| state.is_empty() || state.starts_with(['T', 'Z', 'X']))
        })
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most that it ever was.
    pub fn resident_peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Sluice {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logged());
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A running `sluice serve`.
pub struct Sluice {
    pub process: Process,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    log: PathBuf,
}

pub const TOKEN: &str = "test-token";

/// The shipped configuration with short lives, so that tests see entries go stale.
pub fn shipped(fresh: &str) -> String {
    let text = include_str!("../../proxy.toml");
    text.replace("ttl = \"${CACHE_TTL_SYMBOLS:-3600}s\"", &format!("ttl = \"{fresh}\""))
        .replace("ttl = \"${CACHE_TTL_SECONDS:-300}s\"", &format!("ttl = \"{fresh}\""))
        .replace("\nttl = \"15s\"", &format!("\nttl = \"{fresh}\""))
        .replace("\nttl = \"24h\"", &format!("\nttl = \"{fresh}\""))
}

/// One rule for everything, with these lines in it.
pub fn one_rule(lines: &str) -> String {
    format!("[[route]]\nname = 'all'\npath = '/*'\nkey = 'all'\n{lines}\n")
}

impl Sluice {
    /// In front of `backend`, with the text of a configuration that does not say where it listens.
    pub async fn start(backend: SocketAddr, redis: &str, config: &str) -> Self {
        Self::with(config, &[("BACKEND_URL", &format!("http://{backend}")), ("REDIS_URL", redis)])
    }

    /// In front of `backend` with these rules, and `sections` beside them.
    pub async fn ruled(backend: SocketAddr, redis: &str, rules: &str) -> Self {
        let text = format!("[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{backend}'\ntimeout='5s'\n[cache]\nredis='{redis}'\n{rules}");
        Self::with(&text, &[])
    }

    pub fn with(config: &str, variables: &[(&str, &str)]) -> Self {
        let dir = scratch();
        let file = dir.join("proxy.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = program();
        command.args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--config"]).arg(&file);
        for (name, value) in variables {
            // An empty REDIS_URL would mean the default.
            command.env(name, if value.is_empty() { "redis://127.0.0.1:1/0" } else { value });
        }
        let log = dir.join("log");
        let mut process = Process::start(command.stdout(Stdio::piped()).stderr(std::fs::File::create(&log).unwrap()), dir);
        let mut lines = StdReader::new(process.child.stdout.take().unwrap()).lines();
        let mut address = |prefix: &str| {
            let line = lines.next().expect("a line").unwrap();
            line.strip_prefix(prefix).unwrap_or_else(|| panic!("said {line:?}")).parse().unwrap()
        };
        let (address, admin) = (address("listening on http://"), address("admin on http://"));
        Self { process, address, admin, log }
    }

    /// What it has logged so far.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub async fn get(&self, target: &str) -> Answer {
        get(self.address, target, &[]).await
    }

    pub async fn get_with(&self, target: &str, fields: &[(&str, &str)]) -> Answer {
        get(self.address, target, fields).await
    }

    /// The sum of the metric's series whose labels contain every one of `labels`.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let page = get(self.admin, "/metrics", &[]).await.text();
        let series =
            page.lines().filter(|line| line.starts_with(&format!("sluice_{name}{{")) || line.starts_with(&format!("sluice_{name} ")));
        let meant = series.filter(|line| labels.iter().all(|label| line.contains(label)));
        meant.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub async fn manage(&self, target: &str) -> Answer {
        let token = format!("Bearer {TOKEN}");
        Connection::open(self.admin).await.ask("POST", target, &[("Authorization", &token)], b"").await
    }
}

/// The program under test, without the variables of whoever runs the tests.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    for name in [
        "PORT",
        "REDIS_URL",
        "REDIS_HOST",
        "REDIS_PORT",
        "REDIS_PASSWORD",
        "REDIS_DB",
        "CACHE_TTL_SECONDS",
        "CACHE_TTL_SYMBOLS",
        "BACKEND_URL",
        "BACKEND_KIND",
        "DB_HOST",
        "DB_PORT",
        "DB_USER",
        "DB_PASSWORD",
        "DB_DATABASE",
        "DB_LIQ_TABLENAME",
        "QUERY_TIMEOUT_SECONDS",
        "LONG_QUERY_TIMEOUT_SECONDS",
        "SLUICE_ADMIN_TOKEN",
        "SLUICE_CACHE_KEY",
    ] {
        command.env_remove(name);
    }
    command
}

/// A private Redis.
pub struct Redis {
    pub process: Process,
    pub port: u16,
    extra: Vec<String>,
}

impl Redis {
    pub async fn start(extra: &[&str]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::on(port, extra.iter().map(|&text| text.to_owned()).collect()).await
    }

    pub async fn on(port: u16, extra: Vec<String>) -> Self {
        let dir = scratch();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"]).arg(&dir).args(&extra);
        let process = Process::start(command.stdout(Stdio::null()), dir);
        let redis = Self { process, port, extra };
        until("Redis takes connections", || async { TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
        redis
    }

    /// Ends it and starts it anew, empty, on the same port.
    pub async fn restart(self) -> Self {
        let (port, extra) = (self.port, self.extra.clone());
        drop(self);
        Self::on(port, extra).await
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// Runs a command and returns its raw answer's lines.
    pub async fn command(&self, words: &[&[u8]]) -> Vec<u8> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"*1\r\n$4\r\nQUIT\r\n");
        stream.write_all(&request).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(HANG, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        answer.truncate(answer.len().saturating_sub(5));
        answer
    }

    /// The names of all keys.
    pub async fn keys(&self) -> Vec<String> {
        let answer = String::from_utf8_lossy(&self.command(&[b"KEYS", b"*"]).await).into_owned();
        answer.lines().skip(1).filter(|line| !line.starts_with('$')).map(str::to_owned).collect()
    }
}

/// An answer, its body inflated by no one.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body came whole.
    pub whole: bool,
}

impl Answer {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    pub fn cache_status(&self) -> &str {
        self.field("cache-status").unwrap_or("")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.plain()).into_owned()
    }

    /// The body, inflated if it is gzip.
    pub fn plain(&self) -> Vec<u8> {
        if self.field("content-encoding") == Some("gzip") {
            return sluice::http::encoding::gunzip(&self.body, 1 << 30).unwrap().to_vec();
        }
        self.body.clone()
    }
}

/// A connection to a server, kept alive.
pub struct Connection(pub BufReader<TcpStream>);

impl Connection {
    pub async fn open(address: SocketAddr) -> Self {
        Self(BufReader::new(TcpStream::connect(address).await.unwrap()))
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).await.unwrap();
    }

    pub async fn ask(&mut self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: api.test\r\n");
        for (name, value) in fields {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        self.send(&[head.as_bytes(), body].concat()).await;
        self.answer(method == "HEAD").await.unwrap_or_else(|| panic!("no answer to {method} {target}"))
    }

    /// The head of the next answer; `None` if the connection was closed instead.
    pub async fn head(&mut self) -> Option<Answer> {
        let read = async {
            let mut line = String::new();
            if self.0.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            let status = line.split(' ').nth(1)?.parse().ok()?;
            let mut fields = Vec::new();
            loop {
                line.clear();
                self.0.read_line(&mut line).await.ok()?;
                match line.trim_end().split_once(':') {
                    Some((name, value)) => fields.push((name.to_ascii_lowercase(), value.trim().to_owned())),
                    None => return Some(Answer { status, fields, body: Vec::new(), whole: true }),
                }
            }
        };
        tokio::time::timeout(HANG, read).await.expect("an answer's head")
    }

    pub async fn answer(&mut self, headless: bool) -> Option<Answer> {
        let mut answer = self.head().await?;
        if headless || answer.status == 304 || answer.status == 204 {
            return Some(answer);
        }
        let body = tokio::time::timeout(HANG, self.body(&answer)).await.expect("an answer's body");
        (answer.body, answer.whole) = body;
        Some(answer)
    }

    pub async fn body(&mut self, head: &Answer) -> (Vec<u8>, bool) {
        let mut body = Vec::new();
        if head.field("transfer-encoding").is_some() {
            loop {
                let mut line = String::new();
                if self.0.read_line(&mut line).await.unwrap_or(0) == 0 {
                    return (body, false);
                }
                let size = usize::from_str_radix(line.trim(), 16).unwrap();
                let mut chunk = vec![0; size + 2];
                if self.0.read_exact(&mut chunk).await.is_err() {
                    return (body, false);
                }
                if size == 0 {
                    return (body, true);
                }
                body.extend_from_slice(&chunk[..size]);
            }
        }
        let Some(length) = head.field("content-length") else {
            let whole = self.0.read_to_end(&mut body).await.is_ok();
            return (body, whole);
        };
        let length: u64 = length.parse().unwrap();
        let read = (&mut self.0).take(length).read_to_end(&mut body).await.unwrap_or(0);
        (body, read as u64 == length)
    }
}

pub async fn get(address: SocketAddr, target: &str, fields: &[(&str, &str)]) -> Answer {
    Connection::open(address).await.ask("GET", target, fields, b"").await
}

/// A request as the backend got it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub target: String,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Asked {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }
}

/// What the scripted backend does next.
pub enum Step {
    /// Writes bytes.
    Send(Vec<u8>),
    /// Waits for so long.
    Delay(Duration),
    /// Writes these bytes so many times.
    Repeat(Vec<u8>, usize),
    /// Does nothing until the test ends.
    Hang,
    /// Breaks the connection off with a reset.
    Reset,
    /// Closes the connection.
    Close,
}

/// A whole answer of 200 with these fields.
pub fn ok(fields: &str, body: &[u8]) -> Vec<Step> {
    reply("200 OK", fields, body)
}

pub fn reply(status: &str, fields: &str, body: &[u8]) -> Vec<Step> {
    let head = format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\n\r\n", body.len());
    vec![Step::Send([head.as_bytes(), body].concat())]
}

type Script = dyn Fn(&Asked) -> Vec<Step> + Send + Sync;

/// A backend that does what it is told and remembers what it was asked.
pub struct Backend {
    pub address: SocketAddr,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    script: Arc<Script>,
    serving: Option<tokio::task::JoinHandle<()>>,
}

impl Backend {
    pub async fn start(script: impl Fn(&Asked) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut backend = Self { address: listener.local_addr().unwrap(), asked: Arc::default(), script: Arc::new(script), serving: None };
        backend.serve(listener);
        backend
    }

    fn serve(&mut self, listener: TcpListener) {
        let (asked, script) = (Arc::clone(&self.asked), Arc::clone(&self.script));
        self.serving = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(converse(stream, Arc::clone(&asked), Arc::clone(&script)));
            }
        }));
    }

    /// Ends it, connections and all.
    pub async fn kill(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
    }

    /// Starts it again where it was.
    pub async fn revive(&mut self) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.serve(socket.listen(1024).unwrap());
    }

    pub fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    pub fn count_of(&self, target: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| asked.target == target).count()
    }

    pub fn last(&self) -> Asked {
        self.asked.lock().unwrap().last().expect("a request").clone()
    }
}

async fn converse(stream: TcpStream, asked: Arc<Mutex<Vec<Asked>>>, script: Arc<Script>) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read_request(&mut stream).await {
        let steps = script(&request);
        asked.lock().unwrap().push(request);
        for step in steps {
            let done = match step {
                Step::Send(bytes) => stream.get_mut().write_all(&bytes).await.is_ok(),
                Step::Repeat(bytes, times) => {
                    let mut fine = true;
                    for _ in 0..times {
                        fine = fine && stream.get_mut().write_all(&bytes).await.is_ok();
                    }
                    fine
                }
                Step::Delay(span) => {
                    tokio::time::sleep(span).await;
                    true
                }
                Step::Hang => std::future::pending().await,
                Step::Reset => {
                    let _ = stream.get_ref().set_zero_linger();
                    false
                }
                Step::Close => false,
            };
            if !done {
                return;
            }
        }
    }
}

/// A line, whatever its bytes.
async fn read_line(stream: &mut BufReader<TcpStream>) -> Option<String> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line).await.ok().filter(|&read| read > 0)?;
    Some(String::from_utf8_lossy(&line).into_owned())
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<Asked> {
    let line = read_line(stream).await?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut fields = Vec::new();
    loop {
        let line = read_line(stream).await?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => fields.push((name.to_ascii_lowercase(), value.trim().to_owned())),
            None => break,
        }
    }
    let mut asked = Asked { method, target, fields, body: Vec::new() };
    if let Some(length) = asked.field("content-length").and_then(|length| length.parse().ok()) {
        asked.body = vec![0; length];
        stream.read_exact(&mut asked.body).await.ok()?;
    } else if asked.field("transfer-encoding").is_some() {
        loop {
            let size = usize::from_str_radix(read_line(stream).await?.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).await.ok()?;
            if size == 0 {
                break;
            }
            asked.body.extend_from_slice(&chunk[..size]);
        }
    }
    Some(asked)
}

/// One line of the recorded contract.
#[derive(Clone, serde::Deserialize)]
pub struct Recorded {
    pub method: String,
    pub target: String,
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
    /// The rule by which native mode answers differently.
    pub deviates: Option<String>,
}

/// Where the contract's data is.
pub fn recorded_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/contract")
}

pub fn recorded() -> Vec<Recorded> {
    include_str!("../contract/golden.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
