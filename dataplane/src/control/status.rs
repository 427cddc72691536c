//! What the volumes are doing, as the agent is told.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::Duration;

use bulkhead_protocol::VolumeId;
use bulkhead_protocol::control::{
    Latency, RekeyProgress, RekeyState, StorageState, StorageStatus, VolumeStatus,
};

use super::volumes::{Volume, Volumes};
use crate::blk::{BlkDevice, Level, SECTOR_BYTES};
use crate::server::Server;
use crate::worker::message::DeviceId;

/// Most characters of a fault: the entries of [`super::MAX_VOLUMES`] volumes fit one message.
const MAX_FAULT_CHARS: usize = 100;

/// One entry per granted volume, and per volume that was revoked before its last request had ended.
pub(super) fn of(volumes: &Volumes, server: &Server) -> Vec<VolumeStatus> {
    let granted = volumes.table.iter();
    let mut entries: Vec<_> = granted
        .map(|(id, volume)| one(*id, volume, server))
        .collect();
    for left in &volumes.left {
        match entries.iter_mut().find(|entry| entry.volume == left.volume) {
            Some(entry) => entry.storage = Some(left.status()),
            None => entries.push(VolumeStatus {
                storage: Some(left.status()),
                ..nothing(left.volume)
            }),
        }
    }
    entries
}

/// Of a volume that is not served.
fn nothing(volume: VolumeId) -> VolumeStatus {
    VolumeStatus {
        volume,
        attached: false,
        connected: false,
        encrypted: false,
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
        storage: None,
        throttled_ms: 0,
    }
}

impl Volumes {
    /// Whose a device is, and how its storage does.
    pub(super) fn storage_of(&self, device: DeviceId) -> Option<(VolumeId, StorageStatus)> {
        let of = |volume: &Volume| {
            let (id, device_of) = volume.serving.device()?;
            (id == device).then(|| storage(device_of))
        };
        self.table
            .iter()
            .find_map(|(id, volume)| Some((*id, of(volume)?)))
    }
}

fn one(id: VolumeId, volume: &Volume, server: &Server) -> VolumeStatus {
    let mut status = VolumeStatus {
        encrypted: volume.has_key(),
        ..nothing(id)
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
    status.storage = Some(storage(device));
    let throttled = device.qos().throttled().as_millis();
    status.throttled_ms = u64::try_from(throttled).unwrap_or(u64::MAX);
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

/// How the storage of an attached device does.
pub(super) fn storage(device: &BlkDevice) -> StorageStatus {
    let health = &device.health;
    let (summary, patience) = (health.summary(), health.patience());
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let at_most = |per_mille| health.latency.per_mille_us(per_mille);
    let latency = match (at_most(500), at_most(990), at_most(999)) {
        (Some(median_us), Some(p99_us), Some(p999_us)) => Some(Latency {
            median_us,
            p99_us,
            p999_us,
        }),
        _ => None,
    };
    StorageStatus {
        state: match summary.level {
            Level::Fine => StorageState::Fine,
            Level::Slow => StorageState::Slow,
            Level::Hung => StorageState::Hung,
        },
        old_requests: summary.old,
        oldest_ms: ms(summary.oldest),
        slow_after_ms: ms(patience.slow),
        slow_total: health.ended_slow.get() + u64::from(summary.old),
        latency,
    }
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

#[cfg(test)]
mod tests {
    use bulkhead_protocol::channel::MAX_MESSAGE_BYTES;

    use super::*;
    use crate::control::MAX_VOLUMES;

    /// For what the message has beside the volumes.
    const REST_BYTES: usize = 2048;

    #[test]
    fn the_status_of_all_volumes_fits_one_message() {
        let many = u64::from(u32::MAX) + 1;
        let volume = VolumeStatus {
            attached: true,
            connected: true,
            encrypted: true,
            running_queues: 256,
            retired_queues: 256,
            requests_ok: many,
            requests_failed: many,
            read_bytes: many,
            written_bytes: many,
            fault: Some("x".repeat(MAX_FAULT_CHARS)),
            capacity_bytes: many,
            holds_volume: true,
            rekey: Some(RekeyProgress {
                done_bytes: many,
                total_bytes: many,
                state: RekeyState::Running,
            }),
            storage: Some(StorageStatus {
                state: StorageState::Hung,
                old_requests: 65_536,
                oldest_ms: many,
                slow_after_ms: 1000,
                slow_total: many,
                latency: Some(Latency {
                    median_us: 1 << 26,
                    p99_us: 1 << 26,
                    p999_us: 1 << 26,
                }),
            }),
            ..nothing(VolumeId([0xff; 16]))
        };
        let volumes = vec![volume; MAX_VOLUMES];
        let bytes = minicbor::to_vec(&volumes).expect("encoded").len();
        assert!(bytes + REST_BYTES <= MAX_MESSAGE_BYTES, "{bytes} bytes");
    }
}
