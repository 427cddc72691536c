//! keyd as a process: the real binary, with a rot, an agent and a data plane that the test plays
//! on the other ends of real sockets, real signed bundles and really sealed keys.
#![forbid(unsafe_code)]

mod bundles;
mod grants;
mod host;
mod hostile;
mod nics;
mod refused;
mod rekeys;
mod releases;
mod restarts;
mod secrets;
mod shred;
mod workers;
