//! rot's store of descriptors: what a process must not lose when it dies lies there, and the next
//! process of its role gets it back, in the order in which it was stored.
//!
//! The messages are those of systemd's sd_notify(3) and sd_listen_fds(3), so that rot can pass on
//! to systemd what it is given. They travel over a `SOCK_SEQPACKET` pair that rot makes for each
//! process it starts (descriptor [`STORE_FD`]): who holds the other end is the sender, and nobody
//! else can store anything. Each is one datagram of `NAME=value` lines:
//!
//! | direction | text | descriptors |
//! | --- | --- | --- |
//! | child -> rot | `FDSTORE=1`, `FDNAME=<name>`, `FDPOLL=0` | 1 to [`MAX_FDS`] to store |
//! | child -> rot | `FDSTOREREMOVE=1`, `FDNAME=<name>` | none: all of that name are dropped |
//! | child -> rot | `BARRIER=1` | one, which is closed when everything before it was handled |
//! | rot -> child | `LISTEN_FDS=<n>`, `LISTEN_FDNAMES=<name>:<name>…` | those n |
//! | rot -> candidate | `FDSTOREREMOVE=1`, `FDNAME=<name>` | none |
//!
//! rot puts the last into the socket before the process exists, all of it: [`Store::inherited`]
//! never waits. (To a candidate of a live upgrade it goes on to say what the process that
//! still serves stores and removes: [`Store::follow`].) They are messages and not inherited descriptors with an environment because
//! rot's table of descriptors is then no concern of the child's, and no number is fixed but one.
//!
//! What was sent is stored, even if the sender dies at once: rot reads the socket to its end
//! before it starts the next process. A [`Barrier`] tells when rot (and systemd, where rot runs
//! under it) has it in its own hands, which only matters if rot dies too.
//!
//! rot takes at most so many descriptors of a role ([`STORE_ENV`]), and nothing with another
//! meaning: it neither polls, reads, writes nor maps what it keeps. A name says which descriptors
//! belong together; their meaning stands in a state memfd that is stored with them.
//!
//! # How a process uses it
//! Before it locks itself in (taking asks for `fcntl`, `recvmsg`; then `sendmsg` for each push and
//! removal; `pipe2`, `close` and `poll` for barriers):
//! ```no_run
//! # use bulkhead_protocol::fd_store::{Store, StoreError, FdName};
//! # use std::os::fd::AsFd;
//! # fn resume(name: FdName, fd: std::os::fd::OwnedFd) -> bool { false }
//! let mut store = Store::inherited()?;
//! for (name, fd) in store.taken() {
//!     if !resume(name, fd) {
//!         store.remove(name)?; // nobody will want it any more
//!     }
//! }
//! let file = std::fs::File::open("/dev/null").unwrap();
//! let name: FdName = "d3.volume".parse().unwrap();
//! store.push(name, &[file.as_fd()])?;
//! # Ok::<(), StoreError>(())
//! ```

pub mod keeper;
pub mod message;
pub mod name;
mod store;
#[cfg(test)]
mod tests;

use std::os::fd::RawFd;

pub use keeper::Keeper;
pub use name::{FdName, xdp_interface, xdp_name};
pub use store::{Barrier, Change, Store, StoreError};

/// Number of the descriptor that a child inherits for its store.
pub const STORE_FD: RawFd = 4;

/// Environment variable that rot sets for its children, as systemd does for a service: how many
/// descriptors the store takes of this process's role.
pub const STORE_ENV: &str = "FDSTORE";

/// Most descriptors of one datagram, either way. The kernel's own limit is 253.
pub const MAX_FDS: usize = 128;
