//! What is not told of a request, wherever requests are told of: the log, traces, statistics.

use std::borrow::Cow;

/// Parameters whose names contain one of these may hold a secret.
const SECRETS: [&str; 6] = ["key", "token", "secret", "pass", "auth", "sig"];

/// A target with the values left out of parameters that may hold a secret.
#[must_use]
pub fn without_secrets(target: &str) -> Cow<'_, str> {
    let Some((path, query)) = target.split_once('?') else { return Cow::Borrowed(target) };
    if query.split('&').all(|part| secret_name(part).is_none()) {
        return Cow::Borrowed(target);
    }
    let mut shown = format!("{path}?");
    for (at, part) in query.split('&').enumerate() {
        if at > 0 {
            shown.push('&');
        }
        match secret_name(part) {
            Some(name) => shown.extend([name, "=…"]),
            None => shown.push_str(part),
        }
    }
    Cow::Owned(shown)
}

/// The name of a parameter whose value may be a secret. An encoded name may be any.
fn secret_name(part: &str) -> Option<&str> {
    let (name, _) = part.split_once('=')?;
    let may_be_secret = name.contains('%') || SECRETS.iter().any(|secret| name.to_ascii_lowercase().contains(secret));
    may_be_secret.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_secret_is_not_told() {
        for (target, shown) in [
            ("/a", "/a"),
            ("/a?symbol=BTCUSDT&limit=5", "/a?symbol=BTCUSDT&limit=5"),
            ("/a?apiKey=hidden&x=1&access_token=hidden", "/a?apiKey=…&x=1&access_token=…"),
            ("/a?%6bey=hidden", "/a?%6bey=…"),
            ("/a?PASSWORD=hidden=really", "/a?PASSWORD=…"),
            ("/a?key", "/a?key"),
        ] {
            assert_eq!(without_secrets(target), shown, "{target}");
        }
    }
}
