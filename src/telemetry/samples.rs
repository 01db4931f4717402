//! Logging a few of many: of what may happen with every request, one line a second is enough to see how it looks.

use std::num::NonZeroU32;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

/// Which of many lines are logged.
pub struct Samples(DefaultDirectRateLimiter);

impl Default for Samples {
    fn default() -> Self {
        Self(RateLimiter::direct(Quota::per_second(NonZeroU32::MIN)))
    }
}

impl Samples {
    /// Whether this one is logged.
    #[must_use]
    pub fn take(&self) -> bool {
        self.0.check().is_ok()
    }
}
