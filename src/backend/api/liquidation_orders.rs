//! `GET /api/liquidation-orders`: the newest `limit` orders of a symbol.

use std::fmt::Write as _;

use super::ApiError;
use super::decimal::{Decimal, write_f64};
use super::orders::{Order, Orders};
use super::params::Params;
use crate::moment;
use crate::target::Target;

const TOGETHER: &str = "Both start_timestamp and end_timestamp must be provided together";
const BOTH: &str = "Cannot provide both timestamp range and limit";
const EITHER: &str = "Either provide both timestamps or a limit parameter";
const BAD_TIMES: &str = "Invalid timestamp format. Use Unix milliseconds or ISO format";
const NEGATIVE: &str = "Timestamps must be non-negative";
const ORDER: &str = "start_timestamp must be before end_timestamp";
const NOTHING: &str = "No liquidation orders found for the given criteria";
const NO_PAGES: &str = "This trial answers the newest orders only: use symbol and limit";

/// A JSON array of orders, newest first.
///
/// # Errors
/// 422, 400 and 404 as the contract orders them.
pub async fn get<O: Orders>(orders: &O, target: &Target<'_>) -> Result<String, ApiError> {
    let mut params = Params::new(target);
    let symbol = params.required("symbol");
    let (start, end) = (params.optional("start_timestamp"), params.optional("end_timestamp"));
    let limit = params.count("limit", Some(1000));
    params.count("page", None);
    params.count("page_size", Some(1000));
    params.finish()?;
    let limit = match (start, end, limit) {
        (Some(_), Some(_), Some(_)) => return Err(ApiError::BadRequest(BOTH)),
        (Some(start), Some(end), None) => return Err(ranged(&start, &end)),
        (None, None, Some(limit)) => usize::try_from(limit).unwrap_or(0),
        (None, None, None) => return Err(ApiError::BadRequest(EITHER)),
        _ => return Err(ApiError::BadRequest(TOGETHER)),
    };
    let found = orders.latest(&symbol, limit).await;
    if found.is_empty() {
        return Err(ApiError::NotFound(NOTHING));
    }
    let mut out = String::with_capacity(found.len() * 300);
    for order in &found {
        out.push(if out.is_empty() { '[' } else { ',' });
        write_order(order, &mut out);
    }
    out.push(']');
    Ok(out)
}

/// What is wrong with a range; a valid one is answered by the native API to come.
fn ranged(start: &str, end: &str) -> ApiError {
    ApiError::BadRequest(match (moment::parse(start), moment::parse(end)) {
        (Some(start), Some(end)) if start < 0 || end < 0 => NEGATIVE,
        (Some(start), Some(end)) if start > end => ORDER,
        (Some(_), Some(_)) => NO_PAGES,
        _ => BAD_TIMES,
    })
}

/// Writes an order with its fields in the contract's order.
pub fn write_order(order: &Order, out: &mut String) {
    let text = |value: &str| serde_json::to_string(value).unwrap_or_default();
    let number = |name: &str, value: Option<Decimal>, out: &mut String| {
        out.push_str(",\"");
        out.push_str(name);
        out.push_str("\":");
        match value {
            Some(value) => write_f64(value.to_f64(), out),
            None => out.push_str("null"),
        }
    };
    let (symbol, side) = (text(&order.symbol), text(&order.side));
    let (kind, force) = (text(&order.order_type), text(&order.time_in_force));
    let mut written = write!(out, "{{\"symbol\":{symbol},\"side\":{side},\"order_type\":{kind},\"time_in_force\":{force}");
    number("original_quantity", Some(order.original_quantity), out);
    number("price", order.price, out);
    number("average_price", Some(order.average_price), out);
    written = written.and_then(|()| write!(out, ",\"order_status\":{}", text(&order.order_status)));
    number("order_last_filled_quantity", Some(order.order_last_filled_quantity), out);
    number("order_filled_accumulated_quantity", Some(order.order_filled_accumulated_quantity), out);
    written = written.and_then(|()| write!(out, ",\"order_trade_time\":{}}}", order.order_trade_time));
    debug_assert!(written.is_ok(), "a String takes every write");
}
