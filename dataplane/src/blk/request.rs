//! A request, parsed once: every range, length and permission is decided here.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::config_space::{self, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, feature};
use super::device::{BlkDevice, SECTOR_BYTES};
use crate::virtqueue::{Chain, RingError};

/// Request types (virtio 1.2, 5.2.6).
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Serial.
    pub const GET_ID: u32 = 8;
    /// Blocks are given up.
    pub const DISCARD: u32 = 11;
    /// Zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// What the status byte says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// What a driver asked for, checked: a range lies inside the device, has whole logical blocks, and
/// as many bytes as the buffer that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// From the device to the chain's writable part.
    Read {
        /// First byte on the device.
        offset_bytes: u64,
    },
    /// From the chain's readable part to the device.
    Write {
        /// First byte on the device.
        offset_bytes: u64,
    },
    /// Make every completed write stable.
    Flush,
    /// The serial, to the chain's writable part.
    GetId,
    /// Give up the ranges in the chain's readable part ([`ranges`]).
    Discard,
    /// Zero them.
    WriteZeroes,
}

/// A range of a discard or of zeroes: inside the device, whole logical blocks, no longer than is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte on the device.
    pub offset_bytes: u64,
    /// How many.
    pub bytes: u64,
    /// Zeroes may be given up.
    pub unmap: bool,
}

/// Most ranges of one request.
pub const MAX_RANGES: usize = config_space::MAX_RANGES as usize;

/// `struct virtio_blk_discard_write_zeroes` (virtio 1.2, 5.2.6).
const RANGE_BYTES: usize = 16;
/// Of its flags.
const UNMAP: u32 = 1;
/// Longest buffer of a GET_ID that is filled.
const MAX_ID_BYTES: u64 = 512;

/// Parses a chain, and splits header and status off its buffers: what is asked, or the status
/// that says why it can't be done. `features` are the negotiated ones.
///
/// # Errors
/// [`RingError::NoStatus`]: there is no way to answer.
#[inline(always)]
pub fn parse(
    chain: &mut Chain,
    device: &BlkDevice,
    features: u64,
) -> Result<Result<Operation, Status>, RingError> {
    if !chain.writable.split_last_byte() {
        return Err(RingError::NoStatus);
    }
    Ok(match chain.readable.take_words() {
        Some(header) => decide(header, chain, device, features),
        None => Err(Status::IoError),
    })
}

/// Whether a write is to be completed only once it is stable: without FLUSH a driver has no way to ask
/// for that, and in write-through mode it relies on it (virtio 1.2, 5.2.6.2).
#[must_use]
#[inline]
pub fn is_durable(device: &BlkDevice, features: u64) -> bool {
    features & feature::FLUSH == 0 || !device.writeback()
}

#[inline(always)]
fn decide(
    [kind, sector]: [u64; 2],
    chain: &Chain,
    device: &BlkDevice,
    features: u64,
) -> Result<Operation, Status> {
    // The upper half of the first word has no meaning (5.2.6).
    #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
    match kind as u32 {
        kind::IN if chain.readable.is_empty() => {
            let offset_bytes = range(
                sector,
                chain.writable.bytes(),
                device.capacity_sectors(),
                device,
            )?;
            Ok(Operation::Read { offset_bytes })
        }
        kind::OUT if chain.writable.is_empty() && !device.geometry.read_only => {
            let offset_bytes = range(
                sector,
                chain.readable.bytes(),
                device.capacity_sectors(),
                device,
            )?;
            Ok(Operation::Write { offset_bytes })
        }
        kind::IN | kind::OUT => Err(Status::IoError),
        kind::FLUSH if features & feature::FLUSH != 0 => Ok(Operation::Flush),
        kind::GET_ID if (1..=MAX_ID_BYTES).contains(&chain.writable.bytes()) => {
            Ok(Operation::GetId)
        }
        kind::GET_ID => Err(Status::IoError),
        kind::DISCARD if features & feature::DISCARD != 0 => {
            are_ranges(chain, device).map(|()| Operation::Discard)
        }
        kind::WRITE_ZEROES if features & feature::WRITE_ZEROES != 0 => {
            are_ranges(chain, device).map(|()| Operation::WriteZeroes)
        }
        _ => Err(Status::Unsupported),
    }
}

/// Whether a chain can have ranges of a device that may be changed: their number is decided here, before
/// any is read.
fn are_ranges(chain: &Chain, device: &BlkDevice) -> Result<(), Status> {
    let bytes = chain.readable.bytes();
    let most = (MAX_RANGES * RANGE_BYTES) as u64;
    let whole = bytes.is_multiple_of(RANGE_BYTES as u64) && (1..=most).contains(&bytes);
    if whole && chain.writable.is_empty() && !device.geometry.read_only {
        Ok(())
    } else {
        Err(Status::IoError)
    }
}

/// Reads the ranges of a discard or of zeroes into `out`, each byte once. All of them are good, or none
/// is done.
///
/// # Errors
/// The status that says why not: `Unsupported` for flags that there are not, else `IoError`.
pub fn ranges(
    chain: &Chain,
    operation: Operation,
    device: &BlkDevice,
    out: &mut Vec<Range>,
) -> Result<(), Status> {
    out.clear();
    let (flags_known, most_sectors) = match operation {
        Operation::WriteZeroes => (UNMAP, MAX_WRITE_ZEROES_SECTORS),
        _ => (0, MAX_DISCARD_SECTORS),
    };
    let capacity = device.capacity_sectors();
    let count = chain.readable.bytes() / RANGE_BYTES as u64;
    for index in 0..count.min(MAX_RANGES as u64) {
        let mut bytes = [0; RANGE_BYTES];
        if !chain
            .readable
            .copy_out(index * RANGE_BYTES as u64, &mut bytes)
        {
            return Err(Status::IoError);
        }
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            n0,
            n1,
            n2,
            n3,
            f0,
            f1,
            f2,
            f3,
        ] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > most_sectors {
            return Err(Status::IoError);
        }
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        out.push(Range {
            offset_bytes: range(sector, bytes, capacity, device)?,
            bytes,
            unmap: flags & UNMAP != 0,
        });
    }
    Ok(())
}

/// First byte of a range of the device. Its capacity was read once for the whole request: it may grow
/// meanwhile.
#[inline]
fn range(
    sector: u64,
    bytes: u64,
    capacity_sectors: u64,
    device: &BlkDevice,
) -> Result<u64, Status> {
    let block = u64::from(device.geometry.logical_block_bytes);
    let capacity = capacity_sectors.saturating_mul(SECTOR_BYTES);
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(bytes).ok_or(Status::IoError)?;
    if bytes == 0 || end > capacity || (offset | bytes) & (block - 1) != 0 {
        return Err(Status::IoError);
    }
    Ok(offset)
}

#[cfg(test)]
mod tests;
