//! What a storage likes best: hints for a guest's file systems, none of which a request has to follow.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// The page cache's and nearly every file system's block.
const USUAL_BLOCK_BYTES: u32 = 4096;
/// Larger ones (a network file system's transfer size) say nothing about blocks.
const MAX_BLOCK_BYTES: u32 = 64 * 1024;

/// Sizes in bytes (virtio 1.2, 5.2.4: `topology`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Smallest unit that is written without reading first: a power of two.
    pub physical_block_bytes: u32,
    /// Where the first whole one of them begins.
    pub alignment_offset_bytes: u32,
    /// Smallest transfer that is not slower than it has to be; none: not known.
    pub min_io_bytes: u32,
    /// Best size for long transfers; none: not known.
    pub opt_io_bytes: u32,
}

impl Default for Topology {
    /// Of memory.
    fn default() -> Self {
        Self::of_file(USUAL_BLOCK_BYTES)
    }
}

impl Topology {
    /// Of a file whose file system has blocks of that size.
    #[must_use]
    pub fn of_file(block_bytes: u32) -> Self {
        let usable =
            block_bytes.is_power_of_two() && (512..=MAX_BLOCK_BYTES).contains(&block_bytes);
        let block = if usable {
            block_bytes
        } else {
            USUAL_BLOCK_BYTES
        };
        Self {
            physical_block_bytes: block,
            alignment_offset_bytes: 0,
            min_io_bytes: block,
            opt_io_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_size_is_no_block() {
        assert_eq!(Topology::of_file(4096).physical_block_bytes, 4096);
        assert_eq!(Topology::of_file(65_536).min_io_bytes, 65_536);
        for odd in [0, 1, 511, 4097, 1 << 20] {
            assert_eq!(Topology::of_file(odd), Topology::default(), "{odd}");
        }
    }
}
