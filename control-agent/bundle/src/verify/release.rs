//! Verification of release statements: who signed is checked before anything in it is read.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{Verified, VerifyError, check_signatures, open};
use crate::cose::{Algorithm, Kind};
use crate::operator::Fingerprint;
use crate::release::ReleaseStatement;
use crate::trust::TrustRoot;

/// Verifies a release statement. Whether it is older than what runs is the caller's to know.
///
/// # Errors
/// See [`VerifyError`]; nothing of a refused statement is returned.
pub fn verify_release(
    envelope: &[u8],
    trust: &TrustRoot,
) -> Result<Verified<ReleaseStatement>, VerifyError> {
    let (parsed, digest) = open(Kind::Release, envelope)?;
    let signers = check_signatures(&parsed, trust)?;
    Ok(Verified {
        value: decode(&parsed.payload)?,
        digest,
        signers,
    })
}

/// A release statement as it claims to be, and who claims to have signed it, with which algorithm:
/// for people to look at. Nothing but its form was verified.
///
/// # Errors
/// [`VerifyError`] if it can't be read.
pub fn inspect_release(
    envelope: &[u8],
) -> Result<(ReleaseStatement, Vec<(Fingerprint, Algorithm)>), VerifyError> {
    let (parsed, _) = open(Kind::Release, envelope)?;
    let claimed = parsed.signatures.iter().map(|s| (s.kid, s.algorithm));
    Ok((decode(&parsed.payload)?, claimed.collect()))
}

/// Encoding again and comparing leaves no room for an unknown field, another form of a number or
/// bytes behind the end.
fn decode(payload: &[u8]) -> Result<ReleaseStatement, VerifyError> {
    let statement: ReleaseStatement =
        minicbor::decode(payload).map_err(|error| VerifyError::Malformed(error.to_string()))?;
    if statement.encode() != payload {
        let reason = "its payload is not in the one deterministic form, or has a field that this \
                      version does not know";
        return Err(VerifyError::NotCanonical(reason));
    }
    statement
        .validate()
        .map_err(|reason| VerifyError::Malformed(format!("the release: {reason}")))?;
    Ok(statement)
}
