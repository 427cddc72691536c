//! What a network card is connected to, as the control thread and every worker know it: a worker that serves the
//! card opens the port itself, from this.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where a network card's frames go.
#[derive(Debug, Clone)]
pub enum PortSpec {
    /// Nowhere: what it sends is done at once, and nothing comes.
    Null,
    /// To others on the same switch, and to its uplink.
    Switch(Arc<SwitchSpec>),
}

/// A switch: one worker serves all cards that are on it.
#[derive(Debug)]
pub struct SwitchSpec {
    /// Never used again within a process.
    number: u64,
    /// As the operator named it.
    pub name: String,
}

impl SwitchSpec {
    /// A switch without anything on it.
    #[must_use]
    pub fn new(name: String) -> Arc<Self> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        Arc::new(Self { number, name })
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }
}
