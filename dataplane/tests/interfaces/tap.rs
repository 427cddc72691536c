//! The TAP port: a guest's frames to the host's own stack and back.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_dataplane::net::frame::{Gso, GsoKind, Offload};
use bulkhead_dataplane::net::header::Header;
use bulkhead_dataplane::port::interface::InterfaceCounters;
use bulkhead_dataplane::port::{DropReason, Port, TapPort, Tokens};
use bulkhead_integration::network::{enter_namespace, has_taps, ip};

use super::packets::{Datagram, is_intact, payload_of};
use super::rig::{LONG, NIC, Rig, key};

/// The port of the guest's that the host answers to.
const GUEST_PORT: u16 = 5000;

/// A TAP with the host's address, and the host's socket.
struct Host {
    rig: Rig,
    ports: Vec<TapPort>,
    counters: Arc<InterfaceCounters>,
    mac: [u8; 6],
    socket: UdpSocket,
}

impl Host {
    /// None where it can't be had.
    fn new(test: &str, queues: u16) -> Option<Self> {
        if !has_taps(test) || !enter_namespace(test) {
            return None;
        }
        ip("tuntap add dev t0 mode tap multi_queue vnet_hdr");
        ip("addr add 10.7.0.1/24 dev t0");
        let mut host = Self {
            rig: Rig::new(),
            ports: Vec::new(),
            counters: Arc::default(),
            mac: mac_of("t0"),
            socket: UdpSocket::bind("0.0.0.0:9000").expect("bound"),
        };
        let name = "t0".parse().expect("a name");
        let tap = bulkhead_interfaces::tap::open(&name, queues).expect("opened");
        for (number, queue) in (1..).zip(&tap.queues) {
            let file = host
                .rig
                .ring
                .register_file(queue.as_fd())
                .expect("registered");
            let tokens = Tokens::new(number << Tokens::SLOT_BITS);
            let counters = Arc::clone(&host.counters);
            let port = TapPort::new(NIC, file, tokens, key(), counters);
            host.ports.push(port.expect("a port"));
        }
        up();
        host.socket.set_read_timeout(Some(LONG)).expect("set");
        Some(host)
    }

    fn datagram<'a>(&self, payload: &'a [u8]) -> Datagram<'a> {
        Datagram {
            to: self.mac,
            from_port: GUEST_PORT,
            to_port: 9000,
            payload,
        }
    }

    fn send(&mut self, header: &Header, frame: &[u8]) -> Result<(), DropReason> {
        self.rig.send(&mut self.ports[0], header, frame)
    }

    fn turn(&mut self) {
        self.rig.turn(&mut self.ports[0]);
    }

    fn received(&self) -> Vec<u8> {
        let mut got = vec![0; 70_000];
        let bytes = self.socket.recv(&mut got).expect("received");
        got.truncate(bytes);
        got
    }

    /// Waits for so many datagrams from the host.
    fn answers(&mut self, count: usize) -> Vec<(Offload, Vec<u8>)> {
        let mut got = Vec::new();
        let port = &mut self.ports[0];
        self.rig.until(port, "all the answers", |inbox| {
            let frames = inbox.frames.drain(..);
            got.extend(frames.filter(|(_, frame)| payload_of(frame, GUEST_PORT).is_some()));
            got.len() >= count
        });
        got
    }
}

/// Has the interface up; the kernel takes a station that it can't ask for from us.
fn up() {
    ip("link set dev t0 up");
    ip("neigh replace 10.7.0.2 lladdr 02:00:00:00:00:07 dev t0 nud permanent");
}

fn mac_of(interface: &str) -> [u8; 6] {
    let said = ip(&format!("-o link show dev {interface}"));
    let text = said.split("link/ether ").nth(1).expect("a station");
    let bytes = text.split([' ', ':']).take(6);
    let bytes: Vec<u8> = bytes
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect();
    bytes.try_into().expect("six bytes")
}

#[test]
fn tap_datagrams_reach_the_host_and_come_back_with_their_checksums() {
    let test = "tap_datagrams_reach_the_host_and_come_back_with_their_checksums";
    let Some(mut host) = Host::new(test, 1) else {
        return;
    };
    // Whole; wrong, which the kernel drops; and to be completed by the kernel.
    let whole = host.datagram(b"whole").whole();
    host.send(&Header::default(), &whole).expect("taken");
    let mut wrong = host.datagram(b"wrong").whole();
    wrong[40] ^= 1;
    host.send(&Header::default(), &wrong).expect("taken");
    let (header, frame) = host.datagram(b"partial").partial();
    host.send(&header, &frame).expect("taken");
    host.turn();
    assert_eq!(host.received(), b"whole");
    assert_eq!(host.received(), b"partial");
    host.socket
        .send_to(b"answer", ("10.7.0.2", GUEST_PORT))
        .expect("sent");
    let answers = host.answers(1);
    let (offload, frame) = &answers[0];
    assert_eq!(payload_of(frame, GUEST_PORT), Some(&b"answer"[..]));
    // The kernel leaves the checksum to whoever is last.
    assert!(matches!(offload, Offload::NeedsCsum(csum) if csum.start == 34 && csum.offset == 6));
    assert!(!is_intact(frame));
}

#[test]
fn tap_segments_cross_whole_in_both_directions() {
    let test = "tap_segments_cross_whole_in_both_directions";
    let Some(mut host) = Host::new(test, 1) else {
        return;
    };
    let payload: Vec<u8> = (0..10_500_u32).map(|n| n.to_le_bytes()[0]).collect();
    let (header, frame) = host.datagram(&payload).several(1000);
    host.send(&header, &frame).expect("taken");
    host.turn();
    for part in payload.chunks(1000) {
        assert_eq!(host.received(), part);
    }
    let mss = nix::sys::socket::sockopt::UdpGsoSegment;
    nix::sys::socket::setsockopt(&host.socket, mss, &1000).expect("set");
    host.socket
        .send_to(&payload, ("10.7.0.2", GUEST_PORT))
        .expect("sent");
    let answers = host.answers(1);
    let (offload, frame) = &answers[0];
    assert!(
        matches!(
            offload,
            Offload::Gso(Gso {
                kind: GsoKind::Udp4,
                mss: 1000,
                ..
            })
        ),
        "{offload:?}"
    );
    assert_eq!(payload_of(frame, GUEST_PORT), Some(&payload[..]));
}

#[test]
fn tap_frames_of_the_host_come_in_order_and_all() {
    let test = "tap_frames_of_the_host_come_in_order_and_all";
    let Some(mut host) = Host::new(test, 1) else {
        return;
    };
    // A read waits before the first comes: bursts have to follow it.
    host.turn();
    let to = ("10.7.0.2", GUEST_PORT);
    for number in 0..400_u32 {
        let sent = host.socket.send_to(&number.to_le_bytes(), to);
        sent.expect("sent");
    }
    let answers = host.answers(400);
    for (number, (_, frame)) in (0..400_u32).zip(&answers) {
        let expected = number.to_le_bytes();
        assert_eq!(payload_of(frame, GUEST_PORT), Some(&expected[..]));
    }
    assert_eq!(host.counters.unreadable.load(Ordering::Relaxed), 0);
}

#[test]
fn tap_takes_no_more_than_it_has_room_for_and_goes_on() {
    let test = "tap_takes_no_more_than_it_has_room_for_and_goes_on";
    let Some(mut host) = Host::new(test, 1) else {
        return;
    };
    let frame = host.datagram(b"one").whole();
    for _ in 0..3 {
        let room = host.ports[0].room();
        assert!(room >= 32, "{room}");
        for _ in 0..room {
            host.send(&Header::default(), &frame).expect("taken");
        }
        let over = host.send(&Header::default(), &frame);
        assert_eq!(over, Err(DropReason::PortBusy));
        host.turn();
        assert_eq!(host.ports[0].room(), room);
        for _ in 0..room {
            assert_eq!(host.received(), b"one");
        }
    }
}

#[test]
fn tap_that_is_down_refuses_and_works_again_when_it_is_up() {
    let test = "tap_that_is_down_refuses_and_works_again_when_it_is_up";
    let Some(mut host) = Host::new(test, 1) else {
        return;
    };
    ip("link set dev t0 down");
    let frame = host.datagram(b"lost").whole();
    for _ in 0..5 {
        host.send(&Header::default(), &frame).expect("taken");
        host.turn();
    }
    assert_eq!(host.counters.refused.load(Ordering::Relaxed), 5);
    let errno = host.counters.last_errno.load(Ordering::Relaxed);
    assert_eq!(errno, libc_eio());
    up();
    let frame = host.datagram(b"found").whole();
    host.send(&Header::default(), &frame).expect("taken");
    host.turn();
    assert_eq!(host.received(), b"found");
    host.socket
        .send_to(b"answer", ("10.7.0.2", GUEST_PORT))
        .expect("sent");
    host.answers(1);
}

fn libc_eio() -> i32 {
    nix::errno::Errno::EIO as i32
}

#[test]
fn tap_that_is_removed_under_way_is_counted_and_never_spun_on() {
    let test = "tap_that_is_removed_under_way_is_counted_and_never_spun_on";
    let Some(mut host) = Host::new(test, 1) else {
        return;
    };
    host.turn();
    ip("link del dev t0");
    let frame = host.datagram(b"lost").whole();
    let mut turns = 0;
    let mut failures = 0;
    // After a few failures nothing of it is under way: the worker sleeps.
    while turns < 200 {
        host.send(&Header::default(), &frame).expect("taken");
        host.turn();
        host.rig
            .sleep(&mut host.ports[0], std::time::Duration::from_millis(1));
        failures = host.counters.unreadable.load(Ordering::Relaxed);
        turns += 1;
    }
    assert_eq!(host.counters.refused.load(Ordering::Relaxed), 200);
    // Eight at once, and one a second.
    assert!((8..60).contains(&failures), "{failures}");
    host.rig.stop(&mut host.ports[0]);
}

#[test]
fn tap_port_that_stops_leaves_nothing_in_the_ring() {
    let test = "tap_port_that_stops_leaves_nothing_in_the_ring";
    let Some(mut host) = Host::new(test, 1) else {
        return;
    };
    host.turn();
    assert!(!host.ports[0].is_idle(), "a read waits");
    let frame = host.datagram(b"last").whole();
    host.send(&Header::default(), &frame).expect("taken");
    host.rig.stop(&mut host.ports[0]);
    assert_eq!(host.received(), b"last");
    host.turn();
    assert!(host.ports[0].is_idle(), "and none waits again");
}

#[test]
fn tap_answers_come_by_the_queue_that_the_flow_went_out_by() {
    let test = "tap_answers_come_by_the_queue_that_the_flow_went_out_by";
    let Some(mut host) = Host::new(test, 2) else {
        return;
    };
    let frame = host.datagram(b"by the second").whole();
    host.rig
        .send(&mut host.ports[1], &Header::default(), &frame)
        .expect("taken");
    host.rig.turn(&mut host.ports[1]);
    assert_eq!(host.received(), b"by the second");
    host.socket
        .send_to(b"answer", ("10.7.0.2", GUEST_PORT))
        .expect("sent");
    host.rig.until(&mut host.ports[1], "the answer", |inbox| {
        let mut frames = inbox.frames.iter();
        frames.any(|(_, frame)| payload_of(frame, GUEST_PORT) == Some(&b"answer"[..]))
    });
}
