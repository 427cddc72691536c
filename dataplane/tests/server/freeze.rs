//! A server that stops for another process, and goes on because none does: nothing is lost, nothing is in flight while it
//! is stopped, and it has a fence exactly while something may be.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::fence::Fence;
use bulkhead_dataplane::server::{Access, Event, Offer};
use bulkhead_dataplane::storage::{FileSpec, StorageSpec};
use bulkhead_dataplane::stored::{Keeper, Place, StoredCache, StoredVolume};
use bulkhead_dataplane::worker::message::DeviceId;
use bulkhead_integration::disk::{DATA, Disk, Options, Request};
use bulkhead_integration::driver::kind;
use bulkhead_protocol::fd_store::{self, Store};
use bulkhead_protocol::keys::VolumeGrant;
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::{DiscardPolicy, VolumeId};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::rig::{PATIENCE, Rig};

const BYTES: u64 = 1 << 20;
/// Requests under way on each queue.
const DEPTH: u16 = 8;

/// rot's end of a store, which keeps nothing but is there, and a place in it.
fn place(file: OwnedFd, listener: OwnedFd, room: usize) -> (fd_store::Keeper, Place) {
    let (rot, ours) = fd_store::Keeper::pair().expect("a pair");
    let store = Store::new(ours, room).expect("a store");
    let (keeper, _) = Keeper::take(store).expect("empty");
    let grant = VolumeGrant {
        volume: VolumeId([7; 16]),
        socket: "disk".parse().expect("a name"),
        allowed_uid: 0,
        size_bytes: BYTES,
        logical_block_bytes: 512,
        data_unit_bytes: None,
        read_only: false,
        serial: String::new(),
        queues: 2,
        discard: DiscardPolicy::Ignore,
        epoch: 1,
        rekey: None,
        limits: Limits::default(),
        group: None,
    };
    let place = keeper.place(StoredVolume {
        grant,
        file: Arc::new(file),
        listener: Arc::new(listener),
        key: None,
        previous_key: None,
        refuses_new: false,
        cache: StoredCache::default(),
        connection: None,
    });
    (rot, place.expect("room"))
}

struct Scene {
    rig: Rig,
    id: DeviceId,
    disk: Disk,
    rot: fd_store::Keeper,
}

fn scene() -> Scene {
    scene_with(64)
}

/// With room for so many descriptors in rot's store.
fn scene_with(room: usize) -> Scene {
    let rig = Rig::new();
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    file.as_file().set_len(BYTES).expect("length");
    let spec = FileSpec::from_fd(file.reopen().expect("reopen").into(), false, 512);
    let geometry = Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: [0; 20],
        queues: 2,
        discard: false,
    };
    let storage = StorageSpec::File(spec.expect("usable"));
    let device = BlkDevice::new(geometry, BYTES / 512, storage, None);
    let path = rig.dir.path().join("kept.sock");
    let listener = UnixListener::bind(&path).expect("bind");
    let theirs = listener.try_clone().expect("dup").into();
    let (rot, place) = place(file.reopen().expect("reopen").into(), theirs, room);
    let id = rig.ask(move |server| {
        let offered = server.offer(Offer {
            device: device.into(),
            listener,
            access: Access { allowed_uid: None },
            label: "disk".to_owned(),
            place,
            aside: None,
        });
        offered.expect("watched")
    });
    assert!(matches!(
        rig.event(),
        Event::Attached { result: Ok(()), .. }
    ));
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let disk = Disk::attach(&path, &options).expect("attaches");
    assert!(matches!(rig.event(), Event::Connected { .. }));
    Scene { rig, id, disk, rot }
}

fn request(slot: u16) -> Request {
    Request {
        kind: kind::OUT,
        sector: u64::from(slot) * 8,
        segments: vec![(DATA + u64::from(slot) * 4096, 4096)],
    }
}

/// Requests on both queues, which the device sees.
fn begin(disk: &mut Disk) {
    for queue in 0..2 {
        for slot in queue * DEPTH..(queue + 1) * DEPTH {
            let queue = usize::from(queue);
            disk.push(queue, slot, &request(slot)).expect("room");
        }
        disk.publish(usize::from(queue)).expect("published");
    }
}

/// All of them end.
fn finish(disk: &mut Disk, round: u32) {
    for queue in 0..2 {
        for _ in 0..DEPTH {
            let used = disk.rings[queue].wait_used(&disk.memory, PATIENCE);
            used.unwrap_or_else(|e| panic!("round {round}: {e}"));
        }
    }
}

fn hangs_up(end: &OwnedFd, wait: Duration) -> bool {
    let wait = PollTimeout::try_from(wait).expect("short");
    poll(&mut [PollFd::new(end.as_fd(), PollFlags::empty())], wait).expect("poll") == 1
}

fn thaw(rig: &Rig) -> OwnedFd {
    let (fence, end) = Fence::new().expect("a fence");
    rig.ask(move |server| server.thaw(Some(&fence)));
    end
}

#[test]
fn it_stops_under_load_with_nothing_in_flight_and_goes_on_where_it_was() {
    let Scene {
        rig,
        mut disk,
        rot: _rot,
        ..
    } = scene();
    let mut fence: Option<OwnedFd> = None;
    for round in 0..50 {
        begin(&mut disk);
        rig.ask(|server| server.freeze()).expect("it can");
        assert!(matches!(rig.event(), Event::Frozen), "round {round}");
        if let Some(fence) = fence {
            assert!(hangs_up(&fence, PATIENCE), "round {round}: it is still up");
        }
        // What ended has; nothing more does. (A kick now is not lost either.)
        let mut ended = 0;
        for queue in 0..2 {
            while let Some(_used) = disk.rings[queue].poll_used(&disk.memory).expect("a ring") {
                ended += 1;
            }
        }
        disk.publish(0).expect("a kick");
        std::thread::sleep(Duration::from_millis(1));
        for ring in &mut disk.rings {
            assert!(ring.poll_used(&disk.memory).expect("a ring").is_none());
        }
        let end = thaw(&rig);
        assert!(matches!(rig.event(), Event::Thawed), "round {round}");
        assert!(!hangs_up(&end, Duration::ZERO));
        fence = Some(end);
        let mut left = u32::from(DEPTH) * 2 - ended;
        let deadline = std::time::Instant::now() + PATIENCE;
        while left > 0 {
            assert!(
                std::time::Instant::now() < deadline,
                "round {round}: {left} are lost"
            );
            for ring in &mut disk.rings {
                while ring.poll_used(&disk.memory).expect("a ring").is_some() {
                    left -= 1;
                }
            }
        }
    }
    begin(&mut disk);
    finish(&mut disk, 50);
}

#[test]
fn who_is_told_to_go_on_before_it_has_stopped_goes_on() {
    let Scene {
        rig,
        mut disk,
        rot: _rot,
        ..
    } = scene();
    for round in 0..50 {
        begin(&mut disk);
        rig.ask(|server| server.freeze()).expect("it can");
        let end = thaw(&rig);
        let mut event = rig.event();
        if matches!(event, Event::Frozen) {
            event = rig.event();
        }
        assert!(matches!(event, Event::Thawed), "round {round}: {event:?}");
        finish(&mut disk, round);
        assert!(!hangs_up(&end, Duration::ZERO));
    }
}

#[test]
fn messages_wait_until_it_goes_on_and_a_frontend_that_left_is_gone() {
    let Scene {
        rig,
        id,
        disk,
        rot: _rot,
    } = scene();
    rig.ask(|server| server.freeze()).expect("it can");
    assert!(matches!(rig.event(), Event::Frozen));
    std::thread::scope(|scope| {
        let asks = scope.spawn(|| disk.stop_queue_at(0));
        assert!(rig.quiet() && !asks.is_finished());
        thaw(&rig);
        asks.join().expect("it ends").expect("it is answered");
    });
    assert!(matches!(rig.event(), Event::Thawed));
    rig.ask(|server| server.freeze()).expect("it can");
    assert!(matches!(rig.event(), Event::Frozen));
    drop(disk);
    assert!(rig.quiet() && rig.status(id).connected);
    thaw(&rig);
    assert!(matches!(rig.event(), Event::Thawed));
    assert!(matches!(rig.event(), Event::Disconnected { .. }));
}

#[test]
fn a_frontend_that_is_not_remembered_connects_again_and_holds_up_nobody() {
    // Room for the volume, and for a part of its connection.
    let Scene {
        rig,
        id,
        mut disk,
        rot: _rot,
    } = scene_with(8);
    begin(&mut disk);
    rig.ask(|server| server.freeze()).expect("it can");
    assert!(matches!(rig.event(), Event::Frozen));
    let refused = disk.capacity_sectors();
    assert!(refused.is_err(), "it was hung up on");
    thaw(&rig);
    assert!(matches!(rig.event(), Event::Thawed));
    assert!(matches!(rig.event(), Event::Disconnected { .. }));
    assert!(!rig.status(id).connected);
    let path = rig.dir.path().join("kept.sock");
    let mut again = Disk::attach(&path, &Options::default()).expect("attaches");
    again.read(0, 0, 512).expect("it is served");
}

#[test]
fn what_could_not_be_handed_over_keeps_it_going() {
    let mut rig = Rig::new();
    let (_, path) = rig.attach(None);
    assert_eq!(
        rig.ask(|server| server.freeze()),
        Ok(()),
        "nobody is connected"
    );
    assert!(matches!(rig.event(), Event::Frozen));
    rig.ask(|server| server.thaw(None));
    assert!(matches!(rig.event(), Event::Thawed));
    let mut disk = Disk::attach(&path, &Options::default()).expect("attaches");
    assert!(matches!(rig.event(), Event::Connected { .. }));
    let refused = rig.ask(|server| server.freeze());
    assert!(refused.expect_err("it is stored nowhere").contains("disk"));
    disk.read(0, 0, 512).expect("it is served");
    let (fence, end) = Fence::new().expect("a fence");
    rig.ask(move |server| server.wait_for_fence(1, end))
        .expect("watched");
    let refused = rig.ask(|server| server.freeze());
    assert!(refused.expect_err("a fence is up").contains("under way"));
    drop(fence);
}
