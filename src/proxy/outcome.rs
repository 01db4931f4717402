//! What became of a request: one value from which `Cache-Status` (RFC 9211), the metric label and the access log are made, so
//! that they never disagree.

use std::io::{Cursor, Write as _};
use std::time::Duration;

use http::HeaderValue;

use super::spent::Step;
use crate::cache::ready::HIT;
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
    /// Responses for this key were found uncacheable lately, so requests do not wait for each other.
    Uncacheable,
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
            Self::Failed(_) => OutcomeLabel::Failed,
            Self::Local => OutcomeLabel::Local,
            Self::ClientLeft(_) => OutcomeLabel::ClientLeft,
        }
    }

    /// Whether the access log calls it an error: failed, refused, given up by its client, or served stale for a failure.
    #[must_use]
    pub const fn is_error(&self) -> bool {
        matches!(
            self,
            Self::Refused(_) | Self::Failed(_) | Self::ClientLeft(_) | Self::Stale(_, StaleWhy::Error(_) | StaleWhy::WhileFailing)
        )
    }

    /// The reason, for the log and the `detail` parameter; empty where the outcome says it all.
    #[must_use]
    pub const fn detail(&self) -> &'static str {
        match self {
            Self::Hit(_) | Self::Fetched(_) | Self::Local => "",
            Self::Computed { .. } => TIMELINE,
            Self::Stale(_, why) => why.detail(),
            Self::Pass(why) => why.detail(),
            Self::Refused(why) => why.row().detail,
            Self::Failed(why) => why.detail(),
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
            Self::Fetched(fetched) => {
                let why = match fetched.why {
                    FetchWhy::UriMiss => "uri-miss",
                    FetchWhy::VaryMiss => "vary-miss",
                    FetchWhy::Stale => "stale",
                    FetchWhy::Request => "request",
                };
                let stored = if fetched.stored { "; stored" } else { "" };
                write!(text, "sluice; fwd={why}{stored}{}", if fetched.collapsed { "; collapsed" } else { "" })
            }
            Self::Pass(PassWhy::Method) => write!(text, "sluice; fwd=method"),
            Self::Pass(why) => write!(text, "sluice; fwd=bypass; detail={}", why.detail()),
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
    const fn detail(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::NoRule => "no-rule",
            Self::Rule => "rule",
            Self::Rollout => "rollout",
            Self::Shadow => "shadow",
            Self::Authorization => "authorization",
            Self::DoubtfulPath => "doubtful-path",
            Self::Uncacheable => "uncacheable",
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
        let fetched = |why, stored, collapsed| Outcome::Fetched(Fetched { why, stored, collapsed });
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
            (Outcome::Pass(PassWhy::Method), "sluice; fwd=method"),
            (Outcome::Pass(PassWhy::Authorization), "sluice; fwd=bypass; detail=authorization"),
            (Outcome::Failed(Failure::Timeout), "sluice; fwd=miss; detail=backend-timeout"),
        ] {
            assert_eq!(outcome.cache_status(), text);
        }
    }
}
