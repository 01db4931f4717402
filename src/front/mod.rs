//! Bytes to requests and answers to bytes: listeners, connections, their bounds and deadlines.

pub mod deadlines;
pub mod framing;
pub mod listener;
pub mod select;
pub mod socket;
