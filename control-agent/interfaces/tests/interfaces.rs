//! TAPs and AF_XDP interfaces of the real kernel, in network namespaces of the tests' own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use bulkhead_integration::network::{enter_namespace, has_taps, ip};
use bulkhead_interfaces::tap::{self, TapError};
use bulkhead_interfaces::xdp::{Prepared, XdpError};
use bulkhead_protocol::net::{AF_XDP_QUEUES, InterfaceName, MAX_QUEUE_PAIRS};
use caps::CapSet;

fn name(text: &str) -> InterfaceName {
    text.parse().expect("a name")
}

fn open(text: &str, pairs: u16) -> Result<tap::Tap, TapError> {
    tap::open(&name(text), pairs)
}

/// Runs something as a process that is locked in does: without a capability.
fn without_capabilities<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            caps::clear(None, CapSet::Effective).expect("dropped");
            caps::clear(None, CapSet::Permitted).expect("dropped");
            f()
        });
        thread.join().expect("joined")
    })
}

#[test]
fn every_queue_of_a_tap_is_opened_and_closed() {
    let test = "every_queue_of_a_tap_is_opened_and_closed";
    if !has_taps(test) || !enter_namespace(test) {
        return;
    }
    ip("tuntap add dev t0 mode tap multi_queue vnet_hdr");
    let tap = open("t0", 4).expect("opened");
    assert_eq!(tap.queues.len(), 4);
    assert!(ip("-d link show dev t0").contains("numqueues 4"));
    drop(tap);
    assert!(!ip("-d link show dev t0").contains("numqueues 4"));
    // One that has no other queues will do for a NIC with one pair.
    ip("tuntap add dev t1 mode tap");
    assert_eq!(open("t1", 1).expect("opened").queues.len(), 1);
}

#[test]
fn a_tap_of_the_users_own_takes_no_privilege() {
    let test = "a_tap_of_the_users_own_takes_no_privilege";
    if !has_taps(test) || !enter_namespace(test) {
        return;
    }
    let me = nix::unistd::geteuid();
    ip(&format!(
        "tuntap add dev mine mode tap multi_queue user {me}"
    ));
    ip("tuntap add dev theirs mode tap multi_queue user 4242");
    let (mine, theirs, none) =
        without_capabilities(|| (open("mine", 2), open("theirs", 2), open("none", 2)));
    assert_eq!(mine.expect("opened").queues.len(), 2);
    assert!(matches!(theirs, Err(TapError::NotOurs(_))), "{theirs:?}");
    assert!(matches!(none, Err(TapError::NotThere(_))), "{none:?}");
}

#[test]
fn what_is_no_fitting_tap_is_refused_by_name() {
    let test = "what_is_no_fitting_tap_is_refused_by_name";
    if !has_taps(test) || !enter_namespace(test) {
        return;
    }
    let none = open("none", 1);
    assert!(matches!(none, Err(TapError::NotThere(_))), "{none:?}");
    assert!(!ip("link show").contains("none"), "it is not made either");
    ip("link add v0 type veth peer name v1");
    let veth = open("v0", 1);
    assert!(matches!(veth, Err(TapError::NotATap(_))), "{veth:?}");
    ip("tuntap add dev t0 mode tap");
    let one = open("t0", 2);
    assert!(
        matches!(one, Err(TapError::NotMultiQueue { pairs: 2, .. })),
        "{one:?}"
    );
    let held = open("t0", 1).expect("free again");
    let twice = open("t0", 1);
    assert!(matches!(twice, Err(TapError::Busy(_))), "{twice:?}");
    drop(held);
    for pairs in [0, MAX_QUEUE_PAIRS + 1] {
        assert!(matches!(open("t0", pairs), Err(TapError::Pairs(_))));
    }
}

/// The header has 12 bytes on both ways, or neither side would understand the other.
#[test]
fn the_kernels_stack_answers_through_a_tap() {
    let test = "the_kernels_stack_answers_through_a_tap";
    if !has_taps(test) || !enter_namespace(test) {
        return;
    }
    ip("tuntap add dev t0 mode tap multi_queue");
    ip("addr add 10.7.0.1/24 dev t0");
    let tap = open("t0", 1).expect("opened");
    ip("link set dev t0 up");
    let mut file = File::from(tap.queues.into_iter().next().expect("one"));
    file.write_all(&arp_request([10, 7, 0, 2], [10, 7, 0, 1]))
        .expect("written");
    let since = Instant::now();
    loop {
        let mut frame = [0; 2048];
        let bytes = file.read(&mut frame).expect("read");
        let answer = frame[..bytes].get(12..).unwrap_or_default();
        // An ARP reply from the address that was asked for; the interface sends other things too.
        if answer.get(12..22) == Some(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2])
            && answer.get(28..32) == Some(&[10, 7, 0, 1])
        {
            return;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "no answer");
    }
}

fn arp_request(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mac = [2, 0, 0, 0, 0, 7];
    let parts: [&[u8]; 10] = [
        &[0; 12],
        &[0xff; 6],
        &mac,
        &[8, 6],
        &[0, 1, 8, 0, 6, 4, 0, 1],
        &mac,
        &from,
        &[0; 6],
        &to,
        &[0; 18],
    ];
    parts.concat()
}

#[test]
fn a_program_stays_as_long_as_anybody_holds_its_link() {
    let test = "a_program_stays_as_long_as_anybody_holds_its_link";
    if !enter_namespace(test) {
        return;
    }
    ip("link add v0 type veth peer name v1");
    let prepared = Prepared::new(&name("v0")).expect("prepared");
    let socket = prepared.socket(0).expect("a socket");
    let second = Prepared::new(&name("v0"));
    assert!(matches!(second, Err(XdpError::Busy(_))), "{second:?}");
    let outside = prepared.socket(AF_XDP_QUEUES.into());
    assert!(
        matches!(outside, Err(XdpError::Queue { .. })),
        "{outside:?}"
    );
    let descriptors = prepared.descriptors().map(|fd| fd.try_clone_to_owned());
    let [map, link] = descriptors.map(|fd| fd.expect("cloned"));
    let passed = Prepared::from_descriptors(name("v0"), map, link).expect("it is one");
    let taken = passed.socket(0);
    let is_taken = matches!(taken, Err(XdpError::Taken { queue: 0, .. }));
    assert!(is_taken, "the first one's frames stay its own: {taken:?}");
    let other = passed.socket(1).expect("a socket");
    assert_eq!(other.interface_index, socket.interface_index);
    drop((prepared, passed, other));
    let attached = || ip("link show dev v0").contains("xdp");
    assert!(attached(), "the socket's holder has the link too");
    let link = socket.link.try_clone().expect("cloned");
    let map = socket.socket.try_clone().expect("cloned");
    ip("link del dev v0");
    let gone = Prepared::from_descriptors(name("v0"), map, link);
    assert!(matches!(gone, Err(XdpError::NotThere(_))), "{gone:?}");
    ip("link add v0 type veth peer name v1");
    let prepared = Prepared::new(&name("v0")).expect("prepared");
    assert!(attached());
    drop(prepared);
    assert!(!attached());
    let none = Prepared::new(&name("none"));
    assert!(matches!(none, Err(XdpError::NotThere(_))), "{none:?}");
}

#[test]
fn preparing_an_interface_takes_rights_that_are_named() {
    let test = "preparing_an_interface_takes_rights_that_are_named";
    if !enter_namespace(test) {
        return;
    }
    ip("link add v0 type veth peer name v1");
    let refused = without_capabilities(|| Prepared::new(&name("v0")));
    let said = refused.map(drop).expect_err("refused").to_string();
    assert!(said.contains("CAP_NET_ADMIN and CAP_BPF"), "{said}");
    let prepared = Prepared::new(&name("v0")).expect("prepared");
    let refused = without_capabilities(|| prepared.socket(0));
    let said = refused.map(drop).expect_err("refused").to_string();
    assert!(said.contains("CAP_NET_RAW"), "{said}");
}

/// Without a socket that is bound to the queue nothing changes for the host.
#[test]
fn the_hosts_own_stack_has_what_no_socket_takes() {
    let test = "the_hosts_own_stack_has_what_no_socket_takes";
    if !enter_namespace(test) {
        return;
    }
    ip("link add v0 type veth peer name v1");
    ip("addr add 10.7.0.1/24 dev v0");
    ip("link set dev v0 up");
    ip("link set dev v1 up");
    let _prepared = Prepared::new(&name("v0")).expect("prepared");
    // What goes out by v1 comes in by v0: a broadcast needs no route and no answer.
    let receiver = UdpSocket::bind("0.0.0.0:7777").expect("bound");
    ip("addr add 10.8.0.1/24 dev v1");
    let sender = UdpSocket::bind("10.8.0.1:0").expect("bound");
    sender.set_broadcast(true).expect("broadcast");
    receiver
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("timeout");
    std::fs::write("/proc/sys/net/ipv4/conf/v0/rp_filter", "0").ok();
    std::fs::write("/proc/sys/net/ipv4/conf/v0/accept_local", "1").expect("accept_local");
    sender.send_to(b"through", "10.8.0.255:7777").expect("sent");
    let mut got = [0; 16];
    let bytes = receiver.recv(&mut got).expect("received");
    assert_eq!(&got[..bytes], b"through");
}
