//! Orders in MySQL or MariaDB.
//!
//! ```text
//! mod     the queries that endpoints make          sql     the statements, as text
//! locate  where a deep page begins                  table   what the table is like, which indexes it has
//! query   a statement asked, or several at a time   row     from rows to orders
//! pool    connections within bounds, deadlines
//! connection    one connection, from hello to goodbye
//! ```

pub mod connection;
pub mod locate;
pub mod pool;
pub mod query;
pub mod row;
pub mod sql;
pub mod table;

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use mysql_async::{Row, Value};
use tokio::sync::mpsc;
use tokio::time::interval;

use self::pool::{Lane, Lease, Pool, QueryError};
use self::query::{ask, ask_all, extent, one_number};
use self::sql::{End, Rows, Statement, Symbols};
use self::table::{Matching, Table};
use super::orders::{Batches, Bucket, Order, Orders, OrdersError, Page, Span};
use super::texts::Texts;
use crate::config::Mysql as Config;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::carry;

/// How often the pool is tended, and the table looked at as long as it was not found.
const MAINTAIN_EVERY: Duration = Duration::from_secs(1);
/// The table is looked at again after so many rounds of tending: an index that was added is used within a minute.
const ROUNDS_BETWEEN_LOOKS: u32 = 60;

/// Sums over a span of more milliseconds than this are asked for in two halves at a time: two months.
const LONG: i64 = 60 * 86_400_000;

/// Orders in a table.
pub struct Mysql {
    shared: Arc<Shared>,
    lane: Lane,
}

struct Shared {
    pool: Pool,
    name: String,
    table: ArcSwapOption<Table>,
    query_timeout: Duration,
    long_query_timeout: Duration,
    stream_timeout: Duration,
}

impl Mysql {
    /// Orders in the table that a configuration names. Returns at once, whether the server is there or not: connections
    /// are made in the background of the current runtime.
    ///
    /// # Errors
    /// Never, as long as the configuration was checked.
    pub fn start(config: &Config, metrics: Arc<Metrics>) -> Result<Self, deadpool::managed::BuildError> {
        let shared = Arc::new(Shared {
            pool: Pool::new(config, metrics)?,
            name: config.table.clone(),
            table: ArcSwapOption::empty(),
            query_timeout: config.query_timeout,
            long_query_timeout: config.long_query_timeout,
            stream_timeout: config.stream_timeout,
        });
        tokio::spawn(Arc::clone(&shared).maintain());
        Ok(Self { shared, lane: Lane::Clients })
    }

    /// The same orders for queries of another kind, which have connections of their own.
    #[must_use]
    pub fn in_lane(&self, lane: Lane) -> Self {
        Self { shared: Arc::clone(&self.shared), lane }
    }
}

impl Shared {
    /// Keeps the pool and what is known of the table up to date, for as long as the program runs.
    async fn maintain(self: Arc<Self>) {
        let mut ticks = interval(MAINTAIN_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut round, mut said) = (0, String::new());
        loop {
            ticks.tick().await;
            self.pool.maintain().await;
            if round % ROUNDS_BETWEEN_LOOKS == 0 || self.table.load().is_none() {
                // What failed is told by those who ask.
                if let Ok(mut lease) = self.pool.ask(Lane::Clients, self.query_timeout).await {
                    let failure = self.look(&mut lease).await.err().map(OrdersError::from);
                    let error = failure.map(|error| error.to_string()).unwrap_or_default();
                    // It is looked at every second until it is found, and the same is not said every second.
                    if error != said && !error.is_empty() {
                        tracing::warn!(error, "the table of orders cannot be looked at (mysql.database, mysql.table)");
                    }
                    said = error;
                }
            }
            round = round.wrapping_add(1);
        }
    }

    /// Looks at the table, and says what it found if that is new.
    async fn look(&self, lease: &mut Lease) -> Result<Arc<Table>, QueryError> {
        let table = Arc::new(Table::inspect(lease, &self.name).await?);
        let known = self.table.swap(Some(Arc::clone(&table)));
        if known.as_ref() != Some(&table) {
            let (found, missing) = table.report();
            tracing::info!(server = lease.version(), "orders are read from {found}");
            for sentence in missing {
                tracing::warn!("{sentence} (deploy/mysql/indexes.sql creates all of them)");
            }
        }
        Ok(table)
    }

    async fn table(&self, lease: &mut Lease) -> Result<Arc<Table>, QueryError> {
        match self.table.load_full() {
            Some(table) => Ok(table),
            None => self.look(lease).await,
        }
    }

    /// Asks once more if the table turned out to have changed.
    async fn settled<T, F: Future<Output = Result<T, QueryError>> + Send>(&self, query: impl Fn() -> F + Send) -> Result<T, OrdersError> {
        match query().await {
            Err(QueryError::TableChanged(error)) => {
                tracing::warn!(%error, "the table of orders changed; looking at it again");
                self.table.store(None);
                Ok(query().await?)
            }
            answer => Ok(answer?),
        }
    }

    async fn symbols(&self, lane: Lane) -> Result<Vec<Arc<str>>, QueryError> {
        let mut lease = self.pool.ask(lane, self.query_timeout).await?;
        let table = self.table(&mut lease).await?;
        let mut texts = Texts::default();
        let rows = ask(&mut lease, &sql::symbols(&table)).await?;
        let symbols = rows.iter().filter_map(|row| row::text(row.as_ref(0)?, &mut texts));
        let mut symbols: Vec<Arc<str>> = symbols.filter(|symbol| !symbol.ends_with(|last: char| last.is_ascii_digit())).collect();
        if !table.is_blind_to_case() {
            symbols.sort_by_key(|symbol| symbol.to_uppercase());
        }
        Ok(symbols)
    }

    /// Which rows a symbol means; `None` if none.
    async fn rows<'t>(&self, lease: &mut Lease, table: &'t Table, symbol: &str) -> Result<Option<Rows<'t>>, QueryError> {
        let symbols = match table.matching(symbol) {
            Matching::Equality => Symbols::OneOf(vec![symbol.to_owned()]),
            Matching::Everything => Symbols::Folded(symbol.to_owned()),
            Matching::Spellings => {
                let rows = ask(lease, &sql::spellings(table, symbol)).await?;
                let names: Vec<String> = rows.iter().filter_map(|row| Some(row::plain(row.as_ref(0)?)?.into_owned())).collect();
                if names.is_empty() {
                    return Ok(None);
                }
                Symbols::OneOf(names)
            }
        };
        Ok(Some(Rows { table, symbols }))
    }

    async fn buckets(&self, lane: Lane, symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, QueryError> {
        let mut lease = self.pool.ask(lane, self.query_timeout).await?;
        let table = self.table(&mut lease).await?;
        let Some(rows) = self.rows(&mut lease, &table, symbol).await? else { return Ok(Vec::new()) };
        let mut spans = vec![span];
        if rows.are_ordered() && span.end.saturating_sub(span.start) > LONG {
            let Some(extent) = extent(&mut lease, &rows, span).await? else { return Ok(Vec::new()) };
            spans = halves(extent, span.start, width);
        }
        let statements: Vec<Statement> = spans.into_iter().map(|part| rows.buckets(part, span.start, width)).collect();
        let answers = ask_all(&mut lease, &mut self.second(&statements).await, &statements).await?;
        let mut texts = Texts::default();
        let mut buckets: Vec<Bucket> = answers.iter().flatten().filter_map(|sum| bucket(sum, span, width, &mut texts)).collect();
        buckets.sort_by(|one, two| one.timestamp.cmp(&two.timestamp).then_with(|| by_side(one, two)));
        Ok(buckets)
    }

    /// Somebody to ask the second of several statements, if there is one and a connection is free.
    async fn second(&self, statements: &[Statement]) -> Option<Lease> {
        if statements.len() > 1 { self.pool.help(self.query_timeout).await } else { None }
    }

    async fn count(&self, lane: Lane, symbol: &str, span: Span) -> Result<u64, QueryError> {
        let mut lease = self.pool.ask(lane, self.query_timeout).await?;
        let table = self.table(&mut lease).await?;
        let Some(rows) = self.rows(&mut lease, &table, symbol).await? else { return Ok(0) };
        Ok(locate::number(&ask(&mut lease, &rows.count(span)).await?))
    }

    async fn latest(&self, lane: Lane, symbol: &str, limit: usize) -> Result<Vec<Order>, QueryError> {
        let mut lease = self.pool.ask(lane, self.query_timeout).await?;
        let table = self.table(&mut lease).await?;
        let Some(rows) = self.rows(&mut lease, &table, symbol).await? else { return Ok(Vec::new()) };
        Ok(orders(ask(&mut lease, &rows.latest(limit)).await?))
    }

    async fn page(&self, lane: Lane, symbol: &str, span: Span, page: Page) -> Result<Vec<Order>, QueryError> {
        let mut lease = self.pool.ask(lane, self.long_query_timeout).await?;
        let table = self.table(&mut lease).await?;
        let Some(rows) = self.rows(&mut lease, &table, symbol).await? else { return Ok(Vec::new()) };
        if page.offset <= locate::DEEP || !rows.are_ordered() {
            return Ok(orders(ask(&mut lease, &rows.page(span, page)).await?));
        }
        let mut second = if page.offset > locate::VERY_DEEP { self.pool.help(self.long_query_timeout).await } else { None };
        let Some(place) = locate::order(&mut lease, &mut second, &rows, span, page.offset).await? else { return Ok(Vec::new()) };
        let older = Span { start: span.start, end: place.moment };
        let found = orders(ask(&mut lease, &rows.page(older, Page { offset: 0, size: page.size })).await?);
        // If others share the first one's moment, some of them may belong to the page before.
        if page.size > 1 && found.get(1).is_none_or(|second| second.order_trade_time != Some(place.moment)) {
            return Ok(found);
        }
        let before = place.newer(&mut lease, &rows).await?;
        let page = Page { offset: page.offset.saturating_sub(before), size: page.size };
        Ok(orders(ask(&mut lease, &rows.page(older, page)).await?))
    }

    async fn first(&self, lane: Lane, symbol: &str, before: i64) -> Result<Option<i64>, QueryError> {
        let mut lease = self.pool.ask(lane, self.query_timeout).await?;
        let table = self.table(&mut lease).await?;
        let Some(rows) = self.rows(&mut lease, &table, symbol).await? else { return Ok(None) };
        let mut first: Option<i64> = None;
        for rows in rows.by_spelling() {
            let found = one_number(&ask(&mut lease, &rows.moment(Span { start: 0, end: before - 1 }, End::Oldest, 0)).await?);
            first = first.into_iter().chain(found).min();
        }
        Ok(first)
    }

    async fn stream(self: Arc<Self>, lane: Lane, symbol: String, span: Span) -> Result<Batches<QueryError>, QueryError> {
        let mut lease = self.pool.ask_stream(lane, self.long_query_timeout, self.stream_timeout).await?;
        let table = self.table(&mut lease).await?;
        let Some(rows) = self.rows(&mut lease, &table, &symbol).await? else { return Ok(Batches::none()) };
        let statement = rows.stream(span);
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(carry(async move {
            let mut texts = Texts::default();
            lease.stream(&statement.text, statement.params(), |row| row::order(row, &mut texts), sender).await;
        }));
        Batches::new(receiver).begun().await
    }
}

/// A span in two, cut where a bucket ends; or whole, if no bucket ends within it.
fn halves(span: Span, origin: i64, width: i64) -> Vec<Span> {
    let middle = span.start.midpoint(span.end);
    let cut = middle.saturating_sub(origin) / width * width + origin;
    if cut <= span.start || cut > span.end {
        return vec![span];
    }
    vec![Span { start: span.start, end: cut - 1 }, Span { start: cut, end: span.end }]
}

fn orders(rows: Vec<Row>) -> Vec<Order> {
    let mut texts = Texts::default();
    rows.into_iter().map(|row| row::order(row, &mut texts)).collect()
}

fn bucket(row: &Row, span: Span, width: i64, texts: &mut Texts) -> Option<Bucket> {
    let number = row::whole(row.as_ref(0)?)?;
    let timestamp = number.saturating_mul(width).saturating_add(span.start);
    let side = row::text(row.as_ref(1).unwrap_or(&Value::NULL), texts);
    Some(Bucket { timestamp, side, usd: row::number(row.as_ref(2)?)? })
}

/// NULL before text, upper and lower case alike, as the server sorts.
fn by_side(one: &Bucket, two: &Bucket) -> Ordering {
    let folded = |bucket: &Bucket| bucket.side.as_deref().map(str::to_uppercase);
    folded(one).cmp(&folded(two)).then_with(|| one.side.cmp(&two.side))
}

impl Orders for Mysql {
    type StreamError = QueryError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        self.shared.settled(|| self.shared.symbols(self.lane)).await
    }

    async fn buckets(&self, symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, OrdersError> {
        self.shared.settled(|| self.shared.buckets(self.lane, symbol, span, width)).await
    }

    async fn count(&self, symbol: &str, span: Span) -> Result<Option<u64>, OrdersError> {
        self.shared.settled(|| self.shared.count(self.lane, symbol, span)).await.map(Some)
    }

    async fn latest(&self, symbol: &str, limit: usize) -> Result<Vec<Order>, OrdersError> {
        self.shared.settled(|| self.shared.latest(self.lane, symbol, limit)).await
    }

    async fn page(&self, symbol: &str, span: Span, page: Page) -> Result<Vec<Order>, OrdersError> {
        self.shared.settled(|| self.shared.page(self.lane, symbol, span, page)).await
    }

    async fn first(&self, symbol: &str, before: i64, _grain: i64) -> Result<Option<i64>, OrdersError> {
        self.shared.settled(|| self.shared.first(self.lane, symbol, before)).await
    }

    async fn stream(&self, symbol: &str, span: Span) -> Result<Batches<QueryError>, OrdersError> {
        self.shared.settled(|| Arc::clone(&self.shared).stream(self.lane, symbol.to_owned(), span)).await
    }

    async fn check(&self) -> Result<(), OrdersError> {
        self.shared.pool.check().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn halves_cover_a_span_and_share_no_bucket(start in 0_i64..1000, length in 0_i64..1000, before in 0_i64..500, width in 1_i64..700) {
            let (span, origin) = (Span { start, end: start + length }, start - before);
            let parts = halves(span, origin, width);
            prop_assert_eq!((parts[0].start, parts[parts.len() - 1].end), (span.start, span.end));
            let bucket = |moment: i64| (moment - origin) / width;
            if let [old, new] = parts[..] {
                prop_assert_eq!(old.end + 1, new.start);
                prop_assert!(bucket(old.end) < bucket(new.start));
            }
        }
    }
}
