//! What is offered, where it is remembered for a successor, and what becomes of a volume that a predecessor served.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::unix::net::UnixListener;

use super::connection::ToWorkers;
use super::device::State;
use super::{Access, Server};
use crate::device::Device;
use crate::rekey::ToRekeyer;
use crate::stored::{Fd, Place, StoredNic, StoredVolume};
use crate::worker::message::{DeviceId, ToWorker};

/// A device, and where it is offered.
#[derive(Debug)]
pub struct Offer {
    /// What is served.
    pub device: Device,
    /// Where frontends connect.
    pub listener: UnixListener,
    /// Who may.
    pub access: Access,
    /// Its name in log lines.
    pub label: String,
    /// Where it is remembered for a successor. The connection that a predecessor left there goes on.
    pub place: Place,
    /// Why nothing of it is to be served, if so: no frontend is let in, and one that a predecessor left is sent away.
    pub aside: Option<String>,
}

impl Server {
    /// Offers a device. [`Event::Attached`](super::Event::Attached) says when, or why not; frontends wait in the
    /// listener's backlog until then, and while another is connected. With a connection in its place
    /// [`Event::Resumed`](super::Event::Resumed) follows.
    ///
    /// # Errors
    /// When the listener can't be added to the loop; nothing is remembered then.
    pub fn offer(&mut self, offer: Offer) -> io::Result<DeviceId> {
        self.last_id += 1;
        let id = DeviceId(self.last_id);
        let device = offer.device.clone();
        let is_served = offer.aside.is_none();
        let mut state = State::new(offer, id, self.workers.len());
        state.fenced = self.fences.is_up();
        if let Err(error) = state.register(self.poll.registry()) {
            state.forget();
            return Err(error);
        }
        self.devices.insert(id, state);
        if let Some(device) = device.blk().filter(|_| is_served).cloned() {
            self.rekeyer.send(ToRekeyer::Look { id, device });
        }
        for worker in &self.workers {
            worker.send(ToWorker::Attach {
                id,
                device: device.clone(),
            });
        }
        Ok(id)
    }

    /// As [`Server::offer`], for a device that no successor has to know of.
    ///
    /// # Errors
    /// When the listener can't be added to the loop.
    pub fn attach(
        &mut self,
        device: impl Into<Device>,
        listener: UnixListener,
        access: Access,
        label: String,
    ) -> io::Result<DeviceId> {
        self.offer(Offer {
            device: device.into(),
            listener,
            access,
            label,
            place: Place::none(),
            aside: None,
        })
    }

    /// Remembers something else of a device's volume for a successor.
    ///
    /// # Errors
    /// Why it can't be, in words; what was remembered before still is.
    pub fn remember(
        &mut self,
        id: DeviceId,
        change: impl FnOnce(&mut StoredVolume<Fd>),
    ) -> Result<(), String> {
        let device = self.devices.get_mut(&id);
        let device = device.ok_or("the device is not attached")?;
        device.place.update(change).map_err(|e| e.to_string())
    }

    /// The same of a network card.
    ///
    /// # Errors
    /// As [`Server::remember`].
    pub fn remember_nic(
        &mut self,
        id: DeviceId,
        change: impl FnOnce(&mut StoredNic<Fd>),
    ) -> Result<(), String> {
        let device = self.devices.get_mut(&id);
        let device = device.ok_or("the device is not attached")?;
        device.place.update_nic(change).map_err(|e| e.to_string())
    }

    /// The inode of the socket that a device listens on.
    #[must_use]
    pub fn listener_inode(&self, id: DeviceId) -> Option<u64> {
        let stat = nix::sys::stat::fstat(self.devices.get(&id)?.listener());
        stat.ok().map(|stat| stat.st_ino)
    }

    /// Frontends connect to another listener from now on.
    ///
    /// # Errors
    /// When it can't be added to the loop; then there is the one before.
    pub fn set_listener(&mut self, id: DeviceId, listener: UnixListener) -> io::Result<()> {
        if let Some(device) = self.devices.get_mut(&id) {
            device.set_listener(listener, self.poll.registry())?;
            self.settle(id, ToWorkers::new());
        }
        Ok(())
    }
}
