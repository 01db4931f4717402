//! Where the time of a request goes that does not hit, for the log of slow requests (`log.slow`) and for traces.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use opentelemetry::trace::SpanKind;
use tokio::time::Instant;

use crate::telemetry::trace;

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A count that is shared with other instances.
    Limit,
    /// Redis, for what memory does not hold.
    Redis,
    /// The timeline: computing, and the orders that it needs.
    Timeline,
    /// A fetch through the cache, its own or another request's.
    Fetch,
    /// The upstream, for this request alone.
    Pass,
}

impl Step {
    /// As spans call it.
    const fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Redis => "redis",
            Self::Timeline => "timeline",
            Self::Fetch => "wait for fetch",
            Self::Pass => "pass",
        }
    }

    /// As the reason of a request whose client left meanwhile.
    #[must_use]
    pub const fn detail(self) -> &'static str {
        match self {
            Self::Limit => "waited-for-limit",
            Self::Redis => "waited-for-redis",
            Self::Timeline => "waited-for-timeline",
            Self::Fetch => "waited-for-fetch",
            Self::Pass => "waited-for-backend",
        }
    }

    const ALL: [Self; 5] = [Self::Limit, Self::Redis, Self::Timeline, Self::Fetch, Self::Pass];
}

/// How long a request has waited for each of these.
#[derive(Debug, Default)]
pub struct Spent {
    micros: [AtomicU64; Step::ALL.len()],
    /// The number of the step under way, counted from one.
    under_way: AtomicU8,
}

impl Spent {
    /// Waits for `work`, and notes how long that took. Steps of one request do not overlap.
    pub async fn on<T>(&self, step: Step, work: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let outer = self.under_way.swap(step as u8 + 1, Ordering::Relaxed);
        let done = work.await;
        self.under_way.store(outer, Ordering::Relaxed);
        let took = began.elapsed();
        // Redis has spans of its own.
        if step != Step::Redis {
            trace::note(SpanKind::Internal, step.name(), took, || (Vec::new(), Ok(())));
        }
        self.add(step, took);
        done
    }

    /// Notes that it has waited for that so long.
    pub fn add(&self, step: Step, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.micros[step as usize].fetch_add(micros, Ordering::Relaxed);
    }

    /// What it waits for.
    #[must_use]
    pub fn waits_for(&self) -> Option<Step> {
        Step::ALL.get(usize::from(self.under_way.load(Ordering::Relaxed)).checked_sub(1)?).copied()
    }

    /// How long it has waited for that.
    #[must_use]
    pub fn of(&self, step: Step) -> Duration {
        Duration::from_micros(self.micros[step as usize].load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn times_of_a_step_add_up_and_do_not_mix() {
        let spent = Spent::default();
        let slow = async || {
            sleep(Duration::from_millis(20)).await;
            7
        };
        for _ in 0..2 {
            assert_eq!(spent.on(Step::Redis, slow()).await, 7);
        }
        spent.on(Step::Pass, sleep(Duration::from_millis(5))).await;
        assert_eq!(
            [Step::Limit, Step::Redis, Step::Timeline, Step::Fetch, Step::Pass].map(|step| spent.of(step).as_millis()),
            [0, 40, 0, 0, 5]
        );
    }
}
