//! What must agree before a volume is served.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use bulkhead_crypto::DataUnit;
use bulkhead_protocol::keys::VolumeGrant;
use bulkhead_protocol::{SocketName, VolumeId};

use super::answer::Agent;
use super::grant::{capacity_sectors, geometry};
use super::volumes::{Serving, Volume, Volumes};
use crate::blk::{BlkDevice, Cipher, Ciphers, Rekey};
use crate::server::{Access, Offer, Server};
use crate::storage::{FileSpec, StorageSpec};
use crate::stored::{Fd, Place, StoredCache, StoredVolume};

/// Where an attach is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    /// It was attached before.
    Already,
    /// The workers are asked.
    Now,
}

impl Volumes {
    /// Begins to serve a volume, if everything agrees.
    pub(super) fn attach(
        &mut self,
        server: &mut Server,
        id: VolumeId,
        agent: Agent,
        socket: &SocketName,
        file: OwnedFd,
    ) -> Result<Begun, String> {
        let volume = self.table.get(&id);
        let volume = volume.ok_or_else(|| format!("keyd has not granted volume {id}"))?;
        let grant = volume.held.grant.clone();
        if grant.socket != *socket {
            return Err(format!(
                "volume {id} is granted for socket {}, not for {socket}",
                grant.socket
            ));
        }
        if volume.served().is_some() {
            return Ok(Begun::Already);
        }
        if grant.data_unit_bytes.is_some() && volume.held.keys.key.is_none() {
            return Err(format!(
                "the key of volume {id} was wiped when it was detached: have keyd grant it again"
            ));
        }
        // Before its file is looked at, which may not answer.
        self.refuse_left(id)?;
        let listener = self.listener_for(id, socket)?;
        let file = self.check_file(&grant, file)?;
        let removing = volume.removing;
        let socket_fd = self.listeners.get(socket).map(Arc::clone);
        let stored = socket_fd.and_then(|listener| self.to_store(&grant, &file, listener));
        let device = self.take_device(&grant, file)?;
        self.groups.limit(&device, &grant);
        let place = self.place(stored, &device);
        let attached = server.offer(Offer {
            device: (&device).into(),
            listener,
            access: access(&grant),
            label: label(&grant),
            place,
            aside: None,
        });
        let volume = self.table.get_mut(&id).ok_or("it is gone")?;
        match attached {
            Ok(device_id) => {
                if removing {
                    server.refuse_new(device_id, true);
                }
                volume.serving = Serving::Attaching(device_id, device, agent);
                Ok(Begun::Now)
            }
            Err(error) => {
                volume.held.keys.take_back(device);
                Err(format!("the listener can't be watched: {error}"))
            }
        }
    }

    /// The volume that is served on a socket, or about to be or to be no more.
    pub(super) fn served_on(&self, socket: &SocketName) -> Option<VolumeId> {
        let taken = |v: &Volume| v.held.grant.socket == *socket && v.serving.device().is_some();
        let mut on_it = self.table.iter().filter(|(_, volume)| taken(volume));
        on_it.next().map(|(id, _)| *id)
    }

    /// A second descriptor of the listener, which the server may close.
    fn listener_for(&self, id: VolumeId, socket: &SocketName) -> Result<UnixListener, String> {
        if let Some(other) = self.served_on(socket).filter(|other| *other != id) {
            return Err(format!("volume {other} is served on socket {socket}"));
        }
        let listener = self.listeners.get(socket);
        let listener = listener.ok_or_else(|| format!("rot has sent no listener {socket}"))?;
        let ours = listener.try_clone();
        ours.map(UnixListener::from)
            .map_err(|e| format!("the listener {socket} can't be duplicated: {e}"))
    }

    /// What a successor is to know of a volume that is about to be served; none: nothing. What would hold up whoever
    /// closes it is not stored.
    fn to_store(
        &self,
        grant: &VolumeGrant,
        file: &FileSpec,
        listener: Fd,
    ) -> Option<StoredVolume<Fd>> {
        let volume = self.table.get(&grant.volume)?;
        if !self.keeper.keeps() || file.off_thread {
            return None;
        }
        let (key, previous_key) = volume.held.keys.pages.stored();
        Some(StoredVolume {
            grant: grant.clone(),
            file: file.shared_fd(),
            listener,
            key,
            previous_key,
            refuses_new: volume.removing,
            cache: StoredCache::default(),
            connection: None,
        })
    }

    /// A place in the store. A volume that finds none is served all the same.
    fn place(&self, stored: Option<StoredVolume<Fd>>, device: &BlkDevice) -> Place {
        let Some(stored) = stored else {
            return Place::none();
        };
        let id = stored.grant.volume;
        match self.keeper.place(stored) {
            Ok(place) => {
                if let Some(flag) = place.flush_failed() {
                    device.keep_flush_failure(flag);
                }
                device.hand.set(place.hand());
                place
            }
            Err(error) => {
                tracing::error!(volume = %id, "its frontend will not outlive this process: {error}");
                Place::none()
            }
        }
    }

    /// Looks at the file through its descriptor alone.
    fn check_file(&self, grant: &VolumeGrant, file: OwnedFd) -> Result<FileSpec, String> {
        self.check_shared_file(grant, Arc::new(file))
    }

    /// The same of a file that is stored.
    pub(super) fn check_shared_file(
        &self,
        grant: &VolumeGrant,
        file: Fd,
    ) -> Result<FileSpec, String> {
        let file = FileSpec::from_shared(file, grant.read_only, grant.logical_block_bytes)
            .map_err(|e| e.to_string())?;
        if file.bytes < grant.size_bytes {
            return Err(format!(
                "its file has {} bytes, the volume {}",
                file.bytes, grant.size_bytes
            ));
        }
        self.refuse_left_file(&file)?;
        let same = |v: &Volume| v.file().is_some_and(|f| f.identity == file.identity);
        if let Some((other, _)) = self.table.iter().find(|(_, volume)| same(volume)) {
            return Err(format!("its file is that of volume {other}"));
        }
        Ok(file)
    }

    /// Moves the keys into a device.
    pub(super) fn take_device(
        &mut self,
        grant: &VolumeGrant,
        file: FileSpec,
    ) -> Result<Arc<BlkDevice>, String> {
        let volume = self.table.get_mut(&grant.volume).ok_or("it is gone")?;
        let unit = grant.data_unit_bytes.and_then(DataUnit::new);
        let keys = &mut volume.held.keys;
        let ciphers = match (unit, keys.key.take()) {
            (None, _) => None,
            (Some(unit), Some(key)) => Some(Ciphers {
                cipher: Arc::new(Cipher { key, unit }),
                volume: Some(grant.volume),
                rekey: grant
                    .rekey
                    .zip(keys.previous.take())
                    .map(|(id, key)| Rekey {
                        id,
                        previous: Arc::new(Cipher { key, unit }),
                    }),
            }),
            (Some(_), None) => return Err("its key is not there".to_owned()),
        };
        Ok(BlkDevice::with_ciphers(
            geometry(grant),
            capacity_sectors(grant),
            StorageSpec::File(file),
            ciphers,
        ))
    }
}

/// Who may connect to a volume.
pub(super) fn access(grant: &VolumeGrant) -> Access {
    Access {
        allowed_uid: Some(grant.allowed_uid),
    }
}

/// Its name in log lines.
pub(super) fn label(grant: &VolumeGrant) -> String {
    format!("volume {} on {}", grant.volume, grant.socket)
}
