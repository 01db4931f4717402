//! The configuration: what `proxy.toml` may say ([`reader`], [`compile`]) and what the program uses ([`Config`]).
//!
//! Two phases. First the whole file is read and every problem is reported with its line and column; only a file
//! without errors becomes a [`Config`], in which everything is parsed, bounded and ready to use.

pub mod compile;
pub mod env;
pub mod reader;
pub mod route;
pub mod template;
pub mod units;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::uri::Authority;
use ipnet::IpNet;

use crate::cache::seal::SecretKey;
use crate::config::route::Route;
use reader::Problem;

/// Everything that the program was told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients are served.
    pub listen: SocketAddr,
    /// How clients reach this listener, if they were told.
    pub public_url: Option<PublicUrl>,
    /// Bounds on what clients may take.
    pub limits: Limits,
    /// The admin listener.
    pub admin: Admin,
    /// Logging.
    pub log: Log,
    /// What answers.
    pub backend: Backend,
    /// What is kept, and where.
    pub cache: Cache,
    /// The rules, in the order in which they are tried.
    pub routes: Vec<Route>,
    /// Targets that `sluice warm` asks for.
    pub warm: Vec<String>,
}

/// `public_url`, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicUrl {
    /// `http` or `https`.
    pub scheme: String,
    /// Host and port.
    pub authority: Authority,
}

/// `[limits]`: bounds on what clients may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Whose word about clients is believed (`trusted_proxies`), and whose connections are not counted by address.
    pub trusted_proxies: Vec<IpNet>,
    /// Open client connections.
    pub connections: usize,
    /// Open connections of one address.
    pub connections_per_address: usize,
    /// Bytes of a request's head.
    pub header_bytes: usize,
    /// From the first byte of a request to the end of its head.
    pub header_timeout: Duration,
    /// How long a connection may stay open without a request.
    pub idle_timeout: Duration,
    /// How long a client may take no bytes, or send none of a body it announced.
    pub stall_timeout: Duration,
    /// Bytes a second that a client must take, or send of a body, while it is waited for.
    pub min_rate: u64,
    /// How long open requests get to finish when the program is told to stop.
    pub drain_timeout: Duration,
    /// Requests that may wait for one fetch.
    pub waiters: usize,
    /// How long they wait before they go by themselves.
    pub wait_timeout: Duration,
}

impl Limits {
    /// Whether the other end of a connection is a proxy of the operator's.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies.iter().any(|net| net.contains(&peer))
    }
}

/// `[admin]`.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Where the admin listener is.
    pub listen: SocketAddr,
    /// What management needs; `None`: management is refused.
    pub token: Option<Secret>,
}

/// Text that never shows in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// `[log]`.
#[derive(Clone, Copy, Debug)]
pub struct Log {
    /// One JSON object a line instead of text.
    pub json: bool,
    /// The least severe level that is written.
    pub level: tracing::Level,
    /// Which requests get an access line.
    pub access: Access,
}

/// Which requests get an access line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Every one.
    All,
    /// Those that failed, were refused, or were served stale for a failure.
    Errors,
    /// None.
    Off,
}

/// `[backend]`, with the section of its kind.
#[derive(Clone, Debug)]
pub struct Backend {
    /// What answers.
    pub kind: BackendKind,
    /// HEAD is answered from GET; otherwise it is forwarded.
    pub head_as_get: bool,
    /// To the response's head.
    pub timeout: Duration,
    /// The longest silence within a body that is passed through.
    pub body_timeout: Duration,
    /// Requests on their way to the backend at one time; more wait for at most `timeout`.
    pub max_in_flight: usize,
}

impl Backend {
    /// Whether the API is answered here.
    #[must_use]
    pub const fn is_native(&self) -> bool {
        !matches!(self.kind, BackendKind::Http { .. })
    }
}

/// What answers.
#[derive(Clone, Debug)]
pub enum BackendKind {
    /// An existing API over HTTP.
    Http {
        /// Its authority.
        authority: Authority,
        /// The `Host` that it is sent.
        host: Authority,
        /// How long a connection may take to be made.
        connect_timeout: Duration,
    },
    /// Orders in a database, answered by the native API.
    Mysql(Mysql),
    /// Orders held in memory, answered by the native API.
    Sample {
        /// A CSV file in the schema's column order; `None`: orders that the program makes up.
        orders: Option<PathBuf>,
        /// How long a query pretends to take.
        delay: Duration,
    },
}

/// `[mysql]`.
#[derive(Clone, Debug)]
pub struct Mysql {
    /// Where the server is.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Who asks.
    pub user: String,
    /// The password; may be empty.
    pub password: Secret,
    /// The database.
    pub database: String,
    /// The table of orders, perhaps with its database before a dot.
    pub table: String,
    /// Whether the connection is encrypted.
    pub tls: Tls,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// Connections that are kept open.
    pub pool_min: usize,
    /// Connections at most, which is also how many questions are asked at one time.
    pub pool_max: usize,
    /// Questions that may wait for one.
    pub queue: usize,
    /// How long they wait.
    pub queue_timeout: Duration,
    /// For a question.
    pub query_timeout: Duration,
    /// For a page, and for each silence of a stream.
    pub long_query_timeout: Duration,
    /// For a stream as a whole.
    pub stream_timeout: Duration,
}

/// Whether the connection to the database is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// It is not.
    Off,
    /// It is, with whoever answers.
    Require,
    /// It is, with a server whose certificate is valid for its name.
    Verify {
        /// A file of PEM certificates to trust; `None`: the public authorities.
        ca: Option<PathBuf>,
    },
}

/// `[cache]`.
#[derive(Clone, Debug)]
pub struct Cache {
    /// Bytes of the in-process tier; zero turns it off.
    pub memory: u64,
    /// The shared tier, if there is one.
    pub redis: Option<RedisUrl>,
    /// Every key in Redis begins with it.
    pub namespace: String,
    /// Larger bodies stream through.
    pub max_object: usize,
    /// Bodies from this size on are kept compressed.
    pub compress_above: usize,
    /// How long a read from Redis may take.
    pub redis_timeout: Duration,
    /// The key with which entries in Redis are sealed, and the one before it, which still opens them.
    pub encryption: Option<(SecretKey, Option<SecretKey>)>,
}

/// Where Redis is. Its debug form hides the password.
#[derive(Clone)]
pub struct RedisUrl {
    /// What the client connects with.
    pub info: redis::ConnectionInfo,
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.info.addr())
    }
}

/// What became of reading a configuration.
#[derive(Debug)]
pub struct Checked {
    /// The configuration, unless there were errors.
    pub config: Option<Config>,
    /// Errors and warnings as `file:line:column: message`, in the order of the file.
    pub report: Vec<String>,
}

/// Reads and checks a configuration file with this process's environment.
///
/// # Errors
/// The file cannot be read.
pub fn load(path: &Path) -> std::io::Result<Checked> {
    let source = std::fs::read_to_string(path)?;
    Ok(check(&path.display().to_string(), &source, &|name| std::env::var(name).ok()))
}

/// Checks the text of a configuration file, reporting problems under the name `file`.
#[must_use]
pub fn check(file: &str, source: &str, lookup: env::Lookup<'_>) -> Checked {
    let (config, problems) = compile::compile(source, lookup);
    let failed = problems.iter().any(|problem| problem.error);
    let report = problems.iter().map(|problem| show(file, source, problem)).collect();
    Checked { config: config.filter(|_| !failed), report }
}

/// `file:line:column: message`, both counted from one, columns in characters.
fn show(file: &str, source: &str, problem: &Problem) -> String {
    let before = source.get(..problem.at).unwrap_or(source);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |text| text.chars().count()) + 1;
    let kind = if problem.error { "" } else { "warning: " };
    format!("{file}:{line}:{column}: {kind}{}", problem.message)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const BACKEND: &str = "[backend]\nurl='http://127.0.0.1:1'\n";

    /// The routes of a valid configuration whose `[[route]]` part is `text`.
    pub fn routes(text: &str) -> Vec<Route> {
        let checked = check("t", &format!("{BACKEND}{text}"), &|_| None);
        checked.config.unwrap_or_else(|| panic!("{:#?}", checked.report)).routes
    }

    fn report(text: &str) -> Vec<String> {
        check("proxy.toml", text, &|name| (name == "SET").then(|| "7".to_owned())).report
    }

    #[test]
    fn all_problems_are_reported_together_with_their_places() {
        let text = "lissten = '127.0.0.1:1'\n[backend]\nurl = 'http://127.0.0.1:1'\ntimeout = 'soon'\n[[route]]\nname = 'a'\npath = 'api'\ntll = '5m'\nttl = '${NOPE}'\n";
        let report = report(text);
        let starts = [
            "proxy.toml:1:1: unknown key 'lissten' in the top level; did you mean 'listen'?",
            "proxy.toml:4:11: timeout: 'soon' is not a duration",
            "proxy.toml:7:8: path: 'api' must begin with '/'",
            "proxy.toml:8:1: unknown key 'tll' in [[route]]; did you mean 'ttl'?",
            "proxy.toml:9:7: ttl: the environment variable NOPE is not set",
        ];
        assert_eq!(report.len(), starts.len(), "{report:#?}");
        for (line, start) in report.iter().zip(starts) {
            assert!(line.starts_with(start), "{line}");
        }
    }

    #[test]
    fn syntax_errors_have_places_too() {
        let report = report("[backend]\nurl = \n");
        assert!(report[0].starts_with("proxy.toml:2:"), "{report:?}");
    }

    #[test]
    fn references_may_stand_for_numbers() {
        let checked = check("t", &format!("{BACKEND}[limits]\nconnections = '${{SET}}'\n"), &|_| Some("7".into()));
        assert_eq!(checked.config.unwrap().limits.connections, 7);
    }

    #[test]
    fn rules_that_can_never_match_are_warned_about() {
        let report = report(&format!(
            "{BACKEND}[[route]]\nname='all'\npath='/api/*'\n[[route]]\nname='late'\npath='/api/x'\n[[route]]\nname='odd'\npath='/y'\nwith=['a']\nwithout=['a']\n"
        ));
        assert!(report[0].contains("'late' can never match: 'all'"), "{report:?}");
        assert!(report[1].contains("'odd' can never match"), "{report:?}");
        assert!(report.iter().all(|line| line.contains("warning: ")));
    }

    #[test]
    fn native_mode_says_what_it_lacks() {
        for (lines, expected) in [
            ("", "user: missing"),
            ("user='u'", "database: missing"),
            ("user='u'\ndatabase='d'\npool_min=9\npool_max=3", "pool_min: more than pool_max"),
            ("user='u'\ndatabase='d'\ntls='on'", "tls: expected \"off\", \"require\" or \"verify\""),
            ("user='u'\ndatabase='d'\ntls='verify'\ntls_ca='/no/such/file'", "tls_ca: there is no file"),
            ("user='u'\ndatabase='d'\ntable='a`b'", "is not the name of a table"),
            ("user='u'\ndatabase='d'\ntable='a.b.c'", "is not the name of a table"),
            ("user='u'\ndatabase='d'\npasword='p'", "did you mean 'password'?"),
        ] {
            let report = report(&format!("[backend]\nkind='mysql'\n[mysql]\n{lines}\n"));
            assert!(report.iter().any(|line| line.contains(expected)), "{lines}: {report:?}");
        }
        let text = "[backend]\nkind='mysql'\n[mysql]\nuser='u'\ndatabase='d'\npassword='hush'\n";
        let config = check("t", text, &|_| None).config.unwrap();
        assert!(config.backend.is_native() && !format!("{config:?}").contains("hush"));
    }

    #[test]
    fn secrets_do_not_show() {
        let text =
            format!("{BACKEND}[admin]\ntoken='hush'\n[cache]\nredis='redis://:hush@127.0.0.1:1/0'\nencryption_key='{}'\n", "ab".repeat(32));
        let config = check("t", &text, &|_| None).config.unwrap();
        let shown = format!("{config:?}");
        assert!(!shown.contains("hush") && !shown.contains("abab") && !shown.contains("171, 171"), "{shown}");
        let wrong = report(&format!("{BACKEND}[cache]\nencryption_key='hush'\nencryption_key_previous='{}'\n", "ab".repeat(32)));
        assert!(wrong.iter().any(|line| line.contains("expected 64 hexadecimal digits")) && !wrong.concat().contains("hush"), "{wrong:?}");
    }

    #[test]
    fn the_shipped_file_is_valid_and_without_warnings() {
        let checked = check("proxy.toml", include_str!("../../proxy.toml"), &|_| None);
        assert_eq!(checked.report, Vec::<String>::new());
        assert!(checked.config.is_some());
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_check_fail(text in "[\\[\\]a-z='\"\n#{}$,.0-9 ]{0,80}") {
            let _ = report(&text);
        }
    }
}
