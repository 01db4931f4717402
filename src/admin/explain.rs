//! What Sluice would do with a request, and why: for `sluice explain` and the admin listener. No I/O, no state.

use std::fmt::Write as _;

use http::{HeaderMap, Method};

use super::own::Endpoint;
use crate::cache::key::{Canonical, Key};
use crate::clock::Wall;
use crate::config::route::{PathPattern, Route};
use crate::config::units::show;
use crate::config::{BackendKind, Config};
use crate::proxy::decide::{Admission, admit};
use crate::proxy::outcome::Outcome;
use crate::request::target::Target;

/// What explaining needs of the configuration.
#[derive(Clone, Debug)]
pub struct Explainer {
    routes: Vec<Route>,
    namespace: String,
    head_as_get: bool,
    backend: String,
    native: bool,
}

impl Explainer {
    /// Explains what this configuration does.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let backend = match &config.backend.kind {
            BackendKind::Http { authority, .. } => format!("http://{authority}"),
            BackendKind::Mysql(mysql) => format!("the table {}", mysql.table),
            BackendKind::Sample { .. } => "the sample orders".to_owned(),
        };
        Self {
            routes: config.routes.clone(),
            namespace: config.cache.namespace.clone(),
            head_as_get: config.backend.head_as_get,
            backend,
            native: config.backend.is_native(),
        }
    }

    /// Explains a GET for `target` with these fields, asked at `now`. The flag says that it would not be refused.
    #[must_use]
    pub fn explain(&self, target: &str, headers: &HeaderMap, now: Wall) -> (bool, String) {
        let mut out = String::new();
        let fine = self.write(target, headers, now, &mut out);
        (fine.unwrap_or(true), out)
    }

    fn write(&self, text: &str, headers: &HeaderMap, now: Wall, out: &mut String) -> Result<bool, std::fmt::Error> {
        writeln!(out, "request    GET {text}")?;
        let target = match Target::parse(text) {
            Ok(target) => target,
            Err(refusal) => {
                let (status, sentence) = (refusal.row().status, refusal.row().sentence);
                writeln!(out, "answer     refused with {status}: {sentence}")?;
                return Ok(false);
            }
        };
        writeln!(
            out,
            "path       {}{}",
            target.path,
            if target.doubtful { "   (doubtful: forwarded verbatim, never cached)" } else { "" }
        )?;
        if Endpoint::of(&target.path, self.native).is_some() {
            writeln!(out, "answer     Sluice's own: it is neither cached nor passed on")?;
            return Ok(true);
        }
        let route = if target.doubtful { None } else { self.choose(&target, out)? };
        let admission =
            Admission { method: &Method::GET, headers, has_body: false, doubtful: target.doubtful, head_as_get: self.head_as_get };
        let route = match admit(route, admission) {
            Ok(route) => route,
            Err(why) => {
                writeln!(out, "answer     passed to {} uncached ({})", self.backend, Outcome::Pass(why).detail())?;
                return Ok(true);
            }
        };
        self.write_key(route, &target, headers, out)?;
        write_lifetimes(route, &target, now, out)?;
        writeln!(out, "answer     from the cache, or fetched once from {} for all who ask at the same time", self.backend)?;
        Ok(true)
    }

    fn choose(&self, target: &Target<'_>, out: &mut String) -> Result<Option<&Route>, std::fmt::Error> {
        for route in &self.routes {
            if route.matches(target) {
                writeln!(out, "rule       {} ({})", route.name, shape(route))?;
                return Ok(Some(route));
            }
            if route.path.matches(&target.path) {
                let missing = route.with.iter().find(|name| !target.has(name)).map(|name| format!("'{name}' is absent"));
                let present = route.without.iter().find(|name| target.has(name)).map(|name| format!("'{name}' is present"));
                writeln!(out, "not        {} ({})", route.name, missing.or(present).unwrap_or_default())?;
            }
        }
        writeln!(out, "rule       none matches")?;
        Ok(None)
    }

    fn write_key(&self, route: &Route, target: &Target<'_>, headers: &HeaderMap, out: &mut String) -> std::fmt::Result {
        let key = Key::new(route, target, Canonical::new(route, target, headers));
        write!(out, "canonical  {}", target.path)?;
        let keyed = |name: &[u8]| route.query.as_ref().is_none_or(|names| names.iter().any(|known| known.as_bytes() == name));
        let mut parameters: Vec<_> = target.parameters.iter().collect();
        parameters.sort_by(|a, b| a.name().cmp(b.name()));
        for parameter in parameters.iter().filter(|parameter| keyed(parameter.name())) {
            let name = String::from_utf8_lossy(parameter.name()).into_owned();
            let value = parameter.text();
            let folded = route.fold_case.contains(&name);
            write!(out, "  {name}={:?}", if folded { value.to_ascii_uppercase() } else { value.into_owned() })?;
        }
        if let Some(origin) = headers.get(http::header::ORIGIN) {
            write!(out, "  Origin: {origin:?}")?;
        }
        writeln!(out)?;
        for parameter in parameters.iter().filter(|parameter| !keyed(parameter.name())) {
            writeln!(out, "ignored    {} (not in the rule's query)", String::from_utf8_lossy(parameter.name()))?;
        }
        writeln!(out, "key        {}", key.readable)?;
        writeln!(out, "in Redis   {}", key.name(&self.namespace))?;
        if !key.tags.is_empty() {
            writeln!(out, "tags       {}", key.tags.join(", "))?;
        }
        Ok(())
    }
}

fn shape(route: &Route) -> String {
    let mut shape = match &route.path {
        PathPattern::Exact(path) => format!("path = \"{path}\""),
        PathPattern::Below(prefix) => format!("path = \"{prefix}*\""),
    };
    for (word, names) in [("with", &route.with), ("without", &route.without)] {
        if !names.is_empty() {
            shape.push_str(&format!(", {word} {}", names.join(", ")));
        }
    }
    shape
}

fn write_lifetimes(route: &Route, target: &Target<'_>, now: Wall, out: &mut String) -> std::fmt::Result {
    let policy = route.policy_for(target, now);
    let why = match &route.history {
        Some(history) if history.applies(target, now) => {
            format!("history: {} ended over {} ago", history.parameter, show(history.older_than))
        }
        Some(history) => format!("ttl; not history: {} did not end over {} ago", history.parameter, show(history.older_than)),
        None => "ttl".to_owned(),
    };
    if policy.ttl.is_zero() {
        writeln!(out, "fresh      only as the backend's own headers say")?;
    } else {
        writeln!(
            out,
            "fresh      {} ({why}){}",
            show(policy.ttl),
            if policy.respect_origin { ", unless the backend's headers say otherwise" } else { "" }
        )?;
    }
    writeln!(
        out,
        "stale      {} more while it is refreshed, {} while the backend fails",
        show(policy.stale_while_revalidate),
        show(policy.stale_if_error)
    )?;
    writeln!(
        out,
        "404s       {}",
        if policy.negative_ttl.is_zero() { "not kept".to_owned() } else { format!("fresh {}", show(policy.negative_ttl)) }
    )
}
