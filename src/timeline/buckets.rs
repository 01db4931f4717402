//! Sums by buckets of time, from the sums of blocks that follow one another.

use crate::api::orders::{Bucket, Span, Text};
use crate::api::usd::Usd;

use super::amounts::{Sums, Walk};

/// The buckets of the orders within a span, `width` milliseconds wide (above zero) and counted from its start; by timestamp,
/// then side. `None` if an amount in the span is not known to all digits, or two sides of a bucket are one to the database.
///
/// `sums` are those of blocks that follow one another, oldest first, and together hold all orders of the span. The work grows with the
/// number of buckets that hold orders and with the number of blocks, not with the number of orders.
#[must_use]
pub fn buckets<'s>(sums: impl IntoIterator<Item = &'s Sums>, span: Span, width: i64) -> Option<Vec<Bucket>> {
    let mut summed = Summed { buckets: Vec::new(), timestamp: span.start, open: Vec::new() };
    for sums in sums {
        let Some(extent) = sums.extent().filter(|extent| extent.end >= span.start && extent.start <= span.end) else { continue };
        if sums.is_inexact_in(span) {
            return None;
        }
        let bucket = |time: i64| (time - span.start) / width;
        if extent.start >= span.start && extent.end <= span.end && bucket(extent.start) == bucket(extent.end) {
            // All of it is of one bucket: its arrays need not be looked at.
            summed.move_to(bucket(extent.start) * width + span.start);
            for (side, amount) in sums.totals() {
                summed.add(side, amount)?;
            }
            continue;
        }
        let mut sides: Vec<Walk<'_>> = sums.walks().collect();
        sides.iter_mut().for_each(|side| side.skip_to(span.start));
        while let Some(time) = sides.iter().filter_map(Walk::next_time).min().filter(|&time| time <= span.end) {
            let timestamp = bucket(time) * width + span.start;
            let last = timestamp.saturating_add(width - 1).min(span.end);
            summed.move_to(timestamp);
            for side in &mut sides {
                if let Some(amount) = side.take_to(last) {
                    summed.add(side.side, amount)?;
                }
            }
        }
    }
    summed.close();
    Some(summed.buckets)
}

/// Buckets that are whole, and the one that the next block may add to.
struct Summed {
    buckets: Vec<Bucket>,
    timestamp: i64,
    /// The sums of the open bucket, in the database's order of sides.
    open: Vec<(Text, i128)>,
}

impl Summed {
    /// Closes the open bucket, unless this is still the same.
    fn move_to(&mut self, timestamp: i64) {
        if timestamp != self.timestamp {
            self.close();
            self.timestamp = timestamp;
        }
    }

    fn close(&mut self) {
        let (timestamp, closed) = (self.timestamp, self.open.drain(..));
        self.buckets.extend(closed.map(|(side, amount)| Bucket { timestamp, side, usd: Usd::Exact(amount).nearest() }));
    }

    /// Adds an amount to the open bucket; `None` if that cannot be done with certainty.
    fn add(&mut self, side: &Text, amount: i128) -> Option<()> {
        if let Some((_, sum)) = self.open.iter_mut().find(|(known, _)| known == side) {
            *sum = sum.checked_add(amount)?;
            return Some(());
        }
        let folded = |side: &Text| side.as_deref().map(str::to_uppercase);
        let at = self.open.partition_point(|(known, _)| folded(known) < folded(side));
        if self.open.get(at).is_some_and(|(known, _)| folded(known) == folded(side)) {
            return None;
        }
        self.open.insert(at, (side.clone(), amount));
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::builder::Builder;
    use super::super::columns::{Columns, tests::order};
    use super::*;
    use crate::api::orders::Order;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// The same by adding up order after order.
    fn added(orders: &[Order], span: Span, width: i64) -> Vec<Bucket> {
        let mut sums: BTreeMap<(i64, Text), Usd> = BTreeMap::new();
        for order in orders {
            let time = order.order_trade_time.unwrap();
            if (span.start..=span.end).contains(&time) && order.usd != Usd::Unknown {
                let timestamp = (time - span.start) / width * width + span.start;
                let sum = sums.entry((timestamp, order.side.clone())).or_default();
                *sum = sum.plus(order.usd);
            }
        }
        sums.into_iter().map(|((timestamp, side), usd)| Bucket { timestamp, side, usd: usd.nearest() }).collect()
    }

    proptest! {
        #[test]
        fn buckets_are_what_adding_up_makes_them(
            orders in proptest::collection::vec((0_i64..400, 0_usize..3, proptest::option::of(-1000_i128..1_000_000)), 0..120),
            start in -10_i64..410, length in 0_i64..420, width in 1_i64..200, cuts in proptest::collection::vec(0_i64..400, 0..4),
        ) {
            let mut orders: Vec<Order> = orders
                .into_iter()
                .map(|(time, side, usd)| order(time, ["buy", "sell", ""][side], usd.map_or(Usd::Unknown, Usd::Exact)))
                .collect();
            orders.sort_by_key(|order| std::cmp::Reverse(order.order_trade_time));
            let span = Span { start, end: start + length };
            // The same orders in one piece, and cut into adjoining spans.
            let mut cuts = [cuts, vec![i64::MIN, i64::MAX]].concat();
            cuts.sort_unstable();
            let pieces: Vec<Columns> = cuts
                .windows(2)
                .map(|cut| {
                    let part: Vec<&Order> = orders.iter().filter(|order| (cut[0]..cut[1]).contains(&order.order_trade_time.unwrap())).collect();
                    Builder::columns(part).unwrap()
                })
                .collect();
            prop_assert_eq!(buckets(pieces.iter().flat_map(Columns::sums), span, width), Some(added(&orders, span, width)));
        }
    }

    #[test]
    fn the_last_moment_that_there_is_has_a_bucket_too() {
        let all = Builder::columns(&[order(i64::MAX, "buy", Usd::Exact(1)), order(5, "buy", Usd::Exact(1))]).unwrap();
        for (start, width, expected) in [(0, i64::MAX, vec![0, i64::MAX]), (1, i64::MAX, vec![1]), (0, 10, vec![0, i64::MAX / 10 * 10])] {
            let buckets = buckets(all.sums(), Span { start, end: i64::MAX }, width).unwrap();
            assert_eq!(buckets.iter().map(|bucket| bucket.timestamp).collect::<Vec<_>>(), expected, "{start} {width}");
        }
    }

    #[test]
    fn sides_that_are_one_to_the_database_are_not_summed() {
        let one = Builder::columns(&[order(1, "buy", Usd::Exact(1))]).unwrap();
        let two = Builder::columns(&[order(2, "BUY", Usd::Exact(1))]).unwrap();
        let span = Span { start: 0, end: 9 };
        let sums = || one.sums().chain(two.sums());
        assert_eq!(buckets(sums(), span, 10), None);
        assert!(buckets(sums(), span, 2).is_some());
        let both = Builder::columns(&[order(2, "BUY", Usd::Exact(1)), order(1, "buy", Usd::Exact(1))]).unwrap();
        assert_eq!(buckets(both.sums(), span, 10), None);
        assert!(buckets(both.sums(), span, 2).is_some());
    }

    #[test]
    fn an_amount_that_is_not_exact_matters_to_windows_that_hold_it_alone() {
        let all =
            Builder::columns(&[3, 2, 1].map(|time| order(time, "buy", if time == 2 { Usd::Rounded(1.0) } else { Usd::Exact(1) }))).unwrap();
        for (start, end, is_known) in [(1, 3, false), (2, 2, false), (1, 1, true), (3, 9, true)] {
            assert_eq!(buckets(all.sums(), Span { start, end }, 10).is_some(), is_known, "{start} {end}");
        }
    }
}
