//! Making one answer, away from the thread that serves the client: computed, given the fields of such responses, and packed.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, header};

use super::compute::{self, Computed};
use super::endpoint::Endpoint;
use super::engine::{Allowed, Engine};
use super::fields::Fields;
use super::symbol::Symbol;
use super::trust::Trust;
use super::unanswered::Unanswered;
use super::view::Made;
use crate::api::orders::Orders;
use crate::cache::entry::{Content, Entry, StoredResponse, vary_by_encoding};
use crate::cache::key::Key;
use crate::cache::void::Moment;
use crate::clock::Wall;
use crate::http::conditional::etag_of;
use crate::http::encoding::{Coding, gzip_fast};
use crate::http::freshness::Lifetimes;
use crate::upstream::response_fields::OWN_VIA;

/// What making an answer needs.
pub struct Work<S> {
    /// Where the orders are.
    pub engine: Arc<Engine<S>>,
    /// Whose orders.
    pub symbol: Arc<Symbol>,
    /// What is asked.
    pub endpoint: Endpoint,
    /// Path and query, as they were sent.
    pub text: String,
    /// How late the newest orders may be.
    pub allowed: Allowed,
    /// The request's fields that its response's may depend on.
    pub headers: HeaderMap,
    /// The fields of responses.
    pub fields: Arc<Fields>,
    /// Whether answers in which ties show are served.
    pub trust: Arc<Trust>,
    /// From this size on the body is packed, in bytes.
    pub pack_from: usize,
    /// From this size on the response varies by the coding that clients take.
    pub varies_from: usize,
    /// The key, as if the response was stored.
    pub key: Key,
    /// Before anything of it is read.
    pub began: Moment,
}

/// An answer, and from what it was made.
#[derive(Clone)]
pub struct Worked {
    /// The response, as if it was stored.
    pub entry: Arc<Entry>,
    /// From what it was made.
    pub made: Made,
}

impl<S: Orders> Work<S> {
    /// Makes the answer.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn run(self) -> Result<Worked, Unanswered> {
        let Computed { status, body, made, place } =
            compute::answer(&self.engine, &self.symbol, self.endpoint, &self.text, self.allowed).await?;
        if !self.trust.allows(made.ties) {
            return Err(Unanswered::Ties);
        }
        let mut fields = self.fields.of(self.endpoint, &self.headers, status).ok_or(Unanswered::Fields)?;
        fields.append(header::VIA, OWN_VIA);
        fields.insert(header::ETAG, etag_of(&body));
        if body.len() >= self.varies_from {
            vary_by_encoding(&mut fields);
        }
        let packed = if body.len() >= self.pack_from { gzip_fast(&body) } else { Bytes::new() };
        let (coding, body) = if packed.is_empty() { (Coding::Identity, body) } else { (Coding::Gzip, packed) };
        let body = match place {
            Some(place) => place.hold(body).ok_or(Unanswered::NoRoom)?,
            None => body,
        };
        let response = StoredResponse::new(status, fields, coding, Coding::Identity, body);
        let now = Wall::now();
        // What is made of nothing was asked for when it was begun to be made.
        let asked_at = made.asked_at.unwrap_or(self.began);
        let known_at = made.tail.as_ref().map_or(now, |tail| tail.asked_at);
        let entry = Entry::new(&self.key, asked_at, known_at, 0, Lifetimes::default(), Content::Response(response));
        Ok(Worked { entry: Arc::new(entry), made })
    }
}
