//! Voids that instances share, over Redis: carries out what [`LogView`] says. [`void`](super::void) is the page that explains the
//! protocol, [`void_scripts`] what stands in Redis.
//!
//! An instance is connected to Redis only once it listens and has read the log: [`VoidLog::connected`] runs before any request reaches
//! the new connections. A lost message is noticed by the next one, or by the look at the newest position four times a second. Once
//! connections broke, requests wait until new ones are made ([`VoidLog::is_uncertain`]) or Redis refuses them: then it is away, no
//! other instance can be heard, and what memory holds goes on being served.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_core::Stream;
use redis::aio::MultiplexedConnection;
use redis::{Client, Cmd, RedisError, Value};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{interval, timeout};

use super::entry::Entry;
use super::void::view::{Added, BOUNDS, Heard, InLog, LogHead, LogView, LoggedVoid, Next, Position, Stamp, VoidId};
use super::void::{Effect, Moment, Purge, Selection, Validity, Voids};
use super::void_scripts::{self, Message, Removal, Scripts, Sweep};
use crate::clock::Wall;
use crate::redis_link::RedisLink;
use crate::redis_link::connections::OnConnect;
use crate::redis_link::failure::{RedisFailure, refuses_writes};

/// How often the newest position is looked at, in case that a message was lost.
const LOOK: Duration = Duration::from_millis(250);
/// Steps in which the log is read; more, and it changes faster than it can be read.
const STEPS: usize = 256;

/// The log, as one instance knows it.
pub struct VoidLog {
    link: RedisLink,
    scripts: Scripts,
    voids: Arc<Voids>,
    view: Mutex<LogView>,
    /// One reads the log at a time, so that no page is taken over after a later one.
    reading: tokio::sync::Mutex<()>,
    changed: watch::Sender<()>,
    following: Mutex<Option<AbortHandle>>,
    runtime: Handle,
    itself: Weak<Self>,
}

/// A void that counts here and is still to be added to the log.
#[must_use = "other instances do not know it yet"]
pub struct Pending {
    id: VoidId,
    void: LoggedVoid,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs commands: over the shared connections, or over one that is being made.
trait Caller {
    async fn call(&mut self, command: &Cmd) -> Result<Value, RedisFailure>;
}

impl Caller for &RedisLink {
    async fn call(&mut self, command: &Cmd) -> Result<Value, RedisFailure> {
        RedisLink::call(self, command).await
    }
}

impl Caller for &mut MultiplexedConnection {
    async fn call(&mut self, command: &Cmd) -> Result<Value, RedisFailure> {
        let answer = self.send_packed_command(command).await.and_then(Value::extract_error);
        answer.map_err(RedisFailure::Error)
    }
}

impl VoidLog {
    /// The log of a namespace. What others void is added to `voids`.
    #[must_use]
    pub fn new(link: RedisLink, namespace: &str, voids: Arc<Voids>, runtime: Handle) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            link,
            scripts: Scripts::new(namespace),
            voids,
            view: Mutex::new(LogView::new(BOUNDS, fastrand::u64(1..))),
            reading: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(()),
            following: Mutex::default(),
            runtime,
            itself: Weak::clone(itself),
        })
    }

    /// The commands for the log.
    #[must_use]
    pub const fn scripts(&self) -> &Scripts {
        &self.scripts
    }

    /// Up to where the log is known; `None`: it cannot be trusted, and nothing that is in Redis may be used.
    #[must_use]
    pub fn position(&self) -> Option<Position> {
        lock(&self.view).position()
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

    /// What an entry is that was asked of Redis at `asked_at` and had been checked against voids up to `stamp`.
    #[must_use]
    pub fn admit(&self, entry: &Entry, stamp: Stamp, asked_at: Moment) -> Validity {
        match lock(&self.view).admit(stamp, asked_at, |what| what.concerns(entry)) {
            None => Validity::Valid,
            Some(Effect::Remove) => Validity::Void,
            Some(effect) => Validity::Expired(Box::new(entry.expired(Wall::now(), entry.asked_at, effect))),
        }
    }

    /// Voids something, here at once and against whatever is in Redis. [`share`](Self::share) says it to the other instances.
    pub fn void(&self, what: Selection, soft: bool) -> (Pending, Purge) {
        let (id, void) = (VoidId(fastrand::u64(1..)), LoggedVoid { what, soft });
        let mut view = lock(&self.view);
        view.hold(id, void.clone());
        let purge = self.voids.add(void.what.clone(), Effect::of_purge(soft), Wall::now());
        (Pending { id, void }, purge)
    }

    /// Adds a void to the log. If Redis refuses writes or is away, it is added as soon as that is over.
    pub async fn share(&self, pending: Pending) -> Added {
        let Pending { id, void } = pending;
        let answer = self.link.call(&self.add_command(id, &void)).await;
        if let Some(stands) = answer.as_ref().ok().and_then(void_scripts::added) {
            lock(&self.view).added(id, stands);
            return Added::Shared(stands.seq);
        }
        if matches!(&answer, Err(RedisFailure::Error(error)) if refuses_writes(error)) {
            // Others that listen hear of it all the same.
            let _ = self.link.call(&self.scripts.publish_unlogged(id, &void)).await;
        }
        Added::Waits
    }

    /// The same for what may be forgotten if Redis does not take it.
    pub async fn share_now(&self, pending: Pending) {
        let id = pending.id;
        if self.share(pending).await == Added::Waits {
            lock(&self.view).forget(id);
        }
    }

    fn add_command(&self, id: VoidId, void: &LoggedVoid) -> Cmd {
        self.scripts.add(id, void, self.new_epoch())
    }

    fn new_epoch(&self) -> u64 {
        lock(&self.view).new_epoch(Wall::now(), fastrand::u16(..))
    }

    /// How many voids wait for Redis.
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.view).waiting()
    }

    /// How many entries in Redis a void concerned, once that is known.
    #[must_use]
    pub fn count(&self, seq: u64) -> Option<u64> {
        lock(&self.view).count(seq)
    }

    /// Waits until Redis is swept of what a void concerns, and says how many entries that were; `None` if that takes longer.
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

    /// The voids of which Redis is not swept, with their numbers, and what is known of the log.
    #[must_use]
    pub fn to_sweep(&self) -> Option<(LogHead, Vec<(u64, LoggedVoid)>)> {
        lock(&self.view).to_sweep()
    }

    /// Begins a sweep of Redis. `None`: Redis failed, or has another log by now.
    pub async fn sweep(&self, known: LogHead) -> Option<Sweep> {
        let sweep = Sweep::begin();
        let begun = self.link.call(&self.scripts.sweep(known, sweep)).await.ok()?;
        (begun == Value::Int(1)).then_some(sweep)
    }

    /// Removes entries that are older than voids; says which ones are older and were left. `None`: Redis failed, or the sweep is over.
    pub async fn remove(&self, at: Position, sweep: &mut Sweep, removals: &[Removal<'_>]) -> Option<Vec<i64>> {
        let answer = self.link.call(&self.scripts.remove(at, *sweep, removals)).await.ok()?;
        sweep.step();
        redis::from_redis_value::<Vec<i64>>(answer).ok().filter(|left| left.len() == removals.len())
    }

    /// Notes for all instances that Redis is swept of what the voids up to `upto` concern, of those known up to `at`, and how many
    /// entries of each were left. `false`: Redis is away.
    pub async fn swept(&self, at: Position, sweep: Sweep, upto: u64, left: &BTreeMap<u64, u64>) -> bool {
        match self.link.call(&self.scripts.swept(at, sweep, upto, left)).await {
            Ok(Value::BulkString(told)) => {
                self.take_message(&String::from_utf8_lossy(&told));
                true
            }
            // Redis is away, or went on from an older state: it is swept once more.
            _ => false,
        }
    }

    /// Reads what is new in the log. `false`: Redis is away.
    pub async fn catch_up(&self) -> bool {
        self.read_log(&self.link).await.is_ok()
    }

    /// Reads the log to its end; begins it where there is none, or where it went on from an older state. Where Redis refuses that,
    /// the log stays unknown: what is in Redis is not used then.
    async fn read_log(&self, mut caller: impl Caller) -> Result<(), RedisFailure> {
        let _only_one = self.reading.lock().await;
        for _ in 0..STEPS {
            let known = lock(&self.view).known();
            let answer = caller.call(&self.scripts.read(known)).await?;
            let page = void_scripts::page(&answer).map_err(RedisFailure::Error)?;
            let (was_known, next) = {
                let mut view = lock(&self.view);
                (view.position().is_some(), view.take_page(page, &self.voids, Wall::now()))
            };
            self.changed.send_replace(());
            let begin = match next {
                Next::Synced => return Ok(()),
                Next::More => continue,
                Next::Begin => self.scripts.begin(self.new_epoch()),
                Next::Replace(read) => {
                    if was_known {
                        tracing::warn!("the log of purges in Redis lacks some that are known here (Redis went on from an older state)");
                    }
                    self.scripts.replace(read, self.new_epoch())
                }
            };
            match caller.call(&begin).await {
                Ok(_) => tracing::info!("the log of purges in Redis begins anew"),
                Err(RedisFailure::Error(error)) if refuses_writes(&error) => return Ok(()),
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Takes over a message. `false`: others were lost before it.
    fn take_message(&self, message: &str) -> bool {
        let Some(message) = void_scripts::message(message) else { return false };
        let mut view = lock(&self.view);
        let heard = match message {
            Message::Void(stands, void) => view.take_message(stands, void, &self.voids, Wall::now()),
            Message::Unlogged(InLog { id, void, .. }) => {
                view.take_unlogged(id, void, &self.voids, Wall::now());
                Heard::InOrder
            }
            Message::Swept(epoch, upto, counts) => {
                view.take_swept(epoch, upto, counts, &self.voids);
                Heard::InOrder
            }
        };
        drop(view);
        self.changed.send_replace(());
        heard == Heard::InOrder
    }

    /// Takes over messages for as long as they come, and looks whether any was lost.
    async fn follow(self: Arc<Self>, mut messages: Pin<Box<dyn Stream<Item = redis::Msg> + Send>>) {
        let mut looks = interval(LOOK);
        loop {
            let next = std::future::poll_fn(|cx| messages.as_mut().poll_next(cx));
            let in_order = tokio::select! {
                message = next => match message {
                    Some(message) => message.get_payload::<String>().is_ok_and(|text| self.take_message(&text)),
                    None => break,
                },
                _ = looks.tick() => {
                    self.add_waiting(&self.link).await;
                    !self.link.is_up() || self.is_newest().await
                }
            };
            if !in_order && self.link.is_up() {
                self.catch_up().await;
            }
        }
        self.link.give_up("subscription");
    }

    /// Adds the voids that wait, for as long as Redis takes them.
    async fn add_waiting(&self, mut caller: impl Caller) {
        lock(&self.view).looked();
        loop {
            let Some((id, void)) = lock(&self.view).next_to_add() else { return };
            match caller.call(&self.add_command(id, &void)).await.as_ref().map(void_scripts::added) {
                Ok(Some(stands)) => lock(&self.view).added(id, stands),
                _ => return,
            }
        }
    }

    /// Whether nothing is in the log that is not known here. A Redis that does not say counts as such: it is away.
    async fn is_newest(&self) -> bool {
        let known = lock(&self.view).known();
        match self.link.read(&self.scripts.look()).await {
            Ok(answer) => lock(&self.view).is_newest(void_scripts::head(&answer), known),
            Err(_) => true,
        }
    }

    async fn connect(&self, client: &Client, connection: &mut MultiplexedConnection) -> Result<(), RedisFailure> {
        let mut subscription = client.get_async_pubsub().await.map_err(RedisFailure::Error)?;
        subscription.subscribe(self.scripts.head()).await.map_err(RedisFailure::Error)?;
        self.read_log(&mut *connection).await?;
        // What was voided while Redis was away is in the log before anything is read.
        self.add_waiting(&mut *connection).await;
        self.read_log(&mut *connection).await?;
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
        Box::pin(async {
            self.connect(client, connection).await.map_err(|failure| match failure {
                RedisFailure::Error(error) => error,
                _ => RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut)),
            })
        })
    }
}
