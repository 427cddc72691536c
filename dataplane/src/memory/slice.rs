//! A contiguous range of guest memory that was checked as a whole, on loan from whoever holds the memory.
//!
//! UNSAFETY: a slice is a raw range, made from a checked lookup alone. It borrows from the value that holds the lease on
//! the memory it lies in, and so ends before it. Its bytes are never referenced, only copied.
#![expect(unsafe_code, reason = "copying to and from guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::copy::{copy_any, copy_apart};
use super::{GuestBuffer, GuestMemory, will_read, will_write};

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// A contiguous range of guest memory. Its guest may change its bytes at any time.
#[derive(Debug, Clone, Copy)]
pub struct GuestSlice<'a> {
    host: NonNull<u8>,
    bytes: u32,
    of: PhantomData<&'a GuestMemory>,
}

impl<'a> GuestSlice<'a> {
    /// The `bytes` bytes that begin there.
    ///
    /// # Safety
    /// They come from a checked lookup, in memory that `_holder` holds.
    #[inline(always)]
    pub(crate) unsafe fn new<T>(_holder: &'a T, host: NonNull<u8>, bytes: u32) -> Self {
        Self {
            host,
            bytes,
            of: PhantomData,
        }
    }

    /// Its length in bytes.
    #[must_use]
    #[inline(always)]
    pub fn bytes(self) -> usize {
        self.bytes as usize
    }

    /// Where `bytes` bytes from offset `at` begin; none where it ends before.
    #[inline(always)]
    fn at(self, at: usize, bytes: usize) -> Option<NonNull<u8>> {
        let end = at.checked_add(bytes)?;
        // SAFETY: inside the range.
        (end <= self.bytes()).then(|| unsafe { self.host.add(at) })
    }

    /// What is left behind the first `at` bytes; none where it ends before.
    #[must_use]
    #[inline]
    pub fn behind(self, at: usize) -> Option<Self> {
        let host = self.at(at, 0)?;
        // `at` is at most the length, which is a u32.
        let bytes = self.bytes - u32::try_from(at).unwrap_or(self.bytes);
        Some(Self {
            host,
            bytes,
            of: PhantomData,
        })
    }

    /// The `bytes` bytes behind its first `at`; none where it ends before.
    #[must_use]
    #[inline]
    pub fn part(self, at: usize, bytes: usize) -> Option<Self> {
        let host = self.at(at, bytes)?;
        // At most its length, which is a u32.
        let bytes = u32::try_from(bytes).ok()?;
        Some(Self {
            host,
            bytes,
            of: PhantomData,
        })
    }

    /// Has the CPU fetch its first `most` bytes, which are going to be read.
    #[inline(always)]
    pub fn will_read(self, most: usize) {
        self.each_line(most, will_read);
    }

    /// Has the CPU fetch its first `most` bytes, which are going to be written.
    #[inline(always)]
    pub fn will_write(self, most: usize) {
        self.each_line(most, will_write);
    }

    /// As [`GuestSlice::will_write`], but for the first `front` bytes, which are there already most often
    /// ([`GuestSlice::put`]): a line that has none but such is only going to be read.
    #[inline(always)]
    pub fn will_put(self, front: usize, most: usize) {
        let Some(behind) = self.behind(front) else {
            return self.will_write(most);
        };
        let line = |at: NonNull<u8>| at.addr().get() / LINE_BYTES;
        if line(self.host) != line(behind.host) {
            will_read(self.host);
        }
        behind.will_write(most.saturating_sub(front));
    }

    #[inline(always)]
    fn each_line(self, most: usize, fetch: impl Fn(NonNull<u8>)) {
        let Some(last) = self.bytes().min(most).checked_sub(1) else {
            return;
        };
        // With the last byte comes its line, wherever the first one lies in its own.
        for at in (0..last).step_by(LINE_BYTES).chain([last]) {
            // SAFETY: below the range's length.
            fetch(unsafe { self.host.add(at) });
        }
    }

    /// Copies from offset `at` into `to`, for a copy that is looked at only when all of it is there: some bytes may be
    /// read twice. False, with nothing copied, where it is too short.
    #[must_use]
    #[inline(always)]
    pub fn copy_out(self, at: usize, to: &mut [u8]) -> bool {
        let Some(from) = self.at(at, to.len()) else {
            return false;
        };
        // SAFETY: the range has that many bytes; `to` is memory of ours.
        unsafe { copy_apart(from.as_ptr(), to.as_mut_ptr(), to.len()) };
        true
    }

    /// Copies `from` to offset `at`; false, with nothing copied, where it is too short.
    #[must_use]
    #[inline(always)]
    pub fn copy_in(self, at: usize, from: &[u8]) -> bool {
        let Some(to) = self.at(at, from.len()) else {
            return false;
        };
        // SAFETY: the range has that many bytes; `from` is memory of ours.
        unsafe { copy_apart(from.as_ptr(), to.as_ptr(), from.len()) };
        true
    }

    /// Copies `bytes` to offset `at`, unless they are there already: their line is then left to the other CPUs that have
    /// it, and none waits for it. False, with nothing copied, where it is too short.
    #[must_use]
    #[inline(always)]
    pub fn put<const N: usize>(self, at: usize, bytes: &[u8; N]) -> bool {
        let mut there = [0; N];
        self.copy_out(at, &mut there) && (there == *bytes || self.copy_in(at, bytes))
    }

    /// Copies all of `from`, which may be of other memory, of the same or overlap, to offset `at`. A few bytes may be read
    /// twice, where chunks of the copy meet: nothing is decided by what is copied so. False, with nothing copied, where it is too short.
    #[must_use]
    #[inline]
    pub fn copy_from(self, at: usize, from: GuestSlice<'_>) -> bool {
        let Some(to) = self.at(at, from.bytes()) else {
            return false;
        };
        // SAFETY: both ranges have that many bytes. They may overlap: one guest can give the same bytes for both.
        unsafe { copy_any(from.host.as_ptr(), to.as_ptr(), from.bytes()) };
        true
    }

    /// As [`GuestSlice::copy_from`], of `bytes` bytes from offset `from_at` of a buffer.
    #[must_use]
    #[inline]
    pub fn copy_from_buffer(
        self,
        at: usize,
        from: &GuestBuffer,
        from_at: u64,
        bytes: usize,
    ) -> bool {
        let (Some(mut to), Some(runs)) = (self.at(at, bytes), from.runs(from_at, bytes)) else {
            return false;
        };
        for (host, here) in runs {
            // SAFETY: together the runs have `bytes` bytes, as the place has; they may overlap.
            unsafe {
                copy_any(host.as_ptr(), to.as_ptr(), here);
                to = to.add(here);
            }
        }
        true
    }
}

impl GuestBuffer {
    /// As [`GuestBuffer::copy_from`], of all of a slice.
    #[must_use]
    #[inline]
    pub fn copy_from_slice(&self, at: u64, from: GuestSlice<'_>) -> bool {
        let mut next = from.host;
        self.each(at, from.bytes(), |to, here| {
            // SAFETY: together the ranges have as many bytes as the slice; they may overlap.
            unsafe {
                copy_any(next.as_ptr(), to.as_ptr(), here);
                next = next.add(here);
            }
        })
    }
}

impl GuestMemory {
    /// Marks the first `bytes` bytes of a slice of this memory, which were written, in its dirty log, where one is kept.
    #[inline]
    pub(crate) fn mark_slice(&self, written: GuestSlice<'_>, bytes: usize) {
        if self.log().is_enabled() {
            self.mark_host(written.host, bytes.min(written.bytes()) as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::{Lease, anonymous};

    const BYTES: u64 = 0x1000;

    fn held() -> Lease {
        let (memory, _) = anonymous(BYTES).expect("memory");
        Lease::new(Arc::new(memory))
    }

    fn slice(lease: &Lease, at: u64, bytes: u32) -> GuestSlice<'_> {
        let host = lease.span(at, u64::from(bytes)).expect("inside");
        // SAFETY: just looked up, in memory that the lease holds.
        unsafe { GuestSlice::new(lease, host, bytes) }
    }

    fn content(slice: GuestSlice<'_>) -> Vec<u8> {
        let mut bytes = vec![0; slice.bytes()];
        assert!(slice.copy_out(0, &mut bytes));
        bytes
    }

    fn count(bytes: u8) -> Vec<u8> {
        (1..=bytes).collect()
    }

    #[test]
    fn bytes_go_in_and_out_where_they_have_room() {
        let lease = held();
        let all = slice(&lease, 16, 8);
        assert!(all.copy_in(2, &[1, 2, 3]));
        assert_eq!(content(all), [0, 0, 1, 2, 3, 0, 0, 0]);
        assert!(!all.copy_in(6, &[9, 9, 9]) && !all.copy_in(usize::MAX, &[9]));
        assert!(!all.copy_out(8, &mut [0]) && all.copy_out(8, &mut []));
        assert_eq!(content(all), [0, 0, 1, 2, 3, 0, 0, 0]);
        let rest = all.behind(3).expect("inside");
        assert_eq!((rest.bytes(), content(rest)), (5, vec![2, 3, 0, 0, 0]));
        assert!(all.behind(8).is_some_and(|rest| rest.bytes() == 0));
        assert!(all.behind(9).is_none());
        let part = all.part(3, 2).expect("inside");
        assert_eq!((part.bytes(), content(part)), (2, vec![2, 3]));
        assert!(all.part(3, 6).is_none() && all.part(usize::MAX, 1).is_none());
        assert!(all.put(4, &[3, 0]) && all.put(5, &[4, 5]) && !all.put(7, &[1, 2]));
        assert_eq!(content(all), [0, 0, 1, 2, 3, 4, 5, 0]);
        all.will_read(100);
        all.will_put(4, 100);
        all.will_put(9, 100);
        all.will_write(0);
    }

    #[test]
    fn guest_memory_goes_to_guest_memory_also_where_it_overlaps() {
        let lease = held();
        let (from, to) = (slice(&lease, 0, 10), slice(&lease, 4, 12));
        assert!(from.copy_in(0, &count(10)));
        assert!(!to.copy_from(3, from), "one byte too short");
        assert!(to.copy_from(2, from));
        assert_eq!(content(slice(&lease, 6, 10)), count(10));
    }

    #[test]
    fn a_buffer_of_several_ranges_is_as_good_as_a_slice() {
        let lease = held();
        let mut buffer = GuestBuffer::default();
        buffer.reset(&lease);
        for (at, bytes) in [(0x100, 3), (0x200, 5), (0x300, 4)] {
            buffer.push(at, bytes).expect("inside");
        }
        let (from, back) = (slice(&lease, 0, 10), slice(&lease, 0x800, 12));
        assert!(from.copy_in(0, &count(10)));
        assert!(buffer.copy_from_slice(1, from));
        assert!(!buffer.copy_from_slice(3, from), "one byte too short");
        assert!(back.copy_from_buffer(2, &buffer, 1, 10));
        assert!(!back.copy_from_buffer(3, &buffer, 1, 10));
        assert!(!back.copy_from_buffer(0, &buffer, 3, 10));
        assert_eq!(content(back)[2..], count(10));
    }
}
