//! What keyd refuses: nothing is granted, and floor and state stay as they were.

use std::fs::{self, File};
use std::io::{PipeWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use bulkhead_bundle::sign;
use bulkhead_protocol::envelope::{MAX_ENVELOPE_BYTES, to_memfd};
use bulkhead_protocol::{Channel, Received};
use minicbor::Decoder;

use crate::bundles::{alice, bundle, encrypted, mallory, now, plain, random_key, signed};
use crate::host::{Host, next};

/// Refused with this in the reason, by a keyd at epoch 10 that goes on afterwards.
fn check_refused(envelope: &[u8], reason: &str) {
    let mut host = Host::new();
    let current = signed(&bundle(10, vec![plain(1)]));
    host.apply(&current, 1);
    let state = fs::read(host.path("keyd/accepted")).expect("state");
    let given = host.refuse(envelope);
    assert!(given.contains(reason), "{given}");
    assert_eq!(fs::read(host.path("keyd/accepted")).expect("state"), state);
    host.apply(&current, 1);
    host.apply(&signed(&bundle(11, vec![plain(1)])), 1);
}

#[test]
fn refused_old_bundle_replayed() {
    let volumes = || vec![encrypted(1, &random_key())];
    let mut host = Host::new();
    let first = signed(&bundle(1, volumes()));
    host.apply(&first, 1);
    host.apply(&signed(&bundle(2, volumes())), 1);
    assert!(host.refuse(&first).contains("not above the floor 2"));
    let same_epoch = signed(&bundle(2, volumes()));
    assert!(host.refuse(&same_epoch).contains("not above the floor 2"));
}

#[test]
fn refused_other_host() {
    let mut other = bundle(11, vec![plain(1)]);
    other.host = "host-b".to_owned();
    check_refused(&signed(&other), "for host \"host-b\"");
}

#[test]
fn refused_expired() {
    let mut old = bundle(11, vec![plain(1)]);
    old.expires = now() - 1;
    check_refused(&signed(&old), "expired");
}

#[test]
fn refused_not_yet_valid() {
    let mut early = bundle(11, vec![plain(1)]);
    early.not_before = now() + 600;
    check_refused(&signed(&early), "not valid before");
}

/// Of an envelope by one operator (RFC 9052 section 4.1): where its payload ends, and where its two
/// signatures begin and end.
fn layout(envelope: &[u8]) -> (usize, [std::ops::Range<usize>; 2]) {
    let mut d = Decoder::new(envelope);
    d.tag().expect("COSE_Sign");
    assert_eq!(d.array().expect("a list"), Some(4));
    d.skip().expect("protected");
    d.skip().expect("unprotected");
    d.skip().expect("payload");
    let payload_end = d.position();
    assert_eq!(d.array().expect("signatures"), Some(2));
    let signatures = [0, 1].map(|_| {
        let start = d.position();
        d.skip().expect("a signature");
        start..d.position()
    });
    (payload_end, signatures)
}

#[test]
fn refused_one_signature_missing() {
    let envelope = signed(&bundle(11, vec![plain(1)]));
    let (payload_end, signatures) = layout(&envelope);
    for kept in signatures {
        let list_of_one = 0x81;
        let mut half = envelope[..payload_end].to_vec();
        half.push(list_of_one);
        half.extend_from_slice(&envelope[kept]);
        check_refused(&half, "is missing");
    }
}

#[test]
fn refused_changed_after_signing() {
    let mut envelope = signed(&bundle(11, vec![plain(1)]));
    let (payload_end, _) = layout(&envelope);
    envelope[payload_end - 1] ^= 1;
    check_refused(&envelope, "is wrong");
}

#[test]
fn refused_unknown_operator() {
    let next = bundle(11, vec![plain(1)]);
    check_refused(&sign(&next, &[mallory()]).expect("valid"), "unknown key");
    let both = sign(&next, &[alice(), mallory()]).expect("valid");
    check_refused(&both, "unknown key");
}

#[test]
fn refused_what_it_does_not_follow() {
    let mut next = bundle(11, vec![plain(1)]);
    next.supersedes = vec![[9; 48].into()];
    check_refused(&signed(&next), "supersedes");
}

#[test]
fn refused_noise() {
    check_refused(b"", "malformed");
    check_refused(&[0xd8; 1000], "malformed");
}

#[test]
fn refused_over_the_cap() {
    check_refused(&vec![0; MAX_ENVELOPE_BYTES + 1], "size cap");
}

#[test]
fn refused_what_is_no_file() {
    let mut host = Host::new();
    let (pipe, _writer) = std::io::pipe().expect("pipe");
    let null = File::open("/dev/zero").expect("open");
    let (socket, _peer) = Channel::pair().expect("pair");
    for fd in [pipe.as_fd(), null.as_fd(), socket.as_fd()] {
        host.ask_with(&[fd]);
        let reason = host.refusal();
        assert!(reason.contains("not a regular file"), "{reason}");
    }
    host.apply(&signed(&bundle(1, vec![plain(1)])), 1);
}

#[test]
fn refused_another_number_of_descriptors() {
    let mut host = Host::new();
    let fd = to_memfd(&signed(&bundle(1, vec![plain(1)]))).expect("memfd");
    host.ask_with(&[]);
    assert!(host.refusal().contains("0 descriptors"));
    host.ask_with(&[fd.as_fd(), fd.as_fd()]);
    assert!(host.refusal().contains("2 descriptors"));
    host.apply(&signed(&bundle(1, vec![plain(1)])), 1);
}

/// Another process, by its pidfd, for as long as its input is open.
fn other_process() -> (OwnedFd, Child, PipeWriter) {
    let (ours, theirs) = Channel::pair().expect("pair");
    ours.ask_for_sender().expect("SO_PASSPIDFD");
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    let cat = Command::new("cat")
        .stdin(reader)
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .expect("cat");
    writer.write_all(&[1]).expect("write");
    let received: Received<u8> = next(&ours).expect("message");
    (received.sender.expect("a pidfd"), cat, writer)
}

#[test]
fn refused_sender_that_is_not_the_agent() {
    let envelope = signed(&bundle(1, vec![encrypted(1, &random_key())]));
    let (agent, mut process, input) = other_process();
    let mut host = Host::new();
    // The agent is that process, and this one sends on its socket.
    host.new_agent(agent);
    let reason = host.refuse(&envelope);
    assert!(
        reason.contains("not the process that rot started as the agent"),
        "{reason}"
    );
    assert!(!host.path("keyd/accepted").exists());
    drop(input);
    process.wait().expect("ends");
    // Nor when the agent is gone.
    let reason = host.refuse(&envelope);
    assert!(reason.contains("not the process"), "{reason}");
}
