//! `net_offload`: any frame with any offload that was found good, into receive buffers of any shape, for a driver that
//! negotiated anything. What comes out is the frame, or its segments: they put together are the original, each of their
//! lengths right and each checksum good by an implementation of its own; and no byte outside of the buffers is written.

use std::cell::RefCell;

use bulkhead_dataplane::net::frame::{Frame, Offload};
use bulkhead_dataplane::net::header::{Header, feature};
use bulkhead_dataplane::net::receive::{
    Delivered, Receiver, Refused, Scratch, deliver, deliver_usual,
};
use bulkhead_dataplane::net::{HashKey, offload};
use bulkhead_dataplane::port::DropReason;
use bulkhead_dataplane::virtqueue::{QueueFeatures, Virtqueue};
use bulkhead_dataplane::worker::message::RingLayout;

use crate::guest::{Copy, Guest, REGION, Run};
use crate::input::Input;
use crate::wire::{layers, payload_of, sum};

const SIZE: u16 = 64;
/// The rings, in the first region.
const LAYOUT: RingLayout = RingLayout {
    size: SIZE,
    desc: 0,
    avail: 0x1000,
    used: 0x2000,
};
/// Where buffers lie: in the second region, and in the third.
const BUFFERS: [u64; 2] = [REGION, 0x2_0000];
const VERSION_1: u64 = 1 << 32;

thread_local! {
    static GUEST: RefCell<(Guest, Scratch)> = RefCell::new((Guest::new(), Scratch::default()));
}

pub fn run(data: &[u8]) {
    GUEST.with_borrow_mut(|(guest, scratch)| {
        let mut input = Input::new(data);
        let choice = input.u8();
        let features = features(choice);
        guest.clear();
        let chains = buffers(guest, &mut input);
        let (header, bytes) = frame(&mut input);
        let Ok(frame) = Frame::of_bytes(&header, &bytes, HashKey::new(7)) else {
            return;
        };
        check_in_place(&frame, &bytes);
        let wanted = QueueFeatures::default();
        let queue = Virtqueue::new(&guest.memory, LAYOUT, 0, wanted);
        let mut queue = queue.expect("a queue");
        let before = guest.copy();
        let receiver = Receiver::of(features, u16::MAX);
        let mut delivered = Delivered::default();
        // Some of the same together, as far as that is quickly done, and the next one by itself.
        let together = std::iter::repeat_n(frame, usize::from(choice >> 7) * 3);
        let usual = deliver_usual(&mut queue, receiver, scratch, together, &mut delivered);
        assert_eq!(queue.in_flight(), 0);
        let result = deliver(&mut queue, receiver, scratch, &frame, &mut delivered);
        queue.publish();
        assert_eq!(queue.in_flight(), 0);
        let after = guest.copy();
        check_outside(&before, &after, &chains);
        let frames = received(&after, &chains, features);
        let (first, rest) = frames.split_at(usual);
        for whole in first {
            check(
                &frame,
                &bytes,
                features,
                std::slice::from_ref(whole),
                Ok(()),
            );
            assert!(whole.1 == bytes);
        }
        check(&frame, &bytes, features, rest, result);
        let total: usize = frames.iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(
            (delivered.packets, delivered.bytes),
            (frames.len() as u64, total as u64)
        );
    });
}

fn features(choice: u8) -> u64 {
    let bits = [
        VERSION_1,
        feature::MRG_RXBUF,
        feature::GUEST_CSUM,
        feature::GUEST_TSO4,
        feature::GUEST_TSO6,
        feature::GUEST_USO4,
        feature::GUEST_USO6,
    ];
    let chosen = bits.iter().enumerate();
    chosen.fold(0, |all, (bit, feature)| {
        if choice & 1 << bit == 0 {
            all
        } else {
            all | feature
        }
    })
}

/// Offers chains of buffers: each chain's writable ranges.
fn buffers(guest: &Guest, input: &mut Input<'_>) -> Vec<Vec<Run>> {
    let count = input.u8() % 20;
    let mut at = BUFFERS;
    let (mut chains, mut index) = (Vec::new(), 0u16);
    for slot in 0..u16::from(count) {
        let head = index;
        let mut chain = Vec::new();
        let ranges = 1 + input.u8() % 3;
        for left in (0..ranges).rev() {
            let choice = input.u8();
            let length = match choice >> 4 {
                small @ 0..=7 => u64::from(small) * 7,
                8..=11 => 100,
                12..=14 => 1536,
                _ => u64::from(input.u16() % 0x4000),
            };
            let region = usize::from(choice & 1);
            let begin = at[region];
            // With a gap behind it.
            if begin + length + 8 > BUFFERS[region] + REGION {
                return chains;
            }
            at[region] += length + 8;
            let is_writable = choice & 6 != 0 || !chain.is_empty();
            let flags = u16::from(left > 0) | if is_writable { 2 } else { 0 };
            if is_writable {
                chain.push((begin, length));
            }
            let mut bytes = begin.to_le_bytes().to_vec();
            bytes.extend(u32::try_from(length).expect("small").to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
            guest.write(LAYOUT.desc + 16 * u64::from(index), &bytes);
            index += 1;
        }
        guest.write(LAYOUT.avail + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        guest.write(LAYOUT.avail + 2, &(slot + 1).to_le_bytes());
        chains.push(chain);
    }
    chains
}

/// A header, and a frame that often is what it says.
fn frame(input: &mut Input<'_>) -> (Header, Vec<u8>) {
    let mut header = [0; 12];
    let given = input.bytes(12);
    header[..given.len()].copy_from_slice(given);
    let mut header = Header::parse(&header);
    header.flags &= 3;
    let (shape, payload) = (input.u8(), usize::from(input.u16()) >> (input.u8() & 7));
    let mut bytes = input.bytes(192).to_vec();
    bytes.resize(bytes.len() + payload, 0x5a);
    if shape & 1 == 0 && bytes.len() > 100 {
        let is_six = shape & 2 != 0;
        let is_udp = shape & 4 != 0;
        bytes[12..15].copy_from_slice(if is_six {
            &[0x86, 0xdd, 0x60]
        } else {
            &[8, 0, 0x45]
        });
        let protocol = if is_udp { 17 } else { 6 };
        let l4: usize = if is_six {
            bytes[20] = protocol;
            54
        } else {
            bytes[20..22].fill(0);
            bytes[23] = protocol;
            34
        };
        if !is_udp {
            bytes[l4 + 12] = (5 + (shape >> 6)) << 4 | bytes[l4 + 12] & 0xf;
        }
        header.flags |= 1;
        header.csum_start = u16::try_from(l4).expect("small");
        header.csum_offset = if is_udp { 6 } else { 16 };
        header.gso_type = match (shape & 8 != 0, is_udp, is_six) {
            (false, ..) => 0,
            (_, true, _) => 5,
            (_, _, true) => 4,
            _ => 1,
        };
    }
    (header, bytes)
}

/// Completes and cuts a frame in our own memory.
fn check_in_place(frame: &Frame<'_>, bytes: &[u8]) {
    if let Offload::NeedsCsum(csum) = frame.offload {
        let mut whole = bytes.to_vec();
        offload::complete(&mut whole, csum);
        let start = usize::from(csum.start);
        // What stood in its place went into the sum, and is not there any more.
        let place = start + usize::from(csum.offset);
        let value = u16::from_be_bytes([whole[place], whole[place + 1]]);
        let right = !sum(bytes[start..].iter().copied());
        assert!(value == right || (right == 0 && value == 0xffff));
        whole[place..place + 2].copy_from_slice(&bytes[place..place + 2]);
        assert!(whole == bytes);
    }
}

/// Nothing but buffers and the used ring is written.
fn check_outside(before: &Copy, after: &Copy, chains: &[Vec<Run>]) {
    let mut runs: Vec<Run> = chains.iter().flatten().copied().collect();
    runs.push((LAYOUT.used, 4 + 8 * u64::from(SIZE) + 2));
    runs.sort_unstable();
    let mut at = 0;
    for (begin, length) in runs.into_iter().chain([(0x2_8000, 0)]) {
        while at < begin {
            // To a region's end at most.
            let region = match at {
                ..0x8000 => 0x8000,
                0x8000..0x1_0000 => 0x1_0000,
                0x1_0000..0x2_0000 => {
                    at = 0x2_0000;
                    continue;
                }
                _ => 0x2_8000,
            };
            let bytes = begin.min(region) - at;
            assert!(
                before.in_one_region(at, bytes) == after.in_one_region(at, bytes),
                "{at:#x}"
            );
            at += bytes;
        }
        at = at.max(begin + length);
    }
}

/// What the driver puts together of what was used; chains that were given back empty are nothing.
fn received(after: &Copy, chains: &[Vec<Run>], features: u64) -> Vec<(Header, Vec<u8>)> {
    let mut parts = Vec::new();
    let heads = (0..chains.len()).scan(0u16, |_, slot| {
        let at = LAYOUT.avail + 4 + 2 * u64::try_from(slot).ok()?;
        Some(after.u16(at))
    });
    let heads: Vec<u16> = heads.collect();
    for slot in 0..after.u16(LAYOUT.used + 2) {
        let at = LAYOUT.used + 4 + 8 * u64::from(slot);
        let (id, length) = (after.u32(at), after.u32(at + 4) as usize);
        assert_eq!(id, u32::from(heads[usize::from(slot)]), "in order");
        let mut bytes = Vec::new();
        for (begin, room) in &chains[usize::from(slot)] {
            bytes.extend(after.in_one_region(*begin, *room).expect("in memory"));
        }
        assert!(length <= bytes.len());
        bytes.truncate(length);
        parts.push(bytes);
    }
    let size = if features & (VERSION_1 | feature::MRG_RXBUF) == 0 {
        10
    } else {
        12
    };
    let mut parts = parts.into_iter().filter(|part| !part.is_empty());
    let mut frames = Vec::new();
    while let Some(mut bytes) = parts.next() {
        let mut header = [0; 12];
        header[..size].copy_from_slice(&bytes[..size]);
        let header = Header::parse(&header);
        let more = header.num_buffers.saturating_sub(1);
        assert!(more == 0 || features & feature::MRG_RXBUF != 0);
        for _ in 0..more {
            bytes.extend(parts.next().expect("as many as it says"));
        }
        frames.push((header, bytes.split_off(size)));
    }
    frames
}

/// What came is the frame, or as much of it as there was room for.
fn check(
    frame: &Frame<'_>,
    bytes: &[u8],
    features: u64,
    frames: &[(Header, Vec<u8>)],
    result: Result<(), Refused>,
) {
    match result {
        Ok(()) => assert!(!frames.is_empty()),
        Err(Refused::Dropped(reason)) => {
            let known = [
                DropReason::NoRoom,
                DropReason::BadBuffers,
                DropReason::TooLong,
            ];
            assert!(known.contains(&reason), "{reason:?}");
        }
        // A device-readable buffer behind a writable one.
        Err(Refused::Broken(_)) => {}
    }
    let leaves = features & feature::GUEST_CSUM != 0;
    for (header, _) in frames {
        assert!(
            leaves || header.flags == 0,
            "an offload that was not negotiated"
        );
    }
    let Offload::Gso(gso) = frame.offload else {
        assert!(frames.len() <= 1);
        if let (Some((_, got)), Offload::None | Offload::Valid) = (frames.first(), frame.offload) {
            assert!(got == bytes);
        }
        return;
    };
    let found = layers(bytes).expect("Ethernet");
    let payload = &bytes[usize::from(gso.header_bytes)..];
    let mut done = 0;
    for (header, got) in frames {
        if header.gso_type != 0 {
            assert!(got == bytes && frames.len() == 1);
            return;
        }
        let mut whole = got.clone();
        if header.flags != 0 {
            assert_eq!(header.flags, 1);
            offload::complete(&mut whole, gso.csum);
        }
        let part = payload_of(&whole, bytes, &found);
        let here = (payload.len() - done).min(usize::from(gso.mss));
        assert!(part == &payload[done..done + here]);
        done += here;
    }
    assert!(done == payload.len() || result.is_err());
}
