//! The file behind a new volume: made and reserved in full, or one that is there and large enough.

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
    reserve(&file, path, size_bytes)?;
    file.sync_all().map_err(|e| Failure::at(path, e))?;
    Ok((file, image))
}

/// Reserves every block. `fallocate(2)` itself and not the C library's `posix_fallocate`, which
/// writes to every block where the file system can't reserve: there the file is left sparse, and
/// the operator is told.
fn reserve(file: &File, path: &Path, size_bytes: u64) -> Result<(), Failure> {
    let length = i64::try_from(size_bytes)
        .map_err(|_| Failure::new(format!("--size: {size_bytes} bytes: no file is that large")))?;
    loop {
        return match fallocate(file, FallocateFlags::empty(), 0, length) {
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

fn check_existing(path: &Path, size_bytes: u64) -> Result<File, Failure> {
    // Non-blocking, so that a pipe of that name can't hold us up before it is refused.
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(|e| Failure::at(path, e))?;
    let kind = file
        .metadata()
        .map_err(|e| Failure::at(path, e))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Failure::at(path, "is neither a file nor a block device"));
    }
    // The end of a block device is found by going there; its metadata says 0.
    let length = file
        .seek(SeekFrom::End(0))
        .map_err(|e| Failure::at(path, e))?;
    if length < size_bytes {
        return Err(Failure::at(
            path,
            format!("has {length} bytes, and the volume needs {size_bytes}"),
        ));
    }
    Ok(file)
}
