//! Spans that are over: kept in memory and in Redis, and brought from there or from the source.
//!
//! One task a symbol brings them, however many requests need some: they say which, and wait for a while. What nobody waits for comes after
//! what somebody does, the newest first. After a failure nothing is asked for, for a while that doubles.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::builder::Builder;
use super::columns::{Columns, Unfit};
use super::engine::{AskError, Engine, PATIENCE, note_change};
use super::kept::{SpanKey, StoredSpan};
use super::piece::Piece;
use super::symbol::{Filling, Symbol};
use super::unanswered::Unanswered;
use crate::api::orders::{Orders, Page, Span};
use crate::cache::entry::Checked;
use crate::cache::void::Moment;

/// More spans than this make no window.
pub const MOST_SPANS: i64 = 20_000;
/// Spans that are asked for at once.
const AT_ONCE: usize = 31;
/// Spans that requests wait for, of one symbol.
const MOST_URGENT: usize = 64;
/// Many spans of a symbol are asked for no more often than this.
const BETWEEN_FILLS: Duration = Duration::from_secs(60);
/// The pause after a failure, and after many in a row.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What takes longer is given up.
const LONGEST: Duration = Duration::from_secs(600);
/// How often the source is asked what was before the oldest order that is known, until that is nothing.
const STEPS_BACK: usize = 16;

impl<S: Orders> Engine<S> {
    /// Keeps a span that is over, also in Redis.
    pub(super) fn keep_span(&self, symbol: &Symbol, start: i64, span: StoredSpan) {
        let span = Arc::new(span);
        self.spans.insert(SpanKey { symbol: Arc::clone(&symbol.name), start }, Arc::clone(&span));
        if let Some(shared) = &self.shared {
            let (shared, name, tags) = (shared.clone(), Arc::clone(&symbol.name), symbol.tags().to_vec());
            self.runtime.spawn(async move { shared.put(&name, start, tags, &span).await });
        }
    }

    /// The orders of a span that is over, if they are in memory.
    #[must_use]
    pub fn stored(&self, symbol: &Symbol, start: i64) -> Option<Arc<StoredSpan>> {
        let key = SpanKey { symbol: Arc::clone(&symbol.name), start };
        let span = self.spans.get(&key)?;
        if self.is_void(symbol, Piece::Span(start), span.asked_at, &span.checked) {
            self.spans.remove(&key);
            return None;
        }
        Some(span)
    }

    /// The first moment before which a symbol has no orders, if that is known.
    #[must_use]
    pub fn oldest(&self, symbol: &Symbol) -> Option<i64> {
        let first = symbol.first()?;
        (!self.is_void(symbol, Piece::Derived, first.asked_at, &first.checked)).then_some(first.moment)
    }

    /// Waits for a few spans that are over to be known.
    ///
    /// # Errors
    /// Why they are not.
    pub async fn fill_few(self: &Arc<Self>, symbol: &Arc<Symbol>, starts: &[i64]) -> Result<(), Unanswered> {
        self.bring(symbol, starts, Instant::now() + PATIENCE).await
    }

    /// Waits for spans that are over to be known, until a moment.
    ///
    /// # Errors
    /// Why they are not.
    pub(super) async fn bring(self: &Arc<Self>, symbol: &Arc<Symbol>, starts: &[i64], until: Instant) -> Result<(), Unanswered> {
        let mut fills = symbol.fills.subscribe();
        {
            let mut filling = symbol.filling();
            if filling.is_paused() {
                return Err(Unanswered::SpansFailing);
            }
            if filling.urgent.len() > MOST_URGENT {
                return Err(Unanswered::SpansMissing);
            }
            filling.urgent.extend(starts);
            self.begin_filling(symbol, &mut filling);
        }
        loop {
            fills.mark_unchanged();
            if starts.iter().all(|&start| self.stored(symbol, start).is_some()) {
                return Ok(());
            }
            if symbol.filling().is_paused() {
                return Err(Unanswered::SpansFailing);
            }
            if timeout_at(until, fills.changed()).await.is_err() {
                return Err(Unanswered::SpansMissing);
            }
        }
    }

    /// Has the spans of a window asked for in the background, and says why they are not there.
    pub fn fill_many(self: &Arc<Self>, symbol: &Arc<Symbol>, span: Span, tail_start: i64) -> Unanswered {
        let mut filling = symbol.filling();
        let now = Instant::now();
        if filling.is_paused() {
            return Unanswered::SpansFailing;
        }
        // What was brought then may have been voided since.
        let is_soon = |(at, asked_at): (Instant, Moment)| {
            now < at + BETWEEN_FILLS && !self.is_void(symbol, Piece::Derived, asked_at, &Checked::default())
        };
        if !filling.asked.is_some_and(is_soon) {
            (filling.asked, filling.window) = (Some((now, self.cache.ask())), Some((span, tail_start)));
            self.begin_filling(symbol, &mut filling);
        }
        Unanswered::SpansMissing
    }

    fn begin_filling(self: &Arc<Self>, symbol: &Arc<Symbol>, filling: &mut Filling) {
        if !std::mem::replace(&mut filling.is_active, true) {
            drop(self.runtime.spawn(Arc::clone(self).fill_all(Arc::clone(symbol))));
        }
    }

    /// Brings all that is wanted of a symbol, until there is no more or something fails.
    async fn fill_all(self: Arc<Self>, symbol: Arc<Symbol>) {
        let mut active = Active { symbol: &symbol, is_done: false };
        loop {
            let next = symbol.filling().next();
            let filled = match next {
                Some(Wanted::Spans(starts, is_urgent)) => self.fill(&symbol, starts, is_urgent).await,
                Some(Wanted::Window(span, tail_start)) => self.find_spans(&symbol, span, tail_start).await,
                None => {
                    active.is_done = true;
                    return;
                }
            };
            let mut filling = symbol.filling();
            match filled {
                Ok(()) => filling.failures = 0,
                Err(error) => {
                    // That the source is spared is no failure of this symbol's.
                    filling.failures = filling.failures.saturating_add(u32::from(!matches!(error, AskError::Spared)));
                    let pause = PAUSE.saturating_mul(1 << filling.failures.saturating_sub(1).min(6)).min(LONGEST_PAUSE);
                    filling.paused_until = Some(Instant::now() + pause);
                    filling.clear();
                    if is_of_source(&error) {
                        // A window that is asked for after the pause is looked for again.
                        filling.asked = None;
                    }
                    if !matches!(error, AskError::Spared) {
                        tracing::info!(symbol = %symbol.name, %error, "older orders could not all be brought into the timeline; requests for them go to the backend");
                    }
                }
            }
            drop(filling);
            symbol.fills.send_modify(|fills| *fills += 1);
            if symbol.is_evicted() {
                return;
            }
        }
    }

    /// Finds which spans a window needs.
    async fn find_spans(&self, symbol: &Symbol, span: Span, tail_start: i64) -> Result<(), AskError> {
        let oldest = self.find_oldest(symbol, tail_start).await?;
        let length = self.span();
        let first = span.start.div_euclid(length).saturating_mul(length).max(oldest);
        let starts = (0..MOST_SPANS).map_while(|n| Some(first + n * length).filter(|&start| start < tail_start && start <= span.end));
        let missing: Vec<i64> = starts.filter(|&start| self.stored(symbol, start).is_none()).collect();
        symbol.filling().wanted.extend(missing);
        Ok(())
    }

    /// Brings spans that are over into memory: from Redis, or else from the source.
    async fn fill(self: &Arc<Self>, symbol: &Arc<Symbol>, starts: Vec<i64>, is_urgent: bool) -> Result<(), AskError> {
        if !is_urgent && self.spans.bytes() > self.spans.capacity() / 10 * 9 {
            // More would only drive out what was just brought.
            return Err(AskError::TooMany);
        }
        let mut missing: Vec<i64> = starts.into_iter().filter(|&start| self.stored(symbol, start).is_none()).collect();
        if let Some(shared) = &self.shared {
            let found = shared.get(&symbol.name, &symbol.tags(), &missing).await;
            for (start, span) in found {
                if !self.is_void(symbol, Piece::Span(start), span.asked_at, &span.checked) {
                    missing.retain(|&other| other != start);
                    self.spans.insert(SpanKey { symbol: Arc::clone(&symbol.name), start }, Arc::new(span));
                }
            }
        }
        let length = self.span();
        for run in missing.chunk_by(|one, next| one + length == *next) {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
            let filling = self.fill_run(symbol, Span { start: first, end: last + length - 1 });
            let filled = self.in_turn(is_urgent, filling).await;
            self.metrics.timeline_fetches.with_label_values(&["spans", if filled.is_ok() { "answered" } else { "failed" }]).inc();
            filled?;
        }
        Ok(())
    }

    /// Asks the source something about the past, once it is its turn.
    async fn in_turn<T>(&self, is_urgent: bool, asking: impl Future<Output = Result<T, AskError>>) -> Result<T, AskError> {
        let turn = self.turns.take(is_urgent).await.ok_or(AskError::Spared)?;
        let asked = timeout(LONGEST, asking).await.unwrap_or(Err(AskError::Late(LONGEST)));
        note_change("older orders", turn.end(asked.as_ref().is_err_and(is_of_source)));
        asked
    }

    /// Asks the source for adjoining spans, as one stream.
    async fn fill_run(self: &Arc<Self>, symbol: &Arc<Symbol>, span: Span) -> Result<(), AskError> {
        let asked_at = self.cache.ask();
        let length = self.span();
        let mut batches = self.past.stream(&symbol.name, span).await?;
        let mut found: Vec<(i64, Columns)> = Vec::new();
        let (mut open, mut weight) = (Builder::default(), 0);
        let mut start = span.end + 1 - length;
        while let Some(batch) = batches.next().await {
            for order in batch? {
                let time = order.order_trade_time.ok_or(Unfit::Disordered)?;
                if time < span.start || time > span.end || time >= start + length {
                    return Err(Unfit::Disordered.into());
                }
                while time < start {
                    let columns = std::mem::take(&mut open).finish();
                    weight += columns.weight();
                    found.push((start, columns));
                    start -= length;
                }
                if weight + open.weight() > self.spans.capacity() / 2 {
                    return Err(AskError::TooMany);
                }
                open.push(&order)?;
            }
        }
        while start >= span.start {
            found.push((start, std::mem::take(&mut open).finish()));
            start -= length;
        }
        if self.foreign {
            let columns: Vec<&Columns> = found.iter().rev().map(|(_, columns)| columns).collect();
            self.hold_against_sums(symbol, span, &columns).await?;
        }
        for (start, columns) in found {
            self.keep_span(symbol, start, StoredSpan { columns, asked_at, checked: Checked::default() });
        }
        Ok(())
    }

    /// Finds the span of a symbol's oldest order: by its sums, and by asking what is before.
    async fn find_oldest(&self, symbol: &Symbol, tail_start: i64) -> Result<i64, AskError> {
        match self.oldest(symbol) {
            Some(oldest) => Ok(oldest),
            None => self.in_turn(false, self.ask_for_oldest(symbol, tail_start)).await,
        }
    }

    async fn ask_for_oldest(&self, symbol: &Symbol, tail_start: i64) -> Result<i64, AskError> {
        let (asked_at, length) = (self.cache.ask(), self.span());
        let past = Span { start: 0, end: tail_start - 1 };
        let sums = if past.end < 0 { Vec::new() } else { self.past.buckets(&symbol.name, past, length).await? };
        let mut oldest = sums.first().map_or(tail_start, |bucket| bucket.timestamp);
        for _ in 0..STEPS_BACK {
            let before = Span { start: 0, end: oldest - 1 };
            let found = if before.end < 0 { Vec::new() } else { self.past.page(&symbol.name, before, Page { offset: 0, size: 1 }).await? };
            match found.first().and_then(|order| order.order_trade_time) {
                Some(time) => oldest = time.div_euclid(length) * length,
                None => {
                    symbol.note_oldest(oldest, asked_at);
                    return Ok(oldest);
                }
            }
        }
        Err(AskError::TooMany)
    }
}

/// Whether the source did not answer, whatever was asked.
const fn is_of_source(error: &AskError) -> bool {
    matches!(error, AskError::Source(_) | AskError::Late(_) | AskError::Spared)
}

/// What is brought next.
enum Wanted {
    /// These spans, in order; whether a request waits for them.
    Spans(Vec<i64>, bool),
    /// What a window needs, where the newest part begins at a moment.
    Window(Span, i64),
}

impl Filling {
    /// Takes what is to be brought next; `None`: nothing is, and the task ends.
    fn next(&mut self) -> Option<Wanted> {
        for (starts, is_urgent) in [(&mut self.urgent, true), (&mut self.wanted, false)] {
            // Newest first: those are asked for most.
            let mut next: Vec<i64> = std::iter::from_fn(|| starts.pop_last()).take(AT_ONCE).collect();
            if !next.is_empty() {
                next.reverse();
                return Some(Wanted::Spans(next, is_urgent));
            }
        }
        if let Some((span, tail_start)) = self.window.take() {
            return Some(Wanted::Window(span, tail_start));
        }
        self.is_active = false;
        None
    }

    /// Whether nothing is asked for, after a failure.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused_until.is_some_and(|until| Instant::now() < until)
    }

    fn clear(&mut self) {
        self.urgent.clear();
        self.wanted.clear();
        self.window = None;
    }
}

/// The task that brings spans, whatever ends it.
struct Active<'s> {
    symbol: &'s Symbol,
    /// Nothing was left; another task may be at what came since.
    is_done: bool,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            let mut filling = self.symbol.filling();
            filling.is_active = false;
            filling.clear();
        }
        self.symbol.fills.send_modify(|fills| *fills += 1);
    }
}
