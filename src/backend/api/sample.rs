//! Orders in memory: from a CSV file, or made up.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::decimal::Decimal;
use super::orders::{Buckets, Order, Orders};
use crate::clock::Wall;

/// Orders in memory, by symbol in lower case and then by time.
pub struct Sample {
    by_symbol: BTreeMap<String, Vec<Order>>,
    delay: Duration,
}

/// How many orders are made up, and over how long a past.
const MADE_UP: usize = 20_000;
const MADE_UP_DAYS: u64 = 31;

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
        let orders = text.lines().enumerate().map(|(index, line)| order(line).ok_or(index + 1));
        Ok(Self::of(orders.collect::<Result<_, _>>()?, delay))
    }

    fn of(orders: Vec<Order>, delay: Duration) -> Self {
        let mut by_symbol: BTreeMap<String, Vec<Order>> = BTreeMap::new();
        for order in orders {
            by_symbol.entry(order.symbol.to_lowercase()).or_default().push(order);
        }
        for orders in by_symbol.values_mut() {
            orders.sort_by_key(|order| order.order_trade_time);
        }
        Self { by_symbol, delay }
    }

    /// Orders up to `now`, the same for the same moment.
    #[must_use]
    pub fn made_up(now: Wall, delay: Duration) -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        let span = MADE_UP_DAYS * 86_400_000;
        let mut one = || {
            let (symbol, price) = SYMBOLS[random.usize(..SYMBOLS.len()).min(random.usize(..SYMBOLS.len()))];
            let average = price * random.f64().mul_add(0.06, 0.97);
            let quantity = Decimal::nearest((random.f64() * 20_000.0 / price * 1000.0).ceil() / 1000.0);
            let market = random.u8(..) < 18;
            let text = |value: &str| value.to_owned();
            Order {
                symbol: text(symbol),
                side: text(if random.bool() { "buy" } else { "sell" }),
                order_type: text(if market { "MARKET" } else { "LIMIT" }),
                time_in_force: text(if market { "GTC" } else { "IOC" }),
                original_quantity: quantity,
                price: (!market).then(|| Decimal::nearest((price * 1e4).round() / 1e4)),
                average_price: Decimal::nearest((average * 1e5).round() / 1e5),
                order_status: text("FILLED"),
                order_last_filled_quantity: quantity,
                order_filled_accumulated_quantity: quantity,
                order_trade_time: i64::try_from(now.as_millis().saturating_sub(random.u64(..span))).unwrap_or(0),
            }
        };
        Self::of((0..MADE_UP).map(|_| one()).collect(), delay)
    }

    /// The orders whose symbol the database would call equal: case and trailing spaces aside.
    fn of_symbol(&self, symbol: &str) -> &[Order] {
        self.by_symbol.get(symbol.to_lowercase().trim_end_matches(' ')).map_or(&[], Vec::as_slice)
    }

    async fn pretend_to_query(&self) {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
    }
}

impl Orders for Sample {
    async fn symbols(&self) -> Vec<String> {
        self.pretend_to_query().await;
        let names = self.by_symbol.values().filter_map(|orders| orders.first()).map(|order| order.symbol.clone());
        names.filter(|symbol| !symbol.ends_with(|last: char| last.is_ascii_digit())).collect()
    }

    async fn buckets(&self, symbol: &str, start: i64, end: i64, width: i64) -> Buckets {
        self.pretend_to_query().await;
        let orders = self.of_symbol(symbol);
        let from = orders.partition_point(|order| order.order_trade_time < start);
        let mut buckets = Buckets::new();
        for order in orders[from..].iter().take_while(|order| order.order_trade_time <= end) {
            let bucket = (order.order_trade_time - start) / width * width + start;
            let sum = buckets.entry((bucket, order.side.clone())).or_default();
            *sum += order.average_price.product(order.order_filled_accumulated_quantity);
        }
        buckets
    }

    async fn latest(&self, symbol: &str, limit: usize) -> Vec<Order> {
        self.pretend_to_query().await;
        self.of_symbol(symbol).iter().rev().take(limit).cloned().collect()
    }
}

fn order(line: &str) -> Option<Order> {
    let fields: Vec<&str> = line.trim_end_matches('\r').split(',').collect();
    let [symbol, side, kind, force, quantity, price, average, status, last, filled, time] = fields[..] else { return None };
    Some(Order {
        symbol: symbol.to_owned(),
        side: side.to_owned(),
        order_type: kind.to_owned(),
        time_in_force: force.to_owned(),
        original_quantity: Decimal::parse(quantity)?,
        price: if price == "\\N" { None } else { Some(Decimal::parse(price)?) },
        average_price: Decimal::parse(average)?,
        order_status: status.to_owned(),
        order_last_filled_quantity: Decimal::parse(last)?,
        order_filled_accumulated_quantity: Decimal::parse(filled)?,
        order_trade_time: time.parse().ok()?,
    })
}
