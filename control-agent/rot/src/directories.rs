//! The directories that rot makes and holds: owner, mode, and the lock that makes it the only one.
//!
//! Each is opened without following a symbolic link and used through its descriptor from then on,
//! so that nobody can swap it afterwards.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchown, geteuid};

/// How long a lock that is taken is waited for.
const LOCK_WITHIN: Duration = Duration::from_secs(1);
/// Name of the lock file in the run directory.
const LOCK_FILE: &str = "lock";
/// Group and others may not have these bits on a directory of rot's.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Why a directory is not used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A system call failed.
    #[error("can't {step} {}: {source}", path.display())]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// With what it failed.
        source: io::Error,
    },
    /// It is there, but not as rot would have made it.
    #[error("{} is refused: {reason}", path.display())]
    Refused {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The lock is held.
    #[error("another bulkhead-rot runs in {}; stop it, or choose another --run-dir", path.display())]
    InUse {
        /// The run directory.
        path: PathBuf,
    },
}

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Directory {
    /// Its path, for people and for the children's command lines.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory of rot's own, made if only the last component is missing, with mode 0755.
    ///
    /// # Errors
    /// [`DirectoryError::Refused`] for a symbolic link, for one of another owner, and for one
    /// that others can write.
    pub fn own(path: &Path) -> Result<Self, DirectoryError> {
        make_own(AT_FDCWD, path, path)
    }

    /// As [`Self::own`], inside this one.
    ///
    /// # Errors
    /// As [`Self::own`].
    pub fn own_inside(&self, name: &str) -> Result<Self, DirectoryError> {
        make_own(self.as_fd(), Path::new(name), &self.path.join(name))
    }

    /// A directory of a child's inside this one, mode 0700. One that rot's own user owns is
    /// handed over (itself, not what lies in it).
    ///
    /// # Errors
    /// [`DirectoryError::Refused`] for a symbolic link and for one of a third owner.
    pub fn child_inside(&self, name: &str, uid: u32) -> Result<Self, DirectoryError> {
        let path = self.path.join(name);
        let (directory, found) = make_and_open(self.as_fd(), Path::new(name), &path)?;
        if found.st_uid != uid {
            if found.st_uid != geteuid().as_raw() {
                let reason = format!(
                    "it is owned by uid {}, not by the child's {uid}; change the owner of it and its files",
                    found.st_uid
                );
                return Err(DirectoryError::Refused { path, reason });
            }
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)));
            fchown(&directory, owner.0, owner.1)
                .map_err(|e| failed(&path, "give to its child's uid the directory", e))?;
        }
        set_mode(&directory, 0o700)?;
        Ok(directory)
    }

    /// The lock of this directory, held for as long as the file, or a duplicate of it, is open. One that is taken is waited
    /// for, [`LOCK_WITHIN`]: a rot that was killed as it started a child leaves the lock to that child
    /// until it notices.
    ///
    /// # Errors
    /// [`DirectoryError::InUse`] if another process holds it.
    pub fn lock(&self) -> Result<File, DirectoryError> {
        let path = self.path.join(LOCK_FILE);
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(self, LOCK_FILE, flags, Mode::from_bits_truncate(0o600))
            .map_err(|e| failed(&path, "open the lock file", e))?;
        let file = File::from(file);
        let end = Instant::now() + LOCK_WITHIN;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < end => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(DirectoryError::InUse {
                        path: self.path.clone(),
                    });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(DirectoryError::Io {
                        path,
                        step: "lock",
                        source,
                    });
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn failed(path: &Path, step: &'static str, source: Errno) -> DirectoryError {
    DirectoryError::Io {
        path: path.to_owned(),
        step,
        source: source.into(),
    }
}

fn make_own(at: BorrowedFd<'_>, name: &Path, path: &Path) -> Result<Directory, DirectoryError> {
    let (directory, found) = make_and_open(at, name, path)?;
    let own = geteuid().as_raw();
    let refused = |reason| DirectoryError::Refused {
        path: path.to_owned(),
        reason,
    };
    if found.st_uid != own {
        let reason = format!(
            "it is owned by uid {}, rot runs as {own}; choose a directory of rot's own",
            found.st_uid
        );
        return Err(refused(reason));
    }
    if found.st_mode & WRITABLE_BY_OTHERS != 0 {
        let reason = format!(
            "others can write there (mode {:04o}); choose a directory of rot's own",
            found.st_mode & 0o7777
        );
        return Err(refused(reason));
    }
    set_mode(&directory, 0o755)?;
    Ok(directory)
}

/// The directory, made with mode 0700 if it was not there, and what it is.
fn make_and_open(
    at: BorrowedFd<'_>,
    name: &Path,
    path: &Path,
) -> Result<(Directory, FileStat), DirectoryError> {
    match mkdirat(at, name, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(e) => return Err(failed(path, "make the directory", e)),
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = openat(at, name, flags, Mode::empty()).map_err(|e| match e {
        Errno::ELOOP | Errno::ENOTDIR => DirectoryError::Refused {
            path: path.to_owned(),
            reason: "it is a symbolic link or no directory; name the directory itself".to_owned(),
        },
        e => failed(path, "open the directory", e),
    })?;
    let found = fstat(&fd).map_err(|e| failed(path, "look at the directory", e))?;
    let path = path.to_owned();
    Ok((Directory { fd, path }, found))
}

fn set_mode(directory: &Directory, mode: u32) -> Result<(), DirectoryError> {
    fchmod(directory, Mode::from_bits_truncate(mode))
        .map_err(|e| failed(&directory.path, "set the mode of the directory", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn made_with_owner_and_mode_and_taken_again() {
        let base = tempfile::tempdir().unwrap();
        let run = base.path().join("run");
        for _ in 0..2 {
            let directory = Directory::own(&run).unwrap();
            directory.own_inside("vhost").unwrap();
            let own = geteuid().as_raw();
            directory.child_inside("keyd", own).unwrap();
            assert_eq!(mode(&run), 0o755);
            assert_eq!(mode(&run.join("vhost")), 0o755);
            assert_eq!(mode(&run.join("keyd")), 0o700);
        }
    }

    #[test]
    fn refused_symbolic_links() {
        let base = tempfile::tempdir().unwrap();
        let target = base.path().join("target");
        std::fs::create_dir(&target).unwrap();
        let link = base.path().join("link");
        symlink(&target, &link).unwrap();
        let error = Directory::own(&link).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
        let directory = Directory::own(&target).unwrap();
        symlink("/", target.join("keyd")).unwrap();
        let error = directory.child_inside("keyd", 0).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
    }

    #[test]
    fn refused_where_others_can_write() {
        let base = tempfile::tempdir().unwrap();
        std::fs::set_permissions(base.path(), PermissionsExt::from_mode(0o1777)).unwrap();
        let error = Directory::own(base.path()).unwrap_err().to_string();
        assert!(error.contains("others can write"), "{error}");
        assert_eq!(mode(base.path()), 0o1777, "a refusal changes nothing");
    }

    #[test]
    fn refused_owned_by_someone_else() {
        if !geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let run = base.path().join("run");
        std::fs::create_dir(&run).unwrap();
        std::os::unix::fs::chown(&run, Some(64009), None).unwrap();
        let error = Directory::own(&run).unwrap_err().to_string();
        assert!(error.contains("owned by uid 64009"), "{error}");
        let state = Directory::own(&base.path().join("state")).unwrap();
        let keyd = state.child_inside("keyd", 64001).unwrap();
        assert_eq!(std::fs::metadata(keyd.path()).unwrap().uid(), 64001);
        let error = state.child_inside("keyd", 64002).unwrap_err().to_string();
        assert!(error.contains("owned by uid 64001"), "{error}");
    }

    #[test]
    fn the_lock_is_held_once() {
        let base = tempfile::tempdir().unwrap();
        let directory = Directory::own(&base.path().join("run")).unwrap();
        let lock = directory.lock().unwrap();
        let error = directory.lock().unwrap_err();
        assert!(matches!(error, DirectoryError::InUse { .. }), "{error}");
        drop(lock);
        directory.lock().unwrap();
    }
}
