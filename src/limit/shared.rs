//! Counts that instances share through Redis, by Redis's own clock.

use std::sync::Arc;
use std::time::Duration;

use redis::Value;

use super::standing::Standing;
use super::table::Bucket;
use crate::config::rate_limit::RateLimit;
use crate::redis_link::RedisLink;

/// The generic cell rate algorithm (ITU-T I.371), as the counts of one instance follow it too. `ARGV`: microseconds that one
/// request takes, and those that a burst takes. Answers whether the request is within, how many more are, and how many
/// microseconds to wait.
const SCRIPT: &str = r"
local interval, room = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + interval
local early = due - room - now
if early > 0 then return {0, 0, math.ceil(early)} end
redis.call('SET', KEYS[1], string.format('%.0f', due), 'PX', math.ceil((due - now) / 1000) + 1)
return {1, math.floor(-early / interval), 0}
";

/// Counts in Redis.
#[derive(Clone)]
pub struct SharedCounts {
    link: RedisLink,
    prefix: Arc<str>,
}

impl SharedCounts {
    /// Counts in the Redis behind `link`, under names that begin with `namespace`.
    #[must_use]
    pub fn new(link: RedisLink, namespace: &str) -> Self {
        Self { link, prefix: format!("{namespace}!limit:").into() }
    }

    /// Counts one request; `None` while Redis is away.
    pub async fn take(&self, limit: &RateLimit, bucket: &Bucket) -> Option<Standing> {
        let interval = limit.rate.interval().as_secs_f64() * 1e6;
        let mut pipe = redis::pipe();
        pipe.cmd("EVAL")
            .arg(SCRIPT)
            .arg(1)
            .arg(format!("{}{}:{}", self.prefix, limit.name, bucket.hex()))
            .arg(interval)
            .arg(interval * f64::from(limit.burst.get()));
        let answer = self.link.read(&pipe).await.ok()?;
        let [Value::Array(said)] = &answer[..] else { return None };
        let [Value::Int(within), Value::Int(left), Value::Int(wait)] = said[..] else { return None };
        Some(Standing {
            within: within == 1,
            left: u32::try_from(left).unwrap_or(0),
            wait: Duration::from_micros(u64::try_from(wait).unwrap_or(0)),
        })
    }
}
