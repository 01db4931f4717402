//! The audit line: who changed what, by address and token, and what came of it. It is logged whatever `log.level` says, and never
//! dropped ([`audit_log`](crate::telemetry::audit_log)).

use std::net::IpAddr;
use std::sync::OnceLock;

use http::HeaderMap;

use crate::config::tokens::{Right, Tokens};
use crate::request::refusal::Refusal;
use crate::telemetry::audit_log::{AUDIT, Slot};

/// Somebody who may do something, and does it.
pub struct Actor<'a> {
    address: IpAddr,
    token: &'a str,
    action: &'static str,
    /// What they are doing.
    doing: OnceLock<String>,
    /// What came of it.
    result: OnceLock<String>,
    /// Room for the line.
    _slot: Slot,
}

impl<'a> Actor<'a> {
    /// The sender of a request from `address`, if it may do this, and if it can be audited. An attempt that is refused is audited too.
    ///
    /// # Errors
    /// Why they may not.
    pub async fn authorize(tokens: &'a Tokens, headers: &HeaderMap, address: IpAddr, right: Right) -> Result<Self, Refusal> {
        let action = right.word();
        match tokens.authorize(headers, right) {
            Ok(token) => {
                let slot = Slot::for_action().await.ok_or(Refusal::Unaudited)?;
                Ok(Self { address, token, action, doing: OnceLock::new(), result: OnceLock::new(), _slot: slot })
            }
            Err(refusal) => {
                if let Some(_slot) = Slot::for_refusal() {
                    tracing::warn!(target: AUDIT, action, by = %address, refused = refusal.row().detail, "audit");
                }
                Err(refusal)
            }
        }
    }

    /// They begin with it: if the client does not wait for the end, the line says this.
    pub fn begins(&self, what: &str) {
        let _ = self.doing.set(what.to_owned());
    }

    /// They did it.
    pub fn did(&self, result: &str) {
        let _ = self.result.set(result.to_owned());
    }
}

impl Drop for Actor<'_> {
    fn drop(&mut self) {
        if self.doing.get().is_none() && self.result.get().is_none() {
            // What they asked for made no sense, so nothing was done.
            return;
        }
        let what = self.doing.get().map_or("", String::as_str);
        let result = self.result.get().map_or("the client left before it ended", String::as_str);
        tracing::info!(target: AUDIT, action = self.action, what, result, by = %self.address, token = self.token, "audit");
    }
}

/// The process did something that a signal, or a changed file, told it to.
pub fn told_by(whom: &str, action: &'static str, result: &str) {
    tracing::info!(target: AUDIT, action, result, by = whom, "audit");
}
