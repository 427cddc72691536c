//! Network cards on one switch: what a guest that floods leaves to another, and limits in both directions.

use std::time::{Duration, Instant};

use bulkhead_dataplane::port::{DropReason, PortSpec, SwitchSpec};
use bulkhead_protocol::limits::{Limits, Rate};

use super::cards::{EVERYBODY, Guest, mac};
use super::counting::{allocations_of, assert_it_counts, worker_thread};
use super::rig::{RING, Rig};

fn switch() -> PortSpec {
    PortSpec::Switch(SwitchSpec::new("lan".to_owned(), None))
}

/// A guest that sends to one other, beside one that floods with frames of the same length: its part of the worker's
/// time, in percent, from a quarter of what it has on, as near to a half as it comes. Frames are long, so that this
/// takes long beside what a worker counts at a time.
fn victims_share(to: [u8; 6], bytes: usize, others: u8) -> u64 {
    let mut rig = Rig::new(1);
    let port = switch();
    let mut guest = |number, buffers| Guest::new(&mut rig, 0, port.clone(), number, buffers);
    let flooder = guest(1, 0);
    let victim = guest(2, 0);
    let receiver = guest(3, RING);
    let _others: Vec<Guest> = (4..4 + others).map(|number| guest(number, RING)).collect();
    flooder.prepare(to, bytes);
    victim.prepare(mac(3), bytes);
    // Both at once: the worker finds both messages, or serves whom it heard of first for a moment.
    flooder.begin(&rig);
    victim.begin(&rig);
    victim.wait_for(u64::from(RING) / 4);
    let times = || [&victim, &flooder].map(|guest| guest.device.metrics.worker_ticks());
    let before = times();
    victim.wait_for(u64::from(RING) * 3 / 4);
    let after = times();
    assert!(
        flooder.taken() < u64::from(RING),
        "it flooded until the end"
    );
    assert!(receiver.device.metrics.received().packets > 0);
    let [victims, floods] = [after[0] - before[0], after[1] - before[1]];
    victims * 100 / (victims + floods)
}

/// What a flood costs, copying it to everyone included, is the flooder's.
#[test]
fn a_flood_of_broadcasts_leaves_another_guest_its_half() {
    let share = victims_share(EVERYBODY, 16_000, 12);
    assert!((45..=60).contains(&share), "{share} %");
}

#[test]
fn a_flood_to_stations_that_nobody_knows_leaves_another_guest_its_half() {
    let share = victims_share([2, 9, 9, 9, 9, 9], 16_000, 8);
    assert!((45..=60).contains(&share), "{share} %");
}

fn limits(packets: Option<u64>, bytes: Option<u64>) -> Limits {
    let rate = |per_second| Rate {
        per_second,
        burst: per_second / 2,
    };
    Limits {
        requests: packets.map(rate),
        bytes: bytes.map(rate),
    }
}

/// Looks at a count of a limited guest from two seconds on: never more than rate and burst, and within 2 % of that
/// at least once.
fn assert_rate(per_second: u64, mut count: impl FnMut() -> u64) {
    let start = Instant::now();
    let rate_in = |time: Duration| {
        let micros = u64::try_from(time.as_micros()).expect("short");
        per_second * micros / 1_000_000
    };
    std::thread::sleep(Duration::from_millis(1500));
    let mut best = u64::MAX;
    while start.elapsed() < Duration::from_millis(1900) {
        let counted = count();
        let most = per_second / 2 + rate_in(start.elapsed());
        assert!(counted <= most + 64, "{counted} of at most {most}");
        best = best.min(most - counted.min(most));
        std::thread::sleep(Duration::from_millis(5));
    }
    let least = per_second * 2 / 100;
    assert!(best <= least, "{best} short, more than {least}");
}

#[test]
fn what_a_guest_may_not_send_stays_with_it() {
    let (packets, bytes) = (limits(Some(10_000), None), limits(None, Some(10_000 * 112)));
    for limits in [packets, bytes] {
        let mut rig = Rig::new(1);
        let port = switch();
        let sender = Guest::new(&mut rig, 0, port.clone(), 1, 0);
        let receiver = Guest::new(&mut rig, 0, port, 2, RING);
        sender.device.tx_qos().set(&limits, None);
        sender.prepare(mac(2), 100);
        sender.begin(&rig);
        assert_rate(10_000, || sender.taken());
        assert_eq!(sender.sent().all_drops(), 0);
        assert_eq!(receiver.device.metrics.received().all_drops(), 0);
    }
}

#[test]
fn what_a_guest_may_not_receive_is_dropped_and_counted() {
    let mut rig = Rig::new(1);
    let port = switch();
    let sender = Guest::new(&mut rig, 0, port.clone(), 1, 0);
    let receiver = Guest::new(&mut rig, 0, port.clone(), 2, RING);
    let other = Guest::new(&mut rig, 0, port, 3, RING);
    receiver
        .device
        .rx_qos()
        .set(&limits(Some(1000), None), None);
    sender.prepare(EVERYBODY, 100);
    sender.begin(&rig);
    let all = u64::from(RING);
    sender.wait_for(all);
    let metrics = |guest: &Guest| guest.device.metrics.received();
    let deadline = Instant::now() + Duration::from_secs(60);
    while metrics(&other).packets + metrics(&other).all_drops() < all {
        assert!(Instant::now() < deadline, "counted at the end of a turn");
        std::thread::sleep(Duration::from_micros(50));
    }
    let received = metrics(&receiver);
    let limited = received.drops[DropReason::Limited.number()];
    assert_eq!(received.packets + limited, all);
    assert!(received.packets >= 500, "its burst: {received:?}");
    assert!(limited > 0, "{received:?}");
    // Its neighbour, and who sent, know nothing of it.
    assert_eq!(metrics(&other).packets, all);
    assert_eq!((sender.sent().packets, sender.sent().all_drops()), (all, 0));
}

#[test]
fn a_flood_in_anothers_name_reaches_nobody() {
    let mut rig = Rig::new(1);
    let port = switch();
    let liar = Guest::new(&mut rig, 0, port.clone(), 1, 0);
    let honest = Guest::new(&mut rig, 0, port.clone(), 2, 0);
    let receiver = Guest::new(&mut rig, 0, port, 3, RING);
    liar.prepare_as(mac(2), mac(3), 100);
    honest.prepare(mac(3), 100);
    liar.begin(&rig);
    honest.begin(&rig);
    let all = u64::from(RING);
    honest.wait_for(all);
    liar.wait_for(all);
    let deadline = Instant::now() + Duration::from_secs(60);
    while liar.sent().all_drops() < all || receiver.device.metrics.received().packets < all {
        assert!(Instant::now() < deadline, "counted at the end of a turn");
        std::thread::sleep(Duration::from_micros(50));
    }
    assert_eq!(liar.sent().drops[DropReason::SpoofedMac.number()], all);
    assert_eq!(receiver.device.metrics.received().packets, all);
}

#[test]
fn frames_between_cards_need_no_allocation() {
    let mut rig = Rig::new(1);
    let port = switch();
    let mut guest = |number, buffers| Guest::new(&mut rig, 0, port.clone(), number, buffers);
    let (one, all) = (guest(1, 0), guest(2, 0));
    let receivers = [guest(3, RING), guest(4, 20_000)];
    one.prepare(mac(3), 200);
    all.prepare(EVERYBODY, 200);
    // What is filled once is filled with the first, and the second receiver runs out of buffers behind them.
    for sender in [&one, &all] {
        sender.limit(8192);
        sender.begin(&rig);
        sender.wait_for(8192);
    }
    let count = allocations_of(worker_thread(), || {
        for sender in [&one, &all] {
            sender.limit(RING);
            sender.wait_for(u64::from(RING));
        }
    });
    assert_eq!(count, 0);
    assert_it_counts();
    let deadline = Instant::now() + Duration::from_secs(60);
    let no_room = || receivers[1].device.metrics.received().drops[DropReason::NoRoom.number()];
    while no_room() == 0 {
        assert!(Instant::now() < deadline, "counted at the end of a turn");
        std::thread::sleep(Duration::from_micros(50));
    }
}
