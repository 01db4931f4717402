//! Orders in memory: from a CSV file, or made up.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::decimal::Decimal;
use super::orders::{Batches, Bucket, Order, Orders, OrdersError, Page, Span, Text};
use super::texts::Texts;
use super::usd::Usd;
use crate::clock::Wall;

/// Orders in memory, by symbol in upper case (which is the database's order) and then by time.
#[derive(Clone)]
pub struct Sample {
    by_symbol: Arc<BTreeMap<String, Vec<Order>>>,
    /// Whether orders arrive when their time has come, so that those of the future are not there yet.
    arriving: bool,
    delay: Duration,
}

/// How NULL is written in a CSV file.
const NULL: &str = "\\N";
/// Orders in a batch of a stream.
const BATCH: usize = 256;

/// How many orders are made up, and over how long a past.
const MADE_UP: usize = 20_000;
const MADE_UP_DAYS: u64 = 31;
/// How many more go on arriving, one a second: for a day, so that memory is bounded.
const ARRIVING: u64 = 86_400;

/// Symbols of made-up orders and about what they cost.
const SYMBOLS: [(&str, f64); 8] = [
    ("BTCUSDT", 98_000.0),
    ("ETHUSDT", 3300.0),
    ("SOLUSDT", 190.0),
    ("XRPUSDT", 2.3),
    ("DOGEUSDT", 0.34),
    ("1000PEPEUSDT", 0.0182),
    ("BTCUSDT_250328", 99_000.0),
    ("memeusdt", 0.0123),
];

impl Sample {
    /// Orders of a CSV file, or made-up ones; every query takes `delay`.
    ///
    /// # Errors
    /// The file cannot be read, or a line of it is not an order.
    pub fn load(path: Option<&Path>, delay: Duration) -> Result<Self, crate::body::BoxError> {
        match path {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
                Self::parse(&text, delay)
                    .map_err(|line| format!("{}:{line}: not an order in the schema's column order", path.display()).into())
            }
            None => Ok(Self::made_up(Wall::now(), delay)),
        }
    }

    /// Orders of a CSV text in the schema's column order; `\N` is NULL.
    ///
    /// # Errors
    /// The number of the first line that is not an order.
    pub fn parse(text: &str, delay: Duration) -> Result<Self, usize> {
        let mut texts = Texts::default();
        let orders = text.lines().enumerate().map(|(index, line)| order(line, &mut texts).ok_or(index + 1));
        Ok(Self { by_symbol: by_symbol(orders.collect::<Result<Vec<_>, _>>()?), arriving: false, delay })
    }

    /// Orders up to `now`, and others that go on arriving; the same for the same moment.
    #[must_use]
    pub fn made_up(now: Wall, delay: Duration) -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        let mut texts = Texts::default();
        let span = MADE_UP_DAYS * 86_400_000;
        let mut one = |time: u64| {
            let (symbol, price) = SYMBOLS[random.usize(..SYMBOLS.len()).min(random.usize(..SYMBOLS.len()))];
            let average = price * random.f64().mul_add(0.06, 0.97);
            let quantity = Decimal::nearest((random.f64() * 20_000.0 / price * 1000.0).ceil() / 1000.0);
            let market = random.u8(..) < 18;
            let price = (!market).then(|| Decimal::nearest((price * 1e4).round() / 1e4));
            let average = Decimal::nearest((average * 1e5).round() / 1e5);
            Order {
                symbol: texts.share(symbol),
                side: texts.share(if random.bool() { "buy" } else { "sell" }),
                order_type: texts.share(if market { "MARKET" } else { "LIMIT" }),
                time_in_force: texts.share(if market { "GTC" } else { "IOC" }),
                original_quantity: Some(quantity.to_f64()),
                price: price.map(Decimal::to_f64),
                average_price: Some(average.to_f64()),
                order_status: texts.share("FILLED"),
                order_last_filled_quantity: Some(quantity.to_f64()),
                order_filled_accumulated_quantity: Some(quantity.to_f64()),
                order_trade_time: i64::try_from(time).ok(),
                usd: Usd::of(Some(average), Some(quantity)),
            }
        };
        let mut times = fastrand::Rng::with_seed(11);
        let past = (0..MADE_UP).map(|_| now.as_millis().saturating_sub(times.u64(..span))).collect::<Vec<_>>();
        let future = (1..=ARRIVING).map(|second| now.as_millis() + second * 1000 - times.u64(..1000));
        let orders: Vec<Order> = past.into_iter().chain(future).map(&mut one).collect();
        Self { by_symbol: by_symbol(orders), arriving: true, delay }
    }

    /// The orders whose symbol the database would call equal: case and trailing spaces aside.
    fn of_symbol(&self, symbol: &str) -> &[Order] {
        let orders = self.by_symbol.get(&folded(symbol)).map_or(&[][..], Vec::as_slice);
        if !self.arriving {
            return orders;
        }
        let now = i64::try_from(Wall::now().as_millis()).ok();
        &orders[..orders.partition_point(|order| order.order_trade_time <= now)]
    }

    /// Those within a span, oldest first.
    fn within(&self, symbol: &str, span: Span) -> &[Order] {
        let orders = self.of_symbol(symbol);
        let from = orders.partition_point(|order| order.order_trade_time < Some(span.start));
        let to = orders.partition_point(|order| order.order_trade_time <= Some(span.end));
        &orders[from..to]
    }

    async fn pretend_to_query(&self) {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
    }
}

/// Orders by symbol in upper case, and then by time.
fn by_symbol(orders: Vec<Order>) -> Arc<BTreeMap<String, Vec<Order>>> {
    let mut by_symbol: BTreeMap<String, Vec<Order>> = BTreeMap::new();
    for order in orders {
        // An order without a symbol is found by no query.
        if let Some(symbol) = &order.symbol {
            by_symbol.entry(folded(symbol)).or_default().push(order);
        }
    }
    for orders in by_symbol.values_mut() {
        orders.sort_by_key(|order| order.order_trade_time);
    }
    Arc::new(by_symbol)
}

/// What symbols are compared by.
fn folded(symbol: &str) -> String {
    symbol.to_lowercase().trim_end_matches(' ').to_uppercase()
}

impl Orders for Sample {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        self.pretend_to_query().await;
        let names = self.by_symbol.values().filter_map(|orders| orders.first()?.symbol.clone());
        Ok(names.filter(|symbol| !symbol.ends_with(|last: char| last.is_ascii_digit())).collect())
    }

    async fn buckets(&self, symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, OrdersError> {
        self.pretend_to_query().await;
        let mut sums: BTreeMap<(i64, Option<String>), (Text, Usd)> = BTreeMap::new();
        for order in self.within(symbol, span) {
            let time = order.order_trade_time.unwrap_or(span.start);
            let timestamp = (time - span.start) / width * width + span.start;
            let side = order.side.clone();
            let (_, sum) = sums.entry((timestamp, side.as_deref().map(folded))).or_insert((side, Usd::Unknown));
            *sum = sum.plus(order.usd);
        }
        let known = sums.into_iter().filter(|(_, (_, sum))| !matches!(sum, Usd::Unknown));
        Ok(known.map(|((timestamp, _), (side, sum))| Bucket { timestamp, side, usd: sum.nearest() }).collect())
    }

    async fn count(&self, symbol: &str, span: Span) -> Result<Option<u64>, OrdersError> {
        self.pretend_to_query().await;
        Ok(Some(self.within(symbol, span).len() as u64))
    }

    async fn latest(&self, symbol: &str, limit: usize) -> Result<Vec<Order>, OrdersError> {
        self.pretend_to_query().await;
        Ok(self.of_symbol(symbol).iter().rev().take(limit).cloned().collect())
    }

    async fn page(&self, symbol: &str, span: Span, page: Page) -> Result<Vec<Order>, OrdersError> {
        self.pretend_to_query().await;
        let offset = usize::try_from(page.offset).unwrap_or(usize::MAX);
        Ok(self.within(symbol, span).iter().rev().skip(offset).take(page.size).cloned().collect())
    }

    async fn first(&self, symbol: &str, before: i64, _grain: i64) -> Result<Option<i64>, OrdersError> {
        self.pretend_to_query().await;
        Ok(self.within(symbol, Span { start: 0, end: before - 1 }).first().and_then(|order| order.order_trade_time))
    }

    async fn stream(&self, symbol: &str, span: Span) -> Result<Batches<OrdersError>, OrdersError> {
        self.pretend_to_query().await;
        let (sender, receiver) = mpsc::channel(1);
        let (symbol, sample) = (symbol.to_owned(), self.clone());
        tokio::spawn(async move {
            for batch in sample.within(&symbol, span).rchunks(BATCH) {
                let orders = batch.iter().rev().cloned().collect();
                if sender.send(Ok(orders)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Batches::new(receiver))
    }

    async fn check(&self) -> Result<(), OrdersError> {
        Ok(())
    }
}

fn order(line: &str, texts: &mut Texts) -> Option<Order> {
    let fields: Vec<&str> = line.trim_end_matches('\r').split(',').collect();
    let [symbol, side, kind, force, quantity, price, average, status, last, filled, time] = fields[..] else { return None };
    let mut text = |field: &str| if field == NULL { None } else { texts.share(field) };
    let number = |field: &str| if field == NULL { Some(None) } else { Decimal::parse(field).map(Some) };
    let (average, filled) = (number(average)?, number(filled)?);
    Some(Order {
        symbol: text(symbol),
        side: text(side),
        order_type: text(kind),
        time_in_force: text(force),
        original_quantity: number(quantity)?.map(Decimal::to_f64),
        price: number(price)?.map(Decimal::to_f64),
        average_price: average.map(Decimal::to_f64),
        order_status: text(status),
        order_last_filled_quantity: number(last)?.map(Decimal::to_f64),
        order_filled_accumulated_quantity: filled.map(Decimal::to_f64),
        order_trade_time: if time == NULL { None } else { Some(time.parse().ok()?) },
        usd: Usd::of(average, filled),
    })
}
