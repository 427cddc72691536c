//! Cards and switches that a predecessor served are served on as soon as this process runs, like its volumes
//! (`control/resume.rs`): switches first, since cards are on them.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::attach::{access, label};
use super::ports::{self, Parts};
use super::switches::Switch;
use super::{Nic, Nics, Serving, grant};
use crate::net::NetDevice;
use crate::port::PortSpec;
use crate::server::{Offer, Server};
use crate::stored::{Fd, Place, StoredNic, StoredSwitch};
use crate::worker::message::DeviceId;

impl Nics {
    /// Has a switch that a predecessor had. What can't be is not remembered; its cards are refused then.
    pub(in crate::control) fn resume_switch(
        &mut self,
        stored: StoredSwitch<Fd>,
        place: Place,
    ) -> Result<(), String> {
        let parts = Parts::Stored(stored.port);
        let made = ports::switch(stored.name.as_str(), stored.uplink.as_ref(), parts);
        match made {
            Ok((spec, _)) if !self.switches.contains_key(&stored.name) => {
                let switch = Switch {
                    uplink: stored.uplink,
                    spec,
                    place,
                };
                self.switches.insert(stored.name, switch);
                Ok(())
            }
            Ok(_) => {
                place.remove();
                Err("it is stored twice".to_owned())
            }
            Err(reason) => {
                place.remove();
                Err(reason)
            }
        }
    }

    /// Serves a card on. If that can't be, nothing of it is remembered.
    pub(in crate::control) fn resume(
        &mut self,
        server: &mut Server,
        stored: &StoredNic<Fd>,
        (place, aside): (Place, Option<String>),
    ) -> Result<DeviceId, String> {
        let id = stored.grant.nic;
        let prepared = if self.table.contains_key(&id) {
            Err("it is stored twice".to_owned())
        } else {
            self.prepare(stored)
        };
        let (device, listener) = match prepared {
            Ok(prepared) => prepared,
            Err(reason) => {
                place.remove();
                return Err(reason);
            }
        };
        device.hand.set(place.hand());
        let offered = server.offer(Offer {
            device: Arc::clone(&device).into(),
            listener,
            access: access(&stored.grant),
            label: label(&stored.grant),
            place,
            aside,
        });
        let device_id = offered.map_err(|e| format!("its listener can't be watched: {e}"))?;
        if stored.refuses_new {
            server.refuse_new(device_id, true);
        }
        let mut nic = Nic::new(stored.grant.clone());
        nic.removing = stored.refuses_new;
        nic.serving = Serving::Resuming(device_id, device);
        self.table.insert(id, nic);
        Ok(device_id)
    }

    /// Everything but the device's place among those that are served.
    fn prepare(&self, stored: &StoredNic<Fd>) -> Result<(Arc<NetDevice>, UnixListener), String> {
        let granted = &stored.grant;
        granted.check()?;
        let (port, _) = self.port(granted, Parts::Stored(stored.port.clone()))?;
        // The agent gives it another, once there is one.
        if let PortSpec::Outside(outside) = &port
            && let Some(reason) = ports::was_removed(outside)
        {
            return Err(reason);
        }
        let listener = stored.listener.try_clone();
        let listener = listener.map_err(|e| format!("its listener can't be duplicated: {e}"))?;
        let device = NetDevice::with_port(grant::shape(granted), port, grant::guard(granted));
        grant::apply(&device, granted);
        Ok((device, UnixListener::from(listener)))
    }
}

impl Nic {
    /// Remembers the grant as it is now.
    pub(super) fn remember_grant(&self, server: &mut Server) {
        let grant = self.grant.clone();
        self.remember(server, |nic| nic.grant = grant);
    }

    /// Remembers whether its removal is prepared.
    pub(super) fn remember_removing(&self, server: &mut Server) {
        let removing = self.removing;
        self.remember(server, |nic| nic.refuses_new = removing);
    }

    /// Changes what a successor will find. What can't be remembered is what was before.
    fn remember(&self, server: &mut Server, change: impl FnOnce(&mut StoredNic<Fd>)) {
        let Some(device) = self.serving.device() else {
            return;
        };
        if let Err(error) = server.remember_nic(device, change) {
            tracing::error!(nic = %self.grant.nic, "a successor will find it as it was before: {error}");
        }
    }
}
