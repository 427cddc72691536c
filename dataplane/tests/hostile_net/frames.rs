//! Frames of any shape: headers short, split and overlapping; lengths; who they say to be from, and where they go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_dataplane::port::DropReason::{
    BadOffload, Hairpin, Malformed, Reserved, SpoofedMac, TooLong,
};
use bulkhead_integration::card::Card;
use bulkhead_integration::driver::ring::Desc;
use bulkhead_integration::packets::{Packet, TCP};

use crate::arena::{A, Arena, B, End, Wrong, arrives, offer, publish};
use crate::rig::{PATIENCE, mac};
use crate::{BOTH, Case};

/// Bytes in the attacker's memory, and the chain that names ranges of them: header and frame, one behind the other.
pub(crate) struct Shot {
    pub bytes: Vec<u8>,
    /// First byte, length, and whether the device may write there.
    pub ranges: Vec<(usize, usize, bool)>,
}

impl Shot {
    /// A header and a frame in a range each.
    pub fn new(header: &[u8], frame: &[u8]) -> Self {
        Self {
            bytes: [header, frame].concat(),
            ranges: vec![(0, header.len(), false), (header.len(), frame.len(), false)],
        }
    }

    /// All of it in ranges of these lengths, the last one with the rest.
    fn cut(mut self, lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut at = 0;
        self.ranges.clear();
        for length in lengths {
            self.ranges.push((at, length, false));
            at += length;
        }
        self.ranges.push((at, self.bytes.len() - at, false));
        self
    }

    fn with(mut self, ranges: &[(usize, usize, bool)]) -> Self {
        self.ranges = ranges.to_vec();
        self
    }
}

/// Sends it; how it ended, if it is to go to B as `frame`.
pub(crate) fn shoot(arena: &mut Arena, shot: &Shot, frame: &[u8]) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    let at = card.slot(0, 0);
    card.memory.write(at, &shot.bytes)?;
    let descs: Vec<Desc> = shot
        .ranges
        .iter()
        .map(|&(from, length, is_writable)| {
            let (at, length) = (at + from as u64, u32::try_from(length).unwrap_or(u32::MAX));
            if is_writable {
                Desc::writable(at, length)
            } else {
                Desc::readable(at, length)
            }
        })
        .collect();
    offer(&mut card, 1, 0, &descs)?;
    publish(&mut card, 1)?;
    let memory = Arc::clone(&card.memory);
    let used = match card.rings[1].wait_used(&memory, PATIENCE) {
        Ok(used) => used,
        Err(_) => return arena.retired(&card, 1),
    };
    if (used.id, used.len) != (0, 0) {
        return Err(format!("{used:?}: nothing is written to what is sent").into());
    }
    // The neighbour gets it, or it was counted.
    let marker = arena.frame(A, B, 10);
    card.send(0, &marker)?;
    let first = arena.b.1.receive(0)?;
    if first.frame == marker {
        return Ok(Arena::dropped(|| arena.sent()));
    }
    if first.frame != frame {
        return Err(format!("{} other bytes came", first.frame.len()).into());
    }
    if first.header[0] & 2 != 0 {
        return Err("a guest's word that its data is valid was believed".into());
    }
    arrives(&mut arena.b.1, &marker)?;
    Ok(End::Delivered)
}

/// A row that sends what is made of a frame of 100 bytes of payload.
fn row(name: &'static str, end: End, make: fn(&[u8]) -> Shot) -> Case {
    sized(name, end, 100, make)
}

fn sized(name: &'static str, end: End, payload: usize, make: fn(&[u8]) -> Shot) -> Case {
    altered(name, end, payload, |_| {}, make)
}

/// The same of a frame that was changed first.
fn altered(
    name: &'static str,
    end: End,
    payload: usize,
    alter: fn(&mut Vec<u8>),
    make: fn(&[u8]) -> Shot,
) -> Case {
    let run = move |arena: &mut Arena| {
        let mut frame = arena.frame(A, B, payload);
        alter(&mut frame);
        shoot(arena, &make(&frame), &frame)
    };
    Case {
        name,
        end,
        run: Arc::new(run),
        formats: BOTH,
    }
}

/// A frame that the switch or the guard looks at.
fn switched(name: &'static str, end: End, alter: fn(&mut Vec<u8>)) -> Case {
    altered(name, end, 100, alter, |frame| Shot::new(&NONE, frame))
}

/// Header and frame change all the time while they are sent: what arrives is what was checked, whatever that was.
fn changing(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    let packet = Packet {
        dst: mac(B),
        src: mac(A),
        ..Packet::v4(TCP, &[7; 5000])
    };
    let (frame, start, offset) = packet.partial();
    let mut bytes = vec![1, 1, 54, 0];
    for field in [1000, start, offset, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(frame);
    let at = card.slot(0, 0);
    card.memory.write(at, &bytes)?;
    let memory = Arc::clone(&card.memory);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let word =
                |from: usize| u32::from_le_bytes(bytes[from..from + 4].try_into().expect("four"));
            while !stop.load(Ordering::Relaxed) {
                // Size and place of a segment's checksum; the last four bytes of the source.
                for (from, other) in [(4, 0xffff_0000), (20, 0x0300_0000)] {
                    memory.swap_u32(at + from as u64, other).expect("inside");
                    memory
                        .swap_u32(at + from as u64, word(from))
                        .expect("inside");
                }
            }
        });
        let sent = send_while(arena, &mut card, bytes.len());
        stop.store(true, Ordering::Relaxed);
        sent
    })?;
    // It is as it was.
    offer(
        &mut card,
        1,
        0,
        &[Desc::readable(at, u32::try_from(bytes.len())?)],
    )?;
    publish(&mut card, 1)?;
    arrives(&mut arena.b.1, &bytes[12..])?;
    Ok(End::Harmless)
}

/// Sends what is there, again and again: whatever comes is from the card itself, and as it can be cut.
fn send_while(arena: &mut Arena, card: &mut Card, length: usize) -> Result<(), Wrong> {
    let (at, memory) = (card.slot(0, 0), Arc::clone(&card.memory));
    let length = u32::try_from(length)?;
    for _ in 0..2000 {
        offer(card, 1, 0, &[Desc::readable(at, length)])?;
        publish(card, 1)?;
        card.rings[1].wait_used(&memory, PATIENCE)?;
        while let Some(got) = arena.b.1.poll(0)? {
            let (source, asks) = (&got.frame[6..12], &got.header[..8]);
            if source != mac(A) || asks != [1, 1, 54, 0, 0xe8, 3, 34, 0] {
                return Err(format!("from {source:02x?} came {asks:02x?}").into());
            }
        }
    }
    Ok(())
}

/// A header that asks for nothing.
pub(crate) const NONE: [u8; 12] = [0; 12];

pub(crate) fn cases() -> Vec<Case> {
    let mut all = rows();
    all.push(Case {
        name: "frame_changes_while_it_is_sent",
        end: End::Harmless,
        run: Arc::new(changing),
        formats: BOTH,
    });
    all
}

fn rows() -> Vec<Case> {
    let malformed = End::Dropped(Malformed);
    vec![
        row("no_bytes", malformed, |_| Shot::new(&[], &[])),
        row("header_of_one_byte", malformed, |_| Shot::new(&[0], &[])),
        row("header_short_by_one", malformed, |_| {
            Shot::new(&NONE[1..], &[])
        }),
        row("header_short_and_frame_shorter", malformed, |f| {
            Shot::new(&NONE[..6], &f[..19])
        }),
        row("header_alone", malformed, |_| Shot::new(&NONE, &[])),
        row("frame_of_one_byte", malformed, |f| {
            Shot::new(&NONE, &f[..1])
        }),
        row("frame_short_of_ethernet", malformed, |f| {
            Shot::new(&NONE, &f[..13])
        }),
        altered(
            "frame_of_ethernet_alone",
            End::Delivered,
            0,
            |f| f.truncate(14),
            |f| Shot::new(&NONE, f),
        ),
        row("header_and_frame_in_one", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([])
        }),
        row("header_split_in_a_field", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([5])
        }),
        row("header_split_from_its_last_byte", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([11])
        }),
        row("header_byte_by_byte", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([1; 12])
        }),
        row("header_with_part_of_the_frame", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([12 + 7])
        }),
        row("frame_byte_by_byte", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([1; 100])
        }),
        row("frame_split_in_each_header", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([12, 3, 6, 4, 9, 15, 3])
        }),
        sized("head_split_at_its_end", End::Delivered, 1000, |f| {
            Shot::new(&NONE, f).cut([12 + 191, 1, 1])
        }),
        row("descriptors_of_no_bytes", End::Delivered, |f| {
            Shot::new(&NONE, f).cut([0, 0, 4, 0, 8, 0, 30, 0])
        }),
        row("descriptors_of_no_bytes_alone", malformed, |f| {
            Shot::new(&NONE, f).with(&[(0, 0, false); 5])
        }),
        row("header_overlaps_the_frame", End::Dropped(BadOffload), |f| {
            // Its first bytes are the destination's.
            Shot::new(&[], f).with(&[(0, 12, false), (0, 60, false)])
        }),
        row("ranges_that_overlap", End::Delivered, |f| {
            // All of the frame, by ranges each of which has bytes of the next one's twice in memory.
            let mut shot = Shot::new(&NONE, f);
            let tail = shot.bytes.len();
            shot.bytes.extend_from_slice(&f[50..]);
            shot.with(&[(0, 62, false), (tail, f.len() - 50, false)])
        }),
        row("only_to_be_written", malformed, |f| {
            Shot::new(&NONE, f).with(&[(0, 12, true), (12, 100, true)])
        }),
        row("with_room_to_be_written", End::Delivered, |f| {
            let mut shot = Shot::new(&NONE, f);
            shot.ranges.push((0x1_1000, 64, true));
            shot
        }),
        row("header_to_be_written", End::Retired, |f| {
            Shot::new(&NONE, f).with(&[(0, 12, true), (12, f.len(), false)])
        }),
        row("more_descriptors_than_the_queue_has", End::Retired, |f| {
            Shot::new(&NONE, f).cut([0; 300])
        }),
        row(
            "as_many_descriptors_as_the_queue_has",
            End::Delivered,
            |f| Shot::new(&NONE, f).cut([0; 255]),
        ),
        sized("a_byte_over_the_mtu", End::Dropped(TooLong), 1473, |f| {
            Shot::new(&NONE, f)
        }),
        sized("as_long_as_the_mtu", End::Delivered, 1472, |f| {
            Shot::new(&NONE, f)
        }),
        sized("as_long_as_any_frame", End::Dropped(TooLong), 1000, |f| {
            let mut frame = f.to_vec();
            frame.resize(65_557, 0);
            Shot::new(&NONE, &frame)
        }),
        sized("longer_than_any_frame", End::Dropped(TooLong), 1000, |f| {
            let mut frame = f.to_vec();
            frame.resize(65_558, 0);
            Shot::new(&NONE, &frame)
        }),
        sized(
            "many_times_longer_than_any_frame",
            End::Dropped(TooLong),
            1000,
            |f| {
                let ranges = [(0, 12, false)].into_iter();
                let ranges = ranges.chain([(12, 0x1_0000, false); 100]);
                let ranges: Vec<_> = ranges.collect();
                Shot::new(&NONE, f).with(&ranges)
            },
        ),
        switched(
            "from_another_cards_address",
            End::Dropped(SpoofedMac),
            |f| {
                f[6..12].copy_from_slice(&mac(3));
            },
        ),
        switched("from_a_group", End::Dropped(SpoofedMac), |f| f[6] |= 1),
        switched("from_nobody", End::Dropped(SpoofedMac), |f| {
            f[6..12].fill(0)
        }),
        switched("to_itself", End::Dropped(Hairpin), |f| {
            f[..6].copy_from_slice(&mac(A));
        }),
        switched("to_the_spanning_tree", End::Dropped(Reserved), |f| {
            f[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0]);
        }),
    ]
}
