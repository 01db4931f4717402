//! What operators see of a running Sluice: every metric with its unit and meaning, the log, and traces.
//!
//! Knows the configuration of the log and of traces. Everybody may count and log; nothing here knows what is counted.

pub mod audit_log;
pub mod log;
pub mod metrics;
pub mod samples;
pub mod seldom;
pub mod trace;
