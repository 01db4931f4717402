//! Large values on their way to Redis: over a connection of their own, so that no other command waits behind one, or fails with it.
//!
//! A value that Redis does not take (`proto-max-bulk-len`) breaks that connection alone, and is not tried again. All that is on its way is bounded in
//! bytes, small values included: a Redis that hangs must not make them pile up.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, RedisError, Value};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::failure::{RedisFailure, Scope};

/// A new connection must stand and answer within this.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Values from this size on are large, in bytes.
pub const LARGE: usize = 256 << 10;
/// For so long a value that broke the connection is not tried again, nor a larger one.
const PAUSE: Duration = Duration::from_secs(60);
/// Bytes of all values on their way together.
const ROOM: usize = 64 << 20;
/// A large value has this much more time for each byte than a small one: what a slow network carries in a second, in bytes.
const A_SECOND: u64 = 4 << 20;

/// The connection for large values, and the room for all.
pub struct Large {
    client: Client,
    connection: Mutex<Option<MultiplexedConnection>>,
    room: Arc<Semaphore>,
    /// Values of this size and more broke the connection, and are not tried until then.
    refused: std::sync::Mutex<Option<(usize, Instant)>>,
}

/// The longest that a command with a value of `size` bytes may take, where a small one has `deadline`.
#[must_use]
pub fn deadline_of(size: usize, deadline: Duration) -> Duration {
    deadline + Duration::from_millis((size as u64).saturating_mul(1000) / A_SECOND)
}

impl Large {
    /// Not connected yet.
    pub fn new(client: Client) -> Self {
        let room = Arc::new(Semaphore::new(ROOM));
        Self { client, connection: Mutex::default(), room, refused: std::sync::Mutex::default() }
    }

    /// Room for a value, until the permit is dropped.
    ///
    /// # Errors
    /// Redis takes none of that size, or too much is on its way.
    pub fn room(&self, size: usize) -> Result<OwnedSemaphorePermit, RedisFailure> {
        if self.refused().is_some_and(|(least, until)| size >= least && Instant::now() < until) {
            return Err(RedisFailure::TooLarge);
        }
        let permits = u32::try_from(size).map_err(|_| RedisFailure::TooLarge)?;
        Arc::clone(&self.room).try_acquire_many_owned(permits).map_err(|_| RedisFailure::Full)
    }

    /// Another Redis may answer: it may take what the one before did not.
    pub fn forget(&self) {
        *self.refused() = None;
    }

    fn refused(&self) -> std::sync::MutexGuard<'_, Option<(usize, Instant)>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command with a value of `size` bytes, within `deadline`.
    ///
    /// # Errors
    /// [`RedisFailure`]; none of them says anything of other connections.
    pub async fn call(&self, command: &Cmd, size: usize, deadline: Duration) -> Result<Value, RedisFailure> {
        let answer = match timeout(deadline, self.send(command)).await {
            Ok(answer) => answer.map_err(RedisFailure::Error),
            Err(_) => Err(RedisFailure::Timeout),
        };
        if let Err(failure) = &answer {
            let scope = failure.classify().1;
            if scope == Scope::Connection {
                // Redis says why it closes the connection, but mostly that is lost while the value is on its way.
                let mut refused = self.refused();
                let least = refused.map_or(size, |(least, _)| least.min(size));
                *refused = Some((least, Instant::now() + PAUSE));
            }
            if scope != Scope::Command {
                *self.connection.lock().await = None;
            }
        }
        answer
    }

    async fn send(&self, command: &Cmd) -> Result<Value, RedisError> {
        let mut connection = {
            let mut connection = self.connection.lock().await;
            match &*connection {
                Some(connection) => connection.clone(),
                None => connection.insert(self.client.get_multiplexed_async_connection_with_config(&connection_config()).await?).clone(),
            }
        };
        connection.send_packed_command(command).await.and_then(Value::extract_error)
    }
}

pub(super) fn connection_config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None).set_pipeline_buffer_size(1024)
}
