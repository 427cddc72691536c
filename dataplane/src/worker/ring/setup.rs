//! How a ring is made: with what memory and files, and what it may ever be asked for.
//!
//! UNSAFETY: the kernel keeps the addresses of staging memory, which outlives the ring.
#![expect(unsafe_code, reason = "memory is registered with the kernel")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, Submitter, opcode};

use super::{Entry, MAX_IN_FLIGHT, Ring};
use crate::worker::staging::{PIECES, Staging};

/// Entries of the submission queue: it is submitted when it is full.
const SUBMISSION_ENTRIES: u32 = 256;
/// Threads that the kernel may have at a time for what a worker's ring can't begin without waiting: flushes, file
/// systems that make who begins a transfer wait, disks whose queue is full. They come as they are needed. The
/// kernel's own limit is four for each CPU: so many requests of a volume that hangs would leave none for the
/// flushes of the others.
const MAX_THREADS: u32 = 1024;
/// Fixed files at most: volumes, kicks and calls.
const MAX_FILES: u32 = 8192;
/// Segments of a transfer that each entry has room for from the start, so that a busier moment than
/// any before does not allocate.
const USUAL_SEGMENTS: usize = 4;
/// `IORING_REGISTER_FILES_UPDATE`.
const REGISTER_FILES_UPDATE: u8 = 6;
/// `IORING_REGISTER_BUFFERS_UPDATE`.
const REGISTER_BUFFERS_UPDATE: u8 = 16;

impl Ring {
    /// Makes, restricts and enables a ring. To be called on the thread that will use it.
    ///
    /// # Errors
    /// What the kernel refuses; ENOSYS or EPERM where io_uring is switched off
    /// (`kernel.io_uring_disabled`).
    pub fn new(staging: &Staging) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_cqsize(MAX_IN_FLIGHT)
            .setup_clamp()
            .setup_submit_all()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_r_disabled()
            .build(SUBMISSION_ENTRIES)?;
        let submitter = uring.submitter();
        let pieces = u32::try_from(PIECES).map_err(io::Error::other)?;
        submitter.register_buffers_sparse(pieces)?;
        let mut registered = [false; PIECES];
        registered[0] = register(&submitter, 0, staging.first())?;
        // Before the restrictions, which don't let it be changed.
        submitter.register_iowq_max_workers(&mut [MAX_THREADS, 0])?;
        let files = file_slots()?;
        submitter.register_files_sparse(files)?;
        submitter.register_restrictions(&mut restrictions())?;
        submitter.register_enable_rings()?;
        let mut entries = Vec::with_capacity(MAX_IN_FLIGHT as usize);
        entries.resize_with(MAX_IN_FLIGHT as usize, || Entry {
            iovecs: Vec::with_capacity(USUAL_SEGMENTS),
            ..Entry::default()
        });
        Ok(Self {
            uring,
            entries: entries.into_boxed_slice(),
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            free_files: (0..files).rev().collect(),
            events: 0,
            registered,
            fences: Vec::new(),
        })
    }

    /// Has one piece more of the worker's staging memory; nothing happens if there is none, or it is refused.
    #[cold]
    pub fn grow(&mut self, staging: &mut Staging) {
        let Some((piece, memory)) = staging.grow() else {
            return;
        };
        let submitter = self.uring.submitter();
        match register(&submitter, piece, memory) {
            Ok(registered) => {
                if let Some(place) = self.registered.get_mut(piece as usize) {
                    *place = registered;
                }
            }
            // Transfers name its addresses then.
            Err(error) => tracing::warn!("a piece of staging memory can't be registered: {error}"),
        }
    }
}

/// Registers a piece of the staging memory as the buffer of its number; false where so much memory can't be locked.
fn register(submitter: &Submitter<'_>, piece: u32, memory: libc::iovec) -> io::Result<bool> {
    // SAFETY: the staging memory is mapped for as long as any of its chunks, and the worker drops its ring before its
    // staging.
    match unsafe { submitter.register_buffers_update(piece, &[memory], None) } {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOMEM | libc::EPERM)) => {
            tracing::warn!(
                "staging memory can't be registered ({e}): raise RLIMIT_MEMLOCK for a little more speed"
            );
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// What the ring may ever be asked for.
fn restrictions() -> Vec<Restriction> {
    let fixed = Flags::FIXED_FILE.bits();
    vec![
        // Volumes and eventfds come and go while the worker runs.
        Restriction::register_op(REGISTER_FILES_UPDATE),
        // Staging memory comes as it is wanted.
        Restriction::register_op(REGISTER_BUFFERS_UPDATE),
        // Guest memory in several pieces.
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        // Guest memory in one piece, eventfds, and staging memory where it could not be registered.
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        // Staging memory.
        Restriction::sqe_op(opcode::ReadFixed::CODE),
        Restriction::sqe_op(opcode::WriteFixed::CODE),
        // FLUSH.
        Restriction::sqe_op(opcode::Fsync::CODE),
        // DISCARD and WRITE_ZEROES. A restriction can't name the mode: other modes change the length of a
        // volume that this worker may write to anyway.
        Restriction::sqe_op(opcode::Fallocate::CODE),
        // A socket's receive ring has something; its transmit ring has. Of all that a worker has only AF_XDP sockets
        // are any; a send takes no address but the one a socket is bound to, and no descriptor.
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_op(opcode::Send::CODE),
        // A kick that is no longer waited for, a call that can't be made.
        Restriction::sqe_op(opcode::AsyncCancel::CODE),
        // Nothing but files of the table; begun by another thread where a file system makes who begins wait.
        Restriction::sqe_flags_allowed(fixed | Flags::ASYNC.bits()),
        Restriction::sqe_flags_required(fixed),
    ]
}

/// Size of the file table: the kernel allows no more than the process may open.
fn file_slots() -> io::Result<u32> {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    Ok(u32::try_from(soft).unwrap_or(u32::MAX).min(MAX_FILES))
}
