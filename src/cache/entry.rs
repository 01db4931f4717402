//! What is stored under a key.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, ETAG, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED, VARY};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::key::{Canonical, Key};
use super::ready::{Head, Ready};
use super::void::effect::Effect;
use super::void::moment::Moment;
use crate::aside;
use crate::body::lent::{LARGE, Lender, Reading};
use crate::clock::Wall;
use crate::http::conditional::weaken;
use crate::http::encoding::{Coding, gunzip, inflation_limit, told_length};
use crate::http::freshness::Lifetimes;

/// What is stored under a key, with everything that is needed to judge it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The canonical request that it answers; compared when it is read from Redis.
    pub canonical: Bytes,
    /// The readable part of its key.
    pub readable: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// What an invalidation names it by ([`Key::target`]).
    pub target: u64,
    /// When the upstream was asked for it: if something was voided since that concerns it, it is not to be used.
    pub asked_at: Moment,
    /// When it was stored.
    pub stored_at: Wall,
    /// How old it already was then, in seconds (`Age` of the upstream's response).
    pub age_when_stored: u32,
    /// How long it took to get it, in milliseconds.
    pub cost: u32,
    /// How long it may be used from then.
    pub lifetimes: Lifetimes,
    /// The response, or where to look for it.
    pub content: Content,
    /// The newest void that it was checked against.
    pub checked: Checked,
}

/// The response, or where to look for it.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "nearly every entry is a response, and a hit should not follow one pointer more")]
pub enum Content {
    /// A response.
    Response(StoredResponse),
    /// The response varies by these request fields: look under the key's variant (RFC 9111 §4.1).
    Varies(Vec<HeaderName>),
}

/// A stored response, ready to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredResponse {
    /// Its status.
    pub status: StatusCode,
    /// End-to-end fields as the upstream sent them, with `Via` and an `ETag`; without `Content-Encoding`,
    /// unless the coding is opaque.
    pub fields: HeaderMap,
    /// The coding of `body`.
    pub coding: Coding,
    /// The coding in which the upstream sent it; its `ETag` is strong for that one alone.
    pub sent_coding: Coding,
    /// The bytes, coded.
    pub body: Bytes,
    /// The identity bytes too, once they have been asked for often enough to be kept.
    pub plain: Option<Bytes>,
    /// What lends its bytes to clients, if they are many.
    lender: Option<Lender>,
    /// Whether a client has taken all identity bytes.
    taken: Taken,
    /// The heads with which it is sent, each made when it first is: plain, coded, and each as a 304. `None`: not one that can be kept as bytes.
    heads: [OnceLock<Option<Box<Head>>>; 4],
}

/// Whether a client has taken all of something. Clones are of one.
#[derive(Clone, Debug, Default)]
pub struct Taken(Arc<AtomicBool>);

impl Taken {
    /// A client has.
    pub fn note(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether one has since this was asked last.
    #[must_use]
    pub fn take(&self) -> bool {
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }
}

/// It is no part of what two responses are compared by.
impl PartialEq for Taken {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl StoredResponse {
    /// A stored response.
    #[must_use]
    pub fn new(status: StatusCode, mut fields: HeaderMap, coding: Coding, sent_coding: Coding, body: Bytes) -> Self {
        if coding != Coding::Opaque {
            fields.remove(CONTENT_ENCODING);
        }
        let lender = Lender::new(body.len());
        Self { status, coding, sent_coding, body, plain: None, lender, taken: Taken::default(), heads: Default::default(), fields }
    }

    /// The same response with its identity bytes packed.
    #[must_use]
    pub fn packed(&self, packed: Bytes) -> Self {
        let lender = Lender::new(packed.len());
        Self { coding: Coding::Gzip, body: packed, plain: None, lender, heads: Default::default(), ..self.clone() }
    }

    /// The same response with its identity bytes at hand too.
    #[must_use]
    pub fn with_plain(&self, plain: Bytes) -> Self {
        // The coded bytes are another response's still, which lends them by itself.
        let lender = Lender::new(plain.len());
        Self { plain: Some(plain), lender, heads: Default::default(), ..self.clone() }
    }

    /// The body as the upstream meant it, without gzip (another coding stays); `None` if it is damaged or larger than
    /// `max_object` allows. Inflated where it holds up no request.
    pub async fn inflated(&self, max_object: usize) -> Option<Bytes> {
        match (self.coding, &self.plain) {
            (Coding::Identity | Coding::Opaque, _) => Some(self.body.clone()),
            (Coding::Gzip, Some(plain)) => Some(plain.clone()),
            (Coding::Gzip, None) => {
                let (coded, limit) = (self.body.clone(), self.inflation_limit(max_object));
                aside::run(move || gunzip(&coded, limit)).await?.ok()
            }
        }
    }

    /// The most bytes to which the body may inflate. What Sluice packed itself it may inflate, however well it packed: only the
    /// ratio of what an upstream packed tells of a bomb.
    #[must_use]
    pub fn inflation_limit(&self, max_object: usize) -> usize {
        match (self.coding, self.sent_coding) {
            (Coding::Gzip, Coding::Identity) => max_object.saturating_mul(4),
            _ => inflation_limit(self.body.len(), max_object),
        }
    }

    /// How many identity bytes there are, where that is known without inflating them.
    #[must_use]
    pub fn plain_length(&self) -> Option<usize> {
        match (self.coding, self.sent_coding) {
            (Coding::Gzip, Coding::Identity) => Some(told_length(&self.body)),
            (Coding::Gzip, _) => None,
            _ => Some(self.body.len()),
        }
    }

    /// Whether a client has taken all identity bytes, as they were inflated for it.
    #[must_use]
    pub const fn taken(&self) -> &Taken {
        &self.taken
    }

    /// The body for a client, and whether it must first be inflated.
    #[must_use]
    pub fn form(&self, gzip_accepted: bool) -> Form<'_> {
        match (self.coding, &self.plain) {
            (Coding::Gzip, Some(plain)) if !gzip_accepted => Form::Ready(plain),
            (Coding::Gzip, None) if !gzip_accepted => Form::Inflate(&self.body),
            _ => Form::Ready(&self.body),
        }
    }

    /// The body of one of its forms, for a client that reads it.
    #[must_use]
    pub fn lend(&self, body: &Bytes) -> (Bytes, Option<Arc<Reading>>) {
        match &self.lender {
            Some(lender) if body.len() >= LARGE => {
                let (bytes, reading) = lender.lend(body);
                (bytes, Some(reading))
            }
            _ => (body.clone(), None),
        }
    }

    /// The head for a client that takes gzip or not, and that holds the response already or not; `None` if a hit takes more than filling in what
    /// changes.
    #[must_use]
    pub fn head(&self, gzip_accepted: bool, not_modified: bool) -> Option<&Head> {
        let coded = gzip_accepted && self.coding == Coding::Gzip;
        let head = &self.heads[usize::from(coded) + 2 * usize::from(not_modified)];
        head.get_or_init(|| self.ready(gzip_accepted, not_modified).head().map(Box::new)).as_deref()
    }

    /// The same as fields.
    #[must_use]
    pub fn ready(&self, gzip_accepted: bool, not_modified: bool) -> Ready {
        let coded = gzip_accepted && self.coding == Coding::Gzip;
        let fields = self.sent_fields(if coded { Coding::Gzip } else { Coding::Identity });
        if not_modified {
            return Ready::not_modified(fields);
        }
        let length = match self.form(coded) {
            Form::Ready(body) => Some(body.len()),
            Form::Inflate(_) => None,
        };
        Ready::new(self.status, fields, length)
    }

    /// How many bytes it takes beside its own struct, with the forms in which most are sent: one as a whole, and one that says that the client has it.
    fn weight(&self) -> usize {
        const FORMS: usize = 2;
        let (count, text) =
            self.fields.iter().fold((0, 0), |(count, text), (name, value)| (count + 1, text + name.as_str().len() + value.len()));
        let values = shared(text) + 64;
        let form = allocated(size_of::<Head>()) + allocated(text + count * 4 + ADDED) + allocated(PLACES);
        let plain = self.plain.as_ref().map_or(0, |plain| shared(plain.len()));
        shared(self.body.len()) + plain + map_of(count) + values + FORMS * form
    }

    /// The fields as they are sent with the body in this coding.
    fn sent_fields(&self, form: Coding) -> HeaderMap {
        let mut fields = self.fields.clone();
        if self.coding == Coding::Gzip {
            vary_by_encoding(&mut fields);
        }
        if form == Coding::Gzip {
            fields.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        if form != self.sent_coding
            && self.coding != Coding::Opaque
            && let Some(tag) = self.fields.get(ETAG)
        {
            fields.insert(ETAG, weaken(tag));
        }
        fields
    }
}

/// What a head has besides the fields that are stored, in bytes: the status line, and those that a hit sets. And the places of these.
const ADDED: usize = 128;
const PLACES: usize = 96;
/// A field's name in a list.
const NAME: usize = 32;

/// What the allocator takes for this many bytes: whole pages, or for less than four of them a class of sizes, of which there are four between
/// one power of two and the next (<https://jemalloc.net/jemalloc.3.html#size_classes>).
#[must_use]
pub const fn allocated(bytes: usize) -> usize {
    const PAGE: usize = 4 << 10;
    const SMALLEST: usize = 16;
    match bytes {
        0 => 0,
        1..=SMALLEST => SMALLEST,
        _ if bytes > 4 * PAGE => bytes.next_multiple_of(PAGE),
        _ => {
            let between = (bytes - 1).ilog2() - 2;
            let step = if between < SMALLEST.ilog2() { SMALLEST } else { 1 << between };
            bytes.next_multiple_of(step)
        }
    }
}

/// The same for bytes that are shared, whose owners are counted beside them.
const fn shared(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { allocated(bytes) + 32 }
}

/// What a map of this many fields takes besides their values: a table that has places for those that are set when it is sent, and a
/// place for each.
const fn map_of(fields: usize) -> usize {
    const PLACE: usize = 104;
    let most = fields + 6;
    allocated((most + most / 3).next_power_of_two() * 4) + allocated(fields * PLACE)
}

/// The newest void that an entry was checked against, so that it is checked once against each. It belongs to this process: it is no
/// part of what two entries are compared by, and is not written to Redis.
#[derive(Debug, Default)]
pub struct Checked(AtomicU64);

impl Checked {
    /// Up to which void the entry was checked.
    #[must_use]
    pub fn until(&self) -> Moment {
        Moment::at(self.0.load(Ordering::Relaxed))
    }

    /// Notes that it was checked against every void up to `newest`.
    pub fn note(&self, newest: Moment) {
        self.0.fetch_max(newest.number(), Ordering::Relaxed);
    }
}

impl Clone for Checked {
    fn clone(&self) -> Self {
        Self(AtomicU64::new(self.0.load(Ordering::Relaxed)))
    }
}

impl PartialEq for Checked {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A body in the form that a client takes.
#[derive(Debug)]
pub enum Form<'a> {
    /// These bytes.
    Ready(&'a Bytes),
    /// These bytes, inflated.
    Inflate(&'a Bytes),
}

/// Adds `Accept-Encoding` to `Vary`, unless it is there.
pub fn vary_by_encoding(headers: &mut HeaderMap) {
    let named = headers
        .get_all(VARY)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .any(|name| name.trim_ascii().eq_ignore_ascii_case(b"accept-encoding") || name.trim_ascii() == b"*");
    if !named {
        headers.append(VARY, HeaderValue::from_static("Accept-Encoding"));
    }
}

impl Entry {
    /// An entry under `key`.
    #[must_use]
    pub fn new(key: &Key, asked_at: Moment, stored_at: Wall, age_when_stored: u32, lifetimes: Lifetimes, content: Content) -> Self {
        Self {
            canonical: key.canonical.0.clone(),
            readable: key.readable.clone(),
            tags: key.tags.clone(),
            target: key.target,
            asked_at,
            stored_at,
            age_when_stored,
            cost: 0,
            lifetimes,
            content,
            checked: Checked::default(),
        }
    }

    /// The key that it is stored under.
    #[must_use]
    pub fn key(&self) -> Key {
        Key::of(Canonical(self.canonical.clone()), self.readable.clone(), self.tags.clone(), self.target)
    }

    /// How many bytes it takes in memory: all that it allocates, and the allocator's and the map's share. A test fills memory with entries and
    /// compares.
    #[must_use]
    pub fn weight(&self) -> u64 {
        /// Its place in the map of the tier in memory, and what that remembers of keys that are gone.
        const PLACE: usize = 160;
        let content = match &self.content {
            Content::Response(response) => response.weight(),
            Content::Varies(names) => names.iter().map(|name| NAME + name.as_str().len()).sum(),
        };
        let tags: usize = self.tags.iter().map(|tag| size_of::<String>() + allocated(tag.len())).sum();
        (PLACE + allocated(size_of::<Self>()) + shared(self.canonical.len()) + allocated(self.readable.len()) + tags + content) as u64
    }

    /// Its age at `now`, in whole seconds (RFC 9111 §4.2.3).
    #[must_use]
    pub fn age(&self, now: Wall) -> u64 {
        u64::from(self.age_when_stored).saturating_add(now.since(self.stored_at).as_secs())
    }

    /// Whether it may be served at `now` if the upstream fails (RFC 5861 §4).
    #[must_use]
    pub fn may_replace_errors(&self, now: Wall) -> bool {
        now.since(self.stored_at) < self.lifetimes.fresh.saturating_add(self.lifetimes.stale_if_error)
    }

    /// The conditions of a request that validates it, from the upstream's own validators (RFC 9111 §4.3.1). Empty if it has
    /// none.
    #[must_use]
    pub fn conditions(&self) -> HeaderMap {
        let mut conditions = HeaderMap::new();
        if let Content::Response(response) = &self.content
            && !self.lifetimes.validatable.is_zero()
        {
            let fields = [(ETAG, IF_NONE_MATCH), (LAST_MODIFIED, IF_MODIFIED_SINCE)];
            for (validator, condition) in fields {
                if let Some(value) = response.fields.get(validator) {
                    conditions.insert(condition, value.clone());
                }
            }
        }
        conditions
    }

    /// Whether the upstream was asked for `other` after it was asked for this one, and answered that first. An entry that was read from
    /// Redis counts as asked for when it was read; so it must also have been stored since this one was asked for. Its cost is in whole
    /// milliseconds, 0 for a quick upstream: the one in which it was asked for counts.
    #[must_use]
    pub fn is_overtaken_by(&self, other: &Self) -> bool {
        other.asked_at > self.asked_at && self.stored_at.since(other.stored_at) <= Duration::from_millis(u64::from(self.cost))
    }

    /// The same entry, stale from `now` on, as if it was asked for at `asked_at`. What is in doubt is not served while it is revalidated.
    #[must_use]
    pub fn expired(&self, now: Wall, asked_at: Moment, effect: Effect) -> Self {
        let age = u32::try_from(self.age(now)).unwrap_or(u32::MAX);
        let left = self.lifetimes.kept().saturating_sub(now.since(self.stored_at));
        let while_revalidated = if effect == Effect::Doubt { Duration::ZERO } else { self.lifetimes.stale_while_revalidate };
        let lifetimes = Lifetimes {
            fresh: Duration::ZERO,
            stale_while_revalidate: while_revalidated.min(left),
            stale_if_error: self.lifetimes.stale_if_error.min(left),
            validatable: self.lifetimes.validatable.min(left),
        };
        Self { asked_at, stored_at: now, age_when_stored: age, lifetimes, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_allocator() {
        let sizes = [
            (0, 0),
            (1, 16),
            (16, 16),
            (17, 32),
            (65, 80),
            (129, 160),
            (200, 224),
            (1025, 1280),
            (14_000, 14_336),
            (16_385, 20_480),
            (1 << 20, 1 << 20),
        ];
        for (bytes, taken) in sizes {
            assert_eq!(allocated(bytes), taken, "{bytes}");
        }
    }

    #[test]
    fn a_recoded_form_has_a_weak_tag_and_varies() {
        let mut fields = HeaderMap::new();
        fields.insert(ETAG, HeaderValue::from_static("\"x\""));
        let response = StoredResponse::new(StatusCode::OK, fields, Coding::Gzip, Coding::Identity, Bytes::from_static(b"z"));
        let (coded, plain) = (response.ready(true, false).fields, response.ready(false, false).fields);
        assert_eq!((&coded[ETAG], &plain[ETAG]), (&HeaderValue::from_static("W/\"x\""), &HeaderValue::from_static("\"x\"")));
        assert_eq!((coded[VARY].as_bytes(), plain[VARY].as_bytes()), (&b"Accept-Encoding"[..], &b"Accept-Encoding"[..]));
        assert_eq!(coded[CONTENT_ENCODING], "gzip");
        assert!(!plain.contains_key(CONTENT_ENCODING) && matches!(response.form(false), Form::Inflate(_)));
        assert!(response.head(true, false).is_some() && response.head(false, false).is_none());
        let inflated = response.with_plain(Bytes::from_static(b"plain"));
        assert!(inflated.head(false, false).is_some());
    }
}
