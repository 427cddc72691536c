//! Logs, regions and channels that can't be: refused each time, with nothing kept of them, and the
//! queues go on.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::Disk;
use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::{self, Inflight, request};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{ftruncate, pipe};

use crate::{Outcome, QUEUES, ensure, options};

fn memfd(bytes: u64) -> Result<OwnedFd, Box<dyn Error>> {
    let fd = memfd_create("shared", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&fd, i64::try_from(bytes)?)?;
    Ok(fd)
}

/// A message that must be refused, with its descriptor or without.
fn refused(arena: &Arena, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Outcome {
    let mut disk = arena.attach(&options())?;
    match disk.frontend.set(request, body, fds) {
        Err(FrontendError::Refused { .. }) => {
            disk.read(0, 0, 4096)?;
            Ok(())
        }
        Err(FrontendError::Closed) => Ok(()),
        other => Err(format!("request {request} with {body:x?} ended as {other:?}").into()),
    }
}

pub fn logs(arena: &mut Arena) -> Outcome {
    let file = memfd(8192)?;
    let event = EventFd::new()?;
    let (read, _write) = pipe()?;
    let folder = File::open("/proc")?;
    let fds = [file.as_fd()];
    for (bytes, offset) in [
        (0, 0),
        (8193, 0),
        (4096, 8192),
        (8192, 4096),
        (u64::MAX, 0),
        (4096, u64::MAX),
        (u64::MAX, u64::MAX),
        (1 << 63, 1 << 63),
    ] {
        let body = message::words(&[bytes, offset]);
        refused(arena, request::SET_LOG_BASE, &body, &fds)?;
    }
    let body = message::words(&[4096, 0]);
    for wrong in [event.as_fd(), read.as_fd(), folder.as_fd()] {
        refused(arena, request::SET_LOG_BASE, &body, &[wrong])?;
    }
    refused(arena, request::SET_LOG_BASE, &body, &[])?;
    refused(arena, request::SET_LOG_BASE, &[0; 8], &fds)?;
    refused(arena, request::SET_LOG_BASE, &body, &[file.as_fd(); 3])
}

pub fn regions(arena: &mut Arena) -> Outcome {
    let good = {
        let disk = arena.negotiate(&options())?;
        disk.frontend
            .get_inflight(&Inflight::question(QUEUES, 128))?
            .0
    };
    let file = memfd(good.mmap_size)?;
    let fds = [file.as_fd()];
    let spoil: [fn(&mut Inflight); 9] = [
        |r| r.mmap_size = 0,
        |r| r.mmap_size -= 1,
        |r| r.mmap_size = u64::MAX,
        |r| r.mmap_offset = u64::MAX - 4095,
        |r| r.mmap_offset = 1 << 40,
        |r| r.queues = 0,
        |r| r.queues = u16::MAX,
        |r| r.queue_size = 0,
        |r| r.queue_size = u16::MAX,
    ];
    for spoil in spoil {
        let mut region = good;
        spoil(&mut region);
        refused(arena, request::SET_INFLIGHT_FD, &region.body(), &fds)?;
    }
    let (short, event) = (memfd(good.mmap_size / 2)?, EventFd::new()?);
    for wrong in [short.as_fd(), event.as_fd()] {
        refused(arena, request::SET_INFLIGHT_FD, &good.body(), &[wrong])?;
    }
    refused(arena, request::SET_INFLIGHT_FD, &good.body(), &[])?;
    refused(arena, request::SET_INFLIGHT_FD, &good.body()[..12], &fds)?;
    smaller_than_its_queue(arena, &good)
}

/// A region for queues of 64, and a queue of 128: the start is refused, or the region not used.
fn smaller_than_its_queue(arena: &Arena, good: &Inflight) -> Outcome {
    let disk = arena.negotiate(&options())?;
    let small = Inflight {
        queue_size: 64,
        ..*good
    };
    let file: File = memfd(good.mmap_size)?.into();
    let fds = [file.as_fd()];
    disk.frontend
        .set(request::SET_INFLIGHT_FD, &small.body(), &fds)?;
    disk.share_memory()?;
    ensure(disk.start_queue(0).is_err(), || {
        "a queue started that is larger than its region".to_owned()
    })
}

/// GET_INFLIGHT_FD that asks for too much: refused, and no memory is made for it.
pub fn questions(arena: &mut Arena) -> Outcome {
    for (queues, size) in [
        (0, 128),
        (QUEUES + 1, 128),
        (u16::MAX, u16::MAX),
        (1, 0),
        (1, 32769),
    ] {
        let disk = arena.negotiate(&options())?;
        match disk
            .frontend
            .get_inflight(&Inflight::question(queues, size))
        {
            Err(_) => {}
            Ok((region, _)) => {
                return Err(format!("asked for {queues} queues of {size}, got {region:?}").into());
            }
        }
    }
    Ok(())
}

/// A backend channel of any kind costs nobody anything, whether it is taken or refused.
pub fn backend_channels(arena: &mut Arena) -> Outcome {
    let (near, _far) = std::os::unix::net::UnixStream::pair()?;
    let (closed, far) = std::os::unix::net::UnixStream::pair()?;
    drop(far);
    let (file, event, (read, write)) = (memfd(4096)?, EventFd::new()?, pipe()?);
    let kinds = [
        near.as_fd(),
        closed.as_fd(),
        file.as_fd(),
        event.as_fd(),
        read.as_fd(),
        write.as_fd(),
    ];
    for fd in kinds {
        let mut disk = arena.attach(&options())?;
        for _ in 0..3 {
            match disk.frontend.set(request::SET_BACKEND_REQ_FD, &[], &[fd]) {
                Ok(()) | Err(FrontendError::Refused { .. }) => serves(&mut disk)?,
                Err(FrontendError::Closed) => break,
                Err(other) => return Err(other.into()),
            }
        }
    }
    refused(arena, request::SET_BACKEND_REQ_FD, &[], &[])
}

fn serves(disk: &mut Disk) -> Outcome {
    disk.read(0, 0, 4096)?;
    Ok(())
}
