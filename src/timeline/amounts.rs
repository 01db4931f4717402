//! The half of a block that buckets need: when its orders were, and what they add up to. Twelve bytes an order.
//!
//! Sums are exact. Amounts are whole multiples of a unit, the largest power of ten that divides all of the block. Of each running sum the
//! low 64 bits stand in an array; the high ones change hardly ever, and where they do stands in a list.

use std::ops::Range;

use super::kept::Weigh;
use super::memory::{array, shared, text};
use crate::api::orders::{Span, Text};
use crate::api::usd::Usd;

/// The largest power of ten that an `i128` holds.
const LARGEST_UNIT: i128 = 10_i128.pow(38);
/// Amounts beyond this, in units of 10⁻¹⁶ USD, are not summed: so sums of a block never leave an `i128`.
const MOST: i128 = 1 << 104;

/// The orders of one block, by side and then by time.
#[derive(Debug, Default)]
pub struct Sums {
    /// The time of the oldest, and of the newest.
    base: i64,
    newest: i64,
    /// In the database's order.
    sides: Box<[Side]>,
    /// Milliseconds since the oldest.
    times: Box<[u32]>,
    /// The low 64 bits of what an order and all of its side before it add up to, in units.
    lows: Box<[u64]>,
    /// From which place on the high bits are what. At the beginning of a side they are zero.
    highs: Box<[(u32, i64)]>,
    /// In 10⁻¹⁶ USD.
    unit: i128,
    /// The times of orders that lack an amount, and of those whose amount is not known to all digits.
    unknown: Box<[u32]>,
    inexact: Box<[u32]>,
}

#[derive(Debug)]
struct Side {
    side: Text,
    /// It begins where the one before ends.
    end: u32,
    /// What all of its orders add up to, in 10⁻¹⁶ USD.
    total: i128,
}

impl Weigh for Sums {
    fn weight(&self) -> u64 {
        let arrays = array::<Side>(self.sides.len())
            + array::<u32>(self.times.len())
            + array::<u64>(self.lows.len())
            + array::<(u32, i64)>(self.highs.len())
            + array::<u32>(self.unknown.len())
            + array::<u32>(self.inexact.len());
        shared::<Self>() + arrays + self.sides.iter().map(|side| text(side.side.as_deref())).sum::<u64>()
    }
}

impl Sums {
    /// How many orders there are, those without an amount included.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.times.len() + self.unknown.len() + self.inexact.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The times of the oldest and of the newest; `None`: there are no orders.
    #[must_use]
    pub fn extent(&self) -> Option<Span> {
        (!self.is_empty()).then_some(Span { start: self.base, end: self.newest })
    }

    /// Whether every amount is known to all digits.
    #[must_use]
    pub const fn is_exact(&self) -> bool {
        self.inexact.is_empty()
    }

    /// How many orders lie within a span.
    #[must_use]
    pub fn count(&self, span: Span) -> usize {
        if span.start <= self.base && span.end >= self.newest {
            return self.len();
        }
        let Some(offsets) = self.offsets(span) else { return 0 };
        let listed = within(&self.unknown, offsets).len() + within(&self.inexact, offsets).len();
        self.ranges().map(|side| within(&self.times[side], offsets).len()).sum::<usize>() + listed
    }

    /// Whether an order within a span has an amount that is not known to all digits.
    #[must_use]
    pub fn is_inexact_in(&self, span: Span) -> bool {
        self.offsets(span).is_some_and(|offsets| !within(&self.inexact, offsets).is_empty())
    }

    /// The time of the order within a span that `newer` others precede, counted from the newest; `None` if there are no more than that.
    #[must_use]
    pub fn moment(&self, span: Span, newer: usize) -> Option<i64> {
        let (first, last) = self.offsets(span)?;
        let reaches = |offset: u32| self.count_between((offset, last)) > newer;
        if !reaches(first) {
            return None;
        }
        // The last offset from which on there are more than `newer`.
        let (mut low, mut high) = (first, last);
        while low < high {
            let middle = high - (high - low) / 2;
            if reaches(middle) { low = middle } else { high = middle - 1 }
        }
        Some(self.base + i64::from(low))
    }

    fn count_between(&self, offsets: (u32, u32)) -> usize {
        let listed = within(&self.unknown, offsets).len() + within(&self.inexact, offsets).len();
        self.ranges().map(|side| within(&self.times[side], offsets).len()).sum::<usize>() + listed
    }

    /// The orders of each side, by time, with what each adds in units of 10⁻¹⁶ USD.
    pub(super) fn amounts(&self) -> impl ExactSizeIterator<Item = (&Text, Vec<(i64, i128)>)> {
        self.walks().map(|walk| {
            let sum = |place| self.sum_before(walk.begin, place);
            let one = |place: usize| (self.base + i64::from(self.times[place]), (sum(place + 1) - sum(place)) * self.unit);
            (walk.side, (walk.begin..walk.end).map(one).collect())
        })
    }

    /// The times of orders that lack an amount, and of those whose amount is not known to all digits.
    pub(super) fn without_amounts(&self) -> [Vec<i64>; 2] {
        [&self.unknown, &self.inexact].map(|offsets| offsets.iter().map(|&offset| self.base + i64::from(offset)).collect())
    }

    /// What each side that occurs adds up to, in units of 10⁻¹⁶ USD; in the database's order.
    pub fn totals(&self) -> impl Iterator<Item = (&Text, i128)> {
        self.sides.iter().map(|side| (&side.side, side.total))
    }

    /// A walk through each side that occurs, in the database's order.
    pub fn walks(&self) -> impl ExactSizeIterator<Item = Walk<'_>> {
        let mut begin = 0;
        self.sides.iter().map(move |Side { side, end, .. }| {
            let walk = Walk { sums: self, side, begin, end: *end as usize, at: begin };
            begin = walk.end;
            walk
        })
    }

    fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let mut begin = 0;
        self.sides.iter().map(move |side| std::mem::replace(&mut begin, side.end as usize)..side.end as usize)
    }

    /// The first and the last offset of a span, as far as there may be orders in it.
    fn offsets(&self, span: Span) -> Option<(u32, u32)> {
        if self.is_empty() || span.end < self.base || span.start > self.newest {
            return None;
        }
        let offset = |time: i64| u32::try_from(time - self.base).unwrap_or(u32::MAX);
        Some((offset(span.start.max(self.base)), offset(span.end.min(self.newest))))
    }

    /// What the orders of a side, which begins at `begin`, add up to before a place; in units.
    fn sum_before(&self, begin: usize, place: usize) -> i128 {
        if place == begin {
            return 0;
        }
        let last = place - 1;
        let high = if self.highs.is_empty() { 0 } else { self.high(begin, last) };
        (i128::from(high) << 64) + i128::from(self.lows[last])
    }

    fn high(&self, begin: usize, place: usize) -> i64 {
        let change = self.highs.partition_point(|&(from, _)| from as usize <= place).checked_sub(1).map(|last| self.highs[last]);
        change.filter(|&(from, _)| from as usize >= begin).map_or(0, |(_, high)| high)
    }
}

fn within(offsets: &[u32], (first, last): (u32, u32)) -> Range<usize> {
    let from = offsets.partition_point(|&offset| offset < first);
    from..from + offsets[from..].partition_point(|&offset| offset <= last)
}

/// A walk through the sums of one side, from the oldest order to the newest.
pub struct Walk<'s> {
    sums: &'s Sums,
    /// The side.
    pub side: &'s Text,
    begin: usize,
    end: usize,
    at: usize,
}

impl Walk<'_> {
    /// Passes all orders before a time.
    pub fn skip_to(&mut self, time: i64) {
        self.at = self.place_of(time);
    }

    /// The time of the next order.
    #[must_use]
    pub fn next_time(&self) -> Option<i64> {
        (self.at < self.end).then(|| self.sums.base + i64::from(self.sums.times[self.at]))
    }

    /// What the orders up to a time, and at it, add up to that were not passed yet, in units of 10⁻¹⁶ USD; `None` if there are none.
    pub fn take_to(&mut self, time: i64) -> Option<i128> {
        // There is no time after the last one.
        let (from, to) = (self.at, time.checked_add(1).map_or(self.end, |next| self.place_of(next)));
        self.at = to;
        let amount = || self.sums.sum_before(self.begin, to) - self.sums.sum_before(self.begin, from);
        (to > from).then(|| amount() * self.sums.unit)
    }

    /// How many orders lie before a time. It is looked for from where the walk is, in steps that double: near places, which
    /// narrow buckets lead to, are found in a few.
    fn place_of(&self, time: i64) -> usize {
        let Ok(offset) = u64::try_from(time.saturating_sub(self.sums.base)) else { return self.at };
        let Ok(offset) = u32::try_from(offset) else { return self.end };
        let rest = &self.sums.times[self.at..self.end];
        let mut step = 1;
        while step < rest.len() && rest[step - 1] < offset {
            step *= 2;
        }
        let near = &rest[step / 2..step.min(rest.len())];
        self.at + step / 2 + near.partition_point(|&known| known < offset)
    }
}

/// Sums in the making: orders are added from the oldest to the newest.
#[derive(Default)]
pub struct Maker {
    sides: Vec<(Text, Vec<(i64, i128)>)>,
    unknown: Vec<i64>,
    inexact: Vec<i64>,
}

impl Maker {
    /// Adds an order that is no older than those before it.
    pub fn push(&mut self, time: i64, side: &Text, usd: Usd) {
        match usd {
            Usd::Exact(amount) if amount.unsigned_abs() <= MOST.unsigned_abs() => self.side(side).push((time, amount)),
            Usd::Exact(_) | Usd::Rounded(_) => self.inexact.push(time),
            Usd::Unknown => self.unknown.push(time),
        }
    }

    /// Adds those of others that lie within a span.
    pub fn push_all(&mut self, sums: &Sums, span: Span) {
        let Some(offsets) = sums.offsets(span) else { return };
        let time = |&offset: &u32| sums.base + i64::from(offset);
        self.unknown.extend(sums.unknown[within(&sums.unknown, offsets)].iter().map(time));
        self.inexact.extend(sums.inexact[within(&sums.inexact, offsets)].iter().map(time));
        for (side, range) in sums.sides.iter().zip(sums.ranges()) {
            let places = within(&sums.times[range.clone()], offsets);
            let own = self.side(&side.side);
            let mut before = sums.sum_before(range.start, range.start + places.start);
            for place in range.start + places.start..range.start + places.end {
                let after = sums.sum_before(range.start, place + 1);
                own.push((time(&sums.times[place]), (after - before) * sums.unit));
                before = after;
            }
        }
    }

    fn side(&mut self, side: &Text) -> &mut Vec<(i64, i128)> {
        let place = self.sides.iter().position(|(known, _)| known == side).unwrap_or_else(|| {
            self.sides.push((side.clone(), Vec::new()));
            self.sides.len() - 1
        });
        &mut self.sides[place].1
    }

    /// The sums. `None` if they are none of one block: the first and the last are further apart than 49 days, or there are too many.
    #[must_use]
    pub fn finish(mut self) -> Option<Sums> {
        self.sides.retain(|(_, orders)| !orders.is_empty());
        self.sides.sort_by_cached_key(|(side, _)| (side.as_deref().map(str::to_uppercase), side.clone()));
        let listed = || self.unknown.iter().chain(&self.inexact).copied();
        let times = || self.sides.iter().flat_map(|(_, orders)| orders).map(|&(time, _)| time).chain(listed());
        let (Some(base), Some(newest)) = (times().min(), times().max()) else { return Some(Sums::default()) };
        u32::try_from(newest.checked_sub(base)?).ok()?;
        let offset = |time: i64| u32::try_from(time - base).unwrap_or(u32::MAX);
        let count = self.sides.iter().map(|(_, orders)| orders.len()).sum();
        u32::try_from(count).ok()?;
        let amounts = self.sides.iter().flat_map(|(_, orders)| orders).map(|&(_, amount)| amount);
        let unit = unit(amounts);
        let (mut offsets, mut lows, mut highs) = (Vec::with_capacity(count), Vec::with_capacity(count), Vec::new());
        let mut sides = Vec::with_capacity(self.sides.len());
        for (side, orders) in self.sides {
            let (mut sum, mut high) = (0_i128, 0_i64);
            for (time, amount) in orders {
                sum += amount / unit;
                let (low, new) = split(sum);
                if new != high {
                    highs.push((u32::try_from(lows.len()).ok()?, new));
                    high = new;
                }
                offsets.push(offset(time));
                lows.push(low);
            }
            sides.push(Side { side, end: u32::try_from(lows.len()).ok()?, total: sum * unit });
        }
        let list = |times: Vec<i64>| times.into_iter().map(offset).collect();
        let (unknown, inexact) = (list(self.unknown), list(self.inexact));
        Some(Sums {
            base,
            newest,
            sides: sides.into(),
            times: offsets.into(),
            lows: lows.into(),
            highs: highs.into(),
            unit,
            unknown,
            inexact,
        })
    }
}

/// The low bits of a sum, and the high ones.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the two together are all of it")]
const fn split(sum: i128) -> (u64, i64) {
    (sum as u64, (sum >> 64) as i64)
}

/// The largest power of ten that divides all of them.
fn unit(amounts: impl Iterator<Item = i128>) -> i128 {
    let mut unit = LARGEST_UNIT;
    for amount in amounts.filter(|&amount| amount != 0) {
        while amount % unit != 0 {
            unit /= 10;
        }
    }
    unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Span = Span { start: i64::MIN, end: i64::MAX };

    fn sums(orders: &[(i64, usize, Usd)]) -> Sums {
        let mut maker = Maker::default();
        orders.iter().for_each(|&(time, side, usd)| maker.push(time, &Some(["buy", "sell"][side].into()), usd));
        maker.finish().unwrap()
    }

    fn usd() -> impl Strategy<Value = Usd> {
        let amount = prop_oneof![
            (-1000_i128..1000).prop_map(|amount| amount * 10_i128.pow(13)),
            (any::<i64>(), any::<u32>()).prop_map(|(amount, factor)| i128::from(amount) * i128::from(factor)),
            Just(MOST),
            Just(-MOST),
        ];
        prop_oneof![6 => amount.prop_map(Usd::Exact), 1 => Just(Usd::Unknown), 1 => Just(Usd::Rounded(1.5))]
    }

    proptest! {
        #[test]
        fn sums_and_counts_are_those_of_adding_up(
            mut orders in proptest::collection::vec((0_i64..500, 0_usize..2, usd()), 0..80), start in 0_i64..500, length in 0_i64..300,
        ) {
            orders.sort_by_key(|order| order.0);
            let (sums, span) = (sums(&orders), Span { start, end: start + length });
            let inside: Vec<_> = orders.iter().filter(|order| (span.start..=span.end).contains(&order.0)).collect();
            prop_assert_eq!((sums.len(), sums.count(span)), (orders.len(), inside.len()));
            prop_assert_eq!(sums.is_inexact_in(span), inside.iter().any(|order| matches!(order.2, Usd::Rounded(_))));
            for mut walk in sums.walks() {
                walk.skip_to(span.start);
                let of_side = |order: &&&(i64, usize, Usd)| walk.side.as_deref() == Some(["buy", "sell"][order.1]);
                let amounts: Vec<i128> =
                    inside.iter().filter(of_side).filter_map(|order| if let Usd::Exact(amount) = order.2 { Some(amount) } else { None }).collect();
                prop_assert_eq!(walk.take_to(span.end), (!amounts.is_empty()).then(|| amounts.iter().sum()));
            }
            for newer in [0, 1, inside.len() / 2, inside.len()] {
                prop_assert_eq!(sums.moment(span, newer), inside.iter().rev().nth(newer).map(|order| order.0));
            }
            // What was cut in two and joined is the same again.
            let mut joined = Maker::default();
            joined.push_all(&sums, Span { start: i64::MIN, end: start });
            joined.push_all(&sums, Span { start: start + 1, end: i64::MAX });
            prop_assert_eq!(format!("{:?}", joined.finish().unwrap()), format!("{sums:?}"));
        }
    }

    #[test]
    fn an_order_takes_twelve_bytes() {
        let random = &mut fastrand::Rng::with_seed(4);
        // Prices of five places and quantities of eight: no 64 bits hold the sums of a block.
        let one = |place: i64| (place * 80, random.usize(..2), Usd::Exact(random.i128(1..5_000 * 10_i128.pow(13)) * 1000));
        let orders: Vec<_> = (0..16_384).map(one).collect();
        let sums = sums(&orders);
        assert!(!sums.highs.is_empty());
        assert!(sums.weight() <= 16_384 * 12 + 1024, "{} bytes", sums.weight());
        let plain: Vec<_> = orders.iter().map(|&(time, side, _)| (time, side, Usd::Exact(7 * 10_i128.pow(12)))).collect();
        let plain = super::tests::sums(&plain);
        assert!(plain.highs.is_empty() && plain.weight() <= 16_384 * 12 + 512, "{} bytes", plain.weight());
    }

    #[test]
    fn what_lies_too_far_apart_is_no_block() {
        let far = [(0, 0, Usd::Exact(1)), (i64::from(u32::MAX) + 1, 0, Usd::Exact(1))];
        let mut maker = Maker::default();
        far.iter().for_each(|&(time, _, usd)| maker.push(time, &None, usd));
        assert!(maker.finish().is_none());
        assert_eq!(sums(&[]).extent(), None);
        assert_eq!(sums(&far[..1]).count(ALL), 1);
    }
}
