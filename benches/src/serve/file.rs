//! A disk's file: opened, tried for direct I/O, locked.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use super::devices::{Backing, DeviceError};

/// How long a file's lock is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Opens a file or block device, with direct I/O where that takes logical blocks, and locks it.
///
/// # Errors
/// [`DeviceError::File`], [`DeviceError::Kind`], [`DeviceError::InUse`].
pub fn open(path: &Path, read_only: bool, block_bytes: u32) -> Result<Backing, DeviceError> {
    let failed = |step| {
        move |source| DeviceError::File {
            path: path.to_owned(),
            step,
            source,
        }
    };
    // Before it is opened: opening a FIFO or a terminal waits, or does something.
    let kind = std::fs::metadata(path).map_err(failed("can't be opened"))?;
    if !kind.is_file() && !kind.file_type().is_block_device() {
        return Err(DeviceError::Kind(path.to_owned()));
    }
    let open_with = |flags| {
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(flags);
        options.open(path)
    };
    let (mut file, direct) = match open_with(libc::O_DIRECT) {
        Ok(file) if takes_blocks(&file, block_bytes) => (file, true),
        Ok(_) => (open_with(0).map_err(failed("can't be opened"))?, false),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            (open_with(0).map_err(failed("can't be opened"))?, false)
        }
        Err(e) => return Err(failed("can't be opened")(e)),
    };
    if !direct {
        tracing::warn!(
            "{}: no direct I/O in blocks of {block_bytes} bytes: the page cache is used",
            path.display()
        );
    }
    let bytes = claim(&mut file, path)?;
    Ok(Backing::File {
        file,
        bytes,
        direct,
    })
}

/// Opens a file to be mapped, and locks it.
///
/// # Errors
/// [`DeviceError::File`], [`DeviceError::Kind`], [`DeviceError::InUse`].
pub fn open_cached(path: &Path) -> Result<Backing, DeviceError> {
    let failed = |source| DeviceError::File {
        path: path.to_owned(),
        step: "can't be opened",
        source,
    };
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(DeviceError::Kind(path.to_owned()));
    }
    let file = OpenOptions::new().read(true).write(true).open(path);
    let mut file = file.map_err(failed)?;
    let bytes = claim(&mut file, path)?;
    Ok(Backing::VolatileCache { file, bytes })
}

/// Locks a file: its size in bytes.
fn claim(file: &mut File, path: &Path) -> Result<u64, DeviceError> {
    let failed = |step| {
        move |source| DeviceError::File {
            path: path.to_owned(),
            step,
            source,
        }
    };
    match lock(file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(DeviceError::InUse(path.to_owned())),
        Err(TryLockError::Error(e)) => return Err(failed("can't be locked")(e)),
    }
    // Seeking, because the metadata of a block device has no size.
    file.seek(SeekFrom::End(0)).map_err(failed("has no size"))
}

/// Locks a file against others. The kernel ends a dead process's io_uring requests, and gives its
/// lock back, only some time after the process is gone: that is waited for.
fn lock(file: &File) -> Result<(), TryLockError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            end => return end,
        }
    }
}

/// Whether direct reads work in steps of a logical block: an odd one is tried.
fn takes_blocks(file: &File, block_bytes: u32) -> bool {
    let mut buffer = AlignedBuffer::new(block_bytes as usize);
    let read = file.read_at(buffer.bytes_mut(), u64::from(block_bytes));
    read.is_ok()
}

/// A buffer at an address that direct I/O takes.
#[derive(Debug)]
pub struct AlignedBuffer {
    room: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// What its address is a multiple of: no file system wants more.
    pub const ALIGN_BYTES: usize = 4096;

    /// `len` zeroed bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let room = vec![0u8; len + Self::ALIGN_BYTES];
        let past = room.as_ptr().addr() % Self::ALIGN_BYTES;
        Self {
            start: (Self::ALIGN_BYTES - past) % Self::ALIGN_BYTES,
            room,
            len,
        }
    }

    /// The bytes, to be changed.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let end = self.start + self.len;
        self.room.get_mut(self.start..end).unwrap_or_default()
    }
}
