//! What must agree before a NIC is served.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use bulkhead_protocol::net::NicGrant;
use bulkhead_protocol::{NicId, SocketName};

use super::ports::Parts;
use super::{Nic, Nics, Serving, grant};
use crate::control::answer::Agent;
use crate::control::volumes::Volumes;
use crate::net::NetDevice;
use crate::server::{Access, Offer, Server};
use crate::stored::{Fd, Place, StoredNic, StoredPort};

/// Where an attach is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    /// It was attached before.
    Already,
    /// The workers are asked.
    Now,
}

impl Nics {
    /// Begins to serve a NIC, if everything agrees.
    pub(super) fn attach(
        &mut self,
        (server, volumes): (&mut Server, &Volumes),
        id: NicId,
        agent: Agent,
        socket: &SocketName,
        port: Parts,
    ) -> Result<Begun, String> {
        let nic = self.table.get(&id);
        let nic = nic.ok_or_else(|| format!("keyd has not granted NIC {id}"))?;
        if nic.grant.socket != *socket {
            return Err(format!(
                "NIC {id} is granted for socket {}, not for {socket}",
                nic.grant.socket
            ));
        }
        if nic.served().is_some() {
            return Ok(Begun::Already);
        }
        let listener = self.listener_for(volumes, id, socket)?;
        let (port, stored) = self.port(&nic.grant, port)?;
        let device = NetDevice::with_port(grant::shape(&nic.grant), port, grant::guard(&nic.grant));
        grant::apply(&device, &nic.grant);
        let place = place(volumes, nic, stored);
        device.hand.set(place.hand());
        let offered = server.offer(Offer {
            device: Arc::clone(&device).into(),
            listener,
            access: access(&nic.grant),
            label: label(&nic.grant),
            place,
            aside: None,
        });
        let device_id = offered.map_err(|e| format!("the listener can't be watched: {e}"))?;
        if nic.removing {
            server.refuse_new(device_id, true);
        }
        let nic = self.table.get_mut(&id).ok_or("it is gone")?;
        nic.serving = Serving::Attaching(device_id, device, agent);
        Ok(Begun::Now)
    }

    /// A second descriptor of the listener, which the server may close.
    fn listener_for(
        &self,
        volumes: &Volumes,
        id: NicId,
        socket: &SocketName,
    ) -> Result<UnixListener, String> {
        if let Some(volume) = volumes.served_on(socket) {
            return Err(format!("volume {volume} is served on socket {socket}"));
        }
        match self.served_on(socket) {
            Some(other) if other != id => {
                return Err(format!("NIC {other} is served on socket {socket}"));
            }
            _ => {}
        }
        let listener = volumes.listeners.get(socket);
        let listener = listener.ok_or_else(|| format!("rot has sent no listener {socket}"))?;
        let ours = listener.try_clone();
        ours.map(UnixListener::from)
            .map_err(|e| format!("the listener {socket} can't be duplicated: {e}"))
    }

    /// The NIC that is served on a socket, or about to be or to be no more.
    pub(in crate::control) fn served_on(&self, socket: &SocketName) -> Option<NicId> {
        let mut on_it = self
            .table
            .iter()
            .filter(|(_, nic)| nic.grant.socket == *socket && nic.serving.device().is_some());
        on_it.next().map(|(id, _)| *id)
    }
}

/// A place in the store. A card that finds none is served all the same.
fn place(volumes: &Volumes, nic: &Nic, port: StoredPort<Fd>) -> Place {
    let grant = &nic.grant;
    let Some(listener) = volumes.listeners.get(&grant.socket).map(Arc::clone) else {
        return Place::none();
    };
    let place = volumes.keeper.place(StoredNic {
        grant: grant.clone(),
        listener,
        port,
        refuses_new: nic.removing,
        connection: None,
    });
    place.unwrap_or_else(|error| {
        tracing::error!(nic = %grant.nic, "its frontend will not outlive this process: {error}");
        Place::none()
    })
}

/// Who may connect to a card.
pub(super) fn access(grant: &NicGrant) -> Access {
    Access {
        allowed_uid: Some(grant.allowed_uid),
    }
}

/// Its name in log lines.
pub(super) fn label(grant: &NicGrant) -> String {
    format!("NIC {} on {}", grant.nic, grant.socket)
}
