//! What the agent keeps: the envelope accepted last, the epoch floor, an envelope that keyd was
//! asked about and may have accepted, and what an interrupted change has left to do.
//! Format and order of writing: `docs/formats/agent-state.md`.
//!
//! Invariants: `accepted.cose` is the envelope whose digest `floor` names; the floor never falls;
//! a bundle that keyd may have accepted is on disk before keyd hears of it, so that no crash can
//! leave keyd ahead of the agent for good.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_bundle::{
    HostBundle, Policy, TrustRoot, Verified, VerifyError, digest_of, text, verify,
};
use bulkhead_protocol::envelope::MAX_ENVELOPE_BYTES;
use bulkhead_protocol::{SocketName, VolumeId};

use crate::key_use::KeyUse;
use crate::state_file::StateDirectory;

const ACCEPTED: &str = "accepted.cose";
const CANDIDATE: &str = "candidate.cose";
const FLOOR: &str = "floor";
const UNFINISHED: &str = "unfinished";
const KEY_USE: &str = "key-use";
const FLOOR_KIND: &str = "bulkhead agent floor v1";
const UNFINISHED_KIND: &str = "bulkhead agent unfinished v1";
/// Longest text file of the agent in bytes.
const MAX_TEXT_BYTES: usize = 1024 * 1024;

/// Why the state can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another agent runs.
    #[error("another process uses the state directory {0}: end it first")]
    InUse(PathBuf),
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// A file is not what the agent wrote.
    #[error(
        "{path} is damaged ({problem}); the agent starts with no state it can't trust: \
         restore the file from a backup, or move it away ({effect})"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What moving it away does.
        effect: &'static str,
    },
    /// It was accepted once, and the trust root does not take it any more.
    #[error(
        "{path}, accepted earlier, is refused now: {source}; was the trust root changed? \
         Let it also name the operators of this bundle until the next one is applied"
    )]
    NoLongerTrusted {
        /// Which.
        path: PathBuf,
        /// Why.
        source: VerifyError,
    },
}

/// An envelope that was verified, with its bytes.
#[derive(Debug)]
pub struct Stored {
    /// What it says.
    pub bundle: Verified<HostBundle>,
    /// Its bytes.
    pub envelope: Vec<u8>,
}

/// Epoch and digest of the envelope accepted last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Floor {
    pub(crate) epoch: u64,
    pub(crate) digest: [u8; 48],
}

/// What a crash between the acceptance of a bundle and its last step leaves to do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Unfinished {
    /// Every listener that rot may have from us: those the bundle doesn't name are removed.
    pub(crate) listeners: BTreeSet<SocketName>,
    /// Volumes that have to be detached once, because their file is another now.
    pub(crate) detach: BTreeSet<VolumeId>,
}

/// The state directory and what is in it.
#[derive(Debug)]
pub struct Store {
    directory: StateDirectory,
    floor: Option<Floor>,
    unfinished: Unfinished,
    /// As the file has it.
    key_use: KeyUse,
}

/// What was found at a start.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) store: Store,
    /// Accepted last.
    pub(crate) accepted: Option<Stored>,
    /// keyd may have accepted it.
    pub(crate) candidate: Option<Stored>,
}

impl Store {
    /// Reads and checks everything, and completes a commit that was cut off.
    ///
    /// # Errors
    /// See [`StoreError`]; a damaged file is named, never skipped.
    pub(crate) fn open(path: &Path, host: &str, trust: &TrustRoot) -> Result<Found, StoreError> {
        let directory = StateDirectory::open(path).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => StoreError::InUse(path.to_owned()),
            _ => StoreError::Io {
                path: path.to_owned(),
                source,
            },
        })?;
        let mut store = Self {
            floor: read_floor(&directory)?,
            unfinished: read_unfinished(&directory)?,
            key_use: read_key_use(&directory),
            directory,
        };
        let candidate = store.take_candidate(host, trust)?;
        let accepted = store.load_accepted(host, trust)?;
        Ok(Found {
            store,
            accepted,
            candidate,
        })
    }

    /// Epoch of the bundle accepted last, 0 if none.
    #[must_use]
    pub fn floor_epoch(&self) -> u64 {
        self.floor.map_or(0, |floor| floor.epoch)
    }

    /// Digest of the envelope accepted last.
    #[must_use]
    pub fn last_digest(&self) -> Option<[u8; 48]> {
        self.floor.map(|floor| floor.digest)
    }

    pub(crate) fn unfinished(&self) -> &Unfinished {
        &self.unfinished
    }

    /// Replaces what is left to do; on an error the old stays, here and on disk.
    pub(crate) fn set_unfinished(&mut self, unfinished: Unfinished) -> Result<(), StoreError> {
        if unfinished != self.unfinished {
            self.put(UNFINISHED, write_unfinished(&unfinished).as_bytes())?;
            self.unfinished = unfinished;
        }
        Ok(())
    }

    /// How much was encrypted under which key, as it was kept last.
    pub(crate) fn key_use(&self) -> &KeyUse {
        &self.key_use
    }

    /// Keeps that, if it changed.
    pub(crate) fn put_key_use(&mut self, key_use: &KeyUse) -> Result<(), StoreError> {
        if *key_use != self.key_use {
            self.put(KEY_USE, key_use.to_text().as_bytes())?;
            self.key_use = key_use.clone();
        }
        Ok(())
    }

    /// Before keyd is asked about an envelope.
    pub(crate) fn put_candidate(&self, envelope: &[u8]) -> Result<(), StoreError> {
        self.put(CANDIDATE, envelope)
    }

    /// keyd refused the candidate.
    pub(crate) fn drop_candidate(&self) -> Result<(), StoreError> {
        self.directory
            .remove(CANDIDATE)
            .map_err(io_error(&self.directory, CANDIDATE))
    }

    /// keyd accepted the candidate: from the moment the floor is written, it is the bundle.
    pub(crate) fn commit(&mut self, epoch: u64, digest: [u8; 48]) -> Result<(), StoreError> {
        let floor = Floor { epoch, digest };
        self.put(FLOOR, write_floor(&floor).as_bytes())?;
        self.floor = Some(floor);
        self.directory
            .rename(CANDIDATE, ACCEPTED)
            .map_err(io_error(&self.directory, CANDIDATE))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.directory
            .write(name, bytes)
            .map_err(io_error(&self.directory, name))
    }

    fn take_candidate(
        &mut self,
        host: &str,
        trust: &TrustRoot,
    ) -> Result<Option<Stored>, StoreError> {
        let Some(envelope) = read(&self.directory, CANDIDATE, MAX_ENVELOPE_BYTES)? else {
            return Ok(None);
        };
        let digest = digest_of(&envelope);
        if self.last_digest() == Some(digest) {
            self.directory
                .rename(CANDIDATE, ACCEPTED)
                .map_err(io_error(&self.directory, CANDIDATE))?;
            return Ok(None);
        }
        // It was fresh when it was written; whether it took effect, only keyd can say.
        let bundle = verify_again(&envelope, host, trust).map_err(|error| {
            self.damaged(
                CANDIDATE,
                error.to_string(),
                "if keyd accepted it, the next bundle needs an epoch above it",
            )
        })?;
        if bundle.epoch <= self.floor_epoch() {
            self.drop_candidate()?;
            return Ok(None);
        }
        Ok(Some(Stored { bundle, envelope }))
    }

    fn load_accepted(&self, host: &str, trust: &TrustRoot) -> Result<Option<Stored>, StoreError> {
        const EFFECT: &str = "the floor stays, and the next bundle starts from nothing";
        let damaged = |problem: &str| self.damaged(ACCEPTED, problem.to_owned(), EFFECT);
        let Some(envelope) = read(&self.directory, ACCEPTED, MAX_ENVELOPE_BYTES)? else {
            if self.floor.is_some() {
                tracing::warn!(
                    "there is a floor ({}) but no accepted bundle: apply one above it",
                    self.floor_epoch()
                );
            }
            return Ok(None);
        };
        let Some(floor) = self.floor else {
            return Err(damaged("there is no floor beside it"));
        };
        if digest_of(&envelope) != floor.digest {
            return Err(damaged("it is not the envelope that the floor names"));
        }
        let bundle =
            verify_again(&envelope, host, trust).map_err(|source| StoreError::NoLongerTrusted {
                path: self.directory.path_of(ACCEPTED),
                source,
            })?;
        if bundle.epoch != floor.epoch {
            return Err(self.damaged(
                FLOOR,
                format!(
                    "it says epoch {}, the accepted bundle {}",
                    floor.epoch, bundle.epoch
                ),
                "do that only together with accepted.cose; keyd keeps its own floor",
            ));
        }
        Ok(Some(Stored { bundle, envelope }))
    }

    fn damaged(&self, name: &str, problem: String, effect: &'static str) -> StoreError {
        StoreError::Damaged {
            path: self.directory.path_of(name),
            problem,
            effect,
        }
    }
}

/// Verifies an envelope that was fresh before.
fn verify_again(
    envelope: &[u8],
    host: &str,
    trust: &TrustRoot,
) -> Result<Verified<HostBundle>, VerifyError> {
    let policy = Policy {
        trust,
        host,
        epoch_floor: 0,
        last_digest: Some(digest_of(envelope)),
        now: 0,
    };
    verify(envelope, &policy)
}

fn io_error(directory: &StateDirectory, name: &str) -> impl FnOnce(io::Error) -> StoreError {
    let path = directory.path_of(name);
    |source| StoreError::Io { path, source }
}

fn read(
    directory: &StateDirectory,
    name: &str,
    cap_bytes: usize,
) -> Result<Option<Vec<u8>>, StoreError> {
    directory
        .read(name, cap_bytes)
        .map_err(io_error(directory, name))
}

fn read_text<T>(
    directory: &StateDirectory,
    name: &str,
    effect: &'static str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, StoreError> {
    let Some(bytes) = read(directory, name, MAX_TEXT_BYTES)? else {
        return Ok(None);
    };
    match std::str::from_utf8(&bytes).ok().and_then(parse) {
        Some(value) => Ok(Some(value)),
        None => Err(StoreError::Damaged {
            path: directory.path_of(name),
            problem: "its text is not what the agent writes".to_owned(),
            effect,
        }),
    }
}

fn write_floor(floor: &Floor) -> String {
    format!(
        "{FLOOR_KIND}\nepoch {}\naccepted {}\n",
        floor.epoch,
        text::to_hex(&floor.digest)
    )
}

fn read_floor(directory: &StateDirectory) -> Result<Option<Floor>, StoreError> {
    const EFFECT: &str = "do that only together with accepted.cose; keyd keeps its own floor";
    read_text(directory, FLOOR, EFFECT, |text| {
        let mut lines = text.lines();
        let kind = lines.next()?;
        let epoch = lines.next()?.strip_prefix("epoch ")?.parse().ok()?;
        let digest = text::from_hex(lines.next()?.strip_prefix("accepted ")?)?;
        let floor = Floor {
            epoch,
            digest: digest.try_into().ok()?,
        };
        // One value has one text, so that a damaged file can't pass for another.
        (kind == FLOOR_KIND && write_floor(&floor) == text).then_some(floor)
    })
}

fn write_unfinished(unfinished: &Unfinished) -> String {
    let listeners = unfinished
        .listeners
        .iter()
        .map(|n| format!("listener {n}\n"));
    let detach = unfinished.detach.iter().map(|id| format!("detach {id}\n"));
    let lines: String = listeners.chain(detach).collect();
    format!("{UNFINISHED_KIND}\n{lines}")
}

fn read_unfinished(directory: &StateDirectory) -> Result<Unfinished, StoreError> {
    const EFFECT: &str = "listeners of earlier bundles may then stay until rot restarts";
    let found = read_text(directory, UNFINISHED, EFFECT, |text| {
        let mut unfinished = Unfinished::default();
        let mut lines = text.lines();
        let kind = lines.next()?;
        for line in lines {
            match line.split_once(' ')? {
                ("listener", name) => unfinished.listeners.insert(name.parse().ok()?),
                ("detach", id) => unfinished.detach.insert(id.parse().ok()?),
                _ => return None,
            };
        }
        (kind == UNFINISHED_KIND && write_unfinished(&unfinished) == text).then_some(unfinished)
    })?;
    Ok(found.unwrap_or_default())
}

/// A counter is no reason not to start: one that is damaged, or can't be read, begins anew.
fn read_key_use(directory: &StateDirectory) -> KeyUse {
    let problem = match directory.read(KEY_USE, MAX_TEXT_BYTES) {
        Ok(None) => return KeyUse::default(),
        Ok(Some(bytes)) => {
            let text = std::str::from_utf8(&bytes).ok();
            if let Some(found) = text.and_then(KeyUse::from_text) {
                return found;
            }
            "its text is not what the agent writes".to_owned()
        }
        Err(error) => error.to_string(),
    };
    tracing::warn!(
        "{} is damaged ({problem}): what was encrypted under each volume's key is counted from zero",
        directory.path_of(KEY_USE).display()
    );
    KeyUse::default()
}
