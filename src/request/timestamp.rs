//! Times as the API's clients write them: Unix milliseconds, or ISO 8601 as the legacy service reads it.
//!
//! Used by `route.history` (is this answer about a closed past?) and by the native API (which orders are meant?), so
//! that both understand the same spellings. The rules are the contract's: Python's `int()` first, then Python 3.12's
//! `datetime.fromisoformat`.

/// A time in milliseconds since 1970; negative before. Integers too large for 64 bits saturate.
#[must_use]
pub fn parse(text: &str) -> Option<i64> {
    integer(text).or_else(|| iso(text))
}

/// A whole number as Python's `int()` reads it: white space around, a sign, single underscores between digits.
/// Saturates at the bounds of 64 bits.
#[must_use]
pub fn integer(text: &str) -> Option<i64> {
    let text = text.trim();
    let (negative, digits) = match text.as_bytes() {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    let mut value: i64 = 0;
    let mut after_digit = false;
    for &byte in digits {
        match byte {
            b'0'..=b'9' => {
                let digit = i64::from(byte - b'0');
                value = value.saturating_mul(10);
                value = if negative { value.saturating_sub(digit) } else { value.saturating_add(digit) };
                after_digit = true;
            }
            b'_' if after_digit => after_digit = false,
            _ => return None,
        }
    }
    after_digit.then_some(value)
}

/// ISO 8601 as Python 3.12's `datetime.fromisoformat` reads it; without an offset the time is UTC.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "the contract computes in doubles")]
pub fn iso(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    if text.chars().count() < 7 || !text.is_char_boundary(separator(bytes)?) {
        return None;
    }
    let (date, rest) = text.split_at(separator(bytes)?.min(text.len()));
    let days = date_days(date.as_bytes())?;
    let mut rest = rest.chars();
    rest.next();
    let micros = match rest.as_str() {
        "" => 0,
        time => time_micros(time.as_bytes())?,
    };
    let total = days * 86_400_000_000 + micros;
    Some((total as f64 / 1e6 * 1000.0).trunc() as i64)
}

/// Where the date ends (`_find_isoformat_datetime_separator`).
fn separator(text: &[u8]) -> Option<usize> {
    let at = |index: usize| text.get(index).copied();
    if text.len() == 7 {
        return Some(7);
    }
    if at(4)? == b'-' {
        if at(5)? != b'W' {
            return Some(10.min(text.len()));
        }
        return match at(8) {
            Some(b'-') if text.len() == 9 => None,
            Some(b'-') if at(10).is_some_and(|byte| byte.is_ascii_digit()) => Some(8),
            Some(b'-') => Some(10),
            _ => Some(8),
        };
    }
    if at(4)? != b'W' {
        return Some(8.min(text.len()));
    }
    let end = 7 + text[7..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    Some(match end {
        ..9 => end,
        _ if end % 2 == 0 => 7,
        _ => 8,
    })
}

/// Days since 1970 of `YYYY-MM-DD`, `YYYYMMDD`, `YYYY-Www[-D]` or `YYYYWww[D]`.
fn date_days(text: &[u8]) -> Option<i64> {
    if !matches!(text.len(), 7 | 8 | 10) {
        return None;
    }
    let year = digits(text, 0, 4)?;
    let dashed = text[4] == b'-';
    let mut at = 4 + usize::from(dashed);
    let year = i16::try_from(year).ok().filter(|&year| year >= 1)?;
    if text.get(at) == Some(&b'W') {
        let week = i8::try_from(digits(text, at + 1, 2)?).ok()?;
        at += 3;
        let mut day = 1;
        if text.len() > at {
            if (text[at] == b'-') != dashed {
                return None;
            }
            at += usize::from(dashed);
            day = digits(text, at, 1)?;
            at += 1;
        }
        let weekday = jiff::civil::Weekday::from_monday_one_offset(i8::try_from(day).ok()?).ok()?;
        let date = jiff::civil::ISOWeekDate::new(year, week, weekday).ok()?.date();
        return (at == text.len()).then(|| days_of(date));
    }
    let month = digits(text, at, 2)?;
    at += 2;
    if (text.get(at) == Some(&b'-')) != dashed {
        return None;
    }
    at += usize::from(dashed);
    let day = digits(text, at, 2)?;
    let date = jiff::civil::Date::new(year, i8::try_from(month).ok()?, i8::try_from(day).ok()?).ok()?;
    (at + 2 == text.len()).then(|| days_of(date))
}

fn days_of(date: jiff::civil::Date) -> i64 {
    let epoch = jiff::civil::date(1970, 1, 1);
    i64::from(epoch.until(date).map_or(0, |span| span.get_days()))
}

/// Microseconds since midnight, in UTC: the time of day less its offset.
fn time_micros(text: &[u8]) -> Option<i64> {
    let zone = text.iter().position(|byte| matches!(byte, b'+' | b'-' | b'Z')).unwrap_or(text.len());
    let (clock, leftover) = clock(text, zone)?;
    if clock[0] > 23 || clock[1] > 59 || clock[2] > 59 {
        return None;
    }
    let offset = match text.get(zone) {
        None if leftover => return None,
        None => 0,
        Some(b'Z') if zone + 1 == text.len() => 0,
        Some(b'Z') => return None,
        Some(sign) => {
            let rest = &text[zone + 1..];
            let (parts, leftover) = self::clock(rest, rest.len())?;
            let micros = micros(parts);
            if leftover || micros >= 86_400_000_000 {
                return None;
            }
            if *sign == b'-' { -micros } else { micros }
        }
    };
    Some(micros(clock) - offset)
}

fn micros([hour, minute, second, micro]: [i64; 4]) -> i64 {
    ((hour * 60 + minute) * 60 + second) * 1_000_000 + micro
}

/// `HH[:MM[:SS[.f…]]]` up to `end`, with or without the colons. The flag says that something was left over, which
/// CPython forgives where a zone follows.
fn clock(text: &[u8], end: usize) -> Option<([i64; 4], bool)> {
    let mut parts = [0; 4];
    let (mut at, mut colons) = (0, true);
    for (index, part) in parts.iter_mut().take(3).enumerate() {
        *part = digits(text, at, 2)?;
        let next = text.get(at + 2).copied();
        at += 3;
        if index == 0 {
            colons = next == Some(b':');
        }
        match next {
            _ if at >= end => return Some((parts, next.is_some())),
            Some(b':') if colons => {}
            Some(b'.' | b',') => break,
            _ if !colons => at -= 1,
            _ => return None,
        }
    }
    let count = (end - at.min(end)).min(6);
    if count == 0 {
        return None;
    }
    parts[3] = digits(text, at, count)? * 10_i64.pow(u32::try_from(6 - count).ok()?);
    at += count;
    at += text[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    Some((parts, at < text.len()))
}

fn digits(text: &[u8], at: usize, count: usize) -> Option<i64> {
    let part = text.get(at..at + count)?;
    part.iter().all(u8::is_ascii_digit).then(|| part.iter().fold(0, |sum, &byte| sum * 10 + i64::from(byte - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spellings_of_the_contract() {
        let new_year = Some(1_735_689_600_000);
        for (text, expected) in [
            ("1735689600000", new_year),
            (" +1_735_689_600_000 ", new_year),
            ("-5", Some(-5)),
            ("20250101", Some(20_250_101)),
            ("99999999999999999999999", Some(i64::MAX)),
            ("2025-01-01", new_year),
            ("2025-01-01T00", new_year),
            ("2025-01-01 00:00", new_year),
            ("2025-01-01T", new_year),
            ("2025-W01-3", new_year),
            ("2025W013", new_year),
            ("2025-W01", Some(1_735_516_800_000)),
            ("2025-01-01T00:00:00Z", new_year),
            ("2025-01-01T02:00:00+02:00", new_year),
            ("2025-01-01é00:00", new_year),
            ("2025-01-01T00:00:00,5Z", Some(1_735_689_600_500)),
            ("2025-01-01T00:00:00.289Z", Some(1_735_689_600_289)),
            ("2025-01-01T12:00:00.999999Z", Some(1_735_732_800_999)),
            ("20250101T120000", Some(1_735_732_800_000)),
            ("1969-12-31T23:59:59Z", Some(-1000)),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
        for text in [
            "",
            "abc",
            "1735700000000.0",
            "2025-13-01",
            "2025-02-30",
            "2025-1-1",
            "2025-01-01t00:00:00z",
            "1__0",
            "_1",
            "2025-01-01T00:00:00 00:00",
            "2025-01-01T24:00",
            "2025-01-01T00:60",
            "2025-01-01T00:00:00+24:00",
            "0000-01-01",
            "2025-W60-1",
            "2025-01-01T00:00:00ZZ",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_failing(text in ".{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn texts_like_dates_are_read_without_failing(text in "[0-9W:.,TZ+é-]{0,32}") {
            let _ = parse(&text);
        }

        #[test]
        fn numbers_read_back(value: i64) {
            prop_assert_eq!(parse(&value.to_string()), Some(value));
        }
    }
}
