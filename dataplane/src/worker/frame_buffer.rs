//! Buffers for whole frames, in memory of a port's own: what an interface of the host's gives or gets, the header in
//! front. They are mapped when the port is made and touched when they are used, from the front: one that has only had
//! short frames takes one page.
//!
//! UNSAFETY: a buffer is a raw range of the mapping. Each range is one buffer's only, which is not cloned, holds the
//! mapping alive and moves to whoever uses its bytes; the mapping is filled with zeroes by the kernel.
#![expect(unsafe_code, reason = "an mmap cut into raw buffers")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::rc::Rc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::net::frame::MOST_FRAME_BYTES;
use crate::net::header::MOST_BYTES as HEADER_BYTES;

/// Bytes of a buffer: of the longest frame with its header, in whole pages.
pub const FRAME_BUFFER_BYTES: usize = (HEADER_BYTES + MOST_FRAME_BYTES).next_multiple_of(4096);

#[derive(Debug)]
struct Map {
    base: NonNull<u8>,
    bytes: NonZeroUsize,
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no buffer is left that could use it (each holds the Rc).
        let result = unsafe { munmap(self.base.cast(), self.bytes.get()) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}

/// A buffer, owned.
#[derive(Debug)]
pub struct FrameBuffer {
    at: NonNull<u8>,
    _map: Rc<Map>,
}

impl FrameBuffer {
    /// `count` buffers.
    ///
    /// # Errors
    /// What `mmap` fails with.
    pub fn several(count: u16) -> io::Result<Vec<Self>> {
        let count = usize::from(count);
        let bytes = NonZeroUsize::new(count * FRAME_BUFFER_BYTES)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: fresh anonymous memory at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, bytes, protection, flags) }?.cast::<u8>();
        let map = Rc::new(Map { base, bytes });
        let buffer = |number: usize| Self {
            // SAFETY: the mapping has `count` times as many bytes.
            at: unsafe { base.add(number * FRAME_BUFFER_BYTES) },
            _map: Rc::clone(&map),
        };
        Ok((0..count).map(buffer).collect())
    }

    /// Where it begins, for the kernel.
    #[must_use]
    #[inline]
    pub fn at(&self) -> NonNull<u8> {
        self.at
    }

    /// Its bytes.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: that many initialised bytes, which are this buffer's alone while it is held.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), FRAME_BUFFER_BYTES) }
    }

    /// Its bytes.
    #[must_use]
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), FRAME_BUFFER_BYTES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_and_outlive_each_other() {
        let mut buffers = FrameBuffer::several(3).expect("mapped");
        for (number, buffer) in (1..).zip(&mut buffers) {
            assert_eq!(buffer.bytes(), [0; FRAME_BUFFER_BYTES]);
            buffer.bytes_mut().fill(number);
        }
        let last = buffers.pop().expect("three");
        let first = buffers.swap_remove(0);
        drop(buffers);
        assert_eq!(first.bytes(), [1; FRAME_BUFFER_BYTES]);
        assert_eq!(last.bytes(), [3; FRAME_BUFFER_BYTES]);
        assert!(FrameBuffer::several(0).is_err());
    }
}
