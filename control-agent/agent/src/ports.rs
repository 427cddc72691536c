//! Opening the host's interfaces for NICs and switches, as descriptors for the data plane, which opens none.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use bulkhead_bundle::{HostBundle, Nic, Switch};
use bulkhead_interfaces::tap;
use bulkhead_interfaces::xdp::Prepared;
use bulkhead_protocol::control::PortFacts;
use bulkhead_protocol::net::{InterfaceName, PortSpec, Uplink};
use bulkhead_protocol::{NicId, SwitchName};

/// Whose a port is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    /// A NIC's.
    Nic(NicId),
    /// A switch's uplink.
    Switch(SwitchName),
}

/// What the data plane gets for a port.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) facts: PortFacts,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Those that are prepared for AF_XDP.
pub(crate) type Interfaces = BTreeMap<InterfaceName, Prepared>;

/// Opened and not given to the data plane yet.
pub(crate) type Ports = BTreeMap<Owner, Opened>;

impl Opened {
    fn nothing() -> Self {
        Self {
            facts: PortFacts::Nothing,
            fds: Vec::new(),
        }
    }
}

/// What a NIC with so many pairs needs for its port.
///
/// # Errors
/// For the operator: which interface, and what to do.
pub(crate) fn open(
    port: &PortSpec,
    queue_pairs: u16,
    prepared: &Interfaces,
) -> Result<Opened, String> {
    match port {
        PortSpec::Switch { .. } | PortSpec::Null => Ok(Opened::nothing()),
        PortSpec::Tap { interface } => open_tap(interface, queue_pairs),
        PortSpec::AfXdp { interface, queue } => {
            open_af_xdp(interface, *queue, queue_pairs, prepared)
        }
    }
}

/// The same for a switch.
///
/// # Errors
/// As of [`open`].
pub(crate) fn open_uplink(
    uplink: Option<&Uplink>,
    prepared: &Interfaces,
) -> Result<Opened, String> {
    match uplink {
        None => Ok(Opened::nothing()),
        Some(Uplink::Tap { interface }) => open_tap(interface, 1),
        Some(Uplink::AfXdp { interface, queue }) => open_af_xdp(interface, *queue, 1, prepared),
    }
}

fn open_tap(interface: &InterfaceName, queue_pairs: u16) -> Result<Opened, String> {
    let tap = tap::open(interface, queue_pairs).map_err(|error| error.to_string())?;
    Ok(Opened {
        facts: PortFacts::Tap {
            has_uso: tap.has_uso,
        },
        fds: tap.queues,
    })
}

/// Sockets for a number of queues from the first on, and behind them what keeps the interface's program there.
fn open_af_xdp(
    interface: &InterfaceName,
    first: u16,
    queue_pairs: u16,
    prepared: &Interfaces,
) -> Result<Opened, String> {
    let prepared = prepared.get(interface).ok_or_else(|| {
        format!(
            "interface {interface} is not prepared for AF_XDP: start bulkhead-rot with --xdp {interface}, \
             or use a TAP, in a bridge with {interface}"
        )
    })?;
    let mut interface_index = 0;
    let mut fds = Vec::new();
    for queue in (u32::from(first)..).take(usize::from(queue_pairs)) {
        let made = prepared.socket(queue).map_err(|error| error.to_string())?;
        interface_index = made.interface_index;
        fds.push(made.socket);
    }
    let [_, link] = prepared.descriptors();
    let link = link.try_clone_to_owned();
    fds.push(link.map_err(|error| format!("interface {interface}: {error}"))?);
    Ok(Opened {
        facts: PortFacts::AfXdp { interface_index },
        fds,
    })
}

/// Opens what is new in a bundle, so that an interface that is not there refuses it. What the applied bundle uses
/// is opened when the data plane has let go of it, and the uplink of a switch that no NIC is on is not kept open.
///
/// # Errors
/// For the operator: whose port, which interface, what to do.
pub(crate) fn open_new(
    old: Option<&HostBundle>,
    new: &HostBundle,
    prepared: &Interfaces,
) -> Result<Ports, String> {
    let used: BTreeSet<Place> = old.into_iter().flat_map(places).collect();
    let is_new =
        |places: Vec<Place>| !places.is_empty() && used.is_disjoint(&BTreeSet::from_iter(places));
    let mut ports = Ports::new();
    for nic in &new.nics {
        if is_new(places_of(nic)) {
            let opened = open(&nic.port, nic.queue_pairs, prepared);
            let opened = opened.map_err(|error| format!("NIC {}: {error}", nic.name))?;
            ports.insert(Owner::Nic(nic.id), opened);
        }
    }
    for switch in &new.switches {
        if is_new(places_of_uplink(switch).collect()) {
            let opened = open_uplink(switch.uplink.as_ref(), prepared);
            let opened = opened.map_err(|error| format!("switch {}: {error}", switch.name))?;
            let on_it = PortSpec::Switch {
                switch: switch.name.clone(),
            };
            if new.nics.iter().any(|nic| nic.port == on_it) {
                ports.insert(Owner::Switch(switch.name.clone()), opened);
            }
        }
    }
    Ok(ports)
}

/// What one port alone can have: an interface as a TAP, or one of its queues.
type Place = (InterfaceName, Option<u16>);

fn places_of(nic: &Nic) -> Vec<Place> {
    match &nic.port {
        PortSpec::Switch { .. } | PortSpec::Null => Vec::new(),
        PortSpec::Tap { interface } => vec![(interface.clone(), None)],
        PortSpec::AfXdp { interface, queue } => {
            let queues = (*queue..).take(nic.queue_pairs.into());
            queues
                .map(|queue| (interface.clone(), Some(queue)))
                .collect()
        }
    }
}

fn places_of_uplink(switch: &Switch) -> impl Iterator<Item = Place> {
    switch.uplink.iter().map(|uplink| match uplink {
        Uplink::Tap { interface } => (interface.clone(), None),
        Uplink::AfXdp { interface, queue } => (interface.clone(), Some(*queue)),
    })
}

fn places(bundle: &HostBundle) -> impl Iterator<Item = Place> {
    let nics = bundle.nics.iter().flat_map(places_of);
    nics.chain(bundle.switches.iter().flat_map(places_of_uplink))
}

#[cfg(test)]
mod tests {
    use bulkhead_integration::network::{enter_namespace, has_taps, ip};

    use super::*;
    use crate::examples::{bundle, nic};

    #[test]
    fn only_interfaces_that_are_new_are_opened_before_a_bundle_is_taken() {
        let none = Interfaces::new();
        let missing = |name: &str| name.parse::<InterfaceName>().expect("a name");
        let mut old = bundle(Vec::new());
        old.nics = vec![nic(1)];
        old.nics[0].port = PortSpec::Tap {
            interface: missing("bh-no-tap-1"),
        };
        // It can't be opened now, and is not tried.
        assert_eq!(
            open_new(Some(&old), &old, &none).map(|ports| ports.len()),
            Ok(0)
        );
        let refused = open_new(None, &old, &none).expect_err("there is none");
        assert!(refused.starts_with("NIC net1: "), "{refused}");
        assert!(
            refused.contains("bh-no-tap-1") || refused.contains("/dev/net/tun"),
            "{refused}"
        );
        let mut new = old.clone();
        new.switches = vec![Switch {
            name: "lan".parse().expect("a name"),
            uplink: Some(Uplink::AfXdp {
                interface: missing("bh-no-if-2"),
                queue: 0,
            }),
        }];
        let refused = open_new(Some(&old), &new, &none).expect_err("not prepared");
        assert!(refused.contains("with --xdp bh-no-if-2"), "{refused}");
        new.switches[0].uplink = None;
        assert_eq!(
            open_new(Some(&old), &new, &none).map(|ports| ports.len()),
            Ok(0)
        );
    }

    /// Held open it would be in use for nothing, and nobody else could have it.
    #[test]
    fn an_uplink_that_no_nic_needs_is_looked_at_and_closed() {
        let test = "an_uplink_that_no_nic_needs_is_looked_at_and_closed";
        if !has_taps(test) || !enter_namespace(test) {
            return;
        }
        ip("tuntap add dev up0 mode tap");
        let none = Interfaces::new();
        let interface = "up0".parse().expect("a name");
        let mut new = bundle(Vec::new());
        new.switches = vec![Switch {
            name: "lan".parse().expect("a name"),
            uplink: Some(Uplink::Tap { interface }),
        }];
        assert_eq!(open_new(None, &new, &none).map(|ports| ports.len()), Ok(0));
        new.nics = vec![nic(1)];
        new.nics[0].port = PortSpec::Switch {
            switch: "lan".parse().expect("a name"),
        };
        let held = open_new(None, &new, &none).expect("free");
        assert_eq!(held.len(), 1);
        let taken = open_new(None, &new, &none).expect_err("it is held");
        assert!(
            taken.starts_with("switch lan: TAP up0 is in use"),
            "{taken}"
        );
    }

    /// A second NIC on an interface is as new as the first.
    #[test]
    fn each_queue_of_an_interface_is_new_by_itself() {
        let none = Interfaces::new();
        let on = |queue| PortSpec::AfXdp {
            interface: "eth1".parse().expect("a name"),
            queue,
        };
        let mut old = bundle(Vec::new());
        old.nics = vec![nic(1)];
        (old.nics[0].port, old.nics[0].queue_pairs) = (on(2), 2);
        let mut new = old.clone();
        new.nics.push(nic(2));
        new.nics[1].queue_pairs = 1;
        for (queue, is_new) in [(1, true), (2, false), (3, false), (4, true)] {
            new.nics[1].port = on(queue);
            let refused = open_new(Some(&old), &new, &none).err();
            assert_eq!(refused.is_some(), is_new, "{queue}: {refused:?}");
        }
    }
}
