//! Who writes a volume: two hosts may have the same one attached (during a live migration, both do),
//! and only the one whose guest runs may touch it. A volume that is only read may be read by several,
//! while nobody writes it.
//!
//! The lock is `flock`'s: it holds between processes of a host, and between hosts where the file
//! system carries it there (NFS, CephFS, GFS2, OCFS2). A block device that hosts share has no such lock;
//! there, only the order of a migration keeps them apart.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::AsFd;

use super::FileSpec;

impl FileSpec {
    /// The same open file, and with it the same lock.
    fn alias(&self) -> io::Result<File> {
        Ok(File::from(self.as_fd().try_clone_to_owned()?))
    }

    /// Takes the volume; false while somebody else has it. Never waits.
    ///
    /// # Errors
    /// What `flock` fails with, such as ENOLCK.
    pub fn try_hold(&self) -> io::Result<bool> {
        let file = self.alias()?;
        let taken = if self.read_only {
            // NFS, for one, gives the other lock to files only that are open for writing.
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match taken {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Lets go of the volume. Nothing of it may be in flight.
    ///
    /// # Errors
    /// What `flock` fails with; the lock ends with the open file then.
    pub fn let_go(&self) -> io::Result<()> {
        self.alias()?.unlock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_open_file_at_a_time_has_the_volume() {
        let file = tempfile::NamedTempFile::new_in(".").expect("temporary file");
        file.as_file().set_len(1 << 20).expect("length");
        let open = |read_only: bool| {
            let fd = std::fs::OpenOptions::new()
                .read(true)
                .write(!read_only)
                .open(file.path());
            FileSpec::from_fd(fd.expect("open").into(), read_only, 4096).expect("usable")
        };
        let (one, two) = (open(false), open(false));
        assert!(one.try_hold().expect("flock"));
        assert!(one.try_hold().expect("flock"), "it has it already");
        assert!(!two.try_hold().expect("flock"));
        one.let_go().expect("flock");
        assert!(two.try_hold().expect("flock"));
        assert!(!one.try_hold().expect("flock"));
        drop(two);
        assert!(one.try_hold().expect("flock"), "it ends with the open file");
        // Readers keep out who writes, and the other way round; but not each other.
        let readers = [open(true), open(true)];
        let held = || readers.each_ref().map(|r| r.try_hold().expect("flock"));
        assert_eq!(held(), [false; 2]);
        one.let_go().expect("flock");
        assert_eq!(held(), [true; 2]);
        assert!(!one.try_hold().expect("flock"));
        readers[0].let_go().expect("flock");
        assert!(!one.try_hold().expect("flock"));
        readers[1].let_go().expect("flock");
        assert!(one.try_hold().expect("flock"));
    }
}
