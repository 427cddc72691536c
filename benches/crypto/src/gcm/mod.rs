//! AES-256-GCM of packets: sealed in place and opened from one buffer into another, alone and in batches,
//! beside AWS-LC's AEAD and ring's, which take one packet a call.

mod peers;

use std::borrow::Cow;
use std::hint::black_box;

use bulkhead_benches::ratio::{Pace, Turns};
use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::{
    KEY_BYTES, Kernel, OpenPacket, Opener, PacketKey, SealPacket, Sealer, TAG_BYTES,
};

use crate::Differ;
use bulkhead_benches::figures::row::{Placement, Point, Row, Unit};
pub use peers::PEERS;
use peers::{AwsLc, Ring};

/// Bytes of plaintext in a packet: an acknowledgement, small ones, a full frame, a jumbo frame.
pub const SIZES: [usize; 5] = [64, 256, 512, 1500, 9000];
/// Packets in a batch that is not one packet alone.
const BATCH: usize = 32;
/// Up to this size a kernel of our own must halve the time of a batch.
const HALVED_UP_TO: usize = 512;

const KEY: [u8; KEY_BYTES] = [0x5c; KEY_BYTES];
const SALT: [u8; 4] = [1, 2, 3, 4];
/// Associated data: a tunnel's header.
const HEADER: [u8; 16] = [7; 16];
/// Number of a batch's first packet.
const FIRST: u64 = 1;

/// Measures all sizes.
pub(crate) fn measure(pace: Pace) -> Result<Vec<Row>, Differ> {
    let mut rows = Vec::new();
    for size in SIZES {
        agree(size)?;
        rows.extend(seal::<1>(size, pace));
        rows.extend(seal::<BATCH>(size, pace));
        rows.extend(open::<1>(size, pace));
        rows.extend(open::<BATCH>(size, pace));
    }
    Ok(rows)
}

fn key(kernel: Kernel) -> PacketKey {
    let arena = SecretArena::new(1).expect("secret memory for one key");
    PacketKey::with_kernel(&arena, &KEY, kernel).expect("the CPU has the kernel")
}

/// A plaintext with room for its tag.
fn plain(size: usize) -> Vec<u8> {
    vec![0x5a; size + TAG_BYTES]
}

/// Everyone must make the same bytes.
fn agree(size: usize) -> Result<(), Differ> {
    let mut ours = plain(size);
    let packet = SealPacket::in_place(&HEADER, &mut ours).expect("a packet");
    let mut sealer = Sealer::new(key(Kernel::chosen()), SALT, FIRST);
    sealer.seal_batch(&mut [packet]).expect("a fresh key");
    let (mut aws, mut ring) = (plain(size), plain(size));
    AwsLc::new(&KEY).seal(SALT, FIRST, &HEADER, &mut aws);
    Ring::new(&KEY).seal(SALT, FIRST, &HEADER, &mut ring);
    for (peer, theirs) in PEERS.into_iter().zip([aws, ring]) {
        if ours != theirs {
            let case = format!("gcm seal, {size} B");
            return Err(Differ { case, peer });
        }
    }
    Ok(())
}

/// A batch under our interface; gives what seals one.
fn sealing<const COUNT: usize>(kernel: Kernel, size: usize) -> impl FnMut() {
    let mut sealer = Sealer::new(key(kernel), SALT, FIRST);
    let mut buffers: [_; COUNT] = std::array::from_fn(|_| plain(size));
    move || {
        let mut packets = black_box(&mut buffers)
            .each_mut()
            .map(|buffer| SealPacket::in_place(&HEADER, buffer).expect("a packet"));
        sealer.seal_batch(&mut packets).expect("a fresh key");
    }
}

fn seal<const COUNT: usize>(size: usize, pace: Pace) -> Vec<Row> {
    let mut ours = sealing::<COUNT>(Kernel::chosen(), size);
    let mut through_library = sealing::<COUNT>(Kernel::Library, size);
    let (aws, ring) = (AwsLc::new(&KEY), Ring::new(&KEY));
    let (mut for_aws, mut for_ring) = (vec![plain(size); COUNT], vec![plain(size); COUNT]);
    let (mut numbers, mut more_numbers) = (FIRST.., FIRST..);
    let mut aws = || {
        for (buffer, number) in black_box(&mut for_aws).iter_mut().zip(&mut numbers) {
            aws.seal(SALT, number, &HEADER, buffer);
        }
    };
    let mut ring = || {
        for (buffer, number) in black_box(&mut for_ring).iter_mut().zip(&mut more_numbers) {
            ring.seal(SALT, number, &HEADER, buffer);
        }
    };
    let turns = pace.turns(&mut [&mut ours, &mut aws, &mut ring, &mut through_library]);
    rows("seal", size, COUNT, &turns)
}

/// A batch to be opened, by number.
fn sealed(size: usize, count: usize) -> Vec<(u64, Vec<u8>)> {
    let aws = AwsLc::new(&KEY);
    let packet = |number| {
        let mut buffer = plain(size);
        aws.seal(SALT, number, &HEADER, &mut buffer);
        (number, buffer)
    };
    (FIRST..).take(count).map(packet).collect()
}

/// A batch under our interface; gives what opens one.
fn opening<const COUNT: usize>(kernel: Kernel, size: usize) -> impl FnMut() {
    let opener = Opener::new(key(kernel), SALT);
    let sealed = sealed(size, COUNT);
    let mut outputs: [_; COUNT] = std::array::from_fn(|_| vec![0; size]);
    move || {
        let mut from = black_box(&sealed).iter();
        let mut packets = outputs.each_mut().map(|output| {
            let (number, sealed) = from.next().expect("as many as outputs");
            OpenPacket::between(*number, &HEADER, sealed, output).expect("a packet")
        });
        opener.open_batch(&mut packets);
        let opened = packets.iter_mut().all(|packet| packet.plaintext().is_ok());
        assert!(opened, "a good packet is refused");
    }
}

fn open<const COUNT: usize>(size: usize, pace: Pace) -> Vec<Row> {
    let mut ours = opening::<COUNT>(Kernel::chosen(), size);
    let mut through_library = opening::<COUNT>(Kernel::Library, size);
    let sealed = sealed(size, COUNT);
    let (aws, ring) = (AwsLc::new(&KEY), Ring::new(&KEY));
    let mut for_aws = vec![vec![0; size]; COUNT];
    // ring opens within one buffer: the plaintext's place, then ciphertext and tag, which stay.
    let with_room =
        |(number, sealed): &(u64, Vec<u8>)| (*number, [&vec![0; size], &sealed[..]].concat());
    let mut for_ring: Vec<_> = sealed.iter().map(with_room).collect();
    let mut aws = || {
        for ((number, sealed), output) in black_box(&sealed).iter().zip(&mut for_aws) {
            aws.open(SALT, *number, &HEADER, sealed, output);
        }
    };
    let mut ring = || {
        for (number, buffer) in black_box(&mut for_ring) {
            ring.open(SALT, *number, &HEADER, buffer, size);
        }
    };
    let turns = pace.turns(&mut [&mut ours, &mut aws, &mut ring, &mut through_library]);
    rows("open", size, COUNT, &turns)
}

/// The rows of a case: beside each peer, and our interface with AWS-LC behind it.
fn rows(direction: &str, size: usize, count: usize, turns: &Turns) -> Vec<Row> {
    let batch = if count == 1 {
        "alone".to_owned()
    } else {
        format!("{count} a batch")
    };
    let target = if count > 1 && size <= HALVED_UP_TO {
        2.0
    } else {
        1.0
    };
    let row = |side, peer: &'static str| Row {
        case: format!("gcm {direction}, {size} B, {batch}"),
        unit: Unit::NanosecondsPerPacket,
        ours: nanoseconds(turns.median(0), count),
        peer: Cow::Borrowed(peer),
        theirs: nanoseconds(turns.median(side), count),
        ratio: turns.ratio(side, 0),
        target: Some(target),
        placement: Placement::Inline,
        point: Some(Point {
            panel: format!("AES-256-GCM {direction}, {batch}"),
            line: "Bulkhead".to_owned(),
            axis: "bytes of a packet",
            at: size,
        }),
    };
    let mut rows: Vec<_> = PEERS
        .into_iter()
        .zip(1..)
        .map(|(peer, side)| row(side, peer))
        .collect();
    rows.push(Row {
        target: None,
        point: None,
        ..row(PEERS.len() + 1, "Bulkhead through AWS-LC")
    });
    rows
}

#[expect(clippy::cast_precision_loss, reason = "a small number")]
fn nanoseconds(seconds: f64, count: usize) -> f64 {
    seconds * 1e9 / count as f64
}
