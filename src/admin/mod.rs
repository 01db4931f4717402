//! The admin listener.
//!
//! | endpoint                                      | who may call it                    |
//! |-----------------------------------------------|------------------------------------|
//! | `GET /livez`                                  | everyone who reaches the listener  |
//! | `GET /readyz`                                 | everyone                           |
//! | `GET /metrics`                                | everyone                           |
//! | `GET /stats`                                  | everyone                           |
//! | `GET /explain?target=…`                       | everyone                           |
//! | `POST /purge?pattern=\|symbol=\|tag=[&soft=]` | holders of the admin token         |
//! | `POST /warm`                                  | holders of the admin token         |

pub mod explain;
pub mod own;
mod purge;
mod stats;
pub mod token;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use tokio::net::TcpListener;

use crate::body::Reply;
use crate::clock::Wall;
use crate::config::Config;
use crate::front::body::RequestBody;
use crate::front::connection_limits::ConnectionLimits;
use crate::front::listener;
use crate::proxy::{Proxy, errors};
use crate::request::Arrival;
use crate::request::target::Target;
use explain::Explainer;
use own::Endpoints;

/// Connections that the admin listener takes at one time.
const CONNECTIONS: usize = 64;

/// What the admin listener works with.
pub struct AdminState {
    proxy: Arc<Proxy>,
    endpoints: Arc<Endpoints>,
    explainer: Explainer,
}

impl AdminState {
    /// For this proxy.
    #[must_use]
    pub fn new(proxy: Arc<Proxy>, endpoints: Arc<Endpoints>, config: &Config) -> Arc<Self> {
        Arc::new(Self { proxy, endpoints, explainer: Explainer::new(config) })
    }
}

/// Serves the admin listener until `shutdown`.
pub async fn serve(listener: TcpListener, state: Arc<AdminState>, shutdown: impl Future<Output = ()>) {
    let mut limits = state.proxy.limits.clone();
    limits.connections = CONNECTIONS;
    limits.connections_per_address = CONNECTIONS;
    let answer = move |request: Request<RequestBody>, arrival: Arrival| {
        let state = Arc::clone(&state);
        async move {
            match arrival.refused {
                Some(refusal) => errors::refused(refusal),
                None => state.answer(&request).await,
            }
        }
    };
    listener::run(listener, ConnectionLimits::uncounted(limits), answer, shutdown).await;
}

impl AdminState {
    async fn answer(&self, request: &Request<RequestBody>) -> Response<Reply> {
        let text = request.uri().path_and_query().map_or("/", |target| target.as_str());
        let target = match Target::parse(text) {
            Ok(target) => target,
            Err(refusal) => return errors::refused(refusal),
        };
        let wanted = match &*target.path {
            "/livez" | "/readyz" | "/metrics" | "/stats" | "/explain" => Method::GET,
            "/purge" | "/warm" => Method::POST,
            _ => return errors::json(404, r#"{"detail":"Not Found"}"#),
        };
        if request.method() != wanted && !(wanted == Method::GET && request.method() == Method::HEAD) {
            return errors::wrong_method(if wanted == Method::GET { "GET" } else { "POST" });
        }
        if wanted == Method::POST
            && let Err(refusal) = self.endpoints.token.authorize(request.headers())
        {
            return errors::refused(refusal);
        }
        match &*target.path {
            "/livez" => text_page(200, "ok\n"),
            "/readyz" => self.readyz(),
            "/metrics" => page(200, "text/plain; version=0.0.4", self.proxy.metrics.render()),
            "/stats" => errors::json(200, stats::page(&self.proxy)),
            "/explain" => self.explain(&target, request.headers()),
            "/purge" => purge::post(&self.proxy.cache, &target).await,
            _ => errors::json(200, format!(r#"{{"warming":{}}}"#, self.endpoints.warmer.start(&self.proxy))),
        }
    }

    /// Ready while the backend or the cache can answer.
    fn readyz(&self) -> Response<Reply> {
        if !self.proxy.fetcher.failing().upstream() {
            return text_page(200, "ready\n");
        }
        let tiers = self.proxy.cache.store().report();
        let holds = |tier: &crate::cache::store::Tier| tier.up && tier.entries != Some(0);
        if tiers.iter().any(holds) {
            return text_page(200, "ready: the backend fails, what is stored is served\n");
        }
        let mut reasons = String::from("not ready: the backend fails and is being left alone\n");
        for tier in tiers {
            reasons.push_str(&format!("not ready: the {} tier {}\n", tier.tier, if tier.up { "is empty" } else { "cannot be reached" }));
        }
        text_page(503, reasons)
    }

    fn explain(&self, target: &Target<'_>, headers: &HeaderMap) -> Response<Reply> {
        let Some(asked) = target.text("target") else {
            return errors::json(400, r#"{"detail":"Say what to explain: /explain?target=/api/symbols, percent-encoded"}"#);
        };
        let mut headers = headers.clone();
        headers.remove(AUTHORIZATION);
        text_page(200, self.explainer.explain(&asked, &headers, Wall::now()).1)
    }
}

fn text_page(status: u16, text: impl Into<Bytes>) -> Response<Reply> {
    page(status, "text/plain; charset=utf-8", text)
}

fn page(status: u16, kind: &'static str, body: impl Into<Bytes>) -> Response<Reply> {
    let mut response = errors::json(status, body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
