//! The file that keyd's state lies in: read once at the start, then replaced as a whole (written
//! aside, synced, renamed, the directory synced) before anything that depends on it happens.
//!
//! Invariants: the floor never falls; a file that is there but not whole stops keyd, and is never
//! taken for a fresh host.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::state::State;

const NAME: &str = "accepted";
const ASIDE: &str = "accepted.new";
/// Longest state in bytes; room for the ids of ninety thousand volumes.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// Why the state can't be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another keyd runs.
    #[error("another process uses the state directory {0}: end it first")]
    InUse(PathBuf),
    /// A file, or the directory, can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The file is not what keyd wrote.
    #[error(
        "{path} is damaged ({problem}): keyd does not start without its epoch floor. Restore the \
         file from a backup; without it every old bundle that has not expired would be taken again"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Volumes are only ever added.
    #[error(
        "too many volumes wait for their revocation ({0}): restart the data plane, \
         which forgets them all"
    )]
    TooManyHeld(usize),
    /// A mistake of ours that must not reach the disk.
    #[error("the epoch floor would fall from {from} to {to}")]
    FloorFalls {
        /// As it is.
        from: u64,
        /// As it would be.
        to: u64,
    },
}

/// The state directory and the state in it.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    /// Held for its lock, and to sync the directory through.
    directory: File,
    state: Option<State>,
}

impl StateFile {
    /// Opens and locks the directory, and reads what is kept there; a missing file is a fresh host.
    ///
    /// # Errors
    /// See [`StateError`].
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        let io_error = |source| StateError::Io {
            path: path.to_owned(),
            source,
        };
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_DIRECTORY.bits())
            .open(path)
            .map_err(io_error)?;
        match directory.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(StateError::InUse(path.to_owned())),
            Err(fs::TryLockError::Error(source)) => return Err(io_error(source)),
        }
        Ok(Self {
            state: read(&path.join(NAME))?,
            path: path.to_owned(),
            directory,
        })
    }

    /// What is kept; none on a fresh host.
    pub(crate) fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// Makes this the state, on disk before this returns. On an error the old one stays.
    ///
    /// # Errors
    /// See [`StateError`].
    pub(crate) fn replace(&mut self, state: State) -> Result<(), StateError> {
        if self.state.as_ref() == Some(&state) {
            return Ok(());
        }
        let (from, to) = (self.floor(), state.accepted.epoch);
        if to < from {
            return Err(StateError::FloorFalls { from, to });
        }
        let text = state.to_text();
        if text.len() > MAX_BYTES {
            return Err(StateError::TooManyHeld(state.held.len()));
        }
        self.write(text.as_bytes())
            .map_err(|source| StateError::Io {
                path: self.path.join(NAME),
                source,
            })?;
        self.state = Some(state);
        Ok(())
    }

    /// Epoch of the bundle accepted last, 0 on a fresh host.
    pub(crate) fn floor(&self) -> u64 {
        self.state.as_ref().map_or(0, |state| state.accepted.epoch)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let aside = self.path.join(ASIDE);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, self.path.join(NAME))?;
        self.directory.sync_all()
    }
}

fn read(path: &Path) -> Result<Option<State>, StateError> {
    let io_error = |source| StateError::Io {
        path: path.to_owned(),
        source,
    };
    let damaged = |problem| StateError::Damaged {
        path: path.to_owned(),
        problem,
    };
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io_error)?,
    };
    if !file.metadata().map_err(io_error)?.is_file() {
        return Err(damaged("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error)?;
    if bytes.len() > MAX_BYTES {
        return Err(damaged("it is longer than keyd ever writes it"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| damaged("it is not text"))?;
    State::from_text(text).map(Some).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::state::Accepted;

    fn state(epoch: u64) -> State {
        State {
            accepted: Accepted {
                epoch,
                digest: [7; 48],
            },
            held: BTreeSet::new(),
        }
    }

    #[test]
    fn what_was_replaced_is_read_again() {
        let dir = tempfile::tempdir().expect("dir");
        let mut file = StateFile::open(dir.path()).expect("open");
        assert_eq!((file.state(), file.floor()), (None, 0));
        file.replace(state(3)).expect("replace");
        file.replace(state(8)).expect("replace");
        drop(file);
        let file = StateFile::open(dir.path()).expect("open");
        assert_eq!((file.state(), file.floor()), (Some(&state(8)), 8));
    }

    #[test]
    fn the_floor_never_falls() {
        let dir = tempfile::tempdir().expect("dir");
        let mut file = StateFile::open(dir.path()).expect("open");
        file.replace(state(3)).expect("replace");
        let error = file.replace(state(2)).expect_err("falls");
        assert!(matches!(error, StateError::FloorFalls { from: 3, to: 2 }));
        assert_eq!(file.floor(), 3);
    }

    #[test]
    fn a_write_that_fails_changes_nothing() {
        let dir = tempfile::tempdir().expect("dir");
        let mut file = StateFile::open(dir.path()).expect("open");
        file.replace(state(3)).expect("replace");
        fs::create_dir(dir.path().join(ASIDE)).expect("in the way");
        let error = file.replace(state(4)).expect_err("in the way");
        assert!(matches!(error, StateError::Io { .. }));
        assert_eq!(file.floor(), 3);
        drop(file);
        assert_eq!(StateFile::open(dir.path()).expect("open").floor(), 3);
    }

    #[test]
    fn one_process_has_the_directory() {
        let dir = tempfile::tempdir().expect("dir");
        let _file = StateFile::open(dir.path()).expect("open");
        let error = StateFile::open(dir.path()).expect_err("locked");
        assert!(matches!(error, StateError::InUse(_)));
    }

    #[test]
    fn what_is_no_state_is_refused_and_not_taken_for_a_fresh_host() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join(NAME);
        let problem = || match StateFile::open(dir.path()).expect_err("damaged") {
            StateError::Damaged { problem, .. } => problem.to_owned(),
            other => other.to_string(),
        };
        fs::write(&path, "").expect("write");
        assert!(problem().contains("not a state file"));
        fs::write(&path, [0xff]).expect("write");
        assert!(problem().contains("not text"));
        fs::write(&path, vec![b' '; MAX_BYTES + 1]).expect("write");
        assert!(problem().contains("longer"));
        fs::remove_file(&path).expect("remove");
        fs::create_dir(&path).expect("mkdir");
        assert!(problem().contains("not a regular file"));
        fs::remove_dir(&path).expect("remove");
        std::os::unix::fs::symlink("/dev/null", &path).expect("link");
        assert!(problem().contains("symbolic links"));
    }
}
