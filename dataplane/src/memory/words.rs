//! Words in memory that outlives the process: whoever comes after it finds them as they were left.
//!
//! UNSAFETY: the words lie in an area that others may have mapped too. They must be aligned, stay mapped for
//! as long as the value, and be touched by atomic accesses alone.
#![expect(unsafe_code, reason = "atomics in shared memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use super::SharedArea;

/// The words of an area, from its first byte on.
#[derive(Debug)]
pub struct SharedWords {
    first: NonNull<AtomicU32>,
    count: usize,
    /// What they lie in.
    _area: SharedArea,
}

// SAFETY: the words are only ever accessed atomically, and the area goes with the value.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// The words of an area; none if it has none that is aligned.
    #[must_use]
    pub fn new(area: SharedArea) -> Option<Self> {
        let count = usize::try_from(area.bytes()).ok()? / size_of::<AtomicU32>();
        let bytes = (count * size_of::<AtomicU32>()) as u64;
        let first = area.at(0, bytes)?.cast::<AtomicU32>();
        (count > 0 && first.is_aligned()).then_some(Self {
            first,
            count,
            _area: area,
        })
    }

    /// The word at a place, from 0.
    #[must_use]
    pub fn get(&self, at: usize) -> Option<&AtomicU32> {
        // SAFETY: inside the area, which lives as long, aligned as the first is, and every bit pattern is a number.
        (at < self.count).then(|| unsafe { self.first.add(at).as_ref() })
    }
}
