//! Bytes to requests, and responses to bytes: listeners ([`listener`]), how many connections there may be
//! ([`connection_limits`]), one connection ([`connection`]) with its deadlines ([`deadlines`], [`body`]), what is checked
//! of its raw bytes before the HTTP library reads them ([`socket`], [`framing`], [`frames`], [`hpack`]; the rules: [`message`]) or
//! answered without it ([`plain`]), and what leaves ([`outgoing`]).
//!
//! Knows bytes, clients and their limits. Knows nothing of what answers: that is a function it is given.

pub mod backlog;
pub mod body;
pub mod connection;
pub mod connection_limits;
pub mod deadlines;
pub mod flood;
pub mod frames;
pub mod framing;
pub mod hpack;
pub mod listener;
pub mod message;
pub mod outgoing;
pub mod plain;
pub mod select;
pub mod settling;
pub mod socket;
pub mod sockets;
pub mod stream;
