//! Where answers are kept: [`memory`], [`redis`] (perhaps sealed: [`seal`]) and both in one, [`tiered`].
//!
//! A store knows keys and entries. It does not know routes, requests or freshness decisions, and it never fails: what
//! cannot be read is a miss, what cannot be written is not kept, and both are counted.

pub mod codec;
pub mod entry;
pub mod invalidated;
pub mod key;
pub mod memory;
pub mod purges;
pub mod redis;
pub mod seal;
pub mod tiered;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

pub use entry::Entry;

use crate::cache::key::{Canonical, Key};

/// A future that a store returns.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Keeps entries under keys.
pub trait Store: Send + Sync {
    /// What is at hand without waiting. The hit path: no allocation, no I/O.
    fn peek(&self, canonical: &Canonical) -> Option<Arc<Entry>>;

    /// The entry under a key, whatever its age. It always belongs to the key: the canonical request was compared.
    fn get<'a>(&'a self, key: &'a Key) -> Pending<'a, Option<Arc<Entry>>>;

    /// Keeps an entry until its lives are over or room is needed.
    fn put<'a>(&'a self, key: &'a Key, entry: Arc<Entry>) -> Pending<'a, ()>;

    /// Keeps a different form of an entry that is already kept (its body inflated, say) where it is at hand.
    fn improve(&self, entry: Arc<Entry>);

    /// Removes the entry under a key.
    fn remove<'a>(&'a self, key: &'a Key) -> Pending<'a, ()>;

    /// Removes what is selected, or with `soft` only ends its freshness. Returns how many entries that were.
    fn purge<'a>(&'a self, what: &'a Selection, soft: bool) -> Pending<'a, usize>;

    /// The tiers, for `stats`.
    fn report(&self) -> Vec<Tier>;

    /// How many entries are at hand by the first part of their readable key, for `stats`.
    fn families(&self) -> BTreeMap<String, u64>;

    /// What the server of the shared tier says of itself, by Redis's names; `None` without one, or while it fails.
    fn shared_facts(&self) -> Pending<'_, Option<BTreeMap<String, String>>> {
        Box::pin(std::future::ready(None))
    }

    /// Whether the store works right now.
    fn is_up(&self) -> bool;
}

/// Which entries a purge means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Those whose readable key matches a glob (`*`, `?`).
    Pattern(String),
    /// Those that carry a tag.
    Tag(String),
}

impl Selection {
    /// Whether an entry is meant.
    #[must_use]
    pub fn matches(&self, readable: &str, tags: &[String]) -> bool {
        match self {
            Self::Pattern(pattern) => glob(pattern.as_bytes(), readable.as_bytes()),
            Self::Tag(tag) => tags.contains(tag),
        }
    }
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

/// One tier, as `stats` shows it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Tier {
    /// `memory` or `redis`.
    pub tier: &'static str,
    /// Whether it works right now.
    pub up: bool,
    /// Entries, where that is known without asking.
    pub entries: Option<u64>,
    /// Bytes, likewise.
    pub bytes: Option<u64>,
    /// Bytes that it may hold, likewise.
    pub capacity: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
