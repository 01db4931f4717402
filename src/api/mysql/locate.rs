//! Where a deep page begins, from the index alone.
//!
//! `OFFSET n` walks over n entries of the index. That is fine for thousands of them. For hundreds of thousands the span is
//! cut into slices of equal time, which are counted from the newest on, two at a time where a second connection is
//! free, until one is known to hold the order; within it the walk begins at the nearer end.

use super::pool::{Lease, QueryError};
use super::query::{ask, ask_all, extent, one_number};
use super::sql::{End, Rows, Statement};
use crate::api::orders::Span;

/// Pages that begin later than this are found from the index before any of their rows is read.
pub const DEEP: u64 = 1000;
/// Those that begin later than this, slice by slice.
pub const VERY_DEEP: u64 = 50_000;
/// Slices of a span. The more, the shorter the last walk; each costs a query.
const SLICES: i64 = 24;

/// Where an order is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its moment.
    pub moment: i64,
    /// A part of the span that holds it, …
    within: Span,
    /// … and how many orders are newer than that part.
    newer: u64,
}

impl Place {
    /// How many orders are newer than its moment.
    ///
    /// # Errors
    /// The database's.
    pub async fn newer(&self, lease: &mut Lease, rows: &Rows<'_>) -> Result<u64, QueryError> {
        let rest = Span { start: self.moment.saturating_add(1), end: self.within.end };
        if rest.start > rest.end {
            return Ok(self.newer);
        }
        Ok(self.newer + number(&ask(lease, &rows.count(rest)).await?))
    }
}

/// Where the order is that `offset` newer ones precede; `None` if there are not so many.
///
/// # Errors
/// The database's.
pub async fn order(
    lease: &mut Lease,
    second: &mut Option<Lease>,
    rows: &Rows<'_>,
    span: Span,
    offset: u64,
) -> Result<Option<Place>, QueryError> {
    if offset <= VERY_DEEP {
        let moment = one_number(&ask(lease, &rows.moment(span, End::Newest, offset)).await?);
        return Ok(moment.map(|moment| Place { moment, within: span, newer: 0 }));
    }
    let Some(extent) = extent(lease, rows, span).await? else { return Ok(None) };
    let mut newer = 0;
    for pair in slices(extent).chunks(2) {
        let statements: Vec<Statement> = pair.iter().map(|slice| rows.count(*slice)).collect();
        let counts = ask_all(lease, second, &statements).await?;
        for (slice, count) in pair.iter().zip(&counts) {
            let count = number(count);
            if offset < newer + count {
                let from_newest = offset - newer;
                let from_oldest = count - 1 - from_newest;
                let statement = if from_newest <= from_oldest {
                    rows.moment(*slice, End::Newest, from_newest)
                } else {
                    rows.moment(*slice, End::Oldest, from_oldest)
                };
                let moment = one_number(&ask(lease, &statement).await?);
                return Ok(moment.map(|moment| Place { moment, within: *slice, newer }));
            }
            newer += count;
        }
    }
    Ok(None)
}

/// The one number that was asked for.
pub(super) fn number(rows: &[mysql_async::Row]) -> u64 {
    one_number(rows).and_then(|number| u64::try_from(number).ok()).unwrap_or(0)
}

/// A span in slices of about equal length, the newest first.
fn slices(span: Span) -> Vec<Span> {
    let length = (span.end.saturating_sub(span.start) / SLICES).saturating_add(1);
    let mut slices = Vec::new();
    let mut end = span.end;
    while end >= span.start {
        let start = end.saturating_sub(length - 1).max(span.start);
        slices.push(Span { start, end });
        let Some(next) = start.checked_sub(1) else { break };
        end = next;
    }
    slices
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slices_cover_a_span_without_gaps(start: i64, length in 0_i64..i64::MAX) {
            let span = Span { start, end: start.saturating_add(length) };
            let slices = slices(span);
            prop_assert!(slices.len() <= 26, "{}", slices.len());
            prop_assert_eq!((slices[0].end, slices[slices.len() - 1].start), (span.end, span.start));
            prop_assert!(slices.windows(2).all(|pair| pair[1].end.checked_add(1) == Some(pair[0].start)));
            prop_assert!(slices.iter().all(|slice| slice.start <= slice.end));
        }
    }
}
