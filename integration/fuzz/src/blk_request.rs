//! `blk_request`: any header, ranges and buffers of a virtio-blk request (virtio 1.2, 5.2.6), for devices
//! of any shape, against a model that decides by the specification's sentences.

use std::cell::RefCell;
use std::sync::Arc;

use bulkhead_dataplane::blk::request::{Operation, Status, kind, parse, ranges};
use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::virtqueue::{Chain, RingError};

use crate::guest::Guest;
use crate::input::Input;

/// VIRTIO_BLK_F_FLUSH, _DISCARD, _WRITE_ZEROES.
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
/// Most ranges of a request, and most sectors of a range that is discarded and of one that is zeroed: as the
/// configuration space offers them.
const MOST_RANGES: u64 = 16;
const MOST_DISCARDED: u32 = 1 << 22;
const MOST_ZEROED: u32 = 1 << 16;

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

/// A device of a shape that the bytes choose.
pub fn device(input: &mut Input<'_>) -> Arc<BlkDevice> {
    let shape = input.u8();
    let geometry = Geometry {
        logical_block_bytes: if shape & 1 != 0 { 4096 } else { 512 },
        read_only: shape & 2 != 0,
        serial: [0; 20],
        queues: 1 + u16::from(shape >> 6),
        discard: shape & 4 != 0,
    };
    let block_sectors = u64::from(geometry.logical_block_bytes / 512);
    let capacity = match shape >> 3 & 3 {
        0 => 0,
        1 => u64::from(input.u8()),
        2 => u64::from(input.u32()),
        _ => input.u64() >> 10,
    };
    BlkDevice::new(
        geometry,
        capacity / block_sectors * block_sectors,
        StorageSpec::Null,
        None,
    )
}

pub fn run(data: &[u8]) {
    GUEST.with_borrow(|guest| {
        let mut input = Input::new(data);
        let device = device(&mut input);
        let features = input.u64();
        guest.clear();
        let mut chain = Chain::with_capacity(8);
        chain.readable.reset(&guest.lease);
        chain.writable.reset(&guest.lease);
        let readable = buffers(guest, &mut chain, &mut input);
        let request = Request::new(&readable, chain.writable.bytes(), &device, features);
        let parsed = parse(&mut chain, &device, features);
        match (parsed, request.model()) {
            (Err(RingError::NoStatus), None) => {}
            (Ok(parsed), Some(right)) => {
                assert_eq!(parsed, right);
                if let Ok(operation @ (Operation::Discard | Operation::WriteZeroes)) = parsed {
                    request.check_ranges(&chain, operation);
                }
            }
            (parsed, right) => panic!("{parsed:?}, and right is {right:?}"),
        }
    });
}

/// Readable and writable parts, of any lengths; the bytes of the readable one.
fn buffers(guest: &Guest, chain: &mut Chain, input: &mut Input<'_>) -> Vec<u8> {
    let (mut at, mut bytes) = (0u64, Vec::new());
    for _ in 0..input.u8() % 12 {
        let length = match input.u8() % 4 {
            0 => u32::from(input.u8()),
            1 => 16,
            2 => 512 * u32::from(input.u8() % 16),
            _ => 4096 * u32::from(input.u8() % 4),
        };
        // Two regions touch here: a buffer may lie in both.
        if at + u64::from(length) > 0x1_0000 {
            break;
        }
        if input.flag() {
            chain.writable.push(at, length).expect("in memory");
        } else {
            let content = input.bytes(usize::try_from(length).unwrap_or(0).min(64));
            guest.write(at, content);
            chain.readable.push(at, length).expect("in memory");
            let from = bytes.len();
            bytes.extend(content);
            bytes.resize(from + usize::try_from(length).unwrap_or(0), 0);
        }
        at += u64::from(length);
    }
    bytes
}

/// A request as the model sees it.
struct Request<'a> {
    readable: &'a [u8],
    writable_bytes: u64,
    device: &'a BlkDevice,
    features: u64,
}

impl<'a> Request<'a> {
    fn new(readable: &'a [u8], writable_bytes: u64, device: &'a BlkDevice, features: u64) -> Self {
        Self {
            readable,
            writable_bytes,
            device,
            features,
        }
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.readable[at..at + 4].try_into().expect("four"))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.readable[at..at + 8].try_into().expect("eight"))
    }

    /// Whether a range is whole logical blocks inside the device.
    fn is_inside(&self, sector: u64, bytes: u64) -> bool {
        let offset = u128::from(sector) * 512;
        let end = offset + u128::from(bytes);
        let block = u128::from(self.device.geometry.logical_block_bytes);
        bytes > 0
            && end <= u128::from(self.device.capacity_sectors()) * 512
            && offset.is_multiple_of(block)
            && end.is_multiple_of(block)
    }

    /// What a request is; none if there is no byte for its status.
    fn model(&self) -> Option<Result<Operation, Status>> {
        let to_guest = self.writable_bytes.checked_sub(1)?;
        if self.readable.len() < 16 {
            return Some(Err(Status::IoError));
        }
        let (sector, to_device) = (self.u64(8), self.readable.len() as u64 - 16);
        let read_only = self.device.geometry.read_only;
        let ok_if = |holds: bool, operation| {
            if holds {
                Ok(operation)
            } else {
                Err(Status::IoError)
            }
        };
        // No header gets past these with an offset that overflows.
        let offset_bytes = sector.wrapping_mul(512);
        let ranges = to_guest == 0
            && !read_only
            && to_device.is_multiple_of(16)
            && (1..=MOST_RANGES).contains(&(to_device / 16));
        Some(match self.u32(0) {
            kind::IN => ok_if(
                to_device == 0 && self.is_inside(sector, to_guest),
                Operation::Read { offset_bytes },
            ),
            kind::OUT => ok_if(
                to_guest == 0 && !read_only && self.is_inside(sector, to_device),
                Operation::Write { offset_bytes },
            ),
            kind::FLUSH if self.features & FLUSH != 0 => Ok(Operation::Flush),
            kind::GET_ID => ok_if((1..=512).contains(&to_guest), Operation::GetId),
            kind::DISCARD if self.features & DISCARD != 0 => ok_if(ranges, Operation::Discard),
            kind::WRITE_ZEROES if self.features & WRITE_ZEROES != 0 => {
                ok_if(ranges, Operation::WriteZeroes)
            }
            _ => Err(Status::Unsupported),
        })
    }

    /// All ranges are right, or the request is refused.
    fn check_ranges(&self, chain: &Chain, operation: Operation) {
        let zeroes = operation == Operation::WriteZeroes;
        let (known, most) = if zeroes {
            (1, MOST_ZEROED)
        } else {
            (0, MOST_DISCARDED)
        };
        let mut out = Vec::new();
        let read = ranges(chain, operation, self.device, &mut out);
        for (index, at) in (16..self.readable.len()).step_by(16).enumerate() {
            let (sector, sectors, flags) = (self.u64(at), self.u32(at + 8), self.u32(at + 12));
            let bytes = u64::from(sectors) * 512;
            if flags & !known != 0 {
                return assert_eq!(read, Err(Status::Unsupported));
            }
            if sectors > most || !self.is_inside(sector, bytes) {
                return assert_eq!(read, Err(Status::IoError));
            }
            let range = out[index];
            assert_eq!((range.offset_bytes, range.bytes), (sector * 512, bytes));
            assert_eq!(range.unmap, flags & 1 != 0);
        }
        assert_eq!(read, Ok(()));
    }
}
