//! Between guest memory and where blocks lie: copied, or encrypted and decrypted in one pass.
//!
//! A guest byte is read once; nothing but plaintext that belongs there is written to guest memory.
//! A data unit that straddles segments goes through one unit of memory on the stack.
//!
//! UNSAFETY: all addresses come from a [`GuestBuffer`], a [`Chunk`] or a [`RamSpec`] that is held
//! through the call, and lengths are checked against both sides before the first byte.
#![expect(unsafe_code, reason = "copies and ciphers between raw ranges")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::device::Cipher;
use crate::memory::GuestBuffer;
use crate::storage::RamSpec;
use crate::worker::staging::Chunk;

/// Largest data unit.
const MAX_UNIT_BYTES: usize = 4096;

/// A range on our side.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// The front of a chunk.
    Chunk(&'a Chunk),
    /// Memory storage, from this byte on.
    Ram(&'a RamSpec, u64),
}

impl Place<'_> {
    #[inline]
    fn start(self, bytes: usize) -> Option<NonNull<u8>> {
        match self {
            Place::Chunk(chunk) => (bytes <= chunk.bytes() as usize).then(|| chunk.at()),
            Place::Ram(ram, offset_bytes) => ram.range(offset_bytes, bytes),
        }
    }
}

/// A part of a request: `bytes` bytes from `at` on of its guest buffer, which belong at
/// `offset_bytes` of the device.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// The request's data.
    pub buffer: &'a GuestBuffer,
    /// Where in it.
    pub at: u64,
    /// How many bytes; whole data units.
    pub bytes: usize,
    /// Where on the device; a whole data unit.
    pub offset_bytes: u64,
}

/// From guest memory to our side, encrypted where there is a cipher. False, with nothing or a
/// part of it done, where the ranges don't fit: a mistake of the caller.
#[inline]
#[must_use]
pub fn store(span: Span<'_>, cipher: Option<&Cipher>, to: Place<'_>) -> bool {
    let Some(to) = to.start(span.bytes) else {
        return false;
    };
    let Some(cipher) = cipher else {
        let mut done = 0;
        return span.buffer.each(span.at, span.bytes, |run, bytes| {
            // SAFETY: the run is guest memory of that length; `to` has span.bytes, and the runs sum to that.
            unsafe { std::ptr::copy_nonoverlapping(run.as_ptr(), to.as_ptr().add(done), bytes) };
            done += bytes;
        });
    };
    encrypt(span, cipher, to)
}

/// Zeroes, encrypted where there is a cipher, to the front of a chunk, as they belong at `offset_bytes` of
/// the device. False where they don't fit, or are no whole data units: a mistake of the caller.
#[must_use]
pub fn zeroes(chunk: &mut Chunk, bytes: u64, offset_bytes: u64, cipher: Option<&Cipher>) -> bool {
    let Some(bytes) = u32::try_from(bytes).ok().filter(|b| chunk.zero(*b)) else {
        return false;
    };
    let Some(cipher) = cipher else {
        return true;
    };
    let first = offset_bytes / u64::from(cipher.unit.bytes());
    let at = chunk.at().as_ptr();
    // SAFETY: the chunk has that many bytes, which nobody else uses; source and destination are the same.
    let done = unsafe {
        cipher
            .key
            .encrypt_raw(cipher.unit, first, at, at, bytes as usize)
    };
    done.is_ok()
}

/// From our side to guest memory, decrypted where there is a cipher. As [`store`].
#[inline]
#[must_use]
pub fn load(span: Span<'_>, cipher: Option<&Cipher>, from: Place<'_>) -> bool {
    let Some(from) = from.start(span.bytes) else {
        return false;
    };
    let Some(cipher) = cipher else {
        let mut done = 0;
        return span.buffer.each(span.at, span.bytes, |run, bytes| {
            // SAFETY: as in `store`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(done), run.as_ptr(), bytes) };
            done += bytes;
        });
    };
    decrypt(span, cipher, from)
}

fn encrypt(span: Span<'_>, cipher: &Cipher, to: NonNull<u8>) -> bool {
    let unit = cipher.unit.bytes() as usize;
    let first = span.offset_bytes / unit as u64;
    let mut carry = MaybeUninit::<[u8; MAX_UNIT_BYTES]>::uninit();
    let carry = carry.as_mut_ptr().cast::<u8>();
    let (mut carried, mut done, mut ok) = (0usize, 0usize, true);
    let mut run_cipher = |from: *const u8, done: usize, bytes: usize| {
        // SAFETY: `from` has `bytes` bytes (guest memory, or the carry); `to` has at least done + bytes.
        let result = unsafe {
            cipher.key.encrypt_raw(
                cipher.unit,
                first + (done / unit) as u64,
                from,
                to.as_ptr().add(done),
                bytes,
            )
        };
        ok &= result.is_ok();
    };
    let whole = span.buffer.each(span.at, span.bytes, |run, bytes| {
        let (mut at, mut left) = (run.as_ptr(), bytes);
        while left > 0 {
            let here = if carried == 0 && left >= unit {
                let here = left - left % unit;
                run_cipher(at, done, here);
                done += here;
                here
            } else {
                let here = left.min(unit - carried);
                // SAFETY: `carried + here` is at most a unit, which the carry has room for.
                unsafe { std::ptr::copy_nonoverlapping(at, carry.add(carried), here) };
                carried += here;
                if carried == unit {
                    run_cipher(carry, done, unit);
                    done += unit;
                    carried = 0;
                }
                here
            };
            // SAFETY: at most to the end of the run.
            at = unsafe { at.add(here) };
            left -= here;
        }
    });
    whole && ok && carried == 0
}

fn decrypt(span: Span<'_>, cipher: &Cipher, from: NonNull<u8>) -> bool {
    let unit = cipher.unit.bytes() as usize;
    let first = span.offset_bytes / unit as u64;
    if !span.bytes.is_multiple_of(unit) {
        return false;
    }
    let mut carry = MaybeUninit::<[u8; MAX_UNIT_BYTES]>::uninit();
    let carry = carry.as_mut_ptr().cast::<u8>();
    // Bytes of the carry that are still to be delivered.
    let (mut carried, mut done, mut ok) = (0usize, 0usize, true);
    let mut run_cipher = |to: *mut u8, done: usize, bytes: usize| {
        // SAFETY: `from` has at least done + bytes; `to` has `bytes` bytes (guest memory, or the carry).
        let result = unsafe {
            cipher.key.decrypt_raw(
                cipher.unit,
                first + (done / unit) as u64,
                from.as_ptr().add(done),
                to,
                bytes,
            )
        };
        ok &= result.is_ok();
    };
    let whole = span.buffer.each(span.at, span.bytes, |run, bytes| {
        let (mut at, mut left) = (run.as_ptr(), bytes);
        while left > 0 {
            let here = if carried == 0 && left >= unit {
                let here = left - left % unit;
                run_cipher(at, done, here);
                done += here;
                here
            } else {
                if carried == 0 {
                    run_cipher(carry, done, unit);
                    done += unit;
                    carried = unit;
                }
                let here = left.min(carried);
                // SAFETY: the last `carried` bytes of the unit in the carry were not delivered yet.
                unsafe { std::ptr::copy_nonoverlapping(carry.add(unit - carried), at, here) };
                carried -= here;
                here
            };
            // SAFETY: at most to the end of the run.
            at = unsafe { at.add(here) };
            left -= here;
        }
    });
    whole && ok && carried == 0
}
