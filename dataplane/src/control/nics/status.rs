//! What the NICs are doing, as the agent is told.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ops::Bound;

use bulkhead_protocol::control::{
    DropCount, NICS_PER_MESSAGE, Networks, NicStatus, PairCounts, SwitchStatus, Traffic,
};
use bulkhead_protocol::{NicId, SwitchName};

use super::switches::Switch;
use super::{Nic, Nics, mirror, ports};
use crate::net::{Counts, NetDevice};
use crate::port::{DropReason, OutsideSpec, PortSpec};
use crate::server::Server;

/// Most characters of a fault: what is said of [`NICS_PER_MESSAGE`] NICs fits one message.
const MAX_FAULT_CHARS: usize = 100;

impl Nics {
    /// What is attached.
    pub(in crate::control) fn networks(&self) -> Networks {
        let attached = || {
            let nics = self.table.iter();
            nics.filter_map(|(id, nic)| Some((*id, nic.served()?.1)))
        };
        let nics = self.table.iter();
        let busy = nics.filter(|(_, nic)| !nic.serving.is_settled());
        let mirrored = attached().filter(|(_, device)| device.mirror().is_some());
        Networks {
            nics: attached().map(|(id, _)| id).collect(),
            mirrored: mirrored.map(|(id, _)| id).collect(),
            switches: self.switches.keys().cloned().collect(),
            busy: busy.map(|(id, _)| *id).collect(),
        }
    }

    /// The granted NICs whose id is above one, as many as one message holds.
    pub(in crate::control) fn status(
        &self,
        server: &Server,
        after: Option<NicId>,
    ) -> Vec<NicStatus> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = self.table.range((from, Bound::Unbounded));
        let page = range.take(NICS_PER_MESSAGE);
        page.map(|(id, nic)| one(*id, nic, server)).collect()
    }

    /// All switches that are attached.
    pub(in crate::control) fn switch_status(&self) -> Vec<SwitchStatus> {
        let one = |(name, switch): (&SwitchName, &Switch)| {
            let counters = &switch.spec.counters;
            let counts = counters.counts();
            let uplink = switch.spec.uplink.as_ref();
            SwitchStatus {
                name: name.clone(),
                stations: counters.stations(),
                learned: counts.learned,
                moved: counts.moved,
                flow_hits: counts.flow_hits,
                flow_misses: counts.flow_misses,
                floods: counts.floods,
                uplink_drops: counts.uplink_drops,
                uplink_refused: uplink.map_or(0, ports::refused),
                uplink_removed: uplink.and_then(ports::was_removed).is_some(),
            }
        };
        self.switches.iter().map(one).collect()
    }
}

fn one(id: NicId, nic: &Nic, server: &Server) -> NicStatus {
    let mut status = NicStatus::of_unattached(id);
    let Some((device_id, device)) = nic.served() else {
        return status;
    };
    let now = server.status(device_id);
    status.attached = true;
    status.connected = now.connected;
    status.running_queues = now.running_queues;
    status.retired_queues = now.retired_queues;
    // Only so much fits, and it may be a driver's doing.
    let outside = match &device.port {
        PortSpec::Outside(outside) => Some(outside),
        PortSpec::Null | PortSpec::Source(_) | PortSpec::Switch(_) => None,
    };
    let removed = outside.and_then(ports::was_removed);
    let fault = removed.map(|what| format!("{what}: make it again, and end the data plane"));
    let fault = fault.or(now.fault);
    status.fault = fault.map(|text| text.chars().take(MAX_FAULT_CHARS).collect());
    status.pairs = pairs(device);
    status.tx_drops = drops(&device.metrics.sent());
    if let Some(outside) = outside {
        add_refused(&mut status.tx_drops, outside);
    }
    status.rx_drops = drops(&device.metrics.received());
    status.mirror = mirror::status(device);
    let throttled = device.tx_qos().throttled().as_millis();
    status.throttled_ms = u64::try_from(throttled).unwrap_or(u64::MAX);
    status
}

fn pairs(device: &NetDevice) -> Vec<PairCounts> {
    let queue = |index| {
        let metrics = device.metrics.queue(index);
        let counts = metrics.map_or_else(Counts::default, |queue| queue.counts());
        Traffic {
            packets: counts.packets,
            bytes: counts.bytes,
            dropped: counts.all_drops(),
        }
    };
    let pairs = 0..device.shape.queue_pairs;
    pairs
        .map(|pair| PairCounts {
            rx: queue(2 * pair),
            tx: queue(2 * pair + 1),
        })
        .collect()
}

/// Those of the reasons that there were.
fn drops(counts: &Counts) -> Vec<DropCount> {
    let counted = DropReason::ALL.iter().zip(counts.drops);
    counted
        .filter(|(_, frames)| *frames > 0)
        .map(|(reason, frames)| DropCount {
            reason: reason.name().to_owned(),
            frames,
        })
        .collect()
}

/// What an interface of the NIC's own refused.
fn add_refused(drops: &mut Vec<DropCount>, port: &OutsideSpec) {
    let frames = ports::refused(port);
    let reason = DropReason::PortError.name();
    match drops.iter_mut().find(|count| count.reason == reason) {
        Some(count) => count.frames = count.frames.saturating_add(frames),
        None if frames > 0 => drops.push(DropCount {
            reason: reason.to_owned(),
            frames,
        }),
        None => {}
    }
}
