//! What `deploy/` ships for those who deploy: files that other programs read are read here as those would read them, as far as that
//! is possible without a container engine, and the guide's example of a configuration of nginx does what it is said to become.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

use crate::support::backend::{Asked, Backend, Step, ok, reply};
use crate::support::client::{Answer, get};
use crate::support::process::{Process, scratch};
use crate::support::sluice::{Sluice, program};
use crate::support::until;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(deploy().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn yaml(name: &str) -> Yaml {
    let mut documents = YamlLoader::load_from_str(&read(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(documents.len(), 1, "{name}");
    documents.remove(0)
}

/// The texts of a list, or the keys of a table.
fn texts(value: &Yaml) -> Vec<String> {
    let text = |value: &Yaml| value.as_str().unwrap_or_else(|| panic!("{value:?}")).to_owned();
    match value {
        Yaml::Array(list) => list.iter().map(text).collect(),
        Yaml::Hash(table) => table.keys().map(text).collect(),
        Yaml::BadValue => Vec::new(),
        other => panic!("{other:?}"),
    }
}

/// The environment variables that the shipped configuration reads.
fn variables() -> BTreeSet<String> {
    let text = include_str!("../../proxy.toml");
    text.split("${").skip(1).map(|rest| rest.split([':', '}']).next().unwrap().to_owned()).collect()
}

/// Has the program check a command line: with `--help` behind it, it does nothing else.
fn accepts(arguments: &[&str]) {
    let shown = program().args(arguments).arg("--help").output().unwrap();
    assert!(shown.status.success(), "sluice {arguments:?}: {}", String::from_utf8_lossy(&shown.stderr));
}

fn lint(tool: &str, arguments: &[&str]) {
    let checked = Command::new(tool).args(arguments).output().unwrap_or_else(|error| panic!("{tool} cannot be started: {error}"));
    let said = format!("{}{}", String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    assert!(checked.status.success(), "{tool} {arguments:?}:\n{said}");
}

#[test]
fn the_compose_file_names_what_exists() {
    let file = yaml("docker/compose.yml");
    let services = texts(&file["services"]);
    assert_eq!(services, ["sluice", "redis", "mariadb", "prometheus", "grafana"]);
    for name in &services {
        let service = &file["services"][name.as_str()];
        assert!(
            service["image"].as_str().is_some_and(|image| image.contains(':')) != service["build"].is_hash(),
            "{name}: an image of one version, or built"
        );
        for needed in texts(&service["depends_on"]) {
            assert!(services.contains(&needed), "{name} depends on {needed}");
        }
        for volume in texts(&service["volumes"]) {
            let from = volume.split(':').next().unwrap();
            let exists = if from.starts_with('.') {
                deploy().join("docker").join(from).is_file()
            } else {
                texts(&file["volumes"]).contains(&from.to_owned())
            };
            assert!(exists, "{name}: {volume}");
        }
        for port in texts(&service["ports"]) {
            assert!(port.starts_with("127.0.0.1:"), "{name}: {port} is open to the world");
        }
    }
    let sluice = &file["services"]["sluice"];
    for name in texts(&sluice["environment"]) {
        assert!(variables().contains(&name), "proxy.toml does not read {name}");
    }
    let build = deploy().join("docker").join(sluice["build"]["context"].as_str().unwrap());
    assert!(build.join(sluice["build"]["dockerfile"].as_str().unwrap()).is_file() && build.join("Cargo.toml").is_file());
}

#[test]
fn prometheus_and_grafana_are_told_of_what_exists() {
    let prometheus = yaml("docker/prometheus.yml");
    assert_eq!(prometheus["scrape_configs"][0]["static_configs"][0]["targets"][0].as_str(), Some("sluice:9090"));
    let mounted = texts(&yaml("docker/compose.yml")["services"]["prometheus"]["volumes"]).concat();
    for rules in texts(&prometheus["rule_files"]) {
        assert!(mounted.contains(&format!("/etc/prometheus/{rules}")), "{rules}");
    }
    assert_eq!(yaml("docker/grafana.yml")["datasources"][0]["url"].as_str(), Some("http://prometheus:9090"));
    let folder = yaml("docker/dashboards.yml")["providers"][0]["options"]["path"].as_str().unwrap().to_owned();
    let mounted = texts(&yaml("docker/compose.yml")["services"]["grafana"]["volumes"]).concat();
    assert!(mounted.contains(&format!("dashboard.json:{folder}/")), "{folder}");
    yaml("grafana/alerts.yml");
}

#[test]
fn the_image_is_built_from_what_exists_and_runs_what_the_program_understands() {
    let text = read("docker/Dockerfile");
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.trim_start().starts_with('#')).collect();
    let text = lines.join("\n").replace("\\\n", " ");
    let lines: Vec<&str> = text.lines().collect();
    let of = |name: &str| lines.iter().filter_map(|line| line.strip_prefix(name)).map(str::trim).collect::<Vec<_>>();
    let known = ["FROM", "WORKDIR", "COPY", "RUN", "ENV", "EXPOSE", "USER", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"];
    for line in &lines {
        assert!(known.contains(&line.split(' ').next().unwrap()), "{line}");
    }
    // The last stage has nothing but what is copied, and is not root.
    assert_eq!(of("FROM ").last(), Some(&"scratch"));
    assert!(of("USER ")[0].split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id > 0)));
    let toolchain = of("FROM ")[0].split([':', '-']).nth(1).unwrap();
    assert!(include_str!("../../Cargo.toml").contains(&format!("rust-version = \"{toolchain}\"")), "{toolchain}");
    for pair in of("ENV ")[0].split(' ') {
        let name = pair.split('=').next().unwrap();
        assert!(variables().contains(name), "proxy.toml does not read {name}");
    }
    let words = |json: &str| -> Vec<String> { serde_json::from_str(json).unwrap_or_else(|error| panic!("{json}: {error}")) };
    assert_eq!(words(of("ENTRYPOINT ")[0]), ["/sluice"]);
    let health = of("HEALTHCHECK ")[0].split_once("CMD ").unwrap().1;
    for command in [words(of("CMD ")[0]), words(health).split_off(1)] {
        accepts(&command.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

#[test]
fn dokku_is_told_what_the_program_understands() {
    for line in read("dokku/Procfile").lines() {
        let (kind, command) = line.split_once(": ").unwrap();
        assert_eq!(kind, "web");
        accepts(&command.split(' ').collect::<Vec<_>>());
    }
    let app: Value = serde_json::from_str(&read("dokku/app.json")).unwrap();
    let check = &app["healthchecks"]["web"][0];
    assert_eq!((check["path"].as_str(), check["port"].as_u64()), (Some("/livez"), Some(9090)));
}

#[test]
fn systemd_takes_the_units_and_finds_little_to_close() {
    let dir = scratch();
    for name in ["sluice.service", "sluice.socket"] {
        let unit = read(name).replace("/usr/local/bin/sluice", env!("CARGO_BIN_EXE_sluice"));
        std::fs::write(dir.join(name), unit).unwrap();
    }
    let (service, socket) = (dir.join("sluice.service"), dir.join("sluice.socket"));
    let (service, socket) = (service.to_str().unwrap(), socket.to_str().unwrap());
    lint("systemd-analyze", &["verify", "--man=no", service, socket]);
    // Tenths of the exposure that it computes, from 0 to 100.
    lint("systemd-analyze", &["security", "--offline=true", "--threshold=15", service]);
    let command =
        read("sluice.service").lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/sluice ").map(str::to_owned)).unwrap();
    accepts(&command.split(' ').collect::<Vec<_>>());
}

#[test]
fn scripts_and_what_the_package_names_are_in_order() {
    lint("shellcheck", &[deploy().join("debian/build").to_str().unwrap()]);
    let assets = include_str!("../../Cargo.toml").split("\nassets = [\n").nth(1).unwrap().split("\n]").next().unwrap();
    let assets = assets.lines().map(|line| serde_json::from_str::<[String; 3]>(line.trim().trim_end_matches(',')).unwrap());
    for [from, to, mode] in assets {
        assert!(!to.starts_with('/') && mode.len() == 3, "{to} {mode}");
        // What is built for it stands below target/.
        let folder = Path::new(&from).parent().unwrap();
        assert!(from.starts_with("target/") || Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).is_dir(), "{from}");
    }
    accepts(&["man"]);
    accepts(&["completions"]);
}

/// What the guide has between its fences of this language.
fn example(language: &str) -> String {
    let guide = read("MIGRATING.md");
    let begin = guide.split(&format!("```{language}\n")).nth(1).unwrap_or_else(|| panic!("no example in {language}"));
    begin.split("```").next().unwrap().to_owned()
}

/// What a backend says.
type Script = Box<dyn Fn(&Asked) -> Vec<Step> + Send + Sync>;

/// nginx and Sluice, each over a backend of its own that says the same.
struct Pair {
    nginx: (Backend, u16, Process),
    sluice: (Backend, Sluice),
}

impl Pair {
    async fn start(script: impl Fn() -> Script) -> Self {
        let (one, other) = (Backend::start(script()).await, Backend::start(script()).await);
        let over = |text: String, backend: &Backend| {
            assert!(text.contains("http://127.0.0.1:8000"));
            text.replace("http://127.0.0.1:8000", &format!("http://{}", backend.address))
        };
        let dir = scratch();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = over(example("nginx"), &one).replace("5m;", "1s;").replace("127.0.0.1:8080", &format!("127.0.0.1:{port}"));
        let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path {kind};\n")).concat();
        let text = format!(
            "daemon off;\nmaster_process off;\npid pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}{server}\n}}\n"
        );
        std::fs::write(dir.join("nginx.conf"), text).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-p").arg(&dir).args(["-c", "nginx.conf"]).stderr(Stdio::null());
        let nginx = Process::start(&mut command, dir);
        until("nginx listens", || async { tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
        // Nothing is to be refreshed before it is stale: the backend's requests are counted.
        let text = over(example("toml"), &other).replace("\"5m\"", "\"1s\"") + "\n[cache]\nrefresh_early = false\n";
        let sluice = Sluice::with(&text, &[]);
        Self { nginx: (one, port, nginx), sluice: (other, sluice) }
    }

    async fn ask(&self, target: &str) -> (Answer, Answer) {
        (get(([127, 0, 0, 1], self.nginx.1).into(), target, &[]).await, self.sluice.1.get(target).await)
    }

    /// Asks both, which have to answer alike and to have asked their backends as often.
    async fn same(&self, target: &str, status: u16, asked: usize) {
        let (nginx, sluice) = self.ask(target).await;
        assert_eq!((nginx.status, sluice.status), (status, status), "{target}");
        if status == 200 {
            assert_eq!(nginx.body, sluice.body, "{target}");
        }
        let path = target.split('?').next().unwrap();
        let count =
            |backend: &Backend| backend.asked.lock().unwrap().iter().filter(|asked| asked.target.split('?').next() == Some(path)).count();
        assert_eq!((count(&self.nginx.0), count(&self.sluice.0)), (asked, asked), "{target}");
    }
}

#[tokio::test]
async fn the_guides_example_does_what_nginx_does() {
    let fails = Arc::new(AtomicBool::new(false));
    let script = || -> Script {
        let fails = Arc::clone(&fails);
        Box::new(move |asked| match asked.target.as_str() {
            _ if fails.load(Ordering::Relaxed) => reply("503 Service Unavailable", "", b"down"),
            target if target.contains("NONE") => reply("404 Not Found", "", b"none"),
            target if target.starts_with("/api/liquidations") => {
                ok("Cache-Control: max-age=0\r\n", target.split('&').next().unwrap().as_bytes())
            }
            _ => ok("", b"[]"),
        })
    };
    let both = Pair::start(script).await;
    // Kept, and by path alone.
    both.same("/api/symbols", 200, 1).await;
    both.same("/api/symbols", 200, 1).await;
    both.same("/api/symbols?cachebuster=7", 200, 1).await;
    // By some parameters, whatever the backend says of keeping; and its 404s.
    both.same("/api/liquidations?symbol=NONE&timeframe=1h", 404, 1).await;
    both.same("/api/liquidations?symbol=NONE&timeframe=1h", 404, 1).await;
    both.same("/api/liquidations?symbol=A&timeframe=1h", 200, 2).await;
    both.same("/api/liquidations?symbol=A&timeframe=1h&x=1", 200, 2).await;
    both.same("/api/liquidations?symbol=B&timeframe=1h", 200, 3).await;
    // Not at all.
    both.same("/other", 200, 1).await;
    both.same("/other", 200, 2).await;
    // So many at once.
    for asked in 1..=3 {
        both.same("/api/liquidation-orders?symbol=A", 200, asked).await;
    }
    let (nginx, sluice) = both.ask("/api/liquidation-orders?symbol=A").await;
    assert_eq!((nginx.status, sluice.status), (429, 429));
    // Stale while the backend fails.
    fails.store(true, Ordering::Relaxed);
    until("both serve what went stale", || async {
        let (nginx, sluice) = both.ask("/api/liquidations?symbol=A&timeframe=1h").await;
        assert_eq!((nginx.status, sluice.status, &nginx.body), (200, 200, &sluice.body));
        nginx.field("x-cache") == Some("STALE") && sluice.cache_status().contains("stale-if-error")
    })
    .await;
}
