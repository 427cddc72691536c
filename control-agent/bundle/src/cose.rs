//! The envelope: COSE_Sign (RFC 9052 section 4.1, tag 98) with one fixed shape.
//!
//! ```text
//! 98([ << {3: content type} >>, {}, payload,
//!      [ [ << {1: algorithm, 4: kid} >>, {}, signature ], ... ] ])
//! ```
//!
//! Every part is deterministic CBOR, and signatures stand in the order of (kid, ESP384 before
//! ML-DSA-87), each pair once; anything else is refused by encoding again and comparing.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;

use minicbor::data::Tag;
use minicbor::{Decoder, Encoder};

use crate::operator::Fingerprint;

/// COSE_Sign, RFC 9052 table 1.
const TAG: u64 = 98;
/// Header labels, RFC 9052 table 3.
const LABEL_ALG: i64 = 1;
const LABEL_CONTENT_TYPE: i64 = 3;
const LABEL_KID: i64 = 4;

/// What the payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A host's bundle.
    HostBundle,
    /// A release statement.
    Release,
}

impl Kind {
    /// The content type in the envelope's protected header.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::HostBundle => "application/vnd.bulkhead.host-bundle+cbor",
            Self::Release => "application/vnd.bulkhead.release+cbor",
        }
    }

    /// `external_aad` of every signature: a signature made for one kind can't serve as another.
    #[must_use]
    pub fn domain(self) -> &'static [u8] {
        match self {
            Self::HostBundle => b"bulkhead host bundle v1",
            Self::Release => b"bulkhead release v1",
        }
    }
}

/// Most signatures looked at: two for each operator of the largest trust root.
pub const MAX_SIGNATURES: usize = 2 * crate::trust::MAX_OPERATORS;

/// A signature algorithm; each signer uses both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Algorithm {
    /// ECDSA, P-384, SHA-384 (RFC 9864).
    Esp384,
    /// ML-DSA-87 (FIPS 204), empty context.
    MlDsa87,
}

impl Algorithm {
    /// Number in the COSE registry.
    #[must_use]
    pub fn cose_id(self) -> i64 {
        match self {
            Self::Esp384 => -51,
            Self::MlDsa87 => -50,
        }
    }

    fn from_cose_id(id: i64) -> Option<Self> {
        [Self::Esp384, Self::MlDsa87]
            .into_iter()
            .find(|algorithm| algorithm.cose_id() == id)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Esp384 => "ESP384",
            Self::MlDsa87 => "ML-DSA-87",
        })
    }
}

/// One signature, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Whose, by their own word.
    pub kid: Fingerprint,
    /// Which kind.
    pub algorithm: Algorithm,
    /// The bytes.
    pub signature: Vec<u8>,
}

/// An envelope taken apart, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// What the payload is.
    pub kind: Kind,
    /// What is signed.
    pub payload: Vec<u8>,
    /// By whom.
    pub signatures: Vec<Signature>,
}

/// Why bytes are not an envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ParseError {
    Malformed(String),
    NotCanonical(&'static str),
}

impl From<minicbor::decode::Error> for ParseError {
    fn from(error: minicbor::decode::Error) -> Self {
        Self::Malformed(error.to_string())
    }
}

fn malformed<T>(what: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError::Malformed(what.into()))
}

/// Encodes with a closure; writing to a Vec does not fail.
fn cbor(
    write: impl FnOnce(
        &mut Encoder<Vec<u8>>,
    ) -> Result<(), minicbor::encode::Error<std::convert::Infallible>>,
) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new());
    match write(&mut encoder) {
        Ok(()) => encoder.into_writer(),
        // The writer's error is Infallible, and nothing written here refuses to be encoded.
        Err(error) => unreachable!("encoding into memory failed: {error}"),
    }
}

fn body_protected(kind: Kind) -> Vec<u8> {
    cbor(|e| {
        e.map(1)?.i64(LABEL_CONTENT_TYPE)?;
        e.str(kind.content_type())?.ok()
    })
}

fn signer_protected(kid: &Fingerprint, algorithm: Algorithm) -> Vec<u8> {
    cbor(|e| {
        e.map(2)?.i64(LABEL_ALG)?.i64(algorithm.cose_id())?;
        e.i64(LABEL_KID)?.bytes(kid.as_bytes())?.ok()
    })
}

/// The bytes that a signer signs (`Sig_structure`, RFC 9052 section 4.4).
#[must_use]
pub fn to_be_signed(
    kind: Kind,
    payload: &[u8],
    kid: &Fingerprint,
    algorithm: Algorithm,
) -> Vec<u8> {
    cbor(|e| {
        e.array(5)?.str("Signature")?;
        e.bytes(&body_protected(kind))?;
        e.bytes(&signer_protected(kid, algorithm))?;
        e.bytes(kind.domain())?.bytes(payload)?.ok()
    })
}

impl Envelope {
    /// The one encoding of this envelope; signatures are put in their order.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut signatures: Vec<&Signature> = self.signatures.iter().collect();
        signatures.sort_by_key(|s| (s.kid, s.algorithm));
        cbor(|e| {
            e.tag(Tag::new(TAG))?.array(4)?;
            e.bytes(&body_protected(self.kind))?
                .map(0)?
                .bytes(&self.payload)?;
            e.array(signatures.len() as u64)?;
            for s in signatures {
                e.array(3)?.bytes(&signer_protected(&s.kid, s.algorithm))?;
                e.map(0)?.bytes(&s.signature)?;
            }
            Ok(())
        })
    }

    /// Takes an envelope apart. Looks at nothing inside the payload.
    pub(crate) fn parse(kind: Kind, bytes: &[u8]) -> Result<Self, ParseError> {
        let envelope = Self::parse_leniently(kind, bytes)?;
        let distinct = |pair: &[Signature]| match pair {
            [a, b] => (a.kid, a.algorithm) < (b.kid, b.algorithm),
            _ => true,
        };
        if !envelope.signatures.windows(2).all(distinct) {
            return Err(ParseError::NotCanonical(
                "its signatures are not in the order of kid and algorithm, each once",
            ));
        }
        if envelope.encode() != bytes {
            return Err(ParseError::NotCanonical(
                "its COSE structure is not in the one deterministic form",
            ));
        }
        Ok(envelope)
    }

    fn parse_leniently(kind: Kind, bytes: &[u8]) -> Result<Self, ParseError> {
        let mut d = Decoder::new(bytes);
        if d.tag()?.as_u64() != TAG {
            return malformed("the CBOR tag is not 98 (COSE_Sign)");
        }
        if d.array()? != Some(4) {
            return malformed("COSE_Sign is not an array of 4");
        }
        if d.bytes()? != body_protected(kind) {
            let content_type = kind.content_type();
            return malformed(format!("the content type is not {content_type}"));
        }
        if d.map()? != Some(0) {
            return malformed("there are unprotected headers");
        }
        let payload = d.bytes()?.to_vec();
        let count = d.array()?;
        let Some(count) = count.and_then(|n| usize::try_from(n).ok()) else {
            return malformed("the signatures are not an array of known length");
        };
        if count > MAX_SIGNATURES {
            return malformed(format!(
                "there are {count} signatures, at most {MAX_SIGNATURES} are looked at"
            ));
        }
        let mut signatures = Vec::with_capacity(count);
        for _ in 0..count {
            signatures.push(parse_signature(&mut d)?);
        }
        Ok(Self {
            kind,
            payload,
            signatures,
        })
    }
}

fn parse_signature(d: &mut Decoder<'_>) -> Result<Signature, ParseError> {
    if d.array()? != Some(3) {
        return malformed("a COSE_Signature is not an array of 3");
    }
    let mut headers = Decoder::new(d.bytes()?);
    if headers.map()? != Some(2) || headers.i64()? != LABEL_ALG {
        return malformed("a signer's protected headers are not algorithm and kid");
    }
    let id = headers.i64()?;
    let Some(algorithm) = Algorithm::from_cose_id(id) else {
        return malformed(format!(
            "algorithm {id} is neither ESP384 (-51) nor ML-DSA-87 (-50)"
        ));
    };
    if headers.i64()? != LABEL_KID {
        return malformed("a signer's protected headers are not algorithm and kid");
    }
    let Ok(kid) = headers.bytes()?.try_into() else {
        return malformed("a kid is not 48 bytes long");
    };
    if d.map()? != Some(0) {
        return malformed("a signer has unprotected headers");
    }
    Ok(Signature {
        kid: Fingerprint::from_bytes(kid),
        algorithm,
        signature: d.bytes()?.to_vec(),
    })
}
