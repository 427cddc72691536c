//! Sealing of volume keys: to each host that may serve the volume, and to an offline recovery
//! recipient.
//!
//! HPKE (RFC 9180) in base mode, with the KEM X-Wing (ML-KEM-768 with X25519), HKDF-SHA-256 and
//! ChaCha20-Poly1305. The recipient's name stands in `info`; the volume's identity and geometry
//! are the associated data ([`VolumeContext`]), so that a sealed key moved to another recipient or
//! another volume, or to the same volume with another size or data unit, does not open.
//!
//! A plaintext key is read from the caller's memory by [`seal`] and written into the caller's memory by
//! [`unseal`], and is nowhere else in between. What is derived on the way is wiped by its owner
//! when it is dropped. Formats: `docs/formats/keys.md`.
#![forbid(unsafe_code)]

mod hybrid;
mod recipient;
mod seal;

pub use recipient::{KeyError, RecipientKey, RecipientPublicKey};
pub use seal::{
    ENC_BYTES, SEALED_BYTES, SealError, SealedKey, UnsealError, VolumeContext, seal, unseal,
};
