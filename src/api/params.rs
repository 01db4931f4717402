//! Query parameters as the API reads them, and what is said of those that are wrong.

use super::answer::{ApiError, Fault, FaultContext};
use super::orders::Span;
use crate::request::target::Target;
use crate::request::timestamp;

/// Reads parameters and gathers everything that is wrong with them.
pub struct Params<'t> {
    target: &'t Target<'t>,
    faults: Vec<Fault>,
}

impl<'t> Params<'t> {
    /// The parameters of a request.
    #[must_use]
    pub const fn new(target: &'t Target<'t>) -> Self {
        Self { target, faults: Vec::new() }
    }

    /// A text that must be there; empty if it is not, which [`Params::finish`] then tells.
    pub fn required(&mut self, name: &'static str) -> String {
        self.optional(name).unwrap_or_else(|| {
            self.faults.push(Fault { r#type: "missing", loc: ["query", name], msg: "Field required".into(), input: None, ctx: None });
            String::new()
        })
    }

    /// A text that may be there.
    #[must_use]
    pub fn optional(&self, name: &str) -> Option<String> {
        self.target.text(name).map(std::borrow::Cow::into_owned)
    }

    /// A whole number above zero and at most `most` (if any) that may be there.
    pub fn count(&mut self, name: &'static str, most: Option<i64>) -> Option<i64> {
        let input = self.optional(name)?;
        let mut fault = |kind, msg: String, ctx| {
            self.faults.push(Fault { r#type: kind, loc: ["query", name], msg, input: Some(input.clone()), ctx });
            None
        };
        match whole_number(&input) {
            None => fault("int_parsing", "Input should be a valid integer, unable to parse string as an integer".into(), None),
            Some(..=0) => fault("greater_than", "Input should be greater than 0".into(), Some(FaultContext::Gt(0))),
            Some(number) if most.is_some_and(|most| number > most) => {
                let most = most.unwrap_or_default();
                fault("less_than_equal", format!("Input should be less than or equal to {most}"), Some(FaultContext::Le(most)))
            }
            number => number,
        }
    }

    /// All faults together, if there are any.
    ///
    /// # Errors
    /// 422.
    pub fn finish(self) -> Result<(), ApiError> {
        if self.faults.is_empty() { Ok(()) } else { Err(ApiError::Invalid(self.faults)) }
    }
}

const ORDER: &str = "start_timestamp must be before end_timestamp";

/// The span between two moments; `bad` is said of what is no moment, `negative` (if that is refused) of one before 1970.
///
/// # Errors
/// 400.
pub fn span(start: &str, end: &str, bad: &'static str, negative: Option<&'static str>) -> Result<Span, ApiError> {
    let (Some(start), Some(end)) = (timestamp::parse(start), timestamp::parse(end)) else { return Err(ApiError::BadRequest(bad)) };
    match negative {
        Some(negative) if start < 0 || end < 0 => Err(ApiError::BadRequest(negative)),
        _ if start > end => Err(ApiError::BadRequest(ORDER)),
        _ => Ok(Span { start, end }),
    }
}

/// A whole number as the API's parameters take it: spaces around, a sign, zeros before, single underscores, `.0` after.
fn whole_number(text: &str) -> Option<i64> {
    let text = text.trim();
    let whole = match text.split_once('.') {
        Some((whole, zeros)) if !zeros.is_empty() && zeros.bytes().all(|byte| byte == b'0') => whole,
        Some(_) => return None,
        None => text,
    };
    if whole.ends_with(' ') { None } else { timestamp::integer(whole) }
}
