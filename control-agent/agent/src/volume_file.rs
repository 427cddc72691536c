//! Opening the file or block device of a volume: beneath an allowed directory, through no symbolic
//! link, of a kind that holds blocks, and large enough. Whose turn it is to write is decided by the data
//! planes that have it: the agent takes no lock on it.
//!
//! A path in a bundle is signed, but the tree below it may belong to others: what is opened is
//! decided by the kernel in one walk (`openat2`), and looked at before it is opened for use.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_bundle::Volume;
use bulkhead_protocol::rekey::{self, COPIES, Found, RECORD_BYTES};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};

/// Why a volume's file is refused.
#[derive(Debug, thiserror::Error)]
pub enum VolumeFileError {
    /// An absolute path that lies nowhere allowed.
    #[error(
        "path {path} is outside the allowed directories ({allowed}): move the file, \
         or start bulkhead-rot with another --volume-dir"
    )]
    Outside {
        /// As the bundle has it.
        path: PathBuf,
        /// Where it may lie.
        allowed: String,
    },
    /// The walk would have left the directory.
    #[error("path {0} leads out of the allowed directory")]
    Escapes(PathBuf),
    /// It is not there.
    #[error("path {path} is in none of the allowed directories ({allowed}): create it first")]
    NotFound {
        /// As the bundle has it.
        path: PathBuf,
        /// Where was looked.
        allowed: String,
    },
    /// A link, as its last or an earlier component.
    #[error("path {0} goes through a symbolic link: name the file itself")]
    SymbolicLink(PathBuf),
    /// Not something with blocks.
    #[error("path {path} is a {kind}: a volume is a regular file or a block device")]
    Special {
        /// Where.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Something else came to stand there between looking and opening.
    #[error("path {0} was exchanged while it was opened: somebody else changes this directory")]
    Exchanged(PathBuf),
    /// Smaller than the volume.
    #[error(
        "path {path} has {has_bytes} bytes, the volume {needs_bytes}: \
         enlarge the file or correct the volume's size"
    )]
    TooSmall {
        /// Where.
        path: PathBuf,
        /// Size of the file or device.
        has_bytes: u64,
        /// Size of the volume.
        needs_bytes: u64,
    },
    /// Any other failure.
    #[error("path {path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
}

/// What a path leads to, whatever it is called: two paths with one identity are one store of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Identity {
    /// A regular file.
    File {
        /// Of the file system.
        device: u64,
        /// In the file system.
        inode: u64,
    },
    /// A block device, by the device and not by its node.
    Device(u64),
}

/// An opened volume.
#[derive(Debug)]
pub struct VolumeFile {
    file: File,
    identity: Identity,
}

impl VolumeFile {
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// What the file says of a re-key, behind the volume's end; none if it ends before that place.
    ///
    /// # Errors
    /// What reading fails with.
    pub(crate) fn rekey_record(&self, volume: &Volume) -> io::Result<Option<Found>> {
        let Some(layout) = rekey::layout(volume.size_bytes) else {
            return Ok(None);
        };
        let [first, _] = layout.copies;
        let mut copies = [0; COPIES * RECORD_BYTES];
        match self.file.read_exact_at(&mut copies, first) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            read => read.map(|()| Some(rekey::find(&copies))),
        }
    }

    /// The descriptor for the data plane. It is the only one of this open file: the lock that the data
    /// plane takes on it goes with the data plane, and not before its last request has ended.
    pub(crate) fn into_descriptor(self) -> OwnedFd {
        self.file.into()
    }
}

/// The directories that volumes may lie in.
#[derive(Debug)]
pub struct VolumeDirectories {
    directories: Vec<(PathBuf, OwnedFd)>,
}

impl VolumeDirectories {
    /// Opens the directories.
    ///
    /// # Errors
    /// One is not absolute, not there or no directory; its path is in the text.
    pub fn open(paths: &[PathBuf]) -> io::Result<Self> {
        let open = |path: &PathBuf| {
            let named = |what: String| io::Error::other(format!("{}: {what}", path.display()));
            if !path.is_absolute() {
                return Err(named("a volume directory is an absolute path".to_owned()));
            }
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let fd = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
                .map_err(|error| named(error.desc().to_owned()))?;
            Ok((path.clone(), fd))
        };
        let directories = paths.iter().map(open).collect::<io::Result<_>>()?;
        Ok(Self { directories })
    }

    /// Each directory's descriptor.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = &OwnedFd> {
        self.directories.iter().map(|(_, fd)| fd)
    }

    /// Opens the volume's file. A relative path is looked for in each directory in turn.
    ///
    /// # Errors
    /// See [`VolumeFileError`].
    pub fn open_volume(&self, volume: &Volume) -> Result<VolumeFile, VolumeFileError> {
        let path = Path::new(&volume.path);
        let mut beneath = false;
        for (directory, fd) in &self.directories {
            let relative = if path.is_absolute() {
                match path.strip_prefix(directory) {
                    Ok(relative) => relative,
                    Err(_) => continue,
                }
            } else {
                path
            };
            beneath = true;
            match open_beneath(fd, directory, relative, volume) {
                Err(VolumeFileError::NotFound { .. }) => {}
                found => return found,
            }
        }
        let (path, allowed) = (path.to_owned(), self.listed());
        Err(if beneath {
            VolumeFileError::NotFound { path, allowed }
        } else {
            VolumeFileError::Outside { path, allowed }
        })
    }

    fn listed(&self) -> String {
        let paths = self.directories.iter().map(|(path, _)| path.display());
        paths.map(|p| p.to_string()).collect::<Vec<_>>().join(", ")
    }
}

fn open_beneath(
    directory_fd: &OwnedFd,
    directory: &Path,
    relative: &Path,
    volume: &Volume,
) -> Result<VolumeFile, VolumeFileError> {
    let path = directory.join(relative);
    let walk = |flags: OFlag| {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
        openat2(directory_fd, relative, how)
            .map(File::from)
            .map_err(|errno| walk_error(errno, &path))
    };
    // Looked at first: opening some devices does something, opening a pipe can wait forever.
    let seen = identify(&walk(OFlag::O_PATH)?, &path)?;
    let access = if volume.read_only {
        OFlag::O_RDONLY
    } else {
        OFlag::O_RDWR
    };
    let mut file = walk(access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?;
    let identity = identify(&file, &path)?;
    if identity != seen {
        return Err(VolumeFileError::Exchanged(path));
    }
    // O_NONBLOCK was only for the race; left set, io_uring would answer EAGAIN instead of waiting.
    fcntl(&file, FcntlArg::F_SETFL(access)).map_err(|e| io_error(&path)(e.into()))?;
    let has_bytes = file.seek(SeekFrom::End(0)).map_err(io_error(&path))?;
    if has_bytes < volume.size_bytes {
        return Err(VolumeFileError::TooSmall {
            path,
            has_bytes,
            needs_bytes: volume.size_bytes,
        });
    }
    Ok(VolumeFile { file, identity })
}

fn identify(file: &File, path: &Path) -> Result<Identity, VolumeFileError> {
    let metadata = file.metadata().map_err(io_error(path))?;
    if metadata.is_file() {
        return Ok(Identity::File {
            device: metadata.dev(),
            inode: metadata.ino(),
        });
    }
    if metadata.file_type().is_block_device() {
        return Ok(Identity::Device(metadata.rdev()));
    }
    Err(VolumeFileError::Special {
        path: path.to_owned(),
        kind: kind_of(&metadata),
    })
}

fn kind_of(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_dir() {
        "directory"
    } else if kind.is_fifo() {
        "named pipe"
    } else if kind.is_char_device() {
        "character device"
    } else if kind.is_socket() {
        "socket"
    } else {
        "special file"
    }
}

fn walk_error(errno: Errno, path: &Path) -> VolumeFileError {
    let path = path.to_owned();
    match errno {
        Errno::ELOOP => VolumeFileError::SymbolicLink(path),
        Errno::EXDEV => VolumeFileError::Escapes(path),
        Errno::ENOENT | Errno::ENOTDIR => VolumeFileError::NotFound {
            path,
            allowed: String::new(),
        },
        errno => VolumeFileError::Io {
            path,
            source: errno.into(),
        },
    }
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> VolumeFileError + '_ {
    |source| VolumeFileError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
#[path = "volume_file_tests.rs"]
mod tests;
