//! The files of the host's key, and how one key takes the place of another.
//!
//! | file | holds |
//! | --- | --- |
//! | `host.key` | the host's secret key |
//! | `resealed` | what was sealed to it in the place of what bundles name ([`Resealed`]) |
//! | `host.pub` | the public key, for those who seal |
//! | `host.key.new`, `resealed.new` | those of the next key, while one takes the other's place |
//!
//! A rotation writes the two `.new` files ([`prepare`]), then the state names the new key: that one
//! rename is the point of no return. What is left ([`finish`]) can be done any number of times:
//! the old key's bytes are overwritten where they lie, and the new files get their names. Killed
//! before the point, the old key is in force and the new files are destroyed at the next start;
//! killed after it, the new key is in force and the next start finishes.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::path::PathBuf;

use bulkhead_bundle::text;
use bulkhead_sealing::{KeyError, RecipientKey};

use crate::directory::Directory;
use crate::resealed::Resealed;
use crate::state::Fingerprint;

const KEY: &str = "host.key";
const KEY_NEW: &str = "host.key.new";
const RESEALED: &str = "resealed";
const RESEALED_NEW: &str = "resealed.new";
const PUBLIC: &str = "host.pub";
const PUBLIC_NEW: &str = "host.pub.new";
/// Longest store in bytes: the sealed keys of an envelope of the greatest size are a third of it.
const MAX_RESEALED_BYTES: usize = 4 * 1024 * 1024;
/// Longest public key file in bytes, generously.
const MAX_PUBLIC_BYTES: usize = 16 * 1024;

/// Why the host has no key.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    /// The file.
    #[error("the host's secret key: {0}; `bulkhead host init` makes one")]
    Key(#[from] KeyError),
    /// A key that was destroyed came back, or the one that took its place is lost.
    #[error(
        "{path} is the key {found}, and the host's key is {expected} since a volume was shredded: \
         a key that was destroyed is never used again. Restore the whole directory from a \
         backup of after the shred, or set the host up anew"
    )]
    OtherKey {
        /// The file.
        path: PathBuf,
        /// Fingerprint of what it holds, in hex.
        found: String,
        /// Fingerprint that the state names, in hex.
        expected: String,
    },
    /// The state is of before a shred, and the host's key of after it.
    #[error(
        "{path} is there, which keyd makes when it shreds a volume, and the state beside it does not know \
         of any shred: it is older, or lost, and would take shredded volumes again and lose the others' \
         keys. Restore the whole directory from a backup of after the shred, or set the host up \
         anew in an empty one"
    )]
    OldState {
        /// The file that the state does not know of.
        path: PathBuf,
    },
    /// Without it the remaining volumes have no key.
    #[error(
        "{path} is missing, damaged or of another key of the host: it holds the volume keys that \
         remained when a volume was shredded. Restore the whole directory from a backup of after \
         that, or set the host up anew and seal its volumes to its new key"
    )]
    Resealed {
        /// The file.
        path: PathBuf,
    },
}

/// The host's key, and what is sealed to it in the place of what bundles name. `named` is the key
/// that the state names.
///
/// # Errors
/// See [`HostKeyError`].
pub(crate) fn load(
    directory: &Directory,
    named: Option<Fingerprint>,
) -> Result<(RecipientKey, Resealed), HostKeyError> {
    let Some(named) = named else {
        // The key that the host was made with; new files, if there are any, never counted. A store with
        // its final name did: only what follows on a shred that the state names gives it that.
        let path = directory.path(RESEALED);
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => return Err(HostKeyError::OldState { path }),
        }
        let key = RecipientKey::load(&directory.path(KEY))?;
        let fingerprint = key.public().fingerprint();
        return Ok((key, Resealed::new(fingerprint)));
    };
    let key = match new_key(directory, named) {
        Some(key) => key,
        None => present_key(directory, named)?,
    };
    let of_key = |name| stored(directory, name).filter(|store| store.fingerprint == named);
    let resealed = of_key(RESEALED_NEW).or_else(|| of_key(RESEALED));
    let resealed = resealed.ok_or_else(|| HostKeyError::Resealed {
        path: directory.path(RESEALED),
    })?;
    Ok((key, resealed))
}

/// The new key, if it is the one in force.
fn new_key(directory: &Directory, named: Fingerprint) -> Option<RecipientKey> {
    let key = RecipientKey::load(&directory.path(KEY_NEW)).ok()?;
    (key.public().fingerprint() == named).then_some(key)
}

fn present_key(directory: &Directory, named: Fingerprint) -> Result<RecipientKey, HostKeyError> {
    let path = directory.path(KEY);
    let key = RecipientKey::load(&path)?;
    let found = key.public().fingerprint();
    if found == named {
        return Ok(key);
    }
    Err(HostKeyError::OtherKey {
        path,
        found: text::to_hex(&found),
        expected: text::to_hex(&named),
    })
}

fn stored(directory: &Directory, name: &str) -> Option<Resealed> {
    let bytes = directory.read(name, MAX_RESEALED_BYTES).ok()??;
    Resealed::from_text(std::str::from_utf8(&bytes).ok()?)
}

/// Writes the files of the next key. The old key is in force until the state names the new one.
///
/// # Errors
/// The text says which file; [`discard`] then removes what is there.
pub(crate) fn prepare(
    directory: &Directory,
    key: &RecipientKey,
    resealed: &Resealed,
) -> Result<(), String> {
    // One that was given up may be there.
    discard(directory)?;
    let text = resealed.to_text();
    if text.len() > MAX_RESEALED_BYTES {
        return Err(format!("{RESEALED_NEW} would be over its size cap"));
    }
    let at = |name: &'static str| move |e: io::Error| format!("{name}: {e}");
    directory
        .write(RESEALED_NEW, text.as_bytes())
        .map_err(at(RESEALED_NEW))?;
    directory.step().map_err(at(KEY_NEW))?;
    key.save(&directory.path(KEY_NEW))
        .map_err(|e| e.to_string())?;
    directory.sync().map_err(at(KEY_NEW))
}

/// Destroys the files of a next key that is not to be.
///
/// # Errors
/// The text says which file.
pub(crate) fn discard(directory: &Directory) -> Result<(), String> {
    let at = |name: &'static str| move |e: io::Error| format!("{name}: {e}");
    directory.destroy(KEY_NEW).map_err(at(KEY_NEW))?;
    directory.remove(RESEALED_NEW).map_err(at(RESEALED_NEW))
}

/// Brings the files to what they are without a rotation under way, `key` being in force: the key
/// before it is destroyed, and so is one that never came into force; the public key is renewed.
/// `rotated` says that there was a key before it.
///
/// # Errors
/// The text says which step; it is to be called again.
pub(crate) fn finish(
    directory: &Directory,
    key: &RecipientKey,
    rotated: bool,
) -> Result<(), String> {
    let at = |name: &'static str| move |e: io::Error| format!("{name}: {e}");
    // The state that names the key is to be on disk before anything else is not.
    directory.sync().map_err(at("the directory"))?;
    let named = key.public().fingerprint();
    let is_stored = |name| stored(directory, name).is_some_and(|s| s.fingerprint == named);
    if is_stored(RESEALED_NEW) {
        directory
            .rename(RESEALED_NEW, RESEALED)
            .map_err(at(RESEALED_NEW))?;
    }
    if new_key(directory, named).is_some() {
        directory.overwrite(KEY).map_err(at(KEY))?;
        directory.rename(KEY_NEW, KEY).map_err(at(KEY_NEW))?;
    }
    // Nothing new is thrown away but beside what is in force, read again.
    present_key(directory, named).map_err(|e| e.to_string())?;
    if rotated && !is_stored(RESEALED) {
        return Err(format!("{RESEALED}: it can't be read again"));
    }
    discard(directory)?;
    publish(directory, key).map_err(at(PUBLIC))?;
    directory.sync().map_err(at("the directory"))
}

/// The public key in its file, where it is not yet.
fn publish(directory: &Directory, key: &RecipientKey) -> io::Result<()> {
    let text = key.public().to_text();
    let there = directory.read(PUBLIC, MAX_PUBLIC_BYTES);
    if matches!(there, Ok(Some(bytes)) if bytes == text.as_bytes()) {
        return Ok(());
    }
    directory.write(PUBLIC_NEW, text.as_bytes())?;
    directory.rename(PUBLIC_NEW, PUBLIC)
}
