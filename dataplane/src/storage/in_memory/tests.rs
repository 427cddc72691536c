//! Transfers with a file on tmpfs: each way and size, cut short, out of memory, and refused.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;
use crate::memory::{GuestBuffer, Lease, anonymous};
use crate::storage::StorageSpec;
use crate::worker::staging::Staging;

const BYTES: u64 = 1 << 20;

struct Rig {
    file: File,
    guest: File,
    memory: Lease,
    storage: InMemoryStorage,
    staging: Staging,
    ring: Ring,
}

fn memfd(bytes: u64, flags: MFdFlags) -> OwnedFd {
    let fd = memfd_create("volume", flags | MFdFlags::MFD_CLOEXEC).expect("memfd");
    File::from(fd.try_clone().expect("dup"))
        .set_len(bytes)
        .expect("length");
    fd
}

impl Rig {
    fn new() -> Self {
        let staging = Staging::new().expect("staging");
        let mut ring = Ring::new(&staging).expect("ring");
        let fd = memfd(BYTES, MFdFlags::MFD_ALLOW_SEALING);
        let file = File::from(fd.try_clone().expect("dup"));
        let spec = FileSpec::from_fd(fd, false, 512).expect("usable");
        assert!(spec.in_memory);
        let storage = InMemoryStorage::open(&spec, &mut ring).expect("open");
        let (memory, guest) = anonymous(4 << 20).expect("memory");
        Self {
            file,
            guest: File::from(guest),
            memory: Lease::new(std::sync::Arc::new(memory)),
            storage,
            staging,
            ring,
        }
    }

    /// A transfer with `pieces` ranges of guest memory that don't touch each other, of `bytes` each.
    fn guest(&self, action: Action, offset_bytes: u64, pieces: u64, bytes: u32) -> Transfer {
        let mut buffer = GuestBuffer::with_capacity(4);
        buffer.reset(&self.memory);
        for piece in 0..pieces {
            buffer
                .push(piece * 2 * u64::from(bytes), bytes)
                .expect("inside");
        }
        Transfer {
            action,
            offset_bytes,
            bytes: buffer.bytes(),
            buffer: Buffer::Guest(buffer),
            retries: 0,
        }
    }

    fn run(&mut self, transfer: Transfer) -> (Transfer, Done) {
        match self.storage.begin(&mut self.ring, 1, transfer) {
            Begin::Done(transfer, done) => (transfer, done),
            other => panic!("it does not end at once: {other:?}"),
        }
    }
}

const WRITE: Action = Action::Write { durable: false };
const DURABLE: Action = Action::Write { durable: true };

#[test]
fn guest_memory_goes_there_and_back_in_any_number_of_pieces() {
    let mut rig = Rig::new();
    // One; a few; as many as a call takes; more; odd lengths.
    for (pieces, bytes) in [(1, 4096), (3, 512), (32, 512), (33, 512), (100, 513)] {
        let total = pieces * u64::from(bytes);
        let contents: Vec<u8> = (0..total).map(|n| (n % 251) as u8).collect();
        for (piece, part) in contents.chunks(bytes as usize).enumerate() {
            let at = piece as u64 * 2 * u64::from(bytes);
            rig.guest.write_all_at(part, at).expect("guest memory");
        }
        let (back, done) = rig.run(rig.guest(DURABLE, 512, pieces, bytes));
        assert_eq!((done, back.judge(done)), (Ok(total), Ok(())));
        let mut stored = vec![0; contents.len()];
        rig.file.read_exact_at(&mut stored, 512).expect("file");
        assert_eq!(stored, contents, "{pieces} pieces of {bytes}");
        // Punches all of it out.
        rig.guest.set_len(0).expect("truncate");
        rig.guest.set_len(4 << 20).expect("grow");
        let (back, done) = rig.run(rig.guest(Action::Read, 512, pieces, bytes));
        assert_eq!((done, back.judge(done)), (Ok(total), Ok(())));
        let mut read = vec![0; contents.len()];
        assert!(back.copy_out(&mut read));
        assert_eq!(read, contents, "{pieces} pieces of {bytes}");
    }
}

#[test]
fn staging_goes_there_and_back() {
    let mut rig = Rig::new();
    for action in [WRITE, Action::Read] {
        let mut chunk = rig.staging.take(4096).expect("free");
        assert!(chunk.copy_in(&[if action == WRITE { 7 } else { 0 }; 4096]));
        let (back, done) = rig.run(Transfer {
            action,
            offset_bytes: 8192,
            bytes: 4096,
            buffer: Buffer::Staging(chunk),
            retries: 0,
        });
        let mut bytes = [0; 4096];
        assert!(back.copy_out(&mut bytes));
        assert_eq!((done, bytes), (Ok(4096), [7; 4096]));
    }
}

#[test]
fn a_transfer_that_is_cut_short_is_a_failure() {
    let mut rig = Rig::new();
    // In the second call of two.
    let offset = BYTES - 33 * 512 + 512;
    let (back, done) = rig.run(rig.guest(Action::Read, offset, 33, 512));
    assert_eq!((done, back.judge(done)), (Ok(32 * 512), Err(libc::EIO)));
    // In the first.
    let (back, done) = rig.run(rig.guest(Action::Read, BYTES - 512, 64, 512));
    assert_eq!((done, back.judge(done)), (Ok(512), Err(libc::EIO)));
    let (_, done) = rig.run(rig.guest(Action::Read, BYTES, 1, 4096));
    assert_eq!(done, Ok(0));
}

#[test]
fn errors_come_with_their_number() {
    let mut rig = Rig::new();
    let (_, done) = rig.run(rig.guest(Action::Read, u64::MAX, 1, 512));
    assert_eq!(done, Err(libc::EINVAL));
    nix::fcntl::fcntl(
        &rig.file,
        nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_WRITE),
    )
    .expect("sealed");
    let (_, done) = rig.run(rig.guest(WRITE, 0, 1, 512));
    assert_eq!(done, Err(libc::EPERM));
}

/// A frontend that takes its memory away fails its own requests.
#[test]
fn guest_memory_that_went_away_is_an_error() {
    let mut rig = Rig::new();
    rig.guest.set_len(0).expect("truncate");
    for action in [Action::Read, WRITE] {
        let (back, done) = rig.run(rig.guest(action, 0, 1, 4096));
        assert_eq!(done, Err(libc::EFAULT), "{action:?}");
        assert_eq!(back.judge(done), Err(libc::EFAULT));
    }
}

#[test]
fn a_flush_has_nothing_to_do_and_the_rest_goes_to_the_ring() {
    let mut rig = Rig::new();
    let (_, done) = rig.run(Transfer::flush());
    assert_eq!(done, Ok(0));
    rig.file.write_all_at(&[9; 8192], 0).expect("write");
    let zero = Transfer {
        action: Action::Zero { unmap: true },
        offset_bytes: 0,
        bytes: 4096,
        buffer: Buffer::None,
        retries: 0,
    };
    let begun = rig.storage.begin(&mut rig.ring, 1, zero);
    assert!(matches!(begun, Begin::Later), "{begun:?}");
    let done = loop {
        rig.ring.wait(None);
        if let Some(completion) = rig.ring.reap() {
            break completion.done;
        }
    };
    let mut bytes = [1; 8192];
    rig.file.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(done, Ok(0));
    assert!(bytes[..4096].iter().all(|b| *b == 0) && bytes[4096..].iter().all(|b| *b == 9));
}

/// What is not memory keeps going through io_uring, and what is does not.
#[test]
fn a_worker_takes_the_way_that_the_file_needs() {
    let staging = Staging::new().expect("staging");
    let mut ring = Ring::new(&staging).expect("ring");
    let disk = tempfile::tempfile_in(".").expect("file");
    disk.set_len(BYTES).expect("length");
    let tmpfs = nix::sys::statfs::fstatfs(disk.as_fd())
        .expect("statfs")
        .filesystem_type()
        == nix::sys::statfs::TMPFS_MAGIC;
    for (fd, in_memory) in [
        (memfd(BYTES, MFdFlags::empty()), true),
        (OwnedFd::from(disk), tmpfs),
    ] {
        let spec = FileSpec::from_fd(fd, false, 4096).expect("usable");
        assert_eq!(spec.in_memory, in_memory);
        let storage = StorageSpec::File(spec).open(&mut ring).expect("open");
        let chunk = staging_chunk();
        let transfer = Transfer {
            action: Action::Read,
            offset_bytes: 0,
            bytes: 4096,
            buffer: Buffer::Staging(chunk),
            retries: 0,
        };
        let begun = storage.begin(&mut ring, 1, transfer);
        assert_eq!(matches!(begun, Begin::Done(_, Ok(4096))), in_memory);
        assert_eq!(matches!(begun, Begin::Later), !in_memory);
    }
    drop(ring);
}

fn staging_chunk() -> crate::worker::staging::Chunk {
    Staging::new().expect("staging").take(4096).expect("free")
}

/// The calls are among those of a worker that is locked in.
#[test]
fn a_locked_in_worker_may_do_it() {
    let thread = std::thread::spawn(|| {
        let mut rig = Rig::new();
        crate::sandbox::lock_worker_thread().expect("locked in");
        [WRITE, Action::Read].map(|action| rig.run(rig.guest(action, 0, 2, 4096)).1)
    });
    assert_eq!(thread.join().expect("it lives"), [Ok(8192); 2]);
}
