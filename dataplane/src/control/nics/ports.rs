//! A port out of what the agent gives for it, as far as the grant allows it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_protocol::control::PortFacts;
use bulkhead_protocol::net::{
    InterfaceName, MAX_AF_XDP_MTU, NicGrant, PortSpec as Granted, Uplink,
};
use nix::sys::stat::{SFlag, fstat, major, minor};

use super::Nics;
use crate::port::afxdp::{MOST_MTU, XdpQueue};
use crate::port::{OutsideSpec, PortSpec, SwitchSpec, TapSpec, XdpSpec};
use crate::stored::{Fd, StoredPort};

// What is signed and granted is what such a port can have.
const _: () = assert!(MAX_AF_XDP_MTU as usize == MOST_MTU);

/// What the agent gives for a port.
pub(super) type Given = (PortFacts, Vec<OwnedFd>);

impl Nics {
    /// The port of a NIC that is about to be served.
    pub(super) fn port(&self, grant: &NicGrant, given: Given) -> Result<PortSpec, String> {
        match &grant.port {
            Granted::Null => {
                expect(&given, 0, PortFacts::Nothing)?;
                Ok(PortSpec::Null)
            }
            Granted::Switch { switch } => {
                expect(&given, 0, PortFacts::Nothing)?;
                let held = self.switches.get(switch);
                let held = held.ok_or_else(|| format!("switch {switch} is not attached"))?;
                if held.uplink != grant.uplink {
                    return Err(format!(
                        "switch {switch} is attached with another uplink than the grant's"
                    ));
                }
                Ok(PortSpec::Switch(Arc::clone(&held.spec)))
            }
            Granted::Tap { interface } => {
                tap(interface, grant.queue_pairs, given).map(PortSpec::Outside)
            }
            Granted::AfXdp { interface, queue } => {
                let queues = (*queue, grant.queue_pairs);
                af_xdp(interface, queues, grant.mtu, given).map(PortSpec::Outside)
            }
        }
    }
}

/// A switch with its uplink.
pub(super) fn switch(
    name: &str,
    uplink: Option<&Uplink>,
    given: Given,
) -> Result<Arc<SwitchSpec>, String> {
    let uplink = match uplink {
        None => {
            expect(&given, 0, PortFacts::Nothing)?;
            None
        }
        Some(Uplink::Tap { interface }) => Some(tap(interface, 1, given)?),
        // Its NICs may have any MTU that such a port can have.
        Some(Uplink::AfXdp { interface, queue }) => {
            Some(af_xdp(interface, (*queue, 1), MAX_AF_XDP_MTU, given)?)
        }
    };
    Ok(SwitchSpec::new(name.to_owned(), uplink))
}

/// Sockets for a number of queues from the first on, and what keeps the program on their interface: set up and bound.
/// That they lead to the interface that was granted is for the agent to see to, as of a TAP.
fn af_xdp(
    interface: &InterfaceName,
    (first, pairs): (u16, u16),
    mtu: u16,
    (facts, mut fds): Given,
) -> Result<OutsideSpec, String> {
    let interface_index = match facts {
        PortFacts::AfXdp { interface_index } if fds.len() == facts.descriptors(pairs) => {
            interface_index
        }
        _ => {
            return Err(format!(
                "{facts:?} came with {} descriptors, AF_XDP, {pairs} sockets and a link belong to its port",
                fds.len()
            ));
        }
    };
    let links = fds.split_off(usize::from(pairs));
    let mut queues = Vec::with_capacity(fds.len());
    for (queue, socket) in (u32::from(first)..).zip(fds) {
        let made = XdpQueue::new(socket, interface_index, queue, mtu)
            .map_err(|error| format!("interface {interface}, queue {queue}: {error}"))?;
        tracing::info!(%interface, queue, zero_copy = made.is_zero_copy(), "AF_XDP socket bound");
        queues.push(made);
    }
    let spec = XdpSpec::new(interface.to_string(), queues, links);
    Ok(OutsideSpec::Xdp(spec))
}

/// A TAP out of its queues. That they are those of the interface that was granted is for the agent to
/// see to: the data plane can't tell.
fn tap(
    interface: &InterfaceName,
    pairs: u16,
    (facts, queues): Given,
) -> Result<OutsideSpec, String> {
    let count = facts.descriptors(pairs);
    if !matches!(facts, PortFacts::Tap { .. }) || queues.len() != count {
        return Err(format!(
            "{facts:?} came with {} descriptors, a TAP and {pairs} belong to its port",
            queues.len()
        ));
    }
    for queue in &queues {
        check_tap(queue.as_fd()).map_err(|problem| format!("TAP {interface}: {problem}"))?;
    }
    Ok(OutsideSpec::Tap(Arc::new(TapSpec {
        name: interface.to_string(),
        queues,
        counters: Arc::default(),
    })))
}

/// What of it outlives this process; none: nothing does. (Of an AF_XDP socket and its memory nothing is stored: see ADR 0028.)
///
/// # Errors
/// A descriptor can't be duplicated.
pub(super) fn to_store((facts, fds): &Given) -> Result<Option<StoredPort<Fd>>, String> {
    let has_uso = match facts {
        PortFacts::Nothing => return Ok(Some(StoredPort::nothing())),
        PortFacts::Tap { has_uso } => *has_uso,
        PortFacts::AfXdp { .. } => return Ok(None),
    };
    let taps = fds.iter().map(|fd| fd.try_clone().map(Arc::new));
    let taps = taps.collect::<Result<_, _>>();
    let taps = taps.map_err(|e| format!("its port's descriptors can't be duplicated: {e}"))?;
    Ok(Some(StoredPort { taps, has_uso }))
}

/// What a predecessor was given for a port, as if the agent gave it now.
///
/// # Errors
/// As [`to_store`].
pub(super) fn given(port: &StoredPort<Fd>) -> Result<Given, String> {
    let taps = port.taps.iter().map(|tap| tap.try_clone());
    let taps = taps.collect::<Result<Vec<_>, _>>();
    let taps = taps.map_err(|e| format!("its port's descriptors can't be duplicated: {e}"))?;
    let facts = if taps.is_empty() {
        PortFacts::Nothing
    } else {
        PortFacts::Tap {
            has_uso: port.has_uso,
        }
    };
    Ok((facts, taps))
}

/// Of what `/dev/net/tun` opens: a character device with this number (Documentation/admin-guide/devices.txt).
const TUN: (u64, u64) = (10, 200);

fn check_tap(queue: BorrowedFd<'_>) -> Result<(), String> {
    let stat = fstat(queue).map_err(|e| e.to_string())?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFCHR || (major(stat.st_rdev), minor(stat.st_rdev)) != TUN {
        return Err("a descriptor that came for it is none of a TAP".to_owned());
    }
    Ok(())
}

fn expect((facts, fds): &Given, count: usize, kind: PortFacts) -> Result<(), String> {
    if *facts != kind || fds.len() != count {
        return Err(format!(
            "{facts:?} came with {} descriptors, {kind:?} and {count} belong to its port",
            fds.len()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bulkhead_integration::network::{enter_namespace, ip};
    use bulkhead_interfaces::xdp::Prepared;

    use super::*;

    #[test]
    fn sockets_of_an_interface_are_bound_to_its_queues_and_nothing_else_is_taken() {
        let test = "sockets_of_an_interface_are_bound_to_its_queues_and_nothing_else_is_taken";
        if !enter_namespace(test) {
            return;
        }
        ip("link add v0 numrxqueues 2 numtxqueues 2 type veth peer name v1");
        ip("link set dev v0 up");
        let prepared = Prepared::new(&"v0".parse().expect("a name")).expect("prepared");
        let interface: InterfaceName = "v0".parse().expect("a name");
        let give = |count: usize| {
            let made = prepared.socket(1).expect("a socket");
            let interface_index = made.interface_index;
            let mut fds = vec![made.socket, made.link];
            fds.truncate(count);
            (PortFacts::AfXdp { interface_index }, fds)
        };
        let spec = af_xdp(&interface, (1, 1), 1500, give(2)).expect("taken");
        let OutsideSpec::Xdp(spec) = spec else {
            panic!("{spec:?}")
        };
        assert!(spec.take(0).is_some() && spec.take(1).is_none());
        drop(spec);
        let too_few = af_xdp(&interface, (1, 1), 1500, give(1)).expect_err("no link");
        assert!(too_few.contains("came with 1 descriptors"), "{too_few}");
        let no_queue = af_xdp(&interface, (7, 1), 1500, give(2)).expect_err("no such queue");
        assert!(no_queue.contains("v0, queue 7"), "{no_queue}");
        let too_long = af_xdp(&interface, (1, 1), 9000, give(2)).expect_err("a long MTU");
        assert!(too_long.contains("9000"), "{too_long}");
        let (_, fds) = give(2);
        let tap = PortFacts::Tap { has_uso: true };
        assert!(af_xdp(&interface, (1, 1), 1500, (tap, fds)).is_err());
    }
}
