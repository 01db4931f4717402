//! HTTP caching as pure functions: no socket, no clock, no configuration file.
//!
//! Everything here takes bytes, header maps and a [`Wall`](crate::clock::Wall) called `now`, and returns a value.
//! The names are those of RFC 9110, 9111, 5861 and 9211.

pub mod cache_control;
pub mod conditional;
pub mod encoding;
pub mod freshness;
pub mod headers;
pub mod range;
pub mod request_directives;
pub mod vary;
