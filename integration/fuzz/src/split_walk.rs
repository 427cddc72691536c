//! `split_walk`: a driver that writes anything into a split ring, at any time between two looks at it.
//!
//! The model is virtio 1.2, 2.7, as slow as it reads: it copies all memory and walks the copy.

mod runs;

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};

use bulkhead_dataplane::virtqueue::{Chain, QueueFeatures, SplitQueue};
use bulkhead_dataplane::worker::message::RingLayout;

use crate::guest::{Copy, END, Guest, Run, push_run};
use crate::input::Input;
use crate::order::Order;

/// Where the parts of a ring lie unless a run is about that.
const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Indirect tables.
const TABLES: u64 = 0x4000;
/// Longest chain that is followed in a short queue: what a device says it takes (SEG_MAX), header and status.
const LEAST_LONGEST: u32 = 128;
/// Avail entries that are read together at most. A driver may not change one that it has made available (2.7.13); of
/// one that does, what was read ahead counts.
const AHEAD: u16 = 16;

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

/// What a device takes off the ring, as guest addresses.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    head: u16,
    readable: Vec<Run>,
    writable: Vec<Run>,
}

/// The driver broke the ring.
#[derive(Debug, PartialEq, Eq)]
struct Broken;

pub fn run(data: &[u8]) {
    GUEST.with_borrow(|guest| {
        let mut input = Input::new(data);
        let flags = input.u8();
        if flags & 0x80 == 0 {
            guest.clear();
            Driver::new(guest, flags, &mut input).drive(&mut input);
        } else {
            places(guest, &mut input);
        }
    });
}

/// Any size and addresses: a queue starts where all of its ring is in memory, aligned, and nowhere else.
fn places(guest: &Guest, input: &mut Input<'_>) {
    let size = input.u16();
    let mut address = || match input.u8() % 4 {
        0 => u64::from(input.u16()) << 4,
        1 => END.wrapping_sub(u64::from(input.u16())),
        2 => u64::from(input.u32()),
        _ => input.u64(),
    };
    let layout = RingLayout {
        size,
        desc: address(),
        avail: address(),
        used: address(),
    };
    let copy = guest.copy();
    let entries = u64::from(size);
    let lies = |at: u64, bytes: u64, align: u64| {
        at.is_multiple_of(align) && copy.in_one_region(at, bytes).is_some()
    };
    let right = size.is_power_of_two()
        && size <= 32768
        && lies(layout.desc, 16 * entries, 16)
        && lies(layout.avail, 6 + 2 * entries, 2)
        && lies(layout.used, 6 + 8 * entries, 4);
    let queue = SplitQueue::new(&guest.memory, layout, 0, QueueFeatures::default());
    assert_eq!(queue.is_ok(), right, "{layout:?}");
}

/// A queue, its driver, and the model of both.
struct Driver<'a> {
    guest: &'a Guest,
    queue: SplitQueue,
    chain: Chain,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// The model's state.
    next_avail: u16,
    seen_avail: u16,
    /// Entries that were read and not taken.
    ahead: VecDeque<u16>,
    in_flight: BTreeSet<u16>,
    order: Order,
    /// Used entries that were given back since the last publish.
    given_back: Vec<(u16, u32)>,
    published: u16,
}

impl<'a> Driver<'a> {
    fn new(guest: &'a Guest, flags: u8, input: &mut Input<'_>) -> Self {
        let size = 1 << (input.u8() % 9);
        let layout = RingLayout {
            size,
            desc: DESC,
            avail: AVAIL,
            used: USED,
        };
        let features = QueueFeatures {
            event_idx: flags & 1 != 0,
            indirect: flags & 2 != 0,
            in_order: flags & 4 != 0,
            ..QueueFeatures::default()
        };
        let (next_avail, published) = (input.u16(), input.u16());
        guest.write(AVAIL + 2, &next_avail.to_le_bytes());
        guest.write(USED + 2, &published.to_le_bytes());
        let queue = SplitQueue::new(&guest.memory, layout, next_avail, features);
        Self {
            guest,
            queue: queue.expect("a good place"),
            chain: Chain::with_capacity(8),
            size,
            event_idx: features.event_idx,
            indirect: features.indirect,
            next_avail,
            seen_avail: next_avail,
            ahead: VecDeque::new(),
            in_flight: BTreeSet::new(),
            order: Order::new(features.in_order),
            given_back: Vec::new(),
            published,
        }
    }

    fn drive(mut self, input: &mut Input<'_>) {
        while !input.is_empty() {
            match input.u8() % 8 {
                0 => self.describe(DESC, self.size, input),
                1 => self.describe(TABLES, 256, input),
                2 => self.make_available(input),
                3 => {
                    // Anywhere but in the used ring, which the model reads back.
                    let at = u64::from(input.u16());
                    let most = usize::from(input.u8() % 32);
                    let bytes = input.bytes(most);
                    let used = USED..USED + 0x1000;
                    if !used.contains(&at) && !used.contains(&(at + bytes.len() as u64)) {
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
                6 => self.publish(),
                _ => {
                    if self.arm().is_err() {
                        return;
                    }
                    self.queue.disarm();
                }
            }
        }
        self.publish();
    }

    /// Writes a descriptor of a table with `entries`.
    fn describe(&mut self, table: u64, entries: u16, input: &mut Input<'_>) {
        let index = input.below(entries);
        let addr = match input.u8() % 8 {
            0 => input.u64(),
            1 => END - u64::from(input.u16() % 64),
            2 => 0x1_0000 - u64::from(input.u16() % 64),
            3 => TABLES + 16 * u64::from(input.u8()),
            _ => u64::from(input.u16()),
        };
        let len = match input.u8() % 4 {
            0 => input.u32(),
            1 => 16 * u32::from(input.u8()),
            _ => u32::from(input.u16()),
        };
        let flags = u16::from(input.u8() % 8);
        let next = u16::from(input.u8());
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(addr.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.guest.write(table + 16 * u64::from(index), &bytes);
    }

    /// Makes heads available: as many as it says, wherever the index is then.
    fn make_available(&mut self, input: &mut Input<'_>) {
        let count = input.u8() % 8;
        let at = self.guest.copy().u16(AVAIL + 2);
        for offset in 0..u16::from(count) {
            let slot = at.wrapping_add(offset) & (self.size - 1);
            let head = u16::from(input.u8());
            let entry = AVAIL + 4 + 2 * u64::from(slot);
            self.guest.write(entry, &head.to_le_bytes());
        }
        let jump = if input.u8() == 0 {
            input.u16()
        } else {
            u16::from(count)
        };
        let at = at.wrapping_add(jump);
        self.guest.write(AVAIL + 2, &at.to_le_bytes());
    }

    /// Takes up to `most` chains; each must be the model's.
    fn take(&mut self, most: u8) -> Result<(), Broken> {
        let copy = self.guest.copy();
        for _ in 0..=most % 16 {
            let right = self.model_take(&copy);
            let taken = match self.queue.pop(&mut self.chain) {
                Ok(None) => Ok(None),
                Ok(Some(head)) => Ok(Some(Taken {
                    head,
                    readable: self.guest.runs(&self.chain.readable),
                    writable: self.guest.runs(&self.chain.writable),
                })),
                Err(_) => Err(Broken),
            };
            assert_eq!(taken, right);
            assert_eq!(self.queue.next_avail(), self.next_avail);
            assert_eq!(usize::from(self.queue.in_flight()), self.in_flight.len());
            if taken?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Whether there is something to take (2.7.13).
    fn model_has_work(&mut self, copy: &Copy) -> Result<bool, Broken> {
        if self.seen_avail == self.next_avail {
            let index = copy.u16(AVAIL + 2);
            if index.wrapping_sub(self.next_avail) > self.size {
                return Err(Broken);
            }
            self.seen_avail = index;
        }
        Ok(self.seen_avail != self.next_avail)
    }

    fn model_take(&mut self, copy: &Copy) -> Result<Option<Taken>, Broken> {
        if self.ahead.is_empty() {
            if !self.model_has_work(copy)? {
                return Ok(None);
            }
            let count = self.seen_avail.wrapping_sub(self.next_avail).min(AHEAD);
            let slot = |step| u64::from(self.next_avail.wrapping_add(step) % self.size);
            let entry = |step| copy.u16(AVAIL + 4 + 2 * slot(step));
            self.ahead = (0..count).map(entry).collect();
        }
        let Some(head) = self.ahead.pop_front() else {
            return Ok(None);
        };
        if head >= self.size || self.in_flight.contains(&head) {
            return Err(Broken);
        }
        let taken = self.model_walk(copy, head)?;
        self.in_flight.insert(head);
        self.order.taken(head);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(taken))
    }

    /// Follows a chain (2.7.5), through one indirect table at its end (2.7.5.3).
    fn model_walk(&self, copy: &Copy, head: u16) -> Result<Taken, Broken> {
        let longest = u32::from(self.size).max(LEAST_LONGEST);
        let (mut table, mut entries) = (DESC, u64::from(self.size));
        let (mut index, mut steps, mut inside) = (u64::from(head), 0, false);
        let (mut readable, mut writable, mut bytes) = (Vec::new(), Vec::new(), 0);
        loop {
            if index >= entries || steps == longest {
                return Err(Broken);
            }
            let at = table + 16 * index;
            let (addr, len) = (copy.u64(at), copy.u32(at + 8));
            let (flags, next) = (copy.u16(at + 12), copy.u16(at + 14));
            if flags & 4 != 0 {
                let whole = len > 0 && len.is_multiple_of(16);
                let there = copy.in_one_region(addr, u64::from(len)).is_some();
                if inside || !self.indirect || flags & 1 != 0 || !whole || !there {
                    return Err(Broken);
                }
                (table, entries) = (addr, u64::from(len / 16));
                (index, steps, inside) = (0, 0, true);
                continue;
            }
            let is_writable = flags & 2 != 0;
            if (!is_writable && !writable.is_empty()) || !copy.has(addr, u64::from(len)) {
                return Err(Broken);
            }
            bytes += u64::from(len);
            if bytes > 1 << 32 {
                return Err(Broken);
            }
            let runs = if is_writable {
                &mut writable
            } else {
                &mut readable
            };
            push_run(runs, addr, u64::from(len));
            if flags & 1 == 0 {
                return Ok(Taken {
                    head,
                    readable,
                    writable,
                });
            }
            index = u64::from(next);
            steps += 1;
        }
    }

    fn give_back(&mut self, input: &mut Input<'_>) {
        let which = usize::from(input.u8());
        let len = input.u32();
        let waiting = self.order.waiting(self.in_flight.iter().copied());
        let count = waiting.len().max(1);
        let Some(head) = waiting.get(which % count).copied() else {
            return;
        };
        self.queue.push_used(head, len);
        for (head, len) in self.order.ended(head, len) {
            self.in_flight.remove(&head);
            self.given_back.push((head, len));
        }
    }

    /// Publishes what was given back: entries, index, and whether the driver is called (2.7.7, 2.7.8).
    fn publish(&mut self) {
        let before = self.guest.copy();
        let calls = self.queue.publish();
        let after = self.guest.copy();
        let old = self.published;
        for (head, len) in self.given_back.drain(..) {
            let entry = USED + 4 + 8 * u64::from(self.published % self.size);
            // A later entry of the batch may lie over an earlier one only after a whole turn.
            let there = (after.u32(entry), after.u32(entry + 4));
            assert_eq!(
                there,
                (u32::from(head), len),
                "used entry {}",
                self.published
            );
            self.published = self.published.wrapping_add(1);
        }
        assert_eq!(after.u16(USED + 2), self.published, "the used index");
        let new = self.published;
        let wanted = if self.event_idx {
            let event = before.u16(AVAIL + 4 + 2 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            before.u16(AVAIL) & 1 == 0
        };
        assert_eq!(calls, new != old && wanted, "the driver is called");
    }

    /// Asks to be kicked: the wish is written, and what came meanwhile is seen (2.7.10).
    fn arm(&mut self) -> Result<(), Broken> {
        let right = {
            let copy = self.guest.copy();
            self.model_has_work(&copy)
        };
        assert_eq!(self.queue.arm().map_err(|_| Broken), right);
        let after = self.guest.copy();
        if self.event_idx {
            let event = after.u16(USED + 4 + 8 * u64::from(self.size));
            assert_eq!(event, self.next_avail, "the avail event");
        } else {
            assert_eq!(after.u16(USED), 0, "NO_NOTIFY");
        }
        right.map(drop)
    }
}
