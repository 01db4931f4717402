//! What became of a request: one value from which `Cache-Status` (RFC 9211), the metric label and the access log are made, so
//! that they never disagree.

use std::io::{self, Cursor, Write};
use std::time::Duration;

use http::{HeaderValue, StatusCode};

use super::spent::Step;
use crate::cache::ready::HIT;
use crate::http::freshness::Unstorable;
use crate::request::refusal::Refusal;
use crate::telemetry::metrics::OutcomeLabel;
use crate::upstream::failure::Failure;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered from the cache, fresh for this much longer.
    Hit(Duration),
    /// Answered from the cache although it went stale this long ago.
    Stale(Duration, StaleWhy),
    /// Answered from the timeline; `waited` says that something was asked for first.
    Computed {
        /// Whether something was asked for first.
        waited: bool,
    },
    /// Answered by the upstream through the cache.
    Fetched(Fetched),
    /// Passed to the upstream without the cache.
    Pass(PassWhy),
    /// Refused before anything was asked.
    Refused(Refusal),
    /// The upstream failed and there was nothing to serve instead.
    Failed(Failure),
    /// It said so itself: its answer, with this status, went on.
    FailedWith(u16, Forwarded),
    /// Answered by Sluice itself: `/health` and the like.
    Local,
    /// The client left before there was an answer, and this is what it waited for. Nobody is told by a field; metrics, log and spans are.
    ClientLeft(Option<Step>),
}

/// The reason of what was answered from the timeline.
const TIMELINE: &str = "timeline";

/// Why a stale answer was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleWhy {
    /// It is being revalidated meanwhile (RFC 5861 §3).
    Revalidating,
    /// The upstream failed just now (RFC 5861 §4).
    Error(Failure),
    /// The upstream failed lately and is spared.
    WhileFailing,
    /// The client made more requests than a limit allows.
    Limited,
}

/// A response of the upstream's that went through the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Why the cache could not answer.
    pub why: FetchWhy,
    /// Whether the response is being stored.
    pub stored: bool,
    /// Whether another request had begun the fetch (collapsed forwarding).
    pub collapsed: bool,
    /// Why it is not stored, so far as that is known.
    pub unstored: Option<Unstorable>,
}

/// How an answer came from the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// Through the cache.
    Fetched(Fetched),
    /// Without the cache.
    Pass(PassWhy),
}

/// Why the cache could not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchWhy {
    /// Nothing is stored under this key.
    UriMiss,
    /// Something is, but for other request fields.
    VaryMiss,
    /// What is stored is too old.
    Stale,
    /// What is stored could be served, but the request's own directives want more.
    Request,
}

/// Why a request went past the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassWhy {
    /// A method that the rule does not cache.
    Method,
    /// No rule matches.
    NoRule,
    /// The rule says `cache = false`.
    Rule,
    /// The rule is being rolled out, and this client is not among those that it caches for.
    Rollout,
    /// The rule is in shadow: the upstream answers everything.
    Shadow,
    /// The request carries `Authorization`.
    Authorization,
    /// A path whose meaning is doubtful: it is forwarded verbatim and never cached.
    DoubtfulPath,
    /// Responses for this key were found uncacheable lately, so requests do not wait for each other; and why the last one was, so far as that
    /// is known.
    Uncacheable(Option<Unstorable>),
    /// A body came with a method that has none.
    Body,
    /// The fetch that this request waited for took too long, so it was passed by itself.
    WaitedTooLong,
    /// The client asked that the response be stored nowhere.
    NoStore,
    /// The client asked for a range of what is not stored.
    Part,
}

impl Outcome {
    /// The same for a response with this status: one of the upstream's own that says that it failed is a failure, as no response is. It is
    /// none where the upstream only says what it does not do (501, 505): clients could have it say that all day.
    #[must_use]
    pub const fn with_status(self, status: StatusCode) -> Self {
        let status = status.as_u16();
        if status < 500 || matches!(status, 501 | 505) {
            return self;
        }
        match self {
            Self::Fetched(fetched) => Self::FailedWith(status, Forwarded::Fetched(fetched)),
            Self::Pass(why) => Self::FailedWith(status, Forwarded::Pass(why)),
            other => other,
        }
    }

    /// What metrics call it.
    #[must_use]
    pub const fn label(&self) -> OutcomeLabel {
        match self {
            Self::Hit(_) | Self::Computed { waited: false } => OutcomeLabel::Hit,
            Self::Stale(..) => OutcomeLabel::Stale,
            Self::Fetched(Fetched { collapsed: false, .. }) | Self::Computed { waited: true } => OutcomeLabel::Miss,
            Self::Fetched(_) => OutcomeLabel::Collapsed,
            Self::Pass(_) => OutcomeLabel::Pass,
            Self::Refused(_) => OutcomeLabel::Refused,
            Self::Failed(_) | Self::FailedWith(..) => OutcomeLabel::Failed,
            Self::Local => OutcomeLabel::Local,
            Self::ClientLeft(_) => OutcomeLabel::ClientLeft,
        }
    }

    /// Whether the access log calls it an error: failed, refused, given up by its client, or served stale for a failure.
    #[must_use]
    pub const fn is_error(&self) -> bool {
        matches!(
            self,
            Self::Refused(_)
                | Self::Failed(_)
                | Self::FailedWith(..)
                | Self::ClientLeft(_)
                | Self::Stale(_, StaleWhy::Error(_) | StaleWhy::WhileFailing)
        )
    }

    /// The reason, for the log and the `detail` parameter; empty where the outcome says it all.
    #[must_use]
    pub const fn detail(&self) -> &'static str {
        match self {
            Self::Fetched(Fetched { stored: false, unstored: Some(why), .. }) => why.detail(),
            Self::Hit(_) | Self::Fetched(_) | Self::Local => "",
            Self::Computed { .. } => TIMELINE,
            Self::Stale(_, why) => why.detail(),
            Self::Pass(why) => why.detail(),
            Self::Refused(why) => why.row().detail,
            Self::Failed(why) => why.detail(),
            Self::FailedWith(status, _) => Failure::Status(*status).detail(),
            Self::ClientLeft(Some(step)) => step.detail(),
            Self::ClientLeft(None) => "",
        }
    }

    /// The `Cache-Status` field (RFC 9211 §2).
    #[must_use]
    pub fn cache_status(&self) -> HeaderValue {
        // On the stack, so that a hit pays for one allocation and not for two.
        let mut buffer = [0; 128];
        let mut text = Cursor::new(&mut buffer[..]);
        let written = match self {
            Self::Hit(left) => {
                let mut digits = itoa::Buffer::new();
                text.write_all(HIT.as_bytes()).and_then(|()| text.write_all(digits.format(left.as_secs()).as_bytes()))
            }
            Self::Stale(by, why) => write!(text, "sluice; hit; ttl=-{}; detail={}", by.as_secs(), why.detail()),
            Self::Computed { waited: false } => return HeaderValue::from_static("sluice; hit; detail=timeline"),
            Self::Computed { waited: true } => return HeaderValue::from_static("sluice; fwd=miss; detail=timeline"),
            Self::Fetched(fetched) => fetched.write(&mut text).and_then(|()| match self.detail() {
                "" => Ok(()),
                detail => write!(text, "; detail={detail}"),
            }),
            Self::Pass(why) => why.write(&mut text),
            // `fwd-status` is RFC 9211 §2.3.
            Self::FailedWith(status, Forwarded::Fetched(fetched)) => {
                fetched.write(&mut text).and_then(|()| write!(text, "; fwd-status={status}; detail={}", self.detail()))
            }
            Self::FailedWith(status, Forwarded::Pass(why)) => why.write(&mut text).and_then(|()| write!(text, "; fwd-status={status}")),
            Self::Refused(why) => write!(text, "sluice; fwd=bypass; detail={}", why.row().detail),
            Self::Failed(why) => write!(text, "sluice; fwd=miss; detail={}", why.detail()),
            Self::Local => write!(text, "sluice; fwd=bypass; detail=local"),
            Self::ClientLeft(_) => write!(text, "sluice"),
        };
        debug_assert!(written.is_ok(), "the longest of these has under 128 bytes");
        let length = usize::try_from(text.position()).unwrap_or(0);
        HeaderValue::from_bytes(&buffer[..length]).unwrap_or_else(|_| HeaderValue::from_static("sluice"))
    }
}

impl Fetched {
    /// Writes what `Cache-Status` says of it, but for the reasons.
    fn write(&self, text: &mut impl Write) -> io::Result<()> {
        let why = match self.why {
            FetchWhy::UriMiss => "uri-miss",
            FetchWhy::VaryMiss => "vary-miss",
            FetchWhy::Stale => "stale",
            FetchWhy::Request => "request",
        };
        let stored = if self.stored { "; stored" } else { "" };
        write!(text, "sluice; fwd={why}{stored}{}", if self.collapsed { "; collapsed" } else { "" })
    }
}

impl StaleWhy {
    const fn detail(self) -> &'static str {
        match self {
            Self::Revalidating => "stale-while-revalidate",
            Self::WhileFailing => "stale-if-error-backend-left-alone",
            Self::Limited => "stale-rate-limited",
            Self::Error(failure) => match failure {
                Failure::Connect => "stale-if-error-connect",
                Failure::Reset => "stale-if-error-reset",
                Failure::Timeout => "stale-if-error-timeout",
                Failure::Invalid => "stale-if-error-invalid",
                Failure::Truncated => "stale-if-error-truncated",
                Failure::Status(500) => "stale-if-error-500",
                Failure::Status(502) => "stale-if-error-502",
                Failure::Status(503) => "stale-if-error-503",
                Failure::Status(_) => "stale-if-error-504",
                Failure::Overloaded => "stale-if-error-overloaded",
                Failure::Lost => "stale-if-error-lost",
            },
        }
    }
}

impl PassWhy {
    /// Writes what `Cache-Status` says of it.
    fn write(self, text: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Method => write!(text, "sluice; fwd=method"),
            why => write!(text, "sluice; fwd=bypass; detail={}", why.detail()),
        }
    }

    const fn detail(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::NoRule => "no-rule",
            Self::Rule => "rule",
            Self::Rollout => "rollout",
            Self::Shadow => "shadow",
            Self::Authorization => "authorization",
            Self::DoubtfulPath => "doubtful-path",
            Self::Uncacheable(None) => "uncacheable",
            Self::Uncacheable(Some(why)) => why.detail(),
            Self::Body => "request-body",
            Self::WaitedTooLong => "waited-too-long",
            Self::NoStore => "no-store",
            Self::Part => "part",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_status_says_what_the_interface_promises() {
        let s = Duration::from_secs;
        let fetched = |why, stored, collapsed| Outcome::Fetched(Fetched { why, stored, collapsed, unstored: None });
        let cookie = Fetched { why: FetchWhy::UriMiss, stored: false, collapsed: false, unstored: Some(Unstorable::SetCookie) };
        let busy = StatusCode::SERVICE_UNAVAILABLE;
        for (outcome, text) in [
            (Outcome::Hit(s(42)), "sluice; hit; ttl=42"),
            (Outcome::Hit(s(0)), "sluice; hit; ttl=0"),
            (Outcome::Hit(s(u64::MAX)), "sluice; hit; ttl=18446744073709551615"),
            (Outcome::Stale(s(3), StaleWhy::Revalidating), "sluice; hit; ttl=-3; detail=stale-while-revalidate"),
            (Outcome::Stale(s(3), StaleWhy::Error(Failure::Status(503))), "sluice; hit; ttl=-3; detail=stale-if-error-503"),
            (Outcome::Computed { waited: false }, "sluice; hit; detail=timeline"),
            (Outcome::Computed { waited: true }, "sluice; fwd=miss; detail=timeline"),
            (fetched(FetchWhy::UriMiss, true, false), "sluice; fwd=uri-miss; stored"),
            (fetched(FetchWhy::UriMiss, true, true), "sluice; fwd=uri-miss; stored; collapsed"),
            (fetched(FetchWhy::Stale, false, false), "sluice; fwd=stale"),
            (Outcome::Fetched(cookie), "sluice; fwd=uri-miss; detail=uncacheable-set-cookie"),
            (Outcome::Fetched(Fetched { stored: true, ..cookie }), "sluice; fwd=uri-miss; stored"),
            (Outcome::Pass(PassWhy::Uncacheable(None)), "sluice; fwd=bypass; detail=uncacheable"),
            (Outcome::Pass(PassWhy::Uncacheable(Some(Unstorable::NoStore))), "sluice; fwd=bypass; detail=uncacheable-no-store"),
            (
                Outcome::Fetched(Fetched { collapsed: true, ..cookie }).with_status(busy),
                "sluice; fwd=uri-miss; collapsed; fwd-status=503; detail=backend-status",
            ),
            (Outcome::Pass(PassWhy::NoRule).with_status(busy), "sluice; fwd=bypass; detail=no-rule; fwd-status=503"),
            (Outcome::Pass(PassWhy::Method).with_status(busy), "sluice; fwd=method; fwd-status=503"),
            (Outcome::Pass(PassWhy::Method), "sluice; fwd=method"),
            (Outcome::Pass(PassWhy::Authorization), "sluice; fwd=bypass; detail=authorization"),
            (Outcome::Failed(Failure::Timeout), "sluice; fwd=miss; detail=backend-timeout"),
        ] {
            assert_eq!(outcome.cache_status(), text);
        }
    }

    #[test]
    fn what_the_upstream_answers_with_an_error_of_its_own_has_failed() {
        let fetched = Fetched { why: FetchWhy::VaryMiss, stored: false, collapsed: true, unstored: Some(Unstorable::Error) };
        let of = |outcome: Outcome, status| outcome.with_status(StatusCode::from_u16(status).unwrap());
        for outcome in [Outcome::Fetched(fetched), Outcome::Pass(PassWhy::Rule)] {
            for status in [500, 502, 503, 504, 507, 599] {
                let failed = of(outcome, status);
                assert!(failed.label() == OutcomeLabel::Failed && failed.is_error() && failed.detail() == "backend-status", "{status}");
            }
            for status in [200, 304, 404, 429, 501, 505] {
                assert_eq!(of(outcome, status), outcome, "{status}");
            }
        }
        // What is not the upstream's own answer keeps its word.
        for outcome in
            [Outcome::Local, Outcome::Refused(Refusal::Overloaded), Outcome::Hit(Duration::ZERO), Outcome::Failed(Failure::Connect)]
        {
            assert_eq!(of(outcome, 503), outcome);
        }
    }
}
