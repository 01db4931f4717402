//! The shapes of what Sluice answers itself, as the API's description at `/openapi.json` tells them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How everything is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct HealthReport {
    /// `healthy` or `unhealthy`.
    pub status: String,
    /// When this was said, in ISO 8601, UTC.
    pub timestamp: String,
    /// How each part is.
    pub components: Components,
}

/// The parts.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Components {
    /// The database; its status is that of the whole.
    pub database: Component,
    /// The shared cache, which may be missing.
    pub redis: Component,
}

/// A part.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Component {
    /// `healthy`, `degraded` or `unhealthy`.
    pub status: String,
    /// A sentence.
    pub message: String,
    /// Hits in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub hit_rate: Option<f64>,
}

/// What the cache is doing.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CacheStatistics {
    /// The numbers, or why there are none.
    pub cache_stats: CacheState,
    /// A sentence.
    pub message: String,
}

/// A cache, or none.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum CacheState {
    /// There is one.
    Available(CacheNumbers),
    /// There is none.
    Unavailable(NoCache),
}

/// A cache in numbers.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CacheNumbers {
    /// `true`.
    pub available: bool,
    /// Connections to Redis.
    pub connected_clients: u64,
    /// Bytes that Redis uses; without it, bytes in memory.
    pub used_memory: u64,
    /// The same for humans.
    pub used_memory_human: String,
    /// Requests that the cache answered.
    pub keyspace_hits: u64,
    /// Requests that it could not answer.
    pub keyspace_misses: u64,
    /// By Redis.
    pub total_commands_processed: u64,
    /// Hits in percent.
    pub hit_rate: f64,
}

/// No cache.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct NoCache {
    /// `false`.
    pub available: bool,
    /// Why.
    pub error: String,
}

/// Entries that a pattern meant are gone.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Cleared {
    /// How many they were.
    pub deleted_keys: u64,
    /// The pattern.
    pub pattern: String,
    /// A sentence.
    pub message: String,
}

/// Entries about a symbol are gone.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct SymbolInvalidated {
    /// How many they were.
    pub deleted_keys: u64,
    /// The symbol, as it was asked.
    pub symbol: String,
    /// A sentence.
    pub message: String,
}

/// The list of symbols is gone.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct SymbolsInvalidated {
    /// `true`.
    pub success: bool,
    /// A sentence.
    pub message: String,
}

/// Warming has begun.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Warming {
    /// A sentence.
    pub message: String,
    /// `initiated`.
    pub status: String,
}
