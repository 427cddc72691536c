//! A file whose bytes are memory (tmpfs, a memfd): read and written by the worker itself, with a system call.
//!
//! No such file takes `RWF_NOWAIT`, so io_uring would hand each of its transfers to a thread of the kernel's,
//! which shares the worker's CPU or another one's: dearer than the copy that is all there is to do, and
//! milliseconds late where that CPU polls. Like guest memory (which such a file is, too) it makes a worker wait
//! only where the machine swaps or has no memory left.
//!
//! UNSAFETY: the kernel reads or writes the ranges that a call names, while it lasts. They are those of a
//! transfer, which is borrowed for as long, and nothing refers to their bytes.
#![expect(unsafe_code, reason = "preadv and pwritev on guest memory and staging")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use super::uring::UringStorage;
use super::{Action, Begin, Buffer, Done, FileSpec, Limits, Storage, Transfer};
use crate::memory::Piece;
use crate::worker::ring::Ring;

/// Segments of one call: more than the requests of most drivers have.
const SEGMENTS: usize = 32;

/// A worker's way to it.
#[derive(Debug)]
pub(super) struct InMemoryStorage {
    fd: Arc<OwnedFd>,
    /// For what is rare.
    ring: UringStorage,
}

impl InMemoryStorage {
    pub(super) fn open(spec: &FileSpec, ring: &mut Ring) -> io::Result<Self> {
        Ok(Self {
            fd: spec.shared_fd(),
            ring: UringStorage::open(spec, ring)?,
        })
    }

    /// Reads or writes all of a transfer, or as much as the file has; none: that is not what it is.
    #[inline]
    fn transfer(&self, transfer: &Transfer) -> Option<Done> {
        let write = match transfer.action {
            Action::Read => false,
            // Nothing is more stable than memory here.
            Action::Write { .. } => true,
            Action::Flush => return Some(Ok(0)),
            Action::Discard | Action::Zero { .. } => return None,
        };
        let offset = transfer.offset_bytes;
        match &transfer.buffer {
            Buffer::None => None,
            Buffer::Staging(chunk) => {
                let bytes = usize::try_from(transfer.bytes).ok()?;
                let fits = transfer.bytes <= u64::from(chunk.bytes());
                fits.then(|| self.call(write, offset, &[segment(chunk.at(), bytes)]))
            }
            Buffer::Guest(buffer) => Some(self.pieces(write, offset, buffer.pieces())),
        }
    }

    /// Up to the first call that does less than it was asked for.
    fn pieces(&self, write: bool, offset: u64, pieces: &[Piece]) -> Done {
        let mut done = 0;
        for some in pieces.chunks(SEGMENTS) {
            let mut segments = [segment(NonNull::dangling(), 0); SEGMENTS];
            let mut asked = 0;
            for (to, piece) in segments.iter_mut().zip(some) {
                *to = segment(piece.host(), piece.bytes() as usize);
                asked += u64::from(piece.bytes());
            }
            let segments = segments.get(..some.len()).unwrap_or_default();
            match self.call(write, offset + done, segments) {
                Ok(bytes) if bytes == asked => done += bytes,
                Ok(bytes) => return Ok(done + bytes),
                Err(errno) => return if done == 0 { Err(errno) } else { Ok(done) },
            }
        }
        Ok(done)
    }

    #[inline]
    fn call(&self, write: bool, offset: u64, segments: &[libc::iovec]) -> Done {
        let (list, fd) = (segments.as_ptr(), self.fd.as_raw_fd());
        let count = i32::try_from(segments.len()).map_err(|_| libc::EINVAL)?;
        let offset = i64::try_from(offset).map_err(|_| libc::EINVAL)?;
        let done = if write {
            // SAFETY: the segments lie in the buffer of a transfer that is borrowed.
            unsafe { libc::pwritev(fd, list, count, offset) }
        } else {
            // SAFETY: as above, and nobody refers to their bytes.
            unsafe { libc::preadv(fd, list, count, offset) }
        };
        u64::try_from(done).map_err(|_| {
            let error = io::Error::last_os_error();
            error.raw_os_error().unwrap_or(libc::EIO)
        })
    }
}

fn segment(at: NonNull<u8>, bytes: usize) -> libc::iovec {
    libc::iovec {
        iov_base: at.as_ptr().cast(),
        iov_len: bytes,
    }
}

impl Storage for InMemoryStorage {
    /// The kernel copies.
    fn limits(&self) -> Limits {
        Limits::NONE
    }

    #[inline]
    fn begin(&self, ring: &mut Ring, token: u64, transfer: Transfer) -> Begin {
        match self.transfer(&transfer) {
            Some(done) => Begin::Done(transfer, done),
            None => self.ring.begin(ring, token, transfer),
        }
    }

    fn close(&self, ring: &mut Ring) {
        self.ring.close(ring);
    }
}

#[cfg(test)]
mod tests;
