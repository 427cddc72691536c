//! NICs and switches among the steps of a pass: what is known of them, and how the questions about them are put.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use bulkhead_bundle::{HostBundle, Nic, Verified};
use bulkhead_protocol::control::{AgentToDataplane, MirrorStatus, Networks};
use bulkhead_protocol::net::PortSpec;
use bulkhead_protocol::{NicId, SwitchName};

use crate::agent::{Agent, Known};
use crate::message::{Action, Peer};
use crate::mirror_file::MirrorDirectory;
use crate::ports::{self, Owner};
use crate::step::Step;
use crate::text::plain;

/// Why nothing can be mirrored.
const NO_DIRECTORY: &str = "there is no directory for mirrors: start bulkhead-rot with --mirror-dir and one that is the \
                            agent's user's, or take the mirror out of the bundle";

/// What of networks the data plane has.
#[derive(Debug, Default)]
pub(crate) struct Attached {
    pub(crate) nics: BTreeSet<NicId>,
    pub(crate) switches: BTreeSet<SwitchName>,
    pub(crate) mirrored: BTreeSet<NicId>,
    /// What becomes of these is not known yet.
    pub(crate) busy: BTreeSet<NicId>,
}

impl From<Networks> for Attached {
    fn from(networks: Networks) -> Self {
        Self {
            nics: networks.nics.into_iter().collect(),
            switches: networks.switches.into_iter().collect(),
            mirrored: networks.mirrored.into_iter().collect(),
            busy: networks.busy.into_iter().collect(),
        }
    }
}

/// The steps that are due for switches and NICs, in their order.
pub(crate) fn steps(known: &Known, bundle: &HostBundle) -> Vec<Step> {
    if bundle.nics.is_empty() {
        return Vec::new();
    }
    let Some(attached) = &known.networks else {
        return vec![Step::SurveyNetworks];
    };
    let mut steps = Vec::new();
    for switch in &bundle.switches {
        let is_on = |nic: &&Nic| on(nic) == Some(&switch.name);
        let mut granted = bundle.nics.iter().filter(is_on);
        if !attached.switches.contains(&switch.name) && granted.any(|nic| is_granted(known, nic)) {
            steps.push(Step::AttachSwitch(switch.name.clone()));
        }
    }
    let due = bundle.nics.iter().filter(|nic| {
        let bound = known.bound.get(&nic.socket.name) == Some(&nic.socket);
        let port = on(nic).is_none_or(|switch| attached.switches.contains(switch));
        !attached.nics.contains(&nic.id) && bound && port && is_granted(known, nic)
    });
    steps.extend(due.map(|nic| Step::AttachNic(nic.id)));
    let due = bundle.nics.iter().filter(|nic| {
        let waits = attached.nics.contains(&nic.id) && !attached.mirrored.contains(&nic.id);
        nic.mirror.is_some() && waits && is_granted(known, nic)
    });
    steps.extend(due.map(|nic| Step::Mirror(nic.id)));
    steps
}

/// The switch that a NIC is on.
fn on(nic: &Nic) -> Option<&SwitchName> {
    match &nic.port {
        PortSpec::Switch { switch } => Some(switch),
        _ => None,
    }
}

fn is_granted(known: &Known, nic: &Nic) -> bool {
    known.granted && !known.undelivered.contains_key(&nic.id.into())
}

/// The file that each mirror has which this agent began.
pub(crate) type MirrorFiles = BTreeMap<NicId, String>;

/// Writes down which mirrors end because of a new bundle, and who signed that.
pub(crate) fn tell_ended_mirrors(
    old: Option<&HostBundle>,
    new: &Verified<HostBundle>,
    (files, ended): (&mut MirrorFiles, &mut BTreeSet<NicId>),
) {
    for (nic, file) in ended_mirrors(old, new, files) {
        if ended.remove(&nic.id) {
            continue;
        }
        let (epoch, signers) = (new.epoch, new.signers().join(", "));
        tracing::info!(nic = %nic.id, name = nic.name, file, epoch, %signers, "mirror ends");
    }
}

/// The NICs whose mirrors end, with the file: of one that an earlier agent began, what the bundle calls it.
fn ended_mirrors<'a>(
    old: Option<&'a HostBundle>,
    new: &HostBundle,
    files: &mut MirrorFiles,
) -> Vec<(&'a Nic, String)> {
    let nics = old.map_or(&[][..], |old| &old.nics).iter();
    let ended = nics.filter_map(|nic| {
        let mirror = nic.mirror.as_ref()?;
        let stays = new.nic(nic.id).and_then(|nic| nic.mirror.as_ref());
        if stays == Some(mirror) {
            return None;
        }
        let begun = files.remove(&nic.id);
        Some((nic, begun.unwrap_or_else(|| mirror.file.clone())))
    });
    ended.collect()
}

impl Agent {
    /// Sends a switch's uplink, opened when the bundle was taken in or now. Nothing of it stays here.
    pub(crate) fn begin_attach_switch(
        &mut self,
        now: Instant,
        name: &SwitchName,
    ) -> Result<(), String> {
        let bundle = self.known.accepted.as_ref().map(|stored| &stored.bundle);
        let switch = bundle.and_then(|bundle| bundle.switch(name));
        let switch = switch.ok_or("it is not in the bundle")?;
        let owner = Owner::Switch(name.clone());
        let opened = match self.known.ports.remove(&owner) {
            Some(opened) => opened,
            None => ports::open_uplink(switch.uplink.as_ref(), &self.host.prepared)?,
        };
        let (switch, facts) = (name.clone(), opened.facts);
        self.ask(now, Peer::Dataplane, |request_id| {
            let message = AgentToDataplane::AttachSwitch {
                request_id,
                switch,
                facts,
            };
            Action::Dataplane(message, opened.fds)
        });
        Ok(())
    }

    /// Refuses a bundle with new mirrors where no file can be made for them.
    pub(crate) fn refuse_mirrors(
        &self,
        old: Option<&HostBundle>,
        new: &HostBundle,
    ) -> Result<(), String> {
        let before = |nic: &Nic| old.and_then(|old| old.nic(nic.id)?.mirror.as_ref());
        let is_new = |nic: &&Nic| nic.mirror.is_some() && before(nic) != nic.mirror.as_ref();
        let Some(nic) = new.nics.iter().find(is_new) else {
            return Ok(());
        };
        let directory = self.host.mirrors.as_ref().ok_or(NO_DIRECTORY.to_owned());
        let checked = directory.and_then(MirrorDirectory::check);
        checked.map_err(|problem| format!("NIC {}: {problem}", nic.name))
    }

    /// Writes down that a mirror has ended by itself: its file is as long as it may be, or can't be written to.
    pub(crate) fn tell_of_ended_mirror(
        &mut self,
        id: NicId,
        status: &MirrorStatus,
        problem: Option<&str>,
    ) {
        let bundle = self.known.accepted.as_ref().map(|stored| &stored.bundle);
        let Some((bundle, nic)) = bundle.and_then(|bundle| Some((bundle, bundle.nic(id)?))) else {
            return;
        };
        let Some(mirror) = &nic.mirror else {
            return;
        };
        let file = self.known.mirror_files.remove(&id);
        let file = file.unwrap_or_else(|| mirror.file.clone());
        let (epoch, signers) = (bundle.epoch, bundle.signers().join(", "));
        let because = problem.map_or("it is full".to_owned(), plain);
        let (frames, bytes, missed) = (status.frames, status.bytes, status.missed);
        tracing::info!(
            nic = %id, name = nic.name, file, epoch, %signers, because, frames, bytes, missed, "mirror ends"
        );
        self.known.ended_mirrors.insert(id);
    }

    /// Makes the file of a NIC's mirror and sends it. Who signed that is written down.
    pub(crate) fn begin_mirror(&mut self, now: Instant, id: NicId) -> Result<(), String> {
        let bundle = self.known.accepted.as_ref().map(|stored| &stored.bundle);
        let bundle = bundle.ok_or("there is no bundle")?;
        let nic = bundle.nic(id).ok_or("it is not in the bundle")?;
        let mirror = nic.mirror.as_ref().ok_or("it has no mirror")?;
        let directory = self.host.mirrors.as_ref();
        let directory = directory.ok_or(NO_DIRECTORY)?;
        let (file, name) = directory.create(&mirror.file)?;
        let (epoch, signers) = (bundle.epoch, bundle.signers().join(", "));
        self.known.ended_mirrors.remove(&id);
        // The NIC was detached meanwhile, or a data plane ended.
        if let Some(file) = self.known.mirror_files.insert(id, name.clone()) {
            tracing::info!(nic = %id, name = nic.name, file, epoch, %signers, "mirror ends");
        }
        tracing::info!(nic = %id, name = nic.name, file = name, epoch, %signers, "mirror begins");
        self.ask(now, Peer::Dataplane, |request_id| {
            let message = AgentToDataplane::Mirror {
                request_id,
                nic: id,
            };
            Action::Dataplane(message, vec![file])
        });
        Ok(())
    }

    /// The same of a NIC's port.
    pub(crate) fn begin_attach_nic(&mut self, now: Instant, id: NicId) -> Result<(), String> {
        let bundle = self.known.accepted.as_ref().map(|stored| &stored.bundle);
        let nic = bundle.and_then(|bundle| bundle.nic(id));
        let nic = nic.ok_or("it is not in the bundle")?;
        // Its interface opened once more would take frames from the one that it has.
        let networks = self.known.networks.as_ref();
        if networks.is_some_and(|networks| networks.busy.contains(&id)) {
            return Err("the data plane is still at it: asked again in a moment".to_owned());
        }
        let socket = nic.socket.name.clone();
        let opened = match self.known.ports.remove(&Owner::Nic(id)) {
            Some(opened) => opened,
            None => ports::open(&nic.port, nic.queue_pairs, &self.host.prepared)?,
        };
        let facts = opened.facts;
        self.ask(now, Peer::Dataplane, |request_id| {
            let message = AgentToDataplane::AttachNic {
                request_id,
                nic: id,
                socket,
                facts,
            };
            Action::Dataplane(message, opened.fds)
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::net::MirrorSpec;

    use super::*;
    use crate::examples::{bundle, nic};

    #[test]
    fn a_mirror_that_ends_is_told_with_the_file_that_it_had() {
        let mut old = bundle(Vec::new());
        old.nics = vec![nic(1), nic(2), nic(3), nic(4)];
        for nic in &mut old.nics[..3] {
            nic.mirror = Some(MirrorSpec {
                file: format!("{}.pcapng", nic.name),
                snap_bytes: 64,
                most_bytes: 1 << 20,
            });
        }
        let mut new = old.clone();
        new.nics[0].mirror = None;
        new.nics[1].mirror.as_mut().expect("one").snap_bytes = 128;
        let ids: Vec<NicId> = old.nics.iter().map(|nic| nic.id).collect();
        let file = |index: usize, file: &str| (ids[index], file.to_owned());
        let mut files = MirrorFiles::from([file(0, "net1.pcapng.7"), file(2, "net3.pcapng")]);
        let told = |ended: Vec<(&Nic, String)>| -> MirrorFiles {
            ended
                .into_iter()
                .map(|(nic, file)| (nic.id, file))
                .collect()
        };
        let expected = MirrorFiles::from([file(0, "net1.pcapng.7"), file(1, "net2.pcapng")]);
        assert_eq!(told(ended_mirrors(Some(&old), &new, &mut files)), expected);
        assert_eq!(files, MirrorFiles::from([file(2, "net3.pcapng")]));
        new.nics.clear();
        let expected = MirrorFiles::from([
            file(0, "net1.pcapng"),
            file(1, "net2.pcapng"),
            file(2, "net3.pcapng"),
        ]);
        assert_eq!(told(ended_mirrors(Some(&old), &new, &mut files)), expected);
        assert!(told(ended_mirrors(None, &old, &mut files)).is_empty());
    }
}
