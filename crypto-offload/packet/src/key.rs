//! A key, expanded once into a slot of secret memory, and the kernel that works with it.
//!
//! UNSAFETY: a schedule is a raw slot. It is written by [`PacketKey::with_kernel`] before anything
//! reads it, in the kernel's own layout, and only that kernel is given it.
#![expect(unsafe_code, reason = "key schedules in secret memory")]

use std::sync::Arc;

use bulkhead_crypto::SecretArena;
use bulkhead_crypto::secret::{ArenaFull, Slot};

use crate::library;
use crate::packet::{OpenPacket, SealPacket};

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
}

/// What does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// AWS-LC, one packet after the other; everywhere.
    Library,
}

impl Kernel {
    /// Those that this CPU can run, the fastest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        vec![Self::Library]
    }

    /// The one that [`PacketKey::new`] takes.
    #[must_use]
    pub fn chosen() -> Self {
        Self::Library
    }
}

/// An expanded AES-256-GCM key in secret memory; wiped when it drops. It goes into one
/// [`Sealer`](crate::Sealer) or one [`Opener`](crate::Opener) and can't be had back or copied.
pub struct PacketKey {
    kernel: Kernel,
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

    /// As [`PacketKey::new`], with a kernel of the caller's choice, which must be one of
    /// [`Kernel::available`].
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn with_kernel(
        arena: &Arc<SecretArena>,
        key: &[u8; KEY_BYTES],
        kernel: Kernel,
    ) -> Result<Self, KeyError> {
        let slot = arena.take()?;
        let expanded = match kernel {
            // SAFETY: the slot is ours and zeroed.
            Kernel::Library => unsafe { library::expand(slot.pointer(), key) },
        };
        scrub_stack();
        if !expanded {
            return Err(KeyError::Library);
        }
        Ok(Self { kernel, slot })
    }

    /// The kernel it was expanded for.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Seals numbered packets; whether all were.
    pub(crate) fn seal(&self, salt: [u8; 4], packets: &mut [SealPacket<'_>]) -> bool {
        let sealed = match self.kernel {
            // SAFETY: the slot was expanded for this kernel.
            Kernel::Library => unsafe { library::seal(self.slot.pointer(), salt, packets) },
        };
        scrub_stack();
        sealed
    }

    /// Opens packets; each says how it went.
    pub(crate) fn open(&self, salt: [u8; 4], packets: &mut [OpenPacket<'_>]) {
        match self.kernel {
            // SAFETY: the slot was expanded for this kernel.
            Kernel::Library => unsafe { library::open(self.slot.pointer(), salt, packets) },
        }
        scrub_stack();
    }
}

/// Overwrites the part of the stack that a kernel used: round keys and powers of the hash key are
/// spilled there. As deep as AWS-LC's frames go for a packet.
#[inline(never)]
fn scrub_stack() {
    // As somebody might look at the zeroes, they must be there.
    std::hint::black_box(&mut [0u8; 4096]);
}

/// The nonce of a packet: the tunnel's salt, then its number.
pub(crate) fn nonce(salt: [u8; 4], sequence: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&salt);
    nonce[4..].copy_from_slice(&sequence.to_be_bytes());
    nonce
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
}
