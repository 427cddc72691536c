//! Verification: the only place where a [`Verified`] is made.
//!
//! Nothing inside the payload is interpreted before both signatures of every named signer were
//! checked and enough operators signed.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod release;

use std::ops::Deref;

use bulkhead_protocol::envelope::MAX_ENVELOPE_BYTES;
use sha2::{Digest, Sha384};

use crate::cose::{Algorithm, Envelope, Kind, ParseError, Signature, to_be_signed};
use crate::encoding::{self, DecodeError};
use crate::low_s;
use crate::operator::{Fingerprint, OperatorPublicKey};
use crate::schema::HostBundle;
use crate::text;
use crate::trust::TrustRoot;
use crate::validate::{ValidationError, validate};

/// What a host holds an envelope against.
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    /// Whose signatures count.
    pub trust: &'a TrustRoot,
    /// Name of this host.
    pub host: &'a str,
    /// Epoch of the bundle accepted last, 0 if none: the next is above it.
    pub epoch_floor: u64,
    /// Digest of the envelope accepted last. That same envelope is verified again without a look
    /// at epoch and time, so that a restart after its expiry changes nothing.
    pub last_digest: Option<[u8; 48]>,
    /// Unix time in seconds.
    pub now: u64,
}

/// Something that came out of [`verify`] or [`release::verify_release`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T> {
    value: T,
    digest: [u8; 48],
    signers: Vec<String>,
}

impl<T> Verified<T> {
    /// SHA-384 of the envelope's bytes.
    #[must_use]
    pub fn digest(&self) -> [u8; 48] {
        self.digest
    }

    /// Names of the operators who signed, as the trust root has them.
    #[must_use]
    pub fn signers(&self) -> &[String] {
        &self.signers
    }
}

impl<T> Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// Why an envelope was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Over the cap; nothing in it was looked at.
    #[error("the envelope has {given} bytes, over the size cap of {MAX_ENVELOPE_BYTES}")]
    TooLarge {
        /// Its length in bytes.
        given: usize,
    },
    /// Not an envelope, or not a bundle in it.
    #[error(
        "the envelope is malformed: {0}; is this file what `bulkhead sign` or `bulkhead release sign` wrote?"
    )]
    Malformed(String),
    /// Readable, but not in the one form that is signed.
    #[error("the envelope is not canonical: {0}; sign it again with this version of `bulkhead`")]
    NotCanonical(&'static str),
    /// Nobody signed.
    #[error("the envelope has no signature")]
    NoSignature,
    /// A signer that the trust root does not have.
    #[error(
        "a signature is by an unknown key ({0}): the host's trust root does not name this operator"
    )]
    UnknownSigner(Fingerprint),
    /// One of a signer's two signatures is not there.
    #[error(
        "the {missing} signature of operator {operator} is missing: each operator signs with \
         ESP384 and with ML-DSA-87, and both are required"
    )]
    SignatureMissing {
        /// Whose.
        operator: String,
        /// Which.
        missing: Algorithm,
    },
    /// A signature does not match.
    #[error(
        "the {algorithm} signature of operator {operator} is wrong: the envelope was changed \
         after it was signed, or was signed with another key"
    )]
    BadSignature {
        /// Whose.
        operator: String,
        /// Which.
        algorithm: Algorithm,
    },
    /// Too few operators.
    #[error("{given} operator(s) signed, the trust root demands {needed}")]
    BelowThreshold {
        /// How many signed.
        given: usize,
        /// How many have to.
        needed: usize,
    },
    /// Signed, but with a field that this version does not know.
    #[error(
        "the bundle has the unknown field {0}: it was made by a newer version; \
         upgrade this host first"
    )]
    UnknownField(String),
    /// Signed, but contradicts itself.
    #[error("the bundle is not valid: {0}")]
    Invalid(#[from] ValidationError),
    /// For somebody else.
    #[error("the bundle is for host {bundle:?}, this is {host:?}")]
    OtherHost {
        /// Who is meant.
        bundle: String,
        /// Who we are.
        host: String,
    },
    /// Old, or replayed.
    #[error("the bundle's epoch {epoch} is not above the floor {floor}: sign it with a higher one")]
    EpochNotAboveFloor {
        /// Of the bundle.
        epoch: u64,
        /// Of the bundle accepted last.
        floor: u64,
    },
    /// It names what it follows, and that is not what was accepted last.
    #[error(
        "the bundle supersedes other envelopes than the one this host accepted last ({last}): \
         add that digest to `supersedes`, or leave the field out"
    )]
    DoesNotFollow {
        /// Digest of the envelope accepted last, in hex.
        last: String,
    },
    /// Too early.
    #[error("the bundle is not valid before {not_before}, and now it is {now} (Unix time)")]
    NotYetValid {
        /// First second.
        not_before: u64,
        /// This second.
        now: u64,
    },
    /// Too late.
    #[error(
        "the bundle expired at {expires}, and now it is {now} (Unix time): sign a new one, \
         or look at the host's clock"
    )]
    Expired {
        /// First second after.
        expires: u64,
        /// This second.
        now: u64,
    },
}

impl From<ParseError> for VerifyError {
    fn from(error: ParseError) -> Self {
        match error {
            ParseError::Malformed(what) => Self::Malformed(what),
            ParseError::NotCanonical(what) => Self::NotCanonical(what),
        }
    }
}

impl From<DecodeError> for VerifyError {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Malformed(what) => Self::Malformed(format!("the payload: {what}")),
            DecodeError::UnknownField(path) => Self::UnknownField(path),
            DecodeError::NotCanonical => {
                Self::NotCanonical("its payload is not in the one deterministic form")
            }
        }
    }
}

/// SHA-384 of an envelope's bytes, as `supersedes` and [`Policy::last_digest`] have it.
#[must_use]
pub fn digest_of(envelope: &[u8]) -> [u8; 48] {
    Sha384::digest(envelope).into()
}

/// Verifies an envelope. The caller persists epoch and digest before it acts on the bundle.
///
/// # Errors
/// See [`VerifyError`]; nothing of a refused envelope is returned.
pub fn verify(envelope: &[u8], policy: &Policy<'_>) -> Result<Verified<HostBundle>, VerifyError> {
    let (parsed, digest) = open(Kind::HostBundle, envelope)?;
    let signers = check_signatures(&parsed, policy.trust)?;
    let bundle = encoding::decode(&parsed.payload)?;
    if bundle.host != policy.host {
        return Err(VerifyError::OtherHost {
            bundle: bundle.host,
            host: policy.host.to_owned(),
        });
    }
    validate(&bundle)?;
    if policy.last_digest != Some(digest) {
        check_fresh(&bundle, policy)?;
    }
    Ok(Verified {
        value: bundle,
        digest,
        signers,
    })
}

/// Size, digest and structure.
fn open(kind: Kind, envelope: &[u8]) -> Result<(Envelope, [u8; 48]), VerifyError> {
    if envelope.len() > MAX_ENVELOPE_BYTES {
        return Err(VerifyError::TooLarge {
            given: envelope.len(),
        });
    }
    Ok((Envelope::parse(kind, envelope)?, digest_of(envelope)))
}

/// Both signatures of every signer named, and enough signers. Returns their names.
fn check_signatures(envelope: &Envelope, trust: &TrustRoot) -> Result<Vec<String>, VerifyError> {
    if envelope.signatures.is_empty() {
        return Err(VerifyError::NoSignature);
    }
    let mut signers = Vec::new();
    // The order of an envelope's signatures puts those of one kid side by side.
    for pair in envelope.signatures.chunk_by(|a, b| a.kid == b.kid) {
        let Some(kid) = pair.first().map(|s| s.kid) else {
            continue;
        };
        let operator = trust
            .operators()
            .iter()
            .find(|operator| operator.fingerprint() == kid)
            .ok_or(VerifyError::UnknownSigner(kid))?;
        for algorithm in [Algorithm::Esp384, Algorithm::MlDsa87] {
            let signature = pair.iter().find(|s| s.algorithm == algorithm);
            check_one(envelope, operator, algorithm, signature)?;
        }
        signers.push(operator.name.clone());
    }
    if signers.len() < trust.threshold() {
        return Err(VerifyError::BelowThreshold {
            given: signers.len(),
            needed: trust.threshold(),
        });
    }
    Ok(signers)
}

fn check_one(
    envelope: &Envelope,
    operator: &OperatorPublicKey,
    algorithm: Algorithm,
    signature: Option<&Signature>,
) -> Result<(), VerifyError> {
    let Some(signature) = signature else {
        return Err(VerifyError::SignatureMissing {
            operator: operator.name.clone(),
            missing: algorithm,
        });
    };
    let signed = to_be_signed(envelope.kind, &envelope.payload, &signature.kid, algorithm);
    if !operator.verify(algorithm, &signed, &signature.signature) {
        return Err(VerifyError::BadSignature {
            operator: operator.name.clone(),
            algorithm,
        });
    }
    if algorithm == Algorithm::Esp384 && !low_s::is_low(&signature.signature) {
        return Err(VerifyError::NotCanonical(
            "an ESP384 signature has the larger of its two possible s",
        ));
    }
    Ok(())
}

/// Epoch, what it follows, and time.
fn check_fresh(bundle: &HostBundle, policy: &Policy<'_>) -> Result<(), VerifyError> {
    if bundle.epoch <= policy.epoch_floor {
        return Err(VerifyError::EpochNotAboveFloor {
            epoch: bundle.epoch,
            floor: policy.epoch_floor,
        });
    }
    if let Some(last) = policy.last_digest
        && !bundle.supersedes.is_empty()
        && !bundle.supersedes.iter().any(|digest| **digest == last)
    {
        return Err(VerifyError::DoesNotFollow {
            last: text::to_hex(&last),
        });
    }
    let now = policy.now;
    if now < bundle.not_before {
        return Err(VerifyError::NotYetValid {
            not_before: bundle.not_before,
            now,
        });
    }
    if now >= bundle.expires {
        return Err(VerifyError::Expired {
            expires: bundle.expires,
            now,
        });
    }
    Ok(())
}

/// An envelope as it claims to be: for people to look at, never to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// What it says. Nothing about it was verified.
    pub claimed: HostBundle,
    /// SHA-384 of the envelope's bytes.
    pub digest: [u8; 48],
    /// Who claims to have signed, and with which algorithm.
    pub claimed_signers: Vec<(Fingerprint, Algorithm)>,
}

impl Inspected {
    /// Checks the signatures alone: who of the trust root signed? Says nothing about host, epoch
    /// and time.
    ///
    /// # Errors
    /// See [`VerifyError`].
    pub fn signers(envelope: &[u8], trust: &TrustRoot) -> Result<Vec<String>, VerifyError> {
        let (parsed, _) = open(Kind::HostBundle, envelope)?;
        check_signatures(&parsed, trust)
    }
}

/// Reads an envelope without verifying anything but its form.
///
/// # Errors
/// [`VerifyError`] if it can't be read.
pub fn inspect(envelope: &[u8]) -> Result<Inspected, VerifyError> {
    let (parsed, digest) = open(Kind::HostBundle, envelope)?;
    Ok(Inspected {
        claimed: encoding::decode(&parsed.payload)?,
        digest,
        claimed_signers: parsed
            .signatures
            .iter()
            .map(|s| (s.kid, s.algorithm))
            .collect(),
    })
}
