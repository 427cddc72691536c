//! The memfd that a volume's state lies in: two copies of the state, and a page with the flag that a worker
//! raises when a flush has failed.
//!
//! Its length is sealed, so that nobody is surprised by a page that is gone. A copy is written by one
//! `pwrite`; a process that is killed in it leaves the other copy whole.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::memfd_create;
use nix::sys::stat::fstat;
use nix::sys::uio::{pread, pwrite};
use nix::unistd::ftruncate;

use super::format::{COPIES, COPY_BYTES, FormatError, Numbered, encode, latest};
use super::kinds::Stored;
use super::volume::FdNumber;
use crate::memory::{SharedArea, SharedFlag};
use crate::vhost_user::inflight_flags;

/// Where the page with the flag begins: behind the copies.
pub const FLAG_AT: u64 = (COPIES * COPY_BYTES) as u64;
/// Length of the file in bytes.
pub const FILE_BYTES: u64 = FLAG_AT + PAGE_BYTES;
const PAGE_BYTES: u64 = 4096;

/// A state memfd.
#[derive(Debug)]
pub struct StateFile {
    fd: OwnedFd,
    /// Of the state written last; 0: none was.
    sequence: u64,
    flush_failed: Arc<SharedFlag>,
}

/// Seals of its length, and against others.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

impl StateFile {
    /// A fresh one, in which nothing is written yet. Its pages are there: writing it needs none.
    ///
    /// # Errors
    /// What making, filling, sealing or mapping a memfd fails with.
    pub fn create() -> io::Result<Self> {
        let fd = memfd_create("volume", inflight_flags())?;
        ftruncate(&fd, FILE_BYTES.cast_signed())?;
        for page in 0..FILE_BYTES / PAGE_BYTES {
            write_at(fd.as_fd(), &[0; 4096], page * PAGE_BYTES)?;
        }
        fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(seals()))?;
        let flush_failed = flag(fd.as_fd())?;
        Ok(Self {
            fd,
            sequence: 0,
            flush_failed,
        })
    }

    /// A predecessor's, and the last state in it.
    ///
    /// # Errors
    /// It is no state memfd, or no state in it can be read.
    pub fn open(fd: OwnedFd) -> Result<(Self, Stored<FdNumber>), FileError> {
        let numbered = read(fd.as_fd())?;
        let flush_failed = flag(fd.as_fd())?;
        let file = Self {
            fd,
            sequence: numbered.sequence,
            flush_failed,
        };
        Ok((file, numbered.stored))
    }

    /// Writes a state; the one before stays readable until this one is whole.
    ///
    /// # Errors
    /// It is too long, or `pwrite` fails; the one before is in force then.
    pub fn write(&mut self, stored: &Stored<FdNumber>) -> Result<(), FileError> {
        let sequence = self.sequence + 1;
        let bytes = encode(sequence, stored)?;
        let copy = sequence % COPIES as u64;
        write_at(self.fd.as_fd(), &bytes, copy * COPY_BYTES as u64)?;
        self.sequence = sequence;
        Ok(())
    }

    /// Raised by a worker before it answers a flush that failed, and never lowered.
    #[must_use]
    pub fn flush_failed(&self) -> Arc<SharedFlag> {
        Arc::clone(&self.flush_failed)
    }
}

impl AsFd for StateFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Why a state memfd is of no use.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Another file.
    #[error("a volume's state is no sealed memfd of {FILE_BYTES} bytes")]
    NotOne,
    /// What is written in it, or was to be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A system call.
    #[error("a volume's state can't be read or written: {0}")]
    Io(#[from] io::Error),
}

fn flag(fd: BorrowedFd<'_>) -> io::Result<Arc<SharedFlag>> {
    let area = SharedArea::map(fd, FLAG_AT, FILE_BYTES - FLAG_AT)?;
    let flag = SharedFlag::new(area).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(Arc::new(flag))
}

/// The last state in a predecessor's file, or in that of a process that is still writing it.
///
/// # Errors
/// As [`StateFile::open`].
pub fn look_at(fd: BorrowedFd<'_>) -> Result<Stored<FdNumber>, FileError> {
    Ok(read(fd)?.stored)
}

fn read(fd: BorrowedFd<'_>) -> Result<Numbered, FileError> {
    let length = fstat(fd).map_err(io::Error::from)?.st_size;
    let sealed = fcntl(fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    if length != FILE_BYTES.cast_signed() || !sealed.is_ok_and(|s| s.contains(seals())) {
        return Err(FileError::NotOne);
    }
    let mut both = vec![0; COPIES * COPY_BYTES];
    if pread(fd, &mut both, 0).map_err(io::Error::from)? != both.len() {
        return Err(FileError::NotOne);
    }
    let (one, two) = both.split_at(COPY_BYTES);
    Ok(latest([one, two])?)
}

fn write_at(fd: BorrowedFd<'_>, bytes: &[u8], at: u64) -> io::Result<()> {
    let count = pwrite(fd, bytes, at.cast_signed())?;
    if count == bytes.len() {
        return Ok(());
    }
    Err(io::Error::other("a write to memory was cut short"))
}
