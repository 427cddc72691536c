//! The workers of a bundle: a data plane is told of them before anything else, and what is left of a delivery
//! goes to the one that is started with them.

use bulkhead_bundle::HostBundle;
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane};
use bulkhead_protocol::workers::Workers;

use crate::bundles::{bundle, id, plain, signed};
use crate::grants::volume_of;
use crate::host::{Host, yes_to};

fn workers(count: u16) -> Option<Workers> {
    Workers::new(Some(count), Vec::new()).ok()
}

fn with_workers(epoch: u64, count: u16) -> Vec<u8> {
    signed(&HostBundle {
        workers: workers(count),
        ..bundle(epoch, vec![plain(1), plain(2)])
    })
}

#[test]
fn a_data_plane_hears_of_its_workers_before_its_volumes_and_once() {
    let mut host = Host::without_peers();
    host.new_agent(crate::host::own_pidfd());
    assert_eq!(host.new_dataplane(), None, "there is no bundle yet");
    let first = with_workers(1, 2);
    let got = host.apply(&first, 3);
    let told = KeydToDataplane::Workers {
        workers: workers(2),
    };
    assert_eq!(got[0].message, told);
    assert_eq!(volume_of(&got[1].message), id(1));
    // The same again, and a bundle that differs in something else: nothing to say.
    host.apply(&first, 2);
    host.apply(&with_workers(2, 2), 2);
    // Those of before: a bundle that says nothing of them.
    let got = host.apply(&signed(&bundle(3, vec![plain(1), plain(2)])), 3);
    assert_eq!(got[0].message, KeydToDataplane::Workers { workers: None });
}

#[test]
fn a_data_plane_is_told_what_the_bundle_said_that_an_earlier_keyd_accepted() {
    let mut host = Host::new();
    let envelope = with_workers(1, 3);
    host.apply(&envelope, 3);
    assert_eq!(host.new_dataplane(), workers(3), "another data plane");
    host.start();
    host.new_agent(crate::host::own_pidfd());
    assert_eq!(host.new_dataplane(), workers(3), "before any bundle came");
    host.apply(&envelope, 2);
}

#[test]
fn one_that_ends_for_its_workers_leaves_its_volumes_to_the_next() {
    let mut host = Host::new();
    host.ask(&with_workers(1, 2));
    let told = host.delivered().message;
    assert_eq!(
        told,
        KeydToDataplane::Workers {
            workers: workers(2)
        }
    );
    host.say(&DataplaneToKeyd::WorkersHeard {
        restarts: true,
        holds: Vec::new(),
    });
    host.dataplane = None;
    assert_eq!(host.new_dataplane(), workers(2));
    let got = host.take(2);
    assert_eq!(volume_of(&got[1].message), id(2));
    assert_eq!(host.accepted(), (1, Vec::new()));
}

#[test]
fn grants_wait_until_the_data_plane_has_its_workers() {
    let mut host = Host::new();
    host.ask(&with_workers(1, 2));
    let told = host.delivered().message;
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(host.is_quiet(), "no grant yet");
    host.say(&yes_to(&told));
    host.take(2);
    assert_eq!(host.accepted(), (1, Vec::new()));
}

#[test]
fn one_that_ends_for_its_workers_and_is_not_followed_is_given_up() {
    let mut host = Host::new();
    host.ask(&with_workers(1, 2));
    host.delivered();
    host.say(&DataplaneToKeyd::WorkersHeard {
        restarts: true,
        holds: Vec::new(),
    });
    host.dataplane = None;
    let (epoch, undelivered) = host.accepted();
    assert_eq!((epoch, undelivered.len()), (1, 2));
}
