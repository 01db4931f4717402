//! `GET /api/liquidations`: USD liquidated, by buckets that count from the request's own start.

use http::Response;

use super::answer::{ApiError, json};
use super::decimal::write_f64;
use super::json::{Style, push, write_text};
use super::orders::Orders;
use super::params::{Params, span};
use super::schema::{Invalid, LiquidationBucket, Refusal};
use crate::body::Stream;
use crate::request::target::Target;
use crate::request::timestamp;

const BAD_TIMES: &str = "start_timestamp and end_timestamp must be valid Unix timestamps in miliseconds or datetime strings in ISO format";
const NEGATIVE: &str = "start_timestamp and end_timestamp must be non-negative integers";
const BAD_TIMEFRAME: &str = "timeframe must be a positive whole number of minutes, hours or days, such as 5m, 1h or 1d";
const NOTHING: &str = "No data found for the given parameters";

/// A JSON array of `{timestamp, timestamp_iso, side, cumulated_usd_size}`.
///
/// # Errors
/// 422, 400 and 404 as the contract orders them, and the database's.
#[utoipa::path(
    get,
    path = "/api/liquidations",
    operation_id = "get_liquidations_api_liquidations_get",
    summary = "USD liquidated, by buckets of time",
    description = "",
    tag = "liquidations",
    params(
        ("symbol" = String, Query, description = "Such as BTCUSDT, in upper or lower case"),
        ("timeframe" = String, Query, description = "The width of a bucket: a whole number of minutes, hours or days, such as 5m, 1h or 1d"),
        ("start_timestamp" = String, Query, description = "Unix milliseconds or ISO 8601; buckets count from here"),
        ("end_timestamp" = String, Query, description = "Unix milliseconds or ISO 8601; included"),
    ),
    responses(
        (status = 200, description = "USD liquidated, by bucket and side; empty buckets are absent", body = Vec<LiquidationBucket>),
        (status = 400, description = "Timestamps or timeframe that make no sense", body = Refusal),
        (status = 404, description = "No orders within the span", body = Refusal),
        (status = 422, description = "Missing parameters", body = Invalid),
        (status = 503, description = "The database cannot be reached, or too many queries wait for it", body = Refusal),
        (status = 504, description = "The query took too long", body = Refusal),
    ),
)]
pub async fn get<O: Orders>(orders: &O, target: &Target<'_>) -> Result<Response<Stream>, ApiError> {
    let mut params = Params::new(target);
    let symbol = params.required("symbol");
    let timeframe = params.required("timeframe");
    let (start, end) = (params.required("start_timestamp"), params.required("end_timestamp"));
    params.finish()?;
    let span = span(&start, &end, BAD_TIMES, Some(NEGATIVE))?;
    let width = width(&timeframe).ok_or(ApiError::BadRequest(BAD_TIMEFRAME))?;
    let buckets = orders.buckets(&symbol, span, width).await?;
    if buckets.is_empty() {
        return Err(ApiError::NotFound(NOTHING));
    }
    let mut out = String::with_capacity(buckets.len() * 120);
    for bucket in &buckets {
        out.push(if out.is_empty() { '[' } else { ',' });
        push(&mut out, format_args!("{{\"timestamp\":{0},\"timestamp_iso\":\"{1}\",\"side\":", bucket.timestamp, iso(bucket.timestamp)));
        write_text(bucket.side.as_deref(), Style::Compact, &mut out);
        out.push_str(",\"cumulated_usd_size\":");
        write_f64(bucket.usd, &mut out);
        out.push('}');
    }
    out.push(']');
    Ok(json(out))
}

/// `5m`, `+1h`, `01D` in milliseconds; `None` for what is not a positive whole number of them (deviation D1).
fn width(timeframe: &str) -> Option<i64> {
    let unit = timeframe.chars().next_back()?;
    let unit_millis = match unit.to_ascii_lowercase() {
        'm' => 60_000,
        'h' => 3_600_000,
        'd' => 86_400_000,
        _ => return None,
    };
    let count = timestamp::integer(&timeframe[..timeframe.len() - unit.len_utf8()])?;
    if count > 0 { Some(count.saturating_mul(unit_millis)) } else { None }
}

/// `2025-01-01T02:53:20+00:00`, with six digits of fraction where the milliseconds are not zero.
#[must_use]
pub fn iso(timestamp: i64) -> String {
    let Ok(at) = jiff::Timestamp::from_millisecond(timestamp) else { return timestamp.to_string() };
    let form = if timestamp % 1000 == 0 { "%Y-%m-%dT%H:%M:%S+00:00" } else { "%Y-%m-%dT%H:%M:%S.%6f+00:00" };
    at.strftime(form).to_string()
}
