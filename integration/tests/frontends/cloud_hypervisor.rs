//! cloud-hypervisor (`virtio-devices/src/vhost_user/vu_common_ctrl.rs` and `blk.rs` there): its
//! order at start, pause, reset and reconnect, and a region that is added while the guest runs.
//!
//! It asks for a reply to every message once REPLY_ACK is negotiated, to questions too. All sizes
//! come before the first address, the in-flight region between them. The base is the avail index in
//! guest memory, and there is no error descriptor. On a reconnect it does not ask for protocol
//! features: it sets what it had.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_integration::arena::{Arena, FILE_SECTORS};
use bulkhead_integration::disk::{Disk, DiskError, Options, PATIENCE, feature};
use bulkhead_integration::frontend::message::{self, Inflight, protocol_feature, request};
use bulkhead_integration::frontend::{Frontend, FrontendError};
use bulkhead_integration::random::Random;

use crate::{Outcome, QUEUES, ensure};

/// Bytes that it reads of the configuration space, and says are writable.
const CONFIG_BYTES: u32 = 60;

const FEATURES: u64 = feature::BLK_SEG_MAX
    | feature::BLK_RO
    | feature::BLK_SIZE
    | feature::BLK_FLUSH
    | feature::BLK_MQ
    | feature::BLK_DISCARD
    | feature::BLK_WRITE_ZEROES
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | feature::VERSION_1
    | feature::IN_ORDER;
const PROTOCOL_FEATURES: u64 = protocol_feature::CONFIG
    | protocol_feature::MQ
    | protocol_feature::CONFIGURE_MEM_SLOTS
    | protocol_feature::REPLY_ACK
    | protocol_feature::INFLIGHT_SHMFD
    | protocol_feature::LOG_SHMFD;

fn options() -> Options {
    Options {
        queues: QUEUES,
        ..Options::default()
    }
}

/// What it does before the guest runs.
fn create(arena: &Arena) -> Result<Disk, DiskError> {
    let mut frontend = Frontend::connect(&arena.socket, PATIENCE)?;
    frontend.set(request::SET_OWNER, &[], &[])?;
    let features = FEATURES & frontend.ask_u64(request::GET_FEATURES)?;
    let known = frontend.ask_u64(request::GET_PROTOCOL_FEATURES)?;
    let protocol = message::words(&[PROTOCOL_FEATURES & known]);
    frontend.set(request::SET_PROTOCOL_FEATURES, &protocol, &[])?;
    replies_from_now_on(&mut frontend, PROTOCOL_FEATURES & known);
    if frontend.ask_u64(request::GET_QUEUE_NUM)? < u64::from(QUEUES) {
        return Err(std::io::Error::other("too few queues").into());
    }
    config(&frontend)?;
    Disk::assemble(frontend, &options(), features)
}

fn replies_from_now_on(frontend: &mut Frontend, protocol_features: u64) {
    frontend.protocol_features = protocol_features;
    frontend.questions_need_reply = true;
}

/// GET_CONFIG of its structure, with the writable flag.
fn config(frontend: &Frontend) -> Result<Vec<u8>, FrontendError> {
    let empty = vec![0; CONFIG_BYTES as usize];
    let body = message::config(0, CONFIG_BYTES, 1, &empty);
    let answer = frontend.ask(request::GET_CONFIG, &body, &[])?;
    if answer.len() != 12 + empty.len() {
        return Err(FrontendError::Protocol {
            request: request::GET_CONFIG,
            what: format!("{} bytes", answer.len()),
        });
    }
    Ok(answer[12..].to_vec())
}

/// The in-flight region that it keeps from an activation on, over reconnects.
type Kept = Option<(Inflight, OwnedFd)>;

/// What it does when the guest's driver is ready, and after a reconnect.
fn activate(disk: &Disk, kept: &mut Kept) -> Result<(), DiskError> {
    let frontend = &disk.frontend;
    let features = message::words(&[disk.features]);
    frontend.set(request::SET_FEATURES, &features, &[])?;
    disk.share_memory()?;
    for (index, ring) in (0..).zip(&disk.rings) {
        frontend.set_vring_state(request::SET_VRING_NUM, index, u32::from(ring.size))?;
    }
    if frontend.protocol_features & protocol_feature::INFLIGHT_SHMFD != 0 {
        if kept.is_none() {
            let mut question = Inflight::question(QUEUES, disk.rings[0].size);
            question.padded = true;
            *kept = Some(frontend.get_inflight(&question)?);
        }
        if let Some((region, file)) = kept {
            let fds = [file.as_fd()];
            frontend.set(request::SET_INFLIGHT_FD, &region.body(), &fds)?;
        }
    }
    for (index, ring) in disk.rings.iter().enumerate() {
        disk.set_addresses(index, ring.desc, ring.used, ring.avail)?;
        let avail_index = disk.memory.load_u16(ring.avail + 2)?;
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let base = u32::from(avail_index);
        frontend.set_vring_state(request::SET_VRING_BASE, number, base)?;
        let small = u8::try_from(index).unwrap_or(u8::MAX);
        let (call, kick) = (ring.call.as_fd(), ring.kick.as_fd());
        frontend.set_vring_fd(request::SET_VRING_CALL, small, Some(call))?;
        frontend.set_vring_fd(request::SET_VRING_KICK, small, Some(kick))?;
    }
    enable(disk, 1)
}

fn enable(disk: &Disk, on: u32) -> Result<(), DiskError> {
    for index in 0..u32::from(QUEUES) {
        disk.frontend
            .set_vring_state(request::SET_VRING_ENABLE, index, on)?;
    }
    Ok(())
}

/// Writes, flushes and reads back through each queue.
fn io(arena: &mut Arena, disk: &mut Disk, random: &mut Random) -> Outcome {
    for queue in 0..usize::from(QUEUES) {
        for _ in 0..8 {
            let sector = random.below(FILE_SECTORS / 8 - 8) * 8;
            let blocks = 1 + random.index(8);
            let bytes = random.bytes(4096 * blocks);
            disk.write(queue, sector, &bytes)?;
            disk.flush(queue)?;
            let back = disk.read(queue, sector, u32::try_from(bytes.len())?)?;
            ensure(back == bytes, "what was written reads back differently")?;
            let at = usize::try_from(sector * 512)?;
            arena.touch(at..at + bytes.len());
        }
    }
    Ok(())
}

pub fn start(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = create(arena)?;
    let capacity = config(&disk.frontend)?[..8].try_into()?;
    ensure(
        u64::from_le_bytes(capacity) == FILE_SECTORS,
        "the capacity is another",
    )?;
    activate(&disk, &mut None)?;
    io(arena, &mut disk, random)
}

/// A paused virtual machine: nothing is taken, and nothing is lost.
pub fn pause_and_resume(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = create(arena)?;
    activate(&disk, &mut None)?;
    for _ in 0..10 {
        io(arena, &mut disk, random)?;
        enable(&disk, 0)?;
        let request = bulkhead_integration::disk::Request {
            kind: bulkhead_integration::driver::kind::FLUSH,
            sector: 0,
            segments: Vec::new(),
        };
        disk.push(0, 3, &request)?;
        disk.publish(0)?;
        std::thread::sleep(std::time::Duration::from_millis(10));
        let early = disk.rings[0].poll_used(&disk.memory)?;
        ensure(early.is_none(), "a disabled queue was served")?;
        enable(&disk, 1)?;
        let used = disk.rings[0].wait_used(&disk.memory, PATIENCE)?;
        ensure(used.id == u32::from(Disk::head(3)), "another head was used")?;
        disk.check(3, &request, used.len)?;
    }
    Ok(())
}

/// The guest's driver resets the device and starts again, with rings at their beginning.
pub fn reset(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = create(arena)?;
    for _ in 0..10 {
        activate(&disk, &mut None)?;
        io(arena, &mut disk, random)?;
        for index in 0..u32::from(QUEUES) {
            disk.frontend
                .set_vring_state(request::SET_VRING_ENABLE, index, 0)?;
            let base = disk.frontend.get_vring_base(index)?;
            let ring = &mut disk.rings[usize::try_from(index)?];
            ensure(base == ring.base(), "GET_VRING_BASE is not what was used")?;
            ring.restart(&disk.memory)?;
        }
    }
    Ok(())
}

/// The connection breaks; the rings go on where they were, with the avail index as base.
pub fn reconnect(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = create(arena)?;
    let mut kept = None;
    activate(&disk, &mut kept)?;
    for _ in 0..10 {
        io(arena, &mut disk, random)?;
        connect_again(arena, &mut disk)?;
        activate(&disk, &mut kept)?;
    }
    io(arena, &mut disk, random)
}

/// A new connection for a guest that goes on.
fn connect_again(arena: &Arena, disk: &mut Disk) -> Outcome {
    let protocol = disk.frontend.protocol_features;
    // The old connection is closed first: it is what broke.
    disk.frontend.stream().shutdown(std::net::Shutdown::Both)?;
    disk.frontend = Frontend::connect(&arena.socket, PATIENCE)?;
    disk.frontend.set(request::SET_OWNER, &[], &[])?;
    disk.frontend.ask_u64(request::GET_FEATURES)?;
    let body = message::words(&[protocol]);
    disk.frontend
        .set(request::SET_PROTOCOL_FEATURES, &body, &[])?;
    replies_from_now_on(&mut disk.frontend, protocol);
    Ok(())
}

/// As [`reconnect`], with requests in flight, and made available while nobody is connected: the base
/// says the avail index all the same, and each request has its end.
pub fn reconnect_under_load(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = create(arena)?;
    let mut kept = None;
    activate(&disk, &mut kept)?;
    for round in 0..20 {
        io(arena, &mut disk, random)?;
        let read = |slot: u16| bulkhead_integration::disk::Request {
            kind: bulkhead_integration::driver::kind::IN,
            sector: u64::from(slot) * 8,
            segments: vec![(
                bulkhead_integration::disk::DATA + u64::from(slot) * 0x8_0000,
                0x8_0000,
            )],
        };
        for slot in 0..4 {
            disk.push(0, slot, &read(slot))?;
        }
        disk.publish(0)?;
        disk.frontend.stream().shutdown(std::net::Shutdown::Both)?;
        for slot in 4..8 {
            disk.push(0, slot, &read(slot))?;
        }
        disk.publish(0)?;
        connect_again(arena, &mut disk)?;
        activate(&disk, &mut kept)?;
        disk.rings[0].kick.write(1)?;
        for _ in 0..8 {
            let used = disk.rings[0]
                .wait_used(&disk.memory, std::time::Duration::from_secs(3))
                .map_err(|e| format!("round {round}: {e}"))?;
            let slot = u16::try_from(used.id)? / 16;
            disk.check(slot, &read(slot), used.len)?;
        }
    }
    Ok(())
}

/// A region more while the queues run, where the slots can be configured; then I/O in it.
pub fn hotplug(arena: &mut Arena, random: &mut Random) -> Outcome {
    const MORE: u64 = 0x2_0000_0000;
    let mut disk = create(arena)?;
    activate(&disk, &mut None)?;
    io(arena, &mut disk, random)?;
    let more = bulkhead_integration::driver::memory::GuestMemory::new(&[(MORE, 1 << 20, 0)])?;
    let region = &more.regions()[0];
    // Not at an address that a region has already.
    let entry = message::RegionEntry {
        user_addr: 0x7d00_0000_0000,
        ..region.entry()
    };
    let body = message::single_region(&entry);
    disk.frontend
        .set(request::ADD_MEM_REG, &body, &[region.file()])?;
    let request = bulkhead_integration::disk::Request {
        kind: bulkhead_integration::driver::kind::IN,
        sector: FILE_SECTORS - 8,
        segments: vec![(MORE + 4096, 4096)],
    };
    disk.run(1, &request)?;
    let expected = disk.read(0, FILE_SECTORS - 8, 4096)?;
    ensure(
        more.read(MORE + 4096, 4096)? == expected,
        "the read did not reach the new region",
    )
}
