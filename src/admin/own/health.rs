//! `GET /health`: how the parts are, as clients of the API know it.

use std::sync::Arc;
use std::time::Duration;

use http::header::ACCEPT_ENCODING;
use http::{HeaderValue, Request, Response};
use serde_json::Value;
use tokio::time::timeout;

use super::recent::Recent;
use super::schema::{Component, Components, HealthReport};
use crate::admin::readiness::serves_stored;
use crate::body::{self, Reply};
use crate::clock::Wall;
use crate::proxy::{Proxy, errors};
use crate::telemetry::metrics::OutcomeLabel;

/// How long the upstream has to say how it is.
const DEADLINE: Duration = Duration::from_secs(2);
/// The longest health answer that is read.
const MAX_HEALTH: usize = 64 << 10;

/// What the backend said last.
#[derive(Default)]
pub struct Health(Recent<Component>);

/// `GET /health`: the database as the backend sees it, the shared tier as Sluice sees it. An instance that serves what is stored while the
/// database is away is `degraded` and not unhealthy: a load balancer that asks here must not take it out just then.
#[utoipa::path(
    get,
    path = "/health",
    operation_id = "health_check_health_get",
    summary = "How the database and the cache are",
    description = "",
    tag = "health",
    responses(
        (status = 200, description = "The database answers, or what is stored is served without it (`degraded`)", body = HealthReport),
        (status = 503, description = "Neither", body = HealthReport),
    ),
)]
pub async fn get(health: &Health, proxy: &Arc<Proxy>) -> Response<Reply> {
    let asking = Arc::clone(proxy);
    let database = health.0.get(async move { ask(&asking).await }).await;
    let database = database.unwrap_or_else(|| component("unhealthy", "The backend could not be asked"));
    let healthy = database.status == "healthy";
    let tiers = proxy.cache.store().report();
    let redis = match tiers.iter().find(|tier| tier.tier == "redis") {
        Some(tier) if tier.up => Component { hit_rate: Some(hit_rate(proxy)), ..component("healthy", "Redis connection successful") },
        _ => component("degraded", "Redis not available - running in fallback mode"),
    };
    let (status, code) = match healthy {
        true => ("healthy", 200),
        false if serves_stored(proxy) => ("degraded", 200),
        false => ("unhealthy", 503),
    };
    let report = HealthReport { status: status.to_owned(), timestamp: timestamp(Wall::now()), components: Components { database, redis } };
    // Structs of strings and numbers always serialise.
    errors::json(code, serde_json::to_string(&report).unwrap_or_default())
}

fn component(status: &str, message: &str) -> Component {
    Component { status: status.to_owned(), message: message.to_owned(), hit_rate: None }
}

/// What the backend's own `/health` says of its database. A backend that has no such page is healthy if it answers.
async fn ask(proxy: &Proxy) -> Component {
    let unhealthy = |message| component("unhealthy", message);
    let mut request = Request::new(body::empty());
    *request.uri_mut() = http::Uri::from_static("/health");
    request.headers_mut().insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let answer = async {
        let answer = proxy.upstream.call_beside("health", request, DEADLINE).await.ok()?;
        let status = answer.status();
        let page = body::read(answer.into_body(), MAX_HEALTH).await?;
        Some((status, page))
    };
    let Ok(Some((status, page))) = timeout(DEADLINE, answer).await else {
        return unhealthy("The backend could not be reached");
    };
    let told: Option<Value> = serde_json::from_slice(&page).ok();
    let text = |name: &str| told.as_ref()?.pointer(&format!("/components/database/{name}"))?.as_str();
    match text("status") {
        Some(said) => component(said, text("message").unwrap_or_default()),
        None if status.is_server_error() => unhealthy("The backend failed"),
        None => component("healthy", "Database connection successful"),
    }
}

/// Hits, and requests that the cache could have answered but did not.
pub fn hits_and_misses(proxy: &Proxy) -> (u64, u64) {
    let of = |outcome| proxy.metrics.requests_with(outcome);
    (of(OutcomeLabel::Hit) + of(OutcomeLabel::Stale), of(OutcomeLabel::Miss) + of(OutcomeLabel::Collapsed))
}

/// Hits in percent of all requests that the cache could have answered, with two decimals.
#[allow(clippy::cast_precision_loss, reason = "a percentage")]
pub fn hit_rate(proxy: &Proxy) -> f64 {
    let (hits, misses) = hits_and_misses(proxy);
    if hits + misses == 0 { 0.0 } else { (hits as f64 / (hits + misses) as f64 * 1e4).round() / 1e2 }
}

/// `2026-11-22T17:55:25.897829+00:00`.
fn timestamp(now: Wall) -> String {
    let millis = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(millis).map_or_else(|_| String::new(), |at| at.strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string())
}
