//! Fields of an in-flight region.
//!
//! A field is written by one instruction: whoever finds the region finds the old value or the new one.
//!
//! UNSAFETY: the region is foreign memory; fields are written and read at offsets that the area checks,
//! by volatile accesses. A region begins at a multiple of 8 bytes, and every field at one of its own size.
#![expect(unsafe_code, reason = "accesses to shared memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ptr::NonNull;
use std::sync::atomic::{Ordering, compiler_fence};

use super::QueueRegion;
use crate::virtqueue::dying;

impl QueueRegion {
    /// Where a field lies.
    #[inline]
    fn field<T>(&self, at: u64) -> Option<NonNull<T>> {
        let field = self.area.at(self.offset + at, size_of::<T>() as u64)?;
        let field = field.cast::<T>();
        debug_assert!(field.is_aligned(), "offset {at} is not one of a field");
        Some(field)
    }

    /// Stores a field: what comes after it in the program comes after it in memory, for whoever finds the
    /// region when this process has died.
    #[inline]
    fn store<T>(&self, at: u64, value: T) {
        dying::step();
        let Some(to) = self.field::<T>(at) else {
            debug_assert!(false, "offset {at} is outside the region");
            return;
        };
        compiler_fence(Ordering::Release);
        // SAFETY: it lies inside the area, which the region keeps; region and offset are multiples of its size.
        unsafe { to.write_volatile(value) };
    }

    #[inline]
    pub(super) fn store_u8(&self, at: u64, value: u8) {
        self.store(at, value);
    }

    #[inline]
    pub(super) fn store_u16(&self, at: u64, value: u16) {
        self.store(at, value.to_le());
    }

    #[inline]
    pub(super) fn store_u32(&self, at: u64, value: u32) {
        self.store(at, value.to_le());
    }

    #[inline]
    pub(super) fn store_u64(&self, at: u64, value: u64) {
        self.store(at, value.to_le());
    }

    /// A field, read once: whatever the frontend has put there.
    fn load<T: Default>(&self, at: u64) -> T {
        let Some(from) = self.field::<T>(at) else {
            debug_assert!(false, "offset {at} is outside the region");
            return T::default();
        };
        // SAFETY: it lies inside the area, which the region keeps; region and offset are multiples of its size. Only
        // integers are read, of which any bytes are one.
        unsafe { from.read_volatile() }
    }

    pub(super) fn load_u8(&self, at: u64) -> u8 {
        self.load(at)
    }

    pub(super) fn load_u16(&self, at: u64) -> u16 {
        u16::from_le(self.load(at))
    }

    pub(super) fn load_u32(&self, at: u64) -> u32 {
        u32::from_le(self.load(at))
    }

    pub(super) fn load_u64(&self, at: u64) -> u64 {
        u64::from_le(self.load(at))
    }
}
