//! From a row of the table to an [`Order`], whatever types the table's columns have.

use std::borrow::Cow;

use mysql_async::{Row, Value};

use crate::api::decimal::Decimal;
use crate::api::orders::{Order, Text};
use crate::api::texts::Texts;
use crate::api::usd::Usd;

/// The columns of an order, in the order in which they are asked for.
pub const COLUMNS: [&str; 11] = [
    "symbol",
    "side",
    "order_type",
    "time_in_force",
    "original_quantity",
    "price",
    "average_price",
    "order_status",
    "order_last_filled_quantity",
    "order_filled_accumulated_quantity",
    "order_trade_time",
];

/// Reads an order from a row of [`COLUMNS`].
pub fn order(row: Row, texts: &mut Texts) -> Order {
    let mut values = row.unwrap_raw().into_iter().map(|value| value.unwrap_or(Value::NULL));
    let mut next = || values.next().unwrap_or(Value::NULL);
    let mut order = Order {
        symbol: text(&next(), texts),
        side: text(&next(), texts),
        order_type: text(&next(), texts),
        time_in_force: text(&next(), texts),
        original_quantity: number(&next()),
        price: number(&next()),
        ..Order::default()
    };
    let average = next();
    order.order_status = text(&next(), texts);
    order.order_last_filled_quantity = number(&next());
    let filled = next();
    order.order_trade_time = whole(&next());
    order.average_price = number(&average);
    order.order_filled_accumulated_quantity = number(&filled);
    order.usd = match (order.average_price, order.order_filled_accumulated_quantity, exact(&average), exact(&filled)) {
        (Some(_), Some(_), Some(price), Some(quantity)) => Usd::of(Some(price), Some(quantity)),
        (Some(price), Some(quantity), ..) => Usd::Rounded(price * quantity),
        _ => Usd::Unknown,
    };
    order
}

/// A number of at most eight places, exactly.
fn exact(value: &Value) -> Option<Decimal> {
    match value {
        Value::Bytes(bytes) => Decimal::exact(std::str::from_utf8(bytes).ok()?.trim()),
        other => Decimal::exact(&plain(other)?),
    }
}

/// Text; bytes that are not UTF-8 are replaced.
pub fn text(value: &Value, texts: &mut Texts) -> Text {
    plain(value).and_then(|text| texts.share(&text))
}

/// Any value as text; `None` for NULL.
#[must_use]
pub fn plain(value: &Value) -> Option<Cow<'_, str>> {
    Some(match value {
        Value::NULL => return None,
        Value::Bytes(bytes) => String::from_utf8_lossy(bytes),
        Value::Int(number) => number.to_string().into(),
        Value::UInt(number) => number.to_string().into(),
        other => other.as_sql(true).into(),
    })
}

/// The double nearest to a number, however it is stored; text that is no number counts as NULL.
#[allow(clippy::cast_precision_loss, reason = "the contract's numbers are doubles")]
#[must_use]
pub fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Bytes(bytes) => std::str::from_utf8(bytes).ok()?.trim().parse().ok()?,
        Value::Double(number) => *number,
        // By way of its shortest digits: 0.1 stored as a FLOAT reads as 0.1.
        Value::Float(number) => number.to_string().parse().ok()?,
        Value::Int(number) => *number as f64,
        Value::UInt(number) => *number as f64,
        Value::NULL | Value::Date(..) | Value::Time(..) => return None,
    };
    number.is_finite().then_some(number)
}

/// A whole number, however it is stored.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "saturates, and milliseconds since 1970 are far from the bounds")]
pub fn whole(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        Value::UInt(number) => i64::try_from(*number).ok(),
        // Digits first: a double does not hold all of them.
        other => plain(other).and_then(|text| text.trim().parse().ok()).or_else(|| number(other).map(|number| number as i64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_every_type_of_column() {
        let bytes = |text: &str| Value::Bytes(text.into());
        for (value, expected) in [
            (bytes("403.70059600"), Some(403.700_596)),
            (bytes(" 1e-5 "), Some(1e-5)),
            (bytes("abc"), None),
            (bytes("nan"), None),
            (bytes(""), None),
            (Value::Double(0.1), Some(0.1)),
            (Value::Float(0.1), Some(0.1)),
            (Value::Int(-3), Some(-3.0)),
            (Value::NULL, None),
        ] {
            assert_eq!(number(&value), expected, "{value:?}");
        }
        for (value, expected) in [
            (Value::Int(7), Some(7)),
            (Value::UInt(u64::MAX), None),
            (bytes("1735689600000"), Some(1_735_689_600_000)),
            (Value::Double(1_735_689_600_000.0), Some(1_735_689_600_000)),
            (Value::NULL, None),
        ] {
            assert_eq!(whole(&value), expected, "{value:?}");
        }
    }
}
