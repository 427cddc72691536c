//! An attached network card: a frontend and a driver that together do what a virtual machine does.
//!
//! Guest memory has two regions in different files: the rings in the first, buffers in the second.

use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::disk::{DiskError, feature};
use crate::driver::memory::GuestMemory;
use crate::driver::ring::{Desc, Format, Ring};
use crate::frontend::message::{self, Inflight, protocol_feature, request};
use crate::frontend::{Addresses, Frontend};

/// virtio-net feature bits that tests use.
pub mod net_feature {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
    /// All that leave something to the other side.
    pub const OFFLOADS: u64 = CSUM
        | GUEST_CSUM
        | GUEST_TSO4
        | GUEST_TSO6
        | HOST_TSO4
        | HOST_TSO6
        | GUEST_USO4
        | GUEST_USO6
        | HOST_USO;
}

/// Bytes of the header in front of each frame, with VERSION_1 or MRG_RXBUF.
pub const HEADER_BYTES: usize = 12;
/// Where rings lie.
pub const LOW: u64 = 0x4000_0000;
/// Where buffers lie.
pub const DATA: u64 = 0x1_0000_0000;
/// Frames that can be on their way out of a pair.
const TX_SLOTS: u16 = 16;
/// Room for each.
const TX_BYTES: u64 = 0x1_2000;
/// How long something may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How to attach.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Queue pairs to start.
    pub pairs: u16,
    /// Entries of each queue.
    pub queue_size: u16,
    /// virtio features wanted; those not offered are left out.
    pub features: u64,
    /// Buffers to receive into, of each pair.
    pub buffers: u16,
    /// Bytes of each.
    pub buffer_bytes: u32,
}

impl Default for Options {
    /// One pair, split rings, buffers of a page that frames may lie in several of, all offloads.
    fn default() -> Self {
        Self {
            pairs: 1,
            queue_size: 256,
            features: feature::VERSION_1
                | feature::PROTOCOL_FEATURES
                | net_feature::MRG_RXBUF
                | net_feature::OFFLOADS,
            buffers: 128,
            buffer_bytes: 4096,
        }
    }
}

/// A frame that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// The header in front of it.
    pub header: Vec<u8>,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
    /// Buffers that it lay in.
    pub buffers: u16,
}

/// A card with its queues running.
#[derive(Debug)]
pub struct Card {
    /// The connection.
    pub frontend: Frontend,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The queues: even ones receive, odd ones send.
    pub rings: Vec<Ring>,
    /// virtio features as negotiated.
    pub features: u64,
    options: Options,
    next_slot: Vec<u16>,
    sending: Vec<u16>,
}

impl Card {
    /// Connects, negotiates, shares memory, starts the queues and offers all buffers.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn attach(path: &Path, options: &Options) -> Result<Self, DiskError> {
        let (frontend, features) = negotiate(path, options)?;
        let mut card = Self::assemble(frontend, *options, features)?;
        card.share_memory()?;
        for index in 0..card.rings.len() {
            card.start_queue(index)?;
        }
        for pair in 0..options.pairs {
            card.fill(pair)?;
        }
        Ok(card)
    }

    /// Connects anew with the memory and the rings that there are, as a frontend does whose back-end has died; what was in
    /// flight stands in this region.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn attach_again(
        &mut self,
        path: &Path,
        (region, file): (&Inflight, BorrowedFd<'_>),
    ) -> Result<(), DiskError> {
        // One frontend at a time.
        self.frontend.stream().shutdown(Shutdown::Both)?;
        let (frontend, _) = negotiate(path, &self.options)?;
        self.frontend = frontend;
        self.frontend
            .set(request::SET_INFLIGHT_FD, &region.body(), &[file])?;
        self.share_memory()?;
        (0..self.rings.len()).try_for_each(|index| self.start_queue(index))
    }

    fn assemble(frontend: Frontend, options: Options, features: u64) -> Result<Self, DiskError> {
        let rings = u64::from(options.pairs) * 2;
        let page = |bytes: u64| bytes.next_multiple_of(4096);
        let low = page(rings * Ring::SPAN_BYTES);
        let data = page(u64::from(options.pairs) * pair_bytes(&options));
        let memory = GuestMemory::new(&[(LOW, low, 0), (DATA, data, 0x1_0000)])?;
        let packed = features & feature::RING_PACKED != 0;
        let format = if packed {
            Format::Packed
        } else {
            Format::Split
        };
        let ring = |number| {
            let base = LOW + number * Ring::SPAN_BYTES;
            let mut ring = Ring::with_format(&memory, base, options.queue_size, format)?;
            ring.event_idx = features & feature::EVENT_IDX != 0;
            ring.in_order = features & feature::IN_ORDER != 0;
            Ok(ring)
        };
        let rings: Result<_, DiskError> = (0..rings).map(ring).collect();
        let pairs = usize::from(options.pairs);
        Ok(Self {
            frontend,
            rings: rings?,
            memory: Arc::new(memory),
            features,
            options,
            next_slot: vec![0; pairs],
            sending: vec![0; pairs],
        })
    }

    /// SET_MEM_TABLE with all of the memory.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn share_memory(&self) -> Result<(), DiskError> {
        Ok(self.memory.share_with(&self.frontend)?)
    }

    /// Starts a queue at the index where its ring is, and enables it.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn start_queue(&self, index: usize) -> Result<(), DiskError> {
        let ring = &self.rings[index];
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let frontend = &self.frontend;
        frontend.set_size_and_base(number, ring.size, ring.base())?;
        self.resume_queue(index)
    }

    /// Starts a queue that was stopped, where it was.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn resume_queue(&self, index: usize) -> Result<(), DiskError> {
        let ring = &self.rings[index];
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let frontend = &self.frontend;
        let addresses = Addresses {
            desc: self.memory.user_addr(ring.desc)?,
            used: self.memory.user_addr(ring.used)?,
            avail: self.memory.user_addr(ring.avail)?,
        };
        frontend.set_addresses(number, addresses)?;
        frontend.give_events(number, ring.events())?;
        self.enable(index, true)
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn enable(&self, index: usize, enabled: bool) -> Result<(), DiskError> {
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        Ok(self.frontend.enable_queue(number, enabled)?)
    }

    /// Stops a queue; where it goes on.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn stop_queue(&self, index: usize) -> Result<u32, DiskError> {
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        Ok(self.frontend.get_vring_base(number)?)
    }

    /// Guest address of a buffer to receive into.
    #[must_use]
    pub fn buffer(&self, pair: u16, id: u16) -> u64 {
        let first = DATA + u64::from(pair) * pair_bytes(&self.options);
        first + u64::from(id) * u64::from(self.options.buffer_bytes)
    }

    /// Guest address of room for a frame to send.
    #[must_use]
    pub fn slot(&self, pair: u16, slot: u16) -> u64 {
        self.buffer(pair, self.options.buffers) + u64::from(slot) * TX_BYTES
    }

    /// Offers all buffers of a pair that has none.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn fill(&mut self, pair: u16) -> Result<(), DiskError> {
        for id in 0..self.options.buffers {
            self.offer_buffer(pair, id)?;
        }
        let ring = &mut self.rings[usize::from(pair) * 2];
        Ok(ring.publish(&self.memory)?)
    }

    fn offer_buffer(&mut self, pair: u16, id: u16) -> Result<(), DiskError> {
        let desc = Desc::writable(self.buffer(pair, id), self.options.buffer_bytes);
        let ring = &mut self.rings[usize::from(pair) * 2];
        Ok(ring.offer(&self.memory, id, &[desc])?)
    }

    /// Offers a frame behind a header, both in descriptors of their own, to be seen with [`Card::publish`].
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn offer(&mut self, pair: u16, header: &[u8], frame: &[u8]) -> Result<(), DiskError> {
        let at = usize::from(pair);
        while self.sending[at] == TX_SLOTS {
            self.publish(pair)?;
            self.wait_sent(pair)?;
        }
        let slot = self.next_slot[at];
        self.next_slot[at] = (slot + 1) % TX_SLOTS;
        self.sending[at] += 1;
        let addr = self.slot(pair, slot);
        self.memory.write(addr, header)?;
        self.memory.write(addr + 64, frame)?;
        let bytes = |part: &[u8]| u32::try_from(part.len()).unwrap_or(u32::MAX);
        let descs = [
            Desc::readable(addr, bytes(header)),
            Desc::readable(addr + 64, bytes(frame)),
        ];
        let ring = &mut self.rings[at * 2 + 1];
        Ok(ring.offer(&self.memory, slot * 2, &descs)?)
    }

    /// Shows the device what was offered to be sent.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn publish(&mut self, pair: u16) -> Result<(), DiskError> {
        let ring = &mut self.rings[usize::from(pair) * 2 + 1];
        Ok(ring.publish(&self.memory)?)
    }

    /// Waits until one frame was taken.
    fn wait_sent(&mut self, pair: u16) -> Result<(), DiskError> {
        let at = usize::from(pair);
        self.rings[at * 2 + 1].wait_used(&self.memory, PATIENCE)?;
        self.sending[at] -= 1;
        Ok(())
    }

    /// Waits until everything that was offered was taken.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn drain(&mut self, pair: u16) -> Result<(), DiskError> {
        while self.sending[usize::from(pair)] > 0 {
            self.wait_sent(pair)?;
        }
        Ok(())
    }

    /// Sends a frame with this header, and waits until it was taken.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn send_with(&mut self, pair: u16, header: &[u8], frame: &[u8]) -> Result<(), DiskError> {
        self.offer(pair, header, frame)?;
        self.publish(pair)?;
        self.drain(pair)
    }

    /// Sends a frame with nothing left to do.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn send(&mut self, pair: u16, frame: &[u8]) -> Result<(), DiskError> {
        self.send_with(pair, &[0; HEADER_BYTES], frame)
    }

    /// The next frame that came with a pair, if one has; its buffers are offered again.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn poll(&mut self, pair: u16) -> Result<Option<Received>, DiskError> {
        let at = usize::from(pair) * 2;
        let Some(first) = self.rings[at].poll_used(&self.memory)? else {
            return Ok(None);
        };
        let mut bytes = self.take(pair, first.id, first.len)?;
        if first.len == 0 {
            // Given back with nothing in it: whoever had it has died.
            self.rings[at].publish(&self.memory)?;
            return Ok(None);
        }
        if bytes.len() < HEADER_BYTES {
            return Err(std::io::Error::other("less than a header came").into());
        }
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..buffers {
            let used = self.rings[at].wait_used(&self.memory, PATIENCE)?;
            bytes.extend(self.take(pair, used.id, used.len)?);
        }
        self.rings[at].publish(&self.memory)?;
        let frame = bytes.split_off(HEADER_BYTES);
        Ok(Some(Received {
            header: bytes,
            frame,
            buffers,
        }))
    }

    fn take(&mut self, pair: u16, id: u32, bytes: u32) -> Result<Vec<u8>, DiskError> {
        let id = u16::try_from(id).map_err(std::io::Error::other)?;
        let at = self.buffer(pair, id);
        let bytes = self.memory.read(at, bytes as usize)?;
        self.offer_buffer(pair, id)?;
        Ok(bytes)
    }

    /// The next frame that comes with a pair.
    ///
    /// # Errors
    /// See [`DiskError`]; none comes within [`PATIENCE`].
    pub fn receive(&mut self, pair: u16) -> Result<Received, DiskError> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(received) = self.poll(pair)? {
                return Ok(received);
            }
            if Instant::now() >= until {
                return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
            }
            std::thread::yield_now();
        }
    }
}

fn negotiate(path: &Path, options: &Options) -> Result<(Frontend, u64), DiskError> {
    let mut frontend = Frontend::connect(path, PATIENCE)?;
    let offered = frontend.ask_u64(request::GET_FEATURES)?;
    let features = offered & options.features;
    let protocol = frontend.ask_u64(request::GET_PROTOCOL_FEATURES)?;
    let wanted =
        protocol_feature::MQ | protocol_feature::REPLY_ACK | protocol_feature::INFLIGHT_SHMFD;
    frontend.protocol_features = protocol & wanted;
    let words = message::words(&[frontend.protocol_features]);
    frontend.set(request::SET_PROTOCOL_FEATURES, &words, &[])?;
    frontend.set(request::SET_FEATURES, &message::words(&[features]), &[])?;
    Ok((frontend, features))
}

fn pair_bytes(options: &Options) -> u64 {
    let buffers = u64::from(options.buffers) * u64::from(options.buffer_bytes);
    buffers + u64::from(TX_SLOTS) * TX_BYTES
}
