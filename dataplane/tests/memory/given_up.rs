//! A page that a guest gave up and took anew (a balloon, free page reporting, memory unplugged and plugged): what
//! is read into guest memory has to be where the guest looks. Memory that is registered with io_uring keeps the
//! page that it had; this is why guest memory is not (ADR 0025).
#![expect(
    unsafe_code,
    reason = "a ring with registered guest memory, which the product has not"
)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use bulkhead_dataplane::memory::Lease;
use bulkhead_dataplane::storage::{Action, Buffer, Transfer};
use bulkhead_dataplane::worker::ring::Ring;
use bulkhead_dataplane::worker::staging::Staging;
use io_uring::{IoUring, opcode, types::Fd};
use nix::fcntl::{FallocateFlags, fallocate};

use super::{PAGE, buffer, lease, map_from, memfd, read, region};

const BYTES: u32 = 4096;

/// Guest memory whose second page was given up, after `before` was done with it, and a disk full of 0xa5.
fn give_up<T>(before: impl FnOnce(&Lease) -> T) -> (Lease, File, T) {
    let file = memfd(4 * PAGE);
    nix::sys::uio::pwrite(&file, &[7; 4 * 4096], 0).expect("guest memory");
    let memory = lease(map_from(&[region(0, 4 * PAGE, 0, 0)], &file).expect("map"));
    let done = before(&memory);
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, hole, 4096, 4096).expect("given up");
    let disk = tempfile::tempfile().expect("disk");
    disk.write_all_at(&[0xa5; BYTES as usize], 0).expect("disk");
    (memory, disk, done)
}

#[test]
fn what_is_read_is_where_the_guest_looks() {
    let staging = Staging::new().expect("staging");
    let mut ring = Ring::new(&staging).expect("ring");
    let (memory, disk, ()) = give_up(|_| ());
    let disk = ring.register_file(disk.as_fd()).expect("register");
    let transfer = Transfer {
        action: Action::Read,
        offset_bytes: 0,
        bytes: u64::from(BYTES),
        buffer: Buffer::Guest(buffer(&memory, &[(PAGE, BYTES)]).expect("inside")),
        retries: 0,
    };
    ring.push(1, disk, transfer).expect("room");
    let done = loop {
        ring.wait(Some(Duration::from_secs(5)));
        if let Some(completion) = ring.reap() {
            break completion.done;
        }
    };
    assert_eq!(done, Ok(u64::from(BYTES)));
    assert_eq!(read(&memory, PAGE, BYTES), Some(vec![0xa5; 4096]));
}

/// Should a kernel do better one day, the decision can be taken anew.
#[test]
fn registered_memory_would_keep_the_page_that_the_guest_gave_up() {
    let mut ring = IoUring::new(8).expect("ring");
    let (memory, disk, registered) = give_up(|memory| {
        let all = buffer(memory, &[(0, 4 * BYTES)]).expect("inside");
        let piece = all.pieces()[0];
        let iovec = libc::iovec {
            iov_base: piece.host().as_ptr().cast(),
            iov_len: piece.bytes() as usize,
        };
        // SAFETY: the memory is mapped for longer than the ring lives; nobody refers to its bytes.
        unsafe { ring.submitter().register_buffers(&[iovec]) }
    });
    if let Err(error) = registered {
        println!("skipped: guest memory can't be registered here: {error}");
        return;
    }
    let page = buffer(&memory, &[(PAGE, BYTES)]).expect("inside");
    let at = page.pieces()[0].host().as_ptr();
    let entry = opcode::ReadFixed::new(Fd(disk.as_raw_fd()), at, BYTES, 0).build();
    // SAFETY: the memory and the disk live until the completion is here.
    unsafe { ring.submission().push(&entry) }.expect("room");
    ring.submit_and_wait(1).expect("entered");
    let result = ring.completion().next().expect("a completion").result();
    assert_eq!(
        u32::try_from(result),
        Ok(BYTES),
        "the kernel says that it is done"
    );
    assert_eq!(
        read(&memory, PAGE, BYTES),
        Some(vec![0; 4096]),
        "the guest sees nothing of it"
    );
    drop(ring);
}
