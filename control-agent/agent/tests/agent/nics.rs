//! Network cards and switches: the data plane as these tests play it, and bundles that have some.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::mem;
use std::os::fd::OwnedFd;

use bulkhead_bundle::{HostBundle, Nic, SocketSpec, Switch};
use bulkhead_protocol::admin::{AdminReply, AdminRequest, NicEntry, SwitchEntry};
use bulkhead_protocol::control::{
    AgentToDataplane, DataplaneToAgent, DropCount, Networks, NicStatus, PortFacts, SwitchStatus,
};
use bulkhead_protocol::limits::Rate;
use bulkhead_protocol::net::{MirrorSpec, NicLimits, PortSpec, SpoofChecks, Uplink};
use bulkhead_protocol::rot::Role;
use bulkhead_protocol::{NicId, Received, ServedId, SwitchName};

use crate::bundles::{bundle, signed, volume};
use crate::peers::Halt;
use crate::world::World;

/// What the data plane has of networks.
#[derive(Debug, Default)]
pub struct Nics {
    granted: BTreeMap<NicId, (Nic, Option<Uplink>)>,
    pub attached: BTreeSet<NicId>,
    pub prepared: BTreeSet<NicId>,
    pub connected: BTreeSet<NicId>,
    switches: BTreeMap<SwitchName, Option<Uplink>>,
    /// What is asked next is told that these are busy.
    pub busy: BTreeSet<NicId>,
    /// So many attachments are refused.
    pub refuse_attach: usize,
    /// The files of mirrors that go on.
    pub mirrors: BTreeMap<NicId, File>,
}

/// A message about networks, as the log has it.
pub fn line(message: &AgentToDataplane) -> (String, u64) {
    match message {
        AgentToDataplane::AttachNic {
            request_id,
            nic,
            socket,
            ..
        } => (
            format!("dataplane attach NIC {} {socket}", nic.0[0]),
            *request_id,
        ),
        AgentToDataplane::AttachSwitch {
            request_id, switch, ..
        } => (format!("dataplane attach switch {switch}"), *request_id),
        AgentToDataplane::Mirror { request_id, nic } => {
            (format!("dataplane mirror {}", nic.0[0]), *request_id)
        }
        AgentToDataplane::Networks { request_id } => ("dataplane networks".to_owned(), *request_id),
        AgentToDataplane::Nics { request_id, .. } => ("dataplane NICs".to_owned(), *request_id),
        other => panic!("not about networks: {other:?}"),
    }
}

impl Nics {
    /// keyd grants the NICs of a bundle, but for some.
    pub fn grant(&mut self, bundle: &HostBundle, lost: &BTreeSet<ServedId>) {
        // What a served NIC takes in as it is.
        let essence = |(nic, uplink): &(Nic, Option<Uplink>)| {
            let mut nic = nic.clone();
            nic.name = "-".to_owned();
            nic.force_removal = false;
            (nic.limits, nic.mirror) = (NicLimits::default(), None);
            nic.checks = SpoofChecks::default();
            (nic.socket.uid, nic.socket.gid, nic.socket.mode) = (0, 0, 0);
            (nic, uplink.clone())
        };
        let before = std::mem::take(&mut self.granted);
        for nic in &bundle.nics {
            let new = (nic.clone(), bundle.uplink_of(nic).cloned());
            let same = before.get(&nic.id).map(essence) == Some(essence(&new));
            if lost.contains(&nic.id.into()) {
                self.granted
                    .extend(before.get(&nic.id).map(|old| (nic.id, old.clone())));
                continue;
            }
            if !same {
                self.forget(nic.id);
            }
            if before.get(&nic.id).map(|(old, _)| &old.mirror) != Some(&nic.mirror) {
                self.mirrors.remove(&nic.id);
            }
            self.granted.insert(nic.id, new);
        }
        for id in before.into_keys() {
            if !self.granted.contains_key(&id) {
                self.forget(id);
            }
        }
        let granted = &self.granted;
        self.switches.retain(|name, uplink| {
            let on = PortSpec::Switch {
                switch: name.clone(),
            };
            granted
                .values()
                .any(|(nic, of)| nic.port == on && of == uplink)
        });
    }

    fn forget(&mut self, id: NicId) {
        self.attached.remove(&id);
        self.prepared.remove(&id);
        self.connected.remove(&id);
        self.mirrors.remove(&id);
    }

    pub fn does(
        &mut self,
        request_id: u64,
        message: AgentToDataplane,
        received: &mut Received<AgentToDataplane>,
    ) -> DataplaneToAgent {
        let done = DataplaneToAgent::Done { request_id };
        let refused = |reason: &str| DataplaneToAgent::Refused {
            request_id,
            reason: reason.to_owned(),
        };
        let fds = received.fds.len();
        match message {
            AgentToDataplane::AttachSwitch { switch, facts, .. } => {
                assert_eq!((facts, fds), (PortFacts::Nothing, 0));
                let on = PortSpec::Switch {
                    switch: switch.clone(),
                };
                let Some((_, uplink)) = self.granted.values().find(|(nic, _)| nic.port == on)
                else {
                    return refused("no grant is on this switch");
                };
                self.switches.insert(switch, uplink.clone());
                done
            }
            AgentToDataplane::AttachNic { nic, socket, .. } => {
                assert_eq!(fds, 0, "neither a switch's NIC nor the null port has one");
                let Some((granted, uplink)) = self.granted.get(&nic) else {
                    return refused("no grant for this NIC");
                };
                if granted.socket.name != socket {
                    return refused("no grant for this socket");
                }
                if let PortSpec::Switch { switch } = &granted.port
                    && self.switches.get(switch) != Some(uplink)
                {
                    return refused("its switch is not there");
                }
                if self.refuse_attach > 0 {
                    self.refuse_attach -= 1;
                    return refused("no worker today");
                }
                self.attached.insert(nic);
                done
            }
            AgentToDataplane::PrepareRemove {
                id: ServedId::Nic(nic),
                force,
                ..
            } => {
                if self.connected.contains(&nic) && !force {
                    return refused("a frontend is connected");
                }
                self.prepared.insert(nic);
                done
            }
            AgentToDataplane::CancelRemove {
                id: ServedId::Nic(nic),
                ..
            } => {
                self.prepared.remove(&nic);
                done
            }
            AgentToDataplane::Networks { .. } => DataplaneToAgent::Networks {
                request_id,
                networks: Networks {
                    nics: self.attached.iter().copied().collect(),
                    mirrored: self.mirrors.keys().copied().collect(),
                    switches: self.switches.keys().cloned().collect(),
                    busy: mem::take(&mut self.busy).into_iter().collect(),
                },
            },
            AgentToDataplane::Mirror { nic, .. } => {
                let [file]: [OwnedFd; 1] = received.take_fds().expect("a file");
                assert!(self.attached.contains(&nic) && !self.mirrors.contains_key(&nic));
                self.mirrors.insert(nic, file.into());
                done
            }
            AgentToDataplane::Nics { after, .. } => {
                let above = self
                    .granted
                    .keys()
                    .filter(|id| after.is_none_or(|a| **id > a));
                let nics = above.take(32).map(|id| self.status(*id)).collect();
                DataplaneToAgent::Nics {
                    request_id,
                    nics,
                    switches: self.switches.keys().map(switch_status).collect(),
                }
            }
            other => panic!("the agent does not ask this of NICs: {other:?}"),
        }
    }

    fn status(&self, id: NicId) -> NicStatus {
        NicStatus {
            attached: self.attached.contains(&id),
            connected: self.connected.contains(&id),
            tx_drops: vec![DropCount {
                reason: "spoofed\x1b_mac".to_owned(),
                frames: 3,
            }],
            fault: Some("a fault\x1b[2J".to_owned()),
            ..NicStatus::of_unattached(id)
        }
    }
}

fn nic_id(number: u8) -> NicId {
    NicId([0x80 + number; 16])
}

fn nic(number: u8) -> Nic {
    Nic {
        id: nic_id(number),
        name: format!("net{number}"),
        mac: format!("52:54:00:00:00:{number:02x}")
            .parse()
            .expect("a MAC"),
        mtu: 1500,
        queue_pairs: 1,
        port: PortSpec::Switch {
            switch: "lan".parse().expect("a name"),
        },
        socket: SocketSpec {
            name: format!("vm{number}-net").parse().expect("a name"),
            uid: 0,
            gid: 0,
            mode: 0o600,
        },
        allowed_uid: 0,
        force_removal: false,
        limits: NicLimits::default(),
        checks: SpoofChecks::default(),
        mirror: None,
    }
}

fn networked(epoch: u64, nics: Vec<Nic>) -> HostBundle {
    let mut bundle = bundle(epoch, vec![volume(1)]);
    bundle.switches = vec![Switch {
        name: "lan".parse().expect("a name"),
        uplink: None,
    }];
    bundle.nics = nics;
    bundle
}

/// What the peers saw since the last time.
fn seen(world: &mut World) -> Vec<String> {
    world.serve();
    std::mem::take(&mut world.peers.log)
}

/// Waits until these NICs are attached, and no others.
fn attached(world: &mut World, numbers: &[u8]) {
    let expected: BTreeSet<_> = numbers.iter().map(|n| nic_id(*n)).collect();
    world.drive("NICs", |world| world.peers.nics.attached == expected);
}

fn has(steps: &[String], lines: &[&str]) {
    for line in lines {
        assert!(steps.iter().any(|step| step == line), "{line}: {steps:?}");
    }
}

#[test]
fn a_switch_comes_before_its_nics_and_all_behind_the_volumes() {
    let mut world = World::new();
    seen(&mut world);
    let mut alone = nic(2);
    alone.port = PortSpec::Null;
    let steps = world.apply_fully(&networked(1, vec![nic(1), alone]));
    assert_eq!(
        seen(&mut world),
        [
            "keyd accept 1",
            "rot bind vm1 0:0 600",
            "rot bind vm1-net 0:0 600",
            "rot bind vm2-net 0:0 600",
            "dataplane status",
            "dataplane attach 1 vm1",
            "dataplane networks",
            "dataplane attach switch lan",
            "dataplane attach NIC 129 vm1-net",
            "dataplane attach NIC 130 vm2-net",
        ]
    );
    has(
        &steps,
        &[
            "switch lan: uplink none",
            "NIC net1: added, 52:54:00:00:00:01 on switch lan, listener vm1-net",
            "NIC net2: added, 52:54:00:00:00:02 on null, listener vm2-net",
        ],
    );
}

#[test]
fn limits_checks_and_mirrors_change_beneath_a_connected_guest() {
    let mut world = World::new();
    world.apply_fully(&networked(1, vec![nic(1), nic(2)]));
    world.peers.nics.connected.extend([nic_id(1), nic_id(2)]);
    seen(&mut world);
    let mut next = networked(2, vec![nic(1), nic(2)]);
    next.nics[0].limits.tx.packets = Some(Rate::with_default_burst(1000));
    next.nics[0].checks.sources = vec!["10.0.0.1".parse().expect("a prefix")];
    let steps = world.apply_fully(&next);
    assert_eq!(
        seen(&mut world),
        ["keyd accept 2", "dataplane status", "dataplane networks"]
    );
    has(
        &steps,
        &[
            "NIC net1: limits sends 1000 packets/s (burst 100), checks MAC and 10.0.0.1/32, mirror none; \
             its frontend stays",
            "1 NIC goes on undisturbed",
        ],
    );
    assert_eq!(world.peers.nics.connected.len(), 2);
}

#[test]
fn a_nic_in_use_is_neither_removed_nor_changed_unless_it_is_forced() {
    let mut world = World::new();
    world.apply_fully(&networked(1, vec![nic(1), nic(2)]));
    world.peers.nics.connected.insert(nic_id(1));
    let mut changed = networked(2, vec![nic(1), nic(2)]);
    changed.nics[0].mtu = 9000;
    let mut uplink = networked(2, vec![nic(1), nic(2)]);
    uplink.nics[0].port = PortSpec::Null;
    for bundle in [networked(2, vec![nic(2)]), changed.clone(), uplink] {
        let before = world.snapshot();
        let AdminReply::Refused { reason } = world.apply(&signed(&bundle)) else {
            panic!("not refused");
        };
        assert!(reason.starts_with("NIC net1 is in use"), "{reason}");
        assert!(reason.contains("name it in force_remove_nics"), "{reason}");
        assert_eq!(world.snapshot(), before);
        assert!(world.peers.nics.prepared.is_empty(), "undone");
        assert!(world.peers.nics.attached.contains(&nic_id(1)));
    }
    seen(&mut world);
    changed.nics[0].force_removal = true;
    let steps = world.apply_fully(&changed);
    has(&steps, &["NIC net1: changed, attached again"]);
    let log = seen(&mut world);
    assert!(
        log.contains(&"dataplane prepare 129 force=true".to_owned()),
        "{log:?}"
    );
    assert!(
        log.contains(&"dataplane attach NIC 129 vm1-net".to_owned()),
        "{log:?}"
    );
    // It goes, with the last of its switch, its listener and what it was.
    world.peers.nics.connected.insert(nic_id(1));
    let mut none = bundle(3, vec![volume(1)]);
    none.force_remove_nics = vec![nic_id(1)];
    let steps = world.apply_fully(&none);
    has(
        &steps,
        &[
            "NIC net1: removed",
            "NIC net2: removed",
            "switch lan: removed",
            "listener vm1-net: removed",
        ],
    );
    assert!(world.peers.nics.attached.is_empty());
    let bound: Vec<_> = world.peers.bound.keys().map(ToString::to_string).collect();
    assert_eq!(bound, ["vm1"]);
}

#[test]
fn what_keyd_refuses_leaves_nics_as_they_are() {
    let mut world = World::new();
    world.apply_fully(&networked(1, vec![nic(1)]));
    world.peers.keyd_refuses = Some("no".to_owned());
    let before = world.snapshot();
    let reply = world.apply(&signed(&networked(2, vec![nic(2)])));
    assert!(matches!(reply, AdminReply::Refused { .. }), "{reply:?}");
    world.serve();
    assert_eq!(world.snapshot(), before);
    assert!(world.peers.nics.prepared.is_empty(), "undone");
}

#[test]
fn an_interface_that_is_not_there_refuses_the_bundle_before_anybody_is_asked() {
    let mut world = World::new();
    world.apply_fully(&networked(1, vec![nic(1)]));
    seen(&mut world);
    let mut tap = nic(2);
    tap.port = PortSpec::Tap {
        interface: "bh-no-such-tap".parse().expect("a name"),
    };
    let before = world.snapshot();
    let AdminReply::Refused { reason } = world.apply(&signed(&networked(2, vec![nic(1), tap])))
    else {
        panic!("not refused");
    };
    // (Where there are no TAPs at all it says that.)
    let expected = ["there is no interface bh-no-such-tap", "/dev/net/tun"];
    assert!(reason.starts_with("NIC net2: "), "{reason}");
    assert!(
        expected.iter().any(|words| reason.contains(words)),
        "{reason}"
    );
    assert_eq!(world.snapshot(), before);
    // (The snapshots ask for the status.)
    let log = seen(&mut world);
    assert!(log.iter().all(|line| line == "dataplane status"), "{log:?}");
}

#[test]
fn each_mirror_has_a_new_file_that_only_the_data_plane_keeps() {
    let mut world = World::new();
    let mirrored = |epoch, snap_bytes| {
        let mut bundle = networked(epoch, vec![nic(1)]);
        bundle.nics[0].mirror = Some(MirrorSpec {
            file: "net1.pcapng".to_owned(),
            snap_bytes,
            most_bytes: 1 << 20,
        });
        bundle
    };
    let names = |world: &World| {
        let listed = fs::read_dir(world.path("mirrors")).expect("list");
        let names = listed.map(|entry| entry.expect("entry").file_name().into_string());
        names.collect::<Result<BTreeSet<_>, _>>().expect("text")
    };
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    world.apply_fully(&networked(1, vec![nic(1)]));
    world.peers.nics.connected.insert(nic_id(1));
    let before = world.snapshot().descriptors;
    let steps = world.apply_fully(&mirrored(2, 256));
    has(
        &steps,
        &["NIC net1: limits none, checks MAC, mirror net1.pcapng; its frontend stays"],
    );
    assert_eq!(names(&world), set(&["net1.pcapng"]));
    let mut file = &world.peers.nics.mirrors[&nic_id(1)];
    file.write_all(b"what was seen").expect("write");
    assert_eq!(
        world.snapshot().descriptors,
        before,
        "none stays with the agent"
    );
    // Another one: what was written stays.
    world.apply_fully(&mirrored(3, 128));
    assert_eq!(names(&world), set(&["net1.pcapng", "net1.pcapng.1"]));
    let kept = fs::read(world.path("mirrors/net1.pcapng")).expect("read");
    assert_eq!(kept, b"what was seen");
    // An agent that starts again leaves it as it is; a data plane begins anew.
    world.kill();
    world.start();
    world.announce(Role::Keyd);
    world.announce(Role::Dataplane);
    attached(&mut world, &[1]);
    world.settle(3);
    assert_eq!(names(&world).len(), 2);
    world.peers.dataplane_died();
    world.announce(Role::Dataplane);
    world.drive("a mirror", |world| !world.peers.nics.mirrors.is_empty());
    assert_eq!(names(&world).len(), 3);
    world.apply_fully(&networked(4, vec![nic(1)]));
    assert!(world.peers.nics.mirrors.is_empty());
    assert_eq!(names(&world).len(), 3);
}

#[test]
fn without_its_directory_for_mirrors_a_host_serves_all_the_rest() {
    let mut world = World::new();
    world.apply_fully(&networked(1, vec![nic(1)]));
    world.kill();
    fs::remove_dir(world.path("mirrors")).expect("removed");
    world.start();
    world.announce(Role::Keyd);
    world.announce(Role::Dataplane);
    world.apply_fully(&networked(2, vec![nic(1), nic(2)]));
    let mut mirrored = networked(3, vec![nic(1), nic(2)]);
    mirrored.nics[1].mirror = Some(MirrorSpec {
        file: "net2.pcapng".to_owned(),
        snap_bytes: 64,
        most_bytes: 1 << 20,
    });
    let AdminReply::Refused { reason } = world.apply(&signed(&mirrored)) else {
        panic!("not refused");
    };
    assert!(
        reason.starts_with("NIC net2: there is no directory for mirrors"),
        "{reason}"
    );
}

#[test]
fn a_data_plane_that_starts_again_gets_switches_and_nics_again() {
    let mut world = World::new();
    world.apply_fully(&networked(1, vec![nic(1)]));
    world.peers.dataplane_died();
    seen(&mut world);
    world.announce(Role::Dataplane);
    attached(&mut world, &[1]);
    let log = seen(&mut world);
    let at = |line: &str| log.iter().position(|l| l == line);
    let (switch, nic) = (
        at("dataplane attach switch lan").expect("attached"),
        at("dataplane attach NIC 129 vm1-net").expect("attached"),
    );
    assert!(switch < nic, "{log:?}");
}

#[test]
fn an_agent_that_ends_at_any_step_leaves_the_next_one_the_rest() {
    for at in [
        "keyd accept",
        "rot bind vm1-net",
        "dataplane networks",
        "dataplane attach switch",
        "dataplane attach NIC",
    ] {
        for handled in [false, true] {
            let mut world = World::new();
            world.apply_fully(&bundle(1, vec![volume(1)]));
            world.peers.halt = Some(Halt {
                at: at.to_owned(),
                handled,
            });
            let _client = world.send_apply(&signed(&networked(2, vec![nic(1)])), false);
            world.drive(at, |world| world.peers.halted);
            world.kill();
            (world.peers.halt, world.peers.halted) = (None, false);
            world.start();
            world.announce(Role::Keyd);
            world.announce(Role::Dataplane);
            world.settle(2);
            attached(&mut world, &[1]);
        }
    }
}

#[test]
fn what_a_data_plane_refuses_is_tried_again() {
    let mut world = World::new();
    world.peers.nics.refuse_attach = 1;
    world.peers.undelivered.insert(nic_id(2).into());
    let AdminReply::Applied { pending, .. } =
        world.apply(&signed(&networked(1, vec![nic(1), nic(2)])))
    else {
        panic!("not applied");
    };
    let pending = pending.join("\n");
    assert!(
        pending.contains("NIC net1: attach: no worker today"),
        "{pending}"
    );
    assert!(
        pending.contains("net2: the data plane did not answer"),
        "{pending}"
    );
    world.peers.undelivered.clear();
    attached(&mut world, &[1, 2]);
}

/// A data plane that takes a NIC over has its interface already: opened again, that would share its frames out.
#[test]
fn what_a_data_plane_is_busy_with_is_asked_about_again_and_not_opened() {
    let mut world = World::new();
    world.apply_fully(&networked(1, vec![nic(1), nic(2)]));
    world.peers.dataplane_died();
    seen(&mut world);
    world.peers.nics.busy.insert(nic_id(1));
    world.announce(Role::Dataplane);
    attached(&mut world, &[2]);
    // It took it over, and is asked once more.
    world.peers.nics.attached.insert(nic_id(1));
    world.drive("told", |world| {
        world
            .peers
            .log
            .iter()
            .filter(|line| *line == "dataplane networks")
            .count()
            == 2
    });
    world.settle(1);
    let log = seen(&mut world);
    let again = "dataplane attach NIC 129 vm1-net".to_owned();
    assert!(!log.contains(&again), "{log:?}");
}

fn switch_status(name: &SwitchName) -> SwitchStatus {
    SwitchStatus {
        name: name.clone(),
        stations: 3,
        learned: 5,
        moved: 1,
        flow_hits: 1000,
        flow_misses: 20,
        floods: 7,
        uplink_drops: 2,
        uplink_refused: 0,
        uplink_removed: false,
    }
}

/// The NICs, by pages.
fn nics(world: &mut World) -> (Vec<NicEntry>, Vec<SwitchEntry>) {
    let mut all = Vec::new();
    loop {
        let after = all.last().map(|entry: &NicEntry| entry.nic);
        let client = world.connect();
        let request = AdminRequest::Nics { after };
        client.send(&request, &[]).expect("sent");
        let AdminReply::Nics {
            nics,
            more,
            switches,
        } = world.reply(&client)
        else {
            panic!("another answer");
        };
        all.extend(nics);
        if !more {
            return (all, switches);
        }
    }
}

#[test]
fn all_nics_are_told_of_page_by_page() {
    let mut world = World::new();
    let many: Vec<Nic> = (1..=70).rev().map(nic).collect();
    world.apply_fully(&networked(1, many));
    world.peers.nics.connected.insert(nic_id(7));
    let (all, switches) = nics(&mut world);
    let ids: Vec<_> = all.iter().map(|entry| entry.nic).collect();
    assert_eq!(ids, (1..=70).map(nic_id).collect::<Vec<_>>());
    assert_eq!((switches.len(), switches[0].name.as_str()), (1, "lan"));
    assert_eq!(switches[0].state, Some(switch_status(&switches[0].name)));
    let seventh = &all[6];
    assert!(
        seventh.socket_path.ends_with("run/vm7-net.sock"),
        "{seventh:?}"
    );
    let state = seventh.state.as_ref().expect("the data plane answered");
    assert!(state.attached && state.connected);
    // A peer's words can't drive the operator's terminal.
    assert_eq!(state.tx_drops[0].reason, "spoofed _mac");
    assert_eq!(state.fault.as_deref(), Some("a fault [2J"));
    // Without a data plane what the bundle says is told all the same.
    world.peers.dataplane_died();
    world.peers.halt = Some(Halt {
        at: "dataplane NICs".to_owned(),
        handled: false,
    });
    let (all, switches) = nics(&mut world);
    assert!(all.len() == 70 && all.iter().all(|entry| entry.state.is_none()));
    assert!(switches.len() == 1 && switches[0].state.is_none());
}
