//! `GET /api/liquidations`: USD liquidated, by buckets that count from the request's own start.

use http::Response;

use super::answer::{ApiError, json};
use super::decimal::write_f64;
use super::json::{Style, write_text};
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
    // Enough for each, so that it does not grow to twice as much.
    let mut out = String::with_capacity(buckets.len() * 144);
    for bucket in &buckets {
        out.push_str(if out.is_empty() { "[{\"timestamp\":" } else { ",{\"timestamp\":" });
        out.push_str(itoa::Buffer::new().format(bucket.timestamp));
        out.push_str(",\"timestamp_iso\":\"");
        write_iso(bucket.timestamp, &mut out);
        out.push_str("\",\"side\":");
        write_text(bucket.side.as_deref(), Style::Compact, &mut out);
        out.push_str(",\"cumulated_usd_size\":");
        write_f64(bucket.usd, &mut out);
        out.push('}');
    }
    out.push(']');
    out.shrink_to_fit();
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

/// Writes `2025-01-01T02:53:20+00:00`, with six digits of fraction where the milliseconds are not zero.
fn write_iso(timestamp: i64, out: &mut String) {
    let Ok(at) = jiff::Timestamp::from_millisecond(timestamp) else {
        return out.push_str(itoa::Buffer::new().format(timestamp));
    };
    let at = jiff::tz::Offset::UTC.to_datetime(at);
    let mut number = |value: i16, width: usize, after: char| {
        let mut buffer = itoa::Buffer::new();
        let digits = buffer.format(value);
        (digits.len()..width).for_each(|_| out.push('0'));
        out.push_str(digits);
        out.push(after);
    };
    number(at.year(), 4, '-');
    number(at.month().into(), 2, '-');
    number(at.day().into(), 2, 'T');
    number(at.hour().into(), 2, ':');
    number(at.minute().into(), 2, ':');
    match at.millisecond() {
        0 => number(at.second().into(), 2, '+'),
        milliseconds => {
            number(at.second().into(), 2, '.');
            number(milliseconds, 3, '0');
            out.push_str("00+");
        }
    }
    out.push_str("00:00");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn times_are_written_as_iso_8601(timestamp in 0_i64..253_402_300_799_999, whole: bool) {
            let timestamp = if whole { timestamp / 1000 * 1000 } else { timestamp };
            let form = if timestamp % 1000 == 0 { "%Y-%m-%dT%H:%M:%S+00:00" } else { "%Y-%m-%dT%H:%M:%S.%6f+00:00" };
            let expected = jiff::Timestamp::from_millisecond(timestamp).unwrap().strftime(form).to_string();
            let mut out = String::new();
            write_iso(timestamp, &mut out);
            prop_assert_eq!(out, expected);
        }
    }
}
