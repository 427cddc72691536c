//! What survives this process: of each volume, card and switch that is served one state memfd and the descriptors that it
//! names, all of them in rot's descriptor store (ADR 0027, ADR 0028, `docs/formats/state.md`).
//!
//! | module | owns |
//! | --- | --- |
//! | [`volume`] | what is remembered of a volume and of its frontend's connection |
//! | [`nic`] | what is remembered of a network card, and of a switch |
//! | [`kinds`] | what a slot is: one of these |
//! | [`format`] | the bytes of that: versions, digest, which of two copies counts |
//! | [`file`] | the memfd that they lie in, and the flag that a worker raises in it |
//! | `workers` | how many workers there are |
//! | [`deaths`] | how often each volume has killed the process |
//! | `names` | the names in the store |
//! | [`keeper`] | this process's part of the store, and the taking over of what a predecessor left |
//! | [`place`] | which descriptors of a volume are stored, in which order they come and go |
//! | [`inherited`] | what is there before it is taken over: what a candidate looks at |
//!
//! Everything here happens on the control thread, once for each message of a frontend and for each thing
//! that becomes of a volume; nothing of it is on the way of a request. What a predecessor left is parsed as
//! the bytes of a stranger: it may have been any version, and it may have died for what it wrote.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod deaths;
pub mod file;
pub mod format;
pub mod inherited;
pub mod keeper;
pub mod kinds;
mod names;
pub mod nic;
pub mod place;
pub mod volume;
mod workers;

use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use deaths::Deaths;
pub use inherited::Inherited;
pub use keeper::{Found, KeepError, Keeper};
pub use kinds::Stored;
pub use nic::{StoredNic, StoredPort, StoredSwitch, StoredXdp, StoredXdpQueue};
pub use place::Place;
pub use volume::{
    FdNumber, Reply, Step, StoredCache, StoredConnection, StoredInflight, StoredLog, StoredPhase,
    StoredRegion, StoredRing, StoredVolume, StoredVring,
};

/// A descriptor that a successor is to have. It is stored once for as long as this very value is named,
/// however often a state is written: two of the same file are two.
pub type Fd = Arc<OwnedFd>;
