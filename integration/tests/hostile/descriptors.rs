//! Descriptors that are not what they are sent as, and connections that end under load.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use bulkhead_integration::arena::{Arena, FILE_BYTES};
use bulkhead_integration::disk::{DATA, Disk, DiskError, Options, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::frontend::message::{self, request};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{pipe, write};

use crate::End::{Accepted, Closed, Refused};
use crate::guest::{attach, break_queue, fate, probe};
use crate::{Attack, Case};

const COUNT: &str = "each message has a known number of descriptors; the rest is closed";
const KICK: &str = "a descriptor that is no eventfd may be refused; it stalls and burns nobody";
const CALL: &str = "a call that can't be delivered is the guest's loss; it stalls nobody";
const END: &str = "an end under load leaves nothing behind, and the data is there after it";

/// The table.
pub const CASES: &[Case] = &[
    Case::once("fd_with_get_features", &[Accepted, Closed], COUNT, |a| {
        let disk = Disk::negotiate(&a.socket, &Options::default())?;
        let fd = EventFd::new()?;
        let fds = [fd.as_fd(); 3];
        fate(
            disk.frontend
                .ask(request::GET_FEATURES, &[], &fds)
                .map(drop),
        )
    }),
    Case::once(
        "fd_with_set_owner",
        &[Accepted, Refused, Closed],
        COUNT,
        |a| extra(a, request::SET_OWNER, &[], 1),
    ),
    Case::once(
        "fds_nine_with_set_owner",
        &[Accepted, Refused, Closed],
        COUNT,
        |a| extra(a, request::SET_OWNER, &[], 9),
    ),
    Case::once(
        "fds_most_with_set_owner",
        &[Accepted, Refused, Closed],
        COUNT,
        |a| extra(a, request::SET_OWNER, &[], 253),
    ),
    Case::once(
        "fd_with_vring_num",
        &[Accepted, Refused, Closed],
        COUNT,
        |a| extra(a, request::SET_VRING_NUM, &message::halves(&[0, 128]), 1),
    ),
    Case::once("kick_with_two_fds", &[Refused, Closed], COUNT, |a| {
        extra(a, request::SET_VRING_KICK, &message::vring_fd(0, true), 2)
    }),
    Case::once("kick_without_its_fd", &[Refused, Closed], COUNT, |a| {
        extra(a, request::SET_VRING_KICK, &message::vring_fd(0, true), 0)
    }),
    Case::once("call_without_its_fd", &[Refused, Closed], COUNT, |a| {
        extra(a, request::SET_VRING_CALL, &message::vring_fd(0, true), 0)
    }),
    Case::once(
        "kick_with_fd_and_none_bit",
        &[Accepted, Refused, Closed],
        COUNT,
        |a| extra(a, request::SET_VRING_KICK, &message::vring_fd(0, false), 1),
    ),
    Case::once(
        "fds_with_second_piece",
        &[Accepted, Refused, Closed],
        COUNT,
        second_piece,
    ),
    Case::once("fds_without_message", &[Closed], COUNT, |a| {
        let disk = Disk::negotiate(&a.socket, &Options::default())?;
        let fd = EventFd::new()?;
        disk.frontend.send_raw(&[1], &[fd.as_fd(); 8])?;
        disk.frontend.shut_down_sending()?;
        Ok(if disk.frontend.closes_within(Duration::from_secs(3)) {
            Closed
        } else {
            crate::End::Silent
        })
    }),
    Case::once("kick_is_a_file", &[Accepted, Refused, Closed], KICK, |a| {
        let file = memfd_create("kick", MFdFlags::MFD_CLOEXEC)?;
        kick(a, file.as_fd())
    }),
    Case::once(
        "kick_is_always_readable",
        &[Accepted, Refused, Closed],
        KICK,
        |a| kick(a, File::open("/dev/zero")?.as_fd()),
    ),
    Case::once(
        "kick_is_a_blocking_pipe",
        &[Accepted, Refused, Closed],
        KICK,
        |a| {
            let (read, _write) = pipe()?;
            kick(a, read.as_fd())
        },
    ),
    Case::once(
        "kick_is_the_wrong_end_of_a_pipe",
        &[Accepted, Refused, Closed],
        KICK,
        |a| {
            let (_read, write) = pipe()?;
            kick(a, write.as_fd())
        },
    ),
    Case::once(
        "kick_is_a_broken_pipe",
        &[Accepted, Refused, Closed],
        KICK,
        |a| {
            let (read, write) = pipe()?;
            drop(write);
            kick(a, read.as_fd())
        },
    ),
    Case::once(
        "kick_is_a_folder",
        &[Accepted, Refused, Closed],
        KICK,
        |a| kick(a, File::open("/proc")?.as_fd()),
    ),
    Case::once(
        "kick_is_a_socket",
        &[Accepted, Refused, Closed],
        KICK,
        |a| {
            let (left, _right) = std::os::unix::net::UnixStream::pair()?;
            kick(a, left.as_fd())
        },
    ),
    Case::once(
        "kick_is_a_blocking_eventfd",
        &[Accepted],
        "a blocking eventfd is an eventfd",
        |a| {
            let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
            kick(a, event.as_fd())
        },
    ),
    Case::once(
        "kick_stuck_at_its_top",
        &[Accepted],
        "a counter that is full is a kick",
        |a| {
            let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
            event.write(u64::MAX - 1)?;
            kick(a, event.as_fd())
        },
    ),
    Case::new(
        "kick_replaced_under_load",
        &[Accepted, Refused, Closed],
        KICK,
        kick_replaced,
    ),
    Case::new(
        "call_is_a_full_blocking_eventfd",
        &[Accepted, Refused, Closed],
        CALL,
        |a| {
            let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
            event.write(u64::MAX - 1)?;
            call(a, event.as_fd())
        },
    ),
    Case::once(
        "call_is_a_full_blocking_pipe",
        &[Accepted, Refused, Closed],
        CALL,
        |a| {
            let (_read, write) = full_pipe()?;
            call(a, write.as_fd())
        },
    ),
    Case::once(
        "call_is_a_broken_pipe",
        &[Accepted, Refused, Closed],
        CALL,
        |a| {
            let (read, write) = pipe()?;
            drop(read);
            call(a, write.as_fd())
        },
    ),
    Case::once(
        "call_is_a_read_only_file",
        &[Accepted, Refused, Closed],
        CALL,
        |a| call(a, File::open("/proc/version")?.as_fd()),
    ),
    Case::once(
        "call_is_a_broken_socket",
        &[Accepted, Refused, Closed],
        CALL,
        |a| {
            let (left, right) = std::os::unix::net::UnixStream::pair()?;
            drop(right);
            call(a, left.as_fd())
        },
    ),
    Case::new("call_blocks_once_taken", &[Accepted], CALL, |a| {
        blocks_once_taken(a, request::SET_VRING_CALL)
    }),
    Case::new("error_blocks_once_taken", &[Accepted], CALL, |a| {
        blocks_once_taken(a, request::SET_VRING_ERR)
    }),
    Case::new(
        "call_is_none",
        &[Accepted],
        "a driver that polls needs no call",
        call_none,
    ),
    Case::new(
        "error_is_a_full_blocking_pipe",
        &[Accepted, Refused, Closed],
        CALL,
        error_full,
    ),
    Case::new("disconnect_under_reads", &[Closed], END, |a| {
        disconnect(a, kind::IN)
    }),
    Case::new("disconnect_under_writes", &[Closed], END, |a| {
        disconnect(a, kind::OUT)
    }),
    Case::new("disconnect_with_a_reply_pending", &[Closed], END, |a| {
        let mut disk = attach(a)?;
        load(&mut disk, kind::IN)?;
        let body = message::halves(&[0, 0]);
        let bytes = message::encode(request::GET_VRING_BASE, message::VERSION, &body);
        disk.frontend.send_raw(&bytes, &[])?;
        Ok(Closed)
    }),
];

fn extra(arena: &mut Arena, request: u32, body: &[u8], count: usize) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    let event = EventFd::new()?;
    let fds = vec![event.as_fd(); count];
    fate(disk.frontend.set(request, body, &fds))
}

/// The descriptor comes with the last byte of the message and not with the first.
fn second_piece(arena: &mut Arena) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    let event = EventFd::new()?;
    let flags = message::VERSION | message::FLAG_NEED_REPLY;
    let bytes = message::encode(request::SET_VRING_KICK, flags, &message::vring_fd(0, true));
    let (head, tail) = bytes.split_at(bytes.len() - 1);
    disk.frontend.send_raw(head, &[])?;
    std::thread::sleep(Duration::from_millis(5));
    disk.frontend.send_raw(tail, &[event.as_fd()])?;
    let answer = disk.frontend.answer(request::SET_VRING_KICK)?;
    Ok(if answer.iter().all(|b| *b == 0) {
        Accepted
    } else {
        Refused
    })
}

/// Starts a queue with this kick, offers a request, and looks at the others meanwhile.
fn kick(arena: &mut Arena, fd: BorrowedFd<'_>) -> Attack {
    with_event(arena, request::SET_VRING_KICK, fd)
}

fn call(arena: &mut Arena, fd: BorrowedFd<'_>) -> Attack {
    with_event(arena, request::SET_VRING_CALL, fd)
}

fn with_event(arena: &mut Arena, request: u32, fd: BorrowedFd<'_>) -> Attack {
    let mut disk = attach(arena)?;
    let end = fate(disk.frontend.set_vring_fd(request, 0, Some(fd)))?;
    if end == Closed {
        return Ok(end);
    }
    for _ in 0..4 {
        let _ = load(&mut disk, kind::IN);
        std::thread::sleep(Duration::from_millis(10));
        while disk.rings[0].poll_used(&disk.memory)?.is_some() {}
    }
    // Neither the other device nor the other queue waits for this descriptor.
    arena.check_other()?;
    probe_or_closed(&mut disk, end)
}

fn probe_or_closed(disk: &mut Disk, end: crate::End) -> Attack {
    match probe(disk, 1) {
        Ok(()) => Ok(end),
        Err(_) if disk.frontend.closes_within(Duration::from_millis(100)) => Ok(Closed),
        Err(e) => Err(e),
    }
}

/// Four large requests at once.
fn load(disk: &mut Disk, kind: u32) -> Result<(), DiskError> {
    for slot in 0..4 {
        let request = Request {
            kind,
            sector: u64::from(slot) * 1024,
            segments: vec![(DATA + u64::from(slot) * 0x10_0000, 0x8_0000)],
        };
        disk.push(0, slot, &request)?;
    }
    disk.publish(0)
}

fn full_pipe() -> Result<(OwnedFd, OwnedFd), Box<dyn Error>> {
    let (read, write_end) = pipe()?;
    fcntl(&write_end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    while write(&write_end, &[0; 4096]).is_ok() {}
    fcntl(&write_end, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok((read, write_end))
}

fn kick_replaced(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    for _ in 0..20 {
        load(&mut disk, kind::IN)?;
        let next = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let set = disk
            .frontend
            .set_vring_fd(request::SET_VRING_KICK, 0, Some(next.as_fd()));
        let end = fate(set)?;
        if end != Accepted {
            return Ok(end);
        }
        disk.rings[0].kick = next;
        disk.rings[0].kick.write(1)?;
        for _ in 0..4 {
            disk.rings[0].wait_used(&disk.memory, Duration::from_secs(5))?;
        }
    }
    Ok(Accepted)
}

fn call_none(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let end = fate(disk.frontend.set_vring_fd(request::SET_VRING_CALL, 0, None))?;
    load(&mut disk, kind::IN)?;
    let mut left = 4;
    for _ in 0..2000 {
        while disk.rings[0].poll_used(&disk.memory)?.is_some() {
            left -= 1;
        }
        if left == 0 {
            return Ok(end);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(format!("{left} requests were not served").into())
}

/// A full eventfd that is made to block after the backend took it: the flag belongs to the open
/// file, which both sides share. Then calls, and at the end a broken queue.
fn blocks_once_taken(arena: &mut Arena, request: u32) -> Attack {
    let mut disk = attach(arena)?;
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
    let end = fate(disk.frontend.set_vring_fd(request, 0, Some(event.as_fd())))?;
    // A driver with another call is called at once: what it was told before may have gone to nobody.
    fcntl(
        event.as_fd(),
        FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
    )?;
    while event.write(u64::MAX - 1).is_err() {
        let _ = event.read();
    }
    fcntl(event.as_fd(), FcntlArg::F_SETFL(OFlag::O_RDWR))?;
    for _ in 0..4 {
        load(&mut disk, kind::IN)?;
        std::thread::sleep(Duration::from_millis(10));
        while disk.rings[0].poll_used(&disk.memory)?.is_some() {}
    }
    break_queue(&mut disk)?;
    std::thread::sleep(Duration::from_millis(10));
    arena.check_other()?;
    // A call that waits is given up with its queue.
    disk.stop_queue_at(0)?;
    probe_or_closed(&mut disk, end)
}

/// The queue breaks, and the descriptor that should say so blocks.
fn error_full(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    let (_read, write) = full_pipe()?;
    let end = fate(
        disk.frontend
            .set_vring_fd(request::SET_VRING_ERR, 0, Some(write.as_fd())),
    )?;
    if end == Closed {
        return Ok(end);
    }
    break_queue(&mut disk)?;
    arena.check_other()?;
    probe_or_closed(&mut disk, end)
}

fn disconnect(arena: &mut Arena, kind: u32) -> Attack {
    if kind == kind::OUT {
        arena.touch(0..FILE_BYTES);
    }
    for _ in 0..20 {
        let mut disk = attach(arena)?;
        load(&mut disk, kind)?;
        drop(disk);
    }
    if kind == kind::OUT {
        let mut disk = attach(arena)?;
        disk.write(0, 0, &[0x77; 65536])?;
        drop(disk);
        let mut disk = attach(arena)?;
        if disk.read(0, 0, 65536)? != vec![0x77; 65536] {
            return Err("what was written is not there after the reconnect".into());
        }
    }
    Ok(Closed)
}
