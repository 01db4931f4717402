//! Warming: asks for the targets of `[warm]` in the background, as a client would.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use http::header::HOST;
use http::{HeaderValue, Request};
use http_body_util::BodyExt;
use tokio::runtime::Handle;

use super::Proxy;
use crate::body;
use crate::request::Arrival;

/// Warms the cache of a proxy.
pub struct Warmer {
    /// What is asked for.
    pub targets: Vec<String>,
    /// Where that is done.
    pub runtime: Handle,
}

impl Warmer {
    /// Starts warming and returns how many targets there are. They are asked for one after the other, so that the upstream
    /// is not flooded.
    #[must_use]
    pub fn start(&self, proxy: &Arc<Proxy>) -> usize {
        // What is left to be warmed does not keep a proxy alive that was stopped.
        let (proxy, targets) = (Arc::downgrade(proxy), self.targets.clone());
        self.runtime.spawn(async move {
            for target in targets {
                let (Some(proxy), Ok(uri)) = (proxy.upgrade(), target.parse()) else { continue };
                let mut request = Request::new(body::empty());
                *request.uri_mut() = uri;
                request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
                let arrival = Arrival { peer: IpAddr::V4(Ipv4Addr::LOCALHOST), interim: None, refused: None };
                let response = proxy.handle(request, arrival).await;
                let status = response.status();
                let whole = response.into_body().collect().await.is_ok();
                tracing::info!(target, %status, whole, "warmed");
            }
        });
        self.targets.len()
    }
}
