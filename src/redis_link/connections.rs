//! The connections themselves: made together, given up together, and made anew in the background until Redis answers again.

use std::cell::RefCell;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use redis::aio::MultiplexedConnection;
use redis::{Client, RedisError, Value};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::connect::{CONNECT_TIMEOUT, connect};
use super::in_time::in_time;
use super::large::Large;
use super::reads::Reads;
use crate::breaker::{Backoff, Breaker, Gate};
use crate::telemetry::metrics::Metrics;

/// Connections of a set.
const CONNECTIONS: usize = 4;
/// The one that writes, so that nothing on its way out delays a read.
const WRITING: usize = 0;
/// The one over which Redis is asked whether it answers at all. It carries nothing else.
const ASKING_ALIVE: usize = 1;
/// From this one on they read in turn, for threads that have none of their own.
const READING: usize = 2;
/// How long a failing Redis is left alone between attempts. Recovery is seen within the longest.
const RECONNECT: Backoff = Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(800), tolerated: 0 };
/// How long connections that lead to a replica are kept before others are made once more. A Redis that is always read-only is read meanwhile.
const REPLICA: Backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(10), tolerated: 0 };
/// How often a connection is used that would be idle otherwise: Redis ends none sooner than after a second.
const LOOK: Duration = Duration::from_millis(400);
/// How long a Redis that fails is asked before it counts as away, for whoever must know what it says.
pub(super) const ASKING: Duration = Duration::from_millis(100);

/// What must happen before requests reach new connections.
pub trait OnConnect: Send + Sync {
    /// Does it over one of them. If it fails, Redis counts as away still.
    fn connected<'a>(
        &'a self,
        client: &'a Client,
        connection: &'a mut MultiplexedConnection,
    ) -> Pin<Box<dyn Future<Output = Result<(), RedisError>> + Send + 'a>>;
}

/// The connections, and what the task that makes them anew needs.
pub(super) struct Connections {
    client: Client,
    /// Those that serve; `None` while Redis is left alone.
    pub(super) sets: ArcSwapOption<Vec<MultiplexedConnection>>,
    next: AtomicUsize,
    broken: Notify,
    /// Whether the connections broke, or were never made, and Redis has not been found to be away since.
    asking: AtomicBool,
    asked: Notify,
    /// Changes when connections were made, or given up.
    made: watch::Sender<()>,
    /// Whether Redis is being asked if it answers at all.
    doubting: AtomicBool,
    /// Whether connections are made anew because these lead to a replica.
    replica: Breaker,
    /// For values that are large.
    pub(super) large: Large,
    pub(super) metrics: Arc<Metrics>,
}

/// The connections that were made together.
pub(super) type ConnectionSet = Arc<Vec<MultiplexedConnection>>;

/// A connection that is used for calls.
#[derive(Clone)]
pub(super) struct Via {
    pub(super) connection: MultiplexedConnection,
    /// Its number, if it is the own one of this thread; zero: others use it too.
    pub(super) own: usize,
}

impl Via {
    fn of_set(connection: &MultiplexedConnection) -> Self {
        Self { connection: connection.clone(), own: 0 }
    }
}

/// The connection over which one thread reads.
#[derive(Default)]
struct Own {
    /// The set that it belongs to.
    set: Weak<Vec<MultiplexedConnection>>,
    /// `None` while it is being made, or could not be.
    via: Option<Via>,
    /// What is sent next. Dropped with it, it is asked for over another one.
    reads: Reads,
}

thread_local!(static OWN: RefCell<Own> = RefCell::default());

impl Own {
    fn is_of(&self, set: &ConnectionSet) -> bool {
        self.set.as_ptr() == Arc::as_ptr(set)
    }

    fn has(&self, number: usize) -> bool {
        self.via.as_ref().is_some_and(|via| via.own == number)
    }
}

impl Connections {
    /// No connections yet.
    pub(super) fn new(client: Client, metrics: Arc<Metrics>) -> Self {
        Self {
            large: Large::new(client.clone()),
            made: watch::Sender::new(()),
            doubting: AtomicBool::new(false),
            replica: Breaker::new(REPLICA),
            client,
            sets: ArcSwapOption::empty(),
            next: AtomicUsize::new(0),
            broken: Notify::new(),
            asking: AtomicBool::new(true),
            asked: Notify::new(),
            metrics,
        }
    }

    /// Whether connections are being made without which it cannot be known what other instances said meanwhile.
    pub(super) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Acquire)
    }

    /// Waits until new connections are made, or Redis has to be taken for away: it refuses, or does not answer in time.
    pub(super) async fn asked(&self) {
        let mut asked = pin!(self.asked.notified());
        // Before the look, so that what ends in between is not missed.
        asked.as_mut().enable();
        if self.is_asking() && timeout(ASKING, asked).await.is_err() {
            self.end_asking();
        }
    }

    /// The connection to write over, and the set that it belongs to; `None` while Redis is left alone.
    pub(super) fn writer(&self) -> Option<(Via, ConnectionSet)> {
        let set = self.sets.load_full()?;
        Some((Via::of_set(&set[WRITING]), set))
    }

    /// A connection to read over, and the set that it belongs to; `None` while Redis is left alone.
    pub(super) fn reader(self: &Arc<Self>) -> Option<(Via, ConnectionSet)> {
        let set = self.sets.load_full()?;
        let own = self.own(&set, |via, _| via.clone());
        Some((own.unwrap_or_else(|| self.next_reader(&set)), set))
    }

    /// The connection over which the next thread reads that has none of its own.
    pub(super) fn next_reader(&self, set: &ConnectionSet) -> Via {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % (set.len() - READING);
        Via::of_set(&set[READING + turn])
    }

    /// Does something with the connection of this thread, which is made when the thread reads first. It is driven where its answers
    /// are waited for: over one that another thread drives, each read would wake that one, and be woken by it.
    pub(super) fn own<T>(self: &Arc<Self>, set: &ConnectionSet, with: impl FnOnce(&Via, &mut Reads) -> T) -> Option<T> {
        OWN.with_borrow_mut(|own| {
            if own.is_of(set) {
                return Some(with(own.via.as_ref()?, &mut own.reads));
            }
            // Tasks of other runtimes stay on no thread.
            if Handle::try_current().ok()?.runtime_flavor() == RuntimeFlavor::CurrentThread {
                *own = Own { set: Arc::downgrade(set), ..Own::default() };
                tokio::spawn(Arc::clone(self).make_own(Arc::clone(set)));
            }
            None
        })
    }

    /// What this thread is to send next over its connection of this set.
    pub(super) fn take_reads(set: &ConnectionSet) -> Reads {
        OWN.with_borrow_mut(|own| if own.is_of(set) { std::mem::take(&mut own.reads) } else { Reads::default() })
    }

    /// Makes this thread's own connection, and looks for as long as it is used whether it still stands: Redis may end what is idle
    /// (`timeout`), or an operator may (`CLIENT KILL`).
    async fn make_own(self: Arc<Self>, set: ConnectionSet) {
        let Ok(mut connection) = connect(&self.client).await else { return };
        let number = OWN.with_borrow_mut(|own| {
            let is_ours = own.is_of(&set) && own.via.is_none();
            is_ours.then(|| {
                let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
                own.via.insert(Via { connection: connection.clone(), own: number }).own
            })
        });
        let (Some(number), set) = (number, Arc::downgrade(&set)) else { return };
        loop {
            sleep(LOOK).await;
            let is_used = OWN.with_borrow(|own| own.has(number));
            let Some(set) = set.upgrade().filter(|_| is_used) else { return };
            if !answers(&mut connection, CONNECT_TIMEOUT).await {
                return Self::forget_own(&set, number);
            }
        }
    }

    /// The connection of this thread that has this number is of no use any more: another one is made when the thread reads next. What was
    /// to be sent over it goes over another one. Nothing is forgotten for what went over a connection that others use too, nor for one that
    /// was forgotten before.
    pub(super) fn forget_own(set: &ConnectionSet, number: usize) {
        // Whoever waits is told as this is dropped, and not within.
        drop(OWN.with_borrow_mut(|own| (own.is_of(set) && own.has(number)).then(|| std::mem::take(own))));
    }

    /// A call was not answered in time. Whether that is Redis' doing is asked over the connection that carries nothing else, and asked once
    /// more: this process may have had no time to look. If it does not answer there either, it is taken out of the way. If that connection
    /// broke, they are made anew.
    pub(super) fn doubt(self: &Arc<Self>, set: &ConnectionSet, deadline: Duration) {
        if self.doubting.swap(true, Ordering::AcqRel) {
            return;
        }
        let (doubting, set) = (Doubting(Arc::clone(self)), Arc::clone(set));
        tokio::spawn(async move {
            let mut connection = set[ASKING_ALIVE].clone();
            let mut said = ask_alive(&mut connection, deadline).await;
            if matches!(said, Said::Nothing) {
                said = ask_alive(&mut connection, deadline * 2).await;
            }
            match said {
                Said::Yes => {}
                Said::Broken => doubting.0.renew(&set),
                Said::Nothing => doubting.0.take_down(&set, "timeout"),
                Said::No => doubting.0.take_down(&set, "refused"),
            }
        });
    }

    /// Whether that is being asked.
    #[cfg(test)]
    pub(super) fn is_doubting(&self) -> bool {
        self.doubting.load(Ordering::Acquire)
    }

    /// A connection of this set broke: all are made anew, while those that stand are used.
    pub(super) fn renew(&self, set: &ConnectionSet) {
        if self.is_current(set) {
            self.broken.notify_one();
        }
    }

    /// A write met a replica: the address may lead to a primary by now, though these connections stand and answer. All are made anew, now
    /// and then.
    pub(super) fn leave_replica(&self, set: &ConnectionSet) {
        if self.is_current(set) {
            match self.replica.enter() {
                Gate::Open => return,
                Gate::Closed => drop(self.replica.failed()),
                Gate::Trial => {}
            }
            self.renew(set);
        }
    }

    fn is_current(&self, set: &ConnectionSet) -> bool {
        self.sets.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, set))
    }

    /// The connections that were made after these ones; `None`: none in time.
    pub(super) async fn renewed(&self, set: &ConnectionSet, deadline: Duration) -> Option<ConnectionSet> {
        let mut made = self.made.subscribe();
        let waiting = async {
            while self.is_current(set) {
                made.changed().await.ok()?;
            }
            self.sets.load_full()
        };
        timeout(deadline, waiting).await.ok().flatten()
    }

    /// Waits until Redis is taken out of the way.
    pub(super) async fn is_left_alone(&self) {
        let mut made = self.made.subscribe();
        while self.sets.load().is_some() && made.changed().await.is_ok() {}
    }

    /// Takes Redis out of the way, unless others did or it was mended since.
    pub(super) fn take_down(&self, set: &ConnectionSet, kind: &str) {
        let previous = self.sets.compare_and_swap(set, None);
        if previous.as_ref().is_some_and(|current| Arc::ptr_eq(current, set)) {
            self.made.send_replace(());
            self.asking.store(true, Ordering::Release);
            self.metrics.breaker_open.with_label_values(&["redis"]).set(1);
            tracing::warn!(kind, "Redis failed; requests go on without it until it answers again");
            self.broken.notify_one();
        }
    }

    /// Redis has answered, or is away.
    fn end_asking(&self) {
        self.asking.store(false, Ordering::Release);
        self.asked.notify_waiters();
    }

    /// Connects, and connects again whenever the connections broke, for as long as the program runs.
    pub(super) async fn keep_connected(self: Arc<Self>, first: Arc<dyn OnConnect>) {
        let mut failures = 0;
        loop {
            let made = timeout(CONNECT_TIMEOUT * 2, self.connect(&*first)).await;
            self.end_asking();
            match made {
                Ok(Ok(set)) => {
                    let set = Arc::new(set);
                    let before = self.sets.swap(Some(Arc::clone(&set)));
                    self.made.send_replace(());
                    self.large.renew();
                    self.metrics.breaker_open.with_label_values(&["redis"]).set(0);
                    if before.is_none() {
                        tracing::info!(address = %self.client.get_connection_info().addr(), "Redis answers");
                    }
                    let since = Instant::now();
                    self.stand(set).await;
                    // One that breaks again soon after it was mended counts as failing all the while.
                    if since.elapsed() > RECONNECT.longest * 2 {
                        failures = 0;
                        continue;
                    }
                }
                Ok(Err(error)) => self.failed_to_connect(failures, &error.to_string()).await,
                Err(_) => self.failed_to_connect(failures, "no answer in time").await,
            }
            failures += 1;
            sleep(RECONNECT.after(failures)).await;
        }
    }

    /// Waits until connections are to be made anew: those that stand broke, or do not answer. Each is used now and then, so that Redis does not
    /// take it for idle.
    async fn stand(&self, set: ConnectionSet) {
        loop {
            if timeout(LOOK, self.broken.notified()).await.is_ok() {
                return;
            }
            for connection in set.iter() {
                if !answers(&mut connection.clone(), CONNECT_TIMEOUT).await {
                    return;
                }
            }
        }
    }

    async fn failed_to_connect(&self, failures: u32, error: &str) {
        self.metrics.store_errors.with_label_values(&["redis", "connect", "failed"]).inc();
        let address = self.client.get_connection_info().addr();
        if let Some(set) = self.sets.load_full() {
            // Redis may take no more connections (`maxclients`) and still answer over those that stand.
            if self.keep_living(&set).await {
                if failures == 0 {
                    tracing::warn!(%address, error, "a connection to Redis broke and no new one can be made; those that stand are used");
                }
                return;
            }
            self.take_down(&set, "connection");
            self.end_asking();
        }
        self.metrics.breaker_open.with_label_values(&["redis"]).set(1);
        if failures == 0 {
            tracing::warn!(%address, error, "Redis cannot be reached; requests go on without it (cache.redis says where it is)");
        }
    }

    /// Has those of a set that still answer take the places of the others. Whether there are any.
    async fn keep_living(&self, set: &ConnectionSet) -> bool {
        let mut living = Vec::with_capacity(CONNECTIONS);
        for connection in set.iter() {
            if answers(&mut connection.clone(), CONNECT_TIMEOUT).await {
                living.push(connection.clone());
            }
        }
        if living.len() == set.len() || living.is_empty() {
            return !living.is_empty();
        }
        let kept = Arc::new(living.iter().cycle().take(CONNECTIONS).cloned().collect());
        // Unless Redis was taken out of the way meanwhile.
        let previous = self.sets.compare_and_swap(set, Some(kept));
        self.made.send_replace(());
        previous.as_ref().is_some_and(|previous| Arc::ptr_eq(previous, set))
    }

    async fn connect(&self, first: &dyn OnConnect) -> Result<Vec<MultiplexedConnection>, RedisError> {
        let mut set = Vec::with_capacity(CONNECTIONS);
        for _ in 0..CONNECTIONS {
            let mut connection = connect(&self.client).await?;
            // A Redis that is loading its data, or wants a password, says so here and not to a request.
            connection.send_packed_command(&redis::cmd("PING")).await.and_then(Value::extract_error)?;
            set.push(connection);
        }
        if let Some(connection) = set.first_mut() {
            first.connected(&self.client, connection).await?;
        }
        Ok(set)
    }
}

/// What Redis says when it is asked whether it answers.
enum Said {
    Yes,
    /// It says that it cannot.
    No,
    /// No answer in time.
    Nothing,
    /// The connection broke, which says nothing of others.
    Broken,
}

/// Asks Redis over a connection whether it answers.
async fn ask_alive(connection: &mut MultiplexedConnection, deadline: Duration) -> Said {
    match in_time(deadline, connection.send_packed_command(&redis::cmd("PING"))).await {
        None => Said::Nothing,
        Some(Err(_)) => Said::Broken,
        Some(Ok(answer)) if answer.clone().extract_error().is_ok() => Said::Yes,
        Some(Ok(_)) => Said::No,
    }
}

/// Whether Redis answers over a connection in time.
async fn answers(connection: &mut MultiplexedConnection, deadline: Duration) -> bool {
    matches!(ask_alive(connection, deadline).await, Said::Yes)
}

/// Redis is being asked if it answers at all. Over with this, also where the task ends with its runtime.
struct Doubting(Arc<Connections>);

impl Drop for Doubting {
    fn drop(&mut self) {
        self.0.doubting.store(false, Ordering::Release);
    }
}
