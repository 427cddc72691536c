//! One mapping of a file that a frontend shares. Whoever maps the same bytes of the same file again gets the same
//! mapping: connections of one virtual machine share its memory, and a candidate of a live upgrade has mapped
//! it before it takes it over.
//!
//! Only files that live in memory are mapped. A page of any other file may have to come from a disk, a
//! server or (FUSE) the frontend itself, and the worker that touches it would wait for as long as
//! they like, with all its other devices.
//!
//! UNSAFETY: the mapping must cover exactly the file's bytes that were checked, be known to
//! [`sigbus`](super::sigbus) before anybody reads it, and be unmapped once, when nobody can.
#![expect(unsafe_code, reason = "mmap, munmap, mincore and madvise")]

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::{SFlag, fstat};

use super::sigbus;

const PAGE_BYTES: u64 = 4096;
/// Bytes of a mapping that are looked at at once for pages to enter: a multiple of every page.
const LOOK_BYTES: usize = 1 << 30;
/// `TMPFS_MAGIC`, `include/uapi/linux/magic.h`; also of a memfd.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `HUGETLBFS_MAGIC`; also of a memfd with huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What is mapped: device and inode of the file (of one that is mapped they are nobody else's), from where, and
/// how many bytes.
type Key = (u64, u64, i64, NonZeroUsize);

/// Every mapping that there is.
static MAPPINGS: LazyLock<Mutex<HashMap<Key, Weak<Mapping>>>> = LazyLock::new(Mutex::default);

fn mappings() -> MutexGuard<'static, HashMap<Key, Weak<Mapping>>> {
    MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mapped range of a shared file; unmapped when it drops.
#[derive(Debug)]
pub(super) struct Mapping {
    key: Key,
    address: NonNull<u8>,
    bytes: usize,
    guard: sigbus::Guard,
    /// Its pages were entered.
    prefaulted: AtomicBool,
}

// SAFETY: the address is only ever read, and unmapped once, on drop.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes at `offset` of a file; where they begin in this process. Offsets and
    /// lengths need not be whole pages (the mapping is).
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        bytes: u64,
    ) -> io::Result<(Arc<Self>, NonNull<u8>)> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let stat = fstat(fd)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(invalid(
                "its descriptor is not a regular file or memfd".into(),
            ));
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > length) {
            return Err(invalid(format!("its file has only {length} bytes")));
        }
        let unit = page_unit(fd, stat.st_blksize)?;
        let start = offset - offset % unit;
        let lead = offset - start;
        let whole = (lead + bytes).next_multiple_of(unit);
        let size = usize::try_from(whole).map_err(|_| invalid("it is too large".into()))?;
        let size = NonZeroUsize::new(size).ok_or_else(|| invalid("it is empty".into()))?;
        let lead = usize::try_from(lead).map_err(|_| invalid("it is too large".into()))?;
        let start = i64::try_from(start).map_err(|_| invalid("its offset is too large".into()))?;
        let key = (stat.st_dev, stat.st_ino, start, size);
        let known = mappings().get(&key).and_then(Weak::upgrade);
        let mapping = match known.filter(|known| !known.is_lost()) {
            Some(known) => {
                may_write(fd, key)?;
                known
            }
            None => Arc::new(Self::map(fd, key)?),
        };
        mappings().insert(key, Arc::downgrade(&mapping));
        // SAFETY: lead is less than the mapping's length.
        let host = unsafe { mapping.address.add(lead) };
        Ok((mapping, host))
    }

    fn map(fd: BorrowedFd<'_>, key: Key) -> io::Result<Self> {
        let (.., start, size) = key;
        let address = map_shared(fd, start, size)?;
        let guard = match sigbus::guard(address, size.get()) {
            Ok(guard) => guard,
            Err(error) => {
                // SAFETY: mapped above, and nobody knows it yet.
                let _ = unsafe { munmap(address.cast(), size.get()) };
                return Err(error);
            }
        };
        Ok(Self {
            key,
            address,
            bytes: size.get(),
            guard,
            prefaulted: AtomicBool::new(false),
        })
    }

    /// Enters the pages that the file has into this process's page table, once; makes none. Asks for `mincore` and
    /// `madvise`: to be called before the process locks itself in.
    ///
    /// A frontend decides how large its files are and where they have pages; so no more than `until` is spent on it, and
    /// what is not entered then is when it is touched.
    ///
    /// # Errors
    /// What these fail with; some pages may be entered then.
    pub(super) fn prefault(&self, until: Instant) -> io::Result<()> {
        if self.prefaulted.load(Ordering::Relaxed) {
            return Ok(());
        }
        let page = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
        let mut there = vec![0u8; LOOK_BYTES.min(self.bytes).div_ceil(page)];
        for from in (0..self.bytes).step_by(LOOK_BYTES) {
            let bytes = LOOK_BYTES.min(self.bytes - from);
            // SAFETY: the range lies inside the mapping, which is live.
            let at = unsafe { self.address.add(from) };
            // SAFETY: as above, and there is a byte for each of its pages.
            let known = unsafe { libc::mincore(at.as_ptr().cast(), bytes, there.as_mut_ptr()) };
            Errno::result(known)?;
            let there = there.get(..bytes.div_ceil(page)).unwrap_or_default();
            let mut page_of_run = 0;
            for run in there.chunk_by(|a, b| a & 1 == b & 1) {
                if Instant::now() >= until {
                    return Ok(());
                }
                if run.first().is_some_and(|first| first & 1 != 0) {
                    // SAFETY: the run lies inside the range; entering pages changes nothing in them.
                    let entered = unsafe {
                        let at = at.add(page_of_run * page);
                        let bytes = run.len() * page;
                        libc::madvise(at.as_ptr().cast(), bytes, libc::MADV_POPULATE_READ)
                    };
                    Errno::result(entered)?;
                }
                page_of_run += run.len();
            }
        }
        self.prefaulted.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether pages of it went away.
    pub(super) fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut mappings = mappings();
        // Unless another has taken its place.
        if mappings
            .get(&self.key)
            .is_some_and(|of| of.strong_count() == 0)
        {
            mappings.remove(&self.key);
        }
        drop(mappings);
        // The handler must not put pages back where another mapping may come to lie.
        self.guard.release();
        // SAFETY: mapped by `new`; the value ends here, and with it everybody who knows it.
        let result = unsafe { munmap(self.address.cast(), self.bytes) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}

/// A fresh shared mapping, to be read and written.
fn map_shared(fd: BorrowedFd<'_>, start: i64, size: NonZeroUsize) -> io::Result<NonNull<u8>> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
    // SAFETY: at an address of the kernel's choice.
    let address = unsafe { mmap(None, size, protection, flags, fd, start) }?;
    Ok(address.cast())
}

/// Whether this descriptor, too, may be mapped to be written: that somebody else's is says nothing of one that was
/// opened for reading only, or sealed against writers since.
///
/// # Errors
/// As mapping it.
fn may_write(fd: BorrowedFd<'_>, key: Key) -> io::Result<()> {
    let (.., start, size) = key;
    let address = map_shared(fd, start, size)?;
    // SAFETY: mapped just now, touched by nobody, and known to nobody.
    unsafe { munmap(address.cast(), size.get()) }?;
    Ok(())
}

/// What offsets and lengths of a mapping must be multiples of.
///
/// # Errors
/// InvalidInput for a file that does not live in memory.
fn page_unit(fd: BorrowedFd<'_>, block_bytes: i64) -> io::Result<u64> {
    let kind = nix::sys::statfs::fstatfs(fd)?.filesystem_type().0;
    match (kind, u64::try_from(block_bytes)) {
        (TMPFS_MAGIC, _) => Ok(PAGE_BYTES),
        (HUGETLBFS_MAGIC, Ok(huge)) if huge.is_power_of_two() => Ok(huge.max(PAGE_BYTES)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "its file does not live in memory (file system type {kind:#x}): share guest memory \
                 as a memfd, or a file on tmpfs or hugetlbfs"
            ),
        )),
    }
}
