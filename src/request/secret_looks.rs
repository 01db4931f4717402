//! What a secret looks like, whatever it is called. Symbols, numbers, moments and words are none.

use std::borrow::Cow;

/// How often something may be encoded over and over.
const ROUNDS: usize = 3;
/// The letters and digits from which on a run of them may be a secret.
const LONG: usize = 20;
/// The same from which on any may be, in one case, without a sign between them, and not a number.
const VERY_LONG: usize = 32;
/// Tokens of known kinds begin so, and go on for a while.
const KINDS: [&str; 20] = [
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "sk-",
    "sk_",
    "rk_",
    "pk_live_",
    "xoxb-",
    "xoxp-",
    "xapp-",
    "AKIA",
    "ASIA",
    "AIza",
    "ya29.",
    "npm_",
    "SG.",
];

/// A text without its percent-encoding, also where that is encoded itself. What is no UTF-8 then is replaced.
#[must_use]
pub fn decoded(text: &str) -> Cow<'_, str> {
    let mut text = Cow::Borrowed(text);
    for _ in 0..ROUNDS {
        if !text.contains('%') {
            break;
        }
        let next = percent_decoded(text.as_bytes());
        let next = String::from_utf8_lossy(&next).into_owned();
        if next == text {
            break;
        }
        text = Cow::Owned(next);
    }
    text
}

fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let digit = |at: usize| text.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let (mut out, mut at) = (Vec::with_capacity(text.len()), 0);
    while at < text.len() {
        let escaped = if text[at] == b'%' { digit(at + 1).zip(digit(at + 2)) } else { None };
        match escaped.and_then(|(high, low)| u8::try_from(high * 16 + low).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(text[at]);
                at += 1;
            }
        }
    }
    out
}

/// Whether a text, decoded, is or holds what looks like a secret.
#[must_use]
pub fn looks_secret(text: &str) -> bool {
    has_user_information(text) || has_scheme(text) || text.split(|sign| !is_of_run(sign)).any(is_secret_run)
}

/// `//user:password@host`, or without the slashes.
fn has_user_information(text: &str) -> bool {
    text.split(['/', '?', '#', ' ']).any(|part| part.split_once('@').is_some_and(|(user, host)| user.contains(':') && !host.is_empty()))
}

/// What stands in `Authorization`.
fn has_scheme(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    ["bearer", "basic", "digest"].iter().any(|scheme| {
        lower.match_indices(scheme).any(|(at, _)| {
            let rest = &lower[at + scheme.len()..];
            rest.starts_with([' ', '+', ':']) && rest.trim_start_matches([' ', '+', ':']).len() >= 4
        })
    })
}

const fn is_of_run(sign: char) -> bool {
    sign.is_ascii_alphanumeric() || matches!(sign, '-' | '_' | '=' | '.')
}

fn is_secret_run(run: &str) -> bool {
    if let Some(at) = run.find("eyJ")
        && run.len() - at >= 12
    {
        // A JWT, or another piece of JSON in base64.
        return true;
    }
    if KINDS.iter().any(|kind| run.starts_with(kind) && run.len() >= kind.len() + 12) {
        return true;
    }
    // A fraction and a moment have points in them, tokens have them between long parts.
    run.split('.').any(is_without_words)
}

/// Whether letters and digits stand there in no order that words, symbols or numbers have.
fn is_without_words(run: &str) -> bool {
    let signs = run.bytes().filter(u8::is_ascii_alphanumeric).count();
    if signs < LONG || run.bytes().all(|byte| !byte.is_ascii_alphabetic()) {
        return false;
    }
    // A word begins with a capital letter and goes on without: that is no change.
    let class = |byte: u8| (byte.is_ascii_digit(), byte.is_ascii_uppercase());
    let changes = |pair: &[u8]| {
        let is_start = pair[0].is_ascii_uppercase() && pair[1].is_ascii_lowercase();
        pair.iter().all(u8::is_ascii_alphanumeric) && class(pair[0]) != class(pair[1]) && !is_start
    };
    let changed = run.as_bytes().windows(2).filter(|pair| changes(pair)).count();
    let has = |part: &str, is: fn(&u8) -> bool| part.as_bytes().iter().any(is);
    let in_one_case = |part: &str| !(has(part, u8::is_ascii_uppercase) && has(part, u8::is_ascii_lowercase));
    let is_unbroken = |part: &str| part.len() >= VERY_LONG && in_one_case(part);
    changed * 4 >= signs || run.split(['-', '_', '=']).any(is_unbroken) || is_uuid(run)
}

/// Whether it is a UUID: often a key or the name of a session.
fn is_uuid(run: &str) -> bool {
    let parts = run.split('-').map(str::len);
    parts.eq([8, 4, 4, 4, 12]) && run.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn secrets_are_known_by_their_looks_and_nothing_else_is_taken_for_one() {
        for secret in [
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
            "eyJhbGciOiJub25lIn0",
            "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "d41d8cd98f00b204e9800998ecf8427e",
            "550e8400-e29b-41d4-a716-446655440000",
            "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
            "sk-abcdefghijklmnop",
            "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
            "AKIAIOSFODNN7EXAMPLE",
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY0a1B2c3D4e5F6g7H8",
            "dGhpcyBpcyBhIHNlY3JldCB0b2tlbg==",
            "https://user:hush@host/x",
            "user:hush@host",
            "Bearer abcdef",
            "basic+dTpw",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGH",
            "11111111-1111-4111-a111-111111111111",
        ] {
            assert!(looks_secret(secret), "{secret}");
        }
        for plain in [
            "",
            "BTCUSDT",
            "1000000MOGUSDT_20250101",
            "BTCUSDT-28JUN24-100000-C",
            "1735689600000",
            "123456789012345678901234567890123456789012",
            "-12345678901234567890.12345678901234567890",
            "2025-01-01T00:00:00.000000+00:00",
            "20250101T000000Z",
            "liquidation-orders-latest-of-2024",
            "getLiquidationOrdersByTimeframeAndSymbol",
            "somebody@example.org",
            "text/html,application/xhtml+xml",
            "bearer",
            "the basics",
            "key",
        ] {
            assert!(!looks_secret(plain), "{plain}");
        }
    }

    proptest! {
        #[test]
        fn tokens_of_chance_look_secret(bytes in proptest::collection::vec(any::<u8>(), 32)) {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            prop_assert!(looks_secret(&hex) || hex.bytes().all(|byte| byte.is_ascii_digit()), "{}", hex);
        }

        #[test]
        fn numbers_and_symbols_do_not(number in "[0-9]{1,60}", symbol in "[A-Z]{2,12}(USDT|USDC|BTC)(_[0-9]{6})?") {
            prop_assert!(!looks_secret(&number) && !looks_secret(&symbol));
        }
    }
}
