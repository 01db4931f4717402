//! Who may manage: holders of the admin token.

use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};

use crate::config::secret::Secret;
use crate::request::refusal::Refusal;

/// The admin token, if there is one.
#[derive(Clone, Debug, Default)]
pub struct Token(pub Option<Secret>);

impl Token {
    /// Whether a request may manage.
    ///
    /// # Errors
    /// Why not.
    pub fn authorize(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let token = self.0.as_ref().ok_or(Refusal::NoToken)?;
        let given = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer ")).unwrap_or_default();
        // Digests are compared, so that the time taken says nothing about the token.
        if Sha256::digest(given) == Sha256::digest(token.0.as_bytes()) { Ok(()) } else { Err(Refusal::Forbidden) }
    }
}
