//! A virtio-blk driver in shared memory: well-behaved requests, and the parts to make others from;
//! beside it the other end of a packed ring, for comparisons.

pub mod desc;
pub mod memory;
pub mod model;
pub mod packed;
pub mod ring;
mod split;

use std::io;

use memory::OutOfMemory;

/// Request types (virtio 1.3, section 5.2.6).
pub mod kind {
    /// Read sectors.
    pub const IN: u32 = 0;
    /// Write sectors.
    pub const OUT: u32 = 1;
    /// Make completed writes durable.
    pub const FLUSH: u32 = 4;
    /// Read the serial: 20 bytes.
    pub const GET_ID: u32 = 8;
    /// Forget sectors.
    pub const DISCARD: u32 = 11;
    /// Zero sectors.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes (virtio 1.3, section 5.2.6).
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IOERR: u8 = 1;
    /// The device does not know the request.
    pub const UNSUPP: u8 = 2;
    /// What tests put there first, so that a byte never written is seen.
    pub const UNTOUCHED: u8 = 0xee;
}

/// Bytes of a request header.
pub const HEADER_BYTES: u32 = 16;
/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a serial.
pub const ID_BYTES: u32 = 20;

/// A request header: type, reserved word, sector.
#[must_use]
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// Why a driver call failed.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A mistake of the test.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// The device did not use the buffer in time.
    #[error("the device did not complete the request in time")]
    NothingUsed,
    /// The device completed the request and sent no call.
    #[error("the device completed the request without the call that was asked for")]
    CallLost,
    /// The used index moved by more than the queue has entries.
    #[error("the used index jumped from {last} to {now}")]
    UsedJumped {
        /// Index looked at last.
        last: u16,
        /// Index now.
        now: u16,
    },
    /// The device used a chain that it does not have.
    #[error("the device used {} with {} bytes, which is not in flight", .0.id, .0.len)]
    NotInFlight(ring::Used),
    /// A packed ring has no room for the chain: a mistake of the test.
    #[error("the ring has no room for this chain")]
    Full,
    /// The device used a head that was not waited for.
    #[error("the device used head {given} with {len} bytes, expected head {expected}")]
    WrongHead {
        /// What came.
        given: u32,
        /// Its length.
        len: u32,
        /// What was waited for.
        expected: u32,
    },
    /// The used length is not what the device wrote.
    #[error("used.len is {given}, expected {expected}")]
    WrongLength {
        /// What came.
        given: u32,
        /// What belongs there.
        expected: u32,
    },
    /// The request failed.
    #[error("the request ended with status {0}")]
    Status(u8),
    /// A system call failed.
    #[error("driver: {0}")]
    Io(#[from] io::Error),
}

impl From<nix::errno::Errno> for DriverError {
    fn from(error: nix::errno::Errno) -> Self {
        Self::Io(error.into())
    }
}
