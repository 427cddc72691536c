//! How an envelope (a signed configuration, as received) is handed from process to process:
//! as a descriptor whose bytes the receiver copies once, under the size cap, before it looks
//! at any of them. Whoever holds the file can change it later; the copy is what is verified.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Longest envelope in bytes. A volume takes some 1.6 KiB per recipient, so that this is room for
/// several hundred volumes; verification never looks at a longer one.
pub const MAX_ENVELOPE_BYTES: usize = 1024 * 1024;

/// Why an envelope could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// Over the cap.
    #[error(
        "the envelope is over the size cap of {MAX_ENVELOPE_BYTES} bytes: \
         split the host's volumes over fewer recipients or another host"
    )]
    TooLarge,
    /// Not a regular file or memfd.
    #[error("the envelope is not a regular file")]
    NotAFile,
    /// Reading failed.
    #[error("the envelope can't be read: {0}")]
    Io(#[from] io::Error),
}

/// The bytes in a fresh memfd, to be sent along with a message.
///
/// # Errors
/// What `memfd_create` or `write` fails with.
pub fn to_memfd(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create("envelope", MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// Copies the envelope behind a descriptor, from its start, without moving its offset.
///
/// # Errors
/// See [`EnvelopeError`]. A file that shrinks while it is read gives an error, never a short copy.
pub fn read_capped(fd: BorrowedFd<'_>) -> Result<Vec<u8>, EnvelopeError> {
    let file = File::from(fd.try_clone_to_owned()?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(EnvelopeError::NotAFile);
    }
    let length = usize::try_from(metadata.len()).map_err(|_| EnvelopeError::TooLarge)?;
    if length > MAX_ENVELOPE_BYTES {
        return Err(EnvelopeError::TooLarge);
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn bytes_round_trip() {
        let fd = to_memfd(b"an envelope").expect("memfd");
        assert_eq!(read_capped(fd.as_fd()).expect("read"), b"an envelope");
        assert_eq!(read_capped(fd.as_fd()).expect("again"), b"an envelope");
    }

    #[test]
    fn over_the_cap_is_refused_unread() {
        let fd = to_memfd(b"").expect("memfd");
        let file = File::from(fd);
        file.set_len(MAX_ENVELOPE_BYTES as u64).expect("grow");
        assert!(read_capped(file.as_fd()).is_ok());
        file.set_len(MAX_ENVELOPE_BYTES as u64 + 1).expect("grow");
        assert!(matches!(
            read_capped(file.as_fd()),
            Err(EnvelopeError::TooLarge)
        ));
    }

    #[test]
    fn pipes_and_devices_are_refused() {
        let (read_end, _write_end) = nix::unistd::pipe().expect("pipe");
        assert!(matches!(
            read_capped(read_end.as_fd()),
            Err(EnvelopeError::NotAFile)
        ));
        let device = File::open("/dev/zero").expect("open");
        assert!(matches!(
            read_capped(device.as_fd()),
            Err(EnvelopeError::NotAFile)
        ));
    }
}
