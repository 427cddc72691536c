//! The one HPKE suite there is: which algorithms, and the conversions between their types and bytes.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use hpke::aead::{AeadTag, ChaCha20Poly1305};
use hpke::kdf::HkdfSha256;
use hpke::kem::{Kem, XWing};
use hpke::{Deserializable, HpkeError, OpModeR, OpModeS, Serializable};
use zeroize::{Zeroize, Zeroizing};

/// Bytes of an X-Wing secret key (the seed it is expanded from).
pub(crate) const SECRET_BYTES: usize = 32;
/// Bytes of an X-Wing public key: ML-KEM-768's 1184, then X25519's 32.
pub(crate) const PUBLIC_BYTES: usize = 1216;
/// Bytes of an X-Wing encapsulation: ML-KEM-768's 1088, then X25519's 32.
pub(crate) const ENC_BYTES: usize = 1120;
/// Bytes of a Poly1305 tag.
pub(crate) const TAG_BYTES: usize = 16;

/// Stack that the library's calls use at most, generously: ML-KEM's matrices are the largest part.
const STACK_BYTES: usize = 128 * 1024;

pub(crate) type Secret = <XWing as Kem>::PrivateKey;
pub(crate) type Public = <XWing as Kem>::PublicKey;

/// The secret key with this seed; it wipes itself.
pub(crate) fn secret_from(seed: &[u8]) -> Result<Secret, HpkeError> {
    with_wiped_stack(|| Secret::from_bytes(seed))
}

/// The seed of a secret key.
pub(crate) fn secret_bytes(secret: &Secret) -> Zeroizing<[u8; SECRET_BYTES]> {
    let mut seed = Zeroizing::new([0; SECRET_BYTES]);
    secret.write_exact(seed.as_mut_slice());
    seed
}

/// The public half of a secret key.
pub(crate) fn public_of(secret: &Secret) -> Public {
    XWing::sk_to_pk(secret)
}

/// A public key from its bytes; refused if they are none (FIPS 203 section 7.2).
pub(crate) fn public_from(bytes: &[u8]) -> Result<Public, HpkeError> {
    Public::from_bytes(bytes)
}

/// The bytes of a public key.
pub(crate) fn public_bytes(public: &Public) -> Vec<u8> {
    public.to_bytes().to_vec()
}

/// Runs `call` and then overwrites the stack it ran on: the library keeps parts of keys and
/// plaintexts in local variables that nobody wipes (`tests/residue.rs` finds them without this).
fn with_wiped_stack<T>(call: impl FnOnce() -> T) -> T {
    #[inline(never)]
    fn run<T>(call: impl FnOnce() -> T) -> T {
        call()
    }
    #[inline(never)]
    fn wipe() {
        // As deep as `run` began, so that this array lies where its callees' frames were.
        [0u8; STACK_BYTES].zeroize();
    }
    let result = run(call);
    wipe();
    result
}

/// Encrypts `buffer` in place. Returns the encapsulated key and the tag.
pub(crate) fn seal_in_place(
    to: &Public,
    info: &[u8],
    aad: &[u8],
    buffer: &mut [u8],
) -> Result<(Vec<u8>, Vec<u8>), HpkeError> {
    let (enc, tag) = with_wiped_stack(|| {
        hpke::single_shot_seal_inout_detached::<ChaCha20Poly1305, HkdfSha256, XWing>(
            &OpModeS::Base,
            to,
            info,
            buffer.into(),
            aad,
        )
    })?;
    Ok((enc.to_bytes().to_vec(), tag.to_bytes().to_vec()))
}

/// Decrypts `buffer` in place; after an error its contents mean nothing.
pub(crate) fn open_in_place(
    with: &Secret,
    enc: &[u8],
    info: &[u8],
    aad: &[u8],
    buffer: &mut [u8],
    tag: &[u8],
) -> Result<(), HpkeError> {
    let enc = <XWing as Kem>::EncappedKey::from_bytes(enc)?;
    let tag = AeadTag::<ChaCha20Poly1305>::from_bytes(tag)?;
    with_wiped_stack(|| {
        hpke::single_shot_open_inout_detached::<ChaCha20Poly1305, HkdfSha256, XWing>(
            &OpModeR::Base,
            with,
            &enc,
            info,
            buffer.into(),
            aad,
            &tag,
        )
    })
}
