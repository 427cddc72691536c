//! `stored_state`: what a predecessor left of a volume, a network card or a switch, of any version and in any condition. Whatever it is, it is
//! refused, or read to values in their range that are written and read back the same.

use std::sync::Arc;

use bulkhead_dataplane::blk::config_space;
use bulkhead_dataplane::stored::format::{
    COPY_BYTES, FRAME_BYTES, FormatError, MAX_PAYLOAD_BYTES, Numbered, decode, encode, latest,
};
use bulkhead_dataplane::stored::{Fd, FdNumber, Stored, StoredConnection};
use bulkhead_dataplane::vhost_user::{Facts, Outbox, Session, feature, protocol_feature};
use bulkhead_dataplane::worker::message::DeviceId;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use sha2::{Digest, Sha256};

use crate::blk_request::device;
use crate::input::Input;

/// Length of the memfds that stand for every file that the state names.
const FILE_BYTES: i64 = 1 << 16;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    let (sequence, versions) = (input.u64(), [input.u16(), input.u16()]);
    let bytes = input.bytes(MAX_PAYLOAD_BYTES);
    // As it is, which the digest refuses, or with a digest that is right.
    let mut copy = match how % 4 {
        0 => bytes.to_vec(),
        _ => frame(sequence, versions, bytes),
    };
    copy.resize(COPY_BYTES, 0);
    let read = decode(&copy);
    let other = vec![0; COPY_BYTES];
    assert_eq!(latest([&copy, &other]).ok(), read.as_ref().ok().cloned());
    assert_eq!(latest([&other, &copy]).ok(), read.as_ref().ok().cloned());
    match read {
        Ok(numbered) => accepted(&numbered, &mut input),
        Err(FormatError::Newer { readable_by, .. }) => assert!(readable_by > 1),
        Err(_) => {}
    }
}

fn frame(sequence: u64, [written_by, readable_by]: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short");
    let mut bytes = b"bulkhead volume ".to_vec();
    bytes.extend(written_by.to_le_bytes());
    bytes.extend((readable_by % 4).to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend((sequence >> (sequence % 64)).to_le_bytes());
    // Volumes, cards, switches, and what nobody knows.
    bytes.push((written_by >> 8) as u8 % 4);
    bytes.extend([0; 15]);
    let digest = Sha256::new().chain_update(&bytes).chain_update(payload);
    bytes.extend(digest.finalize());
    assert_eq!(bytes.len(), FRAME_BYTES);
    bytes.extend(payload);
    bytes
}

/// What was read is written and read back the same, and a session is made of it or refused.
fn accepted(numbered: &Numbered, input: &mut Input<'_>) {
    let stored = &numbered.stored;
    if let Ok(again) = encode(numbered.sequence, stored) {
        assert_eq!(decode(&again).as_ref(), Ok(numbered));
    }
    resume(stored, input);
}

/// Has a session go on from it. Most descriptors are what they have to be; some are something else.
fn resume(stored: &Stored<FdNumber>, input: &mut Input<'_>) {
    let (Some(connection), Some(queues)) = (stored.connection().cloned(), stored.queues()) else {
        return;
    };
    let mut kinds = kinds(&connection).into_iter();
    let connection = connection.try_map(&mut |number: FdNumber| {
        let kind = kinds.next().ok_or(())?;
        Ok::<Fd, ()>(match (kind, number.0 % 16) {
            (_, 0) => socket(),
            (_, 1) => event(),
            (_, 2) => memory(),
            (kind, _) => kind(),
        })
    });
    let Ok(mut connection) = connection else {
        return;
    };
    let device = device(input);
    let facts = Facts {
        id: DeviceId(1),
        features: config_space::features(&device.geometry),
        queues,
        device: device.into(),
    };
    if input.flag() {
        // What else it says is seldom looked at.
        connection.features &= facts.features | feature::TRANSPORT;
        connection.protocol_features &= protocol_feature::OFFERED;
    }
    let socket = Arc::clone(&connection.socket);
    let (step, told) = (connection.step, connection.told_sectors);
    let Ok(mut session) = Session::resumed(facts, connection) else {
        return;
    };
    let before = session.remembered(&socket, step);
    assert_eq!(before.told_sectors, told);
    let mut out = Outbox::default();
    let _ = session.start_again(&mut out);
    assert!(out.replies.is_empty(), "nobody has asked anything");
    let _ = session.close(&mut out);
}

/// What each descriptor has to be, in the order of the fields.
fn kinds(connection: &StoredConnection<FdNumber>) -> Vec<fn() -> Fd> {
    let mut kinds: Vec<fn() -> Fd> = vec![socket];
    kinds.extend(connection.memory.iter().map(|_| memory as fn() -> Fd));
    for vring in &connection.vrings {
        let events = [vring.kick, vring.call, vring.error];
        let events = events.iter().flatten();
        kinds.extend(events.map(|_| event as fn() -> Fd));
    }
    kinds.extend(connection.inflight.map(|_| memory as fn() -> Fd));
    kinds.extend(connection.log.map(|_| memory as fn() -> Fd));
    kinds.extend(connection.backend.map(|_| socket as fn() -> Fd));
    kinds
}

fn memory() -> Fd {
    let fd = memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd");
    nix::unistd::ftruncate(&fd, FILE_BYTES).expect("length");
    Arc::new(fd)
}

fn event() -> Fd {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("eventfd");
    Arc::new(event.into())
}

fn socket() -> Fd {
    let (one, _) = std::os::unix::net::UnixStream::pair().expect("sockets");
    Arc::new(one.into())
}
