//! The audit line: who changed what, by address and token, and what came of it. It is logged whatever `log.level` says.

use std::net::IpAddr;

use http::HeaderMap;

use crate::config::tokens::{Right, Tokens};
use crate::request::refusal::Refusal;
use crate::telemetry::log::AUDIT;

/// Somebody who may do something.
pub struct Actor<'a> {
    address: IpAddr,
    token: &'a str,
    action: &'static str,
}

impl<'a> Actor<'a> {
    /// Whoever sent a request from `address`, if they may do this. An attempt that is refused is audited too.
    ///
    /// # Errors
    /// Why they may not.
    pub fn authorize(tokens: &'a Tokens, headers: &HeaderMap, address: IpAddr, right: Right) -> Result<Self, Refusal> {
        let action = right.word();
        match tokens.authorize(headers, right) {
            Ok(token) => Ok(Self { address, token, action }),
            Err(refusal) => {
                tracing::warn!(target: AUDIT, action, by = %address, refused = refusal.row().detail, "audit");
                Err(refusal)
            }
        }
    }

    /// They did it.
    pub fn did(&self, what: &str, result: &str) {
        tracing::info!(target: AUDIT, action = self.action, what, result, by = %self.address, token = self.token, "audit");
    }
}

/// The process did something that a signal, or a changed file, told it to.
pub fn told_by(whom: &str, action: &'static str, result: &str) {
    tracing::info!(target: AUDIT, action, result, by = whom, "audit");
}
