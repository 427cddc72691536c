//! A request, parsed once: every range, length and permission is decided here.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::config_space::feature;
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
/// that says why it can't be done. `features` are the negotiated ones.
///
/// # Errors
/// [`RingError::NoStatus`]: there is no way to answer.
#[inline]
pub fn parse(
    chain: &mut Chain,
    device: &BlkDevice,
    features: u64,
) -> Result<Result<Operation, Status>, RingError> {
    if !chain.writable.split_last_byte() {
        return Err(RingError::NoStatus);
    }
    Ok(match chain.readable.take_front::<HEADER_BYTES>() {
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

#[inline]
fn decide(
    header: [u8; HEADER_BYTES],
    chain: &Chain,
    device: &BlkDevice,
    features: u64,
) -> Result<Operation, Status> {
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        kind::IN if chain.readable.is_empty() => {
            let offset_bytes = range(sector, chain.writable.bytes(), device)?;
            Ok(Operation::Read { offset_bytes })
        }
        kind::OUT if chain.writable.is_empty() && !device.geometry.read_only => {
            let offset_bytes = range(sector, chain.readable.bytes(), device)?;
            Ok(Operation::Write { offset_bytes })
        }
        kind::IN | kind::OUT => Err(Status::IoError),
        kind::FLUSH if features & feature::FLUSH != 0 => Ok(Operation::Flush),
        kind::GET_ID if (1..=MAX_ID_BYTES).contains(&chain.writable.bytes()) => {
            Ok(Operation::GetId)
        }
        kind::GET_ID => Err(Status::IoError),
        _ => Err(Status::Unsupported),
    }
}

/// First byte of a range of the device.
#[inline]
fn range(sector: u64, bytes: u64, device: &BlkDevice) -> Result<u64, Status> {
    let block = u64::from(device.geometry.logical_block_bytes);
    // Once: it may grow meanwhile.
    let capacity = device.capacity_sectors().saturating_mul(SECTOR_BYTES);
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(bytes).ok_or(Status::IoError)?;
    if bytes == 0 || end > capacity || (offset | bytes) & (block - 1) != 0 {
        return Err(Status::IoError);
    }
    Ok(offset)
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::blk::Geometry;
    use crate::memory::{GuestBuffer, Lease, anonymous};
    use crate::storage::StorageSpec;

    const MEMORY_BYTES: u64 = 1 << 20;

    fn device(capacity_sectors: u64, block_bytes: u32, read_only: bool) -> Arc<BlkDevice> {
        let geometry = Geometry {
            logical_block_bytes: block_bytes,
            read_only,
            serial: [0; 20],
            queues: 1,
            discard: false,
        };
        BlkDevice::new(geometry, capacity_sectors, StorageSpec::Null, None)
    }

    /// A chain with a header as given and `readable` and `writable` bytes of data.
    fn chain(kind: u32, sector: u64, readable: u32, writable: u32) -> Chain {
        let (memory, _fd) = anonymous(MEMORY_BYTES).expect("memory");
        let lease: Lease = Rc::new(Arc::new(memory));
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let mut chain = Chain::default();
        let fill = |buffer: &mut GuestBuffer, at: u64, bytes: u32| {
            buffer.reset(&lease);
            buffer.push(at, bytes).expect("in memory");
        };
        fill(&mut chain.readable, 0, 16 + readable);
        assert!(chain.readable.copy_in(0, &header));
        fill(&mut chain.writable, MEMORY_BYTES / 2, writable + 1);
        chain
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever is asked: an accepted range lies inside, has whole blocks, and is not written
        /// to a read-only device.
        #[test]
        fn an_accepted_range_is_inside(
            kind in prop_oneof![Just(kind::IN), Just(kind::OUT)],
            sector in prop_oneof![0..2048u64, Just(u64::MAX), Just(1 << 55), any::<u64>()],
            blocks in 0..64u32,
            odd in 0..3u32,
            capacity in 0..1024u64,
            block in prop_oneof![Just(512u32), Just(4096)],
            read_only in any::<bool>(),
        ) {
            let bytes = blocks * 512 + odd;
            let device = device(capacity, block, read_only);
            let (readable, writable) = if kind == kind::IN { (0, bytes) } else { (bytes, 0) };
            let mut chain = chain(kind, sector, readable, writable);
            let parsed = parse(&mut chain, &device, feature::FLUSH).expect("it has a status");
            let inside = sector
                .checked_mul(512)
                .and_then(|at| at.checked_add(u64::from(bytes)))
                .is_some_and(|end| end <= capacity * 512);
            let whole = bytes > 0
                && bytes % block == 0
                && (u128::from(sector) * 512).is_multiple_of(u128::from(block));
            let allowed = kind == kind::IN || !read_only;
            match parsed {
                Ok(Operation::Read { offset_bytes } | Operation::Write { offset_bytes }) => {
                    prop_assert!(inside && whole && allowed);
                    prop_assert_eq!(offset_bytes, sector * 512);
                }
                Ok(other) => prop_assert!(false, "{other:?}"),
                Err(status) => {
                    prop_assert!(!(inside && whole && allowed));
                    prop_assert_eq!(status, Status::IoError);
                }
            }
        }
    }

    #[test]
    fn the_wrong_direction_is_an_error() {
        let device = device(1024, 512, false);
        for (kind, readable, writable) in [(kind::IN, 512, 512), (kind::OUT, 512, 512)] {
            let mut chain = chain(kind, 0, readable, writable);
            assert_eq!(
                parse(&mut chain, &device, feature::FLUSH),
                Ok(Err(Status::IoError)),
                "{kind}"
            );
        }
        let mut nothing = chain(kind::GET_ID, 0, 0, 0);
        assert_eq!(
            parse(&mut nothing, &device, feature::FLUSH),
            Ok(Err(Status::IoError))
        );
    }

    #[test]
    fn a_flush_that_was_not_negotiated_and_types_of_others_are_not_supported() {
        let device = device(1024, 512, true);
        let mut flush = chain(kind::FLUSH, 0, 0, 0);
        assert_eq!(parse(&mut flush, &device, 0), Ok(Err(Status::Unsupported)));
        for kind in [2, 3, 5, 7, 9, 10, 11, 13, 14, 0x8000_0000, u32::MAX] {
            let mut chain = chain(kind, 0, 0, 512);
            assert_eq!(
                parse(&mut chain, &device, feature::FLUSH),
                Ok(Err(Status::Unsupported)),
                "{kind}"
            );
        }
    }

    #[test]
    fn without_a_status_byte_there_is_no_answer() {
        let mut chain = chain(kind::IN, 0, 0, 0);
        chain.writable.release();
        let error = parse(&mut chain, &device(8, 512, false), feature::FLUSH);
        assert_eq!(error, Err(RingError::NoStatus));
    }
}
