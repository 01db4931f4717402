//! `GET /api/symbols`: the distinct symbols that do not end in a digit.

use super::ApiError;
use super::orders::Orders;

/// A JSON array of symbols.
///
/// # Errors
/// None so far.
pub async fn get<O: Orders>(orders: &O) -> Result<String, ApiError> {
    // A list of strings always serialises.
    Ok(serde_json::to_string(&orders.symbols().await).unwrap_or_default())
}
