//! The key service: the one process that can unseal volume keys. It verifies each bundle itself,
//! against its own trust root and its own epoch floor, and hands the keys of an accepted one to
//! the data plane, over a channel of which the agent has no end.
//!
//! A key takes these steps, each a function:
//! [`KeyService`]'s `asked` (the request, and who sent it) -> `Custody::accept` (the envelope is
//! copied, verified, no key of it serves two volumes, and its epoch and digest are kept on disk before
//! anything is granted) -> `Delivery::advance` (a few volumes at a time) -> `Vault::unseal` (straight
//! into fresh pages of secret memory) -> their descriptors go with the grant -> `Delivery::answered`.
//!
//! A bundle may also end a key for good. `Custody::accept` then takes two steps more:
//! `Vault::successor` (what else the host's key opens, sealed to a new one) and `host_key`'s
//! `prepare` before the state is replaced, `finish` (the old key destroyed) after it.
//!
//! keyd also says which binaries the host may be upgraded to: `Custody::check_release` holds a signed
//! release statement against the trust root and [`Releases`](releases::Releases), the lowest version of each program
//! that may run, and rot hears of it over its own channel.
//!
//! The service is one thread around one poll loop. It waits on nobody: an answer that doesn't come
//! has a deadline, a channel that is full is tried again when it has room.
#![forbid(unsafe_code)]

mod arguments;
mod custody;
mod delivery;
mod directory;
mod grants;
mod host_key;
mod link;
mod lockdown;
mod peers;
mod releases;
mod reply;
mod resealed;
mod service;
mod start;
mod state;
mod state_file;
mod unshared;
mod vault;

pub use arguments::Arguments;
pub use host_key::HostKeyError;
pub use releases::ReleasesError;
pub use service::{KeyService, ServiceError};
pub use start::{StartupError, run};
pub use state_file::StateError;
