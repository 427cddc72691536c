//! Messages around keyd: the agent asks it to accept a bundle, and keyd grants the
//! volumes of that bundle, with their keys, to the data plane over a channel of which
//! the agent has no end.
//!
//! keyd trusts an [`AgentToKeyd`] message only if its `SCM_PIDFD` names the process
//! that rot said is the agent.

use minicbor::{Decode, Encode};

use crate::identity::{DiscardPolicy, RekeyId, ServedId, SocketName, VolumeId};
use crate::limits::{GroupGrant, Limits};
use crate::net::NicGrant;
use crate::release::Release;
use crate::workers::Workers;

/// Length of an AES-256-XTS key: data key, then tweak key.
pub const XTS_KEY_BYTES: usize = 64;

/// SHA-384 of an envelope's bytes.
pub type EnvelopeDigest = minicbor::bytes::ByteArray<48>;

/// SHA-384 that names a recipient's public key (`docs/formats/keys.md`).
pub type KeyFingerprint = minicbor::bytes::ByteArray<48>;

/// Most shreds that one message tells of.
pub const MAX_SHREDS: usize = 32;

/// From the agent to keyd.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum AgentToKeyd {
    /// Verify this envelope and grant its volumes and NICs to the data plane. Descriptor: the
    /// envelope, a regular file or memfd ([`crate::envelope`]).
    ///
    /// The envelope accepted last is granted again, even after its expiry.
    #[n(0)]
    Accept {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
    },
    /// Verify this release statement, and if it holds tell rot so. Descriptor: the statement, as
    /// an envelope is passed.
    #[n(1)]
    CheckRelease {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
    },
}

/// From keyd to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum KeydToAgent {
    /// keyd accepted it (floor and digest persisted), and the data plane has answered each grant.
    #[n(0)]
    Accepted {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// Epoch of the bundle.
        #[n(1)]
        epoch: u64,
        /// Volumes and NICs whose grant did not arrive, with the reason; empty when all did.
        #[n(2)]
        undelivered: Vec<Undelivered>,
        /// The host's key, and what was shredded.
        #[n(3)]
        keys: HostKeys,
    },
    /// keyd refused it; its floor and its grants are as before.
    #[n(1)]
    Refused {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// For the operator.
        #[n(1)]
        reason: String,
    },
    /// The release statement holds, and rot was told.
    #[n(2)]
    ReleaseApproved {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// What it says.
        #[n(1)]
        release: Release,
    },
}

/// What keyd says about the host's key and about the volumes whose keys it destroyed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HostKeys {
    /// Of the public key that volumes are to be sealed to.
    #[n(0)]
    pub fingerprint: KeyFingerprint,
    /// The volumes shredded last, newest first, at most [`MAX_SHREDS`].
    #[n(1)]
    pub shreds: Vec<Shred>,
    /// How many were shredded in all.
    #[n(2)]
    pub shreds_total: u64,
    /// Why the files of the host's key are not in order, if they are not: a key that is to be
    /// destroyed may still be there. keyd tries again at each bundle and at each start.
    #[n(3)]
    pub unfinished: Option<String>,
}

/// A volume whose key was destroyed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Shred {
    /// Which volume.
    #[n(0)]
    pub volume: VolumeId,
    /// Epoch of the bundle that ordered it.
    #[n(1)]
    pub epoch: u64,
    /// When keyd took the order, in seconds since 1970.
    #[n(2)]
    pub time_s: u64,
    /// The host's key that sealed copies of the volume key were for; it is destroyed.
    #[n(3)]
    pub destroyed_key: KeyFingerprint,
    /// The host's key that took its place then.
    #[n(4)]
    pub new_key: KeyFingerprint,
    /// How far it is.
    #[n(5)]
    pub state: ShredState,
}

/// How far a shred is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum ShredState {
    /// The key is gone from keyd, its directory and the data plane.
    #[n(0)]
    Done,
    /// The host's old key is destroyed; that the data plane dropped the volume key is not
    /// confirmed yet.
    #[n(1)]
    HeldByDataplane,
    /// The host's old key may still be on the disk: [`HostKeys::unfinished`].
    #[n(2)]
    KeyOnDisk,
}

/// A grant that the data plane did not take.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Undelivered {
    /// Which volume or NIC.
    #[n(0)]
    pub id: ServedId,
    /// For the operator.
    #[n(1)]
    pub reason: String,
}

/// What keyd vouches for: one volume of the bundle it verified. The data plane serves a
/// volume only as its grant says, whatever the agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VolumeGrant {
    /// Which volume.
    #[n(0)]
    pub volume: VolumeId,
    /// The only listener it may be served on.
    #[n(1)]
    pub socket: SocketName,
    /// The only uid whose frontend may connect (`SO_PEERCRED`).
    #[n(2)]
    pub allowed_uid: u32,
    /// Capacity in bytes, a multiple of the logical block and of the data unit.
    #[n(3)]
    pub size_bytes: u64,
    /// Logical block in bytes: 512 or 4096.
    #[n(4)]
    pub logical_block_bytes: u32,
    /// XTS data unit in bytes (512 or 4096, at most the logical block); none for a plain volume.
    #[n(5)]
    pub data_unit_bytes: Option<u32>,
    /// Writes are refused.
    #[n(6)]
    pub read_only: bool,
    /// GET_ID, at most 20 bytes of ASCII.
    #[n(7)]
    pub serial: String,
    /// Request queues, 1 to 64.
    #[n(8)]
    pub queues: u16,
    /// What DISCARD does.
    #[n(9)]
    pub discard: DiscardPolicy,
    /// Epoch of the bundle it stands in.
    #[n(10)]
    pub epoch: u64,
    /// The volume is re-keyed: its key takes the place of another, the previous key, while it is
    /// served. Only for an encrypted volume that may be written.
    #[n(11)]
    pub rekey: Option<RekeyId>,
    /// How much it may do.
    #[n(12)]
    #[cbor(skip_if = "Limits::is_none")]
    pub limits: Limits,
    /// The group that it shares limits with, beside its own; every grant of a group says the same
    /// about it.
    #[n(13)]
    pub group: Option<GroupGrant>,
}

/// From keyd to the data plane.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum KeydToDataplane {
    /// A volume may be served. Descriptors: for an encrypted volume its key, one page of secret
    /// memory that begins with the [`XTS_KEY_BYTES`]; the data plane expands it and wipes the
    /// page. With [`VolumeGrant::rekey`] the previous key follows in the same form. None for a plain
    /// volume, and none for one whose keys the data plane said it holds
    /// ([`DataplaneToKeyd::WorkersHeard`]): such a grant is taken if it is equal to the one held (the epoch
    /// and the limits aside), and refused else.
    ///
    /// A grant equal to the one held (the epoch aside) changes nothing but the epoch. One that
    /// differs by a greater size alone gives the served volume that capacity, and its frontend
    /// stays; refused if its file is shorter or its key another. One that differs by a re-key alone
    /// ([`VolumeGrant::rekey`]: none to some, or some to none) leaves the served volume and its
    /// frontend where they are, too: with a re-key, the key in use becomes the previous one (the page
    /// has to hold that key); without one, the previous key is dropped, refused while anything is
    /// still encrypted with it. Other limits or another group ([`VolumeGrant::limits`],
    /// [`VolumeGrant::group`]) take effect at once in each of these cases, and if they are all that
    /// differs the served volume stays where it is. Any other replaces the one held, and a volume served under the old
    /// one is detached first.
    #[n(0)]
    Grant {
        /// The grant.
        #[n(0)]
        grant: VolumeGrant,
    },
    /// The volume or NIC is no longer in the bundle: it is detached if it is served, and its key wiped.
    #[n(1)]
    Revoke {
        /// Which.
        #[n(0)]
        id: ServedId,
    },
    /// The worker threads that the bundle asks for: the first message to a data plane, before it makes
    /// them, and again when a bundle asks for others.
    #[n(2)]
    Workers {
        /// None: the bundle says nothing of them, or there is none yet.
        #[n(0)]
        workers: Option<Workers>,
    },
    /// A NIC may be served. No descriptors.
    ///
    /// A grant equal to the one held (the epoch aside) changes nothing but the epoch. Other limits and other
    /// checks take effect at once, another mirror, or none, ends the one there is; if they are all that
    /// differs, the served NIC and its frontend stay where they are. Any other grant replaces the one held, and a
    /// NIC served under the old one is detached first.
    #[n(3)]
    GrantNic {
        /// The grant.
        #[n(0)]
        grant: NicGrant,
    },
}

/// From the data plane to keyd.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum DataplaneToKeyd {
    /// The grant is held.
    #[n(0)]
    Granted {
        /// Which volume or NIC.
        #[n(0)]
        id: ServedId,
    },
    /// The grant can't be held; an earlier one stays as it was.
    #[n(1)]
    GrantRefused {
        /// Which volume or NIC.
        #[n(0)]
        id: ServedId,
        /// For the operator.
        #[n(1)]
        reason: String,
    },
    /// It is detached, and its key wiped.
    #[n(2)]
    Revoked {
        /// Which volume or NIC.
        #[n(0)]
        id: ServedId,
    },
    /// Answer to [`KeydToDataplane::Workers`], once there are workers.
    #[n(3)]
    WorkersHeard {
        /// They are others than there are, and nothing is served: the data plane ends now, to be started
        /// with them. (Where something is served they come with its next start.)
        #[n(0)]
        restarts: bool,
        /// Encrypted volumes whose keys it holds already, as it took them over from the process before it: they
        /// need not be unsealed for it. None from a data plane that does not say so.
        #[n(1)]
        #[cbor(skip_if = "Vec::is_empty")]
        holds: Vec<VolumeId>,
    },
}
