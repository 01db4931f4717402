//! Parts as bytes, for Redis. Whatever does not decode is not used: the entry around them has a checksum and may be sealed,
//! but bytes from Redis are hostile all the same.
//!
//! ```text
//! version:1
//! from, to   the stretch of time
//! kinds      how many, then five texts each (0: NULL, else 1 + length, bytes)
//! orders     how many; times; kinds; numbers, five doubles each (NaN: NULL)
//! sides      how many, then each: its text; how many orders; their times; their amounts
//! others     the times of orders without an amount, and of those whose amount is not exact
//! ```
//! Whole numbers are LEB128, seven bits a byte; signed ones zigzag; times as differences. Doubles are little-endian.

use std::sync::Arc;

use super::amounts::{Maker, Sums};
use super::columns::{Block, MOST_IN_BLOCK};
use super::details::{Details, Kind, MAX_KINDS};
use crate::api::orders::{Span, Text};
use crate::api::usd::Usd;

/// Raised whenever the format changes. It is part of the key: what another format wrote is not found.
pub const VERSION: u8 = 2;
/// More sides than this are no sides of orders.
const MAX_SIDES: usize = 1024;

/// All orders of a stretch of time.
#[derive(Debug)]
pub struct Part {
    /// Its first millisecond.
    pub from: i64,
    /// The first millisecond after it.
    pub to: i64,
    /// Its orders.
    pub block: Block,
}

/// Writes a part.
#[must_use]
pub fn encode(part: &Part) -> Vec<u8> {
    let (details, sums) = (&part.block.details, &part.block.sums);
    let mut out = Vec::with_capacity(64 + details.len() * 60);
    out.push(VERSION);
    put_signed(&mut out, part.from.into());
    put_signed(&mut out, part.to.into());
    put(&mut out, details.kinds.len() as u128);
    for kind in &details.kinds {
        for text in [&kind.symbol, &kind.side, &kind.order_type, &kind.time_in_force, &kind.order_status] {
            put_text(&mut out, text);
        }
    }
    put_times(&mut out, (0..details.len()).map(|place| details.time(place)));
    details.kind.iter().for_each(|&kind| put(&mut out, kind.into()));
    for number in details.numbers.iter().flatten() {
        out.extend_from_slice(&number.to_le_bytes());
    }
    let sides = sums.amounts();
    put(&mut out, sides.len() as u128);
    for (side, orders) in sides {
        put_text(&mut out, side);
        put_times(&mut out, orders.iter().map(|&(time, _)| time));
        orders.iter().for_each(|&(_, amount)| put_signed(&mut out, amount));
    }
    sums.without_amounts().into_iter().for_each(|times| put_times(&mut out, times.into_iter()));
    out
}

fn put(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

fn put_signed(out: &mut Vec<u8>, value: i128) {
    put(out, ((value << 1) ^ (value >> 127)).cast_unsigned());
}

fn put_text(out: &mut Vec<u8>, text: &Text) {
    match text {
        None => put(out, 0),
        Some(text) => {
            put(out, text.len() as u128 + 1);
            out.extend_from_slice(text.as_bytes());
        }
    }
}

fn put_times(out: &mut Vec<u8>, times: impl ExactSizeIterator<Item = i64>) {
    put(out, times.len() as u128);
    let mut last = 0;
    for time in times {
        put_signed(out, i128::from(time) - i128::from(last));
        last = time;
    }
}

/// Reads a part; `None` for anything but what [`encode`] wrote.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Part> {
    let (&version, rest) = bytes.split_first()?;
    if version != VERSION {
        return None;
    }
    let mut reader = Reader(rest);
    let (from, to) = (reader.time()?, reader.time()?);
    let details = reader.details()?;
    let sums = reader.sums()?;
    let extent = (!details.is_empty()).then(|| Span { start: details.time(0), end: details.time(details.len() - 1) });
    let is_inside = extent.is_none_or(|extent| extent.start >= from && extent.end < to);
    if !reader.0.is_empty() || from >= to || !is_inside || sums.extent() != extent || sums.len() != details.len() {
        return None;
    }
    Some(Part { from, to, block: Block { sums: Arc::new(sums), details: Arc::new(details) } })
}

struct Reader<'b>(&'b [u8]);

impl Reader<'_> {
    fn number(&mut self) -> Option<u128> {
        let (mut value, mut shift) = (0_u128, 0);
        loop {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            let part = u128::from(byte & 0x7f);
            if shift > 126 || (part << shift) >> shift != part {
                return None;
            }
            value |= part << shift;
            if byte < 0x80 {
                return Some(value);
            }
            shift += 7;
        }
    }

    fn signed(&mut self) -> Option<i128> {
        let value = self.number()?;
        Some((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
    }

    /// A count of things of at least so many bytes each, so that a false one cannot make the reader reserve.
    fn count(&mut self, each: usize) -> Option<usize> {
        let count = usize::try_from(self.number()?).ok()?;
        (count <= self.0.len() / each).then_some(count)
    }

    fn text(&mut self) -> Option<Text> {
        let length = usize::try_from(self.number()?).ok()?;
        let Some(length) = length.checked_sub(1) else { return Some(None) };
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(Some(Arc::from(std::str::from_utf8(text).ok()?)))
    }

    fn kind(&mut self) -> Option<Kind> {
        Some(Kind {
            symbol: self.text()?,
            side: self.text()?,
            order_type: self.text()?,
            time_in_force: self.text()?,
            order_status: self.text()?,
        })
    }

    fn time(&mut self) -> Option<i64> {
        i64::try_from(self.signed()?).ok()
    }

    /// Times in order.
    fn times(&mut self) -> Option<Vec<i64>> {
        let count = self.count(1).filter(|&count| count <= MOST_IN_BLOCK)?;
        let mut times = Vec::with_capacity(count);
        let mut last = 0_i64;
        for place in 0..count {
            let step = self.signed()?;
            if place > 0 && step < 0 {
                return None;
            }
            last = i64::try_from(i128::from(last).checked_add(step)?).ok()?;
            times.push(last);
        }
        Some(times)
    }

    fn doubles(&mut self) -> Option<[f64; 5]> {
        let mut numbers = [0.0; 5];
        for number in &mut numbers {
            let (&bytes, rest) = self.0.split_first_chunk()?;
            self.0 = rest;
            *number = f64::from_le_bytes(bytes);
            if number.is_infinite() {
                return None;
            }
        }
        Some(numbers)
    }

    fn details(&mut self) -> Option<Details> {
        let kinds = self.count(5).filter(|&count| count <= MAX_KINDS)?;
        let kinds = (0..kinds).map(|_| self.kind()).collect::<Option<Box<[Kind]>>>()?;
        let times = self.times()?;
        let base = times.first().copied().unwrap_or(0);
        let offset = |&time: &i64| u32::try_from(time.checked_sub(base)?).ok();
        let offsets = times.iter().map(offset).collect::<Option<Box<[u32]>>>()?;
        let kind = times.iter().map(|_| u16::try_from(self.number()?).ok().filter(|&kind| usize::from(kind) < kinds.len()));
        let kind = kind.collect::<Option<Box<[u16]>>>()?;
        let numbers = times.iter().map(|_| self.doubles()).collect::<Option<Box<[[f64; 5]]>>>()?;
        Some(Details { base, times: offsets, kind, kinds, numbers })
    }

    fn sums(&mut self) -> Option<Sums> {
        let sides = self.count(2).filter(|&count| count <= MAX_SIDES)?;
        let (mut sums, mut last, mut count) = (Maker::default(), None, 0);
        for _ in 0..sides {
            let side = self.text()?;
            let key = Some((side.as_deref().map(str::to_uppercase), side.clone()));
            let times = self.times()?;
            count += times.len();
            if key <= last || count > MOST_IN_BLOCK {
                return None;
            }
            last = key;
            for &time in &times {
                sums.push(time, &side, Usd::Exact(self.signed()?));
            }
        }
        for usd in [Usd::Unknown, Usd::Rounded(0.0)] {
            self.times()?.into_iter().for_each(|time| sums.push(time, &None, usd));
        }
        sums.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::buckets::buckets;
    use super::super::builder::Builder;
    use super::super::columns::tests::order;
    use super::*;
    use crate::api::orders::Order;
    use proptest::prelude::*;

    const ALL: Span = Span { start: -1_000_000, end: 1_000_000 };

    fn part(orders: &[Order]) -> Part {
        let columns = Builder::columns(orders).unwrap();
        Part { from: -900_000, to: 900_000, block: columns.blocks().first().cloned().unwrap_or_default() }
    }

    fn read(block: &Block) -> Vec<Order> {
        (0..block.len()).map(|place| block.details.order(place)).collect()
    }

    proptest! {
        #[test]
        fn what_was_written_reads_back(
            orders in proptest::collection::vec((-900_000_i64..900_000, ".{0,4}", proptest::option::of(any::<i64>()), proptest::option::of(-1e9..1e9)), 0..60),
            inexact in 0_usize..90,
        ) {
            let mut orders: Vec<Order> = orders
                .into_iter()
                .map(|(time, side, usd, price)| Order { price, ..order(time, &side, usd.map_or(Usd::Unknown, |usd| Usd::Exact(usd.into()))) })
                .collect();
            orders.sort_by_key(|order| std::cmp::Reverse(order.order_trade_time));
            orders.get_mut(inexact).into_iter().for_each(|order| order.usd = Usd::Rounded(1.5));
            let part = part(&orders);
            let again = decode(&encode(&part)).unwrap();
            prop_assert_eq!((again.from, again.to, read(&again.block)), (part.from, part.to, read(&part.block)));
            prop_assert_eq!(format!("{:?}", again.block.sums), format!("{:?}", part.block.sums));
        }

        #[test]
        fn hostile_bytes_are_read_calmly(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut: usize, at: usize, bit in 0_u8..8) {
            let _ = decode(&bytes);
            let _ = decode(&[&[VERSION, 1, 8][..], &bytes].concat());
            let orders = [order(7, "sell", Usd::Exact(5)), order(5, "buy", Usd::Exact(-4)), order(4, "buy", Usd::Unknown)];
            let mut good = encode(&part(&orders));
            prop_assert!(decode(&good[..cut % good.len()]).is_none());
            let at = at % good.len();
            good[at] ^= 1 << bit;
            if let Some(part) = decode(&good) {
                let _ = (read(&part.block).len(), buckets([&*part.block.sums], ALL, 7), part.block.cut(-5, 6));
            }
        }
    }
}
