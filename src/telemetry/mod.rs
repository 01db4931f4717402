//! What operators see of a running Sluice: every metric with its unit and meaning, and the log.
//!
//! Knows the configuration of the log. Everybody may count and log; nothing here knows what is counted.

pub mod log;
pub mod metrics;
pub mod samples;
