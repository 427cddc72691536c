//! Secret memory: pages that hold key bytes, and the descriptor by which one process hands
//! such a page to another.
//!
//! The pages come from `memfd_secret` (Linux 5.14): they are out of the kernel's direct map,
//! locked, never dumped, and neither `/proc/<pid>/mem` nor `ptrace` nor io_uring can read them;
//! the kernel zeroes them when they are freed. Where that system call is missing or switched off
//! (`secretmem.enable=0`) a sealed memfd takes its place, locked and left out of core dumps, and
//! one warning per process says so.
//!
//! System calls, for those who filter them: [`SecretMemory::from_fd`] makes `fstat`, `fstatfs`
//! and `mmap` (with a page of the fallback also `fcntl`, `mlock` and `madvise`), dropping
//! makes `munmap` and `close`.
//!
//! UNSAFETY: the module maps descriptors and hands out slices of the mapping. It must keep the
//! mapping alive for as long as a slice, never hand out two mutable slices at once, and never map
//! a file that can shrink under it (SIGBUS).
#![expect(unsafe_code, reason = "memfd_secret and its mapping")]

mod arena;

use std::io;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Once;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, munmap};
use zeroize::Zeroize;

pub use arena::{ArenaFull, SLOT_BYTES, SecretArena, Slot};

/// Page size of the only architecture supported, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// `SECRETMEM_MAGIC`, `include/uapi/linux/magic.h`.
const SECRETMEM_MAGIC: u64 = 0x5345_434d;

/// Seals of a fallback page: its size can't change, nor the seals.
const FIXED_SIZE: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);

/// Mapped secret memory with the descriptor behind it. Wiped when it drops, for every process
/// that maps it; [`SecretMemory::into_fd`] is the way to part with it unwiped.
pub struct SecretMemory {
    address: NonNull<u8>,
    length_bytes: usize,
    fd: ManuallyDrop<OwnedFd>,
}

// SAFETY: the mapping belongs to this value alone within the process; access to the bytes goes
// through `&self` and `&mut self` as with a Vec.
unsafe impl Send for SecretMemory {}
// SAFETY: as above; `&self` only reads.
unsafe impl Sync for SecretMemory {}

impl std::fmt::Debug for SecretMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretMemory")
            .field("length_bytes", &self.length_bytes)
            .finish_non_exhaustive()
    }
}

impl AsFd for SecretMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl SecretMemory {
    /// `length_bytes` zeroed bytes of secret memory (whole pages underneath).
    ///
    /// # Errors
    /// EINVAL for a length of zero; ENOMEM or EAGAIN when the limit on locked memory
    /// (`RLIMIT_MEMLOCK`) is spent; else what making or mapping the memory fails with.
    pub fn new(length_bytes: usize) -> io::Result<Self> {
        let size = page_multiple(length_bytes)?;
        let (fd, fallback) = match memfd_secret() {
            Ok(fd) => (fd, false),
            Err(reason) => (fallback_memfd(&reason)?, true),
        };
        nix::unistd::ftruncate(
            &fd,
            i64::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?,
        )?;
        if fallback {
            fcntl(&fd, FcntlArg::F_ADD_SEALS(FIXED_SIZE))?;
        }
        Self::map(fd, length_bytes, fallback)
    }

    /// Maps secret memory received from another process.
    ///
    /// # Errors
    /// InvalidInput if the descriptor is not secret memory (or a sealed memfd) of exactly the
    /// pages that `length_bytes` needs; else what `mmap` or `mlock` fails with. The descriptor is
    /// closed.
    pub fn from_fd(fd: OwnedFd, length_bytes: usize) -> io::Result<Self> {
        let size = page_multiple(length_bytes)?;
        let given = nix::sys::stat::fstat(&fd)?.st_size;
        if u64::try_from(given).ok() != Some(size as u64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("secret memory of {size} bytes expected, the descriptor has {given}"),
            ));
        }
        let secret = is_secretmem(&fd)?;
        if !secret && !size_is_sealed(&fd) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is neither secret memory nor a memfd with its size sealed",
            ));
        }
        Self::map(fd, length_bytes, !secret)
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the mapping covers length_bytes and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.length_bytes) }
    }

    /// The bytes, to be changed.
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        // SAFETY: as in as_bytes; &mut self makes this the only slice in this process.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.length_bytes) }
    }

    /// Unmaps the memory and gives the descriptor, its bytes unwiped: to be sent to the process
    /// that shall have them.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: the value is never used again (ManuallyDrop), so that the mapping has no user
        // and the descriptor is taken once.
        unsafe {
            this.unmap();
            ManuallyDrop::take(&mut this.fd)
        }
    }

    fn map(fd: OwnedFd, length_bytes: usize, lock: bool) -> io::Result<Self> {
        let size = page_multiple(length_bytes)?;
        let pages = NonZeroUsize::new(size).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; the file has this size and
        // can't shrink (secretmem refuses a second truncation, the fallback is sealed).
        let address = unsafe {
            mmap(
                None,
                pages,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &fd,
                0,
            )?
        };
        let memory = Self {
            address: address.cast(),
            length_bytes,
            fd: ManuallyDrop::new(fd),
        };
        if lock {
            // SAFETY: both calls change only how the kernel treats these pages.
            let locked = unsafe {
                mlock(address, size)
                    .and_then(|()| madvise(address, size, MmapAdvise::MADV_DONTDUMP))
            };
            if let Err(error) = locked {
                drop(memory.into_fd());
                return Err(error.into());
            }
        }
        Ok(memory)
    }

    /// # Safety
    /// No slice of the mapping is in use and none is taken afterwards.
    unsafe fn unmap(&mut self) {
        let size = self.length_bytes.next_multiple_of(PAGE_BYTES);
        // SAFETY: address and size are those of our own mapping; the caller gives it up.
        let result = unsafe { munmap(self.address.cast(), size) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.address
    }
}

impl Drop for SecretMemory {
    fn drop(&mut self) {
        self.as_mut_bytes().zeroize();
        // SAFETY: the value ends here: the mapping has no user, the descriptor is dropped once.
        unsafe {
            self.unmap();
            ManuallyDrop::drop(&mut self.fd);
        }
    }
}

fn page_multiple(length_bytes: usize) -> io::Result<usize> {
    if length_bytes == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "secret memory of no bytes",
        ));
    }
    length_bytes
        .checked_next_multiple_of(PAGE_BYTES)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn memfd_secret() -> io::Result<OwnedFd> {
    // SAFETY: the system call takes flags only and returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    match RawFd::try_from(fd) {
        // SAFETY: the kernel just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn fallback_memfd(reason: &io::Error) -> io::Result<OwnedFd> {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        tracing::warn!(
            "memfd_secret is not available ({reason}): keys live in locked memory that a \
             privileged process can read; boot with secretmem.enable=1 to change that"
        );
    });
    Ok(memfd_create(
        "secret",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?)
}

fn is_secretmem(fd: &OwnedFd) -> io::Result<bool> {
    let kind = nix::sys::statfs::fstatfs(fd)?.filesystem_type().0;
    Ok(u64::try_from(kind).ok() == Some(SECRETMEM_MAGIC))
}

fn size_is_sealed(fd: &OwnedFd) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS)
        .is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn fallback(length_bytes: usize) -> SecretMemory {
        let fd = fallback_memfd(&io::Error::from_raw_os_error(libc::ENOSYS)).expect("memfd");
        let size = page_multiple(length_bytes).expect("length");
        nix::unistd::ftruncate(&fd, i64::try_from(size).expect("small")).expect("truncate");
        fcntl(&fd, FcntlArg::F_ADD_SEALS(FIXED_SIZE)).expect("seal");
        SecretMemory::map(fd, length_bytes, true).expect("map")
    }

    #[test]
    fn bytes_travel_with_the_descriptor() {
        let makers: [fn() -> SecretMemory; 2] =
            [|| SecretMemory::new(64).expect("secret"), || fallback(64)];
        for make in makers {
            let mut memory = make();
            assert_eq!(memory.as_bytes(), [0; 64]);
            memory.as_mut_bytes().fill(0xa5);
            let fd = memory.into_fd();
            let received = SecretMemory::from_fd(fd, 64).expect("map");
            assert_eq!(received.as_bytes(), [0xa5; 64]);
        }
    }

    #[test]
    fn dropping_wipes_it_for_everyone() {
        let makers: [fn() -> SecretMemory; 2] =
            [|| SecretMemory::new(64).expect("secret"), || fallback(64)];
        for make in makers {
            let mut memory = make();
            memory.as_mut_bytes().fill(0xa5);
            let fd = memory.as_fd().try_clone_to_owned().expect("dup");
            let other = SecretMemory::from_fd(fd, 64).expect("map");
            assert_eq!(other.as_bytes(), [0xa5; 64]);
            drop(memory);
            assert_eq!(other.as_bytes(), [0; 64]);
        }
    }

    #[test]
    fn what_is_not_secret_memory_of_that_size_is_refused() {
        let memory = SecretMemory::new(64).expect("secret");
        let fd = memory.as_fd().try_clone_to_owned().expect("dup");
        assert!(SecretMemory::from_fd(fd, PAGE_BYTES + 1).is_err());
        // A memfd that its sender could still shrink under us.
        let unsealed = memfd_create("unsealed", MFdFlags::MFD_ALLOW_SEALING).expect("memfd");
        nix::unistd::ftruncate(&unsealed, 4096).expect("truncate");
        assert!(SecretMemory::from_fd(unsealed, 64).is_err());
        let null = File::open("/dev/null").expect("open");
        assert!(SecretMemory::from_fd(null.into(), 64).is_err());
        assert!(SecretMemory::new(0).is_err());
        assert!(SecretMemory::new(usize::MAX).is_err());
    }

    #[test]
    fn proc_mem_can_not_read_it() {
        if let Err(reason) = memfd_secret() {
            println!("skipped: proc_mem_can_not_read_it: no memfd_secret: {reason}");
            return;
        }
        let mut memory = SecretMemory::new(64).expect("secret");
        memory.as_mut_bytes().fill(0xa5);
        let ordinary = [0xa5u8; 64];
        let proc_mem = File::open("/proc/self/mem").expect("open");
        let mut copy = [0u8; 64];
        let at = |p: *const u8| p.addr() as u64;
        proc_mem
            .read_exact_at(&mut copy, at(ordinary.as_ptr()))
            .expect("ordinary memory is readable");
        assert_eq!(copy, ordinary);
        assert!(
            proc_mem
                .read_exact_at(&mut copy, at(memory.as_bytes().as_ptr()))
                .is_err()
        );
    }

    #[test]
    fn debug_shows_no_bytes() {
        let mut memory = SecretMemory::new(64).expect("secret");
        memory.as_mut_bytes().fill(0xa5);
        let text = format!("{memory:?}");
        assert!(!text.contains("a5") && !text.contains("165"), "{text}");
    }
}
