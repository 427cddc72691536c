//! What the agent tells an operator about the host.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_bundle::Nic;
use bulkhead_protocol::admin::{AdminReply, HostStatus, NicEntry, SwitchEntry, VolumeEntry};
use bulkhead_protocol::control::{
    NICS_PER_MESSAGE, NicStatus, RekeyState, StorageState, StorageStatus, SwitchStatus,
    VolumeStatus,
};
use bulkhead_protocol::limits::GroupGrant;
use bulkhead_protocol::rot::Role;
use bulkhead_protocol::{NicId, SocketName, VolumeId};

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

    /// What the NICs do whose id is above one, and all switches, with what the data plane said of them just now.
    pub(crate) fn nic_status(
        &self,
        after: Option<NicId>,
        mut said: Vec<NicStatus>,
        switches_said: &[SwitchStatus],
    ) -> AdminReply {
        for nic in &mut said {
            nic.fault = nic.fault.as_deref().map(plain);
            for drops in nic.tx_drops.iter_mut().chain(&mut nic.rx_drops) {
                drops.reason = plain(&drops.reason);
            }
        }
        let bundle = self.known.accepted.as_ref().map(|stored| &*stored.bundle);
        let nics = bundle.map_or(&[][..], |bundle| &bundle.nics).iter();
        let mut nics: Vec<&Nic> = nics
            .filter(|nic| after.is_none_or(|a| nic.id > a))
            .collect();
        nics.sort_by_key(|nic| nic.id);
        let more = nics.len() > NICS_PER_MESSAGE;
        nics.truncate(NICS_PER_MESSAGE);
        let entry = |nic: &Nic| NicEntry {
            nic: nic.id,
            name: nic.name.clone(),
            socket: nic.socket.name.clone(),
            socket_path: self.socket_path(&nic.socket.name),
            mac: nic.mac,
            mtu: nic.mtu,
            queue_pairs: nic.queue_pairs,
            port: nic.port.clone(),
            limits: nic.limits,
            state: said.iter().find(|s| s.nic == nic.id).cloned(),
        };
        let switches = bundle.map_or(&[][..], |bundle| &bundle.switches).iter();
        let switches = switches.map(|switch| SwitchEntry {
            name: switch.name.clone(),
            uplink: switch.uplink.clone(),
            state: switches_said
                .iter()
                .find(|s| s.name == switch.name)
                .cloned(),
        });
        AdminReply::Nics {
            nics: nics.into_iter().map(entry).collect(),
            more,
            switches: switches.collect(),
        }
    }

    fn socket_path(&self, name: &SocketName) -> String {
        let path = self.host.vhost_dir.join(format!("{name}.sock"));
        path.display().to_string()
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
        let entry = |volume: &bulkhead_bundle::Volume| VolumeEntry {
            volume: volume.id,
            name: volume.name.clone(),
            socket: volume.socket.name.clone(),
            socket_path: self.socket_path(&volume.socket.name),
            state: said.iter().find(|s| s.volume == volume.id).cloned(),
            key_bytes: self.key_use.of(volume.id),
            limits: volume.limits,
            group: volume.group.clone(),
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
            nics: accepted.and_then(|stored| u32::try_from(stored.bundle.nics.len()).ok()),
        }
    }
}
