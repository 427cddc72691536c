//! Descriptors come before the state that names them and go after it; a successor has exactly what the last
//! state names, wherever its predecessor died.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_dataplane::stored::file::FILE_BYTES;
use bulkhead_dataplane::stored::format::{COPIES, COPY_BYTES, WRITTEN_BY};
use bulkhead_dataplane::stored::{
    Fd, Found, Inherited, Keeper, Place, Step, Stored, StoredCache, StoredPort, StoredSwitch,
    StoredVolume,
};
use bulkhead_protocol::fd_store::FdName;
use bulkhead_protocol::fd_store::message::Notification;
use nix::sys::uio::{pread, pwrite};

use crate::rot::{Rot, Sent, copy};
use crate::sample::{connection, fd, idle, idle_nic, same};

fn volume() -> StoredVolume<Fd> {
    idle(2, &mut fd)
}

fn take(rot: &mut Rot) -> (Keeper, Found) {
    Keeper::take(rot.start()).expect("rot is there")
}

/// A keeper with one volume, and what became of it.
fn begin(rot: &mut Rot) -> (Keeper, Place) {
    let (keeper, found) = take(rot);
    assert!(found.places.is_empty() && found.lost.is_empty());
    let place = keeper.place(volume()).expect("room");
    (keeper, place)
}

/// The same but for the descriptors, each of which is the same file.
fn assert_same(one: &StoredVolume<Fd>, other: &StoredVolume<Fd>) {
    let count = |volume: &StoredVolume<Fd>| {
        let mut fds = Vec::new();
        let volume = volume.clone();
        let counted: Result<_, ()> = volume.try_map(&mut |fd| {
            fds.push(fd);
            Ok(fds.len())
        });
        (counted.expect("no failure"), fds)
    };
    let ((one, ones), (other, others)) = (count(one), count(other));
    assert_eq!(one, other);
    assert!(
        ones.iter()
            .zip(&others)
            .all(|(one, other)| same(one, other))
    );
}

#[test]
fn a_successor_has_what_was_put_last() {
    let mut rot = Rot::new();
    let (keeper, mut place) = begin(&mut rot);
    let second = keeper.place(volume()).expect("room");
    let cache = StoredCache::default();
    place.put_connection(cache, Some(connection(2, 3, &mut fd)));
    place
        .update(|volume| volume.refuses_new = true)
        .expect("put");
    place.mark(Step::Idle);
    let (first, other) = (place.volume().cloned(), second.volume().cloned());
    let first = first.expect("kept");
    assert_eq!(first.cache, cache);
    drop((keeper, place, second));
    for _ in 0..3 {
        let (_, found) = take(&mut rot);
        assert!(found.lost.is_empty(), "{:?}", found.lost);
        let [one, two] = &found.places[..] else {
            panic!("two volumes: {found:?}");
        };
        assert_same(one.volume().expect("kept"), &first);
        assert_same(two.volume().expect("kept"), other.as_ref().expect("kept"));
        assert_eq!(rot.settle(), Vec::<String>::new(), "all of it is named");
    }
}

#[test]
fn descriptors_come_first_and_go_last() {
    let mut rot = Rot::new();
    let (_keeper, mut place) = begin(&mut rot);
    let said = rot.settle();
    assert_eq!(said, ["+v0.0", "+v0.1", "+v0.2", "+v0.3", "+v0.state"]);
    let mut one = connection(2, 1, &mut fd);
    one.log = None;
    place.put_connection(StoredCache::default(), Some(one.clone()));
    assert_eq!(
        rot.settle().len(),
        10,
        "socket, memory, region, backend, six of queues"
    );
    place.put_connection(StoredCache::default(), Some(one.clone()));
    place.mark(Step::Idle);
    assert_eq!(rot.settle(), Vec::<String>::new(), "nothing is new");
    one.vrings[1].call = Some(fd());
    place.put_connection(StoredCache::default(), Some(one));
    assert_eq!(rot.settle(), ["+v0.14", "-v0.10"], "one for another");
    place.put_connection(StoredCache::default(), None);
    assert_eq!(rot.settle().len(), 10);
    let names = ["v0.0", "v0.1", "v0.2", "v0.3", "v0.state"];
    assert_eq!(rot.names(), names);
    place.remove();
    assert_eq!(rot.settle()[0], "-v0.state", "the state goes first");
    assert_eq!(rot.names(), Vec::<String>::new());
}

/// The bytes of the state in slot 0.
fn state(rot: &Rot) -> (&OwnedFd, Vec<u8>) {
    let named = |(name, _): &&(FdName, OwnedFd)| name.as_str() == "v0.state";
    let (_, fd) = rot.stored.iter().find(named).expect("the state");
    let mut bytes = vec![0; COPIES * COPY_BYTES];
    assert_eq!(pread(fd, &mut bytes, 0), Ok(bytes.len()));
    (fd, bytes)
}

/// Dies after each message to rot, before and after the state is written: the successor has the connection as
/// it was before or as it is then, and nothing else is stored.
#[test]
fn a_death_at_any_step_leaves_one_state_or_the_other() {
    let mut rot = Rot::new();
    let (keeper, mut place) = begin(&mut rot);
    place.put_connection(StoredCache::default(), Some(connection(2, 2, &mut fd)));
    rot.settle();
    let (before, (_, bytes_before)) = (place.volume().cloned().expect("kept"), state(&rot));
    let mut next = connection(2, 4, &mut fd);
    next.socket = Arc::clone(&before.connection.as_ref().expect("one").socket);
    place.put_connection(StoredCache::default(), Some(next));
    let after = place.volume().cloned().expect("kept");
    drop((keeper, place));
    let bytes_after = state(&rot).1;
    let sent = rot.receive();
    let pushes = |(notification, _): &&Sent| matches!(notification, Notification::Store { .. });
    let pushes = sent.iter().take_while(pushes).count();
    assert_eq!((pushes, sent.len()), (13, 13 + 11));
    for died_after in 0..=sent.len() {
        for (bytes, expected) in [(&bytes_before, &before), (&bytes_after, &after)] {
            let is_before = std::ptr::eq(bytes, &bytes_before);
            if died_after != pushes && is_before != (died_after < pushes) {
                continue;
            }
            let mut rot = rot.try_clone();
            for (notification, fds) in &sent[..died_after] {
                rot.apply((*notification, fds.iter().map(copy).collect()));
            }
            assert_eq!(pwrite(state(&rot).0, bytes, 0), Ok(bytes.len()));
            let (_, found) = take(&mut rot);
            assert!(found.lost.is_empty(), "{died_after}: {:?}", found.lost);
            assert_same(found.places[0].volume().expect("kept"), expected);
            assert_eq!(rot.names().len(), 5 + count(expected), "{died_after}");
        }
    }
}

fn volume_of(stored: Stored<Fd>) -> StoredVolume<Fd> {
    match stored {
        Stored::Volume(volume) => volume,
        other => panic!("no volume: {other:?}"),
    }
}

/// Descriptors of its connection.
fn count(volume: &StoredVolume<Fd>) -> usize {
    let mut fds = 0;
    let counted: Result<_, ()> = volume.connection.clone().expect("one").try_map(&mut |_| {
        fds += 1;
        Ok(())
    });
    counted.map(|_| fds).expect("no failure")
}

#[test]
fn what_no_state_names_is_removed() {
    let mut rot = Rot::new();
    let (keeper, place) = begin(&mut rot);
    drop((keeper, place));
    rot.settle();
    let lone = fd();
    for name in ["v0.77", "v5.1", "v5.2", "else", "v0.077"] {
        let name = name.parse().expect("a name");
        rot.stored
            .push((name, lone.as_fd().try_clone_to_owned().expect("dup")));
    }
    let (_, found) = take(&mut rot);
    assert_eq!((found.places.len(), found.lost.len()), (1, 0));
    assert_eq!(rot.names(), ["v0.0", "v0.1", "v0.2", "v0.3", "v0.state"]);
}

#[test]
fn a_state_that_can_not_be_read_is_removed_with_all_that_it_has() {
    let mut rot = Rot::new();
    let (keeper, place) = begin(&mut rot);
    let second = keeper.place(volume()).expect("room");
    drop((keeper, place, second));
    rot.settle();
    for (name, fd) in &mut rot.stored {
        if name.as_str() == "v0.state" {
            *fd = memfd(FILE_BYTES);
        }
    }
    let (keeper, found) = take(&mut rot);
    assert_eq!(
        (found.places.len(), found.lost.len()),
        (1, 1),
        "{:?}",
        found.lost
    );
    assert!(found.lost[0].contains("slot 0"), "{}", found.lost[0]);
    let names = ["v1.0", "v1.1", "v1.2", "v1.3", "v1.state"];
    assert_eq!(rot.names(), names);
    // Its slot is free.
    let _place = keeper.place(volume()).expect("room");
    assert!(rot.names().contains(&"v0.state".to_owned()));
}

fn memfd(bytes: u64) -> OwnedFd {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let fd = memfd_create("x", MFdFlags::MFD_CLOEXEC).expect("memfd");
    nix::unistd::ftruncate(&fd, i64::try_from(bytes).expect("short")).expect("length");
    fd
}

#[test]
fn a_volume_outlives_a_connection_of_which_something_is_missing() {
    let mut rot = Rot::new();
    let (keeper, mut place) = begin(&mut rot);
    place.put_connection(StoredCache::default(), Some(connection(2, 2, &mut fd)));
    drop((keeper, place));
    rot.settle();
    rot.stored.retain(|(name, _)| name.as_str() != "v0.6");
    let (_, found) = take(&mut rot);
    let volume = found.places[0].volume().expect("kept");
    assert!(
        volume.connection.is_none() && found.lost.len() == 1,
        "{:?}",
        found.lost
    );
    assert_eq!(rot.names(), ["v0.0", "v0.1", "v0.2", "v0.3", "v0.state"]);
}

#[test]
fn a_full_store_costs_the_connection_and_nothing_else() {
    let mut rot = Rot::new();
    rot.limit = 1 + 5 + 20;
    let (keeper, mut place) = begin(&mut rot);
    place.put_connection(StoredCache::default(), Some(connection(2, 20, &mut fd)));
    let names = ["v0.0", "v0.1", "v0.2", "v0.3", "v0.state"];
    assert_eq!(rot.names(), names, "what was stored of it is removed");
    // It is not tried again for this connection, but for the next.
    place.put_connection(StoredCache::default(), Some(connection(2, 1, &mut fd)));
    assert_eq!(rot.names(), names);
    place.put_connection(StoredCache::default(), None);
    place.put_connection(StoredCache::default(), Some(connection(2, 1, &mut fd)));
    assert!(rot.names().len() > 5);
    // A volume that does not fit leaves nothing.
    let before = rot.names();
    while keeper.place(volume()).map(std::mem::forget).is_ok() {}
    let after = rot.names();
    assert!(after.len() <= 25 && (after.len() - before.len()).is_multiple_of(5));
    drop(place);
}

#[test]
fn no_volume_takes_away_what_is_the_share_of_another() {
    let mut rot = Rot::new();
    // Half of it is 60, and each has 16 of that whatever the others have.
    rot.limit = 120;
    let (keeper, mut greedy) = begin(&mut rot);
    let mut modest = keeper.place(volume()).expect("room");
    let put = |place: &mut Place, regions| {
        let cache = StoredCache::default();
        place.put_connection(cache, None);
        place.put_connection(cache, Some(connection(2, regions, &mut fd)));
        place.connection().is_some()
    };
    assert!(put(&mut greedy, 35), "nobody else needs it");
    assert!(put(&mut modest, 2), "4 and 12");
    assert!(!put(&mut modest, 5), "4 and 15, and half is taken");
    assert!(put(&mut modest, 2), "the next connection");
    assert!(!put(&mut greedy, 60), "the other half");
    assert!(put(&mut modest, 5), "there is some of it again");
}

#[test]
fn a_failed_flush_is_known_to_the_successor() {
    let mut rot = Rot::new();
    let (keeper, place) = begin(&mut rot);
    let flag = place.flush_failed().expect("kept");
    assert!(!flag.is_raised());
    flag.raise();
    drop((keeper, place, flag));
    let (_, found) = take(&mut rot);
    assert!(found.places[0].flush_failed().expect("kept").is_raised());
}

/// A candidate sees what the process that serves does, leaves all of it alone, and then has it.
#[test]
fn a_candidate_follows_and_takes_over_when_it_is_told_to() {
    let mut rot = Rot::new();
    let (keeper, mut place) = begin(&mut rot);
    let mut candidate = Inherited::of(rot.start_candidate());
    assert_eq!(candidate.look().len(), 1);
    let first = volume_of(candidate.look().remove(0).1);
    assert_same(&first, place.volume().expect("kept"));
    assert!(!candidate.follow().expect("rot"), "nothing has happened");
    // The state is there before rot has passed on what it names: nothing can be made out of it yet.
    place.put_connection(StoredCache::default(), Some(connection(2, 2, &mut fd)));
    let second = keeper.place(volume()).expect("room");
    assert_eq!(candidate.look().len(), 0);
    rot.settle();
    assert!(candidate.follow().expect("rot"));
    let seen = candidate.look();
    assert_eq!(seen.len(), 2);
    let seen = volume_of(seen[0].1.clone());
    assert_same(&seen, place.volume().expect("kept"));
    assert!(Arc::ptr_eq(&seen.file, &first.file), "it is the same one");
    place.remove();
    rot.settle();
    assert!(candidate.follow().expect("rot"));
    assert_eq!(candidate.look().len(), 1);
    let kept = second.volume().cloned().expect("kept");
    drop((keeper, second));
    let before = rot.names();
    rot.promote();
    let (_keeper, found) = candidate.take_over().expect("rot");
    assert!(found.lost.is_empty(), "{:?}", found.lost);
    assert_same(found.places[0].volume().expect("kept"), &kept);
    assert_eq!(rot.names(), before, "all of it is still stored");
}

#[test]
fn a_card_and_a_switch_are_found_too() {
    let mut rot = Rot::new();
    let (keeper, _) = take(&mut rot);
    let switch = StoredSwitch {
        name: "lan".parse().expect("a name"),
        uplink: None,
        port: StoredPort::nothing(),
    };
    if WRITTEN_BY < 3 {
        assert!(keeper.place(switch).is_err(), "it knows no switches");
        assert_eq!(rot.names(), Vec::<String>::new(), "nothing is left");
        return;
    }
    let of_switch = keeper.place(switch.clone()).expect("room");
    let mut place = keeper.place(idle_nic(2, &mut fd)).expect("room");
    assert_eq!(
        rot.names(),
        ["v0.state", "v1.0", "v1.1", "v1.2", "v1.state"]
    );
    place.put_connection(StoredCache::default(), Some(connection(4, 2, &mut fd)));
    place
        .update_nic(|nic| nic.refuses_new = false)
        .expect("put");
    place.begins(3);
    place.mark(Step::Idle);
    let kept = place.stored().cloned().expect("kept");
    assert!(place.volume().is_none() && place.connection().is_some());
    drop((keeper, place, of_switch));
    let (keeper, mut found) = take(&mut rot);
    assert!(found.lost.is_empty(), "{:?}", found.lost);
    let (nic, of_switch) = (
        found.places.pop().expect("one"),
        found.places.pop().expect("two"),
    );
    let Some(Stored::Switch(stored)) = of_switch.stored() else {
        panic!("no switch: {of_switch:?}");
    };
    assert!(stored.name == switch.name && stored.port.taps.is_empty());
    let inodes = |stored: &Stored<Fd>| {
        let inode = |fd: Fd| Ok::<_, ()>(nix::sys::stat::fstat(&fd).expect("stat").st_ino);
        stored.clone().try_map(&mut { inode }).expect("no failure")
    };
    assert_eq!(inodes(nic.stored().expect("kept")), inodes(&kept));
    let Some(Stored::Nic(stored)) = nic.stored() else {
        panic!("no card: {nic:?}");
    };
    let connection = stored.connection.as_ref().expect("one");
    assert!(!stored.refuses_new && !connection.vrings[3].anew && connection.vrings[2].anew);
    nic.remove();
    of_switch.remove();
    assert_eq!(rot.names(), Vec::<String>::new());
    drop(keeper);
}

#[test]
fn fences_stay_until_they_are_removed() {
    let mut rot = Rot::new();
    let (keeper, _) = take(&mut rot);
    let fence = fd();
    keeper.keep_fence(1, fence.as_fd()).expect("stored");
    keeper.keep_fence(3, fence.as_fd()).expect("stored");
    let (keeper, found) = take(&mut rot);
    let generations: Vec<_> = found.fences.iter().map(|(g, _)| *g).collect();
    assert_eq!(generations, [1, 3]);
    keeper.remove_fence(1).expect("removed");
    assert_eq!(rot.names(), ["fence.3"]);
}

#[test]
fn without_a_store_nothing_is_kept() {
    let keeper = Keeper::none();
    let mut place = keeper.place(volume()).expect("nothing to do");
    place.put_connection(StoredCache::default(), Some(connection(2, 2, &mut fd)));
    place
        .update(|_| panic!("there is nothing to change"))
        .expect("nothing to do");
    assert!(!keeper.keeps() && !place.keeps() && place.flush_failed().is_none());
    keeper.keep_fence(1, fd().as_fd()).expect("nothing to do");
    place.remove();
}
