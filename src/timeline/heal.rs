//! Checks, one at a time and in the background, and what follows from them: what differs is voided on every instance, fetched anew, and
//! compared again. [`trust`](super::trust) is the page that explains it.
//!
//! What is void is no more than what the check touched, and of a long window only the spans whose sums differ: a late order of today does not
//! make a year be read again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::check;
use super::endpoint::Endpoint;
use super::engine::Engine;
use super::piece::{self, Piece, part_key};
use super::sums::Part;
use super::symbol::{Symbol, Want};
use super::tail::{MOST_RECENT, Tail, moment};
use super::verdict::{Scope, Verdict};
use super::verify::{Found, Similar, Verifier, similar};
use crate::api::orders::{Orders, Span};
use crate::cache::key::Key;
use crate::cache::void::Selection;
use crate::clock::Wall;
use crate::telemetry::metrics::Metrics;

/// Both sides are asked so often before a difference counts: orders may have come late in between.
const TRIES: u32 = 4;
/// The same once the orders were fetched anew.
const TRIES_ANEW: u32 = 2;
/// Of more spans than this only those are void whose sums differ.
const FEW: usize = 8;
/// More spans than this are voided by one tag: all of the symbol.
const MOST: usize = 64;
/// What was voided is waited for so long.
const PATIENCE: Duration = Duration::from_secs(300);

/// Checks what is computed.
pub struct Checks {
    /// Compares answers with an existing service's; `None` where the API is answered here: there sums are compared with the database's.
    verifier: Option<Verifier>,
    is_checking: AtomicBool,
    told_of_digits: AtomicBool,
    metrics: Arc<Metrics>,
}

/// The right to check, until it is dropped.
pub struct Turn(Arc<Checks>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.is_checking.store(false, Ordering::Release);
    }
}

/// What is compared.
enum Subject {
    /// Answers to a request.
    Answers(Similar),
    /// Sums of a part.
    Sums(Part),
}

impl Checks {
    /// By comparing answers with a service's, or sums with the source's own.
    #[must_use]
    pub fn new(verifier: Option<Verifier>, metrics: Arc<Metrics>) -> Arc<Self> {
        let (is_checking, told_of_digits) = Default::default();
        Arc::new(Self { verifier, is_checking, told_of_digits, metrics })
    }

    /// Whether answers are compared with an existing service's.
    #[must_use]
    pub const fn are_of_answers(&self) -> bool {
        self.verifier.is_some()
    }

    /// The turn to check; `None` if a check is under way.
    #[must_use]
    pub fn take_turn(self: &Arc<Self>) -> Option<Turn> {
        (!self.is_checking.swap(true, Ordering::AcqRel)).then(|| Turn(Arc::clone(self)))
    }
}

impl Turn {
    /// Checks what is known of a symbol, like what a client asked for with `target`.
    pub async fn check<S: Orders>(self, engine: Arc<Engine<S>>, symbol: Arc<Symbol>, endpoint: Endpoint, target: String) {
        let (checks, judge) = (&self.0, &engine.judge);
        let scope = if checks.are_of_answers() { Scope::One(endpoint) } else { Scope::All };
        let subject = match checks.are_of_answers() {
            true => similar(&engine, &symbol, endpoint, &target).map(Subject::Answers),
            false => Part::choose(&engine, &symbol, &target).map(Subject::Sums),
        };
        let Some(subject) = subject else {
            checks.count(endpoint, &Found::Nothing);
            judge.conclude(&symbol.name, scope, Verdict::Unanswered, "");
            return;
        };
        let began = Instant::now();
        let mut found = checks.compare(&engine, &symbol, endpoint, &subject, TRIES).await;
        // The database rests for as long as it was busy.
        let rest = if checks.are_of_answers() { Duration::ZERO } else { began.elapsed() };
        let mut differed = String::new();
        if let Found::Different { why } = &found {
            differed.clone_from(why);
            judge.suspect(&symbol.name, scope, why);
            found = match engine.renew(&symbol, subject.span(&engine, &symbol)).await {
                true => checks.compare(&engine, &symbol, endpoint, &subject, TRIES_ANEW).await,
                false => Found::Nothing,
            };
        }
        let verdict = match found {
            Found::Equal { ties, nearly } => {
                symbol.note_verified();
                checks.tell_of_digits(nearly);
                Verdict::Equal { ties }
            }
            Found::Different { why } => {
                differed = why;
                Verdict::Different
            }
            Found::Nothing => Verdict::Unanswered,
        };
        judge.conclude(&symbol.name, scope, verdict, &differed);
        sleep(rest).await;
    }
}

impl Checks {
    async fn compare<S: Orders>(
        &self,
        engine: &Arc<Engine<S>>,
        symbol: &Arc<Symbol>,
        endpoint: Endpoint,
        subject: &Subject,
        tries: u32,
    ) -> Found {
        let found = match (subject, &self.verifier) {
            (Subject::Answers(similar), Some(verifier)) => verifier.compare(engine, symbol, endpoint, similar, tries).await,
            (Subject::Sums(part), _) => part.compare(engine, symbol).await,
            (Subject::Answers(_), None) => Found::Nothing,
        };
        self.count(endpoint, &found);
        found
    }

    fn count(&self, endpoint: Endpoint, found: &Found) {
        let result = match found {
            Found::Equal { .. } => "equal",
            Found::Different { .. } => "different",
            Found::Nothing => "unanswered",
        };
        let of = if self.are_of_answers() { endpoint.name() } else { "sums" };
        self.metrics.timeline_checks.with_label_values(&[of, result]).inc();
    }

    fn tell_of_digits(&self, nearly: bool) {
        if nearly && !self.told_of_digits.swap(true, Ordering::AcqRel) {
            tracing::info!(
                "sums of the timeline and of the backend differ in their last digits; so they do where the table holds DOUBLE, since they depend on the order of addition"
            );
        }
    }
}

impl Subject {
    /// The orders that are compared.
    fn span<S: Orders>(&self, engine: &Arc<Engine<S>>, symbol: &Symbol) -> Span {
        match self {
            Self::Answers(similar) => {
                let listed = engine.known_tail(symbol).and_then(|tail| tail.latest(MOST_RECENT).last()?.order_trade_time);
                similar.span(listed.unwrap_or(i64::MAX))
            }
            Self::Sums(part) => part.span(),
        }
    }
}

impl<S: Orders> Engine<S> {
    /// Voids what is known of a span, on every instance, and has it fetched anew. Whether it was.
    async fn renew(self: &Arc<Self>, symbol: &Arc<Symbol>, span: Span) -> bool {
        let tail = self.known_tail(symbol);
        let tail_start = tail.as_ref().map_or(i64::MAX, |tail| tail.start);
        let touches_tail = span.end >= tail_start;
        let mut starts = self.starts_in_memory(symbol, span);
        if starts.len() > FEW {
            let differing = self.differing(symbol, &starts).await;
            starts = if differing.is_empty() { starts } else { differing };
        }
        let fetched_anew = starts.clone();
        if touches_tail {
            // Of these spans too, which are cut from it once they are over.
            starts.extend((0..=MOST as i64).map(|n| tail_start + n * self.span()).take_while(|&start| start <= moment(Wall::now())));
        }
        if starts.len() > MOST {
            self.cache.purge(Selection::Tag(piece::tag(&symbol.name)), false).await;
            return false;
        }
        self.void(symbol, &starts, touches_tail);
        let until = Instant::now() + PATIENCE;
        (!touches_tail || self.tail_anew(symbol, until).await.is_some()) && self.bring_spans(symbol, &fetched_anew, until).await
    }

    /// Waits for spans that are over to be known, until a moment. Whether they are.
    async fn bring_spans(self: &Arc<Self>, symbol: &Arc<Symbol>, starts: &[i64], until: Instant) -> bool {
        let stretches = starts.iter().filter_map(|&start| self.over(symbol, start));
        let wants: Vec<Want> = stretches.map(|(from, to)| Want { to, from, details: false }).collect();
        self.fill_until(symbol, &wants, until).await.is_ok()
    }

    /// The spans of which something is in memory that a span touches, oldest first.
    pub(super) fn starts_in_memory(&self, symbol: &Symbol, span: Span) -> Vec<i64> {
        let length = self.span();
        let first = span.start.div_euclid(length).saturating_mul(length);
        let (known, _) = self.known(&self.spans, symbol, first, span.end.saturating_add(1));
        let numbers = known.iter().flat_map(|stretch| stretch.from.div_euclid(length)..=(stretch.to - 1).div_euclid(length));
        let mut starts: Vec<i64> = numbers.map(|number| number * length).filter(|start| (first..=span.end).contains(start)).collect();
        starts.dedup();
        starts
    }

    /// Those of some spans whose sums are not what the source says.
    async fn differing(&self, symbol: &Symbol, starts: &[i64]) -> Vec<i64> {
        let (Some(&first), Some(&last), length) = (starts.first(), starts.last(), self.span()) else { return Vec::new() };
        let Some((_, to)) = self.over(symbol, last) else { return Vec::new() };
        let all = Span { start: first, end: to - 1 };
        let Ok(said) = self.past.buckets(&symbol.name, all, length).await else { return Vec::new() };
        let differs = |start: i64| {
            let Some(((start, to), stored)) = self.over(symbol, start).zip(self.stored(symbol, start)) else { return true };
            let said: Vec<_> = said.iter().filter(|bucket| bucket.timestamp == start).cloned().collect();
            check::sums(stored.iter().map(|stretch| &*stretch.orders), Span { start, end: to - 1 }, length, &said).is_err()
        };
        starts.iter().copied().filter(|&start| differs(start)).collect()
    }

    /// Voids spans, perhaps the newest part, and what was made of them: what was asked for before this moment is not used again.
    fn void(&self, symbol: &Symbol, starts: &[i64], newest: bool) {
        let (length, tags) = (self.span(), symbol.tags());
        let key = |piece: Piece| piece.key(&symbol.name, length, tags.to_vec());
        let mut keys: Vec<Key> = newest.then(|| key(Piece::Newest)).into_iter().collect();
        for &start in starts {
            // In Redis there is a part that ends with the span, and one for each of many blocks.
            let end = start + length;
            let parts =
                self.spans.within(&symbol.name, start, end).into_iter().map(|stretch| stretch.to).filter(|&to| to < end).chain([end]);
            keys.extend(parts.map(|to| part_key(&symbol.name, length, to, tags.to_vec())));
        }
        // Last: others hear of one after the other, and what they compute in between is not used once they hear of this.
        keys.push(key(Piece::Derived));
        // Others are told meanwhile.
        drop(self.cache.invalidate(keys));
        for &start in starts {
            drop(self.stored(symbol, start));
        }
    }

    /// Waits for the newest part to be known again.
    async fn tail_anew(&self, symbol: &Symbol, until: Instant) -> Option<Arc<Tail>> {
        let mut ended = symbol.questions.subscribe();
        loop {
            ended.mark_unchanged();
            if let Some(tail) = self.known_tail(symbol) {
                return Some(tail);
            }
            if symbol.is_evicted() {
                return None;
            }
            timeout_at(until, ended.changed()).await.ok()?.ok()?;
        }
    }
}

#[cfg(test)]
mod tests;
