//! A request and its response, from beginning to end: the id, the time it takes, and its line in the access log.

use std::cell::Cell;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use http::{HeaderValue, Response, request};
use tokio::time::Instant;

use super::access_log::Line;
use super::outcome::Outcome;
use super::rules::Rules;
use super::span::Told;
use super::spent::{Spent, Step};
use crate::body::Reply;
use crate::cache::LookedUp;
use crate::config::Access;
use crate::request::client::{Client, PublicUrl};
use crate::request::fields::REQUEST_ID;
use crate::request::interim::InterimSender;
use crate::request::secrets::{shown_method, without_secrets};
use crate::telemetry::metrics::{CLIENT_LEFT, Metrics, OneMore};
use crate::telemetry::trace::{self, Here};
use crate::upstream::request_fields::Forwarding;

/// The longest id that is taken over from a client, in bytes.
const MAX_ID: usize = 128;

/// A request that is being answered.
pub struct Exchange {
    id: HeaderValue,
    started: Instant,
    spent: Spent,
    _in_flight: OneMore,
}

impl Exchange {
    /// A request came. It keeps the id that the client gave it, or gets one. What the short way looked up for it counts.
    #[must_use]
    pub fn begin(metrics: &Metrics, parts: &request::Parts) -> Self {
        let given = parts.headers.get(REQUEST_ID).filter(|id| fits_as_id(id.as_bytes()) && id.to_str().is_ok());
        let made = || HeaderValue::from_bytes(&new_id()).unwrap_or_else(|_| HeaderValue::from_static("0"));
        let looked_up = parts.extensions.get::<LookedUp>();
        let spent = Spent::default();
        if let Some(looked_up) = looked_up {
            spent.add(Step::Redis, looked_up.took);
        }
        let started = looked_up.map_or_else(Instant::now, |looked_up| looked_up.began);
        Self { id: given.cloned().unwrap_or_else(made), started, spent, _in_flight: OneMore::of(&metrics.inflight) }
    }

    /// The client left while this was being answered: says so in the log and in the span `here`.
    pub fn gave_up(&self, rules: &Rules, route: &str, parts: &request::Parts, client: IpAddr, here: Option<&Here>, outcome: &Outcome) {
        let head = self.elapsed();
        let told = || told(parts, route, outcome, CLIENT_LEFT, &self.id);
        if let Some(here) = here {
            let told = told();
            here.describe(told.name(), told.attributes(), false);
        }
        if rules.access == Access::Off && !rules.are_slow(head) {
            return;
        }
        let line = self.line(told(), client, head);
        if rules.are_slow(head) {
            line.write_slow(&self.spent);
        }
        if rules.access != Access::Off {
            line.write(0, false);
        }
    }

    /// The id, to be put into the response.
    #[must_use]
    pub fn take_id(&mut self) -> HeaderValue {
        std::mem::replace(&mut self.id, HeaderValue::from_static(""))
    }

    /// What the upstream is told of the request besides its own fields.
    #[must_use]
    pub const fn forwarding<'a>(
        &'a self,
        client: &'a Client,
        public: Option<&'a PublicUrl>,
        interim: Option<&'a InterimSender>,
    ) -> Forwarding<'a> {
        Forwarding { client, id: &self.id, public, interim }
    }

    /// Where its time goes.
    #[must_use]
    pub const fn spent(&self) -> &Spent {
        &self.spent
    }

    /// How long it has taken so far.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The head of the response is ready: logs the exchange, if it is one of those that are logged. A streamed response's line
    /// is written when its body ends, with the bytes that were sent. One that was slow gets a line of its own, now.
    #[must_use]
    pub fn end(
        &self,
        rules: &Rules,
        route: &str,
        parts: &request::Parts,
        client: IpAddr,
        response: Response<Reply>,
        outcome: &Outcome,
    ) -> Response<Reply> {
        let head = self.elapsed();
        let id = response.headers().get(REQUEST_ID).unwrap_or(&self.id);
        let told = || told(parts, route, outcome, response.status().as_u16(), id);
        if trace::is_on() {
            let told = told();
            trace::describe(told.name(), told.attributes(), response.status().is_server_error());
        }
        let is_slow = rules.are_slow(head);
        let is_logged = match rules.access {
            Access::All => true,
            Access::Errors => outcome.is_error() || response.status().is_server_error(),
            Access::Off => false,
        };
        if !is_logged && !is_slow {
            return response;
        }
        let line = self.line(told(), client, head);
        if is_slow {
            line.write_slow(&self.spent);
        }
        if is_logged { line.write_with(response) } else { response }
    }

    fn line(&self, told: Told<'_>, client: IpAddr, head: Duration) -> Line {
        let Told { method, target, rule, outcome, detail, status, id } = told;
        let (id, method, target, route) = (id.to_owned(), method.to_owned(), target.into_owned(), rule.to_owned());
        Line { id, client, method, target, route, outcome, detail, status, started: self.started, head }
    }
}

/// What the log and the span say of a request.
fn told<'a>(parts: &'a request::Parts, rule: &'a str, outcome: &'a Outcome, status: u16, id: &'a HeaderValue) -> Told<'a> {
    Told {
        method: shown_method(&parts.method),
        target: without_secrets(parts.uri.path_and_query().map_or("", |target| target.as_str())),
        rule,
        outcome: outcome.label().name(),
        detail: outcome.detail(),
        status,
        id: id.to_str().unwrap_or_default(),
    }
}

/// Whether an id that a client gave, of printable characters, is taken over.
#[must_use]
pub fn fits_as_id(id: &[u8]) -> bool {
    !id.is_empty() && id.len() <= MAX_ID
}

/// Sixteen hexadecimal digits that differ from every other request's: a random start for the process and thread, and
/// a count.
#[must_use]
pub fn new_id() -> [u8; 16] {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    thread_local!(static NEXT: Cell<u64> = Cell::new(PROCESS.get_or_init(|| fastrand::u64(..)) ^ fastrand::u64(..)));
    let number = NEXT.with(|next| next.replace(next.get().wrapping_add(1)));
    let mut text = [0; 16];
    for (at, digit) in text.iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[usize::from(number.to_be_bytes()[at / 2] >> (4 * (1 - at % 2)) & 15)];
    }
    text
}
