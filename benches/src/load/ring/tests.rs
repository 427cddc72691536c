//! Both formats against the echo, and against devices that write nonsense.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use super::packed::Packed;
use super::split::Split;
use super::{Events, Ring};
use crate::load::echo::Echo;
use crate::load::error::QueueError;
use crate::load::memory::Memory;
use crate::load::requests::{Layout, Requests, Shape};
use crate::load::source::Kind;

const QUIET: Events = Events {
    event_idx: false,
    calls: false,
};
const BY_INDEX: Events = Events {
    event_idx: true,
    calls: false,
};

fn shape(indirect: bool, segments: u16) -> Shape {
    Shape {
        depth: 16,
        block_bytes: 4096,
        segments,
        indirect,
        ring_size: 128,
    }
}

/// A queue's place, in memory of its own.
struct Place {
    memory: Memory,
    layout: Layout,
    shape: Shape,
}

impl Place {
    fn new(shape: Shape) -> Self {
        let layout = Layout::new(0, &shape);
        Self {
            memory: Memory::new(layout.end).expect("maps"),
            layout,
            shape,
        }
    }

    fn requests(&self) -> Requests<'_> {
        Requests::new(&self.memory, self.layout, self.shape).expect("fits")
    }

    fn split(&self, events: Events) -> Split<'_> {
        Split::new(&self.memory, &self.layout, &self.requests(), events).expect("fits")
    }

    fn packed(&self, events: Events) -> Packed<'_> {
        Packed::new(&self.memory, &self.layout, &self.requests(), events).expect("fits")
    }

    /// A 16-bit word of what the device (or the driver) writes.
    fn word(&self, part: usize, at: usize) -> &AtomicU16 {
        &self
            .memory
            .slice::<AtomicU16>(part + at, 1)
            .expect("inside")[0]
    }
}

/// Rounds of batches of any size with both directions: each request comes back once, with success.
fn exchange(place: &Place, packed: bool, ring: &mut impl Ring) {
    let requests = place.requests();
    let (memory, layout) = (&place.memory, &place.layout);
    let mut echo = Echo::new(memory, layout, &place.shape, packed, 1 << 20).expect("fits");
    for round in 0..2000u16 {
        let batch = 1 + round % place.shape.depth;
        for slot in 0..batch {
            let kind = if (slot + round) % 3 == 0 {
                Kind::Write
            } else {
                Kind::Read
            };
            requests.prepare(slot, kind, u64::from(slot));
            ring.offer(&requests, slot, kind);
        }
        assert!(!ring.publish(), "the echo wants no kicks");
        assert!(echo.step().expect("sound chains"));
        for slot in 0..batch {
            let used = ring.poll().expect("sound").expect("answered");
            assert_eq!(used.slot, slot, "round {round}");
            assert_eq!(requests.status(slot), 0);
            let read = (slot + round) % 3 != 0;
            assert_eq!(used.len, if read { 4097 } else { 1 });
        }
        assert_eq!(ring.poll(), Ok(None));
        ring.rearm();
        assert!(!echo.step().expect("nothing there"));
    }
}

#[test]
fn requests_go_there_and_back_in_either_format() {
    for indirect in [false, true] {
        for segments in [1, 4] {
            for events in [QUIET, BY_INDEX] {
                let place = Place::new(shape(indirect, segments));
                let mut packed = place.packed(events);
                exchange(&place, true, &mut packed);
                // The echo tells a driver with EVENT_IDX nothing: kicks would be wanted by index.
                if !events.event_idx {
                    let place = Place::new(shape(indirect, segments));
                    exchange(&place, false, &mut place.split(events));
                }
            }
        }
    }
}

#[test]
fn a_request_beyond_the_disk_is_refused_by_the_echo() {
    let place = Place::new(shape(false, 1));
    let (requests, mut ring) = (place.requests(), place.split(QUIET));
    let mut echo = Echo::new(&place.memory, &place.layout, &place.shape, false, 4096);
    let echo = echo.as_mut().expect("fits");
    for (sector, status) in [(0, 0), (1, 1), (u64::MAX >> 9, 1)] {
        requests.prepare(0, Kind::Read, sector);
        ring.offer(&requests, 0, Kind::Read);
        ring.publish();
        echo.step().expect("a sound chain");
        assert_eq!(requests.status(0), status, "sector {sector}");
    }
}

#[test]
fn a_split_device_that_writes_nonsense_is_an_error() {
    let place = Place::new(shape(false, 1));
    let (requests, mut ring) = (place.requests(), place.split(QUIET));
    assert_eq!(ring.poll(), Ok(None));
    for slot in 0..2 {
        ring.offer(&requests, slot, Kind::Read);
    }
    ring.publish();
    let index = place.word(place.layout.device, 2);
    for jump in [3, 200, u16::MAX] {
        index.store(jump, Relaxed);
        let expected = QueueError::UsedJumped {
            last: 0,
            now: jump,
            in_flight: 2,
        };
        assert_eq!(ring.poll(), Err(expected));
    }
    index.store(2, Relaxed);
    let id = &place
        .memory
        .slice::<AtomicU32>(place.layout.device + 4, 1)
        .expect("inside")[0];
    // Within a chain, behind the last chain, behind the ring, and far away.
    for wrong in [1, 16 * 3, 128, u32::MAX] {
        id.store(wrong, Relaxed);
        assert_eq!(ring.poll(), Err(QueueError::NotInFlight { id: wrong }));
    }
    id.store(3, Relaxed);
    assert_eq!(ring.poll().expect("sound").map(|used| used.slot), Some(1));
}

#[test]
fn a_packed_device_that_writes_nonsense_is_an_error() {
    let place = Place::new(shape(false, 1));
    let (requests, mut ring) = (place.requests(), place.packed(QUIET));
    assert_eq!(ring.poll(), Ok(None));
    ring.offer(&requests, 0, Kind::Read);
    ring.publish();
    assert_eq!(ring.poll(), Ok(None), "available is not used");
    let word = &place
        .memory
        .slice::<AtomicU64>(place.layout.desc + 8, 1)
        .expect("inside")[0];
    let used = |id: u64| 1u64 << 55 | 1 << 63 | id << 32 | 77;
    for wrong in [16, 0xffff] {
        word.store(used(wrong), Relaxed);
        let id = u32::try_from(wrong).expect("small");
        assert_eq!(ring.poll(), Err(QueueError::NotInFlight { id }));
    }
    word.store(used(5), Relaxed);
    let used = ring.poll().expect("sound").expect("used");
    assert_eq!((used.slot, used.len), (5, 77));
}

#[test]
fn kicks_are_sent_as_the_device_wishes() {
    let place = Place::new(shape(false, 1));
    let (requests, mut ring) = (place.requests(), place.split(QUIET));
    let mut publish = || {
        ring.offer(&requests, 0, Kind::Read);
        ring.publish()
    };
    assert!(publish(), "a fresh device wants kicks");
    place.word(place.layout.device, 0).store(1, Relaxed);
    assert!(!publish());

    let place = Place::new(shape(false, 1));
    let mut ring = place.split(BY_INDEX);
    let wish = place.word(place.layout.device, 4 + 8 * 128);
    for (wanted_at, batch, expected) in [(0, 1, true), (5, 2, false), (4, 2, true), (5, 1, true)] {
        wish.store(wanted_at, Relaxed);
        for slot in 0..batch {
            ring.offer(&requests, slot, Kind::Read);
        }
        assert_eq!(ring.publish(), expected, "at {wanted_at}");
    }

    let place = Place::new(shape(false, 1));
    let mut ring = place.packed(BY_INDEX);
    let [at, how] = [0, 2].map(|at| place.word(place.layout.device, at));
    // Places of requests of three descriptors each, in the first round.
    for (wanted_at, flags, expected) in [(0, 1, false), (0, 0, true), (5, 2, false), (11, 2, true)]
    {
        at.store(0x8000 | wanted_at, Relaxed);
        how.store(flags, Relaxed);
        ring.offer(&requests, 0, Kind::Read);
        assert_eq!(ring.publish(), expected, "{wanted_at} {flags}");
    }
}

#[test]
fn calls_come_only_where_they_are_asked_for() {
    let calls = |events| Events {
        calls: true,
        ..events
    };
    let place = Place::new(shape(false, 1));
    let flags = place.word(place.layout.driver, 0);
    let _ring = place.split(QUIET);
    assert_eq!(flags.load(Relaxed), 1);
    let _ring = place.split(calls(QUIET));
    assert_eq!(flags.load(Relaxed), 0);
    let used_event = place.word(place.layout.driver, 4 + 2 * 128);
    let _ring = place.split(BY_INDEX);
    assert_eq!(used_event.load(Relaxed), u16::MAX, "passed already");
    let mut ring = place.split(calls(BY_INDEX));
    assert_eq!(used_event.load(Relaxed), 0);
    ring.last_used = 7;
    ring.rearm();
    assert_eq!(used_event.load(Relaxed), 7);

    let place = Place::new(shape(false, 1));
    let [at, how] = [0, 2].map(|at| place.word(place.layout.driver, at));
    for (events, flags) in [
        (QUIET, 1),
        (BY_INDEX, 1),
        (calls(QUIET), 0),
        (calls(BY_INDEX), 2),
    ] {
        let _ring = place.packed(events);
        assert_eq!(
            (at.load(Relaxed), how.load(Relaxed)),
            (0x8000, flags),
            "{events:?}"
        );
    }
}

#[test]
fn a_driver_without_calls_keeps_its_index_behind_the_device() {
    let place = Place::new(shape(false, 1));
    let mut ring = place.split(BY_INDEX);
    let used_event = place.word(place.layout.driver, 4 + 2 * 128);
    for used in 0..=u16::MAX {
        ring.last_used = used;
        ring.rearm();
        let behind = used.wrapping_sub(used_event.load(Relaxed));
        assert!((1..=1 + (1 << 14)).contains(&behind), "{used}: {behind}");
    }
}
