//! Copies to, from and among guests' memory.
//!
//! C libraries copy a few kilobytes and more with `rep movsb` where a CPU says that this is fast. On some (AMD's from Zen 3
//! on) it is a tenth as fast as a loop if the destination lies a few bytes behind the source in its page: as a frame does
//! in a receive buffer, behind the header that it had in front of it where it came from, too. A loop of ordinary moves is
//! as fast as the memory everywhere.
//!
//! UNSAFETY: chunks lie within the bytes that are copied; callers answer for these.
#![expect(unsafe_code, reason = "copying by address")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ptr::{copy, copy_nonoverlapping};

/// Bytes that are moved at once.
const CHUNK: usize = 16;
/// Chunks of a step of a long copy.
const STEP: usize = 4 * CHUNK;
/// Of more bytes than these a call costs little beside the copy.
const MOST_SHORT: usize = 256;
/// From so many bytes on it matters how a library copies.
const LEAST_LONG: usize = 2048;

/// Copies `bytes` bytes. A few go in chunks, of which the last may overlap the one before it: what is read there is
/// read twice, and what is written is written twice.
///
/// # Safety
/// There are as many bytes at both places, and they do not overlap.
#[inline(always)]
pub(super) unsafe fn copy_apart(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: each chunk lies within the bytes; the caller answers for the rest.
    unsafe {
        if !(CHUNK..=MOST_SHORT).contains(&bytes) {
            return copy_long(from, to, bytes);
        }
        let last = bytes - CHUNK;
        let mut at = 0;
        while at < last {
            copy_nonoverlapping(from.add(at), to.add(at), CHUNK);
            at += CHUNK;
        }
        copy_nonoverlapping(from.add(last), to.add(last), CHUNK);
    }
}

/// Copies `bytes` bytes, which may overlap.
///
/// # Safety
/// There are as many bytes at both places.
#[inline]
pub(super) unsafe fn copy_any(from: *const u8, to: *mut u8, bytes: usize) {
    // Wherever the one is, the other is as far behind it, going round.
    let distance = to.addr().wrapping_sub(from.addr());
    // SAFETY: the caller answers for the bytes; they do not overlap where that is said.
    unsafe {
        if distance >= bytes && distance.wrapping_neg() >= bytes {
            copy_long(from, to, bytes);
        } else {
            copy(from, to, bytes);
        }
    }
}

/// Copies `bytes` bytes, many in steps whose stores are aligned.
///
/// # Safety
/// As of [`copy_apart`].
#[inline]
unsafe fn copy_long(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: each step lies within the bytes; the caller answers for the rest.
    unsafe {
        if bytes < LEAST_LONG {
            return copy_nonoverlapping(from, to, bytes);
        }
        copy_nonoverlapping(from, to, CHUNK);
        let mut at = CHUNK - to.addr() % CHUNK;
        while at + STEP <= bytes {
            move_step(from.add(at), to.add(at));
            at += STEP;
        }
        while at + CHUNK < bytes {
            copy_nonoverlapping(from.add(at), to.add(at), CHUNK);
            at += CHUNK;
        }
        let last = bytes - CHUNK;
        copy_nonoverlapping(from.add(last), to.add(last), CHUNK);
    }
}

/// Moves a step, all of it loaded before any is stored.
///
/// # Safety
/// There are as many bytes at both places; the second is aligned to a chunk.
#[inline(always)]
unsafe fn move_step(from: *const u8, to: *mut u8) {
    // SAFETY: the caller answers for them.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_loadu_si128, _mm_store_si128};
            let load = |at: usize| _mm_loadu_si128(from.add(at).cast());
            let chunks = [load(0), load(CHUNK), load(2 * CHUNK), load(3 * CHUNK)];
            for (chunk, at) in chunks.into_iter().zip((0..).step_by(CHUNK)) {
                _mm_store_si128(to.add(at).cast(), chunk);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        copy_nonoverlapping(from, to, STEP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 3000;

    fn pattern() -> Vec<u8> {
        (0..251).map(|byte| byte | 1).cycle().take(ROOM).collect()
    }

    #[test]
    fn exactly_the_bytes_are_copied_wherever_they_lie() {
        let from = pattern();
        let lengths = (0..300).chain(LEAST_LONG - 2..LEAST_LONG + 140);
        for (bytes, shift) in lengths.flat_map(|bytes| [0, 1, 12, 15].map(|shift| (bytes, shift))) {
            for copy in [copy_apart, copy_any] {
                let mut to = vec![0; ROOM];
                // SAFETY: both have that many bytes behind the shifts.
                unsafe { copy(from.as_ptr().add(7), to.as_mut_ptr().add(shift), bytes) };
                assert_eq!(to[shift..shift + bytes], from[7..7 + bytes], "{bytes}");
                let others = to[..shift].iter().chain(&to[shift + bytes..]);
                assert!(others.copied().all(|byte| byte == 0), "{bytes}");
            }
        }
    }

    #[test]
    fn bytes_that_overlap_arrive_as_they_were() {
        let right = pattern();
        for bytes in [100, LEAST_LONG, LEAST_LONG + 77] {
            for (from, to) in [(0, 12), (12, 0), (0, 700), (700, 0), (5, 5)] {
                let mut memory = right.clone();
                let start = memory.as_mut_ptr();
                // SAFETY: all within the memory.
                unsafe { copy_any(start.add(from), start.add(to), bytes) };
                assert_eq!(memory[to..to + bytes], right[from..from + bytes]);
            }
        }
    }
}
