//! The plan: what a new bundle changes against the one that is applied. Pure; it asks nobody.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_bundle::{HostBundle, SocketSpec, Volume};
use bulkhead_protocol::{RekeyId, ServedId, SocketName, VolumeId};

mod limits;
mod nics;

pub use limits::LimitChanges;
pub use nics::NicChanges;

/// What kind of change a kept id goes through, where it has to be detached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Something keyd grants: the data plane detaches it when the new grant arrives.
    Grant,
    /// Only the file behind it: the grant stays as it is, so that the agent has to detach it.
    File,
}

/// A volume or a NIC that has to be detached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaving {
    /// Which.
    pub id: ServedId,
    /// Its name in the applied bundle.
    pub name: String,
    /// Also while a frontend is connected.
    pub force: bool,
    /// How it comes back; none if it does not.
    pub change: Option<Change>,
}

/// A volume that grows while it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Growing {
    /// Which.
    pub id: VolumeId,
    /// The size it has, in bytes.
    pub from_bytes: u64,
}

/// A volume that gets a re-key, or whose re-key ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rekeying {
    /// Which volume.
    pub id: VolumeId,
    /// The re-key it has, whose previous key is dropped.
    pub from: Option<RekeyId>,
    /// The re-key it gets.
    pub to: Option<RekeyId>,
    /// Also if the one it has is not done.
    pub force: bool,
}

/// What a bundle changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Volumes that were not there.
    pub added: Vec<VolumeId>,
    /// Volumes and then NICs that go or have to be detached for a change, in the order of the applied bundle.
    pub leaving: Vec<Leaving>,
    /// Volumes that are not detached: those that go on undisturbed, and those that grow.
    pub kept: Vec<VolumeId>,
    /// Of the kept volumes, those that get a greater size.
    pub growing: Vec<Growing>,
    /// Of the volumes that stay or come back, those whose re-key begins or ends.
    pub rekeying: Vec<Rekeying>,
    /// Other limits, groups and workers.
    pub limits: LimitChanges,
    /// Listeners that are new, or get another owner or mode.
    pub bind: Vec<SocketName>,
    /// Listeners that go.
    pub unbind: Vec<SocketName>,
    /// Volumes whose keys keyd destroys, served before or not; those that the applied bundle
    /// shredded already are not among them.
    pub shredded: Vec<VolumeId>,
    /// What becomes of NICs that are not detached, and of switches.
    pub nics: NicChanges,
}

impl Plan {
    /// From the bundle that is applied (none at first) to a new one.
    #[must_use]
    pub fn between(old: Option<&HostBundle>, new: &HostBundle) -> Self {
        let before = old.map_or(&[][..], |bundle| &bundle.volumes);
        let mut plan = Self::default();
        for volume in before {
            let after = new.volume(volume.id);
            let change = after.and_then(|after| change(volume, after));
            plan.rekeying
                .extend(after.and_then(|after| rekeying(volume, after)));
            match (after, change) {
                (Some(after), None) => {
                    plan.kept.push(volume.id);
                    if after.size_bytes > volume.size_bytes {
                        plan.growing.push(Growing {
                            id: volume.id,
                            from_bytes: volume.size_bytes,
                        });
                    }
                }
                (after, change) => plan.leaving.push(Leaving {
                    id: volume.id.into(),
                    name: volume.name.clone(),
                    force: may_force(volume, after, new),
                    change,
                }),
            }
        }
        let old_volume = |id| before.iter().find(|volume| volume.id == id);
        for volume in &new.volumes {
            if old_volume(volume.id).is_none() {
                plan.added.push(volume.id);
            }
        }
        plan.compare_listeners(old, new);
        plan.nics = NicChanges::between(old, new, &mut plan.leaving);
        let done = |id: &&VolumeId| old.is_some_and(|old| old.shred.contains(id));
        let ordered = new.shred.iter().filter(|id| !done(id));
        plan.shredded = ordered.copied().collect();
        plan.limits = LimitChanges::between(old, new, &plan.kept);
        plan
    }

    fn compare_listeners(&mut self, old: Option<&HostBundle>, new: &HostBundle) {
        let before: BTreeMap<_, _> = old
            .into_iter()
            .flat_map(HostBundle::sockets)
            .map(|(_, socket)| (&socket.name, socket))
            .collect();
        let after: BTreeSet<_> = new.sockets().map(|(_, socket)| &socket.name).collect();
        let other = |socket: &&SocketSpec| before.get(&socket.name) != Some(socket);
        let bind = new.sockets().map(|(_, socket)| socket).filter(other);
        self.bind = bind.map(|socket| socket.name.clone()).collect();
        let sockets = old.into_iter().flat_map(HostBundle::sockets);
        let gone = sockets.filter(|(_, socket)| !after.contains(&socket.name));
        self.unbind = gone.map(|(_, socket)| socket.name.clone()).collect();
    }

    /// Whether nothing that runs would be touched, nor anything started.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty()
            && self.growing.is_empty()
            && self.rekeying.is_empty()
            && self.limits.is_empty()
            && self.leaving.is_empty()
            && self.bind.is_empty()
            && self.unbind.is_empty()
            && self.shredded.is_empty()
            && self.nics.is_empty()
    }

    /// One line per change, for the operator.
    #[must_use]
    pub fn describe(&self, new: &HostBundle) -> Vec<String> {
        let mut lines: Vec<String> = self
            .shredded
            .iter()
            .map(|id| self.shred_line(*id))
            .collect();
        if !lines.is_empty() {
            lines.push("host key: replaced, and the old one destroyed".to_owned());
        }
        for leaving in &self.leaving {
            let (kind, name) = (kind(leaving.id), &leaving.name);
            lines.push(match leaving.change {
                None => format!("{kind} {name}: removed"),
                Some(Change::Grant) => format!("{kind} {name}: changed, attached again"),
                Some(Change::File) => format!("{kind} {name}: moved to another file"),
            });
        }
        for volume in self.added.iter().filter_map(|id| new.volume(*id)) {
            lines.push(format!(
                "volume {}: added, file {}, listener {}",
                volume.name, volume.path, volume.socket.name
            ));
        }
        for growing in &self.growing {
            if let Some(volume) = new.volume(growing.id) {
                lines.push(format!(
                    "volume {}: grows from {} to {} bytes; its frontend stays",
                    volume.name, growing.from_bytes, volume.size_bytes
                ));
            }
        }
        for rekeying in &self.rekeying {
            if let Some(volume) = new.volume(rekeying.id) {
                lines.push(self.describe_rekey(rekeying, &volume.name));
            }
        }
        self.limits.describe(new, &mut lines);
        self.nics.describe(new, &mut lines);
        lines.extend(self.bind.iter().map(|n| format!("listener {n}: bound")));
        lines.extend(self.unbind.iter().map(|n| format!("listener {n}: removed")));
        let changed = |id: &VolumeId| {
            self.growing.iter().any(|growing| growing.id == *id)
                || self.rekeying.iter().any(|rekeying| rekeying.id == *id)
                || self.limits.volumes.contains(id)
        };
        match self.kept.iter().filter(|id| !changed(id)).count() {
            0 => {}
            1 => lines.push("1 volume goes on undisturbed".to_owned()),
            count => lines.push(format!("{count} volumes go on undisturbed")),
        }
        lines
    }

    fn describe_rekey(&self, rekeying: &Rekeying, name: &str) -> String {
        let what = match (rekeying.from, rekeying.to) {
            (None, Some(to)) => format!("gets another key (re-key {to}), while it is served"),
            (Some(_), None) => "its previous key is dropped".to_owned(),
            _ => "another re-key takes the place of the one it has".to_owned(),
        };
        let stays = if self.kept.contains(&rekeying.id) {
            "; its frontend stays"
        } else {
            ""
        };
        format!("volume {name}: {what}{stays}")
    }

    fn shred_line(&self, id: VolumeId) -> String {
        let leaving = self.leaving.iter().find(|leaving| leaving.id == id.into());
        let name = leaving.map_or_else(|| id.to_string(), |l| format!("{} ({id})", l.name));
        format!("volume {name}: SHREDDED, its key is destroyed for ever")
    }
}

/// What something is, for the operator.
pub(crate) fn kind(id: ServedId) -> &'static str {
    match id {
        ServedId::Volume(_) => "volume",
        ServedId::Nic(_) => "NIC",
    }
}

/// A volume never shrinks under its id: what lies behind the new end would be lost, and a guest that
/// has it would not know.
///
/// # Errors
/// For the operator: which volume, and what to do.
pub(crate) fn refuse_shrinking(old: Option<&HostBundle>, new: &HostBundle) -> Result<(), String> {
    for before in old.map_or(&[][..], |bundle| &bundle.volumes) {
        if let Some(after) = new.volume(before.id)
            && after.size_bytes < before.size_bytes
        {
            return Err(format!(
                "volume {}: it has {} bytes, and the bundle gives it {}: a volume never shrinks; \
                 make a smaller one (with an id of its own) and copy what is to be kept",
                after.name, before.size_bytes, after.size_bytes
            ));
        }
    }
    Ok(())
}

fn rekeying(old: &Volume, new: &Volume) -> Option<Rekeying> {
    let id_in = |volume: &Volume| volume.rekey.as_ref().map(|rekey| rekey.id);
    let (from, to) = (id_in(old), id_in(new));
    (from != to).then_some(Rekeying {
        id: new.id,
        from,
        to,
        force: new.force_removal,
    })
}

/// Whether the operators said that a connected frontend does not matter.
fn may_force(old: &Volume, new: Option<&Volume>, bundle: &HostBundle) -> bool {
    match new {
        // The bundle that changes a volume decides about its own change.
        Some(new) => new.force_removal,
        None => old.force_removal || bundle.forces_removal_of(old.id),
    }
}

/// What has to be detached for. Every field of a volume is named here, so that a new one can't be
/// forgotten: a field without an opinion does not compile.
fn change(old: &Volume, new: &Volume) -> Option<Change> {
    let Volume {
        id: _,
        // For people, for the next bundle, and for keyd: nothing that is served changes. (The key
        // itself can't change: the data plane keeps it while the grant stays the same.)
        name: _,
        force_removal: _,
        sealed_keys: _,
        // The data plane takes them into the volume it serves.
        limits: _,
        group: _,
        rekey,
        path,
        size_bytes,
        data_unit_bytes,
        logical_block_bytes,
        read_only,
        serial,
        discard,
        queues,
        // The owner and mode of the socket file are the listener's, which is bound anew.
        socket:
            SocketSpec {
                name: socket_name,
                uid: _,
                gid: _,
                mode: _,
            },
        allowed_uid,
    } = old;
    // A grant that differs by a greater size alone, or by a re-key that begins or ends, updates the one
    // that the data plane holds. Of two re-keys the second has another key to replace.
    let one_rekey = match (rekey, &new.rekey) {
        (Some(old), Some(new)) => old.id == new.id,
        _ => true,
    };
    let same_grant = one_rekey
        && *size_bytes <= new.size_bytes
        && *data_unit_bytes == new.data_unit_bytes
        && *logical_block_bytes == new.logical_block_bytes
        && *read_only == new.read_only
        && *serial == new.serial
        && *discard == new.discard
        && *queues == new.queues
        && *socket_name == new.socket.name
        && *allowed_uid == new.allowed_uid;
    match (same_grant, *path == new.path) {
        (false, _) => Some(Change::Grant),
        (true, false) => Some(Change::File),
        (true, true) => None,
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
