//! What the endpoints ask of whatever holds the orders.

use std::fmt;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::usd::Usd;
use crate::body::BoxError;

/// Text of a row; `None` is NULL. Rows share what repeats.
pub type Text = Option<Arc<str>>;

/// A liquidation order as its readers see it. Whatever is NULL in the table is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Order {
    /// As stored.
    pub symbol: Text,
    /// `buy` or `sell`.
    pub side: Text,
    /// `LIMIT` or `MARKET`.
    pub order_type: Text,
    /// `IOC` or `GTC`.
    pub time_in_force: Text,
    /// What was ordered.
    pub original_quantity: Option<f64>,
    /// The limit, if there is one.
    pub price: Option<f64>,
    /// What was paid on average.
    pub average_price: Option<f64>,
    /// `FILLED` and the like.
    pub order_status: Text,
    /// What the last fill brought.
    pub order_last_filled_quantity: Option<f64>,
    /// What all fills brought.
    pub order_filled_accumulated_quantity: Option<f64>,
    /// Milliseconds since 1970.
    pub order_trade_time: Option<i64>,
    /// What it adds to a bucket.
    pub usd: Usd,
}

/// From `start` to `end`, both included, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first moment.
    pub start: i64,
    /// The last moment; not before `start`.
    pub end: i64,
}

/// The USD liquidated on one side within one bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    /// Its first moment, in milliseconds since 1970.
    pub timestamp: i64,
    /// `buy` or `sell`.
    pub side: Text,
    /// The double nearest to the exact sum of `average_price × order_filled_accumulated_quantity`. Orders that lack
    /// either number count for nothing, and a bucket of such orders alone is absent.
    pub usd: f64,
}

/// Which orders of a list that is cut into pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// How many come before it.
    pub offset: u64,
    /// How many are on it at most.
    pub size: usize,
}

/// Orders that arrive in batches, none of them empty. Whoever sends them stops when this is dropped.
pub struct Batches<E> {
    /// What was taken already, to see that there is something.
    first: Option<Vec<Order>>,
    rest: mpsc::Receiver<Result<Vec<Order>, E>>,
}

impl<E: Into<OrdersError>> Batches<E> {
    /// What a channel brings.
    #[must_use]
    pub const fn new(rest: mpsc::Receiver<Result<Vec<Order>, E>>) -> Self {
        Self { first: None, rest }
    }

    /// No orders.
    #[must_use]
    pub fn none() -> Self {
        Self::new(mpsc::channel(1).1)
    }

    /// Waits for the first batch.
    ///
    /// # Errors
    /// There is none because of this.
    pub async fn begun(mut self) -> Result<Self, E> {
        self.first = self.rest.recv().await.transpose()?;
        Ok(self)
    }

    /// The next batch; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<Vec<Order>, OrdersError>> {
        match self.first.take() {
            Some(first) => Some(Ok(first)),
            None => self.rest.recv().await.map(|batch| batch.map_err(Into::into)),
        }
    }
}

/// Holds orders. Symbols match as the database's comparison of lower-cased text does: case and trailing spaces aside.
pub trait Orders: Send + Sync + 'static {
    /// Why a stream breaks off.
    type StreamError: Into<OrdersError> + Send + 'static;

    /// The distinct symbols that do not end in a digit, in the database's case-insensitive order.
    fn symbols(&self) -> impl Future<Output = Result<Vec<Arc<str>>, OrdersError>> + Send;

    /// Sums of USD within a span, by buckets of `width` milliseconds (above zero) that count from its start; by
    /// timestamp, then side.
    fn buckets(&self, symbol: &str, span: Span, width: i64) -> impl Future<Output = Result<Vec<Bucket>, OrdersError>> + Send;

    /// How many orders of a symbol lie within a span; `None`: whoever holds them does not count them.
    fn count(&self, _symbol: &str, _span: Span) -> impl Future<Output = Result<Option<u64>, OrdersError>> + Send {
        ready(Ok(None))
    }

    /// The newest orders of a symbol, newest first.
    fn latest(&self, symbol: &str, limit: usize) -> impl Future<Output = Result<Vec<Order>, OrdersError>> + Send;

    /// A page of a symbol's orders within a span, newest first, in an order that is the same from page to page.
    fn page(&self, symbol: &str, span: Span, page: Page) -> impl Future<Output = Result<Vec<Order>, OrdersError>> + Send;

    /// The time of a symbol's first order from 1970 on and before a moment, or a moment at most `grain` milliseconds before that order; `None`: there is
    /// none. By pages of one order, each of which is one look into an index, unless there is a shorter way.
    fn first(&self, symbol: &str, before: i64, grain: i64) -> impl Future<Output = Result<Option<i64>, OrdersError>> + Send {
        first_by_pages(self, symbol, before, grain)
    }

    /// All of a symbol's orders within a span, newest first, as fast as they are taken. Returns once the first are
    /// there, or it is known that there are none.
    fn stream(&self, symbol: &str, span: Span) -> impl Future<Output = Result<Batches<Self::StreamError>, OrdersError>> + Send;

    /// Whether orders can be read at this moment.
    fn check(&self) -> impl Future<Output = Result<(), OrdersError>> + Send;
}

/// Goes back in steps that double until there is nothing, and then halves what lies between.
async fn first_by_pages<O: Orders + ?Sized>(orders: &O, symbol: &str, before: i64, grain: i64) -> Result<Option<i64>, OrdersError> {
    let newest_until = async |moment: i64| -> Result<Option<i64>, OrdersError> {
        if moment < 0 {
            return Ok(None);
        }
        let found = orders.page(symbol, Span { start: 0, end: moment }, Page { offset: 0, size: 1 }).await?;
        Ok(found.first().and_then(|order| order.order_trade_time))
    };
    let Some(mut known) = newest_until(before - 1).await? else { return Ok(None) };
    // Up to here there is nothing.
    let (mut empty, mut step) = (-1, grain.saturating_mul(32));
    while let moment = known.saturating_sub(step)
        && moment > empty
    {
        match newest_until(moment).await? {
            Some(time) => (known, step) = (time, step.saturating_mul(2)),
            None => empty = moment,
        }
    }
    while known - empty > grain {
        let middle = empty.midpoint(known);
        match newest_until(middle).await? {
            Some(time) if time < known => known = time,
            _ => empty = middle,
        }
    }
    Ok(Some(empty + 1))
}

impl<O: Orders> Orders for Arc<O> {
    type StreamError = O::StreamError;

    fn symbols(&self) -> impl Future<Output = Result<Vec<Arc<str>>, OrdersError>> + Send {
        (**self).symbols()
    }

    fn buckets(&self, symbol: &str, span: Span, width: i64) -> impl Future<Output = Result<Vec<Bucket>, OrdersError>> + Send {
        (**self).buckets(symbol, span, width)
    }

    fn count(&self, symbol: &str, span: Span) -> impl Future<Output = Result<Option<u64>, OrdersError>> + Send {
        (**self).count(symbol, span)
    }

    fn latest(&self, symbol: &str, limit: usize) -> impl Future<Output = Result<Vec<Order>, OrdersError>> + Send {
        (**self).latest(symbol, limit)
    }

    fn page(&self, symbol: &str, span: Span, page: Page) -> impl Future<Output = Result<Vec<Order>, OrdersError>> + Send {
        (**self).page(symbol, span, page)
    }

    fn first(&self, symbol: &str, before: i64, grain: i64) -> impl Future<Output = Result<Option<i64>, OrdersError>> + Send {
        (**self).first(symbol, before, grain)
    }

    fn stream(&self, symbol: &str, span: Span) -> impl Future<Output = Result<Batches<Self::StreamError>, OrdersError>> + Send {
        (**self).stream(symbol, span)
    }

    fn check(&self) -> impl Future<Output = Result<(), OrdersError>> + Send {
        (**self).check()
    }
}

/// Why there are no orders.
#[derive(Debug)]
pub enum OrdersError {
    /// Whatever holds them cannot be reached, which has been logged by then.
    Unreachable(BoxError),
    /// It failed.
    Unavailable(BoxError),
    /// They took longer than this.
    TooSlow(Duration),
    /// Too many queries are waiting already.
    Busy,
    /// Whoever was asked does not know all of them, or not for certain: another must be asked.
    NotCovered,
}

impl fmt::Display for OrdersError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(cause) | Self::Unavailable(cause) => write!(f, "the database failed: {cause}"),
            Self::TooSlow(limit) => write!(f, "a query took longer than {limit:?} and was ended"),
            Self::Busy => f.write_str("too many queries wait for the database (mysql.queue)"),
            Self::NotCovered => f.write_str("not all of these orders are known for certain"),
        }
    }
}

impl std::error::Error for OrdersError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unreachable(cause) | Self::Unavailable(cause) => Some(cause.as_ref()),
            Self::TooSlow(_) | Self::Busy | Self::NotCovered => None,
        }
    }
}
