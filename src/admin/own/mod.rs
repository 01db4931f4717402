//! What Sluice answers itself on the main listener where `[own]` says so, in the contract's shapes: `/health` and `/api/cache/*`, and in
//! native mode the API's description. Which paths these are: [`crate::config::own`].
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
use crate::config::own::{Endpoint, OwnPaths};
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
    /// Which paths are Sluice's.
    pub paths: OwnPaths,
}

/// The method that an endpoint is asked with.
const fn method_of(endpoint: Endpoint<'_>) -> Method {
    match endpoint {
        Endpoint::Health | Endpoint::Stats | Endpoint::Description | Endpoint::Documentation => Method::GET,
        Endpoint::Clear | Endpoint::InvalidateSymbol(_) | Endpoint::InvalidateSymbols | Endpoint::Warm => Method::POST,
    }
}

impl OwnEndpoints for Endpoints {
    fn owns(&self, path: &str) -> bool {
        Endpoint::of(path, self.paths).is_some()
    }

    fn answer<'a>(&'a self, asked: Asked<'a>, proxy: &'a Arc<Proxy>) -> AnswerFuture<'a> {
        Box::pin(async move {
            let local = |response| Answer { response, outcome: Outcome::Local };
            let Some((endpoint, slash)) = Endpoint::of(&asked.target.path, self.paths) else {
                return local(errors::json(404, r#"{"detail":"Not Found"}"#));
            };
            if slash {
                return local(without_slash(asked));
            }
            let (wanted, method) = (method_of(endpoint), &asked.parts.method);
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
