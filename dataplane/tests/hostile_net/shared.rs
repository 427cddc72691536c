//! What a frontend shares beside guest memory: the dirty log that a migration is done by, and the region of what is in
//! flight, both cut, too short, replaced or rewritten while frames come.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_integration::card::{Card, Options};
use bulkhead_integration::disk::feature;
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::{self, Inflight, request, words};
use bulkhead_integration::random::Random;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::arena::{Arena, End, Wrong, arrives};
use crate::{BOTH, Case};

const PAGE: u64 = 4096;
/// Frames that are sent while something is done to what is shared.
const ROUNDS: usize = 30;

/// The guest address behind its memory.
fn end_of(card: &Card) -> u64 {
    let regions = card.memory.regions().iter();
    let ends = regions.map(|region| region.entry().guest_addr + region.entry().size_bytes);
    ends.max().expect("there is memory")
}

/// A log for so many bytes of guest memory.
fn log_for(bytes: u64) -> Result<File, Wrong> {
    let log = File::from(memfd_create("log", MFdFlags::MFD_CLOEXEC)?);
    log.set_len((bytes / PAGE).div_ceil(8))?;
    Ok(log)
}

/// SET_LOG_BASE.
fn give(card: &Card, log: &File) -> Result<(), FrontendError> {
    let body = words(&[log.metadata().expect("a length").len(), 0]);
    let fds = [log.as_fd()];
    card.frontend.ask(request::SET_LOG_BASE, &body, &fds)?;
    Ok(())
}

/// Has what is written be marked, the rings of the first pair too.
fn begin(card: &Card) -> Result<(), Wrong> {
    let all = words(&[card.features | feature::LOG_ALL]);
    card.frontend.set(request::SET_FEATURES, &all, &[])?;
    for (index, ring) in (0..).zip(&card.rings) {
        let user = |at| card.memory.user_addr(at);
        let at = [user(ring.desc)?, user(ring.used)?, user(ring.avail)?];
        let body = message::logged_vring_addresses(index, at, ring.used);
        card.frontend.set(request::SET_VRING_ADDR, &body, &[])?;
    }
    Ok(())
}

/// Pages that are marked.
fn marked(log: &File) -> Result<BTreeSet<u64>, Wrong> {
    let mut bytes = vec![0; usize::try_from(log.metadata()?.len())?];
    log.read_exact_at(&mut bytes, 0)?;
    let bits = (0u64..).zip(bytes).flat_map(|(at, byte)| {
        let is_set = move |bit: &u64| byte & (1 << bit) != 0;
        (0..8).filter(is_set).map(move |bit| at * 8 + bit)
    });
    Ok(bits.collect())
}

/// The attacker, with buffers of which a long frame needs several.
fn attached(arena: &Arena) -> Result<Card, Wrong> {
    arena.attach(&Options {
        buffer_bytes: 600,
        ..arena.options()
    })
}

/// Whoever migrates the guest copies what is marked: it must be all that has changed.
fn log_is_right(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = attached(arena)?;
    let log = log_for(end_of(&card))?;
    give(&card, &log)?;
    begin(&card)?;
    let buffers = card.memory.regions()[1].entry();
    let length = usize::try_from(buffers.size_bytes)?;
    let before = card.memory.read(buffers.guest_addr, length)?;
    for payload in [10, 1400, 600, 1000] {
        let frame = arena.b_sends(payload)?;
        arrives(&mut card, &frame)?;
    }
    // The last mark may come with the next thing that the worker does, no later than an answer.
    card.frontend.ask_u64(request::GET_FEATURES)?;
    let after = card.memory.read(buffers.guest_addr, length)?;
    let marked = marked(&log)?;
    let bytes = usize::try_from(PAGE)?;
    let changed = before.chunks(bytes).zip(after.chunks(bytes));
    let changed: BTreeSet<u64> = (buffers.guest_addr / PAGE..)
        .zip(changed)
        .filter(|(_, (before, after))| before != after)
        .map(|(page, _)| page)
        .collect();
    let [descs, _, used] = card.rings[0].parts();
    let ring = if arena.packed { descs } else { used };
    if changed.is_empty() || !changed.is_subset(&marked) || !marked.contains(&(ring.start / PAGE)) {
        return Err(format!("changed {changed:x?}, marked {marked:x?}").into());
    }
    Ok(End::Delivered)
}

/// The log's pages go away.
fn log_is_cut(arena: &mut Arena) -> Result<End, Wrong> {
    let card = attached(arena)?;
    let log = log_for(end_of(&card))?;
    give(&card, &log)?;
    begin(&card)?;
    for round in 0..ROUNDS {
        arena.b_sends(1000)?;
        if round == 10 {
            log.set_len(0)?;
        }
        arena.neighbours_talk_once()?;
    }
    Ok(End::Harmless)
}

/// Its last page is not the last of guest memory. What is marked behind it is nowhere.
fn log_is_short(arena: &mut Arena) -> Result<End, Wrong> {
    let card = attached(arena)?;
    // A page before the log, and one behind it, in the same file: nobody may mark there.
    let log = log_for(PAGE * PAGE * 8 * 3)?;
    let body = words(&[PAGE, PAGE]);
    let asked = card
        .frontend
        .ask(request::SET_LOG_BASE, &body, &[log.as_fd()]);
    if asked.is_ok() {
        begin(&card)?;
    }
    for _ in 0..ROUNDS {
        arena.b_sends(1000)?;
        arena.neighbours_talk_once()?;
    }
    let pages = PAGE * 8..PAGE * 16;
    if marked(&log)?.iter().any(|bit| !pages.contains(bit)) {
        return Err("something was marked outside of the log".into());
    }
    Ok(End::Harmless)
}

/// One log after the other, each of which may be gone the moment the next is there.
fn log_is_another(arena: &mut Arena) -> Result<End, Wrong> {
    let mut card = attached(arena)?;
    for round in 0..ROUNDS {
        let log = log_for(end_of(&card))?;
        give(&card, &log)?;
        if round == 0 {
            begin(&card)?;
        }
        arena.b_sends(1000)?;
        while card.poll(0)?.is_some() {}
    }
    let frame = arena.b_sends(100)?;
    arrives(&mut card, &frame)?;
    Ok(End::Delivered)
}

/// What is in flight is rewritten all the time, and what is left of it is given to the next connection.
fn region_is_rewritten(arena: &mut Arena) -> Result<End, Wrong> {
    let mut random = Random::named("region");
    let mut card = attached(arena)?;
    let asked = Inflight::question(2, 256);
    let (region, file) = card.frontend.get_inflight(&asked)?;
    let file = File::from(file);
    for _ in 0..4 {
        // Whatever is left of the last round may be refused, as a whole.
        let path = arena.a.path.clone();
        let _ = card.attach_again(&path, (&region, file.as_fd()));
        for _ in 0..ROUNDS {
            for _ in 0..20 {
                let at = random.below(region.mmap_size - 8);
                file.write_all_at(&random.next_u64().to_le_bytes(), at)?;
            }
            arena.b_sends(1000)?;
            arena.neighbours_talk_once()?;
        }
    }
    Ok(End::Harmless)
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name, end, run: fn(&mut Arena) -> Result<End, Wrong>| Case {
        name,
        end,
        run: Arc::new(run),
        formats: BOTH,
    };
    vec![
        case("log_of_what_is_received", End::Delivered, log_is_right),
        case("log_is_cut_while_frames_come", End::Harmless, log_is_cut),
        case("log_of_less_than_memory", End::Harmless, log_is_short),
        case(
            "log_is_another_with_each_frame",
            End::Delivered,
            log_is_another,
        ),
        case(
            "region_is_rewritten_while_frames_come",
            End::Harmless,
            region_is_rewritten,
        ),
    ]
}
