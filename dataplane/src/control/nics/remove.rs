//! A NIC that is to go, and listeners that come and go: as with volumes, nobody new is let in before it does.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::{NicId, SocketName};

use super::Nics;
use crate::control::remove::take_listener;
use crate::control::volumes::Volumes;
use crate::server::Server;
use crate::stored::Fd;

impl Nics {
    /// Keeps new frontends out, unless one is connected and `force` is not set.
    ///
    /// # Errors
    /// It is in use.
    pub(in crate::control) fn prepare_remove(
        &mut self,
        server: &mut Server,
        id: NicId,
        force: bool,
    ) -> Result<(), String> {
        let Some(nic) = self.table.get_mut(&id) else {
            return Ok(()); // nobody can connect to what is not granted
        };
        if let Some(device) = nic.serving.device() {
            if server.is_connected(device) && !force {
                return Err(format!(
                    "NIC {id} is in use: a frontend is connected on socket {}",
                    nic.grant.socket
                ));
            }
            server.refuse_new(device, true);
        }
        nic.removing = true;
        nic.remember_removing(server);
        Ok(())
    }

    /// Lets frontends in again.
    pub(in crate::control) fn cancel_remove(
        &mut self,
        (server, volumes): (&mut Server, &Volumes),
        id: NicId,
    ) {
        let Some(nic) = self.table.get_mut(&id) else {
            return;
        };
        nic.removing = false;
        nic.remember_removing(server);
        let listens = volumes.listeners.contains_key(&nic.grant.socket);
        if let Some(device) = nic.serving.device().filter(|_| listens) {
            server.refuse_new(device, false);
        }
    }

    /// rot gives a listener: a NIC that is served on that name takes it, unless it is the one it has.
    pub(in crate::control) fn new_listener(
        &mut self,
        server: &mut Server,
        name: &SocketName,
        socket: &Fd,
    ) {
        for nic in self.table.values() {
            let serves = nic.grant.socket == *name;
            let Some(device) = nic.serving.device().filter(|_| serves) else {
                continue;
            };
            if let Err(reason) = take_listener(server, device, socket) {
                tracing::error!(%name, "the listener can't be taken: {reason}");
            }
            if !nic.removing {
                server.refuse_new(device, false);
            }
        }
    }

    /// rot took a listener away: whoever is connected through it stays, nobody new comes.
    pub(in crate::control) fn listener_gone(&mut self, server: &mut Server, name: &SocketName) {
        let on_it = self.table.values().filter(|nic| nic.grant.socket == *name);
        for device in on_it.filter_map(|nic| nic.serving.device()) {
            server.refuse_new(device, true);
        }
    }
}
