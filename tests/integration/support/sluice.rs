//! A running Sluice, the program under test.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::client::{Answer, Connection, forget_admin, get, note_admin};
use super::process::{Process, scratch};

/// A running `sluice serve`.
pub struct Sluice {
    pub process: Process,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    /// Its configuration.
    pub file: PathBuf,
    log: PathBuf,
}

pub const TOKEN: &str = "test-token";

/// The shipped configuration with short lives, so that tests see entries go stale.
pub fn shipped(fresh: &str) -> String {
    let text = include_str!("../../../proxy.toml");
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

    /// In front of `backend` with these rules, and Sluice's own endpoints before them.
    pub async fn ruled(backend: SocketAddr, redis: &str, rules: &str) -> Self {
        let text = format!(
            "own.endpoints=true\n[admin]\ntoken='{TOKEN}'\n[backend]\nurl='http://{backend}'\ntimeout='5s'\n[cache]\nredis='{redis}'\n{rules}"
        );
        Self::with(&text, &[])
    }

    /// In front of `backend`, with one rule for everything. Redis alone keeps entries, so that every request meets it; `lines` follow in
    /// the section of the cache.
    pub fn over_redis(backend: SocketAddr, redis: &str, lines: &str) -> Self {
        let cache = format!("[cache]\nmemory='0B'\nredis='{redis}'\n{lines}\n");
        Self::with(&format!("[backend]\nurl='http://{backend}'\n{cache}{}", one_rule("ttl='1h'")), &[])
    }

    pub fn with(config: &str, variables: &[(&str, &str)]) -> Self {
        Self::run(config, variables, program(), &["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
    }

    /// At these addresses, with more arguments.
    pub fn at(config: &str, address: SocketAddr, admin: SocketAddr, arguments: &[&str]) -> Self {
        let (address, admin) = (address.to_string(), admin.to_string());
        Self::run(config, &[], program(), &[&["--listen", &address, "--admin-listen", &admin], arguments].concat())
    }

    /// The program, as `command` starts it.
    pub fn run(config: &str, variables: &[(&str, &str)], mut command: Command, arguments: &[&str]) -> Self {
        let dir = scratch();
        let file = dir.join("proxy.toml");
        std::fs::write(&file, config).unwrap();
        command.arg("serve").args(arguments).arg("--config").arg(&file);
        for (name, value) in variables {
            // An empty REDIS_URL would mean the default.
            command.env(name, if value.is_empty() { "redis://127.0.0.1:1/0" } else { value });
        }
        let log = dir.join("log");
        let mut process = Process::start(command.stdout(Stdio::piped()).stderr(std::fs::File::create(&log).unwrap()), dir);
        let mut lines = BufReader::new(process.child.stdout.take().unwrap()).lines();
        let mut address = |prefix: &str| {
            let line = lines.next().expect("a line").unwrap();
            line.strip_prefix(prefix).unwrap_or_else(|| panic!("said {line:?}")).parse().unwrap()
        };
        let (address, admin) = (address("listening on http://"), address("admin on http://"));
        note_admin(admin);
        Self { process, address, admin, file, log }
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
        "OTLP_URL",
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
        "SLUICE_ADMIN_NAMES",
        "SLUICE_CACHE_KEY",
    ] {
        command.env_remove(name);
    }
    command
}

impl Drop for Sluice {
    fn drop(&mut self) {
        forget_admin(self.admin);
        if std::thread::panicking() {
            eprintln!("{}", self.logged());
        }
    }
}
