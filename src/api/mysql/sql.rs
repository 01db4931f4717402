//! The statements. Pure text: which index, which rows, in which order.
//!
//! | query | how it is asked |
//! |---|---|
//! | symbols | the distinct ones, by jumping from one to the next in the index |
//! | newest, first pages, stream | down the index on (symbol, order_trade_time): nothing is sorted |
//! | deep pages | first *where* the page begins, from the index alone ([`super::locate`]); then its rows |
//! | sums | from an index that holds all they need; a long span in two halves at a time |
//!
//! Without that index, or where a symbol has several spellings, rows are sorted by time and then by the primary key (or
//! else by all columns: rows that are equal in all of them are the same to every reader), so that pages never overlap.

use mysql_async::{Params, Value};

use super::row::COLUMNS;
use super::table::{Index, Table};
use crate::api::orders::{Page, Span};

/// A statement with its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    /// With `?` for the parameters.
    pub text: String,
    /// In their order.
    pub params: Vec<Value>,
}

impl Statement {
    /// The parameters as the driver takes them.
    #[must_use]
    pub fn params(&self) -> Params {
        if self.params.is_empty() { Params::Empty } else { Params::Positional(self.params.clone()) }
    }
}

/// The distinct symbols, in the server's order if its collation is blind to case.
#[must_use]
pub fn symbols(table: &Table) -> Statement {
    let text =
        format!("SELECT DISTINCT `symbol` FROM {} WHERE `symbol` IS NOT NULL ORDER BY `symbol`", from(table, table.by_symbol.as_ref()));
    Statement { text, params: Vec::new() }
}

/// The stored spellings of a symbol. The inner query jumps through the index; the limit keeps the outer one from
/// being pushed into it.
#[must_use]
pub fn spellings(table: &Table, symbol: &str) -> Statement {
    let from = from(table, table.by_symbol.as_ref());
    let text =
        format!("SELECT `symbol` FROM (SELECT DISTINCT `symbol` FROM {from} LIMIT 1000000) AS spellings WHERE {}", folded(table, symbol));
    Statement { text, params: vec![symbol.into()] }
}

/// From where orders are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// From the newest.
    Newest,
    /// From the oldest.
    Oldest,
}

/// Which rows a query is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Symbols {
    /// Those whose symbol is one of these.
    OneOf(Vec<String>),
    /// Those whose symbol is this one in lower case.
    Folded(String),
}

/// The rows of a symbol in a table.
pub struct Rows<'t> {
    /// The table.
    pub table: &'t Table,
    /// Whose rows.
    pub symbols: Symbols,
}

impl<'t> Rows<'t> {
    /// The same rows by the spelling of their symbol: of each the index knows the first and the last.
    pub fn by_spelling(&self) -> Vec<Rows<'t>> {
        let each = match &self.symbols {
            Symbols::OneOf(names) => names.iter().map(|name| Symbols::OneOf(vec![name.clone()])).collect(),
            folded @ Symbols::Folded(_) => vec![folded.clone()],
        };
        each.into_iter().map(|symbols| Rows { table: self.table, symbols }).collect()
    }

    /// Whether the index has them in order of time.
    #[must_use]
    pub fn are_ordered(&self) -> bool {
        matches!(&self.symbols, Symbols::OneOf(names) if names.len() == 1) && self.table.by_symbol.as_ref().is_some_and(Index::is_timed)
    }

    fn select(&self, what: &str, index: Option<&Index>, span: Option<Span>) -> Statement {
        let mut params = Vec::new();
        let symbols = match &self.symbols {
            Symbols::OneOf(names) if names.len() == 1 => "`symbol` = ?".to_owned(),
            Symbols::OneOf(names) => format!("`symbol` IN ({})", vec!["?"; names.len()].join(", ")),
            Symbols::Folded(name) => folded(self.table, name).to_owned(),
        };
        match &self.symbols {
            Symbols::OneOf(names) => params.extend(names.iter().map(Value::from)),
            Symbols::Folded(name) => params.push(name.into()),
        }
        let index = if matches!(self.symbols, Symbols::Folded(_)) { None } else { index };
        let mut text = format!("SELECT {what} FROM {} WHERE {symbols}", from(self.table, index));
        if let Some(span) = span {
            text.push_str(" AND `order_trade_time` BETWEEN ? AND ?");
            params.extend([Value::from(span.start), Value::from(span.end)]);
        }
        Statement { text, params }
    }

    fn orders(&self, span: Option<Span>) -> Statement {
        let mut statement = self.select(&columns(), self.table.by_symbol.as_ref(), span);
        statement.text.push_str(" ORDER BY `order_trade_time` DESC");
        if !self.are_ordered() {
            let all: Vec<String> = COLUMNS.iter().map(|name| format!("`{name}`")).collect();
            for column in if self.table.primary.is_empty() { &all } else { &self.table.primary } {
                statement.text.push_str(&format!(", {column} DESC"));
            }
        }
        statement
    }

    fn limited(mut statement: Statement, limit: usize, offset: u64) -> Statement {
        statement.text.push_str(" LIMIT ? OFFSET ?");
        statement.params.extend([Value::from(limit as u64), Value::from(offset)]);
        statement
    }

    /// The newest.
    #[must_use]
    pub fn latest(&self, limit: usize) -> Statement {
        Self::limited(self.orders(None), limit, 0)
    }

    /// All of a span, newest first.
    #[must_use]
    pub fn stream(&self, span: Span) -> Statement {
        self.orders(Some(span))
    }

    /// A page, counted from the newest of the span.
    #[must_use]
    pub fn page(&self, span: Span, page: Page) -> Statement {
        Self::limited(self.orders(Some(span)), page.size, page.offset)
    }

    /// The moment of the order that `offset` others precede, counted from the newest or from the oldest; from the index
    /// alone.
    #[must_use]
    pub fn moment(&self, span: Span, from: End, offset: u64) -> Statement {
        let mut statement = self.select("`order_trade_time`", self.table.by_symbol.as_ref(), Some(span));
        statement.text.push_str(match from {
            End::Newest => " ORDER BY `order_trade_time` DESC",
            End::Oldest => " ORDER BY `order_trade_time`",
        });
        Self::limited(statement, 1, offset)
    }

    /// The first and the last moment of the orders within a span: two probes of the index.
    #[must_use]
    pub fn extent(&self, span: Span) -> Statement {
        self.select("MIN(`order_trade_time`), MAX(`order_trade_time`)", self.table.by_symbol.as_ref(), Some(span))
    }

    /// How many orders a span has, from the index alone.
    #[must_use]
    pub fn count(&self, span: Span) -> Statement {
        self.select("COUNT(*)", self.table.by_symbol.as_ref(), Some(span))
    }

    /// Sums of a span by side and by bucket, of which number zero begins at `origin`.
    #[must_use]
    pub fn buckets(&self, span: Span, origin: i64, width: i64) -> Statement {
        let what = format!(
            "(`order_trade_time` - ?) DIV ? AS bucket, `side`, SUM({} * {})",
            self.table.exact("average_price"),
            self.table.exact("order_filled_accumulated_quantity"),
        );
        let index = self.table.covering.as_ref().or(self.table.by_symbol.as_ref());
        let mut statement = self.select(&what, index, Some(span));
        statement.params.splice(0..0, [Value::from(origin), Value::from(width)]);
        // They are few and sorted here; the server need not.
        statement.text.push_str(" GROUP BY bucket, `side` ORDER BY NULL");
        statement
    }
}

fn from(table: &Table, index: Option<&Index>) -> String {
    match index {
        // The optimizer's estimates may be old, and a wrong choice costs a scan of the whole table.
        Some(index) => format!("{} FORCE INDEX ({})", table.name, index.name),
        None => table.name.clone(),
    }
}

/// The comparison by which the API has always found symbols.
fn folded(table: &Table, symbol: &str) -> &'static str {
    if table.holds(symbol) { "LOWER(`symbol`) = LOWER(?)" } else { "LOWER(CONVERT(`symbol` USING utf8mb4)) = LOWER(?)" }
}

fn columns() -> String {
    COLUMNS.map(|name| format!("`{name}`")).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::mysql::table::tests::{table, with_indexes};

    const SPAN: Span = Span { start: 5, end: 9 };

    fn one(table: &Table) -> Rows<'_> {
        Rows { table, symbols: Symbols::OneOf(vec!["BTC".into()]) }
    }

    #[test]
    fn with_indexes_nothing_is_sorted() {
        let table = with_indexes("decimal(28,8)");
        let rows = one(&table);
        let page = rows.page(SPAN, Page { offset: 20, size: 10 });
        assert!(page.text.ends_with(
            "FROM `t` FORCE INDEX (`narrow`) WHERE `symbol` = ? AND `order_trade_time` BETWEEN ? AND ? ORDER BY `order_trade_time` DESC LIMIT ? OFFSET ?"
        ));
        assert_eq!(page.params, [Value::from("BTC"), Value::from(5), Value::from(9), Value::from(10_u64), Value::from(20_u64)]);
        let sums = rows.buckets(SPAN, 3, 60_000);
        assert_eq!(
            sums.text,
            "SELECT (`order_trade_time` - ?) DIV ? AS bucket, `side`, SUM(`average_price` * `order_filled_accumulated_quantity`) FROM `t` \
             FORCE INDEX (`wide`) WHERE `symbol` = ? AND `order_trade_time` BETWEEN ? AND ? GROUP BY bucket, `side` ORDER BY NULL"
        );
        assert_eq!(sums.params[..2], [Value::from(3), Value::from(60_000)]);
    }

    #[test]
    fn without_an_order_in_the_index_pages_are_made_stable() {
        let bare = table("double");
        let folded = Rows { table: &bare, symbols: Symbols::Folded("btc".into()) };
        let page = folded.page(SPAN, Page { offset: 0, size: 10 }).text;
        assert!(page.contains("FROM `t` WHERE LOWER(`symbol`) = LOWER(?)") && page.contains("DESC, `symbol` DESC, `side` DESC"), "{page}");
        assert!(page.starts_with(&folded.stream(SPAN).text), "a stream is in the order of the pages");
        let table = with_indexes("double");
        let two = Rows { table: &table, symbols: Symbols::OneOf(vec!["BTC".into(), "btc".into()]) };
        assert!(!two.are_ordered());
        let page = two.page(SPAN, Page { offset: 0, size: 10 }).text;
        assert!(page.contains("`symbol` IN (?, ?)") && page.contains("DESC, `id` DESC LIMIT"), "{page}");
    }
}
