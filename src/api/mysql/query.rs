//! Asking statements, and reading answers of a single number or span.

use mysql_async::Row;

use super::pool::{Asking, Trouble};
use super::row;
use super::sql::{Rows, Statement};
use crate::api::orders::Span;

/// The rows that answer a statement.
///
/// # Errors
/// The database's.
pub async fn ask(asking: &mut Asking, statement: &Statement) -> Result<Vec<Row>, Trouble> {
    asking.rows(&statement.text, statement.params()).await
}

/// The rows that answer several statements, in their order, two asked at a time if there is a helper.
///
/// # Errors
/// The database's.
pub async fn ask_all(asking: &mut Asking, helper: &mut Option<Asking>, statements: &[Statement]) -> Result<Vec<Vec<Row>>, Trouble> {
    let mut answers = Vec::with_capacity(statements.len());
    for pair in statements.chunks(2) {
        match (pair, &mut *helper) {
            ([first, second], Some(helper)) => {
                let (first, second) = tokio::join!(ask(asking, first), ask(helper, second));
                answers.extend([first?, second?]);
            }
            _ => {
                for statement in pair {
                    answers.push(ask(asking, statement).await?);
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
pub async fn extent(asking: &mut Asking, rows: &Rows<'_>, span: Span) -> Result<Option<Span>, Trouble> {
    let answer = ask(asking, &rows.extent(span)).await?;
    let moment = |at| row::whole(answer.first()?.as_ref(at)?);
    Ok(moment(0).zip(moment(1)).map(|(start, end)| Span { start, end }))
}

/// The whole number that is the first column of the first row.
#[must_use]
pub fn one_number(rows: &[Row]) -> Option<i64> {
    row::whole(rows.first()?.as_ref(0)?)
}
