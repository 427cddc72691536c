//! Opening every file that a new bundle needs, before anything is changed: each file serves one
//! volume, and one that an applied volume holds already keeps its open file and its lock.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use bulkhead_bundle::{HostBundle, Volume};
use bulkhead_protocol::VolumeId;

use crate::plan::Plan;
use crate::volume_file::{Identity, VolumeDirectories, VolumeFile};

/// The files of volumes, by id.
pub(crate) type Files = BTreeMap<VolumeId, VolumeFile>;

/// Opens the files of the volumes that are new or change, and checks them against those of the
/// volumes that stay.
///
/// # Errors
/// For the operator: which volume, which path, what to do.
pub(crate) fn open_new(
    directories: &VolumeDirectories,
    old: Option<&HostBundle>,
    held: &Files,
    new: &HostBundle,
    plan: &Plan,
) -> Result<Files, String> {
    let owned = owned_now(directories, old, held);
    let mut taken: BTreeMap<Identity, &str> = BTreeMap::new();
    let mut opened = Files::new();
    for volume in &new.volumes {
        let kept = plan.kept.contains(&volume.id);
        let identity = if kept {
            // One that can't be opened now is the concern of its own pending step.
            owned.iter().find(|(id, _)| **id == volume.id).map(|o| *o.1)
        } else {
            let file = directories
                .open_volume(volume)
                .map_err(|error| format!("volume {}: {error}", volume.name))?;
            let identity = file.identity();
            opened.insert(volume.id, file);
            Some(identity)
        };
        let Some(identity) = identity else { continue };
        if let Some(other) = taken.insert(identity, &volume.name) {
            return Err(format!(
                "volumes {other} and {}: {} is the same file as that of {other}, under another \
                 path or as a hard link; each volume has its own",
                volume.name, volume.path
            ));
        }
    }
    for volume in &new.volumes {
        if let Some(file) = opened.get_mut(&volume.id) {
            lock(file, held, &owned)
                .map_err(|reason| format!("volume {}: {reason}", volume.name))?;
        }
    }
    Ok(opened)
}

/// What the applied volumes occupy, whether the agent or only the data plane holds it.
fn owned_now(
    directories: &VolumeDirectories,
    old: Option<&HostBundle>,
    held: &Files,
) -> BTreeMap<VolumeId, Identity> {
    let volumes = old.map_or(&[][..], |bundle| &bundle.volumes);
    let identity = |volume: &Volume| match held.get(&volume.id) {
        Some(file) => Some(file.identity()),
        None => Some(directories.open_volume(volume).ok()?.identity()),
    };
    let known = volumes.iter().map(|v| (v.id, identity(v)));
    known.filter_map(|(id, i)| Some((id, i?))).collect()
}

/// Locks a file against others. One that an applied volume has open in the same way is replaced by
/// that, with its lock; the lock on one that is ours and was opened in another way is taken when
/// the data plane has let go of it.
fn lock(
    file: &mut VolumeFile,
    held: &Files,
    owned: &BTreeMap<VolumeId, Identity>,
) -> Result<(), String> {
    let same = |other: &&VolumeFile| {
        other.identity() == file.identity() && other.is_read_only() == file.is_read_only()
    };
    if let Some(ours) = held.values().find(same) {
        *file = ours.share().map_err(|error| error.to_string())?;
    } else if !owned.values().any(|identity| *identity == file.identity()) {
        file.lock().map_err(|error| error.to_string())?;
    }
    Ok(())
}
