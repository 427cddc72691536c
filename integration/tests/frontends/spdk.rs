//! SPDK's virtio-user frontend (`lib/virtio/virtio_vhost_user.c` there), with which bdevperf and
//! others drive a vhost-user disk.
//!
//! MQ and CONFIG alone, so no acknowledgement ever; SET_VRING_ENABLE before anything else is known
//! of a queue; calls first of the rest; the table once for each region of memory, with a question
//! behind it that shows that it was handled; the base is always 0. Guest addresses are its own
//! addresses, from 2^45 on. Split rings of 512, no tables, calls that are never read.

use std::error::Error;
use std::os::fd::AsFd;

use bulkhead_integration::arena::{Arena, FILE_SECTORS};
use bulkhead_integration::disk::{PATIENCE, feature};
use bulkhead_integration::driver::memory::GuestMemory;
use bulkhead_integration::driver::ring::{Desc, Ring};
use bulkhead_integration::driver::{header, kind, status};
use bulkhead_integration::frontend::Frontend;
use bulkhead_integration::frontend::message::{self, RegionEntry, protocol_feature, request};
use bulkhead_integration::random::Random;

use crate::{Outcome, QUEUES, ensure};

/// Where its memory begins.
const BASE: u64 = 0x2000_0000_0000;
/// A huge page.
const PAGE: u64 = 2 << 20;
const SIZE: u16 = 512;
const FEATURES: u64 = feature::VERSION_1
    | feature::BLK_SIZE
    | feature::BLK_SEG_MAX
    | feature::BLK_MQ
    | feature::BLK_FLUSH
    | feature::PROTOCOL_FEATURES;
/// Bytes of the configuration space that it asks for, whatever it wants of it.
const CONFIG_BYTES: usize = 256;
/// Where headers and status bytes lie: behind the rings.
const HEADERS: u64 = BASE + 0x8_0000;
/// The second page is data.
const DATA: u64 = BASE + PAGE;

struct User {
    frontend: Frontend,
    memory: GuestMemory,
    rings: Vec<Ring>,
}

pub fn run(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut user = start(arena)?;
    io(arena, &mut user, random)?;
    stop(&user)
}

/// Stopped and started on one connection, with the rings at their beginning each time.
pub fn again(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut user = start(arena)?;
    for _ in 0..10 {
        io(arena, &mut user, random)?;
        stop(&user)?;
        for ring in &mut user.rings {
            ring.restart(&user.memory)?;
        }
        set_up_queues(&user)?;
        start_device(&user)?;
    }
    io(arena, &mut user, random)
}

fn start(arena: &Arena) -> Result<User, Box<dyn Error>> {
    let mut frontend = Frontend::connect(&arena.socket, PATIENCE)?;
    frontend.set(request::SET_OWNER, &[], &[])?;
    let features = FEATURES & frontend.ask_u64(request::GET_FEATURES)?;
    frontend.set(request::SET_FEATURES, &message::words(&[features]), &[])?;
    let known = frontend.ask_u64(request::GET_PROTOCOL_FEATURES)?;
    let wanted = (protocol_feature::MQ | protocol_feature::CONFIG) & known;
    ensure(
        wanted == protocol_feature::MQ | protocol_feature::CONFIG,
        "MQ and CONFIG are not offered",
    )?;
    let body = message::words(&[wanted]);
    frontend.set(request::SET_PROTOCOL_FEATURES, &body, &[])?;
    frontend.protocol_features = wanted;
    let regions: Vec<_> = (0..2)
        .map(|i| RegionEntry {
            guest_addr: BASE + i * PAGE,
            size_bytes: PAGE,
            user_addr: BASE + i * PAGE,
            mmap_offset: 0,
        })
        .collect();
    let memory = GuestMemory::with_regions(&regions)?;
    read_config(&frontend)?;
    let rings = (0..u64::from(QUEUES))
        .map(|i| Ring::new(&memory, BASE + i * Ring::SPAN_BYTES, SIZE))
        .collect::<Result<_, _>>()?;
    let user = User {
        frontend,
        memory,
        rings,
    };
    set_up_queues(&user)?;
    start_device(&user)?;
    Ok(user)
}

/// Each field is a read of all of the space.
fn read_config(frontend: &Frontend) -> Outcome {
    let field = |offset: usize, len: usize| -> Result<Vec<u8>, Box<dyn Error>> {
        let body = message::config(0, 256, 0, &[0; CONFIG_BYTES]);
        let answer = frontend.ask(request::GET_CONFIG, &body, &[])?;
        ensure(
            answer.len() == 12 + CONFIG_BYTES,
            "256 bytes were asked for",
        )?;
        Ok(answer[12 + offset..12 + offset + len].to_vec())
    };
    let capacity = u64::from_le_bytes(field(0, 8)?.try_into().map_err(|_| "8 bytes")?);
    ensure(capacity == FILE_SECTORS, "the capacity is another")?;
    let queues = u16::from_le_bytes(field(34, 2)?.try_into().map_err(|_| "2 bytes")?);
    ensure(queues >= QUEUES, "too few queues")
}

fn set_up_queues(user: &User) -> Outcome {
    for index in 0..u32::from(QUEUES) {
        user.frontend
            .set_vring_state(request::SET_VRING_ENABLE, index, 1)?;
    }
    Ok(())
}

fn start_device(user: &User) -> Outcome {
    let frontend = &user.frontend;
    ensure(
        frontend.ask_u64(request::GET_QUEUE_NUM)? >= u64::from(QUEUES),
        "too few queues",
    )?;
    for (index, ring) in (0..).zip(&user.rings) {
        frontend.set_vring_fd(request::SET_VRING_CALL, index, Some(ring.call.as_fd()))?;
    }
    share_memory(user)?;
    for (index, ring) in (0u32..).zip(&user.rings) {
        frontend.set_vring_state(request::SET_VRING_NUM, index, u32::from(SIZE))?;
        frontend.set_vring_state(request::SET_VRING_BASE, index, 0)?;
        let body = message::vring_addresses(index, ring.desc, ring.used, ring.avail);
        frontend.set(request::SET_VRING_ADDR, &body, &[])?;
        let small = u8::try_from(index)?;
        frontend.set_vring_fd(request::SET_VRING_KICK, small, Some(ring.kick.as_fd()))?;
    }
    Ok(())
}

/// The whole table for each region that its allocator knows.
fn share_memory(user: &User) -> Outcome {
    let regions = user.memory.regions();
    let entries: Vec<_> = regions.iter().map(|r| r.entry()).collect();
    let fds: Vec<_> = regions.iter().map(|r| r.file()).collect();
    for _ in regions {
        user.frontend.set_memory_table(&entries, &fds)?;
        user.frontend.ask_u64(request::GET_FEATURES)?;
    }
    Ok(())
}

/// Stops each queue, and sends the table again as its memory is let go of.
fn stop(user: &User) -> Outcome {
    for (index, ring) in (0..).zip(&user.rings) {
        let base = user.frontend.get_vring_base(index)?;
        ensure(base == ring.base(), "GET_VRING_BASE is not what was used")?;
    }
    share_memory(user)
}

/// Writes and reads back through each queue, many at once, looking at the rings only.
fn io(arena: &mut Arena, user: &mut User, random: &mut Random) -> Outcome {
    const DEPTH: u64 = 32;
    for queue in 0..usize::from(QUEUES) {
        let blocks: Vec<Vec<u8>> = (0..DEPTH).map(|_| random.bytes(4096)).collect();
        let first = random.below(FILE_SECTORS / 8 - DEPTH) * 8;
        let at = usize::try_from(first * 512)?;
        arena.touch(at..at + 4096 * blocks.len());
        for kind in [kind::OUT, kind::IN] {
            for (i, block) in (0..DEPTH).zip(&blocks) {
                if kind == kind::OUT {
                    user.memory.write(DATA + i * 4096, block)?;
                } else {
                    user.memory.fill(DATA + i * 4096, 4096, 0xdd)?;
                }
            }
            transfer(user, queue, kind, first, DEPTH)?;
        }
        for (i, block) in (0..DEPTH).zip(&blocks) {
            let back = user.memory.read(DATA + i * 4096, 4096)?;
            ensure(back == *block, "what was written reads back differently")?;
        }
    }
    Ok(())
}

fn transfer(user: &mut User, queue: usize, kind: u32, first: u64, count: u64) -> Outcome {
    let ring = &mut user.rings[queue];
    // It polls, and says so.
    ring.suppress_calls(&user.memory)?;
    for i in 0..count {
        let at = HEADERS + i * 64;
        user.memory.write(at, &header(kind, first + i * 8))?;
        user.memory.write(at + 32, &[status::UNTOUCHED])?;
        let data = if kind == kind::IN {
            Desc::writable(DATA + i * 4096, 4096)
        } else {
            Desc::readable(DATA + i * 4096, 4096)
        };
        let descs = [Desc::readable(at, 16), data, Desc::writable(at + 32, 1)];
        ring.offer(&user.memory, u16::try_from(i * 3)?, &descs)?;
    }
    ring.publish(&user.memory)?;
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut left = count;
    while left > 0 {
        if let Some(used) = ring.poll_used(&user.memory)? {
            let slot = u64::from(used.id) / 3;
            let byte = user.memory.read(HEADERS + slot * 64 + 32, 1)?[0];
            ensure(byte == status::OK, "a request failed")?;
            left -= 1;
        }
        ensure(std::time::Instant::now() < deadline, "a request has no end")?;
    }
    Ok(())
}
