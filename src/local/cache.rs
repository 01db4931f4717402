//! `/api/cache/*`: the cache as the API's own clients know it.
//!
//! The legacy service's cache was Redis, so its statistics bear Redis's names. Here the hits and misses are Sluice's
//! own, whichever tier answered; the rest is told by Redis, or without it by the tier in memory.

use http::Response;
use serde_json::{Value, json};

use super::health::{hit_rate, hits_and_misses};
use crate::body::Reply;
use crate::proxy::Proxy;
use crate::respond;
use crate::store::Selection;
use crate::target::Target;
use crate::template::symbol_tag;
use crate::warm::Warmer;

/// The readable key under which the list of symbols is kept.
const SYMBOLS_KEY: &str = "symbols:all";

/// `GET /api/cache/stats`.
pub async fn stats(proxy: &Proxy) -> Response<Reply> {
    let redis = proxy.store.shared_facts().await;
    let memory = proxy.store.report().into_iter().find(|tier| tier.tier == "memory" && tier.capacity != Some(0));
    let number = |name: &str| redis.as_ref().and_then(|facts| facts.get(name)?.parse::<u64>().ok());
    let (hits, misses) = hits_and_misses(proxy);
    let page = if redis.is_none() && memory.is_none() {
        json!({
            "cache_stats": { "available": false, "error": "Redis not available - running in fallback mode" },
            "message": "Cache not available",
        })
    } else {
        let used = number("used_memory").or_else(|| memory.and_then(|tier| tier.bytes)).unwrap_or(0);
        json!({
            "cache_stats": {
                "available": true,
                "connected_clients": number("connected_clients").unwrap_or(0),
                "used_memory": used,
                "used_memory_human": human(used),
                "keyspace_hits": hits,
                "keyspace_misses": misses,
                "total_commands_processed": number("total_commands_processed").unwrap_or(0),
                "hit_rate": hit_rate(proxy),
            },
            "message": "Cache statistics retrieved successfully",
        })
    };
    respond::json(200, page.to_string())
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
pub async fn clear(proxy: &Proxy, target: &Target<'_>) -> Response<Reply> {
    let pattern = target.text("pattern").map_or_else(|| "*".to_owned(), std::borrow::Cow::into_owned);
    let purged = purge(proxy, &Selection::Pattern(pattern.clone())).await;
    said(&json!({ "deleted_keys": purged, "pattern": pattern, "message": format!("Successfully cleared {purged} cache entries") }))
}

/// `POST /api/cache/invalidate/symbol/{symbol}`.
pub async fn invalidate_symbol(proxy: &Proxy, symbol: &str) -> Response<Reply> {
    let purged = purge(proxy, &Selection::Tag(symbol_tag(symbol))).await;
    let message = format!("Successfully invalidated {purged} cache entries for symbol {symbol}");
    said(&json!({ "deleted_keys": purged, "symbol": symbol, "message": message }))
}

/// `POST /api/cache/invalidate/symbols`.
pub async fn invalidate_symbols(proxy: &Proxy) -> Response<Reply> {
    purge(proxy, &Selection::Pattern(SYMBOLS_KEY.to_owned())).await;
    said(&json!({ "success": true, "message": "Symbols cache invalidated successfully" }))
}

/// `POST /api/cache/warm`.
#[must_use]
pub fn warm(warmer: &Warmer) -> Response<Reply> {
    let targets = warmer.start();
    tracing::info!(targets, "warming");
    said(&json!({ "message": "Cache warming started in background", "status": "initiated" }))
}

async fn purge(proxy: &Proxy, what: &Selection) -> usize {
    let purged = proxy.fetcher.purge(what, false).await;
    tracing::info!(?what, purged, "purged");
    purged
}

fn said(page: &Value) -> Response<Reply> {
    respond::json(200, page.to_string())
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
