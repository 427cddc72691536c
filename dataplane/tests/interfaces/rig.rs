//! A worker's ring without the worker: ports are turned by hand.

use std::time::{Duration, Instant};

use bulkhead_dataplane::net::HashKey;
use bulkhead_dataplane::net::frame::{Frame, Offload};
use bulkhead_dataplane::net::header::Header;
use bulkhead_dataplane::port::{DropReason, Nic, Port, Sink};
use bulkhead_dataplane::worker::clock;
use bulkhead_dataplane::worker::ring::Ring;
use bulkhead_dataplane::worker::staging::Staging;

use super::host::GUEST_PORT;
use super::packets::payload_of;

/// Longer than anything takes.
pub const LONG: Duration = Duration::from_secs(60);

/// The NIC of every test's port.
pub const NIC: Nic = Nic(3);

/// A key of flow hashes.
pub fn key() -> HashKey {
    HashKey::new(7)
}

/// What came.
#[derive(Default)]
pub struct Inbox {
    pub frames: Vec<(Offload, Vec<u8>)>,
}

impl Sink for Inbox {
    fn deliver(&mut self, to: Nic, frame: &Frame<'_>) -> Result<(), DropReason> {
        assert_eq!(to, NIC);
        let mut bytes = vec![0; frame.bytes()];
        assert_eq!(frame.copy_to(&mut bytes), Some(bytes.len()));
        self.frames.push((frame.offload, bytes));
        Ok(())
    }
}

/// A ring, and what came by the port that is turned.
pub struct Rig {
    pub ring: Ring,
    pub inbox: Inbox,
    _staging: Staging,
}

impl Rig {
    pub fn new() -> Self {
        let staging = Staging::new().expect("staging");
        Self {
            ring: Ring::new(&staging).expect("ring"),
            inbox: Inbox::default(),
            _staging: staging,
        }
    }

    /// A turn as a worker has it.
    pub fn turn(&mut self, port: &mut impl Port) {
        port.receive(clock::now(), &mut self.inbox, &mut self.ring);
        self.flush(port);
    }

    /// The end of a batch, and what is in the ring done.
    pub fn flush(&mut self, port: &mut impl Port) {
        port.flush(&mut self.ring);
        self.ring.turn();
        self.reap(port);
    }

    fn reap(&mut self, port: &mut impl Port) {
        while let Some(completion) = self.ring.reap() {
            port.landed(completion, &mut self.ring);
        }
    }

    /// Sleeps as a worker does, if the port lets it: until something comes.
    pub fn sleep(&mut self, port: &mut impl Port, most: Duration) {
        if port.arm(&mut self.ring) {
            self.ring.wait(Some(most));
        }
        self.reap(port);
    }

    /// Turns and sleeps until `done` says so.
    pub fn until(
        &mut self,
        port: &mut impl Port,
        what: &str,
        mut done: impl FnMut(&mut Inbox) -> bool,
    ) {
        let since = Instant::now();
        loop {
            self.turn(port);
            if done(&mut self.inbox) {
                return;
            }
            assert!(since.elapsed() < LONG, "{what} did not happen");
            self.sleep(port, Duration::from_millis(10));
        }
    }

    /// Waits for so many datagrams of the host's to the guest.
    pub fn answers(&mut self, port: &mut impl Port, count: usize) -> Vec<(Offload, Vec<u8>)> {
        let mut got = Vec::new();
        self.until(port, "all the answers", |inbox| {
            let frames = inbox.frames.drain(..);
            got.extend(frames.filter(|(_, frame)| payload_of(frame, GUEST_PORT).is_some()));
            got.len() >= count
        });
        got
    }

    /// Sends a frame.
    pub fn send(
        &mut self,
        port: &mut impl Port,
        header: &Header,
        bytes: &[u8],
    ) -> Result<(), DropReason> {
        let frame = Frame::of_bytes(header, bytes, key()).expect("a frame");
        port.transmit(NIC, &frame, &mut self.inbox, &mut self.ring)
    }

    /// Stops a port, and waits until nothing of it is under way.
    pub fn stop(&mut self, port: &mut impl Port) {
        port.stop(&mut self.ring);
        let since = Instant::now();
        while !port.is_idle() {
            assert!(since.elapsed() < LONG, "the port does not become idle");
            self.ring.wait(Some(Duration::from_millis(10)));
            self.reap(port);
        }
    }
}
