//! Voids that instances share: a log in Redis, with publish and subscribe for those who listen.
//!
//! ```text
//! NAMESPACE!voids        hash: epoch, seq (of the newest void), done (worked off until there), trimmed (forgotten until there)
//! NAMESPACE!voids:log    sorted set: seq → void, as JSON
//! NAMESPACE!voids        channel: "void EPOCH SEQ JSON", "done EPOCH JSON"
//! ```
//!
//! Every entry in Redis is written with the [`Position`] in the log up to which it was held against voids, and only while that is
//! the newest one: the script that writes looks first. So whoever reads an entry need hold it only against voids after that, and
//! once a void is worked off, nothing is left or comes that it concerns.
//!
//! An instance is connected to Redis only once it listens and has caught up: [`VoidLog::connected`] runs before any request reaches
//! the new connections. A message that is lost is noticed by the next one, or by the look at `seq` four times a second. Once
//! connections broke, requests wait until new ones are made ([`VoidLog::is_uncertain`]) or Redis refuses them: then it is away, nobody
//! can be asked, and what memory holds goes on being served. Voids wait here meanwhile and are added first thing when it is back.
//!
//! No clock of one instance is compared with that of another: a void counts from the moment at which it arrives.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_core::Stream;
use redis::aio::MultiplexedConnection;
use redis::{Client, Cmd, ErrorKind, RedisError, Value};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, interval, timeout};

use super::entry::Entry;
use super::void::{Selection, Validity, Voids};
use crate::clock::Wall;
use crate::redis_link::RedisLink;
use crate::redis_link::connections::OnConnect;

/// How often it is looked whether a message was lost.
const LOOK: Duration = Duration::from_millis(250);
/// Voids that stay in the log although they are worked off, for instances that were away.
const KEPT: u64 = 1000;
/// Voids that wait here for Redis; beyond that, everything is void.
const PENDING: usize = 1024;

/// What was added so long ago is known to all that listen, even if the log is lost then.
const LATELY: Duration = Duration::from_secs(60);

/// Adds a void. `ARGV`: the epoch to begin with, the void, the channel. A log that nobody works off (the user may not `SCAN`, say)
/// does not grow for ever: it begins anew, and with it what is stored.
const ADD: &str = r"
if redis.call('ZCARD', KEYS[2]) >= 100000 then redis.call('DEL', KEYS[1], KEYS[2]) end
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[1])
local epoch = redis.call('HGET', KEYS[1], 'epoch')
local seq = redis.call('HINCRBY', KEYS[1], 'seq', 1)
redis.call('ZADD', KEYS[2], seq, string.format('%d %s', seq, ARGV[2]))
redis.call('PUBLISH', ARGV[3], string.format('void %s %d %s', epoch, seq, ARGV[2]))
return seq
";

/// Reads what came after a position. `ARGV`: the epoch to begin with, the known epoch and seq.
const READ: &str = r"
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[1])
local head = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'done', 'trimmed')
local after = head[1] == ARGV[2] and ARGV[3] or '0'
return {head[1], tonumber(head[2] or 0), tonumber(head[3] or 0), tonumber(head[4] or 0),
        redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. after, '+inf')}
";

/// Notes that voids are worked off, forgets old ones of them, and tells how many entries each concerned: those that were left, and those
/// that the third key counted as they were removed. `ARGV`: epoch, seq, how many are kept, channel, then each void's number and how many
/// were left. Returns what it tells.
const DONE: &str = r"
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 0 end
local counts = {}
for i = 5, #ARGV, 2 do
  counts[ARGV[i]] = tonumber(ARGV[i + 1]) + tonumber(redis.call('HGET', KEYS[3], ARGV[i]) or 0)
end
-- Kept for a worker that does not get this answer and asks again.
if redis.call('HLEN', KEYS[3]) > 10000 then redis.call('DEL', KEYS[3]) end
local told = string.format('done %s %s', ARGV[1], cjson.encode({upto = tonumber(ARGV[2]), counts = counts}))
local done = math.max(tonumber(ARGV[2]), tonumber(redis.call('HGET', KEYS[1], 'done') or 0))
redis.call('HSET', KEYS[1], 'done', done)
local trimmed = math.min(done, tonumber(redis.call('HGET', KEYS[1], 'seq') or 0) - tonumber(ARGV[3]))
if trimmed > tonumber(redis.call('HGET', KEYS[1], 'trimmed') or 0) then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', trimmed)
  redis.call('HSET', KEYS[1], 'trimmed', trimmed)
end
redis.call('PUBLISH', ARGV[4], told)
return told
";

/// Begins a new log where an old state of Redis was restored, in which voids are missing: what is stored there is of no use. `ARGV`:
/// the known epoch and seq, the new epoch.
const RENEW: &str = r"
local head = redis.call('HMGET', KEYS[1], 'epoch', 'seq')
if head[1] ~= ARGV[1] or tonumber(head[2] or 0) >= tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'epoch', ARGV[3])
return 1
";

/// A void as the log has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedVoid {
    /// What is void.
    pub what: Selection,
    /// Whether it is only stale.
    #[serde(default)]
    pub soft: bool,
}

impl LoggedVoid {
    /// What a text says; what cannot be read, because a later version wrote it or somebody else did, voids everything.
    #[must_use]
    pub fn read(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_else(|_| Self { what: Selection::Pattern("*".to_owned()), soft: false })
    }
}

/// A place in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Which log: one that was lost is another one when it begins anew.
    pub epoch: u64,
    /// The newest void that counts.
    pub seq: u64,
}

impl Position {
    /// The epoch as Redis has it.
    #[must_use]
    pub fn epoch_text(self) -> String {
        format!("{:016x}", self.epoch)
    }
}

/// What is known of the log.
#[derive(Default)]
struct Known {
    at: Position,
    /// Worked off until there, by whoever did.
    done: u64,
    /// What is kept, oldest first.
    voids: VecDeque<(u64, LoggedVoid)>,
    /// How many entries in Redis each void concerned, once it is worked off.
    counts: BTreeMap<u64, u64>,
}

/// The log, as one instance knows it.
pub struct VoidLog {
    link: RedisLink,
    head: String,
    log: String,
    voids: Arc<Voids>,
    known: Mutex<Known>,
    /// Voids that wait for Redis; each is told from its equals by its address.
    pending: Mutex<VecDeque<Arc<LoggedVoid>>>,
    /// Voids that this instance added lately, for a log that is lost before all have read them.
    own: Mutex<VecDeque<(Instant, LoggedVoid)>>,
    changed: watch::Sender<()>,
    following: Mutex<Option<AbortHandle>>,
    runtime: Handle,
    itself: Weak<Self>,
}

/// What came of adding a void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// All instances know it by this number, or soon do.
    Shared(u64),
    /// Redis is away: the others get to know it when it is back.
    Waits,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A name for a log that begins now.
fn new_epoch() -> String {
    Position { epoch: fastrand::u64(1..), seq: 0 }.epoch_text()
}

fn malformed() -> RedisError {
    RedisError::from((ErrorKind::Parse, "the log of voids is malformed"))
}

impl VoidLog {
    /// The log of a namespace. What arrives is added to `voids`.
    #[must_use]
    pub fn new(link: RedisLink, namespace: &str, voids: Arc<Voids>, runtime: Handle) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            link,
            head: format!("{namespace}!voids"),
            log: format!("{namespace}!voids:log"),
            voids,
            known: Mutex::default(),
            pending: Mutex::default(),
            own: Mutex::default(),
            changed: watch::Sender::new(()),
            following: Mutex::default(),
            runtime,
            itself: Weak::clone(itself),
        })
    }

    /// The name of the hash in Redis, for scripts that look at it.
    #[must_use]
    pub fn head(&self) -> &str {
        &self.head
    }

    /// Up to where the log is known.
    #[must_use]
    pub fn position(&self) -> Position {
        lock(&self.known).at
    }

    /// Whether something may have been voided that is not known here, and Redis is being asked.
    #[must_use]
    pub fn is_uncertain(&self) -> bool {
        self.link.is_asking()
    }

    /// Waits until it is known what was voided, or Redis has to be taken for away.
    pub async fn ascertain(&self) {
        self.link.asked().await;
    }

    /// Follows what is known of the log as it changes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What an entry is that was read from Redis and had been held against voids up to `position`.
    #[must_use]
    pub fn admit(&self, entry: &Entry, position: Position) -> Validity {
        let known = lock(&self.known);
        if position.epoch != known.at.epoch {
            return Validity::Void;
        }
        let mut soft = false;
        for (_, void) in known.voids.iter().rev().take_while(|(seq, _)| *seq > position.seq).filter(|(_, void)| void.what.concerns(entry)) {
            if !void.soft {
                return Validity::Void;
            }
            soft = true;
        }
        if soft { Validity::Expired(Box::new(entry.expired(Wall::now(), entry.asked_at))) } else { Validity::Valid }
    }

    /// Adds a void for all instances. It counts here already, and here again once the log says so: what was read from Redis
    /// meanwhile is void too.
    pub async fn add(&self, void: LoggedVoid) -> Added {
        {
            let mut own = lock(&self.own);
            own.push_back((Instant::now(), void.clone()));
            while own.len() > PENDING || own.front().is_some_and(|(at, _)| at.elapsed() > LATELY) {
                own.pop_front();
            }
        }
        if let Ok(Value::Int(seq)) = self.link.call(&self.add_command(&void)).await
            && let Ok(seq) = u64::try_from(seq)
            && (self.position().seq >= seq || self.catch_up().await)
        {
            return Added::Shared(seq);
        }
        self.wait_for_redis(void);
        Added::Waits
    }

    fn wait_for_redis(&self, void: LoggedVoid) {
        let mut pending = lock(&self.pending);
        if pending.len() >= PENDING {
            pending.clear();
            pending.push_back(Arc::new(LoggedVoid { what: Selection::Pattern("*".to_owned()), soft: false }));
        } else {
            pending.push_back(Arc::new(void));
        }
    }

    /// The void that has waited longest. It waits until it [`no_longer_waits`](Self::no_longer_waits).
    fn next_waiting(&self) -> Option<Arc<LoggedVoid>> {
        lock(&self.pending).front().cloned()
    }

    /// A void that waited is in the log. Another one may have taken its place meanwhile, and waits on.
    fn no_longer_waits(&self, void: &Arc<LoggedVoid>) {
        let mut pending = lock(&self.pending);
        if pending.front().is_some_and(|front| Arc::ptr_eq(front, void)) {
            pending.pop_front();
        }
    }

    /// How many voids wait for Redis.
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.pending).len()
    }

    /// How many entries in Redis a void concerned, once that is known.
    #[must_use]
    pub fn count(&self, seq: u64) -> Option<u64> {
        lock(&self.known).counts.get(&seq).copied()
    }

    /// Waits until a void is worked off in Redis, and says how many entries it concerned; `None` if that takes longer.
    pub async fn counted(&self, seq: u64, patience: Duration) -> Option<u64> {
        let mut changes = self.changes();
        let waiting = async {
            loop {
                if let Some(count) = self.count(seq) {
                    return Some(count);
                }
                changes.changed().await.ok()?;
            }
        };
        timeout(patience, waiting).await.ok().flatten()
    }

    /// The voids that are not worked off, with their numbers, and up to where they go.
    #[must_use]
    pub fn undone(&self) -> (Position, Vec<(u64, LoggedVoid)>) {
        let known = lock(&self.known);
        (known.at, known.voids.iter().filter(|(seq, _)| *seq > known.done).cloned().collect())
    }

    /// Where those who work voids off count what they remove: a hash in Redis, by the numbers of voids.
    #[must_use]
    pub fn removed_name(&self, position: Position) -> String {
        format!("{}:removed:{}", self.head, position.epoch_text())
    }

    /// Notes for all instances that voids are worked off up to `position`, and how many entries each concerned: those of `left`, and
    /// those that were removed. `false`: Redis is away, and nobody knows.
    pub async fn done(&self, position: Position, left: &BTreeMap<u64, u64>) -> bool {
        let mut command = redis::cmd("EVAL");
        command.arg(DONE).arg(3).arg(&self.head).arg(&self.log).arg(self.removed_name(position));
        command.arg(position.epoch_text()).arg(position.seq).arg(KEPT).arg(&self.head);
        for (seq, count) in left {
            command.arg(*seq).arg(*count);
        }
        match self.link.call(&command).await {
            Ok(Value::BulkString(told)) => {
                self.take_message(&String::from_utf8_lossy(&told));
                true
            }
            // The log is another one by now.
            Ok(_) => true,
            Err(_) => false,
        }
    }

    fn add_command(&self, void: &LoggedVoid) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(ADD).arg(2).arg(&self.head).arg(&self.log).arg(new_epoch());
        // Texts and a flag always serialise.
        command.arg(serde_json::to_string(void).unwrap_or_default()).arg(&self.head);
        command
    }

    fn read_command(&self) -> Cmd {
        let at = self.position();
        let mut command = redis::cmd("EVAL");
        command.arg(READ).arg(2).arg(&self.head).arg(&self.log).arg(new_epoch());
        command.arg(at.epoch_text()).arg(at.seq);
        command
    }

    fn renew_command(&self) -> Cmd {
        let at = self.position();
        let mut command = redis::cmd("EVAL");
        command.arg(RENEW).arg(2).arg(&self.head).arg(&self.log);
        command.arg(at.epoch_text()).arg(at.seq).arg(new_epoch());
        command
    }

    /// Reads what is new in the log. `false`: Redis is away.
    pub async fn catch_up(&self) -> bool {
        for command in [self.renew_command(), self.read_command()] {
            match self.link.call(&command).await {
                Ok(Value::Int(_)) => {}
                Ok(page) => return self.take_page(&page).is_ok(),
                Err(_) => return false,
            }
        }
        false
    }

    /// Takes over what was read.
    fn take_page(&self, page: &Value) -> Result<(), RedisError> {
        type Page = (String, u64, u64, u64, Vec<String>);
        let (epoch, seq, done, trimmed, voids) = redis::from_redis_value_ref::<Page>(page).map_err(|_| malformed())?;
        let epoch = u64::from_str_radix(&epoch, 16).map_err(|_| malformed())?;
        {
            let mut known = lock(&self.known);
            if epoch != known.at.epoch {
                let lost = known.at.epoch != 0;
                *known = Known { at: Position { epoch, seq: 0 }, ..Known::default() };
                if lost {
                    // Redis has lost its data. Entries went with the log; what was added just before is added again.
                    tracing::info!("the log of purges in Redis begins anew");
                    let mut pending = lock(&self.pending);
                    let own = lock(&self.own);
                    let lately = own.iter().filter(|(at, _)| at.elapsed() <= LATELY).map(|(_, void)| void);
                    let waits = |void: &LoggedVoid| pending.iter().any(|pending| **pending == *void);
                    let again: Vec<_> = lately.filter(|void| !waits(void)).cloned().map(Arc::new).collect();
                    pending.extend(again);
                }
            }
            if trimmed > known.at.seq {
                // This instance was away for so long that nobody knows any more what it missed.
                self.voids.add(Selection::Pattern("*".to_owned()), false);
                known.at.seq = trimmed;
            }
            for text in voids {
                let (number, text) = text.split_once(' ').ok_or_else(malformed)?;
                let number = number.parse().map_err(|_| malformed())?;
                self.take_void(&mut known, number, LoggedVoid::read(text));
            }
            known.at.seq = known.at.seq.max(seq);
            known.done = known.done.max(done);
            while known.voids.front().is_some_and(|(seq, _)| *seq <= trimmed) {
                known.voids.pop_front();
            }
        }
        self.changed.send_replace(());
        Ok(())
    }

    fn take_void(&self, known: &mut Known, seq: u64, void: LoggedVoid) {
        if seq > known.at.seq {
            self.voids.add(void.what.clone(), void.soft);
            known.voids.push_back((seq, void));
            known.at.seq = seq;
        }
    }

    /// Takes over a message. `false`: others were lost before it.
    fn take_message(&self, message: &str) -> bool {
        let mut words = message.splitn(3, ' ');
        let (Some(kind), Some(epoch), Some(rest)) = (words.next(), words.next(), words.next()) else { return false };
        let mut known = lock(&self.known);
        if u64::from_str_radix(epoch, 16) != Ok(known.at.epoch) {
            return false;
        }
        match kind {
            "void" => {
                let Some((Ok(seq), text)) = rest.split_once(' ').map(|(seq, text)| (seq.parse::<u64>(), text)) else { return false };
                if seq > known.at.seq.saturating_add(1) {
                    return false;
                }
                self.take_void(&mut known, seq, LoggedVoid::read(text));
            }
            "done" => {
                #[derive(Deserialize)]
                struct Done {
                    upto: u64,
                    counts: BTreeMap<u64, u64>,
                }
                let Ok(Done { upto, counts }) = serde_json::from_str(rest) else { return true };
                known.done = known.done.max(upto.min(known.at.seq));
                for (seq, count) in counts {
                    // Who works them off once more finds nothing.
                    known.counts.entry(seq).or_insert(count);
                }
                while known.counts.len() > PENDING {
                    known.counts.pop_first();
                }
            }
            _ => {}
        }
        drop(known);
        self.changed.send_replace(());
        true
    }

    /// Takes over messages for as long as they come, and looks whether any was lost.
    async fn follow(self: Arc<Self>, mut messages: Pin<Box<dyn Stream<Item = redis::Msg> + Send>>) {
        let mut looks = interval(LOOK);
        loop {
            let next = std::future::poll_fn(|cx| messages.as_mut().poll_next(cx));
            let told = tokio::select! {
                message = next => match message {
                    Some(message) => message.get_payload::<String>().is_ok_and(|text| self.take_message(&text)),
                    None => break,
                },
                _ = looks.tick() => {
                    self.add_waiting().await;
                    !self.link.is_up() || self.is_newest().await
                }
            };
            if !told && self.link.is_up() {
                self.catch_up().await;
            }
        }
        self.link.give_up("subscription");
    }

    /// Adds voids that began to wait while connections were being made.
    async fn add_waiting(&self) {
        while let Some(void) = self.next_waiting()
            && self.link.call(&self.add_command(&void)).await.is_ok()
        {
            self.no_longer_waits(&void);
        }
    }

    /// Whether nothing is in the log that is not known here.
    async fn is_newest(&self) -> bool {
        let mut look = redis::pipe();
        look.cmd("HMGET").arg(&self.head).arg("epoch").arg("seq");
        let at = self.position();
        let Ok(answer) = self.link.read(&look).await else { return true };
        let said = answer.first().and_then(|pair| redis::from_redis_value_ref::<(Option<String>, Option<u64>)>(pair).ok());
        said.is_some_and(|(epoch, seq)| epoch.is_some_and(|epoch| epoch == at.epoch_text()) && seq.unwrap_or(0) == at.seq)
    }

    async fn connect(&self, client: &Client, connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
        let mut subscription = client.get_async_pubsub().await?;
        subscription.subscribe(&self.head).await?;
        connection.send_packed_command(&self.renew_command()).await?.extract_error()?;
        let read = connection.send_packed_command(&self.read_command()).await?.extract_error()?;
        self.take_page(&read)?;
        // What was voided while Redis was away counts before anything is read.
        while let Some(void) = self.next_waiting() {
            connection.send_packed_command(&self.add_command(&void)).await?.extract_error()?;
            self.no_longer_waits(&void);
        }
        let read = connection.send_packed_command(&self.read_command()).await?.extract_error()?;
        self.take_page(&read)?;
        if let Some(itself) = self.itself.upgrade() {
            let following = self.runtime.spawn(itself.follow(Box::pin(subscription.into_on_message()))).abort_handle();
            if let Some(before) = lock(&self.following).replace(following) {
                before.abort();
            }
        }
        Ok(())
    }
}

impl OnConnect for VoidLog {
    fn connected<'a>(
        &'a self,
        client: &'a Client,
        connection: &'a mut MultiplexedConnection,
    ) -> Pin<Box<dyn Future<Output = Result<(), RedisError>> + Send + 'a>> {
        Box::pin(self.connect(client, connection))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RedisUrl;
    use crate::telemetry::metrics::Metrics;

    #[tokio::test]
    async fn what_began_to_wait_while_another_was_added_waits_on() {
        let url = RedisUrl::parse("redis://127.0.0.1:1", None).unwrap();
        let link = RedisLink::new(&url, Duration::from_millis(1), Arc::new(Metrics::new().unwrap())).unwrap();
        let log = VoidLog::new(link, "ns", Arc::default(), Handle::current());
        let void = |number: u64| LoggedVoid { what: Selection::Target(number), soft: false };
        for number in 0..PENDING as u64 {
            assert_eq!(log.add(void(number)).await, Added::Waits);
        }
        let adding = log.next_waiting().unwrap();
        assert_eq!(*adding, void(0));
        // One more than there is room for: everything is void, and that must not go with the one that was added.
        log.wait_for_redis(void(7));
        log.no_longer_waits(&adding);
        assert_eq!((log.waiting(), log.next_waiting().unwrap().what.clone()), (1, Selection::Pattern("*".to_owned())));
        let all = log.next_waiting().unwrap();
        log.no_longer_waits(&all);
        assert_eq!(log.waiting(), 0);
    }
}
