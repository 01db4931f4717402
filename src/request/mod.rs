//! What a request brings with it, read before anybody answers: how it came ([`Arrival`]), who asks ([`client`]), what its
//! target says ([`target`]), why it may be refused ([`refusal`]), how it may be answered before it is read in full ([`short_way`]), and what is not told of it ([`secrets`]).
//!
//! Knows HTTP and the API's way of writing times. Knows nothing of rules, caches or sockets.

pub mod client;
pub mod fields;
pub mod interim;
pub mod readings;
pub mod refusal;
mod secret_looks;
pub mod secrets;
pub mod short_way;
pub mod target;
pub mod timestamp;
pub mod validate;

use std::net::IpAddr;

use interim::InterimSender;
use refusal::Refusal;

/// How a request came.
pub struct Arrival {
    /// The other end of the connection.
    pub peer: IpAddr,
    /// Where interim (1xx) responses go, if the client may have any.
    pub interim: Option<InterimSender>,
    /// Whether Sluice asks itself, to warm its cache: limits and rollouts are about clients.
    pub own: bool,
    /// What was sent is no valid request: this is the only answer that it may get.
    pub refused: Option<Refusal>,
}
