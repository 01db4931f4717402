//! Which orders of the timeline a request needs, and where they are.

use std::fmt::Write as _;

use crate::clock::Wall;
use crate::timeline::Located;
use crate::timeline::needs::Needs;
use crate::timeline::verdict::State;

/// Which spans of orders a request needs, and where they are if that is known.
pub(super) fn write_needs(needs: &Needs, locate: &dyn Fn(&Needs) -> Option<Located>, out: &mut String) -> std::fmt::Result {
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
