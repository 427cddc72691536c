//! Staging: page-aligned memory between guest and storage, for what the kernel can't transfer
//! directly and for every encrypted byte. One mapping per worker, cut into chunks of two sizes.
//!
//! It lies in huge pages: reserved ones (`vm.nr_hugepages`) where six are free, else those that the kernel
//! finds. A worker makes and touches it on its own thread, when that is bound to its CPU, so that it comes from
//! that CPU's NUMA node, as do the ring and the worker's tables.
//!
//! One piece of it is there from the beginning, the others come when they are wanted: where the host itself is a
//! virtual machine, a huge page that it did not have yet costs about 2 ms, and a process that takes over from one
//! that died has guests that wait.
//!
//! UNSAFETY: a chunk is a raw range of the mapping. The free lists give each to one owner at a time,
//! chunks hold the mapping alive, and nothing takes a reference to their bytes.
#![expect(unsafe_code, reason = "an mmap cut into raw chunks")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::rc::Rc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Bytes of a small chunk: a multiple of every data unit and logical block.
pub const SMALL_BYTES: u32 = 16 * 1024;
/// Bytes of a large chunk.
pub const LARGE_BYTES: u32 = 256 * 1024;
/// Bytes of the pages that are asked for, and of a piece.
const PIECE_BYTES: usize = 2 << 20;
/// Small and large chunks of a piece: the first ones have both, and the others large ones only.
const MIXED: (usize, usize) = (64, 4);
const LARGE_ONLY: (usize, usize) = (0, 8);
/// How many pieces there are at most, and as which they are cut up in the order in which they come.
pub const PIECES: usize = 6;
const CUTS: [(usize, usize); PIECES] = [MIXED, MIXED, MIXED, MIXED, LARGE_ONLY, LARGE_ONLY];
/// Small chunks per worker, and large ones.
const SMALL: usize = 4 * MIXED.0;
const LARGE: usize = 4 * MIXED.1 + 2 * LARGE_ONLY.1;
/// All of it: 12 MiB.
const TOTAL_BYTES: usize = PIECES * PIECE_BYTES;

const fn bytes_of((small, large): (usize, usize)) -> usize {
    small * SMALL_BYTES as usize + large * LARGE_BYTES as usize
}
const _: () = assert!(bytes_of(MIXED) == PIECE_BYTES && bytes_of(LARGE_ONLY) == PIECE_BYTES);

#[derive(Debug)]
struct Map {
    base: NonNull<u8>,
    /// Of pages that the host has set aside.
    reserved: bool,
}

impl Map {
    /// Room for all of it, of which one piece is there.
    fn new() -> io::Result<Self> {
        match Self::reserved() {
            Ok(map) => {
                tracing::debug!("staging memory lies in reserved huge pages");
                Ok(map)
            }
            Err(error) => {
                tracing::debug!(
                    "staging memory lies in pages as the kernel has them, huge ones if it can: no reserved ones \
                     are free ({error})"
                );
                Self::ordinary()
            }
        }
    }

    /// In huge pages of those that the host has set aside, which are this mapping's from now on.
    fn reserved() -> io::Result<Self> {
        let map = Self::empty(true)?;
        map.touch(0)?;
        Ok(map)
    }

    fn ordinary() -> io::Result<Self> {
        let map = Self::empty(false)?;
        // SAFETY: a hint about our own mapping; without effect where it is not supported.
        let _ = unsafe { madvise(map.base.cast(), TOTAL_BYTES, MmapAdvise::MADV_HUGEPAGE) };
        map.touch(0)?;
        Ok(map)
    }

    fn empty(reserved: bool) -> io::Result<Self> {
        let size = NonZeroUsize::new(TOTAL_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let huge = MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB;
        let flags = if reserved { huge } else { MapFlags::empty() };
        // SAFETY: fresh anonymous memory at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE | flags) };
        Ok(Self {
            base: base?.cast::<u8>(),
            reserved,
        })
    }

    /// Where a piece begins; below [`PIECES`].
    fn piece(&self, piece: usize) -> NonNull<u8> {
        debug_assert!(piece < PIECES);
        // SAFETY: the mapping has so many pieces.
        unsafe { self.base.add(piece.min(PIECES - 1) * PIECE_BYTES) }
    }

    /// Has a piece's pages there. A huge page that a limit of the thread's group or node refuses is an error here,
    /// and would be SIGBUS for whoever touched it.
    fn touch(&self, piece: usize) -> io::Result<()> {
        let at = self.piece(piece);
        if !self.reserved {
            // SAFETY: the piece is that long, writable, and known to nobody else yet.
            unsafe { at.write_bytes(0, PIECE_BYTES) };
            return Ok(());
        }
        let advice = libc::MADV_POPULATE_WRITE;
        // SAFETY: our own mapping, which stays as it is but for being present.
        match unsafe { libc::madvise(at.as_ptr().cast(), PIECE_BYTES, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no chunk is left that could use it (each holds the Rc).
        let result = unsafe { munmap(self.base.cast(), TOTAL_BYTES) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}

/// A chunk, owned.
#[derive(Debug)]
pub struct Chunk {
    at: NonNull<u8>,
    bytes: u32,
    piece: u8,
    _map: Rc<Map>,
}

impl Chunk {
    /// Where it begins.
    #[must_use]
    pub fn at(&self) -> NonNull<u8> {
        self.at
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// The piece that it is of, below [`PIECES`].
    #[must_use]
    #[inline]
    pub fn piece(&self) -> u8 {
        self.piece
    }

    /// Copies its front into `to`; false, with nothing copied, where it is shorter.
    #[must_use]
    pub fn copy_out(&self, to: &mut [u8]) -> bool {
        let fits = to.len() <= self.bytes as usize;
        if fits {
            // SAFETY: it has that many bytes, which nobody else uses; `to` is memory of its own.
            unsafe {
                self.at
                    .copy_to_nonoverlapping(NonNull::from(&mut *to).cast(), to.len())
            };
        }
        fits
    }

    /// Copies `from` to its front; false, with nothing copied, where it is shorter.
    #[must_use]
    pub fn copy_in(&mut self, from: &[u8]) -> bool {
        let fits = from.len() <= self.bytes as usize;
        if fits {
            // SAFETY: as above, the other way.
            unsafe {
                self.at
                    .copy_from_nonoverlapping(NonNull::from(from).cast(), from.len())
            };
        }
        fits
    }

    /// Zeroes its first `bytes` bytes; false, with nothing done, where it is shorter.
    #[must_use]
    pub fn zero(&mut self, bytes: u32) -> bool {
        let fits = bytes <= self.bytes;
        if fits {
            // SAFETY: it has that many bytes, which nobody else uses.
            unsafe { self.at.write_bytes(0, bytes as usize) };
        }
        fits
    }
}

/// The chunks that nobody uses.
#[derive(Debug)]
pub struct Staging {
    small: Vec<Chunk>,
    large: Vec<Chunk>,
    /// Pieces that are there.
    pieces: usize,
    /// Pieces that there can be.
    most: usize,
    /// Chunks of those that are not there yet.
    absent: usize,
    map: Rc<Map>,
}

impl Staging {
    /// Maps the memory, in huge pages where the kernel has them, and touches the first piece of it.
    ///
    /// # Errors
    /// What `mmap` fails with.
    pub fn new() -> io::Result<Self> {
        Ok(Self::cut(Map::new()?))
    }

    fn cut(map: Map) -> Self {
        let mut staging = Self {
            small: Vec::with_capacity(SMALL),
            large: Vec::with_capacity(LARGE),
            pieces: 0,
            most: PIECES,
            absent: SMALL + LARGE,
            map: Rc::new(map),
        };
        staging.add();
        staging
    }

    /// The next piece, which is there by now, is cut up.
    fn add(&mut self) {
        let Some((small, large)) = CUTS.get(self.pieces).copied() else {
            return;
        };
        let mut at = self.map.piece(self.pieces);
        let piece = u8::try_from(self.pieces).unwrap_or(u8::MAX);
        let mut cut = |chunks: &mut Vec<Chunk>, bytes: u32| {
            chunks.push(Chunk {
                at,
                bytes,
                piece,
                _map: Rc::clone(&self.map),
            });
            // SAFETY: the chunks of a piece are as long as it is.
            at = unsafe { at.add(bytes as usize) };
        };
        (0..large).for_each(|_| cut(&mut self.large, LARGE_BYTES));
        (0..small).for_each(|_| cut(&mut self.small, SMALL_BYTES));
        self.absent -= small + large;
        self.pieces += 1;
    }

    /// Whether there is no chunk for so many bytes, but could be after [`Staging::grow`].
    #[must_use]
    #[inline]
    pub fn is_short(&self, bytes: u64) -> bool {
        let chunks = if bytes <= u64::from(SMALL_BYTES) {
            &self.small
        } else {
            &self.large
        };
        chunks.is_empty() && self.pieces < self.most
    }

    /// One piece more: its number and where it is, to be registered with the kernel. None if there are all of them, or
    /// the memory is refused; then there will be no more than there are.
    #[cold]
    pub fn grow(&mut self) -> Option<(u32, libc::iovec)> {
        let piece = self.pieces;
        if piece >= self.most {
            return None;
        }
        if let Err(error) = self.map.touch(piece) {
            tracing::warn!(
                "there is less staging memory than there should be, {} of {} MiB: {error}; more requests wait for each \
                 other",
                (piece * PIECE_BYTES) >> 20,
                TOTAL_BYTES >> 20
            );
            self.most = piece;
            self.absent = 0;
            return None;
        }
        self.add();
        Some((u32::try_from(piece).unwrap_or(0), self.iovec(piece)))
    }

    /// A chunk for `bytes` bytes, or for the first part of them; none while all are in use.
    #[inline]
    pub fn take(&mut self, bytes: u64) -> Option<Chunk> {
        if bytes <= u64::from(SMALL_BYTES) {
            return self.small.pop().or_else(|| self.large.pop());
        }
        self.large.pop().or_else(|| self.small.pop())
    }

    /// How many chunks nobody uses, of either size, those included that are not there yet.
    #[must_use]
    #[inline]
    pub fn unused(&self) -> usize {
        self.small.len() + self.large.len() + self.absent
    }

    /// Takes a chunk back.
    #[inline]
    pub fn give(&mut self, chunk: Chunk) {
        // The lists were made with room for all of their chunks.
        if chunk.bytes == SMALL_BYTES {
            self.small.push(chunk);
        } else {
            self.large.push(chunk);
        }
    }

    /// The first piece, to be registered with the kernel.
    #[must_use]
    pub fn first(&self) -> libc::iovec {
        self.iovec(0)
    }

    fn iovec(&self, piece: usize) -> libc::iovec {
        libc::iovec {
            iov_base: self.map.piece(piece).as_ptr().cast(),
            iov_len: PIECE_BYTES,
        }
    }

    #[cfg(test)]
    fn free(&self) -> (usize, usize) {
        (self.small.len(), self.large.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_apart_aligned_and_come_back() {
        check(Staging::cut(Map::ordinary().expect("memory")));
    }

    /// What a successor has to wait for is one piece.
    #[test]
    fn one_piece_is_there_and_the_others_come_as_they_are_wanted() {
        let mut staging = Staging::cut(Map::ordinary().expect("memory"));
        let (small, large) = CUTS[0];
        assert_eq!(staging.free(), (small, large));
        assert!(!staging.is_short(1) && !staging.is_short(u64::from(LARGE_BYTES)));
        let taken: Vec<_> = (0..large)
            .map(|_| staging.take(u64::from(LARGE_BYTES)).expect("free"))
            .collect();
        assert!(staging.is_short(u64::from(LARGE_BYTES)) && !staging.is_short(1));
        let (piece, memory) = staging.grow().expect("memory");
        assert_eq!((piece, memory.iov_len), (1, PIECE_BYTES));
        assert_eq!(staging.free(), (2 * small, large));
        taken.into_iter().for_each(|chunk| staging.give(chunk));
        assert_eq!(staging.free(), (2 * small, 2 * large));
    }

    /// Where the host has some to give, as most test machines have not.
    #[test]
    fn it_takes_reserved_huge_pages() {
        match Map::reserved() {
            Ok(map) => {
                let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
                let from = format!("{:x}-", map.base.addr());
                let mut mine = maps.lines().skip_while(|line| !line.starts_with(&from));
                let size = mine.find(|line| line.starts_with("KernelPageSize:"));
                assert_eq!(size.map(|line| line.contains(" 2048 kB")), Some(true));
                check(Staging::cut(map));
            }
            Err(error) => println!("skipped: reserved huge pages: none are free ({error})"),
        }
        check(Staging::new().expect("with or without"));
    }

    fn check(mut staging: Staging) {
        let mut taken = Vec::new();
        loop {
            assert_eq!(staging.unused() + taken.len(), SMALL + LARGE);
            if staging.is_short(4096) {
                let (piece, memory) = staging.grow().expect("memory");
                assert!(piece > 0 && memory.iov_len == PIECE_BYTES);
            }
            match staging.take(4096) {
                Some(chunk) => taken.push(chunk),
                None => break,
            }
        }
        assert_eq!(taken.len(), SMALL + LARGE);
        assert!(!staging.is_short(4096) && staging.grow().is_none());
        let place = |chunk: &Chunk| chunk.at().addr().get() - staging.map.base.addr().get();
        assert!(
            taken
                .iter()
                .all(|chunk| place(chunk) / PIECE_BYTES == usize::from(chunk.piece()))
        );
        let mut ranges: Vec<_> = taken
            .iter()
            .map(|c| (c.at().addr().get(), c.bytes() as usize))
            .collect();
        ranges.sort_unstable();
        assert!(ranges.iter().all(|(at, _)| at % 4096 == 0));
        assert!(ranges.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        for chunk in taken {
            staging.give(chunk);
        }
        assert_eq!(staging.free(), (SMALL, LARGE));
        assert_eq!(staging.take(1 << 20).expect("free").bytes(), LARGE_BYTES);
    }
}
