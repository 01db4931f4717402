//! The targets that are asked for most: told to operators, and remembered in Redis, if that is wanted, so that a process that starts
//! can ask for them first.
//!
//! A sample of the requests that the cache answered is counted here, and added to the counts in Redis now and then; older counts
//! weigh less and less.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::Value;
use tokio::time::{Instant, sleep};

use crate::redis_link::RedisLink;

/// One request of so many is counted.
const SAMPLED: u32 = 64;
/// Targets that are counted between two writes.
const MOST: usize = 4096;
/// Targets that are kept in Redis.
const KEPT: isize = 10_000;
/// Longer targets are not kept, in bytes.
const LONGEST: usize = 2048;
/// Between two writes, after which older counts weigh less by this.
const BETWEEN: Duration = Duration::from_secs(30);
const WEIGHT: f64 = 0.97;
/// Targets whose older counts this process keeps.
const MOST_HERE: usize = 256;
/// How long Redis is waited for when a program starts.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is asked for most.
pub struct Hottest {
    link: Option<RedisLink>,
    name: String,
    /// Since the last write.
    counts: Mutex<HashMap<String, u32>>,
    /// What this process was asked for most until then, and about how often.
    here: Mutex<Vec<(String, f64)>>,
}

impl Hottest {
    /// Counts that are kept in Redis under a name that begins with `namespace`, if there is a `link` to it. They are written on the
    /// current runtime.
    #[must_use]
    pub fn start(link: Option<RedisLink>, namespace: &str) -> Arc<Self> {
        let name = format!("{namespace}!hottest");
        let hottest = Arc::new(Self { link, name, counts: Mutex::default(), here: Mutex::default() });
        let weak = Arc::downgrade(&hottest);
        tokio::spawn(async move {
            loop {
                sleep(BETWEEN).await;
                let Some(hottest) = weak.upgrade() else { break };
                hottest.write().await;
            }
        });
        hottest
    }

    /// What this process was asked for most of late, and about how often: the `most` first ones of what the cache answered.
    #[must_use]
    pub fn here(&self, most: usize) -> Vec<(String, u64)> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
        let sorted = merged(&here, &counts, 1.0, most);
        drop((counts, here));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts, far below what they hold")]
        let times = |count: f64| (count * f64::from(SAMPLED)).round() as u64;
        sorted.into_iter().map(|(target, count)| (target, times(count))).collect()
    }

    /// Counts a request that the cache answered; most are not looked at.
    pub fn note(&self, target: &str) {
        thread_local!(static COUNT: Cell<u32> = const { Cell::new(0) });
        let count = COUNT.get().wrapping_add(1);
        COUNT.set(count);
        if !count.is_multiple_of(SAMPLED) || target.len() > LONGEST {
            return;
        }
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(target) {
            *count += 1;
        } else if counts.len() < MOST {
            counts.insert(target.to_owned(), 1);
        }
    }

    async fn write(&self) {
        let counts = std::mem::take(&mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        {
            let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
            *here = merged(&here, &counts, WEIGHT, MOST_HERE);
        }
        let Some(link) = self.link.as_ref().filter(|_| !counts.is_empty()) else { return };
        let mut pipe = redis::pipe();
        pipe.cmd("ZUNIONSTORE").arg(&self.name).arg(1).arg(&self.name).arg("WEIGHTS").arg(WEIGHT).ignore();
        for (target, count) in counts {
            pipe.zincr(&self.name, target, count).ignore();
        }
        pipe.zremrangebyrank(&self.name, 0, -KEPT - 1).ignore();
        // While Redis is away, nobody asks for them.
        let _ = link.read(&pipe).await.is_ok();
    }

    /// The targets that all instances were asked for most, the first one most of all; none if Redis does not come up in time.
    pub async fn known(&self, most: usize) -> Vec<String> {
        let Some(link) = &self.link else { return Vec::new() };
        let started = Instant::now();
        while !link.is_up() && started.elapsed() < PATIENCE {
            sleep(Duration::from_millis(50)).await;
        }
        let mut pipe = redis::pipe();
        pipe.zrevrange(&self.name, 0, isize::try_from(most).unwrap_or(isize::MAX) - 1);
        let found = link.read(&pipe).await.ok().and_then(|answers| answers.into_iter().next());
        let targets: Vec<String> = found.and_then(|value: Value| redis::from_redis_value(value).ok()).unwrap_or_default();
        // Others may write there too: what is no path is refused when it is asked for.
        targets.into_iter().filter(|target| target.starts_with('/') && target.len() <= LONGEST).collect()
    }
}

/// Older counts, which weigh less by this, with newer ones: so many of the largest, the first one the largest of all.
fn merged(older: &[(String, f64)], newer: &HashMap<String, u32>, weight: f64, most: usize) -> Vec<(String, f64)> {
    let mut counts: HashMap<&str, f64> = older.iter().map(|(target, count)| (target.as_str(), count * weight)).collect();
    for (target, count) in newer {
        *counts.entry(target).or_default() += f64::from(*count);
    }
    let mut sorted: Vec<(&str, f64)> = counts.into_iter().collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(b.0)));
    sorted.truncate(most);
    sorted.into_iter().map(|(target, count)| (target.to_owned(), count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_asked_for_most_comes_first_and_older_counts_fade() {
        let hottest = Hottest::start(None, "t");
        let ask = |target: &str, times: u32| (0..times * SAMPLED).for_each(|_| hottest.note(target));
        ask("/old", 10);
        ask("/a", 3);
        assert_eq!(hottest.here(1), [("/old".to_owned(), 640)]);
        for _ in 0..60 {
            hottest.write().await;
        }
        ask("/b", 4);
        let targets: Vec<String> = hottest.here(9).into_iter().map(|(target, _)| target).collect();
        assert_eq!(targets, ["/b", "/old", "/a"]);
        assert!(hottest.known(9).await.is_empty(), "nothing is remembered without Redis");
    }
}
