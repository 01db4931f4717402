//! What the endpoints ask of whatever holds the orders.

use std::collections::BTreeMap;

use super::decimal::Decimal;

/// A liquidation order, as the table holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// As stored.
    pub symbol: String,
    /// `buy` or `sell`.
    pub side: String,
    /// `LIMIT` or `MARKET`.
    pub order_type: String,
    /// `IOC` or `GTC`.
    pub time_in_force: String,
    /// What was ordered.
    pub original_quantity: Decimal,
    /// The limit, if there is one.
    pub price: Option<Decimal>,
    /// What was paid on average.
    pub average_price: Decimal,
    /// `FILLED` and the like.
    pub order_status: String,
    /// What the last fill brought.
    pub order_last_filled_quantity: Decimal,
    /// What all fills brought.
    pub order_filled_accumulated_quantity: Decimal,
    /// Milliseconds since 1970.
    pub order_trade_time: i64,
}

/// Sums of USD by bucket and side: (milliseconds, side) → USD in units of 10⁻¹⁶.
pub type Buckets = BTreeMap<(i64, String), i128>;

/// Holds orders. Symbols match as the database's comparison of lower-cased text does.
pub trait Orders: Send + Sync + 'static {
    /// The distinct symbols that do not end in a digit, in the database's case-insensitive order.
    fn symbols(&self) -> impl Future<Output = Vec<String>> + Send;

    /// The sums of `average_price × filled` between two moments (both included), by buckets of `width` milliseconds
    /// counted from `start`.
    fn buckets(&self, symbol: &str, start: i64, end: i64, width: i64) -> impl Future<Output = Buckets> + Send;

    /// The newest orders of a symbol, newest first.
    fn latest(&self, symbol: &str, limit: usize) -> impl Future<Output = Vec<Order>> + Send;
}
