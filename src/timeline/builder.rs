//! Columns from orders as a source gives them, newest first, without holding the orders.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::columns::{Columns, Kind, MAX_KINDS, NULL, Side, Unfit, sort_sides};
use crate::api::orders::{Order, Text};
use crate::api::texts::Texts;
use crate::api::usd::Usd;

/// Columns in the making.
#[derive(Default)]
pub struct Builder {
    times: Vec<i64>,
    kind: Vec<u16>,
    numbers: Vec<[f64; 5]>,
    amounts: Vec<Option<i128>>,
    kinds: Vec<Kind>,
    places: HashMap<Kind, u16, RandomState>,
    texts: Texts,
    uncertain: bool,
}

impl Builder {
    /// Columns of orders that are all there, newest first.
    ///
    /// # Errors
    /// [`Unfit`] if they are nothing to compute with.
    pub fn columns<'o>(newest_first: impl IntoIterator<Item = &'o Order>) -> Result<Columns, Unfit> {
        let mut builder = Self::default();
        newest_first.into_iter().try_for_each(|order| builder.push(order))?;
        Ok(builder.finish())
    }

    /// Adds an order that is no newer than those before it.
    ///
    /// # Errors
    /// [`Unfit`].
    pub fn push(&mut self, order: &Order) -> Result<(), Unfit> {
        let time = order.order_trade_time.ok_or(Unfit::Disordered)?;
        if self.times.last().is_some_and(|&last| last < time) {
            return Err(Unfit::Disordered);
        }
        let texts = &mut self.texts;
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
        self.uncertain |= matches!(order.usd, Usd::Rounded(_));
        self.amounts.push(match order.usd {
            Usd::Exact(amount) => Some(amount),
            // What is unknown counts for nothing.
            Usd::Rounded(_) | Usd::Unknown => None,
        });
        Ok(())
    }

    /// About how many bytes it takes.
    #[must_use]
    pub const fn weight(&self) -> u64 {
        (self.times.len() * (8 + 2 + 40 + 32)) as u64
    }

    /// The columns.
    #[must_use]
    pub fn finish(self) -> Columns {
        let Self { mut times, mut kind, mut numbers, amounts, kinds, uncertain, .. } = self;
        times.reverse();
        kind.reverse();
        numbers.reverse();
        let mut sides: Vec<Side> = Vec::new();
        let mut certain = !uncertain;
        let amounts = amounts.iter().rev();
        for ((&time, &kind), amount) in times.iter().zip(&kind).zip(amounts) {
            let Some(amount) = amount else { continue };
            let side = &kinds[usize::from(kind)].side;
            let at = sides.iter().position(|known| known.side == *side).unwrap_or_else(|| {
                sides.push(Side { side: side.clone(), times: Vec::new(), sums: vec![0] });
                sides.len() - 1
            });
            let known = &mut sides[at];
            match known.sums.last().copied().unwrap_or(0).checked_add(*amount) {
                Some(sum) => {
                    known.times.push(time);
                    known.sums.push(sum);
                }
                None => certain = false,
            }
        }
        certain &= sort_sides(&mut sides);
        let mut columns = Columns { times, kind, kinds, numbers, sides, certain };
        columns.shrink();
        columns
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
        for doubtful in [order(1, "BUY", Usd::Exact(1)), order(1, "sell", Usd::Rounded(1.0)), order(1, "buy", Usd::Exact(i128::MAX))] {
            assert!(!Builder::columns([&late, &doubtful]).unwrap().is_certain(), "{doubtful:?}");
        }
        let many: Vec<Order> =
            (0..=i64::try_from(MAX_KINDS).unwrap()).map(|number| order(-number, &number.to_string(), Usd::Unknown)).collect();
        assert_eq!(Builder::columns(&many).err(), Some(Unfit::TooManyKinds));
        assert!(Builder::columns(&many[1..]).is_ok());
    }
}
