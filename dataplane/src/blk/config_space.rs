//! The virtio-blk configuration space and feature bits (virtio 1.2, 5.2.3 and 5.2.4).

use super::device::{BlkDevice, Geometry};

/// Bytes that a frontend may ask for: `struct virtio_blk_config`, zero-padded.
pub const CONFIG_BYTES: usize = 256;

/// Feature bits of virtio-blk.
pub mod feature {
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// FLUSH is understood.
    pub const FLUSH: u64 = 1 << 9;
    /// `num_queues` is valid.
    pub const MQ: u64 = 1 << 12;
}

/// Data segments of one request: with header and status no more than a queue of 128 has room for.
pub const SEG_MAX: u32 = 126;

/// What a device of this shape offers, beside the transport's features.
#[must_use]
pub fn features(geometry: &Geometry) -> u64 {
    let mut bits = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
    if geometry.read_only {
        bits |= feature::RO;
    }
    if geometry.queues > 1 {
        bits |= feature::MQ;
    }
    bits
}

/// Its configuration space, as it is now.
#[must_use]
pub fn read(device: &BlkDevice) -> [u8; CONFIG_BYTES] {
    let geometry = &device.geometry;
    let mut space = [0u8; CONFIG_BYTES];
    space[0..8].copy_from_slice(&device.capacity_sectors().to_le_bytes());
    space[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
    space[20..24].copy_from_slice(&geometry.logical_block_bytes.to_le_bytes());
    space[34..36].copy_from_slice(&geometry.queues.to_le_bytes());
    space
}

/// Writes `payload` at `offset`, if that is a field that a driver may write.
///
/// # Errors
/// It is not; nothing has changed.
pub fn write(_device: &BlkDevice, offset: u32, payload: &[u8]) -> Result<(), String> {
    Err(format!(
        "{} bytes at {offset} are no field of the configuration space that can be written",
        payload.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::StorageSpec;

    const CAPACITY: u64 = 0x0102_0304_0506_0708;

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let geometry = Geometry {
            logical_block_bytes: 4096,
            read_only: true,
            serial: [0; 20],
            queues: 3,
            discard: false,
        };
        let device = BlkDevice::new(geometry.clone(), CAPACITY, StorageSpec::Null, None);
        let space = read(&device);
        assert_eq!(space[0..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(space[12..16], [126, 0, 0, 0]);
        assert_eq!(space[20..24], [0, 16, 0, 0]);
        assert_eq!(space[34..36], [3, 0]);
        assert!(space[36..].iter().all(|b| *b == 0));
        assert_eq!(
            features(&geometry),
            (1 << 2) | (1 << 5) | (1 << 6) | (1 << 9) | (1 << 12)
        );
    }
}
