//! Small files that survive a crash: replaced as a whole (written aside, synced, renamed, the
//! directory synced), read under a cap, never through a symbolic link.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

/// A directory that one process at a time keeps its files in.
#[derive(Debug)]
pub(crate) struct StateDirectory {
    path: PathBuf,
    /// Held for its lock, and to sync the directory through.
    directory: File,
}

impl StateDirectory {
    /// Opens the directory and locks it.
    ///
    /// # Errors
    /// `ErrorKind::WouldBlock` if another process has it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_DIRECTORY.bits())
            .open(path)?;
        directory.try_lock()?;
        Ok(Self {
            path: path.to_owned(),
            directory,
        })
    }

    /// Where a file of this name lies.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The file's bytes; none if it is not there.
    ///
    /// # Errors
    /// `ErrorKind::InvalidData` if it is longer than `cap_bytes` or no regular file.
    pub(crate) fn read(&self, name: &str, cap_bytes: usize) -> io::Result<Option<Vec<u8>>> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(self.path_of(name));
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is not a regular file",
            ));
        }
        let mut bytes = Vec::new();
        file.take(cap_bytes as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > cap_bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it is longer than {cap_bytes} bytes"),
            ));
        }
        Ok(Some(bytes))
    }

    /// Makes the file hold exactly these bytes, before this returns, crash or not. On an error it
    /// holds what it held before.
    ///
    /// # Errors
    /// Of the file system.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let aside = self.path_of(&format!("{name}.new"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, self.path_of(name))?;
        self.directory.sync_all()
    }

    /// Gives a file another name, in place of what had it.
    ///
    /// # Errors
    /// Of the file system.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path_of(from), self.path_of(to))?;
        self.directory.sync_all()
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// Of the file system.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path_of(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.directory.sync_all(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_read_under_its_cap() {
        let dir = tempfile::tempdir().expect("dir");
        let state = StateDirectory::open(dir.path()).expect("open");
        assert_eq!(state.read("f", 10).expect("read"), None);
        state.write("f", b"first, and longer").expect("write");
        state.write("f", b"second").expect("write");
        assert_eq!(state.read("f", 6).expect("read"), Some(b"second".to_vec()));
        let error = state.read("f", 5).expect_err("over the cap");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        state.remove("f").expect("remove");
        state.remove("f").expect("is gone already");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn one_process_has_the_directory() {
        let dir = tempfile::tempdir().expect("dir");
        let _state = StateDirectory::open(dir.path()).expect("open");
        let error = StateDirectory::open(dir.path()).expect_err("locked");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().expect("dir");
        let state = StateDirectory::open(dir.path()).expect("open");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("f")).expect("link");
        assert!(state.read("f", 1 << 20).is_err());
    }
}
