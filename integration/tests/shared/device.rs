//! The device as a whole: its status, its reset, and the reset of one of its queues.

use std::time::Duration;

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, PATIENCE, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::driver::ring::Ring;
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::{self, request};

use crate::{Outcome, QUEUES, ensure, options};

fn set_status(disk: &Disk, status: u64) -> Result<(), FrontendError> {
    let body = message::words(&[status]);
    disk.frontend.set(request::SET_STATUS, &body, &[])
}

/// What the driver has said comes back; more than eight bits are refused.
pub fn status(arena: &mut Arena) -> Outcome {
    let mut disk = arena.attach(&options())?;
    for status in [1, 3, 11, 15, 0x8f] {
        set_status(&disk, status)?;
        let now = disk.frontend.ask_u64(request::GET_STATUS)?;
        ensure(now == status, || {
            format!("{status:#x} was set, {now:#x} came back")
        })?;
    }
    let refused = set_status(&disk, 0x100);
    ensure(
        matches!(refused, Err(FrontendError::Refused { .. })),
        || format!("a status of nine bits ended as {refused:?}"),
    )?;
    disk.read(1, 0, 4096)?;
    Ok(())
}

/// A status of 0 is a reset.
pub fn status_zero(arena: &mut Arena) -> Outcome {
    resets(arena, |disk| set_status(disk, 0))
}

/// RESET_DEVICE.
pub fn reset(arena: &mut Arena) -> Outcome {
    resets(arena, |disk| {
        disk.frontend.set(request::RESET_DEVICE, &[], &[])
    })
}

/// After a reset no queue takes anything; queues that start anew begin at their beginning.
fn resets(arena: &mut Arena, reset: fn(&Disk) -> Result<(), FrontendError>) -> Outcome {
    let mut disk = arena.attach(&options())?;
    for round in 0..10 {
        for queue in 0..usize::from(QUEUES) {
            let bytes = disk.read(queue, 8, 8192)?;
            ensure(bytes == arena.contents[4096..4096 + 8192], || {
                format!("round {round}: the read brought other bytes")
            })?;
        }
        reset(&disk)?;
        disk.push(0, 3, &read())?;
        disk.publish(0)?;
        disk.rings[0].kick.write(1)?;
        std::thread::sleep(Duration::from_millis(10));
        let early = disk.rings[0].poll_used(&disk.memory)?;
        ensure(early.is_none(), || {
            format!("round {round}: {early:?} after the reset")
        })?;
        for queue in 0..usize::from(QUEUES) {
            disk.rings[queue].restart(&disk.memory)?;
            disk.start_queue(queue)?;
        }
    }
    Ok(())
}

fn read() -> Request {
    Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA, 4096)],
    }
}

/// A way to stop everything that runs.
type Stop = fn(&Disk) -> Result<(), FrontendError>;

/// Once a stop is acknowledged the guest may use its memory for something else: what a slow disk
/// still had to bring is there before, or never comes.
pub fn nothing_after_a_stop(arena: &mut Arena) -> Outcome {
    let stops: [(&str, Stop); 4] = [
        ("RESET_DEVICE", |disk| {
            disk.frontend.set(request::RESET_DEVICE, &[], &[])
        }),
        ("status 0", |disk| set_status(disk, 0)),
        ("RESET_OWNER", |disk| {
            disk.frontend.set(request::RESET_OWNER, &[], &[])
        }),
        // Of each queue: one that runs says about kicks what it likes.
        ("GET_VRING_BASE", |disk| {
            (0..u32::from(QUEUES)).try_for_each(|q| disk.frontend.get_vring_base(q).map(drop))
        }),
    ];
    for (name, stop) in stops {
        let mut disk = arena.attach(&options())?;
        for slot in 0..8 {
            let request = Request {
                segments: vec![(DATA + u64::from(slot) * 4096, 4096)],
                ..read()
            };
            disk.push(0, slot, &request)?;
        }
        disk.publish(0)?;
        std::thread::sleep(Duration::from_millis(5));
        stop(&disk)?;
        let entry = disk.memory.regions()[0].entry();
        let low = usize::try_from(entry.size_bytes)?;
        disk.memory.fill(entry.guest_addr, low, 0x77)?;
        disk.memory.fill(DATA, 8 * 4096, 0x77)?;
        // The disk takes up to 200 ms for each transfer.
        std::thread::sleep(Duration::from_millis(250));
        let after = [
            disk.memory.read(entry.guest_addr, low)?,
            disk.memory.read(DATA, 8 * 4096)?,
        ];
        let written = after.concat().iter().filter(|byte| **byte != 0x77).count();
        ensure(written == 0, || {
            format!("{written} bytes were written after {name} was acknowledged")
        })?;
    }
    Ok(())
}

/// VIRTIO_F_RING_RESET: one queue is stopped and starts anew, smaller and elsewhere, while requests
/// run on the other.
pub fn queue_reset(arena: &mut Arena) -> Outcome {
    let mut disk = arena.attach(&options())?;
    for round in 0..10u16 {
        disk.read(0, 0, 4096)?;
        for slot in 8..12 {
            disk.push(1, slot, &read())?;
        }
        disk.publish(1)?;
        disk.stop_queue_at(0)?;
        for _ in 0..4 {
            let used = disk.rings[1].wait_used(&disk.memory, PATIENCE)?;
            ensure(used.len == 4097, || format!("round {round}: {used:?}"))?;
        }
        let ring = &mut disk.rings[0];
        ring.size = if round % 2 == 0 { 64 } else { 128 };
        let base = ring.desc ^ (2 * Ring::SPAN_BYTES);
        (ring.desc, ring.avail, ring.used) = (base, base + 0x4000, base + 0x5000);
        ring.restart(&disk.memory)?;
        disk.start_queue(0)?;
    }
    disk.read(0, 0, 4096)?;
    Ok(())
}
