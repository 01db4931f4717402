//! `POST /warm`: asks for the targets of `[warm]` in the background, as a client would.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use http::header::HOST;
use http::{HeaderValue, Request, Response};
use http_body_util::BodyExt;
use serde_json::json;

use crate::body::{self, Reply};
use crate::proxy::Proxy;
use crate::respond;

/// Starts warming; one target after the other, so that the backend is not flooded.
#[must_use]
pub fn post(proxy: &Arc<Proxy>, targets: &[String]) -> Response<Reply> {
    let (proxy, targets) = (Arc::clone(proxy), targets.to_vec());
    let count = targets.len();
    tokio::spawn(async move {
        for target in targets {
            let Ok(uri) = target.parse() else { continue };
            let mut request = Request::new(body::empty());
            *request.uri_mut() = uri;
            request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
            let answer = proxy.handle(request, IpAddr::V4(Ipv4Addr::LOCALHOST)).await;
            let status = answer.status();
            let whole = answer.into_body().collect().await.is_ok();
            tracing::info!(target, %status, whole, "warmed");
        }
    });
    respond::json(200, json!({ "warming": count }).to_string())
}
