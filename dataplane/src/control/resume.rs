//! What a predecessor served is served on as soon as this process runs: before hello is said to rot, which drops what
//! kills whoever takes it over, and before keyd and the agent are there. They find it served; what keyd no longer
//! grants it takes back as always.
//!
//! The grant, the keys, the file and the connection come from the store; nothing of it is trusted more than
//! when it came: the grant is checked as keyd's are, the file as the agent's are, the connection as a
//! frontend's messages are. (Only this role could store it.)
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use bulkhead_crypto::SecretArena;
use bulkhead_protocol::rot::ToRot;

use super::Control;
use super::grant::{GrantedKeys, check};
use super::page::{Page, Pages, expand_stored};
use super::volumes::{Held, Serving, Volume, Volumes};
use crate::crash_point;
use crate::hand::{self, Hand};
use crate::server::{Offer, Server};
use crate::storage::FileSpec;
use crate::stored::deaths::MOST_DEATHS;
use crate::stored::{Fd, Found, Place, Stored, StoredVolume};
use crate::worker::message::DeviceId;

impl Control {
    /// Takes over what a predecessor served. To be called once, before the server runs.
    pub fn resume(&mut self, server: &mut Server, found: Found) {
        crash_point!("start.taken");
        for reason in &found.lost {
            tracing::error!("lost with the process before this one: {reason}");
        }
        for (number, end) in found.fences {
            let watched =
                crate::fence::earlier(end).and_then(|end| server.wait_for_fence(number, end));
            match watched {
                Ok(()) => {}
                // No pipe: it would never hang up.
                Err(error) if error.kind() == ErrorKind::InvalidInput => {
                    tracing::error!("fence {number} of an earlier process is none: {error}");
                    self.fence_is_gone(number);
                }
                // Its requests may be under way.
                Err(error) => {
                    self.stop(server, format!("fence {number} can't be watched: {error}"))
                }
            }
        }
        let mut places = found.places;
        // Cards are on switches.
        places.sort_by_key(|place| !matches!(place.stored(), Some(Stored::Switch(_))));
        for place in places {
            self.take_over(server, place);
        }
        hand::take(Hand::NOTHING);
        crash_point!("start.offered");
    }

    /// Serves on what is stored in a place, or says why not.
    fn take_over(&mut self, server: &mut Server, place: Place) {
        let Some(stored) = place.stored().cloned() else {
            return;
        };
        let aside = set_aside(&place);
        if let Some(reason) = &aside {
            tracing::error!("{stored}: {reason}");
        }
        let connected = stored.connection().is_some() && aside.is_none();
        let name = stored.to_string();
        hand::take(place.hand());
        let resumed = match stored {
            Stored::Volume(volume) => self
                .volumes
                .resume(server, &self.arena, volume, (place, aside))
                .map(Some),
            Stored::Nic(nic) => self.nics.resume(server, &nic, (place, aside)).map(Some),
            Stored::Switch(switch) => self.nics.resume_switch(switch, place).map(|()| None),
        };
        match resumed {
            Ok(Some(device)) if connected => {
                self.resuming.insert(device);
            }
            Ok(_) => {}
            Err(reason) => tracing::error!("{name} can't be served on: {reason}"),
        }
    }

    /// Leaves what is stored as it is, keys and all: whoever comes after this process goes on with it. Where rot and
    /// its store end, too, the kernel frees it.
    pub fn leave(&mut self) {
        for volume in self.volumes.table.values_mut() {
            volume.held.keys.pages.leave();
        }
    }

    /// Nothing of the process that kept this fence is under way any more.
    pub(super) fn fence_is_gone(&self, number: u64) {
        crash_point!("fence.gone");
        if let Err(error) = self.volumes.keeper.remove_fence(number) {
            tracing::error!("fence {number}, which is gone, stays in the store: {error}");
        }
    }

    /// What a predecessor served of a device goes on, or can't.
    pub(super) fn has_resumed(&mut self, device: DeviceId) {
        if self.resuming.remove(&device) {
            self.say_hello();
        }
    }

    /// Says hello if it is due and everything that was taken over is served.
    pub(super) fn say_hello(&mut self) {
        if self.resuming.is_empty() && std::mem::take(&mut self.hello_due) {
            crash_point!("start.resumed");
            self.rot.send(ToRot::Hello);
        }
    }
}

impl Volumes {
    /// Serves a volume on. If that can't be, nothing of it is remembered, and its key is wiped.
    fn resume(
        &mut self,
        server: &mut Server,
        arena: &Arc<SecretArena>,
        stored: StoredVolume<Fd>,
        (place, aside): (Place, Option<String>),
    ) -> Result<DeviceId, String> {
        let id = stored.grant.volume;
        if self.table.contains_key(&id) {
            // The one that is there stays; the pages of this one's keys are wiped.
            drop(expand_all(arena, &stored));
            place.remove();
            return Err("it is stored twice".to_owned());
        }
        match self.prepare(arena, &stored) {
            Ok((listener, file)) => self.offer(server, &stored, (listener, file), (place, aside)),
            Err(reason) => {
                place.remove();
                Err(reason)
            }
        }
        .inspect_err(|_| {
            // Its keys' pages are wiped with it.
            self.table.remove(&id);
        })
    }

    /// Everything but the device: the volume stands in the table then, granted.
    fn prepare(
        &mut self,
        arena: &Arc<SecretArena>,
        stored: &StoredVolume<Fd>,
    ) -> Result<(UnixListener, FileSpec), String> {
        // First of all: from here on they are wiped when something fails.
        let keys = expand_all(arena, stored)?;
        let grant = &stored.grant;
        check(grant)?;
        let file = self.check_shared_file(grant, Arc::clone(&stored.file))?;
        let listener = stored.listener.try_clone();
        let listener = listener.map_err(|e| format!("its listener can't be duplicated: {e}"))?;
        let held = Held {
            grant: grant.clone(),
            keys,
        };
        let mut volume = Volume::new(held);
        volume.removing = stored.refuses_new;
        self.table.insert(grant.volume, volume);
        Ok((UnixListener::from(listener), file))
    }

    fn offer(
        &mut self,
        server: &mut Server,
        stored: &StoredVolume<Fd>,
        (listener, file): (UnixListener, FileSpec),
        (place, aside): (Place, Option<String>),
    ) -> Result<DeviceId, String> {
        let grant = &stored.grant;
        let device = match self.take_device(grant, file) {
            Ok(device) => device,
            Err(reason) => {
                place.remove();
                return Err(reason);
            }
        };
        if let Some(flag) = place.flush_failed() {
            device.keep_flush_failure(flag);
        }
        device.hand.set(place.hand());
        device.resume_cache_mode(stored.cache);
        if let Some(told) = stored.connection.as_ref().and_then(|c| c.told_sectors) {
            // What a frontend was told of stays there, if the file has it.
            let _ = device.resize(told.max(device.capacity_sectors()));
        }
        self.groups.limit(&device, grant);
        let offered = server.offer(Offer {
            device: (&device).into(),
            listener,
            access: super::attach::access(grant),
            label: super::attach::label(grant),
            place,
            aside,
        });
        let device_id = offered.map_err(|e| format!("its listener can't be watched: {e}"))?;
        if stored.refuses_new {
            server.refuse_new(device_id, true);
        }
        if let Some(volume) = self.table.get_mut(&grant.volume) {
            volume.serving = Serving::Resuming(device_id, device);
        }
        Ok(device_id)
    }
}

/// Why a volume is not served on although it was served, if it has killed one process after the other.
fn set_aside(place: &Place) -> Option<String> {
    let deaths = place.deaths();
    (deaths >= MOST_DEATHS).then(|| {
        format!("set aside: it killed {deaths} data planes in a row; detach it, or upgrade the data plane")
    })
}

/// The keys of a stored volume. All pages are wiped if one of them is of no use.
fn expand_all(arena: &Arc<SecretArena>, stored: &StoredVolume<Fd>) -> Result<GrantedKeys, String> {
    let one = |page: &Option<Fd>| {
        page.as_ref()
            .map(|page| expand_stored(arena, page))
            .transpose()
    };
    let (key, previous) = (one(&stored.key), one(&stored.previous_key));
    let (key, key_page) = key?.unzip();
    let (previous, previous_page) = previous?.unzip();
    let keys = GrantedKeys {
        key,
        previous,
        pages: Pages {
            key: key_page,
            previous: previous_page,
        },
    };
    let grant = &stored.grant;
    let right = keys.key.is_some() == grant.data_unit_bytes.is_some()
        && keys.previous.is_some() == grant.rekey.is_some();
    right
        .then_some(keys)
        .ok_or_else(|| "its keys are not those of its grant".to_owned())
}

impl Volume {
    /// Remembers the grant as it is now.
    pub(super) fn remember_grant(&self, server: &mut Server) {
        let grant = self.held.grant.clone();
        self.remember(server, |volume| volume.grant = grant);
    }

    /// Remembers whether its removal is prepared.
    pub(super) fn remember_removing(&self, server: &mut Server) {
        let removing = self.removing;
        self.remember(server, |volume| volume.refuses_new = removing);
    }

    /// Changes what a successor will find. What can't be remembered is what was before.
    fn remember(&self, server: &mut Server, change: impl FnOnce(&mut StoredVolume<Fd>)) {
        let Some((device, _)) = self.serving.device() else {
            return;
        };
        if let Err(error) = server.remember(device, change) {
            tracing::error!(
                volume = %self.held.grant.volume,
                "a successor will find it as it was before: {error}"
            );
        }
    }
}

impl Pages {
    /// Their descriptors, as they are stored.
    pub(super) fn stored(&self) -> (Option<Fd>, Option<Fd>) {
        let fd = |page: &Option<Page>| page.as_ref().and_then(Page::fd);
        (fd(&self.key), fd(&self.previous))
    }
}
