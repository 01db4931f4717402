//! The admin listener. It answers to its own names alone (`names`), and refuses any other `Host` with 421.
//!
//! | endpoint                                      | who may call it                    |
//! |-----------------------------------------------|------------------------------------|
//! | `GET /` (a page, with its two files)          | everyone who reaches the listener  |
//! | `GET /livez`                                  | everyone                           |
//! | `GET /readyz`                                 | everyone                           |
//! | `GET /metrics`                                | everyone                           |
//! | `GET /stats[?symbol=…]`                       | everyone                           |
//! | `GET /explain?target=…[&header=…]`            | everyone                           |
//! | `POST /purge?pattern=\|symbol=\|tag=[&soft=]` | holders of the admin token         |
//! | `GET /purge?number=I`                         | everyone                           |
//! | `GET /warm`                                   | everyone                           |
//! | `POST /warm`                                  | holders of the admin token         |
//! | `POST /reload`                                | holders of the admin token         |
//! | `POST /stop`                                  | holders of the admin token         |

pub mod audit;
mod console;
pub mod explain;
mod names;
pub mod own;
mod purge;
pub mod readiness;
mod reload;
mod stats;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, request};
use serde_json::json;
use tokio::sync::watch;

use crate::body::Reply;
use crate::cache::hot_file::HotFile;
use crate::clock::Wall;
use crate::config::Config;
use crate::config::tokens::Right;
use crate::control::reload::Reloader;
use crate::front::body::RequestBody;
use crate::front::connection_limits::ConnectionLimits;
use crate::front::listener::{self, Stop};
use crate::front::sockets::Listener;
use crate::proxy::{Proxy, errors};
use crate::request::Arrival;
use crate::request::refusal::Refusal;
use crate::request::target::Target;
use crate::request::validate::validate;
use crate::timeline::needs::Needs;
use audit::Actor;
use explain::{Explainer, Serving};
use own::Endpoints;
use readiness::Readiness;

/// Connections that the admin listener takes at one time.
const CONNECTIONS: usize = 64;

/// What the admin listener works with.
pub struct AdminState {
    proxy: Arc<Proxy>,
    endpoints: Arc<Endpoints>,
    explainer: Explainer,
    /// `None`: the configuration does not come from a file.
    reloader: Option<Arc<Reloader>>,
    /// Ends the program, once another process takes over.
    hand_over: watch::Sender<bool>,
    /// What memory holds is left there for that process.
    hot: Option<Arc<HotFile>>,
}

impl AdminState {
    /// For this proxy.
    #[must_use]
    pub fn new(
        proxy: Arc<Proxy>,
        endpoints: Arc<Endpoints>,
        config: &Config,
        reloader: Option<Arc<Reloader>>,
        hand_over: watch::Sender<bool>,
        hot: Option<Arc<HotFile>>,
    ) -> Arc<Self> {
        Arc::new(Self { proxy, endpoints, explainer: Explainer::new(config), reloader, hand_over, hot })
    }
}

/// Serves the admin listener until `shutdown`.
pub async fn serve(listener: Listener, state: Arc<AdminState>, told: watch::Receiver<Stop>) -> io::Result<()> {
    let mut limits = state.proxy.limits.clone();
    limits.connections = CONNECTIONS;
    limits.connections_per_address = CONNECTIONS;
    let bound = listener.socket.local_addr()?.ip();
    let answer = move |request: Request<RequestBody>, arrival: Arrival| {
        let state = Arc::clone(&state);
        async move {
            match arrival.refused {
                Some(refusal) => errors::refused(refusal),
                None => state.answer(request, arrival.peer, bound).await,
            }
        }
    };
    listener::run(listener, ConnectionLimits::uncounted(limits), (answer, None), told).await
}

impl AdminState {
    async fn answer(&self, request: Request<RequestBody>, peer: IpAddr, bound: IpAddr) -> Response<Reply> {
        let (request, _body) = request.into_parts();
        let target = match validate(&request).and_then(Target::parse) {
            Ok(_) if !names::are_own(&request, bound, &self.proxy.rules.load().admin_hosts) => {
                return errors::refused(Refusal::Misdirected);
            }
            Ok(target) => target,
            Err(refusal) => return errors::refused(refusal),
        };
        match (&*target.path, &request.method) {
            ("/purge", &Method::GET) => return purge::get(&self.proxy.cache, &target),
            ("/warm", &Method::GET) => return errors::json(200, json!(self.endpoints.warmer.state()).to_string()),
            (path, &Method::GET | &Method::HEAD) if let Some(page) = console::get(path) => return page,
            _ => {}
        }
        let wanted = match &*target.path {
            "/livez" | "/readyz" | "/metrics" | "/stats" | "/explain" => Method::GET,
            "/purge" | "/warm" | "/reload" | "/stop" => Method::POST,
            _ => return errors::json(404, r#"{"detail":"Not Found"}"#),
        };
        if request.method != wanted && !(wanted == Method::GET && request.method == Method::HEAD) {
            return errors::wrong_method(if wanted == Method::GET { "GET" } else { "POST" });
        }
        match &*target.path {
            "/livez" => text_page(200, "ok\n"),
            "/readyz" => self.readyz(),
            "/metrics" => self.metrics(),
            "/stats" => self.stats(&target),
            "/explain" => self.explain(&target, &request.headers, peer).await,
            _ => self.manage(&target, &request.headers, peer).await.unwrap_or_else(errors::refused),
        }
    }

    /// What needs a token.
    async fn manage(&self, target: &Target<'_>, headers: &HeaderMap, peer: IpAddr) -> Result<Response<Reply>, Refusal> {
        let rules = self.proxy.rules.load_full();
        let actor = |right| Actor::authorize(&rules.tokens, headers, peer, right);
        Ok(match &*target.path {
            "/reload" => reload::post(self.reloader.as_ref(), &actor(Right::Reload).await?).await,
            "/purge" => purge::post(&self.proxy, target, &actor(Right::Purge).await?).await,
            "/stop" => self.stop(&actor(Right::Stop).await?).await,
            _ => self.warm(&actor(Right::Warm).await?),
        })
    }

    /// Leaves what memory holds for the process that takes over, and ends this one.
    async fn stop(&self, actor: &Actor<'_>) -> Response<Reply> {
        actor.begins("");
        let left = match &self.hot {
            Some(hot) => hot.write(&self.proxy.cache).await,
            None => 0,
        };
        actor.did(&format!("stopping, {left} entries left for the next process"));
        self.hand_over.send_replace(true);
        errors::json(200, format!(r#"{{"stopping":true,"left":{left}}}"#))
    }

    fn warm(&self, actor: &Actor<'_>) -> Response<Reply> {
        let targets = self.endpoints.warmer.start(&self.proxy);
        actor.did(&format!("{targets} targets"));
        errors::json(200, format!(r#"{{"warming":{targets}}}"#))
    }

    fn metrics(&self) -> Response<Reply> {
        if let Some(timeline) = &self.proxy.timeline {
            timeline.update_gauges();
        }
        self.proxy.update_gauges();
        page(200, "text/plain; version=0.0.4", self.proxy.metrics.render())
    }

    /// How all stands, or one symbol of the timeline.
    fn stats(&self, target: &Target<'_>) -> Response<Reply> {
        let Some(symbol) = target.text("symbol") else { return errors::json(200, stats::page(&self.proxy)) };
        match self.proxy.timeline.as_ref().and_then(|timeline| timeline.describe(&symbol)) {
            Some(report) => errors::json(200, serde_json::to_string_pretty(&report).unwrap_or_default()),
            None => errors::json(404, r#"{"detail":"The timeline knows nothing of this symbol"}"#),
        }
    }

    /// Ready while the backend or the cache can answer.
    fn readyz(&self) -> Response<Reply> {
        match Readiness::of(&self.proxy) {
            Readiness::Ready => text_page(200, "ready\n"),
            Readiness::FromStored => text_page(200, "ready: the backend fails, what is stored is served\n"),
            Readiness::No(reasons) => text_page(503, reasons),
        }
    }

    /// Explains a GET with the fields that are named as `header=Name: value`, and the caller's own but for those that are about this call.
    async fn explain(&self, target: &Target<'_>, own: &HeaderMap, peer: IpAddr) -> Response<Reply> {
        let Some(asked) = target.text("target") else {
            return errors::json(400, r#"{"detail":"Say what to explain: /explain?target=/api/symbols, percent-encoded"}"#);
        };
        let mut headers = own.clone();
        [AUTHORIZATION, HOST, COOKIE].iter().for_each(|name| drop(headers.remove(name)));
        for named in target.parameters.iter().filter(|parameter| parameter.is("header")) {
            let Some((name, value)) = read_field(&named.text()) else {
                return errors::json(400, r#"{"detail":"Write fields as header=Name: value, percent-encoded"}"#);
            };
            headers.append(name, value);
        }
        let (rules, client) = (self.proxy.rules.load_full(), explain::client(&headers, peer));
        let foreseen = match request_for(&asked, &headers) {
            Some(parts) => self.proxy.foresee(&rules, &parts, client).await,
            None => None,
        };
        let locate = |needs: &Needs| self.proxy.timeline.as_ref().map(|timeline| timeline.locate(needs));
        let serving = Serving {
            routes: &rules.routes,
            limits: rules.limits.defined().collect(),
            client,
            foreseen: foreseen.as_ref(),
            voids: Some(self.proxy.cache.voids()),
            locate: &locate,
        };
        let now = foreseen.as_ref().map_or_else(Wall::now, |foreseen| foreseen.now);
        text_page(200, self.explainer.explain(&serving, &asked, &headers, now).1)
    }
}

/// A field as `Name: value`.
fn read_field(text: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':')?;
    Some((name.trim().parse().ok()?, value.trim().parse().ok()?))
}

/// The head of a GET; `None` for a target that is none.
fn request_for(target: &str, headers: &HeaderMap) -> Option<request::Parts> {
    let mut parts = Request::get(target).body(()).ok()?.into_parts().0;
    parts.headers = headers.clone();
    Some(parts)
}

fn text_page(status: u16, text: impl Into<Bytes>) -> Response<Reply> {
    page(status, "text/plain; charset=utf-8", text)
}

fn page(status: u16, kind: &'static str, body: impl Into<Bytes>) -> Response<Reply> {
    let mut response = errors::json(status, body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
