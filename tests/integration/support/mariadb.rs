//! A private MariaDB with the contract's orders in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, OptsBuilder};

use super::process::{Process, scratch};
use super::recorded::recorded_dir;
use super::sluice::{Sluice, TOKEN};
use super::until;

pub const USER: &str = "sluice";
pub const PASSWORD: &str = "correct-horse-battery";

const OPTIONS: [&str; 10] = [
    "--no-defaults",
    "--innodb-log-file-size=8M",
    "--innodb-buffer-pool-size=48M",
    "--innodb-flush-log-at-trx-commit=0",
    "--performance-schema=off",
    "--character-set-server=utf8mb4",
    "--local-infile=1",
    "--bind-address=127.0.0.1",
    "--skip-log-bin",
    "--max-connections=100",
];

const SHIPPED: &str = include_str!("../../../proxy.toml");

/// An empty server's data, made once and copied for each server.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let dir = scratch();
        let mut command = Command::new("mariadb-install-db");
        command.args(&OPTIONS[..2]).arg(format!("--datadir={}", dir.display()));
        command.args(["--auth-root-authentication-method=normal", "--skip-test-db"]).args(as_root());
        let output = command.stdout(Stdio::null()).stderr(Stdio::piped()).output().expect("mariadb-install-db can be run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        dir
    })
}

/// The server does not run as root unless it is told to.
fn as_root() -> Option<&'static str> {
    let own = std::fs::metadata("/proc/self").map(|own| std::os::unix::fs::MetadataExt::uid(&own));
    (own.ok() == Some(0)).then_some("--user=root")
}

/// A private MariaDB.
pub struct MariaDb {
    pub process: Option<Process>,
    pub port: u16,
    dir: PathBuf,
    extra: Vec<String>,
}

impl MariaDb {
    /// A server without tables.
    pub async fn empty(extra: &[&str]) -> Self {
        let template = tokio::task::spawn_blocking(template).await.unwrap();
        let dir = scratch().join("data");
        let copied = Command::new("cp").arg("-r").arg(template).arg(&dir).status().unwrap();
        assert!(copied.success());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Self { process: None, port, dir, extra: extra.iter().map(|&text| text.to_owned()).collect() };
        server.start().await;
        server
            .run(&format!(
                "CREATE DATABASE api; CREATE USER '{USER}'@'%' IDENTIFIED BY '{PASSWORD}'; GRANT SELECT ON api.* TO '{USER}'@'%'"
            ))
            .await;
        server
    }

    /// A server with the contract's table and orders, and no index.
    pub async fn filled() -> Self {
        let server = Self::empty(&[]).await;
        server.load().await;
        server
    }

    /// Replaces the table with the contract's.
    pub async fn load(&self) {
        let contract = recorded_dir();
        self.run("DROP TABLE IF EXISTS api.binance_liqs").await;
        self.feed(&contract.join("schema.sql"));
        self.load_file(&contract.join("orders.csv"));
    }

    /// Adds the orders of a CSV file.
    pub fn load_file(&self, orders: &Path) {
        let statement = format!("LOAD DATA LOCAL INFILE '{}' INTO TABLE binance_liqs FIELDS TERMINATED BY ','", orders.display());
        self.client(&["api", "-e", &statement], None);
    }

    /// Creates what deploy/mysql/indexes.sql creates.
    pub fn index(&self) -> String {
        self.feed(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy/mysql/indexes.sql"))
    }

    /// Runs a file of statements, as an operator does.
    pub fn feed(&self, file: &Path) -> String {
        self.client(&["api"], Some(file))
    }

    fn client(&self, arguments: &[&str], input: Option<&Path>) -> String {
        let mut command = Command::new("mariadb");
        command.args(["--no-defaults", "--local-infile=1", "-uroot", "--socket"]).arg(self.socket()).args(arguments);
        command.stdin(input.map_or_else(Stdio::null, |file| std::fs::File::open(file).unwrap().into()));
        let output = command.output().expect("the mariadb client can be run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("s")
    }

    /// Starts the server where it was, and waits until it answers.
    pub async fn start(&mut self) {
        let mut command = Command::new("mariadbd");
        command.args(OPTIONS).args(&self.extra).args(as_root());
        command.arg(format!("--datadir={}", self.dir.display())).arg(format!("--socket={}", self.socket().display()));
        command.arg(format!("--port={}", self.port)).stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(Process::start(&mut command, scratch()));
        until("MariaDB answers", || async { self.open().await.is_some() }).await;
    }

    /// Ends the server at once, as a crash would.
    pub fn kill(&mut self) {
        self.process = None;
    }

    pub fn signal(&self, signal: &str) {
        self.process.as_ref().unwrap().signal(signal);
    }

    async fn open(&self) -> Option<Conn> {
        let opts = OptsBuilder::default().user(Some("root")).socket(Some(self.socket().to_str().unwrap()));
        Conn::new(opts).await.ok()
    }

    /// An administrator's connection.
    pub async fn admin(&self) -> Conn {
        self.open().await.expect("a connection")
    }

    /// Runs statements as the administrator.
    pub async fn run(&self, statements: &str) {
        let mut conn = self.admin().await;
        for statement in statements.split("; ") {
            conn.query_drop(statement).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
        }
    }

    /// What Sluice's connections are doing: their statements, `None` for those that are idle.
    pub async fn doing(&self) -> Vec<Option<String>> {
        let query = format!("SELECT IF(command = 'Sleep', NULL, info) FROM information_schema.processlist WHERE user = '{USER}'");
        self.admin().await.query(query).await.unwrap()
    }

    /// The ids of Sluice's connections that run a statement.
    pub async fn running(&self) -> Vec<u64> {
        let query =
            format!("SELECT id FROM information_schema.processlist WHERE user = '{USER}' AND command <> 'Sleep' AND info IS NOT NULL");
        self.admin().await.query(query).await.unwrap()
    }

    /// The environment that the legacy service has.
    pub fn variables(&self) -> [(&'static str, String); 7] {
        [
            ("BACKEND_KIND", "mysql".to_owned()),
            ("DB_HOST", "127.0.0.1".to_owned()),
            ("DB_PORT", self.port.to_string()),
            ("DB_USER", USER.to_owned()),
            ("DB_PASSWORD", PASSWORD.to_owned()),
            ("DB_DATABASE", "api".to_owned()),
            ("SLUICE_ADMIN_TOKEN", TOKEN.to_owned()),
        ]
    }

    /// Sluice over this database, with the shipped configuration and these changes to its text.
    pub fn sluice(&self, changes: &[(&str, &str)]) -> Sluice {
        self.sluice_with(changes, &[])
    }

    pub fn sluice_with(&self, changes: &[(&str, &str)], more: &[(&str, &str)]) -> Sluice {
        self.configured(SHIPPED, changes, more)
    }

    /// The same without rules, so that nothing is kept and each request is a question.
    pub fn uncached(&self, changes: &[(&str, &str)], more: &[(&str, &str)]) -> Sluice {
        self.configured(SHIPPED.split("# Rules.").next().unwrap(), changes, more)
    }

    fn configured(&self, text: &str, changes: &[(&str, &str)], more: &[(&str, &str)]) -> Sluice {
        let mut text = text.to_owned();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        let own = self.variables();
        let variables: Vec<(&str, &str)> =
            own.iter().map(|(name, value)| (*name, value.as_str())).chain([("REDIS_URL", "")]).chain(more.iter().copied()).collect();
        Sluice::with(&text, &variables)
    }
}
