//! Walks a run of data units from source to destination segments, in batches whose bases are made together.
//!
//! Where a group of 32 cipher blocks lies in one piece on both sides, the kernel works on it there. One
//! that straddles segments goes through a group's room on the stack, which is wiped. So are the bases.
//!
//! UNSAFETY: segments are raw ranges: a cursor must never give out more of one than there is, and
//! source and destination advance by the same bytes, so that what may be in place stays in place.
#![expect(unsafe_code, reason = "raw ranges are cut into groups")]

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::kernel::{BASES_ROUNDED_TO, Base, Crypt, Functions, GROUP_BYTES};
use super::types::DataUnit;
use crate::raw;

/// Groups whose bases are made together: 32 KiB of data.
const BATCH_GROUPS: usize = 64;

const _: () = assert!(
    BATCH_GROUPS.is_multiple_of(BASES_ROUNDED_TO)
        && BATCH_GROUPS * GROUP_BYTES >= DataUnit::MAX_BYTES
);

/// Room for a batch's bases, and one more, which kernels read ahead. Aligned to what a kernel writes at once: a read
/// that follows a write across two cache lines waits until that has reached the cache, 20 ns of a call.
#[repr(align(64))]
#[expect(dead_code, reason = "its bytes are used by address")]
struct Bases([Base; BATCH_GROUPS + 1]);

/// A raw range of bytes.
pub(super) type Piece = (NonNull<u8>, usize);

/// Whether to encrypt or decrypt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Encrypt,
    Decrypt,
}

/// A run of data units: which, how, and under which key.
pub(super) struct Run<'k> {
    pub functions: &'static Functions,
    pub schedule: *const u8,
    pub unit: DataUnit,
    pub first: u128,
    pub direction: Direction,
    /// The schedule's owner is borrowed as long.
    pub key: std::marker::PhantomData<&'k ()>,
}

impl Run<'_> {
    /// Does `units` data units.
    ///
    /// # Safety
    /// The schedule is one of these functions. Both sides have as many bytes, readable and writable
    /// through the call; a byte of the source that is also one of the destination is the same one in both.
    pub unsafe fn between(
        &self,
        units: usize,
        source: impl Iterator<Item = Piece>,
        destination: impl Iterator<Item = Piece>,
    ) {
        let mut bases = MaybeUninit::<Bases>::uninit();
        let bases = bases.as_mut_ptr().cast::<Base>();
        let (mut source, mut destination) = (Cursor::new(source), Cursor::new(destination));
        let (mut first, mut left) = (self.first, units);
        while left > 0 {
            let units = batch(self.unit, first, left);
            let groups = units * self.unit.groups();
            // SAFETY: a batch's bases have room; the low half does not overflow in a batch. As many bytes are left
            // on both sides. Kernels wipe the bases that they use; the others are in the array.
            unsafe {
                let written = (self.functions.bases)(self.schedule, self.unit, first, units, bases);
                self.groups(bases, groups, &mut source, &mut destination);
                let unused = written.saturating_sub(groups);
                raw::wipe(bases.add(groups).cast(), unused * size_of::<Base>());
            }
            first = first.wrapping_add(units as u128);
            left -= units;
        }
    }

    /// # Safety
    /// As `between`, for as many groups; there are as many bases.
    unsafe fn groups(
        &self,
        bases: *mut Base,
        groups: usize,
        source: &mut Cursor<impl Iterator<Item = Piece>>,
        destination: &mut Cursor<impl Iterator<Item = Piece>>,
    ) {
        let crypt = match self.direction {
            Direction::Encrypt => self.functions.encrypt,
            Direction::Decrypt => self.functions.decrypt,
        };
        let mut done = 0;
        while done < groups {
            // SAFETY: below `groups`.
            let bases = unsafe { bases.add(done) };
            let whole = source.left().min(destination.left()) / GROUP_BYTES;
            if whole == 0 {
                // SAFETY: a group is left on both sides, and its base.
                unsafe { self.straddling(crypt, bases, source, destination) };
                done += 1;
                continue;
            }
            let here = whole.min(groups - done);
            let bytes = here * GROUP_BYTES;
            // SAFETY: both sides have as many bytes in one piece.
            unsafe {
                let (src, dst) = (source.take(bytes), destination.take(bytes));
                crypt(self.schedule, bases, here, src.as_ptr(), dst.as_ptr());
            }
            done += here;
        }
    }

    /// One group that does not lie in one piece.
    ///
    /// # Safety
    /// As `between`, for one group.
    #[cold]
    #[inline(never)]
    unsafe fn straddling(
        &self,
        crypt: Crypt,
        base: *mut Base,
        source: &mut Cursor<impl Iterator<Item = Piece>>,
        destination: &mut Cursor<impl Iterator<Item = Piece>>,
    ) {
        let mut room = [0u8; GROUP_BYTES];
        let at = room.as_mut_ptr();
        // SAFETY: the pieces sum to a group, the room's size; what is read is all read before anything
        // is written.
        unsafe {
            source.each(|done, from, bytes| raw::copy(from.as_ptr(), at.add(done), bytes));
            crypt(self.schedule, base, 1, at, at);
            destination.each(|done, to, bytes| raw::copy(at.add(done), to.as_ptr(), bytes));
        }
        // SAFETY: the room is ours.
        unsafe { raw::wipe(at, GROUP_BYTES) };
    }
}

/// Units of the next batch: as many as there is room for, and none after the low half of the
/// number has overflowed.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the low half is what counts"
)]
fn batch(unit: DataUnit, first: u128, left: usize) -> usize {
    let room = unit.units_in(BATCH_GROUPS * GROUP_BYTES);
    // One less than there are, which doesn't overflow itself.
    let after_first = usize::try_from(u64::MAX - first as u64).unwrap_or(usize::MAX);
    left.min(room).min(after_first.saturating_add(1))
}

/// Where a walk over segments stands.
struct Cursor<I> {
    rest: I,
    at: NonNull<u8>,
    left: usize,
}

impl<I: Iterator<Item = Piece>> Cursor<I> {
    fn new(rest: I) -> Self {
        Self {
            rest,
            at: NonNull::dangling(),
            left: 0,
        }
    }

    /// Bytes in one piece from here on; none only at the end.
    fn left(&mut self) -> usize {
        while self.left == 0 {
            match self.rest.next() {
                Some((at, left)) => (self.at, self.left) = (at, left),
                None => break,
            }
        }
        self.left
    }

    /// # Safety
    /// At most `left` bytes.
    unsafe fn take(&mut self, bytes: usize) -> NonNull<u8> {
        let at = self.at;
        // SAFETY: at most to the end of the segment.
        self.at = unsafe { at.add(bytes) };
        self.left -= bytes;
        at
    }

    /// Calls `f` with the pieces of the next group, and how many bytes of it went before.
    ///
    /// # Safety
    /// `f` may use the pieces; there are as many bytes.
    unsafe fn each(&mut self, mut f: impl FnMut(usize, NonNull<u8>, usize)) {
        let mut done = 0;
        while done < GROUP_BYTES {
            let here = self.left().min(GROUP_BYTES - done);
            if here == 0 {
                debug_assert!(false, "segments end before the last data unit");
                return;
            }
            // SAFETY: at most what is left.
            f(done, unsafe { self.take(here) }, here);
            done += here;
        }
    }
}
