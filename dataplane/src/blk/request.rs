//! A request, parsed once: every range, length and permission is decided here.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::device::{Geometry, SECTOR_BYTES};
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
}

const HEADER_BYTES: usize = 16;
/// Longest buffer of a GET_ID that is filled.
const MAX_ID_BYTES: u64 = 512;

/// Parses a chain, and splits header and status off its buffers: what is asked, or the status
/// that says why it can't be done.
///
/// # Errors
/// [`RingError::NoStatus`]: there is no way to answer.
#[inline]
pub fn parse(
    chain: &mut Chain,
    geometry: &Geometry,
    flush: bool,
) -> Result<Result<Operation, Status>, RingError> {
    if !chain.writable.split_last_byte() {
        return Err(RingError::NoStatus);
    }
    Ok(match chain.readable.take_front::<HEADER_BYTES>() {
        Some(header) => decide(header, chain, geometry, flush),
        None => Err(Status::IoError),
    })
}

#[inline]
fn decide(
    header: [u8; HEADER_BYTES],
    chain: &Chain,
    geometry: &Geometry,
    flush: bool,
) -> Result<Operation, Status> {
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        kind::IN if chain.readable.is_empty() => {
            let offset_bytes = range(sector, chain.writable.bytes(), geometry)?;
            Ok(Operation::Read { offset_bytes })
        }
        kind::OUT if chain.writable.is_empty() && !geometry.read_only => {
            let offset_bytes = range(sector, chain.readable.bytes(), geometry)?;
            Ok(Operation::Write { offset_bytes })
        }
        kind::IN | kind::OUT => Err(Status::IoError),
        kind::FLUSH if flush => Ok(Operation::Flush),
        kind::GET_ID if (1..=MAX_ID_BYTES).contains(&chain.writable.bytes()) => {
            Ok(Operation::GetId)
        }
        kind::GET_ID => Err(Status::IoError),
        _ => Err(Status::Unsupported),
    }
}

/// First byte of a range of the device.
#[inline]
fn range(sector: u64, bytes: u64, geometry: &Geometry) -> Result<u64, Status> {
    let block = u64::from(geometry.logical_block_bytes);
    let capacity = geometry.capacity_sectors.saturating_mul(SECTOR_BYTES);
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(bytes).ok_or(Status::IoError)?;
    if bytes == 0 || end > capacity || (offset | bytes) & (block - 1) != 0 {
        return Err(Status::IoError);
    }
    Ok(offset)
}
