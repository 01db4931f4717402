//! Columns as bytes, for Redis. Whatever does not decode is not used: the entry around them has a checksum and may be sealed,
//! but bytes from Redis are hostile all the same.
//!
//! ```text
//! version:1  certain:1
//! kinds      how many, then five texts each (0: NULL, else 1 + length, bytes)
//! orders     how many; times; kinds; numbers, five doubles each (NaN: NULL)
//! sides      how many, then each: its text; how many orders; their times; their amounts
//! ```
//! Whole numbers are LEB128, seven bits a byte; signed ones zigzag; times as differences. Doubles are little-endian.

use std::sync::Arc;

use super::columns::{Columns, Kind, MAX_KINDS, Side};
use crate::api::orders::Text;

/// Raised whenever the format changes.
const VERSION: u8 = 1;
/// More sides than this are no sides of orders.
const MAX_SIDES: usize = 1024;

/// Writes columns.
#[must_use]
pub fn encode(columns: &Columns) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + columns.times.len() * 60);
    out.extend_from_slice(&[VERSION, u8::from(columns.certain)]);
    put(&mut out, columns.kinds.len() as u128);
    for kind in &columns.kinds {
        for text in [&kind.symbol, &kind.side, &kind.order_type, &kind.time_in_force, &kind.order_status] {
            put_text(&mut out, text);
        }
    }
    put_times(&mut out, &columns.times);
    columns.kind.iter().for_each(|&kind| put(&mut out, kind.into()));
    for number in columns.numbers.iter().flatten() {
        out.extend_from_slice(&number.to_le_bytes());
    }
    put(&mut out, columns.sides.len() as u128);
    for side in &columns.sides {
        put_text(&mut out, &side.side);
        put_times(&mut out, &side.times);
        // Sums may wrap only in columns that are not certain, which then stay so.
        side.sums.windows(2).for_each(|sums| put_signed(&mut out, sums[1].wrapping_sub(sums[0])));
    }
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

fn put_times(out: &mut Vec<u8>, times: &[i64]) {
    put(out, times.len() as u128);
    let mut last = 0;
    for &time in times {
        put_signed(out, i128::from(time) - i128::from(last));
        last = time;
    }
}

/// Reads columns; `None` for anything but what [`encode`] wrote.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Columns> {
    let (&[version, certain], rest) = bytes.split_first_chunk()?;
    if version != VERSION || certain > 1 {
        return None;
    }
    let mut reader = Reader(rest);
    let kinds = reader.count(5).filter(|&count| count <= MAX_KINDS)?;
    let kinds = (0..kinds).map(|_| reader.kind()).collect::<Option<Vec<Kind>>>()?;
    let times = reader.times()?;
    let kind = times.iter().map(|_| u16::try_from(reader.number()?).ok().filter(|&kind| usize::from(kind) < kinds.len()));
    let kind = kind.collect::<Option<Vec<u16>>>()?;
    let numbers = times.iter().map(|_| reader.doubles()).collect::<Option<Vec<[f64; 5]>>>()?;
    let sides = reader.count(2).filter(|&count| count <= MAX_SIDES)?;
    let sides = (0..sides).map(|_| reader.side()).collect::<Option<Vec<Side>>>()?;
    let folded = |side: &Side| side.side.as_deref().map(str::to_uppercase);
    let certain = certain == 1;
    if !reader.0.is_empty() || (certain && !sides.is_sorted_by(|one, two| folded(one) < folded(two))) {
        return None;
    }
    Some(Columns { times, kind, kinds, numbers, sides, certain })
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

    /// Times in order.
    fn times(&mut self) -> Option<Vec<i64>> {
        let count = self.count(1)?;
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

    fn side(&mut self) -> Option<Side> {
        let side = self.text()?;
        let times = self.times()?;
        let mut sums = Vec::with_capacity(times.len() + 1);
        let mut sum = 0_i128;
        sums.push(sum);
        for _ in &times {
            sum = sum.checked_add(self.signed()?)?;
            sums.push(sum);
        }
        Some(Side { side, times, sums })
    }
}

#[cfg(test)]
mod tests {
    use super::super::buckets::buckets;
    use super::super::builder::Builder;
    use super::super::columns::tests::order;
    use super::*;
    use crate::api::orders::{Order, Span};
    use crate::api::usd::Usd;
    use proptest::prelude::*;

    const ALL: Span = Span { start: -1_000_000, end: 1_000_000 };

    proptest! {
        #[test]
        fn what_was_written_reads_back(
            orders in proptest::collection::vec((-900_000_i64..900_000, ".{0,4}", proptest::option::of(any::<i64>()), proptest::option::of(-1e9..1e9)), 0..60),
        ) {
            let mut orders: Vec<Order> = orders
                .into_iter()
                .map(|(time, side, usd, price)| Order { price, ..order(time, &side, usd.map_or(Usd::Unknown, |usd| Usd::Exact(usd.into()))) })
                .collect();
            orders.sort_by_key(|order| std::cmp::Reverse(order.order_trade_time));
            let columns = Builder::columns(&orders).unwrap();
            for columns in [columns.part(-1000, 1000), columns] {
                let read = decode(&encode(&columns)).unwrap();
                prop_assert_eq!(read.orders(ALL).collect::<Vec<_>>(), columns.orders(ALL).collect::<Vec<_>>());
                prop_assert_eq!(buckets([&read], ALL, 1000), buckets([&columns], ALL, 1000));
                prop_assert_eq!(read.is_certain(), columns.is_certain());
            }
        }

        #[test]
        fn hostile_bytes_are_read_calmly(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut: usize, at: usize, bit in 0_u8..8) {
            let _ = decode(&bytes);
            let _ = decode(&[&[VERSION, 1][..], &bytes].concat());
            let orders = [order(7, "sell", Usd::Exact(5)), order(5, "buy", Usd::Exact(-4))];
            let mut good = encode(&Builder::columns(&orders).unwrap());
            prop_assert!(decode(&good[..cut % good.len()]).is_none());
            let at = at % good.len();
            good[at] ^= 1 << bit;
            if let Some(columns) = decode(&good) {
                let _ = (columns.orders(ALL).count(), buckets([&columns], ALL, 7));
            }
        }
    }
}
