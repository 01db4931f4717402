//! Blocks from orders as a source gives them, newest first, without holding the orders.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::amounts::Maker;
use super::columns::{BLOCK, Block, Columns, MOST_IN_BLOCK, Unfit};
use super::details::{Details, Kind, MAX_KINDS, NULL};
use super::kept::Weigh;
use crate::api::orders::{Order, Text};
use crate::api::texts::Texts;
use crate::api::usd::Usd;

/// Blocks in the making.
#[derive(Default)]
pub struct Builder {
    /// What came, newest first: blocks, and the orders of the one that is not full.
    blocks: Vec<Block>,
    open: Open,
    texts: Texts,
    /// The time of the last order.
    last: Option<i64>,
    /// What the blocks take, in bytes.
    weight: u64,
}

/// The orders of a block, newest first.
#[derive(Default)]
struct Open {
    times: Vec<i64>,
    kind: Vec<u16>,
    numbers: Vec<[f64; 5]>,
    amounts: Vec<Usd>,
    kinds: Vec<Kind>,
    places: HashMap<Kind, u16, RandomState>,
}

impl Builder {
    /// Columns of orders that are all there, newest first.
    ///
    /// # Errors
    /// [`Unfit`] if they are nothing to compute with.
    pub fn columns<'o>(newest_first: impl IntoIterator<Item = &'o Order>) -> Result<Columns, Unfit> {
        let mut builder = Self::default();
        newest_first.into_iter().try_for_each(|order| builder.push(order))?;
        builder.finish()
    }

    /// Adds an order that is no newer than those before it.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn push(&mut self, order: &Order) -> Result<(), Unfit> {
        let time = order.order_trade_time.ok_or(Unfit::Disordered)?;
        if self.last.is_some_and(|last| last < time) {
            return Err(Unfit::Disordered);
        }
        self.last = Some(time);
        if self.open.ends_before(time) {
            self.close()?;
        }
        self.open.push(time, order, &mut self.texts)
    }

    /// Ends the block, so that the next order begins another.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn close(&mut self) -> Result<(), Unfit> {
        if !self.open.times.is_empty() {
            let block = std::mem::take(&mut self.open).finish()?;
            self.weight += block.weight();
            self.blocks.push(block);
        }
        Ok(())
    }

    /// The blocks that have ended and were not taken yet, newest first.
    #[must_use]
    pub fn take_blocks(&mut self) -> Vec<Block> {
        self.weight = 0;
        std::mem::take(&mut self.blocks)
    }

    /// How many bytes it takes.
    #[must_use]
    pub const fn weight(&self) -> u64 {
        let open = size_of::<i64>() + size_of::<u16>() + size_of::<[f64; 5]>() + size_of::<Usd>();
        self.weight + (self.open.times.capacity() * open) as u64
    }

    /// The columns.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn finish(mut self) -> Result<Columns, Unfit> {
        self.close()?;
        Ok(Columns::of(self.blocks.into_iter().rev()))
    }
}

impl Open {
    /// Whether an order of this time belongs to the next block: this one is full, or too far away. What is of one moment stays together.
    fn ends_before(&self, time: i64) -> bool {
        let (Some(&newest), Some(&last)) = (self.times.first(), self.times.last()) else { return false };
        let is_near = newest.checked_sub(time).is_some_and(|range| u32::try_from(range).is_ok());
        !is_near || (self.times.len() >= BLOCK && time < last)
    }

    fn push(&mut self, time: i64, order: &Order, texts: &mut Texts) -> Result<(), Unfit> {
        if self.times.len() >= MOST_IN_BLOCK {
            return Err(Unfit::TooDense);
        }
        let mut share = |text: &Text| text.as_deref().and_then(|text| texts.share(text));
        let kind = Kind {
            symbol: share(&order.symbol),
            side: share(&order.side),
            order_type: share(&order.order_type),
            time_in_force: share(&order.time_in_force),
            order_status: share(&order.order_status),
        };
        let number = match self.places.get(&kind) {
            Some(&number) => number,
            None => {
                let number = u16::try_from(self.kinds.len()).ok().filter(|&number| usize::from(number) < MAX_KINDS);
                let number = number.ok_or(Unfit::TooManyKinds)?;
                self.kinds.push(kind.clone());
                self.places.insert(kind, number);
                number
            }
        };
        self.times.push(time);
        self.kind.push(number);
        let value = |number: Option<f64>| number.unwrap_or(NULL);
        self.numbers.push([
            value(order.original_quantity),
            value(order.price),
            value(order.average_price),
            value(order.order_last_filled_quantity),
            value(order.order_filled_accumulated_quantity),
        ]);
        self.amounts.push(order.usd);
        Ok(())
    }

    fn finish(self) -> Result<Block, Unfit> {
        let Self { times, kind, numbers, amounts, kinds, .. } = self;
        let base = times.last().copied().unwrap_or(0);
        let mut sums = Maker::default();
        for ((&time, &kind), &amount) in times.iter().zip(&kind).zip(&amounts).rev() {
            sums.push(time, &kinds[usize::from(kind)].side, amount);
        }
        let offset = |&time: &i64| u32::try_from(time - base).map_err(|_| Unfit::Disordered);
        let details = Details {
            base,
            times: times.iter().rev().map(offset).collect::<Result<_, _>>()?,
            kind: kind.into_iter().rev().collect(),
            kinds: kinds.into(),
            numbers: numbers.into_iter().rev().collect(),
        };
        Ok(Block { sums: Arc::new(sums.finish().ok_or(Unfit::Disordered)?), details: Arc::new(details) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::columns::tests::order;
    use super::*;

    #[test]
    fn what_cannot_be_computed_with_is_told() {
        let early = order(1, "buy", Usd::Exact(1));
        let late = order(2, "buy", Usd::Exact(1));
        assert_eq!(Builder::columns([&early, &late]).err(), Some(Unfit::Disordered));
        assert_eq!(Builder::columns([&Order { order_trade_time: None, ..early.clone() }]).err(), Some(Unfit::Disordered));
        for doubtful in [order(1, "sell", Usd::Rounded(1.0)), order(1, "buy", Usd::Exact(i128::MAX))] {
            assert!(!Builder::columns([&late, &doubtful]).unwrap().is_certain(), "{doubtful:?}");
        }
        let many: Vec<Order> =
            (0..=i64::try_from(MAX_KINDS).unwrap()).map(|number| order(-number, &number.to_string(), Usd::Unknown)).collect();
        assert_eq!(Builder::columns(&many).err(), Some(Unfit::TooManyKinds));
        assert!(Builder::columns(&many[1..]).is_ok());
    }
}
