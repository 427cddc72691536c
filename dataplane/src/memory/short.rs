//! Short copies: of a length that is not known before, and too short for a call of `memcpy`.
//!
//! UNSAFETY: chunks lie within the bytes that are copied; callers answer for these.
#![expect(unsafe_code, reason = "copying by address")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Bytes that are copied at once.
const CHUNK: usize = 16;
/// Of more bytes than these a call costs little beside the copy.
const MOST: usize = 256;

/// Copies `bytes` bytes. A few go in chunks, of which the last may overlap the one before it: what is read there is
/// read twice, and what is written is written twice.
///
/// # Safety
/// There are as many bytes at both places, and they do not overlap.
#[inline(always)]
pub(super) unsafe fn copy_short(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: each chunk lies within the bytes; the caller answers for the rest.
    unsafe {
        if !(CHUNK..=MOST).contains(&bytes) {
            return std::ptr::copy_nonoverlapping(from, to, bytes);
        }
        let last = bytes - CHUNK;
        let mut at = 0;
        while at < last {
            std::ptr::copy_nonoverlapping(from.add(at), to.add(at), CHUNK);
            at += CHUNK;
        }
        std::ptr::copy_nonoverlapping(from.add(last), to.add(last), CHUNK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_bytes_are_copied() {
        let from: Vec<u8> = (0..400u16).map(|at| at.to_le_bytes()[0] | 1).collect();
        for bytes in 0..from.len() {
            let mut to = vec![0; from.len()];
            // SAFETY: both have that many bytes.
            unsafe { copy_short(from.as_ptr(), to.as_mut_ptr(), bytes) };
            assert_eq!(to[..bytes], from[..bytes], "{bytes}");
            assert!(to[bytes..].iter().all(|byte| *byte == 0), "{bytes}");
        }
    }
}
