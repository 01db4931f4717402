//! Large values on their way to Redis and from it: over connections of their own, so that no other command waits behind one, or fails with
//! it.
//!
//! A value that Redis does not take (`proto-max-bulk-len`) breaks its connection alone, and is not tried again. What is on its way is
//! bounded in bytes, small values that are written included: a Redis that hangs must not make them pile up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Client, Cmd, RedisError, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

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

/// The connections for large values, and the room for all.
pub struct Large {
    writing: Lane,
    reading: Lane,
    /// Values of this size and more broke the connection, and are not tried until then.
    refused: Mutex<Option<(usize, Instant)>>,
}

/// One way: a connection, and the room for what goes over it.
struct Lane {
    client: Client,
    connection: tokio::sync::Mutex<Option<MultiplexedConnection>>,
    room: Arc<Semaphore>,
}

impl Large {
    /// Not connected yet.
    pub fn new(client: Client) -> Self {
        Self { writing: Lane::new(client.clone()), reading: Lane::new(client), refused: Mutex::default() }
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

    /// Another Redis may answer: it may take what the one before did not.
    pub fn forget(&self) {
        *self.refused() = None;
    }

    fn refused(&self) -> MutexGuard<'_, Option<(usize, Instant)>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command that writes a value of `size` bytes, which has [room](Self::room). It may take `deadline`, and the time for all bytes
    /// that are on their way.
    ///
    /// # Errors
    /// [`RedisFailure`]; none of them says anything of other connections.
    pub async fn write(&self, command: &Cmd, size: usize, deadline: Duration) -> Result<Value, RedisFailure> {
        let answer = self.writing.call(command, deadline).await;
        if answer.as_ref().is_err_and(|failure| failure.classify().1 == Scope::Connection) {
            // It broke a connection that was made for it. Redis says why, but mostly that is lost while the value is on its way.
            let mut refused = self.refused();
            let least = refused.map_or(size, |(least, _)| least.min(size));
            *refused = Some((least, Instant::now() + PAUSE));
        }
        answer
    }

    /// The whole value under a name; `None`: there is none. It may take `deadline`, and the time for all bytes that are on their way.
    ///
    /// # Errors
    /// [`RedisFailure`]: also if too much is on its way.
    pub async fn read(&self, name: &str, deadline: Duration) -> Result<Option<Vec<u8>>, RedisFailure> {
        let length = self.reading.call(redis::cmd("STRLEN").arg(name), deadline).await?;
        // It may be gone by now.
        let Value::Int(length @ 1..) = length else { return Ok(None) };
        let _room = self.reading.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        match self.reading.call(redis::cmd("GETRANGE").arg(name).arg(0).arg(length - 1), deadline).await? {
            Value::BulkString(bytes) => Ok(Some(bytes)),
            _ => Ok(None),
        }
    }
}

impl Lane {
    fn new(client: Client) -> Self {
        Self { client, connection: tokio::sync::Mutex::default(), room: Arc::new(Semaphore::new(ROOM)) }
    }

    fn take(&self, size: usize) -> Result<OwnedSemaphorePermit, RedisFailure> {
        let permits = u32::try_from(size).map_err(|_| RedisFailure::TooLarge)?;
        Arc::clone(&self.room).try_acquire_many_owned(permits).map_err(|_| RedisFailure::Full)
    }

    /// Bytes that are on their way.
    fn under_way(&self) -> usize {
        ROOM - self.room.available_permits()
    }

    /// Runs a command. A connection that was there before may have broken meanwhile (`CLIENT KILL`, `timeout`): then it goes once more,
    /// over a new one.
    async fn call(&self, command: &Cmd, deadline: Duration) -> Result<Value, RedisFailure> {
        let answering = async {
            let (connection, is_new) = self.connection().await.map_err(RedisFailure::Error)?;
            let answer = send(connection, command).await;
            if is_new || !answer.as_ref().is_err_and(|failure| failure.classify().1 == Scope::Connection) {
                return answer;
            }
            *self.connection.lock().await = None;
            let (connection, _) = self.connection().await.map_err(RedisFailure::Error)?;
            send(connection, command).await
        };
        let answer = timeout(deadline_of(self.under_way(), deadline), answering).await.unwrap_or(Err(RedisFailure::Timeout));
        if answer.as_ref().is_err_and(|failure| failure.classify().1 != Scope::Command) {
            *self.connection.lock().await = None;
        }
        answer
    }

    /// The connection, and whether it was made now.
    async fn connection(&self) -> Result<(MultiplexedConnection, bool), RedisError> {
        let mut connection = self.connection.lock().await;
        match &*connection {
            Some(connection) => Ok((connection.clone(), false)),
            None => Ok((connection.insert(connect(&self.client).await?).clone(), true)),
        }
    }
}

async fn send(mut connection: MultiplexedConnection, command: &Cmd) -> Result<Value, RedisFailure> {
    connection.send_packed_command(command).await.and_then(Value::extract_error).map_err(RedisFailure::Error)
}

/// The longest that a command may take while `bytes` are on their way, where one without a value has `deadline`.
fn deadline_of(bytes: usize, deadline: Duration) -> Duration {
    deadline + Duration::from_millis((bytes as u64).saturating_mul(1000) / A_SECOND)
}
