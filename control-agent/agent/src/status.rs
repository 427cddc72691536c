//! What the agent tells an operator about the host.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::VolumeId;
use bulkhead_protocol::admin::{HostStatus, VolumeEntry};
use bulkhead_protocol::control::{RekeyState, StorageState, StorageStatus, VolumeStatus};
use bulkhead_protocol::limits::GroupGrant;
use bulkhead_protocol::rot::Role;

use crate::agent::Agent;
use crate::text::{first_lines, plain};

impl Agent {
    /// The storage of a volume does worse than before, or better: a line for whoever reads the log.
    pub(crate) fn tell_of_storage(&self, volume: VolumeId, status: &StorageStatus) {
        let accepted = self.known.accepted.as_ref();
        let named = accepted.and_then(|stored| stored.bundle.volume(volume));
        let name = named.map_or("", |volume| &volume.name);
        if status.state == StorageState::Fine {
            tracing::info!(%volume, name, "storage {status}");
        } else {
            tracing::warn!(%volume, name, "storage {status}");
        }
    }

    /// The status, with what the data plane said just now; none if it did not.
    pub(crate) fn status(&self, said: Option<Vec<VolumeStatus>>) -> HostStatus {
        let workers = self.known.workers.clone().filter(|_| said.is_some());
        let mut said = said.unwrap_or_default();
        for volume in &mut said {
            volume.fault = volume.fault.as_deref().map(plain);
            if let Some(RekeyState::Failed { reason }) =
                volume.rekey.as_mut().map(|rekey| &mut rekey.state)
            {
                *reason = plain(reason);
            }
        }
        let accepted = self.known.accepted.as_ref();
        let volumes = accepted.map_or(&[][..], |stored| &stored.bundle.volumes);
        let entry = |volume: &bulkhead_bundle::Volume| {
            let name = &volume.socket.name;
            let socket_path = self.host.vhost_dir.join(format!("{name}.sock"));
            VolumeEntry {
                volume: volume.id,
                name: volume.name.clone(),
                socket: name.clone(),
                socket_path: socket_path.display().to_string(),
                state: said.iter().find(|s| s.volume == volume.id).cloned(),
                key_bytes: self.key_use.of(volume.id),
                limits: volume.limits,
                group: volume.group.clone(),
            }
        };
        let groups = accepted.map_or(&[][..], |stored| &stored.bundle.groups);
        let group = |group: &bulkhead_bundle::Group| GroupGrant {
            name: group.name.clone(),
            limits: group.limits,
        };
        let is_known = |id: VolumeId| volumes.iter().any(|volume| volume.id == id);
        let removed = said.iter().filter(|volume| !is_known(volume.volume));
        let left = removed.filter_map(|volume| {
            let storage = volume.storage?;
            let line = format!("volume {} was removed: {storage}", volume.volume);
            (storage.state == StorageState::GivenUp).then_some(line)
        });
        let pending = self.pending.iter().cloned().chain(left).collect();
        let mut processes = Vec::new();
        for role in Role::ALL {
            processes.extend(self.processes.iter().filter(|p| p.role == role).cloned());
        }
        HostStatus {
            host: self.host.name.clone(),
            epoch: accepted.map(|stored| stored.bundle.epoch),
            epoch_floor: self.store.floor_epoch(),
            digest: accepted.map(|stored| stored.bundle.digest().into()),
            processes,
            volumes: volumes.iter().map(entry).collect(),
            pending: first_lines(pending),
            keys: self.known.keys.clone().map(Box::new),
            groups: groups.iter().map(group).collect(),
            workers: workers.map(Box::new),
            programs: self.programs.clone(),
        }
    }
}
