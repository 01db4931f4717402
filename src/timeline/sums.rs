//! Comparing sums and counts of orders that are settled with those that the database adds up, where the API is answered here: there is nobody
//! else's answer to compare with, and an order may come too late, change or go all the same.

use std::sync::Arc;

use super::amounts::Sums;
use super::check;
use super::engine::Engine;
use super::symbol::Symbol;
use super::tail::moment;
use super::verify::Found;
use crate::api::orders::{Orders, OrdersError, Span};
use crate::request::target::Target;
use crate::request::timestamp;

/// A part of a symbol's orders.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// A span that is over.
    Over(Span),
    /// What is settled of the newest part, up to a moment.
    Settled(Span),
}

impl Part {
    /// One that the answer to a request was made of, by chance. `None`: nothing that it was made of is known and settled.
    pub fn choose<S: Orders>(engine: &Arc<Engine<S>>, symbol: &Symbol, target: &str) -> Option<Self> {
        let tail = engine.known_tail(symbol)?;
        let target = Target::parse(target).ok()?;
        let time = |name: &str| target.text(name).and_then(|text| timestamp::parse(&text));
        let asked = Span { start: time("start_timestamp").unwrap_or(tail.start), end: time("end_timestamp").unwrap_or(i64::MAX) };
        let known_at = moment(tail.asked_at);
        let settled = tail.newest_until(known_at).unwrap_or(known_at).saturating_sub(engine.settle());
        let newest = Span { start: tail.start, end: settled };
        let newest = (asked.end >= tail.start && newest.start <= newest.end).then_some(Self::Settled(newest));
        let spans = engine.starts_in_memory(symbol, asked);
        let over = spans
            .into_iter()
            .filter_map(|start| engine.over(symbol, start))
            .map(|(from, to)| Self::Over(Span { start: from, end: to - 1 }));
        let parts: Vec<Self> = newest.into_iter().chain(over).collect();
        parts.get(fastrand::usize(..parts.len().max(1))).copied()
    }

    /// Its orders.
    #[must_use]
    pub const fn span(self) -> Span {
        match self {
            Self::Over(span) | Self::Settled(span) => span,
        }
    }

    /// Compares what is known of it with what the source says.
    pub async fn compare<S: Orders>(self, engine: &Arc<Engine<S>>, symbol: &Symbol) -> Found {
        match self {
            Self::Over(span) => match engine.stored(symbol, span.start) {
                Some(stored) => compare(engine, symbol, span, &stored.iter().map(|stretch| &*stretch.orders).collect::<Vec<_>>()).await,
                None => Found::Nothing,
            },
            Self::Settled(span) => match engine.known_tail(symbol) {
                Some(tail) if tail.start <= span.start => compare(engine, symbol, span, &tail.columns.sums().collect::<Vec<_>>()).await,
                _ => Found::Nothing,
            },
        }
    }
}

async fn compare<S: Orders>(engine: &Engine<S>, symbol: &Symbol, span: Span, sums: &[&Sums]) -> Found {
    // As many sums as a span has hours, if it is a day.
    let width = (engine.span() / 24).max(1);
    match ask(engine, symbol, span, sums, width).await {
        Ok(Ok(())) => Found::Equal { ties: false, nearly: false },
        Ok(Err(why)) => Found::Different { why },
        Err(_) => Found::Nothing,
    }
}

async fn ask<S: Orders>(
    engine: &Engine<S>,
    symbol: &Symbol,
    span: Span,
    sums: &[&Sums],
    width: i64,
) -> Result<Result<(), String>, OrdersError> {
    let own: usize = sums.iter().map(|sums| sums.count(span)).sum();
    let (own, said) = (own as u64, engine.past.count(&symbol.name, span).await?);
    if let Some(said) = said.filter(|&said| said != own) {
        return Ok(Err(format!("{own} orders are known from {} to {}, and the database counts {said}", span.start, span.end)));
    }
    let said = engine.past.buckets(&symbol.name, span, width).await?;
    Ok(check::sums(sums.iter().copied(), span, width, &said).map_err(|doubt| doubt.to_string()))
}
