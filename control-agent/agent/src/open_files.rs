//! Opening every file that a new bundle needs, before anything is changed: each file serves one
//! volume, and is large enough for it. No lock is taken: a volume that migrates is in the bundles of two
//! hosts at once, and whose turn it is to write is decided between their data planes.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use bulkhead_bundle::{HostBundle, Volume};
use bulkhead_protocol::VolumeId;

use crate::plan::Plan;
use crate::volume_file::{Identity, VolumeDirectories, VolumeFile};

/// The files of volumes, by id.
pub(crate) type Files = BTreeMap<VolumeId, VolumeFile>;

/// Opens the files of the volumes that are new or change, and checks them against those of the
/// volumes that stay. One that grows is only measured: the data plane has it open.
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
        let grows = plan.growing.iter().any(|growing| growing.id == volume.id);
        let identity = if kept && !grows {
            // One that can't be opened now is the concern of its own pending step.
            owned.iter().find(|(id, _)| **id == volume.id).map(|o| *o.1)
        } else {
            let file = directories
                .open_volume(volume)
                .map_err(|error| format!("volume {}: {error}", volume.name))?;
            let identity = file.identity();
            if !kept {
                opened.insert(volume.id, file);
            }
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
