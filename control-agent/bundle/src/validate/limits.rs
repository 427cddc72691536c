//! What limits, groups and workers have to be.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::limits::Limits;

use super::{Part, Problem, ValidationError, of};
use crate::schema::{Group, HostBundle, Volume};

/// Checks the groups, what volumes say of limits, and the workers.
pub(super) fn check(bundle: &HostBundle) -> Result<(), ValidationError> {
    for (index, group) in bundle.groups.iter().enumerate() {
        check_group(bundle, index, group)
            .map_err(|problem| of(Part::Group(index, group.name.to_string()), problem))?;
    }
    for (index, volume) in bundle.volumes.iter().enumerate() {
        check_volume(bundle, volume)
            .map_err(|problem| of(Part::Volume(index, volume.name.clone()), problem))?;
    }
    match &bundle.workers {
        Some(workers) => {
            let checked = workers.check();
            checked.map_err(|problem| of(Part::Workers, ("count", problem)))
        }
        None => Ok(()),
    }
}

fn check_group(bundle: &HostBundle, index: usize, group: &Group) -> Result<(), Problem> {
    let mut earlier = bundle.groups.iter().take(index);
    if earlier.any(|other| other.name == group.name) {
        return Err(("name", "there are two groups of that name".to_owned()));
    }
    check_limits(&group.limits)
}

/// A group that nobody defined would be one without limits, and a slip of the pen that.
fn check_volume(bundle: &HostBundle, volume: &Volume) -> Result<(), Problem> {
    check_limits(&volume.limits)?;
    match &volume.group {
        Some(name) if bundle.group_of(volume).is_none() => Err((
            "group",
            format!(
                "there is no group {:?} in the bundle: add [[group]] with that name",
                name.as_str()
            ),
        )),
        _ => Ok(()),
    }
}

fn check_limits(limits: &Limits) -> Result<(), Problem> {
    limits.check().map_err(|e| ("limits", e.to_string()))
}
