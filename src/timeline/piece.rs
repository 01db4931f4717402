//! What can be void of a symbol's orders, piece by piece, when a check found it wrong: the names by which an invalidation finds it, here, in
//! Redis and on other instances.
//!
//! Purges of answers find orders by their [`tags`](super::tags); they are somebody's wish, and concern all orders of a symbol. What a check
//! voids are single pieces: a late order of today does not make a year be read again.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::codec::VERSION;
use crate::cache::key::{Canonical, Key};
use crate::cache::void::ORDERS;

/// A piece of what is known of a symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The span that is over and begins at this millisecond.
    Span(i64),
    /// The newest part.
    Newest,
    /// What was made from any of it: where the orders begin, and answers.
    Derived,
}

impl Piece {
    fn readable(self, symbol: &str, length: i64) -> String {
        match self {
            Self::Span(start) => format!("{ORDERS}{symbol}:{start}:{length}"),
            Self::Newest => format!("{ORDERS}{symbol}:newest:{length}"),
            Self::Derived => format!("{ORDERS}{symbol}:derived:{length}"),
        }
    }

    /// What invalidations call it, where spans have this length in milliseconds.
    #[must_use]
    pub fn target(self, symbol: &str, length: i64) -> u64 {
        xxh3_64(self.readable(symbol, length).as_bytes())
    }

    /// Its key.
    #[must_use]
    pub fn key(self, symbol: &str, length: i64, tags: Vec<String>) -> Key {
        let readable = self.readable(symbol, length);
        // The length of a symbol in front, so that no two keys are one.
        let canonical = format!("\0timeline\0{}\0{readable}", symbol.len());
        Key::of(Canonical(Bytes::from(canonical)), readable, tags, self.target(symbol, length))
    }
}

/// The key of a part in Redis: by where it ends. Its target is that of the span in which it lies, where spans have this length in milliseconds.
#[must_use]
pub fn part_key(symbol: &str, length: i64, to: i64, tags: Vec<String>) -> Key {
    let readable = format!("{ORDERS}{symbol}:{to}:v{VERSION}");
    // The length of a symbol in front, so that no two keys are one.
    let canonical = format!("\0timeline\0{}\0{readable}", symbol.len());
    let span = Piece::Span((to - 1).div_euclid(length).saturating_mul(length));
    Key::of(Canonical(Bytes::from(canonical)), readable, tags, span.target(symbol, length))
}

/// The tag that all spans of a symbol have, and those of no other.
#[must_use]
pub fn tag(symbol: &str) -> String {
    format!("{ORDERS}{symbol}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_piece_of_each_symbol_has_a_target_and_a_name_of_its_own() {
        let pieces = [Piece::Span(0), Piece::Span(5), Piece::Span(50), Piece::Newest, Piece::Derived];
        let keys = || ["BTC", "BTCUSDT", "BTC.5"].into_iter().flat_map(|symbol| pieces.map(|piece| piece.key(symbol, 100, Vec::new())));
        let (targets, names): (BTreeSet<u64>, BTreeSet<String>) = keys().map(|key| (key.target, key.name("ns").to_owned())).unzip();
        assert_eq!((targets.len(), names.len()), (15, 15));
        for to in [1, 50, 100] {
            assert_eq!(part_key("BTC", 100, to, Vec::new()).target, Piece::Span(0).target("BTC", 100), "{to}");
        }
        assert_ne!(Piece::Span(0).target("BTC", 100), Piece::Span(0).target("BTC", 1000), "spans of another length are others");
    }
}
