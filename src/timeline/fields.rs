//! The fields of computed responses: those that the backend's own responses have, so that a client sees no difference.

use foldhash::fast::RandomState;
use http::header::{
    ACCEPT_RANGES, AGE, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, DATE, ETAG, EXPIRES, LAST_MODIFIED, ORIGIN, SET_COOKIE,
    TRANSFER_ENCODING, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};

use super::endpoint::Endpoint;
use crate::http::cache_control::CacheControl;
use crate::http::vary::Vary;

/// Kinds of responses whose fields are remembered.
const KINDS: usize = 256;
/// What belongs to one response and not to its kind.
const OF_ONE: [HeaderName; 11] =
    [ACCEPT_RANGES, AGE, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, DATE, ETAG, EXPIRES, LAST_MODIFIED, TRANSFER_ENCODING, VIA];

/// A kind of response: those of one have the same fields.
type Kind = (Endpoint, StatusCode, Option<HeaderValue>);

type Known = Cache<Kind, Option<HeaderMap>, UnitWeighter, RandomState, DefaultLifecycle<Kind, Option<HeaderMap>>>;

/// Where the fields of computed responses come from.
pub enum Fields {
    /// The API is answered here.
    Own,
    /// An existing service answers: they are learnt from its responses. `None` under a kind says that its responses are not
    /// for sharing.
    Learnt(Box<Known>),
}

impl Fields {
    /// Of responses of this program's own.
    #[must_use]
    pub fn own() -> Self {
        Self::Own
    }

    /// Of responses of an existing service, of which none was seen yet.
    #[must_use]
    pub fn learnt() -> Self {
        Self::Learnt(Box::new(Cache::with(KINDS, KINDS as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default())))
    }

    /// Notes a response of the backend's, as it reaches the client.
    pub fn note(&self, endpoint: Endpoint, request: &HeaderMap, status: StatusCode, fields: &HeaderMap) {
        let Self::Learnt(known) = self else { return };
        let Some(kind) = kind(endpoint, request, status) else { return };
        let mut fields = fields.clone();
        for name in OF_ONE {
            fields.remove(name);
        }
        known.insert(kind, is_for_sharing(&fields).then_some(fields));
    }

    /// The fields of a computed response; `None` if they are not known, or such responses are not for sharing.
    #[must_use]
    pub fn of(&self, endpoint: Endpoint, request: &HeaderMap, status: StatusCode) -> Option<HeaderMap> {
        match self {
            Self::Own => Some(HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))])),
            Self::Learnt(known) => known.get(&kind(endpoint, request, status)?)?,
        }
    }
}

/// Services answer `Origin` without saying `Vary`, so each has its own kind of responses.
fn kind(endpoint: Endpoint, request: &HeaderMap, status: StatusCode) -> Option<Kind> {
    let mut origins = request.get_all(ORIGIN).iter();
    let origin = origins.next().cloned();
    origins.next().is_none().then_some((endpoint, status, origin))
}

/// Whether responses with these fields may be given to others, and now as well as later.
fn is_for_sharing(fields: &HeaderMap) -> bool {
    let control = CacheControl::of(fields);
    let kept = !control.no_store && !control.private && !control.no_cache && !control.must_revalidate;
    let fresh = [control.s_maxage, control.max_age].iter().flatten().all(|age| !age.is_zero());
    let alike = matches!(Vary::of(fields), Vary::Fields(names) if names.iter().all(|name| *name == ORIGIN));
    kept && fresh && alike && !fields.contains_key(SET_COOKIE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn computed_responses_have_the_fields_of_the_backends_own() {
        let fields = Fields::learnt();
        let (plain, page) = (map(&[]), map(&[("origin", "https://a.example")]));
        let of = |request: &HeaderMap, status: u16| fields.of(Endpoint::Orders, request, StatusCode::from_u16(status).unwrap());
        assert_eq!(of(&plain, 200), None);
        let seen =
            map(&[("content-type", "application/json"), ("server", "uvicorn"), ("etag", "\"x\""), ("vary", "Accept-Encoding, Origin")]);
        fields.note(Endpoint::Orders, &plain, StatusCode::OK, &seen);
        let known = of(&plain, 200).unwrap();
        assert_eq!((known.len(), &known["server"]), (3, &HeaderValue::from_static("uvicorn")));
        assert_eq!((of(&page, 200), of(&plain, 404)), (None, None), "each origin and status is a kind of its own");
        for bad in [("cache-control", "private"), ("set-cookie", "a=b"), ("vary", "Cookie"), ("cache-control", "max-age=0")] {
            fields.note(Endpoint::Orders, &plain, StatusCode::OK, &map(&[bad]));
            assert_eq!(of(&plain, 200), None, "{bad:?}");
        }
    }
}
