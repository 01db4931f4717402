//! Exact decimal numbers with eight places, and doubles as Python writes them.

use std::fmt::Write as _;

/// `DECIMAL(28,8)`: a whole number of hundred-millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decimal(i128);

const PLACES: usize = 8;

impl Decimal {
    /// Reads `-12.5` or `1e-05`; places beyond the eighth are rounded, halves away from zero, as the database does.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (negative, unsigned) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (digits, exponent) = match unsigned.split_once(['e', 'E']) {
            Some((digits, exponent)) => (digits, exponent.parse::<i32>().ok()?),
            None => (unsigned, 0),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let numeric = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let empty = whole.is_empty() && fraction.is_empty();
        if !numeric(whole) || !numeric(fraction) || empty || digits.len() > 60 || exponent.abs() > 60 {
            return None;
        }
        // The digits, with the point after the eighth place.
        let point = i32::try_from(whole.len()).ok()? + exponent + i32::try_from(PLACES).ok()?;
        let all = [whole, fraction].concat();
        let value = match usize::try_from(point) {
            Err(_) => 0,
            Ok(point) if point >= all.len() => format!("{all:0<point$}").parse::<i128>().ok()?,
            Ok(point) => {
                let kept = if point == 0 { 0 } else { all[..point].parse::<i128>().ok()? };
                kept.checked_add(i128::from(all.as_bytes()[point] >= b'5'))?
            }
        };
        Some(Self(if negative { -value } else { value }))
    }

    /// The number with eight places that is nearest to a double.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "saturates, and sample orders are small")]
    pub fn nearest(value: f64) -> Self {
        Self((value * 1e8).round() as i128)
    }

    /// The exact product, in units of 10⁻¹⁶; `None` beyond 10²² or so.
    #[must_use]
    pub const fn product(self, other: Self) -> Option<i128> {
        self.0.checked_mul(other.0)
    }

    /// The nearest double.
    #[must_use]
    pub fn to_f64(self) -> f64 {
        scaled_to_f64(self.0, PLACES)
    }
}

/// The double nearest to `value` × 10^-`places`. Parsing a decimal text rounds correctly; dividing would round twice.
#[must_use]
pub fn scaled_to_f64(value: i128, places: usize) -> f64 {
    format!("{value}e-{places}").parse().unwrap_or(f64::NAN)
}

/// Writes a double with the shortest digits that read back the same, in Python's layout: exponent form below 1e-4 and
/// from 1e16.
pub fn write_f64(value: f64, out: &mut String) {
    let shortest = format!("{value:e}");
    let Some((mantissa, exponent)) = shortest.split_once('e') else {
        out.push_str("null");
        return;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let written = if (-4..16).contains(&exponent) || value == 0.0 {
        if value.fract() == 0.0 { write!(out, "{value}.0") } else { write!(out, "{value}") }
    } else {
        write!(out, "{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    };
    debug_assert!(written.is_ok(), "a String takes every write");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(value: f64) -> String {
        let mut out = String::new();
        write_f64(value, &mut out);
        out
    }

    #[test]
    fn doubles_print_as_python_prints_them() {
        for (value, text) in [
            (403.700596, "403.700596"),
            (3_786_478.0, "3786478.0"),
            (2.157e-05, "2.157e-05"),
            (1e16, "1e+16"),
            (0.0001, "0.0001"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (1.5e300, "1.5e+300"),
            (0.0, "0.0"),
            (-0.5, "-0.5"),
        ] {
            assert_eq!(written(value), text);
        }
    }

    #[test]
    fn decimals_are_exact() {
        let of = |text| Decimal::parse(text).unwrap();
        assert_eq!(scaled_to_f64(of("0.1").product(of("0.2")).unwrap(), 16), 0.02);
        for (text, value) in [
            ("-1.50000000", -1.5),
            ("1e5", 1e5),
            ("1.25E-05", 0.000_012_5),
            (".5", 0.5),
            ("5.", 5.0),
            ("1.000000005", 1.000_000_01),
            ("-0.000000004", 0.0),
            ("0.000000005", 1e-8),
            ("5e-9", 1e-8),
            ("12e-30", 0.0),
        ] {
            assert_eq!(of(text).to_f64(), value, "{text}");
        }
        for text in ["", ".", "abc", "1.2.3", "--1", "e5", "1e", "1e99", "+1"] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_failing(text in "[-0-9.eE]{0,70}") {
            let _ = Decimal::parse(&text);
        }

        #[test]
        fn doubles_read_back(value: f64) {
            prop_assume!(value.is_finite());
            prop_assert_eq!(written(value).parse::<f64>().unwrap(), value);
        }
    }
}
