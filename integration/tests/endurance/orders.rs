//! T25: well-formed messages in any order, with requests in flight: geometry that changes while a
//! queue runs, queues started before they have rings, memory that goes. Everything is answered or
//! the connection closed, the process lives, and the next connection is served.

use std::error::Error;
use std::os::fd::AsFd;

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, DiskError, Options, Request, feature};
use bulkhead_integration::driver::kind;
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::{self, Inflight, protocol_feature, request};
use bulkhead_integration::random::Random;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::Outcome;

/// Messages of one sequence, at most.
const LONGEST: u64 = 40;

/// So many sequences.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let kept = arena.contents.clone();
    let mut options = Options {
        queues: 2,
        ..Options::default()
    };
    options.protocol_features |= protocol_feature::CONFIGURE_MEM_SLOTS
        | protocol_feature::LOG_SHMFD
        | protocol_feature::INFLIGHT_SHMFD
        | protocol_feature::RESET_DEVICE
        | protocol_feature::STATUS
        | protocol_feature::BACKEND_REQ;
    let (mut messages, mut refused, mut closed) = (0u64, 0u64, 0u64);
    let acknowledged = options.protocol_features;
    for round in 0..rounds {
        // Without acknowledgements a refusal ends the connection.
        options.protocol_features = if random.below(4) == 0 {
            acknowledged & !protocol_feature::REPLY_ACK
        } else {
            acknowledged
        };
        let mut disk = if random.below(2) == 0 {
            arena.attach(&options)?
        } else {
            arena.negotiate(&options)?
        };
        for _ in 0..1 + random.below(LONGEST) {
            let step = random.below(STEPS);
            messages += 1;
            match perform(&mut disk, random, step) {
                Ok(()) => {}
                Err(DiskError::Frontend(FrontendError::Refused { .. })) => refused += 1,
                Err(DiskError::Frontend(FrontendError::Closed)) => {
                    closed += 1;
                    break;
                }
                Err(e) => return Err(format!("round {round}, step {step}: {e}").into()),
            }
        }
        drop(disk);
        if round % 20 == 0 {
            check(arena, &kept)?;
        }
    }
    if messages < rounds * 4 || refused == 0 {
        return Err(format!("no order at all: {messages} messages, {refused} refused").into());
    }
    Ok(format!(
        "{messages} messages, {refused} refused, {closed} connections closed"
    ))
}

/// Both devices serve; nothing but reads was offered, so the disk holds what it held.
fn check(arena: &mut Arena, kept: &[u8]) -> Result<(), Box<dyn Error>> {
    arena.check_other()?;
    let mut disk = arena.attach(&Options::default())?;
    if disk.read(0, 8, 4096)? != kept[4096..8192] {
        return Err("the disk changed".into());
    }
    Ok(())
}

const STEPS: u64 = 25;

fn perform(disk: &mut Disk, random: &mut Random, step: u64) -> Result<(), DiskError> {
    let queue = random.index(2);
    let number = u32::try_from(queue).unwrap_or(0);
    let small = u8::try_from(queue).unwrap_or(0);
    let frontend = &disk.frontend;
    match step {
        0 => Ok(frontend.set(request::SET_OWNER, &[], &[])?),
        1 => Ok(frontend.set(request::RESET_OWNER, &[], &[])?),
        2 => {
            let features = disk.features & random.next_u64();
            let body = message::words(&[if random.below(2) == 0 {
                disk.features
            } else {
                features
            }]);
            Ok(frontend.set(request::SET_FEATURES, &body, &[])?)
        }
        3 => disk.share_memory(),
        4 => region(disk, random, request::ADD_MEM_REG),
        5 => region(disk, random, request::REM_MEM_REG),
        6 => {
            let size = [1, 2, 64, 128, 256, 1024][random.index(6)];
            Ok(frontend.set_vring_state(request::SET_VRING_NUM, number, size)?)
        }
        7 => {
            let base = u32::try_from(random.below(1 << 32)).unwrap_or(0);
            let base = [0, 0x8000_8000, disk.rings[queue].base(), base][random.index(4)];
            Ok(frontend.set_vring_state(request::SET_VRING_BASE, number, base)?)
        }
        8 => {
            let ring = &disk.rings[random.index(2)];
            let (desc, used, avail) = (ring.desc, ring.used, ring.avail);
            disk.set_addresses(queue, desc, used, avail)
        }
        9 => Ok(disk.stop_queue_at(queue).map(drop)?),
        10 => {
            let fd = disk.rings[queue].kick.as_fd();
            Ok(frontend.set_vring_fd(request::SET_VRING_KICK, small, Some(fd))?)
        }
        11 => {
            let fd = disk.rings[queue].call.as_fd();
            let fd = (random.below(4) > 0).then_some(fd);
            Ok(frontend.set_vring_fd(request::SET_VRING_CALL, small, fd)?)
        }
        12 => {
            let fd = disk.rings[queue].err.as_fd();
            Ok(frontend.set_vring_fd(request::SET_VRING_ERR, small, Some(fd))?)
        }
        13 => {
            let on = u32::try_from(random.below(2)).unwrap_or(0);
            Ok(frontend.set_vring_state(request::SET_VRING_ENABLE, number, on)?)
        }
        14 => Ok(frontend.get_config(0, 60).map(drop)?),
        15 => {
            disk.rings[queue].restart(&disk.memory)?;
            disk.start_queue(queue)
        }
        16..19 => shared(disk, random, step),
        19 => Ok(frontend.set(request::RESET_DEVICE, &[], &[])?),
        20 => {
            let status = [0, 1, 3, 11, 15, 0x100][random.index(6)];
            Ok(frontend.set(request::SET_STATUS, &message::words(&[status]), &[])?)
        }
        21 => Ok(frontend.ask_u64(request::GET_STATUS).map(drop)?),
        _ => offer(disk, random, queue),
    }
}

/// A log, LOG_ALL, or an in-flight region of any size.
fn shared(disk: &Disk, random: &mut Random, step: u64) -> Result<(), DiskError> {
    let frontend = &disk.frontend;
    let file = memfd_create("shared", MFdFlags::MFD_CLOEXEC)?;
    let bytes = i64::try_from(random.below(1 << 18)).unwrap_or(0);
    ftruncate(&file, bytes)?;
    let fds = [file.as_fd()];
    match step {
        16 => {
            let body = message::words(&[random.below(1 << 18), random.below(2) * 4096]);
            let answer = frontend.ask(request::SET_LOG_BASE, &body, &fds);
            Ok(answer.map(drop)?)
        }
        17 => {
            let log = if random.below(2) == 0 {
                feature::LOG_ALL
            } else {
                0
            };
            let body = message::words(&[disk.features | log]);
            Ok(frontend.set(request::SET_FEATURES, &body, &[])?)
        }
        _ => {
            let region = Inflight {
                mmap_size: random.below(1 << 18),
                mmap_offset: random.below(2) * 4096,
                queues: u16::try_from(random.below(4)).unwrap_or(0),
                queue_size: [0, 64, 128, 1024][random.index(4)],
                padded: random.below(2) == 0,
            };
            Ok(frontend.set(request::SET_INFLIGHT_FD, &region.body(), &fds)?)
        }
    }
}

fn region(disk: &Disk, random: &mut Random, request: u32) -> Result<(), DiskError> {
    let regions = disk.memory.regions();
    let region = &regions[random.index(regions.len())];
    let body = message::single_region(&region.entry());
    let fds = [region.file()];
    let fds = if request == request::ADD_MEM_REG {
        &fds[..]
    } else {
        &[]
    };
    Ok(disk.frontend.set(request, &body, fds)?)
}

/// Reads of 64 KiB, made available and kicked for, whatever state the queue is in.
fn offer(disk: &mut Disk, random: &mut Random, queue: usize) -> Result<(), DiskError> {
    for slot in 0..1 + u16::try_from(random.below(4)).unwrap_or(0) {
        let request = Request {
            kind: kind::IN,
            sector: random.below(64) * 8,
            segments: vec![(DATA + u64::from(slot) * 0x1_0000, 0x1_0000)],
        };
        let slot = slot + 8 * u16::try_from(queue).unwrap_or(0);
        match disk.push(queue, slot, &request) {
            // Nobody collects what is used: a ring that is full begins anew.
            Err(DiskError::Driver(bulkhead_integration::driver::DriverError::Full)) => {
                return Ok(disk.rings[queue].restart(&disk.memory)?);
            }
            other => other?,
        }
    }
    disk.publish(queue)?;
    disk.rings[queue].kick.write(1)?;
    Ok(())
}
