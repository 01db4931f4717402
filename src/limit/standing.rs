//! What a limit says of one request.

use std::time::Duration;

/// What a limit says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whether the request is within the limit.
    pub within: bool,
    /// How many more requests may be made at once.
    pub left: u32,
    /// How long until one more may be made, if none may now.
    pub wait: Duration,
}
