//! How much one XTS key may encrypt: the *key scope* of IEEE 1619, in cipher blocks of 16 bytes.
//!
//! A key of a volume has the volume as its scope, so that the volume's size is what the limits are held
//! against; what is written again and again is counted besides (`docs/adr/0020-key-limits.md`).
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::schema::Volume;

/// No more than 2^44 blocks shall be encrypted with one key: 256 TiB. A larger volume is refused.
pub const MAX_BYTES: u64 = (1 << 44) * 16;
/// No more than 2^36 blocks should be: 1 TiB. Whoever makes or signs a larger volume is told so.
pub const ADVISED_BYTES: u64 = (1 << 36) * 16;

/// What is to be said about a volume that exceeds [`ADVISED_BYTES`]; none for any other.
#[must_use]
pub fn warning(volume: &Volume) -> Option<String> {
    (volume.is_encrypted() && volume.size_bytes > ADVISED_BYTES).then(|| {
        format!(
            "volume {:?} has {} bytes under one key, and IEEE 1619 advises at most {ADVISED_BYTES} \
             (2^36 cipher blocks, 1 TiB): several volumes would each have a key of their own",
            volume.name, volume.size_bytes
        )
    })
}
