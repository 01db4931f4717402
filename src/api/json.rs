//! How orders are written: the JSON of the API's bodies, and the other style of the stream's lines.

use std::fmt::Write as _;

use super::decimal::write_f64;
use super::orders::{Order, Text};

/// A style of JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// No spaces; non-ASCII as UTF-8.
    Compact,
    /// `", "` and `": "`; non-ASCII escaped.
    Spaced,
}

/// Writes an order with its fields in the contract's order.
pub fn write_order(order: &Order, style: Style, out: &mut String) {
    let (comma, colon) = match style {
        Style::Compact => (",\"", "\":"),
        Style::Spaced => (", \"", "\": "),
    };
    let text = |name: &str, value: &Text, out: &mut String| {
        out.push_str(comma);
        out.push_str(name);
        out.push_str(colon);
        write_text(value.as_deref(), style, out);
    };
    let number = |name: &str, value: Option<f64>, out: &mut String| {
        out.push_str(comma);
        out.push_str(name);
        out.push_str(colon);
        match value {
            Some(value) => write_f64(value, out),
            None => out.push_str("null"),
        }
    };
    let start = out.len();
    text("symbol", &order.symbol, out);
    text("side", &order.side, out);
    text("order_type", &order.order_type, out);
    text("time_in_force", &order.time_in_force, out);
    number("original_quantity", order.original_quantity, out);
    number("price", order.price, out);
    number("average_price", order.average_price, out);
    text("order_status", &order.order_status, out);
    number("order_last_filled_quantity", order.order_last_filled_quantity, out);
    number("order_filled_accumulated_quantity", order.order_filled_accumulated_quantity, out);
    out.push_str(comma);
    out.push_str("order_trade_time");
    out.push_str(colon);
    match order.order_trade_time {
        Some(time) => push(out, format_args!("{time}")),
        None => out.push_str("null"),
    }
    out.push('}');
    // The first field came with the separator that the others need.
    out.replace_range(start..start + comma.len(), "{\"");
}

/// Writes a text, or `null`.
pub fn write_text(value: Option<&str>, style: Style, out: &mut String) {
    let Some(value) = value else { return out.push_str("null") };
    out.push('"');
    for letter in value.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ..' ' => push(out, format_args!("\\u{:04x}", u32::from(letter))),
            _ if style == Style::Spaced && !letter.is_ascii() => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    push(out, format_args!("\\u{unit:04x}"));
                }
            }
            _ => out.push(letter),
        }
    }
    out.push('"');
}

/// Writes what a `String` always takes.
pub fn push(out: &mut String, arguments: std::fmt::Arguments<'_>) {
    let written = out.write_fmt(arguments);
    debug_assert!(written.is_ok(), "a String takes every write");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(value: &str, style: Style) -> String {
        let mut out = String::new();
        write_text(Some(value), style, &mut out);
        out
    }

    #[test]
    fn the_two_styles_differ_in_spaces_and_escapes() {
        let order = Order { symbol: Some("é😀\u{1}\"".into()), price: Some(2.157e-5), order_trade_time: Some(7), ..Order::default() };
        let (mut compact, mut spaced) = (String::new(), String::new());
        write_order(&order, Style::Compact, &mut compact);
        write_order(&order, Style::Spaced, &mut spaced);
        let rest = ["side", "order_type", "time_in_force", "original_quantity"].map(|name| format!("\"{name}\":null")).join(",");
        assert!(compact.starts_with(&format!("{{\"symbol\":\"é😀\\u0001\\\"\",{rest},\"price\":2.157e-05,")), "{compact}");
        assert!(spaced.starts_with("{\"symbol\": \"\\u00e9\\ud83d\\ude00\\u0001\\\"\", \"side\": null, "), "{spaced}");
        assert!(spaced.ends_with("\"order_trade_time\": 7}"));
    }

    proptest! {
        #[test]
        fn texts_read_back_in_both_styles(value: String) {
            for style in [Style::Compact, Style::Spaced] {
                let text = written(&value, style);
                prop_assert_eq!(&serde_json::from_str::<String>(&text).unwrap(), &value);
                prop_assert!(style == Style::Compact || text.is_ascii());
            }
        }
    }
}
