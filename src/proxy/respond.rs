//! From what is stored, or is being fetched, to a response for one client.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use http::header::{AGE, CONTENT_ENCODING, CONTENT_LENGTH, ETAG, RANGE, VIA};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::aside;
use crate::body::lent::Reading;
use crate::body::{Reply, Stream};
use crate::cache::entry::{Content, Entry, Form, StoredResponse, vary_by_encoding};
use crate::cache::store::Store;
use crate::clock::Wall;
use crate::fetch::fill::Fill;
use crate::fetch::inflate::Inflate;
use crate::http::conditional::{not_modified, weaken};
use crate::http::encoding::{Coding, InflateError, accepts_gzip, gunzip, told_length};
use crate::http::range;
use crate::upstream::response_fields::OWN_VIA;

/// Coded bodies of up to this size are inflated on the spot, larger ones where they hold up no request: they may be hundreds
/// of times as large.
const INFLATE_HERE: usize = 4 << 10;
/// What is inflated on the spot has at most these many bytes.
const INFLATED_HERE: usize = 2 << 20;

/// Bodies that inflate to this size are inflated as their client takes them. As a whole, to be kept, only once a client has taken
/// all of one: else clients that ask and take nothing would have them inflated again and again.
const PIECEWISE: usize = 64 << 10;

/// Bytes of all bodies that were inflated as a whole and are held, by memory or by a client that reads slowly.
const MOST_INFLATED: usize = 128 << 20;
/// Smaller ones are not counted.
const COUNTED: usize = 16 << 10;
static INFLATED: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(MOST_INFLATED)));

/// Room for a body that is inflated as a whole, a permit for each byte; `None` inside: it is not counted.
struct Room(Option<OwnedSemaphorePermit>);

impl Room {
    /// Room for what a stored body says that it inflates to; `None`: too much is held already.
    fn take(stored: &StoredResponse) -> Option<Self> {
        let bytes = told_length(&stored.body);
        if bytes < COUNTED {
            return Some(Self(None));
        }
        let taken = Arc::clone(&INFLATED).try_acquire_many_owned(u32::try_from(bytes).ok()?).ok()?;
        Some(Self(Some(taken)))
    }

    /// The same bytes, which take the room for as long as they are held.
    fn hold(self, bytes: Bytes) -> Bytes {
        match self.0 {
            Some(_) => Bytes::from_owner(Held { bytes, _room: self }),
            None => bytes,
        }
    }
}

struct Held {
    bytes: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The stored response for this client: in the coding that it takes, a range of it (if `ranges`: only GET has them), or 304 if
/// the client holds it already.
///
/// # Errors
/// The stored bytes do not inflate, which only a forged entry's do.
pub async fn from_stored(
    store: &dyn Store,
    entry: &Arc<Entry>,
    stored: &StoredResponse,
    request: &HeaderMap,
    ranges: bool,
    now: Wall,
    max_object: usize,
) -> Result<Response<Reply>, InflateError> {
    let ranged = ranges && stored.status == StatusCode::OK && stored.coding != Coding::Opaque && request.contains_key(RANGE);
    let gzip = stored.coding == Coding::Gzip && !ranged && accepts_gzip(request);
    let held = stored.status == StatusCode::OK && not_modified(request, &stored.fields);
    let mut headers = stored.ready(gzip, held).fields;
    headers.insert(AGE, HeaderValue::from(entry.age(now)));
    if held {
        return Ok(build(StatusCode::NOT_MODIFIED, headers, Bytes::new()));
    }
    let (body, reading) = match stored.form(gzip) {
        Form::Ready(body) => stored.lend(body),
        Form::Inflate(_) if ranged => {
            let room = Room::take(stored).unwrap_or(Room(None));
            Box::pin(inflate(store, entry, stored, max_object, room)).await?
        }
        Form::Inflate(_) => match is_worth_keeping(stored).then(|| Room::take(stored)).flatten() {
            Some(room) => Box::pin(inflate(store, entry, stored, max_object, room)).await?,
            // In constant memory, however slowly the client takes it.
            None => {
                let (coded, reading) = stored.lend(&stored.body);
                let inflating = Inflate::stored(coded, stored.plain_length(), stored.inflation_limit(max_object), stored.taken().clone());
                let response = build(stored.status, headers, Bytes::new()).map(|_| Reply::Stream(inflating.boxed_unsync()));
                return Ok(read_by(response, reading));
            }
        },
    };
    let response = if ranged {
        let (status, part) = range::cut(&range::parts(request, &headers, body.len()), &mut headers, &body);
        build(status, headers, part)
    } else {
        build(stored.status, headers, body)
    };
    Ok(read_by(response, reading))
}

/// Whether a body is to be inflated as a whole, and kept.
fn is_worth_keeping(stored: &StoredResponse) -> bool {
    told_length(&stored.body) < PIECEWISE || stored.taken().take()
}

/// A response with what says who reads its body, if that is lent.
fn read_by(mut response: Response<Reply>, reading: Option<Arc<Reading>>) -> Response<Reply> {
    if let Some(reading) = reading {
        response.extensions_mut().insert(reading);
    }
    response
}

/// The body of an entry, inflated.
async fn inflate(
    store: &dyn Store,
    entry: &Arc<Entry>,
    stored: &StoredResponse,
    max_object: usize,
    room: Room,
) -> Result<(Bytes, Option<Arc<Reading>>), InflateError> {
    let limit = stored.inflation_limit(max_object);
    let plain = match gunzip_here(&stored.body, limit) {
        Some(plain) => plain?,
        None => {
            let coded = stored.body.clone();
            aside::run(move || gunzip(&coded, limit)).await.ok_or(InflateError::Corrupt)??
        }
    };
    let plain = room.hold(plain);
    let inflated = keep_inflated(store, entry, stored, plain.clone());
    match &inflated.content {
        Content::Response(inflated) => Ok(inflated.lend(&plain)),
        Content::Varies(_) => Ok((plain, None)),
    }
}

/// An entry with its body inflated too, if that is done on the spot; `None`: it is large, or damaged.
pub fn inflated_here(store: &dyn Store, entry: &Arc<Entry>, stored: &StoredResponse, max_object: usize) -> Option<Arc<Entry>> {
    if told_length(&stored.body) >= PIECEWISE {
        return None;
    }
    let room = Room::take(stored)?;
    let plain = gunzip_here(&stored.body, stored.inflation_limit(max_object))?.ok()?;
    Some(keep_inflated(store, entry, stored, room.hold(plain)))
}

/// A coded body inflated on the spot, to at most `limit` bytes; `None`: it takes too long.
fn gunzip_here(coded: &[u8], limit: usize) -> Option<Result<Bytes, InflateError>> {
    if coded.len() > INFLATE_HERE {
        return None;
    }
    match gunzip(coded, limit.min(INFLATED_HERE)) {
        Err(InflateError::TooLarge) if limit > INFLATED_HERE => None,
        inflated => Some(inflated),
    }
}

/// Keeps a body in memory inflated too: clients that do not take gzip will ask again.
fn keep_inflated(store: &dyn Store, entry: &Arc<Entry>, stored: &StoredResponse, plain: Bytes) -> Arc<Entry> {
    let content = Content::Response(stored.with_plain(plain));
    let inflated = Arc::new(Entry { content, ..Entry::clone(entry) });
    store.replace(entry, Some(Arc::clone(&inflated)));
    inflated
}

/// A response whose body is still being fetched; `None` if its first bytes are gone already.
#[must_use]
pub fn from_fill(fill: &Arc<Fill>, request: &HeaderMap) -> Option<Response<Reply>> {
    let reader = fill.reader()?;
    let mut response = fill.head.response(reader.boxed_unsync());
    response.headers_mut().append(VIA, OWN_VIA);
    if fill.head.coding == Coding::Gzip {
        vary_by_encoding(response.headers_mut());
    }
    Some(recode(response, request).map(Reply::Stream))
}

/// A response of the upstream's, inflated if the client does not take the coding in which Sluice asked for it.
#[must_use]
pub fn recode(response: Response<Stream>, request: &HeaderMap) -> Response<Stream> {
    if accepts_gzip(request) || Coding::of(response.headers()) != Coding::Gzip {
        return response;
    }
    let mut plain = response.map(|body| Inflate::new(body).boxed_unsync());
    let headers = plain.headers_mut();
    headers.remove(CONTENT_ENCODING);
    headers.remove(CONTENT_LENGTH);
    vary_by_encoding(headers);
    if let Some(tag) = headers.get(ETAG).map(weaken) {
        headers.insert(ETAG, tag);
    }
    plain
}

fn build(status: StatusCode, headers: HeaderMap, body: Bytes) -> Response<Reply> {
    let mut response = Response::new(Reply::Full(Some(body)));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}
