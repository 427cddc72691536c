//! Memory that is mapped before anybody uses it: who maps the same soon finds it done.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use super::RegionSpec;
use super::mapping::Mapping;

/// Regions that stay mapped for as long as the value, with the pages that they have entered in this process.
#[derive(Debug, Default)]
pub struct Prepared {
    mappings: Vec<Arc<Mapping>>,
}

impl Prepared {
    /// Maps a region and enters its pages, as far as it gets `until` then: 100 to 200 ms for each GiB that a guest has
    /// used. To be called before the process locks itself in.
    ///
    /// # Errors
    /// As [`super::GuestMemory::map`]; what `mincore` and `madvise` fail with.
    pub fn add(&mut self, spec: &RegionSpec, fd: BorrowedFd<'_>, until: Instant) -> io::Result<()> {
        let (mapping, _) = Mapping::new(fd, spec.file_offset, spec.bytes)?;
        mapping.prefault(until)?;
        self.mappings.push(mapping);
        Ok(())
    }
}
