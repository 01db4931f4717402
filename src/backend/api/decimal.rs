//! Exact decimal numbers with eight places, and doubles as Python writes them.

use std::fmt::Write as _;

/// `DECIMAL(28,8)`: a whole number of hundred-millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decimal(i128);

const PLACES: usize = 8;

impl Decimal {
    /// Reads `-12.5`. Places beyond the eighth must be zero.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let numeric = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if !numeric(whole) || !numeric(fraction) || (whole.is_empty() && fraction.is_empty()) || digits.len() > 40 {
            return None;
        }
        let kept = &fraction[..fraction.len().min(PLACES)];
        if fraction[kept.len()..].bytes().any(|byte| byte != b'0') {
            return None;
        }
        let value: i128 = format!("{whole}{kept:0<PLACES$}").parse().ok()?;
        Some(Self(if negative { -value } else { value }))
    }

    /// The number with eight places that is nearest to a double.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "saturates, and sample orders are small")]
    pub fn nearest(value: f64) -> Self {
        Self((value * 1e8).round() as i128)
    }

    /// The exact product, in units of 10⁻¹⁶.
    #[must_use]
    pub const fn product(self, other: Self) -> i128 {
        self.0.saturating_mul(other.0)
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
        assert_eq!(scaled_to_f64(of("0.1").product(of("0.2")), 16), 0.02);
        assert_eq!(of("-1.50000000").to_f64(), -1.5);
        for text in ["", ".", "1e5", "1.000000001", "abc", "1.2.3", "--1"] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn doubles_read_back(value: f64) {
            prop_assume!(value.is_finite());
            prop_assert_eq!(written(value).parse::<f64>().unwrap(), value);
        }
    }
}
