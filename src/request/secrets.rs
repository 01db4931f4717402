//! What is not told of a request, wherever requests are told of: the log, traces, statistics.

use std::borrow::Cow;

/// Parameters whose names contain one of these may hold a secret.
const SECRETS: [&str; 6] = ["key", "token", "secret", "pass", "auth", "sig"];

/// A target with the values left out of parameters that may hold a secret.
#[must_use]
pub fn without_secrets(target: &str) -> Cow<'_, str> {
    let Some((path, query)) = target.split_once('?') else { return Cow::Borrowed(target) };
    if !query.split('&').any(may_be_secret) {
        return Cow::Borrowed(target);
    }
    let mut shown = format!("{path}?");
    for (at, part) in query.split('&').enumerate() {
        if at > 0 {
            shown.push('&');
        }
        match part.split_once('=') {
            Some((name, _)) if may_be_secret(part) => shown.extend([name, "=…"]),
            _ => shown.push_str(part),
        }
    }
    Cow::Owned(shown)
}

/// Whether a parameter has a value that may be a secret. An encoded name may be any.
fn may_be_secret(part: &str) -> bool {
    let is_one = |name: &str| name.contains('%') || SECRETS.iter().any(|secret| name.to_ascii_lowercase().contains(secret));
    part.split_once('=').is_some_and(|(name, _)| is_one(name))
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
