//! The file behind a volume: made and reserved in full, one that is there and large enough, or one
//! that grows.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};

use crate::arguments::VolumeCreate;
use crate::failure::Failure;

/// A file that was made here and is removed again unless it is kept.
#[derive(Debug)]
pub(crate) struct Image {
    made: Option<PathBuf>,
}

impl Image {
    /// What `--file`, `--existing` and `--owner-uid` ask for.
    pub(crate) fn prepare(arguments: &VolumeCreate) -> Result<Self, Failure> {
        let Some(path) = &arguments.file else {
            return Ok(Self { made: None });
        };
        let (file, image) = if arguments.existing {
            (check_existing(path, arguments.size)?, Self { made: None })
        } else {
            make(path, arguments.size)?
        };
        if let Some(uid) = arguments.owner_uid {
            fchown(&file, Some(uid), None)
                .map_err(|e| Failure::at(path, format!("can't change its owner to {uid}: {e}")))?;
        }
        Ok(image)
    }

    /// The volume is complete: the file stays.
    pub(crate) fn keep(mut self) {
        self.made = None;
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            // The error that brought us here is already on its way to the operator.
            let _ = fs::remove_file(path);
        }
    }
}

fn make(path: &Path, size_bytes: u64) -> Result<(File, Image), Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Failure::at(
                path,
                "exists, and a volume's data is never overwritten: choose another --file, \
                 or add --existing to use it as it is",
            ),
            _ => Failure::at(path, error),
        })?;
    let image = Image {
        made: Some(path.to_owned()),
    };
    reserve(&file, path, 0, size_bytes)?;
    file.sync_all().map_err(|e| Failure::at(path, e))?;
    Ok((file, image))
}

/// Reserves every block from `has_bytes` on. `fallocate(2)` itself and not the C library's `posix_fallocate`, which
/// writes to every block where the file system can't reserve: there the file is left sparse, and
/// the operator is told.
fn reserve(file: &File, path: &Path, has_bytes: u64, size_bytes: u64) -> Result<(), Failure> {
    let too_large = |_| Failure::new(format!("--size: {size_bytes} bytes: no file is that large"));
    i64::try_from(size_bytes).map_err(too_large)?;
    let from = i64::try_from(has_bytes).map_err(too_large)?;
    let length = i64::try_from(size_bytes - has_bytes).map_err(too_large)?;
    loop {
        return match fallocate(file, FallocateFlags::empty(), from, length) {
            Ok(()) => Ok(()),
            Err(Errno::EINTR) => continue,
            Err(Errno::EOPNOTSUPP) => {
                file.set_len(size_bytes)
                    .map_err(|e| Failure::at(path, format!("can't be made that large: {e}")))?;
                eprintln!(
                    "bulkhead: warning: {}: this file system can't reserve space; the file is \
                     sparse, and the guest's writes fail when the disk is full",
                    path.display()
                );
                Ok(())
            }
            Err(error) => Err(Failure::at(
                path,
                format!("can't reserve {size_bytes} bytes: {}", error.desc()),
            )),
        };
    }
}

/// Enlarges a volume's file to `size_bytes`, which are reserved; a device is only looked at. Nothing
/// of what the file holds changes, and it may be in use. True if it was enlarged.
pub(crate) fn grow(path: &Path, size_bytes: u64) -> Result<bool, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(|e| Failure::at(path, e))?;
    let has_bytes = length_of(&file, path)?;
    if has_bytes >= size_bytes {
        return Ok(false);
    }
    let kind = file.metadata().map_err(|e| Failure::at(path, e))?;
    if !kind.is_file() {
        return Err(Failure::at(
            path,
            format!(
                "is a block device of {has_bytes} bytes, and the volume is to have {size_bytes}: \
                 enlarge it with the tools that made it (`lvextend`, for one) first"
            ),
        ));
    }
    reserve(&file, path, has_bytes, size_bytes)?;
    file.sync_all().map_err(|e| Failure::at(path, e))?;
    Ok(true)
}

/// Opens a volume's file for reading, if it is one and has at least `size_bytes`.
pub(crate) fn check_existing(path: &Path, size_bytes: u64) -> Result<File, Failure> {
    // Non-blocking, so that a pipe of that name can't hold us up before it is refused.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(|e| Failure::at(path, e))?;
    let length = length_of(&file, path)?;
    if length < size_bytes {
        return Err(Failure::at(
            path,
            format!("has {length} bytes, and the volume needs {size_bytes}"),
        ));
    }
    Ok(file)
}

/// Bytes of a file or block device; refuses everything else.
pub(crate) fn length_of(mut file: &File, path: &Path) -> Result<u64, Failure> {
    let kind = file
        .metadata()
        .map_err(|e| Failure::at(path, e))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Failure::at(path, "is neither a file nor a block device"));
    }
    // The end of a block device is found by going there; its metadata says 0.
    file.seek(SeekFrom::End(0))
        .map_err(|e| Failure::at(path, e))
}
