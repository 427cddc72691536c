//! The kernel that is AWS-LC: its AEAD context lies in our secret memory, one call a packet.
//!
//! UNSAFETY: every function takes a slot that [`expand`] filled (or is about to fill), and hands
//! AWS-LC the ranges of packets, which are valid for their lengths. AWS-LC may read its input more
//! than once, so it is never given memory that others may change.
#![expect(unsafe_code, reason = "AWS-LC is a C library")]

use std::ptr::{self, NonNull};

use aws_lc_sys::{
    EVP_AEAD_CTX, EVP_AEAD_CTX_init, EVP_AEAD_CTX_open_gather, EVP_AEAD_CTX_seal_scatter,
    EVP_aead_aes_256_gcm,
};
use bulkhead_crypto::raw;
use bulkhead_crypto::secret::SLOT_BYTES;

use crate::kernel::{Functions, nonce};
use crate::key::KEY_BYTES;
use crate::packet::{Job, OpenPacket, Ranges, SealPacket, TAG_BYTES};

const _: () = assert!(size_of::<EVP_AEAD_CTX>() <= SLOT_BYTES && align_of::<EVP_AEAD_CTX>() <= 64);

/// How deep AWS-LC's frames go: those of its AEAD with a copy of the hash key's table, and of
/// its assembly.
const STACK_BYTES: usize = 4096;

/// See [`Functions`].
pub(crate) static FUNCTIONS: Functions = Functions { expand, seal, open };

/// Expands `key` into the slot; whether AWS-LC did.
///
/// The context holds round keys and the hash key's table and points nowhere but to code, so that
/// wiping the slot is all that its end needs.
///
/// # Safety
/// The slot is the caller's alone.
unsafe fn expand(slot: NonNull<u8>, key: &[u8; KEY_BYTES]) -> bool {
    // SAFETY: the slot is large and aligned enough (asserted above); the key has its length.
    let expanded = unsafe {
        EVP_AEAD_CTX_init(
            slot.cast().as_ptr(),
            EVP_aead_aes_256_gcm(),
            key.as_ptr(),
            key.len(),
            TAG_BYTES,
            ptr::null_mut(),
        ) == 1
    };
    raw::wipe_left::<STACK_BYTES>();
    expanded
}

/// Seals packets that have their numbers; whether all were.
///
/// # Safety
/// `slot` was filled by [`expand`].
unsafe fn seal(slot: NonNull<u8>, salt: [u8; 4], packets: &mut [SealPacket<'_>]) -> bool {
    let all = packets.iter().all(|packet| {
        // SAFETY: passed on.
        unsafe { seal_one(slot.cast().as_ptr(), salt, packet.ranges()) }
    });
    raw::wipe_left::<STACK_BYTES>();
    all
}

/// # Safety
/// `context` was made by [`expand`].
unsafe fn seal_one(context: *const EVP_AEAD_CTX, salt: [u8; 4], packet: &Ranges) -> bool {
    let nonce = nonce(salt, packet.sequence);
    let mut tag_bytes = 0;
    // SAFETY: the ranges of a packet are valid for their lengths, and the output has TAG_BYTES
    // more; what others may change is copied to the output first, and sealed there.
    unsafe {
        let mut source = packet.source;
        if packet.shared {
            raw::copy(source, packet.output, packet.bytes);
            source = packet.output;
        }
        EVP_AEAD_CTX_seal_scatter(
            context,
            packet.output,
            packet.output.add(packet.bytes),
            &raw mut tag_bytes,
            TAG_BYTES,
            nonce.as_ptr(),
            nonce.len(),
            source,
            packet.bytes,
            ptr::null(),
            0,
            packet.associated,
            packet.associated_bytes,
        ) == 1
            && tag_bytes == TAG_BYTES
    }
}

/// Opens packets; each says how it went. AWS-LC compares tags in constant time.
///
/// # Safety
/// `slot` was filled by [`expand`].
unsafe fn open(slot: NonNull<u8>, salt: [u8; 4], packets: &mut [OpenPacket<'_>]) {
    for packet in packets.iter_mut().filter(|packet| packet.is_unopened()) {
        // SAFETY: passed on.
        if unsafe { open_one(slot.cast().as_ptr(), salt, packet.ranges()) } {
            packet.opened();
        } else {
            packet.refuse();
        }
    }
    raw::wipe_left::<STACK_BYTES>();
}

/// # Safety
/// `context` was made by [`expand`].
unsafe fn open_one(context: *const EVP_AEAD_CTX, salt: [u8; 4], packet: &Ranges) -> bool {
    let nonce = nonce(salt, packet.sequence);
    // SAFETY: the ranges of a packet are valid for their lengths, and the source has TAG_BYTES
    // more; with source and output the same, AWS-LC works in place.
    unsafe {
        EVP_AEAD_CTX_open_gather(
            context,
            packet.output,
            nonce.as_ptr(),
            nonce.len(),
            packet.source,
            packet.bytes,
            packet.source.add(packet.bytes),
            TAG_BYTES,
            packet.associated,
            packet.associated_bytes,
        ) == 1
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use bulkhead_crypto::SecretArena;

    use super::*;
    use crate::kernel::residue;

    /// Why registers and stack are wiped, and that the look at it sees what is there.
    #[test]
    fn aws_lc_leaves_the_hash_key_behind() {
        let arena = SecretArena::new(1).expect("arena");
        let slot = arena.take().expect("slot");
        let mut buffer = vec![0; 100];
        let mut packet = SealPacket::in_place(&[], &mut buffer).expect("packet");
        packet.number(1);
        let mut left = residue::room();
        // SAFETY: the slot is ours and zeroed; then it is filled.
        unsafe {
            assert!(expand(slot.pointer(), &[3; KEY_BYTES]));
            assert!(seal_one(
                slot.pointer().cast().as_ptr(),
                [0; 4],
                packet.ranges()
            ));
        }
        residue::left(&mut left);
        assert!(residue::holds(&left, slot.pointer(), &[]));
        raw::wipe_left::<STACK_BYTES>();
        residue::left(&mut left);
        assert!(!residue::holds(&left, slot.pointer(), &[]));
    }
}
