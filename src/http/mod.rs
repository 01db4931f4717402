//! The rules of HTTP that a cache and a gateway go by, as pure functions, a file for a section of an RFC (9110, 9111, 9213,
//! 5861).
//!
//! Everything here takes fields, bytes and a [`Wall`](crate::clock::Wall) called `now`, and returns a value. Knows no socket, no
//! clock, no rule of the configuration.

pub mod cache_control;
pub mod conditional;
pub mod encoding;
pub mod endless;
pub mod freshness;
pub mod headers;
pub mod invalidation;
pub mod range;
pub mod request_directives;
pub mod taken_back;
pub mod vary;
