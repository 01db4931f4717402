//! Durations (`250ms`, `30s`, `5m`, `1h`, `7d`) and sizes (`64KiB`, `256MiB`).

use std::time::Duration;

/// Reads a duration.
///
/// # Errors
/// A sentence that says what a duration looks like.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let per_unit = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(format!("'{text}' is not a duration: write a whole number and ms, s, m, h or d, such as \"30s\"")),
    };
    let count: u64 = number.parse().map_err(|_| format!("'{text}' is not a duration: '{number}' is not a whole number"))?;
    match count.checked_mul(per_unit) {
        Some(millis) if millis <= MAX_DURATION => Ok(Duration::from_millis(millis)),
        _ => Err(format!("'{text}' is too long: at most 3650d")),
    }
}

const MAX_DURATION: u64 = 3650 * 86_400_000;

/// Reads a duration that is not zero.
///
/// # Errors
/// The same, or that it is zero.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    let span = duration(text)?;
    if span.is_zero() { Err("must be longer than zero".to_owned()) } else { Ok(span) }
}

/// Reads a size in bytes.
///
/// # Errors
/// A sentence that says what a size looks like.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "KB" | "MB" | "GB" | "kB" => return Err(format!("'{text}' is not a size: write KiB, MiB or GiB (powers of 1024)")),
        _ => return Err(format!("'{text}' is not a size: write a whole number and B, KiB, MiB or GiB, such as \"64KiB\"")),
    };
    let count: u64 = number.parse().map_err(|_| format!("'{text}' is not a size: '{number}' is not a whole number"))?;
    count.checked_mul(1 << shift).filter(|&bytes| bytes <= 1 << 40).ok_or_else(|| format!("'{text}' is too large"))
}

fn split(text: &str) -> (&str, &str) {
    let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    text.split_at(at)
}

/// Whether a text is a name for metrics, logs and keys: 1 to 64 letters, digits, `-`, `_` or `.`.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=64).contains(&text.len()) && text.bytes().all(plain)
}

/// Writes a duration as one would in the configuration.
#[must_use]
pub fn show(span: Duration) -> String {
    let millis = crate::clock::millis(span);
    for (unit, per_unit) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)] {
        if millis >= per_unit && millis.is_multiple_of(per_unit) {
            return format!("{}{unit}", millis / per_unit);
        }
    }
    if millis == 0 { "0s".into() } else { format!("{millis}ms") }
}

/// A share such as `10%` or `0.5%`, in hundredths of a percent.
///
/// # Errors
/// A sentence that says what is expected.
pub fn share(text: &str) -> Result<u16, String> {
    let share = || {
        let percent = text.strip_suffix('%')?.trim();
        let (whole, part) = percent.split_once('.').unwrap_or((percent, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let plain = !whole.is_empty() && part.len() <= 2 && digits(whole) && digits(part);
        plain.then(|| format!("{whole}{part:0<2}").parse().ok()).flatten().filter(|share: &u16| *share <= 10_000)
    };
    share().ok_or_else(|| format!("'{text}' is not a share such as 10% or 0.5%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [("250ms", 250), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000), ("7d", 604_800_000), ("0s", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)));
            assert_eq!(show(Duration::from_millis(millis)), text);
        }
        for text in ["", "30", "s", "1.5s", "-1s", "1 s", "1w", "99999999999999999999s", "4000d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!((size("0B"), size("64KiB"), size("16MiB")), (Ok(0), Ok(65_536), Ok(16_777_216)));
        for text in ["", "1", "1MB", "1kib", "-1B", "9999999GiB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
