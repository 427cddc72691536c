//! `packed_walk`: a driver that writes anything into a packed ring, at any time between two looks at it.
//!
//! The model is virtio 1.2, 2.8, as slow as it reads.

mod runs;

use std::cell::RefCell;
use std::collections::BTreeMap;

use bulkhead_dataplane::virtqueue::{Chain, PackedQueue, QueueFeatures};
use bulkhead_dataplane::worker::message::RingLayout;

use crate::guest::{Copy, END, Guest, Run, push_run};
use crate::input::Input;
use crate::order::Order;

const RING: u64 = 0;
/// Event suppression: what the driver wants, what the device wants.
const DRIVER: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
/// Indirect tables.
const TABLES: u64 = 0x4000;
/// Longest table that is followed in a short queue: what a device says it takes, header and status.
const LEAST_LONGEST: u32 = 128;
/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

/// What a device takes off the ring, as guest addresses.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    id: u16,
    readable: Vec<Run>,
    writable: Vec<Run>,
}

/// The driver broke the ring.
#[derive(Debug, PartialEq, Eq)]
struct Broken;

/// A place in the ring and the wrap counter there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    /// One place further.
    fn next(self, size: u16) -> Self {
        if self.index + 1 < size {
            let index = self.index + 1;
            return Self { index, ..self };
        }
        Self {
            index: 0,
            wrap: !self.wrap,
        }
    }

    fn further(self, by: u16, size: u16) -> Self {
        (0..by).fold(self, |place, _| place.next(size))
    }

    /// As SET_VRING_BASE and the event areas have it.
    fn word(self) -> u16 {
        self.index | if self.wrap { 0x8000 } else { 0 }
    }

    fn descriptor(self) -> u64 {
        RING + 16 * u64::from(self.index)
    }
}

pub fn run(data: &[u8]) {
    GUEST.with_borrow(|guest| {
        guest.clear();
        let mut input = Input::new(data);
        Driver::new(guest, &mut input).drive(&mut input);
    });
}

/// A queue, its driver, and the model of both.
struct Driver<'a> {
    guest: &'a Guest,
    queue: PackedQueue,
    chain: Chain,
    size: u16,
    features: QueueFeatures,
    /// Where the driver is to write next: a mere help, it may write anywhere.
    driver: Place,
    /// The model's state.
    avail: Place,
    used: Place,
    published: Place,
    /// Descriptors of each buffer in flight.
    in_flight: BTreeMap<u16, u16>,
    order: Order,
    /// Descriptors that were taken and are not published as used; of these, those given back.
    taken: u16,
    given_back: u16,
    /// The first used descriptor of a batch, and its flags.
    first: Option<(Place, u16)>,
}

impl<'a> Driver<'a> {
    fn new(guest: &'a Guest, input: &mut Input<'_>) -> Self {
        let flags = input.u8();
        let size = u16::from(input.u8()) + 1;
        let layout = RingLayout {
            size,
            desc: RING,
            avail: DRIVER,
            used: DEVICE,
        };
        let features = QueueFeatures {
            packed: true,
            event_idx: flags & 1 != 0,
            indirect: flags & 2 != 0,
            in_order: flags & 4 != 0,
        };
        let start = Place {
            index: input.below(size),
            wrap: flags & 8 != 0,
        };
        let base = u32::from(start.word());
        let base = if flags & 16 != 0 {
            base | base << 16
        } else {
            base
        };
        let queue = PackedQueue::new(&guest.memory, layout, base, features);
        Self {
            guest,
            queue: queue.expect("a good place"),
            chain: Chain::with_capacity(8),
            size,
            features,
            driver: start,
            avail: start,
            used: start,
            published: start,
            in_flight: BTreeMap::new(),
            order: Order::new(features.in_order),
            taken: 0,
            given_back: 0,
            first: None,
        }
    }

    fn drive(mut self, input: &mut Input<'_>) {
        while !input.is_empty() {
            match input.u8() % 8 {
                0 | 1 => self.make_available(input),
                2 => self.fill_table(input),
                3 => {
                    // Anywhere but in the device's area, which the model reads back.
                    let at = u64::from(input.u16());
                    let most = usize::from(input.u8() % 32);
                    let bytes = input.bytes(most);
                    if at >= DEVICE + 4 || at + (bytes.len() as u64) <= DEVICE {
                        self.guest.write(at, bytes);
                    }
                }
                4 => {
                    let most = input.u8();
                    if most & 0x80 != 0 {
                        self.take_run(most, input);
                    } else if self.take(most).is_err() {
                        return;
                    }
                }
                5 => self.give_back(input),
                6 => {
                    let wish = u32::from(input.u16()) | (u32::from(input.u8() & 3) << 16);
                    self.guest.write(DRIVER, &wish.to_le_bytes());
                    self.publish();
                }
                _ => self.arm(),
            }
        }
        self.publish();
    }

    /// The fields of a descriptor but for its flags.
    fn fields(input: &mut Input<'_>) -> (Vec<u8>, u8) {
        let addr = match input.u8() % 8 {
            0 => input.u64(),
            1 => END - u64::from(input.u16() % 64),
            2 => 0x1_0000 - u64::from(input.u16() % 64),
            3 => TABLES + 16 * u64::from(input.u8()),
            _ => u64::from(input.u16()),
        };
        let len = match input.u8() % 4 {
            0 => input.u32(),
            1 => 16 * u32::from(input.u8() % 8),
            _ => u32::from(input.u16()),
        };
        let id = u16::from(input.u8());
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(addr.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        (bytes, input.u8())
    }

    /// Writes the next descriptor, mostly as an available one.
    fn make_available(&mut self, input: &mut Input<'_>) {
        let (mut bytes, choice) = Self::fields(input);
        let wrap = self.driver.wrap != (choice & 0xf0 == 0xf0);
        let flags = u16::from(choice & 7) | if wrap { AVAIL } else { USED };
        bytes.extend(flags.to_le_bytes());
        self.guest.write(self.driver.descriptor(), &bytes);
        self.driver = self.driver.next(self.size);
    }

    fn fill_table(&mut self, input: &mut Input<'_>) {
        let index = u64::from(input.u8());
        let (mut bytes, choice) = Self::fields(input);
        bytes.extend(u16::from(choice & 7).to_le_bytes());
        self.guest.write(TABLES + 16 * index, &bytes);
    }

    /// Takes up to `most` chains; each must be the model's.
    fn take(&mut self, most: u8) -> Result<(), Broken> {
        let copy = self.guest.copy();
        for _ in 0..=most % 16 {
            let right = self.model_take(&copy);
            let taken = match self.queue.pop(&mut self.chain) {
                Ok(None) => Ok(None),
                Ok(Some(id)) => Ok(Some(Taken {
                    id,
                    readable: self.guest.runs(&self.chain.readable),
                    writable: self.guest.runs(&self.chain.writable),
                })),
                Err(_) => Err(Broken),
            };
            assert_eq!(taken, right);
            assert_eq!(usize::from(self.queue.in_flight()), self.in_flight.len());
            let base = u32::from(self.avail.word()) | (u32::from(self.used.word()) << 16);
            assert_eq!(self.queue.base(), base, "where the ring goes on");
            if taken?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Whether the next descriptor is available (2.8.1).
    fn model_has_work(&self, copy: &Copy) -> bool {
        let flags = copy.u16(self.avail.descriptor() + 14);
        (flags & AVAIL != 0) == self.avail.wrap && (flags & USED != 0) != self.avail.wrap
    }

    fn model_take(&mut self, copy: &Copy) -> Result<Option<Taken>, Broken> {
        if !self.model_has_work(copy) {
            return Ok(None);
        }
        let (taken, count) = self.model_walk(copy)?;
        let room = self.size - self.taken;
        if taken.id >= self.size || self.in_flight.contains_key(&taken.id) || count > room {
            return Err(Broken);
        }
        self.in_flight.insert(taken.id, count);
        self.order.taken(taken.id);
        self.taken += count;
        self.avail = self.avail.further(count, self.size);
        Ok(Some(taken))
    }

    /// Follows a chain (2.8.6), through a table in place of its last buffer (2.8.7); and how many
    /// descriptors of the ring it has.
    fn model_walk(&self, copy: &Copy) -> Result<(Taken, u16), Broken> {
        let mut buffers = Vec::new();
        let mut place = self.avail;
        for count in 1..=self.size {
            let at = place.descriptor();
            let (flags, id) = (copy.u16(at + 14), copy.u16(at + 12));
            let (addr, len) = (copy.u64(at), copy.u32(at + 8));
            if flags & INDIRECT != 0 {
                let whole = len > 0 && len.is_multiple_of(16);
                let there = copy.in_one_region(addr, u64::from(len)).is_some();
                let longest = u32::from(self.size).max(LEAST_LONGEST);
                if !self.features.indirect
                    || flags & NEXT != 0
                    || !whole
                    || !there
                    || len / 16 > longest
                {
                    return Err(Broken);
                }
                for entry in (addr..addr + u64::from(len)).step_by(16) {
                    let flags = copy.u16(entry + 14);
                    if flags & INDIRECT != 0 {
                        return Err(Broken);
                    }
                    buffers.push((copy.u64(entry), copy.u32(entry + 8), flags & WRITE != 0));
                }
            } else {
                buffers.push((addr, len, flags & WRITE != 0));
            }
            if flags & INDIRECT != 0 || flags & NEXT == 0 {
                return Ok((collect(copy, id, &buffers)?, count));
            }
            place = place.next(self.size);
        }
        Err(Broken)
    }

    fn give_back(&mut self, input: &mut Input<'_>) {
        let which = usize::from(input.u8());
        let len = input.u32();
        let waiting = self.order.waiting(self.in_flight.keys().copied());
        let count = waiting.len().max(1);
        let Some(id) = waiting.get(which % count).copied() else {
            return;
        };
        self.queue.push_used(id, len);
        let copy = self.guest.copy();
        self.has_ended(&copy, id, len);
    }

    /// A chain has ended, in the memory as it is then.
    fn has_ended(&mut self, copy: &Copy, id: u16, len: u32) {
        for (id, len) in self.order.ended(id, len) {
            let count = self.in_flight.remove(&id).expect("it is in flight");
            let at = self.used.descriptor();
            let there = (copy.u32(at + 8), copy.u16(at + 12));
            assert_eq!(there, (len, id), "length and buffer of {:?}", self.used);
            let bits = if self.used.wrap { AVAIL | USED } else { 0 };
            let flags = bits | if len > 0 { WRITE } else { 0 };
            if self.first.is_none() {
                self.first = Some((self.used, flags));
            } else {
                assert_eq!(copy.u16(at + 14), flags, "flags of {:?}", self.used);
            }
            self.used = self.used.further(count, self.size);
            self.given_back += count;
        }
    }

    /// Publishes what was given back: the batch's first flags, and whether the driver is called (2.8.10).
    fn publish(&mut self) {
        let before = self.guest.copy();
        let calls = self.queue.publish();
        let Some((first, flags)) = self.first.take() else {
            assert!(!calls, "a call for nothing");
            return;
        };
        let after = self.guest.copy();
        assert_eq!(
            after.u16(first.descriptor() + 14),
            flags,
            "flags of {first:?}"
        );
        let wish = before.u32(DRIVER);
        let event = u16::try_from(wish & 0xffff).expect("16 bits");
        let passed = event & 0x7fff >= self.size
            || (0..self.given_back).any(|by| self.published.further(by, self.size).word() == event);
        let wanted = match wish >> 16 & 3 {
            1 => false,
            2 if self.features.event_idx => passed,
            _ => true,
        };
        assert_eq!(calls, wanted, "the driver is called");
        self.taken -= std::mem::take(&mut self.given_back);
        self.published = self.used;
    }

    /// Asks to be kicked: the wish is written, and what came meanwhile is seen.
    fn arm(&mut self) {
        let right = self.model_has_work(&self.guest.copy());
        assert_eq!(self.queue.arm(), right);
        let wish = if self.features.event_idx {
            u32::from(self.avail.word()) | 2 << 16
        } else {
            0
        };
        assert_eq!(self.guest.copy().u32(DEVICE), wish, "the device's wish");
        self.queue.disarm();
        assert_eq!(self.guest.copy().u32(DEVICE), 1 << 16, "no wish");
    }
}

/// The buffers of a chain: readable ones first, all in memory, no more than 2^32 bytes.
fn collect(copy: &Copy, id: u16, buffers: &[(u64, u32, bool)]) -> Result<Taken, Broken> {
    let (mut readable, mut writable, mut bytes) = (Vec::new(), Vec::new(), 0);
    for (addr, len, is_writable) in buffers.iter().copied() {
        let len = u64::from(len);
        bytes += len;
        if (!is_writable && !writable.is_empty()) || !copy.has(addr, len) || bytes > 1 << 32 {
            return Err(Broken);
        }
        let runs = if is_writable {
            &mut writable
        } else {
            &mut readable
        };
        push_run(runs, addr, len);
    }
    Ok(Taken {
        id,
        readable,
        writable,
    })
}
