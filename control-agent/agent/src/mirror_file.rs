//! The files that mirrors of NICs are written to: each new, in one directory, and never one that is there.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, faccessat};

/// Files of one name: with `.1` behind it and so on, if there is one.
const MOST_FILES: u16 = 1000;

/// The directory for mirrors.
#[derive(Debug)]
pub struct MirrorDirectory {
    path: PathBuf,
    fd: OwnedFd,
}

impl MirrorDirectory {
    /// Opens the directory.
    ///
    /// # Errors
    /// It is not there, or no directory; its path is in the text.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty())
            .map_err(|error| io::Error::other(format!("{}: {}", path.display(), error.desc())))?;
        Ok(Self {
            path: path.to_owned(),
            fd,
        })
    }

    /// Whether files can be made in it.
    ///
    /// # Errors
    /// For the operator: which directory, and what to do.
    pub(crate) fn check(&self) -> Result<(), String> {
        let access = AccessFlags::W_OK | AccessFlags::X_OK;
        let checked = faccessat(&self.fd, ".", access, AtFlags::AT_EACCESS);
        checked.map_err(|error| {
            let path = self.path.display();
            let error = error.desc();
            format!("the agent can't make files in {path} ({error}): give that directory to the agent's user, with mode 0700")
        })
    }

    pub(crate) fn descriptor(&self) -> &OwnedFd {
        &self.fd
    }

    /// Makes a file to be appended to, and gives it with its name: the one that was asked for, or with a
    /// number behind it.
    ///
    /// # Errors
    /// For the operator: which file, what failed.
    pub(crate) fn create(&self, name: &str) -> Result<(OwnedFd, String), String> {
        let access = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_EXCL;
        let how = OpenHow::new()
            .flags(access | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .mode(Mode::S_IRUSR | Mode::S_IWUSR)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let failed = |name: &str, what: &str| {
            let path = self.path.join(name);
            Err(format!("the mirror's file {}: {what}", path.display()))
        };
        for number in 0..MOST_FILES {
            let name = match number {
                0 => name.to_owned(),
                number => format!("{name}.{number}"),
            };
            match openat2(&self.fd, name.as_str(), how) {
                Ok(file) => return Ok((file, name)),
                Err(Errno::EEXIST) => {}
                Err(Errno::EACCES) => return self.check().and(failed(&name, "it may not be made")),
                Err(error) => return failed(&name, error.desc()),
            }
        }
        failed(name, "there are too many of that name: remove some")
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use bulkhead_protocol::process;

    use super::*;

    #[test]
    fn a_file_is_always_a_new_one() {
        let folder = tempfile::tempdir().expect("folder");
        let directory = MirrorDirectory::open(folder.path()).expect("open");
        fs::write(folder.path().join("a.pcapng"), "kept").expect("write");
        symlink("elsewhere", folder.path().join("a.pcapng.1")).expect("link");
        let (file, name) = directory.create("a.pcapng").expect("made");
        assert_eq!(name, "a.pcapng.2");
        let mut file = File::from(file);
        file.write_all(b"one").expect("write");
        let path = folder.path().join(name);
        assert_eq!(fs::read(&path).expect("read"), b"one");
        let mode = path.metadata().expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!folder.path().join("elsewhere").exists());
        let kept = fs::read(folder.path().join("a.pcapng")).expect("read");
        assert_eq!(kept, b"kept");
    }

    #[test]
    fn a_directory_of_somebody_elses_is_named_with_what_to_do() {
        let folder = tempfile::tempdir().expect("folder");
        let directory = MirrorDirectory::open(folder.path()).expect("open");
        assert_eq!(directory.check(), Ok(()));
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o500)).expect("mode");
        // As the agent does it: without a right to pass over modes.
        let refused = std::thread::scope(|scope| {
            let agent = scope.spawn(|| {
                process::keep_capabilities(&[]).expect("dropped");
                [directory.check(), directory.create("a").map(drop)]
            });
            agent.join().expect("joined")
        });
        for refused in refused {
            let refused = refused.expect_err("refused");
            assert!(
                refused.contains("give that directory to the agent's user"),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_name_that_leads_out_is_refused() {
        let folder = tempfile::tempdir().expect("folder");
        fs::create_dir(folder.path().join("in")).expect("mkdir");
        let directory = MirrorDirectory::open(&folder.path().join("in")).expect("open");
        for name in ["../x", "/tmp/x", "no/such"] {
            let refused = directory.create(name).expect_err("refused");
            assert!(refused.starts_with("the mirror's file "), "{refused}");
        }
        assert!(!folder.path().join("x").exists());
        assert!(MirrorDirectory::open(&folder.path().join("none")).is_err());
    }
}
