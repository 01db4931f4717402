//! Lease statements, and reading answers of a single number or span.

use mysql_async::Row;

use super::pool::{Lease, QueryError};
use super::row;
use super::sql::{Rows, Statement};
use crate::api::orders::Span;

/// The rows that answer a statement.
///
/// # Errors
/// The database's.
pub async fn ask(lease: &mut Lease, statement: &Statement) -> Result<Vec<Row>, QueryError> {
    lease.rows(&statement.text, statement.params()).await
}

/// The rows that answer several statements, in their order, two at a time if there is a second connection (`helper`).
///
/// # Errors
/// The database's.
pub async fn ask_all(lease: &mut Lease, helper: &mut Option<Lease>, statements: &[Statement]) -> Result<Vec<Vec<Row>>, QueryError> {
    let mut answers = Vec::with_capacity(statements.len());
    for pair in statements.chunks(2) {
        match (pair, &mut *helper) {
            ([first, second], Some(helper)) => {
                let (first, second) = tokio::join!(ask(lease, first), ask(helper, second));
                answers.extend([first?, second?]);
            }
            _ => {
                for statement in pair {
                    answers.push(ask(lease, statement).await?);
                }
            }
        }
    }
    Ok(answers)
}

/// The times of the first and the last order within a span; `None` if there are none.
///
/// # Errors
/// The database's.
pub async fn extent(lease: &mut Lease, rows: &Rows<'_>, span: Span) -> Result<Option<Span>, QueryError> {
    let answer = ask(lease, &rows.extent(span)).await?;
    let moment = |at| row::whole(answer.first()?.as_ref(at)?);
    Ok(moment(0).zip(moment(1)).map(|(start, end)| Span { start, end }))
}

/// The whole number that is the first column of the first row.
#[must_use]
pub fn one_number(rows: &[Row]) -> Option<i64> {
    row::whole(rows.first()?.as_ref(0)?)
}
