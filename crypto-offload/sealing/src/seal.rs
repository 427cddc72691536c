//! Sealing and unsealing one volume key for one recipient.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_files::text;
use bulkhead_protocol::VolumeId;
use bulkhead_protocol::keys::XTS_KEY_BYTES;
use minicbor::Encode;
use zeroize::Zeroize;

use crate::hybrid::{self, TAG_BYTES};
use crate::recipient::{RecipientKey, RecipientPublicKey};

/// Bytes of an encapsulated key.
pub const ENC_BYTES: usize = hybrid::ENC_BYTES;
/// Bytes of a sealed volume key: the key, then the tag.
pub const SEALED_BYTES: usize = XTS_KEY_BYTES + TAG_BYTES;

/// First entry of `info`: nothing else is ever sealed under it.
const INFO_DOMAIN: &str = "bulkhead volume key v1";

/// What a volume key is bound to. Its deterministic CBOR is the associated data; the numbers are the
/// keys of the map and never change their meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode)]
#[cbor(map)]
pub struct VolumeContext {
    /// The volume.
    #[n(0)]
    pub id: VolumeId,
    /// Its capacity in bytes.
    #[n(1)]
    pub size_bytes: u64,
    /// Its XTS data unit in bytes.
    #[n(2)]
    pub data_unit_bytes: u32,
    /// Its logical block in bytes.
    #[n(3)]
    pub logical_block_bytes: u32,
}

/// A volume key, sealed to one recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedKey {
    /// Name of the recipient.
    pub recipient: String,
    /// [`RecipientPublicKey::fingerprint`] of the recipient, 48 bytes.
    pub fingerprint: Vec<u8>,
    /// HPKE encapsulated key, [`ENC_BYTES`].
    pub enc: Vec<u8>,
    /// Encrypted key and tag, [`SEALED_BYTES`].
    pub ciphertext: Vec<u8>,
}

/// Why a key was not sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// XTS with equal halves is no XTS.
    #[error(
        "the two halves of the volume key are equal, which XTS forbids: make a new key at random"
    )]
    EqualHalves,
    /// The kernel gave no random bytes.
    #[error("the system has no randomness: {0}")]
    Randomness(getrandom::Error),
    /// The library refused; it does not say why.
    #[error("the volume key can't be sealed to {0:?}: its public key is damaged")]
    Crypto(String),
}

/// Why a key was not unsealed. The caller's memory was zeroed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnsealError {
    /// For somebody else.
    #[error("the key is sealed to {sealed_to:?}, and this is the key of {ours:?}")]
    OtherRecipient {
        /// Whom it is sealed to.
        sealed_to: String,
        /// Whose key was given.
        ours: String,
    },
    /// For an earlier or later key of the same recipient.
    #[error(
        "the key is sealed to another key of {recipient:?} (fingerprint {sealed_to}) than this \
         one ({ours}): seal it again to the key that {recipient:?} has now"
    )]
    OtherKey {
        /// The recipient.
        recipient: String,
        /// Fingerprint of the key it is sealed to, in hex.
        sealed_to: String,
        /// Fingerprint of the key given, in hex.
        ours: String,
    },
    /// Not something that [`seal`] made.
    #[error("the {part} of the sealed key has {given} bytes, not {expected}: it is damaged")]
    WrongLength {
        /// Which part.
        part: &'static str,
        /// Its length.
        given: usize,
        /// Its length in a sealed key.
        expected: usize,
    },
    /// Authentication failed.
    #[error(
        "the key sealed to {recipient:?} does not open for volume {volume}: it was changed, or \
         was sealed for another id, size, data unit or logical block"
    )]
    DoesNotOpen {
        /// The recipient.
        recipient: String,
        /// The volume.
        volume: VolumeId,
    },
}

/// Seals a volume key to a recipient. Each call gives another result.
///
/// # Errors
/// See [`SealError`].
pub fn seal(
    key: &[u8; XTS_KEY_BYTES],
    to: &RecipientPublicKey,
    context: &VolumeContext,
) -> Result<SealedKey, SealError> {
    if halves_equal(key) {
        return Err(SealError::EqualHalves);
    }
    // The library panics without randomness. Once the kernel has given any it never fails again,
    // so that asking first turns that into an error.
    getrandom::fill(&mut [0; 1]).map_err(SealError::Randomness)?;
    let mut ciphertext = Vec::with_capacity(SEALED_BYTES); // never grows: no copy is left behind
    ciphertext.extend_from_slice(key);
    let sealed = hybrid::seal_in_place(
        to.key(),
        &info(&to.name),
        &associated_data(context),
        &mut ciphertext,
    );
    let (enc, tag) = sealed.map_err(|_| {
        ciphertext.zeroize();
        SealError::Crypto(to.name.clone())
    })?;
    ciphertext.extend_from_slice(&tag);
    Ok(SealedKey {
        recipient: to.name.clone(),
        fingerprint: to.fingerprint().to_vec(),
        enc,
        ciphertext,
    })
}

/// Unseals a volume key straight into the caller's memory, which is zeroed on every error.
///
/// # Errors
/// See [`UnsealError`].
pub fn unseal(
    sealed: &SealedKey,
    with: &RecipientKey,
    context: &VolumeContext,
    out: &mut [u8; XTS_KEY_BYTES],
) -> Result<(), UnsealError> {
    out.zeroize();
    check_recipient(sealed, with.public())?;
    check_length("encapsulated key", &sealed.enc, ENC_BYTES)?;
    check_length("ciphertext", &sealed.ciphertext, SEALED_BYTES)?;
    let does_not_open = || UnsealError::DoesNotOpen {
        recipient: sealed.recipient.clone(),
        volume: context.id,
    };
    let (body, tag) = sealed
        .ciphertext
        .split_first_chunk::<XTS_KEY_BYTES>()
        .ok_or_else(does_not_open)?;
    out.copy_from_slice(body);
    let opened = hybrid::open_in_place(
        with.secret(),
        &sealed.enc,
        &info(&with.public().name),
        &associated_data(context),
        out.as_mut_slice(),
        tag,
    );
    opened.map_err(|_| {
        out.zeroize();
        does_not_open()
    })
}

fn check_recipient(sealed: &SealedKey, ours: &RecipientPublicKey) -> Result<(), UnsealError> {
    if sealed.recipient != ours.name {
        return Err(UnsealError::OtherRecipient {
            sealed_to: sealed.recipient.clone(),
            ours: ours.name.clone(),
        });
    }
    let fingerprint = ours.fingerprint();
    if sealed.fingerprint != fingerprint {
        return Err(UnsealError::OtherKey {
            recipient: ours.name.clone(),
            sealed_to: text::to_hex(&sealed.fingerprint),
            ours: text::to_hex(&fingerprint),
        });
    }
    Ok(())
}

fn check_length(part: &'static str, bytes: &[u8], expected: usize) -> Result<(), UnsealError> {
    match bytes.len() {
        given if given == expected => Ok(()),
        given => Err(UnsealError::WrongLength {
            part,
            given,
            expected,
        }),
    }
}

/// Whether data key and tweak key are equal, in a time that says nothing about either.
fn halves_equal(key: &[u8; XTS_KEY_BYTES]) -> bool {
    let (data, tweak) = key.split_at(XTS_KEY_BYTES / 2);
    let differences = data.iter().zip(tweak).fold(0, |all, (a, b)| all | (a ^ b));
    differences == 0
}

/// HPKE's `info`: what is sealed, and to whom.
fn info(recipient: &str) -> Vec<u8> {
    encoded(&(INFO_DOMAIN, recipient))
}

/// HPKE's associated data: which volume, of which geometry.
fn associated_data(context: &VolumeContext) -> Vec<u8> {
    encoded(context)
}

fn encoded<T: Encode<()>>(value: &T) -> Vec<u8> {
    // Writing to a Vec can't fail, and none of these types refuses to be encoded.
    minicbor::to_vec(value).unwrap_or_else(|error| unreachable!("encoding failed: {error}"))
}
