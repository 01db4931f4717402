//! The configuration: what `proxy.toml` may say ([`reader`], [`compile`]) and what the program uses ([`Config`], [`route`]).
//!
//! Two phases. First the whole file is read and every problem is reported with its line and column; only a file without
//! errors becomes a [`Config`], in which everything is parsed, bounded and ready to use.
//!
//! Knows targets and freshness lifetimes, which rules are about. Knows nothing of what carries rules out.

pub mod compile;
pub mod compile_route;
pub mod compile_timeline;
pub mod env;
pub mod own;
pub mod rate_limit;
pub mod reader;
pub mod route;
pub mod secret;
pub mod settings;
pub mod template;
pub mod tokens;
pub mod units;
pub mod warm;

use std::path::Path;

pub use settings::{Access, Admin, Backend, BackendKind, CacheSettings, Config, Limits, Log, Mysql, RedisUrl, Telemetry, Timeline, Tls};

use reader::Problem;

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
    use crate::config::own::OwnPaths;
    use crate::config::route::Route;

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
    fn every_misspelt_key_gets_the_nearest_one_named() {
        let route = "name='r'\npath='/'\n";
        for (section, other_keys, keys) in [
            (
                "",
                "",
                "listen public_url trusted_proxies limits admin log telemetry backend own sample mysql cache timeline route warm limit",
            ),
            ("[admin]", "", "listen hosts token tokens watch"),
            ("[[admin.tokens]]", "", "name token may"),
            ("[log]", "", "format level access slow redact"),
            ("[telemetry]", "", "otlp sample"),
            (
                "[backend]",
                "",
                "kind url host connect_timeout timeout body_timeout head max_in_flight max_uploads max_downloads max_streams queue queue_timeout upload_buffer upload_memory forward_invalidation",
            ),
            ("[own]", "", "endpoints"),
            ("[sample]", "", "orders delay"),
            (
                "[mysql]",
                "",
                "host port user password database table tls tls_ca pool_min pool_max queue queue_timeout query_timeout \
                 long_query_timeout stream_timeout",
            ),
            (
                "[cache]",
                "",
                "memory redis redis_password redis_timeout namespace max_object compress_above refresh_early handover encryption_key \
                 encryption_key_previous",
            ),
            ("[timeline]", "", "enabled span settle refresh memory probation verify concurrency questions"),
            ("[warm]", "", "targets templates symbols symbols_from timeframes at_start concurrency hottest"),
            (
                "[limits]",
                "",
                "connections connections_per_address header_bytes header_timeout idle_timeout stall_timeout min_rate drain_timeout \
                 waiters wait_timeout",
            ),
            ("[[limit]]", "name='l'\nrate='1/s'\n", "routes by header burst count shared report_only"),
            ("[[limit]]", "", "name rate"),
            (
                "[[route]]",
                route,
                "methods with without ttl negative_ttl stale_while_revalidate stale_if_error origin_headers heuristic set_cookie \
                 authorization language parts client_directives request_headers query fold_case key tags history cache rollout shadow timeline limit",
            ),
        ] {
            for key in keys.split_whitespace() {
                let doubled = format!("{key}{}", &key[key.len() - 1..]);
                let line = format!("{doubled} = 'x'");
                let text = if section.is_empty() { format!("{line}\n{BACKEND}") } else { format!("{section}\n{other_keys}{line}\n") };
                let report = report(&text);
                let expected = format!("unknown key '{doubled}' in ");
                let told = report.iter().find(|line| line.contains(&expected)).unwrap_or_else(|| panic!("{doubled}: {report:?}"));
                assert!(told.ends_with(&format!("; did you mean '{key}'?")), "{told}");
            }
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
    fn a_rule_for_what_sluice_answers_itself_is_warned_about() {
        let rules = "[[route]]\nname='h'\npath='/health'\n[[route]]\nname='below'\npath='/health/*'\n[[route]]\nname='d'\npath='/docs'\n";
        for (text, own, warned) in [
            (format!("{BACKEND}{rules}"), OwnPaths::None, &[][..]),
            (
                format!("{BACKEND}[[route]]\nname='t'\npath='/api/liquidations'\nfold_case=['symbol']\ntimeline=true\n"),
                OwnPaths::None,
                &["t:1:1: warning: [own] is left out"],
            ),
            (
                format!(
                    "own.endpoints=false\n{BACKEND}[[route]]\nname='t'\npath='/api/liquidations'\nfold_case=['symbol']\ntimeline=true\n"
                ),
                OwnPaths::None,
                &[],
            ),
            (format!("own.endpoints=false\n{BACKEND}{rules}"), OwnPaths::None, &[]),
            (
                format!("own.endpoints=true\n{BACKEND}{rules}"),
                OwnPaths::Management,
                &["t:4:1: warning: 'h' can never match: Sluice answers /health itself"],
            ),
            (format!("[backend]\nkind='sample'\n{rules}"), OwnPaths::Whole, &["t:3:1: warning: 'h' can", "t:9:1: warning: 'd' can"]),
            (format!("own.endpoints=false\n[backend]\nkind='sample'\n{rules}"), OwnPaths::None, &[]),
        ] {
            let checked = check("t", &text, &|_| None);
            assert_eq!(checked.config.map(|config| config.own_paths()), Some(own), "{text}");
            assert_eq!(checked.report.len(), warned.len(), "{text}: {:?}", checked.report);
            assert!(checked.report.iter().zip(warned).all(|(line, start)| line.starts_with(start)), "{:?}", checked.report);
        }
    }

    #[test]
    fn secrets_do_not_show() {
        let text =
            format!("{BACKEND}[admin]\ntoken='hush'\n[cache]\nredis='redis://:hush@127.0.0.1:1/0'\nencryption_key='{}'\n", "ab".repeat(32));
        let config = check("t", &text, &|_| None).config.unwrap();
        let shown = format!("{config:?}");
        assert!(!shown.contains("hush") && !shown.contains("abab") && !shown.contains("171, 171"), "{shown}");
        for text in [
            "[backend]\nurl='http://me:hush@127.0.0.1:1'\n",
            "[backend]\nurl='me:hush@127.0.0.1'\n",
            "[backend]\nurl='http://127.0.0.1:1'\nhost='me:hush@h'\n",
            "public_url='https://me:hush@h'\n[backend]\nurl='http://127.0.0.1:1'\n",
            "[backend]\nurl='http://127.0.0.1:1'\n[telemetry]\notlp='http://me:hush@h:4318'\n",
            "[backend]\nurl='http://127.0.0.1:1'\n[cache]\nredis='redis//:hush@h'\n",
        ] {
            let told = report(text);
            assert!(!told.is_empty() && !told.concat().contains("hush"), "{told:?}");
        }
        let wrong = report(&format!("{BACKEND}[cache]\nencryption_key='hush'\nencryption_key_previous='{}'\n", "ab".repeat(32)));
        assert!(wrong.iter().any(|line| line.contains("expected 64 hexadecimal digits")) && !wrong.concat().contains("hush"), "{wrong:?}");
    }

    #[test]
    fn no_namespace_begins_like_another_one_does_before_its_end() {
        let of = |namespace: &str| check("t", &format!("{BACKEND}[cache]\nnamespace=\"{namespace}\"\n"), &|_| None);
        for fine in ["sluice", "app", "app-v2", "app_v2", "app.v2", "A", "7", &"x".repeat(64)] {
            assert_eq!(of(fine).config.map(|config| config.cache.namespace).as_deref(), Some(fine));
        }
        let refused = of("app:v2");
        let told = "t:4:11: namespace: 'app:v2' must not contain ':', at which a namespace ends";
        assert!(refused.config.is_none() && refused.report[0].starts_with(told), "{:?}", refused.report);
        assert!(refused.report[0].contains("Write \"app-v2\""), "{:?}", refused.report);
        for wrong in ["", ":", "a!b", "a#b", "a*", "a?", "a[b]", "a\\\\", "{a}", "a b", "a/b", "é", "a:b!c", &"x".repeat(65)] {
            let checked = of(wrong);
            assert!(checked.report[0].contains("namespace: "), "{wrong}: {:?}", checked.report);
            assert!(checked.config.is_none_or(|config| config.cache.namespace == "sluice"), "{wrong}");
        }
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
