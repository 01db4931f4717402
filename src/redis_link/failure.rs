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

/// Full, a replica, short of good replicas, or unable to save: Redis reads but does not write. Before Redis 7 an error within a script
/// was one of the script, with the first one in its text.
#[must_use]
pub fn refuses_writes(error: &RedisError) -> bool {
    const REFUSALS: [&str; 4] = ["OOM", "READONLY", "MISCONF", "NOREPLICAS"];
    let within = |text: &str| text.contains("script") && REFUSALS.iter().any(|refusal| text.contains(&format!("-{refusal} ")));
    error.code().is_some_and(|code| REFUSALS.contains(&code)) || error.detail().is_some_and(within)
}
