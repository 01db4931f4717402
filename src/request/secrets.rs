//! What is not told of a request, wherever something is said of requests: the log, traces, samples, statistics, explanations. One redaction for
//! all of them.
//!
//! A value is left out for its name (a parameter of the query or of a path segment, in any spelling that a backend may decode), or for
//! what it looks like: a JWT, a token of a known kind, user information of a URL, or a long run of letters and digits without words in
//! it. What is shown has an upper bound, since clients choose how long it is.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use http::Method;

use super::secret_looks::{decoded, looks_secret};

/// The longest text that is said of a target, in bytes.
pub const MAX_SHOWN: usize = 1024;
/// The longest value within it.
const MAX_VALUE: usize = 256;
/// The longest method.
const MAX_METHOD: usize = 32;
/// Stands for what is left out.
pub const LEFT_OUT: &str = "…";

/// Values may be secret whose names contain one of these, whatever stands around it.
const WITHIN: [&str; 18] = [
    "key",
    "token",
    "secret",
    "pass",
    "auth",
    "sig",
    "pwd",
    "jwt",
    "session",
    "sessid",
    "credential",
    "cookie",
    "bearer",
    "csrf",
    "xsrf",
    "saml",
    "mnemonic",
    "private",
];
/// Or one of whose words is one of these.
const WORDS: [&str; 20] = [
    "code",
    "sid",
    "pin",
    "otp",
    "totp",
    "mfa",
    "cvv",
    "cvc",
    "mac",
    "hmac",
    "nonce",
    "ticket",
    "psw",
    "pw",
    "cred",
    "creds",
    "assertion",
    "verifier",
    "seed",
    "dsn",
];
/// Beside these words, `code` is nothing secret.
const PUBLIC_CODES: [&str; 12] =
    ["country", "currency", "zip", "postal", "language", "lang", "status", "error", "area", "region", "city", "airport"];
/// What follows such a segment of a path may be a secret.
const BEFORE_SECRETS: [&str; 11] =
    ["token", "tokens", "password", "passwd", "secret", "secrets", "session", "sessions", "jwt", "apikey", "api-key"];

/// Names beside those that are built in (`log.redact`), in lower case. There is one log in a process, and so one list.
fn named() -> &'static ArcSwap<Vec<String>> {
    static NAMED: OnceLock<ArcSwap<Vec<String>>> = OnceLock::new();
    NAMED.get_or_init(ArcSwap::default)
}

/// From now on the values of these parameters are left out too.
pub fn leave_out(names: &[String]) {
    named().store(Arc::new(names.iter().map(|name| name.to_ascii_lowercase()).collect()));
}

/// A target (path and query) without what may be a secret, and not longer than [`MAX_SHOWN`].
#[must_use]
pub fn without_secrets(target: &str) -> Cow<'_, str> {
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    let mut shown = String::with_capacity(target.len().min(MAX_SHOWN));
    show_path(path, &mut shown);
    if let Some(query) = query {
        shown.push('?');
        show_query(query, &mut shown);
    }
    if shown == target { Cow::Borrowed(target) } else { Cow::Owned(shown) }
}

/// A text that a client chose in part, such as the readable part of a key: as it is, or only so much of it as is no secret.
#[must_use]
pub fn text_without_secrets(text: &str) -> Cow<'_, str> {
    let mut shown = String::new();
    for piece in text.split_inclusive([':', ' ', ',', '#']) {
        let (bare, end) = piece.split_at(piece.trim_end_matches([':', ' ', ',', '#']).len());
        if !push(if bare.len() > MAX_SHOWN || is_secret(bare) { LEFT_OUT } else { bare }, &mut shown) || !push(end, &mut shown) {
            break;
        }
    }
    if shown == text { Cow::Borrowed(text) } else { Cow::Owned(shown) }
}

/// A method as it is said: a client may make up one of any length.
#[must_use]
pub fn shown_method(method: &Method) -> &str {
    if method.as_str().len() <= MAX_METHOD { method.as_str() } else { LEFT_OUT }
}

/// Whether a parameter's value is left out, for its name or for what it looks like.
#[must_use]
pub fn is_left_out(name: &str, value: &str) -> bool {
    is_secret_name(name) || is_secret(value)
}

/// Adds text as long as there is room for it; false: there is none, and a sign says so.
fn push(text: &str, out: &mut String) -> bool {
    if out.len() + text.len() <= MAX_SHOWN {
        out.push_str(text);
        return true;
    }
    if !out.ends_with(LEFT_OUT) {
        out.push_str(LEFT_OUT);
    }
    false
}

fn show_path(path: &str, out: &mut String) {
    let mut before = String::new();
    for (at, segment) in path.split('/').enumerate() {
        if at > 0 && !push("/", out) {
            return;
        }
        for (at, piece) in segment.split(';').enumerate() {
            if at > 0 && !push(";", out) {
                return;
            }
            let follows = at == 0 && BEFORE_SECRETS.contains(&before.as_str());
            if !show_part(piece, follows, out) {
                return;
            }
        }
        before = decoded(segment).to_ascii_lowercase();
    }
}

fn show_query(query: &str, out: &mut String) {
    // Some backends end a parameter at `;` too.
    for part in query.split_inclusive(['&', ';']) {
        let (bare, end) = part.split_at(part.trim_end_matches(['&', ';']).len());
        if !show_part(bare, false, out) || !push(end, out) {
            return;
        }
    }
}

/// Shows `name=value` or a bare value; false: there is no more room.
fn show_part(part: &str, is_hidden: bool, out: &mut String) -> bool {
    let (name, value) = match part.split_once('=') {
        Some((name, value)) => (Some(name), value),
        None => (None, part),
    };
    if let Some(name) = name {
        let shown = if name.len() > MAX_VALUE || is_secret(name) { LEFT_OUT } else { name };
        if !push(shown, out) || !push("=", out) {
            return false;
        }
    }
    // First what costs least: clients choose how long both are. A name that is not shown may be any.
    let hides = (is_hidden && !part.is_empty())
        || value.len() > MAX_VALUE
        || name.is_some_and(|name| name.len() > MAX_VALUE || is_secret_name(name))
        || is_secret(value);
    push(if hides { LEFT_OUT } else { value }, out)
}

/// Whether a value may be one, or holds one: a URL or a form within it, encoded once more perhaps.
fn is_secret(value: &str) -> bool {
    let value = decoded(value);
    let has_name = |part: &str| part.split_once(['=', ':']).is_some_and(|(name, rest)| !rest.is_empty() && is_secret_name(bare(name)));
    looks_secret(&value) || value.split(['&', ';', '?', '#', ',', '{', '}', '/', ' ']).any(has_name)
}

/// A name without what stands around it in JSON.
fn bare(name: &str) -> &str {
    name.trim_matches(|sign: char| matches!(sign, '"' | '\'' | ' '))
}

/// Whether a parameter of this name may hold a secret, however it is spelt: encoded, in any case, with an index in brackets.
fn is_secret_name(name: &str) -> bool {
    let name = decoded(name);
    // Encoded deeper than that, it may be any name.
    let is_any = name.contains('%');
    let words = words(&name);
    let whole = words.concat();
    let is_public = words.iter().any(|word| PUBLIC_CODES.contains(&word.as_str()));
    let is_word = |word: &String| WORDS.contains(&word.as_str()) && !(word == "code" && is_public);
    let is_named = || {
        let (lower, named) = (name.to_ascii_lowercase(), named().load());
        named.iter().any(|named| *named == lower || lower.split(['[', ']']).any(|part| part == named))
    };
    is_any || WITHIN.iter().any(|within| whole.contains(within)) || words.iter().any(is_word) || is_named()
}

/// The words of a name, in lower case: `verificationCode` and `verification_code` have two.
fn words(name: &str) -> Vec<String> {
    let (mut words, mut was_lower) = (vec![String::new()], false);
    for sign in name.chars() {
        if !sign.is_alphanumeric() || (was_lower && sign.is_ascii_uppercase()) {
            words.push(String::new());
        }
        if sign.is_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.extend(sign.to_lowercase());
        }
        was_lower = sign.is_ascii_lowercase() || sign.is_ascii_digit();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_left_out_for_their_names() {
        for (target, shown) in [
            ("/a", "/a"),
            ("/a?symbol=BTCUSDT&limit=5", "/a?symbol=BTCUSDT&limit=5"),
            ("/a?apiKey=hidden&x=1&access_token=hidden", "/a?apiKey=…&x=1&access_token=…"),
            ("/a?%6bey=hidden", "/a?%6bey=…"),
            ("/a?%63ode=hidden&%2563ode=hidden", "/a?%63ode=…&%2563ode=…"),
            ("/a?PASSWORD=hidden=really", "/a?PASSWORD=…"),
            ("/a?key", "/a?key"),
            ("/a?code=hidden&JWT=hidden&session=hidden&PHPSESSID=hidden", "/a?code=…&JWT=…&session=…&PHPSESSID=…"),
            (
                "/a?pwd=hidden&user[password]=hidden&token[]=hidden&token%5B0%5D=hidden",
                "/a?pwd=…&user[password]=…&token[]=…&token%5B0%5D=…",
            ),
            ("/a?verificationCode=hidden&sms_code=hidden&otp=hidden&sid=hidden", "/a?verificationCode=…&sms_code=…&otp=…&sid=…"),
            ("/a?country_code=DE&decode=1&side=buy&pins=3", "/a?country_code=DE&decode=1&side=buy&pins=3"),
            ("/a?x=1;token=hidden;y=2", "/a?x=1;token=…;y=2"),
            ("/a;jsessionid=hidden/b;v=1;Token=hidden?x=1", "/a;jsessionid=…/b;v=1;Token=…?x=1"),
            ("/a%3Bjsessionid%3Dhidden/b", "/…/b"),
            ("/reset/password/hidden/next", "/reset/password/…/next"),
            ("/a?next=https%3A%2F%2Fx%2Fcb%3Fcode%3Dhidden", "/a?next=…"),
            ("/a?next=https://me:hidden@x/cb", "/a?next=…"),
            ("/a?body={\"password\":\"hidden\"}", "/a?body=…"),
        ] {
            assert_eq!(without_secrets(target), shown, "{target}");
        }
    }

    #[test]
    fn what_a_dashboard_asks_is_shown_as_it_is() {
        for target in [
            "/api/liquidations?symbol=BTCUSDT&timeframe=1h&start_timestamp=1735689600000&end_timestamp=1735776000000",
            "/api/liquidation-orders?symbol=1000SHIBUSDT&start_timestamp=2025-01-01T00:00:00.000Z&page=1&page_size=100",
            "/api/liquidation-orders?start_timestamp=2025-01-01T00%3A00%3A00%2B00%3A00&limit=50",
            "/api/symbols?list=BTCUSDT,ETHUSDT,SOLUSDT,BTC-28JUN24-100000-C,BTCUSDT_PERP_240628",
            "/x?number=123456789012345678901234567890&fraction=0.12345678901234567890",
            "/a/very-long-slug-of-words-that-somebody-wrote-in-2024-q1?sort=-created_at",
            "/getLiquidationOrdersByTimeframeAndSymbol?fields=price,quantity,averagePrice",
            "//a//b?&&;",
            "/",
            "",
        ] {
            assert_eq!(without_secrets(target), target);
        }
    }

    #[test]
    fn names_of_the_operators_own_are_left_out_too() {
        leave_out(&["Customer".to_owned()]);
        let shown = without_secrets("/a;customer=7?CUSTOMER=7&customer[]=7&%63ustomer=7&a[customer]=7&customers=7").into_owned();
        assert_eq!(shown, "/a;customer=…?CUSTOMER=…&customer[]=…&%63ustomer=…&a[customer]=…&customers=7");
        leave_out(&[]);
    }

    #[test]
    fn what_is_shown_is_bounded() {
        for target in [format!("/{}", "a/".repeat(4000)), format!("/a?x={}", "1".repeat(8000)), format!("/a?{}", "x=1&".repeat(2000))] {
            let shown = without_secrets(&target);
            assert!(shown.len() <= MAX_SHOWN + LEFT_OUT.len() && shown.contains(LEFT_OUT), "{shown}");
        }
    }

    #[test]
    fn what_is_too_long_to_be_shown_is_not_looked_at() {
        let long = "a-".repeat(MAX_VALUE);
        assert_eq!(without_secrets(&format!("/{long}?x={long}&{long}=1&y=2")), "/…?x=…&…=…&y=2");
    }

    #[test]
    fn keys_are_shown_without_values_that_look_like_secrets() {
        assert_eq!(text_without_secrets("liq:BTCUSDT:1h:1735689600000"), "liq:BTCUSDT:1h:1735689600000");
        assert_eq!(text_without_secrets("k:eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln:x"), "k:…:x");
    }

    proptest! {
        #[test]
        fn no_target_makes_it_fail_or_show_more(target in "[a-z%0-9=&;?/:@.\\[\\]é]{0,80}") {
            let shown = without_secrets(&target);
            prop_assert!(shown.len() <= target.len() + 3 * target.len());
        }

        #[test]
        fn secrets_under_a_secret_name_never_show(value in "[A-Z]{6,40}", name in "(code|jwt|session|db_password|x-api-key|Sid)") {
            for target in [format!("/a?{name}={value}"), format!("/a?b=1&{name}={value}&c"), format!("/a;{name}={value}/b")] {
                prop_assert!(!without_secrets(&target).contains(&value), "{target}");
            }
        }
    }
}
