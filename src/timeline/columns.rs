//! Orders of one symbol in one span of time, as columns: little memory, and sums by binary search.

use std::ops::Range;

use crate::api::orders::{Order, Span, Text};
use crate::api::usd::Usd;

/// Orders by time, oldest first; of one moment, in the reverse of the order in which their source gives them. So the end of
/// the columns, read backwards, is what the source would give.
#[derive(Debug, Default)]
pub struct Columns {
    pub(super) times: Vec<i64>,
    /// Which of `kinds` each order is.
    pub(super) kind: Vec<u16>,
    pub(super) kinds: Vec<Kind>,
    /// Original quantity, price, average price, last and accumulated fill. What is NULL is not a number.
    pub(super) numbers: Vec<[f64; 5]>,
    pub(super) sides: Vec<Side>,
    /// Whether sums are certain: every amount is exact, and no two sides are one to the database.
    pub(super) certain: bool,
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

/// The orders of one side that have an amount: their times, and what they and all before them add up to.
#[derive(Debug, Default)]
pub(super) struct Side {
    pub(super) side: Text,
    pub(super) times: Vec<i64>,
    /// In units of 10⁻¹⁶ USD; one more than there are times, the first is zero.
    pub(super) sums: Vec<i128>,
}

/// What is not known of an order.
pub(super) const NULL: f64 = f64::NAN;
/// More different combinations of texts than this are nothing that columns are good for.
pub(super) const MAX_KINDS: usize = 4096;

/// Why orders are no columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// They are not in order of time, or one has no time.
    Disordered,
    /// Their texts differ too much.
    TooManyKinds,
}

impl Columns {
    /// The orders up to `from`, and from there on newer ones (all of them at `from` or later).
    ///
    /// # Errors
    /// [`Unfit::TooManyKinds`].
    pub fn renewed(&self, from: i64, newer: &Self) -> Result<Self, Unfit> {
        let mut columns = self.part(i64::MIN, from);
        let mut numbers = Vec::with_capacity(newer.kinds.len());
        for kind in &newer.kinds {
            numbers.push(match columns.kinds.iter().position(|known| known == kind) {
                Some(number) => number,
                None => {
                    columns.kinds.push(kind.clone());
                    columns.kinds.len() - 1
                }
            });
        }
        if columns.kinds.len() > MAX_KINDS {
            return Err(Unfit::TooManyKinds);
        }
        let numbers =
            numbers.into_iter().map(|number| u16::try_from(number).map_err(|_| Unfit::TooManyKinds)).collect::<Result<Vec<_>, _>>()?;
        columns.times.extend_from_slice(&newer.times);
        columns.kind.extend(newer.kind.iter().map(|&kind| numbers[usize::from(kind)]));
        columns.numbers.extend_from_slice(&newer.numbers);
        columns.certain &= newer.certain;
        for side in &newer.sides {
            let at = columns.sides.iter().position(|known| known.side == side.side).unwrap_or_else(|| {
                columns.sides.push(Side { side: side.side.clone(), times: Vec::new(), sums: vec![0] });
                columns.sides.len() - 1
            });
            let known = &mut columns.sides[at];
            let (end, begin) = (known.sums.last().copied().unwrap_or(0), side.sums.first().copied().unwrap_or(0));
            for (&time, sum) in side.times.iter().zip(&side.sums[1..]) {
                match sum.checked_sub(begin).and_then(|sum| sum.checked_add(end)) {
                    Some(sum) => {
                        known.times.push(time);
                        known.sums.push(sum);
                    }
                    None => columns.certain = false,
                }
            }
        }
        columns.certain &= sort_sides(&mut columns.sides);
        Ok(columns)
    }

    /// Whether the orders from `from` on are these, as far as their readers see.
    #[must_use]
    pub fn ends_in(&self, from: i64, newer: &Self) -> bool {
        let first = self.times.partition_point(|&time| time < from);
        let bits = |numbers: &[[f64; 5]]| numbers.iter().flatten().map(|number| number.to_bits()).collect::<Vec<_>>();
        let kinds = |columns: &Self, place: usize| columns.kinds[usize::from(columns.kind[place])].clone();
        self.times[first..] == newer.times
            && bits(&self.numbers[first..]) == bits(&newer.numbers)
            && (0..newer.len()).all(|place| kinds(self, first + place) == kinds(newer, place))
    }

    /// The orders from one moment up to, and not including, another.
    #[must_use]
    pub fn part(&self, from: i64, to: i64) -> Self {
        self.cut(|times| {
            let first = times.partition_point(|&time| time < from);
            first..times.partition_point(|&time| time < to).max(first)
        })
    }

    /// The orders from a moment on.
    #[must_use]
    pub fn since(&self, from: i64) -> Self {
        self.cut(|times| times.partition_point(|&time| time < from)..times.len())
    }

    fn cut(&self, cut: impl Fn(&[i64]) -> Range<usize>) -> Self {
        let places = cut(&self.times);
        let sides = self.sides.iter().map(|side| {
            let places = cut(&side.times);
            // Only differences of sums are used, so they need not begin at zero.
            Side {
                side: side.side.clone(),
                times: side.times[places.clone()].to_vec(),
                sums: side.sums[places.start..=places.end].to_vec(),
            }
        });
        Self {
            times: self.times[places.clone()].to_vec(),
            kind: self.kind[places.clone()].to_vec(),
            kinds: self.kinds.clone(),
            numbers: self.numbers[places].to_vec(),
            sides: sides.filter(|side| !side.times.is_empty()).collect(),
            certain: self.certain,
        }
    }

    /// Gives back the room that it does not need.
    pub(super) fn shrink(&mut self) {
        self.times.shrink_to_fit();
        self.kind.shrink_to_fit();
        self.numbers.shrink_to_fit();
        self.kinds.shrink_to_fit();
        for side in &mut self.sides {
            side.times.shrink_to_fit();
            side.sums.shrink_to_fit();
        }
    }

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

    /// Whether sums of them are certain.
    #[must_use]
    pub const fn is_certain(&self) -> bool {
        self.certain
    }

    /// About how many bytes they take.
    #[must_use]
    pub fn weight(&self) -> u64 {
        let sides: usize = self.sides.iter().map(|side| side.times.len() * 24 + 128).sum();
        (256 + self.times.len() * (8 + 2 + 40) + self.kinds.len() * 80 + sides) as u64
    }

    /// The time of the newest.
    #[must_use]
    pub fn newest(&self) -> Option<i64> {
        self.times.last().copied()
    }

    /// The time of the order at a place.
    #[must_use]
    pub fn time(&self, place: usize) -> Option<i64> {
        self.times.get(place).copied()
    }

    /// Orders within a span, newest first.
    pub fn orders(&self, span: Span) -> impl Iterator<Item = Order> + '_ {
        self.within(span).rev().map(|place| self.order(place))
    }

    /// The places of the orders within a span.
    #[must_use]
    pub fn within(&self, span: Span) -> Range<usize> {
        let from = self.times.partition_point(|&time| time < span.start);
        let to = self.times.partition_point(|&time| time <= span.end);
        from..to.max(from)
    }

    /// The newest moment that several orders share.
    #[must_use]
    pub fn tie(&self) -> Option<i64> {
        self.times.windows(2).rev().find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
    }

    /// The order at a place.
    #[must_use]
    pub fn order(&self, place: usize) -> Order {
        let kind = &self.kinds[usize::from(self.kind[place])];
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
            order_trade_time: Some(self.times[place]),
            // Sums are made from columns, not from orders that come out of them.
            usd: Usd::Unknown,
        }
    }

    /// The sides that occur, in the database's order.
    pub(super) fn sides(&self) -> impl ExactSizeIterator<Item = Sums<'_>> {
        self.sides.iter().map(|side| Sums { side: &side.side, times: &side.times, sums: &side.sums, at: 0 })
    }
}

/// Brings sides into the database's order; false if two of them are one to it.
pub(super) fn sort_sides(sides: &mut [Side]) -> bool {
    let folded = |side: &Side| side.side.as_deref().map(str::to_uppercase);
    sides.sort_by_key(folded);
    sides.is_sorted_by(|one, two| folded(one) < folded(two))
}

/// A walk through the sums of one side, from the oldest order to the newest.
pub(super) struct Sums<'c> {
    /// The side.
    pub side: &'c Text,
    times: &'c [i64],
    sums: &'c [i128],
    /// How many orders were passed.
    at: usize,
}

impl Sums<'_> {
    /// Passes all orders before a time.
    pub fn skip_to(&mut self, time: i64) {
        self.at = self.place_of(time);
    }

    /// The time of the next order.
    pub fn next_time(&self) -> Option<i64> {
        self.times.get(self.at).copied()
    }

    /// What the orders up to a time, and at it, add up to that were not passed yet, in units of 10⁻¹⁶ USD; `None` if there are none.
    pub fn take_to(&mut self, time: i64) -> Option<i128> {
        // There is no time after the last one.
        let (from, to) = (self.at, time.checked_add(1).map_or(self.times.len(), |next| self.place_of(next)));
        self.at = to;
        (to > from).then(|| self.sums[to] - self.sums[from])
    }

    /// How many orders lie before a time. It is looked for from where the walk is, in steps that double: near places, which
    /// narrow buckets lead to, are found in a few.
    fn place_of(&self, time: i64) -> usize {
        let rest = &self.times[self.at..];
        let mut step = 1;
        while step < rest.len() && rest[step - 1] < time {
            step *= 2;
        }
        let near = &rest[step / 2..step.min(rest.len())];
        self.at + step / 2 + near.partition_point(|&known| known < time)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::builder::Builder;
    use super::*;
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
        ];
        let columns = Builder::columns(&orders).unwrap();
        let read: Vec<Order> = (0..columns.len()).rev().map(|place| columns.order(place)).collect();
        let expected: Vec<Order> = orders.iter().map(|order| Order { usd: Usd::Unknown, ..order.clone() }).collect();
        assert_eq!(read, expected);
        assert_eq!((columns.newest(), columns.within(Span { start: 4, end: 5 })), (Some(7), 1..3));
        assert!(columns.within(Span { start: 8, end: 9 }).is_empty() && columns.is_certain());
    }

    proptest! {
        #[test]
        fn what_is_renewed_is_as_if_it_was_read_at_once(
            mut times in proptest::collection::vec(0_i64..100, 0..60), from in 0_i64..110, doubt in 0_usize..60,
        ) {
            times.sort_unstable_by_key(|&time| std::cmp::Reverse(time));
            let one = |(place, &time): (usize, &i64)| {
                let usd = if place == doubt { Usd::Unknown } else { Usd::Exact(i128::from(time) * 7 + 1) };
                order(time, ["sell", "buy"][place % 2], usd)
            };
            let orders: Vec<Order> = times.iter().enumerate().map(one).collect();
            let whole = Builder::columns(&orders).unwrap();
            let newer = Builder::columns(orders.iter().filter(|order| order.order_trade_time >= Some(from))).unwrap();
            let all = Span { start: i64::MIN, end: i64::MAX };
            prop_assert!(whole.ends_in(from, &newer));
            prop_assert_eq!(whole.ends_in(from, &Columns::default()), newer.is_empty());
            let again = whole.renewed(from, &newer).unwrap();
            prop_assert_eq!(again.orders(all).collect::<Vec<_>>(), whole.orders(all).collect::<Vec<_>>());
            let sums = |columns: &Columns| super::super::buckets::buckets([columns], Span { start: 0, end: 200 }, 10);
            prop_assert_eq!(sums(&again), sums(&whole));
            prop_assert_eq!(again.is_certain(), whole.is_certain());
        }
    }
}
