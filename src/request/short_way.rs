//! How a plain request is answered before the HTTP library sees it: between who reads its bytes and who has the answer.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::Extensions;
use tokio::time::Instant;

use crate::body::lent::Reading;

/// What may answer a request from its bytes.
pub trait ShortWay: Send + Sync {
    /// Answers a request of which `bytes` are all that came, at `began`: then the head was appended to `head`, else nothing has happened.
    ///
    /// `brought` is what a [`Way::Wait`] brought for these bytes; there is no second one.
    fn answer(&self, bytes: &[u8], began: Instant, brought: Option<&Extensions>, head: &mut Vec<u8>) -> Way;
}

/// What becomes of a request that might be answered from its bytes.
pub enum Way {
    /// It is answered, with this body, and the reading of it if it is large.
    Answered(Bytes, Option<Arc<Reading>>),
    /// This is to be waited for first. If it is not answered then either, what was brought goes with the request, as its extensions.
    Wait(Waiting),
    /// It goes through the library, with the same bytes.
    Library,
}

/// What is waited for before a request is answered from its bytes. It has a deadline of its own.
pub type Waiting = Pin<Box<dyn Future<Output = Extensions> + Send>>;
