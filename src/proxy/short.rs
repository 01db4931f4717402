//! The short way of a plain hit: from the bytes of a request to those of its answer, before the HTTP library sees them.
//!
//! A hit changes nothing and waits for nothing, so that reading the request and writing the answer is nearly all there is to do.
//! This is the way of a request that
//!
//! * is one whole head, plain beyond doubt (`Fields::read`): a GET over HTTP/1.1, printable ASCII, whole line ends, one valid
//!   `Host`, no body, and no field but those whose meaning is known here;
//! * is served by a rule that answers all clients alike (`Known::of`): no limit counts it, no rollout or shadow, no timeline, no
//!   field of the request in the key but `Origin`;
//! * finds a fresh response in memory, in the form that it takes, that has nothing to be rewritten.
//!
//! Whatever else comes gets `None`: then nothing has happened yet, nothing was counted, and the library reads the same bytes.
//!
//! Why both ways answer alike: nothing is decided here. The target is read by [`Target::parse`], the rule chosen by [`select`] and
//! [`admit`], the key made by [`Canonical::new`], what is void kept back by `Cache::peek`, freshness judged by [`decide`], conditions
//! and codings by [`is_listed`] and [`takes_gzip`]; and the head is made from the very fields that the library would be given
//! ([`crate::cache::ready`]). What was read is remembered under the very bytes that it was read from, the fields of a head in one
//! piece, and the target with `Origin` for as long as the same rules serve (`Memo`). A test sends random and broken requests by
//! both ways and compares.

use std::cell::RefCell;
use std::iter::once;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ETAG, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use memchr::memchr;
use tokio::time::Instant;

use super::Proxy;
use super::decide::{Admission, Decision, admit, decide, is_early};
use super::exchange::{fits_as_id, new_id};
use super::rules::Rules;
use super::span::Told;
use super::targets::{Remembered, remembered};
use crate::cache::entry::{Content, Form};
use crate::cache::key::Canonical;
use crate::cache::ready::Moment;
use crate::clock::Wall;
use crate::config::Access;
use crate::config::route::{Rollout, select};
use crate::http::conditional::is_listed;
use crate::http::encoding::takes_gzip;
use crate::request::target::Target;
use crate::request::validate::is_host;
use crate::telemetry::metrics::OutcomeLabel;

/// The most fields of a plain request.
const MAX_FIELDS: usize = 64;
/// The longest name of a field that may occur in one, in bytes.
const MAX_NAME: usize = 32;
/// Blocks of fields that each thread remembers (of at most the bytes that the front reads at once).
const BLOCKS: usize = 512;
/// Targets that each thread remembers, and how long they may be, in bytes.
const TARGETS: usize = 2048;
const MAX_TARGET: usize = 1024;

thread_local!(static MEMO: RefCell<Memo> = RefCell::new(Memo::default()));

impl Proxy {
    /// Answers a plain request (of which `bytes` are all that came) with a hit: appends the head to `head` and returns the body.
    /// `None`: it goes the long way, as if it had not been here.
    pub fn answer_plain(&self, bytes: &[u8], began: Instant, head: &mut Vec<u8>) -> Option<Bytes> {
        let (line, block) = cut_line(bytes)?;
        let target = std::str::from_utf8(line.strip_prefix(b"GET ")?.strip_suffix(b" HTTP/1.1")?).ok()?;
        let rules = self.rules.load();
        if rules.access == Access::All || self.cache.is_uncertain() {
            return None;
        }
        let (fields, remembered) = MEMO.with_borrow_mut(|memo| {
            let fields = memo.fields(block)?;
            let known = memo.find(&rules, target, &fields);
            Some((fields, known))
        })?;
        let is_new = remembered.is_none();
        let known = remembered.or_else(|| Known::of(self, &rules, target, &fields))?;
        let route = &rules.routes[known.row];
        if fields.directives && route.client_directives || fields.traced && self.tracer.is_some() {
            return None;
        }
        let entry = self.cache.peek(&known.canonical)?;
        let Content::Response(stored) = &entry.content else { return None };
        let now = Wall::now();
        let Decision::Hit(left) = decide(Ok((entry.stored_at, entry.lifetimes)), now, || true) else { return None };
        let cost = Duration::from_millis(u64::from(entry.cost));
        if self.refresh_early && is_early(left, entry.lifetimes.fresh, cost, || 0.0) {
            return None;
        }
        let names = |list: &[u8]| is_listed(list, stored.fields.get(ETAG));
        let held = stored.status == StatusCode::OK && fields.none_match.as_deref().is_some_and(names);
        let gzip = fields.gzip.unwrap_or(false);
        let ready = stored.ready(gzip, held).head()?;
        let (status, body) = match stored.form(gzip) {
            _ if held => (StatusCode::NOT_MODIFIED, Bytes::new()),
            Form::Ready(body) => (stored.status, body.clone()),
            Form::Inflate(_) => return None,
        };
        let made = new_id();
        let id = fields.id.as_deref().filter(|id| fits_as_id(id)).unwrap_or(&made);
        ready.write(&Moment { age: entry.age(now), left: left.as_secs(), id, now }, head);
        self.hottest.note(target);
        self.metrics.record(&rules.rows, route.index, &route.name, OutcomeLabel::Hit, status.as_u16(), began.elapsed());
        if let Some(tracer) = self.tracer.as_ref().filter(|tracer| tracer.picks()) {
            let (rule, id, status) = (&route.name, str::from_utf8(id).unwrap_or_default(), status.as_u16());
            let told = Told { method: "GET", target, rule, outcome: OutcomeLabel::Hit.name(), detail: "", status, id };
            tracer.over(began.elapsed(), told.name(), told.attributes());
        }
        if is_new {
            MEMO.with_borrow_mut(|memo| memo.remember(&rules, target, &fields, known));
        }
        Some(body)
    }
}

/// What is known of a target: where its answer is stored, and the place of the rule that serves it.
#[derive(Clone)]
struct Known {
    canonical: Canonical,
    row: usize,
}

impl Known {
    /// Finds it out; `None` for a target whose requests take the long way.
    fn of(proxy: &Proxy, rules: &Rules, target: &str, fields: &Fields) -> Option<Self> {
        let target = Target::parse(target).ok()?;
        if proxy.own.owns(&target.path) {
            return None;
        }
        let mut headers = HeaderMap::new();
        if let Some(origin) = &fields.origin {
            headers.insert(ORIGIN, HeaderValue::from_bytes(origin).ok()?);
        }
        let doubtful = target.doubtful;
        let admission =
            Admission { method: &Method::GET, headers: &headers, has_body: false, doubtful, head_as_get: proxy.head_as_get, client: None };
        let route = admit(select(&rules.routes, &target), admission).ok()?;
        let by_timeline = route.timeline && proxy.timeline.is_some();
        let for_all_alike = route.rollout == Rollout::ALL && route.request_fields.listed().is_empty() && !rules.limits.any(route.index);
        (for_all_alike && !route.shadow && !by_timeline)
            .then(|| Self { canonical: Canonical::new(route, &target, &headers), row: route.index })
    }
}

/// What a thread remembers: of blocks of fields, which clients send again and again, and of targets for which there were hits.
struct Memo {
    blocks: Remembered<Box<[u8]>, Option<Rc<Fields>>>,
    targets: Remembered<Box<[u8]>, Known>,
    /// The rules under which `targets` holds.
    rules: Option<Arc<Rules>>,
    /// The key of the target at hand, in memory that is used again.
    key: Vec<u8>,
}

impl Default for Memo {
    fn default() -> Self {
        Self { blocks: remembered(BLOCKS), targets: remembered(TARGETS), rules: None, key: Vec::new() }
    }
}

impl Memo {
    /// What a block of fields says, with the empty line that ends it; `None` if it is not plain.
    fn fields(&mut self, block: &[u8]) -> Option<Rc<Fields>> {
        if let Some(known) = self.blocks.get(block) {
            return known.clone();
        }
        let fields = Fields::read(block).map(Rc::new);
        // An id is another one each time, and so is a trace.
        if fields.as_ref().is_none_or(|fields| fields.id.is_none() && !fields.traced) {
            self.blocks.insert(block.into(), fields.clone());
        }
        fields
    }

    fn find(&mut self, rules: &Arc<Rules>, target: &str, fields: &Fields) -> Option<Known> {
        if !self.rules.as_ref().is_some_and(|held| Arc::ptr_eq(held, rules)) {
            self.targets.clear();
            self.rules = Some(Arc::clone(rules));
        }
        self.set_key(target, fields);
        self.targets.get(&self.key[..]).cloned()
    }

    fn remember(&mut self, rules: &Arc<Rules>, target: &str, fields: &Fields, known: Known) {
        self.set_key(target, fields);
        if self.key.len() <= MAX_TARGET && self.rules.as_ref().is_some_and(|held| Arc::ptr_eq(held, rules)) {
            self.targets.insert(self.key.as_slice().into(), known);
        }
    }

    /// Neither a target nor an origin has a line end in it.
    fn set_key(&mut self, target: &str, fields: &Fields) {
        self.key.clear();
        self.key.extend_from_slice(target.as_bytes());
        if let Some(origin) = &fields.origin {
            self.key.push(b'\n');
            self.key.extend_from_slice(origin);
        }
    }
}

/// What the fields of a plain request say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// `Origin`.
    pub origin: Option<Box<[u8]>>,
    /// Whether gzip is taken; `None` if nothing is said of codings.
    pub gzip: Option<bool>,
    /// `If-None-Match`.
    pub none_match: Option<Box<[u8]>>,
    /// `X-Request-Id`.
    pub id: Option<Box<[u8]>>,
    /// Whether it says what it wants of a cache.
    pub directives: bool,
    /// Whether it says which trace it belongs to.
    pub traced: bool,
}

impl Fields {
    /// Reads what follows a request line: `None` unless it is fields whose meaning is known, the empty line, and nothing else.
    #[must_use]
    pub fn read(block: &[u8]) -> Option<Self> {
        if !block.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\r' | b'\n')) {
            return None;
        }
        let (mut fields, mut rest, mut hosts) = (Self::default(), block, 0);
        for _ in 0..MAX_FIELDS {
            let (line, after) = cut_line(rest)?;
            rest = after;
            if line.is_empty() {
                // Nothing follows, and there is one authority (RFC 9112 §3.2).
                return (rest.is_empty() && hosts == 1).then_some(fields);
            }
            let colon = memchr(b':', line)?;
            let mut lower = [0; MAX_NAME];
            let name = lower.get_mut(..colon)?;
            name.copy_from_slice(&line[..colon]);
            name.make_ascii_lowercase();
            hosts += u8::from(name == b"host");
            if line.contains(&b'\r') || !fields.take(name, line[colon + 1..].trim_ascii()) {
                return None;
            }
        }
        None
    }

    /// Takes a field in; `false` for one that may make a difference of which nothing is known here, or that contradicts another one.
    fn take(&mut self, name: &[u8], value: &[u8]) -> bool {
        let noted = match name {
            b"host" => return is_host(value),
            b"connection" => return value.eq_ignore_ascii_case(b"keep-alive"),
            b"accept-encoding" => return self.gzip.replace(takes_gzip(once(value))).is_none(),
            b"if-none-match" => &mut self.none_match,
            b"origin" => &mut self.origin,
            b"x-request-id" => &mut self.id,
            b"cache-control" | b"pragma" => {
                self.directives = true;
                return true;
            }
            b"traceparent" => {
                self.traced = true;
                return true;
            }
            _ => return INDIFFERENT.contains(&name),
        };
        noted.replace(value.into()).is_none()
    }
}

/// Fields that describe the client, or claim who it is: in no key, and nothing that a hit depends on.
#[rustfmt::skip]
const INDIFFERENT: [&[u8]; 25] = [
    b"user-agent", b"accept", b"accept-language", b"referer", b"cookie", b"dnt", b"priority", b"save-data",
    b"tracestate", b"upgrade-insecure-requests", b"x-requested-with", b"sec-gpc", b"sec-fetch-site", b"sec-fetch-mode",
    b"sec-fetch-dest", b"sec-fetch-user", b"sec-ch-ua", b"sec-ch-ua-mobile", b"sec-ch-ua-platform", b"x-forwarded-for",
    b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port", b"x-real-ip", b"forwarded",
];

/// The first line of `bytes`, which must end in CR LF, and what follows it.
fn cut_line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr(b'\n', bytes)?;
    Some((bytes[..end].strip_suffix(b"\r")?, &bytes[end + 1..]))
}
