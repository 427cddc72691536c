//! The arena: one secret mapping per process, cut into slots of equal size, one per key schedule.
//! One mapping, because each takes one of the kernel's limited number and its own locked pages.
//!
//! UNSAFETY: a slot is a raw pointer into the mapping. The free list must give each slot to one
//! owner at a time, the mapping must outlive every slot (each holds the arena), and nothing may
//! take a slice over the mapping while slots are out.
#![expect(unsafe_code, reason = "slots are raw memory inside one mapping")]

use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use zeroize::Zeroize;

use super::SecretMemory;

/// Size of a slot in bytes; it starts at a multiple of 64.
pub const SLOT_BYTES: usize = 2048;

/// Every slot of the arena is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all {slots} places for keys in secret memory are taken: detach a volume first")]
pub struct ArenaFull {
    /// How many there are.
    pub slots: usize,
}

/// Secret memory for a fixed number of key schedules.
#[derive(Debug)]
pub struct SecretArena {
    memory: SecretMemory,
    slots: usize,
    free: Mutex<Vec<usize>>,
}

impl SecretArena {
    /// An arena with room for `slots` keys, [`SLOT_BYTES`] each, which count against
    /// `RLIMIT_MEMLOCK`. Made before the process locks itself in.
    ///
    /// # Errors
    /// As [`SecretMemory::new`].
    pub fn new(slots: usize) -> io::Result<Arc<Self>> {
        let length = slots
            .checked_mul(SLOT_BYTES)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let memory = SecretMemory::new(length)?;
        Ok(Arc::new(Self {
            memory,
            slots,
            free: Mutex::new((0..slots).rev().collect()),
        }))
    }

    /// How many keys fit in all.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// How many more keys fit now.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.free_list().len()
    }

    /// A zeroed slot, wiped and returned when it drops.
    ///
    /// # Errors
    /// [`ArenaFull`] when all are taken.
    pub fn take(self: &Arc<Self>) -> Result<Slot, ArenaFull> {
        let index = self
            .free_list()
            .pop()
            .ok_or(ArenaFull { slots: self.slots })?;
        Ok(Slot {
            arena: Arc::clone(self),
            index,
        })
    }

    fn free_list(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        // The list is whole between any two of its operations, whoever panicked.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One slot, owned: room for one key schedule.
pub struct Slot {
    arena: Arc<SecretArena>,
    index: usize,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Slot(..)")
    }
}

impl Slot {
    /// First byte of the slot's [`SLOT_BYTES`], which nobody else reads or writes while the slot
    /// lives.
    #[must_use]
    pub fn pointer(&self) -> NonNull<u8> {
        // SAFETY: index is below `slots`, so that the slot lies inside the mapping.
        unsafe { self.arena.memory.base().add(self.index * SLOT_BYTES) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: the slot is ours until it is back on the list, and its owner is done with it.
        unsafe { std::slice::from_raw_parts_mut(self.pointer().as_ptr(), SLOT_BYTES) }.zeroize();
        self.arena.free_list().push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart_wiped_and_reused() {
        let arena = SecretArena::new(3).expect("arena");
        let taken: Vec<_> = (0..3).map(|_| arena.take().expect("slot")).collect();
        assert!(matches!(arena.take(), Err(ArenaFull { slots: 3 })));
        for (i, slot) in taken.iter().enumerate() {
            assert_eq!(slot.pointer().addr().get() % 64, 0);
            let value = u8::try_from(i).expect("small") + 1;
            // SAFETY: the slot is ours and has SLOT_BYTES.
            unsafe { slot.pointer().write_bytes(value, SLOT_BYTES) };
        }
        for (i, slot) in taken.iter().enumerate() {
            // SAFETY: written above; nobody changes it now.
            let bytes = unsafe { std::slice::from_raw_parts(slot.pointer().as_ptr(), SLOT_BYTES) };
            assert!(bytes.iter().all(|&b| usize::from(b) == i + 1));
        }
        drop(taken);
        assert_eq!(arena.free_slots(), 3);
        assert!(arena.memory.as_bytes().iter().all(|&b| b == 0));
        assert!(arena.take().is_ok());
    }
}
