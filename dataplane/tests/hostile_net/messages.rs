//! What a frontend says of a network card: MTU and RARP messages malformed, queues enabled in odd orders and numbers,
//! memory, queues and connections taken away while frames are on their way.

use std::sync::Arc;

use bulkhead_integration::card::{Card, Options};
use bulkhead_integration::disk::DiskError;
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::{halves, request, words};

use crate::arena::{A, Arena, B, C, End, Wrong, arrives};
use crate::rig::mac;
use crate::{BOTH, Case, SPLIT};

/// How a message ended.
fn fate(result: Result<(), FrontendError>) -> Result<End, Wrong> {
    match result {
        Ok(()) => Ok(End::Accepted),
        Err(FrontendError::Refused { .. } | FrontendError::Closed) => Ok(End::Refused),
        Err(other) => Err(other.into()),
    }
}

/// A row that says one thing on a connection whose card runs.
fn says(name: &'static str, end: End, code: u32, body: fn() -> Vec<u8>) -> Case {
    let run = move |arena: &mut Arena| {
        let card = arena.attach(&arena.options())?;
        fate(card.frontend.set(code, &body(), &[]))
    };
    Case {
        name,
        end,
        run: Arc::new(run),
        formats: SPLIT,
    }
}

fn case(
    name: &'static str,
    end: End,
    formats: &'static [bool],
    run: fn(&mut Arena) -> Result<End, Wrong>,
) -> Case {
    Case {
        name,
        end,
        run: Arc::new(run),
        formats,
    }
}

fn address(mac: [u8; 6]) -> Vec<u8> {
    mac.into_iter().chain([0; 2]).collect()
}

fn numbers() -> Vec<Case> {
    use request::{NET_SET_MTU, SEND_RARP, SET_VRING_ENABLE};
    vec![
        says("mtu_as_it_is", End::Accepted, NET_SET_MTU, || {
            words(&[1500])
        }),
        says("mtu_zero", End::Refused, NET_SET_MTU, || words(&[0])),
        says("mtu_of_less_than_any", End::Refused, NET_SET_MTU, || {
            words(&[67])
        }),
        says("mtu_over_the_cards", End::Refused, NET_SET_MTU, || {
            words(&[1501])
        }),
        says(
            "mtu_of_more_than_16_bits",
            End::Refused,
            NET_SET_MTU,
            || words(&[0x1_05dc]),
        ),
        says("mtu_largest", End::Refused, NET_SET_MTU, || {
            words(&[u64::MAX])
        }),
        says("mtu_without_a_body", End::Refused, NET_SET_MTU, Vec::new),
        says("mtu_of_half_a_body", End::Refused, NET_SET_MTU, || {
            vec![0xdc, 5, 0, 0]
        }),
        says("mtu_of_two_bodies", End::Refused, NET_SET_MTU, || {
            words(&[1500, 1500])
        }),
        says("rarp_as_it_is", End::Accepted, SEND_RARP, || {
            address(mac(A))
        }),
        says("rarp_of_another_card", End::Refused, SEND_RARP, || {
            address(mac(B))
        }),
        says("rarp_of_everybody", End::Refused, SEND_RARP, || {
            address([0xff; 6])
        }),
        says("rarp_of_nobody", End::Refused, SEND_RARP, || {
            address([0; 6])
        }),
        says("rarp_without_a_body", End::Refused, SEND_RARP, Vec::new),
        says("rarp_of_six_bytes", End::Refused, SEND_RARP, || {
            mac(A).to_vec()
        }),
        says("rarp_of_two_bodies", End::Refused, SEND_RARP, || {
            [address(mac(A)), address(mac(A))].concat()
        }),
        says(
            "enable_of_a_queue_that_is_not",
            End::Refused,
            SET_VRING_ENABLE,
            || halves(&[4, 1]),
        ),
        says(
            "enable_of_the_control_queue",
            End::Refused,
            SET_VRING_ENABLE,
            || halves(&[5, 1]),
        ),
        says(
            "enable_of_the_largest_queue",
            End::Refused,
            SET_VRING_ENABLE,
            || halves(&[u32::MAX, 1]),
        ),
        says(
            "enable_of_a_queue_that_was_not_set_up",
            End::Accepted,
            SET_VRING_ENABLE,
            || halves(&[3, 1]),
        ),
        says(
            "enable_with_any_number",
            End::Accepted,
            SET_VRING_ENABLE,
            || halves(&[0, 0xdead]),
        ),
    ]
}

/// Many announcements, one behind the other.
fn announcements(arena: &mut Arena) -> Result<End, Wrong> {
    let card = arena.attach(&arena.options())?;
    // Each goes to everybody, who have room for so many.
    for _ in 0..50 {
        card.frontend
            .set(request::SEND_RARP, &address(mac(A)), &[])?;
    }
    arena.neighbours_talk()?;
    Ok(End::Harmless)
}

/// Nothing of a card whose link is down goes anywhere, whatever its frontend says.
fn announced_while_down(arena: &mut Arena) -> Result<End, Wrong> {
    let card = arena.attach(&arena.options())?;
    arena.a.device.set_up(false);
    card.frontend
        .set(request::SEND_RARP, &address(mac(A)), &[])?;
    for _ in 0..10 {
        let frame = arena.frame(C, B, 100);
        arena.c.1.send(0, &frame)?;
        if arena.b.1.receive(0)?.frame != frame {
            return Err("it was announced".into());
        }
    }
    arena.a.device.set_up(true);
    Ok(End::Harmless)
}

/// Pairs are enabled and disabled in any order while frames come for them.
fn pairs(arena: &mut Arena) -> Result<End, Wrong> {
    let options = Options {
        pairs: 2,
        ..arena.options()
    };
    let mut card = arena.attach(&options)?;
    for round in 0..40usize {
        for queue in [3, 0, 2, 1] {
            card.enable(queue, (round + queue) % 3 != 0)?;
            arena.b_sends(100)?;
            for pair in 0..2 {
                while card.poll(pair)?.is_some() {}
            }
        }
    }
    for queue in 0..4 {
        card.enable(queue, queue < 2)?;
    }
    // All with the first one again.
    let frame = arena.b_sends(100)?;
    arrives(&mut card, &frame)?;
    let frame = arena.frame(A, B, 100);
    card.send(0, &frame)?;
    arrives(&mut arena.b.1, &frame)?;
    Ok(End::Delivered)
}

/// Only the queue that receives; only the one that sends.
fn one_direction(arena: &mut Arena, disabled: usize) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    card.enable(disabled, false)?;
    if disabled == 1 {
        let frame = arena.b_sends(100)?;
        arrives(&mut card, &frame)?;
    } else {
        let frame = arena.frame(A, B, 100);
        card.send(0, &frame)?;
        arrives(&mut arena.b.1, &frame)?;
    }
    Ok(End::Delivered)
}

/// What is offered before a queue is enabled waits until it is.
fn offered_before(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    card.enable(1, false)?;
    let frame = arena.frame(A, B, 100);
    card.offer(0, &[0; 12], &frame)?;
    card.publish(0)?;
    arena.neighbours_talk()?;
    if arena.sent().packets != 0 {
        return Err("a queue that is disabled was served".into());
    }
    card.enable(1, true)?;
    arrives(&mut arena.b.1, &frame)?;
    Ok(End::Delivered)
}

/// Queues are stopped and started while frames come and go.
fn stops(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    for round in 0..30usize {
        let queue = round % 2;
        for _ in 0..4 {
            arena.b_sends(1000)?;
        }
        card.stop_queue(queue)?;
        arena.b_sends(1000)?;
        card.resume_queue(queue)?;
        while card.poll(0)?.is_some() {}
    }
    let frame = arena.b_sends(100)?;
    arrives(&mut card, &frame)?;
    Ok(End::Delivered)
}

/// The memory table is set again, or is another, while frames come.
fn tables(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = arena.attach(&arena.options())?;
    for _ in 0..30 {
        arena.b_sends(1000)?;
        card.share_memory()?;
        while card.poll(0)?.is_some() {}
    }
    let frame = arena.b_sends(100)?;
    arrives(&mut card, &frame)?;
    Ok(End::Delivered)
}

/// A table in which the rings or the buffers are not any more.
fn table_without(arena: &mut Arena, region: usize) -> Result<End, Wrong> {
    let card = arena.attach(&arena.options())?;
    let region = &card.memory.regions()[region];
    let told = card
        .frontend
        .set_memory_table(&[region.entry()], &[region.file()]);
    for _ in 0..10 {
        arena.b_sends(1000)?;
    }
    arena.neighbours_talk()?;
    // What is nowhere retires its queue, now or when it is needed.
    fate(told).map(|_| End::Harmless)
}

/// The connection ends while frames come.
fn goes(arena: &mut Arena) -> Result<End, Wrong> {
    for _ in 0..10 {
        let card = arena.attach(&arena.options())?;
        for _ in 0..5 {
            arena.b_sends(1000)?;
        }
        drop(card);
        arena.b_sends(1000)?;
        arena.neighbours_talk_once()?;
    }
    Ok(End::Harmless)
}

/// RESET_OWNER and SET_FEATURES while queues run.
fn features_while_running(arena: &mut Arena) -> Result<End, Wrong> {
    let card = arena.attach(&arena.options())?;
    let other = card.features & !bulkhead_integration::card::net_feature::MRG_RXBUF;
    let told = card
        .frontend
        .set(request::SET_FEATURES, &words(&[other]), &[]);
    for _ in 0..10 {
        arena.b_sends(1000)?;
    }
    arena.neighbours_talk()?;
    match fate(told) {
        // Taken or not: what runs goes on with what it was started with, or has stopped.
        Ok(_) => Ok(End::Harmless),
        Err(wrong) => Err(wrong),
    }
}

/// Features that were not offered.
fn features_unoffered(arena: &mut Arena) -> Result<End, Wrong> {
    let usual = Options {
        pairs: 1,
        buffers: 0,
        ..Options::default()
    };
    let card = Card::attach(&arena.a.path, &usual)?;
    // VIRTIO_NET_F_HOST_UFO, GUEST_ECN and RSC_EXT.
    for bit in [14, 9, 61] {
        let told = words(&[card.features | 1 << bit]);
        match card.frontend.set(request::SET_FEATURES, &told, &[]) {
            Err(FrontendError::Refused { .. }) => {}
            Err(FrontendError::Closed) => break,
            other => return Err(format!("bit {bit}: {other:?}").into()),
        }
    }
    Ok(End::Refused)
}

/// A kick of a queue that receives, as often as a frontend likes.
fn kicks(arena: &mut Arena) -> Result<End, Wrong> {
    let card = arena.attach(&arena.options())?;
    for _ in 0..5000 {
        for ring in &card.rings {
            match ring.kick.write(1) {
                Ok(_) | Err(nix::errno::Errno::EAGAIN) => {}
                Err(other) => return Err(DiskError::from(other).into()),
            }
        }
    }
    arena.neighbours_talk()?;
    Ok(End::Harmless)
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = numbers();
    all.extend([
        case("rarp_again_and_again", End::Harmless, SPLIT, announcements),
        case(
            "rarp_while_the_link_is_down",
            End::Harmless,
            SPLIT,
            announced_while_down,
        ),
        case("pairs_in_any_order", End::Delivered, BOTH, pairs),
        case("receiving_alone", End::Delivered, BOTH, |arena| {
            one_direction(arena, 1)
        }),
        case("sending_alone", End::Delivered, BOTH, |arena| {
            one_direction(arena, 0)
        }),
        case(
            "offered_before_it_is_enabled",
            End::Delivered,
            BOTH,
            offered_before,
        ),
        case("queues_stop_under_traffic", End::Delivered, BOTH, stops),
        case("memory_changes_under_traffic", End::Delivered, BOTH, tables),
        case("memory_without_rings", End::Harmless, BOTH, |arena| {
            table_without(arena, 1)
        }),
        case("memory_without_buffers", End::Harmless, BOTH, |arena| {
            table_without(arena, 0)
        }),
        case("connection_ends_under_traffic", End::Harmless, BOTH, goes),
        case(
            "features_while_running",
            End::Harmless,
            BOTH,
            features_while_running,
        ),
        case(
            "features_that_were_not_offered",
            End::Refused,
            SPLIT,
            features_unoffered,
        ),
        case("kicks_without_end", End::Harmless, BOTH, kicks),
    ]);
    all
}
