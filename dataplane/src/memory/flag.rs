//! A flag in memory that outlives the process: raised once, never lowered.
//!
//! UNSAFETY: the word lies in an area that others may have mapped too. It must be aligned, stay mapped for
//! as long as the value, and be touched by atomic accesses alone.
#![expect(unsafe_code, reason = "an atomic in shared memory")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use super::SharedArea;

/// The first word of an area: 0 until it is raised. Any other value is raised.
#[derive(Debug)]
pub struct SharedFlag {
    word: NonNull<AtomicU32>,
    /// What the word lies in.
    _area: SharedArea,
}

// SAFETY: the word is only ever accessed atomically, and the area goes with the value.
unsafe impl Send for SharedFlag {}
// SAFETY: as above.
unsafe impl Sync for SharedFlag {}

impl SharedFlag {
    /// The first word of an area; none if it has none that is aligned.
    #[must_use]
    pub fn new(area: SharedArea) -> Option<Self> {
        let word = area
            .at(0, size_of::<AtomicU32>() as u64)?
            .cast::<AtomicU32>();
        word.is_aligned().then_some(Self { word, _area: area })
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: aligned, inside the area, which lives as long, and every bit pattern is a number.
        unsafe { self.word.as_ref() }
    }

    /// Raises it: whoever comes after this process finds it so.
    pub fn raise(&self) {
        self.word().store(1, Ordering::Release);
    }

    /// Whether it was raised, by this process or another.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.word().load(Ordering::Acquire) != 0
    }
}
