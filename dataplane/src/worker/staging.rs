//! Staging: page-aligned memory between guest and storage, for what the kernel can't transfer
//! directly and for every encrypted byte. One mapping per worker, cut into chunks of two sizes.
//!
//! It lies in huge pages: reserved ones (`vm.nr_hugepages`) where six are free, else those that the kernel
//! finds. A worker makes and touches it on its own thread, when that is bound to its CPU, so that it comes from
//! that CPU's NUMA node, as do the ring and the worker's tables.
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
/// Small chunks per worker.
const SMALL: usize = 256;
/// Large chunks per worker.
const LARGE: usize = 32;
/// All of it: 12 MiB.
const TOTAL_BYTES: usize = SMALL * SMALL_BYTES as usize + LARGE * LARGE_BYTES as usize;

/// Bytes of the pages that are asked for.
const HUGE_BYTES: usize = 2 << 20;
const _: () = assert!(TOTAL_BYTES.is_multiple_of(HUGE_BYTES));

#[derive(Debug)]
struct Map {
    base: NonNull<u8>,
}

impl Map {
    /// All of it, zeroed and present.
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

    /// In huge pages of those that the host has set aside.
    fn reserved() -> io::Result<Self> {
        let map = Self::empty(MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB)?;
        map.populate()?;
        Ok(map)
    }

    fn ordinary() -> io::Result<Self> {
        let map = Self::empty(MapFlags::empty())?;
        // SAFETY: a hint about our own mapping; without effect where it is not supported.
        let _ = unsafe { madvise(map.base.cast(), TOTAL_BYTES, MmapAdvise::MADV_HUGEPAGE) };
        // SAFETY: the mapping is TOTAL_BYTES long, writable, and known to nobody else.
        unsafe { map.base.write_bytes(0, TOTAL_BYTES) };
        Ok(map)
    }

    fn empty(flags: MapFlags) -> io::Result<Self> {
        let size = NonZeroUsize::new(TOTAL_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: fresh anonymous memory at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE | flags) };
        Ok(Self {
            base: base?.cast::<u8>(),
        })
    }

    /// Touches its pages. A huge page that a limit of the thread's group or node refuses is an error here, and
    /// would be SIGBUS for whoever touched it.
    fn populate(&self) -> io::Result<()> {
        let advice = libc::MADV_POPULATE_WRITE;
        // SAFETY: our own mapping, which stays as it is but for being present.
        match unsafe { libc::madvise(self.base.as_ptr().cast(), TOTAL_BYTES, advice) } {
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
    map: Rc<Map>,
}

impl Staging {
    /// Maps the memory, in huge pages where the kernel has them, and touches it.
    ///
    /// # Errors
    /// What `mmap` fails with.
    pub fn new() -> io::Result<Self> {
        Ok(Self::cut(Map::new()?))
    }

    fn cut(map: Map) -> Self {
        let base = map.base;
        let map = Rc::new(map);
        let mut offset = 0;
        let mut cut = |count: usize, bytes: u32| -> Vec<Chunk> {
            let mut chunks = Vec::with_capacity(count);
            for _ in 0..count {
                chunks.push(Chunk {
                    // SAFETY: the counts and sizes sum to TOTAL_BYTES.
                    at: unsafe { base.add(offset) },
                    bytes,
                    _map: Rc::clone(&map),
                });
                offset += bytes as usize;
            }
            chunks
        };
        Self {
            large: cut(LARGE, LARGE_BYTES),
            small: cut(SMALL, SMALL_BYTES),
            map,
        }
    }

    /// A chunk for `bytes` bytes, or for the first part of them; none while all are in use.
    #[inline]
    pub fn take(&mut self, bytes: u64) -> Option<Chunk> {
        if bytes <= u64::from(SMALL_BYTES) {
            return self.small.pop().or_else(|| self.large.pop());
        }
        self.large.pop().or_else(|| self.small.pop())
    }

    /// How many chunks nobody uses, of either size.
    #[must_use]
    #[inline]
    pub fn unused(&self) -> usize {
        self.small.len() + self.large.len()
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

    /// The whole of it, to be registered with the kernel once.
    #[must_use]
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.map.base.as_ptr().cast(),
            iov_len: TOTAL_BYTES,
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
        while let Some(chunk) = staging.take(4096) {
            taken.push(chunk);
        }
        assert_eq!(taken.len(), SMALL + LARGE);
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
