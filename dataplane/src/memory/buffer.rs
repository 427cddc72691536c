//! A guest buffer: the ranges of one direction of a descriptor chain, each checked to lie in
//! guest memory, held together with that memory.
//!
//! UNSAFETY: a piece is a raw range. It is only reachable through the buffer that holds the lease
//! on the memory it lies in, and it is made from a checked lookup only.
#![expect(unsafe_code, reason = "copying to and from guest memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ptr::NonNull;

use super::copy::{copy_any, copy_apart};
use super::{GuestMemory, Lease, read_words, will_read, will_write};

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// Bytes that most often stand in front of others: a network card's header.
const USUAL_FRONT: usize = 12;

/// Ranges that the longest chains of well-behaved drivers have.
pub const USUAL_MOST_PIECES: usize = 256;

/// A contiguous part of a buffer; what an iovec needs.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    host: NonNull<u8>,
    bytes: u32,
}

impl Piece {
    /// Its length in bytes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        self.bytes
    }

    /// Where it begins in this process; valid for as long as its buffer.
    #[must_use]
    pub fn host(self) -> NonNull<u8> {
        self.host
    }
}

/// A range outside guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at guest address {guest_addr:#x} don't lie in guest memory")]
pub struct OutsideMemory {
    /// First address.
    pub guest_addr: u64,
    /// Length.
    pub bytes: u32,
}

/// Ranges of guest memory, in order.
#[derive(Debug, Default)]
pub struct GuestBuffer {
    lease: Option<Lease>,
    pieces: Vec<Piece>,
    /// Pieces before this one were taken off the front.
    first: usize,
    bytes: u64,
    /// The byte that was split off its end.
    last: Option<NonNull<u8>>,
}

impl GuestBuffer {
    /// An empty buffer with room for `pieces`.
    #[must_use]
    pub fn with_capacity(pieces: usize) -> Self {
        Self {
            lease: None,
            pieces: Vec::with_capacity(pieces),
            first: 0,
            bytes: 0,
            last: None,
        }
    }

    /// Empties it, for ranges of this memory.
    #[inline]
    pub fn reset(&mut self, lease: &Lease) {
        if self.pieces.capacity() > USUAL_MOST_PIECES {
            self.shrink();
        }
        self.pieces.clear();
        self.first = 0;
        self.bytes = 0;
        self.last = None;
        match &self.lease {
            Some(held) if held.is_same(lease) => {}
            _ => self.lease = Some(lease.clone()),
        }
    }

    /// Empties it and lets go of the memory, and of room that only a very long chain needed: a
    /// guest could otherwise make every place in a worker that large.
    pub fn release(&mut self) {
        if self.pieces.capacity() > USUAL_MOST_PIECES {
            self.shrink();
        }
        self.pieces.clear();
        self.first = 0;
        self.bytes = 0;
        self.last = None;
        self.lease = None;
    }

    /// Gives up room that only a very long chain needed.
    #[cold]
    fn shrink(&mut self) {
        self.pieces = Vec::with_capacity(USUAL_MOST_PIECES);
    }

    /// Has the CPU fetch the first byte, which is going to be read.
    #[inline]
    pub fn announce_first(&self) {
        if let Some(piece) = self.pieces.first().filter(|piece| piece.bytes > 0) {
            will_read(piece.host);
        }
    }

    /// Has the CPU fetch the first `most` bytes, which are going to be read, of the first two ranges.
    #[inline]
    pub fn announce_front(&self, most: u32) {
        let mut left = most;
        for piece in self.pieces.iter().take(2) {
            let bytes = piece.bytes.min(left);
            left -= bytes;
            // With the last byte comes its line, wherever the first one lies in its own.
            for at in (0..bytes).step_by(LINE_BYTES).chain(bytes.checked_sub(1)) {
                // SAFETY: below the piece's length.
                will_read(unsafe { piece.host.add(at as usize) });
            }
        }
    }

    /// Has the CPU fetch the last byte, which is going to be written.
    #[inline]
    pub fn announce_last(&self) {
        if let Some(piece) = self.pieces.last().filter(|piece| piece.bytes > 0) {
            // SAFETY: the piece has at least one byte; this is its last.
            will_write(unsafe { piece.host.add(piece.bytes as usize - 1) });
        }
    }

    /// Adds a range, which may span adjacent regions. Nothing is added for no bytes.
    ///
    /// # Errors
    /// [`OutsideMemory`]; the buffer is then of no use.
    #[inline]
    pub fn push(&mut self, guest_addr: u64, bytes: u32) -> Result<(), OutsideMemory> {
        let lease = self.lease.as_ref();
        let Some(host) = lease.and_then(|lease| lease.recent(guest_addr, bytes)) else {
            return self.push_elsewhere(guest_addr, bytes);
        };
        self.pieces.push(Piece { host, bytes });
        self.bytes += u64::from(bytes);
        Ok(())
    }

    /// As [`GuestBuffer::push`], of a range anywhere.
    #[inline(never)]
    fn push_elsewhere(&mut self, guest_addr: u64, bytes: u32) -> Result<(), OutsideMemory> {
        let outside = OutsideMemory { guest_addr, bytes };
        let lease = self.lease.as_ref().ok_or(outside)?;
        let mut at = guest_addr;
        let mut left = bytes;
        while left > 0 {
            let (host, here) = lease.run(at, left).ok_or(outside)?;
            self.pieces.push(Piece { host, bytes: here });
            left -= here;
            at = at.checked_add(u64::from(here)).ok_or(outside)?;
        }
        lease.remember(guest_addr);
        self.bytes += u64::from(bytes);
        Ok(())
    }

    /// Its length in bytes.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it has no bytes.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Its parts, in order; none is empty.
    #[must_use]
    #[inline]
    pub fn pieces(&self) -> &[Piece] {
        self.pieces.get(self.first..).unwrap_or_default()
    }

    /// Whether memory that it lies in went away.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lease.as_ref().is_some_and(|memory| memory.is_lost())
    }

    /// Takes the last byte off, as the place of a status; false if there is none.
    #[inline]
    pub fn split_last_byte(&mut self) -> bool {
        let Some(last) = self.pieces.last_mut().filter(|p| p.bytes > 0) else {
            return false;
        };
        last.bytes -= 1;
        // SAFETY: the piece had at least one byte; this is its last.
        self.last = Some(unsafe { last.host.add(last.bytes as usize) });
        if last.bytes == 0 {
            self.pieces.pop();
        }
        self.bytes -= 1;
        true
    }

    /// Writes the byte that was split off: the last write of a request, after which everything that
    /// it may have written is marked in the memory's dirty log, where one is kept.
    #[inline]
    pub fn write_last_byte(&self, value: u8) {
        self.store_last_byte(value);
        if let Some(memory) = self.lease.as_ref().filter(|m| m.log().is_enabled()) {
            self.mark_written(memory);
        }
    }

    /// As [`GuestBuffer::write_last_byte`], of a request that wrote nothing else: a guest may ask for what
    /// can't be done as fast as it likes, and marking the whole of a long buffer takes a while.
    #[inline]
    pub fn write_only_last_byte(&self, value: u8) {
        self.store_last_byte(value);
        if let Some(memory) = self.lease.as_ref().filter(|m| m.log().is_enabled())
            && let Some(at) = self.last
        {
            memory.mark_host(at, 1);
        }
    }

    #[inline]
    fn store_last_byte(&self, value: u8) {
        if let Some(at) = self.last {
            // SAFETY: it lies in the memory that the lease still holds.
            unsafe { at.as_ptr().write_volatile(value) };
        }
    }

    #[cold]
    fn mark_written(&self, memory: &GuestMemory) {
        for piece in self.pieces() {
            memory.mark_host(piece.host, u64::from(piece.bytes));
        }
        if let Some(at) = self.last {
            memory.mark_host(at, 1);
        }
    }

    /// Takes 16 bytes off the front as two little-endian words, each byte read once; none if it is shorter.
    #[inline]
    pub fn take_words(&mut self) -> Option<[u64; 2]> {
        const BYTES: u32 = 16;
        let first = self.pieces.get_mut(self.first);
        let Some(piece) = first.filter(|piece| piece.bytes >= BYTES) else {
            return self.take_scattered_words();
        };
        // SAFETY: the piece has these bytes, in memory that the lease holds.
        let words = unsafe { read_words(piece.host) };
        // SAFETY: at most the piece's own length further.
        piece.host = unsafe { piece.host.add(BYTES as usize) };
        piece.bytes -= BYTES;
        self.first += usize::from(piece.bytes == 0);
        self.bytes -= u64::from(BYTES);
        Some(words)
    }

    /// As [`GuestBuffer::take_words`], of bytes that may lie in several pieces.
    #[cold]
    fn take_scattered_words(&mut self) -> Option<[u64; 2]> {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = self.take_front::<16>()?;
        Some([
            u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            u64::from_le_bytes([i, j, k, l, m, n, o, p]),
        ])
    }

    /// Takes `N` bytes off the front and copies them, each byte once; none if it is shorter.
    pub fn take_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut out = [0u8; N];
        if !self.copy_out(0, &mut out) {
            return None;
        }
        let mut left = N;
        while let Some(piece) = self.pieces.get_mut(self.first).filter(|_| left > 0) {
            let here = left.min(piece.bytes as usize);
            // SAFETY: at most the piece's own length further.
            piece.host = unsafe { piece.host.add(here) };
            // `here` is at most the piece's length, which is a u32.
            piece.bytes -= u32::try_from(here).unwrap_or(piece.bytes);
            left -= here;
            self.first += usize::from(piece.bytes == 0);
        }
        self.bytes -= N as u64;
        Some(out)
    }

    /// Copies from offset `at` into `to`; false, with nothing copied, where it is too short.
    pub fn copy_out(&self, at: u64, to: &mut [u8]) -> bool {
        let mut done = 0;
        self.each(at, to.len(), |host, bytes| {
            if let Some(part) = to.get_mut(done..done + bytes) {
                // SAFETY: `host` has that many bytes; `part` is ours and as long.
                unsafe { copy_apart(host.as_ptr(), part.as_mut_ptr(), bytes) };
            }
            done += bytes;
        })
    }

    /// Copies `from` to offset `at`; false, with nothing copied, where it is too short.
    pub fn copy_in(&self, at: u64, from: &[u8]) -> bool {
        let mut done = 0;
        self.each(at, from.len(), |host, bytes| {
            if let Some(part) = from.get(done..done + bytes) {
                // SAFETY: as in copy_out, the other way.
                unsafe { copy_apart(part.as_ptr(), host.as_ptr(), bytes) };
            }
            done += bytes;
        })
    }

    /// Copies `first` and `second`, one behind the other, to the front of its first range; false, with nothing copied,
    /// where that is too short.
    #[inline]
    pub fn copy_front(&self, first: &[u8], second: &[u8]) -> bool {
        let bytes = first.len() + second.len();
        let front = self.pieces.first();
        let Some(piece) = front.filter(|piece| bytes <= piece.bytes as usize) else {
            return false;
        };
        // SAFETY: the piece has that many bytes, and is no memory of ours.
        unsafe {
            let host = piece.host.as_ptr();
            match first.first_chunk::<USUAL_FRONT>() {
                // Of a length that is known, it is no call.
                Some(usual) if first.len() == USUAL_FRONT => {
                    std::ptr::copy_nonoverlapping(usual.as_ptr(), host, USUAL_FRONT);
                }
                _ => std::ptr::copy_nonoverlapping(first.as_ptr(), host, first.len()),
            }
            std::ptr::copy_nonoverlapping(second.as_ptr(), host.add(first.len()), second.len());
        }
        true
    }

    /// Copies `bytes` bytes from offset `from_at` of another buffer, which may be of other memory, of the same or
    /// overlap, to offset `at`; nothing is decided by what is copied so (a few bytes may be read twice). False, with nothing copied, where either is too short.
    #[inline]
    pub fn copy_from(&self, at: u64, from: &Self, from_at: u64, bytes: usize) -> bool {
        let (Some(mut to), Some(runs)) = (self.runs(at, bytes), from.runs(from_at, bytes)) else {
            return false;
        };
        let (mut place, mut room) = (NonNull::dangling(), 0);
        for (mut host, mut left) in runs {
            while left > 0 {
                if room == 0 {
                    let Some(next) = to.next() else {
                        return false;
                    };
                    (place, room) = next;
                }
                let here = left.min(room);
                // SAFETY: both places have that many bytes. They may overlap: one guest can give the same bytes for
                // both.
                unsafe {
                    copy_any(host.as_ptr(), place.as_ptr(), here);
                    // At most to their ends.
                    (host, place) = (host.add(here), place.add(here));
                }
                (left, room) = (left - here, room - here);
            }
        }
        true
    }

    /// Marks the first `bytes` bytes, which were written, in the memory's dirty log, where one is kept.
    #[inline]
    pub fn mark_front(&self, bytes: usize) {
        if let Some(memory) = self.lease.as_ref().filter(|m| m.log().is_enabled()) {
            self.each(0, bytes, |host, bytes| memory.mark_host(host, bytes as u64));
        }
    }

    /// Writes zeroes to `bytes` bytes from offset `at`; false where it is too short.
    pub fn zero(&self, at: u64, bytes: usize) -> bool {
        self.each(at, bytes, |host, bytes| {
            // SAFETY: `host` has that many bytes.
            unsafe { std::ptr::write_bytes(host.as_ptr(), 0, bytes) };
        })
    }

    /// Calls `f` for each contiguous run of `bytes` bytes from offset `at`; false, without a
    /// call, where the buffer ends before.
    #[inline]
    pub fn each(&self, at: u64, bytes: usize, mut f: impl FnMut(NonNull<u8>, usize)) -> bool {
        let Some(runs) = self.runs(at, bytes) else {
            return false;
        };
        runs.for_each(|(host, bytes)| f(host, bytes));
        true
    }

    /// The contiguous runs of `bytes` bytes from offset `at`; none where the buffer ends before.
    #[inline]
    #[must_use]
    pub fn runs(&self, at: u64, bytes: usize) -> Option<Runs<'_>> {
        let end = at.checked_add(bytes as u64)?;
        (end <= self.bytes).then(|| Runs {
            pieces: self.pieces().iter(),
            skip: at,
            left: bytes,
        })
    }
}

/// Contiguous runs of a buffer: where each lies and how many bytes it has.
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    pieces: std::slice::Iter<'a, Piece>,
    /// Bytes in front of the first run.
    skip: u64,
    left: usize,
}

impl Iterator for Runs<'_> {
    type Item = (NonNull<u8>, usize);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let piece = self.pieces.next()?;
            let length = u64::from(piece.bytes);
            if self.skip >= length {
                self.skip -= length;
                continue;
            }
            // Both fit: skip < length <= u32::MAX.
            let offset = usize::try_from(self.skip).unwrap_or(0);
            let here = (piece.bytes as usize - offset).min(self.left);
            self.skip = 0;
            self.left -= here;
            // SAFETY: offset lies inside the piece.
            return Some((unsafe { piece.host.add(offset) }, here));
        }
        None
    }
}
