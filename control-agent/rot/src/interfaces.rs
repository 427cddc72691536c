//! Preparing interfaces for AF_XDP, before rot locks itself in: it attaches their program, which takes rights that nobody
//! has afterwards, and leaves what the agent makes sockets with in the agent's store. There it outlives any agent; the
//! program goes with rot and the last socket.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_interfaces::InterfaceName;
use bulkhead_interfaces::xdp::Prepared;
use bulkhead_protocol::fd_store::{FdName, xdp_interface, xdp_name};
use bulkhead_protocol::rot::Role;

use crate::stores::Stores;

/// Prepares these interfaces and no others: what systemd kept of an earlier rot is prepared if it still leads to the interface
/// of that name, and one that this rot was not told of is let go. One that can't be prepared is named in the log, and the
/// host serves all the same: the agent refuses NICs on it.
pub fn prepare(interfaces: &[InterfaceName], stores: &mut Stores) {
    let wanted: Vec<_> = interfaces.iter().map(InterfaceName::as_str).collect();
    let is_other = |name: &FdName| xdp_interface(name).is_some_and(|name| !wanted.contains(&name));
    let stored = stores.stored(Role::Agent);
    let names = stored.into_iter().map(|(name, _)| name);
    let others: Vec<FdName> = names.filter(is_other).collect();
    for name in others {
        stores.forget(Role::Agent, name);
    }
    for interface in interfaces {
        match one(interface, stores) {
            Ok(()) => tracing::info!(%interface, "prepared for AF_XDP"),
            Err(problem) => tracing::error!("--xdp {interface}: {problem}"),
        }
    }
}

fn one(interface: &InterfaceName, stores: &mut Stores) -> Result<(), String> {
    let name = xdp_name(interface.as_str()).ok_or("its name is too long")?;
    let stored = stores.stored(Role::Agent).into_iter();
    let stored: Vec<_> = stored.filter(|(other, _)| *other == name).collect();
    if is_prepared(interface, stored.into_iter().map(|(_, fd)| fd)) {
        return Ok(());
    }
    stores.forget(Role::Agent, name);
    let prepared = Prepared::new(interface).map_err(|error| error.to_string())?;
    let descriptors = prepared.descriptors().map(|fd| fd.try_clone_to_owned());
    let descriptors: Result<Vec<OwnedFd>, _> = descriptors.into_iter().collect();
    let descriptors = descriptors.map_err(|error| error.to_string())?;
    stores.put(Role::Agent, name, descriptors)
}

/// Whether what is stored is the map and the link of a program on the interface that has this name now.
fn is_prepared<'a>(
    interface: &InterfaceName,
    stored: impl Iterator<Item = BorrowedFd<'a>>,
) -> bool {
    let owned: Result<Vec<OwnedFd>, _> = stored.map(|fd| fd.try_clone_to_owned()).collect();
    let owned: Option<[OwnedFd; 2]> = owned.ok().and_then(|fds| fds.try_into().ok());
    let Some([map, link]) = owned else {
        return false;
    };
    let found = Prepared::from_descriptors(interface.clone(), map, link);
    found.is_ok_and(|found| found.is_on_its_name())
}

#[cfg(test)]
mod tests {
    use bulkhead_integration::network::{enter_namespace, ip};

    use super::*;

    /// What a rot left with systemd is this one's: of an interface that was removed and is there again, and of one that it is
    /// not told of.
    #[test]
    fn what_an_earlier_rot_prepared_is_used_as_long_as_it_leads_to_its_interface() {
        let test = "what_an_earlier_rot_prepared_is_used_as_long_as_it_leads_to_its_interface";
        if !enter_namespace(test) {
            return;
        }
        let has_program = || ip("link show dev v0").contains("xdp");
        let v0: InterfaceName = "v0".parse().expect("a name");
        let mut stores = Stores::new(1024, None, Vec::new());
        let numbers = |stores: &Stores| -> Vec<i32> {
            let stored = stores.stored(Role::Agent).into_iter();
            stored
                .map(|(_, fd)| std::os::fd::AsRawFd::as_raw_fd(&fd))
                .collect()
        };
        ip("link add v0 type veth peer name v1");
        prepare(std::slice::from_ref(&v0), &mut stores);
        let first = numbers(&stores);
        assert!(has_program() && first.len() == 2);
        prepare(std::slice::from_ref(&v0), &mut stores);
        assert_eq!(numbers(&stores), first, "it is as it was");
        ip("link del dev v0");
        prepare(std::slice::from_ref(&v0), &mut stores);
        assert!(numbers(&stores).is_empty(), "there is none");
        ip("link add v0 type veth peer name v1");
        prepare(std::slice::from_ref(&v0), &mut stores);
        assert!(has_program() && numbers(&stores).len() == 2);
        // Another interface has its name.
        ip("link set dev v0 name v2");
        ip("link add v0 type veth peer name v3");
        prepare(std::slice::from_ref(&v0), &mut stores);
        assert!(has_program() && numbers(&stores).len() == 2);
        assert!(!ip("link show dev v2").contains("xdp"));
        prepare(&[], &mut stores);
        assert!(!has_program() && numbers(&stores).is_empty());
    }
}
