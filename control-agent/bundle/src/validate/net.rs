//! What switches and network cards have to be: each name, address and interface is used once, and what a
//! signer could ask for is bounded.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_protocol::net::{
    InterfaceName, MAX_NICS, MAX_QUEUE_PAIRS, MAX_SOURCES, MAX_SWITCHES, MIN_MTU, PortSpec, Uplink,
};

use super::{Part, Problem, ValidationError, check_mode, check_name, of};
use crate::schema::{HostBundle, Nic, Switch};

/// Checks the switches and the NICs, and that nothing of a NIC is something else's already.
pub(super) fn check(bundle: &HostBundle) -> Result<(), ValidationError> {
    check_bundle(bundle).map_err(|problem| of(Part::Bundle, problem))?;
    let mut taken = Taken::with_volumes(bundle);
    for (index, switch) in bundle.switches.iter().enumerate() {
        let part = Part::Switch(index, switch.name.to_string());
        let checked = check_switch(bundle, index, switch, &mut taken);
        checked.map_err(|problem| of(part, problem))?;
    }
    for (index, nic) in bundle.nics.iter().enumerate() {
        let part = Part::Nic(index, nic.name.clone());
        let checked = check_nic(bundle, nic).and_then(|()| taken.take_nic(nic));
        checked.map_err(|problem| of(part, problem))?;
    }
    Ok(())
}

fn check_bundle(bundle: &HostBundle) -> Result<(), Problem> {
    let (switches, nics) = (bundle.switches.len(), bundle.nics.len());
    if switches > MAX_SWITCHES {
        let problem = format!("{switches} switches are more than {MAX_SWITCHES}");
        return Err(("switch", problem));
    }
    if nics > MAX_NICS {
        return Err(("nic", format!("{nics} NICs are more than {MAX_NICS}")));
    }
    let mut seen = BTreeSet::new();
    for id in &bundle.force_remove_nics {
        if !seen.insert(*id) {
            return Err(("force_remove_nics", format!("NIC {id} is named twice")));
        }
        if let Some(nic) = bundle.nic(*id) {
            let problem = format!(
                "NIC {id} ({:?}) is also among the NICs: it can't be both kept and removed",
                nic.name
            );
            return Err(("force_remove_nics", problem));
        }
    }
    Ok(())
}

fn check_switch(
    bundle: &HostBundle,
    index: usize,
    switch: &Switch,
    taken: &mut Taken,
) -> Result<(), Problem> {
    let mut earlier = bundle.switches.iter().take(index);
    if earlier.any(|other| other.name == switch.name) {
        return Err(("name", "there are two switches of that name".to_owned()));
    }
    let uplink = switch.uplink.as_ref();
    let checked = uplink.map_or(Ok(()), Uplink::check);
    checked.map_err(|problem| ("uplink", problem))?;
    let whose = format!("switch {}", switch.name);
    let taken = match &switch.uplink {
        None => Ok(()),
        Some(Uplink::Tap { interface }) => taken.whole(interface, &whose),
        Some(Uplink::AfXdp { interface, queue }) => taken.queues(interface, *queue, 1, &whose),
    };
    taken.map_err(|problem| ("uplink", problem))
}

fn check_nic(bundle: &HostBundle, nic: &Nic) -> Result<(), Problem> {
    check_name(&nic.name).map_err(|e| ("name", e))?;
    check_mode(&nic.socket)?;
    if nic.mtu < MIN_MTU {
        let problem = format!("{} is not between {MIN_MTU} and {}", nic.mtu, u16::MAX);
        return Err(("mtu", problem));
    }
    if !(1..=MAX_QUEUE_PAIRS).contains(&nic.queue_pairs) {
        let problem = format!("{} is not between 1 and {MAX_QUEUE_PAIRS}", nic.queue_pairs);
        return Err(("queue_pairs", problem));
    }
    if let PortSpec::Switch { switch } = &nic.port
        && bundle.switch(switch).is_none()
    {
        let name = switch.as_str();
        let problem =
            format!("there is no switch {name:?} in the bundle: add [[switch]] with that name");
        return Err(("port", problem));
    }
    let uplink = bundle.uplink_of(nic);
    nic.port.check(uplink, nic.mtu, nic.queue_pairs)?;
    nic.limits.check().map_err(|e| ("limits", e.to_string()))?;
    check_sources(nic)?;
    match &nic.mirror {
        Some(mirror) => {
            check_name(&mirror.file).map_err(|e| ("mirror", format!("file: {e}")))?;
            let checked = mirror.check();
            checked.map_err(|(field, e)| ("mirror", format!("{field}: {e}")))
        }
        None => Ok(()),
    }
}

fn check_sources(nic: &Nic) -> Result<(), Problem> {
    let sources = &nic.checks.sources;
    if sources.len() > MAX_SOURCES {
        let problem = format!("{} prefixes are more than {MAX_SOURCES}", sources.len());
        return Err(("sources", problem));
    }
    let mut seen = BTreeSet::new();
    match sources.iter().find(|source| !seen.insert(**source)) {
        Some(source) => Err(("sources", format!("{source} is named twice"))),
        None => Ok(()),
    }
}

/// What is somebody's, with the words for whose it is.
struct Taken {
    /// Ids, names, sockets, MACs and files, each as text with its kind before it.
    texts: BTreeMap<(&'static str, String), String>,
    /// Interfaces as a whole: none, and the queues of others.
    interfaces: BTreeMap<InterfaceName, Use>,
}

/// How an interface is used.
enum Use {
    /// As a TAP.
    Whole(String),
    /// Each queue by whom.
    Queues(BTreeMap<u16, String>),
}

impl Taken {
    fn with_volumes(bundle: &HostBundle) -> Self {
        let mut texts = BTreeMap::new();
        for volume in &bundle.volumes {
            let whose = format!("volume {:?}", volume.name);
            let of_it = [
                ("id", volume.id.to_string()),
                ("name", volume.name.clone()),
                ("socket", volume.socket.name.to_string()),
            ];
            texts.extend(of_it.map(|key| (key, whose.clone())));
        }
        Self {
            texts,
            interfaces: BTreeMap::new(),
        }
    }

    fn take_nic(&mut self, nic: &Nic) -> Result<(), Problem> {
        let whose = format!("NIC {:?}", nic.name);
        let mirror = nic.mirror.as_ref();
        let of_it = [
            ("id", nic.id.to_string()),
            ("name", nic.name.clone()),
            ("socket", nic.socket.name.to_string()),
            ("mac", nic.mac.to_string()),
        ];
        let file = mirror.map(|mirror| ("mirror", mirror.file.clone()));
        for (field, text) in of_it.into_iter().chain(file) {
            let problem = format!("{text:?} is also that of ");
            if let Some(other) = self.texts.insert((field, text), whose.clone()) {
                return Err((field, format!("{problem}{other}: each has its own")));
            }
        }
        let taken = match &nic.port {
            PortSpec::Switch { .. } | PortSpec::Null => Ok(()),
            PortSpec::Tap { interface } => self.whole(interface, &whose),
            PortSpec::AfXdp { interface, queue } => {
                self.queues(interface, *queue, nic.queue_pairs, &whose)
            }
        };
        taken.map_err(|problem| ("port", problem))
    }

    fn whole(&mut self, interface: &InterfaceName, whose: &str) -> Result<(), String> {
        let new = Use::Whole(whose.to_owned());
        let other = match self.interfaces.insert(interface.clone(), new) {
            None => return Ok(()),
            Some(Use::Whole(other)) => other,
            Some(Use::Queues(queues)) => queues.into_values().next().unwrap_or_default(),
        };
        Err(format!("interface {interface} is also that of {other}"))
    }

    fn queues(
        &mut self,
        interface: &InterfaceName,
        first: u16,
        count: u16,
        whose: &str,
    ) -> Result<(), String> {
        let found = self.interfaces.entry(interface.clone());
        let queues = match found.or_insert_with(|| Use::Queues(BTreeMap::new())) {
            Use::Whole(other) => {
                return Err(format!("interface {interface} is also that of {other}"));
            }
            Use::Queues(queues) => queues,
        };
        for queue in (first..).take(count.into()) {
            if let Some(other) = queues.insert(queue, whose.to_owned()) {
                return Err(format!(
                    "queue {queue} of interface {interface} is also that of {other}"
                ));
            }
        }
        Ok(())
    }
}
