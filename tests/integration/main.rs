//! The real program over real sockets, with a scripted backend, a real Redis and a real MariaDB.
//!
//! Servers are private: free ports, throw-away data, ended with the test. Nothing here waits on time alone; waits are
//! on answers, counters and metrics ([`support::until`]).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, missing_docs, reason = "a test fails by panicking")]

mod admin;
mod attack;
mod cache;
mod cli;
mod conformance;
mod contract;
mod differential;
mod flight;
mod gateway;
mod mariadb;
mod native;
mod outage;
mod redis;
mod size;
mod support;
