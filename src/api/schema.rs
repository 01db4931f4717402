//! The shapes of the API's bodies, as its description at `/openapi.json` tells them.
//!
//! Bodies are written by hand, for their numbers' sake ([`super::json`]); a test holds every recorded body against these.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The USD liquidated on one side within one bucket.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct LiquidationBucket {
    /// The bucket's first moment, in Unix milliseconds.
    pub timestamp: i64,
    /// The same in ISO 8601, UTC.
    pub timestamp_iso: String,
    /// `buy` or `sell`.
    #[schema(required = true)]
    pub side: Option<String>,
    /// The sum of average price × filled quantity.
    pub cumulated_usd_size: f64,
}

/// A liquidation order. Whatever the table does not know is null.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct LiquidationOrder {
    /// As stored.
    #[schema(required = true)]
    pub symbol: Option<String>,
    /// `buy` or `sell`.
    #[schema(required = true)]
    pub side: Option<String>,
    /// `LIMIT` or `MARKET`.
    #[schema(required = true)]
    pub order_type: Option<String>,
    /// `IOC` or `GTC`.
    #[schema(required = true)]
    pub time_in_force: Option<String>,
    /// What was ordered.
    #[schema(required = true)]
    pub original_quantity: Option<f64>,
    /// The limit; null for market orders.
    #[schema(required = true)]
    pub price: Option<f64>,
    /// What was paid on average.
    #[schema(required = true)]
    pub average_price: Option<f64>,
    /// `FILLED` and the like.
    #[schema(required = true)]
    pub order_status: Option<String>,
    /// What the last fill brought.
    #[schema(required = true)]
    pub order_last_filled_quantity: Option<f64>,
    /// What all fills brought.
    #[schema(required = true)]
    pub order_filled_accumulated_quantity: Option<f64>,
    /// In Unix milliseconds.
    #[schema(required = true)]
    pub order_trade_time: Option<i64>,
}

/// The newest orders, or a page of those within a span.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum LiquidationOrders {
    /// With `limit`.
    Latest(Vec<LiquidationOrder>),
    /// With timestamps.
    Page(LiquidationOrderPage),
}

/// A page of orders.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct LiquidationOrderPage {
    /// Newest first.
    pub data: Vec<LiquidationOrder>,
    /// Which page this is.
    pub pagination: Pagination,
}

/// Which page it is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Pagination {
    /// Its number, from 1.
    pub page: i64,
    /// The most orders that it could hold.
    pub page_size: i64,
    /// How many it holds.
    pub total_returned: i64,
    /// Whether it is full, so that there may be another.
    pub has_more: bool,
}

/// Why there is no answer.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Refusal {
    /// A sentence.
    pub detail: String,
}

/// What is wrong with the parameters, all of it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Invalid {
    /// One for each failing parameter.
    pub detail: Vec<InvalidParameter>,
}

/// A failing parameter.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct InvalidParameter {
    /// `missing`, `int_parsing`, `greater_than` or `less_than_equal`.
    pub r#type: String,
    /// `query` and the parameter's name.
    pub loc: Vec<String>,
    /// A sentence.
    pub msg: String,
    /// As it was sent; null if it was not.
    #[schema(required = true)]
    pub input: Option<String>,
    /// The bound that was missed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub ctx: Option<Bound>,
}

/// A bound.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Bound {
    /// The number must be greater than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub gt: Option<i64>,
    /// The number may be this at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub le: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::DeserializeOwned;
    use serde_json::Value;

    /// The body has exactly the fields of the shape.
    fn fits<T: DeserializeOwned + Serialize>(body: &str) {
        let shape: T = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
        assert_eq!(serde_json::to_value(&shape).unwrap(), serde_json::from_str::<Value>(body).unwrap());
    }

    #[test]
    fn every_recorded_body_has_the_shape_that_is_told_of_it() {
        let mut checked = 0;
        for line in include_str!("../../tests/contract/golden.jsonl").lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let (target, body) = (line["target"].as_str().unwrap(), line["body"].as_str().unwrap());
            match (line["status"].as_u64().unwrap(), target.split('?').next().unwrap()) {
                (200, _) if line["method"] == "HEAD" => continue,
                (200, path) if path.ends_with("symbols") => fits::<Vec<String>>(body),
                (200, "/api/liquidations") => fits::<Vec<LiquidationBucket>>(body),
                (200, "/api/liquidation-orders") => fits::<LiquidationOrders>(body),
                (200, "/api/liquidation-orders/stream") => body.lines().for_each(fits::<LiquidationOrder>),
                (400 | 404 | 405 | 503, _) if !body.is_empty() => fits::<Refusal>(body),
                (422, _) => fits::<Invalid>(body),
                _ => continue,
            }
            checked += 1;
        }
        assert!(checked > 235, "{checked}");
    }
}
