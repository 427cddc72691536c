//! The packed virtqueue against a driver written from the specification (virtio 1.2, 2.8): random
//! chains, ends in any order, batches of any size, many wraps; and what broken drivers write.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_dataplane::memory::{GuestMemory, anonymous};
use bulkhead_dataplane::virtqueue::{Chain, PackedQueue, QueueFeatures, RingError};
use bulkhead_dataplane::worker::message::RingLayout;
use proptest::prelude::*;

const RING: u64 = 0;
const DRIVER_EVENT: u64 = 0x4000;
const DEVICE_EVENT: u64 = 0x4008;
const TABLES: u64 = 0x8000;
const DATA: u64 = 0x10_0000;
const MEMORY_BYTES: u64 = 0x20_0000;
/// Base of a ring at its beginning.
const START: u32 = 0x8000_8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const PLAIN: QueueFeatures = QueueFeatures {
    packed: true,
    event_idx: false,
    indirect: true,
    in_order: false,
};

fn layout(size: u16) -> RingLayout {
    RingLayout {
        size,
        desc: RING,
        avail: DRIVER_EVENT,
        used: DEVICE_EVENT,
    }
}

/// A driver: what it has said, kept as simply as possible.
struct Driver {
    file: File,
    size: u16,
    next_avail: u16,
    avail_wrap: bool,
    next_used: u16,
    used_wrap: bool,
    free: u16,
    ids: Vec<u16>,
    /// Of each ID in flight: descriptors of the ring.
    in_flight: HashMap<u16, u16>,
}

fn place(size: u16) -> (Driver, Arc<GuestMemory>) {
    let (memory, fd) = anonymous(MEMORY_BYTES).expect("memory");
    let driver = Driver {
        file: fd.into(),
        size,
        next_avail: 0,
        avail_wrap: true,
        next_used: 0,
        used_wrap: true,
        free: size,
        ids: (0..size).rev().collect(),
        in_flight: HashMap::new(),
    };
    (driver, Arc::new(memory))
}

fn descriptor(addr: u64, len: u32, id: u16, flags: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&id.to_le_bytes());
    bytes[14..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

impl Driver {
    fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("write");
    }

    fn put(&self, index: u16, bytes: [u8; 16]) {
        self.write(RING + 16 * u64::from(index), &bytes);
    }

    fn avail_flags(&self) -> u16 {
        if self.avail_wrap { AVAIL } else { USED }
    }

    /// Makes one request available: readable and writable lengths; its ID.
    fn add(&mut self, lengths: &[(u32, bool)], indirect: bool) -> Option<u16> {
        let needed = if indirect { 1 } else { lengths.len() };
        let needed = u16::try_from(needed).expect("short");
        if needed > self.free {
            return None;
        }
        let id = self.ids.pop()?;
        let at = |i: usize| DATA + u64::from(id) * 0x400 + 0x40 * i as u64;
        let write = |w: bool| if w { WRITE } else { 0 };
        let mut ring = Vec::new();
        if indirect {
            let table = TABLES + u64::from(id) * 0x100;
            for (i, (len, w)) in lengths.iter().enumerate() {
                // A NEXT flag in a table means nothing.
                let entry = descriptor(at(i), *len, 0xdead, write(*w) | NEXT);
                self.write(table + 16 * i as u64, &entry);
            }
            let bytes = 16 * u32::try_from(lengths.len()).expect("short");
            ring.push((table, bytes, INDIRECT));
        } else {
            for (i, (len, w)) in lengths.iter().enumerate() {
                let next = if i + 1 < lengths.len() { NEXT } else { 0 };
                ring.push((at(i), *len, write(*w) | next));
            }
        }
        self.publish(&ring, id);
        self.in_flight.insert(id, needed);
        self.free -= needed;
        Some(id)
    }

    /// Writes descriptors, the first one's flags last.
    fn publish(&mut self, ring: &[(u64, u32, u16)], id: u16) {
        let head = (self.next_avail, self.avail_flags());
        for (i, (addr, len, flags)) in ring.iter().enumerate() {
            // Only the last one's ID counts.
            let id = if i + 1 == ring.len() { id } else { 0xbeef };
            let shown = if i == 0 { 0 } else { self.avail_flags() };
            let hidden = if i == 0 {
                !self.avail_flags() & (AVAIL | USED)
            } else {
                0
            };
            self.put(
                self.next_avail,
                descriptor(*addr, *len, id, flags | shown | hidden),
            );
            self.next_avail += 1;
            if self.next_avail == self.size {
                self.next_avail = 0;
                self.avail_wrap = !self.avail_wrap;
            }
        }
        let flags = ring[0].2 | head.1;
        self.write(RING + 16 * u64::from(head.0) + 14, &flags.to_le_bytes());
    }

    /// What the device shows next: ID and length.
    fn used(&mut self) -> Option<(u16, u32)> {
        let mut bytes = [0; 16];
        let at = RING + 16 * u64::from(self.next_used);
        self.file.read_exact_at(&mut bytes, at).expect("read");
        let half = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        let flags = half(14);
        let both = (flags & AVAIL != 0, flags & USED != 0);
        if both != (self.used_wrap, self.used_wrap) {
            return None;
        }
        let len = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        assert_eq!(flags & WRITE != 0, len > 0, "a length is there or not");
        let id = half(12);
        let count = self.in_flight.remove(&id).expect("an ID in flight");
        self.ids.push(id);
        self.free += count;
        self.next_used += count;
        if self.next_used >= self.size {
            self.next_used -= self.size;
            self.used_wrap = !self.used_wrap;
        }
        Some((id, len))
    }

    fn wish(&self, off_wrap: u16, flags: u16) {
        self.write(DRIVER_EVENT, &off_wrap.to_le_bytes());
        self.write(DRIVER_EVENT + 2, &flags.to_le_bytes());
    }

    fn device_wish(&self) -> (u16, u16) {
        let mut bytes = [0; 4];
        self.file
            .read_exact_at(&mut bytes, DEVICE_EVENT)
            .expect("read");
        let half = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        (half(0), half(2))
    }
}

/// A step of either side.
#[derive(Debug, Clone)]
enum Step {
    Add(Vec<(u32, bool)>, bool),
    Take,
    /// Ends the one at this place among those taken, with this length.
    End(usize, u32),
    Publish,
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    let lengths = (
        proptest::collection::vec(1..0x40u32, 0..4),
        proptest::collection::vec(1..0x40u32, 1..4),
    )
        .prop_map(|(r, w)| {
            let readable = r.into_iter().map(|len| (len, false));
            readable
                .chain(w.into_iter().map(|len| (len, true)))
                .collect()
        });
    prop_oneof![
        3 => (lengths, any::<bool>()).prop_map(|(l, i)| Step::Add(l, i)),
        3 => Just(Step::Take),
        3 => (any::<usize>(), 0..3u32).prop_map(|(n, len)| Step::End(n, len)),
        1 => Just(Step::Publish),
        1 => Just(Step::Collect),
    ]
}

/// Runs both sides by the steps, and then to the end; how many requests there were.
fn run(size: u16, in_order: bool, steps: &[Step]) -> usize {
    let (mut driver, memory) = place(size);
    let features = QueueFeatures { in_order, ..PLAIN };
    let mut queue = PackedQueue::new(&memory, layout(size), START, features).expect("a queue");
    let mut chain = Chain::default();
    let (mut added, mut taken) = (VecDeque::new(), Vec::new());
    let (mut ended, mut shown) = (HashMap::new(), 0);
    let mut order = VecDeque::new();
    let mut unpublished = false;
    let rest = std::iter::repeat_n(
        [Step::Take, Step::End(0, 1), Step::Publish, Step::Collect],
        usize::from(size) + 1,
    );
    for step in steps.iter().cloned().chain(rest.flatten()) {
        match step {
            Step::Add(lengths, indirect) => {
                if let Some(id) = driver.add(&lengths, indirect) {
                    added.push_back((id, lengths));
                }
            }
            Step::Take => {
                assert_eq!(queue.has_work(), !added.is_empty());
                let got = queue.pop(&mut chain).expect("a good driver");
                let Some((id, lengths)) = added.pop_front() else {
                    assert_eq!(got, None);
                    continue;
                };
                assert_eq!(got, Some(id));
                let sum = |w: bool| {
                    let of = lengths.iter().filter(|(_, write)| *write == w);
                    of.map(|(len, _)| u64::from(*len)).sum::<u64>()
                };
                assert_eq!(chain.readable.bytes(), sum(false));
                assert_eq!(chain.writable.bytes(), sum(true));
                taken.push(id);
                order.push_back(id);
            }
            Step::End(n, len) => {
                if !taken.is_empty() {
                    let id = taken.swap_remove(n % taken.len());
                    ended.insert(id, len);
                    queue.push_used(id, len);
                    unpublished = true;
                }
            }
            Step::Publish => {
                queue.publish();
                unpublished = false;
            }
            Step::Collect => {
                while let Some((id, len)) = driver.used() {
                    assert_eq!(ended.remove(&id), Some(len));
                    if in_order {
                        assert_eq!(order.pop_front(), Some(id));
                    }
                    shown += 1;
                }
                if !unpublished && !in_order {
                    assert!(ended.is_empty(), "everything published is shown");
                }
            }
        }
    }
    assert!(added.is_empty() && taken.is_empty() && ended.is_empty());
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(driver.free, size);
    let base = queue.base();
    assert_eq!(base & 0xffff, base >> 16, "nothing is in flight");
    shown
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_request_comes_and_goes_once(
        size in prop_oneof![Just(1u16), Just(2), Just(7), Just(16), 1..40u16],
        in_order in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..400),
    ) {
        run(size, in_order, &steps);
    }

    /// Calls against the slow way to tell: one descriptor after the other.
    #[test]
    fn the_driver_is_called_when_its_event_is_passed(
        size in 1..12u16,
        batches in proptest::collection::vec((1..12u16, any::<u16>(), any::<bool>()), 1..60),
    ) {
        let (mut driver, memory) = place(size);
        let features = QueueFeatures { event_idx: true, ..PLAIN };
        let mut queue = PackedQueue::new(&memory, layout(size), START, features).expect("a queue");
        let mut chain = Chain::default();
        for (count, event, wrap) in batches {
            let (count, event) = (count.min(size), event % size);
            driver.wish(event | (u16::from(wrap) << 15), 2);
            let mut passed = false;
            for _ in 0..count {
                driver.add(&[(8, true)], false).expect("it is empty");
                let id = queue.pop(&mut chain).expect("good").expect("there");
                // The place that this one is used at.
                passed |= (queue.base() >> 16) == u32::from(event) | (u32::from(wrap) << 15);
                queue.push_used(id, 0);
            }
            prop_assert_eq!(queue.publish(), passed);
            while driver.used().is_some() {}
        }
    }
}

#[test]
fn indexes_wrap_more_than_ten_times_at_every_batch_size() {
    for size in [1u16, 5, 256] {
        for batch in [1u16, 2, size] {
            let (mut driver, memory) = place(size);
            let mut queue = PackedQueue::new(&memory, layout(size), START, PLAIN).expect("a queue");
            let mut chain = Chain::default();
            let mut left = 10 * u32::from(size) + 3;
            while left > 0 {
                let mut ids = Vec::new();
                while ids.len() < usize::from(batch.min(size)) && driver.free > 0 {
                    ids.extend(driver.add(&[(8, true)], false));
                }
                while queue.pop(&mut chain).expect("good").is_some() {}
                for id in &ids {
                    queue.push_used(*id, 1);
                }
                queue.publish();
                for id in &ids {
                    assert_eq!(driver.used(), Some((*id, 1)));
                    left = left.saturating_sub(1);
                }
                assert_eq!(driver.used(), None);
            }
        }
    }
}

#[test]
fn wishes_say_when_a_call_and_a_kick_are_needed() {
    for event_idx in [false, true] {
        let (mut driver, memory) = place(4);
        let features = QueueFeatures { event_idx, ..PLAIN };
        let mut queue = PackedQueue::new(&memory, layout(4), START, features).expect("a queue");
        assert_eq!(driver.device_wish().1, 1, "it is polled at the start");
        let mut chain = Chain::default();
        let mut round = |driver: &mut Driver, queue: &mut PackedQueue| {
            driver.add(&[(8, true)], false).expect("room");
            let id = queue.pop(&mut chain).expect("good").expect("there");
            queue.push_used(id, 0);
            let call = queue.publish();
            driver.used().expect("shown");
            call
        };
        driver.wish(0, 1);
        assert!(!round(&mut driver, &mut queue), "disabled");
        driver.wish(0, 0);
        assert!(round(&mut driver, &mut queue), "enabled");
        // Flags that are reserved, and an event without EVENT_IDX.
        driver.wish(0, 3);
        assert!(round(&mut driver, &mut queue));
        driver.wish(0, 2);
        assert_eq!(round(&mut driver, &mut queue), !event_idx);
        assert!(!queue.publish(), "nothing ended");
        assert!(!queue.arm());
        let wanted = if event_idx { (0, 2) } else { (0, 0) };
        assert_eq!(
            driver.device_wish(),
            wanted,
            "the next is 0 in the second turn"
        );
        driver.add(&[(8, true)], false).expect("room");
        assert!(queue.arm(), "one came in the meantime");
        queue.disarm();
        assert_eq!(driver.device_wish().1, 1);
    }
}

/// Address, length, buffer ID, flags.
type Raw = (u64, u32, u16, u16);

/// A ring of four with these descriptors, all of which the driver shows.
fn broken(descriptors: &[Raw]) -> Result<Option<u16>, RingError> {
    let (driver, memory) = place(4);
    for (i, (addr, len, id, flags)) in descriptors.iter().enumerate() {
        let index = u16::try_from(i).expect("short");
        driver.put(index, descriptor(*addr, *len, *id, flags | AVAIL));
    }
    let mut queue = PackedQueue::new(&memory, layout(4), START, PLAIN).expect("a queue");
    queue.pop(&mut Chain::default())
}

#[test]
fn what_breaks_the_ring_is_an_error() {
    let ok = (DATA, 8, 0, WRITE);
    assert_eq!(broken(&[ok]), Ok(Some(0)));
    let cases: &[(&[Raw], RingError)] = &[
        (
            &[(DATA, 8, 4, WRITE)],
            RingError::OutOfTable { index: 4, size: 4 },
        ),
        (
            &[(DATA, 8, 0xffff, WRITE)],
            RingError::OutOfTable {
                index: 0xffff,
                size: 4,
            },
        ),
        (&[(DATA, 8, 0, NEXT); 4], RingError::ChainTooLong(4)),
        (
            &[(DATA, 8, 0, WRITE | NEXT), (DATA, 8, 0, 0)],
            RingError::ReadableAfterWritable,
        ),
        (
            &[(MEMORY_BYTES - 4, 8, 0, WRITE)],
            RingError::OutsideMemory {
                guest_addr: MEMORY_BYTES - 4,
                bytes: 8,
            },
        ),
        (
            &[(TABLES, 16, 0, INDIRECT | NEXT)],
            RingError::Indirect("a descriptor follows it"),
        ),
        (
            &[(TABLES, 15, 0, INDIRECT)],
            RingError::Indirect("its length is not whole descriptors"),
        ),
        (
            &[(TABLES, 0, 0, INDIRECT)],
            RingError::Indirect("its length is not whole descriptors"),
        ),
        (
            &[(u64::MAX, 16, 0, INDIRECT)],
            RingError::Indirect("it is not in guest memory"),
        ),
        (
            &[(TABLES, 16 * 129, 0, INDIRECT)],
            RingError::ChainTooLong(128),
        ),
    ];
    for (descriptors, error) in cases {
        assert_eq!(broken(descriptors), Err(*error), "{descriptors:?}");
    }
}

#[test]
fn an_id_in_flight_and_more_than_the_ring_has_are_refused() {
    let (driver, memory) = place(4);
    driver.put(0, descriptor(DATA, 8, 1, WRITE | AVAIL));
    driver.put(1, descriptor(DATA, 8, 1, WRITE | AVAIL));
    let mut queue = PackedQueue::new(&memory, layout(4), START, PLAIN).expect("a queue");
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(Some(1)));
    assert_eq!(queue.pop(&mut chain), Err(RingError::HeadInFlight(1)));
    assert_eq!(queue.in_flight(), 1);

    // Four are in flight, and the first is shown again, as of the second turn.
    let (driver, memory) = place(4);
    for index in 0..4 {
        driver.put(index, descriptor(DATA, 8, index, WRITE | AVAIL));
    }
    let mut queue = PackedQueue::new(&memory, layout(4), START, PLAIN).expect("a queue");
    for index in 0..3 {
        assert_eq!(queue.pop(&mut chain), Ok(Some(index)));
    }
    queue.push_used(0, 0);
    driver.put(3, descriptor(DATA, 8, 3, WRITE | NEXT | AVAIL));
    driver.put(0, descriptor(DATA, 8, 0, WRITE | USED));
    // Until it is published, what was used is not the driver's.
    assert_eq!(queue.pop(&mut chain), Err(RingError::Overcommitted(4)));
}

#[test]
fn it_goes_on_where_it_was_and_refuses_what_is_no_place() {
    let (_driver, memory) = place(4);
    let at = |base| PackedQueue::new(&memory, layout(4), base, PLAIN);
    for base in [START, 0x8003_8003, 0x0002_0002, 0x8001_0001] {
        assert_eq!(at(base).expect("a queue").base(), base);
    }
    // DPDK's frontends leave the high half empty.
    assert_eq!(at(0x8002).expect("a queue").base(), 0x8002_8002);
    for base in [4, 0x8004, 0x8004_8000, 0x7fff_ffff, u32::MAX] {
        assert!(matches!(at(base), Err(RingError::Base { .. })), "{base:#x}");
    }
    let sized = |size| PackedQueue::new(&memory, layout(size), START, PLAIN).map(|q| q.size());
    assert_eq!(sized(0), Err(RingError::PackedSize(0)));
    assert_eq!(sized(32769), Err(RingError::PackedSize(32769)));
    assert_eq!(sized(1000), Ok(1000));
    let refused = |layout| PackedQueue::check_place(&memory, &layout).is_err();
    assert!(refused(RingLayout {
        desc: 8,
        ..layout(4)
    }));
    assert!(refused(RingLayout {
        desc: MEMORY_BYTES - 48,
        ..layout(4)
    }));
    assert!(refused(RingLayout {
        avail: 2,
        ..layout(4)
    }));
    assert!(refused(RingLayout {
        used: MEMORY_BYTES - 2,
        ..layout(4)
    }));
}
