//! Mirrors of NICs: a file of the agent's, as far as the grant allows one.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_protocol::NicId;
use bulkhead_protocol::control::{DataplaneToAgent, MirrorStatus};

use super::{Nic, Nics};
use crate::control::answer::Answers;
use crate::net::NetDevice;
use crate::port::MirrorFile;
use crate::port::mirror::MirrorEnd;
use crate::server::Server;

impl Nics {
    /// Has the frames of an attached NIC copied into a file. One that is mirrored already goes on as it is.
    ///
    /// # Errors
    /// Why not, for the operator.
    pub(in crate::control) fn mirror(
        &mut self,
        server: &mut Server,
        id: NicId,
        file: OwnedFd,
    ) -> Result<(), String> {
        let nic = self.table.get(&id);
        let nic = nic.ok_or_else(|| format!("keyd has not granted NIC {id}"))?;
        let spec = nic.grant.mirror.as_ref();
        let spec = spec.ok_or_else(|| format!("NIC {id} is granted without a mirror"))?;
        let (device_id, device) = nic
            .served()
            .ok_or_else(|| format!("NIC {id} is not attached"))?;
        if device.mirror().is_some() {
            return Ok(());
        }
        let file = MirrorFile::begin(file, nic.grant.socket.as_str(), spec);
        let file = file.map_err(|error| format!("its mirror's file: {error}"))?;
        if let Some(bell) = &self.mirrors_end {
            file.ring_when_over(Arc::clone(bell));
        }
        server.set_mirror(device_id, Some(file))?;
        tracing::info!(nic = %id, "mirrored from now on");
        Ok(())
    }

    /// Tells of mirrors that have ended by themselves, each once.
    pub(in crate::control) fn tell_ended_mirrors(&self, answers: &mut Answers) {
        for (id, nic) in &self.table {
            let Some((_, device)) = nic.served() else {
                continue;
            };
            let (Some(end), Some(status)) = (
                device.mirror().and_then(|mirror| mirror.take_end()),
                status(device),
            ) else {
                continue;
            };
            let problem = match end {
                MirrorEnd::Full => None,
                MirrorEnd::Failed(errno) => Some(io::Error::from_raw_os_error(errno).to_string()),
            };
            answers.unasked.push(DataplaneToAgent::MirrorEnded {
                nic: *id,
                status,
                problem,
            });
        }
    }
}

impl Nic {
    /// Ends the mirror that it has.
    pub(super) fn end_mirror(&self, server: &mut Server) {
        let Some((id, device)) = self.served() else {
            return;
        };
        if device.mirror().is_none() {
            return;
        }
        match server.set_mirror(id, None) {
            Ok(()) => tracing::info!(nic = %self.grant.nic, "mirrored no longer"),
            Err(error) => {
                tracing::error!(nic = %self.grant.nic, "its mirror does not end: {error}")
            }
        }
    }
}

/// What the mirror of a device has recorded; none: it has none.
pub(super) fn status(device: &NetDevice) -> Option<MirrorStatus> {
    let counts = device.mirror()?.counts();
    Some(MirrorStatus {
        frames: counts.frames,
        bytes: counts.bytes,
        missed: counts.dropped,
        ended: counts.end.is_some(),
    })
}
