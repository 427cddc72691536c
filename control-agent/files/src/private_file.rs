//! Files that hold secrets: made new with mode 0600, read only if nobody else can.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use zeroize::Zeroizing;

/// Longest secret file in bytes.
pub const MAX_BYTES: u64 = 64 * 1024;

/// Why a secret file could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// It is there already.
    #[error("{0} exists and is never overwritten: choose another name or move it away")]
    Exists(PathBuf),
    /// Others may read it.
    #[error(
        "{path} can be read by others (mode {mode:04o}): `chmod 600 {path}` first, and think about who read it"
    )]
    TooOpen {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A directory, device or pipe, or far too long.
    #[error("{0} is not a regular file of at most {MAX_BYTES} bytes")]
    NotASecretFile(PathBuf),
    /// Anything else.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> PrivateFileError + '_ {
    |source| PrivateFileError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Makes a new file of mode 0600 and writes the bytes through to the disk. An existing file is
/// never touched; a file that could not be written whole is removed.
///
/// # Errors
/// See [`PrivateFileError`].
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    create_with_mode(path, bytes, 0o600)
}

/// As [`create`], for what goes with a secret but is public itself: mode 0644 less the umask.
///
/// # Errors
/// See [`PrivateFileError`].
pub fn create_public(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    create_with_mode(path, bytes, 0o644)
}

fn create_with_mode(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PrivateFileError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => PrivateFileError::Exists(path.to_owned()),
            _ => io_error(path)(source),
        })?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|source| {
            // Half a key is worse than none; if removing fails too, the first error says enough.
            let _ = fs::remove_file(path);
            io_error(path)(source)
        })
}

/// Reads a secret file whole, into memory that is wiped.
///
/// # Errors
/// [`PrivateFileError::TooOpen`] if group or others have any permission on it.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, PrivateFileError> {
    // Non-blocking, so that a pipe of that name can't hold us up before it is refused.
    let mut file: File = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits())
        .open(path)
        .map_err(io_error(path))?;
    let metadata = file.metadata().map_err(io_error(path))?;
    if !metadata.is_file() || metadata.size() > MAX_BYTES {
        return Err(PrivateFileError::NotASecretFile(path.to_owned()));
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PrivateFileError::TooOpen {
            path: path.to_owned(),
            mode,
        });
    }
    let length = usize::try_from(metadata.size())
        .map_err(|_| PrivateFileError::NotASecretFile(path.to_owned()))?;
    let mut bytes = Zeroizing::new(vec![0; length]);
    file.read_exact(&mut bytes).map_err(io_error(path))?;
    Ok(bytes)
}
