//! The virtio-blk configuration space and feature bits (virtio 1.2, 5.2.3 and 5.2.4).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used)]

use super::device::{BlkDevice, Geometry, SECTOR_BYTES};
pub use crate::device::CONFIG_BYTES;

/// Feature bits of virtio-blk.
pub mod feature {
    /// `size_max` is valid.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// FLUSH is understood.
    pub const FLUSH: u64 = 1 << 9;
    /// `topology` is valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `writeback` can be read and written.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `num_queues` is valid.
    pub const MQ: u64 = 1 << 12;
    /// DISCARD is understood.
    pub const DISCARD: u64 = 1 << 13;
    /// WRITE_ZEROES is understood.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Data segments of one request: with header and status no more than a queue of 128 has room for.
pub const SEG_MAX: u32 = 126;
/// Bytes of one segment. The kernel transfers less than 2 GiB at a time (`MAX_RW_COUNT`): a request of
/// [`SEG_MAX`] of them is below that.
pub const SIZE_MAX: u32 = 16 << 20;
const _: () = assert!(SEG_MAX as u64 * (SIZE_MAX as u64) < 0x7fff_f000);
/// Ranges of one discard, or of one request for zeroes.
pub const MAX_RANGES: u32 = 16;
/// Sectors of one range that is discarded: 2 GiB, one call to the file system.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Sectors of one range that is zeroed: 32 MiB, which may have to be written.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;

/// Where `writeback` lies.
const WRITEBACK: usize = 32;

/// What a device of this shape offers, beside the transport's features.
#[must_use]
pub fn features(geometry: &Geometry) -> u64 {
    let mut bits = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE;
    if geometry.read_only {
        bits |= feature::RO;
    } else {
        bits |= feature::WRITE_ZEROES;
        if geometry.discard {
            bits |= feature::DISCARD;
        }
    }
    if geometry.queues > 1 {
        bits |= feature::MQ;
    }
    bits
}

/// Its configuration space, as it is now. Fields of what is not offered are zero.
#[must_use]
pub fn read(device: &BlkDevice) -> [u8; CONFIG_BYTES] {
    let geometry = &device.geometry;
    let offered = features(geometry);
    let mut space = Space([0; CONFIG_BYTES]);
    space.put(0, &device.capacity_sectors().to_le_bytes());
    space.put(8, &SIZE_MAX.to_le_bytes());
    space.put(12, &SEG_MAX.to_le_bytes());
    space.put(20, &geometry.logical_block_bytes.to_le_bytes());
    let blocks = Blocks::of(device);
    space.put(24, &[blocks.physical_exponent, blocks.alignment_offset]);
    space.put(26, &blocks.min_io.to_le_bytes());
    space.put(28, &blocks.opt_io.to_le_bytes());
    space.put(WRITEBACK, &[u8::from(device.writeback())]);
    space.put(34, &geometry.queues.to_le_bytes());
    if offered & feature::DISCARD != 0 {
        space.put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        space.put(40, &MAX_RANGES.to_le_bytes());
        space.put(44, &blocks.discard_alignment_sectors.to_le_bytes());
    }
    if offered & feature::WRITE_ZEROES != 0 {
        space.put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        space.put(52, &MAX_RANGES.to_le_bytes());
        // Of an encrypted device no zeroes are given up: they would read back as noise.
        space.put(56, &[u8::from(!device.is_encrypted())]);
    }
    space.0
}

struct Space([u8; CONFIG_BYTES]);

impl Space {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    }
}

/// What the storage likes best, in logical blocks of the device.
struct Blocks {
    physical_exponent: u8,
    alignment_offset: u8,
    min_io: u16,
    opt_io: u32,
    discard_alignment_sectors: u32,
}

impl Blocks {
    fn of(device: &BlkDevice) -> Self {
        let topology = device.storage.topology();
        let logical = device.geometry.logical_block_bytes.max(1);
        let physical = topology.physical_block_bytes.max(logical);
        let in_blocks = |bytes: u32| bytes / logical;
        Self {
            // Both are powers of two.
            physical_exponent: u8::try_from(in_blocks(physical).ilog2()).unwrap_or(0),
            alignment_offset: u8::try_from(in_blocks(topology.alignment_offset_bytes)).unwrap_or(0),
            min_io: u16::try_from(in_blocks(topology.min_io_bytes)).unwrap_or(0),
            opt_io: in_blocks(topology.opt_io_bytes),
            discard_alignment_sectors: physical / u32::try_from(SECTOR_BYTES).unwrap_or(512),
        }
    }
}

/// Writes `payload` at `offset`: `writeback` (1: completed writes may be volatile until a flush; anything
/// else: they are not), which is all that a driver may write.
///
/// # Errors
/// It is something else; nothing has changed.
pub fn write(device: &BlkDevice, offset: u32, payload: &[u8]) -> Result<(), String> {
    match (usize::try_from(offset), payload) {
        (Ok(WRITEBACK), [mode]) => {
            device.set_writeback(*mode == 1);
            Ok(())
        }
        _ => Err(format!(
            "{} bytes at {offset} of the configuration space can't be written: only `writeback`, one \
             byte at {WRITEBACK}, can",
            payload.len()
        )),
    }
}

#[cfg(test)]
mod tests;
