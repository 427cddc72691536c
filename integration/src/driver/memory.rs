//! Guest memory: memfds mapped here and, through the memory table, by the backend.
//!
//! UNSAFETY: the mappings are shared with another process that writes at any time, so no
//! reference to their bytes may exist: every access is a volatile copy or an atomic, after
//! [`Region::offset`] has checked its range against the mapping, which lives as long as the region.
//! A test that shrinks a region's file must not touch that region through here afterwards.
#![expect(
    unsafe_code,
    reason = "mapping and accessing memory shared with the backend"
)]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

use crate::frontend::message::RegionEntry;
use crate::frontend::{Frontend, FrontendError};

/// A range outside guest memory: a mistake of the test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest memory has no {len} bytes at {guest_addr:#x}")]
pub struct OutOfMemory {
    /// Guest-physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub len: usize,
}

/// One mapped memfd.
#[derive(Debug)]
pub struct Region {
    entry: RegionEntry,
    file: OwnedFd,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is to a mapping that no thread owns; accesses are volatile or atomic.
unsafe impl Send for Region {}
// SAFETY: as above; another process accesses the same bytes all the time.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned and was given; nothing borrows from it.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

impl Region {
    fn new(entry: RegionEntry) -> io::Result<Self> {
        let file = memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC)?;
        let len = usize::try_from(entry.size_bytes).map_err(io::Error::other)?;
        let end = entry.mmap_offset + entry.size_bytes;
        ftruncate(&file, i64::try_from(end).map_err(io::Error::other)?)?;
        let length = NonZeroUsize::new(len).ok_or_else(|| io::Error::other("an empty region"))?;
        let offset = i64::try_from(entry.mmap_offset).map_err(io::Error::other)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &file,
                offset,
            )
        }?;
        Ok(Self {
            entry,
            file,
            base: base.cast(),
            len,
        })
    }

    fn offset(&self, guest_addr: u64, len: usize) -> Option<usize> {
        let offset = usize::try_from(guest_addr.checked_sub(self.entry.guest_addr)?).ok()?;
        (offset.checked_add(len)? <= self.len).then_some(offset)
    }

    /// Its line of the memory table.
    #[must_use]
    pub fn entry(&self) -> RegionEntry {
        self.entry
    }

    /// Its file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The memory of a guest: some regions with holes between them.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Memory with a region for each `(guest address, bytes, offset in the file)`. User addresses
    /// are made up, different from the guest's, and not adjacent where guest addresses are.
    ///
    /// # Errors
    /// What making or mapping a memfd fails with.
    pub fn new(layout: &[(u64, u64, u64)]) -> io::Result<Self> {
        let entries = layout.iter().zip(0u64..);
        let entries = entries.map(|(&(guest_addr, size_bytes, mmap_offset), i)| RegionEntry {
            guest_addr,
            size_bytes,
            user_addr: 0x7e00_0000_0000 + i * 0x10_0000_0000,
            mmap_offset,
        });
        Self::with_regions(&entries.collect::<Vec<_>>())
    }

    /// Memory with these regions, a new file for each.
    ///
    /// # Errors
    /// What making or mapping a memfd fails with.
    pub fn with_regions(entries: &[RegionEntry]) -> io::Result<Self> {
        let regions = entries.iter().copied().map(Region::new);
        let regions = regions.collect::<io::Result<_>>()?;
        Ok(Self { regions })
    }

    /// The regions in order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// SET_MEM_TABLE with all of it.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn share_with(&self, frontend: &Frontend) -> Result<(), FrontendError> {
        let entries: Vec<_> = self.regions.iter().map(|r| r.entry()).collect();
        let fds: Vec<_> = self.regions.iter().map(|r| r.file()).collect();
        frontend.set_memory_table(&entries, &fds)
    }

    fn locate(&self, guest_addr: u64, len: usize) -> Result<NonNull<u8>, OutOfMemory> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = region.offset(guest_addr, len)?;
                // SAFETY: offset + len lies within the mapping, which the region keeps.
                Some(unsafe { region.base.add(offset) })
            })
            .ok_or(OutOfMemory { guest_addr, len })
    }

    /// The frontend's address for a guest address.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn user_addr(&self, guest_addr: u64) -> Result<u64, OutOfMemory> {
        self.regions
            .iter()
            .find(|region| region.offset(guest_addr, 1).is_some())
            .map(|region| guest_addr - region.entry.guest_addr + region.entry.user_addr)
            .ok_or(OutOfMemory { guest_addr, len: 1 })
    }

    /// Copies bytes into guest memory.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn write(&self, guest_addr: u64, bytes: &[u8]) -> Result<(), OutOfMemory> {
        let to = self.locate(guest_addr, bytes.len())?;
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: `locate` checked the whole range.
            unsafe { to.add(i).write_volatile(*byte) };
        }
        Ok(())
    }

    /// Copies bytes out of guest memory.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn read(&self, guest_addr: u64, len: usize) -> Result<Vec<u8>, OutOfMemory> {
        let from = self.locate(guest_addr, len)?;
        // SAFETY: `locate` checked the whole range.
        Ok((0..len)
            .map(|i| unsafe { from.add(i).read_volatile() })
            .collect())
    }

    /// Fills with one byte.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn fill(&self, guest_addr: u64, len: usize, byte: u8) -> Result<(), OutOfMemory> {
        self.write(guest_addr, &vec![byte; len])
    }

    /// Where a field of `bytes` lies that is aligned to its size.
    fn aligned(&self, guest_addr: u64, bytes: usize) -> Result<NonNull<u8>, OutOfMemory> {
        let at = self.locate(guest_addr, bytes)?;
        if !at.as_ptr().addr().is_multiple_of(bytes) {
            let len = bytes;
            return Err(OutOfMemory { guest_addr, len });
        }
        Ok(at)
    }

    fn atomic(&self, guest_addr: u64) -> Result<&AtomicU16, OutOfMemory> {
        let at = self.aligned(guest_addr, 2)?;
        // SAFETY: in range, aligned, and atomics may be shared with another process; the lifetime
        // is that of `self`, which keeps the mapping.
        Ok(unsafe { AtomicU16::from_ptr(at.as_ptr().cast()) })
    }

    /// Replaces a 32-bit field in one piece; what it had.
    ///
    /// # Errors
    /// [`OutOfMemory`], also for an address that is not aligned.
    pub fn swap_u32(&self, guest_addr: u64, value: u32) -> Result<u32, OutOfMemory> {
        let at = self.aligned(guest_addr, 4)?;
        // SAFETY: as in `atomic`.
        let field = unsafe { AtomicU32::from_ptr(at.as_ptr().cast()) };
        Ok(field.swap(value, Ordering::SeqCst))
    }

    /// Replaces a 64-bit field in one piece; what it had.
    ///
    /// # Errors
    /// [`OutOfMemory`], also for an address that is not aligned.
    pub fn swap_u64(&self, guest_addr: u64, value: u64) -> Result<u64, OutOfMemory> {
        let at = self.aligned(guest_addr, 8)?;
        // SAFETY: as in `atomic`.
        let field = unsafe { AtomicU64::from_ptr(at.as_ptr().cast()) };
        Ok(field.swap(value, Ordering::SeqCst))
    }

    /// A 16-bit field that the backend writes; what it wrote before is seen after this.
    ///
    /// # Errors
    /// [`OutOfMemory`], also for an odd address.
    pub fn load_u16(&self, guest_addr: u64) -> Result<u16, OutOfMemory> {
        Ok(self.atomic(guest_addr)?.load(Ordering::SeqCst))
    }

    /// A 16-bit field that the backend reads; what was written before is seen with it.
    ///
    /// # Errors
    /// [`OutOfMemory`], also for an odd address.
    pub fn store_u16(&self, guest_addr: u64, value: u16) -> Result<(), OutOfMemory> {
        self.atomic(guest_addr)?.store(value, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_and_bytes_come_back() {
        let memory = GuestMemory::new(&[(0x1000, 0x2000, 0), (0x3000, 0x1000, 0x1000)])
            .expect("two regions");
        memory.write(0x1fff, &[1, 2, 3]).expect("inside");
        assert_eq!(memory.read(0x1ffe, 4).expect("inside"), [0, 1, 2, 3]);
        assert!(memory.read(0x2fff, 2).is_err(), "straddles two regions");
        assert!(memory.write(0xfff, &[0]).is_err());
        assert!(memory.read(u64::MAX, 2).is_err());
        memory.store_u16(0x3002, 0x1234).expect("aligned");
        assert_eq!(memory.load_u16(0x3002).expect("aligned"), 0x1234);
        assert!(memory.store_u16(0x3001, 1).is_err());
        memory
            .swap_u64(0x3008, 0x1122_3344_5566_7788)
            .expect("aligned");
        assert_eq!(memory.swap_u32(0x300c, 1), Ok(0x1122_3344));
        assert!(memory.swap_u64(0x300c, 1).is_err() && memory.swap_u32(0x3002, 1).is_err());
    }
}
