//! Fields of an in-flight region.
//!
//! UNSAFETY: the region is foreign memory; fields are written and read at offsets that the area checks,
//! by volatile accesses that need no alignment.
#![expect(unsafe_code, reason = "accesses to shared memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{Ordering, compiler_fence};

use super::QueueRegion;

impl QueueRegion {
    /// Stores bytes at an offset of the region: what comes after it in the program comes after it in
    /// memory, for whoever finds the region when this process has died.
    #[inline]
    pub(super) fn store<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        let Some(to) = self.area.at(self.offset + at, N as u64) else {
            debug_assert!(false, "offset {at} is outside the region");
            return;
        };
        compiler_fence(Ordering::Release);
        // SAFETY: N bytes from there on lie inside the area, which the region keeps; bytes need no alignment.
        unsafe { to.cast::<[u8; N]>().write_volatile(bytes) };
    }

    #[inline]
    pub(super) fn store_u8(&self, at: u64, value: u8) {
        self.store(at, [value]);
    }

    #[inline]
    pub(super) fn store_u16(&self, at: u64, value: u16) {
        self.store(at, value.to_le_bytes());
    }

    #[inline]
    pub(super) fn store_u64(&self, at: u64, value: u64) {
        self.store(at, value.to_le_bytes());
    }

    /// Bytes at an offset of the region, read once: whatever the frontend has put there.
    pub(super) fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        let Some(from) = self.area.at(self.offset + at, N as u64) else {
            debug_assert!(false, "offset {at} is outside the region");
            return [0; N];
        };
        // SAFETY: N bytes from there on lie inside the area, which the region keeps; any bytes are a value.
        unsafe { from.cast::<[u8; N]>().read_volatile() }
    }
}
