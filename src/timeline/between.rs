//! Whether orders that came in between explain that two answers differ.
//!
//! Both sides are asked in turn: here, the backend, and here again. Orders come, and those that are there stay as they are. So what the backend
//! said lies between the two: it holds what was known before, and what it holds is known after. What does not lie there differs for another reason,
//! however new it is.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::check::nearly;

/// What an answer holds.
enum Held<'a> {
    /// Sums, by bucket and side.
    Sums(Vec<Sum<'a>>),
    /// Orders, by time.
    Orders(Vec<(i64, &'a str)>),
}

#[derive(Deserialize)]
struct Sum<'a> {
    timestamp: i64,
    side: Option<&'a str>,
    cumulated_usd_size: Option<f64>,
}

#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    data: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct Timed {
    order_trade_time: i64,
}

impl<'a> Held<'a> {
    fn of(body: &'a [u8]) -> Option<Self> {
        if let Ok(sums) = serde_json::from_slice::<Vec<Sum<'_>>>(body) {
            return Some(Self::Sums(sums));
        }
        let orders: Vec<&RawValue> = match serde_json::from_slice(body) {
            Ok(list) => list,
            Err(_) => serde_json::from_slice::<Page<'_>>(body).ok()?.data,
        };
        let timed = |order: &'a RawValue| Some((serde_json::from_str::<Timed>(order.get()).ok()?.order_trade_time, order.get()));
        Some(Self::Orders(orders.into_iter().map(timed).collect::<Option<_>>()?))
    }
}

/// Whether orders that came in between explain why what the backend `said` is not what was known `before` and `after`; true also where that cannot
/// be told. `is_anew`: no cache of the backend's has answered the same before, so that it said what it knew at that moment.
#[must_use]
pub fn is_between(before: &[u8], said: &[u8], after: &[u8], is_anew: bool) -> bool {
    let (Some(before), Some(said), Some(after)) = (Held::of(before), Held::of(said), Held::of(after)) else { return true };
    match (before, said, after) {
        (Held::Sums(before), Held::Sums(said), Held::Sums(after)) => are_within(&said, &after) && (!is_anew || are_within(&before, &said)),
        (Held::Orders(_), Held::Orders(said), Held::Orders(after)) => {
            // Lists and pages reach as far as they are long: only what lies within both is compared. At the edges orders of one moment are cut apart.
            let (Some(newest), Some(oldest)) = (after.first(), after.last()) else { return true };
            let known: HashSet<&str> = after.iter().map(|(_, text)| *text).collect();
            said.iter().filter(|(time, _)| oldest.0 < *time && *time < newest.0).all(|(_, text)| known.contains(text))
        }
        _ => true,
    }
}

/// Whether no sum is less later. Amounts are never negative.
fn are_within(earlier: &[Sum<'_>], later: &[Sum<'_>]) -> bool {
    earlier.iter().all(|one| {
        let same = |two: &&Sum<'_>| (two.timestamp, two.side) == (one.timestamp, one.side);
        let place = later.partition_point(|two| two.timestamp < one.timestamp);
        let (one, two) = (one.cumulated_usd_size, later[place..].iter().take(8).find(same).and_then(|two| two.cumulated_usd_size));
        match (one, two) {
            (Some(one), Some(two)) => one <= two || nearly(one, two),
            (Some(_), None) => false,
            (None, _) => true,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(sums: &[(i64, f64)]) -> Vec<u8> {
        let sum = |(time, usd): &(i64, f64)| format!("{{\"timestamp\":{time},\"side\":\"buy\",\"cumulated_usd_size\":{usd:?}}}");
        format!("[{}]", sums.iter().map(sum).collect::<Vec<_>>().join(",")).into_bytes()
    }

    fn list(orders: &[(i64, u8)]) -> Vec<u8> {
        let order = |(time, price): &(i64, u8)| format!("{{\"price\":{price},\"order_trade_time\":{time}}}");
        format!("[{}]", orders.iter().map(order).collect::<Vec<_>>().join(",")).into_bytes()
    }

    #[test]
    fn sums_only_grow() {
        let (one, two, three) = (sums(&[(10, 1.0)]), sums(&[(10, 2.0), (20, 1.0)]), sums(&[(10, 2.5), (20, 1.0), (30, 7.0)]));
        assert!(is_between(&one, &two, &three, true) && is_between(&one, &one, &three, true));
        assert!(!is_between(&one, &three, &two, true), "what the backend holds is not known after it");
        assert!(!is_between(&two, &one, &three, true), "the backend has less than was known before");
        assert!(is_between(&two, &one, &three, false), "from its cache it may");
        assert!(is_between(&one, &sums(&[(10, 2.0 + 1e-12), (20, 1.0)]), &two, true), "the last digits");
    }

    #[test]
    fn orders_stay_as_they_are() {
        let before = list(&[(9, 1), (7, 1), (5, 1), (3, 1)]);
        let after = list(&[(12, 1), (9, 1), (8, 1), (7, 1), (5, 1), (3, 1)]);
        assert!(is_between(&before, &list(&[(9, 1), (8, 1), (7, 1), (5, 1)]), &after, true));
        assert!(!is_between(&before, &list(&[(9, 1), (7, 2), (5, 1)]), &after, true), "another price");
        assert!(!is_between(&before, &list(&[(9, 1), (6, 1), (5, 1)]), &after, true), "one that is not known");
        assert!(is_between(&before, &list(&[(13, 2), (12, 3), (9, 1), (3, 4), (2, 1)]), &after, true), "beyond what both reach");
        let page = |orders: &[(i64, u8)]| [b"{\"data\":", &*list(orders), b",\"pagination\":{}}"].concat();
        assert!(!is_between(&page(&[(9, 1)]), &page(&[(9, 1), (7, 2), (5, 1)]), &page(&[(9, 1), (7, 1), (3, 1)]), true));
        assert!(is_between(b"{\"detail\":\"no\"}", &before, &after, true) && is_between(&before, b"x", &after, true));
    }
}
