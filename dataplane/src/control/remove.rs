//! A volume that is to go: new frontends are kept out before it does, so that "is it in use" can't change
//! between asking and removing.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::{SocketName, VolumeId};

use super::volumes::Volumes;
use crate::server::Server;

impl Volumes {
    /// Keeps new frontends out, unless one is connected and `force` is not set.
    pub(super) fn prepare_remove(
        &mut self,
        server: &mut Server,
        id: VolumeId,
        force: bool,
    ) -> Result<(), String> {
        let Some(volume) = self.table.get_mut(&id) else {
            return Ok(()); // nobody can connect to what is not granted
        };
        if let Some((device, _)) = volume.serving.device() {
            if server.is_connected(device) && !force {
                return Err(format!(
                    "volume {id} is in use: a frontend is connected on socket {}",
                    volume.held.grant.socket
                ));
            }
            server.refuse_new(device, true);
        }
        volume.removing = true;
        Ok(())
    }

    /// Lets frontends in again.
    pub(super) fn cancel_remove(&mut self, server: &mut Server, id: VolumeId) {
        let Some(volume) = self.table.get_mut(&id) else {
            return;
        };
        volume.removing = false;
        let listens = self.listeners.contains_key(&volume.held.grant.socket);
        if let Some((device, _)) = volume.serving.device().filter(|_| listens) {
            server.refuse_new(device, false);
        }
    }

    /// rot took a listener away: whoever is connected through it stays, nobody new comes.
    pub(super) fn listener_gone(&mut self, server: &mut Server, name: &SocketName) {
        self.listeners.remove(name);
        let on_it = self.table.values().filter(|v| v.held.grant.socket == *name);
        for (device, _) in on_it.filter_map(|volume| volume.serving.device()) {
            server.refuse_new(device, true);
        }
    }
}
