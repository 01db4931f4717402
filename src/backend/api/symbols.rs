//! `GET /api/symbols`: the distinct symbols that do not end in a digit.

use http::Response;

use super::json::{Style, write_text};
use super::orders::Orders;
use super::{ApiError, json};
use crate::body::Stream;

/// A JSON array of symbols.
///
/// # Errors
/// The database's.
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
