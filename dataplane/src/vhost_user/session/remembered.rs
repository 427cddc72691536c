//! A session as it is remembered for a successor, and the session that a predecessor left: the one is made of
//! the other, so that a connection goes on as if nothing had happened.
//!
//! What workers have of it (requests, how far a ring was read) is not here: the in-flight regions and the
//! rings themselves say it. Nor is whose the volume is: a session that goes on takes it anew, and waits for it
//! as one does whose volume somebody else has.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Facts, Outbox, Pending, Session, Vring, Waiting};
use crate::fds::as_event;
use crate::memory::{GuestMemory, RegionSpec};
use crate::stored::{
    Fd, Step, StoredCache, StoredConnection, StoredPhase, StoredRegion, StoredRing, StoredVring,
};
use crate::vhost_user::message::{ProtocolError, VringAddresses};
use crate::vhost_user::vring::Phase;
use crate::vhost_user::{BackendChannel, feature};
use crate::worker::message::RingLayout;

impl Session {
    /// What a successor has to know of the connection over `socket`, between two messages or when one is done.
    #[must_use]
    pub fn remembered(&self, socket: &Fd, step: Step) -> StoredConnection<Fd> {
        let region = |(spec, fd): &(RegionSpec, Fd)| StoredRegion {
            guest_addr: spec.guest_addr,
            bytes: spec.bytes,
            user_addr: spec.user_addr,
            file_offset: spec.file_offset,
            fd: Arc::clone(fd),
        };
        StoredConnection {
            socket: Arc::clone(socket),
            features: self.features,
            protocol_features: self.protocol_features,
            status: self.status,
            memory: self.files.iter().map(region).collect(),
            vrings: self.vrings.iter().map(remembered_vring).collect(),
            inflight: self.regions.as_ref().map(|regions| regions.file.clone()),
            log: self.log_file.clone(),
            backend: self.backend.as_ref().map(|b| Arc::clone(b.socket())),
            step,
            told_sectors: self.told,
        }
    }

    /// The device's cache mode, which outlives the connection.
    #[must_use]
    pub fn cache_mode(&self) -> StoredCache {
        self.facts.device.cache_mode()
    }

    /// The session that a predecessor left, with its memory mapped. None of its queues runs before
    /// [`Session::start_again`].
    ///
    /// # Errors
    /// [`ProtocolError::Resume`]: this build does not offer what was negotiated, or something can't be mapped.
    pub fn resumed(facts: Facts, left: StoredConnection<Fd>) -> Result<Self, ProtocolError> {
        Self::take_over(facts, left).map_err(ProtocolError::Resume)
    }

    fn take_over(facts: Facts, left: StoredConnection<Fd>) -> Result<Self, String> {
        let mut session = Self::new(facts);
        let offered = session.offered();
        if left.features & !offered != 0
            || left.protocol_features & !session.facts.device.protocol_features() != 0
        {
            return Err(format!(
                "features {:#x} and protocol features {:#x} were negotiated, and are not offered",
                left.features, left.protocol_features
            ));
        }
        if left.vrings.len() != session.vrings.len() {
            return Err(format!("it has {} queues", left.vrings.len()));
        }
        session.features = left.features;
        session.protocol_features = left.protocol_features;
        session.status = left.status;
        session.told = left.told_sectors;
        if let Some(log) = left.log {
            session.map_log(log)?;
        }
        session.log.enable(left.features & feature::LOG_ALL != 0);
        session.take_over_memory(left.memory)?;
        if let Some(file) = left.inflight {
            session.set_regions(file)?;
        }
        session.backend = left.backend.map(BackendChannel::new).transpose()?;
        let vrings = left.vrings.into_iter().zip(0..);
        let vrings = vrings.map(|(vring, index)| taken_over(vring, index));
        session.vrings = vrings.collect::<Result<_, _>>()?;
        Ok(session)
    }

    fn take_over_memory(&mut self, regions: Vec<StoredRegion<Fd>>) -> Result<(), String> {
        let files = regions.into_iter().map(|r| (r.spec(), r.fd));
        self.files = files.collect();
        let regions: Vec<_> = self.files.iter().map(|(s, fd)| (*s, fd.as_fd())).collect();
        let memory = GuestMemory::map(&regions).map_err(|e| e.to_string())?;
        self.memory = Arc::new(memory.with_log(&self.log));
        Ok(())
    }

    /// Starts the queues that a predecessor's workers had, and takes the volume if there are any. The session is
    /// pending until all have started; they go on where the rings and in-flight regions say.
    ///
    /// A queue that its driver broke stays broken; one whose ring is in no region waits for a region.
    ///
    /// # Errors
    /// [`ProtocolError::Resume`]: a queue can't be started; the connection has to end.
    pub fn start_again(&mut self, out: &mut Outbox) -> Result<(), ProtocolError> {
        self.tell_changes();
        let started = self.started();
        if !started.is_empty() {
            self.take_volume(out);
        }
        let mut left = 0;
        for queue in started {
            let vring = self.vrings.get_mut(usize::from(queue.index));
            let Some((vring, layout)) = vring.and_then(|v| v.running.map(|layout| (v, layout)))
            else {
                continue;
            };
            vring.rests = !vring.ring_is_in(&self.memory, self.features);
            vring.dormant = vring.rests || vring.phase == Phase::Retired;
            if vring.dormant {
                continue;
            }
            let start = self.start_of(queue.index, layout);
            let start = start.map_err(ProtocolError::Resume)?;
            self.begin(start, out);
            left += 1;
        }
        if left > 0 {
            self.waiting = Some(Waiting {
                what: Pending::Resume { left },
                code: 0,
                acknowledge: false,
            });
        }
        Ok(())
    }

    /// The device may have changed, a volume grown, while nobody could tell the frontend.
    fn tell_changes(&mut self) {
        if self.told != Some(self.facts.device.told()) {
            self.config_changed();
        }
    }

    /// One of a predecessor's queues has started.
    pub(super) fn one_resumed(&mut self) {
        if let Some(Pending::Resume { left }) = self.waiting.as_mut().map(|w| &mut w.what) {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.waiting = None;
            }
        }
    }

    /// Whether queues that a predecessor's workers had are still to start. Whatever the frontend says afterwards is
    /// no part of that.
    #[must_use]
    pub fn is_resuming(&self) -> bool {
        let what = self.waiting.as_ref().map(|w| &w.what);
        matches!(what, Some(Pending::Resume { .. }))
    }

    /// Whether queues of a predecessor's are being started, by themselves or because their memory is back.
    pub(super) fn starts_again(&self) -> bool {
        let what = self.waiting.as_ref().map(|w| &w.what);
        matches!(what, Some(Pending::Resume { .. } | Pending::Changes { .. }))
    }
}

fn remembered_vring(vring: &Vring) -> StoredVring<Fd> {
    let ring = |a: VringAddresses| StoredRing {
        desc: a.desc,
        avail: a.avail,
        used: a.used,
    };
    let layout = |layout: RingLayout| StoredRing {
        desc: layout.desc,
        avail: layout.avail,
        used: layout.used,
    };
    StoredVring {
        size: vring.size,
        addresses: vring.addresses.map(ring),
        log: vring.addresses.and_then(|a| a.log),
        base: vring.base,
        enabled: vring.enabled,
        phase: match vring.phase {
            Phase::Stopped => StoredPhase::Stopped,
            Phase::Running => StoredPhase::Running,
            Phase::Retired => StoredPhase::Retired,
        },
        running: vring.running.map(layout),
        kick: vring.kick.clone(),
        call: vring.call.clone(),
        error: vring.error.clone(),
        anew: vring.anew,
    }
}

/// What a predecessor left of a queue. Everything that a worker will get of it is looked at as if a frontend
/// had just sent it.
fn taken_over(left: StoredVring<Fd>, index: u32) -> Result<Vring, String> {
    let layout = |ring: StoredRing| RingLayout {
        size: left.size,
        desc: ring.desc,
        avail: ring.avail,
        used: ring.used,
    };
    let addresses = |ring: StoredRing| VringAddresses {
        index,
        desc: ring.desc,
        avail: ring.avail,
        used: ring.used,
        log: left.log,
    };
    let running = left.running.map(layout);
    let phase = match left.phase {
        StoredPhase::Stopped => Phase::Stopped,
        StoredPhase::Running => Phase::Running,
        StoredPhase::Retired => Phase::Retired,
    };
    if (phase == Phase::Stopped) != running.is_none() {
        return Err(format!("queue {index} runs nowhere"));
    }
    Ok(Vring {
        size: left.size,
        addresses: left.addresses.map(addresses),
        base: left.base,
        enabled: left.enabled,
        kick: left.kick.map(event).transpose()?,
        call: left.call.map(event).transpose()?,
        error: left.error.map(event).transpose()?,
        phase,
        running,
        anew: left.anew,
        owes: false,
        rests: false,
        dormant: false,
    })
}

/// As [`as_event`], of a descriptor that stays the one that is stored.
fn event(fd: Fd) -> Result<Fd, String> {
    let looked_at = fd.try_clone().and_then(as_event);
    looked_at.map(|_| fd).map_err(|e| e.to_string())
}
