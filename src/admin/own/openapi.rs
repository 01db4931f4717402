//! `GET /openapi.json`, the API's description, and `GET /docs`, a page made from it that needs no other server.

use std::sync::OnceLock;

use bytes::Bytes;
use http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use http::{HeaderValue, Response};
use utoipa::openapi::OpenApi as Description;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{cache, health};
use crate::api::{liquidation_orders, liquidations, stream, symbols};
use crate::body::Reply;
use crate::proxy::errors;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Liquidation API",
        description = "Liquidation orders, as they are and summed by time, and the cache in front of them.",
        license(name = "MIT", identifier = "MIT"),
    ),
    paths(
        liquidations::get,
        symbols::get,
        liquidation_orders::get,
        stream::get,
        cache::stats,
        cache::clear,
        cache::invalidate_symbol,
        cache::invalidate_symbols,
        cache::warm,
        health::get,
    ),
    tags(
        (name = "liquidations", description = "What was liquidated"),
        (name = "cache", description = "What is kept; what changes it needs the admin token"),
        (name = "health", description = "How everything is"),
    ),
    modifiers(&Finish),
)]
struct Api;

/// How the admin token is sent; and no fields that say nothing.
struct Finish;

impl Modify for Finish {
    fn modify(&self, description: &mut Description) {
        description.info.contact = None;
        for path in description.paths.paths.values_mut() {
            for operation in [&mut path.get, &mut path.post].into_iter().flatten() {
                operation.description = operation.description.take().filter(|text| !text.is_empty());
            }
        }
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("admin.token of the configuration")).build();
        description.components.get_or_insert_default().add_security_scheme("admin_token", SecurityScheme::Http(scheme));
    }
}

/// The page: it reads the description and lets its reader try each operation.
const PAGE: &str = include_str!("docs.html");

/// The OpenAPI 3.1 document.
#[must_use]
pub fn description() -> Response<Reply> {
    static TEXT: OnceLock<Bytes> = OnceLock::new();
    // A description made from types always serialises.
    let text = TEXT.get_or_init(|| Api::openapi().to_json().map(Bytes::from).unwrap_or_default());
    errors::json(200, text.clone())
}

/// The page.
#[must_use]
pub fn documentation() -> Response<Reply> {
    let mut response = errors::json(200, Bytes::from_static(PAGE.as_bytes()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'self' 'unsafe-inline'; frame-ancestors 'none'"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_the_contracts_names_and_parameters() {
        let text = Api::openapi().to_json().unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        for (path, method, id, parameters) in [
            ("/api/liquidations", "get", "get_liquidations_api_liquidations_get", "symbol timeframe start_timestamp end_timestamp"),
            ("/api/symbols", "get", "get_symbols_api_symbols_get", ""),
            (
                "/api/liquidation-orders",
                "get",
                "get_liquidation_orders_api_liquidation_orders_get",
                "symbol start_timestamp end_timestamp limit page page_size",
            ),
            (
                "/api/liquidation-orders/stream",
                "get",
                "stream_liquidation_orders_api_liquidation_orders_stream_get",
                "symbol start_timestamp end_timestamp batch_size",
            ),
            ("/api/cache/stats", "get", "get_cache_statistics_api_cache_stats_get", ""),
            ("/api/cache/clear", "post", "clear_cache_api_cache_clear_post", "pattern"),
            (
                "/api/cache/invalidate/symbol/{symbol}",
                "post",
                "invalidate_symbol_cache_api_cache_invalidate_symbol__symbol__post",
                "symbol",
            ),
            ("/api/cache/invalidate/symbols", "post", "invalidate_symbols_endpoint_api_cache_invalidate_symbols_post", ""),
            ("/api/cache/warm", "post", "warm_cache_endpoint_api_cache_warm_post", ""),
            ("/health", "get", "health_check_health_get", ""),
        ] {
            let operation = &document["paths"][path][method];
            assert_eq!(operation["operationId"], id);
            let named = operation["parameters"].as_array().map(Vec::as_slice).unwrap_or_default().iter();
            let names: Vec<&str> = named.map(|parameter| parameter["name"].as_str().unwrap()).collect();
            assert_eq!(names.join(" "), parameters, "{path}");
            assert!(operation["responses"]["200"]["content"].is_object(), "{path}");
        }
        assert_eq!(document["paths"].as_object().unwrap().len(), 10);
    }

    #[test]
    fn the_page_asks_no_other_server() {
        assert!(!PAGE.contains("http://") && !PAGE.contains("https://") && !PAGE.contains("src="));
    }
}
