//! What Sluice does with a request, and why: for `sluice explain` and the admin listener. No I/O.
//!
//! Nothing is decided here: the rule is chosen, the request admitted, its key made and the stored response judged by the functions that answer
//! requests; what they say is told. What only a program that serves knows comes with [`Foreseen`].

mod key;
mod orders;
mod rules;
mod stored;

use std::fmt::Write as _;
use std::net::IpAddr;

use http::header::AUTHORIZATION;
use http::{HeaderMap, Method};

use crate::cache::void::Voids;
use crate::clock::Wall;
use crate::config::own::{Endpoint, OwnPaths};
use crate::config::rate_limit::RateLimit;
use crate::config::route::{Rollout, Route, beside, may_serve};
use crate::config::{BackendKind, Config, Timeline};
use crate::proxy::decide::{Admission, admit};
use crate::proxy::foresee::Foreseen;
use crate::proxy::outcome::{Outcome, PassWhy};
use crate::request::client::FORWARDED_FOR;
use crate::request::secrets::without_secrets;
use crate::request::target::Target;
use crate::timeline::Located;
use crate::timeline::needs::{Needs, needs};
use key::write_key;
use orders::write_needs;
use rules::{choose, write_lifetimes};
use stored::Told;

/// What explaining needs of the configuration.
#[derive(Clone, Debug)]
pub struct Explainer {
    namespace: String,
    head_as_get: bool,
    backend: String,
    own: OwnPaths,
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
    /// What would become of the request now, if somebody knows.
    pub foreseen: Option<&'a Foreseen>,
    /// What is void, if somebody knows.
    pub voids: Option<&'a Voids>,
    /// Where the spans of orders are that a request needs, if somebody knows.
    pub locate: &'a dyn Fn(&Needs) -> Option<Located>,
}

/// Who asks, in an explanation: the address that `X-Forwarded-For` names, whether a trusted proxy says so or not, or else `peer`.
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
            own: config.own_paths(),
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
        if Endpoint::of(&target.path, self.own).is_some() {
            writeln!(out, "answer     Sluice's own (own.endpoints): it is neither cached nor passed on")?;
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
                let (detail, change) = (Outcome::Pass(why).detail(), change(why, headers));
                writeln!(out, "answer     not a hit: passed to {} uncached ({detail}){change}", self.backend)?;
                return Ok(true);
            }
        };
        write_key(route, &self.namespace, &target, headers, out)?;
        write_lifetimes(route, &target, now, out)?;
        let told = serving.foreseen.map(|foreseen| Told::new(route, foreseen, serving.voids, &self.backend));
        if let Some(told) = &told {
            told.write(out)?;
        }
        if route.shadow {
            writeln!(out, "shadow     the answer of {} is compared with what the cache would have said", self.backend)?;
            writeln!(out, "answer     not a hit: passed to {} (shadow); shadow = false has it answered from what is stored", self.backend)?;
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
        match told {
            Some(told) => writeln!(out, "answer     {first}{}", told.sentence())?,
            None => writeln!(
                out,
                "answer     {first}from the cache while that is fresh, else fetched from {}, once for all who wait at the same time, unless \
                 the answer is for one client alone (--running says what is so now)",
                self.backend
            )?,
        }
        Ok(true)
    }
}

/// What would have a request answered from the cache that is passed.
fn change(why: PassWhy, headers: &HeaderMap) -> &'static str {
    match why {
        PassWhy::NoRule => ": a [[route]] for this path caches it",
        PassWhy::Rule => ": the rule says cache = false",
        PassWhy::Rollout => ": a larger rollout caches for this client too",
        PassWhy::Authorization if headers.contains_key(AUTHORIZATION) => {
            ": authorization = \"respect\" shares answers to requests with Authorization that say that all may have them"
        }
        PassWhy::Authorization => ": X-Api-Key is a credential, unless request_headers lists it",
        PassWhy::DoubtfulPath => ": programs disagree about what this target means",
        _ => "",
    }
}
