//! Wall time, and the only place that reads it.
//!
//! Sluice keeps two clocks apart. *Freshness* is wall time, because it is shared through Redis by several
//! instances and outlives a restart; it is a [`Wall`] and is handed into pure code as `now`. *Deadlines* belong to
//! the runtime (`tokio::time`), because they must not jump when the wall clock is set.

use std::ops::Add;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment of wall time in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wall(u64);

impl Wall {
    /// The present moment. A clock set before 1970 reads as 1970.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "the one place where wall time is read")]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(millis(since))
    }

    /// The moment `millis` milliseconds after 1970.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// As people write it: `2025-01-01T00:00:00.123Z`.
    #[must_use]
    pub fn text(self) -> String {
        let moment = i64::try_from(self.0).ok().and_then(|moment| jiff::Timestamp::from_millisecond(moment).ok());
        moment.map(|moment| moment.to_string()).unwrap_or_default()
    }

    /// As HTTP writes it (RFC 9110 §5.6.7): `Sun, 06 Nov 1994 08:49:37 GMT`.
    #[must_use]
    pub fn http_date(self) -> String {
        let moment = i64::try_from(self.0).ok().and_then(|moment| jiff::Timestamp::from_millisecond(moment).ok());
        let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
        moment.and_then(|moment| printer.timestamp_to_rfc9110_string(&moment).ok()).unwrap_or_default()
    }

    /// How long after `earlier` this is; zero if it is not after it.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Wall {
    type Output = Self;
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(millis(span)))
    }
}

/// A duration in whole milliseconds, capped at what 64 bits hold.
#[must_use]
pub fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
