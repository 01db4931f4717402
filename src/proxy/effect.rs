//! What a request with an unsafe method did to its target, as far as the proxy can know it.

use http::StatusCode;

use crate::upstream::failure::Failure;

/// What became of a request that may change something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The backend answered without an error: the change is made (RFC 9111 §4.4).
    Done,
    /// The backend answered that it did not make the change: 4xx, or 5xx of its own.
    Refused,
    /// Nothing reached the backend: there was no permit, or no connection.
    NotSent,
    /// It was sent, and no answer says what became of it. It counts as done.
    Unknown,
    /// The same, where the backend may be at work still: it counts as done now, and once more later.
    UnderWay,
}

impl Effect {
    /// The effect of a request with this answer, or without one.
    ///
    /// RFC 9111 §4.4 invalidates for an answer that is no error. A gateway behind the backend's name that got no answer itself
    /// (502, 504; RFC 9110 §15.6) knows no more than this one would: the change may be made.
    #[must_use]
    pub const fn of(answer: Result<StatusCode, Failure>) -> Self {
        match answer {
            Ok(StatusCode::BAD_GATEWAY) => Self::Unknown,
            Ok(StatusCode::GATEWAY_TIMEOUT) | Err(Failure::Timeout) => Self::UnderWay,
            Ok(status) if status.as_u16() >= 400 => Self::Refused,
            Ok(_) => Self::Done,
            Err(Failure::Connect | Failure::Overloaded) => Self::NotSent,
            Err(_) => Self::Unknown,
        }
    }

    /// Whether what is stored for the target is void.
    #[must_use]
    pub const fn voids(self) -> bool {
        matches!(self, Self::Done | Self::Unknown | Self::UnderWay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_been_done_counts_as_done() {
        let status = |code| Effect::of(Ok(StatusCode::from_u16(code).unwrap()));
        for code in [200, 201, 204, 206, 299, 300, 303, 304, 307] {
            assert_eq!(status(code), Effect::Done, "{code}");
        }
        for code in [400, 401, 404, 408, 409, 412, 429, 499, 500, 501, 503, 599, 999] {
            assert_eq!(status(code), Effect::Refused, "{code}");
        }
        assert_eq!((status(502), status(504)), (Effect::Unknown, Effect::UnderWay));
        for failure in [Failure::Connect, Failure::Overloaded] {
            assert_eq!(Effect::of(Err(failure)), Effect::NotSent, "{failure:?}");
        }
        for failure in [Failure::Reset, Failure::Invalid, Failure::Truncated, Failure::Lost] {
            assert_eq!(Effect::of(Err(failure)), Effect::Unknown, "{failure:?}");
        }
        assert_eq!(Effect::of(Err(Failure::Timeout)), Effect::UnderWay);
        let voids = [Effect::Done, Effect::Refused, Effect::NotSent, Effect::Unknown, Effect::UnderWay].map(Effect::voids);
        assert_eq!(voids, [true, false, false, true, true]);
    }
}
