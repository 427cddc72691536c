//! The driver against the model, and the model against drivers that break rules.

use super::*;
use crate::driver::ring::{Format, Ring};
use crate::random::Random;

const BASE: u64 = 0x10_0000;
const DATA: u64 = BASE + 0x1_0000;

fn pair(size: u16, event_idx: bool) -> (GuestMemory, Ring, Model) {
    let memory = GuestMemory::new(&[(BASE, 0x4_0000, 0)]).expect("memory");
    let mut ring = Ring::with_format(&memory, BASE, size, Format::Packed).expect("ring");
    ring.event_idx = event_idx;
    let mut model = Model::new(size, ring.desc, ring.avail, ring.used);
    model.event_idx = event_idx;
    (memory, ring, model)
}

/// A chain whose lengths tell which it is.
fn chain(random: &mut Random, most: u64, mark: u32) -> Vec<Desc> {
    let count = 1 + random.below(most);
    let readable = random.below(count + 1);
    (0..count)
        .map(|i| {
            let len = mark * 8 + u32::try_from(i).expect("few");
            if i < readable {
                Desc::readable(DATA + i * 64, len)
            } else {
                Desc::writable(DATA + i * 64, len)
            }
        })
        .collect()
}

fn ranges(descs: &[Desc], write: u16) -> Vec<(u64, u32)> {
    let these = descs.iter().filter(|d| d.flags & WRITE == write);
    these.map(|d| (d.addr, d.len)).collect()
}

/// Batches of random chains, some in tables, used in any order, past many wraps, in rings of
/// sizes that are and are not powers of two: what is taken is what was offered.
#[test]
fn driver_and_model_agree() {
    for (size, event_idx) in [(1, true), (3, false), (8, true), (20, false), (128, true)] {
        let (memory, mut ring, mut model) = pair(size, event_idx);
        let mut random = Random::named("driver and model");
        let mut free: Vec<u16> = (0..size).collect();
        for round in 0..3000u32 {
            let mut offered = Vec::new();
            for mark in 1..=1 + random.below(u64::from(size)) {
                let descs = chain(
                    &mut random,
                    u64::from(size.min(5)),
                    u32::try_from(mark).expect("few"),
                );
                let id = free.swap_remove(random.index(free.len()));
                let in_table = random.below(3) == 0;
                let done = if in_table {
                    ring.offer_table(&memory, id, DATA + 0x1_0000 + mark * 128, &descs)
                } else {
                    ring.offer(&memory, id, &descs)
                };
                if done.is_err() {
                    free.push(id);
                    break;
                }
                offered.push((id, descs));
            }
            assert_eq!(model.pop(&memory), Ok(None), "{round}: not published yet");
            model.arm(&memory).expect("in memory");
            let wanted = ring.publish_quietly(&memory).expect("in memory");
            assert!(wanted, "{round}: armed for the first of these");
            let mut taken = Vec::new();
            for (id, descs) in &offered {
                let chain = model.pop(&memory).expect("good").expect("offered");
                assert_eq!(chain.id, *id);
                assert_eq!(chain.readable, ranges(descs, 0));
                assert_eq!(chain.writable, ranges(descs, WRITE));
                taken.push(chain);
            }
            assert_eq!(model.pop(&memory), Ok(None), "{round}: no more");
            ring.ask_for_call(&memory).expect("in memory");
            while !taken.is_empty() {
                let chain = taken.swap_remove(random.index(taken.len()));
                model.push_used(&memory, &chain, 7).expect("in memory");
                free.push(chain.id);
                let used = ring.poll_used(&memory).expect("good").expect("used");
                assert_eq!((used.id, used.len), (u32::from(chain.id), 7));
                assert_eq!(ring.poll_used(&memory).expect("good"), None);
            }
            let called = model.call_wanted(&memory).expect("in memory");
            assert!(called, "{round}: asked for");
        }
    }
}

#[test]
fn no_kick_and_no_call_where_none_is_wanted() {
    let (memory, mut ring, mut model) = pair(8, false);
    for _ in 0..20 {
        model.disarm(&memory).expect("in memory");
        ring.suppress_calls(&memory).expect("in memory");
        let descs = [Desc::writable(DATA, 1)];
        ring.offer(&memory, 3, &descs).expect("room");
        assert!(!ring.publish_quietly(&memory).expect("in memory"));
        let chain = model.pop(&memory).expect("good").expect("offered");
        model.push_used(&memory, &chain, 1).expect("in memory");
        assert!(!model.call_wanted(&memory).expect("in memory"));
        assert!(ring.poll_used(&memory).expect("good").is_some());
    }
}

/// With IN_ORDER one used descriptor stands for all before it.
#[test]
fn a_batch_in_order_is_used_with_one_descriptor() {
    let (memory, mut ring, mut model) = pair(8, false);
    ring.in_order = true;
    for round in 0..50u32 {
        for id in 0..3u16 {
            let descs = [Desc::readable(DATA, 4), Desc::writable(DATA, 9)];
            ring.offer(&memory, id, &descs).expect("room");
        }
        ring.publish_quietly(&memory).expect("in memory");
        let mut last = None;
        let mut slots = 0;
        for _ in 0..3 {
            let chain = model.pop(&memory).expect("good").expect("offered");
            slots += chain.slots;
            last = Some(chain);
        }
        let mut last = last.expect("three");
        last.slots = slots;
        model.in_flight.clear();
        model.push_used(&memory, &last, 5).expect("in memory");
        let lens: Vec<_> = (0..3)
            .map(|_| ring.poll_used(&memory).expect("good").expect("used").len)
            .collect();
        assert_eq!(lens, [9, 9, 5], "round {round}");
        assert_eq!(ring.poll_used(&memory).expect("good"), None);
    }
}

/// Makes a chain of three one that a driver must not write.
type Spoil = fn(&mut [Desc; 3]);

#[test]
fn what_a_driver_must_not_do_breaks_the_ring() {
    let spoil: [(&str, Spoil); 5] = [
        ("id outside", |d| d[2].next = 8),
        ("table and next", |d| d[0].flags |= INDIRECT),
        ("order", |d| d[0].flags |= WRITE),
        ("no end", |d| d[2].flags |= NEXT),
        ("hole", |d| d[1].flags &= !crate::driver::desc::AVAIL),
    ];
    for (name, spoil) in spoil {
        let (memory, ring, mut model) = pair(8, false);
        let avail = crate::driver::desc::AVAIL;
        let desc = |flags| Desc {
            flags: flags | avail,
            ..Desc::readable(DATA, 16)
        };
        let mut descs = [desc(NEXT), desc(NEXT), desc(WRITE)];
        let write = |descs: &[Desc; 3]| {
            for (i, desc) in descs.iter().enumerate() {
                let place = START | u16::try_from(i).expect("few");
                ring.write_slot(&memory, place, desc).expect("in memory");
            }
        };
        write(&descs);
        let mut good = model.clone();
        assert!(good.pop(&memory).expect("good").is_some(), "{name}");
        spoil(&mut descs);
        write(&descs);
        assert!(model.pop(&memory).is_err(), "{name}");
    }
}
