//! Network cards with a real server, its workers and drivers: frames from one guest to another, and what becomes of
//! them when something is not as it should be.

mod mirror;
mod queues;
mod rig;

use bulkhead_dataplane::port::{DropReason, PortSpec};
use bulkhead_integration::card::{Card, HEADER_BYTES, Options, net_feature};
use bulkhead_integration::disk::feature;
use bulkhead_protocol::limits::{Limits, Rate};
use rig::{Rig, counted, drops, frame, mac};

const EVERYBODY: [u8; 6] = [0xff; 6];

/// Everything that a driver can negotiate about its rings.
fn kinds() -> Vec<Options> {
    let usual = Options::default();
    let mut kinds = Vec::new();
    for packed in [0, feature::RING_PACKED] {
        for others in [0, feature::IN_ORDER | feature::EVENT_IDX] {
            let features = usual.features | packed | others;
            kinds.push(Options { features, ..usual });
            let features = features & !net_feature::MRG_RXBUF;
            kinds.push(Options { features, ..usual });
        }
    }
    kinds
}

#[test]
fn frames_of_a_card_on_the_null_port_are_counted_and_gone() {
    let mut rig = Rig::new();
    let offered = rig.offer(PortSpec::Null, 1);
    let mut card = Card::attach(&offered.path, &Options::default()).expect("attach");
    for _ in 0..100 {
        let frame = frame(1, EVERYBODY, (1, 2), 50);
        card.offer(0, &[0; HEADER_BYTES], &frame).expect("offer");
    }
    card.publish(0).expect("publish");
    card.drain(0).expect("taken");
    let sent = counted(|| offered.device.metrics.sent(), |sent| sent.packets == 100);
    assert_eq!((sent.bytes, sent.all_drops()), (100 * 92, 0));
    assert!(card.poll(0).expect("poll").is_none());
    assert_eq!(rig.status(offered.id).running_queues, 2);
}

#[test]
fn frames_cross_the_switch_whole_whatever_the_rings() {
    for kind in kinds() {
        let mut rig = Rig::new();
        let [(of_a, mut a), (of_b, mut b)] = rig.two(&kind, &Options::default());
        for (count, payload) in (1..).zip([0, 1, 18, 64, 1000, 1472]) {
            let there = frame(1, mac(2), (7, 9), payload);
            a.send(0, &there).expect("sent");
            let received = b.receive(0).expect("received");
            assert_eq!(received.frame, there, "{kind:?}");
            assert_eq!(received.header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            let back = frame(2, mac(1), (9, 7), payload);
            b.send(0, &back).expect("sent");
            assert_eq!(a.receive(0).expect("received").frame, back, "{kind:?}");
            for device in [&of_a.device, &of_b.device] {
                let metrics = &device.metrics;
                let sent = counted(|| metrics.sent(), |sent| sent.packets == count);
                let received = counted(|| metrics.received(), |all| all.packets == count);
                assert_eq!((sent.bytes, sent.drops), (received.bytes, received.drops));
            }
        }
    }
}

/// More than the rings have room for, so that all of them go round several times.
#[test]
fn many_frames_keep_their_order() {
    for kind in kinds() {
        let mut rig = Rig::new();
        let [(_, mut a), (_, mut b)] = rig.two(&kind, &kind);
        for number in 0..1000u16 {
            let frame = frame(1, mac(2), (number, 9), usize::from(number % 700));
            a.offer(0, &[0; HEADER_BYTES], &frame).expect("offered");
            if number % 10 == 9 {
                a.publish(0).expect("published");
                for number in number - 9..=number {
                    let received = b.receive(0).expect("received").frame;
                    assert_eq!(received[34..36], number.to_be_bytes(), "{kind:?}");
                    assert_eq!(received.len(), 42 + usize::from(number % 700));
                }
            }
        }
    }
}

#[test]
fn everybody_else_gets_a_broadcast() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let [(_, mut a), (_, mut b)] = rig.two(&usual, &usual);
    let offered = rig.on_switch(1);
    let mut c = Card::attach(&offered.path, &usual).expect("attach");
    let frame = frame(1, EVERYBODY, (1, 2), 100);
    a.send(0, &frame).expect("sent");
    assert_eq!(b.receive(0).expect("received").frame, frame);
    assert_eq!(c.receive(0).expect("received").frame, frame);
    assert!(a.poll(0).expect("poll").is_none(), "it is not told itself");
}

/// A TCP segment over IPv4 that is to be cut, with its header.
fn segment(payload: usize) -> ([u8; HEADER_BYTES], Vec<u8>) {
    let mut bytes = frame(1, mac(2), (1, 2), payload + 12);
    bytes[23] = 6;
    // A header of five words, and no flags but ACK.
    bytes[46] = 0x50;
    bytes[47] = 0x10;
    let mut header = [0; HEADER_BYTES];
    header[0] = 1;
    header[1] = 1;
    header[2..4].copy_from_slice(&54u16.to_le_bytes());
    header[4..6].copy_from_slice(&1448u16.to_le_bytes());
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    (header, bytes)
}

#[test]
fn a_long_segment_crosses_whole_or_is_cut_for_who_takes_none() {
    let usual = Options::default();
    let without = Options {
        features: usual.features & !net_feature::OFFLOADS,
        ..usual
    };
    let (header, bytes) = segment(60_000);
    let mut rig = Rig::new();
    let [(_, mut a), (of_b, mut b)] = rig.two(&usual, &usual);
    a.send_with(0, &header, &bytes).expect("sent");
    let received = b.receive(0).expect("received");
    assert_eq!(received.header[..10], header[..10]);
    assert_eq!(received.frame, bytes);
    assert_eq!(received.buffers, 15, "60,066 bytes in buffers of 4,096");
    let metrics = &of_b.device.metrics;
    assert_eq!(
        counted(|| metrics.received(), |all| all.packets > 0).packets,
        1
    );
    let mut rig = Rig::new();
    let [(_, mut a), (_, mut b)] = rig.two(&usual, &without);
    a.send_with(0, &header, &bytes).expect("sent");
    let mut payload = 0;
    for _ in 0..60_000usize.div_ceil(1448) {
        let received = b.receive(0).expect("received");
        assert_eq!(received.header[..10], [0; 10]);
        payload += received.frame.len() - 54;
    }
    assert_eq!(payload, 60_000);
}

#[test]
fn who_sends_as_somebody_else_is_not_heard() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let [(of_a, mut a), (_, mut b)] = rig.two(&usual, &usual);
    a.send(0, &frame(9, mac(2), (1, 2), 10)).expect("taken");
    let honest = frame(1, mac(2), (1, 2), 11);
    a.send(0, &honest).expect("taken");
    assert_eq!(b.receive(0).expect("received").frame, honest);
    let sent = counted(|| of_a.device.metrics.sent(), |sent| sent.packets == 1);
    assert_eq!(drops(&sent, DropReason::SpoofedMac), 1);
    assert_eq!(sent.all_drops(), 1);
}

#[test]
fn what_finds_no_room_is_dropped_and_counted_where_it_was_to_go() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let few = Options {
        buffers: 4,
        ..usual
    };
    let [(of_a, mut a), (of_b, mut b)] = rig.two(&usual, &few);
    for _ in 0..10 {
        a.send(0, &frame(1, mac(2), (1, 2), 10)).expect("taken");
    }
    let of_b = &of_b.device.metrics;
    let received = counted(
        || of_b.received(),
        |all| all.packets + all.all_drops() == 10,
    );
    assert_eq!(
        (received.packets, drops(&received, DropReason::NoRoom)),
        (4, 6)
    );
    assert_eq!(of_a.device.metrics.sent().all_drops(), 0);
    for _ in 0..4 {
        b.receive(0).expect("received");
    }
    let last = frame(1, mac(2), (3, 4), 10);
    a.send(0, &last).expect("taken");
    assert_eq!(b.receive(0).expect("received").frame, last);
}

#[test]
fn a_link_that_is_down_carries_nothing() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let [(of_a, mut a), (of_b, mut b)] = rig.two(&usual, &usual);
    of_b.device.set_up(false);
    a.send(0, &frame(1, mac(2), (1, 2), 10)).expect("taken");
    b.send(0, &frame(2, mac(1), (1, 2), 10)).expect("taken");
    let received = || of_b.device.metrics.received();
    counted(received, |all| drops(all, DropReason::LinkDown) == 1);
    let sent = || of_b.device.metrics.sent();
    counted(sent, |all| drops(all, DropReason::LinkDown) == 1);
    of_b.device.set_up(true);
    a.send(0, &frame(1, mac(2), (1, 2), 11)).expect("taken");
    assert_eq!(b.receive(0).expect("received").frame.len(), 53);
    assert_eq!(of_a.device.metrics.received().packets, 0);
}

fn frames_a_second(per_second: u64, burst: u64) -> Limits {
    Limits {
        requests: Some(Rate { per_second, burst }),
        bytes: None,
    }
}

/// Slow limits, so that on the slowest machine hardly a token comes meanwhile.
#[test]
fn a_card_receives_no_more_than_it_may() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let [(_, mut a), (of_b, _b)] = rig.two(&usual, &usual);
    of_b.device.rx_qos().set(&frames_a_second(1, 20), None);
    for _ in 0..100 {
        a.send(0, &frame(1, mac(2), (1, 2), 10)).expect("taken");
    }
    let received = || of_b.device.metrics.received();
    let received = counted(received, |all| all.packets + all.all_drops() == 100);
    assert!(drops(&received, DropReason::Limited) > 0, "{received:?}");
    assert!(received.packets >= 20, "{received:?}");
}

/// What is too much waits in the guest's ring.
#[test]
fn a_card_sends_no_faster_than_it_may() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let [(of_a, mut a), (_, mut b)] = rig.two(&usual, &usual);
    of_a.device.tx_qos().set(&frames_a_second(1000, 1), None);
    let began = std::time::Instant::now();
    for _ in 0..100 {
        a.send(0, &frame(1, mac(2), (1, 2), 10)).expect("taken");
        b.receive(0).expect("received");
    }
    assert!(began.elapsed().as_millis() >= 50, "{:?}", began.elapsed());
    assert_eq!(of_a.device.metrics.sent().all_drops(), 0);
}

/// Each of these becomes 200 packets: the third waits until 400 are paid for, all but a burst of few.
#[test]
fn a_segment_is_as_many_packets_as_it_becomes() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let [(of_a, mut a), (_, mut b)] = rig.two(&usual, &usual);
    of_a.device.tx_qos().set(&frames_a_second(1000, 1), None);
    let (mut header, bytes) = segment(48_000);
    header[4..6].copy_from_slice(&240u16.to_le_bytes());
    let began = std::time::Instant::now();
    for _ in 0..3 {
        a.send_with(0, &header, &bytes).expect("sent");
        assert_eq!(b.receive(0).expect("received").frame, bytes);
    }
    assert!(began.elapsed().as_millis() >= 300, "{:?}", began.elapsed());
}
