//! What the two halves of a block have in common: they are cut and joined.

use super::amounts::{Maker, Sums};
use super::columns::joined;
use super::details::Details;
use super::kept::Weigh;
use crate::api::orders::Span;

/// A half of the orders of a block.
pub trait Half: Weigh + Sized {
    /// How many orders there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// These and newer ones; `None` if that makes no block.
    fn joined(&self, newer: &Self) -> Option<Self>;

    /// Those from one moment up to, and not including, another.
    fn cut(&self, from: i64, to: i64) -> Self;
}

impl Half for Sums {
    fn len(&self) -> usize {
        self.len()
    }

    fn joined(&self, newer: &Self) -> Option<Self> {
        joined(self, newer)
    }

    fn cut(&self, from: i64, to: i64) -> Self {
        let mut sums = Maker::default();
        if from < to {
            sums.push_all(self, Span { start: from, end: to - 1 });
        }
        // What is part of a block makes one.
        sums.finish().unwrap_or_default()
    }
}

impl Half for Details {
    fn len(&self) -> usize {
        self.len()
    }

    fn joined(&self, newer: &Self) -> Option<Self> {
        self.joined(newer)
    }

    fn cut(&self, from: i64, to: i64) -> Self {
        self.cut(self.place_of(from)..self.place_of(to))
    }
}
