//! A flag in memory that outlives the process: raised once, never lowered.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use super::{SharedArea, SharedWords};

/// The first word of an area: 0 until it is raised. Any other value is raised.
#[derive(Debug)]
pub struct SharedFlag(SharedWords);

impl SharedFlag {
    /// The first word of an area; none if it has none that is aligned.
    #[must_use]
    pub fn new(area: SharedArea) -> Option<Self> {
        SharedWords::new(area).map(Self)
    }

    /// Raises it: whoever comes after this process finds it so.
    pub fn raise(&self) {
        if let Some(word) = self.0.get(0) {
            word.store(1, Ordering::Release);
        }
    }

    /// Whether it was raised, by this process or another.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        let word = self.0.get(0);
        word.is_some_and(|word| word.load(Ordering::Acquire) != 0)
    }
}
