//! Queues of network cards: where they are served, several of them, and what a frontend says about them.

use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use bulkhead_dataplane::port::PortSpec;
use bulkhead_dataplane::worker::message::QueueId;
use bulkhead_integration::card::{Card, HEADER_BYTES, Options};
use bulkhead_integration::disk::feature;
use bulkhead_integration::driver::ring::{Desc, Used};
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::{Inflight, request, words};

use crate::rig::{Rig, counted, frame, mac};

const USUAL: fn() -> Options = Options::default;

#[test]
fn one_worker_serves_a_switch() {
    let mut rig = Rig::new();
    let options = Options {
        pairs: 2,
        ..USUAL()
    };
    let [(of_a, _a), (of_b, _b)] = rig.two(&options, &options);
    let worker = |rig: &Rig, device, index| {
        rig.ask(move |server| server.worker_of(QueueId { device, index }))
    };
    let home = worker(&rig, of_a.id, 0).expect("it runs");
    for index in 0..4 {
        assert_eq!(worker(&rig, of_a.id, index), Some(home));
        assert_eq!(worker(&rig, of_b.id, index), Some(home));
    }
    let queue = QueueId {
        device: of_a.id,
        index: 0,
    };
    let moved = rig.ask(move |server| server.move_queue(queue, 1 - home));
    assert!(moved.is_err_and(|why| why.contains("network card")));
    // A card by itself has its pairs where there is room, and each together.
    let alone = rig.offer(PortSpec::Null, 2);
    let _card = Card::attach(&alone.path, &options).expect("attach");
    let at = |index| worker(&rig, alone.id, index).expect("it runs");
    assert_eq!((at(0), at(2)), (at(1), at(3)));
}

/// What a guest gets comes with the pair that it sent the flow with last.
#[test]
fn an_answer_comes_with_the_pair_that_asked() {
    let mut rig = Rig::new();
    let several = Options {
        pairs: 4,
        ..USUAL()
    };
    let [(_, mut a), (_, mut b)] = rig.two(&several, &USUAL());
    for round in 0..3u16 {
        for pair in 0..4u16 {
            let (one, other) = (1000 + pair, 2000 + 7 * round + pair);
            let there = frame(1, mac(2), (one, other), 10);
            a.send(pair, &there).expect("sent");
            assert_eq!(b.receive(0).expect("received").frame, there);
            let back = frame(2, mac(1), (other, one), 10);
            b.send(0, &back).expect("sent");
            assert_eq!(a.receive(pair).expect("received").frame, back);
        }
    }
}

#[test]
fn frames_go_around_a_pair_that_is_not_enabled() {
    let mut rig = Rig::new();
    let two = Options {
        pairs: 2,
        ..USUAL()
    };
    let [(_, mut a), (of_b, mut b)] = rig.two(&USUAL(), &two);
    for enabled in [1, 0] {
        b.enable(enabled * 2, true).expect("enabled");
        b.enable(2 - enabled * 2, false).expect("disabled");
        let pair = u16::try_from(enabled).expect("small");
        for port in 0..20 {
            let frame = frame(1, mac(2), (port, 9), 10);
            a.send(0, &frame).expect("sent");
            assert_eq!(b.receive(pair).expect("received").frame, frame);
        }
    }
    // None at all: the link is as good as down.
    b.enable(0, false).expect("disabled");
    a.send(0, &frame(1, mac(2), (1, 9), 10)).expect("sent");
    counted(
        || of_b.device.metrics.received(),
        |all| all.all_drops() == 1,
    );
}

#[test]
fn a_queue_stops_where_it_is_and_goes_on_there() {
    for packed in [0, feature::RING_PACKED] {
        let mut rig = Rig::new();
        let options = Options {
            features: USUAL().features | packed,
            ..USUAL()
        };
        let [(_, mut a), (_, mut b)] = rig.two(&options, &USUAL());
        for round in 0..5 {
            let there = frame(1, mac(2), (round, 9), 10);
            a.send(0, &there).expect("sent");
            assert_eq!(b.receive(0).expect("received").frame, there);
            for index in [0, 1] {
                a.stop_queue(index).expect("stopped");
            }
            // Other memory, with the same in it.
            a.share_memory().expect("shared");
            for index in [1, 0] {
                a.resume_queue(index).expect("started");
            }
            let back = frame(2, mac(1), (9, round), 10);
            b.send(0, &back).expect("sent");
            assert_eq!(a.receive(0).expect("received").frame, back);
        }
    }
}

#[test]
fn memory_changes_under_running_queues() {
    let mut rig = Rig::new();
    let [(_, mut a), (_, mut b)] = rig.two(&USUAL(), &USUAL());
    for round in 0..10 {
        a.share_memory().expect("shared");
        b.share_memory().expect("shared");
        let there = frame(1, mac(2), (round, 9), 100);
        a.send(0, &there).expect("sent");
        assert_eq!(b.receive(0).expect("received").frame, there);
    }
}

/// Whoever breaks a ring of its own has nobody else suffer.
#[test]
fn a_broken_ring_retires_alone() {
    let mut rig = Rig::new();
    let [(_, mut a), (of_b, mut b)] = rig.two(&USUAL(), &USUAL());
    let offered = rig.on_switch(1);
    let mut c = Card::attach(&offered.path, &USUAL()).expect("attach");
    // The next buffer that b has to receive into is nowhere.
    for _ in 0..128 {
        a.send(0, &frame(1, mac(2), (1, 2), 10)).expect("sent");
    }
    let outside = Desc::writable(0xdead_0000_0000, 4096);
    let memory = std::sync::Arc::clone(&b.memory);
    b.rings[0].offer(&memory, 130, &[outside]).expect("offered");
    b.rings[0].publish(&memory).expect("published");
    a.send(0, &frame(1, mac(2), (1, 2), 10)).expect("sent");
    assert!(b.rings[0].has_failed(crate::rig::PATIENCE));
    assert_eq!(rig.status(of_b.id).retired_queues, 1);
    // It still sends, and others are served as before.
    let there = frame(2, mac(3), (1, 2), 10);
    b.send(0, &there).expect("sent");
    assert_eq!(c.receive(0).expect("received").frame, there);
    let back = frame(3, mac(1), (1, 2), 10);
    c.send(0, &back).expect("sent");
    assert_eq!(a.receive(0).expect("received").frame, back);
}

#[test]
fn a_guest_that_came_from_elsewhere_is_announced() {
    let mut rig = Rig::new();
    let [(_, a), (_, mut b)] = rig.two(&USUAL(), &USUAL());
    let word = |mac: [u8; 6]| {
        let [x, y, z, u, v, w] = mac;
        words(&[u64::from_le_bytes([x, y, z, u, v, w, 0, 0])])
    };
    let frontend = &a.frontend;
    frontend
        .set(request::SEND_RARP, &word(mac(1)), &[])
        .expect("done");
    let heard = b.receive(0).expect("received").frame;
    assert_eq!((&heard[..6], &heard[6..12]), (&[0xff; 6][..], &mac(1)[..]));
    assert_eq!(heard[12..14], [0x80, 0x35]);
    let refused = frontend.set(request::SEND_RARP, &word(mac(2)), &[]);
    assert!(
        matches!(refused, Err(FrontendError::Refused { .. })),
        "it is another card's"
    );
}

/// Each announcement goes to every other card, and is not its guest's turn.
#[test]
fn a_frontend_that_announces_without_end_is_heard_a_few_times_a_second() {
    let mut rig = Rig::new();
    let [(_, mut a), (_, mut b)] = rig.two(&USUAL(), &USUAL());
    let began = Instant::now();
    let [x, y, z, u, v, w] = mac(1);
    let address = words(&[u64::from_le_bytes([x, y, z, u, v, w, 0, 0])]);
    for _ in 0..200 {
        let set = a.frontend.set(request::SEND_RARP, &address, &[]);
        set.expect("done");
    }
    let seconds = began.elapsed().as_secs() + 2;
    let last = frame(1, mac(2), (1, 2), 10);
    a.send(0, &last).expect("sent");
    let mut heard = 0;
    while b.receive(0).expect("received").frame != last {
        heard += 1;
    }
    assert!((1..=5 * seconds).contains(&heard), "{heard} in {seconds} s");
}

#[test]
fn a_frontend_sets_no_more_than_the_cards_mtu() {
    let mut rig = Rig::new();
    let [(_, a), _] = rig.two(&USUAL(), &USUAL());
    let set = |mtu| a.frontend.set(request::NET_SET_MTU, &words(&[mtu]), &[]);
    set(1500).expect("as it has");
    set(1280).expect("less");
    assert!(matches!(set(1501), Err(FrontendError::Refused { .. })));
}

#[test]
fn a_frontend_that_goes_leaves_its_place_to_the_next() {
    let mut rig = Rig::new();
    let [(of_a, a), (_, mut b)] = rig.two(&USUAL(), &USUAL());
    drop(a);
    b.send(0, &frame(2, mac(1), (1, 2), 10)).expect("sent");
    let mut again = Card::attach(&of_a.path, &USUAL()).expect("attach");
    for port in 0..50 {
        let there = frame(1, mac(2), (port, 2), 10);
        again.offer(0, &[0; HEADER_BYTES], &there).expect("offered");
        again.publish(0).expect("published");
        assert_eq!(b.receive(0).expect("received").frame, there);
    }
}

/// What a process that died had taken comes back without a frame in it, and nothing else of the ring does.
#[test]
fn buffers_that_were_in_flight_come_back_empty_and_the_others_are_filled() {
    let mut rig = Rig::new();
    let [(_, mut a), (of_b, mut b)] = rig.two(&USUAL(), &USUAL());
    let asked = Inflight::question(2, 256);
    let (region, file) = b.frontend.get_inflight(&asked).expect("a region");
    let file = std::fs::File::from(file);
    // The receive queue's part (vhost-user, "Inflight I/O tracking"): version 1, 256 entries, three of them in
    // flight since the ring began.
    let put = |bytes: &[u8], at: u64| file.write_all_at(bytes, at).expect("written");
    put(&[1, 0, 0, 1], 8);
    for head in 0..3u64 {
        put(&[1], 16 + 16 * head);
        put(&(head + 1).to_le_bytes(), 16 + 16 * head + 8);
    }
    b.attach_again(&of_b.path, (&region, file.as_fd()))
        .expect("attached");
    let memory = std::sync::Arc::clone(&b.memory);
    for id in 0..3 {
        let used = b.rings[0].wait_used(&memory, crate::rig::PATIENCE);
        assert_eq!(used.expect("used"), Used { id, len: 0 });
    }
    // Long enough for whoever looked at the ring to look at it no more.
    std::thread::sleep(std::time::Duration::from_millis(20));
    for port in 0..300 {
        let there = frame(1, mac(2), (port, 9), 100);
        a.send(0, &there).expect("sent");
        assert_eq!(b.receive(0).expect("received").frame, there);
    }
}
