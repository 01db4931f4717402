//! Why a call to Redis gave nothing, and what that says of more than the call.

use redis::{ErrorKind, RedisError};

/// Why a call to Redis gave nothing.
#[derive(Clone, Debug)]
pub enum RedisFailure {
    /// Redis is being left alone.
    Down,
    /// What it was to go with was given up before it was sent.
    Unsent,
    /// Redis did not answer in time.
    Timeout,
    /// Redis or the connection said no.
    Error(RedisError),
    /// The value is larger than Redis takes.
    TooLarge,
    /// Too much is on its way to Redis already.
    Full,
}

/// What a failure belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// The command alone: others go on over the same connection.
    Command,
    /// The connection: what went over it fails, Redis itself may be well.
    Connection,
    /// Unknown: Redis may be slow, the value large, the connection dead.
    Doubt,
    /// Redis as a whole.
    Redis,
}

/// Codes with which Redis says of itself that it cannot answer.
const UNABLE: [&str; 6] = ["LOADING", "MASTERDOWN", "CLUSTERDOWN", "NOAUTH", "WRONGPASS", "BUSY"];

impl RedisFailure {
    /// The metric label, and what it belongs to.
    pub(super) fn classify(&self) -> (&'static str, Scope) {
        match self {
            Self::Down => ("down", Scope::Command),
            Self::Unsent => ("connection", Scope::Connection),
            Self::TooLarge => ("too_large", Scope::Command),
            Self::Full => ("dropped", Scope::Command),
            Self::Timeout => ("timeout", Scope::Doubt),
            Self::Error(error) if refuses_writes(error) => ("refused_write", Scope::Command),
            // This user may not run this command. Others may work.
            Self::Error(error) if error.code() == Some("NOPERM") => ("forbidden", Scope::Command),
            Self::Error(error) if error.is_io_error() || error.is_connection_dropped() => ("connection", Scope::Connection),
            Self::Error(error) if error.kind() == ErrorKind::Parse => ("protocol", Scope::Connection),
            Self::Error(error) if error.code().is_some_and(|code| UNABLE.contains(&code)) => ("refused", Scope::Redis),
            // Redis closes a connection that it cannot understand, such as one with a value over proto-max-bulk-len.
            Self::Error(error) if is_protocol_error(error) => ("refused", Scope::Connection),
            Self::Error(_) => ("refused", Scope::Command),
        }
    }
}

/// Whether Redis says that it did not understand what came, and closes the connection.
fn is_protocol_error(error: &RedisError) -> bool {
    error.detail().is_some_and(|text| text.contains("Protocol error"))
}

/// What a replica says to a write.
const OF_A_REPLICA: &str = "READONLY";

/// Full, a replica, short of good replicas, or unable to save: Redis reads but does not write.
#[must_use]
pub fn refuses_writes(error: &RedisError) -> bool {
    [OF_A_REPLICA, "OOM", "MISCONF", "NOREPLICAS"].into_iter().any(|refusal| says(error, refusal))
}

/// Whether the connection leads to a replica. What was a primary may be one by now, and another one behind the same address.
pub(super) fn is_of_a_replica(failure: &RedisFailure) -> bool {
    matches!(failure, RedisFailure::Error(error) if says(error, OF_A_REPLICA))
}

/// Whether Redis refused something with this code. Before Redis 7 an error within a script was one of the script, with the first one in
/// its text.
fn says(error: &RedisError, refusal: &str) -> bool {
    let within = |text: &str| text.contains("script") && text.contains(&format!("-{refusal} "));
    error.code() == Some(refusal) || error.detail().is_some_and(within)
}

#[cfg(test)]
mod tests {
    use super::*;
    use redis::Value;

    #[test]
    fn a_replica_is_told_from_one_that_is_full_within_scripts_too() {
        for (text, of_a_replica) in [
            ("-READONLY You can't write against a read only replica.", true),
            ("-ERR Error running script (call to f_1): @user_script:2: @user_script: 2: -READONLY You can't write", true),
            ("-OOM command not allowed", false),
            ("-ERR Error running script (call to f_1): @user_script:2: @user_script: 2: -OOM command not allowed", false),
        ] {
            let error = redis::parse_redis_value(format!("{text}\r\n").as_bytes()).and_then(Value::extract_error).unwrap_err();
            assert!(refuses_writes(&error), "{text}");
            assert_eq!(is_of_a_replica(&RedisFailure::Error(error)), of_a_replica, "{text}");
        }
        assert!(!is_of_a_replica(&RedisFailure::Timeout));
    }

    #[test]
    fn what_a_refusal_belongs_to() {
        for (text, kind, scope) in [
            ("-OOM command not allowed", "refused_write", Scope::Command),
            ("-READONLY You can't write", "refused_write", Scope::Command),
            ("-MISCONF Redis is configured", "refused_write", Scope::Command),
            ("-NOPERM this user", "forbidden", Scope::Command),
            ("-WRONGTYPE Operation against a key", "refused", Scope::Command),
            ("-ERR string exceeds maximum allowed size", "refused", Scope::Command),
            ("-ERR Protocol error: invalid bulk length", "refused", Scope::Connection),
            ("-LOADING dataset", "refused", Scope::Redis),
            ("-NOAUTH Authentication required.", "refused", Scope::Redis),
            ("-MASTERDOWN Link with MASTER is down", "refused", Scope::Redis),
        ] {
            let error = redis::parse_redis_value(format!("{text}\r\n").as_bytes()).and_then(Value::extract_error).unwrap_err();
            assert_eq!(RedisFailure::Error(error).classify(), (kind, scope), "{text}");
        }
        let cut = RedisError::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert_eq!(RedisFailure::Error(cut).classify(), ("connection", Scope::Connection));
        assert_eq!(RedisFailure::Timeout.classify().1, Scope::Doubt);
    }
}
