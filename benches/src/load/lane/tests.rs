//! A queue whose device answers as a test says.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;

use super::*;
use crate::load::memory::Memory;
use crate::load::requests::{Layout, Shape};
use crate::load::ring::Chains;
use crate::load::source::{Mix, Pattern, Span};

/// A ring that keeps what was offered, and gives what it was told to.
#[derive(Debug, Default)]
struct Told {
    offered: Vec<(u16, Kind)>,
    published: u32,
    used: VecDeque<Used>,
    /// Each request is used as soon as it is offered.
    at_once: bool,
}

impl Ring for Told {
    fn offer(&mut self, _: &impl Chains, slot: u16, kind: Kind) {
        self.offered.push((slot, kind));
        if self.at_once {
            self.used.push_back(Used { slot, len: 1 });
        }
    }

    fn publish(&mut self) -> bool {
        self.published += 1;
        false
    }

    fn poll(&mut self) -> Result<Option<Used>, QueueError> {
        Ok(self.used.pop_front())
    }

    fn rearm(&mut self) {}
}

const SHAPE: Shape = Shape {
    depth: 4,
    block_bytes: 4096,
    segments: 1,
    indirect: false,
    ring_size: 128,
};

fn with(mix: &str, test: impl FnOnce(Lane<'_, Told>, &dyn Fn(u16, u8))) {
    let layout = Layout::new(0, &SHAPE);
    let memory = Memory::new(layout.end).expect("maps");
    let requests = Requests::new(&memory, layout, SHAPE).expect("fits");
    let status = |slot: u16, value: u8| {
        let addr = requests.descriptor(slot, 2, Kind::Read).addr;
        let at = memory.offset_of(addr).expect("inside");
        memory.slice::<AtomicU8>(at, 1).expect("inside")[0].store(value, Relaxed);
    };
    let span = Span {
        first: 8,
        blocks: 1,
    };
    let mix: Mix = mix.parse().expect("a mix");
    let source = Source::new(span, Pattern::Sequential, mix, 0);
    let other = Requests::new(&memory, layout, SHAPE).expect("fits");
    let mut lane = Lane::new(Told::default(), other, None, source, None).expect("constants");
    lane.set_stage(Some(Stage::Mixed));
    assert_eq!(lane.step(), Ok(0));
    assert_eq!(lane.in_flight(), 4);
    test(lane, &status);
}

#[test]
fn an_answered_request_is_followed_by_the_next() {
    with("read", |mut lane, status| {
        lane.start_counting(Duration::MAX);
        assert_eq!(lane.ring.published, 1, "all four at once");
        for slot in [2, 0] {
            status(slot, 0);
            lane.ring.used.push_back(Used { slot, len: 4097 });
        }
        assert_eq!(lane.step(), Ok(2));
        let offered: Vec<u16> = lane.ring.offered.iter().map(|(slot, _)| *slot).collect();
        assert_eq!(offered, [0, 1, 2, 3, 2, 0]);
        lane.set_stage(None);
        status(3, 0);
        lane.ring.used.push_back(Used { slot: 3, len: 1 });
        assert_eq!(lane.step(), Ok(1));
        assert_eq!((lane.in_flight(), lane.is_through()), (3, false));
        lane.stop_counting();
        let counts = lane.measured();
        assert_eq!((counts.answered, counts.reads), (3, 3));
    });
}

#[test]
fn a_device_that_keeps_up_does_not_hold_a_step_up() {
    with("read", |mut lane, status| {
        lane.ring.at_once = true;
        for slot in 0..4 {
            status(slot, 0);
            lane.ring.used.push_back(Used { slot, len: 1 });
        }
        // Statuses are as they were made ready again: the fifth answer would be an error.
        assert_eq!(lane.step(), Ok(4));
        assert_eq!(lane.ring.used.len(), 4);
    });
}

#[test]
fn what_a_device_can_not_have_used_is_an_error() {
    with("read", |mut lane, status| {
        status(1, 0);
        let used = Used { slot: 1, len: 4097 };
        lane.set_stage(None);
        lane.ring.used.extend([used, used]);
        assert_eq!(lane.step(), Err(QueueError::NotInFlight { id: 1 }));
        lane.ring.used.push_back(Used { slot: 4, len: 1 });
        assert_eq!(lane.step(), Err(QueueError::NotInFlight { id: 4 }));
    });
}

#[test]
fn statuses_and_lengths_are_checked() {
    for (mix, kind, room) in [("read", Kind::Read, 4097), ("write", Kind::Write, 1)] {
        for value in [1, 2, 3, 0xff] {
            with(mix, |mut lane, status| {
                status(0, value);
                lane.ring.used.push_back(Used { slot: 0, len: 1 });
                let expected = QueueError::Status {
                    kind,
                    offset: 8 * 4096,
                    bytes: 4096,
                    status: value,
                };
                assert_eq!(lane.step(), Err(expected));
            });
        }
        with(mix, |mut lane, status| {
            status(0, 0);
            let given = room + 1;
            lane.ring.used.push_back(Used {
                slot: 0,
                len: given,
            });
            let expected = QueueError::Length {
                given,
                room,
                kind,
                offset: 8 * 4096,
            };
            assert_eq!(lane.step(), Err(expected));
        });
    }
}

#[test]
fn latencies_are_taken_of_no_more_than_can_be_afforded() {
    with("read", |mut lane, _| {
        for (answered, every) in [(0, 1), (100_000, 1), (100_001, 2), (5_000_000, 50)] {
            lane.counts.answered = answered;
            lane.start_counting(Duration::from_secs(1));
            assert_eq!(lane.latency().1, every, "{answered}");
            let taken = (0..200).filter(|_| lane.sample(None).is_some()).count();
            assert_eq!(taken as u64, 200 / every, "{answered}");
        }
    });
}

#[test]
fn a_pace_gives_each_request_its_time() {
    let mut pace = Pace::new(1000.0, 0.0);
    let start = pace.due;
    let at = |micros| start + Duration::from_micros(micros);
    assert_eq!(pace.take(at(0)), Some(start));
    assert_eq!(pace.take(at(999)), None);
    // Late by two: both go out, with the times when they were due.
    assert_eq!(pace.take(at(2100)), Some(at(1000)));
    assert_eq!(pace.take(at(2100)), Some(at(2000)));
    assert_eq!(pace.take(at(2100)), None);
}

#[test]
fn queues_at_a_rate_take_turns() {
    let before = Instant::now();
    let half = Pace::new(0.001, 0.5);
    let first = half.due.duration_since(before);
    assert!((500..505).contains(&first.as_secs()), "{first:?}");
    // As good as never, and no time that does not exist.
    let never = Pace::new(1e-300, 0.9);
    assert!(never.due > before);
}
