//! Signing: a bundle or a release statement and the operators' keys in, an envelope out.

use bulkhead_protocol::envelope::MAX_ENVELOPE_BYTES;

use crate::cose::{Algorithm, Envelope, Kind, Signature, to_be_signed};
use crate::operator::{KeyError, OperatorKey};
use crate::release::ReleaseStatement;
use crate::schema::HostBundle;
use crate::validate::{ValidationError, validate};
use crate::{encoding, low_s};

/// Why a bundle was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// Nobody signs.
    #[error("no operator key was given: name at least as many as the trust root's threshold")]
    NoKeys,
    /// The same operator twice.
    #[error("operator {0} was given twice: each signs once")]
    SameOperatorTwice(String),
    /// The bundle makes no sense.
    #[error(transparent)]
    Invalid(#[from] ValidationError),
    /// The release statement makes no sense.
    #[error("the release: {0}")]
    Release(String),
    /// Every host would refuse it.
    #[error(
        "the envelope would have {0} bytes, over the cap of {MAX_ENVELOPE_BYTES}: \
         name fewer volumes or recipients"
    )]
    TooLarge(usize),
    /// The key does not sign.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Validates a bundle and signs it, twice for each key. Returns the envelope's bytes.
///
/// # Errors
/// See [`SignError`].
pub fn sign(bundle: &HostBundle, keys: &[&OperatorKey]) -> Result<Vec<u8>, SignError> {
    validate(bundle)?;
    sign_payload(encoding::encode(bundle), keys)
}

/// Signs a payload as it is, whatever it says: what a verifier's tests need and [`sign`] refuses to
/// make. It gives nobody more than their key does, and every host refuses what is no valid bundle.
///
/// # Errors
/// See [`SignError`].
pub fn sign_payload(payload: Vec<u8>, keys: &[&OperatorKey]) -> Result<Vec<u8>, SignError> {
    sign_as(Kind::HostBundle, payload, keys)
}

/// Signs a release statement, twice for each key. Returns the envelope's bytes.
///
/// # Errors
/// See [`SignError`].
pub fn sign_release(
    statement: &ReleaseStatement,
    keys: &[&OperatorKey],
) -> Result<Vec<u8>, SignError> {
    statement.validate().map_err(SignError::Release)?;
    sign_as(Kind::Release, statement.encode(), keys)
}

pub(crate) fn sign_as(
    kind: Kind,
    payload: Vec<u8>,
    keys: &[&OperatorKey],
) -> Result<Vec<u8>, SignError> {
    if keys.is_empty() {
        return Err(SignError::NoKeys);
    }
    let mut signatures: Vec<Signature> = Vec::with_capacity(2 * keys.len());
    for key in keys {
        let kid = key.public().fingerprint();
        if signatures.iter().any(|s| s.kid == kid) {
            return Err(SignError::SameOperatorTwice(key.public().name.clone()));
        }
        for algorithm in [Algorithm::Esp384, Algorithm::MlDsa87] {
            let signature = key.sign(algorithm, &to_be_signed(kind, &payload, &kid, algorithm))?;
            signatures.push(Signature {
                kid,
                algorithm,
                signature: match algorithm {
                    Algorithm::Esp384 => low_s::normalised(signature),
                    Algorithm::MlDsa87 => signature,
                },
            });
        }
    }
    let envelope = Envelope {
        kind,
        payload,
        signatures,
    }
    .encode();
    if envelope.len() > MAX_ENVELOPE_BYTES {
        return Err(SignError::TooLarge(envelope.len()));
    }
    Ok(envelope)
}
