//! Where orders that are over come from: Redis, or else the source, in parts that are kept as they come.
//!
//! A part is all of a day's orders, or a block of them where a day has more. A question covers as much time as brings about
//! 130,000 orders: how much that is, is learnt from the newest orders and from what came. One that brings twice that is broken off.

use std::sync::Arc;

use super::builder::Builder;
use super::codec::Part;
use super::columns::{BLOCK, Block, Columns, Unfit};
use super::engine::{AskError, Engine};
use super::fill::ORDERS;
use super::halves::Half;
use super::piece::Piece;
use super::spans::{Spans, Stretch};
use super::symbol::Symbol;
use super::tail::Tail;
use crate::api::orders::{Order, Orders, Span};
use crate::cache::entry::Checked;
use crate::cache::void::Moment;

/// A question covers at least a minute, and at most so many spans.
const SHORTEST: i64 = 60_000;
const AT_ONCE: i64 = 31;
/// Neighbours that have no more orders than this together are made one: so small days share what a stretch takes besides its orders.
const SMALL: usize = BLOCK / 4;

impl<S: Orders> Engine<S> {
    /// Brings some of the end of `from..to` into memory, and says from where on all of it is there now.
    pub(super) async fn bring(self: &Arc<Self>, symbol: &Arc<Symbol>, (from, to): (i64, i64), is_urgent: bool) -> Result<i64, AskError> {
        if let Some(begin) = self.bring_from_redis(symbol, from, to).await {
            return Ok(begin);
        }
        let (length, reach) = (self.span(), self.reach(symbol));
        let mut begin = to.saturating_sub(reach).max(from);
        if reach >= length {
            begin = (begin.div_euclid(length) * length).max(from);
        }
        if self.shared.is_some() {
            // Days that Redis has are not asked for.
            let mut end = (to - 1).div_euclid(length) * length;
            while end > begin {
                if self.bring_from_redis(symbol, from, end).await.is_some() {
                    begin = end;
                }
                end -= length;
            }
        }
        self.ask_for(symbol, (begin, to), is_urgent).await
    }

    /// Brings the part that ends at `to` from Redis, and says where it begins, not before `from`.
    async fn bring_from_redis(&self, symbol: &Symbol, from: i64, to: i64) -> Option<i64> {
        let (mut part, asked_at) = self.shared.as_ref()?.get(&symbol.name, &symbol.tags(), to).await?;
        let checked = Checked::default();
        let span = Piece::Span((to - 1).div_euclid(self.span()) * self.span());
        if self.is_void(symbol, span, asked_at, &checked) {
            return None;
        }
        if part.from < from {
            part = Part { from, to, block: part.block.cut(from, to) };
        }
        // Checked was its last day alone.
        self.keep_part(symbol, &part, asked_at, &Checked::default());
        Some(part.from)
    }

    /// How much time a question may cover, in milliseconds.
    fn reach(&self, symbol: &Symbol) -> i64 {
        let mut filling = symbol.filling();
        if filling.reach == 0 {
            let longest = self.span().saturating_mul(AT_ONCE);
            let reach = symbol.tail().and_then(|tail| tail.millis_of(ORDERS));
            filling.reach = reach.unwrap_or(longest).clamp(SHORTEST, longest);
        }
        filling.reach
    }

    /// So many orders came in so much time: the next question may cover more, or less.
    fn learn_reach(&self, symbol: &Symbol, orders: usize, millis: i64) {
        let longest = self.span().saturating_mul(AT_ONCE);
        let mut filling = symbol.filling();
        filling.reach = match orders {
            _ if orders > ORDERS => millis / 2,
            _ if orders < ORDERS / 4 && millis >= filling.reach => filling.reach.saturating_mul(2),
            _ => filling.reach,
        };
        filling.reach = filling.reach.clamp(SHORTEST, longest);
    }

    /// Asks the source for `from..to`, once it is its turn, and says from where on it was kept.
    async fn ask_for(self: &Arc<Self>, symbol: &Arc<Symbol>, (from, to): (i64, i64), is_urgent: bool) -> Result<i64, AskError> {
        let (builder, parts) = Default::default();
        let mut coming = Coming { engine: self, symbol, asked_at: self.cache.ask(), from, to, builder, parts, fresh: 0, orders: 0 };
        let asked = self.in_turn(is_urgent, coming.read()).await;
        self.metrics.timeline_fetches.with_label_values(&["spans", if asked.is_ok() { "answered" } else { "failed" }]).inc();
        asked?;
        symbol.filling().found = Some((coming.orders, to - coming.to));
        self.learn_reach(symbol, coming.orders, to - coming.to);
        Ok(coming.to)
    }

    /// Keeps all orders of `from..to`, which are over, also in Redis.
    pub(super) fn keep_columns(self: &Arc<Self>, symbol: &Arc<Symbol>, (from, to): (i64, i64), columns: &Columns, tail: &Tail) {
        let blocks = columns.blocks();
        let begins = |place: usize| blocks.get(place).and_then(Block::extent).map_or(to, |extent| extent.start);
        let parts = (0..blocks.len().max(1)).map(|place| {
            let block = blocks.get(place).cloned().unwrap_or_default();
            Part { from: if place == 0 { from } else { begins(place) }, to: begins(place + 1), block }
        });
        for part in parts {
            // Of these days the tail was never checked one by one.
            self.keep_part(symbol, &part, tail.oldest_asked, &Checked::default());
            if let Some(shared) = &self.shared {
                let (shared, name, tags, asked_at) = (shared.clone(), Arc::clone(&symbol.name), symbol.tags().to_vec(), tail.oldest_asked);
                self.runtime.spawn(async move { shared.put(&name, tags, part, asked_at).await });
            }
        }
    }

    /// Keeps a part in memory.
    fn keep_part(&self, symbol: &Symbol, part: &Part, asked_at: Moment, checked: &Checked) {
        let range = (part.from, part.to);
        let details = Stretch::new(range, Arc::clone(&part.block.details), asked_at, checked.clone());
        self.keep_stretch(&self.details, symbol, details);
        self.keep_stretch(&self.spans, symbol, Stretch::new(range, Arc::clone(&part.block.sums), asked_at, checked.clone()));
    }

    /// Keeps a stretch of which not all is known, together with small neighbours.
    fn keep_stretch<V: Half>(&self, spans: &Spans<V>, symbol: &Symbol, mut stretch: Stretch<V>) {
        let (known, gaps) = self.known(spans, symbol, stretch.from.saturating_sub(1), stretch.to.saturating_add(1));
        if !gaps.iter().any(|gap| gap.0 < stretch.to && gap.1 > stretch.from) {
            return;
        }
        for other in known {
            if let Some(joined) = join(&other, &stretch) {
                stretch = joined;
            }
        }
        spans.insert(&symbol.name, stretch);
    }
}

/// A stretch and its neighbour as one, if they are small.
fn join<V: Half>(one: &Stretch<V>, other: &Stretch<V>) -> Option<Stretch<V>> {
    let (older, newer) = if one.to == other.from { (one, other) } else { (other, one) };
    if older.to != newer.from || older.orders.len() + newer.orders.len() > SMALL {
        return None;
    }
    let orders = Arc::new(older.orders.joined(&newer.orders)?);
    // Up to here each was checked, or asked for later.
    let seen = |stretch: &Stretch<V>| stretch.checked.until().max(stretch.asked_at);
    let checked = Checked::default();
    checked.note(seen(one).min(seen(other)));
    Some(Stretch::new((older.from, newer.to), orders, one.asked_at.min(other.asked_at), checked))
}

/// The answer to a question, as it comes.
struct Coming<'e, S> {
    engine: &'e Engine<S>,
    symbol: &'e Arc<Symbol>,
    asked_at: Moment,
    from: i64,
    /// What comes next lies before this.
    to: i64,
    builder: Builder,
    /// What came and is not kept yet, newest first, and how many orders that is.
    parts: Vec<Part>,
    fresh: usize,
    /// How many orders came.
    orders: usize,
}

impl<S: Orders> Coming<'_, S> {
    async fn read(&mut self) -> Result<(), AskError> {
        self.asked_at = self.engine.cache.ask();
        let mut batches = self.engine.past.stream(&self.symbol.name, Span { start: self.from, end: self.to - 1 }).await?;
        while let Some(batch) = batches.next().await {
            for order in batch? {
                self.push(&order)?;
            }
            if self.fresh >= BLOCK {
                self.keep().await?;
            }
            if self.orders > 2 * ORDERS {
                // What is left is asked for anew, by shorter questions.
                return self.keep().await;
            }
        }
        while self.from < self.to {
            self.end_day()?;
        }
        self.keep().await
    }

    fn push(&mut self, order: &Order) -> Result<(), AskError> {
        let time = order.order_trade_time.ok_or(Unfit::Disordered)?;
        if time < self.from || time >= self.to {
            return Err(Unfit::Disordered.into());
        }
        while time < self.day() {
            self.end_day()?;
        }
        self.builder.push(order)?;
        self.orders += 1;
        for block in self.builder.take_blocks() {
            let from = block.extent().map_or(self.to, |extent| extent.start);
            self.add(from, block);
        }
        Ok(())
    }

    /// The first moment of the day that comes.
    fn day(&self) -> i64 {
        let length = self.engine.span();
        ((self.to - 1).div_euclid(length) * length).max(self.from)
    }

    /// The rest of the day has come.
    fn end_day(&mut self) -> Result<(), AskError> {
        self.builder.close()?;
        let (day, mut blocks) = (self.day(), self.builder.take_blocks());
        let last = blocks.pop().unwrap_or_default();
        for block in blocks {
            let from = block.extent().map_or(self.to, |extent| extent.start);
            self.add(from, block);
        }
        self.add(day, last);
        Ok(())
    }

    fn add(&mut self, from: i64, block: Block) {
        self.fresh += block.len();
        self.parts.push(Part { from, to: self.to, block });
        self.to = from;
    }

    /// Keeps what came, once its source says the same in another way.
    async fn keep(&mut self) -> Result<(), AskError> {
        let parts = std::mem::take(&mut self.parts);
        self.fresh = 0;
        let (Some(newest), Some(oldest)) = (parts.first(), parts.last()) else { return Ok(()) };
        if self.engine.foreign {
            let columns = Columns::of(parts.iter().rev().map(|part| part.block.clone()));
            self.engine.hold_against_sums(self.symbol, Span { start: oldest.from, end: newest.to - 1 }, &[&columns]).await?;
        }
        for part in parts {
            self.engine.keep_part(self.symbol, &part, self.asked_at, &Checked::default());
            if let Some(shared) = &self.engine.shared
                && let Some(turn) = shared.turn().await
            {
                let (shared, name, tags, asked_at) =
                    (shared.clone(), Arc::clone(&self.symbol.name), self.symbol.tags().to_vec(), self.asked_at);
                self.engine.runtime.spawn(async move {
                    let _turn = turn;
                    shared.put(&name, tags, part, asked_at).await;
                });
            }
        }
        Ok(())
    }
}
