//! Why the timeline does not answer a request: one value from which the metric, the log and `explain` are made.

use std::fmt;

/// Why the timeline does not answer a request. Then the backend does, or what is stored for its URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// It carries credentials: whether a response is for those who have some, only the backend says.
    Credentials,
    /// Backends may understand it differently, or refuse it.
    Shape,
    /// Nothing is known of its symbol: the backend never answered anything about it.
    UnknownSymbol,
    /// Too few of the endpoint's answers were compared with the backend's.
    Probation,
    /// The endpoint's answers differed from the backend's.
    Off,
    /// The symbol's answers differed from the backend's.
    Quarantined,
    /// The newest orders are not known yet.
    NewestMissing,
    /// They are older than the rule allows, and did not come in time.
    NewestLate,
    /// They are older than the rule allows while the source fails, or the source never gave any.
    NewestFailing,
    /// What the source says of them is nothing to compute with, and what is known is older than the rule allows while they are asked for.
    NewestUnfit,
    /// Spans that are over are not known yet.
    SpansMissing,
    /// They could not be read a moment ago.
    SpansFailing,
    /// The window needs more spans than are looked for.
    TooManySpans,
    /// Its answer has more buckets than are computed.
    TooManyBuckets,
    /// The window holds an amount that is not known to all digits, or sides that the database takes for one.
    Inexact,
    /// A bucket begins beyond the year 9999, which backends write differently.
    FarTimes,
    /// Orders of one moment show, and it is not known in which order the backend gives them.
    Ties,
    /// The fields of such a response were not seen yet, or say that it is not for sharing.
    Fields,
    /// There is no room to compute its answer in.
    NoRoom,
    /// What it was made from was purged meanwhile.
    Voided,
    /// Computing it failed.
    Lost,
}

impl Unanswered {
    /// Every reason.
    pub const ALL: [Self; 21] = [
        Self::Credentials,
        Self::Shape,
        Self::UnknownSymbol,
        Self::Probation,
        Self::Off,
        Self::Quarantined,
        Self::NewestMissing,
        Self::NewestLate,
        Self::NewestFailing,
        Self::NewestUnfit,
        Self::SpansMissing,
        Self::SpansFailing,
        Self::TooManySpans,
        Self::TooManyBuckets,
        Self::Inexact,
        Self::FarTimes,
        Self::Ties,
        Self::Fields,
        Self::NoRoom,
        Self::Voided,
        Self::Lost,
    ];

    /// The value of the metric label `reason`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Credentials => "credentials",
            Self::Shape => "shape",
            Self::UnknownSymbol => "unknown_symbol",
            Self::Probation => "probation",
            Self::Off => "off",
            Self::Quarantined => "quarantined",
            Self::NewestMissing => "newest_missing",
            Self::NewestLate => "newest_late",
            Self::NewestFailing => "newest_failing",
            Self::NewestUnfit => "newest_unfit",
            Self::SpansMissing => "spans_missing",
            Self::SpansFailing => "spans_failing",
            Self::TooManySpans => "too_many_spans",
            Self::TooManyBuckets => "too_many_buckets",
            Self::Inexact => "inexact",
            Self::FarTimes => "far_times",
            Self::Ties => "ties",
            Self::Fields => "fields",
            Self::NoRoom => "no_room",
            Self::Voided => "voided",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Credentials => "the request carries credentials",
            Self::Shape => "backends may understand the request differently, or refuse it",
            Self::UnknownSymbol => "nothing is known of the symbol yet",
            Self::Probation => "the endpoint is on probation",
            Self::Off => "the endpoint is off, since an answer differed from the backend's",
            Self::Quarantined => "the symbol is in quarantine, since an answer differed from the backend's",
            Self::NewestMissing => "the newest orders are not known yet, and are being asked for",
            Self::NewestLate => "the newest orders are older than the rule's stale_while_revalidate allows, and did not come in time",
            Self::NewestFailing => {
                "the newest orders cannot be read, and what is known of them is older than the rule's stale_if_error allows"
            }
            Self::NewestUnfit => "what the source says of the newest orders is nothing to compute with",
            Self::SpansMissing => "older orders are not known yet, and are being fetched",
            Self::SpansFailing => "older orders could not be read a moment ago",
            Self::TooManySpans => "the window is too long",
            Self::TooManyBuckets => "the answer has too many buckets",
            Self::Inexact => "an amount in the window is not known to all digits",
            Self::FarTimes => "a bucket begins beyond the year 9999",
            Self::Ties => "orders of one millisecond show, and it is not known in which order the backend gives them",
            Self::Fields => "the header fields of such an answer of the backend's were not seen yet, or it is not for sharing",
            Self::NoRoom => "there is no room to compute the answer in",
            Self::Voided => "orders were purged while the answer was computed",
            Self::Lost => "computing the answer failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_reason_has_a_name_and_a_sentence_of_its_own() {
        let names: BTreeSet<&str> = Unanswered::ALL.iter().map(|reason| reason.name()).collect();
        let sentences: BTreeSet<String> = Unanswered::ALL.iter().map(ToString::to_string).collect();
        assert_eq!((names.len(), sentences.len()), (Unanswered::ALL.len(), Unanswered::ALL.len()));
        for (number, reason) in Unanswered::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number, "{reason}");
        }
    }
}
