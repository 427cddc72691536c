//! A frame into a driver's receive buffers (virtio 1.2, 5.1.6.3 and 5.1.6.4): whole where the driver takes it so, else
//! completed or cut before.
//!
//! Buffers are filled as they are taken. When they turn out to be too few they are put back, last one first, and the
//! driver sees nothing of it: a frame that there is no room for costs no buffer. What a driver can't be given back
//! that way, since it would stand in the way for ever, is a chain without room for any frame: it is shown as used with
//! no bytes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod parts;
mod run;

use super::frame::{Body, Frame, GsoKind, Offload};
use super::header::{HeaderSize, MOST_BYTES, feature};
use super::offload::{Checksums, SegmentHead, Segments, Staging, complete};
use super::parse::ETHERNET_BYTES;
use crate::port::DropReason;
use crate::virtqueue::{Chain, RingError, Virtqueue};
use parts::{Parts, header_of};
use run::Buffers;

/// Buffers that a frame may lie in: these, and one for each so many of its bytes. No driver's are shorter than a few
/// hundred; of shorter ones a sender would look at hundreds for each frame, to find that they are too few.
const FEW_BUFFERS: usize = 32;
const LEAST_OF_BUFFER: u64 = 64;
/// Those that the longest frame may lie in.
const MOST_BUFFERS: usize = 1100;
/// Descriptors of one of them: 64 KiB by pages, with a header, are 18, and the most that a driver is known to give are 47.
/// Whoever sends a frame pays for the walk, so that a longer one would be at others' expense.
pub const MOST_OF_BUFFER: u32 = 128;
/// Chains without room that are given back while one frame is delivered: whoever sends it pays for them.
const MOST_USELESS: usize = 4;
/// Where the number of buffers stands in a header.
const NUM_BUFFERS_AT: u64 = 10;

/// What a driver takes, as it was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receiver {
    header: HeaderSize,
    features: u64,
    /// Longest packet, unless it is one to be cut.
    mtu: u16,
}

/// What has to be done with a frame before a driver takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Complete,
    Cut(Checksums),
}

impl Receiver {
    /// Of negotiated virtio features and the longest packet that the card takes, in bytes from its network header on.
    #[must_use]
    pub fn of(features: u64, mtu: u16) -> Self {
        Self {
            header: HeaderSize::of(features),
            features,
            mtu,
        }
    }

    #[inline]
    fn has(self, feature: u64) -> bool {
        self.features & feature != 0
    }

    #[inline]
    fn before(self, offload: &Offload) -> Before {
        let leaves_checksums = self.has(feature::GUEST_CSUM);
        match offload {
            Offload::NeedsCsum(_) if !leaves_checksums => Before::Complete,
            Offload::Gso(gso) => {
                let takes = self.has(match gso.kind {
                    GsoKind::Tcp4 => feature::GUEST_TSO4,
                    GsoKind::Tcp6 => feature::GUEST_TSO6,
                    GsoKind::Udp4 => feature::GUEST_USO4,
                    GsoKind::Udp6 => feature::GUEST_USO6,
                });
                match (takes, leaves_checksums) {
                    (true, true) => Before::Nothing,
                    (false, true) => Before::Cut(Checksums::Left),
                    (_, false) => Before::Cut(Checksums::Complete),
                }
            }
            Offload::None | Offload::Valid | Offload::NeedsCsum(_) => Before::Nothing,
        }
    }
}

/// What came of a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Frames that the driver gets: more than one if it was cut.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
}

/// Why a driver did not get a frame, or the rest of one that was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is dropped.
    Dropped(DropReason),
    /// The driver broke its ring: the queue retires.
    Broken(RingError),
}

/// What a worker needs to deliver frames, whatever the queue.
#[derive(Debug)]
pub struct Scratch {
    first: Chain,
    next: Chain,
    /// Chains of the frame that is being delivered, and the bytes written to each.
    taken: Vec<(u16, u32)>,
    run: Buffers,
    staging: Staging,
    head: SegmentHead,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            first: Chain::with_capacity(32),
            next: Chain::with_capacity(32),
            taken: Vec::with_capacity(MOST_BUFFERS),
            run: Buffers::default(),
            staging: Staging::default(),
            head: SegmentHead::default(),
        }
    }
}

impl Scratch {
    /// Lets go of guest memory.
    pub fn release(&mut self) {
        self.first.release();
        self.next.release();
        self.run.release();
    }
}

/// Copies a frame into a driver's buffers; the driver sees it with the next [`Virtqueue::publish`]. What was delivered
/// is added to `delivered`, also of a frame whose last pieces found no room.
///
/// # Errors
/// [`DropReason::TooLong`] for the receiver's MTU, [`DropReason::NoRoom`], [`DropReason::BadBuffers`]; a broken ring.
pub fn deliver(
    ring: &mut Virtqueue,
    receiver: Receiver,
    scratch: &mut Scratch,
    frame: &Frame<'_>,
    delivered: &mut Delivered,
) -> Result<(), Refused> {
    if frame.packet_bytes() > usize::from(receiver.mtu) {
        return Err(Refused::Dropped(DropReason::TooLong));
    }
    let Scratch {
        first,
        next,
        taken,
        staging,
        head,
        ..
    } = scratch;
    let mut place = Place {
        ring,
        receiver,
        first,
        next,
        taken,
        delivered,
    };
    let offload = &frame.offload;
    match receiver.before(offload) {
        Before::Nothing => {
            // Who can't leave a checksum isn't told that one is good either.
            let offload = match offload {
                Offload::Valid if !receiver.has(feature::GUEST_CSUM) => &Offload::None,
                offload => offload,
            };
            place.frame(offload, frame.head, frame.body)
        }
        Before::Complete => {
            let staged = staging.stage(frame).ok_or(LOST)?;
            if let Offload::NeedsCsum(csum) = offload {
                complete(staged, *csum);
            }
            place.frame(&Offload::None, staged, Body::Bytes(&[]))
        }
        Before::Cut(checksums) => {
            let staged = staging.stage(frame).ok_or(LOST)?;
            let Offload::Gso(gso) = *offload else {
                return Ok(());
            };
            let l3 = frame.link.l3;
            let segments = Segments::new(staged, gso, l3, checksums);
            let mut segments = segments.ok_or(Refused::Dropped(DropReason::BadOffload))?;
            let each = match checksums {
                Checksums::Complete => Offload::None,
                Checksums::Left => Offload::NeedsCsum(gso.csum),
            };
            while let Some((head, payload)) = segments.next(head) {
                place.frame(&each, head, Body::Bytes(payload))?;
            }
            Ok(())
        }
    }
}

/// Copies frames from the front of `frames` into a driver's buffers, as [`deliver`] does each of them, as far as that is
/// quickly done: how many. The next one, if there is one, is for [`deliver`].
#[inline]
pub fn deliver_usual<'a>(
    ring: &mut Virtqueue,
    receiver: Receiver,
    scratch: &mut Scratch,
    frames: impl Iterator<Item = Frame<'a>> + Clone,
    delivered: &mut Delivered,
) -> usize {
    scratch.run.deliver(ring, receiver, frames, delivered)
}

/// A frame that is longer than its own memory, which can't be.
const LOST: Refused = Refused::Dropped(DropReason::Malformed);

/// Where frames are put.
struct Place<'a> {
    ring: &'a mut Virtqueue,
    receiver: Receiver,
    first: &'a mut Chain,
    next: &'a mut Chain,
    taken: &'a mut Vec<(u16, u32)>,
    delivered: &'a mut Delivered,
}

impl Place<'_> {
    /// One frame, as it is, into one chain or several.
    fn frame(&mut self, offload: &Offload, head: &[u8], body: Body<'_>) -> Result<(), Refused> {
        let size = self.receiver.header.bytes();
        let header = header_of(offload);
        let parts = Parts {
            header: header.get(..size).unwrap_or_default(),
            head,
            body,
        };
        let needed = parts.bytes();
        let id = self.pop_first(size + ETHERNET_BYTES)?;
        if self.first.writable.bytes() < needed {
            self.several(id, &parts)?;
        } else {
            parts.write_whole(&self.first.writable);
            self.ring.push_used(id, length(needed));
        }
        self.delivered.packets += 1;
        self.delivered.bytes += needed - size as u64;
        Ok(())
    }

    /// The frame needs more chains than the one with this id.
    #[inline(never)]
    fn several(&mut self, id: u16, parts: &Parts<'_>) -> Result<(), Refused> {
        if !self.receiver.has(feature::MRG_RXBUF) {
            self.ring.unpop(id);
            return Err(Refused::Dropped(DropReason::NoRoom));
        }
        let needed = parts.bytes();
        self.taken.clear();
        let mut written = parts.write(0, &self.first.writable);
        self.taken.push((id, length(written)));
        while written < needed {
            written += self.continued(parts, written)?;
        }
        if let Ok(count) = u16::try_from(self.taken.len())
            && count > 1
        {
            let count = count.to_le_bytes();
            self.first.writable.copy_in(NUM_BUFFERS_AT, &count);
        }
        for (id, length) in self.taken.drain(..) {
            self.ring.push_used(id, length);
        }
        Ok(())
    }

    /// The chain that a frame begins in: at least the header and the first bytes have room there.
    #[inline]
    fn pop_first(&mut self, least: usize) -> Result<u16, Refused> {
        for _ in 0..=MOST_USELESS {
            let id = match self.ring.pop(self.first) {
                Ok(Some(id)) => id,
                Ok(None) => return Err(Refused::Dropped(DropReason::NoRoom)),
                Err(error) => return Err(Refused::Broken(error)),
            };
            if self.first.writable.bytes() >= least as u64 {
                return Ok(id);
            }
            self.ring.push_used(id, 0);
        }
        Err(Refused::Dropped(DropReason::BadBuffers))
    }

    /// One more chain of a frame of which `written` bytes are in others: how many are in this one.
    fn continued(&mut self, parts: &Parts<'_>, written: u64) -> Result<u64, Refused> {
        let id = match self.ring.pop(self.next) {
            Ok(Some(id)) => id,
            Ok(None) => {
                self.put_back();
                return Err(Refused::Dropped(DropReason::NoRoom));
            }
            Err(error) => {
                self.put_back();
                return Err(Refused::Broken(error));
            }
        };
        let here = parts.write(written, &self.next.writable);
        self.taken.push((id, length(here)));
        let are_too_many = self.taken.len() > most_buffers(parts.bytes());
        if here == 0 || (are_too_many && written + here < parts.bytes()) {
            // In the way of every frame that needs more than one chain: all go back without a byte.
            for (id, _) in self.taken.drain(..) {
                self.ring.push_used(id, 0);
            }
            return Err(Refused::Dropped(DropReason::BadBuffers));
        }
        Ok(here)
    }

    fn put_back(&mut self) {
        while let Some((id, _)) = self.taken.pop() {
            self.ring.unpop(id);
        }
    }
}

/// Buffers that a frame of so many bytes with its header may lie in.
#[inline]
fn most_buffers(bytes: u64) -> usize {
    FEW_BUFFERS + usize::try_from(bytes / LEAST_OF_BUFFER).unwrap_or(0)
}

/// A length in a used entry.
fn length(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
