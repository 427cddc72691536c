//! NICs and switches among the steps of a pass: what is known of them, and how the questions about them are put.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::time::Instant;

use bulkhead_bundle::{HostBundle, Nic, Verified};
use bulkhead_protocol::control::{AgentToDataplane, Networks};
use bulkhead_protocol::net::PortSpec;
use bulkhead_protocol::{NicId, SwitchName};

use crate::agent::{Agent, Known};
use crate::message::{Action, Peer};
use crate::ports::{self, Owner};
use crate::step::Step;

/// Why nothing can be mirrored.
const NO_DIRECTORY: &str = "there is no directory for mirrors: start bulkhead-rot with --mirror-dir, or take the \
                            mirror out of the bundle";

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

/// Writes down which mirrors end because of a new bundle, and who signed that.
pub(crate) fn tell_ended_mirrors(old: Option<&HostBundle>, new: &Verified<HostBundle>) {
    for nic in old.map_or(&[][..], |old| &old.nics) {
        let Some(mirror) = &nic.mirror else { continue };
        let stays = new.nic(nic.id).and_then(|nic| nic.mirror.as_ref());
        if stays != Some(mirror) {
            let (file, epoch) = (&mirror.file, new.epoch);
            let signers = new.signers().join(", ");
            tracing::info!(nic = %nic.id, name = nic.name, file, epoch, %signers, "mirror ends");
        }
    }
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

    /// Refuses a bundle with mirrors where there is no directory for them.
    pub(crate) fn refuse_mirrors(&self, bundle: &HostBundle) -> Result<(), String> {
        let mut nics = bundle.nics.iter();
        match nics.find(|nic| nic.mirror.is_some()) {
            Some(nic) if self.host.mirrors.is_none() => {
                Err(format!("NIC {}: {NO_DIRECTORY}", nic.name))
            }
            _ => Ok(()),
        }
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
