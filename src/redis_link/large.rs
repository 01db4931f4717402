//! Large values on their way to Redis and from it: over connections of their own, so that no other command waits behind one, or fails with
//! it.
//!
//! A value that Redis does not take (`proto-max-bulk-len`) breaks its connection, and what else is on its way over that one. So what broke
//! goes once more, each over a connection that carries nothing else: a value that breaks that too is not tried again for a while. What is on
//! its way is bounded in bytes, small values that are written included: a Redis that hangs must not make them pile up. A read that nobody
//! waits for any more keeps its room until its answer came, since Redis sends it all the same.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Client, Cmd, RedisError, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use super::connect::connect;
use super::failure::{RedisFailure, Scope};

/// Values from this size on are large, in bytes.
pub const LARGE: usize = 256 << 10;
/// For so long a value that broke the connection is not tried again, nor a larger one.
const PAUSE: Duration = Duration::from_secs(60);
/// Bytes of all values on their way together, each way.
const ROOM: usize = 64 << 20;
/// A large value has this much more time for each byte than a small one: what a slow network carries in a second, in bytes.
const A_SECOND: u64 = 4 << 20;
/// A connection that was not used for so long is not trusted: what stands between may have forgotten it.
const IDLE: Duration = Duration::from_secs(10);

/// The connections for large values, and the room for all.
pub struct Large {
    writing: Lane,
    reading: Arc<Lane>,
    /// Held by the write that goes over a connection of its own.
    alone: tokio::sync::Mutex<()>,
    /// Values of this size and more broke the connection, and are not tried until then.
    refused: Mutex<Option<(usize, Instant)>>,
}

/// One way: a connection, and the room for what goes over it.
struct Lane {
    client: Client,
    connection: tokio::sync::Mutex<Kept>,
    /// Counts how often the connections were to be made anew.
    renewed: AtomicU64,
    room: Arc<Semaphore>,
}

/// The connection that a lane keeps.
#[derive(Default)]
struct Kept {
    /// The number of the last one that was made.
    number: u64,
    used: Option<Used>,
}

struct Used {
    connection: MultiplexedConnection,
    /// How often connections had been made anew before.
    renewed: u64,
    /// When it was asked for last.
    last: Instant,
}

impl Large {
    /// Not connected yet.
    pub fn new(client: Client) -> Self {
        let (writing, reading) = (Lane::new(client.clone()), Arc::new(Lane::new(client)));
        Self { writing, reading, alone: tokio::sync::Mutex::default(), refused: Mutex::default() }
    }

    /// Room for a value of `size` bytes that is written, until the permit is dropped.
    ///
    /// # Errors
    /// Redis takes none of that size, or too much is on its way.
    pub fn room(&self, size: usize) -> Result<OwnedSemaphorePermit, RedisFailure> {
        if self.refused().is_some_and(|(least, until)| size >= least && Instant::now() < until) {
            return Err(RedisFailure::TooLarge);
        }
        self.writing.take(size)
    }

    /// Another Redis may answer, and may take what the one before did not: what comes next goes over new connections.
    pub fn renew(&self) {
        *self.refused() = None;
        self.writing.renewed.fetch_add(1, Ordering::AcqRel);
        self.reading.renewed.fetch_add(1, Ordering::AcqRel);
    }

    fn refused(&self) -> MutexGuard<'_, Option<(usize, Instant)>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Redis took a value of this size, so that it is not too large, nor was it.
    fn takes(&self, size: usize) {
        self.refused().take_if(|(least, _)| *least <= size);
    }

    /// Redis does not take a value of this size.
    fn refuses(&self, size: usize) {
        let (mut refused, now) = (self.refused(), Instant::now());
        // What was refused before that pause ended says nothing any more: a smaller one was not tried since.
        let least = refused.filter(|(_, until)| now < *until).map_or(size, |(least, _)| least.min(size));
        *refused = Some((least, now + PAUSE));
    }

    /// Runs a command that writes a value of `size` bytes, which has [room](Self::room). It may take `deadline`, and the time for all bytes
    /// that are on their way; twice if it has to go once more.
    ///
    /// # Errors
    /// [`RedisFailure`]; none of them says anything of other connections.
    pub async fn write(&self, command: &Cmd, size: usize, deadline: Duration) -> Result<Value, RedisFailure> {
        let mut answer = self.writing.call(command, Instant::now() + self.writing.deadline(deadline)).await;
        if broke(&answer) {
            let again = self.write_alone(command, size);
            answer = timeout(self.writing.deadline(deadline), again).await.unwrap_or(Err(RedisFailure::Timeout));
        }
        if answer.is_ok() {
            self.takes(size);
        }
        answer
    }

    /// Writes over a connection that carries nothing else, so that nothing else can have broken it.
    async fn write_alone(&self, command: &Cmd, size: usize) -> Result<Value, RedisFailure> {
        let _alone = self.alone.lock().await;
        // That no connection can be made says nothing of the value.
        let connection = connect(&self.writing.client).await.map_err(RedisFailure::Error)?;
        let answer = send(connection, command).await;
        if broke(&answer) {
            // Redis says why, but mostly that is lost while the value is on its way.
            self.refuses(size);
        }
        answer
    }

    /// The whole value under a name; `None`: there is none. It may take `deadline`, and the time for all bytes that are on their way.
    ///
    /// # Errors
    /// [`RedisFailure`]: also if too much is on its way.
    pub async fn read(&self, name: &[u8], deadline: Duration) -> Result<Option<Vec<u8>>, RedisFailure> {
        let length = self.reading.call_again(redis::cmd("STRLEN").arg(name), deadline).await?;
        // It may be gone by now.
        let Value::Int(length @ 1..) = length else { return Ok(None) };
        let room = self.reading.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        let mut command = redis::cmd("GETRANGE");
        command.arg(name).arg(0).arg(length - 1);
        let lane = Arc::clone(&self.reading);
        // By itself: it is sent to its end though whoever waits for it goes away.
        let reading = tokio::spawn(async move {
            let _room = room;
            lane.call_again(&command, deadline).await
        });
        match reading.await.unwrap_or(Err(RedisFailure::Down))? {
            Value::BulkString(bytes) => Ok(Some(bytes)),
            _ => Ok(None),
        }
    }
}

impl Lane {
    fn new(client: Client) -> Self {
        Self { client, connection: tokio::sync::Mutex::default(), renewed: AtomicU64::new(0), room: Arc::new(Semaphore::new(ROOM)) }
    }

    fn take(&self, size: usize) -> Result<OwnedSemaphorePermit, RedisFailure> {
        let permits = u32::try_from(size).map_err(|_| RedisFailure::TooLarge)?;
        Arc::clone(&self.room).try_acquire_many_owned(permits).map_err(|_| RedisFailure::Full)
    }

    /// The longest that a command may take now, where one without a value has `deadline`.
    fn deadline(&self, deadline: Duration) -> Duration {
        deadline_of(ROOM - self.room.available_permits(), deadline)
    }

    /// Runs a command; once more if its connection broke, which may have been there before and have been ended meanwhile (`CLIENT KILL`,
    /// `timeout`).
    async fn call_again(&self, command: &Cmd, deadline: Duration) -> Result<Value, RedisFailure> {
        let until = Instant::now() + self.deadline(deadline);
        let answer = self.call(command, until).await;
        if broke(&answer) { self.call(command, until).await } else { answer }
    }

    /// Runs a command. Its connection is given up if that broke, or did not answer in time.
    async fn call(&self, command: &Cmd, until: Instant) -> Result<Value, RedisFailure> {
        let mut over = None;
        let answering = async {
            let (connection, number) = self.connection().await.map_err(RedisFailure::Error)?;
            over = Some(number);
            send(connection, command).await
        };
        let answer = timeout_at(until, answering).await.unwrap_or(Err(RedisFailure::Timeout));
        if answer.as_ref().is_err_and(|failure| failure.classify().1 != Scope::Command) {
            let mut kept = self.connection.lock().await;
            // Not one that was made since.
            if over == Some(kept.number) {
                kept.used = None;
            }
        }
        answer
    }

    /// The connection, made now if there is none that can be trusted, and its number.
    async fn connection(&self) -> Result<(MultiplexedConnection, u64), RedisError> {
        let mut kept = self.connection.lock().await;
        let (renewed, now) = (self.renewed.load(Ordering::Acquire), Instant::now());
        let number = kept.number;
        if let Some(used) = kept.used.as_mut().filter(|used| used.renewed == renewed && now.duration_since(used.last) < IDLE) {
            used.last = now;
            return Ok((used.connection.clone(), number));
        }
        kept.used = None;
        let connection = connect(&self.client).await?;
        kept.used = Some(Used { connection: connection.clone(), renewed, last: now });
        kept.number += 1;
        Ok((connection, kept.number))
    }
}

async fn send(mut connection: MultiplexedConnection, command: &Cmd) -> Result<Value, RedisFailure> {
    connection.send_packed_command(command).await.and_then(Value::extract_error).map_err(RedisFailure::Error)
}

/// Whether a command's connection broke.
fn broke(answer: &Result<Value, RedisFailure>) -> bool {
    answer.as_ref().is_err_and(|failure| failure.classify().1 == Scope::Connection)
}

/// The longest that a command may take while `bytes` are on their way, where one without a value has `deadline`.
fn deadline_of(bytes: usize, deadline: Duration) -> Duration {
    deadline + Duration::from_millis((bytes as u64).saturating_mul(1000) / A_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::{Notify, watch};

    /// Values above this break their connection.
    const BULK: usize = 2 * LARGE;
    const IN_TIME: Duration = Duration::from_secs(30);

    /// A Redis that takes values up to [`BULK`], and says of each name that so many bytes are under it.
    struct Fake {
        made: AtomicUsize,
        /// A whole value is asked for.
        asked: Notify,
        /// Whole values are sent from then on.
        sends: watch::Sender<bool>,
    }

    impl Fake {
        async fn start() -> (Arc<Self>, Large) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let large = Large::new(Client::open(format!("redis://{}", listener.local_addr().unwrap())).unwrap());
            let fake = Arc::new(Self { made: AtomicUsize::new(0), asked: Notify::new(), sends: watch::Sender::new(true) });
            let serving = Arc::clone(&fake);
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    serving.made.fetch_add(1, Ordering::SeqCst);
                    let serving = Arc::clone(&serving);
                    tokio::spawn(async move { serving.serve(BufReader::new(stream)).await });
                }
            });
            (fake, large)
        }

        /// Answers until something is larger than it may be.
        async fn serve(&self, mut stream: BufReader<TcpStream>) -> Option<()> {
            loop {
                let words = number(&mut stream).await?;
                let mut name = Vec::new();
                for word in 0..words {
                    let length = number(&mut stream).await.filter(|length| *length <= BULK)?;
                    let mut bytes = vec![0; length + 2];
                    stream.read_exact(&mut bytes).await.ok()?;
                    if word == 0 {
                        name = bytes;
                    }
                }
                let answer = match &name[..] {
                    b"STRLEN\r\n" => ":5\r\n",
                    b"GETRANGE\r\n" => {
                        self.asked.notify_one();
                        self.sends.subscribe().wait_for(|sends| *sends).await.ok()?;
                        "$5\r\nhello\r\n"
                    }
                    _ => "+OK\r\n",
                };
                stream.write_all(answer.as_bytes()).await.ok()?;
            }
        }
    }

    /// The number of a line.
    async fn number(stream: &mut BufReader<TcpStream>) -> Option<usize> {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        line.get(1..)?.trim().parse().ok()
    }

    async fn write(large: &Large, size: usize) -> Result<Value, RedisFailure> {
        large.write(redis::cmd("SET").arg("k").arg(vec![7_u8; size]), size, IN_TIME).await
    }

    #[tokio::test]
    async fn only_a_value_that_breaks_a_connection_by_itself_is_refused() {
        let (_fake, large) = Fake::start().await;
        let (first, second, small) = tokio::join!(write(&large, BULK + 2), write(&large, BULK + 1), write(&large, LARGE));
        assert!(broke(&first) && broke(&second) && small.is_ok(), "{first:?} {second:?} {small:?}");
        assert!(large.room(BULK).is_ok() && write(&large, BULK).await.is_ok());
        assert!(matches!(large.room(BULK + 1), Err(RedisFailure::TooLarge)));
        // Redis may take what another one did not.
        large.renew();
        assert!(large.room(BULK + 1).is_ok());
    }

    #[tokio::test]
    async fn a_connection_that_cannot_be_made_says_nothing_of_the_value() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let large = Large::new(Client::open(format!("redis://{}", listener.local_addr().unwrap())).unwrap());
        drop(listener);
        assert!(broke(&write(&large, LARGE).await));
        assert!(large.room(LARGE).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_refused_long_ago_says_nothing_any_more() {
        let large = Large::new(Client::open("redis://127.0.0.1:1").unwrap());
        large.refuses(LARGE);
        large.refuses(4 * LARGE);
        assert!(large.room(LARGE).is_err());
        tokio::time::advance(PAUSE).await;
        large.refuses(4 * LARGE);
        assert!(large.room(4 * LARGE - 1).is_ok() && large.room(4 * LARGE).is_err());
        large.takes(4 * LARGE - 1);
        assert!(large.room(4 * LARGE).is_err());
        large.takes(4 * LARGE);
        assert!(large.room(4 * LARGE).is_ok());
    }

    #[tokio::test]
    async fn a_read_that_is_given_up_keeps_its_room_until_its_answer_came() {
        let (fake, large) = Fake::start().await;
        assert_eq!(large.read(b"k", IN_TIME).await.unwrap().unwrap(), b"hello");
        fake.asked.notified().await;
        fake.sends.send_replace(false);
        tokio::select! {
            read = large.read(b"k", IN_TIME) => panic!("{read:?}"),
            () = fake.asked.notified() => {}
        }
        assert_eq!(large.reading.room.available_permits(), ROOM - 5);
        fake.sends.send_replace(true);
        let all = large.reading.room.acquire_many(u32::try_from(ROOM).unwrap());
        assert!(timeout(IN_TIME, all).await.is_ok());
    }

    #[tokio::test]
    async fn a_connection_is_given_up_with_the_others_and_not_for_one_before_it() {
        let (fake, large) = Fake::start().await;
        let made = || fake.made.load(Ordering::SeqCst);
        let ask = async || assert!(large.reading.call_again(redis::cmd("STRLEN").arg("k"), IN_TIME).await.is_ok());
        ask().await;
        ask().await;
        assert_eq!(made(), 1);
        fake.sends.send_replace(false);
        let mut late = redis::cmd("GETRANGE");
        let late = large.reading.call(late.arg("k"), Instant::now() + Duration::from_millis(100));
        let others = async {
            fake.asked.notified().await;
            large.renew();
            ask().await;
        };
        assert!(matches!(tokio::join!(late, others).0, Err(RedisFailure::Timeout)));
        assert_eq!(made(), 2);
        ask().await;
        assert_eq!(made(), 2, "the one that was late is not the one that is used");
    }
}
