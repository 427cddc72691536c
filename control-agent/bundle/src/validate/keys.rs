//! What the keys of a volume have to be, as far as it can be told from outside of them.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::rekey::layout;

use super::{MAX_SEALED_BYTES, Problem, check_name};
use crate::key_scope::MAX_BYTES;
use crate::schema::{Rekey, SealedKeyEntry, Volume};

pub(super) fn check(volume: &Volume, host: &str) -> Result<(), Problem> {
    if volume.is_encrypted() {
        check_scope(volume.size_bytes)?;
    }
    check_sealed_keys(volume, host).map_err(|e| ("sealed_key", e))?;
    match &volume.rekey {
        Some(rekey) => check_rekey(volume, rekey, host).map_err(|e| ("rekey", e)),
        None => Ok(()),
    }
}

fn check_scope(size_bytes: u64) -> Result<(), Problem> {
    if size_bytes <= MAX_BYTES {
        return Ok(());
    }
    Err((
        "size",
        format!(
            "{size_bytes} bytes are more than one key may encrypt ({MAX_BYTES}, which are 2^44 \
             cipher blocks or 256 TiB; IEEE 1619): make several volumes, each with its own key, \
             and put them together in the guest"
        ),
    ))
}

fn check_sealed_keys(volume: &Volume, host: &str) -> Result<(), String> {
    if !volume.is_encrypted() {
        return match volume.sealed_keys.len() {
            0 => Ok(()),
            n => Err(format!(
                "a plain volume has no key, but {n} sealed key(s) are given: \
                 set data_unit, or take them out"
            )),
        };
    }
    check_entries(&volume.sealed_keys)?;
    if volume.sealed_for(host).is_none() {
        return Err(format!(
            "no key is sealed to the host {host:?}: make the volume with \
             `bulkhead volume create --host` and that host's public key"
        ));
    }
    Ok(())
}

fn check_rekey(volume: &Volume, rekey: &Rekey, host: &str) -> Result<(), String> {
    if !volume.is_encrypted() {
        return Err("a plain volume has no key to replace: take the re-key out".to_owned());
    }
    if volume.read_only {
        return Err(
            "a read-only volume can't be re-keyed, since every block is written: set \
                    read_only = false for as long as it lasts"
                .to_owned(),
        );
    }
    if layout(volume.size_bytes).is_none() {
        return Err("the volume is too large for a record behind its end".to_owned());
    }
    check_entries(&rekey.previous_keys).map_err(|e| format!("previous_key: {e}"))?;
    if volume.previous_sealed_for(host).is_none() {
        return Err(format!(
            "the previous key is not sealed to the host {host:?}, which needs both: seal them \
             with `bulkhead volume reseal --host` and that host's public key"
        ));
    }
    let same = |old: &SealedKeyEntry| {
        let mut new = volume.sealed_keys.iter();
        new.any(|new| (&new.enc, &new.ciphertext) == (&old.enc, &old.ciphertext))
    };
    match rekey.previous_keys.iter().find(|old| same(old)) {
        Some(entry) => Err(format!(
            "what is sealed to {:?} as the previous key is the key itself: make the re-key with \
             `bulkhead volume rekey`",
            entry.recipient
        )),
        None => Ok(()),
    }
}

fn check_entries(entries: &[SealedKeyEntry]) -> Result<(), String> {
    for (index, entry) in entries.iter().enumerate() {
        let recipient = &entry.recipient;
        check_name(recipient)?;
        let mut earlier = entries.iter().take(index);
        if earlier.any(|other| other.recipient == *recipient) {
            return Err(format!("two keys are sealed to {recipient:?}"));
        }
        check_lengths(entry)?;
    }
    Ok(())
}

fn check_lengths(entry: &SealedKeyEntry) -> Result<(), String> {
    let parts = [
        ("fingerprint", &entry.fingerprint),
        ("enc", &entry.enc),
        ("ciphertext", &entry.ciphertext),
    ];
    for (what, bytes) in parts {
        if bytes.is_empty() || bytes.len() > MAX_SEALED_BYTES {
            return Err(format!(
                "the {what} of the key sealed to {:?} has {} bytes, not 1 to {MAX_SEALED_BYTES}",
                entry.recipient,
                bytes.len()
            ));
        }
    }
    Ok(())
}
