//! The schema of a host bundle. Each field's number is its key in the CBOR map and never
//! changes its meaning; `docs/formats/bundle.md` is the same list for people.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::keys::EnvelopeDigest;
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::net::{Mac, MirrorSpec, NicLimits, PortSpec, SpoofChecks, Uplink};
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{
    DiscardPolicy, GroupName, NicId, RekeyId, ServedId, SocketName, SwitchName, VolumeId,
};
use minicbor::{Decode, Encode};

/// Everything one host is to serve.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct HostBundle {
    /// Name of the host it is meant for.
    #[n(0)]
    pub host: String,
    /// Grows with every bundle of this host; gaps are allowed.
    #[n(1)]
    pub epoch: u64,
    /// If not empty: digests of the envelopes it may follow. A host whose last accepted envelope
    /// is none of them refuses it; a host that accepted none yet takes it.
    #[n(2)]
    pub supersedes: Vec<EnvelopeDigest>,
    /// First second of its validity, Unix time.
    #[n(3)]
    pub not_before: u64,
    /// First second after its validity, Unix time.
    #[n(4)]
    pub expires: u64,
    /// The volumes; one that was there before and is not in the list is removed.
    #[n(5)]
    pub volumes: Vec<Volume>,
    /// Volumes that may be removed while a frontend is connected; none of them is in `volumes`.
    #[n(6)]
    pub force_remove: Vec<VolumeId>,
    /// Volumes whose key the host is to destroy for ever; none of them is in `volumes`. They are
    /// removed also while a frontend is connected. An empty list is left out, so that a bundle
    /// without it is encoded as it was before there was this field.
    #[n(7)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub shred: Vec<VolumeId>,
    /// The groups that volumes can be in; without any it is encoded as before there were groups.
    #[n(8)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
    /// The worker threads of the host's data plane; none: as many as the host itself says.
    #[n(9)]
    pub workers: Option<Workers>,
    /// The switches that network cards can be on. Without any, as without what follows, it is encoded as
    /// before there were networks.
    #[n(10)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub switches: Vec<Switch>,
    /// The network cards; one that was there before and is not in the list is removed.
    #[n(11)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// Network cards that may be removed while a frontend is connected; none of them is in `nics`.
    #[n(12)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub force_remove_nics: Vec<NicId>,
}

/// A switch: the network cards on it reach each other, and the world through its uplink.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Switch {
    /// Its name, which NICs give as their port.
    #[n(0)]
    pub name: SwitchName,
    /// What connects it to the world; none: nothing does.
    #[n(1)]
    pub uplink: Option<Uplink>,
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Nic {
    /// Its identity.
    #[n(0)]
    pub id: NicId,
    /// The name people gave it.
    #[n(1)]
    pub name: String,
    /// Its address, which no other NIC of the host has.
    #[n(2)]
    pub mac: Mac,
    /// Its MTU in bytes, 68 to 65,535.
    #[n(3)]
    pub mtu: u16,
    /// Queue pairs, 1 to 16.
    #[n(4)]
    pub queue_pairs: u16,
    /// What its frames go out of.
    #[n(5)]
    pub port: PortSpec,
    /// Its listener.
    #[n(6)]
    pub socket: SocketSpec,
    /// The only uid whose frontend may connect.
    #[n(7)]
    pub allowed_uid: u32,
    /// What this bundle changes about it, and its removal by a later one, go ahead while a frontend is
    /// connected.
    #[n(8)]
    pub force_removal: bool,
    /// How much it may send and get.
    #[n(9)]
    #[cbor(skip_if = "NicLimits::is_none")]
    pub limits: NicLimits,
    /// What it may claim to be.
    #[n(10)]
    pub checks: SpoofChecks,
    /// All its frames are copied into a file, too.
    #[n(11)]
    pub mirror: Option<MirrorSpec>,
}

/// Volumes that share limits, beside those that each of them has.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Group {
    /// Its name, which volumes give as theirs.
    #[n(0)]
    pub name: GroupName,
    /// What its volumes may do together.
    #[n(1)]
    #[cbor(skip_if = "Limits::is_none")]
    pub limits: Limits,
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Volume {
    /// Its identity, bound into its sealed keys.
    #[n(0)]
    pub id: VolumeId,
    /// The name people gave it.
    #[n(1)]
    pub name: String,
    /// File or block device: absolute, or relative to the agent's volume directory.
    #[n(2)]
    pub path: String,
    /// Capacity in bytes, a multiple of the logical block.
    #[n(3)]
    pub size_bytes: u64,
    /// XTS data unit in bytes, 512 or 4096, at most the logical block; none for a plain volume.
    #[n(4)]
    pub data_unit_bytes: Option<u32>,
    /// Logical block in bytes, 512 or 4096.
    #[n(5)]
    pub logical_block_bytes: u32,
    /// Writes are refused.
    #[n(6)]
    pub read_only: bool,
    /// What GET_ID answers: at most 20 printable ASCII characters.
    #[n(7)]
    pub serial: String,
    /// What DISCARD does.
    #[n(8)]
    pub discard: DiscardPolicy,
    /// Request queues, 1 to 64.
    #[n(9)]
    pub queues: u16,
    /// Its listener.
    #[n(10)]
    pub socket: SocketSpec,
    /// The only uid whose frontend may connect.
    #[n(11)]
    pub allowed_uid: u32,
    /// What this bundle changes about the volume, and its removal by a later one, go ahead while
    /// a frontend is connected.
    #[n(12)]
    pub force_removal: bool,
    /// Its key, sealed to each recipient; empty for a plain volume.
    #[n(13)]
    pub sealed_keys: Vec<SealedKeyEntry>,
    /// The re-key that brings it from another key to this one; none if there is none to be done. What
    /// was signed before there were re-keys has none, and is encoded as it was.
    #[n(14)]
    pub rekey: Option<Rekey>,
    /// How much it may do. Without limits it is encoded as before there were any.
    #[n(15)]
    #[cbor(skip_if = "Limits::is_none")]
    pub limits: Limits,
    /// The group whose limits hold for it, too; one of the bundle's.
    #[n(16)]
    pub group: Option<GroupName>,
}

/// A re-key: the volume's key takes the place of another, the previous key, while it is served.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Rekey {
    /// Random; the record in the volume's file carries it.
    #[n(0)]
    pub id: RekeyId,
    /// The previous key, sealed to each recipient as it was before.
    #[n(1)]
    pub previous_keys: Vec<SealedKeyEntry>,
}

/// A vhost-user listener: rot makes the path from the name.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SocketSpec {
    /// Its name.
    #[n(0)]
    pub name: SocketName,
    /// Owner of the socket file.
    #[n(1)]
    pub uid: u32,
    /// Group of the socket file.
    #[n(2)]
    pub gid: u32,
    /// Permission bits of the socket file, at most 0o777.
    #[n(3)]
    pub mode: u32,
}

/// A volume key, sealed to one recipient.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SealedKeyEntry {
    /// Host name, or [`crate::RECOVERY_RECIPIENT`].
    #[n(0)]
    pub recipient: String,
    /// Fingerprint of the recipient's public key.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub fingerprint: Vec<u8>,
    /// HPKE encapsulated key.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub enc: Vec<u8>,
    /// HPKE ciphertext of the volume key.
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub ciphertext: Vec<u8>,
}

impl HostBundle {
    /// Whether it says that a volume goes although a frontend is connected.
    #[must_use]
    pub fn forces_removal_of(&self, id: VolumeId) -> bool {
        self.force_remove.contains(&id) || self.shred.contains(&id)
    }

    /// The same of anything that is served.
    #[must_use]
    pub fn forces_removal_of_served(&self, id: ServedId) -> bool {
        match id {
            ServedId::Volume(id) => self.forces_removal_of(id),
            ServedId::Nic(id) => self.force_remove_nics.contains(&id),
        }
    }

    /// The NIC of that id.
    #[must_use]
    pub fn nic(&self, id: NicId) -> Option<&Nic> {
        self.nics.iter().find(|nic| nic.id == id)
    }

    /// The switch of that name.
    #[must_use]
    pub fn switch(&self, name: &SwitchName) -> Option<&Switch> {
        self.switches.iter().find(|switch| switch.name == *name)
    }

    /// The name that people gave a volume or a NIC; none if it is not in the bundle.
    #[must_use]
    pub fn name_of(&self, id: ServedId) -> Option<&str> {
        match id {
            ServedId::Volume(id) => self.volume(id).map(|volume| volume.name.as_str()),
            ServedId::Nic(id) => self.nic(id).map(|nic| nic.name.as_str()),
        }
    }

    /// The listener of each volume and NIC.
    pub fn sockets(&self) -> impl Iterator<Item = (ServedId, &SocketSpec)> {
        let volumes = self.volumes.iter().map(|v| (v.id.into(), &v.socket));
        volumes.chain(self.nics.iter().map(|nic| (nic.id.into(), &nic.socket)))
    }

    /// The uplink of the switch that a NIC is on.
    #[must_use]
    pub fn uplink_of(&self, nic: &Nic) -> Option<&Uplink> {
        let PortSpec::Switch { switch } = &nic.port else {
            return None;
        };
        self.switch(switch)?.uplink.as_ref()
    }

    /// The volume of that id.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.id == id)
    }

    /// The group that a volume is in.
    #[must_use]
    pub fn group_of(&self, volume: &Volume) -> Option<&Group> {
        let name = volume.group.as_ref()?;
        self.groups.iter().find(|group| group.name == *name)
    }
}

impl Volume {
    /// The key sealed to a recipient (a host's name, or [`crate::RECOVERY_RECIPIENT`]).
    #[must_use]
    pub fn sealed_for(&self, recipient: &str) -> Option<&SealedKeyEntry> {
        self.sealed_keys
            .iter()
            .find(|entry| entry.recipient == recipient)
    }

    /// The previous key sealed to a recipient; none without a re-key.
    #[must_use]
    pub fn previous_sealed_for(&self, recipient: &str) -> Option<&SealedKeyEntry> {
        let rekey = self.rekey.as_ref()?;
        let mut entries = rekey.previous_keys.iter();
        entries.find(|entry| entry.recipient == recipient)
    }

    /// Whether it has a key.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.data_unit_bytes.is_some()
    }
}
