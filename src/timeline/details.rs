//! The half of a block that lists and pages print: texts and numbers of its orders.

use std::ops::Range;

use super::kept::Weigh;
use super::memory::{array, shared, text};
use crate::api::orders::{Order, Span, Text};
use crate::api::usd::Usd;

/// Orders by time, oldest first; of one moment, in the reverse of the order in which their source gives them. So their end, read
/// backwards, is what the source would give.
#[derive(Debug, Default)]
pub struct Details {
    /// The time of the oldest.
    pub(super) base: i64,
    /// Milliseconds since then.
    pub(super) times: Box<[u32]>,
    /// Which of `kinds` each order is.
    pub(super) kind: Box<[u16]>,
    pub(super) kinds: Box<[Kind]>,
    /// Original quantity, price, average price, last and accumulated fill. What is NULL is not a number.
    pub(super) numbers: Box<[[f64; 5]]>,
}

/// The texts of an order, which few combinations of occur.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub(super) symbol: Text,
    pub(super) side: Text,
    pub(super) order_type: Text,
    pub(super) time_in_force: Text,
    pub(super) order_status: Text,
}

/// What is not known of an order.
pub(super) const NULL: f64 = f64::NAN;
/// More different combinations of texts than this are nothing that a block is good for.
pub(super) const MAX_KINDS: usize = 4096;

impl Kind {
    fn weight(&self) -> u64 {
        [&self.symbol, &self.side, &self.order_type, &self.time_in_force, &self.order_status].map(|one| text(one.as_deref())).iter().sum()
    }
}

impl Weigh for Details {
    fn weight(&self) -> u64 {
        shared::<Self>()
            + array::<u32>(self.times.len())
            + array::<u16>(self.kind.len())
            + array::<[f64; 5]>(self.numbers.len())
            + array::<Kind>(self.kinds.len())
            + self.kinds.iter().map(Kind::weight).sum::<u64>()
    }
}

impl Details {
    /// How many orders there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.times.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.times.is_empty()
    }

    /// The time of the order at a place, which there must be.
    #[must_use]
    pub fn time(&self, place: usize) -> i64 {
        self.base + i64::from(self.times[place])
    }

    /// How many orders lie before a time.
    #[must_use]
    pub fn place_of(&self, time: i64) -> usize {
        let Ok(offset) = u64::try_from(time.saturating_sub(self.base)) else { return 0 };
        u32::try_from(offset).map_or(self.len(), |offset| self.times.partition_point(|&known| known < offset))
    }

    /// The places of the orders within a span.
    #[must_use]
    pub fn within(&self, span: Span) -> Range<usize> {
        let from = self.place_of(span.start);
        // There is no time after the last one.
        let to = span.end.checked_add(1).map_or(self.len(), |next| self.place_of(next));
        from..to.max(from)
    }

    /// The order at a place, which there must be.
    #[must_use]
    pub fn order(&self, place: usize) -> Order {
        let kind = self.kind(place);
        let [original, price, average, last, filled] = self.numbers[place].map(|number| (!number.is_nan()).then_some(number));
        Order {
            symbol: kind.symbol.clone(),
            side: kind.side.clone(),
            order_type: kind.order_type.clone(),
            time_in_force: kind.time_in_force.clone(),
            original_quantity: original,
            price,
            average_price: average,
            order_status: kind.order_status.clone(),
            order_last_filled_quantity: last,
            order_filled_accumulated_quantity: filled,
            order_trade_time: Some(self.time(place)),
            // Sums are made from the other half, not from orders that come out of this one.
            usd: Usd::Unknown,
        }
    }

    /// Whether two orders are the same to their readers.
    pub(super) fn is_same(&self, place: usize, other: &Self, at: usize) -> bool {
        let bits = |details: &Self, place: usize| details.numbers[place].map(f64::to_bits);
        self.time(place) == other.time(at) && bits(self, place) == bits(other, at) && self.kind(place) == other.kind(at)
    }

    fn kind(&self, place: usize) -> &Kind {
        &self.kinds[usize::from(self.kind[place])]
    }

    /// The newest moment that several orders share.
    #[must_use]
    pub fn tie(&self) -> Option<i64> {
        let last = self.times.windows(2).rposition(|pair| pair[0] == pair[1])?;
        Some(self.time(last))
    }

    /// The orders at these places.
    #[must_use]
    pub(super) fn cut(&self, places: Range<usize>) -> Self {
        let Some(&first) = self.times.get(places.start).filter(|_| !places.is_empty()) else { return Self::default() };
        Self {
            base: self.base + i64::from(first),
            times: self.times[places.clone()].iter().map(|offset| offset - first).collect(),
            kind: self.kind[places.clone()].into(),
            kinds: self.kinds.clone(),
            numbers: self.numbers[places].into(),
        }
    }

    /// These, and newer ones after them. `None` if that makes no block.
    #[must_use]
    pub(super) fn joined(&self, newer: &Self) -> Option<Self> {
        if self.is_empty() || newer.is_empty() {
            return Some(if self.is_empty() { newer.cut(0..newer.len()) } else { self.cut(0..self.len()) });
        }
        let step = u32::try_from(newer.base.checked_sub(self.base)?).ok()?;
        let mut kinds = self.kinds.to_vec();
        let mut numbers = Vec::with_capacity(newer.kinds.len());
        for kind in &newer.kinds {
            let place = kinds.iter().position(|known| known == kind).unwrap_or_else(|| {
                kinds.push(kind.clone());
                kinds.len() - 1
            });
            numbers.push(u16::try_from(place).ok().filter(|_| place < MAX_KINDS)?);
        }
        let mut times = self.times.to_vec();
        times.reserve_exact(newer.len());
        for &offset in &newer.times {
            times.push(offset.checked_add(step)?);
        }
        Some(Self {
            base: self.base,
            times: times.into(),
            kind: self.kind.iter().copied().chain(newer.kind.iter().map(|&kind| numbers[usize::from(kind)])).collect(),
            kinds: kinds.into(),
            numbers: self.numbers.iter().chain(&newer.numbers).copied().collect(),
        })
    }
}
