//! A driver of the simplest kind, of either format, whose memory, region and mind can be put back to a moment.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::memory::{GuestMemory, SharedArea, anonymous};
use crate::virtqueue::{Chain, Format, QueueFeatures, QueueRegion, RingError, Virtqueue};
use crate::worker::message::RingLayout;

pub(super) const SIZE: u16 = 8;
const ENTRIES: u16 = 11;
const LAYOUT: RingLayout = RingLayout {
    size: SIZE,
    desc: 0,
    avail: 0x100,
    used: 0x200,
};
const DATA: u64 = 0x400;
/// Indirect tables, one for each buffer ID.
const TABLES: u64 = 0x800;
const MEMORY_BYTES: usize = 0x1000;
/// One in so many requests has its buffers in a table.
const INDIRECT_EVERY: u64 = 3;
/// The second queue's.
const INDEX: u16 = 1;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A request that was made available and not seen as used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offer {
    /// Its head, or buffer ID.
    pub(super) id: u16,
    /// No other has it.
    pub(super) serial: u64,
    descriptors: u16,
}

/// What a driver knows.
#[derive(Debug, Clone)]
pub(super) struct Mind {
    pub(super) open: Vec<Offer>,
    /// Descriptors of the split table, or buffer IDs.
    free: Vec<u16>,
    free_descriptors: u16,
    avail: u16,
    avail_wrap: bool,
    used: u16,
    used_wrap: bool,
    serial: u64,
}

/// All that outlives a backend.
pub(super) struct Moment {
    mind: Mind,
    guest: Vec<u8>,
    region: Vec<u8>,
}

pub(super) struct Driver {
    pub(super) features: QueueFeatures,
    pub(super) mind: Mind,
    memory: Arc<GuestMemory>,
    guest: File,
    pub(super) area: Arc<SharedArea>,
    region: File,
}

fn read(file: &File) -> Vec<u8> {
    let bytes = file.metadata().expect("stat").len();
    let mut all = vec![0; usize::try_from(bytes).expect("small")];
    file.read_exact_at(&mut all, 0).expect("read");
    all
}

impl Driver {
    pub(super) fn new(features: QueueFeatures) -> Self {
        let (memory, guest) = anonymous(MEMORY_BYTES as u64).expect("memory");
        let bytes = features.format().region_bytes(ENTRIES) * 2;
        let (_, region) = anonymous(bytes).expect("region");
        let area = SharedArea::map(region.as_fd(), 0, bytes).expect("mapped");
        let mind = Mind {
            open: Vec::new(),
            free: (0..SIZE).collect(),
            free_descriptors: SIZE,
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
            serial: 1,
        };
        Self {
            features,
            mind,
            memory: Arc::new(memory),
            guest: guest.into(),
            area: Arc::new(area),
            region: region.into(),
        }
    }

    pub(super) fn region(&self) -> QueueRegion {
        let format = self.features.format();
        QueueRegion::new(&self.area, format, INDEX, ENTRIES).expect("it fits")
    }

    /// The bytes of its region.
    pub(super) fn region_bytes(&self) -> Vec<u8> {
        let stride = usize::try_from(self.features.format().region_bytes(ENTRIES)).expect("small");
        read(&self.region).split_off(stride)
    }

    /// Those of the queue before it.
    pub(super) fn other_region_bytes(&self) -> Vec<u8> {
        let stride = usize::try_from(self.features.format().region_bytes(ENTRIES)).expect("small");
        let mut all = read(&self.region);
        all.truncate(stride);
        all
    }

    /// The frontend takes the region away.
    pub(super) fn cut_region(&self) {
        self.region.set_len(0).expect("cut");
    }

    /// Where the next used entry is as the driver has it.
    pub(super) fn used(&self) -> (u16, bool) {
        (self.mind.used, self.mind.used_wrap)
    }

    pub(super) fn set_region(&self, bytes: &[u8]) {
        let stride = self.features.format().region_bytes(ENTRIES);
        self.region.write_all_at(bytes, stride).expect("region");
    }

    /// A queue as it starts, with a base that a frontend may give.
    pub(super) fn queue(&self, base: u32) -> Virtqueue {
        let base = if self.features.packed {
            0x8000_8000
        } else {
            base & 0xffff
        };
        Virtqueue::new(&self.memory, LAYOUT, base, self.features).expect("a queue")
    }

    pub(super) fn moment(&self) -> Moment {
        Moment {
            mind: self.mind.clone(),
            guest: read(&self.guest),
            region: read(&self.region),
        }
    }

    pub(super) fn back_to(&mut self, moment: &Moment) {
        self.mind = moment.mind.clone();
        self.guest.write_all_at(&moment.guest, 0).expect("write");
        self.region.write_all_at(&moment.region, 0).expect("write");
    }

    /// The driver is another one: its ring is as new.
    pub(super) fn reset(&mut self) {
        let serial = self.mind.serial;
        self.mind = Self::new(self.features).mind;
        self.mind.serial = serial;
        self.write(0, &vec![0; MEMORY_BYTES]);
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.guest.write_all_at(bytes, at).expect("guest memory");
    }

    fn half(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.guest.read_exact_at(&mut bytes, at).expect("read");
        u16::from_le_bytes(bytes)
    }

    /// Makes a request of so many descriptors available, if there is room: the first is read, the others written.
    /// One in a few has them in a table.
    pub(super) fn offer(&mut self, buffers: u16) {
        let is_indirect = self.mind.serial.is_multiple_of(INDIRECT_EVERY);
        let descriptors = if is_indirect { 1 } else { buffers };
        let needed = if self.features.packed { 1 } else { descriptors };
        if self.mind.free_descriptors < descriptors || self.mind.free.len() < usize::from(needed) {
            return;
        }
        let taken: Vec<u16> = self.mind.free.drain(..usize::from(needed)).collect();
        let offer = Offer {
            id: taken[0],
            serial: self.mind.serial,
            descriptors,
        };
        self.mind.serial += 1;
        self.mind.free_descriptors -= descriptors;
        let data = DATA + 64 * u64::from(offer.id);
        self.write(data, &offer.serial.to_le_bytes());
        let flags = |step: u16| {
            let next = if step + 1 < buffers { NEXT } else { 0 };
            next | if step > 0 { WRITE } else { 0 }
        };
        let address = |step: u16| data + 8 * u64::from(step);
        let table = TABLES + 64 * u64::from(offer.id);
        if is_indirect {
            for step in 0..buffers {
                let at = table + 16 * u64::from(step);
                // A packed table has the flags behind the ID, which means nothing there.
                let (third, fourth) = if self.features.packed {
                    (0xdead, flags(step) & WRITE)
                } else {
                    (flags(step), step + 1)
                };
                self.descriptor(at, address(step), 8, third, fourth);
            }
        }
        let (address, bytes, flags) = (
            |step: u16| if is_indirect { table } else { address(step) },
            if is_indirect {
                16 * u32::from(buffers)
            } else {
                8
            },
            |step: u16| if is_indirect { INDIRECT } else { flags(step) },
        );
        if self.features.packed {
            self.offer_packed(offer.id, descriptors, bytes, flags, address);
        } else {
            for (step, index) in (0..descriptors).zip(&taken) {
                let next = taken.get(usize::from(step) + 1).copied().unwrap_or(0);
                let at = LAYOUT.desc + 16 * u64::from(*index);
                self.descriptor(at, address(step), bytes, flags(step), next);
            }
            self.mind.free.splice(0..0, taken[1..].iter().copied());
            self.offer_split(offer.id, &taken);
        }
        self.mind.open.push(offer);
    }

    fn descriptor(&self, at: u64, addr: u64, len: u32, third: u16, fourth: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(third.to_le_bytes());
        bytes.extend(fourth.to_le_bytes());
        self.write(at, &bytes);
    }

    fn offer_split(&mut self, head: u16, taken: &[u16]) {
        // Descriptors behind the head belong to it until it is used.
        self.mind.free.retain(|index| !taken.contains(index));
        let slot = LAYOUT.avail + 4 + 2 * u64::from(self.mind.avail % SIZE);
        self.write(slot, &head.to_le_bytes());
        self.mind.avail = self.mind.avail.wrapping_add(1);
        self.write(LAYOUT.avail + 2, &self.mind.avail.to_le_bytes());
    }

    fn offer_packed(
        &mut self,
        id: u16,
        descriptors: u16,
        bytes: u32,
        flags: impl Fn(u16) -> u16,
        address: impl Fn(u16) -> u64,
    ) {
        for step in 0..descriptors {
            let owner = if self.mind.avail_wrap { AVAIL } else { USED };
            let at = LAYOUT.desc + 16 * u64::from(self.mind.avail);
            // Only the last one's ID counts.
            let id = if step + 1 < descriptors { 0xbeef } else { id };
            self.descriptor(at, address(step), bytes, id, flags(step) | owner);
            self.mind.avail += 1;
            if self.mind.avail == SIZE {
                self.mind.avail = 0;
                self.mind.avail_wrap = !self.mind.avail_wrap;
            }
        }
    }

    /// Sees what is used; each must be a request of its own that is not seen yet.
    pub(super) fn look(&mut self) {
        while let Some(id) = self.next_used() {
            let at = self.mind.open.iter().position(|offer| offer.id == id);
            let at = at.unwrap_or_else(|| panic!("{id} is used, which was not available"));
            // In order, those before it are used with it.
            let first = if self.features.in_order { 0 } else { at };
            let used: Vec<Offer> = self.mind.open.drain(first..=at).collect();
            used.into_iter().for_each(|offer| self.ended(offer));
        }
    }

    fn ended(&mut self, offer: Offer) {
        let id = offer.id;
        self.mind.free_descriptors += offer.descriptors;
        if self.features.packed {
            self.mind.free.push(id);
            self.mind.used += offer.descriptors;
            if self.mind.used >= SIZE {
                self.mind.used -= SIZE;
                self.mind.used_wrap = !self.mind.used_wrap;
            }
        } else {
            self.mind.used = self.mind.used.wrapping_add(1);
            self.give_back(id);
        }
    }

    /// The descriptors of a split chain are free.
    fn give_back(&mut self, head: u16) {
        let mut at = head;
        loop {
            self.mind.free.push(at);
            let descriptor = LAYOUT.desc + 16 * u64::from(at);
            if self.half(descriptor + 12) & NEXT == 0 {
                return;
            }
            at = self.half(descriptor + 14);
        }
    }

    fn next_used(&self) -> Option<u16> {
        if self.features.packed {
            let at = LAYOUT.desc + 16 * u64::from(self.mind.used);
            let flags = self.half(at + 14);
            let both = (flags & AVAIL != 0, flags & USED != 0);
            let wrap = self.mind.used_wrap;
            return (both == (wrap, wrap)).then(|| self.half(at + 12));
        }
        let slot = LAYOUT.used + 4 + 8 * u64::from(self.mind.used % SIZE);
        (self.half(LAYOUT.used + 2) != self.mind.used).then(|| self.half(slot))
    }

    /// What a chain that was taken is: its serial number; 0 of none that was offered.
    pub(super) fn serial_of(chain: &Chain) -> u64 {
        let mut bytes = [0; 8];
        chain.readable.copy_out(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// Takes everything that is in flight, and everything that is available: serial numbers, in order.
pub(super) fn take_all(queue: &mut Virtqueue) -> Result<Vec<(u16, u64)>, RingError> {
    let mut taken = Vec::new();
    let mut chain = Chain::default();
    while let Some(id) = queue.pop_again(&mut chain)? {
        taken.push((id, Driver::serial_of(&chain)));
    }
    while let Some(id) = queue.pop(&mut chain)? {
        taken.push((id, Driver::serial_of(&chain)));
    }
    Ok(taken)
}

/// Every format, in order or not.
pub(super) fn features() -> impl Iterator<Item = QueueFeatures> {
    [Format::Split, Format::Packed]
        .into_iter()
        .flat_map(|format| {
            [false, true].map(|in_order| QueueFeatures {
                packed: format == Format::Packed,
                in_order,
                indirect: true,
                ..QueueFeatures::default()
            })
        })
}
