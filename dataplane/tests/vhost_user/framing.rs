//! A stream is the same messages in any pieces; descriptors belong to the message that they came with, and
//! none is left open; a frontend that does not read stops being read.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use bulkhead_dataplane::vhost_user::message::{HEADER_BYTES, MAX_BODY_BYTES, ProtocolError, code};
use bulkhead_dataplane::vhost_user::{Framing, Incoming, Message};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use proptest::prelude::*;

use crate::messages::{bytes, event, table, words};

fn pair() -> (UnixStream, Framing) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    (ours, Framing::new(theirs).expect("non-blocking"))
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let part = [IoSlice::new(bytes)];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &part, control, MsgFlags::empty(), None);
    assert_eq!(sent, Ok(bytes.len()));
}

/// Everything there is now.
fn take(framing: &mut Framing) -> Vec<Message> {
    let mut messages = Vec::new();
    loop {
        match framing.receive().expect("a stream") {
            Incoming::Message(message) => {
                framing.consume().expect("it is there");
                messages.push(message);
            }
            Incoming::Later => return messages,
            Incoming::End => panic!("the stream ended"),
        }
    }
}

/// Request, body and number of descriptors.
type Shape = (u32, Vec<u8>, usize);

fn shapes(messages: &[Message]) -> Vec<Shape> {
    let shape = |m: &Message| (m.header.code, m.body.clone(), m.fds.len());
    messages.iter().map(shape).collect()
}

fn three() -> (Vec<u8>, Vec<Shape>) {
    let bodies = [
        (code::SET_VRING_KICK, words(&[1])),
        (code::GET_FEATURES, Vec::new()),
        (code::SET_MEM_TABLE, table(&[(0, 4096), (8192, 4096)])),
    ];
    let stream = bodies.iter().flat_map(|(code, body)| bytes(*code, 1, body));
    let shapes = bodies.iter().map(|(code, body)| (*code, body.clone(), 0));
    (stream.collect(), shapes.collect())
}

#[test]
fn any_two_pieces_are_the_same_messages() {
    let (stream, expected) = three();
    for at in 0..=stream.len() {
        let (ours, mut framing) = pair();
        (&ours).write_all(&stream[..at]).expect("write");
        let mut messages = take(&mut framing);
        (&ours).write_all(&stream[at..]).expect("write");
        messages.extend(take(&mut framing));
        assert_eq!(shapes(&messages), expected, "split at {at}");
    }
}

#[test]
fn descriptors_with_any_byte_belong_to_its_message() {
    let (stream, mut expected) = three();
    let first = HEADER_BYTES + expected[0].1.len();
    expected[0].2 = 1;
    expected[2].2 = 2;
    let (one, two) = (event(), [event(), event()]);
    let two: Vec<_> = two.iter().map(AsFd::as_fd).collect();
    let third = first + HEADER_BYTES;
    for early in 0..first {
        for late in [third, third + 5, third + HEADER_BYTES, stream.len() - 1] {
            let (ours, mut framing) = pair();
            send(&ours, &stream[..early + 1], &[]);
            // Whether or not the first part was read by then.
            let mut messages = if late % 2 == 0 {
                take(&mut framing)
            } else {
                Vec::new()
            };
            if early + 1 < first {
                send(&ours, &stream[early + 1..late], &[one.as_fd()]);
            } else {
                // The first message has already ended: its descriptor comes with the second, which has none by
                // itself, and with what was sent with it. (If all are there, the first, which lacks its own, is
                // given it, too.)
                expected[0].2 = usize::from(messages.is_empty());
                expected[1].2 = usize::from(late == third);
                send(&ours, &stream[early + 1..late], &[one.as_fd()]);
            }
            send(&ours, &stream[late..], &two);
            messages.extend(take(&mut framing));
            assert_eq!(shapes(&messages), expected, "{early} {late}");
        }
    }
}

#[test]
fn too_many_descriptors_end_the_stream_and_are_closed() {
    let one = event();
    for count in [9, 16, 253] {
        let (ours, mut framing) = pair();
        // A pipe says when its last writer is closed.
        let (mut watch, writer) = std::io::pipe().expect("pipe");
        let mut fds = vec![one.as_fd(); count - 1];
        fds.push(writer.as_fd());
        send(&ours, &bytes(code::SET_MEM_TABLE, 1, &[]), &fds);
        drop(writer);
        let received = framing.receive();
        assert!(
            matches!(received, Err(ProtocolError::TooManyFds)),
            "{count}: {received:?}"
        );
        drop(framing);
        assert_eq!(watch.read(&mut [0]).expect("read"), 0);
    }
    // As many, a few at a time.
    let (ours, mut framing) = pair();
    let stream = bytes(code::SET_FEATURES, 1, &words(&[0]));
    for byte in &stream[..8] {
        send(&ours, &[*byte], &[one.as_fd()]);
    }
    assert_eq!(take(&mut framing).len(), 0);
    send(&ours, &stream[8..9], &[one.as_fd()]);
    assert!(matches!(framing.receive(), Err(ProtocolError::TooManyFds)));
}

#[test]
fn descriptors_that_belong_to_no_message_are_closed_with_the_connection() {
    let (ours, mut framing) = pair();
    let (mut watch, writer) = std::io::pipe().expect("pipe");
    send(&ours, &[1], &[writer.as_fd()]);
    drop(writer);
    assert_eq!(take(&mut framing).len(), 0);
    drop(ours);
    assert!(matches!(framing.receive(), Ok(Incoming::End)));
    drop(framing);
    assert_eq!(watch.read(&mut [0]).expect("read"), 0);
}

/// Set in the process that has no descriptor to spare.
const CHILD: &str = "BULKHEAD_TEST_CHILD";

#[test]
fn at_the_limit_on_open_files_nothing_is_left_open() {
    let name = "framing::at_the_limit_on_open_files_nothing_is_left_open";
    if std::env::var_os(CHILD).is_none() {
        let this = std::env::current_exe().expect("this test");
        let mut child = std::process::Command::new(this);
        let run = child.args([name, "--exact", "--nocapture"]).env(CHILD, "1");
        let output = run.output().expect("run");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        return;
    }
    let open = || fs::read_dir("/proc/self/fd").expect("fds").count();
    let (ours, mut framing) = pair();
    let one = event();
    send(
        &ours,
        &bytes(code::SET_MEM_TABLE, 1, &[]),
        &[one.as_fd(); 8],
    );
    let before = open();
    // Room for three of the eight.
    let next = event().as_raw_fd();
    let room = u64::try_from(next).expect("a number") + 3;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits");
    setrlimit(Resource::RLIMIT_NOFILE, room, hard).expect("limit");
    let received = framing.receive();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("limit");
    assert!(
        matches!(received, Err(ProtocolError::TooManyFds)),
        "{received:?}"
    );
    assert_eq!(open(), before);
}

#[test]
fn a_header_that_can_not_be_ends_the_stream() {
    for (what, header) in [
        ("version 0", bytes(1, 0, &[])),
        ("version 2", bytes(1, 2, &[])),
        ("version 3", bytes(1, 3, &[])),
        ("a reply", bytes(1, 5, &[])),
        (
            "a long body",
            [
                words(&[1 | 1 << 32]),
                (MAX_BODY_BYTES + 1).to_le_bytes().to_vec(),
            ]
            .concat(),
        ),
    ] {
        let (ours, mut framing) = pair();
        send(&ours, &header, &[]);
        let received = framing.receive();
        assert!(
            matches!(received, Err(ProtocolError::Header(_))),
            "{what}: {received:?}"
        );
    }
}

#[test]
fn replies_that_are_not_read_are_kept_in_order() {
    let (ours, mut framing) = pair();
    let mut sent = Vec::new();
    while !framing.has_unsent() {
        let reply = words(&[sent.len() as u64]);
        framing.send(&reply, None).expect("kept");
        sent.extend(reply);
    }
    // What the kernel did not take is less than the last reply, and goes when there is room.
    ours.set_nonblocking(true).expect("non-blocking");
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let mut some = [0; 4096];
        let count = (&ours).read(&mut some).expect("something is there");
        got.extend_from_slice(&some[..count]);
        framing.flush().expect("room");
    }
    assert!(!framing.has_unsent());
    assert!(got == sent);
    drop(ours);
    assert!(matches!(
        framing.send(&[1], None),
        Err(ProtocolError::Io(_))
    ));
}

proptest! {
    /// Any bytes in any pieces: messages, an error or nothing, and no more bytes than were sent.
    #[test]
    fn any_bytes_in_any_pieces(
        pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..40), 0usize..4), 1..20),
        valid in prop::collection::vec(0u32..48, 0..4),
    ) {
        let (ours, mut framing) = pair();
        let (mut watch, writer) = std::io::pipe().expect("pipe");
        let mut sent = 0;
        for code in valid {
            send(&ours, &bytes(code, 1, &words(&[7])), &[writer.as_fd()]);
            sent += HEADER_BYTES + 8;
        }
        for (piece, fds) in &pieces {
            send(&ours, piece, &vec![writer.as_fd(); *fds]);
            sent += piece.len();
        }
        drop(writer);
        drop(ours);
        let mut taken = 0;
        while let Ok(Incoming::Message(message)) = framing.receive() {
            prop_assert_eq!(message.body.len(), message.header.body_bytes as usize);
            prop_assert!(message.fds.len() <= 8);
            taken += HEADER_BYTES + message.body.len();
            framing.consume().expect("it is there");
        }
        prop_assert!(taken <= sent);
        drop(framing);
        prop_assert_eq!(watch.read(&mut [0]).expect("read"), 0, "a descriptor is left open");
    }
}
