//! What Sluice answers itself on the main listener, in the contract's shapes: `/health` and `/api/cache/*`, and in native
//! mode the API's description.
//!
//! The operations that change something need the admin token (deviation D8).

pub mod cache;
pub mod health;
pub mod openapi;
pub mod schema;

use http::header::LOCATION;
use http::{Method, Response, request};

use crate::admin::token::Token;
use crate::body::Reply;
use crate::config::PublicUrl;
use crate::proxy::Proxy;
use crate::proxy::outcome::Outcome;
use crate::proxy::respond;
use crate::proxy::warm::Warmer;
use crate::request::target::Target;
use crate::upstream::forward::{self, Client};
use health::Health;

/// What Sluice answers itself.
pub struct Local {
    /// What operations need.
    pub token: Token,
    /// What `POST /api/cache/warm` starts.
    pub warm: Warmer,
    /// What the backend said of itself.
    pub health: Health,
    /// Whether the API is answered here, so that its description is here too.
    pub native: bool,
}

/// One of Sluice's own endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint<'a> {
    /// `GET /health`.
    Health,
    /// `GET /api/cache/stats`.
    Stats,
    /// `POST /api/cache/clear`.
    Clear,
    /// `POST /api/cache/invalidate/symbol/{symbol}`.
    InvalidateSymbol(&'a str),
    /// `POST /api/cache/invalidate/symbols`.
    InvalidateSymbols,
    /// `POST /api/cache/warm`.
    Warm,
    /// `GET /openapi.json`, in native mode.
    Description,
    /// `GET /docs`, in native mode.
    Documentation,
}

impl<'a> Endpoint<'a> {
    /// The endpoint of a decoded path; the flag says that a slash too many follows it.
    #[must_use]
    pub fn of(path: &'a str, native: bool) -> Option<(Self, bool)> {
        // What most requests ask for is told apart by the first bytes.
        if path.starts_with("/api/") && !path.starts_with("/api/cache/") {
            return None;
        }
        let exact = path.strip_suffix('/').unwrap_or(path);
        let endpoint = match exact {
            "/health" => Self::Health,
            "/api/cache/stats" => Self::Stats,
            "/api/cache/clear" => Self::Clear,
            "/api/cache/invalidate/symbols" => Self::InvalidateSymbols,
            "/api/cache/warm" => Self::Warm,
            "/openapi.json" if native => Self::Description,
            "/docs" if native => Self::Documentation,
            _ => {
                let symbol = exact.strip_prefix("/api/cache/invalidate/symbol/")?;
                if symbol.is_empty() || symbol.contains('/') {
                    return None;
                }
                Self::InvalidateSymbol(symbol)
            }
        };
        Some((endpoint, exact.len() < path.len()))
    }

    const fn changes_something(self) -> bool {
        !matches!(self, Self::Health | Self::Stats | Self::Description | Self::Documentation)
    }
}

impl Local {
    /// Answers one of Sluice's own endpoints.
    pub async fn answer(
        &self,
        (endpoint, slash): (Endpoint<'_>, bool),
        target: &Target<'_>,
        parts: &request::Parts,
        client: &Client,
        proxy: &Proxy,
    ) -> (Response<Reply>, Outcome) {
        if slash {
            return (without_slash(target, parts, client, proxy.public.as_ref()), Outcome::Local);
        }
        let wanted = if endpoint.changes_something() { Method::POST } else { Method::GET };
        if parts.method != wanted && !(wanted == Method::GET && parts.method == Method::HEAD && proxy.head_as_get) {
            return (respond::wrong_method(if endpoint.changes_something() { "POST" } else { "GET" }), Outcome::Local);
        }
        if endpoint.changes_something()
            && let Err(refusal) = self.token.authorize(&parts.headers)
        {
            return (respond::refused(refusal), Outcome::Refused(refusal));
        }
        let response = match endpoint {
            Endpoint::Health => health::get(&self.health, proxy).await,
            Endpoint::Stats => cache::stats(proxy).await,
            Endpoint::Clear => cache::clear(proxy, target).await,
            Endpoint::InvalidateSymbol(symbol) => cache::invalidate_symbol(proxy, symbol).await,
            Endpoint::InvalidateSymbols => cache::invalidate_symbols(proxy).await,
            Endpoint::Warm => cache::warm(&self.warm),
            Endpoint::Description => openapi::description(),
            Endpoint::Documentation => openapi::documentation(),
        };
        (response, Outcome::Local)
    }
}

/// 307 to the path without its last slash.
fn without_slash(target: &Target<'_>, parts: &request::Parts, client: &Client, public: Option<&PublicUrl>) -> Response<Reply> {
    let mut response = respond::json(307, "");
    let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let path = target.path.trim_end_matches('/');
    if let Some(location) = forward::own_url(&format!("{path}{query}"), parts, client, public) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_sluices_own_endpoints() {
        for (path, expected) in [
            ("/health", Some((Endpoint::Health, false))),
            ("/health/", Some((Endpoint::Health, true))),
            ("/healthy", None),
            ("/api/cache/stats", Some((Endpoint::Stats, false))),
            ("/api/cache/invalidate/symbols", Some((Endpoint::InvalidateSymbols, false))),
            ("/api/cache/invalidate/symbol/BTC USDT", Some((Endpoint::InvalidateSymbol("BTC USDT"), false))),
            ("/api/cache/invalidate/symbol/", None),
            ("/api/cache/invalidate/symbol/a/b", None),
            ("/api/cache", None),
            ("/api/symbols", None),
            ("/docs", None),
            ("/", None),
        ] {
            assert_eq!(Endpoint::of(path, false), expected, "{path}");
        }
        assert_eq!(Endpoint::of("/docs", true), Some((Endpoint::Documentation, false)));
        assert_eq!(Endpoint::of("/openapi.json", true), Some((Endpoint::Description, false)));
    }
}
