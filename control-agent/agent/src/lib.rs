//! The control agent: it takes signed configurations from the operator, verifies them, and makes
//! the host what they say, through rot (listeners), keyd (grants and keys) and the data plane
//! (volumes). It holds paths and names, never a key, a listener or guest memory.
//!
//! A configuration is applied in these steps, each a function:
//! [`Agent::handle`] (a request and its envelope, capped) -> `verify` of the bundle crate ->
//! [`Plan::between`] (pure) -> [`VolumeDirectories::open_volume`] for each new file (and for each whose
//! re-key begins or ends) -> asking the
//! data plane and keyd (`apply`, undone in full if anyone refuses) -> [`Store`] (`commit`) ->
//! the convergence pass (`converge`): listeners, files, what goes; what fails there is retried.
//!
//! The agent is one thread around one state machine: [`Agent`] takes events and gives actions and
//! deadlines, and never waits; [`event_loop`] owns every descriptor and does the waiting.
#![forbid(unsafe_code)]

mod agent;
mod apply;
mod arguments;
mod clients;
mod commit;
mod converge;
pub mod event_loop;
#[cfg(test)]
mod examples;
mod from_rot;
mod key_use;
mod link;
mod lockdown;
mod message;
mod mirror_file;
mod networks;
mod open_files;
mod operators;
mod plan;
mod ports;
mod prepared;
mod rekey;
mod start;
mod state_file;
mod status;
mod step;
mod store;
mod text;
mod upgrade;
mod volume_file;

pub use agent::{Agent, Host};
pub use arguments::Arguments;
pub use message::{Action, Answer, ClientId, Event, Peer};
pub use mirror_file::MirrorDirectory;
pub use plan::{Change, Growing, Leaving, NicChanges, Plan, Rekeying};
pub use start::{StartupError, run};
pub use store::{Store, StoreError, Stored};
pub use volume_file::{VolumeDirectories, VolumeFile, VolumeFileError};
