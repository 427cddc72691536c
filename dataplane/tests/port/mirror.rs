//! A mirror's file, as an independent reader finds it.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bulkhead_dataplane::memory::{GuestBuffer, Lease, anonymous};
use bulkhead_dataplane::net::frame::{Frame, HeadBuffer};
use bulkhead_dataplane::net::header::HeaderSize;
use bulkhead_dataplane::port::mirror::pcapng::Direction::{self, Inbound, Outbound};
use bulkhead_dataplane::port::mirror::{BUFFERS, MirrorCounts, MirrorEnd};
use bulkhead_dataplane::port::{Mirror, MirrorFile, Tokens};
use bulkhead_dataplane::worker::ring::Ring;
use bulkhead_dataplane::worker::staging::Staging;
use bulkhead_protocol::net::MirrorSpec;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pcap_parser::pcapng::{Block, OptionCode, parse_block_le};

use crate::frames::{Packet, datagram, segment};
use crate::rig::{PATIENCE, key};

const NAME: &str = "guest7-net0";

/// A mirror with its ring, and the file that it writes.
struct Rig {
    mirror: Mirror,
    shared: Arc<MirrorFile>,
    ring: Ring,
    _staging: Staging,
}

fn spec(snap_bytes: u32, most_bytes: u64) -> MirrorSpec {
    let file = "unused".to_owned();
    MirrorSpec {
        file,
        snap_bytes,
        most_bytes,
    }
}

fn appending(path: &Path) -> OwnedFd {
    let file = OpenOptions::new().append(true).create(true).open(path);
    file.expect("the file").into()
}

fn rig(file: OwnedFd, spec: &MirrorSpec) -> Rig {
    let staging = Staging::new().expect("staging memory");
    let mut ring = Ring::new(&staging).expect("a ring");
    let shared = MirrorFile::begin(file, NAME, spec).expect("a file to append to");
    let tokens = Tokens::new(9 << 32);
    let mirror = Mirror::new(Arc::clone(&shared), tokens, &mut ring).expect("a mirror");
    Rig {
        mirror,
        shared,
        ring,
        _staging: staging,
    }
}

impl Rig {
    fn record(&mut self, direction: Direction, packet: &Packet) {
        let frame = Frame::of_bytes(&packet.header, &packet.bytes, key()).expect("a frame");
        self.mirror.record(direction, &frame);
    }

    /// Until everything is written.
    fn settle(&mut self) -> MirrorCounts {
        let since = std::time::Instant::now();
        while !self.mirror.is_idle() {
            assert!(since.elapsed() < PATIENCE, "it is never written");
            self.mirror.flush(&mut self.ring);
            self.ring.wait(Some(Duration::from_millis(100)));
            while let Some(completion) = self.ring.reap() {
                assert!(Tokens::new(9 << 32).has(completion.token));
                self.mirror.landed(completion, &mut self.ring);
            }
        }
        self.shared.counts()
    }
}

/// A packet block of a file.
#[derive(Debug, PartialEq, Eq)]
struct Kept {
    outbound: bool,
    original: u32,
    bytes: Vec<u8>,
    dropped: u64,
}

/// What is in a file: how many headers, and its packets, whose times lie between the two.
fn read(path: &Path, (after, before): (SystemTime, SystemTime)) -> (usize, Vec<Kept>) {
    let bytes = std::fs::read(path).expect("the file");
    let (mut rest, mut headers, mut kept) = (&bytes[..], 0, Vec::new());
    while !rest.is_empty() {
        let (next, block) = parse_block_le(rest).expect("a block");
        rest = next;
        match block {
            Block::SectionHeader(header) => {
                headers += 1;
                assert_eq!((header.major_version, header.minor_version), (1, 0));
            }
            Block::InterfaceDescription(interface) => {
                assert_eq!(interface.linktype.0, 1, "Ethernet");
                assert_eq!(interface.if_tsresol, 9, "nanoseconds");
                let name = interface
                    .options
                    .iter()
                    .find(|one| one.code == OptionCode::IfName);
                let name = name.expect("a name");
                assert_eq!(&name.value[..usize::from(name.len)], NAME.as_bytes());
            }
            Block::EnhancedPacket(packet) => {
                let ns = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(ns);
                assert!(after <= time && time <= before, "{time:?}");
                let option = |code: u16| packet.options.iter().find(|one| one.code.0 == code);
                let flags = option(2).expect("a direction").value[0];
                let dropped = option(4).map_or(0, |option| {
                    u64::from_le_bytes(option.value[..8].try_into().expect("8 bytes"))
                });
                kept.push(Kept {
                    outbound: flags & 3 == 2,
                    original: packet.origlen,
                    bytes: packet.data[..packet.caplen as usize].to_vec(),
                    dropped,
                });
            }
            other => panic!("what is this: {other:?}"),
        }
    }
    (headers, kept)
}

fn whole(outbound: bool, packet: &Packet) -> Kept {
    Kept {
        outbound,
        original: u32::try_from(packet.bytes.len()).expect("a frame"),
        bytes: packet.bytes.clone(),
        dropped: 0,
    }
}

#[test]
fn frames_of_both_directions_are_kept_in_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("mirror.pcapng");
    let after = SystemTime::now();
    let mut rig = rig(appending(&path), &spec(262_144, 1 << 30));
    let mut expected = Vec::new();
    let lengths = [60, 61, 62, 63, 191, 192, 193, 1514];
    for round in 0..40u8 {
        for (at, bytes) in lengths.into_iter().enumerate() {
            let packet = Packet::from(datagram(round, 1, bytes));
            let outbound = (usize::from(round) + at) % 3 == 0;
            let direction = if outbound { Outbound } else { Inbound };
            rig.record(direction, &packet);
            expected.push(whole(outbound, &packet));
        }
        rig.mirror.flush(&mut rig.ring);
    }
    let longest = segment(2, 1, 65_549, 1448);
    rig.record(Outbound, &longest);
    expected.push(whole(true, &longest));
    let counts = rig.settle();
    let (headers, kept) = read(&path, (after, SystemTime::now()));
    assert_eq!(headers, 1);
    assert!(kept == expected, "not the same frames");
    let bytes = std::fs::metadata(&path).expect("the file").len();
    let expected = MirrorCounts {
        frames: 321,
        bytes,
        dropped: 0,
        end: None,
    };
    assert_eq!(counts, expected);
}

#[test]
fn of_long_frames_the_front_is_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("mirror.pcapng");
    let after = SystemTime::now();
    let mut rig = rig(appending(&path), &spec(300, 1 << 30));
    let packets = [100, 299, 300, 301, 1500].map(|bytes| Packet::from(datagram(2, 1, bytes)));
    for packet in &packets {
        rig.record(Inbound, packet);
    }
    rig.settle();
    let (_, kept) = read(&path, (after, SystemTime::now()));
    assert_eq!(kept.len(), packets.len());
    for (kept, packet) in kept.iter().zip(&packets) {
        assert_eq!(kept.original as usize, packet.bytes.len());
        assert_eq!(kept.bytes, packet.bytes[..packet.bytes.len().min(300)]);
    }
}

#[test]
fn a_frame_in_guest_memory_is_kept_whole() {
    let (memory, _file) = anonymous(1 << 20).expect("memory");
    let mut buffer = GuestBuffer::with_capacity(4);
    buffer.reset(&Lease::new(Arc::new(memory)));
    let bytes = datagram(2, 1, 1514);
    // A header that says nothing, and the frame, in pieces.
    for (guest_addr, length) in [(0x1000, 12), (0x3000, 700), (0x9000, 814)] {
        buffer.push(guest_addr, length).expect("inside");
    }
    assert!(buffer.copy_in(12, &bytes));
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("mirror.pcapng");
    let after = SystemTime::now();
    let mut rig = rig(appending(&path), &spec(1000, 1 << 30));
    let mut head = HeadBuffer::default();
    let frame = Frame::of_chain(&buffer, HeaderSize::Long, key(), &mut head).expect("a frame");
    rig.mirror.record(Outbound, &frame);
    rig.settle();
    let (_, kept) = read(&path, (after, SystemTime::now()));
    assert_eq!(
        (kept[0].original, &kept[0].bytes[..]),
        (1514, &bytes[..1000])
    );
}

#[test]
fn it_ends_with_the_last_frame_that_fits() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("mirror.pcapng");
    let after = SystemTime::now();
    let mut rig = rig(appending(&path), &spec(65_536, 64 << 10));
    for round in 0..200 {
        rig.record(Inbound, &datagram(2, 1, 1000).into());
        if round % 7 == 0 {
            rig.settle();
        }
    }
    let counts = rig.settle();
    assert_eq!((counts.end, counts.dropped), (Some(MirrorEnd::Full), 0));
    let bytes = std::fs::metadata(&path).expect("the file").len();
    assert!(
        bytes == counts.bytes && bytes <= 64 << 10 && bytes > 63 << 10,
        "{bytes}"
    );
    let (_, kept) = read(&path, (after, SystemTime::now()));
    assert_eq!(kept.len() as u64, counts.frames);
}

#[test]
fn what_finds_no_buffer_is_missing_and_said_to_be() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("mirror.pcapng");
    let after = SystemTime::now();
    let mut rig = rig(appending(&path), &spec(65_600, 1 << 30));
    // Nothing is written meanwhile: each fills more than half of a buffer.
    let long = segment(2, 1, 60_000, 1448);
    for _ in 0..BUFFERS + 9 {
        rig.record(Outbound, &long);
    }
    assert_eq!(rig.settle().dropped, 9);
    rig.record(Inbound, &long);
    rig.record(Inbound, &long);
    let counts = rig.settle();
    assert_eq!((counts.frames, counts.dropped), (u64::from(BUFFERS) + 2, 9));
    let (_, kept) = read(&path, (after, SystemTime::now()));
    let dropped: Vec<u64> = kept
        .iter()
        .map(|one| one.dropped)
        .filter(|one| *one > 0)
        .collect();
    assert_eq!(dropped, [9]);
    assert_eq!(
        kept[usize::from(BUFFERS)].dropped,
        9,
        "before the first that came after"
    );
}

#[test]
fn a_file_that_cannot_be_written_ends_it() {
    let flags = MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC;
    let file = memfd_create("mirror", flags).expect("memfd");
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND)).expect("appending");
    let copy = file.try_clone().expect("another");
    let mut rig = rig(file, &spec(65_536, 1 << 30));
    fcntl(&copy, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).expect("sealed");
    for _ in 0..100 {
        rig.record(Inbound, &datagram(2, 1, 1000).into());
    }
    let counts = rig.settle();
    assert_eq!(counts.end, Some(MirrorEnd::Failed(libc::EPERM)));
    for _ in 0..1000 {
        rig.record(Inbound, &datagram(2, 1, 1000).into());
    }
    assert_eq!(rig.settle(), counts, "it is over");
    rig.mirror.close(&mut rig.ring);
}

#[test]
fn a_successor_goes_on_in_the_same_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("mirror.pcapng");
    let after = SystemTime::now();
    for number in 1..=3 {
        let mut rig = rig(appending(&path), &spec(65_536, 1 << 30));
        rig.record(Inbound, &datagram(2, number, 100).into());
        assert_eq!(rig.settle().frames, 1);
    }
    let (headers, kept) = read(&path, (after, SystemTime::now()));
    assert_eq!(headers, 1);
    let senders: Vec<u8> = kept.iter().map(|one| one.bytes[11]).collect();
    assert_eq!(senders, [1, 2, 3]);
}

#[test]
fn a_file_that_would_be_overwritten_is_refused() {
    let file = tempfile::tempfile().expect("a file");
    let error = MirrorFile::begin(file.into(), NAME, &spec(100, 1 << 20)).expect_err("refused");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    let null = File::options()
        .append(true)
        .open("/dev/null")
        .expect("null");
    let error = MirrorFile::begin(null.into(), NAME, &spec(100, 1 << 20)).expect_err("refused");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}
