//! Warming: asks for the targets of `[warm]` in the background, as a client would.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Weak;

use http::header::HOST;
use http::{HeaderValue, Request};
use http_body_util::BodyExt;
use tokio::runtime::Handle;

use crate::body;
use crate::front::listener::Arrival;
use crate::proxy::Proxy;

/// Warms a proxy.
pub struct Warmer {
    /// The proxy that this is a part of.
    pub proxy: Weak<Proxy>,
    /// What is asked for.
    pub targets: Vec<String>,
    /// Where that happens.
    pub runtime: Handle,
}

impl Warmer {
    /// Starts warming and returns how many targets there are. They are asked for one after the other, so that the
    /// backend is not flooded.
    #[must_use]
    pub fn start(&self) -> usize {
        let (proxy, targets) = (Weak::clone(&self.proxy), self.targets.clone());
        self.runtime.spawn(async move {
            for target in targets {
                let (Some(proxy), Ok(uri)) = (proxy.upgrade(), target.parse()) else { continue };
                let mut request = Request::new(body::empty());
                *request.uri_mut() = uri;
                request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
                let answer = proxy.handle(request, Arrival { peer: IpAddr::V4(Ipv4Addr::LOCALHOST), interim: None, refused: None }).await;
                let status = answer.status();
                let whole = answer.into_body().collect().await.is_ok();
                tracing::info!(target, %status, whole, "warmed");
            }
        });
        self.targets.len()
    }
}
