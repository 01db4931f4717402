//! Exact decimal numbers with eight places, and doubles as Python writes them.

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

    /// Reads a number as it is; `None` also for one with more than eight places.
    #[must_use]
    pub fn exact(text: &str) -> Option<Self> {
        // Nearly every number has this form: digits, perhaps a point, and up to eight digits more.
        let (negative, unsigned) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (mut value, mut places, mut digits) = (0_i128, None, 0);
        for byte in unsigned.bytes() {
            match byte {
                b'0'..=b'9' if digits < 36 => {
                    value = value * 10 + i128::from(byte - b'0');
                    digits += 1;
                    places = places.map(|places: usize| places + 1);
                }
                b'.' if places.is_none() => places = Some(0),
                b'e' | b'E' => return Self::exact_with_exponent(text),
                _ => return None,
            }
        }
        let mut places = places.unwrap_or(0);
        while places > PLACES && value % 10 == 0 {
            (value, places) = (value / 10, places - 1);
        }
        if digits == 0 || places > PLACES {
            return None;
        }
        let scaled = value.checked_mul(10_i128.pow(u32::try_from(PLACES - places).ok()?))?;
        Some(Self(if negative { -scaled } else { scaled }))
    }

    /// The same for `2.157e-05`: what rounding to eight places leaves must say the same.
    fn exact_with_exponent(text: &str) -> Option<Self> {
        let read = Self::parse(text)?;
        let (mantissa, exponent) = text.split_once(['e', 'E'])?;
        let exponent: i32 = exponent.parse().ok()?;
        let fraction = mantissa.split_once('.').map_or("", |(_, fraction)| fraction.trim_end_matches('0'));
        let places = i32::try_from(fraction.len()).ok()? - exponent;
        (places <= i32::try_from(PLACES).ok()?).then_some(read)
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

/// The double nearest to `value` × 10^-`places`, halves to even, for up to 16 places.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "rounded once, correctly: see within")]
pub fn scaled_to_f64(value: i128, places: usize) -> f64 {
    const EXACT: u128 = 1 << f64::MANTISSA_DIGITS;
    let unit = 10_u128.pow(u32::try_from(places.min(16)).unwrap_or(16));
    let magnitude = value.unsigned_abs();
    let nearest = if magnitude <= EXACT {
        // Both are doubles, and dividing doubles rounds correctly.
        magnitude as f64 / unit as f64
    } else {
        // A quotient of more bits than a double has, the lowest of which says whether anything follows: converting that
        // rounds correctly, and a power of two changes no digit.
        let shift = magnitude.leading_zeros();
        let (quotient, rest) = ((magnitude << shift) / unit, (magnitude << shift) % unit);
        (quotient | u128::from(rest != 0)) as f64 / (1_u128 << shift) as f64
    };
    if value < 0 { -nearest } else { nearest }
}

/// Writes a double with the shortest digits that read back the same, in Python's layout: exponent form below 1e-4 and
/// from 1e16. Allocates nothing besides the text.
pub fn write_f64(value: f64, out: &mut String) {
    if !value.is_finite() {
        return out.push_str("null");
    }
    if value.is_sign_negative() {
        out.push('-');
    }
    let mut buffer = zmij::Buffer::new();
    let (digits, length, point) = digits_of(buffer.format_finite(value.abs()));
    let Ok(digits) = std::str::from_utf8(&digits[..length]) else { return };
    match usize::try_from(point) {
        _ if digits.is_empty() => out.push_str("0.0"),
        // 0.000123
        Err(_) | Ok(0) if point > -4 => {
            out.push_str("0.");
            (point..0).for_each(|_| out.push('0'));
            out.push_str(digits);
        }
        // 12.5
        Ok(whole) if whole < digits.len() && whole > 0 => {
            out.push_str(&digits[..whole]);
            out.push('.');
            out.push_str(&digits[whole..]);
        }
        // 1200.0
        Ok(whole) if whole <= 16 && whole > 0 => {
            out.push_str(digits);
            (digits.len()..whole).for_each(|_| out.push('0'));
            out.push_str(".0");
        }
        _ => {
            let (first, rest) = digits.split_at(1);
            out.push_str(first);
            if !rest.is_empty() {
                out.push('.');
                out.push_str(rest);
            }
            let exponent = point - 1;
            out.push_str(if exponent < 0 { "e-" } else { "e+" });
            if exponent.abs() < 10 {
                out.push('0');
            }
            out.push_str(itoa::Buffer::new().format(exponent.abs()));
        }
    }
}

/// The digits of a number as it is written, without zeros at either end, and how many of them stand before the point.
fn digits_of(text: &str) -> ([u8; 32], usize, i32) {
    let (mantissa, exponent) =
        text.split_once(['e', 'E']).map_or((text, 0), |(mantissa, exponent)| (mantissa, exponent.parse().unwrap_or(0)));
    let (mut digits, mut length, mut point, mut fraction) = ([0; 32], 0, exponent, false);
    for byte in mantissa.bytes() {
        match byte {
            b'.' => fraction = true,
            // Zeros before the first digit only move the point.
            b'0' if length == 0 => point -= i32::from(fraction),
            _ => {
                point += i32::from(!fraction);
                if let Some(slot) = digits.get_mut(length) {
                    *slot = byte;
                    length += 1;
                }
            }
        }
    }
    while length > 0 && digits[length - 1] == b'0' {
        length -= 1;
    }
    (digits, length, point)
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
            (1_808_759_772_738_168.2, "1808759772738168.2"),
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

    #[test]
    fn exact_numbers_have_at_most_eight_places() {
        for text in ["0", "12", "-1.5", "0.00000001", "1.10000000000", "123456789012.12345678", "2.157e-05", "1e5", "1.5E3"] {
            assert_eq!(Decimal::exact(text), Decimal::parse(text), "{text}");
        }
        for text in ["", ".", "-", "0.000000001", "1.123456789", "2.1574e-05", "1e-9", "abc", "1.2.3", "1e", "+1", &"9".repeat(40)] {
            assert_eq!(Decimal::exact(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_exactly_is_what_is_read(whole in 0_u64..1_000_000_000_000, fraction in "[0-9]{0,8}", negative: bool) {
            let text = format!("{}{whole}.{fraction}", if negative { "-" } else { "" });
            prop_assert_eq!(Decimal::exact(&text), Decimal::parse(&text));
        }

        #[test]
        fn any_text_is_read_without_failing(text in "[-0-9.eE]{0,70}") {
            let _ = (Decimal::parse(&text), Decimal::exact(&text));
        }

        #[test]
        fn doubles_read_back_and_have_the_shortest_digits(value: f64) {
            prop_assume!(value.is_finite());
            let text = written(value);
            prop_assert_eq!(text.parse::<f64>().unwrap(), value);
            let digits = |text: &str| {
                let mantissa: String = text.split('e').next().unwrap().chars().filter(char::is_ascii_digit).collect();
                mantissa.trim_matches('0').to_owned()
            };
            // As few as Rust needs; where two candidates are equally near, Python takes the even one and Rust the upper.
            prop_assert_eq!(digits(&text).len(), digits(&format!("{value:e}")).len());
        }

        #[test]
        fn numbers_of_every_size_are_laid_out_as_python_does(digits in 1_u64..100_000, exponent in -30_i32..30) {
            let value: f64 = format!("{digits}e{exponent}").parse().unwrap();
            let text = written(value);
            prop_assert_eq!(text.contains('e'), !(1e-4..1e16).contains(&value));
            prop_assert!(text.contains('e') || text.contains('.'), "{}", text);
        }

        #[test]
        fn scaling_rounds_as_reading_the_text_does(value: i128, small: i64, places in 0_usize..=16) {
            for value in [value, i128::from(small), i128::from(small) << 20, value >> 40] {
                let text: f64 = format!("{value}e-{places}").parse().unwrap();
                prop_assert_eq!(scaled_to_f64(value, places), text);
            }
        }
    }
}
