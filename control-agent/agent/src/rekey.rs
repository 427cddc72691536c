//! What a bundle may do to a volume that is re-keyed: it is held against the record in the volume's file,
//! before anything has changed. The data plane has the last word, and this spares the operator a bundle
//! in force that it can't carry out.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_bundle::{HostBundle, Volume};
use bulkhead_protocol::RekeyId;
use bulkhead_protocol::rekey::{Found, Record, Stage};

use crate::plan::Plan;
use crate::volume_file::VolumeDirectories;

/// A volume keeps its size from the bundle that brings a re-key to the one that drops the previous key:
/// the record of how far it is lies behind its end.
///
/// # Errors
/// For the operator: which volume, and what to do.
pub(crate) fn refuse_resizing(old: Option<&HostBundle>, new: &HostBundle) -> Result<(), String> {
    for before in old.map_or(&[][..], |bundle| &bundle.volumes) {
        let Some(after) = new.volume(before.id) else {
            continue;
        };
        let rekeyed = before.rekey.is_some() || after.rekey.is_some();
        if rekeyed && before.size_bytes != after.size_bytes {
            return Err(format!(
                "volume {}: it is re-keyed, and can't get {} bytes instead of {}: let the re-key be \
                 done, apply a bundle without it, and then another with the new size",
                after.name, after.size_bytes, before.size_bytes
            ));
        }
    }
    Ok(())
}

/// Refuses a re-key that its file is not prepared for, and one that ends before it is done (unless it is
/// forced): what it had not come to is under the previous key.
///
/// # Errors
/// For the operator: which volume, how far it is, and what to do.
pub(crate) fn check_files(
    directories: &VolumeDirectories,
    new: &HostBundle,
    plan: &Plan,
) -> Result<(), String> {
    for rekeying in &plan.rekeying {
        let Some(volume) = new.volume(rekeying.id) else {
            continue;
        };
        let record = record(directories, volume)?;
        if let Some(from) = rekeying.from.filter(|_| !rekeying.force) {
            check_done(volume, from, record)?;
        }
        if let Some(to) = rekeying.to {
            check_prepared(volume, to, record)?;
        }
    }
    for volume in plan.added.iter().filter_map(|id| new.volume(*id)) {
        if let Some(rekey) = &volume.rekey {
            check_prepared(volume, rekey.id, record(directories, volume)?)?;
        }
    }
    Ok(())
}

/// The record of a re-key of this volume. That of another volume is none: the file is a copy, say.
fn record(directories: &VolumeDirectories, volume: &Volume) -> Result<Option<Record>, String> {
    let at = |error: &dyn std::fmt::Display| format!("volume {}: {error}", volume.name);
    let file = directories.open_volume(volume).map_err(|e| at(&e))?;
    match file.rekey_record(volume) {
        Ok(None | Some(Found::Nothing)) => Ok(None),
        Ok(Some(Found::Record(record))) => Ok(Some(record).filter(|r| r.volume == volume.id)),
        Ok(Some(Found::Damaged)) => Err(at(&format!(
            "the re-key record behind the end of {} is damaged: which part is under which key \
             stands nowhere else; restore it from a backup",
            volume.path
        ))),
        Err(error) => Err(at(&format!(
            "the re-key record behind the end of {} can't be read: {error}",
            volume.path
        ))),
    }
}

fn check_prepared(volume: &Volume, to: RekeyId, record: Option<Record>) -> Result<(), String> {
    let problem = match record {
        Some(record) if record.rekey == to => return Ok(()),
        Some(record) => format!(
            "its file is prepared for another re-key, {}, and not",
            record.rekey
        ),
        None => "its file is not prepared".to_owned(),
    };
    Err(format!(
        "volume {}: {problem} for the re-key {to}: run `bulkhead volume rekey --prepare --volume` \
         its stanza `--file` {}, and apply the bundle again",
        volume.name, volume.path
    ))
}

fn check_done(volume: &Volume, from: RekeyId, record: Option<Record>) -> Result<(), String> {
    let how_far = match record {
        Some(record) if record.rekey == from => match record.stage {
            // Another host may have been first.
            Stage::Done { .. } | Stage::Over { .. } => return Ok(()),
            Stage::Running { frontier_bytes, .. } => {
                let percent =
                    u128::from(frontier_bytes) * 100 / u128::from(record.size_bytes.max(1));
                format!("it is at {percent} %")
            }
            Stage::Prepared => "it has not begun".to_owned(),
        },
        _ => "its file has no record of it".to_owned(),
    };
    Err(format!(
        "volume {}: its re-key {from} is not done, {how_far}, and the previous key is needed until it \
         is: apply this bundle when `bulkhead status` says `done` of it. (One that is to be given up: \
         leave the volume out of one bundle, or set force_removal = true for it; what is under \
         the key that is dropped can't be read without it.)",
        volume.name
    ))
}

#[cfg(test)]
#[path = "rekey_tests.rs"]
mod tests;
