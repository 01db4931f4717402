//! From a whole body to a stored response: checked, compressed, with a validator, under every key by which it will be asked
//! for. A large one is in memory as it came before it is compressed.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT_LANGUAGE, AGE, ETAG, VIA};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::collapse::Leader;
use super::fill::Fill;
use super::{Fetcher, Job};
use crate::aside::{self, ToPack};
use crate::cache::entry::{Content, Entry, StoredResponse};
use crate::cache::key::Key;
use crate::clock::{Wall, millis};
use crate::http::cache_control::CacheControl;
use crate::http::conditional::etag_of;
use crate::http::encoding::{self, Coding};
use crate::http::freshness::Lifetimes;
use crate::http::headers::age;
use crate::http::vary::content_language;
use crate::telemetry::seldom::Seldom;
use crate::upstream::response_fields::OWN_VIA;

/// Such a body may come as often as it is asked for.
static NO_GZIP: Seldom = Seldom::new();

/// Bodies from this size on are compressed where they hold up no request.
const COMPRESS_ELSEWHERE: usize = 64 << 10;
/// Bodies from this size on are digested there.
const DIGEST_ELSEWHERE: usize = 256 << 10;
/// Coded bodies from this size on are inflated there: they may be hundreds of times as large.
const INFLATE_ELSEWHERE: usize = 4 << 10;

/// Fields that a stored response gets, and those that are set when it is sent.
const MORE: usize = 6;

impl Fetcher {
    /// Stores the body of a fill, and says what was made of it. The leader, if there is one, lives until the entry can be found.
    pub(super) async fn store(&self, job: &Job, leader: Option<Leader>, fill: &Arc<Fill>, bytes: Bytes, lifetimes: Lifetimes) {
        let Some(mut body) = self.prepare(fill, bytes).await else {
            if let Some(left_out) = NO_GZIP.next() {
                let route = &*job.party.rule;
                tracing::warn!(route, left_out, "the backend's gzip body is not valid or inflates too far; it was not stored");
            }
            return fill.settle(None);
        };
        let head = &fill.head;
        let mut fields = with_own_memory(&head.fields);
        // It ages from when its head came, however long its body takes (RFC 9111 §4.2.3). How long the upstream took for the head is not
        // counted: what is fresh for as long as it takes would never be.
        let elapsed = head.came.elapsed();
        let age_when_stored = u32::try_from(age(&fields).saturating_add(elapsed).as_secs()).unwrap_or(u32::MAX);
        let lifetimes = lifetimes.after(elapsed);
        fields.remove(AGE);
        fields.append(VIA, OWN_VIA);
        if let Some(etag) = body.etag.take() {
            fields.entry(ETAG).or_insert(etag);
        }
        // The clone has room for no more fields than there are.
        let response = |body: &PreparedBody| {
            Content::Response(StoredResponse::new(head.status, fields.clone(), body.coding, head.coding, body.bytes.clone()))
        };
        let now = Wall::now();
        let cost = u32::try_from(millis(job.began.elapsed())).unwrap_or(u32::MAX);
        let entry = |key: &Key, content: Content| {
            Arc::new(Entry { cost, ..Entry::new(key, job.asked_at, now, age_when_stored, lifetimes, content) })
        };
        let (names, _) = &head.vary;
        let key = if names.is_empty() { job.key.clone() } else { job.key.variant(names, &job.selecting) };
        let mut stored = entry(&key, response(&body));
        let packing = std::mem::replace(&mut body.packing, Packing::None);
        let is_for_later = matches!(packing, Packing::Later);
        if let Packing::Next(room) = packing {
            // Nobody waits for that.
            self.cache.keep(&key, &stored);
            fill.settle(Some(Arc::clone(&stored)));
            body.pack(room).await;
            stored = entry(&key, response(&body));
        }
        // Those who prefer this language to all others get the response too.
        let language = content_language(&head.fields).filter(|_| job.match_language && names[..] == [ACCEPT_LANGUAGE]);
        let also = language.map(|language| job.key.language(&language));
        // Memory has them as soon as `put` is called, before the last client goes on; Redis gets them meanwhile.
        let writing = self.cache.put(&key, Arc::clone(&stored));
        let also_writing = also.as_ref().map(|key| {
            let entry = Arc::new(Entry { canonical: key.canonical.0.clone(), ..Entry::clone(&stored) });
            self.cache.put(key, entry)
        });
        let marker = (!names.is_empty()).then(|| entry(&job.key, Content::Varies(names.clone())));
        let marking = marker.map(|marker| self.cache.put(&job.key, marker));
        fill.settle(Some(Arc::clone(&stored)));
        drop(body);
        self.uncacheable.remove(&job.collapse_key);
        self.unstored.remove(&job.collapse_key);
        match lifetimes.fresh.is_zero() {
            // The next request would have it revalidated at once, and the one after that, without end.
            true => self.failing.stored_stale(&job.collapse_key, job.began.elapsed()),
            false => self.failing.stored(&job.collapse_key),
        }
        // Whoever comes from now on finds it in memory, and is not given what may be old by the time that Redis has it.
        let leader = leader.filter(|_| self.cache.peek(&key.canonical).is_none());
        // What it replaces may stand under another key: the upstream names other fields in `Vary` now, or none.
        let others = |entry: &&Arc<Entry>| {
            [Some(&key), also.as_ref(), Some(&job.key)].iter().flatten().all(|key| key.canonical.0 != entry.canonical)
        };
        if let Some(replaced) = job.replaced.as_ref().filter(others) {
            self.cache.end(&replaced.key()).await;
        }
        writing.await;
        if let Some(writing) = also_writing {
            writing.await;
        }
        if let Some(marking) = marking {
            marking.await;
        }
        drop(leader);
        if is_for_later {
            self.pack_later(&stored);
        }
    }

    /// Packs a body that is in memory, when those are packed that came before. Until then nothing is kept for that but a place in a queue.
    fn pack_later(&self, entry: &Arc<Entry>) {
        let Ok(place) = Arc::clone(&self.to_pack).try_acquire_owned() else { return };
        let (entry, cache) = (Arc::downgrade(entry), Arc::clone(&self.cache));
        self.runtime.spawn(async move {
            let packing = aside::pack(move || {
                // Unless it is gone from memory by now.
                let entry = entry.upgrade()?;
                let Content::Response(response) = &entry.content else { return None };
                let content = Content::Response(response.packed(packed(&response.body)?));
                let packed = Arc::new(Entry { content, ..Entry::clone(&entry) });
                Some((entry, packed))
            });
            if let Some(Some((entry, packed))) = packing.await {
                cache.store().replace(&entry, Some(packed));
            }
            drop(place);
        });
    }

    /// Checks and digests a body, and compresses a small one; `None` if it claims to be gzip and is not, or inflates too far.
    async fn prepare(&self, fill: &Fill, bytes: Bytes) -> Option<PreparedBody> {
        let head = &fill.head;
        let coding = head.coding;
        let may_compress = coding == Coding::Identity && !CacheControl::of(&head.fields).no_transform;
        let compress = may_compress && bytes.len() >= self.settings.compress_above;
        let limit = encoding::inflation_limit(bytes.len(), self.settings.max_object);
        let (length, has_tag) = (bytes.len(), head.fields.contains_key(ETAG));
        let at_once = compress && length < COMPRESS_ELSEWHERE;
        let prepare = move || PreparedBody::new(bytes, coding, has_tag, at_once, limit);
        let is_long = match coding {
            Coding::Gzip => length >= INFLATE_ELSEWHERE,
            Coding::Identity | Coding::Opaque => !has_tag && length >= DIGEST_ELSEWHERE,
        };
        let prepared = if is_long { aside::run(prepare).await.flatten()? } else { prepare()? };
        let packing = if compress && !at_once { ToPack::new(length).map_or(Packing::Later, Packing::Next) } else { Packing::None };
        Some(PreparedBody { packing, ..prepared })
    }
}

/// A body in the form in which it is stored.
struct PreparedBody {
    bytes: Bytes,
    coding: Coding,
    /// A strong validator for a response that came without one.
    etag: Option<HeaderValue>,
    packing: Packing,
}

/// Whether a large body is to be packed.
enum Packing {
    /// It is not.
    None,
    /// Before it is written to Redis.
    Next(ToPack),
    /// In memory alone, since too many bytes wait for that.
    Later,
}

impl PreparedBody {
    fn new(bytes: Bytes, coding: Coding, has_tag: bool, compress: bool, limit: usize) -> Option<Self> {
        let tag_of = |plain: &Bytes| (!has_tag).then(|| etag_of(plain));
        match coding {
            Coding::Gzip => {
                let plain = encoding::gunzip(&bytes, limit).ok()?;
                // The tag is that of the bytes as the upstream coded them; the plain form gets its weak form.
                Some(Self { etag: tag_of(&plain), bytes, coding, packing: Packing::None })
            }
            Coding::Opaque => Some(Self { etag: tag_of(&bytes), bytes, coding, packing: Packing::None }),
            Coding::Identity => {
                let etag = tag_of(&bytes);
                let packed = if compress { packed(&bytes) } else { None };
                let coding = if packed.is_some() { Coding::Gzip } else { coding };
                Some(Self { bytes: packed.unwrap_or(bytes), coding, etag, packing: Packing::None })
            }
        }
    }

    /// Packs it, unless that makes it no smaller.
    async fn pack(&mut self, room: ToPack) {
        let bytes = self.bytes.clone();
        if let Some(Some(packed)) = room.pack(move || packed(&bytes)).await {
            (self.bytes, self.coding) = (packed, Coding::Gzip);
        }
    }
}

/// The body as gzip; `None`: it would be no smaller.
fn packed(bytes: &Bytes) -> Option<Bytes> {
    Some(encoding::gzip(bytes)).filter(|packed| !packed.is_empty() && packed.len() < bytes.len())
}

/// The same fields in memory of their own, all values in one piece. As they arrived they are slices of the connection's buffer, which they would keep
/// alive for as long as the entry lives.
fn with_own_memory(fields: &HeaderMap) -> HeaderMap {
    let mut block = BytesMut::with_capacity(fields.values().map(HeaderValue::len).sum());
    fields.values().for_each(|value| block.extend_from_slice(value.as_bytes()));
    let mut block = block.freeze();
    // With a table that has places for the fields that are added here and when it is sent: it is cloned as it is.
    let mut own = HeaderMap::with_capacity(fields.len() + MORE);
    for (name, value) in fields {
        let copy = block.split_to(value.len());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_str().as_bytes()), HeaderValue::from_maybe_shared(copy)) {
            own.append(name, value);
        }
    }
    own
}
