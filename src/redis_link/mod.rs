//! Connections to Redis, for everything that is shared between instances.
//!
//! Redis is never in the way: every call has a deadline in tens of milliseconds, longer for what is large. Connections are multiplexed and
//! pipelined; no blocking command, no `KEYS`, no `FLUSHDB`.
//!
//! A failure belongs to what failed:
//!
//! | failure | what follows |
//! |---|---|
//! | a refused command (full, not allowed, of another type) | that command's alone |
//! | a write that met a replica | that write's alone; connections are made anew now and then, since the address may lead to a primary by now |
//! | a value that Redis does not take | it is not tried again for a minute; it went over a connection of its own ([`large`]) |
//! | a connection broke | a read goes once more over another one; the broken one is made anew, while the others are used |
//! | no answer in time | that read is a miss; Redis is asked whether it answers at all, twice, over a connection that carries nothing else. If not: |
//! | Redis does not answer, says that it cannot, or takes no connection | nothing touches it until a task in the background has seen it answer again |
//!
//! Connections are used at least twice a second, so that Redis takes none for idle.
//!
//! Knows commands and answers. Knows nothing of what they mean.

mod connect;
pub mod connections;
pub mod failure;
mod in_time;
pub mod large;
pub mod reads;

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use redis::io::tcp::TcpSettings;
use redis::{Client, Cmd, Pipeline, RedisError, Value};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use crate::config::RedisUrl;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace;
use connections::{ConnectionSet, Connections, OnConnect, Via};
use failure::{RedisFailure, Scope, is_of_a_replica};
use in_time::in_time;
use large::LARGE;
use reads::{Kept, Read, Reads};

/// A write may take this many times as long as a read: no client waits for it.
const WRITE_FACTOR: u32 = 10;

/// Redis, as everything that needs it reaches it. Cheap to clone.
#[derive(Clone)]
pub struct RedisLink {
    connections: Arc<Connections>,
    read_timeout: Duration,
}

impl RedisLink {
    /// A link that is not connected yet. Reads may take `read_timeout`, writes ten times that.
    ///
    /// # Errors
    /// The URL makes no sense to the client.
    pub fn new(url: &RedisUrl, read_timeout: Duration, metrics: Arc<Metrics>) -> Result<Self, RedisError> {
        // Else what is sent while something is unanswered waits for that, or for Redis' kernel to say that it came: up to 40 ms.
        let info = url.info.clone().set_tcp_settings(TcpSettings::default().set_nodelay(true));
        Ok(Self { connections: Arc::new(Connections::new(Client::open(info)?, metrics)), read_timeout })
    }

    /// Connects in the background, on the current runtime, and again whenever connections broke. Returns at once, whether Redis is
    /// there or not.
    pub fn keep_connected(&self, first: Arc<dyn OnConnect>) {
        tokio::spawn(Arc::clone(&self.connections).keep_connected(first));
    }

    /// Gives the connections up: something is wrong with what came over another one.
    pub fn give_up(&self, kind: &str) {
        if let Some(set) = self.connections.sets.load_full() {
            self.connections.take_down(&set, kind);
        }
    }

    /// Whether Redis answered last.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.connections.sets.load().is_some()
    }

    /// Whether connections are being made without which it cannot be known what other instances said meanwhile.
    #[must_use]
    pub fn is_asking(&self) -> bool {
        self.connections.is_asking()
    }

    /// Waits until new connections are made, or Redis has to be taken for away: it refuses, or does not answer in time.
    pub async fn asked(&self) {
        self.connections.asked().await;
    }

    /// Runs a command, mostly a write, within a deadline.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn call(&self, command: &Cmd) -> Result<Value, RedisFailure> {
        let (mut via, set) = self.connections.writer().ok_or(RedisFailure::Down)?;
        let answering = async { via.connection.send_packed_command(command).await.and_then(Value::extract_error) };
        let began = begin();
        let answer = self.within("write", self.read_timeout * WRITE_FACTOR, (&set, via.own), answering).await;
        tell("write", began, &answer);
        answer
    }

    /// Room for a value of `size` bytes on its way to Redis, to be held until it is there.
    ///
    /// # Errors
    /// Redis takes none of that size, or too much is on its way. It is counted.
    pub fn room(&self, size: usize) -> Result<OwnedSemaphorePermit, RedisFailure> {
        self.connections.large.room(size).inspect_err(|failure| self.count("write", failure))
    }

    /// Runs a command with a value of `size` bytes, over a connection of its own if that is large.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn call_with(&self, command: &Cmd, size: usize) -> Result<Value, RedisFailure> {
        if size < LARGE {
            return self.call(command).await;
        }
        let set = self.connections.sets.load_full().ok_or(RedisFailure::Down)?;
        let (began, started) = (begin(), Instant::now());
        let answer = self.connections.large.write(command, size, self.read_timeout * WRITE_FACTOR).await;
        self.took("write", started);
        if let Err(failure) = &answer {
            self.count("write", failure);
            if is_of_a_replica(failure) {
                self.connections.leave_replica(&set);
            }
        }
        tell("write", began, &answer);
        answer
    }

    /// Notes how long a call took that began at `started`.
    fn took(&self, op: &str, started: Instant) {
        self.connections.metrics.store_seconds.with_label_values(&["redis", op]).observe(started.elapsed().as_secs_f64());
    }

    fn count(&self, op: &str, failure: &RedisFailure) {
        self.connections.metrics.store_errors.with_label_values(&["redis", op, failure.classify().0]).inc();
    }

    /// What is kept under a name. What one thread reads at the same time goes in one round trip; the rest of what is large comes over a
    /// connection of its own.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn get(&self, name: &[u8]) -> Read {
        let set = self.connections.sets.load_full().ok_or(RedisFailure::Down)?;
        let began = begin();
        let answer = match self.join(&set, name) {
            Some(answer) => answer,
            None => {
                let mut reads = Reads::default();
                let answer = reads.add(name);
                self.send(reads, self.connections.next_reader(&set), &set).await;
                answer
            }
        };
        // Those that it went with may have been given up with their connection.
        let mut read = answer.await.unwrap_or(Err(RedisFailure::Unsent));
        if let Err(failure) = &read
            && failure.classify().1 == Scope::Connection
        {
            // Redis may be well. What it would have said is asked for once more, over another connection.
            read = Box::pin(self.get_again(name, &set)).await;
        }
        if let Ok(Some(kept)) = &read
            && kept.bytes.len() == LARGE
        {
            // Apart, since few values are.
            read = Box::pin(self.get_large(name, kept.left, &set)).await;
        }
        tell("read", began, &read);
        read
    }

    /// The whole of what is large, over a connection of its own.
    async fn get_large(&self, name: &[u8], left: Option<Duration>, set: &ConnectionSet) -> Read {
        let started = Instant::now();
        let read = tokio::select! {
            read = self.connections.large.read(name, self.read_timeout) => read,
            // Others have found that Redis does not answer: a client that waits for megabytes need not find it again.
            () = self.connections.is_left_alone() => return Err(RedisFailure::Down),
        };
        self.took("read", started);
        if let Err(RedisFailure::Timeout) = &read {
            self.connections.doubt(set, self.patience());
        }
        let read = read.inspect_err(|failure| self.count("read", failure));
        read.map(|bytes| bytes.map(|bytes| Kept { bytes, left }))
    }

    /// Reads over a connection that others use too; if that one is broken as well, over one that is made now.
    async fn get_again(&self, name: &[u8], set: &ConnectionSet) -> Read {
        let over = async |set: &ConnectionSet| {
            let mut reads = Reads::default();
            let answer = reads.add(name);
            self.send(reads, self.connections.next_reader(set), set).await;
            answer.await.unwrap_or(Err(RedisFailure::Down))
        };
        if !self.is_up() {
            return Err(RedisFailure::Down);
        }
        let read = over(set).await;
        if !read.as_ref().is_err_and(|failure| failure.classify().1 == Scope::Connection) {
            return read;
        }
        self.connections.renew(set);
        match self.connections.renewed(set, self.read_timeout).await {
            Some(renewed) => over(&renewed).await,
            None => read,
        }
    }

    /// Lets a read go with those that this thread makes until the tasks have had their turn that can go on now. `None`: the thread has
    /// no connection of its own.
    fn join(&self, set: &ConnectionSet, name: &[u8]) -> Option<oneshot::Receiver<Read>> {
        self.connections.own(set, |via, reads| {
            let is_first = reads.is_empty();
            let answer = reads.add(name);
            if is_first || reads.is_full() {
                let (link, via, set) = (self.clone(), via.clone(), Arc::clone(set));
                // The first is followed by more; what is full goes before more come.
                let full = reads.is_full().then(|| std::mem::take(reads));
                tokio::spawn(async move {
                    link.send(full.unwrap_or_else(|| Connections::take_reads(&set)), via, &set).await;
                });
            }
            answer
        })
    }

    /// Sends reads, and gives each its answer.
    async fn send(&self, reads: Reads, mut via: Via, set: &ConnectionSet) {
        if reads.is_empty() {
            return;
        }
        let commands = reads.commands();
        let answering = via.connection.send_packed_commands(commands, 0, commands.len());
        match self.within("read", reads.deadline(self.read_timeout), (set, via.own), answering).await {
            Ok(answers) => {
                if let Err(refusal) = reads.answer(answers) {
                    self.failed("read", (set, via.own), &RedisFailure::Error(refusal));
                }
            }
            Err(failure) => reads.fail(&failure),
        }
    }

    /// Runs commands that a request waits for, in one round trip.
    ///
    /// # Errors
    /// [`RedisFailure`].
    pub async fn read(&self, commands: &Pipeline) -> Result<Vec<Value>, RedisFailure> {
        let (mut via, set) = self.connections.reader().ok_or(RedisFailure::Down)?;
        let answering = async {
            let answers = via.connection.send_packed_commands(commands, 0, commands.len()).await?;
            answers.into_iter().map(Value::extract_error).collect::<Result<Vec<_>, _>>()
        };
        let began = begin();
        let answer = self.within("read", self.read_timeout, (&set, via.own), answering).await;
        tell("read", began, &answer);
        answer
    }

    /// Waits for an answer within a deadline, and does what a failure asks for. The connection is told by its set, and its number if it is
    /// this thread's own.
    async fn within<T>(
        &self,
        op: &'static str,
        deadline: Duration,
        over: (&ConnectionSet, usize),
        answering: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, RedisFailure> {
        let started = Instant::now();
        let answer = in_time(deadline, answering).await;
        self.took(op, started);
        let answer = answer.ok_or(RedisFailure::Timeout).and_then(|answer| answer.map_err(RedisFailure::Error));
        if let Err(failure) = &answer {
            self.failed(op, over, failure);
        }
        answer
    }

    /// How long Redis may take to say that it is there.
    fn patience(&self) -> Duration {
        self.read_timeout.max(Duration::from_millis(10))
    }

    /// Counts a failure, and does what it asks for beyond its call.
    fn failed(&self, op: &str, (set, own): (&ConnectionSet, usize), failure: &RedisFailure) {
        let (kind, scope) = failure.classify();
        self.count(op, failure);
        match scope {
            Scope::Command if is_of_a_replica(failure) => self.connections.leave_replica(set),
            Scope::Command => {}
            // A read goes once more over another one.
            Scope::Connection if op == "read" => Connections::forget_own(set, own),
            Scope::Connection => self.connections.renew(set),
            Scope::Doubt => {
                // What is behind a large value on this connection waits for it; another one does not.
                Connections::forget_own(set, own);
                self.connections.doubt(set, self.patience());
            }
            Scope::Redis => self.connections.take_down(set, kind),
        }
    }
}

/// When a call begins, if whoever makes it is in a span.
fn begin() -> Option<Instant> {
    trace::is_on().then(Instant::now)
}

/// Tells of a call that is over in a span.
fn tell<T>(op: &'static str, began: Option<Instant>, answer: &Result<T, RedisFailure>) {
    let Some(began) = began else { return };
    trace::note(SpanKind::Client, "redis", began.elapsed(), || {
        let attributes = vec![KeyValue::new("db.system.name", "redis"), KeyValue::new("db.operation.name", op)];
        (attributes, answer.as_ref().map(drop).map_err(|failure| failure.classify().0.to_owned()))
    });
}

#[cfg(test)]
mod tests {
    use super::connections::ASKING;
    use super::*;
    use redis::aio::MultiplexedConnection;
    use std::future::poll_fn;
    use std::pin::{Pin, pin};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::task::Poll;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::Notify;
    use tokio::task::yield_now;
    use tokio::time::timeout;

    /// A server that says OK to every command.
    async fn agree(listener: TcpListener) {
        serve(listener, |_, _| Some("+OK\r\n".to_owned())).await;
    }

    /// A server that answers so, by the number of the connection and the command's bytes; not at all if that is `None`.
    async fn serve(listener: TcpListener, answer: impl Fn(usize, &str) -> Option<String> + Clone + Send + 'static) {
        let mut number = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            number += 1;
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut bytes).await {
                    let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
                    let answers: String = text.split('*').skip(1).filter_map(|command| answer(number, command)).collect();
                    if stream.write_all(answers.as_bytes()).await.is_err() {
                        break;
                    }
                }
            });
        }
    }

    /// A link to a server that answers so, connected, and what serves.
    async fn over(
        read_timeout: Duration,
        answer: impl Fn(usize, &str) -> Option<String> + Clone + Send + 'static,
    ) -> (RedisLink, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = RedisUrl::parse(&format!("redis://{}", listener.local_addr().unwrap()), None).unwrap();
        let serving = tokio::spawn(serve(listener, answer));
        let link = RedisLink::new(&url, read_timeout, Arc::new(Metrics::new().unwrap())).unwrap();
        link.keep_connected(Arc::new(Open));
        while !link.is_up() {
            yield_now().await;
        }
        (link, serving)
    }

    /// Connections wait for nothing.
    struct Open;

    impl OnConnect for Open {
        fn connected<'a>(
            &'a self,
            _: &'a Client,
            _: &'a mut MultiplexedConnection,
        ) -> Pin<Box<dyn Future<Output = Result<(), RedisError>> + Send + 'a>> {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    /// Connections wait for it.
    struct Door(Notify);

    impl OnConnect for Door {
        fn connected<'a>(
            &'a self,
            _: &'a Client,
            _: &'a mut MultiplexedConnection,
        ) -> Pin<Box<dyn Future<Output = Result<(), RedisError>> + Send + 'a>> {
            Box::pin(async {
                self.0.notified().await;
                Ok(())
            })
        }
    }

    #[tokio::test]
    async fn redis_is_not_blamed_for_a_thread_that_is_late_to_look() {
        let (tell, address) = oneshot::channel();
        std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                agree(listener).await;
            });
        });
        let deadline = Duration::from_millis(60);
        let url = RedisUrl::parse(&format!("redis://{}", address.await.unwrap()), None).unwrap();
        let link = RedisLink::new(&url, deadline, Arc::new(Metrics::new().unwrap())).unwrap();
        let door = Arc::new(Door(Notify::new()));
        link.keep_connected(Arc::clone(&door) as _);
        door.0.notify_one();
        while !link.is_up() || link.connections.own(&link.connections.sets.load_full().unwrap(), |_, _| ()).is_none() {
            yield_now().await;
        }
        // So many others have their turn each time before a task goes on.
        let others: Vec<_> = (0..40)
            .map(|_| {
                tokio::spawn(async move {
                    loop {
                        let from = Instant::now();
                        while from.elapsed() < deadline / 20 {
                            std::hint::spin_loop();
                        }
                        // As a task whose socket is always ready: it goes on once the others have.
                        let mut is_next = true;
                        poll_fn(|cx| {
                            cx.waker().wake_by_ref();
                            if std::mem::take(&mut is_next) { Poll::Pending } else { Poll::Ready(()) }
                        })
                        .await;
                    }
                })
            })
            .collect();
        for _ in 0..3 {
            let read = link.get(b"x").await;
            assert!(read.is_ok(), "Redis answered in time: {read:?}");
        }
        others.into_iter().for_each(|other| other.abort());
        assert!(link.is_up());
    }

    #[tokio::test]
    async fn connections_that_lead_to_a_replica_are_left_for_the_primary_behind_the_same_address() {
        let (failed_over, is_replica) =
            (Arc::new(AtomicUsize::new(usize::MAX)), "-READONLY You can't write against a read only replica.\r\n");
        let made = Arc::new(AtomicUsize::new(0));
        let (link, _serving) = over(Duration::from_secs(5), {
            let (failed_over, made) = (Arc::clone(&failed_over), Arc::clone(&made));
            move |number, command: &str| {
                made.fetch_max(number, Ordering::SeqCst);
                // Those that were made before stand, and lead to what is a replica now.
                let refused = command.contains("SET\r") && number <= failed_over.load(Ordering::SeqCst);
                Some(if refused && failed_over.load(Ordering::SeqCst) < usize::MAX { is_replica } else { "+OK\r\n" }.to_owned())
            }
        })
        .await;
        let mut write = redis::cmd("SET");
        write.arg("k").arg("v");
        assert!(link.call(&write).await.is_ok());
        let set = link.connections.sets.load_full().unwrap();
        failed_over.store(made.load(Ordering::SeqCst), Ordering::SeqCst);
        let refused = link.call(&write).await.unwrap_err();
        assert_eq!(refused.classify(), ("refused_write", Scope::Command));
        assert!(link.is_up(), "it is read meanwhile");
        assert!(link.connections.renewed(&set, Duration::from_secs(30)).await.is_some_and(|renewed| !Arc::ptr_eq(&renewed, &set)));
        assert!(link.call(&write).await.is_ok());
        // One that is always read-only is not connected to over and over.
        let set = link.connections.sets.load_full().unwrap();
        failed_over.store(usize::MAX - 1, Ordering::SeqCst);
        for _ in 0..20 {
            assert!(link.call(&write).await.is_err());
        }
        assert!(Arc::ptr_eq(&link.connections.sets.load_full().unwrap(), &set));
    }

    /// What a Redis says that has one byte under every name.
    fn one_byte(command: &str) -> Option<String> {
        let answer = match command {
            read if read.contains("GETRANGE\r") => "$1\r\nx\r\n",
            left if left.contains("PTTL\r") => ":-1\r\n",
            _ => "+OK\r\n",
        };
        Some(answer.to_owned())
    }

    /// The set, and the number of this thread's own connection.
    async fn own(link: &RedisLink) -> (ConnectionSet, usize) {
        loop {
            let set = link.connections.sets.load_full().unwrap();
            if let Some(number) = link.connections.own(&set, |via, _| via.own) {
                return (set, number);
            }
            yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_failure_costs_the_connection_that_it_happened_on_and_no_other_one() {
        let (link, _serving) = over(Duration::from_secs(5), |_, command: &str| one_byte(command)).await;
        let (set, first) = own(&link).await;
        let late = async |op, own| link.within::<()>(op, Duration::ZERO, (&set, own), std::future::pending()).await.unwrap_err();
        late("write", link.connections.writer().unwrap().0.own).await;
        late("read", link.connections.next_reader(&set).own).await;
        assert_eq!(own(&link).await.1, first, "it is not the one that was late");
        let cut = RedisFailure::Error(RedisError::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        link.failed("read", (&set, 0), &cut);
        assert_eq!(own(&link).await.1, first, "it is not the one that broke");
        late("read", first).await;
        let (_, second) = own(&link).await;
        assert_ne!(second, first);
        late("read", first).await;
        assert_eq!(own(&link).await.1, second, "what is late on a connection that was given up costs no other one");
    }

    #[tokio::test]
    async fn what_was_to_go_over_a_connection_that_was_given_up_goes_over_another_one() {
        let (link, _serving) = over(Duration::from_secs(5), |_, command: &str| one_byte(command)).await;
        let (set, number) = own(&link).await;
        let mut reading = pin!(link.get(b"x"));
        assert!(poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx).is_pending())).await);
        Connections::forget_own(&set, number);
        assert_eq!(reading.await.unwrap().unwrap().bytes, b"x");
        // The same where connections were made anew meanwhile.
        let (set, _) = own(&link).await;
        let mut reading = pin!(link.get(b"x"));
        assert!(poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx).is_pending())).await);
        let renewed = Arc::new(set.to_vec());
        assert!(link.connections.own(&renewed, |_, _| ()).is_none());
        assert_eq!(reading.await.unwrap().unwrap().bytes, b"x");
    }

    /// What is done with a Redis that answers, on the second of its connections, by the number of times that it was asked.
    async fn doubted(answer: impl Fn(usize) -> Option<&'static str> + Clone + Send + Sync + 'static) -> (RedisLink, ConnectionSet) {
        let (is_asked, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (link, _) = over(Duration::from_secs(5), {
            let is_asked = Arc::clone(&is_asked);
            move |number, command: &str| match is_asked.load(Ordering::SeqCst) && number == 2 && command.contains("PING\r") {
                true => answer(asked.fetch_add(1, Ordering::SeqCst)).map(str::to_owned),
                false => one_byte(command),
            }
        })
        .await;
        let set = link.connections.sets.load_full().unwrap();
        is_asked.store(true, Ordering::SeqCst);
        link.connections.doubt(&set, Duration::from_millis(10));
        while link.connections.is_doubting() {
            yield_now().await;
        }
        (link, set)
    }

    #[tokio::test]
    async fn redis_is_left_alone_only_if_it_does_not_answer_twice_over_a_connection_that_stands() {
        // Late once: both answers come when it is asked for the second time.
        let (link, _) = doubted(|asked| if asked == 0 { None } else { Some("+OK\r\n+OK\r\n") }).await;
        assert!(link.is_up());
        // That connection breaks: others are made, and those that stand are used.
        let (link, set) = doubted(|_| Some("nonsense\r\n")).await;
        assert!(link.is_up());
        assert!(link.connections.renewed(&set, Duration::from_secs(30)).await.is_some());
        let (link, _) = doubted(|_| None).await;
        assert!(!link.is_up());
        let (link, _) = doubted(|_| Some("-LOADING dataset\r\n")).await;
        assert!(!link.is_up());
    }

    #[tokio::test]
    async fn nobody_waits_for_a_large_value_of_a_redis_that_is_away() {
        let asked = Arc::new(Notify::new());
        let (link, _serving) = over(Duration::from_secs(60), {
            let asked = Arc::clone(&asked);
            move |_, command: &str| match command {
                length if length.contains("STRLEN\r") => {
                    asked.notify_one();
                    None
                }
                read if read.contains("GETRANGE\r") => Some(format!("${LARGE}\r\n{}\r\n", "x".repeat(LARGE))),
                other => one_byte(other),
            }
        })
        .await;
        let reading = tokio::spawn({
            let link = link.clone();
            async move { link.get(b"x").await }
        });
        asked.notified().await;
        link.give_up("test");
        assert!(matches!(timeout(Duration::from_secs(30), reading).await.unwrap().unwrap(), Err(RedisFailure::Down)));
    }

    #[tokio::test]
    async fn who_must_know_waits_for_new_connections_but_not_for_a_redis_that_is_away() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = RedisUrl::parse(&format!("redis://{}", listener.local_addr().unwrap()), None).unwrap();
        let serving = tokio::spawn(agree(listener));
        let link = RedisLink::new(&url, Duration::from_secs(5), Arc::new(Metrics::new().unwrap())).unwrap();
        let door = Arc::new(Door(Notify::new()));
        link.keep_connected(Arc::clone(&door) as _);
        door.0.notify_one();
        while !link.is_up() {
            tokio::task::yield_now().await;
        }
        assert!(!link.is_asking());
        link.asked().await;
        loop {
            while !link.is_up() {
                tokio::task::yield_now().await;
            }
            let lost = Instant::now();
            link.give_up("test");
            let asking = tokio::spawn({
                let link = link.clone();
                async move {
                    link.asked().await;
                    link.is_up()
                }
            });
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            assert!(link.is_asking() && !asking.is_finished() || lost.elapsed() >= ASKING);
            door.0.notify_one();
            let answered = asking.await.unwrap();
            // On a machine that was busy for so long, it is tried again.
            if lost.elapsed() < ASKING {
                assert!(answered, "whoever waited knows what new connections said");
                break;
            }
        }
        // It hangs: nobody waits for long, and then nobody waits at all.
        link.give_up("test");
        link.asked().await;
        assert!(!link.is_up() && !link.is_asking());
        // It is gone.
        door.0.notify_one();
        while !link.is_up() {
            tokio::task::yield_now().await;
        }
        serving.abort();
        link.give_up("test");
        link.asked().await;
        assert!(!link.is_asking());
    }
}
