//! One key serves one volume: two volumes under one key would show where their contents are alike, and
//! the limits of a key would hold for both together.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;

use bulkhead_bundle::{HostBundle, Volume};
use bulkhead_crypto::secret::SecretMemory;
use bulkhead_protocol::keys::XTS_KEY_BYTES;
use subtle::ConstantTimeEq as _;

use crate::vault::{NoKey, Vault};

/// Why a bundle's keys are not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SharedKey {
    /// Two volumes, one key.
    #[error(
        "the volumes {0:?} and {1:?} have the same key (or one has the other's as its previous key), \
         and a key serves one volume: make one of them anew with `bulkhead volume create`, and copy \
         its data"
    )]
    Volumes(String, String),
    /// There is no room to compare them in.
    #[error("there is no secret memory to compare the keys of the volumes in: {0}")]
    Memory(#[from] io::Error),
}

/// Refuses a bundle in which a key, or a previous key, is that of two volumes. What does not open
/// says nothing here: it is not granted either.
///
/// # Errors
/// See [`SharedKey`]; it names the volumes, and nothing of the key.
pub(crate) fn check_unshared(vault: &Vault, bundle: &HostBundle) -> Result<(), SharedKey> {
    let encrypted = bundle.volumes.iter().filter(|v| v.is_encrypted());
    let keys_of = |volume: &Volume| 1 + usize::from(volume.rekey.is_some());
    let most: usize = encrypted.clone().map(keys_of).sum();
    if most < 2 {
        return Ok(());
    }
    // All keys in one run of pages: a page for each would come near the limit on mappings.
    let mut memory = SecretMemory::new(most * XTS_KEY_BYTES)?;
    let mut places = memory.as_mut_bytes().chunks_exact_mut(XTS_KEY_BYTES);
    let mut owners: Vec<&Volume> = Vec::with_capacity(most);
    for volume in encrypted {
        let pages = match vault.unseal(volume) {
            // It may open a moment later, and then nobody has compared it.
            Err(NoKey::Memory(error)) => return Err(SharedKey::Memory(error)),
            opened => opened.unwrap_or_default(),
        };
        for page in pages {
            if let Some(place) = places.next() {
                place.copy_from_slice(page.as_bytes());
                owners.push(volume);
            }
        }
    }
    let keys = || memory.as_bytes().chunks_exact(XTS_KEY_BYTES);
    for (index, (key, owner)) in keys().zip(&owners).enumerate() {
        for (other, its_owner) in keys().zip(&owners).skip(index + 1) {
            // Each comparison takes the same time, and its result is no secret: it is what is refused.
            if owner.id != its_owner.id && bool::from(key.ct_eq(other)) {
                let names = (owner.name.clone(), its_owner.name.clone());
                return Err(SharedKey::Volumes(names.0, names.1));
            }
        }
    }
    Ok(())
}
