//! A key: expanded once into secret memory, used by shared reference, wiped when it drops.
//!
//! UNSAFETY: the schedule lies in raw secret memory that the key owns until it drops; only the functions of
//! the kernel that expanded it may use it.
#![expect(
    unsafe_code,
    reason = "key schedules in secret memory; guest memory by raw pointer"
)]

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use subtle::ConstantTimeEq;

use super::engine::{Direction, Piece, Run};
use super::kernel::{Functions, GROUP_BYTES, Kernel};
use super::self_test;
use super::types::{BufferError, DataUnit, KEY_BYTES, KeyError};
use crate::secret::{SecretArena, Slot};

/// An expanded AES-256-XTS key in secret memory; wiped when it drops.
pub struct XtsKey {
    kernel: Kernel,
    functions: &'static Functions,
    /// Has the schedule; wiped and freed when it drops.
    slot: Slot,
}

impl std::fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XtsKey")
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}

impl XtsKey {
    /// Expands `key` (data key, then tweak key) into a slot of the arena, for the fastest kernel
    /// that this CPU can run. The caller wipes its copy.
    ///
    /// # Errors
    /// [`KeyError::EqualHalves`] (compared in constant time), [`KeyError::ArenaFull`], and
    /// [`KeyError::SelfTest`] where the kernel has failed its self-test.
    pub fn new(arena: &Arc<SecretArena>, key: &[u8; KEY_BYTES]) -> Result<Self, KeyError> {
        Self::with_kernel(arena, key, Kernel::chosen())
    }

    /// As [`XtsKey::new`], for a kernel of the caller's choice.
    ///
    /// # Errors
    /// As [`XtsKey::new`], and [`KeyError::NoSuchKernel`] if this CPU can't run it.
    pub fn with_kernel(
        arena: &Arc<SecretArena>,
        key: &[u8; KEY_BYTES],
        kernel: Kernel,
    ) -> Result<Self, KeyError> {
        let functions = kernel.functions().ok_or(KeyError::NoSuchKernel(kernel))?;
        self_test::tested(kernel, functions)?;
        let (data, tweak) = key.split_at(KEY_BYTES / 2);
        if data.ct_eq(tweak).into() {
            return Err(KeyError::EqualHalves);
        }
        let slot = arena.take()?;
        // SAFETY: the slot is ours, zeroed, of SLOT_BYTES, aligned to 64 bytes.
        unsafe { (functions.expand)(key, slot.pointer().as_ptr()) };
        Ok(Self {
            kernel,
            functions,
            slot,
        })
    }

    /// The kernel that it uses.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Whether another key is the same one: whether both do the same to two data units that no volume has. Two keys
    /// that differ do so with a probability of 2^-256.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let (one, two) = (self.fingerprint(), other.fingerprint());
        one.ct_eq(&two).into()
    }

    /// What two units full of zeroes become. It depends on both halves of the key.
    fn fingerprint(&self) -> [u8; 2 * GROUP_BYTES] {
        let mut bytes = [0; 2 * GROUP_BYTES];
        let piece: [Piece; 1] = [(NonNull::from(&mut bytes).cast(), bytes.len())];
        let run = self.run(DataUnit::B512, TEST_UNIT, Direction::Encrypt);
        // SAFETY: one buffer of two units as source and destination.
        unsafe { run.between(2, piece.into_iter(), piece.into_iter()) };
        bytes
    }

    /// Encrypts whole data units; `first_unit` is the number of the first.
    ///
    /// # Errors
    /// [`BufferError`] with nothing written.
    pub fn encrypt(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), BufferError> {
        unit.check(src.len(), dst.len())?;
        // SAFETY: two slices of the same length; a shared and a mutable one never overlap.
        unsafe { self.encrypt_raw(unit, first_unit, src.as_ptr(), dst.as_mut_ptr(), src.len()) }
    }

    /// Decrypts whole data units; `first_unit` is the number of the first.
    ///
    /// # Errors
    /// [`BufferError`] with nothing written.
    pub fn decrypt(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), BufferError> {
        unit.check(src.len(), dst.len())?;
        // SAFETY: two slices of the same length; a shared and a mutable one never overlap.
        unsafe { self.decrypt_raw(unit, first_unit, src.as_ptr(), dst.as_mut_ptr(), src.len()) }
    }

    /// As [`XtsKey::encrypt`], between raw addresses of `len` bytes each, of any alignment.
    ///
    /// # Errors
    /// [`BufferError`] if `len` is not a multiple of the data unit; nothing was written.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for `len` bytes through the call. They are the same
    /// address or don't overlap. Others (a guest) may change the bytes meanwhile: what was read
    /// first is encrypted. No Rust reference to either range is in use.
    pub unsafe fn encrypt_raw(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), BufferError> {
        // SAFETY: passed on to the caller.
        unsafe { self.raw(unit, first_unit, src, dst, len, Direction::Encrypt) }
    }

    /// As [`XtsKey::decrypt`], between raw addresses of `len` bytes each, of any alignment.
    ///
    /// # Errors
    /// [`BufferError`] if `len` is not a multiple of the data unit; nothing was written.
    ///
    /// # Safety
    /// As [`XtsKey::encrypt_raw`].
    pub unsafe fn decrypt_raw(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), BufferError> {
        // SAFETY: passed on to the caller.
        unsafe { self.raw(unit, first_unit, src, dst, len, Direction::Decrypt) }
    }

    /// # Safety
    /// As [`XtsKey::encrypt_raw`].
    unsafe fn raw(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
        direction: Direction,
    ) -> Result<(), BufferError> {
        unit.check(len, len)?;
        let (Some(src), Some(dst)) = (NonNull::new(src.cast_mut()), NonNull::new(dst)) else {
            return unit.check(0, len);
        };
        let units = unit.units_in(len);
        let run = self.run(unit, u128::from(first_unit), direction);
        let (source, destination) = ([(src, len)], [(dst, len)]);
        // SAFETY: passed on to the caller.
        unsafe { run.between(units, source.into_iter(), destination.into_iter()) };
        Ok(())
    }

    pub(super) fn run(&self, unit: DataUnit, first: u128, direction: Direction) -> Run<'_> {
        Run {
            functions: self.functions,
            schedule: self.slot.pointer().as_ptr(),
            unit,
            first,
            direction,
            key: PhantomData,
        }
    }
}

/// A number that no data unit of a volume has: theirs are below 2^64.
const TEST_UNIT: u128 = u128::MAX - 0xa5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::SLOT_BYTES;

    #[test]
    fn the_schedule_is_wiped_on_drop() {
        for kernel in Kernel::available() {
            let arena = SecretArena::new(1).expect("arena");
            let key: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
            let key = XtsKey::with_kernel(&arena, &key, kernel).expect("key");
            let slot = key.slot.pointer();
            // SAFETY: the slot's bytes are mapped while the arena lives; nobody writes them now.
            let taken = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_BYTES) }.to_vec();
            assert!(taken.iter().any(|&b| b != 0), "{kernel}");
            drop(key);
            // SAFETY: as above.
            let after = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_BYTES) };
            assert!(after.iter().all(|&b| b == 0), "{kernel}");
        }
    }
}
