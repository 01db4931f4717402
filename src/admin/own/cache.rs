//! `/api/cache/*`: the cache as the API's own clients know it.
//!
//! The legacy service's cache was Redis, so its statistics bear Redis's names. Here the hits and misses are Sluice's
//! own, whichever tier answered; the rest is told by Redis, or without it by the tier in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::Response;
use serde::Serialize;

use super::super::audit::Actor;
use super::health::{hit_rate, hits_and_misses};
use super::recent::Recent;
use super::schema::{CacheNumbers, CacheState, CacheStatistics, Cleared, NoCache, SymbolInvalidated, SymbolsInvalidated, Warming};
use crate::api::schema::Refusal;
use crate::body::Reply;
use crate::cache::void::Selection;
use crate::config::template::symbol_tag;
use crate::proxy::warm::Warmer;
use crate::proxy::{Proxy, errors};
use crate::request::target::Target;

/// The readable key under which the list of symbols is kept.
const SYMBOLS_KEY: &str = "symbols:all";
/// The contract's sentence where there is no cache at all.
const NO_CACHE: &str = "Redis not available - running in fallback mode";

/// `GET /api/cache/stats`.
#[utoipa::path(
    get,
    path = "/api/cache/stats",
    operation_id = "get_cache_statistics_api_cache_stats_get",
    summary = "What the cache is doing",
    description = "",
    tag = "cache",
    responses((status = 200, description = "Statistics, or that there is no cache", body = CacheStatistics)),
)]
pub async fn stats(server: &Recent<Option<BTreeMap<String, String>>>, proxy: &Arc<Proxy>) -> Response<Reply> {
    let asking = Arc::clone(proxy);
    let redis = server.get(async move { asking.cache.store().server_info().await }).await.flatten();
    let memory = proxy.cache.store().report().into_iter().find(|tier| tier.tier == "memory" && tier.capacity != Some(0));
    let number = |name: &str| redis.as_ref().and_then(|info| info.get(name)?.parse::<u64>().ok());
    let (hits, misses) = hits_and_misses(proxy);
    let page = if redis.is_none() && memory.is_none() {
        CacheStatistics {
            cache_stats: CacheState::Unavailable(NoCache { available: false, error: NO_CACHE.to_owned() }),
            message: "Cache not available".to_owned(),
        }
    } else {
        let used = number("used_memory").or_else(|| memory.and_then(|tier| tier.bytes)).unwrap_or(0);
        let numbers = CacheNumbers {
            available: true,
            connected_clients: number("connected_clients").unwrap_or(0),
            used_memory: used,
            used_memory_human: human(used),
            keyspace_hits: hits,
            keyspace_misses: misses,
            total_commands_processed: number("total_commands_processed").unwrap_or(0),
            hit_rate: hit_rate(proxy),
        };
        CacheStatistics { cache_stats: CacheState::Available(numbers), message: "Cache statistics retrieved successfully".to_owned() }
    };
    json_page(&page)
}

/// `1.05M`, as Redis writes it.
#[allow(clippy::cast_precision_loss, reason = "rounded for humans")]
fn human(bytes: u64) -> String {
    let units = [(1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    match units.iter().find(|(size, _)| bytes >= *size) {
        Some((size, unit)) => format!("{:.2}{unit}", bytes as f64 / *size as f64),
        None => format!("{bytes}B"),
    }
}

/// `POST /api/cache/clear[?pattern=*]`.
#[utoipa::path(
    post,
    path = "/api/cache/clear",
    operation_id = "clear_cache_api_cache_clear_post",
    summary = "Removes entries by a pattern",
    description = "",
    tag = "cache",
    params(("pattern" = Option<String>, Query, description = "A glob over the readable keys, * if left out")),
    responses(
        (status = 200, description = "Entries were removed", body = Cleared),
        (status = 401, description = "The admin token is missing or wrong", body = Refusal),
        (status = 403, description = "No admin token is configured", body = Refusal),
    ),
    security(("admin_token" = [])),
)]
pub async fn clear(proxy: &Arc<Proxy>, target: &Target<'_>, actor: &Actor<'_>) -> Response<Reply> {
    let pattern = target.text("pattern").map_or_else(|| "*".to_owned(), std::borrow::Cow::into_owned);
    let purged = purge(proxy, Selection::Pattern(pattern.clone()), actor).await;
    json_page(&Cleared { deleted_keys: purged, pattern, message: format!("Successfully cleared {purged} cache entries") })
}

/// `POST /api/cache/invalidate/symbol/{symbol}`.
#[utoipa::path(
    post,
    path = "/api/cache/invalidate/symbol/{symbol}",
    operation_id = "invalidate_symbol_cache_api_cache_invalidate_symbol__symbol__post",
    summary = "Removes entries about a symbol",
    description = "",
    tag = "cache",
    params(("symbol" = String, Path, description = "In upper or lower case")),
    responses(
        (status = 200, description = "Entries were removed", body = SymbolInvalidated),
        (status = 401, description = "The admin token is missing or wrong", body = Refusal),
        (status = 403, description = "No admin token is configured", body = Refusal),
    ),
    security(("admin_token" = [])),
)]
pub async fn invalidate_symbol(proxy: &Arc<Proxy>, symbol: &str, actor: &Actor<'_>) -> Response<Reply> {
    let purged = purge(proxy, Selection::Tag(symbol_tag(symbol)), actor).await;
    let message = format!("Successfully invalidated {purged} cache entries for symbol {symbol}");
    json_page(&SymbolInvalidated { deleted_keys: purged, symbol: symbol.to_owned(), message })
}

/// `POST /api/cache/invalidate/symbols`.
#[utoipa::path(
    post,
    path = "/api/cache/invalidate/symbols",
    operation_id = "invalidate_symbols_endpoint_api_cache_invalidate_symbols_post",
    summary = "Removes the list of symbols",
    description = "",
    tag = "cache",
    responses(
        (status = 200, description = "The list of symbols was removed", body = SymbolsInvalidated),
        (status = 401, description = "The admin token is missing or wrong", body = Refusal),
        (status = 403, description = "No admin token is configured", body = Refusal),
    ),
    security(("admin_token" = [])),
)]
pub async fn invalidate_symbols(proxy: &Arc<Proxy>, actor: &Actor<'_>) -> Response<Reply> {
    purge(proxy, Selection::Pattern(SYMBOLS_KEY.to_owned()), actor).await;
    json_page(&SymbolsInvalidated { success: true, message: "Symbols cache invalidated successfully".to_owned() })
}

/// `POST /api/cache/warm`.
#[utoipa::path(
    post,
    path = "/api/cache/warm",
    operation_id = "warm_cache_endpoint_api_cache_warm_post",
    summary = "Asks for the targets of [warm], in the background",
    description = "",
    tag = "cache",
    responses(
        (status = 200, description = "Warming has begun", body = Warming),
        (status = 401, description = "The admin token is missing or wrong", body = Refusal),
        (status = 403, description = "No admin token is configured", body = Refusal),
    ),
    security(("admin_token" = [])),
)]
#[must_use]
pub fn warm(warmer: &Warmer, proxy: &Arc<Proxy>, actor: &Actor<'_>) -> Response<Reply> {
    let targets = warmer.start(proxy);
    actor.did(&format!("{targets} targets"));
    json_page(&Warming { message: "Cache warming started in background".to_owned(), status: "initiated".to_owned() })
}

async fn purge(proxy: &Arc<Proxy>, what: Selection, actor: &Actor<'_>) -> u64 {
    actor.begins(&what.to_string());
    let purged = proxy.purge(what, false).await;
    actor.did(&purged.to_string());
    purged.count.unwrap_or(0)
}

fn json_page(page: &impl Serialize) -> Response<Reply> {
    // Structs of strings and numbers always serialise.
    errors::json(200, serde_json::to_string(page).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_read_as_redis_writes_them() {
        for (bytes, text) in [(0, "0B"), (1023, "1023B"), (1536, "1.50K"), (1_101_004, "1.05M"), (3 << 30, "3.00G")] {
            assert_eq!(super::human(bytes), text);
        }
    }
}
