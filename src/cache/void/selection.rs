//! Which entries a void concerns.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cache::entry::Entry;
use crate::cache::key::{MADE_INTO, entry_digest};

/// Which entries a void concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Those whose readable key matches a glob (`*`, `?`).
    Pattern(String),
    /// Those that carry a tag.
    Tag(String),
    /// Those for a target URI, in all variants and for every origin ([`Key::target`](crate::cache::key::Key::target)).
    Target(u64),
    /// The one with this digest ([`entry_digest`]): the upstream has taken it back.
    Entry(u64),
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pattern(pattern) => write!(f, "pattern {pattern}"),
            Self::Tag(tag) => write!(f, "tag {tag}"),
            Self::Target(target) => write!(f, "target {target:016x}"),
            Self::Entry(digest) => write!(f, "entry {digest:016x}"),
        }
    }
}

impl Selection {
    /// Everything.
    #[must_use]
    pub fn all() -> Self {
        Self::Pattern("*".to_owned())
    }

    /// Whether it concerns an entry.
    #[must_use]
    pub fn concerns(&self, entry: &Entry) -> bool {
        match self {
            Self::Entry(digest) => entry_digest(&entry.canonical) == *digest,
            _ => self.matches(&entry.readable, &entry.tags, entry.target),
        }
    }

    /// Whether it concerns all entries with this readable key, these tags and this target.
    #[must_use]
    pub fn matches(&self, readable: &str, tags: &[String], target: u64) -> bool {
        match self {
            Self::Pattern(pattern) => {
                let made = || tags.iter().filter_map(|tag| tag.strip_prefix(MADE_INTO));
                glob(pattern.as_bytes(), readable.as_bytes()) || made().any(|keys| overlap(pattern.as_bytes(), keys.as_bytes()))
            }
            Self::Tag(tag) => tags.contains(tag),
            Self::Target(voided) => *voided == target,
            Self::Entry(_) => false,
        }
    }
}

/// The readable keys of entries with such tags begin so: whether a pattern concerns them, their names alone do not say.
pub const ORDERS: &str = "timeline:";

/// Whether some text matches two patterns of `*` and `?` both.
#[must_use]
pub fn overlap(one: &[u8], two: &[u8]) -> bool {
    // Row by row from the end: whether what is left of `one` and of `two` can be the same.
    let mut below = vec![false; two.len() + 1];
    for at in (0..=one.len()).rev() {
        let mut row = vec![false; two.len() + 1];
        for other in (0..=two.len()).rev() {
            row[other] = match (one.get(at), two.get(other)) {
                (None, None) => true,
                (Some(b'*'), None) => below[other],
                (None, Some(b'*')) => row[other + 1],
                (Some(b'*'), Some(_)) | (Some(_), Some(b'*')) => below[other] || row[other + 1],
                (Some(a), Some(b)) => (a == b || *a == b'?' || *b == b'?') && below[other + 1],
                _ => false,
            };
        }
        below = row;
    }
    below[0]
}

/// Whether `text` matches a pattern of `*` and `?`. Linear in practice: only the last `*` is ever tried again.
#[must_use]
pub fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t, mut retry) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p, t));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[t] => (p, t) = (p + 1, t + 1),
            _ => match retry {
                Some((star, from)) => {
                    retry = Some((star, from + 1));
                    (p, t) = (star + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn globs() {
        for (pattern, text, matches) in [
            ("*", "", true),
            ("liq:BTC*:*", "liq:BTCUSDT:1m", true),
            ("liq:?:*", "liq:BTC:1m", false),
            ("a*b*c", "aXbYbZc", true),
            ("a*b", "abc", false),
            ("", "a", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn purges_by_pattern_find_what_the_answers_that_they_name_are_made_from() {
        let tags = ["symbol:BTCUSDT".to_owned(), format!("{MADE_INTO}liq:BTCUSDT:*:*"), format!("{MADE_INTO}orders:BTCUSDT:*")];
        let concerned = |pattern: &str| Selection::Pattern(pattern.into()).matches("timeline:BTCUSDT", &tags, 0);
        for pattern in ["*", "liq:*", "liq:BTC*:1m:*", "liq:BTCUSDT:1m:1:2", "orders:?TCUSDT:latest:50", "*USDT*", "timeline:*"] {
            assert!(concerned(pattern), "{pattern}");
        }
        for pattern in ["", "liq", "liq:ETH*", "symbols:all", "other:*"] {
            assert!(!concerned(pattern), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn patterns_that_match_one_text_overlap(one in "[ab*?]{0,6}", two in "[ab*?]{0,6}", text in "[ab]{0,6}") {
            if glob(one.as_bytes(), text.as_bytes()) && glob(two.as_bytes(), text.as_bytes()) {
                prop_assert!(overlap(one.as_bytes(), two.as_bytes()));
            }
            prop_assert_eq!(overlap(one.as_bytes(), text.as_bytes()), glob(one.as_bytes(), text.as_bytes()));
        }
    }
}
