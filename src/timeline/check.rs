//! Holding what a source says in one way against what it says in another.

use std::fmt;

use super::amounts::Sums;
use super::buckets::buckets;
use super::columns::Columns;
use crate::api::orders::{Bucket, Order, Span};

/// A contradiction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt(String);

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the backend contradicts itself: {}", self.0)
    }
}

/// Sums of doubles depend on the order of addition: they may differ in their last digits, so much of the whole.
const LAST_DIGITS: f64 = 1e-9;

/// Whether two sums are the same but for the last digits.
#[must_use]
pub fn nearly(one: f64, two: f64) -> bool {
    (one - two).abs() <= LAST_DIGITS * one.abs().max(two.abs())
}

/// Holds sums (of blocks that follow one another, oldest first) against the sums that their source says, in buckets of `width`.
///
/// # Errors
/// Where they differ.
pub fn sums<'s>(sums: impl IntoIterator<Item = &'s Sums>, span: Span, width: i64, said: &[Bucket]) -> Result<(), Doubt> {
    let Some(own) = buckets(sums, span, width) else { return Ok(()) };
    for (own, said) in own.iter().zip(said) {
        if (own.timestamp, &own.side) != (said.timestamp, &said.side) || !nearly(own.usd, said.usd) {
            let side = said.side.as_deref().unwrap_or("null");
            return Err(Doubt(format!(
                "from {} on its orders of side {} add up to {}, and its sum for {} on side {side} is {}",
                own.timestamp,
                own.side.as_deref().unwrap_or("null"),
                own.usd,
                said.timestamp,
                said.usd
            )));
        }
    }
    if own.len() != said.len() {
        return Err(Doubt(format!("its orders make {} sums, and it says {}", own.len(), said.len())));
    }
    Ok(())
}

/// Holds the orders from `start` on against a list of the newest that was asked for before them: orders do not vanish, so all of
/// the list that belong there must be among them.
///
/// # Errors
/// Some are not.
pub fn newest(latest: &[Order], start: i64, since: &Columns) -> Result<(), Doubt> {
    let times = || latest.iter().filter_map(|order| order.order_trade_time).filter(|&time| time >= start);
    let (Some(oldest), Some(newest)) = (times().min(), times().max()) else { return Ok(()) };
    let (listed, streamed) = (times().count(), since.within(Span { start: oldest, end: newest }).len());
    if streamed < listed {
        return Err(Doubt(format!("it lists {listed} orders from {oldest} to {newest}, and streams {streamed} of them")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::builder::Builder;
    use super::super::columns::tests::order;
    use super::*;
    use crate::api::usd::Usd;

    fn usd(value: i128) -> Usd {
        Usd::Exact(value * 10_i128.pow(16))
    }

    #[test]
    fn a_missing_or_changed_order_is_noticed() {
        let orders = [order(30, "sell", usd(7)), order(12, "buy", usd(2)), order(5, "buy", usd(1))];
        let (all, cut) = (Builder::columns(&orders).unwrap(), Builder::columns(&orders[1..]).unwrap());
        let span = Span { start: 0, end: 99 };
        let said = buckets(all.sums(), span, 10).unwrap();
        assert_eq!(sums(all.sums(), span, 10, &said), Ok(()));
        assert!(sums(cut.sums(), span, 10, &said).is_err() && sums(all.sums(), span, 10, &said[1..]).is_err());
        let mut changed = said.clone();
        changed[0].usd += 1e-3;
        assert!(sums(all.sums(), span, 10, &changed).is_err());
        changed[0].usd = said[0].usd * (1.0 + 1e-12);
        assert_eq!(sums(all.sums(), span, 10, &changed), Ok(()), "the last digits");
    }

    #[test]
    fn a_stream_without_an_order_of_the_list_is_noticed() {
        let latest = [30, 12, 12, 5].map(|time| order(time, "sell", usd(1)));
        let since = |times: &[i64]| Builder::columns(&times.iter().map(|&time| order(time, "sell", usd(1))).collect::<Vec<_>>()).unwrap();
        for (start, streamed, holds) in [
            (0, &[30, 12, 12, 5][..], true),
            (0, &[40, 30, 20, 12, 12, 5, 1], true),
            (0, &[30, 12, 5, 1], false),
            (0, &[30, 12, 12], false),
            (0, &[], false),
            (6, &[30, 12, 12], true),
            (6, &[40, 30, 12], false),
            (31, &[], true),
        ] {
            assert_eq!(newest(&latest, start, &since(streamed)).is_ok(), holds, "{start} {streamed:?}");
        }
    }
}
