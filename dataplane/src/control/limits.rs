//! The limits of volumes and groups: what a grant says of them becomes what the device keeps to, at the
//! attach and whenever another grant comes while it is served.
//!
//! A group is there as long as a granted volume names it. Each grant of its members says the same about it;
//! while the grants of a new bundle come in one after the other, the newest epoch counts.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::sync::Arc;

use bulkhead_protocol::keys::VolumeGrant;
use bulkhead_protocol::{GroupName, VolumeId};

use super::volumes::Volumes;
use crate::blk::BlkDevice;
use crate::qos::Group;

/// The groups there are.
#[derive(Debug, Default)]
pub(super) struct Groups {
    table: HashMap<GroupName, Known>,
}

#[derive(Debug)]
struct Known {
    group: Arc<Group>,
    /// Of the bundle that said last what its limits are.
    epoch: u64,
}

impl Groups {
    /// Has a device keep to the limits of its grant.
    pub(super) fn limit(&mut self, device: &BlkDevice, grant: &VolumeGrant) {
        let group = self.of(grant);
        device.qos().set(&grant.limits, group);
    }

    /// The group of a grant, with the limits that it says unless a newer bundle said others.
    fn of(&mut self, grant: &VolumeGrant) -> Option<Arc<Group>> {
        let said = grant.group.as_ref()?;
        let known = self.table.entry(said.name.clone());
        let known = known.or_insert_with(|| Known {
            group: Group::new(&said.limits),
            epoch: grant.epoch,
        });
        if grant.epoch > known.epoch {
            known.group.set(&said.limits);
            known.epoch = grant.epoch;
        }
        Some(Arc::clone(&known.group))
    }
}

impl Volumes {
    /// A grant was taken in: the device of its volume, if it is served, keeps to its limits from now on.
    pub(super) fn limit(&mut self, id: VolumeId) {
        if let Some(volume) = self.table.get(&id)
            && let Some((_, device)) = volume.served()
        {
            self.groups.limit(device, &volume.held.grant);
        }
        self.forget_groups();
    }

    /// Forgets the groups that no grant names any more.
    pub(super) fn forget_groups(&mut self) {
        let named = |name: &GroupName| {
            let mut groups = self
                .table
                .values()
                .filter_map(|v| v.held.grant.group.as_ref());
            groups.any(|group| group.name == *name)
        };
        self.groups.table.retain(|name, _| named(name));
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::DiscardPolicy;
    use bulkhead_protocol::limits::{GroupGrant, Limits, Rate};

    use super::*;
    use crate::control::grant::GrantedKeys;
    use crate::control::volumes::{Held, Volume};
    use crate::stored::Keeper;

    fn grant(group: &str, per_second: u64, epoch: u64) -> VolumeGrant {
        VolumeGrant {
            volume: VolumeId([7; 16]),
            socket: "disk".parse().expect("a name"),
            allowed_uid: 1000,
            size_bytes: 1 << 20,
            logical_block_bytes: 4096,
            data_unit_bytes: None,
            read_only: false,
            serial: String::new(),
            queues: 1,
            discard: DiscardPolicy::Ignore,
            epoch,
            rekey: None,
            limits: Limits::default(),
            group: Some(GroupGrant {
                name: group.parse().expect("a name"),
                limits: Limits {
                    requests: Some(Rate::with_default_burst(per_second)),
                    bytes: None,
                },
            }),
        }
    }

    #[test]
    fn a_group_goes_with_its_last_member() {
        let mut volumes = Volumes::kept_by(Keeper::none());
        let members = [("a", 1), ("a", 2), ("b", 3)].map(|(group, id)| VolumeGrant {
            volume: VolumeId([id; 16]),
            ..grant(group, 100, 1)
        });
        for grant in members {
            volumes.groups.of(&grant);
            let held = Held {
                grant: grant.clone(),
                keys: GrantedKeys::default(),
            };
            volumes.table.insert(grant.volume, Volume::new(held));
        }
        for (gone, left) in [(1, 2), (2, 1), (3, 0)] {
            volumes.table.remove(&VolumeId([gone; 16]));
            volumes.forget_groups();
            assert_eq!(volumes.groups.table.len(), left, "without volume {gone}");
        }
    }

    #[test]
    fn volumes_that_name_a_group_share_it_and_the_newest_bundle_says_what_it_may_do() {
        let mut groups = Groups::default();
        let first = groups.of(&grant("a", 100, 1)).expect("a group");
        let other = groups.of(&grant("b", 100, 1)).expect("a group");
        assert!(!Arc::ptr_eq(&first, &other));
        for (per_second, epoch, known) in [(200, 3, 3), (100, 2, 3), (300, 4, 4)] {
            let same = groups.of(&grant("a", per_second, epoch)).expect("a group");
            assert!(Arc::ptr_eq(&first, &same));
            assert_eq!(groups.table[&"a".parse().expect("a name")].epoch, known);
        }
        let mut alone = grant("a", 1, 9);
        alone.group = None;
        assert!(groups.of(&alone).is_none());
    }
}
