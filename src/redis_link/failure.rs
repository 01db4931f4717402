//! Why a call to Redis brought nothing, and what that says of the connection.

use redis::{ErrorKind, RedisError};

/// Why a call to Redis brought nothing.
#[derive(Clone, Debug)]
pub enum RedisFailure {
    /// Redis is being left alone.
    Down,
    /// Redis did not answer in time.
    Timeout,
    /// Redis or the connection said no.
    Error(RedisError),
}

impl RedisFailure {
    /// The metric label, and whether the connection is to be given up.
    pub(super) fn classify(&self) -> (&'static str, bool) {
        match self {
            Self::Down => ("down", false),
            Self::Timeout => ("timeout", true),
            Self::Error(error) if refuses_writes(error) => ("refused_write", false),
            // This user may not run this command. Others may work.
            Self::Error(error) if error.code() == Some("NOPERM") => ("forbidden", false),
            Self::Error(error) if error.is_io_error() || error.is_connection_dropped() => ("connection", true),
            Self::Error(error) if error.kind() == ErrorKind::Parse => ("protocol", true),
            Self::Error(_) => ("refused", true),
        }
    }
}

/// Full, a replica, short of good replicas, or unable to save: Redis reads but does not write.
#[must_use]
pub fn refuses_writes(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "READONLY" | "MISCONF" | "NOREPLICAS"))
}
