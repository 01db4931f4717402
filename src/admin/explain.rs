//! What Sluice would do with a request, and why: for `sluice explain` and the admin listener. No I/O.

use std::fmt::Write as _;
use std::net::IpAddr;

use http::header::ORIGIN;
use http::{HeaderMap, HeaderName, Method};

use super::own::Endpoint;
use crate::cache::key::{Canonical, Key};
use crate::cache::void::{Effect, Voids};
use crate::clock::Wall;
use crate::config::rate_limit::RateLimit;
use crate::config::route::{PathPattern, RequestFields, Rollout, Route, beside, may_serve};
use crate::config::template::escape;
use crate::config::units::show;
use crate::config::{BackendKind, Config, Timeline};
use crate::proxy::decide::{Admission, admit};
use crate::proxy::outcome::Outcome;
use crate::request::client::FORWARDED_FOR;
use crate::request::fields::may_go_on;
use crate::request::secrets::{LEFT_OUT, is_left_out, text_without_secrets, without_secrets};
use crate::request::target::{Parameter, Target};
use crate::timeline::Located;
use crate::timeline::needs::{Needs, needs};
use crate::timeline::verdict::State;

/// So many of the purges that concern a key are shown.
const MOST_VOIDS: usize = 5;

/// What explaining needs of the configuration.
#[derive(Clone, Debug)]
pub struct Explainer {
    namespace: String,
    head_as_get: bool,
    backend: String,
    native: bool,
    timeline: Timeline,
}

/// What may change while the program runs, and what only a program that serves knows.
pub struct Serving<'a> {
    /// The rules.
    pub routes: &'a [Route],
    /// How many requests clients may make.
    pub limits: Vec<&'a RateLimit>,
    /// Who asks.
    pub client: IpAddr,
    /// What is void, if somebody knows.
    pub voids: Option<&'a Voids>,
    /// Where the spans of orders are that a request needs, if somebody knows.
    pub locate: &'a dyn Fn(&Needs) -> Option<Located>,
}

/// Who asks, in an explanation: the address that `X-Forwarded-For` names, whoever says so, or else `peer`.
#[must_use]
pub fn client(headers: &HeaderMap, peer: IpAddr) -> IpAddr {
    headers.get(FORWARDED_FOR).and_then(|value| value.to_str().ok()?.trim().parse().ok()).unwrap_or(peer)
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
            namespace: config.cache.namespace.clone(),
            head_as_get: config.backend.head_as_get,
            backend,
            native: config.backend.is_native(),
            timeline: config.timeline.clone(),
        }
    }

    /// Explains what becomes of a GET for `target` with these fields, asked at `now`. The flag says that it would not be refused.
    #[must_use]
    pub fn explain(&self, serving: &Serving<'_>, target: &str, headers: &HeaderMap, now: Wall) -> (bool, String) {
        let mut out = String::new();
        let fine = self.write(serving, target, headers, now, &mut out);
        (fine.unwrap_or(true), out)
    }

    fn write(&self, serving: &Serving<'_>, text: &str, headers: &HeaderMap, now: Wall, out: &mut String) -> Result<bool, std::fmt::Error> {
        writeln!(out, "request    GET {}", without_secrets(text))?;
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
            without_secrets(&target.path),
            if target.doubtful { "   (doubtful: forwarded verbatim, never cached)" } else { "" }
        )?;
        if Endpoint::of(&target.path, self.native).is_some() {
            writeln!(out, "answer     Sluice's own: it is neither cached nor passed on")?;
            return Ok(true);
        }
        let route = if target.doubtful { None } else { choose(serving.routes, &target, out)? };
        // A target counts on each rule to which it may lead.
        let besides = beside(serving.routes, &target);
        let found = if target.doubtful { may_serve(serving.routes, text, &target) } else { route.into_iter().chain(besides).collect() };
        for limit in &serving.limits {
            let on_one = found.iter().any(|route| limit.counts_on(Some(&route.name)));
            if on_one || (found.is_empty() && limit.counts_on(None)) {
                writeln!(out, "limited    {limit}")?;
            }
        }
        let admission = Admission {
            method: &Method::GET,
            headers,
            has_body: false,
            doubtful: target.doubtful,
            head_as_get: self.head_as_get,
            client: Some(serving.client),
        };
        if let Some(route) = route.filter(|route| route.cache && route.rollout != Rollout::ALL) {
            let (share, client) = (route.rollout, serving.client);
            let verb = if share.includes(&route.name, client) { "is one of them" } else { "is not" };
            writeln!(out, "rollout    for {share} of clients; {client} {verb}")?;
        }
        let route = match admit(route, admission) {
            Ok(route) => route,
            Err(why) => {
                writeln!(out, "answer     passed to {} uncached ({})", self.backend, Outcome::Pass(why).detail())?;
                return Ok(true);
            }
        };
        let key = self.write_key(route, &target, headers, out)?;
        write_voids(&key, serving.voids, out)?;
        write_lifetimes(route, &target, now, out)?;
        if route.shadow {
            writeln!(out, "shadow     the answer of {} is compared with what the cache would have said", self.backend)?;
            writeln!(out, "answer     passed to {} (shadow)", self.backend)?;
            return Ok(true);
        }
        let mut first = "";
        if route.timeline && self.timeline.enabled && !route.sees_credentials(headers) {
            match needs(&self.timeline, &target, now) {
                Some(needs) => {
                    write_needs(&needs, serving.locate, out)?;
                    first = "from the timeline if that can, else ";
                }
                None => writeln!(out, "timeline   not asked: this is for the backend to answer")?,
            }
        }
        writeln!(out, "answer     {first}from the cache, or fetched once from {} for all who ask at the same time", self.backend)?;
        Ok(true)
    }

    fn write_key(&self, route: &Route, target: &Target<'_>, headers: &HeaderMap, out: &mut String) -> Result<Key, std::fmt::Error> {
        let key = Key::new(route, target, Canonical::new(route, target, headers));
        write!(out, "canonical  {}", without_secrets(&target.path))?;
        // Values that may be secret, as keys and tags hold them.
        let mut hidden: Vec<String> = Vec::new();
        let keyed = |parameter: &Parameter<'_>| route.query.as_ref().is_none_or(|names| names.iter().any(|known| parameter.is(known)));
        let mut parameters: Vec<_> = target.parameters.iter().collect();
        parameters.sort_by(|a, b| a.name().cmp(b.name()));
        for parameter in parameters.iter().filter(|parameter| keyed(parameter)) {
            let name = parameter.name_text().into_owned();
            let value = parameter.text();
            let folded = route.fold_case.contains(&name);
            let value = if folded { value.to_ascii_uppercase() } else { value.into_owned() };
            if is_left_out(&name, &value) {
                write!(out, "  {name}={LEFT_OUT}")?;
                let mut kept = String::new();
                escape(&value, &mut kept);
                hidden.push(kept);
            } else {
                write!(out, "  {name}={value:?}")?;
            }
        }
        if let Some(origin) = headers.get(ORIGIN).map(|origin| String::from_utf8_lossy(origin.as_bytes())) {
            write!(out, "  Origin: {:?}", text_without_secrets(&origin))?;
        }
        writeln!(out)?;
        for parameter in parameters.iter().filter(|parameter| !keyed(parameter)) {
            writeln!(out, "ignored    {} (not in the rule's query)", text_without_secrets(&parameter.name_text()))?;
        }
        for name in route.request_fields.listed() {
            for value in headers.get_all(name) {
                // The value may be a credential.
                writeln!(out, "keyed      {name}: {} bytes (listed in request_headers)", value.len())?;
            }
        }
        if matches!(route.request_fields, RequestFields::Listed(_)) {
            let own = |name: &&HeaderName| may_go_on(name) && **name != ORIGIN && !route.request_fields.listed().contains(name);
            let withheld: Vec<&str> = headers.keys().filter(own).map(HeaderName::as_str).collect();
            if !withheld.is_empty() {
                writeln!(out, "not sent   {} (to the backend, unless it names them in Vary)", withheld.join(", "))?;
            }
        }
        let shown =
            |text: &str| hidden.iter().filter(|value| !value.is_empty()).fold(text.to_owned(), |text, value| text.replace(value, LEFT_OUT));
        writeln!(out, "key        {}", shown(&key.readable))?;
        writeln!(out, "in Redis   {}", shown(key.name(&self.namespace)))?;
        if !key.tags.is_empty() {
            writeln!(out, "tags       {}", shown(&key.tags.join(", ")))?;
        }
        Ok(key)
    }
}

/// The newest purges and changes that concern a key.
fn write_voids(key: &Key, voids: Option<&Voids>, out: &mut String) -> std::fmt::Result {
    let found = voids.map(|voids| voids.concerning(&key.readable, &key.tags, key.target)).unwrap_or_default();
    for purge in found.iter().take(MOST_VOIDS) {
        let left = match purge.effect {
            Effect::Remove => "void",
            Effect::Expire => "stale",
            Effect::Doubt => "in doubt",
        };
        writeln!(out, "voided     by {}: what was asked for before {} is {left}", purge.what, purge.since.text())?;
    }
    if found.len() > MOST_VOIDS {
        writeln!(out, "           and by {} more", found.len() - MOST_VOIDS)?;
    }
    Ok(())
}

/// The rule that serves a target, saying why others before it do not.
fn choose<'r>(routes: &'r [Route], target: &Target<'_>, out: &mut String) -> Result<Option<&'r Route>, std::fmt::Error> {
    for route in routes {
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

/// Which spans of orders a request needs, and where they are if that is known.
fn write_needs(needs: &Needs, locate: &dyn Fn(&Needs) -> Option<Located>, out: &mut String) -> std::fmt::Result {
    let day = |moment: i64| u64::try_from(moment).map_or_else(|_| moment.to_string(), |moment| Wall::from_millis(moment).text());
    write!(out, "timeline   {}: ", needs.symbol)?;
    match &needs.spans {
        Some(spans) if needs.count() == 1 => write!(out, "the span from {}", day(*spans.start()))?,
        Some(spans) => write!(out, "{} spans, from {} to that from {}", needs.count(), day(*spans.start()), day(*spans.end()))?,
        None => {}
    }
    let and = if needs.spans.is_some() { " and " } else { "" };
    writeln!(out, "{}", if needs.newest { format!("{and}the newest orders") } else { String::new() })?;
    let Some(Located { state, known, in_memory, before_first, newest, unanswered, symbol }) = locate(needs) else { return Ok(()) };
    match state {
        State::On if unanswered.is_none() => writeln!(out, "           answered from it, if all of that is there or can be had quickly")?,
        State::On if known => {}
        State::On => writeln!(out, "           not yet: nothing was asked about this symbol, or nothing was found")?,
        State::Probation { equal, of } => {
            writeln!(out, "           on probation: {equal} of {of} answers in a row were the backend's own")?
        }
        State::Off => writeln!(out, "           off: the answers about most symbols differed from the backend's (the log says how)")?,
    }
    if let Some(reason) = unanswered {
        writeln!(out, "           left to the backend now: {reason} (reason=\"{}\" in sluice_timeline_unanswered_total)", reason.name())?;
    }
    if !known {
        return Ok(());
    }
    let newest = newest.map_or_else(|| "not known".to_owned(), |age| format!("asked for {} ms ago", age.as_millis()));
    let missing = needs.count() - in_memory - before_first;
    writeln!(
        out,
        "           in memory: {in_memory} spans; before the first order: {before_first}; elsewhere: {missing}; newest orders: {newest}"
    )?;
    for line in symbol.map(|symbol| symbol.to_string()).unwrap_or_default().lines() {
        writeln!(out, "           {line}")?;
    }
    Ok(())
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
