//! What is stored for a request, and the sentence that says whether it is a hit: until when, or why not and what to change.

use std::fmt::Write as _;
use std::time::Duration;

use crate::cache::entry::{Content, Entry};
use crate::cache::void::{Effect, Purge, Selection, Voids};
use crate::clock::Wall;
use crate::config::route::Route;
use crate::config::units::show;
use crate::fetch::unstored::Unstored;
use crate::http::freshness::Unstorable;
use crate::proxy::decide::Decision;
use crate::proxy::foresee::Foreseen;
use crate::proxy::outcome::FetchWhy;

/// At most this many of the purges that matter are shown.
const MOST_VOIDS: usize = 5;

/// What is known of a request by a program that serves, written as lines and as the last sentence.
pub(super) struct Told<'a> {
    pub(super) route: &'a Route,
    pub(super) foreseen: &'a Foreseen,
    /// The voids that matter, newest first.
    pub(super) voids: Vec<Purge>,
    pub(super) backend: &'a str,
}

impl<'a> Told<'a> {
    /// With those of all voids that matter: the ones since what is stored was asked for, or since the last answer came.
    pub(super) fn new(route: &'a Route, foreseen: &'a Foreseen, voids: Option<&Voids>, backend: &'a str) -> Self {
        let key = &foreseen.key;
        let all = voids.map(|voids| voids.concerning(&key.readable, &key.tags, key.target)).unwrap_or_default();
        let matters = |purge: &Purge| match (&foreseen.found, &foreseen.unstored) {
            (Ok(entry), _) => purge.at >= entry.asked_at,
            (Err(_), Some(last)) => purge.since > last.at,
            (Err(_), None) => true,
        };
        let mut voids: Vec<Purge> = Vec::new();
        for purge in all.into_iter().filter(matters) {
            // The newest of those that concern the same.
            if !voids.iter().any(|known| known.what == purge.what) {
                voids.push(purge);
            }
        }
        Self { route, foreseen, voids, backend }
    }

    /// What is stored, and which voids concern it.
    pub(super) fn write(&self, out: &mut String) -> std::fmt::Result {
        match &self.foreseen.found {
            Ok(entry) => self.write_entry(entry, out)?,
            Err(FetchWhy::VaryMiss) => writeln!(out, "stored     for other request headers than these")?,
            Err(_) => writeln!(out, "stored     nothing")?,
        }
        if let Some(Unstored { why, status, at }) = &self.foreseen.unstored {
            writeln!(out, "not kept   {} {} ago: {}", status, ago(self.foreseen.now, *at), why.detail())?;
        }
        write_voids(&self.voids, out)
    }

    fn write_entry(&self, entry: &Entry, out: &mut String) -> std::fmt::Result {
        let (now, lives) = (self.foreseen.now, &entry.lifetimes);
        let status = match &entry.content {
            Content::Response(response) => format!("{}, {} bytes", response.status.as_u16(), response.body.len()),
            Content::Varies(_) => String::new(),
        };
        let tier = if self.foreseen.in_memory { "memory" } else { "Redis" };
        let fresh_until = entry.stored_at + lives.fresh;
        writeln!(out, "stored     in {tier}: {status}, since {} (Age: {} s)", entry.stored_at.text(), entry.age(now))?;
        write!(out, "           fresh until {}", fresh_until.text())?;
        for (span, what) in
            [(lives.stale_while_revalidate, "served while it is refreshed"), (lives.stale_if_error, "while the backend fails")]
        {
            if !span.is_zero() {
                write!(out, ", {what} until {}", (fresh_until + span).text())?;
            }
        }
        writeln!(out)
    }

    /// The last sentence.
    pub(super) fn sentence(&self) -> String {
        let Foreseen { found, decision, now, .. } = self.foreseen;
        let until = |span: fn(&Entry) -> Duration| {
            found.as_ref().map(|entry| (entry.stored_at + entry.lifetimes.fresh + span(entry)).text()).unwrap_or_default()
        };
        match *decision {
            Decision::Hit(left) => format!("a hit for {} more, until {}", seconds(left), (*now + left).text()),
            Decision::StaleAndRevalidate(by) => format!(
                "a stale hit: what is stored went stale {} ago; it is served at once while one request refreshes it, until {} at most",
                seconds(by),
                until(|entry| entry.lifetimes.stale_while_revalidate)
            ),
            Decision::StaleWhileFailing(by) => format!(
                "a stale hit: what is stored went stale {} ago, and the backend failed lately and is left alone; served until {} at most",
                seconds(by),
                until(|entry| entry.lifetimes.stale_while_revalidate.max(entry.lifetimes.stale_if_error))
            ),
            Decision::OnlyIfCached => "refused with 504: the client says only-if-cached, and nothing fresh is stored".to_owned(),
            Decision::FetchUnstored => format!("not a hit: the client says no-store; passed to {}", self.backend),
            Decision::Fetch { why, .. } => format!("not a hit: {}; {}", self.why_not(why), self.what_happens()),
        }
    }

    /// What happens to a request that is not a hit.
    fn what_happens(&self) -> String {
        if self.foreseen.is_passed {
            return format!("each request is passed to {} by itself", self.backend);
        }
        let failing = if self.foreseen.is_failing { ", which failed lately" } else { "" };
        // What is an error of the backend's, or absent, is for all who wait; other answers that are not kept are for one client alone.
        if self.foreseen.unstored.is_some_and(|last| !matches!(last.status, 404 | 410 | 500..)) {
            return format!("fetched from {}{failing}, by each client for itself while its answers are such", self.backend);
        }
        format!("fetched from {}{failing}, once for all who wait at the same time", self.backend)
    }

    /// Why it is not a hit, and what to change.
    fn why_not(&self, why: FetchWhy) -> String {
        let Foreseen { found, unstored, now, .. } = self.foreseen;
        match (why, found) {
            (FetchWhy::Request, _) => "the client's Cache-Control wants something newer (client_directives = \"ignore\" ignores that)".to_owned(),
            (_, Ok(entry)) => match self.voids.first() {
                Some(purge) => format!("what is stored was voided by {} at {}", by(purge), purge.since.text()),
                None if entry.lifetimes.fresh.is_zero() => {
                    "what is stored is used only after the backend says that it still holds (the backend's headers or ttl = \"0s\" make it so)"
                        .to_owned()
                }
                None => {
                    let stale = now.since(entry.stored_at + entry.lifetimes.fresh);
                    format!("what is stored went stale {} ago (a longer ttl or stale_while_revalidate keeps it)", seconds(stale))
                }
            },
            (FetchWhy::VaryMiss, _) if unstored.is_none() => {
                "what is stored is for other request headers (the backend's Vary names them)".to_owned()
            }
            _ => match (unstored, self.voids.first()) {
                (Some(last), None) => {
                    format!("the last answer ({}, {} ago) was not kept, since {}", last.status, ago(*now, last.at), reason(last, self.route))
                }
                (_, Some(purge)) => format!("{} voided what was stored at {}, and nothing was asked for since", by(purge), purge.since.text()),
                (None, None) => "nothing is stored: it was not asked for yet, or what was stored is over or made room for others".to_owned(),
            },
        }
    }
}

/// Who voided something.
fn by(purge: &Purge) -> String {
    match &purge.what {
        Selection::Target(_) => "a change that a client made".to_owned(),
        Selection::Entry(_) => "the backend, which took it back,".to_owned(),
        what => format!("the purge of {what}"),
    }
}

/// The newest purges and changes that matter.
pub(super) fn write_voids(voids: &[Purge], out: &mut String) -> std::fmt::Result {
    for purge in voids.iter().take(MOST_VOIDS) {
        let left = match purge.effect {
            Effect::Remove => "void",
            Effect::Expire => "stale",
            Effect::Doubt => "in doubt",
        };
        writeln!(out, "voided     by {}: what was asked for before {} is {left}", purge.what, purge.since.text())?;
    }
    if voids.len() > MOST_VOIDS {
        writeln!(out, "           and by {} more", voids.len() - MOST_VOIDS)?;
    }
    Ok(())
}

/// Why a response was not kept, and what to change.
fn reason(last: &Unstored, route: &Route) -> String {
    const CONTROL: &str = "Cache-Control (or CDN-Cache-Control)";
    let policy = &route.policy;
    match last.why {
        Unstorable::NoStore => format!("its {CONTROL} says no-store, which no rule overrides: change it at the backend"),
        Unstorable::Private => format!("its {CONTROL} says private, which no rule overrides: change it at the backend"),
        Unstorable::NoCache => {
            format!("its {CONTROL} says no-cache and it has no ETag or Last-Modified to ask by: let the backend send one of these, or a max-age")
        }
        Unstorable::SetCookie => {
            "it sets a cookie (Set-Cookie): leave that out at the backend, or share it with everyone by set_cookie = \"store\"".to_owned()
        }
        Unstorable::Authorized => {
            "it is to a request with credentials and does not say that others may have it: public, s-maxage or must-revalidate in Cache-Control"
                .to_owned()
        }
        Unstorable::VaryAny => "its Vary is *, or names other fields each time: let the backend name what its answer depends on".to_owned(),
        Unstorable::Coding => {
            "its Content-Encoding is none that can be undone for others: let the backend send gzip, or a max-age in Cache-Control".to_owned()
        }
        Unstorable::NoFreshness if matches!(last.status, 404 | 410) && policy.negative_ttl.is_zero() => {
            "the rule's negative_ttl is 0s and its headers say no lifetime: a negative_ttl keeps it".to_owned()
        }
        Unstorable::NoFreshness if policy.ttl.is_zero() => "the rule's ttl is 0s and its headers say no lifetime: a ttl keeps it".to_owned(),
        Unstorable::NoFreshness if policy.respect_origin && matches!(last.status, 200 | 203 | 204) => {
            "its Cache-Control or Expires says that it is stale at once: origin_headers = \"ignore\" lets ttl decide".to_owned()
        }
        Unstorable::NoFreshness => {
            format!("ttl is for 200, 203 and 204, and its headers say no lifetime: a max-age at the backend keeps a {}", last.status)
        }
        Unstorable::Status => format!("a {} is about one request alone", last.status),
        Unstorable::Endless => "it is a stream without a known end, which each client has for itself".to_owned(),
        Unstorable::Reflection => "it is a redirect to the host that the request named, which anybody may name".to_owned(),
        Unstorable::Error if last.status >= 500 => format!("a {} says that the backend failed: mend that", last.status),
        Unstorable::Error => format!("a {} says what one client did wrong", last.status),
        Unstorable::TooLarge => "it is larger than cache.max_object: raise that".to_owned(),
    }
}

fn ago(now: Wall, at: Wall) -> String {
    seconds(now.since(at))
}

/// In whole seconds, but for what is shorter than one.
fn seconds(span: Duration) -> String {
    show(if span < Duration::from_secs(1) { span } else { Duration::from_secs(span.as_secs()) })
}
