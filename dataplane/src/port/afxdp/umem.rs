//! The memory that a socket's frames lie in (its UMEM): the data plane's own, in a memory file, so that a process that
//! comes after this one finds the frames that are on their way.
//!
//! The first [`RECEIVING`] frames are for what comes, the other [`SENDING`] for what goes. Behind them, in pages that
//! the kernel is not given, stands who has each of these.
//!
//! UNSAFETY: the mapping is as long as the frames and that table. A frame is the kernel's or ours; its bytes are only
//! reached while it is ours, and only by `&mut self` for writing. The file's length is sealed.
#![expect(unsafe_code, reason = "memory that is shared with the kernel")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::memfd_create;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::net::parse::{ETHERNET_BYTES, MOST_TAGS};
use crate::vhost_user::inflight_flags;

/// Frames for what comes.
pub(super) const RECEIVING: u32 = 512;
/// Frames for what goes.
pub(super) const SENDING: u32 = 1024;
/// All of them.
pub(super) const FRAMES: u32 = RECEIVING + SENDING;
/// Room that the kernel keeps in front of what comes (`XDP_PACKET_HEADROOM`).
const HEADROOM: usize = 256;
/// Sizes that a frame can have: the kernel takes powers of two up to a page.
const SIZES: [usize; 2] = [2048, 4096];
/// Bytes of the table, in whole pages.
const TABLE_BYTES: usize = (FRAMES as usize).next_multiple_of(4096);

/// Longest IP packet that a frame has room for, in its largest size: a NIC's MTU on such a port at most.
pub const MOST_MTU: usize = SIZES[1] - HEADROOM - ETHERNET_BYTES - 4 * MOST_TAGS;

const OURS: u8 = 0;
const THE_KERNELS: u8 = 1;

/// The memory.
#[derive(Debug)]
pub(super) struct Umem {
    file: OwnedFd,
    base: NonNull<u8>,
    frame_bytes: usize,
}

// SAFETY: whoever has it is the only one on this side, on whichever thread; nothing in it belongs to a thread.
unsafe impl Send for Umem {}

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: our own mapping; what the kernel uses of the pages it holds itself.
        let result = unsafe { munmap(self.base.cast(), self.mapped_bytes()) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}

impl Umem {
    /// Memory for frames of packets of `mtu` bytes; all are ours.
    ///
    /// # Errors
    /// A longer MTU than [`MOST_MTU`], or no memory.
    pub(super) fn new(mtu: u16) -> io::Result<Self> {
        let packet = HEADROOM + ETHERNET_BYTES + 4 * MOST_TAGS + usize::from(mtu);
        let size = SIZES.into_iter().find(|bytes| packet <= *bytes);
        let frame_bytes = size.ok_or_else(|| {
            io::Error::other(format!(
                "an MTU of {mtu} bytes is too long for an AF_XDP port: at most {MOST_MTU}, or take a TAP"
            ))
        })?;
        let file = memfd_create("umem", inflight_flags())?;
        let length = i64::try_from(bytes_of(frame_bytes)).map_err(io::Error::other)?;
        nix::unistd::ftruncate(&file, length)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Self::map(file, frame_bytes)
    }

    /// The memory of an earlier process, from its file.
    ///
    /// # Errors
    /// It is no such file, or can't be mapped.
    pub(super) fn found(file: OwnedFd) -> io::Result<Self> {
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS)?;
        let sealed = SealFlag::F_SEAL_SHRINK.bits() | SealFlag::F_SEAL_GROW.bits();
        let bytes = u64::try_from(nix::sys::stat::fstat(&file)?.st_size).unwrap_or(0);
        let size = SIZES
            .into_iter()
            .find(|size| bytes_of(*size) as u64 == bytes);
        match size {
            Some(frame_bytes) if seals & sealed == sealed => Self::map(file, frame_bytes),
            _ => Err(io::Error::other("the stored memory of a port is none")),
        }
    }

    fn map(file: OwnedFd, frame_bytes: usize) -> io::Result<Self> {
        let bytes = NonZeroUsize::new(bytes_of(frame_bytes))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file whose length is sealed.
        let base = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(Self {
            file,
            base: base.cast(),
            frame_bytes,
        })
    }

    fn mapped_bytes(&self) -> usize {
        bytes_of(self.frame_bytes)
    }

    /// Its file, to be stored.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// As the kernel is to register it: the frames, and not the table.
    pub(super) fn registration(&self) -> libc::xdp_umem_reg {
        let mut registration = libc::xdp_umem_reg {
            addr: self.base.as_ptr().addr() as u64,
            len: FRAMES as u64 * self.frame_bytes as u64,
            chunk_size: 0,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        // 2048 or 4096.
        registration.chunk_size = u32::try_from(self.frame_bytes).unwrap_or(0);
        registration
    }

    /// Bytes of a frame.
    pub(super) fn frame_bytes(&self) -> usize {
        self.frame_bytes
    }

    /// Where a frame begins, as the kernel counts.
    pub(super) fn address(&self, frame: u32) -> u64 {
        u64::from(frame) * self.frame_bytes as u64
    }

    /// The frame that an address lies in, and where in it.
    pub(super) fn place(&self, address: u64) -> Option<(u32, usize)> {
        let size = self.frame_bytes as u64;
        let frame = u32::try_from(address / size).ok()?;
        let at = usize::try_from(address % size).ok()?;
        (frame < FRAMES).then_some((frame, at))
    }

    fn owner(&self, frame: u32) -> Option<&AtomicU8> {
        let table = FRAMES as usize * self.frame_bytes;
        // SAFETY: a byte of the table, which the mapping has for each frame and which lives as long.
        (frame < FRAMES).then(|| unsafe { self.base.add(table + frame as usize).cast().as_ref() })
    }

    /// Whether a frame is the kernel's.
    pub(super) fn is_kernels(&self, frame: u32) -> bool {
        self.owner(frame)
            .is_some_and(|owner| owner.load(Ordering::Relaxed) != OURS)
    }

    /// Notes that a frame is now the kernel's.
    #[inline]
    pub(super) fn give(&mut self, frame: u32) {
        if let Some(owner) = self.owner(frame) {
            owner.store(THE_KERNELS, Ordering::Relaxed);
        }
    }

    /// Notes that the kernel has given a frame back; false if it had not got it, or there is none.
    #[inline]
    pub(super) fn take(&mut self, frame: u32) -> bool {
        let is_kernels = self.is_kernels(frame);
        if let Some(owner) = self.owner(frame) {
            owner.store(OURS, Ordering::Relaxed);
        }
        is_kernels
    }

    /// Bytes of a frame that is ours; none if it isn't, or has fewer.
    #[inline]
    pub(super) fn bytes(&self, frame: u32, at: usize, bytes: usize) -> Option<&[u8]> {
        let end = at.checked_add(bytes)?;
        let fits = frame < FRAMES && end <= self.frame_bytes && !self.is_kernels(frame);
        // SAFETY: within a frame that nobody else touches while it is ours; the file began as zeroes.
        fits.then(|| unsafe {
            let start = self.base.add(frame as usize * self.frame_bytes + at);
            std::slice::from_raw_parts(start.as_ptr(), bytes)
        })
    }

    /// All bytes of a frame that is ours.
    #[inline]
    pub(super) fn bytes_mut(&mut self, frame: u32) -> Option<&mut [u8]> {
        let fits = frame < FRAMES && !self.is_kernels(frame);
        // SAFETY: as above, and nobody else on this side either.
        fits.then(|| unsafe {
            let start = self.base.add(frame as usize * self.frame_bytes);
            std::slice::from_raw_parts_mut(start.as_ptr(), self.frame_bytes)
        })
    }
}

fn bytes_of(frame_bytes: usize) -> usize {
    FRAMES as usize * frame_bytes + TABLE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_fit_the_mtu_or_say_why_not() {
        assert_eq!(Umem::new(1500).expect("mapped").frame_bytes(), 2048);
        let most = u16::try_from(MOST_MTU).expect("small");
        assert_eq!(Umem::new(most).expect("mapped").frame_bytes(), 4096);
        let refused = Umem::new(most + 1).map(drop).expect_err("too long");
        assert!(refused.to_string().contains("at most"), "{refused}");
    }

    #[test]
    fn a_frame_is_ours_or_the_kernels_and_nobody_reaches_anothers() {
        let mut umem = Umem::new(1500).expect("mapped");
        umem.bytes_mut(3).expect("ours").fill(7);
        umem.give(3);
        assert!(umem.bytes(3, 0, 1).is_none() && umem.bytes_mut(3).is_none());
        assert!(umem.take(3));
        assert!(!umem.take(3), "it was not given");
        assert_eq!(umem.bytes(3, 2047, 1), Some(&[7][..]));
        assert!(umem.bytes(3, 2047, 2).is_none() && umem.bytes(3, usize::MAX, 2).is_none());
        assert!(umem.bytes(FRAMES, 0, 1).is_none() && !umem.take(FRAMES));
        assert_eq!(umem.place(umem.address(3) + 5), Some((3, 5)));
        assert_eq!(umem.place(umem.address(FRAMES)), None);
        assert_eq!(umem.place(u64::MAX), None);
    }

    #[test]
    fn the_next_process_finds_the_frames_and_whose_they_are() {
        let mut umem = Umem::new(1500).expect("mapped");
        umem.bytes_mut(9).expect("ours").fill(5);
        umem.give(8);
        let file = umem.file().try_clone_to_owned().expect("cloned");
        drop(umem);
        let found = Umem::found(file).expect("found");
        assert_eq!(found.bytes(9, 0, 2), Some(&[5, 5][..]));
        assert!(found.is_kernels(8) && !found.is_kernels(7));
        let other = memfd_create("other", inflight_flags()).expect("made");
        assert!(Umem::found(other).is_err());
    }
}
