//! The signed host bundle: what people write, how it is encoded, signed and verified.
//!
//! A configuration travels in at most six steps, each a function here:
//! [`source::load`] (TOML, errors with file, line and field) -> [`HostBundle`] ->
//! [`sign`] (deterministic CBOR inside COSE_Sign, two signatures per operator) -> an envelope,
//! carried by anything -> [`verify`] (size, signatures, threshold, encoding, target host, epoch,
//! validity) -> [`Verified<HostBundle>`], whose only constructor is in [`mod@verify`].
//!
//! The agent and keyd verify the same bytes with the same code and their own [`TrustRoot`].
//! A release of Bulkhead itself travels in the same kind of envelope: [`ReleaseStatement`],
//! [`sign_release`], [`verify_release`].
//!
//! Formats: `docs/formats/bundle.md`, `docs/formats/release.md` and `docs/formats/keys.md`.
#![forbid(unsafe_code)]

pub mod cose;
mod encoding;
pub mod key_scope;
mod low_s;
pub mod operator;
pub mod release;
pub mod schema;
pub mod sign;
pub mod source;
pub mod trust;
pub mod validate;
pub mod verify;

pub use bulkhead_files::{private_file, reader, text};

pub use operator::{Fingerprint, KeyError, OperatorKey, OperatorPublicKey};
pub use reader::SourceError;
pub use release::ReleaseStatement;
pub use schema::{Group, HostBundle, Nic, Rekey, SealedKeyEntry, SocketSpec, Switch, Volume};
pub use sign::{SignError, sign, sign_release};
pub use trust::TrustRoot;
pub use validate::{ValidationError, validate};
pub use verify::release::{inspect_release, verify_release};
pub use verify::{Inspected, Policy, Verified, VerifyError, digest_of, inspect, verify};

/// Recipient name of the offline recovery key in a volume's sealed keys; no host may have it.
pub const RECOVERY_RECIPIENT: &str = "recovery";

#[cfg(test)]
mod tests;
