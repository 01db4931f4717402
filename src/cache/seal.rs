//! Sealing of what lies in Redis, where others may read and write (`cache.encryption_key`).
//!
//! AES-256-GCM with a random nonce; the entry's name in Redis is the associated data, so that an entry that was moved to
//! another name does not open. A sealed entry says which key sealed it, so that a new key can be brought in while the old
//! one still opens.
//!
//! ```text
//! "SLXS" | first 4 bytes of the key's SHA-256 | nonce, 12 bytes | sealed bytes | tag, 16 bytes
//! ```

use bytes::{Bytes, BytesMut};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use sha2::{Digest, Sha256};

use crate::config::secret::SecretKey;

const MAGIC: &[u8; 4] = b"SLXS";
const ID_LEN: usize = 4;
const HEAD: usize = MAGIC.len() + ID_LEN + NONCE_LEN;

/// Why sealed bytes were not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealError {
    /// They are not sealed, though everything should be.
    Unsealed,
    /// No key that is known sealed them.
    UnknownKey,
    /// They were changed, cut, or sealed under another name.
    Forged,
}

impl SealError {
    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unsealed => "unsealed",
            Self::UnknownKey => "unknown_key",
            Self::Forged => "forged",
        }
    }
}

/// Seals with one key and opens with it or the one before it.
pub struct Sealer {
    current: NamedKey,
    previous: Option<NamedKey>,
    random: SystemRandom,
}

/// A key and the name by which sealed entries refer to it.
struct NamedKey {
    id: [u8; ID_LEN],
    key: LessSafeKey,
}

impl NamedKey {
    fn new(key: &SecretKey) -> Option<Self> {
        let digest = Sha256::digest(key.0);
        let id = digest[..ID_LEN].try_into().ok()?;
        Some(Self { id, key: LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key.0).ok()?) })
    }
}

impl Sealer {
    /// `None` only if the library refuses a key of the right length.
    #[must_use]
    pub fn new(current: &SecretKey, previous: Option<&SecretKey>) -> Option<Self> {
        let previous = match previous {
            Some(key) => Some(NamedKey::new(key)?),
            None => None,
        };
        Some(Self { current: NamedKey::new(current)?, previous, random: SystemRandom::new() })
    }

    /// Seals bytes for a name. `None` if the system has no random numbers: then nothing is kept.
    #[must_use]
    pub fn seal(&self, name: &[u8], plain: &[u8]) -> Option<Bytes> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut sealed = plain.to_vec();
        self.current.key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(name), &mut sealed).ok()?;
        let mut out = BytesMut::with_capacity(HEAD + sealed.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.current.id);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&sealed);
        Some(out.freeze())
    }

    /// Opens bytes that were sealed for a name.
    ///
    /// # Errors
    /// A [`SealError`] for anything else.
    pub fn open(&self, name: &[u8], sealed: &[u8]) -> Result<Bytes, SealError> {
        let rest = sealed.strip_prefix(MAGIC).ok_or(SealError::Unsealed)?;
        let (id, rest) = rest.split_at_checked(ID_LEN).ok_or(SealError::Forged)?;
        let (nonce, rest) = rest.split_at_checked(NONCE_LEN).ok_or(SealError::Forged)?;
        let keys = [Some(&self.current), self.previous.as_ref()];
        let found = keys.into_iter().flatten().find(|known| known.id == id).ok_or(SealError::UnknownKey)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::Forged)?;
        let mut plain = rest.to_vec();
        let length = found.key.open_in_place(nonce, Aad::from(name), &mut plain).map_err(|_| SealError::Forged)?.len();
        plain.truncate(length);
        Ok(Bytes::from(plain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(byte: u8) -> SecretKey {
        SecretKey([byte; 32])
    }

    #[test]
    fn what_was_sealed_opens_under_its_name_and_a_known_key() {
        let (old, new) = (Sealer::new(&key(1), None).unwrap(), Sealer::new(&key(2), Some(&key(1))).unwrap());
        let sealed = old.seal(b"name", b"plain words").unwrap();
        assert!(!sealed.windows(5).any(|window| window == b"plain"));
        assert_ne!(old.seal(b"name", b"plain words"), Some(sealed.clone()), "never the same twice");
        assert_eq!(old.open(b"name", &sealed).as_deref(), Ok(&b"plain words"[..]));
        assert_eq!(new.open(b"name", &sealed).as_deref(), Ok(&b"plain words"[..]));
        assert_eq!(new.open(b"other", &sealed), Err(SealError::Forged));
        assert_eq!(old.open(b"name", &new.seal(b"name", b"x").unwrap()), Err(SealError::UnknownKey));
        assert_eq!(old.open(b"name", b"SLX1 and more"), Err(SealError::Unsealed));
    }

    proptest! {
        #[test]
        fn one_flipped_bit_or_one_byte_less_does_not_open(plain in proptest::collection::vec(any::<u8>(), 0..60), at: usize, bit in 0_u8..8) {
            let sealer = Sealer::new(&key(7), None).unwrap();
            let sealed = sealer.seal(b"name", &plain).unwrap();
            let mut flipped = sealed.to_vec();
            let at = at % flipped.len();
            flipped[at] ^= 1 << bit;
            prop_assert!(sealer.open(b"name", &flipped).is_err());
            prop_assert!(sealer.open(b"name", &sealed[..at]).is_err());
        }

        #[test]
        fn any_bytes_are_looked_at_calmly(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Sealer::new(&key(7), None).unwrap().open(b"name", &bytes);
            let _ = Sealer::new(&key(7), None).unwrap().open(b"name", &[&MAGIC[..], &bytes].concat());
        }
    }
}
