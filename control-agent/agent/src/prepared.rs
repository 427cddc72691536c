//! The interfaces that rot has prepared for AF_XDP before it locked itself in: of each the map of sockets and the link of
//! its program, in rot's store under its name.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use bulkhead_interfaces::xdp::Prepared;
use bulkhead_protocol::fd_store::{FdName, xdp_interface};
use bulkhead_protocol::net::InterfaceName;

/// What the store has. One that can't be used is named in the log: NICs on it are refused.
pub(crate) fn take(
    stored: impl IntoIterator<Item = (FdName, OwnedFd)>,
) -> BTreeMap<InterfaceName, Prepared> {
    let mut descriptors: BTreeMap<FdName, Vec<OwnedFd>> = BTreeMap::new();
    for (name, fd) in stored {
        descriptors.entry(name).or_default().push(fd);
    }
    let mut prepared = BTreeMap::new();
    for (name, fds) in descriptors {
        match one(name, fds) {
            Ok((interface, one)) => {
                prepared.insert(interface, one);
            }
            Err(problem) => tracing::error!("what rot stored as {name} can't be used: {problem}"),
        }
    }
    prepared
}

fn one(name: FdName, fds: Vec<OwnedFd>) -> Result<(InterfaceName, Prepared), String> {
    let text = xdp_interface(&name).ok_or("it is of no kind that the agent knows")?;
    let interface: InterfaceName = text.parse().map_err(|_| "it names no interface")?;
    let fds: Result<[OwnedFd; 2], _> = fds.try_into();
    let [map, link] =
        fds.map_err(|fds| format!("{} descriptors came with it, not 2", fds.len()))?;
    let prepared = Prepared::from_descriptors(interface.clone(), map, link);
    Ok((interface, prepared.map_err(|error| error.to_string())?))
}
