//! The TAP port: a guest's frames to the host's own stack and back.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bulkhead_dataplane::net::frame::{Gso, GsoKind, Offload};
use bulkhead_dataplane::net::header::Header;
use bulkhead_dataplane::port::interface::InterfaceCounters;
use bulkhead_dataplane::port::{DropReason, Port, TapPort, Tokens};
use bulkhead_integration::network::{enter_namespace, has_taps, ip};

use super::host::{GUEST_PORT, Host};
use super::packets::{is_intact, payload_of};
use super::rig::{LONG, NIC, Rig, key};

/// A TAP with the host's own stack behind it.
struct Tap {
    rig: Rig,
    ports: Vec<TapPort>,
    counters: Arc<InterfaceCounters>,
    host: Host,
}

impl Tap {
    /// None where it can't be had.
    fn new(test: &str, queues: u16) -> Option<Self> {
        if !has_taps(test) || !enter_namespace(test) {
            return None;
        }
        ip("tuntap add dev t0 mode tap multi_queue vnet_hdr");
        let mut tap = Self {
            rig: Rig::new(),
            ports: Vec::new(),
            counters: Arc::default(),
            host: Host::new("t0"),
        };
        let name = "t0".parse().expect("a name");
        let opened = bulkhead_interfaces::tap::open(&name, queues).expect("opened");
        for (number, queue) in (1..).zip(&opened.queues) {
            let file = tap.rig.ring.register_file(queue.as_fd());
            let tokens = Tokens::new(number << Tokens::SLOT_BITS);
            let counters = Arc::clone(&tap.counters);
            let port = TapPort::new(NIC, file.expect("registered"), tokens, key(), counters);
            tap.ports.push(port.expect("a port"));
        }
        tap.host.up();
        Some(tap)
    }

    fn send(&mut self, header: &Header, frame: &[u8]) -> Result<(), DropReason> {
        self.rig.send(&mut self.ports[0], header, frame)
    }

    fn turn(&mut self) {
        self.rig.turn(&mut self.ports[0]);
    }

    fn answers(&mut self, count: usize) -> Vec<(Offload, Vec<u8>)> {
        self.rig.answers(&mut self.ports[0], count)
    }
}

#[test]
fn tap_datagrams_reach_the_host_and_come_back_with_their_checksums() {
    let test = "tap_datagrams_reach_the_host_and_come_back_with_their_checksums";
    let Some(mut tap) = Tap::new(test, 1) else {
        return;
    };
    // Whole; wrong, which the kernel drops; and to be completed by the kernel.
    let whole = tap.host.datagram(b"whole").whole();
    tap.send(&Header::default(), &whole).expect("taken");
    let mut wrong = tap.host.datagram(b"wrong").whole();
    wrong[40] ^= 1;
    tap.send(&Header::default(), &wrong).expect("taken");
    let (header, frame) = tap.host.datagram(b"partial").partial();
    tap.send(&header, &frame).expect("taken");
    tap.turn();
    assert_eq!(tap.host.received(), b"whole");
    assert_eq!(tap.host.received(), b"partial");
    tap.host.send(b"answer");
    let answers = tap.answers(1);
    let (offload, frame) = &answers[0];
    assert_eq!(payload_of(frame, GUEST_PORT), Some(&b"answer"[..]));
    // The kernel leaves the checksum to whoever is last.
    assert!(matches!(offload, Offload::NeedsCsum(csum) if csum.start == 34 && csum.offset == 6));
    assert!(!is_intact(frame));
}

#[test]
fn tap_segments_cross_whole_in_both_directions() {
    let test = "tap_segments_cross_whole_in_both_directions";
    let Some(mut tap) = Tap::new(test, 1) else {
        return;
    };
    let payload: Vec<u8> = (0..10_500_u32).map(|n| n.to_le_bytes()[0]).collect();
    let (header, frame) = tap.host.datagram(&payload).several(1000);
    tap.send(&header, &frame).expect("taken");
    tap.turn();
    for part in payload.chunks(1000) {
        assert_eq!(tap.host.received(), part);
    }
    let mss = nix::sys::socket::sockopt::UdpGsoSegment;
    nix::sys::socket::setsockopt(&tap.host.socket, mss, &1000).expect("set");
    tap.host.send(&payload);
    let answers = tap.answers(1);
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
    let Some(mut tap) = Tap::new(test, 1) else {
        return;
    };
    // A read waits before the first comes: bursts have to follow it.
    tap.turn();
    for number in 0..400_u32 {
        tap.host.send(&number.to_le_bytes());
    }
    let answers = tap.answers(400);
    for (number, (_, frame)) in (0..400_u32).zip(&answers) {
        let expected = number.to_le_bytes();
        assert_eq!(payload_of(frame, GUEST_PORT), Some(&expected[..]));
    }
    assert_eq!(tap.counters.unreadable.load(Ordering::Relaxed), 0);
}

#[test]
fn tap_takes_no_more_than_it_has_room_for_and_goes_on() {
    let test = "tap_takes_no_more_than_it_has_room_for_and_goes_on";
    let Some(mut tap) = Tap::new(test, 1) else {
        return;
    };
    let frame = tap.host.datagram(b"one").whole();
    for _ in 0..3 {
        let room = tap.ports[0].room(NIC);
        assert!(room >= 32, "{room}");
        for _ in 0..room {
            tap.send(&Header::default(), &frame).expect("taken");
        }
        let over = tap.send(&Header::default(), &frame);
        assert_eq!(over, Err(DropReason::PortBusy));
        tap.turn();
        assert_eq!(tap.ports[0].room(NIC), room);
        for _ in 0..room {
            assert_eq!(tap.host.received(), b"one");
        }
    }
}

#[test]
fn tap_that_is_down_refuses_and_works_again_when_it_is_up() {
    let test = "tap_that_is_down_refuses_and_works_again_when_it_is_up";
    let Some(mut tap) = Tap::new(test, 1) else {
        return;
    };
    ip("link set dev t0 down");
    let frame = tap.host.datagram(b"lost").whole();
    for _ in 0..5 {
        tap.send(&Header::default(), &frame).expect("taken");
        tap.turn();
    }
    assert_eq!(tap.counters.refused.load(Ordering::Relaxed), 5);
    let errno = tap.counters.last_errno.load(Ordering::Relaxed);
    assert_eq!(errno, nix::errno::Errno::EIO as i32);
    tap.host.up();
    let frame = tap.host.datagram(b"found").whole();
    tap.send(&Header::default(), &frame).expect("taken");
    tap.turn();
    assert_eq!(tap.host.received(), b"found");
    tap.host.send(b"answer");
    tap.answers(1);
}

#[test]
fn tap_that_is_removed_under_way_is_counted_and_never_spun_on() {
    let test = "tap_that_is_removed_under_way_is_counted_and_never_spun_on";
    let Some(mut tap) = Tap::new(test, 1) else {
        return;
    };
    tap.turn();
    ip("link del dev t0");
    let frame = tap.host.datagram(b"lost").whole();
    let since = Instant::now();
    // After a few failures nothing of it is under way: the worker sleeps.
    for _ in 0..200 {
        tap.send(&Header::default(), &frame).expect("taken");
        tap.turn();
        tap.rig.sleep(&mut tap.ports[0], Duration::from_millis(1));
    }
    assert_eq!(tap.counters.refused.load(Ordering::Relaxed), 200);
    // Eight at once, and one a second.
    let failures = tap.counters.unreadable.load(Ordering::Relaxed);
    let most = 9 + since.elapsed().as_secs();
    assert!((8..=most).contains(&failures), "{failures}");
    tap.rig.stop(&mut tap.ports[0]);
}

#[test]
fn tap_port_that_stops_leaves_nothing_in_the_ring() {
    let test = "tap_port_that_stops_leaves_nothing_in_the_ring";
    let Some(mut tap) = Tap::new(test, 1) else {
        return;
    };
    // The host says things of its own while it comes up.
    let since = Instant::now();
    while tap.ports[0].is_idle() {
        assert!(since.elapsed() < LONG, "no read waits");
        tap.turn();
    }
    let frame = tap.host.datagram(b"last").whole();
    tap.send(&Header::default(), &frame).expect("taken");
    tap.rig.stop(&mut tap.ports[0]);
    assert_eq!(tap.host.received(), b"last");
    tap.turn();
    assert!(tap.ports[0].is_idle(), "and none waits again");
}

#[test]
fn tap_answers_come_by_the_queue_that_the_flow_went_out_by() {
    let test = "tap_answers_come_by_the_queue_that_the_flow_went_out_by";
    let Some(mut tap) = Tap::new(test, 2) else {
        return;
    };
    let frame = tap.host.datagram(b"by the second").whole();
    tap.rig
        .send(&mut tap.ports[1], &Header::default(), &frame)
        .expect("taken");
    tap.rig.turn(&mut tap.ports[1]);
    assert_eq!(tap.host.received(), b"by the second");
    tap.host.send(b"answer");
    tap.rig.until(&mut tap.ports[1], "the answer", |inbox| {
        let mut frames = inbox.frames.iter();
        frames.any(|(_, frame)| payload_of(frame, GUEST_PORT) == Some(&b"answer"[..]))
    });
}
