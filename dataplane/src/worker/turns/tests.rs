//! Devices that share a worker, on a clock that only moves as the test says: what each gets of it.

use super::*;
use crate::blk::{BlkDevice, Geometry};
use crate::storage::StorageSpec;

/// Ticks are nanoseconds here.
const SLACK_NS: u64 = 20_000;
const PATIENCE_NS: u64 = 3_000;
const MOST: usize = 16;
/// A look at a queue.
const LOOK_NS: u64 = 20;
const LONG_NS: u64 = 200_000_000;

fn device() -> Device {
    let geometry = Geometry {
        logical_block_bytes: 4096,
        read_only: false,
        serial: [0; 20],
        queues: 1,
        discard: false,
    };
    BlkDevice::new(geometry, 8, StorageSpec::Null, None).into()
}

/// A device and its driver.
#[derive(Debug, Clone)]
struct Guest {
    queues: usize,
    /// Requests that each queue has at most.
    depth: usize,
    /// What one takes.
    cost_ns: u64,
    /// How long after a turn its driver has made new ones available.
    refill_ns: u64,
}

/// One queue's requests: there now, and those that come at a moment.
#[derive(Debug, Default)]
struct Ring {
    there: usize,
    coming: std::collections::VecDeque<(u64, usize)>,
}

impl Ring {
    fn look(&mut self, now: u64) -> usize {
        while let Some((_, count)) = self.coming.pop_front_if(|(at, _)| *at <= now) {
            self.there += count;
        }
        self.there
    }
}

/// What each guest got within a time: requests, and time.
#[derive(Debug, Default, Clone, Copy)]
struct Got {
    requests: u64,
    ns: u64,
}

fn run(guests: &[Guest]) -> Vec<Got> {
    let mut turns = Turns::new(SLACK_NS, PATIENCE_NS);
    let mut got = vec![Got::default(); guests.len()];
    let mut rings: Vec<(usize, Ring)> = Vec::new();
    for (number, guest) in (0u64..).zip(guests) {
        let seat = turns.seat(DeviceId(number), &device());
        for _ in 0..guest.queues {
            turns.poll(seat, u32::try_from(rings.len()).expect("few"));
            let there = guest.depth;
            let ring = Ring {
                there,
                ..Ring::default()
            };
            rings.push((seat as usize, ring));
        }
    }
    let mut now = 1_000_000;
    while now < LONG_NS {
        let round = turns.round(now);
        let (began, mut any) = (now, false);
        for place in 0..turns.awake() {
            let Some(turn) = turns.turn(place, &round, now, MOST) else {
                continue;
            };
            let (from, mut requests) = (now, 0);
            for _ in 0..turn.queues {
                let number = turns.next_queue(turn.seat).expect("polled") as usize;
                let (owner, ring) = &mut rings[number];
                let guest = &guests[*owner];
                let taken = ring.look(now).min(turn.batch);
                ring.there -= taken;
                now += LOOK_NS + taken as u64 * guest.cost_ns;
                if taken > 0 {
                    ring.coming.push_back((now + guest.refill_ns, taken));
                }
                requests += taken;
                if now >= turn.ends_at {
                    break;
                }
            }
            turns.charge(&turn, requests, from, now);
            let of = &mut got[turn.seat as usize];
            of.requests += requests as u64;
            of.ns += now - from;
            any |= requests > 0;
        }
        if !any {
            now += LOOK_NS;
            turns.waited(&round, began, now);
        }
    }
    got
}

/// What the first of them keeps of what it has alone, in percent.
fn kept(victim: &Guest, hostile: &Guest) -> u64 {
    let alone = run(std::slice::from_ref(victim));
    let beside = run(&[victim.clone(), hostile.clone()]);
    beside[0].requests * 100 / alone[0].requests
}

fn deep() -> Guest {
    Guest {
        queues: 1,
        depth: 32,
        cost_ns: 120,
        refill_ns: 1500,
    }
}

/// Whatever a guest does, the other one keeps nearly half of what it has alone.
#[test]
fn a_victim_keeps_its_half_beside_every_kind_of_hostile_guest() {
    let victims = [
        ("a full ring", deep()),
        (
            "one request at a time",
            Guest {
                depth: 1,
                refill_ns: 700,
                ..deep()
            },
        ),
        (
            "slow requests",
            Guest {
                cost_ns: 5000,
                ..deep()
            },
        ),
    ];
    let hostile = [
        ("requests like the victim's", deep()),
        (
            "64 full queues",
            Guest {
                queues: 64,
                depth: 256,
                refill_ns: 0,
                ..deep()
            },
        ),
        (
            "128 KiB, encrypted",
            Guest {
                depth: 256,
                cost_ns: 30_000,
                refill_ns: 0,
                ..deep()
            },
        ),
        (
            "chains as long as they can be",
            Guest {
                queues: 64,
                depth: 256,
                cost_ns: 150_000,
                refill_ns: 0,
            },
        ),
        (
            "64 queues that are polled and empty",
            Guest {
                queues: 64,
                depth: 0,
                ..deep()
            },
        ),
        (
            "pauses, so that it never seems to be ahead",
            Guest {
                depth: 16,
                cost_ns: 30_000,
                refill_ns: 4000,
                ..deep()
            },
        ),
    ];
    for (victims_name, victim) in &victims {
        for (name, hostile) in &hostile {
            let kept = kept(victim, hostile);
            assert!(kept >= 45, "{victims_name} beside {name}: {kept} %");
        }
    }
}

/// Nothing is lost to a neighbour that does little.
#[test]
fn time_that_one_does_not_need_is_the_others() {
    let seldom = Guest {
        depth: 1,
        refill_ns: 50_000,
        ..deep()
    };
    let heavy = Guest {
        depth: 256,
        cost_ns: 2000,
        refill_ns: 0,
        ..deep()
    };
    let got = run(&[seldom.clone(), heavy.clone()]);
    let alone = run(&[heavy]);
    assert!(got[1].requests * 100 >= alone[0].requests * 95, "{got:?}");
    let alone = run(&[seldom]);
    assert!(got[0].requests * 100 >= alone[0].requests * 70, "{got:?}");
}

#[test]
fn equals_have_equal_parts_however_many_they_are() {
    let got = run(&vec![deep(); 16]);
    let (least, most) = (
        got.iter().map(|of| of.requests).min().expect("some"),
        got.iter().map(|of| of.requests).max().expect("some"),
    );
    assert!(least * 100 >= most * 95, "{least} to {most}");
}

#[test]
fn what_a_guest_missed_is_not_owed_to_it() {
    let mut turns = Turns::new(SLACK_NS, PATIENCE_NS);
    let (busy, late) = (
        turns.seat(DeviceId(1), &device()),
        turns.seat(DeviceId(2), &device()),
    );
    turns.poll(busy, 0);
    turns.poll(late, 1);
    let mut now = 1_000_000;
    let mut serve = |turns: &mut Turns, late_has: bool| {
        let mut had = [0, 0];
        for _ in 0..100 {
            let round = turns.round(now);
            for place in 0..turns.awake() {
                let Some(turn) = turns.turn(place, &round, now, MOST) else {
                    continue;
                };
                let works = turn.seat == busy || late_has;
                let took = if works { 10_000 } else { LOOK_NS };
                turns.charge(&turn, usize::from(works), now, now + took);
                now += took;
                had[usize::from(turn.seat == late)] += usize::from(works);
            }
        }
        had
    };
    assert_eq!(serve(&mut turns, false), [100, 0]);
    let [busy_had, late_had] = serve(&mut turns, true);
    assert!(late_had - busy_had <= 6, "{busy_had} and {late_had}");
}

#[test]
fn queues_that_are_polled_no_more_cost_no_turn() {
    let mut turns = Turns::new(SLACK_NS, PATIENCE_NS);
    let seats: Vec<u32> = (0..4).map(|n| turns.seat(DeviceId(n), &device())).collect();
    for (queue, seat) in (0..).zip(&seats) {
        turns.poll(*seat, queue);
        turns.poll(*seat, queue);
        turns.poll(*seat, queue + 100);
    }
    assert_eq!((turns.awake(), turns.place(1)), (4, Some((1, 2))));
    turns.unpoll(1, 1);
    turns.unpoll(1, 101);
    turns.unpoll(1, 101);
    turns.leave(DeviceId(0));
    assert_eq!(turns.awake(), 2);
    turns.poll(1, 101);
    assert_eq!(turns.next_queue(1), Some(101));
    assert_eq!(
        turns.seat(DeviceId(9), &device()),
        0,
        "the place that is free"
    );
}
