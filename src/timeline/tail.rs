//! The newest part of a symbol's timeline: the orders of spans that are not over yet, and the newest ones before them.

use std::sync::Arc;

use tokio::time::Instant;

use super::builder::Builder;
use super::columns::{BLOCK, Columns, Unfit};
use super::kept::Weigh;
use super::memory::shared;
use crate::api::orders::{Order, Span};
use crate::cache::entry::Checked;
use crate::cache::void::Moment;
use crate::clock::Wall;

/// The most orders that a list of the newest holds.
pub const MOST_RECENT: usize = 1000;
/// The last moment that anything is asked for. Orders may bear any time (microseconds that were taken for milliseconds lie beyond the year
/// 9999), and backends list them among the newest.
pub const FAR: i64 = i64::MAX;

/// The newest part.
#[derive(Debug)]
pub struct Tail {
    /// Its first millisecond; what is older lies in spans that are over.
    pub start: i64,
    /// The orders from there on, without end.
    pub columns: Arc<Columns>,
    /// The newest orders before that: as many as make [`MOST_RECENT`] together with the others, or all that there are.
    pub before: Arc<Columns>,
    /// When it was asked for last, by the runtime's clock.
    pub asked: Instant,
    /// The same by wall time.
    pub asked_at: Wall,
    /// The moment at which the oldest part of it was asked for: what was voided since is not used.
    pub oldest_asked: Moment,
    /// The newest void that it was checked against.
    pub checked: Checked,
}

impl Weigh for Tail {
    fn weight(&self) -> u64 {
        shared::<Self>() + self.columns.weight() + self.before.weight()
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn moment(wall: Wall) -> i64 {
    i64::try_from(wall.as_millis()).unwrap_or(i64::MAX)
}

/// The first moment of the newest part: that of the span in which `settle` before the newest order lies, or before now if
/// that is earlier. A source that falls behind, or a symbol that rests, keeps its newest part open for as long as that lasts,
/// so that no span is taken for complete before orders after it have come.
#[must_use]
pub fn first_moment(newest: Option<i64>, now: Wall, span: i64, settle: i64) -> i64 {
    let newest = newest.map_or(moment(now), |newest| newest.min(moment(now)));
    newest.saturating_sub(settle).div_euclid(span).saturating_mul(span)
}

/// In how much time so many orders come, in milliseconds, by the newest ones (newest first), far ones aside; `None` if these are few: then they say
/// nothing of those before them.
#[must_use]
pub fn millis_of(orders: usize, latest: &[Order], now: i64) -> Option<i64> {
    let mut times = latest.iter().filter_map(|order| order.order_trade_time).filter(|&time| time <= now);
    let (newest, oldest) = (times.next()?, times.next_back()?);
    let (orders, known) = (i64::try_from(orders).ok()?, i64::try_from(latest.len()).ok()?);
    let range = newest.saturating_sub(oldest).saturating_add(1);
    (latest.len() >= MOST_RECENT).then(|| range.saturating_mul(orders) / known)
}

/// The same as [`first_moment`], unless so many orders came since that they are better left to those who ask for them: then so late that
/// about a block of orders is settled.
#[must_use]
pub fn first_moment_by(latest: &[Order], now: Wall, span: i64, settle: i64) -> i64 {
    // Those whose time lies in the future say nothing of which orders have come.
    let newest = latest.iter().filter_map(|order| order.order_trade_time).find(|&time| time <= moment(now));
    let start = first_moment(newest, now, span, settle);
    let of = |orders| millis_of(orders, latest, moment(now));
    let (Some(newest), Some(many), Some(some)) = (newest, of(4 * BLOCK), of(BLOCK)) else { return start };
    if newest.saturating_sub(start) <= many {
        return start;
    }
    newest.saturating_sub(settle).saturating_sub(some).max(start)
}

impl Tail {
    /// The newest part, from the newest orders of all (newest first) and from those since `start`.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn begin(start: i64, latest: &[Order], since: Columns, (asked, asked_at): (Instant, Wall), moment: Moment) -> Result<Self, Unfit> {
        let older = latest.iter().filter(|order| order.order_trade_time.is_none_or(|time| time < start));
        let room = MOST_RECENT.saturating_sub(since.len());
        let (columns, before) = (Arc::new(since), Arc::new(Builder::columns(older.take(room))?));
        Ok(Self { start, columns, before, asked, asked_at, oldest_asked: moment, checked: Checked::default() })
    }

    /// From where on it is asked for anew: what arrives late, does so within `settle`.
    #[must_use]
    pub fn asked_again_from(&self, settle: i64) -> i64 {
        let known = self.newest_until(moment(self.asked_at)).unwrap_or(i64::MIN);
        known.saturating_sub(settle).max(self.start)
    }

    /// Whether `newer`, the orders from `from` on, has fewer of those that were known than there were. Orders do not vanish: the
    /// source was cut short, or somebody deleted some, and then others may be gone too.
    #[must_use]
    pub fn misses_some_in(&self, from: i64, newer: &Columns) -> bool {
        let known = Span { start: from, end: self.columns.newest().unwrap_or(i64::MIN) };
        newer.within(known).len() < self.columns.within(known).len()
    }

    /// The same once the orders from `from` on are known anew.
    #[must_use]
    pub fn renewed(&self, from: i64, newer: &Columns, asked: Instant, asked_at: Wall) -> Self {
        let same = self.columns.ends_in(from, newer);
        let columns = if same { Arc::clone(&self.columns) } else { Arc::new(self.columns.renewed(from, newer)) };
        let before = Arc::clone(&self.before);
        Self { start: self.start, columns, before, asked, asked_at, oldest_asked: self.oldest_asked, checked: self.checked.clone() }
    }

    /// From where on it goes on: what lies before is settled. That is where a span begins, or a block where a span has many orders.
    #[must_use]
    pub fn goes_on_from(&self, span: i64, settle: i64) -> i64 {
        let newest = self.newest_until(moment(self.asked_at));
        let by_span = first_moment(newest, self.asked_at, span, settle).max(self.start);
        let Some(settled) = newest.map(|newest| newest.saturating_sub(settle)) else { return by_span };
        let mut kept = 0;
        let by_block = self.columns.blocks().iter().skip(1).rev().find_map(|block| {
            kept += block.len();
            block.extent().map(|extent| extent.start).filter(|&start| kept >= BLOCK && start <= settled)
        });
        by_block.map_or(by_span, |start| start.max(by_span))
    }

    /// In how much time so many orders come, in milliseconds, by the newest [`MOST_RECENT`]; `None` if there are fewer.
    #[must_use]
    pub fn millis_of(&self, orders: usize) -> Option<i64> {
        millis_of(orders, &self.latest(MOST_RECENT), moment(self.asked_at))
    }

    /// The same from a later moment on. What it held before that belongs to spans that are over.
    ///
    /// # Errors
    /// Never, in truth: what is in columns makes columns.
    pub fn from(&self, start: i64) -> Result<Self, Unfit> {
        let columns = self.columns.since(start);
        let room = MOST_RECENT.saturating_sub(columns.len());
        let older = Span { start: i64::MIN, end: start - 1 };
        let before: Vec<Order> = self.columns.orders(older).chain(self.before.orders(older)).take(room).collect();
        Ok(Self {
            start,
            columns: Arc::new(columns),
            before: Arc::new(Builder::columns(&before)?),
            asked: self.asked,
            asked_at: self.asked_at,
            oldest_asked: self.oldest_asked,
            checked: self.checked.clone(),
        })
    }

    /// The time of the newest order up to a moment. One whose time lies in the future says nothing of which orders have come.
    #[must_use]
    pub fn newest_until(&self, moment: i64) -> Option<i64> {
        let until = Span { start: i64::MIN, end: moment };
        let newest = |columns: &Columns| columns.time(columns.within(until).next_back()?);
        newest(&self.columns).or_else(|| newest(&self.before))
    }

    /// The newest orders, newest first; at most [`MOST_RECENT`] of them.
    #[must_use]
    pub fn latest(&self, limit: usize) -> Vec<Order> {
        let all = Span { start: i64::MIN, end: i64::MAX };
        self.columns.orders(all).chain(self.before.orders(all)).take(limit.min(MOST_RECENT)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::columns::tests::order;
    use super::*;
    use crate::api::usd::Usd;

    fn columns(orders: &[Order]) -> Columns {
        Builder::columns(orders).unwrap()
    }

    fn orders(times: std::ops::Range<i64>) -> Vec<Order> {
        times.rev().map(|time| order(time, "buy", Usd::Exact(1))).collect()
    }

    fn times(orders: &[Order]) -> Vec<i64> {
        orders.iter().map(|order| order.order_trade_time.unwrap()).collect()
    }

    #[tokio::test]
    async fn the_newest_part_grows_and_gives_up_what_is_over() {
        let wall = Wall::from_millis;
        let tail = Tail::begin(100, &orders(0..105), columns(&orders(100..107)), (Instant::now(), wall(150)), Moment::default()).unwrap();
        assert_eq!((tail.newest_until(150), tail.newest_until(105), tail.newest_until(-1)), (Some(106), Some(105), None));
        assert_eq!((tail.newest_until(99), tail.columns.len(), tail.before.len()), (Some(99), 7, 100));
        assert_eq!(times(&tail.latest(9)), (98..107).rev().collect::<Vec<_>>());
        assert_eq!(tail.asked_again_from(3), 103);
        let same = tail.renewed(103, &columns(&orders(103..107)), Instant::now(), wall(160));
        assert!(Arc::ptr_eq(&same.columns, &tail.columns), "nothing new");
        let mut late = orders(103..120);
        late.insert(12, order(107, "sell", Usd::Exact(1)));
        let more = tail.renewed(103, &columns(&late), Instant::now(), wall(170));
        assert!(!tail.misses_some_in(103, &columns(&late)) && tail.misses_some_in(103, &columns(&orders(104..120))));
        assert_eq!((more.newest_until(i64::MAX), more.columns.len()), (Some(119), 21));
        let later = more.from(110).unwrap();
        assert_eq!((later.columns.len(), later.before.len()), (10, 111));
        assert_eq!(later.latest(500), more.latest(500));
    }

    #[tokio::test]
    async fn orders_of_a_far_time_stay_among_the_newest_and_say_nothing_of_what_has_come() {
        let mut since = orders(100..107);
        since.splice(0..0, [i64::MAX, 1_735_689_600_000_000].map(|time| order(time, "sell", Usd::Exact(1))));
        let mut latest = since.clone();
        latest.extend(orders(95..100));
        let tail = Tail::begin(100, &latest, columns(&since), (Instant::now(), Wall::from_millis(150)), Moment::default()).unwrap();
        assert_eq!((tail.latest(3).len(), times(&tail.latest(3))), (3, vec![i64::MAX, 1_735_689_600_000_000, 106]));
        assert_eq!((tail.newest_until(150), tail.asked_again_from(3)), (Some(106), 103));
        assert_eq!(tail.from(104).unwrap().latest(9), tail.latest(9));
    }

    #[test]
    fn a_source_that_falls_behind_keeps_its_newest_part_open() {
        let now = Wall::from_millis(1050);
        assert_eq!(first_moment(Some(1049), now, 100, 10), 1000);
        assert_eq!(first_moment(Some(1005), now, 100, 10), 900);
        assert_eq!(first_moment(Some(240), now, 100, 10), 200);
        assert_eq!(first_moment(Some(9999), now, 100, 10), 1000);
        assert_eq!(first_moment(None, now, 100, 10), 1000);
    }
}
