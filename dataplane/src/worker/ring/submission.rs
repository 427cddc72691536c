//! A submission queue entry for an entry of the ring's table.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use io_uring::opcode;
use io_uring::squeue::{self, Flags};
use io_uring::types::{Fixed, FsyncFlags};

use super::{Entry, Event, FrameAction, Job};
use crate::memory::Piece;
use crate::storage::{Action, Buffer, Transfer};
use crate::worker::frame_buffer::{FRAME_BUFFER_BYTES, FrameBuffer};
use crate::worker::staging::PIECES;

/// `RWF_DSYNC`.
const RWF_DSYNC: i32 = 0x2;

/// The kernel's form of an entry.
#[inline]
pub(super) fn submission(entry: &mut Entry, registered: &[bool; PIECES]) -> Option<squeue::Entry> {
    let off_thread = entry.in_flight.as_ref()?.file.off_thread;
    let flags = if off_thread {
        Flags::FIXED_FILE | Flags::ASYNC
    } else {
        Flags::FIXED_FILE
    };
    Some(operation(entry, registered)?.flags(flags))
}

#[inline]
fn operation(entry: &mut Entry, registered: &[bool; PIECES]) -> Option<squeue::Entry> {
    let in_flight = entry.in_flight.as_ref()?;
    let file = Fixed(in_flight.file.number);
    let transfer = match &in_flight.job {
        Job::Transfer(transfer) => transfer,
        Job::Event(Event::Wait) => {
            let word = (&raw mut entry.word).cast::<u8>();
            return Some(opcode::Read::new(file, word, 8).build());
        }
        Job::Event(Event::Signal) => {
            entry.word = 1;
            let word = (&raw const entry.word).cast();
            return Some(opcode::Write::new(file, word, 8).build());
        }
        Job::Event(event @ (Event::Readable | Event::Kick)) => {
            return Some(of_socket(file, *event));
        }
        Job::Frame(action, buffer) => return of_frame(file, *action, buffer),
    };
    match &transfer.buffer {
        Buffer::None => without_buffer(file, transfer),
        Buffer::Staging(chunk) => {
            let at = chunk.at().as_ptr();
            let bytes = u32::try_from(transfer.bytes).ok()?;
            let piece = chunk.piece();
            if bytes > chunk.bytes() {
                return None;
            }
            if !registered.get(usize::from(piece)).copied().unwrap_or(false) {
                return Some(with_address(file, transfer, at, bytes));
            }
            Some(from_staging(file, transfer, at, bytes, piece.into()))
        }
        Buffer::Guest(buffer) => match buffer.pieces() {
            // Most requests: the kernel need not read a list first.
            [piece] => {
                let at = piece.host().as_ptr();
                Some(with_address(file, transfer, at, piece.bytes()))
            }
            pieces => with_list(file, transfer, &mut entry.iovecs, pieces),
        },
    }
}

fn of_socket(file: Fixed, event: Event) -> squeue::Entry {
    if event == Event::Readable {
        // A constant of the C library, which is not negative.
        let readable = u32::from(libc::POLLIN.unsigned_abs());
        return opcode::PollAdd::new(file, readable).build();
    }
    opcode::Send::new(file, std::ptr::null(), 0)
        .flags(libc::MSG_DONTWAIT)
        .build()
}

fn of_frame(file: Fixed, action: FrameAction, buffer: &FrameBuffer) -> Option<squeue::Entry> {
    let at = buffer.at().as_ptr();
    let most = u32::try_from(FRAME_BUFFER_BYTES).ok()?;
    match action {
        FrameAction::Send(bytes) => {
            (bytes <= most).then(|| opcode::Write::new(file, at, bytes).build())
        }
        FrameAction::Take => {
            let read = opcode::Read::new(file, at, most);
            Some(read.rw_flags(libc::RWF_NOWAIT).build())
        }
        FrameAction::Await => Some(opcode::Read::new(file, at, most).build()),
    }
}

fn with_address(file: Fixed, transfer: &Transfer, at: *mut u8, bytes: u32) -> squeue::Entry {
    let offset = transfer.offset_bytes;
    match transfer.action {
        Action::Write { durable } => opcode::Write::new(file, at, bytes)
            .offset(offset)
            .rw_flags(write_flags(durable))
            .build(),
        _ => opcode::Read::new(file, at, bytes).offset(offset).build(),
    }
}

fn with_list(
    file: Fixed,
    transfer: &Transfer,
    iovecs: &mut Vec<libc::iovec>,
    pieces: &[Piece],
) -> Option<squeue::Entry> {
    iovecs.clear();
    iovecs.extend(pieces.iter().map(|piece| libc::iovec {
        iov_base: piece.host().as_ptr().cast(),
        iov_len: piece.bytes() as usize,
    }));
    let list = iovecs.as_ptr();
    let count = u32::try_from(iovecs.len()).ok()?;
    let offset = transfer.offset_bytes;
    Some(match transfer.action {
        Action::Write { durable } => opcode::Writev::new(file, list, count)
            .offset(offset)
            .rw_flags(write_flags(durable))
            .build(),
        _ => opcode::Readv::new(file, list, count).offset(offset).build(),
    })
}

fn write_flags(durable: bool) -> i32 {
    if durable { RWF_DSYNC } else { 0 }
}

fn from_staging(
    file: Fixed,
    transfer: &Transfer,
    at: *mut u8,
    bytes: u32,
    buffer: u16,
) -> squeue::Entry {
    let offset = transfer.offset_bytes;
    match transfer.action {
        Action::Write { durable } => opcode::WriteFixed::new(file, at, bytes, buffer)
            .offset(offset)
            .rw_flags(write_flags(durable))
            .build(),
        _ => opcode::ReadFixed::new(file, at, bytes, buffer)
            .offset(offset)
            .build(),
    }
}

fn without_buffer(file: Fixed, transfer: &Transfer) -> Option<squeue::Entry> {
    let mode = match transfer.action {
        Action::Flush => {
            let fsync = opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC);
            return Some(fsync.build());
        }
        // The length of a file stays as it is, whatever is asked.
        Action::Discard | Action::Zero { unmap: true } => libc::FALLOC_FL_PUNCH_HOLE,
        Action::Zero { unmap: false } => libc::FALLOC_FL_ZERO_RANGE,
        Action::Read | Action::Write { .. } => return None,
    };
    let fallocate = opcode::Fallocate::new(file, transfer.bytes)
        .offset(transfer.offset_bytes)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE);
    Some(fallocate.build())
}
