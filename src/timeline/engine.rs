//! Gets orders from their source: the newest part of a symbol again and again while somebody asks, spans that are over once.
//!
//! Every fetch from the source is a task of its own, of which one a symbol runs at a time: however many wait for it, they wait
//! for the same one, and none of them can end it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::builder::Builder;
use super::check::{self, Doubt};
use super::columns::{Columns, Unfit};
use super::kept::{Kept, SpanKey, StoredSpan};
use super::series::Series;
use super::shared::Shared;
use super::tail::{FAR, MOST_RECENT, Tail, first_moment, moment};
use crate::api::orders::{Orders, OrdersError, Page, Span};
use crate::body::BoxError;
use crate::cache::Cache;
use crate::cache::entry::Checked;
use crate::cache::void::Moment;
use crate::clock::{Wall, millis};
use crate::config::Timeline as Settings;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::carry;

/// A request waits so long for a fetch; then it is answered from what is known, or goes to the
/// backend by itself.
const PATIENCE: Duration = Duration::from_secs(1);
/// So many spans are asked for while a request waits. If more are missing, it does not wait.
pub const FEW: usize = 3;
/// Days that are asked for at once in the background.
const AT_ONCE: usize = 31;
/// Many spans of a symbol are asked for no more often than this.
const BETWEEN_FILLS: Duration = Duration::from_secs(60);
/// More spans than this make no window.
pub const MOST_SPANS: i64 = 20_000;
/// A source that contradicts itself so often is not used any more: once may be an order that came in between.
const DOUBTS: u32 = 2;
/// How long a source is spared whose answer was nothing to compute with, besides the time between two fetches.
const SPARED: Duration = Duration::from_secs(60);
/// How often it is asked what was before the oldest order that is known, until that is nothing.
const STEPS_BACK: usize = 16;

/// What is known of all symbols, and where it comes from.
pub struct Engine<S> {
    source: S,
    settings: Settings,
    /// Whether the source is another service, whose word is checked.
    foreign: bool,
    tails: Kept<Arc<str>, Tail>,
    spans: Kept<SpanKey, StoredSpan>,
    shared: Option<Shared>,
    cache: Arc<Cache>,
    fills: Semaphore,
    doubts: AtomicU32,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

/// How new the newest part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Newness {
    /// It is new enough.
    Fresh,
    /// It should have been asked for again so long ago, and is being asked for.
    Late(Duration),
    /// It should have been asked for again so long ago, and the source fails.
    Failing(Duration),
}

/// Why a fetch brought nothing.
#[derive(Debug)]
pub enum AskError {
    /// The source did not answer it.
    Source(OrdersError),
    /// What it answered is nothing to compute with.
    Unfit(Unfit),
    /// What it answered contradicts what it says elsewhere.
    Doubt(Doubt),
    /// There is more than there is room for.
    TooMany,
    /// It failed a moment ago and is spared.
    Spared,
}

impl std::fmt::Display for AskError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Source(error) => write!(f, "{error}"),
            Self::Unfit(Unfit::Disordered) => f.write_str("orders came out of order, or one without a time"),
            Self::Unfit(Unfit::TooManyKinds) => f.write_str("the texts of its orders differ too much"),
            Self::Doubt(doubt) => write!(f, "{doubt}"),
            Self::TooMany => f.write_str("there are more orders than timeline.memory has room for"),
            Self::Spared => f.write_str("it failed a moment ago"),
        }
    }
}

impl std::error::Error for AskError {}

impl From<OrdersError> for AskError {
    fn from(error: OrdersError) -> Self {
        Self::Source(error)
    }
}

impl From<Unfit> for AskError {
    fn from(unfit: Unfit) -> Self {
        Self::Unfit(unfit)
    }
}

impl From<Doubt> for AskError {
    fn from(doubt: Doubt) -> Self {
        Self::Doubt(doubt)
    }
}

impl<S: Orders> Engine<S> {
    /// Over a source; if that is `foreign`, what it streams is held against its own sums. Fetches run on `runtime`.
    ///
    /// # Errors
    /// Never, as long as the configuration was checked.
    pub fn new(
        source: S,
        foreign: bool,
        settings: Settings,
        cache: Arc<Cache>,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, BoxError> {
        Ok(Arc::new(Self {
            source,
            foreign,
            tails: Kept::new(settings.memory / 4)?,
            spans: Kept::new(settings.memory / 8 * 5)?,
            shared: Shared::new(&cache, settings.span),
            fills: Semaphore::new(settings.concurrency),
            doubts: AtomicU32::new(0),
            settings,
            cache,
            runtime,
            metrics,
        }))
    }

    /// Bytes and count of the spans and newest parts in memory, for reports.
    #[must_use]
    pub fn size(&self) -> (u64, usize, usize) {
        (self.spans.bytes() + self.tails.bytes(), self.spans.count(), self.tails.count())
    }

    /// The length of a span, in milliseconds.
    #[must_use]
    pub fn span(&self) -> i64 {
        whole_millis(self.settings.span)
    }

    fn settle(&self) -> i64 {
        whole_millis(self.settings.settle)
    }

    /// The newest part as it is known; `None` if it is not, in which case it is being asked for.
    pub fn known_tail(self: &Arc<Self>, series: &Arc<Series>) -> Option<Arc<Tail>> {
        series.used.store(true, Ordering::Release);
        let tail = self.tail(series);
        if tail.is_none() {
            self.tend(series);
        }
        tail
    }

    /// The newest part, unless it was purged.
    fn tail(&self, series: &Series) -> Option<Arc<Tail>> {
        let tail = self.tails.get(&series.symbol)?;
        if self.is_purged(series, tail.oldest_asked, &tail.checked) {
            self.tails.remove(&series.symbol);
            return None;
        }
        Some(tail)
    }

    fn is_purged(&self, series: &Series, asked_at: Moment, checked: &Checked) -> bool {
        self.cache.voids().is_purged(asked_at, checked, |selection| series.is_concerned(selection))
    }

    fn is_new(&self, tail: &Tail) -> bool {
        tail.asked.elapsed() < self.settings.refresh
    }

    /// Whether a newest part need not be waited for: it is new, or whoever tends it is about to ask for a newer one.
    fn need_not_wait(&self, series: &Series, tail: &Tail) -> bool {
        let tended = || series.tended.load(Ordering::Acquire) && series.failed().is_none();
        self.is_new(tail) || (tail.asked.elapsed() < self.settings.refresh * 2 && tended())
    }

    /// Whether an answer that needs the newest part can be given without asking anything.
    #[must_use]
    pub fn has_new_tail(&self, series: &Series) -> bool {
        self.tail(series).is_some_and(|tail| self.need_not_wait(series, &tail))
    }

    /// How long ago the newest part in memory was asked for.
    #[must_use]
    pub fn age(&self, series: &Series) -> Option<Duration> {
        self.tail(series).map(|tail| tail.asked.elapsed())
    }

    /// Whether the source contradicted itself so often that nothing of it is used any more.
    #[must_use]
    pub fn is_doubted(&self) -> bool {
        self.doubts.load(Ordering::Acquire) >= DOUBTS
    }

    /// The newest part, new enough if that can be had, and whether it was waited for. `None`: it was purged meanwhile.
    pub async fn new_tail(self: &Arc<Self>, series: &Arc<Series>, tail: Arc<Tail>) -> Option<(Arc<Tail>, Newness, bool)> {
        let (now, refresh) = (Instant::now(), self.settings.refresh);
        if self.need_not_wait(series, &tail) {
            return Some((tail, Newness::Fresh, false));
        }
        self.tend(series);
        let engine = Arc::clone(self);
        let asked = self.runtime.spawn({
            let series = Arc::clone(series);
            carry(async move { engine.refresh(&series).await.is_ok() })
        });
        // One fetch that hangs does not hold up every request for as long as it hangs.
        let patience = series.asking_since().unwrap_or(now) + PATIENCE;
        let outcome = timeout_at(patience, asked).await;
        let tail = self.tail(series)?;
        let late = tail.asked.elapsed().saturating_sub(refresh);
        let newness = match outcome {
            Ok(Ok(true)) => Newness::Fresh,
            Ok(_) => Newness::Failing(late),
            Err(_) => Newness::Late(late),
        };
        Some((tail, newness, true))
    }

    /// Has the newest part asked for whenever it is due, for as long as somebody asks.
    fn tend(self: &Arc<Self>, series: &Arc<Series>) {
        if series.tended.swap(true, Ordering::AcqRel) {
            return;
        }
        let (engine, series) = (Arc::clone(self), Arc::clone(series));
        self.runtime.spawn(async move {
            loop {
                let due = engine.tails.get(&series.symbol).map(|tail| tail.asked + engine.settings.refresh);
                let spared = series.failed().map(|at| at + engine.settings.refresh);
                if let Some(due) = due.max(spared) {
                    sleep_until(due).await;
                }
                // Only a part that is known and that nobody uses is left alone.
                if !series.used.swap(false, Ordering::AcqRel) {
                    break;
                }
                // What failed is told where it happens.
                let _ = engine.refresh(&series).await;
            }
            series.tended.store(false, Ordering::Release);
        });
    }

    /// Asks for the newest part, unless others did just now.
    async fn refresh(self: &Arc<Self>, series: &Series) -> Result<(), AskError> {
        let _turn = series.refreshing.lock().await;
        let now = Instant::now();
        let known = self.tail(series);
        if known.as_ref().is_some_and(|tail| self.is_new(tail)) {
            return Ok(());
        }
        if series.failed().is_some_and(|at| now < at + self.settings.refresh) {
            return Err(AskError::Spared);
        }
        series.note_asking(Some(now));
        let asked = match &known {
            Some(tail) => self.ask_again(series, tail).await,
            None => self.ask_first(series).await,
        };
        series.note_asking(None);
        let kept = asked.and_then(|tail| self.keep_tail(series, known.as_ref(), tail));
        self.metrics.timeline_fetches.with_label_values(&["newest", if kept.is_ok() { "answered" } else { "failed" }]).inc();
        match &kept {
            Ok(()) => series.note_failed(None),
            Err(error) => {
                let spared = if matches!(error, AskError::Source(_)) { Duration::ZERO } else { SPARED };
                series.note_failed(Some(Instant::now() + spared));
                tracing::warn!(symbol = %series.symbol, %error, "the newest orders could not be read; the timeline serves what it knows, or leaves requests to the backend");
            }
        }
        kept
    }

    /// The newest part of which nothing is known.
    async fn ask_first(&self, series: &Series) -> Result<Tail, AskError> {
        let asking = self.cache.ask();
        let latest = self.source.latest(&series.symbol, MOST_RECENT).await?;
        let (asked, asked_at) = (Instant::now(), Wall::now());
        let newest = latest.first().and_then(|order| order.order_trade_time);
        let start = first_moment(newest, asked_at, self.span(), self.settle());
        let since = self.read(series, Span { start, end: FAR }).await?;
        if self.foreign {
            check::newest(&latest, start, &since).map_err(|doubt| self.doubt(series, doubt))?;
        }
        let tail = Tail::begin(start, &latest, since, (asked, asked_at), asking)?;
        if self.foreign {
            let settled = moment(asked_at).saturating_sub(self.settle());
            self.hold_against_sums(series, Span { start, end: settled }, &[&tail.columns]).await?;
        }
        Ok(tail)
    }

    /// The newest part once what may have changed of it is known anew.
    async fn ask_again(&self, series: &Series, tail: &Tail) -> Result<Tail, AskError> {
        let (asked, asked_at) = (Instant::now(), Wall::now());
        let from = tail.asked_again_from(self.settle());
        let newer = self.read(series, Span { start: from, end: FAR }).await?;
        if tail.misses_some_in(from, &newer) {
            return self.ask_first(series).await;
        }
        Ok(tail.renewed(from, &newer, asked, asked_at)?)
    }

    /// Keeps a newest part, and what of it is over as spans of its own.
    fn keep_tail(&self, series: &Series, known: Option<&Arc<Tail>>, tail: Tail) -> Result<(), AskError> {
        let span = self.span();
        let start = first_moment(tail.newest(), tail.asked_at, span, self.settle()).max(tail.start);
        let mut first = tail.start;
        while first < start {
            let columns = tail.columns.part(first, first + span);
            self.keep_span(series, first, StoredSpan { columns, asked_at: tail.oldest_asked, checked: tail.checked.clone() });
            first += span;
        }
        let tail = Arc::new(if start > tail.start { tail.from(start)? } else { tail });
        let unchanged = known.is_some_and(|known| Arc::ptr_eq(&known.columns, &tail.columns));
        self.tails.insert(Arc::clone(&series.symbol), tail);
        if !unchanged {
            series.note_change();
        }
        if self.tails.get(&series.symbol).is_none() {
            return Err(AskError::TooMany);
        }
        Ok(())
    }

    fn keep_span(&self, series: &Series, start: i64, span: StoredSpan) {
        let span = Arc::new(span);
        self.spans.insert(SpanKey { symbol: Arc::clone(&series.symbol), start }, Arc::clone(&span));
        if let Some(shared) = &self.shared {
            let (shared, symbol, tags) = (shared.clone(), Arc::clone(&series.symbol), series.tags.clone());
            self.runtime.spawn(async move { shared.put(&symbol, start, tags, &span).await });
        }
    }

    /// The orders of a span that is over, if they are in memory.
    #[must_use]
    pub fn stored(&self, series: &Series, start: i64) -> Option<Arc<StoredSpan>> {
        let key = SpanKey { symbol: Arc::clone(&series.symbol), start };
        let span = self.spans.get(&key)?;
        if self.is_purged(series, span.asked_at, &span.checked) {
            self.spans.remove(&key);
            return None;
        }
        Some(span)
    }

    /// The first moment before which a symbol has no orders, if that is known.
    #[must_use]
    pub fn oldest(&self, series: &Series) -> Option<i64> {
        let (oldest, asked_at) = series.oldest()?;
        (!self.is_purged(series, asked_at, &Checked::default())).then_some(oldest)
    }

    /// Waits for a few spans that are over to be known.
    pub async fn fill_few(self: &Arc<Self>, series: &Arc<Series>, starts: Vec<i64>) -> bool {
        let engine = Arc::clone(self);
        let filling = self.runtime.spawn({
            let series = Arc::clone(series);
            carry(async move { engine.fill(&series, starts).await.is_ok() })
        });
        matches!(timeout_at(Instant::now() + PATIENCE, filling).await, Ok(Ok(true)))
    }

    /// Has many spans that are over asked for in the background.
    pub fn fill_many(self: &Arc<Self>, series: &Arc<Series>, span: Span, tail_start: i64) {
        if !series.take_turn(Instant::now(), BETWEEN_FILLS) {
            return;
        }
        let (engine, series) = (Arc::clone(self), Arc::clone(series));
        self.runtime.spawn(async move {
            let filled = async {
                let oldest = engine.find_oldest(&series, tail_start).await?;
                let length = engine.span();
                let first = span.start.div_euclid(length).saturating_mul(length).max(oldest);
                let starts: Vec<i64> = (0..MOST_SPANS).map_while(|n| Some(first + n * length).filter(|&s| s < tail_start && s <= span.end)).collect();
                // Newest first: those are asked for most.
                for chunk in starts.rchunks(AT_ONCE) {
                    engine.fill(&series, chunk.to_vec()).await?;
                    if engine.spans.bytes() > engine.spans.capacity() / 10 * 9 {
                        // More would only drive out what was just brought.
                        return Err(AskError::TooMany);
                    }
                }
                Ok(())
            };
            if let Err(error) = filled.await {
                tracing::info!(symbol = %series.symbol, %error, "older orders could not all be brought into the timeline; requests for them go to the backend");
            }
        });
    }

    /// Brings spans that are over into memory: from Redis, or else from the source.
    async fn fill(self: &Arc<Self>, series: &Arc<Series>, starts: Vec<i64>) -> Result<(), AskError> {
        let _turn = series.filling.lock().await;
        let mut missing: Vec<i64> = starts.into_iter().filter(|&start| self.stored(series, start).is_none()).collect();
        if let Some(shared) = &self.shared {
            let found = shared.get(&series.symbol, &series.tags, &missing).await;
            for (start, span) in found {
                if !self.is_purged(series, span.asked_at, &span.checked) {
                    missing.retain(|&other| other != start);
                    self.spans.insert(SpanKey { symbol: Arc::clone(&series.symbol), start }, Arc::new(span));
                }
            }
        }
        let length = self.span();
        for run in missing.chunk_by(|one, next| one + length == *next) {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
            let filled = self.fill_run(series, Span { start: first, end: last + length - 1 }).await;
            self.metrics.timeline_fetches.with_label_values(&["spans", if filled.is_ok() { "answered" } else { "failed" }]).inc();
            filled?;
        }
        Ok(())
    }

    /// Asks the source for adjoining spans, as one stream.
    async fn fill_run(self: &Arc<Self>, series: &Arc<Series>, span: Span) -> Result<(), AskError> {
        let _permit = self.fills.acquire().await.map_err(|_| AskError::Spared)?;
        let asked_at = self.cache.ask();
        let length = self.span();
        let mut batches = self.source.stream(&series.symbol, span).await?;
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
            self.hold_against_sums(series, span, &columns).await?;
        }
        for (start, columns) in found {
            self.keep_span(series, start, StoredSpan { columns, asked_at, checked: Checked::default() });
        }
        Ok(())
    }

    /// Holds what a foreign source streamed against the sums that it gives itself.
    async fn hold_against_sums(&self, series: &Series, span: Span, columns: &[&Columns]) -> Result<(), AskError> {
        if span.end < span.start || !columns.iter().all(|columns| columns.is_certain()) {
            return Ok(());
        }
        let said = self.source.buckets(&series.symbol, span, self.span()).await?;
        check::sums(columns, span, self.span(), &said).map_err(|doubt| self.doubt(series, doubt))
    }

    /// Counts a contradiction, and says so.
    fn doubt(&self, series: &Series, doubt: Doubt) -> AskError {
        self.metrics.timeline_doubts.inc();
        let off = self.doubts.fetch_add(1, Ordering::AcqRel) + 1 >= DOUBTS;
        tracing::warn!(symbol = %series.symbol, %doubt, off, "what the backend streams is not what it says elsewhere");
        doubt.into()
    }

    /// All orders of a span.
    async fn read(&self, series: &Series, span: Span) -> Result<Columns, AskError> {
        let mut batches = self.source.stream(&series.symbol, span).await?;
        let mut columns = Builder::default();
        while let Some(batch) = batches.next().await {
            for order in batch? {
                if order.order_trade_time.is_none_or(|time| time < span.start || time > span.end) {
                    return Err(Unfit::Disordered.into());
                }
                columns.push(&order)?;
            }
            if columns.weight() > self.tails.capacity() / 2 {
                return Err(AskError::TooMany);
            }
        }
        Ok(columns.finish())
    }

    /// Finds the span of a symbol's oldest order: by its sums, and by asking what is before.
    async fn find_oldest(&self, series: &Series, tail_start: i64) -> Result<i64, AskError> {
        if let Some(oldest) = self.oldest(series) {
            return Ok(oldest);
        }
        let (asked_at, length) = (self.cache.ask(), self.span());
        let past = Span { start: 0, end: tail_start - 1 };
        let sums = if past.end < 0 { Vec::new() } else { self.source.buckets(&series.symbol, past, length).await? };
        let mut oldest = sums.first().map_or(tail_start, |bucket| bucket.timestamp);
        for _ in 0..STEPS_BACK {
            let before = Span { start: 0, end: oldest - 1 };
            let found =
                if before.end < 0 { Vec::new() } else { self.source.page(&series.symbol, before, Page { offset: 0, size: 1 }).await? };
            match found.first().and_then(|order| order.order_trade_time) {
                Some(time) => oldest = time.div_euclid(length) * length,
                None => {
                    series.note_oldest(oldest, asked_at);
                    return Ok(oldest);
                }
            }
        }
        Err(AskError::TooMany)
    }
}

/// A duration in whole milliseconds.
fn whole_millis(span: Duration) -> i64 {
    i64::try_from(millis(span)).unwrap_or(i64::MAX)
}
