//! The liquidation API as an existing service: orders that change while it runs, and that it may lie about.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt;
use sluice::api::Api;
use sluice::api::sample::Sample;
use sluice::upstream::Backend as _;
use sluice::upstream::upload::Progress;
use tokio::runtime::Handle;

use super::backend::{Backend, Step, reply};

/// What the service makes of an answer that it would give to a target.
pub type Lie = dyn Fn(&str, Vec<u8>) -> Vec<u8> + Send + Sync;

/// An existing service.
pub struct Service {
    pub backend: Backend,
    orders: Arc<Mutex<Vec<String>>>,
    lie: Arc<Mutex<Arc<Lie>>>,
}

impl Service {
    /// Over orders in the schema's column order. Its own answers are those of the API.
    pub async fn start(orders: Vec<String>) -> Self {
        Self::start_slow(orders, Duration::ZERO).await
    }

    /// The same, taking so long for each answer.
    pub async fn start_slow(orders: Vec<String>, delay: Duration) -> Self {
        let orders = Arc::new(Mutex::new(orders));
        let lie: Arc<Mutex<Arc<Lie>>> = Arc::new(Mutex::new(Arc::new(|_, body| body)));
        let backend = Backend::start({
            let (orders, lie) = (Arc::clone(&orders), Arc::clone(&lie));
            let known: Mutex<Option<(usize, Arc<Api<Sample>>)>> = Mutex::default();
            move |asked| {
                let api = {
                    let (orders, mut known) = (orders.lock().unwrap(), known.lock().unwrap());
                    let changed = known.as_ref().is_none_or(|(count, _)| *count != orders.len());
                    if changed {
                        let sample = Sample::parse(&orders.join("\n"), delay).unwrap();
                        *known = Some((orders.len(), Arc::new(Api::new(sample, Handle::current()))));
                    }
                    Arc::clone(&known.as_ref().unwrap().1)
                };
                let lie = Arc::clone(&lie.lock().unwrap());
                answer(&api, &asked.target, &*lie)
            }
        })
        .await;
        Self { backend, orders, lie }
    }

    /// An order arrives.
    pub fn add(&self, row: String) {
        self.orders.lock().unwrap().push(row);
    }

    /// From now on it lies.
    pub fn lie(&self, lie: impl Fn(&str, Vec<u8>) -> Vec<u8> + Send + Sync + 'static) {
        *self.lie.lock().unwrap() = Arc::new(lie);
    }

    /// How many requests begin so that were made since `since` of all of them.
    pub fn asked(&self, since: usize, begin: &str) -> usize {
        self.backend.asked.lock().unwrap()[since..].iter().filter(|asked| asked.target.starts_with(begin)).count()
    }
}

fn answer(api: &Api<Sample>, target: &str, lie: &Lie) -> Vec<Step> {
    let request = http::Request::get(target).body(sluice::body::empty()).unwrap();
    let call = api.call(request, &Progress::begin());
    let (head, body) = tokio::task::block_in_place(|| {
        Handle::current().block_on(async {
            let (head, body) = call.await.unwrap().into_parts();
            (head, body.collect().await.unwrap().to_bytes().to_vec())
        })
    });
    let kind = head.headers["content-type"].to_str().unwrap();
    reply(&head.status.to_string(), &format!("Server: uvicorn\r\nContent-Type: {kind}\r\n"), &lie(target, body))
}
