//! The targets that are asked for most, remembered in Redis, so that a process that starts can ask for them first.
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
/// How long Redis is waited for when a program starts.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is asked for most.
pub struct Hottest {
    link: RedisLink,
    name: String,
    counts: Mutex<HashMap<String, u32>>,
}

impl Hottest {
    /// Counts that are kept in Redis under a name that begins with `namespace`. They are written on the current runtime.
    #[must_use]
    pub fn start(link: RedisLink, namespace: &str) -> Arc<Self> {
        let hottest = Arc::new(Self { link, name: format!("{namespace}!hottest"), counts: Mutex::default() });
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
        if counts.is_empty() {
            return;
        }
        let mut pipe = redis::pipe();
        pipe.cmd("ZUNIONSTORE").arg(&self.name).arg(1).arg(&self.name).arg("WEIGHTS").arg(WEIGHT).ignore();
        for (target, count) in counts {
            pipe.zincr(&self.name, target, count).ignore();
        }
        pipe.zremrangebyrank(&self.name, 0, -KEPT - 1).ignore();
        // While Redis is away, nobody asks for them.
        let _ = self.link.read(&pipe).await.is_ok();
    }

    /// The targets that were asked for most, the first one most of all; none if Redis does not come up in time.
    pub async fn known(&self, most: usize) -> Vec<String> {
        let started = Instant::now();
        while !self.link.is_up() && started.elapsed() < PATIENCE {
            sleep(Duration::from_millis(50)).await;
        }
        let mut pipe = redis::pipe();
        pipe.zrevrange(&self.name, 0, isize::try_from(most).unwrap_or(isize::MAX) - 1);
        let found = self.link.read(&pipe).await.ok().and_then(|answers| answers.into_iter().next());
        let targets: Vec<String> = found.and_then(|value: Value| redis::from_redis_value(value).ok()).unwrap_or_default();
        // Others may write there too: what is no path is refused when it is asked for.
        targets.into_iter().filter(|target| target.starts_with('/') && target.len() <= LONGEST).collect()
    }
}
