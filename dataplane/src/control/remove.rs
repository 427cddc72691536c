//! A volume that is to go: new frontends are kept out before it does, so that "is it in use" can't change
//! between asking and removing.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use bulkhead_protocol::{SocketName, VolumeId};
use nix::sys::stat::fstat;

use super::volumes::Volumes;
use crate::server::Server;
use crate::stored::Fd;
use crate::worker::message::DeviceId;

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
        volume.remember_removing(server);
        Ok(())
    }

    /// Lets frontends in again.
    pub(super) fn cancel_remove(&mut self, server: &mut Server, id: VolumeId) {
        let Some(volume) = self.table.get_mut(&id) else {
            return;
        };
        volume.removing = false;
        volume.remember_removing(server);
        let listens = self.listeners.contains_key(&volume.held.grant.socket);
        if let Some((device, _)) = volume.serving.device().filter(|_| listens) {
            server.refuse_new(device, false);
        }
    }

    /// rot gives a listener. A volume that is served on that name takes it, unless it is the one it has: rot may have
    /// been started anew, and bound another.
    pub(super) fn new_listener(&mut self, server: &mut Server, name: SocketName, socket: Fd) {
        for volume in self.table.values() {
            let serves = volume.held.grant.socket == name;
            let Some((device, _)) = volume.serving.device().filter(|_| serves) else {
                continue;
            };
            if let Err(reason) = take_listener(server, device, &socket) {
                tracing::error!(%name, "the listener can't be taken: {reason}");
            }
            if !volume.removing {
                server.refuse_new(device, false);
            }
        }
        self.listeners.insert(name, socket);
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

/// Has a device listen there, and remembers it, if that is another socket than before.
pub(super) fn take_listener(
    server: &mut Server,
    device: DeviceId,
    socket: &Fd,
) -> Result<(), String> {
    let inode = |fd: &Fd| fstat(fd).map(|stat| stat.st_ino);
    if server.listener_inode(device) == inode(socket).ok() {
        return Ok(());
    }
    let ours = socket.try_clone().map_err(|e| e.to_string())?;
    let listener = UnixListener::from(ours);
    server
        .set_listener(device, listener)
        .map_err(|e| e.to_string())?;
    server.remember(device, |volume| volume.listener = Arc::clone(socket))
}
