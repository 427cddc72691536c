//! What the volumes are doing, as the agent is told.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::VolumeId;
use bulkhead_protocol::control::{RekeyProgress, RekeyState, VolumeStatus};

use super::volumes::{Volume, Volumes};
use crate::blk::{BlkDevice, SECTOR_BYTES};
use crate::server::Server;

/// Most characters of a fault: the entries of [`super::MAX_VOLUMES`] volumes fit one message.
const MAX_FAULT_CHARS: usize = 100;

/// One entry per granted volume.
pub(super) fn of(volumes: &Volumes, server: &Server) -> Vec<VolumeStatus> {
    let entries = volumes.table.iter();
    entries
        .map(|(id, volume)| one(*id, volume, server))
        .collect()
}

fn one(id: VolumeId, volume: &Volume, server: &Server) -> VolumeStatus {
    let mut status = VolumeStatus {
        volume: id,
        attached: false,
        connected: false,
        encrypted: volume.has_key(),
        running_queues: 0,
        retired_queues: 0,
        requests_ok: 0,
        requests_failed: 0,
        read_bytes: 0,
        written_bytes: 0,
        fault: None,
        capacity_bytes: 0,
        holds_volume: false,
        waits_for_volume: false,
        rekey: None,
    };
    let Some((device_id, device)) = volume.served() else {
        return status;
    };
    let now = server.status(device_id);
    status.attached = true;
    status.connected = now.connected;
    status.running_queues = now.running_queues;
    status.retired_queues = now.retired_queues;
    status.holds_volume = now.holds_volume;
    status.waits_for_volume = now.waits_for_volume;
    status.rekey = rekey(device);
    status.capacity_bytes = device.capacity_sectors() * SECTOR_BYTES;
    let counts = device.metrics.totals();
    status.requests_ok = counts.requests_ok;
    status.requests_failed = counts.requests_failed;
    status.read_bytes = counts.read_bytes;
    status.written_bytes = counts.written_bytes;
    let flush = device
        .flush_failed()
        .then(|| "a flush failed: what was written before it may be lost".to_owned());
    // Only so much fits, and it may be a driver's doing.
    let text = flush.or(now.fault);
    let stopped = matches!(&status.rekey, Some(p) if matches!(p.state, RekeyState::Failed { .. }));
    // Why a re-key stopped takes its room.
    let text = text.filter(|_| !stopped);
    status.fault = text.map(|text| text.chars().take(MAX_FAULT_CHARS).collect());
    status
}

/// How far the re-key is; why it stopped, cut to what fits.
fn rekey(device: &BlkDevice) -> Option<RekeyProgress> {
    let mut progress = device.rekey_progress()?;
    if let RekeyState::Failed { reason } = &mut progress.state {
        *reason = reason.chars().take(MAX_FAULT_CHARS).collect();
        // It may have waited for a longer file.
        device.measure_storage();
    }
    Some(progress)
}
