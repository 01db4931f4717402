//! `GET /api/liquidation-orders`: the newest `limit` orders of a symbol, or a page of those within a span.

use http::Response;

use super::answer::{ApiError, json};
use super::json::{Style, push, write_order};
use super::orders::{Order, Orders, Page, Span};
use super::params::{Params, span};
use super::schema::{Invalid, LiquidationOrders, Refusal};
use crate::body::Stream;
use crate::request::target::Target;

const TOGETHER: &str = "Both start_timestamp and end_timestamp must be provided together";
const BOTH: &str = "Cannot provide both timestamp range and limit";
const EITHER: &str = "Either provide both timestamps or a limit parameter";
/// Also said of the stream's.
pub const BAD_TIMES: &str = "Invalid timestamp format. Use Unix milliseconds or ISO format";
const NEGATIVE: &str = "Timestamps must be non-negative";
const NOTHING: &str = "No liquidation orders found for the given criteria";

/// The most orders that one answer holds.
pub const MOST: i64 = 1000;

/// A JSON array of the newest orders, or an object with a page of them.
///
/// # Errors
/// 422, 400 and 404 as the contract orders them, and the database's.
#[utoipa::path(
    get,
    path = "/api/liquidation-orders",
    operation_id = "get_liquidation_orders_api_liquidation_orders_get",
    summary = "The newest orders of a symbol, or a page of those within a span",
    description = "",
    tag = "liquidations",
    params(
        ("symbol" = String, Query, description = "Such as BTCUSDT, in upper or lower case"),
        ("start_timestamp" = Option<String>, Query, description = "Unix milliseconds or ISO 8601; with end_timestamp, and without limit"),
        ("end_timestamp" = Option<String>, Query, description = "Unix milliseconds or ISO 8601; included"),
        ("limit" = Option<i64>, Query, description = "The newest orders, so many; without timestamps", minimum = 1, maximum = 1000),
        ("page" = Option<i64>, Query, description = "Which page of the span, 1 if left out", minimum = 1),
        ("page_size" = Option<i64>, Query, description = "Orders on a page, 100 if left out", minimum = 1, maximum = 1000),
    ),
    responses(
        (status = 200, description = "With limit an array of orders, with timestamps a page of them; newest first", body = LiquidationOrders),
        (status = 400, description = "Timestamps that make no sense, or neither or both of timestamps and limit", body = Refusal),
        (status = 404, description = "No such orders, or a page past the end", body = Refusal),
        (status = 422, description = "Missing parameters, or numbers out of range", body = Invalid),
        (status = 503, description = "The database cannot be reached, or too many queries wait for it", body = Refusal),
        (status = 504, description = "The query took too long", body = Refusal),
    ),
)]
pub async fn get<O: Orders>(orders: &O, target: &Target<'_>) -> Result<Response<Stream>, ApiError> {
    let mut params = Params::new(target);
    let symbol = params.required("symbol");
    let (start, end) = (params.optional("start_timestamp"), params.optional("end_timestamp"));
    let limit = params.count("limit", Some(MOST));
    let page = params.count("page", None).unwrap_or(1);
    let page_size = params.count("page_size", Some(MOST)).unwrap_or(100);
    params.finish()?;
    match (start, end, limit) {
        (Some(_), Some(_), Some(_)) => Err(ApiError::BadRequest(BOTH)),
        (Some(start), Some(end), None) => paged(orders, &symbol, span(&start, &end, BAD_TIMES, Some(NEGATIVE))?, page, page_size).await,
        (None, None, Some(limit)) => latest(orders, &symbol, usize::try_from(limit).unwrap_or(0)).await,
        (None, None, None) => Err(ApiError::BadRequest(EITHER)),
        _ => Err(ApiError::BadRequest(TOGETHER)),
    }
}

async fn latest<O: Orders>(orders: &O, symbol: &str, limit: usize) -> Result<Response<Stream>, ApiError> {
    let found = orders.latest(symbol, limit).await?;
    let mut out = String::with_capacity(found.len() * 350);
    write_array(&found, &mut out)?;
    Ok(json(out))
}

/// A page past the end holds nothing, even where its place is beyond 64 bits (deviation D2).
async fn paged<O: Orders>(orders: &O, symbol: &str, span: Span, number: i64, size: i64) -> Result<Response<Stream>, ApiError> {
    let offset = (number - 1).checked_mul(size).and_then(|offset| u64::try_from(offset).ok());
    let (Some(offset), Ok(places)) = (offset, usize::try_from(size)) else { return Err(ApiError::NotFound(NOTHING)) };
    let found = orders.page(symbol, span, Page { offset, size: places }).await?;
    let mut out = String::with_capacity(found.len() * 350 + 100);
    out.push_str("{\"data\":");
    write_array(&found, &mut out)?;
    let (returned, more) = (found.len(), found.len() == places);
    push(
        &mut out,
        format_args!(",\"pagination\":{{\"page\":{number},\"page_size\":{size},\"total_returned\":{returned},\"has_more\":{more}}}}}"),
    );
    Ok(json(out))
}

fn write_array(orders: &[Order], out: &mut String) -> Result<(), ApiError> {
    if orders.is_empty() {
        return Err(ApiError::NotFound(NOTHING));
    }
    for (index, order) in orders.iter().enumerate() {
        out.push(if index == 0 { '[' } else { ',' });
        write_order(order, Style::Compact, out);
    }
    out.push(']');
    Ok(())
}
