//! What a bundle changes about network cards and switches.

use bulkhead_bundle::{HostBundle, Nic, SocketSpec};
use bulkhead_protocol::net::Uplink;
use bulkhead_protocol::{NicId, SwitchName};

use super::{Change, Leaving};

/// Changes of NICs that are not detached for them, and of switches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NicChanges {
    /// NICs that were not there.
    pub added: Vec<NicId>,
    /// NICs that are not detached.
    pub kept: Vec<NicId>,
    /// Of the kept ones, those that get other limits, checks or another mirror.
    pub live: Vec<NicId>,
    /// Switches that are new or get another uplink.
    pub switches: Vec<SwitchName>,
    /// Switches that go.
    pub switches_gone: Vec<SwitchName>,
}

impl NicChanges {
    /// Between two bundles; NICs that have to be detached are added to `leaving`.
    pub(super) fn between(
        old: Option<&HostBundle>,
        new: &HostBundle,
        leaving: &mut Vec<Leaving>,
    ) -> Self {
        let mut changes = Self::default();
        let before = |id| old.and_then(|old| old.nic(id));
        for nic in &new.nics {
            if before(nic.id).is_none() {
                changes.added.push(nic.id);
            }
        }
        if let Some(old) = old {
            changes.compare(old, new, leaving);
        }
        let known = |name| old.and_then(|old| old.switch(name));
        let other = new.switches.iter().filter(|s| known(&s.name) != Some(*s));
        changes.switches = other.map(|switch| switch.name.clone()).collect();
        let gone = old.map_or(&[][..], |old| &old.switches).iter();
        let gone = gone.filter(|switch| new.switch(&switch.name).is_none());
        changes.switches_gone = gone.map(|switch| switch.name.clone()).collect();
        changes
    }

    fn compare(&mut self, old: &HostBundle, new: &HostBundle, leaving: &mut Vec<Leaving>) {
        for nic in &old.nics {
            let after = new.nic(nic.id);
            let stays = after.filter(|after| {
                let uplinks = (old.uplink_of(nic), new.uplink_of(after));
                !needs_detach(nic, after, uplinks)
            });
            if let Some(after) = stays {
                self.kept.push(nic.id);
                let live = |nic: &Nic| (nic.limits, nic.checks.clone(), nic.mirror.clone());
                if live(nic) != live(after) {
                    self.live.push(nic.id);
                }
                continue;
            }
            leaving.push(Leaving {
                id: nic.id.into(),
                name: nic.name.clone(),
                force: match after {
                    // The bundle that changes a NIC decides about its own change.
                    Some(after) => after.force_removal,
                    None => nic.force_removal || new.force_remove_nics.contains(&nic.id),
                },
                change: after.map(|_| Change::Grant),
            });
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        let Self {
            added,
            kept: _,
            live,
            switches,
            switches_gone,
        } = self;
        added.is_empty() && live.is_empty() && switches.is_empty() && switches_gone.is_empty()
    }

    /// One line per change, for the operator.
    pub(super) fn describe(&self, new: &HostBundle, lines: &mut Vec<String>) {
        for switch in self.switches.iter().filter_map(|name| new.switch(name)) {
            let uplink = switch.uplink.as_ref();
            let uplink = uplink.map_or("none".to_owned(), ToString::to_string);
            lines.push(format!("switch {}: uplink {uplink}", switch.name));
        }
        let gone = self.switches_gone.iter();
        lines.extend(gone.map(|name| format!("switch {name}: removed")));
        for nic in self.added.iter().filter_map(|id| new.nic(*id)) {
            lines.push(format!(
                "NIC {}: added, {} on {}, listener {}",
                nic.name, nic.mac, nic.port, nic.socket.name
            ));
        }
        for nic in self.live.iter().filter_map(|id| new.nic(*id)) {
            let mirror = nic.mirror.as_ref();
            let mirror = mirror.map_or("none".to_owned(), |mirror| mirror.file.clone());
            lines.push(format!(
                "NIC {}: limits {}, checks {}, mirror {mirror}; its frontend stays",
                nic.name,
                nic.limits,
                checks(nic),
            ));
        }
        let undisturbed = |id: &&NicId| !self.live.contains(id);
        match self.kept.iter().filter(undisturbed).count() {
            0 => {}
            1 => lines.push("1 NIC goes on undisturbed".to_owned()),
            count => lines.push(format!("{count} NICs go on undisturbed")),
        }
    }
}

fn checks(nic: &Nic) -> String {
    let mac = if nic.checks.mac { "MAC" } else { "no MAC" };
    let sources: Vec<_> = nic.checks.sources.iter().map(ToString::to_string).collect();
    let checks = match sources.is_empty() {
        true => mac.to_owned(),
        false => format!("{mac} and {}", sources.join(" ")),
    };
    match nic.checks.trusted.is_nothing() {
        true => checks,
        false => format!(
            "{checks}, trusted: {}",
            nic.checks.trusted.names().join(" and ")
        ),
    }
}

/// Whether it has to be detached. Every field of a NIC is named here, so that a new one can't be forgotten: a
/// field without an opinion does not compile.
fn needs_detach(old: &Nic, new: &Nic, uplinks: (Option<&Uplink>, Option<&Uplink>)) -> bool {
    let Nic {
        id: _,
        // For people, and for the next bundle.
        name: _,
        force_removal: _,
        // The data plane takes them into the NIC that it serves.
        limits: _,
        checks: _,
        mirror: _,
        mac,
        mtu,
        queue_pairs,
        port,
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
    let same = *mac == new.mac
        && *mtu == new.mtu
        && *queue_pairs == new.queue_pairs
        && *port == new.port
        && *socket_name == new.socket.name
        && *allowed_uid == new.allowed_uid
        && uplinks.0 == uplinks.1;
    !same
}
