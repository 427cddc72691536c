//! Network cards and switches: what must agree before one is served, what changes beneath a connected frontend, and
//! what a taken-over agent can't do.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixListener;

use bulkhead_protocol::control::{
    AgentToDataplane, DataplaneToAgent, Networks, NicStatus, PortFacts,
};
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane};
use bulkhead_protocol::limits::Rate;
use bulkhead_protocol::net::{MirrorSpec, NicGrant, NicLimits, PortSpec, SpoofChecks, Uplink};
use bulkhead_protocol::rot::FromRot;
use bulkhead_protocol::{NicId, SocketName};

use crate::harness::{Host, volume};
use crate::{features, grant_refused, refused};

const NOTHING: PortFacts = PortFacts::Nothing;
const TAP: PortFacts = PortFacts::Tap { has_uso: false };

fn nic(n: u8) -> NicId {
    NicId([0x80 + n; 16])
}

fn socket(n: u8) -> SocketName {
    format!("net-{n}").parse().expect("a name")
}

fn on_switch(name: &str) -> PortSpec {
    PortSpec::Switch {
        switch: name.parse().expect("a name"),
    }
}

fn tap(name: &str) -> PortSpec {
    PortSpec::Tap {
        interface: name.parse().expect("a name"),
    }
}

fn grant(n: u8) -> NicGrant {
    NicGrant {
        nic: nic(n),
        socket: socket(n),
        allowed_uid: nix::unistd::getuid().as_raw(),
        mac: format!("52:54:00:00:00:{n:02x}").parse().expect("a MAC"),
        mtu: 1500,
        queue_pairs: 2,
        port: on_switch("lan"),
        uplink: None,
        limits: NicLimits::default(),
        checks: SpoofChecks::default(),
        mirror: None,
        epoch: 1,
    }
}

fn give(host: &Host, grant: &NicGrant) -> DataplaneToKeyd {
    let grant = grant.clone();
    host.ask_keyd(&KeydToDataplane::GrantNic { grant }, &[])
}

fn granted(host: &Host, grant: &NicGrant) {
    let id = grant.nic.into();
    assert_eq!(give(host, grant), DataplaneToKeyd::Granted { id });
}

fn revoke(host: &Host, n: u8) {
    let id = nic(n).into();
    let answer = host.ask_keyd(&KeydToDataplane::Revoke { id }, &[]);
    assert_eq!(answer, DataplaneToKeyd::Revoked { id });
}

fn listen(host: &Host, n: u8) {
    let name = socket(n);
    let listener = UnixListener::bind(host.dir.path().join(name.as_str())).expect("bind");
    host.tell(&FromRot::Listener { name }, &[listener.as_fd()]);
}

fn attach_switch(host: &mut Host, name: &str) -> Result<(), String> {
    attach_switch_with(host, name, NOTHING, &[])
}

fn attach_switch_with(
    host: &mut Host,
    name: &str,
    facts: PortFacts,
    fds: &[BorrowedFd<'_>],
) -> Result<(), String> {
    let switch = name.parse().expect("a name");
    let make = |request_id| AgentToDataplane::AttachSwitch {
        request_id,
        switch,
        facts,
    };
    host.ask(make, fds)
}

fn attach(host: &mut Host, n: u8) -> Result<(), String> {
    attach_with(host, n, socket(n), NOTHING, &[])
}

fn attach_with(
    host: &mut Host,
    n: u8,
    socket: SocketName,
    facts: PortFacts,
    fds: &[BorrowedFd<'_>],
) -> Result<(), String> {
    let make = |request_id| AgentToDataplane::AttachNic {
        request_id,
        nic: nic(n),
        socket,
        facts,
    };
    host.ask(make, fds)
}

fn detach(host: &mut Host, n: u8) -> Result<(), String> {
    let id = nic(n).into();
    host.ask(
        |request_id| AgentToDataplane::Detach { request_id, id },
        &[],
    )
}

/// A granted NIC on the switch `lan`, with its listener, served.
fn served(host: &mut Host, n: u8) {
    granted(host, &grant(n));
    listen(host, n);
    assert_eq!(attach_switch(host, "lan"), Ok(()));
    assert_eq!(attach(host, n), Ok(()));
}

fn networks(host: &mut Host) -> Networks {
    host.request_id += 1;
    let request_id = host.request_id;
    let message = AgentToDataplane::Networks { request_id };
    host.agent.send(&message, &[]).expect("sent");
    match host.answer() {
        DataplaneToAgent::Networks { networks, .. } => networks,
        other => panic!("another answer: {other:?}"),
    }
}

fn statuses(host: &mut Host, after: Option<NicId>) -> Vec<NicStatus> {
    host.request_id += 1;
    let request_id = host.request_id;
    let message = AgentToDataplane::Nics { request_id, after };
    host.agent.send(&message, &[]).expect("sent");
    match host.answer() {
        DataplaneToAgent::Nics { nics, .. } => nics,
        other => panic!("another answer: {other:?}"),
    }
}

fn status(host: &mut Host, n: u8) -> NicStatus {
    let mut all = statuses(host, None).into_iter();
    all.find(|status| status.nic == nic(n)).expect("granted")
}

/// A frontend that is served: it got an answer.
fn frontend(host: &Host, n: u8) -> std::os::unix::net::UnixStream {
    let path = host.dir.path().join(socket(n).as_str());
    let mut stream = std::os::unix::net::UnixStream::connect(path).expect("connect");
    let patience = std::time::Duration::from_secs(20);
    stream.set_read_timeout(Some(patience)).expect("timeout");
    assert!(features(&mut stream).is_some(), "it is served");
    stream
}

#[test]
fn attach_needs_grant_switch_listener_and_the_granted_socket() {
    let mut host = Host::start();
    refused(
        attach_switch(&mut host, "lan"),
        "keyd has granted no NIC on switch lan",
    );
    refused(attach(&mut host, 1), "keyd has not granted NIC");
    granted(&host, &grant(1));
    refused(attach(&mut host, 1), "rot has sent no listener net-1");
    listen(&host, 1);
    refused(attach(&mut host, 1), "switch lan is not attached");
    refused(
        attach_switch(&mut host, "wan"),
        "keyd has granted no NIC on switch wan",
    );
    assert_eq!(attach_switch(&mut host, "lan"), Ok(()));
    served(&mut host, 2);
    let other = attach_with(&mut host, 1, socket(2), NOTHING, &[]);
    refused(other, "is granted for socket net-1, not for net-2");
    assert_eq!(attach(&mut host, 1), Ok(()));
    assert_eq!(attach(&mut host, 1), Ok(()), "again");
    let attached = networks(&mut host);
    assert_eq!(attached.nics, [nic(1), nic(2)]);
    assert_eq!(attached.switches, ["lan".parse().expect("a name")]);
    let _frontend = frontend(&host, 1);
    assert!(status(&mut host, 1).connected);
}

#[test]
fn a_port_has_exactly_the_descriptors_that_belong_to_it() {
    let mut host = Host::start();
    let file = host.file(1);
    let null = File::open("/dev/null").expect("open");
    granted(&host, &grant(1));
    listen(&host, 1);
    let fd = [file.as_fd()];
    refused(
        attach_switch_with(&mut host, "lan", NOTHING, &fd),
        "with 1 descriptors",
    );
    refused(
        attach_switch_with(&mut host, "lan", TAP, &[]),
        "Nothing and 0 belong",
    );
    assert_eq!(attach_switch(&mut host, "lan"), Ok(()));
    refused(
        attach_with(&mut host, 1, socket(1), NOTHING, &fd),
        "with 1 descriptors",
    );
    let alone = NicGrant {
        port: tap("tap0"),
        ..grant(2)
    };
    granted(&host, &alone);
    listen(&host, 2);
    for (facts, fds, because) in [
        (NOTHING, &[][..], "a TAP and 2 belong"),
        (TAP, &[file.as_fd()], "a TAP and 2 belong"),
        (TAP, &[file.as_fd(), file.as_fd()], "is none of a TAP"),
        (TAP, &[null.as_fd(), null.as_fd()], "is none of a TAP"),
    ] {
        refused(attach_with(&mut host, 2, socket(2), facts, fds), because);
    }
    let uplink = NicGrant {
        port: on_switch("out"),
        uplink: Some(Uplink::Tap {
            interface: "tap1".parse().expect("a name"),
        }),
        ..grant(3)
    };
    granted(&host, &uplink);
    refused(attach_switch(&mut host, "out"), "a TAP and 1 belong");
    refused(
        attach_switch_with(&mut host, "out", TAP, &fd),
        "is none of a TAP",
    );
    assert!(host.is_alive());
}

#[test]
fn a_socket_is_one_volumes_or_one_nics() {
    let mut host = Host::start();
    host.served(1);
    let mut thief = grant(1);
    thief.socket = crate::harness::socket(1);
    thief.port = PortSpec::Null;
    granted(&host, &thief);
    let name = thief.socket.clone();
    let taken = attach_with(&mut host, 1, name, NOTHING, &[]);
    refused(
        taken,
        &format!("volume {} is served on socket disk-1", volume(1)),
    );
}

#[test]
fn a_grant_that_makes_no_sense_is_refused_and_the_earlier_one_stays() {
    let mut host = Host::start();
    served(&mut host, 1);
    let _frontend = frontend(&host, 1);
    type Change = fn(&mut NicGrant);
    let cases: [(&str, Change); 3] = [
        ("MTU", |g| g.mtu = 67),
        ("queue pairs", |g| g.queue_pairs = 17),
        ("tx_packets", |g| {
            g.limits.tx.packets = Some(Rate {
                per_second: 0,
                burst: 0,
            });
        }),
    ];
    for (because, change) in cases {
        let mut bad = grant(1);
        change(&mut bad);
        grant_refused(give(&host, &bad), because);
    }
    let file = host.file(1);
    let grant = grant(1);
    let with_file = host.ask_keyd(&KeydToDataplane::GrantNic { grant }, &[file.as_fd()]);
    grant_refused(with_file, "1 descriptors");
    assert!(status(&mut host, 1).connected);
}

#[test]
fn limits_and_checks_change_beneath_a_frontend_and_all_else_detaches_it() {
    let mut host = Host::start();
    served(&mut host, 1);
    let mut guest = frontend(&host, 1);
    let mut other = grant(1);
    other.epoch = 2;
    other.limits.rx.packets = Some(Rate::with_default_burst(1000));
    other.checks.sources = vec!["10.0.0.1".parse().expect("a prefix")];
    granted(&host, &other);
    assert!(features(&mut guest).is_some(), "it stays");
    assert!(status(&mut host, 1).connected);
    other.mtu = 9000;
    granted(&host, &other);
    assert_eq!(
        guest.read(&mut [0; 8]).ok(),
        Some(0),
        "its connection is closed"
    );
    let now = status(&mut host, 1);
    assert!(!now.attached && !now.connected, "{now:?}");
    assert_eq!(attach(&mut host, 1), Ok(()));
    let _guest = frontend(&host, 1);
}

#[test]
fn a_nic_in_use_is_not_removed_unless_it_is_forced() {
    let mut host = Host::start();
    served(&mut host, 1);
    let mut guest = frontend(&host, 1);
    let id = nic(1).into();
    let prepare = |force| {
        move |request_id| AgentToDataplane::PrepareRemove {
            request_id,
            id,
            force,
        }
    };
    refused(
        host.ask(prepare(false), &[]),
        "a frontend is connected on socket net-1",
    );
    assert_eq!(host.ask(prepare(true), &[]), Ok(()));
    assert!(features(&mut guest).is_some(), "until it is detached");
    drop(guest);
    // Nobody new comes, until the removal is undone.
    let path = host.dir.path().join(socket(1).as_str());
    let waiting = std::os::unix::net::UnixStream::connect(path);
    let mut waiting = waiting.expect("the listener is there");
    let cancel = |request_id| AgentToDataplane::CancelRemove { request_id, id };
    assert_eq!(host.ask(cancel, &[]), Ok(()));
    let mut again = match features(&mut waiting) {
        Some(_) => waiting,
        // It was sent away before the undoing.
        None => frontend(&host, 1),
    };
    revoke(&host, 1);
    assert_eq!(
        again.read(&mut [0; 8]).ok(),
        Some(0),
        "its connection is closed"
    );
    assert_eq!(
        networks(&mut host),
        Networks::default(),
        "the switch is gone, too"
    );
    assert_eq!(host.ask(prepare(false), &[]), Ok(()), "of nothing");
    assert_eq!(detach(&mut host, 1), Ok(()), "nothing is left to stop");
}

/// Whoever asks meanwhile would take it for one that is to be attached.
#[test]
fn a_nic_that_is_being_attached_is_busy_until_it_is_attached() {
    let mut host = Host::start();
    for n in 1..=8 {
        granted(&host, &grant(n));
        listen(&host, n);
    }
    assert_eq!(attach_switch(&mut host, "lan"), Ok(()));
    let mut ids = Vec::new();
    for n in 1..=8 {
        host.request_id += 1;
        let request_id = host.request_id;
        ids.push(nic(n));
        let attach = AgentToDataplane::AttachNic {
            request_id,
            nic: nic(n),
            socket: socket(n),
            facts: NOTHING,
        };
        host.agent.send(&attach, &[]).expect("sent");
        let request_id = 1000 + request_id;
        let ask = AgentToDataplane::Networks { request_id };
        host.agent.send(&ask, &[]).expect("sent");
    }
    let mut told = 0;
    while told < 8 {
        // (Those of the attachments come in between.)
        let DataplaneToAgent::Networks { networks, .. } = host.answer() else {
            continue;
        };
        told += 1;
        let known = |id: &&NicId| networks.nics.contains(id) || networks.busy.contains(id);
        assert_eq!(ids.iter().filter(known).count(), told, "{networks:?}");
    }
}

#[test]
fn a_switch_has_the_uplink_of_its_newest_grants() {
    let mut host = Host::start();
    served(&mut host, 1);
    served(&mut host, 2);
    // The grants of another bundle come in one after the other.
    let uplink = |name: &str| {
        Some(Uplink::Tap {
            interface: name.parse().expect("a name"),
        })
    };
    let with_uplink = |n| NicGrant {
        uplink: uplink("tap9"),
        epoch: 2,
        ..grant(n)
    };
    granted(&host, &with_uplink(1));
    assert!(!status(&mut host, 1).attached && status(&mut host, 2).attached);
    refused(attach_switch(&mut host, "lan"), "is still on it");
    refused(attach(&mut host, 1), "another uplink than the grant's");
    granted(&host, &with_uplink(2));
    assert_eq!(networks(&mut host), Networks::default());
    // Without it again.
    granted(
        &host,
        &NicGrant {
            epoch: 3,
            ..grant(1)
        },
    );
    granted(
        &host,
        &NicGrant {
            epoch: 3,
            ..grant(2)
        },
    );
    assert_eq!(attach_switch(&mut host, "lan"), Ok(()));
    assert_eq!(
        (attach(&mut host, 1), attach(&mut host, 2)),
        (Ok(()), Ok(()))
    );
}

#[test]
fn a_mirror_needs_its_grant_and_ends_with_it() {
    let mut host = Host::start();
    served(&mut host, 1);
    let new_file = |host: &Host, name: &str| {
        let mut options = File::options();
        options.append(true).create_new(true);
        options.open(host.dir.path().join(name)).expect("a file")
    };
    let mirror = |host: &mut Host, file: &File| {
        let make = |request_id| AgentToDataplane::Mirror {
            request_id,
            nic: nic(1),
        };
        host.ask(make, &[file.as_fd()])
    };
    let first = new_file(&host, "first");
    refused(mirror(&mut host, &first), "is granted without a mirror");
    let mut with = grant(1);
    with.mirror = Some(MirrorSpec {
        file: "first".to_owned(),
        snap_bytes: 256,
        most_bytes: 1 << 20,
    });
    granted(&host, &with);
    let truncating = File::create(host.dir.path().join("other")).expect("a file");
    refused(mirror(&mut host, &truncating), "open for appending");
    assert_eq!(mirror(&mut host, &first), Ok(()));
    assert_eq!(networks(&mut host).mirrored, [nic(1)]);
    let bytes = first.metadata().expect("stat").len();
    assert!(bytes > 0, "it begins with its header");
    let now = status(&mut host, 1).mirror.expect("it has one");
    assert_eq!((now.frames, now.bytes, now.ended), (0, bytes, false));
    // Another file does not take its place; another grant ends it.
    let second = new_file(&host, "second");
    assert_eq!(mirror(&mut host, &second), Ok(()));
    assert_eq!(second.metadata().expect("stat").len(), 0);
    with.mirror.as_mut().expect("one").snap_bytes = 128;
    granted(&host, &with);
    assert_eq!(
        (networks(&mut host).mirrored, status(&mut host, 1).mirror),
        (vec![], None)
    );
    assert_eq!(mirror(&mut host, &second), Ok(()));
    assert!(second.metadata().expect("stat").len() > 0);
    granted(&host, &grant(1));
    assert_eq!(status(&mut host, 1).mirror, None);
    refused(mirror(&mut host, &second), "is granted without a mirror");
}

#[test]
fn what_is_told_of_many_nics_comes_in_pages() {
    let mut host = Host::start();
    for n in 0..70 {
        let null = NicGrant {
            port: PortSpec::Null,
            ..grant(n)
        };
        granted(&host, &null);
    }
    let mut all: Vec<NicStatus> = Vec::new();
    loop {
        let page = statuses(&mut host, all.last().map(|status| status.nic));
        if page.is_empty() {
            break;
        }
        assert!(page.len() <= 32);
        all.extend(page);
    }
    let ids: Vec<_> = all.iter().map(|status| status.nic).collect();
    assert_eq!(ids, (0..70).map(nic).collect::<Vec<_>>());
    assert!(all.iter().all(|status| !status.attached));
}
