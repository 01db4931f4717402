//! One connection to Redis, made as all of them are.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisError};

/// A new connection must stand and answer within this.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Commands that may wait to be sent over one connection.
const PENDING: usize = 1024;

/// Makes a connection. Calls over it have the deadlines of their callers.
///
/// # Errors
/// Redis cannot be reached in time, or refuses the connection.
pub(super) async fn connect(client: &Client) -> Result<MultiplexedConnection, RedisError> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(None)
        .set_pipeline_buffer_size(PENDING);
    client.get_multiplexed_async_connection_with_config(&config).await
}
