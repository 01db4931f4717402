//! How one symbol stands, in words that an operator knows: for `/stats?symbol=…`, for the worst of them in `/stats`, and for `explain`.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::engine::Engine;
use super::judge::Quarantine;
use super::symbol::Symbol;
use super::tail::moment;
use super::unanswered::Unanswered;
use crate::api::orders::Orders;
use crate::clock::Wall;

/// Spans that are looked for, from the newest one back.
const MOST_LOOKED_FOR: usize = 5000;

/// How a symbol stands. Times are seconds.
#[derive(Clone, Debug, Serialize)]
pub struct SymbolReport {
    /// The symbol, in upper case.
    pub symbol: String,
    /// The time of its newest order that is known, up to now.
    pub newest_order: Option<String>,
    /// How old that is.
    pub newest_order_age: Option<f64>,
    /// How the newest orders are kept up to date.
    pub newest: NewestReport,
    /// What is known of what is over.
    pub spans: SpansReport,
    /// How long ago an answer about it was the same as the backend's.
    pub verified_ago: Option<f64>,
    /// Why the backend answers for it, if a check found it different.
    pub quarantine: Option<String>,
    /// The last request about it that was left to the backend.
    pub left_to_backend: Option<LeftReport>,
}

/// How the newest orders are kept up to date.
#[derive(Clone, Debug, Serialize)]
pub struct NewestReport {
    /// How long ago they were asked for; `None`: nothing is known of them.
    pub asked_ago: Option<f64>,
    /// How many orders they are.
    pub orders: usize,
    /// How long the last question took that was answered.
    pub took: f64,
    /// For how long they have been being asked for, if they are.
    pub asking_for: Option<f64>,
    /// In how many seconds they are asked for next; zero: they are due, and wait for their turn. `None`: nobody wants them, or a question is
    /// under way.
    pub next_in: Option<f64>,
    /// Questions in a row that failed.
    pub failures: u32,
}

/// What is known of what is over.
#[derive(Clone, Debug, Serialize)]
pub struct SpansReport {
    /// Spans in memory.
    pub known: usize,
    /// How many there are since its first order; `None`: where its orders begin is not known.
    pub of: Option<usize>,
    /// Spans that requests wait for, and that are to be fetched besides.
    pub urgent: usize,
    /// Spans that are to be fetched and that nobody waits for.
    pub wanted: usize,
    /// Whether they are being fetched.
    pub is_fetching: bool,
    /// Fetches in a row that failed.
    pub failures: u32,
    /// For how long nothing is fetched after that.
    pub paused_for: Option<f64>,
}

/// A request that was left to the backend.
#[derive(Clone, Debug, Serialize)]
pub struct LeftReport {
    /// Why, as the metric names it.
    pub reason: &'static str,
    /// The same as a sentence.
    pub why: String,
    /// How long ago.
    pub ago: f64,
}

/// Seconds, to the millisecond.
fn seconds(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e3).round() / 1e3
}

impl<S: Orders> Engine<S> {
    /// How a symbol stands. Asks for nothing.
    #[must_use]
    pub fn describe(&self, symbol: &Symbol) -> SymbolReport {
        let (now, tail) = (Wall::now(), symbol.tail());
        let newest_order = tail.as_ref().and_then(|tail| tail.newest_until(moment(now)));
        let told = |time: i64| u64::try_from(time).map_or_else(|_| time.to_string(), |time| Wall::from_millis(time).text());
        let left =
            |(reason, at): (Unanswered, Instant)| LeftReport { reason: reason.name(), why: reason.to_string(), ago: seconds(at.elapsed()) };
        SymbolReport {
            symbol: symbol.name.to_string(),
            newest_order: newest_order.map(told),
            newest_order_age: newest_order.map(|time| seconds(Duration::from_millis(moment(now).abs_diff(time)))),
            newest: self.describe_newest(symbol),
            spans: self.describe_spans(symbol, tail.map_or_else(|| moment(now), |tail| tail.start)),
            verified_ago: symbol.verified().map(|at| seconds(at.elapsed())),
            quarantine: Some(self.judge.quarantine(&symbol.name)).filter(|found| *found != Quarantine::Open).map(|found| found.to_string()),
            left_to_backend: symbol.left_to_backend().map(left),
        }
    }

    /// The symbols that stand worst, at most `most` of them: those that differ, those whose questions fail, and those whose newest orders are late though somebody wants them.
    #[must_use]
    pub fn worst(&self, most: usize) -> Vec<SymbolReport> {
        let badly = |symbol: Arc<Symbol>| {
            let standing = self.standing(&symbol);
            let failures = standing.failures.saturating_add(symbol.filling().failures);
            let age = symbol.tail().filter(|_| standing.is_wanted).map_or(Duration::ZERO, |tail| tail.asked.elapsed());
            let late = age.saturating_sub(self.settings.refresh + symbol.took());
            let is_closed = self.judge.quarantine(&symbol.name) != Quarantine::Open;
            (is_closed || failures > 0 || !late.is_zero()).then_some(((is_closed, failures, late), symbol))
        };
        let mut found: Vec<((bool, u32, Duration), Arc<Symbol>)> = self.all().into_iter().filter_map(badly).collect();
        found.sort_unstable_by_key(|(badness, _)| Reverse(*badness));
        found.iter().take(most).map(|(_, symbol)| self.describe(symbol)).collect()
    }

    fn describe_newest(&self, symbol: &Symbol) -> NewestReport {
        let tail = symbol.tail();
        let standing = self.standing(symbol);
        NewestReport {
            asked_ago: tail.as_ref().map(|tail| seconds(tail.asked.elapsed())),
            orders: tail.map_or(0, |tail| tail.columns.len()),
            took: seconds(symbol.took()),
            asking_for: symbol.asking_since().map(|since| seconds(since.elapsed())),
            next_in: standing.next_in.filter(|_| standing.is_wanted).map(seconds),
            failures: standing.failures,
        }
    }

    fn describe_spans(&self, symbol: &Symbol, tail_start: i64) -> SpansReport {
        let (length, oldest) = (self.span(), self.oldest(symbol));
        let first = oldest.unwrap_or(0).div_euclid(length);
        let of = usize::try_from(tail_start.div_euclid(length).saturating_sub(first)).unwrap_or(0);
        let starts = (0..of.min(MOST_LOOKED_FOR)).filter_map(|back| Some(tail_start - i64::try_from(back + 1).ok()? * length));
        let known = starts.filter(|&start| self.is_stored(symbol, start)).count();
        let filling = symbol.filling();
        SpansReport {
            known,
            of: oldest.map(|_| of),
            urgent: filling.urgent.len(),
            wanted: filling.wanted.len(),
            is_fetching: filling.is_active,
            failures: filling.failures,
            paused_for: filling
                .paused_until
                .map(|until| until.saturating_duration_since(Instant::now()))
                .filter(|left| !left.is_zero())
                .map(seconds),
        }
    }
}

impl fmt::Display for SymbolReport {
    /// Lines for `explain`, without an end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { newest, spans, .. } = self;
        match (&self.newest_order, self.newest_order_age) {
            (Some(time), Some(age)) => write!(f, "newest order {time}, {age} s old")?,
            _ if newest.asked_ago.is_some() => f.write_str("no order is known")?,
            _ => f.write_str("the newest orders are not known")?,
        }
        match (newest.asking_for, newest.next_in) {
            (Some(seconds), _) => write!(f, "; being asked for since {seconds} s")?,
            (None, Some(seconds)) if seconds > 0.0 => write!(f, "; asked for next in {seconds} s")?,
            (None, Some(_)) => f.write_str("; due to be asked for, waits for its turn")?,
            (None, None) => f.write_str("; nobody asks for it")?,
        }
        if newest.took > 0.0 {
            write!(f, "; the last question took {} s", newest.took)?;
        }
        if newest.failures > 0 {
            write!(f, "; {} questions in a row failed", newest.failures)?;
        }
        match spans.of {
            Some(of) => write!(f, "\nspans: {} of {of} known", spans.known)?,
            None => write!(f, "\nspans: {} known, where its orders begin is not", spans.known)?,
        }
        if spans.is_fetching {
            write!(f, "; being fetched: {} that requests wait for, {} others", spans.urgent, spans.wanted)?;
        }
        if let Some(seconds) = spans.paused_for {
            write!(f, "; {} fetches in a row failed, none for {seconds} s", spans.failures)?;
        }
        match self.verified_ago {
            Some(seconds) => write!(f, "\ncompared with the backend's answers {seconds} s ago, and equal")?,
            None => f.write_str("\nnever compared with the backend's answers")?,
        }
        if let Some(why) = &self.quarantine {
            write!(f, "\n{why}")?;
        }
        if let Some(left) = &self.left_to_backend {
            write!(f, "\nlast left to the backend {} s ago: {} ({})", left.ago, left.why, left.reason)?;
        }
        Ok(())
    }
}
