//! `GET /api/symbols`: the distinct symbols that do not end in a digit.

use http::Response;

use super::answer::{ApiError, json};
use super::json::{Style, write_text};
use super::orders::Orders;
use super::schema::Refusal;
use crate::body::Stream;

/// A JSON array of symbols.
///
/// # Errors
/// The database's.
#[utoipa::path(
    get,
    path = "/api/symbols",
    operation_id = "get_symbols_api_symbols_get",
    summary = "The symbols that there are",
    description = "",
    tag = "liquidations",
    responses(
        (status = 200, description = "The distinct symbols that do not end in a digit, in the database's order", body = Vec<String>),
        (status = 503, description = "The database cannot be reached, or too many queries wait for it", body = Refusal),
        (status = 504, description = "The query took too long", body = Refusal),
    ),
)]
pub async fn get<O: Orders>(orders: &O) -> Result<Response<Stream>, ApiError> {
    let mut out = String::from("[");
    for symbol in orders.symbols().await? {
        if out.len() > 1 {
            out.push(',');
        }
        write_text(Some(&symbol), Style::Compact, &mut out);
    }
    out.push(']');
    Ok(json(out))
}
