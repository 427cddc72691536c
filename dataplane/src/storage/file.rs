//! A volume's file or block device: what was opened, and how the kernel wants it to be read.
//!
//! UNSAFETY: `statx`, `ioctl` and `pread` are called with buffers of this module that live
//! through the call, with their true sizes.
#![expect(unsafe_code, reason = "statx, a block device's sizes and a trial read")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};

use super::Topology;

/// Why a descriptor can't be a volume.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Neither a regular file nor a block device.
    #[error("the volume is neither a regular file nor a block device")]
    Kind,
    /// Opened for too little.
    #[error("the volume is not opened for {0}")]
    Access(&'static str),
    /// The kernel can't read the volume in steps of its logical block.
    #[error(
        "the volume's logical block of {logical_block_bytes} bytes is smaller than what its storage \
         can address, {offset_align_bytes} bytes: give the volume a logical block of that size"
    )]
    Alignment {
        /// Of the volume.
        logical_block_bytes: u32,
        /// Of the storage.
        offset_align_bytes: u32,
    },
    /// A system call failed.
    #[error("the volume can't be used ({step}): {source}")]
    Io {
        /// Which.
        step: &'static str,
        /// With what.
        source: io::Error,
    },
}

/// An opened volume.
#[derive(Debug)]
pub struct FileSpec {
    fd: Arc<OwnedFd>,
    /// Nothing is written to it.
    pub read_only: bool,
    /// Its length in bytes.
    pub bytes: u64,
    /// Device number and inode: which file it is.
    pub identity: (u64, u64),
    /// The page cache is bypassed.
    pub direct: bool,
    /// What addresses of transfers must be multiples of.
    pub memory_align_bytes: u32,
    /// What offsets, and lengths of each segment, must be multiples of.
    pub offset_align_bytes: u32,
    /// Its bytes are memory: it lies on tmpfs, or is a memfd.
    pub in_memory: bool,
    /// Its file system makes whoever begins a transfer wait for its end, asked not to or not: FUSE, of Linux 6.18.
    pub off_thread: bool,
    /// What it likes best.
    pub topology: Topology,
}

impl AsFd for FileSpec {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl FileSpec {
    /// Looks at an opened file, and makes it bypass the page cache where its file system can.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn from_fd(
        fd: OwnedFd,
        read_only: bool,
        logical_block_bytes: u32,
    ) -> Result<Self, StorageError> {
        Self::from_shared(Arc::new(fd), read_only, logical_block_bytes)
    }

    /// As [`FileSpec::from_fd`], of a descriptor that others have, too.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub fn from_shared(
        fd: Arc<OwnedFd>,
        read_only: bool,
        logical_block_bytes: u32,
    ) -> Result<Self, StorageError> {
        let (kind, stat, bytes) = measure(&fd)?;
        let identity = match kind {
            SFlag::S_IFBLK => (stat.st_rdev, u64::MAX),
            _ => (stat.st_dev, stat.st_ino),
        };
        let direct = prepare(&fd, read_only)?;
        let file_system = fstatfs(&fd).map_err(failed("fstatfs"))?;
        let topology = match kind {
            SFlag::S_IFBLK => block_device_topology(&fd)?,
            _ => Topology::of_file(u32::try_from(stat.st_blksize).unwrap_or(0)),
        };
        let (memory, offset) = if direct {
            direct_alignment(&fd, logical_block_bytes)?
        } else {
            (1, 1)
        };
        if offset > logical_block_bytes {
            return Err(StorageError::Alignment {
                logical_block_bytes,
                offset_align_bytes: offset,
            });
        }
        Ok(Self {
            fd,
            read_only,
            bytes,
            identity,
            direct,
            memory_align_bytes: memory.max(1),
            offset_align_bytes: offset.max(1),
            in_memory: file_system.filesystem_type() == TMPFS_MAGIC,
            off_thread: file_system.filesystem_type() == FUSE_SUPER_MAGIC,
            topology,
        })
    }

    /// The descriptor, for a worker that makes system calls with it, and to be stored.
    pub(crate) fn shared_fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Its length in bytes, as it is now.
    ///
    /// # Errors
    /// What `fstat` or BLKGETSIZE64 fails with.
    pub fn current_bytes(&self) -> io::Result<u64> {
        let (_, _, bytes) = measure(&self.fd).map_err(io::Error::other)?;
        Ok(bytes)
    }
}

/// What kind of file it is, what else the kernel says of it, and its length in bytes.
fn measure(fd: &OwnedFd) -> Result<(SFlag, FileStat, u64), StorageError> {
    let stat = fstat(fd).map_err(failed("fstat"))?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    let bytes = match kind {
        SFlag::S_IFREG => u64::try_from(stat.st_size).unwrap_or(0),
        SFlag::S_IFBLK => block_device_bytes(fd)?,
        _ => return Err(StorageError::Kind),
    };
    Ok((kind, stat, bytes))
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> StorageError {
    move |source| StorageError::Io {
        step,
        source: source.into(),
    }
}

/// Checks how it was opened and sets O_DIRECT; whether that took.
fn prepare(fd: &OwnedFd, read_only: bool) -> Result<bool, StorageError> {
    let flags = fcntl(fd, FcntlArg::F_GETFL).map_err(failed("F_GETFL"))?;
    let flags = OFlag::from_bits_retain(flags);
    match flags & OFlag::O_ACCMODE {
        OFlag::O_RDWR => {}
        OFlag::O_RDONLY if read_only => {}
        OFlag::O_WRONLY => return Err(StorageError::Access("reading")),
        _ => return Err(StorageError::Access("writing")),
    }
    if flags.contains(OFlag::O_APPEND) {
        return Err(StorageError::Access("writing anywhere but at its end"));
    }
    if flags.contains(OFlag::O_DIRECT) {
        return Ok(true);
    }
    match fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EINVAL) => {
            tracing::warn!("the volume's file system has no direct I/O: its page cache is used");
            Ok(false)
        }
        Err(e) => Err(failed("F_SETFL")(e)),
    }
}

nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
nix::ioctl_read_bad!(blkiomin, 0x1278, libc::c_uint);
nix::ioctl_read_bad!(blkioopt, 0x1279, libc::c_uint);
nix::ioctl_read_bad!(blkalignoff, 0x127a, libc::c_int);
nix::ioctl_read_bad!(blkpbszget, 0x127b, libc::c_uint);

fn block_device_topology(fd: &OwnedFd) -> Result<Topology, StorageError> {
    let fd = fd.as_raw_fd();
    let (mut physical, mut least, mut best, mut shift) = (0, 0, 0, 0);
    // SAFETY: each writes one word, to a live one.
    unsafe {
        blkpbszget(fd, &raw mut physical).map_err(failed("BLKPBSZGET"))?;
        blkiomin(fd, &raw mut least).map_err(failed("BLKIOMIN"))?;
        blkioopt(fd, &raw mut best).map_err(failed("BLKIOOPT"))?;
        blkalignoff(fd, &raw mut shift).map_err(failed("BLKALIGNOFF"))?;
    }
    Ok(Topology {
        min_io_bytes: least,
        opt_io_bytes: best,
        // Negative: the device's parts don't fit together.
        alignment_offset_bytes: u32::try_from(shift).unwrap_or(0),
        ..Topology::of_file(physical)
    })
}

fn block_device_bytes(fd: &OwnedFd) -> Result<u64, StorageError> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64, to a live one.
    unsafe { blkgetsize64(fd.as_raw_fd(), &raw mut bytes) }.map_err(failed("BLKGETSIZE64"))?;
    Ok(bytes)
}

/// Alignment of memory and of offsets for direct I/O, in bytes.
fn direct_alignment(fd: &OwnedFd, logical_block_bytes: u32) -> Result<(u32, u32), StorageError> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path names the descriptor itself; the kernel writes one statx, to a live one.
    let rc = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            out.as_mut_ptr(),
        )
    };
    if rc != 0 {
        return Err(failed("statx")(io::Error::last_os_error()));
    }
    // SAFETY: all-zero is a valid statx, and the call succeeded.
    let out = unsafe { out.assume_init() };
    if out.stx_mask & libc::STATX_DIOALIGN != 0 && out.stx_dio_offset_align != 0 {
        return Ok((out.stx_dio_mem_align, out.stx_dio_offset_align));
    }
    trial_read(fd, logical_block_bytes)
}

/// Where the kernel doesn't tell: a read of one logical block at an odd one, into memory aligned
/// for it, shows that such steps work.
fn trial_read(fd: &OwnedFd, logical_block_bytes: u32) -> Result<(u32, u32), StorageError> {
    #[repr(C, align(4096))]
    struct Page([u8; 8192]);
    let mut page = Box::new(Page([0; 8192]));
    let length = (logical_block_bytes as usize).min(4096);
    for at in [logical_block_bytes, 0] {
        // SAFETY: the buffer has at least twice that length behind the address, and is ours.
        let n = unsafe {
            libc::pread(
                fd.as_raw_fd(),
                page.0.as_mut_ptr().add(length).cast(),
                length,
                i64::from(at),
            )
        };
        if n < 0 {
            return Err(failed("trial read")(io::Error::last_os_error()));
        }
    }
    Ok((logical_block_bytes, logical_block_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(flags: libc::c_int) -> (tempfile::NamedTempFile, OwnedFd) {
        let file = tempfile::NamedTempFile::new_in(".").expect("temporary file");
        file.as_file().set_len(1 << 20).expect("length");
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(file.path(), flags, nix::sys::stat::Mode::empty());
        (file, fd.expect("open"))
    }

    #[test]
    fn a_file_is_made_direct_and_measured() {
        let (_file, fd) = opened(libc::O_RDWR);
        let spec = FileSpec::from_fd(fd, false, 4096).expect("usable");
        assert_eq!(spec.bytes, 1 << 20);
        assert!(spec.memory_align_bytes <= 4096 && spec.offset_align_bytes <= 4096);
        if spec.direct {
            let flags = fcntl(&spec.fd, FcntlArg::F_GETFL).expect("flags");
            assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT));
        }
    }

    #[test]
    fn refused_access_kind_and_append() {
        let (_file, fd) = opened(libc::O_RDONLY);
        assert!(matches!(
            FileSpec::from_fd(fd.try_clone().expect("dup"), false, 512),
            Err(StorageError::Access(_))
        ));
        assert!(FileSpec::from_fd(fd, true, 4096).is_ok());
        let (_file, fd) = opened(libc::O_RDWR | libc::O_APPEND);
        assert!(matches!(
            FileSpec::from_fd(fd, false, 512),
            Err(StorageError::Access(_))
        ));
        let null = std::fs::File::open("/dev/null").expect("open");
        assert!(matches!(
            FileSpec::from_fd(null.into(), true, 512),
            Err(StorageError::Kind)
        ));
    }

    #[test]
    fn the_same_file_is_known_by_its_identity() {
        let (file, fd) = opened(libc::O_RDWR);
        let again = file.reopen().expect("reopen");
        let one = FileSpec::from_fd(fd, false, 4096).expect("usable");
        let two = FileSpec::from_fd(again.into(), false, 4096).expect("usable");
        assert_eq!(one.identity, two.identity);
    }
}
