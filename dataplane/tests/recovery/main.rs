//! A worker that goes on with a queue whose backend has died: what was in flight is done again, in order, before
//! anything else, and the driver is called although it does not kick; not while the queue waits; and not at the
//! price of what may be said to a queue meanwhile.

mod rig;

use std::time::{Duration, Instant};

use bulkhead_dataplane::worker::message::{FromWorker, ToWorker};
use bulkhead_protocol::limits::{Limits, Rate};
use rig::{QUEUE, Rig, Start, dup, formats};

/// Six requests: four taken, of which the second is shown as used, and the third was about to be.
fn died(format: bulkhead_dataplane::virtqueue::Format, in_order: bool) -> Rig {
    let mut rig = Rig::new(format, in_order);
    rig.offer(6);
    if in_order {
        rig.live_and_die(4, &[0], &[1]);
    } else {
        rig.live_and_die(4, &[1], &[2]);
    }
    rig.look();
    assert_eq!(rig.used.len(), 1);
    rig
}

/// Slots that the dead backend has not shown.
fn open(rig: &Rig) -> Vec<u16> {
    (0..6)
        .filter(|slot| !rig.used[..1].contains(slot))
        .collect()
}

fn started(rig: &Rig, how: Start) {
    let said = rig.start(how);
    assert!(matches!(said, FromWorker::Started { .. }), "{said:?}");
}

/// Bases as QEMU and cloud-hypervisor give them, and one that means nothing at all.
#[test]
fn what_was_in_flight_is_done_again_whatever_the_base() {
    for (format, in_order) in formats() {
        for base in [1, 6, 4, 0] {
            let mut rig = died(format, in_order);
            let left = open(&rig);
            started(
                &rig,
                Start {
                    base,
                    ..Start::AGAIN
                },
            );
            rig.wait(6);
            rig.check_done(left.iter().copied());
            rig.wait_called();
            if in_order {
                assert_eq!(rig.used, [0, 1, 2, 3, 4, 5]);
            }
            // It goes on as ever.
            rig.offer(2);
            rig.kick.write(1).expect("a kick");
            rig.wait(8);
            rig.check_done([6, 7]);
            assert_eq!(rig.stop(), Some(rig.base_after(8)));
        }
    }
}

/// What the driver was shown last it may not have been called for.
#[test]
fn a_driver_is_called_though_nothing_was_in_flight() {
    for (format, in_order) in formats() {
        let mut rig = Rig::new(format, in_order);
        rig.offer(2);
        rig.live_and_die(2, &[0, 1], &[]);
        rig.wait(2);
        started(&rig, Start::AGAIN);
        rig.wait_called();
        assert_eq!(rig.stop(), Some(rig.base_after(2)));
        // A ring over which nobody has served anything is not called for.
        let fresh = Rig::new(format, in_order);
        let base = fresh.base_after(0);
        started(
            &fresh,
            Start {
                base,
                ..Start::AGAIN
            },
        );
        assert_eq!(fresh.stop(), Some(base));
        assert!(!fresh.was_called());
    }
}

/// Of a guest that moved here, the host that it left may not have called the driver for what it showed last. And a
/// frontend may have stopped looking at a call that it replaces.
#[test]
fn a_driver_is_called_by_whoever_goes_on_with_its_ring() {
    for (format, in_order) in formats() {
        let mut rig = Rig::new(format, in_order);
        rig.offer(2);
        rig.live_and_die(2, &[0, 1], &[]);
        rig.wait(2);
        let base = rig.base_after(2);
        let anew = true;
        started(
            &rig,
            Start {
                base,
                anew,
                ..Start::AGAIN
            },
        );
        rig.wait_called();
        let fd = dup(&rig.call);
        rig.tell(ToWorker::SetCall { queue: QUEUE, fd });
        assert!(matches!(rig.hear(), FromWorker::Changed { .. }));
        rig.wait_called();
        assert_eq!(rig.stop(), Some(base));
    }
}

/// A frontend may say where to call only when the queue runs.
#[test]
fn a_driver_is_called_as_soon_as_it_says_where() {
    for (format, in_order) in formats() {
        let mut rig = died(format, in_order);
        started(
            &rig,
            Start {
                call: false,
                ..Start::AGAIN
            },
        );
        rig.wait(6);
        assert!(!rig.was_called());
        let fd = dup(&rig.call);
        rig.tell(ToWorker::SetCall { queue: QUEUE, fd });
        assert!(matches!(rig.hear(), FromWorker::Changed { .. }));
        rig.wait_called();
        rig.stop();
    }
}

/// Somebody else may still be writing: nothing is done before the queue is enabled.
#[test]
fn a_queue_that_waits_does_nothing_yet() {
    for (format, in_order) in formats() {
        let mut rig = died(format, in_order);
        let left = open(&rig);
        let waits = Start {
            enabled: false,
            ..Start::AGAIN
        };
        started(&rig, waits);
        // It takes with it what it is to do when it goes to another worker meanwhile.
        rig.tell(ToWorker::Move { queue: QUEUE });
        let FromWorker::Moved(moved) = rig.hear() else {
            panic!("it stays");
        };
        rig.tell(ToWorker::Resume(moved));
        rig.check_open(left.iter().copied());
        let enabled = true;
        rig.tell(ToWorker::SetEnabled {
            queue: QUEUE,
            enabled,
        });
        assert!(matches!(rig.hear(), FromWorker::Changed { .. }));
        rig.wait(6);
        rig.check_done(left);
        rig.stop();
    }
}

/// A frontend that goes: what was in flight is left where it is, and is there when it comes back.
#[test]
fn a_queue_that_stops_leaves_what_was_in_flight_in_its_region() {
    for (format, in_order) in formats() {
        let mut rig = died(format, in_order);
        let left = open(&rig);
        for _ in 0..3 {
            started(
                &rig,
                Start {
                    enabled: false,
                    ..Start::AGAIN
                },
            );
            assert!(rig.stop_leaving().1, "the control thread has to know");
        }
        rig.check_open(left.iter().copied());
        rig.look();
        started(&rig, Start::AGAIN);
        rig.wait(6);
        rig.check_done(left);
        assert!(!rig.stop_leaving().1, "nothing is left");
    }
}

/// A region is the frontend's word: what it says is charged like everything else, or it would be a way around the limits.
#[test]
fn what_is_done_again_is_charged_to_the_limits() {
    let rate = Rate {
        per_second: 10,
        burst: 1,
    };
    let limits = Limits {
        requests: Some(rate),
        bytes: None,
    };
    for (format, in_order) in formats() {
        let mut rig = died(format, in_order);
        rig.device.qos().set(&limits, None);
        let began = Instant::now();
        started(&rig, Start::AGAIN);
        rig.wait(6);
        // Three that were in flight and two new ones: the first passes at once, each other 100 ms later.
        assert!(
            began.elapsed() >= Duration::from_millis(300),
            "{:?}",
            began.elapsed()
        );
        rig.stop();
    }
}

/// A frontend that wants to know where the queue goes on, maybe elsewhere: what was in flight is done first, and
/// nothing else.
#[test]
fn a_queue_that_finishes_does_what_was_in_flight_before_it_stops() {
    for (format, in_order) in formats() {
        let mut rig = died(format, in_order);
        started(
            &rig,
            Start {
                enabled: false,
                ..Start::AGAIN
            },
        );
        rig.tell(ToWorker::Finish { queue: QUEUE });
        assert_eq!(rig.stop(), Some(rig.base_after(4)));
        rig.wait(4);
        let done: Vec<u16> = open(&rig).into_iter().filter(|slot| *slot < 4).collect();
        rig.check_done(done);
        rig.check_open([4, 5]);
        // On the same connection the base says where it goes on.
        let base = rig.base_after(4);
        started(
            &rig,
            Start {
                base,
                anew: true,
                ..Start::AGAIN
            },
        );
        rig.wait(6);
        rig.check_done([4, 5]);
        rig.stop();
    }
}

/// Neither does a device that is given up, whatever its queues were to finish.
#[test]
fn a_device_that_is_given_up_leaves_what_was_in_flight() {
    for (format, in_order) in formats() {
        let rig = died(format, in_order);
        started(
            &rig,
            Start {
                enabled: false,
                ..Start::AGAIN
            },
        );
        rig.tell(ToWorker::GiveUp {
            id: QUEUE.device,
            wipe: true,
        });
        rig.tell(ToWorker::Finish { queue: QUEUE });
        rig.stop();
        rig.check_open(open(&rig));
    }
}

/// A storage that hangs is given up, and its frontend comes back: what hung is done again, by the worker that had
/// given it up.
#[test]
fn what_was_given_up_is_done_when_the_frontend_comes_back() {
    for (format, in_order) in formats() {
        let mut rig = Rig::new(format, in_order);
        let base = rig.base_after(0);
        started(
            &rig,
            Start {
                base,
                ..Start::AGAIN
            },
        );
        rig.storage.stop(true);
        rig.offer(4);
        rig.kick.write(1).expect("a kick");
        rig.until("all are taken", || (rig.in_flight() == 4).then_some(()));
        let (id, wipe) = (QUEUE.device, false);
        rig.tell(ToWorker::GiveUp { id, wipe });
        rig.tell(ToWorker::Stop { queue: QUEUE });
        rig.storage.stop(false);
        assert!(matches!(rig.hear(), FromWorker::Stopped { .. }));
        assert_eq!((rig.look(), rig.in_flight()), (0, 4));
        started(&rig, Start::AGAIN);
        rig.wait(4);
        rig.check_done(0..4);
        rig.wait_called();
        assert_eq!(rig.stop(), Some(rig.base_after(4)));
        assert_eq!(rig.in_flight(), 0);
    }
}

/// A driver may have changed a chain since: then it has broken its ring, as ever. (A packed ring's chain is
/// in the region, as it was.)
#[test]
fn a_chain_that_is_broken_by_now_retires_the_queue() {
    let format = bulkhead_dataplane::virtqueue::Format::Split;
    let mut rig = died(format, false);
    rig.spoil(2);
    started(&rig, Start::AGAIN);
    assert!(matches!(rig.hear(), FromWorker::Retired { .. }));
    rig.look();
    rig.check_open([2, 3, 4, 5]);
    rig.stop();
}

/// What can't be understood is refused, and the queue does not run.
#[test]
fn a_region_that_nobody_here_knows_is_refused() {
    for (format, in_order) in formats() {
        let rig = died(format, in_order);
        rig.set_version(7);
        let said = rig.start(Start::AGAIN);
        let FromWorker::StartFailed { reason, .. } = said else {
            panic!("{said:?}");
        };
        assert!(reason.contains("version 7"), "{reason}");
        assert_eq!(rig.stop(), None);
    }
}
