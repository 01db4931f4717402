//! What one request sees of the timeline: orders, as the endpoints of the API read them.
//!
//! It answers from what is known, waits for a little of what is not, and says [`OrdersError::NotCovered`] to the rest, noting why
//! ([`View::unanswered`]): then the request goes to the backend as if there were no timeline.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::amounts::Sums;
use super::buckets::buckets;
use super::details::Details;
use super::engine::{Allowed, Engine, FEW, Newness};
use super::fill::MOST_SPANS;
use super::room::Place;
use super::spans::Stretch;
use super::symbol::{Symbol, Want};
use super::tail::{MOST_RECENT, Tail};
use super::unanswered::Unanswered;
use crate::api::orders::{Batches, Bucket, Order, Orders, OrdersError, Page, Span};
use crate::cache::void::Moment;

/// More buckets than this are not computed: their answer would be larger than what is stored.
const MOST_BUCKETS: usize = 120_000;
/// What a bucket takes at most while its answer is made, in bytes: its sum, its text, and that once more as gzip.
const BUCKET: usize = 256;
/// The same of an order in a list or a page.
const ORDER: usize = 1024;

/// What one request sees.
pub struct View<S> {
    engine: Arc<Engine<S>>,
    symbol: Arc<Symbol>,
    allowed: Allowed,
    made: Mutex<Made>,
    unanswered: OnceLock<Unanswered>,
    /// The room that the answer is made in.
    place: Mutex<Option<Place>>,
}

/// From what an answer was made.
#[derive(Clone, Debug)]
pub struct Made {
    /// The newest part, if it was needed.
    pub tail: Option<Arc<Tail>>,
    /// How new that is.
    pub newness: Newness,
    /// Whether something was asked for while the request waited.
    pub waited: bool,
    /// When the oldest piece of it was asked for.
    pub asked_at: Option<Moment>,
    /// Whether the order of orders of one moment shows.
    pub ties: bool,
}

impl Made {
    fn note_asked_at(&mut self, asked_at: Moment) {
        self.asked_at = Some(self.asked_at.map_or(asked_at, |known| known.min(asked_at)));
    }
}

impl<S: Orders> View<S> {
    /// What a request about this symbol sees; the newest part may be as late as is allowed.
    #[must_use]
    pub const fn new(engine: Arc<Engine<S>>, symbol: Arc<Symbol>, allowed: Allowed) -> Self {
        let made = Made { tail: None, newness: Newness::Fresh, waited: false, asked_at: None, ties: false };
        Self { engine, symbol, allowed, made: Mutex::new(made), unanswered: OnceLock::new(), place: Mutex::new(None) }
    }

    /// From what the answer was made.
    #[must_use]
    pub fn made(&self) -> Made {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why it did not answer, if it did not.
    #[must_use]
    pub fn unanswered(&self) -> Option<Unanswered> {
        self.unanswered.get().copied()
    }

    /// Does not answer, for this reason.
    fn not(&self, reason: Unanswered) -> OrdersError {
        self.unanswered.get_or_init(|| reason);
        OrdersError::NotCovered
    }

    /// The room that the answer was made in, which its body is to [hold](Place::hold).
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Takes room for an answer of at most `bytes`.
    async fn reserve(&self, bytes: usize) -> Result<Place, OrdersError> {
        self.engine.room.reserve(bytes).await.ok_or_else(|| self.not(Unanswered::NoRoom))
    }

    /// Waits for the turn to make the answer; all that it needs is there.
    async fn begin(&self, place: Place) -> Result<(), OrdersError> {
        let place = self.engine.room.turn(place).await.ok_or_else(|| self.not(Unanswered::NoRoom))?;
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
        Ok(())
    }

    fn note(&self, change: impl FnOnce(&mut Made)) {
        change(&mut self.made.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The newest part as it is known, which says where it begins.
    fn known_tail(&self) -> Result<Arc<Tail>, OrdersError> {
        let missing = || self.not(self.symbol.why_missing());
        self.engine.known_tail(&self.symbol).ok_or_else(missing)
    }

    /// The newest part, as new as it can be had.
    async fn tail(&self) -> Result<Arc<Tail>, OrdersError> {
        self.known_tail()?;
        let (tail, newness, waited) = self.engine.new_tail(&self.symbol, self.allowed).await.map_err(|why| self.not(why))?;
        self.note(|made| {
            made.note_asked_at(tail.oldest_asked);
            (made.tail, made.newness, made.waited) = (Some(Arc::clone(&tail)), newness, made.waited || waited);
        });
        Ok(tail)
    }

    /// What of a window is over: from its first moment up to, and not including, its last.
    fn over(&self, span: Span, tail_start: i64) -> Result<(i64, i64), OrdersError> {
        let oldest = self.engine.oldest(&self.symbol);
        let from = span.start.max(oldest.unwrap_or(0));
        let to = span.end.saturating_add(1).min(tail_start).max(from);
        if to - from > MOST_SPANS.saturating_mul(self.engine.span()) {
            // It is not known yet where the orders begin, or there are too many spans.
            let missing = self.engine.fill_many(&self.symbol, span, tail_start);
            return Err(self.not(if oldest.is_some() { Unanswered::TooManySpans } else { missing }));
        }
        Ok((from, to))
    }

    /// A stretch of what is over, widened to whole spans, since these are what others have and want.
    fn want(&self, (from, to): (i64, i64), details: bool, tail_start: i64) -> Want {
        let length = self.engine.span();
        let to = (to - 1).div_euclid(length).saturating_add(1).saturating_mul(length).min(tail_start);
        let from = (from.div_euclid(length) * length).max(self.engine.oldest(&self.symbol).unwrap_or(0));
        Want { to, from, details }
    }

    async fn wait_for(&self, wants: &[Want]) -> Result<(), OrdersError> {
        self.note(|made| made.waited = true);
        self.engine.fill_few(&self.symbol, wants).await.map_err(|why| self.not(why))
    }

    /// The sums of what is over of a window; those that are not known are asked for, if they are few.
    async fn sums(&self, span: Span, tail_start: i64) -> Result<Vec<Arc<Stretch<Sums>>>, OrdersError> {
        let (from, to) = self.over(span, tail_start)?;
        let known = || self.engine.known(&self.engine.spans, &self.symbol, from, to);
        let (mut found, gaps) = known();
        if !gaps.is_empty() {
            let length = self.engine.span();
            let spans: i64 = gaps.iter().map(|gap| (gap.1 - 1).div_euclid(length) - gap.0.div_euclid(length) + 1).sum();
            if usize::try_from(spans).is_ok_and(|spans| spans > FEW) {
                return Err(self.not(self.engine.fill_many(&self.symbol, span, tail_start)));
            }
            let wants: Vec<Want> = gaps.into_iter().map(|gap| self.want(gap, false, tail_start)).collect();
            self.wait_for(&wants).await?;
            let (now, gaps) = known();
            if !gaps.is_empty() {
                return Err(self.not(Unanswered::SpansMissing));
            }
            found = now;
        }
        self.note(|made| found.iter().for_each(|stretch| made.note_asked_at(stretch.asked_at)));
        Ok(found)
    }

    /// The details of all orders of a span that is over.
    async fn details(&self, span: Span, want: Want) -> Result<Vec<Arc<Stretch<Details>>>, OrdersError> {
        let known = || self.engine.known(&self.engine.details, &self.symbol, span.start, span.end + 1);
        let (mut found, gaps) = known();
        if !gaps.is_empty() {
            self.wait_for(&[want]).await?;
            let (now, gaps) = known();
            if !gaps.is_empty() {
                return Err(self.not(Unanswered::SpansMissing));
            }
            found = now;
        }
        self.note(|made| found.iter().for_each(|stretch| made.note_asked_at(stretch.asked_at)));
        Ok(found)
    }

    /// Takes what a page needs of a stretch, as far as it lies in `from..to`: it may have been joined with what was taken already.
    async fn take(
        &self,
        taken: &mut Taken,
        stretch: &Arc<Stretch<Sums>>,
        (from, to): (i64, i64),
        tail_start: i64,
    ) -> Result<(), OrdersError> {
        let within = Span { start: from.max(stretch.from), end: to.min(stretch.to) - 1 };
        self.note(|made| made.note_asked_at(stretch.asked_at));
        let count = stretch.orders.count(within);
        if taken.skip >= count {
            taken.skip -= count;
            return Ok(());
        }
        let last = count.min(taken.skip + taken.missing()) - 1;
        let (Some(newest), Some(oldest)) = (stretch.orders.moment(within, taken.skip), stretch.orders.moment(within, last)) else {
            return Err(self.not(Unanswered::Lost));
        };
        let needed = Span { start: oldest, end: newest };
        let mut want = self.want((oldest, newest + 1), true, tail_start);
        (want.from, want.to) = (want.from.max(stretch.from), want.to.min(stretch.to));
        let details = self.details(needed, want).await?;
        if details.iter().map(|details| details.orders.within(needed).len()).sum::<usize>() != stretch.orders.count(needed) {
            // Both were asked for, one after the other, and the source changed in between.
            self.engine.spans.remove(&self.symbol.name, stretch);
            details.iter().for_each(|details| self.engine.details.remove(&self.symbol.name, details));
            return Err(self.not(Unanswered::SpansMissing));
        }
        // Of the moment of the newest some may be on the page before.
        taken.skip -= if newest < within.end { stretch.orders.count(Span { start: newest + 1, end: within.end }) } else { 0 };
        details.iter().rev().for_each(|details| taken.take(details.orders.within(needed), |place| details.orders.order(place)));
        Ok(())
    }
}

/// A page in the making.
struct Taken {
    /// How many orders come before the next one that is taken.
    skip: usize,
    wanted: usize,
    found: Vec<Order>,
}

impl Taken {
    fn missing(&self) -> usize {
        self.wanted - self.found.len()
    }

    /// Takes orders, which lie at places from the oldest to the newest, as far as they are on the page.
    fn take(&mut self, places: Range<usize>, order: impl Fn(usize) -> Order) {
        let passed = self.skip.min(places.len());
        self.skip -= passed;
        let missing = self.missing();
        self.found.extend(places.rev().skip(passed).take(missing).map(order));
    }
}

impl<S: Orders> Orders for View<S> {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        Err(OrdersError::NotCovered)
    }

    async fn buckets(&self, _symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, OrdersError> {
        let known = self.known_tail()?;
        let tail = if span.end >= known.start { Some(self.tail().await?) } else { None };
        let over = self.sums(span, tail.as_ref().unwrap_or(&known).start).await?;
        let sums = || over.iter().map(|stretch| &*stretch.orders).chain(tail.iter().flat_map(|tail| tail.columns.sums()));
        let orders: usize = sums().map(|sums| sums.count(span)).sum();
        let places = usize::try_from(span.end.saturating_sub(span.start) / width).unwrap_or(usize::MAX).saturating_add(1);
        let most = orders.min(places.saturating_mul(2));
        if most > MOST_BUCKETS {
            return Err(self.not(Unanswered::TooManyBuckets));
        }
        self.begin(self.reserve(most * BUCKET).await?).await?;
        let buckets = buckets(sums(), span, width).ok_or_else(|| self.not(Unanswered::Inexact))?;
        // In the order of time, so that the last one tells of all.
        if buckets.last().is_some_and(|bucket| !is_written(bucket.timestamp)) {
            return Err(self.not(Unanswered::FarTimes));
        }
        Ok(buckets)
    }

    async fn latest(&self, _symbol: &str, limit: usize) -> Result<Vec<Order>, OrdersError> {
        let tail = self.tail().await?;
        let limit_and_next = limit.saturating_add(1).min(MOST_RECENT);
        self.begin(self.reserve(limit_and_next * ORDER).await?).await?;
        let orders = tail.latest(limit_and_next);
        self.note(|made| made.ties = has_ties(&orders));
        Ok(orders.into_iter().take(limit).collect())
    }

    async fn page(&self, _symbol: &str, span: Span, page: Page) -> Result<Vec<Order>, OrdersError> {
        let known = self.known_tail()?;
        let tail = if span.end >= known.start { Some(self.tail().await?) } else { None };
        let tail_start = tail.as_ref().unwrap_or(&known).start;
        let (from, mut to) = self.over(span, tail_start)?;
        // One order more on either side, to see whether the page's edges cut through orders of one moment.
        let skip = usize::try_from(page.offset).map_err(|_| self.not(Unanswered::Shape))?;
        let edge = usize::from(skip > 0);
        let wanted = page.size + edge + 1;
        let place = self.reserve(wanted.saturating_mul(ORDER)).await?;
        let mut taken = Taken { skip: skip - edge, wanted, found: Vec::with_capacity(wanted) };
        tail.iter().for_each(|tail| taken.take(tail.columns.within(span), |place| tail.columns.order(place)));
        let mut has_waited = false;
        // From the newest stretch to the oldest, as far as the page needs them, a few spans at a time.
        while taken.missing() > 0 && from < to {
            let (known, gaps) = self.engine.known(&self.engine.spans, &self.symbol, from, to);
            let gap = gaps.last().copied();
            let known_from = gap.map_or(from, |gap| gap.1);
            for stretch in known.iter().rev().take_while(|stretch| stretch.to > known_from) {
                if taken.missing() > 0 {
                    self.take(&mut taken, stretch, (known_from, to), tail_start).await?;
                }
            }
            to = known_from;
            let Some((begin, end)) = gap.filter(|_| taken.missing() > 0) else { break };
            if std::mem::replace(&mut has_waited, true) {
                return Err(self.not(self.engine.fill_many(&self.symbol, span, tail_start)));
            }
            let few = end.saturating_sub(i64::try_from(FEW).unwrap_or(1).saturating_mul(self.engine.span()));
            self.wait_for(&[self.want((begin.max(few), end), false, tail_start)]).await?;
        }
        self.begin(place).await?;
        let found = taken.found;
        self.note(|made| made.ties = has_ties(&found));
        Ok(found.into_iter().skip(edge).take(page.size).collect())
    }

    async fn stream(&self, _symbol: &str, _span: Span) -> Result<Batches<OrdersError>, OrdersError> {
        Err(OrdersError::NotCovered)
    }

    async fn check(&self) -> Result<(), OrdersError> {
        Err(OrdersError::NotCovered)
    }
}

/// Whether every backend writes such a time as ISO 8601. Beyond the year 9999 some fail, and others write something else.
fn is_written(time: i64) -> bool {
    jiff::Timestamp::from_millisecond(time).is_ok()
}

/// Whether two neighbours are of one moment.
fn has_ties(orders: &[Order]) -> bool {
    orders.windows(2).any(|pair| pair[0].order_trade_time == pair[1].order_trade_time)
}
