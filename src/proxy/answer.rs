//! What every way of a request ends in.

use http::Response;

use super::errors;
use super::outcome::Outcome;
use crate::body::Reply;
use crate::request::refusal::Refusal;
use crate::upstream::failure::Failure;

/// A response, and what became of the request.
pub struct Answer {
    /// The response, as the client gets it but for the fields that every response gets.
    pub response: Response<Reply>,
    /// What became of the request.
    pub outcome: Outcome,
}

impl Answer {
    /// The answer to a refused request.
    #[must_use]
    pub fn refused(refusal: Refusal) -> Self {
        Self { response: errors::refused(refusal), outcome: Outcome::Refused(refusal) }
    }

    /// The answer when the upstream failed and nothing can be served instead.
    #[must_use]
    pub fn failed(failure: Failure) -> Self {
        Self { response: errors::failed(failure), outcome: Outcome::Failed(failure) }
    }
}
