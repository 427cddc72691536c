//! The AF_XDP port over a veth pair, in copy mode: a guest's frames to the host's own stack and back.

use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bulkhead_dataplane::net::frame::Offload;
use bulkhead_dataplane::net::header::Header;
use bulkhead_dataplane::port::afxdp::XdpQueue;
use bulkhead_dataplane::port::interface::InterfaceCounters;
use bulkhead_dataplane::port::{AfXdpPort, DropReason, Port, Tokens};
use bulkhead_integration::network::{enter_namespace, ip};
use bulkhead_interfaces::xdp::{Prepared, Socket};
use nix::errno::Errno;

use super::host::{GUEST_PORT, Host};
use super::packets::{is_intact, payload_of};
use super::rig::{LONG, NIC, Rig, key};

/// A veth pair: the port has one end, the host's own stack the other.
struct Pair {
    rig: Rig,
    port: AfXdpPort,
    counters: Arc<InterfaceCounters>,
    host: Host,
    _prepared: Prepared,
}

impl Pair {
    /// None where it can't be had.
    fn new(test: &str) -> Option<Self> {
        if !enter_namespace(test) {
            return None;
        }
        let (prepared, made) = veth();
        let queue = XdpQueue::new(made.socket, made.interface_index, made.queue, 1500);
        let mut rig = Rig::new();
        let counters = Arc::default();
        let port = port(&mut rig, &counters, queue.expect("set up"));
        let host = Host::new("v1");
        host.up();
        Some(Self {
            rig,
            port,
            counters,
            host,
            _prepared: prepared,
        })
    }

    fn send(&mut self, header: &Header, frame: &[u8]) -> Result<(), DropReason> {
        self.rig.send(&mut self.port, header, frame)
    }

    fn turn(&mut self) {
        self.rig.turn(&mut self.port);
    }

    fn answers(&mut self, count: usize) -> Vec<(Offload, Vec<u8>)> {
        self.rig.answers(&mut self.port, count)
    }
}

/// A pair of which one end is prepared, and a socket for that.
pub fn veth() -> (Prepared, Socket) {
    ip("link add v0 type veth peer name v1");
    // Nobody on the way would complete its checksums.
    let off = Command::new("ethtool")
        .args(["-K", "v1", "tx", "off"])
        .output();
    let off = off.expect("ethtool, of the Debian package of that name");
    assert!(off.status.success(), "{off:?}");
    ip("link set dev v0 up");
    let prepared = Prepared::new(&"v0".parse().expect("a name")).expect("prepared");
    let socket = prepared.socket(0).expect("a socket");
    (prepared, socket)
}

pub fn port(rig: &mut Rig, counters: &Arc<InterfaceCounters>, queue: XdpQueue) -> AfXdpPort {
    let [socket, _] = queue.descriptors();
    let file = rig.ring.register_file(socket).expect("registered");
    let tokens = Tokens::new(1 << Tokens::SLOT_BITS);
    AfXdpPort::new(NIC, file, tokens, key(), Arc::clone(counters), queue)
}

#[test]
fn afxdp_datagrams_reach_the_host_with_their_checksums_completed() {
    let test = "afxdp_datagrams_reach_the_host_with_their_checksums_completed";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    let whole = pair.host.datagram(b"whole").whole();
    pair.send(&Header::default(), &whole).expect("taken");
    let mut wrong = pair.host.datagram(b"wrong").whole();
    wrong[40] ^= 1;
    pair.send(&Header::default(), &wrong).expect("taken");
    let (header, frame) = pair.host.datagram(b"partial").partial();
    pair.send(&header, &frame).expect("taken");
    pair.rig.flush(&mut pair.port);
    assert_eq!(pair.host.received(), b"whole");
    assert_eq!(pair.host.received(), b"partial", "a wrong one is dropped");
    pair.host.send(b"answer");
    let answers = pair.answers(1);
    let (offload, frame) = &answers[0];
    assert_eq!(payload_of(frame, GUEST_PORT), Some(&b"answer"[..]));
    assert_eq!(*offload, Offload::None);
    assert!(is_intact(frame));
}

#[test]
fn afxdp_segments_are_cut_and_whole_ones_that_are_too_long_refused() {
    let test = "afxdp_segments_are_cut_and_whole_ones_that_are_too_long_refused";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    let payload: Vec<u8> = (0..10_500_u32).map(|n| n.to_le_bytes()[0]).collect();
    let (header, frame) = pair.host.datagram(&payload).several(1000);
    pair.send(&header, &frame).expect("taken");
    pair.rig.flush(&mut pair.port);
    for part in payload.chunks(1000) {
        assert_eq!(pair.host.received(), part);
    }
    let (header, frame) = pair.host.datagram(&payload).several(4000);
    assert_eq!(pair.send(&header, &frame), Err(DropReason::TooLong));
    let long = pair.host.datagram(&payload).whole();
    let refused = pair.send(&Header::default(), &long);
    assert_eq!(refused, Err(DropReason::TooLong));
}

#[test]
fn afxdp_frames_of_the_host_come_in_order_again_and_again() {
    let test = "afxdp_frames_of_the_host_come_in_order_again_and_again";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    // More than there are frames for, so that each is used again.
    for round in 0..5_u32 {
        let numbers = round * 300..(round + 1) * 300;
        for number in numbers.clone() {
            pair.host.send(&number.to_le_bytes());
        }
        let answers = pair.answers(300);
        for (number, (_, frame)) in numbers.zip(&answers) {
            let expected = number.to_le_bytes();
            assert_eq!(payload_of(frame, GUEST_PORT), Some(&expected[..]));
        }
    }
    assert_eq!(pair.counters.malformed.load(Ordering::Relaxed), 0);
}

#[test]
fn afxdp_takes_no_more_than_it_has_room_for_and_goes_on() {
    let test = "afxdp_takes_no_more_than_it_has_room_for_and_goes_on";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    let frame = pair.host.datagram(b"one").whole();
    for _ in 0..3 {
        let mut taken = 0;
        while pair.send(&Header::default(), &frame).is_ok() {
            taken += 1;
        }
        assert!(taken >= 512, "{taken}");
        assert_eq!(pair.port.room(NIC), 0);
        let busy = pair.send(&Header::default(), &frame);
        assert_eq!(busy, Err(DropReason::PortBusy));
        // The kernel takes some at a time, and the host's socket has room for some only.
        let since = Instant::now();
        while pair.port.room(NIC) < 16 {
            assert!(since.elapsed() < LONG, "its room does not come back");
            pair.turn();
        }
        let mut buffer = [0; 64];
        pair.host.socket.set_nonblocking(true).expect("set");
        while pair.host.socket.recv(&mut buffer).is_ok() {}
        pair.host.socket.set_nonblocking(false).expect("set");
    }
}

#[test]
fn afxdp_interface_that_is_down_refuses_and_works_again_when_it_is_up() {
    let test = "afxdp_interface_that_is_down_refuses_and_works_again_when_it_is_up";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    ip("link set dev v0 down");
    let frame = pair.host.datagram(b"late").whole();
    pair.send(&Header::default(), &frame).expect("taken");
    pair.rig.flush(&mut pair.port);
    let errno = pair.counters.last_errno.load(Ordering::Relaxed);
    assert_eq!(errno, Errno::ENETDOWN as i32);
    let refused = pair.send(&Header::default(), &frame);
    assert_eq!(refused, Err(DropReason::PortError));
    ip("link set dev v0 up");
    let since = Instant::now();
    while pair.send(&Header::default(), &frame).is_err() {
        assert!(since.elapsed() < LONG, "it does not take frames again");
        pair.turn();
    }
    pair.rig.flush(&mut pair.port);
    assert_eq!(pair.host.received(), b"late");
    pair.host.send(b"answer");
    pair.answers(1);
}

#[test]
fn afxdp_interface_that_is_removed_under_way_is_refused_and_never_spun_on() {
    let test = "afxdp_interface_that_is_removed_under_way_is_refused_and_never_spun_on";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    pair.turn();
    let frame = pair.host.datagram(b"lost").whole();
    ip("link del dev v0");
    let mut slept = Duration::ZERO;
    let mut refused = 0;
    let began = Instant::now();
    for _ in 0..100 {
        refused += u128::from(pair.send(&Header::default(), &frame).is_err());
        pair.turn();
        let since = Instant::now();
        pair.rig.sleep(&mut pair.port, Duration::from_millis(2));
        slept += since.elapsed();
    }
    // It is tried ten times a second at most.
    let tried = 2 + began.elapsed().as_millis() / 100;
    assert!(refused + tried >= 100, "{refused} refused, {tried} tried");
    assert!(slept > Duration::from_millis(100), "it spins: {slept:?}");
    pair.rig.stop(&mut pair.port);
}

#[test]
fn afxdp_port_that_stops_leaves_nothing_in_the_ring() {
    let test = "afxdp_port_that_stops_leaves_nothing_in_the_ring";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    // The host says things of its own while it comes up.
    let since = Instant::now();
    while pair.port.is_idle() {
        assert!(since.elapsed() < LONG, "it waits for nothing");
        pair.turn();
        pair.rig.sleep(&mut pair.port, Duration::from_millis(1));
    }
    pair.rig.stop(&mut pair.port);
    pair.turn();
    assert!(pair.port.is_idle(), "and does not wait again");
}

/// As after a crash: the socket and the memory's file are stored, nothing else is known.
#[test]
fn afxdp_socket_goes_on_in_the_next_process() {
    let test = "afxdp_socket_goes_on_in_the_next_process";
    let Some(mut pair) = Pair::new(test) else {
        return;
    };
    let before = pair.host.datagram(b"before").whole();
    pair.send(&Header::default(), &before).expect("taken");
    pair.rig.flush(&mut pair.port);
    assert_eq!(pair.host.received(), b"before");
    pair.host.send(b"one");
    pair.answers(1);
    pair.rig.stop(&mut pair.port);
    for _ in 0..3 {
        let queue = pair.port.into_queue();
        let stored = queue
            .descriptors()
            .map(|fd| fd.as_fd().try_clone_to_owned());
        drop(queue);
        // It comes while nobody is there.
        pair.host.send(b"between");
        let [socket, memory] = stored.map(|fd| fd.expect("cloned"));
        let queue = XdpQueue::resumed(socket, memory).expect("resumed");
        pair.port = port(&mut pair.rig, &pair.counters, queue);
        let answers = pair.rig.answers(&mut pair.port, 1);
        assert_eq!(payload_of(&answers[0].1, GUEST_PORT), Some(&b"between"[..]));
        // All frames of both kinds are still there.
        for _ in 0..600 {
            pair.host.send(b"more");
            pair.rig.answers(&mut pair.port, 1);
        }
        let after = pair.host.datagram(b"after").whole();
        pair.rig
            .send(&mut pair.port, &Header::default(), &after)
            .expect("taken");
        pair.rig.flush(&mut pair.port);
        assert_eq!(pair.host.received(), b"after");
        assert!(pair.port.room(NIC) >= 20, "{}", pair.port.room(NIC));
        pair.rig.stop(&mut pair.port);
    }
}
