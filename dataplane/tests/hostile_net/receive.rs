//! Receive buffers of any shape: too short, too few, too many, read-only, elsewhere; and their exhaustion.

use std::sync::Arc;

use bulkhead_dataplane::port::DropReason::{BadBuffers, LinkDown, NoRoom};
use bulkhead_integration::card::{Card, Options};
use bulkhead_integration::driver::ring::Desc;
use bulkhead_integration::packets::{Packet, TCP};

use crate::arena::{A, Arena, B, C, End, Wrong, arrives, offer, publish};
use crate::rig::{counted, drops, mac};
use crate::{BOTH, Case};

/// Where a row's buffers lie, in the room for frames that the attacker does not send.
fn at(card: &Card, offset: u64) -> u64 {
    card.slot(0, 2) + offset
}

/// A chain of buffers of these lengths, side by side.
fn chain(card: &Card, offset: u64, lengths: &[u32]) -> Vec<Desc> {
    let mut next = at(card, offset);
    let mut descs = Vec::new();
    for length in lengths {
        descs.push(Desc::writable(next, *length));
        next += u64::from(*length);
    }
    descs
}

type Chains = fn(&Card) -> Vec<Vec<Desc>>;

fn receiving(
    name: &'static str,
    end: End,
    options: fn(&Arena) -> Options,
    payload: usize,
    chains: Chains,
) -> Case {
    let run = move |arena: &mut Arena| {
        let mut card = arena.attach(&options(arena))?;
        for (id, descs) in (0u16..).zip(chains(&card)) {
            offer(&mut card, 0, id * 4, &descs)?;
        }
        publish(&mut card, 0)?;
        let frame = arena.b_sends(payload)?;
        if end == End::Retired {
            return arena.retired(&card, 0);
        }
        received(arena, &mut card, &frame)
    };
    Case {
        name,
        end,
        run: Arc::new(run),
        formats: BOTH,
    }
}

/// How a frame to the attacker ended: as what is counted, and where bytes were written.
fn received(arena: &Arena, card: &mut Card, frame: &[u8]) -> Result<End, Wrong> {
    let counts = || arena.received();
    let until = std::time::Instant::now() + crate::rig::PATIENCE;
    loop {
        if counts().packets == 1 {
            return comes(card, frame);
        }
        if counts().all_drops() > 0 {
            return Ok(Arena::dropped(counts));
        }
        if std::time::Instant::now() > until {
            return Err("nothing was counted".into());
        }
        std::thread::yield_now();
    }
}

/// The bytes are found behind each other in the attacker's buffers, wherever those are.
fn comes(card: &mut Card, frame: &[u8]) -> Result<End, Wrong> {
    let memory = Arc::clone(&card.memory);
    let mut bytes = 0;
    while bytes < frame.len() + 12 {
        let used = card.rings[0].wait_used(&memory, crate::rig::PATIENCE)?;
        bytes += used.len as usize;
    }
    let all = memory.read(card.slot(0, 0), 0x12_0000)?;
    let is_there = all.windows(frame.len()).any(|part| part == frame);
    if bytes == frame.len() + 12 && is_there {
        Ok(End::Delivered)
    } else {
        Err(format!("{bytes} bytes were used, and the frame is there: {is_there}").into())
    }
}

fn row(name: &'static str, end: End, chains: Chains) -> Case {
    receiving(name, end, Arena::without_buffers, 1000, chains)
}

fn unmerged(name: &'static str, end: End, chains: Chains) -> Case {
    receiving(name, end, Arena::unmerged, 1000, chains)
}

/// Bytes of the frame with its header.
const WHOLE: u32 = 12 + 42 + 1000;

fn shapes() -> Vec<Case> {
    let (no_room, bad) = (End::Dropped(NoRoom), End::Dropped(BadBuffers));
    vec![
        row("no_buffers", no_room, |_| Vec::new()),
        row("buffer_that_just_fits", End::Delivered, |card| {
            vec![chain(card, 0, &[WHOLE])]
        }),
        row("buffers_short_by_one", no_room, |card| {
            vec![chain(card, 0, &[500]), chain(card, 500, &[WHOLE - 501])]
        }),
        row("buffers_that_just_fit", End::Delivered, |card| {
            vec![chain(card, 0, &[500]), chain(card, 500, &[WHOLE - 500])]
        }),
        row("buffers_of_a_byte_each", no_room, |card| {
            let first = chain(card, 0, &[26]);
            let others = (0..40).map(|i| chain(card, 26 + i, &[1]));
            std::iter::once(first).chain(others).collect()
        }),
        row("buffers_of_which_there_are_too_many", bad, |card| {
            let first = chain(card, 0, &[26]);
            let others = (0..60).map(|i| chain(card, 26 + i, &[1]));
            std::iter::once(first).chain(others).collect()
        }),
        row("buffers_as_many_as_there_may_be", End::Delivered, |card| {
            let first = chain(card, 0, &[26]);
            let others = (0..47).map(|i| chain(card, 26 + 22 * i, &[22]));
            std::iter::once(first).chain(others).collect()
        }),
        row(
            "buffers_of_a_byte_each_in_one_chain",
            End::Delivered,
            |card| vec![chain(card, 0, &[&[1; 127][..], &[WHOLE - 127]].concat())],
        ),
        row("buffer_of_too_many_parts", End::Retired, |card| {
            vec![chain(card, 0, &[&[1; 128][..], &[WHOLE - 128]].concat())]
        }),
        row("buffer_of_too_many_empty_parts", End::Retired, |card| {
            vec![chain(card, 0, &[&[0; 128][..], &[WHOLE]].concat())]
        }),
        row("buffers_with_empty_ones_between", End::Delivered, |card| {
            vec![chain(card, 0, &[0, 5, 0, 0, 7, 0, WHOLE, 0])]
        }),
        row("buffers_shorter_than_a_header", bad, |card| {
            (0..8).map(|_| chain(card, 0, &[11])).collect()
        }),
        row("buffers_as_short_as_a_header", bad, |card| {
            (0..8).map(|_| chain(card, 0, &[12])).collect()
        }),
        row("buffers_short_of_ethernet", bad, |card| {
            (0..8).map(|_| chain(card, 0, &[25])).collect()
        }),
        row("buffers_of_no_bytes", bad, |card| {
            (0..8).map(|_| chain(card, 0, &[0])).collect()
        }),
        row("buffers_that_are_read_only", bad, |card| {
            (0..8)
                .map(|_| vec![Desc::readable(at(card, 0), 4096)])
                .collect()
        }),
        row("few_buffers_that_are_read_only", no_room, |card| {
            (0..3)
                .map(|_| vec![Desc::readable(at(card, 0), 4096)])
                .collect()
        }),
        row(
            "read_only_buffers_before_a_good_one",
            End::Delivered,
            |card| {
                let bad = (0..3).map(|_| vec![Desc::readable(at(card, 0), 4096)]);
                bad.chain([chain(card, 0, &[2000])]).collect()
            },
        ),
        row("read_only_buffer_behind_a_short_one", bad, |card| {
            vec![
                chain(card, 0, &[100]),
                vec![Desc::readable(at(card, 0), 4096)],
                chain(card, 100, &[2000]),
            ]
        }),
        row(
            "buffer_with_a_part_that_is_read_only",
            End::Delivered,
            |card| {
                let readable = Desc::readable(at(card, 0x8000), 4096);
                vec![[vec![readable], chain(card, 0, &[WHOLE])].concat()]
            },
        ),
        row(
            "read_only_part_behind_a_writable_one",
            End::Retired,
            |card| {
                let readable = Desc::readable(at(card, 0x8000), 4096);
                vec![[chain(card, 0, &[WHOLE]), vec![readable]].concat()]
            },
        ),
        row("buffer_twice", End::Delivered, |card| {
            vec![chain(card, 0, &[2000]), chain(card, 0, &[2000])]
        }),
        row(
            "more_descriptors_than_the_queue_has_to_receive",
            End::Retired,
            |card| vec![chain(card, 0, &[1; 300])],
        ),
    ]
}

fn places() -> Vec<Case> {
    vec![
        row("buffer_outside", End::Retired, |_| {
            vec![vec![Desc::writable(0xdead_0000_0000, 4096)]]
        }),
        row("buffer_at_the_end_of_addresses", End::Retired, |_| {
            vec![vec![Desc::writable(u64::MAX - 10, 4096)]]
        }),
        row("buffer_past_the_memorys_end", End::Retired, |card| {
            let region = card.memory.regions()[1].entry();
            let end = region.guest_addr + region.size_bytes;
            vec![vec![Desc::writable(end - 2000, 2001)]]
        }),
        row("buffer_to_the_memorys_end", End::Delivered, |card| {
            let region = card.memory.regions()[1].entry();
            let end = region.guest_addr + region.size_bytes;
            vec![vec![Desc::writable(end - 2000, 2000)]]
        }),
        row("buffer_of_four_gigabytes", End::Retired, |card| {
            vec![vec![Desc::writable(at(card, 0), u32::MAX)]]
        }),
        row("buffer_outside_behind_a_short_one", End::Retired, |card| {
            vec![
                chain(card, 0, &[100]),
                vec![Desc::writable(0xdead_0000_0000, 4096)],
            ]
        }),
        unmerged("one_buffer_short_by_one", End::Dropped(NoRoom), |card| {
            vec![chain(card, 0, &[WHOLE - 1]), chain(card, 2000, &[4096])]
        }),
        unmerged("one_buffer_that_just_fits", End::Delivered, |card| {
            vec![chain(card, 0, &[WHOLE])]
        }),
        unmerged("one_buffer_of_many_parts", End::Delivered, |card| {
            vec![chain(card, 0, &[3, 9, 14, 1, 500, WHOLE - 527])]
        }),
        unmerged(
            "one_buffer_that_is_read_only",
            End::Dropped(BadBuffers),
            |card| {
                (0..8)
                    .map(|_| vec![Desc::readable(at(card, 0), 4096)])
                    .collect()
            },
        ),
    ]
}

fn case(name: &'static str, end: End, run: fn(&mut Arena) -> Result<End, Wrong>) -> Case {
    Case {
        name,
        end,
        run: Arc::new(run),
        formats: BOTH,
    }
}

/// Buffers that lie over the rings they are offered in: what the guest gets of that is its own affair.
fn over_rings(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.without_buffers())?;
    let parts = card.rings[0].parts();
    for (id, part) in (0u16..).zip(parts) {
        let start = part.start;
        offer(&mut card, 0, id * 4, &[Desc::writable(start, 4096)])?;
    }
    publish(&mut card, 0)?;
    for _ in 0..10 {
        arena.b_sends(1000)?;
    }
    arena.neighbours_talk()?;
    Ok(End::Harmless)
}

/// More than there are buffers: each frame that found one came, the others were counted.
fn exhaustion(arena: &mut Arena) -> Result<End, Wrong> {
    let options = Options {
        buffers: 10,
        ..arena.options()
    };
    let mut card = arena.attach(&options)?;
    let mut frames = Vec::new();
    for _ in 0..200 {
        frames.push(arena.b_sends(100)?);
        arena.neighbours_talk_once()?;
    }
    let counts = counted(
        || arena.received(),
        |all| all.packets + all.all_drops() == 200,
    );
    if (counts.packets, drops(&counts, NoRoom)) != (10, 190) {
        return Err(format!("{counts:?}").into());
    }
    for frame in frames.iter().take(10) {
        if card.receive(0)?.frame != *frame {
            return Err("another frame came".into());
        }
    }
    // There are buffers again.
    let frame = arena.b_sends(100)?;
    arrives(&mut card, &frame)?;
    Ok(End::Delivered)
}

/// A segment of 64 KiB is too much for the buffers; small frames find them all afterwards.
fn large_segments(arena: &mut Arena) -> Result<End, Wrong> {
    let options = Options {
        buffers: 12,
        ..arena.options()
    };
    let mut card = arena.attach(&options)?;
    let packet = Packet {
        dst: mac(A),
        src: mac(B),
        ..Packet::v4(TCP, &vec![3; 60_000])
    };
    let (segment, start, offset) = packet.partial();
    let mut header = vec![1, 1, 54, 0];
    for field in [1400, start, offset, 0] {
        header.extend(field.to_le_bytes());
    }
    for _ in 0..50 {
        arena.b.1.send_with(0, &header, &segment)?;
    }
    let counts = counted(|| arena.received(), |all| all.all_drops() == 50);
    if drops(&counts, NoRoom) != 50 {
        return Err(format!("{counts:?}").into());
    }
    for _ in 0..12 {
        let frame = arena.b_sends(1000)?;
        if card.receive(0)?.frame != frame {
            return Err("another frame came".into());
        }
    }
    Ok(End::Delivered)
}

/// What goes to everybody goes to those who have room.
fn broadcasts(arena: &mut Arena) -> Result<End, Wrong> {
    let _card = arena.attach(&arena.without_buffers())?;
    let mut frame = arena.frame(B, C, 100);
    frame[..6].fill(0xff);
    for _ in 0..20 {
        arena.b.1.send(0, &frame)?;
        arrives(&mut arena.c.1, &frame)?;
    }
    let counts = counted(|| arena.received(), |all| all.all_drops() == 20);
    Ok(match drops(&counts, NoRoom) {
        20 => End::Dropped(NoRoom),
        _ => return Err(format!("{counts:?}").into()),
    })
}

/// The pages that frames are delivered to go away while they are.
fn memory_is_cut(arena: &mut Arena, region: usize) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    let frame = arena.b_sends(1000)?;
    arrives(&mut card, &frame)?;
    nix::unistd::ftruncate(card.memory.regions()[region].file(), 0)?;
    for _ in 0..20 {
        arena.b_sends(1000)?;
        arena.neighbours_talk_once()?;
    }
    // Nothing here may touch that memory any more.
    std::mem::forget(card.rings.drain(..).collect::<Vec<_>>());
    Ok(End::Harmless)
}

/// The pages that frames are sent from.
fn sent_memory_is_cut(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    let frame = arena.frame(A, B, 1000);
    for _ in 0..15 {
        card.offer(0, &[0; 12], &frame)?;
    }
    nix::unistd::ftruncate(card.memory.regions()[1].file(), 0)?;
    card.publish(0)?;
    for _ in 0..20 {
        arena.neighbours_talk_once()?;
    }
    Ok(End::Harmless)
}

fn disabled(arena: &mut Arena) -> Result<End, Wrong> {
    let card = arena.attach(&arena.options())?;
    card.enable(0, false)?;
    arena.b_sends(100)?;
    let end = Arena::dropped(|| arena.received());
    card.enable(0, true)?;
    let mut card = card;
    let frame = arena.b_sends(100)?;
    arrives(&mut card, &frame)?;
    Ok(end)
}

/// Buffers that are offered, and changed as soon as they are.
fn changing(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    let memory = Arc::clone(&card.memory);
    let desc = card.rings[0].desc;
    std::thread::scope(|scope| {
        let flip = scope.spawn(|| {
            // Addresses and lengths of the first descriptors, here and nowhere.
            for round in 0..20_000u32 {
                let place = desc + 16 * u64::from(round % 64) + 8;
                let length = if round % 3 == 0 { 4096 } else { round };
                memory.swap_u32(place, length).expect("inside");
            }
        });
        while !flip.is_finished() {
            arena.b_sends(1000)?;
            arena.neighbours_talk_once()?;
        }
        Ok::<(), Wrong>(())
    })?;
    card.rings[0].forget();
    Ok(End::Harmless)
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = shapes();
    all.extend(places());
    all.extend([
        case("buffers_over_their_own_rings", End::Harmless, over_rings),
        case("exhaustion", End::Delivered, exhaustion),
        case(
            "exhaustion_by_large_segments",
            End::Delivered,
            large_segments,
        ),
        case(
            "exhaustion_of_one_of_many",
            End::Dropped(NoRoom),
            broadcasts,
        ),
        case("memory_of_buffers_is_cut", End::Harmless, |arena| {
            memory_is_cut(arena, 1)
        }),
        case("memory_of_rings_is_cut", End::Harmless, |arena| {
            memory_is_cut(arena, 0)
        }),
        case("memory_of_frames_is_cut", End::Harmless, sent_memory_is_cut),
        case("receiving_is_disabled", End::Dropped(LinkDown), disabled),
        case(
            "buffers_change_while_they_are_written",
            End::Harmless,
            changing,
        ),
    ]);
    all
}
