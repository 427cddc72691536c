//! Between guest memory and where blocks lie: copied, or encrypted and decrypted in one pass.
//!
//! A guest byte is read once; nothing but plaintext that belongs there is written to guest memory.
//! A data unit may straddle segments.
//!
//! UNSAFETY: all addresses come from a [`GuestBuffer`], a [`Chunk`] or a [`RamSpec`] that is held
//! through the call, and lengths are checked against both sides before the first byte.
#![expect(unsafe_code, reason = "copies and ciphers between raw ranges")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::marker::PhantomData;
use std::ptr::NonNull;

use bulkhead_crypto::Extent;

use super::Cipher;
use crate::memory::GuestBuffer;
use crate::storage::RamSpec;
use crate::worker::staging::Chunk;

/// How much of a chunk is plaintext at a time while it gets another key.
const REKEYED_BYTES: u32 = 16 << 10;

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
/// part of it done, where the ranges don't fit or are no whole data units: a mistake of the caller.
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
    let Some(first) = unit_at(offset_bytes, cipher) else {
        return false;
    };
    let at = chunk.at().as_ptr();
    // SAFETY: the chunk has that many bytes, which nobody else uses; source and destination are the same.
    let done = unsafe {
        cipher
            .key
            .encrypt_raw(cipher.unit, first, at, at, bytes as usize)
    };
    done.is_ok()
}

/// Bytes of the device at the front of a chunk, from one key to another; both have the same data unit. Plaintext
/// stands there for no longer than a piece of it takes. False, with nothing or a part of it done, where they
/// don't fit, or are no whole data units: a mistake of the caller.
#[must_use]
pub fn rekey(chunk: &mut Chunk, bytes: u32, offset_bytes: u64, from: &Cipher, to: &Cipher) -> bool {
    let unit = from.unit.bytes();
    if bytes > chunk.bytes() || !bytes.is_multiple_of(unit) || from.unit != to.unit {
        return false;
    }
    let Some(first) = unit_at(offset_bytes, from) else {
        return false;
    };
    let step = REKEYED_BYTES.next_multiple_of(unit);
    (0..bytes).step_by(step as usize).all(|done| {
        let (len, number) = (step.min(bytes - done), first + u64::from(done / unit));
        // SAFETY: inside the chunk, which nobody else uses; source and destination are the same.
        let both = unsafe {
            let at = chunk.at().as_ptr().add(done as usize);
            from.key
                .decrypt_raw(from.unit, number, at, at, len as usize)
                .and_then(|()| to.key.encrypt_raw(to.unit, number, at, at, len as usize))
        };
        both.is_ok()
    })
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
    let runs = span.buffer.runs(span.at, span.bytes);
    let (Some(runs), Some(first)) = (runs, unit_at(span.offset_bytes, cipher)) else {
        return false;
    };
    let (first, to) = (u128::from(first), std::iter::once((to, span.bytes)));
    // SAFETY: the runs are guest memory that the buffer holds; `to` has span.bytes, which nobody else uses.
    let done = unsafe { cipher.key.encrypt_segments(cipher.unit, first, runs, to) };
    done.is_ok()
}

fn decrypt(span: Span<'_>, cipher: &Cipher, from: NonNull<u8>) -> bool {
    let runs = span.buffer.runs(span.at, span.bytes);
    let (Some(runs), Some(first)) = (runs, unit_at(span.offset_bytes, cipher)) else {
        return false;
    };
    let (first, from) = (u128::from(first), std::iter::once((from, span.bytes)));
    // SAFETY: as in `encrypt`, the other way.
    let done = unsafe { cipher.key.decrypt_segments(cipher.unit, first, from, runs) };
    done.is_ok()
}

/// Parts of requests that are encrypted, or decrypted, in one call: that is faster than a call for each, of
/// whose time the first tweak takes a good part.
#[derive(Debug)]
pub struct Together<'a> {
    extents: [Extent; MOST_TOGETHER],
    count: usize,
    to_us: bool,
    /// The spans' buffers and places hold what the extents name.
    of: PhantomData<Span<'a>>,
}

/// Parts of one call at most.
pub const MOST_TOGETHER: usize = 8;
/// The longest that is worth it.
const SHORT_BYTES: usize = 16 << 10;

impl<'a> Together<'a> {
    /// None yet: parts to encrypt to our side if `to_us`, else to decrypt to guest memory.
    #[must_use]
    pub fn new(to_us: bool) -> Self {
        let nothing = Extent {
            first_unit: 0,
            source: NonNull::dangling(),
            destination: NonNull::dangling(),
            bytes: 0,
        };
        Self {
            extents: [nothing; MOST_TOGETHER],
            count: 0,
            to_us,
            of: PhantomData,
        }
    }

    /// Adds a part. False, with nothing added, where it is to be done by itself ([`store`], [`load`]): one that
    /// does not lie in one piece, is long, or finds no room.
    #[inline]
    #[must_use]
    pub fn add(&mut self, span: Span<'a>, cipher: &Cipher, ours: Place<'a>) -> bool {
        let Some(mut runs) = span.buffer.runs(span.at, span.bytes) else {
            return false;
        };
        let (Some((guest, here)), Some(ours)) = (runs.next(), ours.start(span.bytes)) else {
            return false;
        };
        let (Some(first_unit), Some(extent)) = (
            unit_at(span.offset_bytes, cipher),
            self.extents.get_mut(self.count),
        ) else {
            return false;
        };
        if here != span.bytes || here > SHORT_BYTES {
            return false;
        }
        let (source, destination) = if self.to_us {
            (guest, ours)
        } else {
            (ours, guest)
        };
        *extent = Extent {
            first_unit,
            source,
            destination,
            bytes: here,
        };
        self.count += 1;
        true
    }

    /// Does what was added. As [`store`] and [`load`]: false for a mistake of the caller.
    #[must_use]
    pub fn run(&self, cipher: &Cipher) -> bool {
        let extents = self.extents.get(..self.count).unwrap_or_default();
        // SAFETY: each is a run of guest memory of that length, and as many bytes on our side; the spans' buffers and
        // the places are borrowed for as long as this value.
        let done = unsafe {
            if self.to_us {
                cipher.key.encrypt_extents(cipher.unit, extents)
            } else {
                cipher.key.decrypt_extents(cipher.unit, extents)
            }
        };
        done.is_ok()
    }
}

/// Number of the data unit that begins at this byte of the device; none where none does, whose bytes another
/// unit's tweak would ruin.
#[inline]
fn unit_at(offset_bytes: u64, cipher: &Cipher) -> Option<u64> {
    let unit = u64::from(cipher.unit.bytes());
    offset_bytes
        .is_multiple_of(unit)
        .then_some(offset_bytes / unit)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};

    use super::*;
    use crate::memory::{Lease, anonymous};
    use crate::worker::staging::Staging;

    /// More than is plaintext at a time.
    const BYTES: u32 = REKEYED_BYTES + 4096;

    #[test]
    fn a_chunk_gets_another_key_in_whole_data_units_alone() {
        let arena = SecretArena::new(2).expect("arena");
        let cipher = |first: u8| {
            let mut key = [7; 64];
            key[0] = first;
            let key = XtsKey::new(&arena, &key).expect("key");
            let unit = DataUnit::B4096;
            Cipher { key, unit }
        };
        let (one, two) = (cipher(1), cipher(2));
        let zeroes_under = |cipher: &Cipher, first: u64| {
            let mut bytes = vec![0; BYTES as usize];
            let zero = bytes.clone();
            let done = cipher.key.encrypt(cipher.unit, first, &zero, &mut bytes);
            done.expect("whole units");
            bytes
        };
        let mut staging = Staging::new().expect("staging");
        let mut chunk = staging.take(u64::from(BYTES)).expect("a chunk");
        let holds = |chunk: &Chunk, expected: &[u8]| {
            let mut bytes = vec![0; BYTES as usize];
            assert!(chunk.copy_out(&mut bytes));
            bytes == expected
        };

        assert!(zeroes(&mut chunk, u64::from(BYTES), 8192, Some(&one)));
        assert!(holds(&chunk, &zeroes_under(&one, 2)));
        assert!(!zeroes(&mut chunk, u64::from(BYTES), 512, Some(&one)));
        assert!(zeroes(&mut chunk, u64::from(BYTES), 8192, Some(&one)));
        for (bytes, offset_bytes) in [(BYTES, 8192 + 512), (512, 8192), (u32::MAX, 8192)] {
            assert!(!rekey(&mut chunk, bytes, offset_bytes, &one, &two));
        }
        assert!(holds(&chunk, &zeroes_under(&one, 2)), "refused untouched");
        assert!(rekey(&mut chunk, BYTES, 8192, &one, &two));
        assert!(holds(&chunk, &zeroes_under(&two, 2)));
    }

    /// A guest's buffer of these ranges, each filled with a byte of its own.
    fn buffer(lease: &Lease, ranges: &[(u64, u32)]) -> GuestBuffer {
        let mut buffer = GuestBuffer::default();
        buffer.reset(lease);
        for (at, bytes) in ranges {
            buffer.push(*at, *bytes).expect("in memory");
        }
        let fill = ranges.iter().flat_map(|(at, bytes)| {
            let byte = u8::try_from(at / 4096 % 251).expect("small");
            vec![byte; *bytes as usize]
        });
        assert!(buffer.copy_in(0, &fill.collect::<Vec<_>>()));
        buffer
    }

    #[test]
    fn what_is_done_together_is_what_each_is_alone() {
        const VOLUME: u64 = 1 << 20;
        let arena = SecretArena::new(1).expect("arena");
        let key: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
        let cipher = Cipher {
            key: XtsKey::new(&arena, &key).expect("key"),
            unit: DataUnit::B4096,
        };
        let (memory, _fd) = anonymous(1 << 20).expect("memory");
        let lease = Lease::new(Arc::new(memory));
        let whole = |ranges: &[(u64, u32)]| buffer(&lease, ranges);
        let buffers: Vec<_> = (1..=9).map(|n| whole(&[(n * 0x5000, 4096)])).collect();
        let (scattered, long) = (
            whole(&[(0x80000, 2048), (0x90000, 2048)]),
            whole(&[(0xa0000, 32768)]),
        );
        let span = |buffer, offset_bytes| Span {
            buffer,
            at: 0,
            bytes: usize::try_from(GuestBuffer::bytes(buffer)).expect("small"),
            offset_bytes,
        };
        let (one, other) = (RamSpec::new(VOLUME), RamSpec::new(VOLUME));
        let (alone, together) = (one.expect("memory"), other.expect("memory"));
        let mut writes = Together::new(true);
        assert!(!writes.add(span(&scattered, 0), &cipher, Place::Ram(&together, 0)));
        assert!(!writes.add(span(&long, 0), &cipher, Place::Ram(&together, 0)));
        for (n, buffer) in (0u32..).zip(&buffers) {
            // Far apart, and the last ones first.
            let at = u64::from(9 - n) * 0x10000;
            let added = writes.add(span(buffer, at), &cipher, Place::Ram(&together, at));
            assert_eq!(
                added,
                usize::try_from(n).is_ok_and(|n| n < MOST_TOGETHER),
                "{n}"
            );
            if added {
                assert!(store(
                    span(buffer, at),
                    Some(&cipher),
                    Place::Ram(&alone, at)
                ));
            }
        }
        assert!(writes.run(&cipher));
        let all = |ram: &RamSpec| {
            let mut bytes = vec![0; usize::try_from(VOLUME).expect("small")];
            assert!(ram.copy_out(0, &mut bytes));
            bytes
        };
        assert!(all(&alone) == all(&together));
        let mut reads = Together::new(false);
        let back = whole(&[(0xf0000, 4096)]);
        assert!(reads.add(
            span(&back, 0x90000),
            &cipher,
            Place::Ram(&together, 0x90000)
        ));
        assert!(reads.run(&cipher));
        let bytes = |buffer: &GuestBuffer| {
            let mut bytes = [0; 4096];
            assert!(buffer.copy_out(0, &mut bytes));
            bytes
        };
        assert!(bytes(&back) == bytes(&buffers[0]));
    }
}
