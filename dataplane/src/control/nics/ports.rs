//! A port out of what the agent gives for it, as far as the grant allows it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_protocol::control::PortFacts;
use bulkhead_protocol::net::{
    InterfaceName, MAX_AF_XDP_MTU, NicGrant, PortSpec as Granted, Uplink,
};
use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat, major, minor};

use super::Nics;
use crate::port::afxdp::{MOST_MTU, XdpQueue};
use crate::port::{OutsideSpec, PortSpec, SwitchSpec, TapSpec, XdpSpec};
use crate::stored::{Fd, StoredPort, StoredXdp, StoredXdpQueue};

// What is signed and granted is what such a port can have.
const _: () = assert!(MAX_AF_XDP_MTU as usize == MOST_MTU);

/// What a port is to be made of.
#[derive(Debug)]
pub(in crate::control) enum Parts {
    /// What the agent gives for it.
    Given(PortFacts, Vec<OwnedFd>),
    /// What a predecessor had.
    Stored(StoredPort<Fd>),
}

impl Nics {
    /// The port of a NIC that is about to be served, and what of it outlives this process.
    pub(super) fn port(
        &self,
        grant: &NicGrant,
        parts: Parts,
    ) -> Result<(PortSpec, StoredPort<Fd>), String> {
        let outside = |(spec, stored)| (PortSpec::Outside(spec), stored);
        match &grant.port {
            Granted::Null => Ok((PortSpec::Null, nothing(&parts)?)),
            Granted::Switch { switch } => {
                let stored = nothing(&parts)?;
                let held = self.switches.get(switch);
                let held = held.ok_or_else(|| format!("switch {switch} is not attached"))?;
                if held.uplink != grant.uplink {
                    return Err(format!(
                        "switch {switch} is attached with another uplink than the grant's"
                    ));
                }
                Ok((PortSpec::Switch(Arc::clone(&held.spec)), stored))
            }
            Granted::Tap { interface } => tap(interface, grant.queue_pairs, parts).map(outside),
            Granted::AfXdp { interface, queue } => {
                let queues = (*queue, grant.queue_pairs);
                af_xdp(interface, queues, grant.mtu, parts).map(outside)
            }
        }
    }
}

/// A switch with its uplink, and what of that outlives this process.
pub(super) fn switch(
    name: &str,
    uplink: Option<&Uplink>,
    parts: Parts,
) -> Result<(Arc<SwitchSpec>, StoredPort<Fd>), String> {
    let (uplink, stored) = match uplink {
        None => (None, nothing(&parts)?),
        Some(Uplink::Tap { interface }) => {
            let (spec, stored) = tap(interface, 1, parts)?;
            (Some(spec), stored)
        }
        // Its NICs may have any MTU that such a port can have.
        Some(Uplink::AfXdp { interface, queue }) => {
            let (spec, stored) = af_xdp(interface, (*queue, 1), MAX_AF_XDP_MTU, parts)?;
            (Some(spec), stored)
        }
    };
    Ok((SwitchSpec::new(name.to_owned(), uplink), stored))
}

/// Sockets for a number of queues from the first on, and what keeps the program on their interface: set up and bound.
/// That they lead to the interface that was granted is for the agent to see to, as of a TAP.
fn af_xdp(
    interface: &InterfaceName,
    (first, pairs): (u16, u16),
    mtu: u16,
    parts: Parts,
) -> Result<(OutsideSpec, StoredPort<Fd>), String> {
    let (queues, link, stored) = match parts {
        Parts::Given(facts, fds) => {
            let (queues, link) = bound(interface, (first, pairs), mtu, (facts, fds))?;
            let stored = to_store(&queues, &link)?;
            (queues, link, stored)
        }
        Parts::Stored(stored) => {
            let (queues, link) = resumed(interface, pairs, &stored)?;
            (queues, link, stored)
        }
    };
    let spec = XdpSpec::new(interface.to_string(), queues, vec![link]);
    Ok((OutsideSpec::Xdp(spec), stored))
}

/// What the agent has made, set up.
fn bound(
    interface: &InterfaceName,
    (first, pairs): (u16, u16),
    mtu: u16,
    (facts, mut fds): (PortFacts, Vec<OwnedFd>),
) -> Result<(Vec<XdpQueue>, OwnedFd), String> {
    let count = fds.len();
    let link = fds.pop().filter(|_| count == facts.descriptors(pairs));
    let (PortFacts::AfXdp { interface_index }, Some(link)) = (facts, link) else {
        return Err(format!(
            "{facts:?} came with {count} descriptors, AF_XDP, {pairs} sockets and a link belong to its port"
        ));
    };
    let mut queues = Vec::with_capacity(fds.len());
    for (queue, socket) in (u32::from(first)..).zip(fds) {
        let made = XdpQueue::new(socket, interface_index, queue, mtu)
            .map_err(|error| format!("interface {interface}, queue {queue}: {error}"))?;
        tracing::info!(%interface, queue, zero_copy = made.is_zero_copy(), "AF_XDP socket bound");
        queues.push(made);
    }
    Ok((queues, link))
}

/// What a predecessor has set up.
fn resumed(
    interface: &InterfaceName,
    pairs: u16,
    stored: &StoredPort<Fd>,
) -> Result<(Vec<XdpQueue>, OwnedFd), String> {
    let xdp = stored.xdp.as_ref();
    let xdp = xdp.filter(|xdp| xdp.queues.len() == usize::from(pairs));
    let xdp = xdp.ok_or_else(|| {
        format!("interface {interface}: other queues are stored than {pairs} of AF_XDP")
    })?;
    let mut queues = Vec::with_capacity(xdp.queues.len());
    for queue in &xdp.queues {
        let made = XdpQueue::resumed(duplicate(&queue.socket)?, duplicate(&queue.memory)?);
        queues.push(made.map_err(|error| format!("interface {interface}: {error}"))?);
    }
    Ok((queues, duplicate(&xdp.link)?))
}

fn to_store(queues: &[XdpQueue], link: &OwnedFd) -> Result<StoredPort<Fd>, String> {
    let mut stored = Vec::with_capacity(queues.len());
    for queue in queues {
        let [socket, memory] = queue.descriptors();
        stored.push(StoredXdpQueue {
            socket: Arc::new(duplicate(socket)?),
            memory: Arc::new(duplicate(memory)?),
        });
    }
    Ok(StoredPort {
        xdp: Some(StoredXdp {
            queues: stored,
            link: Arc::new(duplicate(link)?),
        }),
        ..StoredPort::nothing()
    })
}

/// A TAP out of its queues. That they are those of the interface that was granted is for the agent to
/// see to: the data plane can't tell.
fn tap(
    interface: &InterfaceName,
    pairs: u16,
    parts: Parts,
) -> Result<(OutsideSpec, StoredPort<Fd>), String> {
    let (queues, stored) = match parts {
        Parts::Given(facts @ PortFacts::Tap { has_uso }, queues)
            if queues.len() == facts.descriptors(pairs) =>
        {
            let taps = queues.iter().map(|queue| Ok(Arc::new(duplicate(queue)?)));
            let stored = StoredPort {
                taps: taps.collect::<Result<_, String>>()?,
                has_uso,
                ..StoredPort::nothing()
            };
            (queues, stored)
        }
        Parts::Given(facts, fds) => {
            return Err(format!(
                "{facts:?} came with {} descriptors, a TAP and {pairs} belong to its port",
                fds.len()
            ));
        }
        Parts::Stored(stored) => {
            let taps = stored.taps.iter().map(duplicate);
            (taps.collect::<Result<Vec<_>, _>>()?, stored)
        }
    };
    if queues.len() != usize::from(pairs) {
        return Err(format!(
            "TAP {interface}: {} queues of it are stored, {pairs} belong to its port",
            queues.len()
        ));
    }
    for queue in &queues {
        check_tap(queue.as_fd()).map_err(|problem| format!("TAP {interface}: {problem}"))?;
    }
    let spec = OutsideSpec::Tap(Arc::new(TapSpec {
        name: interface.to_string(),
        queues,
        counters: Arc::default(),
    }));
    Ok((spec, stored))
}

/// Whether the interface behind a port was removed: a TAP's queues lead nowhere then, for ever, also if one of that name is made
/// again. (A read of nothing takes no frame and waits for none.)
pub(super) fn was_removed(port: &OutsideSpec) -> Option<String> {
    let OutsideSpec::Tap(tap) = port else {
        return None;
    };
    let reads = |queue: &OwnedFd| nix::unistd::read(queue, &mut []);
    let gone = tap
        .queues
        .iter()
        .any(|queue| reads(queue) == Err(Errno::EBADFD));
    gone.then(|| format!("TAP {} was removed", tap.name))
}

/// What an interface refused after its port had taken it: it said so later.
pub(super) fn refused(port: &OutsideSpec) -> u64 {
    let counters = match port {
        OutsideSpec::Tap(tap) => &tap.counters,
        OutsideSpec::Xdp(xdp) => &xdp.counters,
    };
    counters.refused.load(Ordering::Relaxed)
}

/// Of a port that needs no descriptor.
fn nothing(parts: &Parts) -> Result<StoredPort<Fd>, String> {
    match parts {
        Parts::Given(PortFacts::Nothing, fds) if fds.is_empty() => Ok(StoredPort::nothing()),
        Parts::Stored(stored) if stored.is_nothing() => Ok(StoredPort::nothing()),
        Parts::Given(facts, fds) => Err(format!(
            "{facts:?} came with {} descriptors, Nothing and 0 belong to its port",
            fds.len()
        )),
        Parts::Stored(_) => Err("descriptors are stored for a port that needs none".to_owned()),
    }
}

fn duplicate(fd: impl AsFd) -> Result<OwnedFd, String> {
    let duplicated = fd.as_fd().try_clone_to_owned();
    duplicated.map_err(|e| format!("its port's descriptors can't be duplicated: {e}"))
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
            Parts::Given(PortFacts::AfXdp { interface_index }, fds)
        };
        let one = |queue, mtu, parts| af_xdp(&interface, (queue, 1), mtu, parts);
        let (spec, stored) = one(1, 1500, give(2)).expect("taken");
        let OutsideSpec::Xdp(spec) = spec else {
            panic!("{spec:?}")
        };
        assert!(spec.take(0).is_some() && spec.take(1).is_none());
        drop(spec);
        // What a successor finds is bound already, and for as many queue pairs.
        assert!(one(1, 1500, Parts::Stored(stored.clone())).is_ok());
        let other = af_xdp(&interface, (1, 2), 1500, Parts::Stored(stored.clone()));
        let other = other.expect_err("two pairs");
        assert!(other.contains("other queues are stored than 2"), "{other}");
        assert!(tap(&interface, 1, Parts::Stored(stored.clone())).is_err());
        assert!(nothing(&Parts::Stored(stored.clone())).is_err());
        let none = Parts::Stored(StoredPort::nothing());
        assert!(one(1, 1500, none).is_err(), "nothing is stored");
        // As soon as nobody has it open any more the queue is another socket's.
        drop(stored);
        assert!(one(1, 1500, give(2)).is_ok());
        let too_few = one(1, 1500, give(1)).expect_err("no link");
        assert!(too_few.contains("came with 1 descriptors"), "{too_few}");
        let no_queue = one(7, 1500, give(2)).expect_err("no such queue");
        assert!(no_queue.contains("v0, queue 7"), "{no_queue}");
        let too_long = one(1, 9000, give(2)).expect_err("a long MTU");
        assert!(too_long.contains("9000"), "{too_long}");
        let Parts::Given(_, fds) = give(2) else {
            panic!("it gives")
        };
        let tap = PortFacts::Tap { has_uso: true };
        assert!(one(1, 1500, Parts::Given(tap, fds)).is_err());
    }
}
