//! Both ends together.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::message::Notification;
use super::{Change, FdName, Keeper, MAX_FDS, Store, StoreError};

fn name(text: &str) -> FdName {
    text.parse().unwrap()
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

fn ends(limit: usize) -> (Keeper, Store) {
    let (keeper, theirs) = Keeper::pair().unwrap();
    (keeper, Store::new(theirs, limit).unwrap())
}

/// The next message and how many descriptors came with it.
fn next(keeper: &Keeper) -> (Notification, usize) {
    let received = keeper.receive().unwrap().unwrap();
    (received.notification.unwrap(), received.fds.len())
}

#[test]
fn the_kept_descriptors_are_there_before_the_process_asks() {
    let (keeper, theirs) = Keeper::pair().unwrap();
    let file = null();
    let longest = |i: usize| name(&format!("longest-name{i:04}"));
    let stored: Vec<(FdName, BorrowedFd<'_>)> =
        (0..300).map(|i| (longest(i), file.as_fd())).collect();
    keeper.hand_over(&stored).unwrap();
    let mut store = Store::new(theirs, 4096).unwrap();
    assert_eq!(store.len(), 300);
    let taken = store.taken();
    let names: Vec<FdName> = taken.iter().map(|(name, _)| *name).collect();
    assert!(names.into_iter().eq((0..300).map(longest)));
    assert!(store.taken().is_empty(), "they are given once");
    store.remove(longest(7)).unwrap();
    let gone = Notification::Remove { name: longest(7) };
    assert_eq!(next(&keeper), (gone, 0));
    assert_eq!(store.len(), 299);
}

#[test]
fn a_push_of_many_is_several_messages_and_one_over_the_limit_is_none() {
    let (keeper, mut store) = ends(MAX_FDS + 3);
    let file = null();
    let many = vec![file.as_fd(); MAX_FDS + 2];
    store.push(name("a"), &many).unwrap();
    let stored = Notification::Store { name: name("a") };
    assert_eq!(next(&keeper), (stored, MAX_FDS));
    assert_eq!(next(&keeper), (stored, 2));
    let error = store.push(name("b"), &many[..2]).unwrap_err();
    assert!(matches!(error, StoreError::Full { more: 2, .. }), "{error}");
    store.push(name("b"), &many[..1]).unwrap();
    store.remove(name("never")).unwrap();
    assert_eq!(next(&keeper), (Notification::Store { name: name("b") }, 1));
    store.remove_all().unwrap();
    assert!(store.is_empty());
    assert_eq!(next(&keeper), (Notification::Remove { name: name("a") }, 0));
    assert_eq!(next(&keeper), (Notification::Remove { name: name("b") }, 0));
    let nothing = keeper.receive().unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_barrier_is_reached_when_the_keeper_closes_it_and_not_when_it_dies() {
    let (keeper, store) = ends(1);
    let barrier = store.barrier().unwrap();
    assert!(!store.reached(&barrier, Duration::ZERO).unwrap());
    let received = keeper.receive().unwrap().unwrap();
    assert_eq!(received.notification, Ok(Notification::Barrier));
    assert!(!store.reached(&barrier, Duration::ZERO).unwrap());
    drop(received);
    assert!(store.reached(&barrier, Duration::from_secs(20)).unwrap());
    let unread = store.barrier().unwrap();
    drop(keeper);
    let error = store.reached(&unread, Duration::from_secs(20)).unwrap_err();
    assert!(matches!(error, StoreError::Closed), "{error}");
    assert!(matches!(store.barrier(), Err(StoreError::Closed)));
}

#[test]
fn what_a_process_sent_is_there_after_its_end() {
    let (keeper, mut store) = ends(8);
    store.push(name("last"), &[null().as_fd()]).unwrap();
    drop(store);
    let stored = Notification::Store { name: name("last") };
    assert_eq!(next(&keeper), (stored, 1));
    assert!(keeper.receive().unwrap().is_none());
}

#[test]
fn a_candidate_follows_what_the_process_before_it_does() {
    let (keeper, theirs) = Keeper::pair().unwrap();
    let file = null();
    let (a, b) = (name("a"), name("b"));
    let entry = |name| (name, file.as_fd());
    keeper.hand_over(&[entry(a), entry(b), entry(a)]).unwrap();
    // What was removed before it looked is not there at all.
    keeper.hand_removal(b).unwrap();
    let mut store = Store::new(theirs, 100).unwrap();
    let names: Vec<FdName> = store.taken().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, [a, a]);
    assert!(store.follow().unwrap().is_none());
    keeper.hand_over(&[entry(b)]).unwrap();
    keeper.hand_removal(a).unwrap();
    match store.follow().unwrap().unwrap() {
        Change::Stored(fds) => assert_eq!((fds.len(), fds[0].0), (1, b)),
        Change::Removed(name) => panic!("{name} was not removed"),
    }
    match store.follow().unwrap().unwrap() {
        Change::Removed(name) => assert_eq!(name, a),
        Change::Stored(fds) => panic!("{fds:?} were not stored"),
    }
    assert!(store.follow().unwrap().is_none());
    assert_eq!(store.len(), 1, "what it counts by itself follows too");
}

#[test]
fn what_rot_can_not_have_sent_is_no_change() {
    let (keeper, theirs) = Keeper::pair().unwrap();
    let mut store = Store::new(theirs, 100).unwrap();
    for text in ["FDSTORE=1", "LISTEN_FDS=1\nLISTEN_FDNAMES=a", "x"] {
        nix::unistd::write(&keeper, text.as_bytes()).unwrap();
        assert!(
            matches!(store.follow(), Err(StoreError::Malformed)),
            "{text}"
        );
    }
}
