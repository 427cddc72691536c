//! A port on a ring of its own, the NICs of its worker, and what is behind it.

use std::time::{Duration, Instant};

use bulkhead_dataplane::net::HashKey;
use bulkhead_dataplane::net::frame::Frame;
use bulkhead_dataplane::port::{DropReason, Nic, Port, Sink};
use bulkhead_dataplane::worker::clock;
use bulkhead_dataplane::worker::ring::Ring;
use bulkhead_dataplane::worker::staging::Staging;

use crate::frames::Packet;

/// How long a test waits for what must happen. A machine that takes longer hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What flows are hashed with.
pub fn key() -> HashKey {
    HashKey::new(0x1234_5678_9abc_def0)
}

/// The NIC whose port is tested.
pub const NIC: Nic = Nic(0);

/// NICs that take everything, but those that are to take nothing.
#[derive(Debug, Default)]
pub struct Nics {
    pub delivered: Vec<(Nic, Packet)>,
    /// Who has no room.
    pub full: Vec<Nic>,
    pub refused: usize,
}

impl Sink for Nics {
    fn deliver(&mut self, to: Nic, frame: &Frame<'_>) -> Result<(), DropReason> {
        if self.full.contains(&to) {
            self.refused += 1;
            return Err(DropReason::NoRoom);
        }
        self.delivered.push((to, packet(frame)));
        Ok(())
    }
}

impl Nics {
    /// What a NIC got since it was asked last.
    pub fn take(&mut self, nic: Nic) -> Vec<Packet> {
        let (its, others) = std::mem::take(&mut self.delivered)
            .into_iter()
            .partition(|(to, _)| *to == nic);
        self.delivered = others;
        let its: Vec<(Nic, Packet)> = its;
        its.into_iter().map(|(_, packet)| packet).collect()
    }
}

/// A frame's bytes and header.
pub fn packet(frame: &Frame<'_>) -> Packet {
    let mut bytes = vec![0; frame.bytes()];
    assert_eq!(frame.copy_to(&mut bytes), Some(bytes.len()));
    let header = frame.offload.header();
    Packet { header, bytes }
}

/// A port as a worker has it.
pub struct Rig<P> {
    pub port: P,
    pub nics: Nics,
    /// Dropped before the staging memory.
    pub ring: Ring,
    _staging: Staging,
}

impl<P: Port> Rig<P> {
    /// With a port that is made on the ring.
    pub fn new(port: impl FnOnce(&mut Ring) -> P) -> Self {
        let staging = Staging::new().expect("staging memory");
        let mut ring = Ring::new(&staging).expect("a ring");
        Self {
            port: port(&mut ring),
            nics: Nics::default(),
            ring,
            _staging: staging,
        }
    }

    /// A turn of the worker without frames to send: how many were received.
    pub fn turn(&mut self) -> usize {
        self.ring.turn();
        while let Some(completion) = self.ring.reap() {
            self.port.landed(completion, &mut self.ring);
        }
        self.port
            .receive(clock::now(), &mut self.nics, &mut self.ring)
    }

    /// Turns until something is so.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let since = Instant::now();
        while !is_so(self) {
            assert!(since.elapsed() < PATIENCE, "not after {PATIENCE:?}: {what}");
            self.turn();
        }
    }

    /// Gives the port one frame, whether it has room or not.
    pub fn transmit(&mut self, from: Nic, packet: &Packet) -> Result<(), DropReason> {
        let frame = Frame::of_bytes(&packet.header, &packet.bytes, key()).expect("a frame");
        self.port
            .transmit(from, &frame, &mut self.nics, &mut self.ring)
    }

    /// Sends frames as the port has room for them, in batches, as a worker does.
    pub fn send(&mut self, from: Nic, packets: &[Packet]) {
        let mut left = packets;
        while !left.is_empty() {
            self.until("the port has room", |rig| rig.port.room(from) > 0);
            let room = self.port.room(from);
            let (now, later) = left.split_at(room.min(left.len()).min(32));
            for packet in now {
                assert_eq!(self.transmit(from, packet), Ok(()));
            }
            self.port.flush(&mut self.ring);
            self.turn();
            left = later;
        }
    }
}
