//! The file that keyd's state lies in: read once at the start, then replaced as a whole (written
//! aside, synced, renamed, the directory synced) before anything that depends on it happens.
//!
//! Invariants: the floor never falls; a file that is there but not whole stops keyd, and is never
//! taken for a fresh host.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::path::{Path, PathBuf};

use crate::directory::{Directory, Unavailable};
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
         whole directory from a backup, one of after the last shred (its files belong together); \
         without it every old bundle that has not expired would be taken again"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// More than is ever read again.
    #[error(
        "keyd can't remember more: {held} volumes wait for their revocation, which the data plane has to \
         confirm, and {shredded} were shredded"
    )]
    TooLong {
        /// Volumes that may be held.
        held: usize,
        /// Volumes that were shredded.
        shredded: usize,
    },
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
    directory: Directory,
    state: Option<State>,
    /// The state may not survive a loss of power.
    unsynced: bool,
}

impl StateFile {
    /// Opens and locks the directory, and reads what is kept there; a missing file is a fresh host.
    ///
    /// # Errors
    /// See [`StateError`].
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        let directory = Directory::open(path).map_err(|error| match error {
            Unavailable::InUse => StateError::InUse(path.to_owned()),
            Unavailable::Io(source) => StateError::Io {
                path: path.to_owned(),
                source,
            },
        })?;
        Ok(Self {
            state: read(&directory)?,
            directory,
            // Whoever wrote it may have ended before it was.
            unsynced: true,
        })
    }

    /// The directory.
    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// What is kept; none on a fresh host.
    pub(crate) fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// Makes this the state, on disk before this returns. On an error the old one stays, or, if
    /// nothing but the last sync failed, the new one may not survive a loss of power: a later call
    /// syncs it, with whatever state.
    ///
    /// # Errors
    /// See [`StateError`].
    pub(crate) fn replace(&mut self, state: State) -> Result<(), StateError> {
        if self.state.as_ref() == Some(&state) {
            return self.sync();
        }
        let (from, to) = (self.floor(), state.accepted.epoch);
        if to < from {
            return Err(StateError::FloorFalls { from, to });
        }
        let text = state.to_text();
        if text.len() > MAX_BYTES {
            return Err(StateError::TooLong {
                held: state.held.len(),
                shredded: state.shredded.len(),
            });
        }
        let io_error = |source| StateError::Io {
            path: self.directory.path(NAME),
            source,
        };
        let written = self.directory.write(ASIDE, text.as_bytes());
        let replaced = written.and_then(|()| self.directory.rename(ASIDE, NAME));
        replaced.map_err(io_error)?;
        self.state = Some(state);
        self.unsynced = true;
        self.sync()
    }

    fn sync(&mut self) -> Result<(), StateError> {
        if self.unsynced {
            self.directory.sync().map_err(|source| StateError::Io {
                path: self.directory.path(NAME),
                source,
            })?;
            self.unsynced = false;
        }
        Ok(())
    }

    /// Epoch of the bundle accepted last, 0 on a fresh host.
    pub(crate) fn floor(&self) -> u64 {
        self.state.as_ref().map_or(0, |state| state.accepted.epoch)
    }
}

fn read(directory: &Directory) -> Result<Option<State>, StateError> {
    let path = directory.path(NAME);
    let damaged = |problem: &str| StateError::Damaged {
        path: path.clone(),
        problem: problem.to_owned(),
    };
    let bytes = match directory.read(NAME, MAX_BYTES) {
        Ok(None) => return Ok(None),
        Ok(Some(bytes)) => bytes,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(damaged(&error.to_string()));
        }
        Err(source) => return Err(StateError::Io { path, source }),
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| damaged("it is not text"))?;
    State::from_text(text).map(Some).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;

    use super::*;
    use crate::state::Accepted;

    fn state(epoch: u64) -> State {
        State {
            accepted: Accepted {
                epoch,
                digest: [7; 48],
            },
            held: BTreeSet::new(),
            rotations: Vec::new(),
            shredded: BTreeMap::new(),
            workers: None,
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
            StateError::Damaged { problem, .. } => problem,
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
