//! Which rules were tried for a request, what did not fit, and how long the one that serves it lets answers live.

use std::fmt::Write as _;

use crate::clock::Wall;
use crate::config::route::{PathPattern, Route, select};
use crate::config::units::show;
use crate::request::target::Target;

/// The rule that serves a target, after those that were tried before it, each with what did not fit.
pub(super) fn choose<'r>(routes: &'r [Route], target: &Target<'_>, out: &mut String) -> Result<Option<&'r Route>, std::fmt::Error> {
    let chosen = select(routes, target);
    let tried = chosen.map_or(routes.len(), |chosen| chosen.index);
    for route in routes.iter().take(tried) {
        writeln!(out, "not        {} ({})", route.name, misfit(route, target))?;
    }
    match chosen {
        Some(route) => writeln!(out, "rule       {} ({})", route.name, shape(route))?,
        None => writeln!(out, "rule       none matches")?,
    }
    Ok(chosen)
}

/// Why a rule does not serve a target.
fn misfit(route: &Route, target: &Target<'_>) -> String {
    if !route.path.matches(&target.path) {
        return format!("it is for {}", pattern(&route.path));
    }
    let missing = route.with.iter().find(|name| !target.has(name)).map(|name| format!("'{name}' is absent"));
    let present = || route.without.iter().find(|name| target.has(name)).map(|name| format!("'{name}' is present"));
    missing.or_else(present).unwrap_or_default()
}

fn pattern(path: &PathPattern) -> String {
    match path {
        PathPattern::Exact(path) => path.clone(),
        PathPattern::Below(prefix) => format!("{prefix}*"),
    }
}

fn shape(route: &Route) -> String {
    let mut shape = format!("path = \"{}\"", pattern(&route.path));
    for (word, names) in [("with", &route.with), ("without", &route.without)] {
        if !names.is_empty() {
            shape.push_str(&format!(", {word} {}", names.join(", ")));
        }
    }
    shape
}

/// How long the rule lets answers live.
pub(super) fn write_lifetimes(route: &Route, target: &Target<'_>, now: Wall, out: &mut String) -> std::fmt::Result {
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
