//! The switches: each is there as long as a grant names it with the uplink that it has.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use bulkhead_protocol::SwitchName;
use bulkhead_protocol::net::{NicGrant, PortSpec, Uplink};

use super::ports::{self, Parts};
use super::{Nic, Nics};
use crate::control::volumes::Volumes;
use crate::port::SwitchSpec;
use crate::stored::{Fd, Place, StoredPort, StoredSwitch};

/// A switch that is attached.
#[derive(Debug)]
pub(super) struct Switch {
    pub(super) uplink: Option<Uplink>,
    pub(super) spec: Arc<SwitchSpec>,
    /// Where it is remembered for a successor.
    pub(super) place: Place,
}

impl Switch {
    /// No successor is to know of it any more.
    fn forget(&mut self) {
        std::mem::replace(&mut self.place, Place::none()).remove();
    }
}

/// Whether a grant is that of a NIC on this switch.
fn is_on(grant: &NicGrant, name: &SwitchName) -> bool {
    matches!(&grant.port, PortSpec::Switch { switch } if switch == name)
}

impl Nics {
    /// Has a switch, with what the agent gives for its uplink.
    ///
    /// # Errors
    /// Why not, for the operator.
    pub(in crate::control) fn attach_switch(
        &mut self,
        volumes: &Volumes,
        name: &SwitchName,
        parts: Parts,
    ) -> Result<(), String> {
        let on_it = self.table.values().filter(|nic| is_on(&nic.grant, name));
        // While the grants of a new bundle come in one after the other, the newest counts.
        let newest = on_it.max_by_key(|nic| nic.grant.epoch);
        let newest = newest.ok_or_else(|| format!("keyd has granted no NIC on switch {name}"))?;
        let uplink = newest.grant.uplink.clone();
        if let Some(held) = self.switches.get(name) {
            if held.uplink == uplink {
                return Ok(());
            }
            let serves = |nic: &Nic| is_on(&nic.grant, name) && nic.serving.device().is_some();
            if let Some((id, _)) = self.table.iter().find(|(_, nic)| serves(nic)) {
                return Err(format!(
                    "switch {name} has another uplink, and NIC {id} is still on it"
                ));
            }
        }
        let (spec, stored) = ports::switch(name.as_str(), uplink.as_ref(), parts)?;
        if let Some(mut before) = self.switches.remove(name) {
            before.forget();
        }
        let place = place(volumes, name, uplink.clone(), stored);
        tracing::info!(switch = %name, uplink = uplink.as_ref().map(tracing::field::display), "switch attached");
        let switch = Switch {
            uplink,
            spec,
            place,
        };
        self.switches.insert(name.clone(), switch);
        Ok(())
    }

    /// Forgets the switches that no grant names with the uplink that they have.
    pub(super) fn forget_switches(&mut self) {
        let table = &self.table;
        self.switches.retain(|name, held| {
            let grants = table.values().map(|nic| &nic.grant);
            let named = grants
                .filter(|grant| is_on(grant, name))
                .any(|grant| grant.uplink == held.uplink);
            if !named {
                tracing::info!(switch = %name, "switch gone");
                held.forget();
            }
            named
        });
    }
}

/// A place in the store. A switch that finds none is there all the same.
fn place(
    volumes: &Volumes,
    name: &SwitchName,
    uplink: Option<Uplink>,
    port: StoredPort<Fd>,
) -> Place {
    let place = volumes.keeper.place(StoredSwitch {
        name: name.clone(),
        uplink,
        port,
    });
    place.unwrap_or_else(|error| {
        tracing::error!(switch = %name, "the frontends on it will not outlive this process: {error}");
        Place::none()
    })
}
