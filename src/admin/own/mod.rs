//! What Sluice answers itself on the main listener, in the contract's shapes: `/health` and `/api/cache/*`, and in native mode
//! the API's description.
//!
//! | endpoint                                      | who may call it            |
//! |-----------------------------------------------|----------------------------|
//! | `GET /health`                                 | everyone                   |
//! | `GET /api/cache/stats`                        | everyone                   |
//! | `GET /openapi.json`, `GET /docs` (native mode) | everyone                   |
//! | `POST /api/cache/*`                           | holders of the admin token (deviation D8 of the contract) |

pub mod cache;
pub mod health;
pub mod openapi;
pub mod recent;
pub mod schema;

use std::collections::BTreeMap;
use std::sync::Arc;

use http::header::LOCATION;
use http::{Method, Response};

use super::audit::Actor;
use crate::body::Reply;
use crate::config::tokens::Right;
use crate::proxy::answer::Answer;
use crate::proxy::asked::Asked;
use crate::proxy::outcome::Outcome;
use crate::proxy::warm::Warmer;
use crate::proxy::{AnswerFuture, OwnEndpoints, Proxy, errors};
use crate::request::client::own_url;
use crate::request::refusal::Refusal;
use health::Health;
use recent::Recent;

/// The endpoints, with what they need.
pub struct Endpoints {
    /// What `POST /api/cache/warm` starts.
    pub warmer: Warmer,
    /// What the upstream said of itself.
    pub health: Health,
    /// What Redis said of itself, by its own names; `None`: it did not answer, or there is none.
    pub server: Recent<Option<BTreeMap<String, String>>>,
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

    /// The method that it is asked with.
    const fn method(self) -> Method {
        match self {
            Self::Health | Self::Stats | Self::Description | Self::Documentation => Method::GET,
            Self::Clear | Self::InvalidateSymbol(_) | Self::InvalidateSymbols | Self::Warm => Method::POST,
        }
    }
}

impl OwnEndpoints for Endpoints {
    fn owns(&self, path: &str) -> bool {
        Endpoint::of(path, self.native).is_some()
    }

    fn answer<'a>(&'a self, asked: Asked<'a>, proxy: &'a Arc<Proxy>) -> AnswerFuture<'a> {
        Box::pin(async move {
            let local = |response| Answer { response, outcome: Outcome::Local };
            let Some((endpoint, slash)) = Endpoint::of(&asked.target.path, self.native) else {
                return local(errors::json(404, r#"{"detail":"Not Found"}"#));
            };
            if slash {
                return local(without_slash(asked));
            }
            let (wanted, method) = (endpoint.method(), &asked.parts.method);
            if *method != wanted && !(wanted == Method::GET && *method == Method::HEAD && proxy.head_as_get) {
                return local(errors::wrong_method(if wanted == Method::GET { "GET" } else { "POST" }));
            }
            self.respond(endpoint, asked, proxy).await.map_or_else(Answer::refused, local)
        })
    }
}

impl Endpoints {
    /// The response of an endpoint, or why whoever asked may not have it.
    async fn respond(&self, endpoint: Endpoint<'_>, asked: Asked<'_>, proxy: &Arc<Proxy>) -> Result<Response<Reply>, Refusal> {
        let (rules, client) = (proxy.rules.load_full(), asked.forwarding.client.address);
        let actor = |right| Actor::authorize(&rules.tokens, &asked.parts.headers, client, right);
        Ok(match endpoint {
            Endpoint::Health => health::get(&self.health, proxy).await,
            Endpoint::Stats => cache::stats(&self.server, proxy).await,
            Endpoint::Clear => cache::clear(proxy, asked.target, &actor(Right::Purge).await?).await,
            Endpoint::InvalidateSymbol(symbol) => cache::invalidate_symbol(proxy, symbol, &actor(Right::Purge).await?).await,
            Endpoint::InvalidateSymbols => cache::invalidate_symbols(proxy, &actor(Right::Purge).await?).await,
            Endpoint::Warm => cache::warm(&self.warmer, proxy, &actor(Right::Warm).await?),
            Endpoint::Description => openapi::description(),
            Endpoint::Documentation => openapi::documentation(),
        })
    }
}

/// 307 to the path without its last slash.
fn without_slash(asked: Asked<'_>) -> Response<Reply> {
    let mut response = errors::json(307, "");
    let query = asked.parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let path = asked.target.path.trim_end_matches('/');
    let forwarding = asked.forwarding;
    if let Some(location) = own_url(&format!("{path}{query}"), "http", asked.parts, forwarding.client, forwarding.public) {
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
