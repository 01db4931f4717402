//! Orders of one symbol, in blocks: what the newest part holds, and what the source gives.

use std::ops::Range;
use std::sync::Arc;

use super::amounts::{Maker, Sums};
use super::details::Details;
use super::kept::Weigh;
use crate::api::orders::{Order, Span};

/// The orders of a full block. Its sums take 192 KiB, in sizes that the allocator hands out exactly; what a block takes besides is 0.2 % of
/// that. Its details take 0.75 MiB, which Redis takes at once. Cutting or joining one is done within a millisecond.
pub const BLOCK: usize = 1 << 14;
/// A block with more orders than this is none, though they all be of one moment.
pub const MOST_IN_BLOCK: usize = 4 * BLOCK;

/// Orders by time, oldest first, in blocks. Orders of one moment lie in one block.
#[derive(Debug, Default)]
pub struct Columns {
    blocks: Vec<Block>,
    /// How many orders there are up to the end of each block.
    ends: Vec<usize>,
}

/// Some orders that follow one another: what they add up to, and what they are.
#[derive(Clone, Debug, Default)]
pub struct Block {
    /// For buckets.
    pub sums: Arc<Sums>,
    /// For lists and pages.
    pub details: Arc<Details>,
}

/// Why orders are no columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// They are not in order of time, or one has no time.
    Disordered,
    /// Their texts differ too much.
    TooManyKinds,
    /// More orders are of one moment than a block holds.
    TooDense,
}

impl Weigh for Block {
    fn weight(&self) -> u64 {
        self.sums.weight() + self.details.weight()
    }
}

impl Block {
    /// How many orders there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.details.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.details.is_empty()
    }

    /// The times of the first and the last order.
    #[must_use]
    pub fn extent(&self) -> Option<Span> {
        let last = self.len().checked_sub(1)?;
        Some(Span { start: self.details.time(0), end: self.details.time(last) })
    }

    /// Its orders from one moment up to, and not including, another.
    #[must_use]
    pub fn cut(&self, from: i64, to: i64) -> Self {
        let places = self.details.place_of(from)..self.details.place_of(to);
        if places.len() == self.len() {
            return self.clone();
        }
        if places.is_empty() {
            return Self::default();
        }
        let mut sums = Maker::default();
        sums.push_all(&self.sums, Span { start: from, end: to - 1 });
        // What is part of a block makes one.
        Self { sums: Arc::new(sums.finish().unwrap_or_default()), details: Arc::new(self.details.cut(places)) }
    }

    /// This and a newer one as one block, if they make one.
    fn joined(&self, newer: &Self) -> Option<Self> {
        if self.len() + newer.len() > BLOCK {
            return None;
        }
        Some(Self { sums: Arc::new(joined(&self.sums, &newer.sums)?), details: Arc::new(self.details.joined(&newer.details)?) })
    }
}

/// Sums of two pieces, of which the second is the newer one. `None` if they are too far apart.
#[must_use]
pub fn joined(older: &Sums, newer: &Sums) -> Option<Sums> {
    let all = Span { start: i64::MIN, end: i64::MAX };
    let mut sums = Maker::default();
    sums.push_all(older, all);
    sums.push_all(newer, all);
    sums.finish()
}

impl Columns {
    /// From blocks, oldest first; those without orders are left out.
    #[must_use]
    pub(super) fn of(blocks: impl IntoIterator<Item = Block>) -> Self {
        let mut columns = Self::default();
        blocks.into_iter().for_each(|block| columns.push(block));
        columns.blocks.shrink_to_fit();
        columns.ends.shrink_to_fit();
        columns
    }

    fn push(&mut self, block: Block) {
        if !block.is_empty() {
            self.ends.push(self.len() + block.len());
            self.blocks.push(block);
        }
    }

    /// The orders before `from`, and from there on newer ones (all of them at `from` or later). Whole blocks are shared.
    #[must_use]
    pub fn renewed(&self, from: i64, newer: &Self) -> Self {
        let mut blocks = self.part(i64::MIN, from).blocks;
        let mut newer = newer.blocks.iter();
        if let (Some(last), Some(first)) = (blocks.last(), newer.clone().next())
            && let Some(joined) = last.joined(first)
        {
            blocks.pop();
            blocks.push(joined);
            newer.next();
        }
        blocks.extend(newer.cloned());
        Self::of(blocks)
    }

    /// Whether the orders from `from` on are these, as far as their readers see.
    #[must_use]
    pub fn ends_in(&self, from: i64, newer: &Self) -> bool {
        let first = self.place_of(from);
        let is_same = |place: usize| {
            let ((one, place), (other, at)) = (self.locate(first + place), newer.locate(place));
            one.details.is_same(place, &other.details, at)
        };
        self.len() - first == newer.len() && (0..newer.len()).all(is_same)
    }

    /// The orders from one moment up to, and not including, another. Whole blocks are shared.
    #[must_use]
    pub fn part(&self, from: i64, to: i64) -> Self {
        Self::of(self.blocks.iter().map(|block| block.cut(from, to)))
    }

    /// The orders from a moment on.
    #[must_use]
    pub fn since(&self, from: i64) -> Self {
        let first = self.place_of(from);
        let within = self.blocks.iter().zip(&self.ends).filter(|&(_, &end)| end > first);
        Self::of(within.map(|(block, _)| {
            let places = block.details.place_of(from)..block.len();
            if places.start == 0 {
                return block.clone();
            }
            let mut sums = Maker::default();
            sums.push_all(&block.sums, Span { start: from, end: i64::MAX });
            Block { sums: Arc::new(sums.finish().unwrap_or_default()), details: Arc::new(block.details.cut(places)) }
        }))
    }

    /// Its blocks, oldest first.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// What buckets are made from, oldest first.
    pub fn sums(&self) -> impl DoubleEndedIterator<Item = &Sums> {
        self.blocks.iter().map(|block| &*block.sums)
    }

    /// How many orders there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether every amount is known to all digits.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.sums().all(Sums::is_exact)
    }

    /// How many bytes they take.
    #[must_use]
    pub fn weight(&self) -> u64 {
        let lists = super::memory::array::<Block>(self.blocks.capacity()) + super::memory::array::<usize>(self.ends.capacity());
        super::memory::shared::<Self>() + lists + self.blocks.iter().map(Weigh::weight).sum::<u64>()
    }

    /// The time of the newest.
    #[must_use]
    pub fn newest(&self) -> Option<i64> {
        self.blocks.last()?.extent().map(|extent| extent.end)
    }

    /// The time of the order at a place.
    #[must_use]
    pub fn time(&self, place: usize) -> Option<i64> {
        (place < self.len()).then(|| {
            let (block, place) = self.locate(place);
            block.details.time(place)
        })
    }

    /// Orders within a span, newest first.
    pub fn orders(&self, span: Span) -> impl Iterator<Item = Order> + '_ {
        self.blocks.iter().rev().flat_map(move |block| block.details.within(span).rev().map(|place| block.details.order(place)))
    }

    /// The places of the orders within a span.
    #[must_use]
    pub fn within(&self, span: Span) -> Range<usize> {
        let from = self.place_of(span.start);
        // There is no time after the last one.
        let to = span.end.checked_add(1).map_or(self.len(), |next| self.place_of(next));
        from..to.max(from)
    }

    /// The newest moment that several orders share.
    #[must_use]
    pub fn tie(&self) -> Option<i64> {
        self.blocks.iter().rev().find_map(|block| block.details.tie())
    }

    /// The order at a place, which there must be.
    #[must_use]
    pub fn order(&self, place: usize) -> Order {
        let (block, place) = self.locate(place);
        block.details.order(place)
    }

    /// How many orders lie before a time.
    fn place_of(&self, time: i64) -> usize {
        let block = self.blocks.partition_point(|block| block.extent().is_some_and(|extent| extent.end < time));
        self.begin(block) + self.blocks.get(block).map_or(0, |block| block.details.place_of(time))
    }

    fn begin(&self, block: usize) -> usize {
        block.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    fn locate(&self, place: usize) -> (&Block, usize) {
        let block = self.ends.partition_point(|&end| end <= place);
        (&self.blocks[block], place - self.begin(block))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::buckets::buckets;
    use super::super::builder::Builder;
    use super::*;
    use crate::api::usd::Usd;
    use proptest::prelude::*;

    /// An order at a time, of a side, with an amount of whole 10⁻¹⁶ USD.
    pub fn order(time: i64, side: &str, usd: Usd) -> Order {
        Order {
            symbol: Some("BTCUSDT".into()),
            side: Some(side.into()),
            price: Some(1.5),
            order_trade_time: Some(time),
            usd,
            ..Order::default()
        }
    }

    #[test]
    fn orders_come_out_as_they_went_in() {
        let orders = [
            Order { side: None, price: None, ..order(7, "", Usd::Unknown) },
            order(5, "sell", Usd::Exact(1)),
            order(5, "buy", Usd::Exact(2)),
            order(3, "buy", Usd::Exact(4)),
            order(i64::from(u32::MAX) * -2, "buy", Usd::Exact(4)),
        ];
        let columns = Builder::columns(&orders).unwrap();
        let read: Vec<Order> = (0..columns.len()).rev().map(|place| columns.order(place)).collect();
        let expected: Vec<Order> = orders.iter().map(|order| Order { usd: Usd::Unknown, ..order.clone() }).collect();
        assert_eq!(read, expected);
        assert_eq!(columns.blocks().len(), 2, "one is too far away");
        assert_eq!((columns.newest(), columns.tie(), columns.within(Span { start: 4, end: 5 })), (Some(7), Some(5), 2..4));
        assert!(columns.within(Span { start: 8, end: 9 }).is_empty() && columns.is_certain());
    }

    #[test]
    fn blocks_are_bounded_and_share_no_moment() {
        let times = (0..i64::try_from(2 * BLOCK).unwrap()).rev().map(|place| if place < 100 { 5 } else { place });
        let orders: Vec<Order> = times.map(|time| order(time, "buy", Usd::Exact(1))).collect();
        let columns = Builder::columns(&orders).unwrap();
        assert_eq!(columns.blocks().iter().map(Block::len).collect::<Vec<_>>(), [BLOCK, BLOCK]);
        let tied: Vec<Order> = (0..=MOST_IN_BLOCK).map(|_| order(5, "buy", Usd::Exact(1))).collect();
        assert_eq!(Builder::columns(&tied[1..]).unwrap().blocks().len(), 1);
        assert_eq!(Builder::columns(&tied).err(), Some(Unfit::TooDense));
    }

    proptest! {
        #[test]
        fn what_is_renewed_is_as_if_it_was_read_at_once(
            mut times in proptest::collection::vec(0_i64..100, 0..60), from in 0_i64..110, doubt in 0_usize..60, far in 0_usize..3,
        ) {
            times.sort_unstable_by_key(|&time| std::cmp::Reverse(time));
            let far = [1, 1 << 30, 1 << 40][far];
            let one = |(place, &time): (usize, &i64)| {
                let usd = if place == doubt { Usd::Unknown } else { Usd::Exact(i128::from(time) * 7 + 1) };
                order(time * far, ["sell", "buy"][place % 2], usd)
            };
            let orders: Vec<Order> = times.iter().enumerate().map(one).collect();
            let (whole, from) = (Builder::columns(&orders).unwrap(), from * far);
            let newer = Builder::columns(orders.iter().filter(|order| order.order_trade_time >= Some(from))).unwrap();
            let all = Span { start: i64::MIN, end: i64::MAX };
            prop_assert!(whole.ends_in(from, &newer));
            prop_assert_eq!(whole.ends_in(from, &Columns::default()), newer.is_empty());
            let again = whole.renewed(from, &newer);
            prop_assert_eq!(again.orders(all).collect::<Vec<_>>(), whole.orders(all).collect::<Vec<_>>());
            prop_assert_eq!(whole.since(from).orders(all).collect::<Vec<_>>(), newer.orders(all).collect::<Vec<_>>());
            let sums = |columns: &Columns| buckets(columns.sums(), Span { start: 0, end: 200 * far }, 10 * far);
            prop_assert_eq!(sums(&again), sums(&whole));
            prop_assert_eq!(again.is_certain(), whole.is_certain());
        }
    }
}
