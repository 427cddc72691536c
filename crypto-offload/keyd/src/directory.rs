//! keyd's directory: what lies in it is read whole, written whole, and destroyed in place.
//!
//! Everything that changes the directory goes through here, one call a step, so that the order in
//! which steps reach the disk can be read where they are taken. Names are relative, and never
//! followed through a symbolic link.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

/// The directory, locked for this process.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    /// Held for its lock, and to sync the directory through.
    file: File,
    /// How many more steps succeed; every one after that fails, as if power was lost there.
    #[cfg(test)]
    pub(crate) steps_left: std::cell::Cell<u32>,
}

/// Why the directory can't be had.
#[derive(Debug)]
pub(crate) enum Unavailable {
    /// Another process has it.
    InUse,
    /// The kernel says no.
    Io(io::Error),
}

impl Directory {
    /// Opens and locks it.
    ///
    /// # Errors
    /// See [`Unavailable`].
    pub(crate) fn open(path: &Path) -> Result<Self, Unavailable> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_DIRECTORY.bits())
            .open(path)
            .map_err(Unavailable::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(Unavailable::InUse),
            Err(fs::TryLockError::Error(source)) => return Err(Unavailable::Io(source)),
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            #[cfg(test)]
            steps_left: u32::MAX.into(),
        })
    }

    /// The path of a file in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A file's bytes; none if there is no such file.
    ///
    /// # Errors
    /// If it can't be read, is no regular file, or is longer than `max_bytes`.
    pub(crate) fn read(&self, name: &str, max_bytes: usize) -> io::Result<Option<Vec<u8>>> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(self.path(name));
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if !file.metadata()?.is_file() {
            return Err(not_ours("it is not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(max_bytes as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > max_bytes {
            return Err(not_ours("it is longer than keyd ever writes it"));
        }
        Ok(Some(bytes))
    }

    /// Writes a file whole and through to the disk, in the place of one that may be there. Its name
    /// is durable after [`Directory::sync`].
    ///
    /// # Errors
    /// What the kernel says; the file may then be there in part.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.open_to_write(name, true)?;
        let (half, rest) = bytes.split_at(bytes.len() / 2);
        file.write_all(half)?;
        self.step()?;
        file.write_all(rest)?;
        file.sync_all()
    }

    /// Gives a file the name of another, which is gone then.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.step()?;
        fs::rename(self.path(from), self.path(to))
    }

    /// Makes names durable.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.file.sync_all()
    }

    /// Overwrites a file's bytes where they lie, through to the disk; nothing to do if it is not
    /// there.
    ///
    /// # Errors
    /// What the kernel says; the file may then be overwritten in part.
    pub(crate) fn overwrite(&self, name: &str) -> io::Result<()> {
        let mut file = match self.open_to_write(name, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let zeroes = vec![0; length];
        let (half, rest) = zeroes.split_at(length / 2);
        file.write_all(half)?;
        self.step()?;
        file.write_all(rest)?;
        file.sync_all()
    }

    /// Overwrites a file and removes it; nothing to do if it is not there.
    ///
    /// # Errors
    /// As [`Directory::overwrite`].
    pub(crate) fn destroy(&self, name: &str) -> io::Result<()> {
        self.overwrite(name)?;
        self.remove(name)
    }

    /// Removes a file; nothing to do if it is not there.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        self.step()?;
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    fn open_to_write(&self, name: &str, fresh: bool) -> io::Result<File> {
        self.step()?;
        OpenOptions::new()
            .write(true)
            .create(fresh)
            .truncate(fresh)
            .mode(0o600)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(self.path(name))
    }

    /// Where the power may fail.
    pub(crate) fn step(&self) -> io::Result<()> {
        #[cfg(test)]
        {
            let left = self.steps_left.get();
            if left == 0 {
                return Err(io::Error::other("the power has failed"));
            }
            self.steps_left.set(left - 1);
        }
        Ok(())
    }
}

/// A file that keyd did not write like this.
fn not_ours(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_overwritten_is_gone_from_the_very_file() {
        let dir = tempfile::tempdir().expect("dir");
        let directory = Directory::open(dir.path()).expect("open");
        directory.write("secret", b"key bytes").expect("write");
        // A second name for the same file still shows what lies there.
        fs::hard_link(dir.path().join("secret"), dir.path().join("link")).expect("link");
        directory.destroy("secret").expect("destroy");
        assert!(!dir.path().join("secret").exists());
        assert_eq!(fs::read(dir.path().join("link")).expect("read"), [0; 9]);
        directory.destroy("secret").expect("nothing to do");
    }

    #[test]
    fn what_cannot_be_looked_up_does_not_count_as_gone() {
        let dir = tempfile::tempdir().expect("dir");
        let directory = Directory::open(dir.path()).expect("open");
        let name = "n".repeat(256);
        assert!(directory.overwrite(&name).is_err());
        assert!(directory.destroy(&name).is_err());
    }

    #[test]
    fn no_symbolic_link_is_followed() {
        let dir = tempfile::tempdir().expect("dir");
        let target = dir.path().join("target");
        fs::write(&target, "x").expect("write");
        let inside = dir.path().join("inside");
        fs::create_dir(&inside).expect("mkdir");
        std::os::unix::fs::symlink(&target, inside.join("name")).expect("link");
        let directory = Directory::open(&inside).expect("open");
        assert!(directory.read("name", 9).is_err());
        assert!(directory.write("name", b"y").is_err());
        assert!(directory.overwrite("name").is_err());
        assert_eq!(fs::read(&target).expect("read"), b"x");
    }
}
