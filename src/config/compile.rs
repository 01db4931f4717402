//! From the document to [`Config`]: every key with its default, bounds, unit and meaning in one place.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use http::uri::Authority;
use ipnet::IpNet;
use sha2::{Digest, Sha256};
use toml::de::DeTable;

use super::compile_route::route;
use super::compile_timeline::timeline;
use super::env::Lookup;
use super::own::Endpoint;
use super::rate_limit;
use super::reader::{Problem, Reader, Section};
use super::route::{PathPattern, Route};
use super::secret::{Secret, SecretKey};
use super::settings::{Access, Admin, Backend, BackendKind, CacheSettings, Config, Limits, Log, Mysql, RedisUrl, Telemetry, Tls};
use super::tokens::tokens;
use super::units::{duration, positive_duration, share, size};
use super::warm::warm;
use crate::http::conditional::hex;
use crate::request::client::PublicUrl;

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Reads a document. The configuration is usable only if no problem is an error.
#[must_use]
pub fn compile(source: &str, lookup: Lookup<'_>) -> (Option<Config>, Vec<Problem>) {
    let reader = Reader::new(lookup);
    let (document, errors) = DeTable::parse_recoverable(source);
    for error in &errors {
        reader.error(error.span().map_or(0, |span| span.start), error.message());
    }
    if !errors.is_empty() {
        // What the rest would mean is anyone's guess.
        return (None, reader.into_problems());
    }
    let config = top(Section::new(&reader, "the top level", Some(document.get_ref()), 0), &reader);
    let config = config.map(|config| Config { digest: digest(source), ..config });
    (config, reader.into_problems())
}

fn top(mut top: Section<'_, '_>, reader: &Reader<'_>) -> Option<Config> {
    let listen = top.parsed("listen", address).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8080)));
    let public_url = top.parsed("public_url", |text| if text.is_empty() { Ok(None) } else { public_url(text).map(Some) }).flatten();
    let trusted_proxies = networks(&mut top, "trusted_proxies");
    let limits = limits(top.table("limits", "[limits]"), trusted_proxies);
    let admin = admin(top.table("admin", "[admin]"));
    let log = log(top.table("log", "[log]"));
    let telemetry = telemetry(top.table("telemetry", "[telemetry]"));
    let mut sample = top.table("sample", "[sample]");
    let mut mysql = top.table("mysql", "[mysql]");
    let backend = backend(top.table("backend", "[backend]"), &mut sample, &mut mysql);
    sample.finish();
    mysql.finish();
    let mut own = top.table("own", "[own]");
    let own_endpoints = own.boolean("endpoints");
    own.finish();
    let cache = cache(top.table("cache", "[cache]"));
    let timeline = timeline(top.table("timeline", "[timeline]"));
    let sections = top.tables("route", "[[route]]");
    let limit_sections = top.tables("limit", "[[limit]]");
    let limit_places: Vec<usize> = limit_sections.iter().map(|section| section.place("routes")).collect();
    let warm = warm(top.table("warm", "[warm]"));
    top.finish();
    let mut rate_limits = rate_limit::limits(limit_sections);
    let mut routes: Vec<(Route, usize)> = Vec::new();
    for section in sections {
        let at = section.at;
        if let Some((route, limit)) = route(section, routes.len()) {
            if let Some((other, _)) = routes.iter().find(|(other, _)| other.name == route.name) {
                reader.error(at, format!("the name '{}' is used twice; metrics and keys need it to be unique", other.name));
            }
            if let Some(limit) = limit {
                if rate_limits.iter().any(|other| other.name == limit.name) {
                    reader.error(at, format!("its limit has the name '{}', and so has a [[limit]]", limit.name));
                }
                rate_limits.push(limit);
            }
            routes.push((route, at));
        }
    }
    for (limit, at) in rate_limits.iter().zip(limit_places) {
        for name in limit.routes.iter().flatten().filter(|name| !routes.iter().any(|(route, _)| route.name == **name)) {
            reader.error(at, format!("routes: there is no rule named '{name}'"));
        }
    }
    if let Some(limit) = rate_limits.iter().find(|limit| limit.shared && cache.redis.is_none()) {
        reader.warn(0, format!("the limit '{}' is shared, and without cache.redis each instance counts by itself", limit.name));
    }
    warn_of_shadows(&routes, reader);
    let places: Vec<usize> = routes.iter().map(|(_, at)| *at).collect();
    let routes: Vec<Route> = routes.into_iter().map(|(route, _)| route).collect();
    let backend = backend?;
    // Files from before [own] had these endpoints without a word.
    let is_for_liquidations = |route: &Route| {
        let (PathPattern::Exact(path) | PathPattern::Below(path)) = &route.path;
        route.timeline || path.starts_with("/api/liquidation")
    };
    let had_them = backend.forward_invalidation || routes.iter().any(is_for_liquidations);
    if own_endpoints.is_none() && !backend.is_native() && had_them {
        reader.warn(0, "[own] is left out, so that /health and /api/cache/* are the backend's own; say endpoints = true or false there");
    }
    let config = Config {
        listen,
        public_url,
        limits,
        admin,
        log,
        telemetry,
        // Where Sluice is the API these paths are part of it.
        own_endpoints: own_endpoints.unwrap_or(backend.is_native()),
        backend,
        cache,
        timeline,
        routes,
        rate_limits,
        warm,
        digest: String::new(),
    };
    warn_of_own_paths(&config, &places, reader);
    Some(config)
}

/// The first digits of the SHA-256 of a file's text.
fn digest(source: &str) -> String {
    let mut text = String::with_capacity(64);
    hex(&Sha256::digest(source.as_bytes()), &mut text);
    text.truncate(12);
    text
}

/// Warns of rules that can never match, because an earlier one takes all their requests or because they contradict
/// themselves.
fn warn_of_shadows(routes: &[(Route, usize)], reader: &Reader<'_>) {
    for (index, (late, at)) in routes.iter().enumerate() {
        if let Some(name) = late.with.iter().find(|name| late.without.contains(name)) {
            reader.warn(*at, format!("'{}' can never match: it wants '{name}' both present and absent", late.name));
        }
        let takes_all = |early: &Route| {
            early.path.covers(&late.path)
                && early.with.iter().all(|name| late.with.contains(name))
                && early.without.iter().all(|name| late.without.contains(name))
        };
        if let Some((early, _)) = routes[..index].iter().find(|(early, _)| takes_all(early)) {
            reader.warn(*at, format!("'{}' can never match: '{}' above it takes all its requests", late.name, early.name));
        }
    }
}

/// Warns of rules that can never match since Sluice answers their path itself. `places` are those of the rules.
fn warn_of_own_paths(config: &Config, places: &[usize], reader: &Reader<'_>) {
    for (route, at) in config.routes.iter().zip(places) {
        if let PathPattern::Exact(path) = &route.path
            && Endpoint::of(path, config.own_paths()).is_some()
        {
            let what = if config.backend.is_native() { "" } else { "; if it is the backend's, leave own.endpoints out" };
            reader.warn(*at, format!("'{}' can never match: Sluice answers {path} itself{what}", route.name));
        }
    }
}

/// A number of things within bounds, or the default.
fn count(section: &mut Section<'_, '_>, key: &'static str, bounds: RangeInclusive<u64>, default: usize) -> usize {
    section.number(key, bounds).and_then(|number| usize::try_from(number).ok()).unwrap_or(default)
}

fn limits(mut section: Section<'_, '_>, trusted_proxies: Vec<IpNet>) -> Limits {
    let limits = Limits {
        trusted_proxies,
        connections: count(&mut section, "connections", 1..=1_000_000, 10_000),
        connections_per_address: count(&mut section, "connections_per_address", 1..=1_000_000, 5_000),
        header_bytes: bytes(&mut section, "header_bytes", 64 << 10),
        header_timeout: positive(&mut section, "header_timeout", s(10)),
        idle_timeout: positive(&mut section, "idle_timeout", s(75)),
        stall_timeout: positive(&mut section, "stall_timeout", s(30)),
        min_rate: section.parsed("min_rate", size).unwrap_or(512),
        drain_timeout: positive(&mut section, "drain_timeout", s(30)),
        waiters: count(&mut section, "waiters", 1..=1_000_000, 10_000),
        wait_timeout: positive(&mut section, "wait_timeout", s(30)),
    };
    if !(8192 + 1024..=1 << 20).contains(&limits.header_bytes) {
        section.error("header_bytes", "expected 9KiB to 1MiB, since a URL alone may have 8KiB");
    }
    section.finish();
    limits
}

/// A list of addresses and networks.
fn networks(section: &mut Section<'_, '_>, key: &'static str) -> Vec<IpNet> {
    let mut networks = Vec::new();
    for text in section.strings(key).unwrap_or_default() {
        match text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)) {
            Ok(network) => networks.push(network),
            Err(_) => section.error(key, format!("'{text}' is neither an address nor a network such as 10.0.0.0/8")),
        }
    }
    networks
}

fn admin(mut section: Section<'_, '_>) -> Admin {
    let listen = section.parsed("listen", address).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 9090)));
    let tokens = tokens(&mut section);
    let hosts = hosts(&mut section);
    let watch = section.boolean("watch").unwrap_or(false);
    section.finish();
    Admin { listen, hosts, tokens, watch }
}

/// Names of the admin listener. One text may hold several, as a variable of the environment does.
fn hosts(section: &mut Section<'_, '_>) -> Vec<String> {
    let texts = section.strings("hosts").unwrap_or_default();
    let names = texts.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|name| !name.is_empty());
    let is_name = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) && !name.starts_with('.');
    let mut hosts = Vec::new();
    for name in names {
        if name.parse::<IpAddr>().is_ok() || is_name(name) {
            hosts.push(name.trim_end_matches('.').to_ascii_lowercase());
        } else {
            section.error("hosts", format!("'{name}' is not a name such as \"sluice\": write it whole, without a port or a '*'"));
        }
    }
    hosts
}

fn log(mut section: Section<'_, '_>) -> Log {
    use tracing::Level;
    let json = section.choice("format", &[("text", false), ("json", true)]).unwrap_or(false);
    let levels = [("error", Level::ERROR), ("warn", Level::WARN), ("info", Level::INFO), ("debug", Level::DEBUG), ("trace", Level::TRACE)];
    let level = section.choice("level", &levels).unwrap_or(Level::INFO);
    let accesses = [("all", Access::All), ("errors", Access::Errors), ("off", Access::Off)];
    let access = section.choice("access", &accesses).unwrap_or(Access::Errors);
    let slow = section.parsed("slow", duration).unwrap_or(Duration::from_secs(1));
    let redact = section.strings("redact").unwrap_or_default();
    for name in redact.iter().filter(|name| name.is_empty() || name.len() > 64 || name.contains(['[', ']', '=', '&', ';', '%', '*'])) {
        section.error("redact", format!("'{name}' is not the name of a parameter: write it decoded, without an index in brackets"));
    }
    section.finish();
    Log { json, level, access, slow, redact }
}

fn telemetry(mut section: Section<'_, '_>) -> Telemetry {
    let collector =
        |text: &str| if text.is_empty() { Ok(None) } else { web_url(text, &["http"]).map(|_| Some(text.trim_end_matches('/').to_owned())) };
    let otlp = section.parsed("otlp", collector).flatten();
    let sample = section.parsed("sample", share).unwrap_or(100);
    section.finish();
    Telemetry { otlp, sample }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Http,
    Sample,
    Mysql,
}

fn backend(mut section: Section<'_, '_>, sample: &mut Section<'_, '_>, mysql: &mut Section<'_, '_>) -> Option<Backend> {
    let kinds = [("http", Kind::Http), ("sample", Kind::Sample), ("mysql", Kind::Mysql)];
    let kind = if section.has("kind") { section.choice("kind", &kinds) } else { Some(Kind::Http) };
    let url = section.parsed("url", http_authority);
    let host = section.parsed("host", |text| match text.parse::<Authority>() {
        Ok(host) if !text.contains('@') => Ok(host),
        _ if text.contains('@') => Err("expected a host such as api.example:8000, without user or password".to_owned()),
        _ => Err(format!("'{text}' is not a host such as api.example:8000")),
    });
    let connect_timeout = positive(&mut section, "connect_timeout", s(1));
    let timeout = positive(&mut section, "timeout", s(30));
    let body_timeout = positive(&mut section, "body_timeout", s(300));
    let head_as_get = section.choice("head", &[("get", true), ("forward", false)]).unwrap_or(true);
    let forward_invalidation = section.boolean("forward_invalidation").unwrap_or(false);
    let max_in_flight = count(&mut section, "max_in_flight", 1..=100_000, 256);
    let max_uploads = count(&mut section, "max_uploads", 1..=100_000, 128);
    let max_downloads = count(&mut section, "max_downloads", 1..=100_000, 2048);
    let max_streams = count(&mut section, "max_streams", 1..=100_000, 2048);
    let queue = count(&mut section, "queue", 0..=100_000, 1024);
    let queue_timeout = positive(&mut section, "queue_timeout", s(5));
    let mut bytes = |key, default| section.parsed(key, size).and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(default);
    let (upload_buffer, upload_memory) = (bytes("upload_buffer", 256 << 10), bytes("upload_memory", 64 << 20));
    let orders = sample.string("orders").filter(|path| !path.is_empty()).map(Into::into);
    let delay = sample.parsed("delay", duration).unwrap_or_default();
    if kind == Some(Kind::Http) && !section.has("url") {
        section.error("url", "missing: write where the API is, such as url = \"http://127.0.0.1:8000\" in [backend]");
    }
    let mysql = self::mysql(mysql, kind == Some(Kind::Mysql), connect_timeout);
    section.finish();
    let kind = match kind? {
        Kind::Http => {
            let authority = url?;
            BackendKind::Http { host: host.unwrap_or_else(|| authority.clone()), authority, connect_timeout }
        }
        Kind::Sample => BackendKind::Sample { orders, delay },
        Kind::Mysql => BackendKind::Mysql(mysql?),
    };
    Some(Backend {
        kind,
        head_as_get,
        forward_invalidation,
        timeout,
        body_timeout,
        max_in_flight,
        max_uploads,
        max_downloads,
        max_streams,
        queue,
        queue_timeout,
        upload_buffer,
        upload_memory,
    })
}

/// Checked even where it is not used, so that the day of the move brings no surprise.
fn mysql(section: &mut Section<'_, '_>, used: bool, connect_timeout: Duration) -> Option<Mysql> {
    let text = |section: &mut Section<'_, '_>, key, default: &str| section.string(key).unwrap_or_else(|| default.to_owned());
    let name = |text: &str| {
        let plain = |part: &str| (1..=64).contains(&part.chars().count()) && !part.contains(['`', '/', '\\', '\0']);
        if text.split('.').count() <= 2 && text.split('.').all(plain) {
            Ok(text.to_owned())
        } else {
            Err(format!("'{text}' is not the name of a table such as binance_liqs or liquidations.binance_liqs"))
        }
    };
    let ca = section.string("tls_ca").filter(|path| !path.is_empty()).map(PathBuf::from);
    let modes = [("off", Tls::Off), ("require", Tls::Require), ("verify", Tls::Verify { ca: ca.clone() })];
    let tls = section.parsed("tls", |text| {
        let found = modes.iter().find(|(word, _)| *word == text).map(|(_, mode)| mode.clone());
        found.ok_or_else(|| format!("expected \"off\", \"require\" or \"verify\", found \"{text}\""))
    });
    if let Some(path) = ca.as_ref().filter(|path| used && !path.is_file()) {
        section.error("tls_ca", format!("there is no file {}", path.display()));
    }
    if ca.is_some() && !matches!(tls, Some(Tls::Verify { .. })) {
        section.warn("tls_ca", "has no effect unless tls = \"verify\"");
    }
    let config = Mysql {
        host: text(section, "host", "127.0.0.1"),
        port: section.number("port", 1..=65_535).and_then(|port| u16::try_from(port).ok()).unwrap_or(3306),
        user: text(section, "user", ""),
        password: Secret(text(section, "password", "")),
        database: text(section, "database", ""),
        table: section.parsed("table", name).unwrap_or_else(|| "binance_liqs".to_owned()),
        tls: tls.unwrap_or(Tls::Off),
        connect_timeout,
        pool_min: count(section, "pool_min", 0..=1000, 5),
        pool_max: count(section, "pool_max", 1..=1000, 20),
        queue: count(section, "queue", 0..=10_000, 64),
        queue_timeout: positive(section, "queue_timeout", s(5)),
        query_timeout: positive(section, "query_timeout", s(30)),
        long_query_timeout: positive(section, "long_query_timeout", s(120)),
        stream_timeout: positive(section, "stream_timeout", s(3600)),
    };
    if config.pool_min > config.pool_max {
        section.error("pool_min", "more than pool_max");
    }
    for (key, value) in [("user", &config.user), ("database", &config.database)] {
        if used && value.is_empty() {
            section.error(key, "missing: backend.kind = \"mysql\" needs it");
        }
    }
    used.then_some(config)
}

fn cache(mut section: Section<'_, '_>) -> CacheSettings {
    let memory = section.parsed("memory", size).unwrap_or(256 << 20);
    let password = section.string("redis_password").filter(|password| !password.is_empty());
    let redis =
        section.parsed("redis", |text| if text.is_empty() { Ok(None) } else { RedisUrl::parse(text, password).map(Some) }).flatten();
    let namespace = section.parsed("namespace", namespace);
    let max_object = bytes(&mut section, "max_object", 16 << 20);
    if max_object == 0 || max_object > 1 << 30 {
        section.error("max_object", "expected 1B to 1GiB");
    }
    if memory > 0 && (max_object as u64) > memory / 4 {
        section.warn("max_object", "more than a quarter of cache.memory: objects near that size will not stay in memory");
    }
    let compress_above = bytes(&mut section, "compress_above", 1 << 10);
    let refresh_early = section.boolean("refresh_early").unwrap_or(true);
    let handover = section.string("handover").filter(|path| !path.is_empty()).map(PathBuf::from);
    if handover.is_some() && redis.is_some() {
        section.warn("handover", "does nothing with cache.redis, from which the next process has what it needs");
    }
    let redis_timeout = positive(&mut section, "redis_timeout", Duration::from_millis(25));
    let key = |text: &str| match text {
        "" => Ok(None),
        text => SecretKey::parse(text).map(Some).ok_or("expected 64 hexadecimal digits, as `openssl rand -hex 32` prints them".to_owned()),
    };
    let current = section.parsed("encryption_key", key).flatten();
    let previous = section.parsed("encryption_key_previous", key).flatten();
    if current.is_none() && previous.is_some() {
        section.error("encryption_key_previous", "has no meaning without encryption_key");
    }
    section.finish();
    let encryption = current.map(|current| (current, previous));
    CacheSettings {
        encryption,
        memory,
        redis,
        namespace: namespace.unwrap_or_else(|| "sluice".into()),
        max_object,
        compress_above,
        refresh_early,
        handover,
        redis_timeout,
    }
}

/// What every name in Redis begins with. In names it ends at `:` or `!`, so it holds neither: else the names of `app:v2` would begin
/// like those of `app`, and a purge of the one would empty the other. It holds nothing either that a glob of Redis reads.
fn namespace(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let of_right_size = (1..=64).contains(&text.len());
    if of_right_size && text.bytes().all(plain) {
        return Ok(text.to_owned());
    }
    if of_right_size && text.contains(':') && text.bytes().all(|byte| plain(byte) || byte == b':') {
        return Err(format!(
            "'{text}' must not contain ':', at which a namespace ends: in one Redis, purges of '{}' would empty it. Write \"{}\"; what is \
             stored under the old name is not used any more, and Redis lets it expire",
            text.split(':').next().unwrap_or_default(),
            text.replace(':', "-"),
        ));
    }
    Err("expected 1 to 64 letters, digits, '-', '_' or '.'".to_owned())
}

fn positive(section: &mut Section<'_, '_>, key: &'static str, default: Duration) -> Duration {
    section.parsed(key, positive_duration).unwrap_or(default)
}

fn bytes(section: &mut Section<'_, '_>, key: &'static str, default: usize) -> usize {
    section.parsed(key, size).and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(default)
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("'{text}' is not an address such as 127.0.0.1:8080 or [::]:8080"))
}

fn web_url(text: &str, schemes: &[&str]) -> Result<(String, Authority), String> {
    let shown =
        if text.contains('@') { "what stands here (with an '@', so that it is not repeated)".to_owned() } else { format!("'{text}'") };
    let fault = || format!("{shown} is not a URL such as {}://127.0.0.1:8000, without a path, user or password", schemes[0]);
    let uri: Uri = text.parse().map_err(|_| fault())?;
    match (uri.scheme_str(), uri.authority(), uri.path_and_query().map(|path| path.as_str())) {
        (Some(scheme), Some(authority), None | Some("/")) if schemes.contains(&scheme) && !authority.as_str().contains('@') => {
            Ok((scheme.to_owned(), authority.clone()))
        }
        (Some("https"), ..) if !schemes.contains(&"https") => Err("this version reaches the backend over plain http only".into()),
        _ => Err(fault()),
    }
}

fn http_authority(text: &str) -> Result<Authority, String> {
    web_url(text, &["http"]).map(|(_, authority)| authority)
}

fn public_url(text: &str) -> Result<PublicUrl, String> {
    web_url(text, &["https", "http"]).map(|(scheme, authority)| PublicUrl { scheme, authority })
}
