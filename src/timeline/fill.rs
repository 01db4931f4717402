//! What is over and wanted: requests say what they need, and wait for a while; one task a symbol brings it, however many ask.
//!
//! What somebody waits for comes before what nobody does, the newest first. What came stays: what is interrupted goes on where it stopped.
//! After a failure nothing is asked for, for a while that doubles. Where it comes from says [`bring`](super::bring).

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::amounts::Sums;
use super::columns::BLOCK;
use super::engine::{AskError, Engine, PATIENCE, note_change};
use super::halves::Half;
use super::piece::Piece;
use super::spans::{Spans, Stretch, gaps};
use super::symbol::{Filling, Symbol, Want};
use super::unanswered::Unanswered;
use crate::api::orders::{Orders, Span};
use crate::cache::entry::Checked;
use crate::cache::void::Moment;

/// More spans than this make no window.
pub const MOST_SPANS: i64 = 20_000;
/// Stretches that requests wait for, of one symbol.
const MOST_URGENT: usize = 64;
/// Many spans of a symbol are asked for no more often than this.
const BETWEEN_FILLS: Duration = Duration::from_secs(60);
/// The pause after a failure, and after many in a row.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What takes longer is given up.
const LONGEST: Duration = Duration::from_secs(600);
/// As many orders as a question is to bring.
pub(super) const ORDERS: usize = 8 * BLOCK;
/// What the sums of an order take, in bytes.
const BYTES: u64 = 12;

/// Stretches, and the gaps between them.
type Known<V> = (Vec<Arc<Stretch<V>>>, Vec<(i64, i64)>);

impl<S: Orders> Engine<S> {
    /// The stretches of a symbol that reach into `from..to`, and what of it they do not cover; both oldest first. What is void is forgotten.
    #[must_use]
    pub(super) fn known<V: Half>(&self, spans: &Spans<V>, symbol: &Symbol, from: i64, to: i64) -> Known<V> {
        loop {
            let stretches = spans.within(&symbol.name, from, to);
            let mut all_are_valid = true;
            for stretch in &stretches {
                let void = self.void_spans(symbol, stretch);
                if !void.is_empty() {
                    all_are_valid = false;
                    self.keep_rest(spans, symbol, stretch, &void);
                }
            }
            if all_are_valid {
                let gaps = gaps(&stretches, from, to);
                return (stretches, gaps);
            }
        }
    }

    /// The first moments of the spans in which a stretch is void. Each is checked against the same voids.
    fn void_spans<V: Half>(&self, symbol: &Symbol, stretch: &Stretch<V>) -> Vec<i64> {
        let length = self.span();
        let first = stretch.from.div_euclid(length);
        let mut starts = (first..=(stretch.to - 1).div_euclid(length)).map(|number| number.saturating_mul(length));
        let checked = stretch.checked.clone();
        let is_void = |start: i64, checked: &Checked| self.is_void(symbol, Piece::Span(start), stretch.asked_at, checked);
        let mut void: Vec<i64> = starts.next().into_iter().filter(|&start| is_void(start, &checked)).collect();
        if void.is_empty() && checked.until() == stretch.checked.until() {
            // Nothing was voided since it was looked at last.
            return void;
        }
        void.extend(starts.filter(|&start| is_void(start, &stretch.checked.clone())));
        if void.is_empty() {
            stretch.checked.note(checked.until());
        }
        void
    }

    /// Keeps what is valid of a stretch that is void in some spans.
    fn keep_rest<V: Half>(&self, spans: &Spans<V>, symbol: &Symbol, stretch: &Arc<Stretch<V>>, void: &[i64]) {
        spans.remove(&symbol.name, stretch);
        let mut from = stretch.from;
        let ends = void.iter().copied().chain([stretch.to]);
        for end in ends {
            if from < end {
                let rest = Stretch::new((from, end), Arc::new(stretch.orders.cut(from, end)), stretch.asked_at, stretch.checked.clone());
                spans.insert(&symbol.name, rest);
            }
            from = end.saturating_add(self.span()).max(from);
        }
    }

    /// What of a span is over, from its first moment up to, and not including, its last; `None`: nothing is.
    #[must_use]
    pub(super) fn over(&self, symbol: &Symbol, start: i64) -> Option<(i64, i64)> {
        let to = start.saturating_add(self.span()).min(symbol.tail().map_or(i64::MAX, |tail| tail.start));
        (start < to).then_some((start, to))
    }

    /// The sums of what of a span is over, if they are in memory.
    #[must_use]
    pub(super) fn stored(&self, symbol: &Symbol, start: i64) -> Option<Vec<Arc<Stretch<Sums>>>> {
        let (from, to) = self.over(symbol, start)?;
        let (stretches, gaps) = self.known(&self.spans, symbol, from, to);
        gaps.is_empty().then_some(stretches)
    }

    /// Whether the sums of a span that is over are in memory.
    #[must_use]
    pub fn is_stored(&self, symbol: &Symbol, start: i64) -> bool {
        self.known(&self.spans, symbol, start, start.saturating_add(self.span())).1.is_empty()
    }

    /// The first moment before which a symbol has no orders, if that is known.
    #[must_use]
    pub fn oldest(&self, symbol: &Symbol) -> Option<i64> {
        let first = symbol.first()?;
        (!self.is_void(symbol, Piece::Derived, first.asked_at, &first.checked)).then_some(first.moment)
    }

    /// What of a want is not known, the newest of it.
    fn gap(&self, symbol: &Symbol, want: Want) -> Option<(i64, i64)> {
        let gaps = match want.details {
            true => self.known(&self.details, symbol, want.from, want.to).1,
            false => self.known(&self.spans, symbol, want.from, want.to).1,
        };
        gaps.last().copied()
    }

    /// Waits for a little of what is over to be known.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn fill_few(self: &Arc<Self>, symbol: &Arc<Symbol>, wants: &[Want]) -> Result<(), Unanswered> {
        self.fill_until(symbol, wants, Instant::now() + PATIENCE).await
    }

    /// Waits for what is over to be known, until a moment.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn fill_until(self: &Arc<Self>, symbol: &Arc<Symbol>, wants: &[Want], until: Instant) -> Result<(), Unanswered> {
        let mut fills = symbol.fills.subscribe();
        {
            let mut filling = symbol.filling();
            if filling.is_paused() || wants.iter().any(|want| filling.is_too_long(want.to - want.from)) {
                return Err(Unanswered::SpansFailing);
            }
            if filling.urgent.len() > MOST_URGENT {
                return Err(Unanswered::SpansMissing);
            }
            filling.urgent.extend(wants);
            self.begin_filling(symbol, &mut filling);
        }
        loop {
            fills.mark_unchanged();
            if wants.iter().all(|&want| self.gap(symbol, want).is_none()) {
                return Ok(());
            }
            let fails = {
                let filling = symbol.filling();
                filling.is_paused() || wants.iter().any(|want| filling.is_too_long(want.to - want.from))
            };
            if fails {
                return Err(Unanswered::SpansFailing);
            }
            if symbol.is_evicted() {
                return Err(Unanswered::SpansMissing);
            }
            if timeout_at(until, fills.changed()).await.is_err() {
                return Err(Unanswered::SpansMissing);
            }
        }
    }

    /// Has what a window needs asked for in the background, and says why it is not there.
    pub fn fill_many(self: &Arc<Self>, symbol: &Arc<Symbol>, span: Span, tail_start: i64) -> Unanswered {
        let mut filling = symbol.filling();
        let now = Instant::now();
        if filling.is_paused() || filling.is_too_long(span.end.saturating_sub(span.start)) {
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
                Some(Wanted::Stretch(want, is_urgent)) => self.fill(&symbol, want, is_urgent).await,
                Some(Wanted::Window(span, tail_start)) => self.find_missing(&symbol, span, tail_start).await,
                None => {
                    active.is_done = true;
                    return;
                }
            };
            let mut filling = symbol.filling();
            match filled {
                Ok(()) => filling.failures = 0,
                // Others may have room.
                Err(AskError::TooMany) => {
                    tracing::info!(symbol = %symbol.name, "older orders have no room in the timeline; requests for as many go to the backend");
                }
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

    /// Finds what a window needs that is not known.
    async fn find_missing(&self, symbol: &Symbol, span: Span, tail_start: i64) -> Result<(), AskError> {
        let (oldest, length) = (self.find_oldest(symbol, tail_start).await?, self.span());
        let from = (span.start.div_euclid(length) * length).max(oldest);
        let end = span.end.div_euclid(length).saturating_add(1).saturating_mul(length).min(tail_start);
        let to = end.min(from.saturating_add(MOST_SPANS.saturating_mul(length)));
        if from < to {
            symbol.filling().wanted.insert(Want { to, from, details: false });
        }
        Ok(())
    }

    /// Brings what is missing of a stretch, the newest first, piece by piece.
    async fn fill(self: &Arc<Self>, symbol: &Arc<Symbol>, mut want: Want, is_urgent: bool) -> Result<(), AskError> {
        while let Some((from, to)) = self.gap(symbol, want) {
            if !is_urgent {
                let mut filling = symbol.filling();
                if !filling.urgent.is_empty() {
                    filling.wanted.insert(Want { to, ..want });
                    return Ok(());
                }
            }
            self.has_room(symbol, to - from, is_urgent)?;
            // From here on backwards, so that it ends also where what came found no room.
            want.to = self.bring(symbol, (from, to), is_urgent).await?;
            symbol.fills.send_modify(|fills| *fills += 1);
            if symbol.is_evicted() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Asks the source something about the past, once it is its turn.
    pub(super) async fn in_turn<T>(&self, is_urgent: bool, asking: impl Future<Output = Result<T, AskError>>) -> Result<T, AskError> {
        let turn = self.turns.take(is_urgent).await.ok_or(AskError::Spared)?;
        let asked = timeout(LONGEST, asking).await.unwrap_or(Err(AskError::Late(LONGEST)));
        note_change("older orders", turn.end(asked.as_ref().is_err_and(is_of_source)));
        asked
    }

    /// Whether what would come would stay. More than that would only drive out what was just brought, to be read again.
    fn has_room(&self, symbol: &Symbol, millis: i64, is_urgent: bool) -> Result<(), AskError> {
        let (bytes, capacity) = (self.spans.bytes(), self.spans.capacity());
        let mut filling = symbol.filling();
        // Where memory is full, what is used least makes room for as much.
        let is_little = expected_bytes(millis, filling.found) <= capacity / 2;
        if is_little || (!is_urgent && bytes <= capacity / 10 * 9) {
            return Ok(());
        }
        if is_urgent {
            filling.too_long = Some((millis, Instant::now() + LONGEST_PAUSE));
        }
        // What the next question finds may be less.
        filling.found = None;
        Err(AskError::TooMany)
    }

    /// Finds the first moment of the span of a symbol's oldest order.
    async fn find_oldest(&self, symbol: &Symbol, tail_start: i64) -> Result<i64, AskError> {
        match self.oldest(symbol) {
            Some(oldest) => Ok(oldest),
            None => self.in_turn(false, self.ask_for_oldest(symbol, tail_start)).await,
        }
    }

    async fn ask_for_oldest(&self, symbol: &Symbol, tail_start: i64) -> Result<i64, AskError> {
        let (asked_at, length) = (self.cache.ask(), self.span());
        let first = if tail_start > 0 { self.past.first(&symbol.name, tail_start, length).await? } else { None };
        let oldest = first.map_or(tail_start, |time| time.div_euclid(length) * length);
        symbol.note_oldest(oldest, asked_at);
        Ok(oldest)
    }
}

/// What the sums of so much time may take, where the last question found so many orders in so much of it. Today says nothing of that: more
/// may come in a day than in a week before it.
fn expected_bytes(millis: i64, found: Option<(usize, i64)>) -> u64 {
    let Some((orders, found_in)) = found else { return 0 };
    let bytes = i128::from(millis).saturating_mul(orders as i128).saturating_mul(i128::from(BYTES)) / i128::from(found_in.max(1));
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Whether the source did not answer, whatever was asked.
const fn is_of_source(error: &AskError) -> bool {
    matches!(error, AskError::Source(_) | AskError::Late(_) | AskError::Spared)
}

/// What is brought next.
enum Wanted {
    /// This; whether a request waits for it.
    Stretch(Want, bool),
    /// What a window needs, where the newest part begins at a moment.
    Window(Span, i64),
}

impl Filling {
    /// Takes what is to be brought next; `None`: nothing is, and the task ends.
    fn next(&mut self) -> Option<Wanted> {
        // Newest first: those are asked for most.
        if let Some(want) = self.urgent.pop_last() {
            return Some(Wanted::Stretch(want, true));
        }
        if let Some(want) = self.wanted.pop_last() {
            return Some(Wanted::Stretch(want, false));
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

    /// Whether so much time, in milliseconds, had no room a moment ago.
    fn is_too_long(&self, millis: i64) -> bool {
        self.too_long.is_some_and(|(most, until)| millis >= most && Instant::now() < until)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_judged_by_what_was_found_in_the_past() {
        assert_eq!(expected_bytes(5 * 86_400_000, None), 0);
        assert_eq!(expected_bytes(1000, Some((10, 100))), 1200);
        assert_eq!(expected_bytes(i64::MAX, Some((usize::MAX, 0))), u64::MAX);
    }
}
