//! How the upstream fails: the one word from which breakers, stale answers, `Cache-Status` and error answers are made.

use std::fmt;

use crate::body::BoxError;

/// How the upstream failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It did not take the connection.
    Connect,
    /// It broke the connection off.
    Reset,
    /// It took too long.
    Timeout,
    /// It spoke something else than HTTP.
    Invalid,
    /// Its body ended early.
    Truncated,
    /// It answered 500, 502, 503 or 504.
    Status(u16),
    /// Too many requests are on their way to it already (`backend.max_in_flight`).
    Overloaded,
    /// The task that fetched died.
    Lost,
}

impl Failure {
    /// The reason as `Cache-Status` and the access log name it.
    #[must_use]
    pub const fn detail(self) -> &'static str {
        match self {
            Self::Connect => "backend-connect",
            Self::Reset => "backend-reset",
            Self::Timeout => "backend-timeout",
            Self::Invalid => "backend-invalid",
            Self::Truncated => "backend-truncated",
            Self::Status(_) => "backend-status",
            Self::Overloaded => "backend-overloaded",
            Self::Lost => "fetch-lost",
        }
    }

    /// The status and the sentence for the client: the one place where an error becomes a status.
    #[must_use]
    pub const fn answer(self) -> (u16, &'static str) {
        match self {
            Self::Connect => (502, "The backend could not be reached"),
            Self::Reset => (502, "The backend closed the connection before it answered"),
            Self::Invalid => (502, "The backend's answer could not be understood"),
            Self::Truncated => (502, "The backend's answer ended early"),
            Self::Status(_) => (502, "The backend failed"),
            Self::Timeout => (504, "The backend did not answer in time"),
            Self::Overloaded => (503, "The backend is busy; try again shortly"),
            Self::Lost => (502, "The request to the backend was lost"),
        }
    }
}

/// The error of a body that ended before its time.
#[derive(Debug)]
pub struct BrokenBody(pub Failure);

impl fmt::Display for BrokenBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the body broke off: {}", self.0.answer().1)
    }
}

impl std::error::Error for BrokenBody {}

impl BrokenBody {
    /// How a body failed whose reading ended in `error`.
    #[must_use]
    pub fn failure(error: &BoxError) -> Failure {
        error.downcast_ref::<Self>().map_or(Failure::Truncated, |broken| broken.0)
    }
}
