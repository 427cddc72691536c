//! What is remembered of a volume and of its frontend's connection: plain values, and of each descriptor
//! either itself ([`super::Fd`]) or, in the state as it is written, its number ([`FdNumber`]).
//!
//! The types are the format: fields are numbered, new ones come last and are optional, so that the version
//! before reads what this one writes ([`super::format`]).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::keys::VolumeGrant;
use minicbor::{Decode, Encode};

use crate::memory::RegionSpec;

/// Which of a volume's stored descriptors: its name in the store is made of it, and it is never used again
/// for another of that volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct FdNumber(#[n(0)] pub u32);

/// A volume that is served.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredVolume<F> {
    /// What keyd granted. A successor serves the volume as it says until keyd says otherwise.
    #[n(0)]
    pub grant: VolumeGrant,
    /// The file or block device that the agent gave, with the lock on it while queues run.
    #[n(1)]
    pub file: F,
    /// Where frontends connect.
    #[n(2)]
    pub listener: F,
    /// The page of secret memory with its key, as keyd gave it; none: a plain volume.
    #[n(3)]
    pub key: Option<F>,
    /// The same with the key that a re-key replaces.
    #[n(4)]
    pub previous_key: Option<F>,
    /// No new frontend is let in: its removal is prepared.
    #[n(5)]
    pub refuses_new: bool,
    /// The cache mode, which outlives a connection.
    #[n(6)]
    pub cache: StoredCache,
    /// Its frontend; none: nobody is connected.
    #[n(7)]
    pub connection: Option<StoredConnection<F>>,
}

/// The cache mode of a device (virtio 1.2, 5.2.5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StoredCache {
    /// Completed writes may be volatile until a flush.
    #[n(0)]
    pub writeback: bool,
    /// The driver chose that, and did not just begin with it.
    #[n(1)]
    pub chosen: bool,
}

impl Default for StoredCache {
    fn default() -> Self {
        Self {
            writeback: true,
            chosen: false,
        }
    }
}

/// A frontend's connection.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredConnection<F> {
    /// The socket.
    #[n(0)]
    pub socket: F,
    /// SET_FEATURES.
    #[n(1)]
    pub features: u64,
    /// SET_PROTOCOL_FEATURES.
    #[n(2)]
    pub protocol_features: u64,
    /// SET_STATUS.
    #[n(3)]
    pub status: u8,
    /// Guest memory, by guest address.
    #[n(4)]
    pub memory: Vec<StoredRegion<F>>,
    /// One for each queue of the device.
    #[n(5)]
    pub vrings: Vec<StoredVring<F>>,
    /// SET_INFLIGHT_FD, or a region of our own where the frontend has none.
    #[n(6)]
    pub inflight: Option<StoredInflight<F>>,
    /// SET_LOG_BASE.
    #[n(7)]
    pub log: Option<StoredLog<F>>,
    /// SET_BACKEND_REQ_FD.
    #[n(8)]
    pub backend: Option<F>,
    /// Where the message is that lies first in the socket.
    #[n(9)]
    pub step: Step,
    /// The capacity in sectors that the frontend knows; none: nobody knows which. From version 2 on.
    #[n(10)]
    pub told_sectors: Option<u64>,
}

/// Where the message is that lies first in the socket. It was looked at without being taken out
/// (`MSG_PEEK`), and is taken out when nothing can be lost with it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub enum Step {
    /// Nothing was done for it: it is read again.
    #[default]
    #[n(0)]
    Idle,
    /// What it asks for is done, and stands in this state.
    #[n(1)]
    Applied {
        /// Its length, header and all.
        #[n(0)]
        bytes: u32,
        /// Its reply.
        #[n(1)]
        reply: Reply,
    },
}

/// Where the reply to a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Reply {
    /// It has none.
    #[n(0)]
    None,
    /// It is being sent. A successor can't tell whether it was, and closes the connection.
    #[n(1)]
    Owed,
    /// It was sent.
    #[n(2)]
    Sent,
}

/// A region of guest memory (vhost-user, "Memory region description").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StoredRegion<F> {
    /// First guest address.
    #[n(0)]
    pub guest_addr: u64,
    /// Length in bytes.
    #[n(1)]
    pub bytes: u64,
    /// First address in the frontend.
    #[n(2)]
    pub user_addr: u64,
    /// Where it begins in its file, in bytes.
    #[n(3)]
    pub file_offset: u64,
    /// Its file.
    #[n(4)]
    pub fd: F,
}

/// What a frontend has said about one queue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct StoredVring<F> {
    /// SET_VRING_NUM in entries; 0: not said yet.
    #[n(0)]
    pub size: u16,
    /// SET_VRING_ADDR: addresses in the frontend.
    #[n(1)]
    pub addresses: Option<StoredRing>,
    /// SET_VRING_ADDR: guest address of the used ring in the dirty log, if it is to be marked there.
    #[n(2)]
    pub log: Option<u64>,
    /// SET_VRING_BASE, or where it was stopped. Of a queue that runs, where it was started.
    #[n(3)]
    pub base: Option<u32>,
    /// SET_VRING_ENABLE.
    #[n(4)]
    pub enabled: bool,
    /// Whether a worker had it.
    #[n(5)]
    pub phase: StoredPhase,
    /// Where its ring lies in guest memory, while a worker has it.
    #[n(6)]
    pub running: Option<StoredRing>,
    /// SET_VRING_KICK, while a worker has it.
    #[n(7)]
    pub kick: Option<F>,
    /// SET_VRING_CALL.
    #[n(8)]
    pub call: Option<F>,
    /// SET_VRING_ERR.
    #[n(9)]
    pub error: Option<F>,
    /// It was stopped on this connection: nothing of it is in flight, and `base` counts.
    #[n(10)]
    pub anew: bool,
}

/// Where a queue is between its first message and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
#[cbor(index_only)]
pub enum StoredPhase {
    /// No worker has it.
    #[default]
    #[n(0)]
    Stopped,
    /// A worker serves it.
    #[n(1)]
    Running,
    /// The driver broke it.
    #[n(2)]
    Retired,
}

/// The addresses of a ring's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StoredRing {
    /// Descriptor table; packed: descriptor ring.
    #[n(0)]
    pub desc: u64,
    /// Avail ring; packed: driver event area.
    #[n(1)]
    pub avail: u64,
    /// Used ring; packed: device event area.
    #[n(2)]
    pub used: u64,
}

/// The in-flight region of a connection (vhost-user, "Inflight description").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StoredInflight<F> {
    /// Its file.
    #[n(0)]
    pub fd: F,
    /// Bytes to map.
    #[n(1)]
    pub bytes: u64,
    /// Where in the file they begin.
    #[n(2)]
    pub offset: u64,
    /// Queues that it is for.
    #[n(3)]
    pub queues: u16,
    /// Entries of each.
    #[n(4)]
    pub queue_size: u16,
    /// Ours: the frontend does not know of it, and it ends with the connection.
    #[n(5)]
    pub private: bool,
}

/// The dirty log of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StoredLog<F> {
    /// Its file.
    #[n(0)]
    pub fd: F,
    /// Bytes to map.
    #[n(1)]
    pub bytes: u64,
    /// Where in the file they begin.
    #[n(2)]
    pub offset: u64,
}

impl<F> StoredVolume<F> {
    /// The same with other descriptors, each made of the one it had, in the order of the fields.
    ///
    /// # Errors
    /// The first that `with` fails with.
    pub fn try_map<G, E>(
        self,
        with: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<StoredVolume<G>, E> {
        Ok(StoredVolume {
            grant: self.grant,
            file: with(self.file)?,
            listener: with(self.listener)?,
            key: self.key.map(&mut *with).transpose()?,
            previous_key: self.previous_key.map(&mut *with).transpose()?,
            refuses_new: self.refuses_new,
            cache: self.cache,
            connection: self.connection.map(|c| c.try_map(with)).transpose()?,
        })
    }
}

impl<F> StoredConnection<F> {
    /// As [`StoredVolume::try_map`].
    ///
    /// # Errors
    /// The first that `with` fails with.
    pub fn try_map<G, E>(
        self,
        with: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<StoredConnection<G>, E> {
        let socket = with(self.socket)?;
        let memory = self.memory.into_iter().map(|r| r.try_map(with));
        let memory = memory.collect::<Result<_, E>>()?;
        let vrings = self.vrings.into_iter().map(|v| v.try_map(with));
        Ok(StoredConnection {
            socket,
            features: self.features,
            protocol_features: self.protocol_features,
            status: self.status,
            memory,
            vrings: vrings.collect::<Result<_, E>>()?,
            inflight: self.inflight.map(|i| i.try_map(with)).transpose()?,
            log: self.log.map(|l| l.try_map(with)).transpose()?,
            backend: self.backend.map(&mut *with).transpose()?,
            step: self.step,
            told_sectors: self.told_sectors,
        })
    }
}

impl<F> StoredRegion<F> {
    /// Where it lies, as a frontend describes it.
    #[must_use]
    pub fn spec(&self) -> RegionSpec {
        RegionSpec {
            guest_addr: self.guest_addr,
            bytes: self.bytes,
            user_addr: self.user_addr,
            file_offset: self.file_offset,
        }
    }

    fn try_map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<StoredRegion<G>, E> {
        Ok(StoredRegion {
            guest_addr: self.guest_addr,
            bytes: self.bytes,
            user_addr: self.user_addr,
            file_offset: self.file_offset,
            fd: with(self.fd)?,
        })
    }
}

impl<F> StoredVring<F> {
    fn try_map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<StoredVring<G>, E> {
        Ok(StoredVring {
            size: self.size,
            addresses: self.addresses,
            log: self.log,
            base: self.base,
            enabled: self.enabled,
            phase: self.phase,
            running: self.running,
            kick: self.kick.map(&mut *with).transpose()?,
            call: self.call.map(&mut *with).transpose()?,
            error: self.error.map(&mut *with).transpose()?,
            anew: self.anew,
        })
    }
}

impl<F> StoredInflight<F> {
    fn try_map<G, E>(
        self,
        with: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<StoredInflight<G>, E> {
        Ok(StoredInflight {
            fd: with(self.fd)?,
            bytes: self.bytes,
            offset: self.offset,
            queues: self.queues,
            queue_size: self.queue_size,
            private: self.private,
        })
    }
}

impl<F> StoredLog<F> {
    fn try_map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<StoredLog<G>, E> {
        Ok(StoredLog {
            fd: with(self.fd)?,
            bytes: self.bytes,
            offset: self.offset,
        })
    }
}
