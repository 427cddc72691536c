//! What callers and kernels agree on: lengths, data units, and what is refused.
#![forbid(unsafe_code)]

use super::kernel::{GROUP_BYTES, Kernel};
use super::self_test::SelfTestError;
use crate::secret::ArenaFull;

/// Length of a key in bytes: data key, then tweak key.
pub const KEY_BYTES: usize = 64;

/// Cipher block in bytes.
pub(super) const BLOCK_BYTES: usize = 16;

/// Most cipher blocks of a data unit (IEEE 1619, 5.1; NIST SP 800-38E).
const MAX_UNIT_BLOCKS: usize = 1 << 20;

const _: () = assert!(DataUnit::MAX_BYTES / BLOCK_BYTES <= MAX_UNIT_BLOCKS);

/// Why a key can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Data key and tweak key are the same, which XTS forbids (IEEE 1619, FIPS 140 IG C.I).
    #[error("the two halves of the XTS key are equal: make a new volume key")]
    EqualHalves,
    /// No room in secret memory.
    #[error(transparent)]
    ArenaFull(#[from] ArenaFull),
    /// A kernel was asked for that needs instructions which are missing here.
    #[error("this CPU can't run the {0} kernel: use one of those that are available")]
    NoSuchKernel(Kernel),
    /// The kernel does not do what it should.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
}

/// Buffers that don't fit each other or the data unit. Nothing was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{source_bytes} bytes can't be encrypted or decrypted into {destination_bytes}: \
     both must be the same multiple of the data unit, {unit_bytes} bytes"
)]
pub struct BufferError {
    /// Length of the source in bytes.
    pub source_bytes: usize,
    /// Length of the destination in bytes.
    pub destination_bytes: usize,
    /// The data unit in bytes.
    pub unit_bytes: u32,
}

/// How many bytes share one tweak: 512 or 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DataUnit(u32);

impl DataUnit {
    /// 512 bytes.
    pub const B512: Self = Self(512);
    /// 4096 bytes.
    pub const B4096: Self = Self(4096);
    /// Size of the largest, in bytes.
    pub const MAX_BYTES: usize = 4096;

    /// A data unit of `bytes`, if that is 512 or 4096.
    #[must_use]
    pub const fn new(bytes: u32) -> Option<Self> {
        match bytes {
            512 | 4096 => Some(Self(bytes)),
            _ => None,
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// How many groups it is.
    pub(super) const fn groups(self) -> usize {
        self.0 as usize / GROUP_BYTES
    }

    /// How many whole units so many bytes are. By a shift: a division takes as long as a round of AES, or five.
    pub(super) const fn units_in(self, bytes: usize) -> usize {
        bytes >> self.0.trailing_zeros()
    }

    /// That both lengths are the same whole number of units.
    pub(super) fn check(self, source: usize, destination: usize) -> Result<(), BufferError> {
        let whole = self.units_in(source) << self.0.trailing_zeros();
        if source == destination && source == whole {
            return Ok(());
        }
        Err(BufferError {
            source_bytes: source,
            destination_bytes: destination,
            unit_bytes: self.bytes(),
        })
    }
}
