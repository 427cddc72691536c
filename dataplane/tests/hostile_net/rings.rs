//! Rings that are broken, of queues that receive and that send: each retires alone, and the card's other queue works.

use std::sync::Arc;

use bulkhead_integration::card::{Card, Options};
use bulkhead_integration::disk::feature;
use bulkhead_integration::driver::desc::AVAIL;
use bulkhead_integration::driver::ring::{Desc, INDIRECT, NEXT, WRITE};

use crate::arena::{A, Arena, B, End, Wrong, arrives, gets, publish};
use crate::{Case, PACKED, SPLIT};

/// Breaks a queue's ring: those of even queues are looked at when a frame comes.
type Break = fn(&mut Card, usize) -> Result<(), Wrong>;

fn broken(arena: &mut Arena, queue: usize, options: &Options, how: Break) -> Result<End, Wrong> {
    let mut card = arena.attach(options)?;
    how(&mut card, queue)?;
    card.rings[queue].kick.write(1)?;
    if queue == 0 {
        arena.b_sends(100)?;
    }
    let end = arena.retired(&card, queue)?;
    // The other one goes on.
    if queue == 0 {
        let frame = arena.frame(A, B, 100);
        card.send(0, &frame)?;
        arrives(&mut arena.b.1, &frame)?;
    } else {
        gets(arena, &mut card)?;
    }
    Ok(end)
}

/// The row for the queue that receives, and for the one that sends.
fn rows(
    receives: &'static str,
    sends: &'static str,
    formats: &'static [bool],
    how: Break,
) -> [Case; 2] {
    [(receives, 0), (sends, 1)].map(|(name, queue)| Case {
        name,
        end: End::Retired,
        run: Arc::new(move |arena: &mut Arena| {
            let options = arena.without_buffers();
            broken(arena, queue, &options, how)
        }),
        formats,
    })
}

/// A good buffer, for either direction.
fn buffer(card: &Card, queue: usize) -> Desc {
    let at = card.slot(0, 3);
    if queue == 0 {
        Desc::writable(at, 4096)
    } else {
        Desc::readable(at, 100)
    }
}

/// Makes a split head available, whatever stands there.
fn show(card: &mut Card, queue: usize, heads: &[u16]) -> Result<(), Wrong> {
    let memory = Arc::clone(&card.memory);
    for head in heads {
        card.rings[queue].push(&memory, *head)?;
    }
    publish(card, queue)
}

fn split() -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(rows(
        "rx_index_jumps",
        "tx_index_jumps",
        SPLIT,
        |card, queue| {
            let size = card.rings[queue].size;
            Ok(card.rings[queue].publish_index(&card.memory, size + 1)?)
        },
    ));
    all.extend(rows(
        "rx_index_goes_back",
        "tx_index_goes_back",
        SPLIT,
        |card, queue| Ok(card.rings[queue].publish_index(&card.memory, u16::MAX)?),
    ));
    all.extend(rows(
        "rx_head_outside",
        "tx_head_outside",
        SPLIT,
        |card, queue| {
            let size = card.rings[queue].size;
            show(card, queue, &[size])
        },
    ));
    all.extend(rows(
        "rx_head_largest",
        "tx_head_largest",
        SPLIT,
        |card, queue| show(card, queue, &[u16::MAX]),
    ));
    all.extend(rows(
        "rx_chain_leaves_the_table",
        "tx_chain_leaves_the_table",
        SPLIT,
        |card, queue| {
            let desc = Desc {
                flags: buffer(card, queue).flags | NEXT,
                next: 5000,
                ..buffer(card, queue)
            };
            card.rings[queue].write_desc(&card.memory, 0, &desc)?;
            show(card, queue, &[0])
        },
    ));
    all.extend(rows(
        "rx_chain_loops",
        "tx_chain_loops",
        SPLIT,
        |card, queue| {
            for (index, next) in [(0, 1), (1, 0)] {
                let desc = Desc {
                    flags: buffer(card, queue).flags | NEXT,
                    next,
                    ..buffer(card, queue)
                };
                card.rings[queue].write_desc(&card.memory, index, &desc)?;
            }
            show(card, queue, &[0])
        },
    ));
    all.extend(rows(
        "rx_chain_is_its_own_next",
        "tx_chain_is_its_own_next",
        SPLIT,
        |card, queue| {
            let desc = Desc {
                flags: buffer(card, queue).flags | NEXT,
                next: 0,
                ..buffer(card, queue)
            };
            card.rings[queue].write_desc(&card.memory, 0, &desc)?;
            show(card, queue, &[0])
        },
    ));
    all.extend(tables(
        SPLIT,
        [
            ("rx_table_of_no_bytes_split", "tx_table_of_no_bytes_split"),
            (
                "rx_table_of_half_an_entry_split",
                "tx_table_of_half_an_entry_split",
            ),
            ("rx_table_outside_split", "tx_table_outside_split"),
            ("rx_table_in_a_table_split", "tx_table_in_a_table_split"),
            ("rx_table_with_a_next_split", "tx_table_with_a_next_split"),
        ],
        show_split,
    ));
    all
}

fn packed() -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(rows(
        "rx_id_outside",
        "tx_id_outside",
        PACKED,
        |card, queue| {
            let desc = buffer(card, queue);
            let size = card.rings[queue].size;
            place(card, queue, 0, &desc, size)
        },
    ));
    all.extend(rows(
        "rx_id_largest",
        "tx_id_largest",
        PACKED,
        |card, queue| {
            let desc = buffer(card, queue);
            place(card, queue, 0, &desc, u16::MAX)
        },
    ));
    all.extend(rows(
        "rx_chain_as_long_as_the_ring",
        "tx_chain_as_long_as_the_ring",
        PACKED,
        |card, queue| {
            let size = card.rings[queue].size;
            for index in (0..size).rev() {
                let desc = Desc {
                    flags: buffer(card, queue).flags | NEXT,
                    ..buffer(card, queue)
                };
                place(card, queue, index, &desc, 0)?;
            }
            Ok(())
        },
    ));
    all.extend(tables(
        PACKED,
        [
            ("rx_table_of_no_bytes_packed", "tx_table_of_no_bytes_packed"),
            (
                "rx_table_of_half_an_entry_packed",
                "tx_table_of_half_an_entry_packed",
            ),
            ("rx_table_outside_packed", "tx_table_outside_packed"),
            ("rx_table_in_a_table_packed", "tx_table_in_a_table_packed"),
            ("rx_table_with_a_next_packed", "tx_table_with_a_next_packed"),
        ],
        show_packed,
    ));
    all
}

/// Writes a descriptor of a packed ring in its first turn.
fn place(card: &mut Card, queue: usize, index: u16, desc: &Desc, id: u16) -> Result<(), Wrong> {
    let desc = Desc {
        flags: desc.flags | AVAIL,
        next: id,
        ..*desc
    };
    Ok(card.rings[queue].write_slot(&card.memory, index, &desc)?)
}

fn show_split(card: &mut Card, queue: usize, desc: &Desc) -> Result<(), Wrong> {
    card.rings[queue].write_desc(&card.memory, 0, desc)?;
    show(card, queue, &[0])
}

fn show_packed(card: &mut Card, queue: usize, desc: &Desc) -> Result<(), Wrong> {
    place(card, queue, 0, desc, 0)
}

/// Tables that can't be.
fn tables(
    formats: &'static [bool],
    names: [(&'static str, &'static str); 5],
    show: fn(&mut Card, usize, &Desc) -> Result<(), Wrong>,
) -> Vec<Case> {
    let kinds: [fn(u64) -> Desc; 5] = [
        |at| Desc::indirect(at, 0),
        |at| Desc::indirect(at, 24),
        |_| Desc::indirect(0xdead_0000_0000, 16),
        |at| Desc::indirect(at, 16),
        |at| Desc {
            flags: INDIRECT | NEXT,
            ..Desc::indirect(at, 16)
        },
    ];
    let mut all = Vec::new();
    for ((receives, sends), desc) in names.into_iter().zip(kinds) {
        for (name, queue) in [(receives, 0), (sends, 1)] {
            let run = move |arena: &mut Arena| {
                let mut card = arena.attach(&arena.without_buffers())?;
                let at = card.slot(0, 4);
                // The table's one entry is a table.
                let inner = Desc::indirect(at, 16);
                let bytes = if arena.packed {
                    inner.packed_bytes()
                } else {
                    inner.bytes()
                };
                card.memory.write(at, &bytes)?;
                show(&mut card, queue, &desc(at))?;
                card.rings[queue].kick.write(1)?;
                if queue == 0 {
                    arena.b_sends(100)?;
                }
                arena.retired(&card, queue)
            };
            all.push(Case {
                name,
                end: End::Retired,
                run: Arc::new(run),
                formats,
            });
        }
    }
    all
}

/// A table where none was negotiated.
fn unasked(arena: &mut Arena, queue: usize) -> Result<End, Wrong> {
    let usual = arena.without_buffers();
    let options = Options {
        features: usual.features & !feature::INDIRECT_DESC,
        ..usual
    };
    let mut card = arena.attach(&options)?;
    let at = card.slot(0, 4);
    let desc = Desc {
        flags: INDIRECT | if queue == 0 { WRITE } else { 0 },
        ..Desc::indirect(at, 16)
    };
    if arena.packed {
        show_packed(&mut card, queue, &desc)?;
    } else {
        show_split(&mut card, queue, &desc)?;
    }
    card.rings[queue].kick.write(1)?;
    if queue == 0 {
        arena.b_sends(100)?;
    }
    arena.retired(&card, queue)
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = split();
    all.extend(packed());
    for (name, queue) in [
        ("rx_table_that_was_not_negotiated", 0),
        ("tx_table_that_was_not_negotiated", 1),
    ] {
        all.push(Case {
            name,
            end: End::Retired,
            run: Arc::new(move |arena: &mut Arena| unasked(arena, queue)),
            formats: crate::BOTH,
        });
    }
    all
}
