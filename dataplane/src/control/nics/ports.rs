//! A port out of what the agent gives for it, as far as the grant allows it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_protocol::control::PortFacts;
use bulkhead_protocol::net::{InterfaceName, NicGrant, PortSpec as Granted, Uplink};
use nix::sys::stat::{SFlag, fstat, major, minor};

use super::Nics;
use crate::port::{OutsideSpec, PortSpec, SwitchSpec, TapSpec};

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
            Granted::AfXdp { interface, .. } => Err(no_af_xdp(interface)),
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
        Some(Uplink::AfXdp { interface, .. }) => return Err(no_af_xdp(interface)),
    };
    Ok(SwitchSpec::new(name.to_owned(), uplink))
}

fn no_af_xdp(interface: &InterfaceName) -> String {
    format!("AF_XDP {interface}: this data plane has no such port")
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
