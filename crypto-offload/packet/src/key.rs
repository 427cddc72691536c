//! A key, expanded once into a slot of secret memory, and the kernel that works with it.
//!
//! UNSAFETY: a schedule is a raw slot. It is written by [`PacketKey::with_kernel`] before anything
//! reads it, in the kernel's own layout, and only that kernel is given it.
#![expect(unsafe_code, reason = "key schedules in secret memory")]

use std::sync::Arc;

use bulkhead_crypto::SecretArena;
use bulkhead_crypto::secret::{ArenaFull, Slot};

use crate::kernel::{Functions, Kernel};
use crate::packet::{OpenPacket, SealPacket};
use crate::self_test::{SelfTestError, tested};

/// Length of a key in bytes.
pub const KEY_BYTES: usize = 32;

/// Why a key can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No room in secret memory.
    #[error(transparent)]
    ArenaFull(#[from] ArenaFull),
    /// AWS-LC took no AES-256-GCM key.
    #[error("AWS-LC refuses to expand an AES-256-GCM key: its build is not for this machine")]
    Library,
    /// The kernel does not do what it should.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// The CPU lacks what the kernel needs.
    #[error("this CPU can't run the packet cipher's kernel {kernel}")]
    Unavailable {
        /// What was asked for.
        kernel: Kernel,
    },
}

/// An expanded AES-256-GCM key in secret memory; wiped when it drops. It goes into one
/// [`Sealer`](crate::Sealer) or one [`Opener`](crate::Opener) and can't be had back or copied.
pub struct PacketKey {
    kernel: Kernel,
    functions: &'static Functions,
    /// Wiped and freed when it drops.
    slot: Slot,
}

impl std::fmt::Debug for PacketKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PacketKey")
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}

impl PacketKey {
    /// Expands `key` into a slot of the arena. The caller wipes its copy.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new(arena: &Arc<SecretArena>, key: &[u8; KEY_BYTES]) -> Result<Self, KeyError> {
        Self::with_kernel(arena, key, Kernel::chosen())
    }

    /// As [`PacketKey::new`], with a kernel of the caller's choice.
    ///
    /// # Errors
    /// [`KeyError`]; `Unavailable` for a kernel that is not one of [`Kernel::available`].
    pub fn with_kernel(
        arena: &Arc<SecretArena>,
        key: &[u8; KEY_BYTES],
        kernel: Kernel,
    ) -> Result<Self, KeyError> {
        let functions = kernel.functions().ok_or(KeyError::Unavailable { kernel })?;
        tested(kernel, functions)?;
        let slot = arena.take()?;
        // SAFETY: the slot is ours and zeroed.
        if !unsafe { (functions.expand)(slot.pointer(), key) } {
            return Err(KeyError::Library);
        }
        Ok(Self {
            kernel,
            functions,
            slot,
        })
    }

    /// The kernel it was expanded for.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Seals numbered packets; whether all were.
    pub(crate) fn seal(&self, salt: [u8; 4], packets: &mut [SealPacket<'_>]) -> bool {
        // SAFETY: the slot was filled by the same kernel's `expand`.
        unsafe { (self.functions.seal)(self.slot.pointer(), salt, packets) }
    }

    /// Opens packets; each says how it went.
    pub(crate) fn open(&self, salt: [u8; 4], packets: &mut [OpenPacket<'_>]) {
        // SAFETY: the slot was filled by the same kernel's `expand`.
        unsafe { (self.functions.open)(self.slot.pointer(), salt, packets) }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_crypto::secret::SLOT_BYTES;

    use super::*;

    #[test]
    fn the_schedule_is_wiped_on_drop() {
        for kernel in Kernel::available() {
            let arena = SecretArena::new(1).expect("arena");
            let key = std::array::from_fn(|i| u8::try_from(i).expect("small") + 1);
            let key = PacketKey::with_kernel(&arena, &key, kernel).expect("key");
            let slot = key.slot.pointer();
            // SAFETY: the slot's bytes are mapped while the arena lives; nobody writes them now.
            let taken = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_BYTES) }.to_vec();
            assert!(
                taken.windows(32).any(|w| w.iter().copied().eq(1..33)),
                "the first round keys of {kernel:?} are not in secret memory"
            );
            drop(key);
            // SAFETY: as above.
            let after = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_BYTES) };
            assert!(after.iter().all(|&b| b == 0));
        }
    }

    /// Packets without data: their tags are what masks tags, which nobody else may know.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn nothing_secret_is_left_behind() {
        use crate::kernel::residue;

        for kernel in Kernel::available() {
            let arena = SecretArena::new(1).expect("arena");
            let key = PacketKey::with_kernel(&arena, b"not to be seen on any stack ever", kernel);
            let key = key.expect("key");
            let mut left = residue::room();
            residue::left(&mut left);
            assert!(
                !residue::holds(&left, key.slot.pointer(), &[]),
                "{kernel}: expansion"
            );
            let mut tags = vec![[0; 16]; 20];
            let mut batch: Vec<_> = tags
                .iter_mut()
                .map(|tag| SealPacket::in_place(&[], tag).expect("packet"))
                .collect();
            for (packet, number) in batch.iter_mut().zip(1..) {
                packet.number(number);
            }
            assert!(key.seal([1; 4], &mut batch));
            residue::left(&mut left);
            drop(batch);
            assert!(
                !residue::holds(&left, key.slot.pointer(), &tags),
                "{kernel}: sealing"
            );
            let mut sealed = tags.clone();
            let mut batch: Vec<_> = (1..)
                .zip(&mut sealed)
                .map(|(number, tag)| OpenPacket::in_place(number, &[], tag).expect("packet"))
                .collect();
            key.open([1; 4], &mut batch);
            residue::left(&mut left);
            assert!(batch.iter_mut().all(|packet| packet.plaintext().is_ok()));
            assert!(
                !residue::holds(&left, key.slot.pointer(), &tags),
                "{kernel}: opening"
            );
        }
    }
}
