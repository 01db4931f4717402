//! Looking up what is stored for a request, and deciding what it allows.

use std::sync::Arc;

use http::header::ACCEPT_LANGUAGE;
use http::{Method, Response};

use super::asked::CacheableRequest;
use super::decide::{Decision, decide, respect_directives};
use super::outcome::FetchWhy;
use super::spent::Step;
use super::{Proxy, respond};
use crate::body::Reply;
use crate::cache::entry::{Content, Entry};
use crate::cache::key::{Canonical, Key};
use crate::http::cache_control::CacheControl;
use crate::http::request_directives::RequestDirectives;

impl Proxy {
    /// The stored response for a request: directly, or through the marker that says what the response varies by.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn look_up(&self, request: &mut CacheableRequest<'_>) -> Result<Arc<Entry>, FetchWhy> {
        // Until what is found says otherwise, what was answered the last time counts.
        request.shared = request.authorized && self.fetcher.is_shared(&request.canonical);
        let entry = self.find(request, &request.canonical).await.ok_or(FetchWhy::UriMiss)?;
        let entry = match &entry.content {
            Content::Varies(fields) => {
                let variant = request.canonical.variant(fields, request.selecting());
                request.variant = Some(variant.clone());
                match self.find(request, &variant).await {
                    Some(entry) => Some(entry),
                    None if request.route.match_language && fields[..] == [ACCEPT_LANGUAGE] => self.find_by_language(request).await,
                    None => None,
                }
            }
            Content::Response(_) => Some(entry),
        };
        let why = if request.variant.is_some() { FetchWhy::VaryMiss } else { FetchWhy::UriMiss };
        let entry = entry.filter(|entry| is_for(request, entry)).ok_or(why)?;
        request.shared = request.authorized;
        Ok(entry)
    }

    /// The stored response in the language that the client prefers to all others.
    async fn find_by_language(&self, request: &CacheableRequest<'_>) -> Option<Arc<Entry>> {
        let language = request.selecting().preferred_language()?;
        self.find(request, &request.canonical.language(&language)).await
    }

    /// The entry under one canonical request: in memory, or else in Redis, unless the short way has just looked there.
    pub(super) async fn find(&self, request: &CacheableRequest<'_>, canonical: &Canonical) -> Option<Arc<Entry>> {
        if let Some(entry) = self.cache.peek(canonical) {
            return Some(entry);
        }
        let looked_up = request.parts.extensions.get();
        if let Some(found) = looked_up.and_then(|looked_up| self.cache.found(looked_up, canonical)) {
            return found;
        }
        let key = Key::new(request.route, request.target, canonical.clone());
        request.spent.on(Step::Redis, self.cache.get(&key)).await
    }

    /// What to do with a request, given what was found.
    pub(super) fn decide(&self, request: &CacheableRequest<'_>, found: &Result<Arc<Entry>, FetchWhy>) -> Decision {
        let life = found.as_ref().map(|entry| (entry.stored_at, entry.lifetimes)).map_err(|why| *why);
        let decision = decide(life, request.now, || self.fetcher.failing().key(&request.route.name, &request.collapse_key()));
        let decision = match (decision, found) {
            // Its credentials have an answer of their own, which refreshes nothing: it is asked for instead.
            (Decision::StaleAndRevalidate(by), Ok(entry)) if self.has_own_answer(request) => {
                Decision::Fetch { why: FetchWhy::Stale, fallback: entry.may_replace_errors(request.now).then_some(by) }
            }
            (decision, _) => decision,
        };
        if !request.route.client_directives {
            return decision;
        }
        let directives = RequestDirectives::of(&request.parts.headers);
        respect_directives(&directives, decision, found.as_deref().ok(), request.now)
    }

    /// Whether the last answer to a request's credentials was for these alone.
    pub(super) fn has_own_answer(&self, request: &CacheableRequest<'_>) -> bool {
        request.credentials_key().is_some_and(|key| self.fetcher.is_uncacheable(&key))
    }

    /// A stored response for this client; `None` if it is damaged.
    pub(super) async fn respond(&self, request: &CacheableRequest<'_>, found: Option<&Arc<Entry>>) -> Option<Response<Reply>> {
        let entry = found?;
        let Content::Response(stored) = &entry.content else { return None };
        let ranges = request.parts.method == Method::GET;
        respond::from_stored(self.cache.store(), entry, stored, &request.parts.headers, ranges, request.now, self.max_object).await.ok()
    }
}

/// Whether what was found is a response that this request may get: one with `Authorization` only gets what says that all may
/// have it (RFC 9111 §3.5).
pub(super) fn is_for(request: &CacheableRequest<'_>, entry: &Entry) -> bool {
    match &entry.content {
        Content::Response(stored) => !request.authorized || CacheControl::of(&stored.fields).shares_authorized(),
        Content::Varies(_) => false,
    }
}
