//! Requests that are sampled are answered in a span.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;

use super::Proxy;
use crate::body::{BoxError, Reply};
use crate::request::Arrival;

impl Proxy {
    /// Answers one request ([`Proxy::handle`]), in a span if it is sampled.
    pub async fn handle_traced<B>(self: &Arc<Self>, request: Request<B>, arrival: Arrival) -> Response<Reply>
    where
        B: Body<Data = Bytes, Error = BoxError> + Send + 'static,
    {
        let trusted = self.limits.trusts(arrival.peer);
        match self.tracer.as_ref().and_then(|tracer| tracer.request(request.method(), request.headers(), trusted)) {
            Some(span) => Box::pin(span.scope(self.handle(request, arrival))).await,
            None => self.handle(request, arrival).await,
        }
    }
}
