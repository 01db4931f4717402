//! The newest parts of symbols: who is asked for them, when, and what a request gets of it.
//!
//! One task carries out the [`schedule`](super::schedule). Each question is a task of its own, and the only one about its symbol: requests wait
//! for it, and none of them can end it. Spans that are over come as [`fill`](super::fill) says.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::amounts::Sums;
use super::builder::Builder;
use super::check::{self, Doubt};
use super::columns::{BLOCK, Columns, Unfit};
use super::details::Details;
use super::judge::Judge;
use super::piece::Piece;
use super::room::Room;
use super::schedule::{Ended, Next, Schedule};
use super::shared::Shared;
use super::spans::Spans;
use super::symbol::{Symbol, Symbols};
use super::tail::{FAR, MOST_RECENT, Tail, first_moment_by, moment};
use super::turns::{Change, Turns};
use super::unanswered::Unanswered;
use super::verdict::Rules;
use crate::api::orders::{Orders, OrdersError, Span};
use crate::body::BoxError;
use crate::cache::entry::Checked;
use crate::cache::void::Moment;
use crate::cache::{Cache, Holder};
use crate::clock::{Wall, millis};
use crate::config::Timeline as Settings;
use crate::telemetry::metrics::Metrics;

/// A request waits so long for a question, if what is known may be served meanwhile, or for spans that are over.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// So many spans are asked for while a request waits. If more are missing, it does not wait.
pub(super) const FEW: usize = 3;
/// It waits so long if what is known is too old. Then the backend is asked.
const LONG_PATIENCE: Duration = Duration::from_secs(10);
/// A source is slow that takes longer for a question.
const SLOW: Duration = Duration::from_secs(1);
/// If more orders than this are to be expected since it was asked for, a newest part begins anew.
const MOST_AGAIN: usize = 8 * BLOCK;
/// Sums are asked for from up to so many milliseconds later on: another question than the last, so that no cache of the source answers it.
const MOVED: i64 = 60_000;
/// Symbols of which anything is known.
const SYMBOLS: usize = 4096;

/// What is known of all symbols, and where it comes from.
pub struct Engine<S> {
    pub(super) source: S,
    /// The same for spans that are over, where what these take is not to be missing for the newest orders.
    pub(super) past: S,
    pub(super) settings: Settings,
    /// Whether the source is another service, whose word is checked.
    pub(super) foreign: bool,
    symbols: Symbols,
    schedule: Mutex<Schedule>,
    /// What the schedule's moments count from.
    begun: Instant,
    /// Told when the schedule may say something else.
    changed: Arc<Notify>,
    /// What is over: what buckets need, and what lists and pages print, which is forgotten first.
    pub(super) spans: Spans<Sums>,
    pub(super) details: Spans<Details>,
    pub(super) shared: Option<Shared>,
    pub(super) cache: Arc<Cache>,
    /// Where answers are computed.
    pub room: Room,
    /// Whose turn it is to ask for orders of the past.
    pub(super) turns: Turns,
    /// What the checks found.
    pub judge: Judge,
    /// How long the last question took that was answered, of whichever symbol, in milliseconds.
    took: AtomicU64,
    pub(super) runtime: Handle,
    pub(super) metrics: Arc<Metrics>,
}

/// Where orders come from.
pub struct Source<S> {
    /// Asked about the newest ones.
    pub newest: S,
    /// Asked about those of the past, in long streams.
    pub past: S,
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

/// How late the newest part may be served.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// While it is being asked for: the rule's `stale_while_revalidate`.
    pub late: Duration,
    /// While the source fails: its `stale_if_error`.
    pub failing: Duration,
}

impl Allowed {
    /// Not at all.
    pub const NOTHING: Self = Self { late: Duration::ZERO, failing: Duration::ZERO };
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
    /// It took longer than this.
    Late(Duration),
}

impl std::fmt::Display for AskError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Source(error) => write!(f, "{error}"),
            Self::Unfit(Unfit::Disordered) => f.write_str("orders came out of order, or one without a time"),
            Self::Unfit(Unfit::TooDense) => f.write_str("more orders are of one millisecond than can be computed with"),
            Self::Unfit(Unfit::TooManyKinds) => f.write_str("the texts of its orders differ too much"),
            Self::Doubt(doubt) => write!(f, "{doubt}"),
            Self::TooMany => f.write_str("there are more orders than timeline.memory has room for"),
            Self::Spared => f.write_str("it failed a moment ago"),
            Self::Late(after) => write!(f, "it took longer than {after:?}"),
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

impl<S> Drop for Engine<S> {
    fn drop(&mut self) {
        // The task that carries the schedule out ends with it.
        self.changed.notify_one();
    }
}

impl<S: Orders> Holder for Engine<S> {
    fn drop_void(&self) {
        // What belongs to no symbol any more is checked once somebody asks for that again.
        for symbol in self.symbols.all() {
            drop((self.tail(&symbol), self.oldest(&symbol)));
            drop(self.known(&self.spans, &symbol, i64::MIN, i64::MAX));
            drop(self.known(&self.details, &symbol, i64::MIN, i64::MAX));
        }
    }
}

impl<S: Orders> Engine<S> {
    /// Over a source; if that is `foreign`, what it streams is held against its own sums. Questions run on `runtime`.
    ///
    /// # Errors
    /// Never, as long as the configuration was checked.
    pub fn new(
        Source { newest: source, past }: Source<S>,
        foreign: bool,
        settings: Settings,
        cache: Arc<Cache>,
        runtime: Handle,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, BoxError> {
        let engine = Arc::new(Self {
            source,
            past,
            foreign,
            symbols: Symbols::new(SYMBOLS, settings.memory / 4),
            schedule: Mutex::new(Schedule::new(settings.refresh, settings.questions)),
            begun: Instant::now(),
            changed: Arc::default(),
            spans: Spans::new(settings.memory / 2),
            details: Spans::new(settings.memory / 8),
            shared: Shared::new(&cache, settings.span),
            room: Room::new(settings.memory / 8),
            turns: Turns::new(settings.concurrency),
            judge: Judge::new(Rules::of(&settings, foreign), Arc::clone(&metrics)),
            took: AtomicU64::new(0),
            settings,
            cache,
            runtime,
            metrics,
        });
        let swept: Weak<dyn Holder> = Arc::downgrade(&engine) as Weak<dyn Holder>;
        engine.cache.sweep_too(swept);
        engine.runtime.spawn(carry_out(Arc::downgrade(&engine), Arc::clone(&engine.changed)));
        Ok(engine)
    }

    /// The symbol of this name, in upper case, if anything is known of it.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<Arc<Symbol>> {
        self.symbols.get(name)
    }

    /// The same, made if it is new.
    pub fn symbol_or_new(&self, name: &str, tags: impl FnOnce() -> Vec<String>) -> Arc<Symbol> {
        let (symbol, evicted) = self.symbols.get_or_make(name, tags);
        self.forget(&evicted);
        symbol
    }

    /// The tags of each symbol are made anew.
    pub fn follow(&self, tags: impl Fn(&str) -> Vec<String>) {
        self.symbols.follow(tags);
    }

    fn forget(&self, evicted: &[Arc<Symbol>]) {
        if !evicted.is_empty() {
            let mut schedule = self.schedule();
            evicted.iter().for_each(|symbol| schedule.forget(symbol.number));
        }
    }

    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// How things stand, for reports.
    #[must_use]
    pub fn size(&self) -> Size {
        let (symbols, newest_parts, newest_bytes) = self.symbols.size();
        let (questions, behind) = {
            let schedule = self.schedule();
            (schedule.asking(), schedule.behind(self.now()))
        };
        let bytes = self.spans.bytes() + self.details.bytes() + newest_bytes;
        Size { symbols, newest_parts, spans: self.spans.count(), bytes, questions, behind }
    }

    /// How the schedule has a symbol.
    #[must_use]
    pub fn standing(&self, symbol: &Symbol) -> Standing {
        let (is_wanted, due, failures) = self.schedule().standing(symbol.number);
        Standing { is_wanted, next_in: due.map(|due| due.saturating_sub(self.now())), failures }
    }

    /// All symbols of which anything is known.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Symbol>> {
        self.symbols.all()
    }

    /// The length of a span, in milliseconds.
    #[must_use]
    pub fn span(&self) -> i64 {
        whole_millis(self.settings.span)
    }

    pub(super) fn settle(&self) -> i64 {
        whole_millis(self.settings.settle)
    }

    /// The newest part as it is known; `None` if it is not, in which case it is being asked for.
    pub fn known_tail(&self, symbol: &Symbol) -> Option<Arc<Tail>> {
        self.want(symbol);
        self.tail(symbol)
    }

    /// Has the newest part asked for once it is due.
    pub fn want(&self, symbol: &Symbol) {
        if symbol.is_wanted_anew() && !symbol.is_evicted() && self.schedule().want(self.now(), symbol.number) {
            self.changed.notify_one();
        }
    }

    /// The newest part, unless it was purged.
    fn tail(&self, symbol: &Symbol) -> Option<Arc<Tail>> {
        let tail = symbol.tail()?;
        if self.is_void(symbol, Piece::Newest, tail.oldest_asked, &tail.checked) {
            self.symbols.remove_tail(symbol, &tail);
            return None;
        }
        Some(tail)
    }

    /// The newest void that is forgotten: what is found not to be void from now on was checked against it.
    pub(super) fn forgotten(&self) -> Moment {
        self.cache.voids().forgotten()
    }

    /// Whether a piece that was asked for at `asked_at` is void: it was purged since, or a check found it wrong.
    pub(super) fn is_void(&self, symbol: &Symbol, piece: Piece, asked_at: Moment, checked: &Checked) -> bool {
        let target = || piece.target(&symbol.name, self.span());
        self.cache.voids().is_void(asked_at, checked, target, |selection| symbol.is_concerned(selection))
    }

    /// Whether a newest part is as new as a request of this moment can expect: no older than `refresh`, and the time that a question takes, as
    /// long as that is no longer.
    #[must_use]
    pub fn is_new(&self, symbol: &Symbol, tail: &Tail, at: Instant) -> bool {
        at.saturating_duration_since(tail.asked) < self.settings.refresh + symbol.took().min(self.settings.refresh)
    }

    /// Whether an answer that needs the newest part can be given without asking anything.
    #[must_use]
    pub fn has_new_tail(&self, symbol: &Symbol) -> bool {
        self.tail(symbol).is_some_and(|tail| self.is_new(symbol, &tail, Instant::now()))
    }

    /// How long ago the newest part in memory was asked for.
    #[must_use]
    pub fn age(&self, symbol: &Symbol) -> Option<Duration> {
        self.tail(symbol).map(|tail| tail.asked.elapsed())
    }

    fn is_sparing(&self) -> bool {
        self.schedule().is_sparing(self.now())
    }

    /// Whether the source fails and is asked by one question at a time: for the newest orders, and for those of the past.
    #[must_use]
    pub fn spared(&self) -> (bool, bool) {
        (self.is_sparing(), self.turns.are_sparing())
    }

    /// Whether the source takes longer than a client that asks again in a moment, or fails.
    #[must_use]
    pub fn is_slow(&self) -> bool {
        self.took.load(Ordering::Relaxed) > millis(SLOW) || self.is_sparing()
    }

    /// Why a request that lacks `missing` spans would not be answered at this moment, as far as that is known without asking anything.
    #[must_use]
    pub fn foresee(&self, symbol: &Symbol, missing: i64) -> Option<Unanswered> {
        if self.tail(symbol).is_none() {
            return Some(symbol.why_missing());
        }
        let is_paused = missing > 0 && symbol.filling().is_paused();
        let are_many = usize::try_from(missing).is_ok_and(|missing| missing > FEW);
        if is_paused { Some(Unanswered::SpansFailing) } else { are_many.then_some(Unanswered::SpansMissing) }
    }

    /// The newest part as new as it can be had, how new that is, and whether it was waited for.
    ///
    /// # Errors
    /// It is older than is allowed, or was purged meanwhile.
    pub async fn new_tail(&self, symbol: &Symbol, allowed: Allowed) -> Result<(Arc<Tail>, Newness, bool), Unanswered> {
        let began = Instant::now();
        let mut ended = symbol.questions.subscribe();
        let mut waited = false;
        loop {
            // Before the look at what there is, so that none that ends after it is missed.
            ended.mark_unchanged();
            let tail = self.tail(symbol).ok_or(Unanswered::NewestMissing)?;
            if self.is_new(symbol, &tail, began) {
                return Ok((tail, Newness::Fresh, waited));
            }
            self.want(symbol);
            let late = tail.asked.elapsed().saturating_sub(self.settings.refresh);
            let is_allowed = late <= allowed.late;
            if self.is_failing(symbol) {
                // It pauses after that, or waits for others: nothing comes soon.
                let allowed = (late <= allowed.failing).then_some((tail, Newness::Failing(late), waited));
                return allowed.ok_or(Unanswered::NewestFailing);
            }
            if symbol.failed() == Some(Ended::Unfit) {
                // The backend is well, and knows what cannot be read here.
                return is_allowed.then_some((tail, Newness::Late(late), waited)).ok_or(Unanswered::NewestUnfit);
            }
            let asking = symbol.asking_since();
            let until = match asking {
                // One question that hangs does not hold up every request for as long as it hangs.
                _ if is_allowed => asking.unwrap_or(began) + PATIENCE,
                Some(since) => (began + LONG_PATIENCE).min(since + hangs_after(symbol)),
                None => began + LONG_PATIENCE,
            };
            // Nobody waits for a turn that is far away.
            let is_far = is_allowed && asking.is_none() && self.is_behind();
            waited |= !is_far;
            if (is_far || timeout_at(until, ended.changed()).await.is_err()) && (is_allowed || !self.is_failing(symbol)) {
                return is_allowed.then_some((tail, Newness::Late(late), waited)).ok_or(Unanswered::NewestLate);
            }
        }
    }

    /// Whether the source fails, or hangs for so long that it is taken to.
    fn is_failing(&self, symbol: &Symbol) -> bool {
        let hangs = match symbol.asking_since() {
            Some(since) => since.elapsed() >= hangs_after(symbol),
            // Others hang, and it waits for them.
            None => self.is_sparing(),
        };
        hangs || symbol.failed() == Some(Ended::Failed) || self.schedule().is_failing()
    }

    /// Whether symbols wait for their turn longer than a request does.
    fn is_behind(&self) -> bool {
        self.schedule().behind(self.now()) >= PATIENCE
    }

    /// Asks for the newest part of a symbol, and says to all what came of it.
    async fn ask(self: Arc<Self>, symbol: Arc<Symbol>) {
        let mut question = Question { engine: &self, symbol: &symbol, began: Instant::now(), ended: Ended::Failed };
        symbol.begin_question();
        let known = self.tail(&symbol);
        let asking = async {
            match &known {
                Some(tail) => self.ask_again(&symbol, tail).await,
                None => self.ask_first(&symbol).await,
            }
        };
        let patience = self.schedule().patience();
        let asked = timeout(patience, asking).await.unwrap_or(Err(AskError::Late(patience)));
        let kept = asked.and_then(|tail| self.keep_tail(&symbol, tail));
        self.metrics.timeline_fetches.with_label_values(&["newest", if kept.is_ok() { "answered" } else { "failed" }]).inc();
        question.ended = match &kept {
            Ok(()) => Ended::Answered,
            Err(AskError::Source(_) | AskError::Late(_) | AskError::Spared) => Ended::Failed,
            Err(AskError::Unfit(_) | AskError::Doubt(_) | AskError::TooMany) => Ended::Unfit,
        };
        if let Err(error) = &kept {
            tracing::warn!(symbol = %symbol.name, %error, "the newest orders could not be read; the timeline serves what it knows, or leaves requests to the backend");
        }
    }

    /// The newest part of which nothing is known.
    async fn ask_first(&self, symbol: &Symbol) -> Result<Tail, AskError> {
        // All three before the first question: what is purged or comes from then on may be missing in what the source says.
        let (asking, asked, asked_at) = (self.cache.ask(), Instant::now(), Wall::now());
        let latest = self.source.latest(&symbol.name, MOST_RECENT).await?;
        let start = first_moment_by(&latest, asked_at, self.span(), self.settle());
        let since = self.read(symbol, Span { start, end: FAR }).await?;
        if self.foreign {
            check::newest(&latest, start, &since).map_err(|doubt| self.doubt(symbol, doubt))?;
        }
        let tail = Tail::begin(start, &latest, since, (asked, asked_at), asking)?;
        if self.foreign {
            let settled = moment(asked_at).saturating_sub(self.settle());
            self.hold_against_sums(symbol, Span { start, end: settled }, &[&tail.columns]).await?;
        }
        Ok(tail)
    }

    /// The newest part once what may have changed of it is known anew.
    async fn ask_again(self: &Arc<Self>, symbol: &Arc<Symbol>, tail: &Tail) -> Result<Tail, AskError> {
        let (asked, asked_at) = (Instant::now(), Wall::now());
        let from = tail.asked_again_from(self.settle());
        let rested = asked_at.since(tail.asked_at);
        if tail.millis_of(MOST_AGAIN).is_some_and(|most| whole_millis(rested) > most) {
            // What came while it rested is better asked for by those who need it.
            self.keep_settled(symbol, tail, from);
            return self.ask_first(symbol).await;
        }
        let newer = self.read(symbol, Span { start: from, end: FAR }).await?;
        if tail.misses_some_in(from, &newer) {
            return self.ask_first(symbol).await;
        }
        Ok(tail.renewed(from, &newer, asked, asked_at))
    }

    /// Keeps a newest part, and what of it is over as spans of its own.
    fn keep_tail(self: &Arc<Self>, symbol: &Arc<Symbol>, tail: Tail) -> Result<(), AskError> {
        let start = tail.goes_on_from(self.span(), self.settle());
        self.keep_settled(symbol, &tail, start);
        let tail = Arc::new(if start > tail.start { tail.from(start)? } else { tail });
        let evicted = self.symbols.keep_tail(symbol, tail).ok_or(AskError::TooMany)?;
        self.forget(&evicted);
        Ok(())
    }

    /// Keeps the orders of a newest part before a moment as what is over, by day.
    fn keep_settled(self: &Arc<Self>, symbol: &Arc<Symbol>, tail: &Tail, to: i64) {
        let (mut from, span) = (tail.start, self.span());
        while from < to {
            let next = from.div_euclid(span).saturating_add(1).saturating_mul(span).min(to);
            self.keep_columns(symbol, (from, next), &tail.columns.part(from, next), tail);
            from = next;
        }
    }

    /// Holds what a foreign source streamed against the sums that it gives itself.
    pub(super) async fn hold_against_sums(&self, symbol: &Symbol, span: Span, columns: &[&Columns]) -> Result<(), AskError> {
        let span = Span { start: span.start.saturating_add(fastrand::i64(0..=MOVED)), ..span };
        if span.end < span.start || !columns.iter().all(|columns| columns.is_certain()) {
            return Ok(());
        }
        let said = self.source.buckets(&symbol.name, span, self.span()).await?;
        check::sums(columns.iter().flat_map(|columns| columns.sums()), span, self.span(), &said)
            .map_err(|doubt| self.doubt(symbol, doubt))?;
        self.judge.agree(&symbol.name);
        Ok(())
    }

    /// Counts a contradiction, and says so.
    fn doubt(&self, symbol: &Symbol, doubt: Doubt) -> AskError {
        self.metrics.timeline_doubts.inc();
        tracing::warn!(symbol = %symbol.name, %doubt, "what the backend streams is not what it says elsewhere");
        self.judge.doubt(&symbol.name, &doubt.to_string());
        doubt.into()
    }

    /// All orders of a span.
    async fn read(&self, symbol: &Symbol, span: Span) -> Result<Columns, AskError> {
        let mut batches = self.source.stream(&symbol.name, span).await?;
        let mut columns = Builder::default();
        while let Some(batch) = batches.next().await {
            for order in batch? {
                if order.order_trade_time.is_none_or(|time| time < span.start || time > span.end) {
                    return Err(Unfit::Disordered.into());
                }
                columns.push(&order)?;
            }
            if columns.weight() > self.settings.memory / 8 {
                return Err(AskError::TooMany);
            }
        }
        Ok(columns.finish()?)
    }
}

/// How much there is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Symbols of which anything is known.
    pub symbols: usize,
    /// Newest parts in memory.
    pub newest_parts: usize,
    /// Spans in memory.
    pub spans: usize,
    /// What all of them take, in bytes.
    pub bytes: u64,
    /// Questions that are under way.
    pub questions: usize,
    /// For how long the newest part that has waited longest has been due.
    pub behind: Duration,
}

/// How the schedule has a symbol.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Whether somebody has wanted its newest part since the last question about it began.
    pub is_wanted: bool,
    /// How soon it is due, if it is to be asked for; zero: it waits for its turn.
    pub next_in: Option<Duration>,
    /// Questions in a row that failed.
    pub failures: u32,
}

/// A question that is under way, whatever ends it.
struct Question<'e, S: Orders> {
    engine: &'e Engine<S>,
    symbol: &'e Symbol,
    began: Instant,
    ended: Ended,
}

impl<S: Orders> Drop for Question<'_, S> {
    fn drop(&mut self) {
        if self.ended == Ended::Answered {
            self.engine.took.store(millis(self.began.elapsed()), Ordering::Relaxed);
        }
        self.symbol.end_question(self.ended);
        let (now, mut schedule) = (self.engine.now(), self.engine.schedule());
        let was_spared = schedule.is_sparing(now);
        schedule.ended(now, self.symbol.number, self.ended);
        let is_spared = schedule.is_sparing(now);
        drop(schedule);
        match (was_spared, is_spared) {
            (false, true) => note_change("newest orders", Change::Spared),
            (true, false) => note_change("newest orders", Change::Back),
            _ => {}
        }
        self.engine.changed.notify_one();
    }
}

/// Carries the schedule out, as long as there is an engine.
async fn carry_out<S: Orders>(engine: Weak<Engine<S>>, changed: Arc<Notify>) {
    loop {
        let next = {
            let Some(engine) = engine.upgrade() else { return };
            let next = engine.schedule().next(engine.now());
            match next {
                Next::Ask(number) => {
                    match engine.symbols.numbered(number) {
                        Some(symbol) => drop(engine.runtime.spawn(Arc::clone(&engine).ask(symbol))),
                        // It was evicted just now.
                        None => {
                            let (now, mut schedule) = (engine.now(), engine.schedule());
                            schedule.ended(now, number, Ended::Unasked);
                            schedule.forget(number);
                        }
                    }
                    continue;
                }
                Next::At(at) => Some(engine.begun + at),
                Next::Wait => None,
            }
        };
        match next {
            Some(at) => {
                tokio::select! {
                    () = sleep_until(at) => (),
                    () = changed.notified() => (),
                }
            }
            None => changed.notified().await,
        }
    }
}

/// Says that the source is spared, or is not any more.
pub(super) fn note_change(asked_for: &str, change: Change) {
    match change {
        Change::None => {}
        Change::Spared => tracing::warn!(asked_for, "the source of the timeline fails and is asked by one question at a time"),
        Change::Back => tracing::info!(asked_for, "the source of the timeline answers again"),
    }
}

/// A question about a symbol that takes so long hangs: as long as requests wait, or three times as long as the last one took.
fn hangs_after(symbol: &Symbol) -> Duration {
    LONG_PATIENCE.max(symbol.took().saturating_mul(3))
}

/// A duration in whole milliseconds.
pub(super) fn whole_millis(span: Duration) -> i64 {
    i64::try_from(millis(span)).unwrap_or(i64::MAX)
}
