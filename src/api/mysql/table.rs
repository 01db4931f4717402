//! What the table is like: its columns, and the indexes that queries can use.
//!
//! Nothing is assumed of a production table but the names of its columns. Numbers may be DECIMAL, floating or text;
//! text may have any collation; there may be no index at all. [`Table::inspect`] finds out, [`Table::report`] says it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use mysql_async::{Params, Row};

use super::pool::{Lease, QueryError};
use super::row::{COLUMNS, plain};
use crate::api::orders::OrdersError;

/// What is known of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name, quoted for statements.
    pub name: String,
    /// How each of [`COLUMNS`] is stored.
    columns: BTreeMap<String, Column>,
    /// Its primary key, which tells rows of the same moment apart.
    pub primary: Vec<String>,
    /// The index by which a symbol's orders are found, and whether it has them in order of time.
    pub by_symbol: Option<Index>,
    /// The index that holds all that sums need.
    pub covering: Option<Index>,
}

/// A usable index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Its name, quoted for statements.
    pub name: String,
    /// Its columns, in order.
    pub columns: Vec<String>,
}

impl Index {
    /// Whether the orders of one symbol stand in it in order of time.
    #[must_use]
    pub fn is_timed(&self) -> bool {
        starts_with(&self.columns, &["symbol", "order_trade_time"])
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Column {
    /// `decimal(28,8)` and the like, in lower case.
    kind: String,
    /// Of text columns.
    collation: Option<String>,
}

/// How the rows of a symbol are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matching {
    /// `symbol = ?`: one probe of an index that is blind to case itself.
    Equality,
    /// By each of the spellings that the index holds.
    Spellings,
    /// `LOWER(symbol) = LOWER(?)`: without an index every row is read anyway.
    Everything,
}

/// What sums are made from.
const SUMMED: [&str; 3] = ["side", "average_price", "order_filled_accumulated_quantity"];

impl Table {
    /// Looks at a table.
    ///
    /// # Errors
    /// It cannot be looked at, or lacks a column.
    pub async fn inspect(lease: &mut Lease, name: &str) -> Result<Self, QueryError> {
        let name = quote(name);
        let columns = lease.rows(&format!("SHOW FULL COLUMNS FROM {name}"), Params::Empty).await?;
        let indexes = lease.rows(&format!("SHOW INDEX FROM {name}"), Params::Empty).await?;
        let columns = columns.iter().filter_map(|row| {
            let column = Column { kind: field(row, "Type")?.to_ascii_lowercase(), collation: field(row, "Collation") };
            Some((field(row, "Field")?, column))
        });
        let parts = indexes.iter().filter_map(part).collect();
        Self::of(name, columns.collect(), parts).map_err(|missing| {
            let sentence = format!("the table lacks the column{} {}", if missing.len() == 1 { "" } else { "s" }, missing.join(", "));
            OrdersError::Unavailable(sentence.into()).into()
        })
    }

    fn of(name: String, all: BTreeMap<String, Column>, parts: Vec<Part>) -> Result<Self, Vec<&'static str>> {
        // Names of columns are blind to case.
        let columns: BTreeMap<String, Column> = all.into_iter().map(|(name, column)| (name.to_ascii_lowercase(), column)).collect();
        let missing: Vec<&str> = COLUMNS.into_iter().filter(|name| !columns.contains_key(*name)).collect();
        if !missing.is_empty() {
            return Err(missing);
        }
        let mut indexes: BTreeMap<String, Vec<Part>> = BTreeMap::new();
        for part in parts {
            indexes.entry(part.index.clone()).or_default().push(part);
        }
        let primary = indexes.get("PRIMARY").map(|parts| parts.iter().map(|part| quote(&part.column)).collect()).unwrap_or_default();
        let usable = |parts: &&Vec<Part>| parts.iter().all(|part| part.usable);
        let mut indexes: Vec<Index> = indexes.values().filter(usable).map(|parts| index(parts)).collect();
        // The narrowest first: fewer pages to read.
        indexes.sort_by_key(|index| index.columns.len());
        let timed = indexes.iter().find(|index| index.is_timed());
        let by_symbol = timed.or_else(|| indexes.iter().find(|index| starts_with(&index.columns, &["symbol"]))).cloned();
        let covers = |index: &&Index| index.is_timed() && SUMMED.iter().all(|name| index.columns.iter().any(|column| column == name));
        let covering = indexes.iter().find(covers).cloned();
        let columns = columns.into_iter().filter(|(name, _)| COLUMNS.contains(&name.as_str())).collect();
        Ok(Self { name, columns, primary, by_symbol, covering })
    }

    /// Whether the column's character set surely holds a symbol. The server refuses to compare it with one that it
    /// cannot hold, or converts the whole column.
    #[must_use]
    pub fn holds(&self, symbol: &str) -> bool {
        let collation = self.columns.get("symbol").and_then(|column| column.collation.as_deref());
        symbol.is_ascii() || collation.is_some_and(|collation| collation.starts_with("utf8mb4"))
    }

    /// How the rows of this symbol are found.
    #[must_use]
    pub fn matching(&self, symbol: &str) -> Matching {
        match &self.by_symbol {
            None => Matching::Everything,
            Some(_) if self.is_blind_to_case() && self.holds(symbol) => Matching::Equality,
            Some(_) => Matching::Spellings,
        }
    }

    /// Whether the column of symbols calls upper and lower case equal.
    #[must_use]
    pub fn is_blind_to_case(&self) -> bool {
        let collation = self.columns.get("symbol").and_then(|column| column.collation.as_deref());
        collation.is_some_and(|collation| collation.ends_with("_ci"))
    }

    /// A number column as an exact decimal, for sums.
    #[must_use]
    pub fn exact(&self, column: &str) -> String {
        let kind = self.columns.get(column).map_or("", |column| column.kind.as_str());
        if kind.starts_with("decimal") || kind.contains("int") {
            format!("`{column}`")
        } else {
            // The server turns a double into the decimal of its shortest digits. Fifteen permits leave the product of
            // two within its thirty, and twenty digits before the point, as DECIMAL(28,8) has.
            format!("CAST(`{column}` AS DECIMAL(35,15))")
        }
    }

    /// What was found, for the log at start: the state, and what is missing with the statement that creates it.
    #[must_use]
    pub fn report(&self) -> (String, Vec<String>) {
        let kinds: Vec<String> = ["symbol", "average_price", "order_trade_time"].iter().map(|name| self.describe(name)).collect();
        let named = |index: &Option<Index>| index.as_ref().map_or_else(|| "none".to_owned(), |index| index.name.clone());
        let found = format!(
            "{} with {}; orders by index {}, sums by index {}",
            self.name,
            kinds.join(", "),
            named(&self.by_symbol),
            named(self.covering.as_ref().map_or(&self.by_symbol, |_| &self.covering)),
        );
        let mut missing = Vec::new();
        if !self.by_symbol.as_ref().is_some_and(Index::is_timed) {
            missing.push(format!(
                "no index on (symbol, order_trade_time): queries read {}; create it with: ALTER TABLE {} ADD INDEX \
                 `liq_symbol_time` (`symbol`, `order_trade_time`), ALGORITHM=INPLACE, LOCK=NONE",
                if self.by_symbol.is_some() { "and sort all orders of a symbol" } else { "the whole table" },
                self.name,
            ));
        }
        if self.covering.is_none() {
            missing.push(format!(
                "no index that holds what sums need: /api/liquidations reads a row for each order; create it with: ALTER TABLE {} \
                 ADD INDEX `liq_symbol_time_usd` (`symbol`, `order_trade_time`, `side`, `average_price`, \
                 `order_filled_accumulated_quantity`), ALGORITHM=INPLACE, LOCK=NONE",
                self.name,
            ));
        }
        (found, missing)
    }

    fn describe(&self, name: &str) -> String {
        let Some(column) = self.columns.get(name) else { return String::new() };
        let collation = column.collation.as_deref().map(|collation| format!(" {collation}")).unwrap_or_default();
        format!("{name} {}{collation}", column.kind)
    }
}

/// One column of an index.
#[derive(Clone, Debug)]
struct Part {
    index: String,
    at: u64,
    column: String,
    /// A whole column of a B-tree that the optimizer may use.
    usable: bool,
}

fn index(parts: &[Part]) -> Index {
    let mut sorted: Vec<&Part> = parts.iter().collect();
    sorted.sort_by_key(|part| part.at);
    let name = sorted.first().map(|part| quote(&part.index)).unwrap_or_default();
    Index { name, columns: sorted.into_iter().map(|part| part.column.to_ascii_lowercase()).collect() }
}

/// A row of `SHOW INDEX`. `Visible` is MySQL's, `Ignored` is MariaDB's.
fn part(row: &Row) -> Option<Part> {
    let whole = field(row, "Sub_part").is_none();
    let tree = field(row, "Index_type").is_some_and(|kind| kind.eq_ignore_ascii_case("BTREE"));
    let hidden = field(row, "Visible").is_some_and(|word| word == "NO") || field(row, "Ignored").is_some_and(|word| word == "YES");
    Some(Part {
        index: field(row, "Key_name")?,
        at: field(row, "Seq_in_index")?.parse().ok()?,
        // An expression has no name.
        column: field(row, "Column_name").unwrap_or_default(),
        usable: whole && tree && !hidden,
    })
}

/// A field by its name, as text; `None` for NULL, or if there is no such field.
fn field(row: &Row, name: &str) -> Option<String> {
    let at = row.columns_ref().iter().position(|column| column.name_str().eq_ignore_ascii_case(name))?;
    plain(row.as_ref(at)?).map(Cow::into_owned)
}

fn starts_with(columns: &[String], names: &[&str]) -> bool {
    columns.len() >= names.len() && columns.iter().zip(names).all(|(column, name)| column == name)
}

/// A name, or two around a dot, as statements take them.
fn quote(name: &str) -> String {
    let parts: Vec<String> = name.split('.').map(|part| format!("`{}`", part.replace('`', "``"))).collect();
    parts.join(".")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn columns(collation: &str, number: &str) -> BTreeMap<String, Column> {
        let kind = |name: &str| match name {
            "symbol" => Column { kind: "varchar(32)".into(), collation: Some(collation.into()) },
            "order_trade_time" => Column { kind: "bigint(20)".into(), collation: None },
            _ => Column { kind: number.into(), collation: None },
        };
        // Names in a spelling of their own, and one more than is needed.
        COLUMNS.iter().chain(&["id"]).map(|name| (name.to_ascii_uppercase(), kind(name))).collect()
    }

    fn parts(index: &str, columns: &[&str]) -> Vec<Part> {
        let part = |(at, column): (usize, &&str)| Part { index: index.into(), at: at as u64, column: (*column).into(), usable: true };
        columns.iter().enumerate().map(part).collect()
    }

    /// A table without indexes.
    pub fn table(number: &str) -> Table {
        Table::of("`t`".into(), columns("utf8mb4_general_ci", number), Vec::new()).unwrap()
    }

    /// A table with a primary key and both indexes.
    pub fn with_indexes(number: &str) -> Table {
        let all = ["symbol", "order_trade_time", "side", "average_price", "order_filled_accumulated_quantity"];
        let parts = [parts("wide", &all), parts("narrow", &all[..2]), parts("PRIMARY", &["id"])].concat();
        Table::of("`t`".into(), columns("utf8mb4_general_ci", number), parts).unwrap()
    }

    #[test]
    fn the_best_index_is_found_and_what_is_missing_is_told() {
        let table = |parts: Vec<Part>| Table::of("`t`".into(), columns("utf8mb4_general_ci", "decimal(28,8)"), parts).unwrap();
        let bare = table(Vec::new());
        assert_eq!((bare.matching("BTCUSDT"), bare.report().1.len()), (Matching::Everything, 2));
        assert!(bare.report().1[0].contains("ALTER TABLE `t` ADD INDEX"), "{:?}", bare.report());
        let all = ["SYMBOL", "order_trade_time", "average_price", "side", "order_filled_accumulated_quantity"];
        let mut both = parts("wide", &all);
        both.extend(parts("narrow", &all[..2]));
        both.extend(parts("PRIMARY", &["id"]));
        both.extend(parts("other", &["side", "symbol"]));
        let table_with_both = table(both.clone());
        assert_eq!(table_with_both.by_symbol.as_ref().map(|index| index.name.as_str()), Some("`narrow`"));
        assert_eq!(table_with_both.covering.as_ref().map(|index| index.name.as_str()), Some("`wide`"));
        assert_eq!((table_with_both.primary.clone(), table_with_both.report().1), (vec!["`id`".to_owned()], Vec::new()));
        let wide = table(parts("wide", &all));
        assert!(wide.by_symbol.as_ref().is_some_and(Index::is_timed), "one index can serve both");
        let symbol = table(parts("symbol", &["symbol"]));
        assert!(symbol.by_symbol.is_some() && symbol.report().1.len() == 2);
        let mut hidden = both;
        for part in &mut hidden {
            part.usable = false;
        }
        assert_eq!(table(hidden).by_symbol, None);
    }

    #[test]
    fn equality_is_asked_only_where_it_means_the_same() {
        for (collation, symbol, expected) in [
            ("utf8mb4_general_ci", "BTCUSDT", Matching::Equality),
            ("utf8mb4_0900_ai_ci", "é", Matching::Equality),
            ("latin1_swedish_ci", "BTCUSDT", Matching::Equality),
            ("latin1_swedish_ci", "é", Matching::Spellings),
            ("utf8mb4_bin", "BTCUSDT", Matching::Spellings),
            ("utf8mb4_0900_as_cs", "BTCUSDT", Matching::Spellings),
        ] {
            let table = Table::of("`t`".into(), columns(collation, "double"), parts("i", &["symbol", "order_trade_time"])).unwrap();
            assert_eq!(table.matching(symbol), expected, "{collation} {symbol}");
        }
    }

    #[test]
    fn numbers_that_are_not_exact_are_made_so() {
        for (kind, exact) in [
            ("decimal(28,8)", "`price`"),
            ("bigint(20) unsigned", "`price`"),
            ("double", "CAST(`price` AS DECIMAL(35,15))"),
            ("varchar(64)", "CAST(`price` AS DECIMAL(35,15))"),
        ] {
            assert_eq!(Table::of("`t`".into(), columns("utf8mb4_bin", kind), Vec::new()).unwrap().exact("price"), exact);
        }
        let missing = Table::of("`t`".into(), BTreeMap::new(), Vec::new());
        assert_eq!(missing.map_err(|missing| missing.len()), Err(COLUMNS.len()));
    }

    #[test]
    fn names_cannot_leave_their_quotes() {
        assert_eq!((quote("a.b"), quote("a`; DROP TABLE b")), ("`a`.`b`".to_owned(), "`a``; DROP TABLE b`".to_owned()));
    }
}
