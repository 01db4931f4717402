//! The short way of a plain hit: from the bytes of a request to those of its answer, before the HTTP library sees them.
//!
//! A hit changes nothing, so that reading the request and writing the answer is nearly all there is to do.
//! This is the way of a request that
//!
//! * is one whole head, plain beyond doubt (`Fields::read`): a GET over HTTP/1.1, printable ASCII, whole line ends, one valid
//!   `Host`, no body, and no field but those whose meaning is known here;
//! * is served by a rule that answers all clients alike (`Known::of`): no limit counts it, no rollout or shadow, no timeline, no
//!   field of the request in the key but `Origin`;
//! * finds a fresh response in memory, or in Redis, which it waits for, in the form that it takes or small enough to be inflated on
//!   the spot, that has nothing to be rewritten.
//!
//! Whatever else comes gets [`Way::Library`]: then nothing has happened yet, nothing was counted, and the library reads the same
//! bytes; what was looked up for them goes along, so that nobody asks Redis twice.
//!
//! Why both ways answer alike: nothing is decided here. The target is read by `Target::parse`, the rule chosen by [`select`] and
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

use arc_swap::Guard;
use bytes::Bytes;
use http::header::{ETAG, ORIGIN};
use http::{Extensions, HeaderMap, HeaderValue, Method, StatusCode};
use memchr::memchr;
use tokio::time::Instant;

use super::Proxy;
use super::decide::{Admission, Decision, admit, decide, is_early};
use super::exchange::{fits_as_id, new_id};
use super::remembered::{Memo, read_target};
use super::respond::inflated_here;
use super::rules::Rules;
use super::span::Told;
use crate::body::lent;
use crate::cache::LookedUp;
use crate::cache::entry::{Content, Entry, Form, allocated};
use crate::cache::key::{Canonical, Key};
use crate::cache::ready::Moment;
use crate::clock::Wall;
use crate::config::Access;
use crate::config::route::{Rollout, select};
use crate::fetch::remembered::Heap;
use crate::http::conditional::is_listed;
use crate::http::encoding::takes_gzip;
use crate::request::secrets::without_secrets;
use crate::request::short_way::{ShortWay, Waiting, Way};
use crate::request::validate::is_host;
use crate::telemetry::metrics::{OneMore, OutcomeLabel};

/// The most fields of a plain request.
const MAX_FIELDS: usize = 64;
/// The longest name of a field that may occur in one, in bytes.
const MAX_NAME: usize = 32;

thread_local!(static MEMO: RefCell<Memo<Fields, Known>> = RefCell::default());

impl ShortWay for Proxy {
    fn answer(&self, bytes: &[u8], began: Instant, brought: Option<&Extensions>, head: &mut Vec<u8>) -> Way {
        let Some(plain) = self.read_plain(bytes) else { return Way::Library };
        let looked_up = brought.and_then(Extensions::get::<LookedUp>);
        let found = match looked_up {
            // The log says where the time of slow requests went.
            Some(looked_up) if plain.rules.are_slow(looked_up.took) => return Way::Library,
            Some(looked_up) => self.cache.found(looked_up, &plain.known.key.canonical).flatten(),
            None => self.cache.peek(&plain.known.key.canonical),
        };
        match found {
            Some(entry) => self.hit(&plain, &entry, began, head).map_or(Way::Library, |(body, reading)| Way::Answered(body, reading)),
            None if looked_up.is_none() => self.look_up_plain(&plain).map_or(Way::Library, Way::Wait),
            None => Way::Library,
        }
    }
}

impl Proxy {
    /// Reads a request; `None`: it goes the long way, as if it had not been here.
    fn read_plain<'b>(&self, bytes: &'b [u8]) -> Option<PlainRequest<'b>> {
        let (line, block) = cut_line(bytes)?;
        let target = std::str::from_utf8(line.strip_prefix(b"GET ")?.strip_suffix(b" HTTP/1.1")?).ok()?;
        let rules = self.rules.load();
        if rules.access == Access::All || self.cache.is_uncertain() {
            return None;
        }
        let (fields, remembered) = MEMO.with_borrow_mut(|memo| {
            let fields = memo.fields(block, Fields::read, Fields::repeats)?;
            let known = memo.find(&rules, target, fields.origin.as_deref());
            Some((fields, known))
        })?;
        let is_new = remembered.is_none();
        let known = remembered.or_else(|| Known::of(self, &rules, target, &fields))?;
        let by_directives = fields.directives && rules.routes[known.row].client_directives;
        let by_trace = fields.traced && self.tracer.is_some();
        (!by_directives && !by_trace).then_some(PlainRequest { target, fields, rules, known, is_new })
    }

    /// Looks up in Redis what memory has not, unless there is none, or that belongs into a trace.
    fn look_up_plain(&self, plain: &PlainRequest<'_>) -> Option<Waiting> {
        if self.tracer.is_some() || !self.cache.may_be_shared() {
            return None;
        }
        let (looking, in_flight) = (self.cache.look_up(Arc::clone(&plain.known.key)), OneMore::of(&self.metrics.inflight));
        Some(Box::pin(async move {
            let _in_flight = in_flight;
            let mut brought = Extensions::new();
            brought.insert(looking.await);
            brought
        }))
    }

    /// Answers with an entry, if that is a hit of which only what changes is to be filled in.
    fn hit(
        &self,
        plain: &PlainRequest<'_>,
        entry: &Arc<Entry>,
        began: Instant,
        head: &mut Vec<u8>,
    ) -> Option<(Bytes, Option<Arc<lent::Reading>>)> {
        let PlainRequest { target, fields, rules, known, is_new } = plain;
        let route = &rules.routes[known.row];
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
        let (status, body) = match stored.form(gzip) {
            _ if held => (StatusCode::NOT_MODIFIED, (Bytes::new(), None)),
            Form::Ready(body) => (stored.status, stored.lend(body)),
            Form::Inflate(_) => {
                let inflated = inflated_here(self.cache.store(), entry, stored, self.max_object)?;
                return self.hit(plain, &inflated, began, head);
            }
        };
        let ready = stored.head(gzip, held)?;
        let made = new_id();
        let id = fields.id.as_deref().filter(|id| fits_as_id(id)).unwrap_or(&made);
        ready.write(&Moment { age: entry.age(now), left: left.as_secs(), id, now }, head);
        self.hottest.note(target);
        self.metrics.record(&rules.rows, route.index, &route.name, OutcomeLabel::Hit, status.as_u16(), began.elapsed());
        if let Some(tracer) = self.tracer.as_ref().filter(|tracer| tracer.picks()) {
            let (rule, id, status) = (&route.name, str::from_utf8(id).unwrap_or_default(), status.as_u16());
            let target = without_secrets(target);
            let told = Told { method: "GET", target, rule, outcome: OutcomeLabel::Hit.name(), detail: "", status, id };
            tracer.over(began.elapsed(), told.name(), told.attributes());
        }
        if *is_new {
            MEMO.with_borrow_mut(|memo| memo.remember(rules, target, fields.origin.as_deref(), known.clone()));
        }
        Some(body)
    }
}

/// A plain request, as it was read.
struct PlainRequest<'b> {
    target: &'b str,
    fields: Rc<Fields>,
    rules: Guard<Arc<Rules>>,
    known: Known,
    /// Whether `known` was found out for it, and not remembered.
    is_new: bool,
}

/// What is known of a target: where its answer is stored, and the place of the rule that serves it.
#[derive(Clone)]
struct Known {
    key: Arc<Key>,
    row: usize,
}

impl Known {
    /// Finds it out; `None` for a target whose requests take the long way.
    fn of(proxy: &Proxy, rules: &Rules, target: &str, fields: &Fields) -> Option<Self> {
        let target = read_target(target).ok()?;
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
        let is_limited = rules.limits.any(route.index) || rules.limited_beside(&target).is_some();
        let for_all_alike = route.rollout == Rollout::ALL && route.request_fields.listed().is_empty() && !is_limited;
        (for_all_alike && !route.shadow && !by_timeline).then(|| {
            let canonical = Canonical::new(route, &target, &headers);
            Self { key: Arc::new(Key::new(route, &target, canonical)), row: route.index }
        })
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

    /// Whether clients may send the same again: an id is another one each time, and so is a trace.
    const fn repeats(&self) -> bool {
        self.id.is_none() && !self.traced
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

impl Heap for Fields {
    fn heap(&self) -> usize {
        [&self.origin, &self.none_match, &self.id].into_iter().flatten().map(|text| allocated(text.len())).sum()
    }
}

impl Heap for Known {
    fn heap(&self) -> usize {
        let Key { canonical, readable, tags, .. } = &*self.key;
        let tags: usize = tags.iter().map(|tag| size_of::<String>() + allocated(tag.len())).sum();
        // Its name in Redis is about as long as what is readable.
        allocated(size_of::<Key>() + 16) + allocated(canonical.0.len()) + 2 * allocated(readable.len()) + tags
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
