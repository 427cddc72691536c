//! The peers: AWS-LC's AEAD as its users call it, a packet at a time, and ring's.
//!
//! UNSAFETY: AWS-LC is called with a context that lives through the call and buffers of the lengths
//! given.
#![expect(unsafe_code, reason = "the peer is a C library")]

use std::ptr;

use aws_lc_sys::{
    EVP_AEAD_CTX, EVP_AEAD_CTX_free, EVP_AEAD_CTX_new, EVP_AEAD_CTX_open_gather,
    EVP_AEAD_CTX_seal_scatter, EVP_aead_aes_256_gcm,
};
use bulkhead_packet_cipher::{KEY_BYTES, TAG_BYTES};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// As rows call them.
pub const PEERS: [&str; 2] = ["AWS-LC (AEAD)", "ring (AEAD)"];

/// The nonce that our cipher makes of salt and number.
fn nonce(salt: [u8; 4], sequence: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&salt);
    nonce[4..].copy_from_slice(&sequence.to_be_bytes());
    nonce
}

/// AWS-LC with its key expanded once.
pub(super) struct AwsLc(*mut EVP_AEAD_CTX);

impl AwsLc {
    /// Expands a key.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        // SAFETY: the key has its length; what comes back is checked.
        let context =
            unsafe { EVP_AEAD_CTX_new(EVP_aead_aes_256_gcm(), key.as_ptr(), key.len(), TAG_BYTES) };
        assert!(!context.is_null(), "AWS-LC gives no context");
        Self(context)
    }

    /// Seals the plaintext in `buffer`, which has room for the tag behind it.
    pub fn seal(&self, salt: [u8; 4], number: u64, aad: &[u8], buffer: &mut [u8]) {
        let nonce = nonce(salt, number);
        let mut tag_bytes = 0;
        let (text, tag) = buffer.split_at_mut(buffer.len() - TAG_BYTES);
        // SAFETY: the context is live; every buffer has the length given.
        let done = unsafe {
            EVP_AEAD_CTX_seal_scatter(
                self.0,
                text.as_mut_ptr(),
                tag.as_mut_ptr(),
                &raw mut tag_bytes,
                TAG_BYTES,
                nonce.as_ptr(),
                nonce.len(),
                text.as_ptr(),
                text.len(),
                ptr::null(),
                0,
                aad.as_ptr(),
                aad.len(),
            )
        };
        assert_eq!(done, 1, "AWS-LC failed to seal");
    }

    /// Opens into `output`.
    pub fn open(&self, salt: [u8; 4], number: u64, aad: &[u8], sealed: &[u8], output: &mut [u8]) {
        let nonce = nonce(salt, number);
        let (ciphertext, tag) = sealed.split_at(output.len());
        // SAFETY: the context is live; every buffer has the length given.
        let done = unsafe {
            EVP_AEAD_CTX_open_gather(
                self.0,
                output.as_mut_ptr(),
                nonce.as_ptr(),
                nonce.len(),
                ciphertext.as_ptr(),
                ciphertext.len(),
                tag.as_ptr(),
                tag.len(),
                aad.as_ptr(),
                aad.len(),
            )
        };
        assert_eq!(done, 1, "AWS-LC failed to open");
    }
}

impl Drop for AwsLc {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { EVP_AEAD_CTX_free(self.0) };
    }
}

/// ring with its key expanded once. It works within one buffer only.
pub(super) struct Ring(LessSafeKey);

impl Ring {
    /// Expands a key.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        let key = UnboundKey::new(&AES_256_GCM, key).expect("a key's length");
        Self(LessSafeKey::new(key))
    }

    /// Seals the plaintext in `buffer`, which has room for the tag behind it.
    pub fn seal(&self, salt: [u8; 4], number: u64, aad: &[u8], buffer: &mut [u8]) {
        let nonce = Nonce::assume_unique_for_key(nonce(salt, number));
        let (plaintext, room) = buffer.split_at_mut(buffer.len() - TAG_BYTES);
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce, Aad::from(aad), plaintext);
        room.copy_from_slice(tag.expect("ring failed to seal").as_ref());
    }

    /// Opens ciphertext and tag that lie in `buffer` behind `size` bytes, to which the plaintext goes.
    pub fn open(&self, salt: [u8; 4], number: u64, aad: &[u8], buffer: &mut [u8], size: usize) {
        let nonce = Nonce::assume_unique_for_key(nonce(salt, number));
        let opened = self.0.open_within(nonce, Aad::from(aad), buffer, size..);
        assert_eq!(
            opened.map(|plaintext| plaintext.len()),
            Ok(size),
            "ring failed to open"
        );
    }
}
