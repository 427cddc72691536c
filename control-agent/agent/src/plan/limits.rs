//! What a bundle changes about how much may be done, and by how many workers. None of it detaches a
//! volume.

use bulkhead_bundle::{HostBundle, Volume};
use bulkhead_protocol::{GroupName, VolumeId};

/// Changes of limits, groups and workers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LimitChanges {
    /// Volumes that stay attached and get other limits or another group.
    pub volumes: Vec<VolumeId>,
    /// Groups that are new or get other limits.
    pub groups: Vec<GroupName>,
    /// The data plane is to have other workers.
    pub workers: bool,
}

impl LimitChanges {
    /// Between two bundles; `kept` are the volumes that stay attached.
    pub(super) fn between(old: Option<&HostBundle>, new: &HostBundle, kept: &[VolumeId]) -> Self {
        let before = |id| old.and_then(|old| old.volume(id));
        let other = |new: &&Volume| {
            let is_same = |old: &Volume| (old.limits, &old.group) == (new.limits, &new.group);
            kept.contains(&new.id) && !before(new.id).is_some_and(is_same)
        };
        let known = |name: &GroupName| {
            let mut groups = old.into_iter().flat_map(|old| &old.groups);
            groups.find(|group| group.name == *name)
        };
        let groups = new.groups.iter().filter(|g| known(&g.name) != Some(*g));
        Self {
            volumes: new.volumes.iter().filter(other).map(|v| v.id).collect(),
            groups: groups.map(|group| group.name.clone()).collect(),
            workers: old.and_then(|old| old.workers.as_ref()) != new.workers.as_ref(),
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// One line per change, for the operator.
    pub(super) fn describe(&self, new: &HostBundle, lines: &mut Vec<String>) {
        for volume in self.volumes.iter().filter_map(|id| new.volume(*id)) {
            let group = match &volume.group {
                Some(group) => format!(", group {group}"),
                None => String::new(),
            };
            lines.push(format!(
                "volume {}: limits {}{group}; its frontend stays",
                volume.name, volume.limits
            ));
        }
        let changed = |name: &GroupName| self.groups.contains(name);
        for group in new.groups.iter().filter(|group| changed(&group.name)) {
            lines.push(format!("group {}: limits {}", group.name, group.limits));
        }
        if self.workers {
            lines.push(match &new.workers {
                Some(workers) => format!("workers: {workers}"),
                None => "workers: what the host itself says".to_owned(),
            });
        }
    }
}
