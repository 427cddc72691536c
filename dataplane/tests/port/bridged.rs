//! What is outside of a port that leads to an interface of the host's: a bridge of the kernel's, and behind that a TAP that
//! the test reads and writes.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::time::Instant;

use bulkhead_dataplane::net::frame::Frame;
use bulkhead_dataplane::net::header::{Header, MOST_BYTES};
use bulkhead_integration::network::{enter_namespace, has_taps, ip};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::frames::Packet;
use crate::rig::{PATIENCE, key, packet};

/// The far end.
pub struct Bridged {
    tap: File,
}

/// Whether there can be one.
pub fn is_possible(test: &str) -> bool {
    has_taps(test) && enter_namespace(test)
}

/// A network namespace of the calling thread's own, whose last one goes.
pub fn fresh_namespace() {
    assert!(enter_namespace("a case"), "there was one before");
}

impl Bridged {
    /// Connects `interface`, whose other end is open, with the far end: both forward when this returns.
    pub fn new(interface: &str) -> Self {
        ip("tuntap add dev far mode tap multi_queue vnet_hdr");
        let name = "far".parse().expect("a name");
        let opened = bulkhead_interfaces::tap::open(&name, 1).expect("opened");
        let tap = File::from(opened.queues.into_iter().next().expect("one"));
        fcntl(&tap, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("set");
        ip("link add br0 type bridge stp_state 0 mcast_snooping 0");
        ip("link set dev br0 up");
        for interface in [interface, "far"] {
            ip(&format!("link set dev {interface} up"));
            ip(&format!("link set dev {interface} master br0"));
        }
        let since = Instant::now();
        for interface in [interface, "far"] {
            while !ip(&format!("-d link show dev {interface}")).contains("state forwarding") {
                assert!(since.elapsed() < PATIENCE, "{interface} does not forward");
            }
        }
        Self { tap }
    }

    /// What has arrived, with its headers as a guest would get them.
    pub fn arrived(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        let mut bytes = vec![0; 70_000];
        loop {
            let read = match self.tap.read(&mut bytes) {
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return packets,
                Err(error) => panic!("the far end can't be read: {error}"),
            };
            let (header, frame) = bytes[..read]
                .split_first_chunk::<MOST_BYTES>()
                .expect("a header");
            let frame = Frame::of_bytes(&Header::parse(header), frame, key());
            packets.push(packet(&frame.expect("a frame")));
        }
    }

    /// Sends a frame.
    pub fn send(&mut self, packet: &Packet) {
        let bytes = [&packet.header.bytes()[..], &packet.bytes].concat();
        self.tap.write_all(&bytes).expect("written");
    }
}
