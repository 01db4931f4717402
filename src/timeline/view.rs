//! What one request sees of the timeline: orders, as the endpoints of the API read them.
//!
//! It answers from what is known, waits for a little of what is not, and says [`OrdersError::NotCovered`] to the rest, noting why
//! ([`View::unanswered`]): then the request goes to the backend as if there were no timeline.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::buckets::buckets;
use super::columns::Columns;
use super::engine::{Allowed, Engine, FEW, Newness};
use super::fill::MOST_SPANS;
use super::kept::StoredSpan;
use super::room::Place;
use super::symbol::Symbol;
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

/// Orders by span, oldest first.
struct Pieces {
    spans: Vec<Arc<StoredSpan>>,
    tail: Option<Arc<Tail>>,
}

impl Pieces {
    fn columns(&self) -> impl DoubleEndedIterator<Item = &Columns> {
        self.spans.iter().map(|span| &span.columns).chain(self.tail.iter().map(|tail| &*tail.columns))
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

    /// Where the spans begin that a window needs besides the newest part, oldest first.
    fn starts(&self, span: Span, tail_start: i64) -> Result<Vec<i64>, OrdersError> {
        let length = self.engine.span();
        let end = span.end.min(tail_start - 1);
        let begin = span.start.max(self.engine.oldest(&self.symbol).unwrap_or(0));
        if begin > end {
            return Ok(Vec::new());
        }
        let (first, last) = (begin.div_euclid(length), end.div_euclid(length));
        if last - first >= MOST_SPANS {
            // It is not known yet where the orders begin, or there are too many spans.
            let missing = self.engine.fill_many(&self.symbol, span, tail_start);
            let is_known = self.engine.oldest(&self.symbol).is_some();
            return Err(self.not(if is_known { Unanswered::TooManySpans } else { missing }));
        }
        Ok((first..=last).map(|number| number * length).collect())
    }

    /// The orders of spans that are over; those that are not known are asked for, if they are few.
    async fn spans(&self, starts: &[i64], span: Span, tail_start: i64) -> Result<Vec<Arc<StoredSpan>>, OrdersError> {
        let missing: Vec<i64> = starts.iter().copied().filter(|&start| self.engine.stored(&self.symbol, start).is_none()).collect();
        if missing.len() > FEW {
            return Err(self.not(self.engine.fill_many(&self.symbol, span, tail_start)));
        }
        if !missing.is_empty() {
            self.note(|made| made.waited = true);
            self.engine.fill_few(&self.symbol, &missing).await.map_err(|why| self.not(why))?;
        }
        let stored = |start| self.engine.stored(&self.symbol, start).ok_or_else(|| self.not(Unanswered::SpansMissing));
        let found = starts.iter().map(|&start| stored(start));
        let found = found.collect::<Result<Vec<_>, _>>()?;
        self.note(|made| found.iter().for_each(|span| made.note_asked_at(span.asked_at)));
        Ok(found)
    }

    /// All orders of a window.
    async fn pieces(&self, span: Span) -> Result<Pieces, OrdersError> {
        let known = self.known_tail()?;
        let tail = if span.end >= known.start { Some(self.tail().await?) } else { None };
        let tail_start = tail.as_ref().unwrap_or(&known).start;
        let starts = self.starts(span, tail_start)?;
        Ok(Pieces { spans: self.spans(&starts, span, tail_start).await?, tail })
    }
}

impl<S: Orders> Orders for View<S> {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        Err(OrdersError::NotCovered)
    }

    async fn buckets(&self, _symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, OrdersError> {
        let pieces = self.pieces(span).await?;
        let orders: usize = pieces.columns().map(|columns| columns.within(span).len()).sum();
        let places = usize::try_from(span.end.saturating_sub(span.start) / width).unwrap_or(usize::MAX).saturating_add(1);
        let most = orders.min(places.saturating_mul(2));
        if most > MOST_BUCKETS {
            return Err(self.not(Unanswered::TooManyBuckets));
        }
        self.begin(self.reserve(most * BUCKET).await?).await?;
        let buckets = buckets(pieces.columns(), span, width).ok_or_else(|| self.not(Unanswered::Inexact))?;
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
        let mut starts = self.starts(span, tail_start)?;
        // One order more on either side, to see whether the page's edges cut through orders of one moment.
        let mut skip = usize::try_from(page.offset).map_err(|_| self.not(Unanswered::Shape))?;
        let edge = usize::from(skip > 0);
        skip -= edge;
        let wanted = page.size + edge + 1;
        let place = self.reserve(wanted.saturating_mul(ORDER)).await?;
        let mut found: Vec<Order> = Vec::with_capacity(wanted);
        let mut asked_for = 0;
        let mut take = |columns: &Columns| {
            let places = columns.within(span);
            let passed = skip.min(places.len());
            skip -= passed;
            let newest_first = places.rev().skip(passed).take(wanted - found.len());
            found.extend(newest_first.map(|place| columns.order(place)));
            found.len() == wanted
        };
        let mut full = tail.is_some_and(|tail| take(&tail.columns));
        // From the newest span to the oldest, as far as the page needs them, a few at a time.
        while let (false, false) = (full, starts.is_empty()) {
            let next = match starts.iter().rposition(|&start| self.engine.stored(&self.symbol, start).is_none()) {
                // All that are left are known.
                None => starts.split_off(0),
                Some(place) if place + 1 < starts.len() => starts.split_off(place + 1),
                Some(place) if asked_for == 0 => {
                    asked_for = FEW;
                    starts.split_off((place + 1).saturating_sub(FEW))
                }
                Some(_) => return Err(self.not(self.engine.fill_many(&self.symbol, span, tail_start))),
            };
            for stored in self.spans(&next, span, tail_start).await?.iter().rev() {
                full = full || take(&stored.columns);
            }
        }
        self.begin(place).await?;
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
