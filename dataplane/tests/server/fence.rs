//! The fence of an earlier process: what waits for it, and what does not (ADR 0029).

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use bulkhead_dataplane::fence::Fence;
use bulkhead_dataplane::server::Event;
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::worker::message::DeviceId;
use bulkhead_integration::disk::{DATA, Disk, Options, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::frontend::wait_readable;

use crate::rig::{PATIENCE, Rig};

fn fenced() -> (Rig, DeviceId, Disk, Fence) {
    let mut rig = Rig::new();
    let (fence, end): (Fence, OwnedFd) = Fence::new().expect("a fence");
    rig.ask(move |server| server.wait_for_fence(7, end))
        .expect("it is watched");
    let (id, path) = rig.attach(None);
    let disk = Disk::attach(&path, &Options::default()).expect("queues start");
    assert!(matches!(rig.event(), Event::Connected { .. }));
    (rig, id, disk, fence)
}

fn read(disk: &mut Disk) {
    let request = Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA, 512)],
    };
    disk.push(0, 0, &request).expect("room");
    disk.publish(0).expect("published");
}

#[test]
fn nothing_is_served_before_the_last_request_of_an_earlier_process_has_ended() {
    let (rig, id, mut disk, fence) = fenced();
    read(&mut disk);
    let early = disk.rings[0].wait_used(&disk.memory, Duration::from_millis(300));
    assert!(early.is_err(), "served behind the fence: {early:?}");
    let status = rig.status(id);
    assert!(status.waits_for_volume && !status.holds_volume);
    drop(fence);
    assert!(matches!(rig.event(), Event::FenceGone { number: 7 }));
    let served = disk.rings[0].wait_used(&disk.memory, PATIENCE);
    assert!(served.is_ok(), "{served:?}: {:?}", rig.status(id));
    assert!(rig.status(id).holds_volume);
}

#[test]
fn a_stop_is_answered_when_the_fence_is_gone_and_other_questions_before() {
    let (_rig, _, mut disk, fence) = fenced();
    read(&mut disk);
    let stream = disk.frontend.stream();
    let question = |code: u32, body: &[u8]| {
        let length = u32::try_from(body.len()).expect("short");
        let mut bytes: Vec<u8> = [code, 1, length]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        bytes.extend(body);
        let mut stream = stream;
        stream.write_all(&bytes).expect("sent");
    };
    question(code::GET_QUEUE_NUM, &[]);
    let mut reply = [0; 20];
    (&mut &*stream).read_exact(&mut reply).expect("answered");
    question(code::GET_VRING_BASE, &[0; 8]);
    assert!(!wait_readable(stream.as_fd(), Duration::from_millis(300)));
    drop(fence);
    (&mut &*stream).read_exact(&mut reply).expect("answered");
    assert_eq!(reply[..4], code::GET_VRING_BASE.to_le_bytes());
}

#[test]
fn a_frontend_that_leaves_does_not_wait_for_the_fence_but_a_detach_does() {
    let (rig, id, disk, fence) = fenced();
    drop(disk);
    assert!(matches!(rig.event(), Event::Disconnected { .. }));
    rig.ask(move |server| server.detach(id));
    assert!(rig.quiet(), "its storage may still be written to");
    drop(fence);
    assert!(matches!(rig.event(), Event::FenceGone { .. }));
    assert!(matches!(rig.event(), Event::Detached { .. }));
}
