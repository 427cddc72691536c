//! What network cards do, as the data plane tells it.

use minicbor::{Decode, Encode};

use crate::identity::{NicId, SwitchName};

/// Most NICs that one message tells of: with all that can be said of them they fit.
pub const NICS_PER_MESSAGE: usize = 32;

/// Which NICs and switches a data plane has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Networks {
    /// NICs that are attached.
    #[n(0)]
    pub nics: Vec<NicId>,
    /// Of these, those that are mirrored, or whose mirror has ended because its file was full.
    #[n(1)]
    pub mirrored: Vec<NicId>,
    /// Switches that are attached.
    #[n(2)]
    pub switches: Vec<SwitchName>,
    /// NICs that are being attached, taken over from a predecessor, or detached: what they come to is not known yet.
    #[n(3)]
    #[cbor(default)]
    pub busy: Vec<NicId>,
}

/// What one NIC is doing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NicStatus {
    /// Which NIC.
    #[n(0)]
    pub nic: NicId,
    /// It has its port.
    #[n(1)]
    pub attached: bool,
    /// A frontend is connected.
    #[n(2)]
    pub connected: bool,
    /// Queues that run, of both directions.
    #[n(3)]
    pub running_queues: u16,
    /// Queues retired after a driver error.
    #[n(4)]
    pub retired_queues: u16,
    /// What each pair carried since it was attached.
    #[n(5)]
    pub pairs: Vec<PairCounts>,
    /// Frames of the guest that went no further, by reason.
    #[n(6)]
    pub tx_drops: Vec<DropCount>,
    /// Frames for the guest that it did not get, by reason.
    #[n(7)]
    pub rx_drops: Vec<DropCount>,
    /// Its mirror; none: it has none.
    #[n(8)]
    pub mirror: Option<MirrorStatus>,
    /// Why the device failed, if it did (for people).
    #[n(9)]
    pub fault: Option<String>,
    /// How long its limits have let nothing be sent since it was attached, in milliseconds.
    #[n(10)]
    pub throttled_ms: u64,
}

/// What a switch has done since it was attached, or since the data plane was started.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SwitchStatus {
    /// Which switch.
    #[n(0)]
    pub name: SwitchName,
    /// Stations that it knew when it last counted them, which it does once a second while it works.
    #[n(1)]
    pub stations: u64,
    /// Stations that were not known before.
    #[n(2)]
    pub learned: u64,
    /// Stations that went from one port to another.
    #[n(3)]
    pub moved: u64,
    /// Frames to a single station whose way the flow cache knew.
    #[n(4)]
    pub flow_hits: u64,
    /// Frames to a single station whose way it did not know.
    #[n(5)]
    pub flow_misses: u64,
    /// Frames that went to all ports: they were for many, or for a station that wasn't known.
    #[n(6)]
    pub floods: u64,
    /// Frames from the uplink that went no further.
    #[n(7)]
    pub uplink_drops: u64,
    /// Frames that its uplink's interface refused.
    #[n(8)]
    #[cbor(default)]
    pub uplink_refused: u64,
    /// Its uplink's interface was removed: nothing goes through it any more, also if there is another of its name.
    #[n(9)]
    #[cbor(default)]
    pub uplink_removed: bool,
}

/// What a queue pair carried; the directions are the guest's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct PairCounts {
    /// What the guest got.
    #[n(0)]
    pub rx: Traffic,
    /// What the guest sent.
    #[n(1)]
    pub tx: Traffic,
}

/// What a queue carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Traffic {
    /// Frames; a segment that is not cut yet is one.
    #[n(0)]
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    #[n(1)]
    pub bytes: u64,
    /// Frames that went no further.
    #[n(2)]
    pub dropped: u64,
}

/// Frames that were dropped for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DropCount {
    /// The reason's name, which stays the same from version to version.
    #[n(0)]
    pub reason: String,
    /// How many.
    #[n(1)]
    pub frames: u64,
}

/// What the mirror of a NIC is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct MirrorStatus {
    /// Frames in the file.
    #[n(0)]
    pub frames: u64,
    /// Bytes of the file.
    #[n(1)]
    pub bytes: u64,
    /// Frames that came faster than they could be written.
    #[n(2)]
    pub missed: u64,
    /// It has ended: the file is as long as it may be, or can't be written to.
    #[n(3)]
    pub ended: bool,
}

impl NicStatus {
    /// Of a NIC that is not served.
    #[must_use]
    pub fn of_unattached(nic: NicId) -> Self {
        Self {
            nic,
            attached: false,
            connected: false,
            running_queues: 0,
            retired_queues: 0,
            pairs: Vec::new(),
            tx_drops: Vec::new(),
            rx_drops: Vec::new(),
            mirror: None,
            fault: None,
            throttled_ms: 0,
        }
    }

    /// What all pairs carried.
    #[must_use]
    pub fn total(&self) -> PairCounts {
        let add = |sum: Traffic, other: Traffic| Traffic {
            packets: sum.packets.saturating_add(other.packets),
            bytes: sum.bytes.saturating_add(other.bytes),
            dropped: sum.dropped.saturating_add(other.dropped),
        };
        let pairs = self.pairs.iter();
        pairs.fold(PairCounts::default(), |sum, pair| PairCounts {
            rx: add(sum.rx, pair.rx),
            tx: add(sum.tx, pair.tx),
        })
    }
}

/// As much as can be said of a switch.
#[cfg(test)]
pub(crate) fn switch_status_at_its_longest(name: SwitchName) -> SwitchStatus {
    SwitchStatus {
        name,
        stations: u64::MAX,
        learned: u64::MAX,
        moved: u64::MAX,
        flow_hits: u64::MAX,
        flow_misses: u64::MAX,
        floods: u64::MAX,
        uplink_drops: u64::MAX,
        uplink_refused: u64::MAX,
        uplink_removed: true,
    }
}

/// As much as can be said of one.
#[cfg(test)]
pub(crate) fn nic_status_at_its_longest() -> NicStatus {
    let traffic = Traffic {
        packets: u64::MAX,
        bytes: u64::MAX,
        dropped: u64::MAX,
    };
    let pair = PairCounts {
        rx: traffic,
        tx: traffic,
    };
    let drops = DropCount {
        reason: "a_reason_with_a_long_name".to_owned(),
        frames: u64::MAX,
    };
    NicStatus {
        attached: true,
        connected: true,
        running_queues: 32,
        retired_queues: 32,
        pairs: vec![pair; 16],
        tx_drops: vec![drops.clone(); 24],
        rx_drops: vec![drops; 24],
        mirror: Some(MirrorStatus {
            frames: u64::MAX,
            bytes: u64::MAX,
            missed: u64::MAX,
            ended: true,
        }),
        fault: Some("x".repeat(100)),
        throttled_ms: u64::MAX,
        ..NicStatus::of_unattached(NicId([7; 16]))
    }
}
