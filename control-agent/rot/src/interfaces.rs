//! Preparing interfaces for AF_XDP, before rot locks itself in: it attaches their program, which takes rights that nobody
//! has afterwards, and leaves what the agent makes sockets with in the agent's store. There it outlives any agent; the
//! program goes with rot and the last socket.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;

use bulkhead_interfaces::InterfaceName;
use bulkhead_interfaces::xdp::Prepared;
use bulkhead_protocol::fd_store::xdp_name;
use bulkhead_protocol::rot::Role;

use crate::stores::Stores;

/// Prepares these interfaces; what systemd kept of an earlier rot is prepared. One that can't be is named in the log, and
/// the host serves all the same: the agent refuses NICs on it.
pub fn prepare(interfaces: &[InterfaceName], stores: &mut Stores) {
    for interface in interfaces {
        match one(interface, stores) {
            Ok(()) => tracing::info!(%interface, "prepared for AF_XDP"),
            Err(problem) => tracing::error!("--xdp {interface}: {problem}"),
        }
    }
}

fn one(interface: &InterfaceName, stores: &mut Stores) -> Result<(), String> {
    let name = xdp_name(interface.as_str()).ok_or("its name is too long")?;
    let stored = stores.stored(Role::Agent);
    if stored.iter().any(|(other, _)| *other == name) {
        return Ok(());
    }
    let prepared = Prepared::new(interface).map_err(|error| error.to_string())?;
    let descriptors = prepared.descriptors().map(|fd| fd.try_clone_to_owned());
    let descriptors: Result<Vec<OwnedFd>, _> = descriptors.into_iter().collect();
    let descriptors = descriptors.map_err(|error| error.to_string())?;
    stores.put(Role::Agent, name, descriptors)
}
