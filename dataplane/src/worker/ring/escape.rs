//! What code that took a worker over could ask its ring for: the real ring, on a thread locked in as a
//! worker's is.
//!
//! UNSAFETY: entries are pushed that the ring must refuse; should it not, the buffers they name live
//! until their completion was taken.

use std::os::fd::AsFd;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, Fixed, OpenHow};

use super::*;
use crate::sandbox::lock_worker_thread;
use crate::worker::staging::Staging;

/// Runs `attempts` with a ring, on a thread of its own that is locked in.
fn locked_in<T: Send>(attempts: impl FnOnce(&mut Ring, FixedFile) -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let staging = Staging::new().expect("staging");
            let mut ring = Ring::new(&staging).expect("ring");
            let event = nix::sys::eventfd::EventFd::from_value(1).expect("eventfd");
            let file = ring.register_file(event.as_fd()).expect("register");
            lock_worker_thread().expect("locked in");
            attempts(&mut ring, file)
        });
        thread.join().expect("joined")
    })
}

/// The result of one entry: 0 or more, or an errno.
fn result_of(ring: &mut Ring, entry: &Entry) -> i32 {
    // SAFETY: what the entry names lives in the caller's frame until the completion is here.
    unsafe { ring.uring.submission().push(entry) }.expect("room");
    ring.uring.submit_and_wait(1).expect("entered");
    let completion = ring.uring.completion().next().expect("a completion");
    completion.result()
}

fn refused(name: &str, entry: Entry) {
    let result = locked_in(|ring, _| {
        [Flags::empty(), Flags::FIXED_FILE]
            .map(|flags| result_of(ring, &entry.clone().flags(flags)))
    });
    assert_eq!(result, [-libc::EACCES; 2], "{name}");
}

#[test]
fn escape_ring_openat_is_refused() {
    let path = c"/etc/hostname".as_ptr();
    refused(
        "openat",
        opcode::OpenAt::new(Fd(libc::AT_FDCWD), path).build(),
    );
    let how = OpenHow::new();
    let open = opcode::OpenAt2::new(Fd(libc::AT_FDCWD), path, &raw const how);
    refused("openat2", open.build());
}

#[test]
fn escape_ring_socket_is_refused() {
    let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0);
    refused("socket", socket.build());
}

#[test]
fn escape_ring_connect_is_refused() {
    // SAFETY: all-zero is a valid sockaddr_in.
    let address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    let length = u32::try_from(size_of_val(&address)).expect("small");
    let connect = opcode::Connect::new(Fixed(0), (&raw const address).cast(), length);
    refused("connect", connect.build());
}

#[test]
fn escape_ring_everything_else_is_refused() {
    let name = c"x".as_ptr();
    let mut byte = 0u8;
    let mut header = std::mem::MaybeUninit::<libc::msghdr>::zeroed();
    let entries = [
        (
            "recv",
            opcode::Recv::new(Fixed(0), &raw mut byte, 1).build(),
        ),
        (
            "sendmsg",
            opcode::SendMsg::new(Fixed(0), header.as_ptr()).build(),
        ),
        (
            "recvmsg",
            opcode::RecvMsg::new(Fixed(0), header.as_mut_ptr()).build(),
        ),
        (
            "accept",
            opcode::Accept::new(Fixed(0), std::ptr::null_mut(), std::ptr::null_mut()).build(),
        ),
        (
            "splice",
            opcode::Splice::new(Fixed(0), -1, Fixed(0), -1, 1).build(),
        ),
        ("close", opcode::Close::new(Fixed(0)).build()),
        (
            "unlink",
            opcode::UnlinkAt::new(Fd(libc::AT_FDCWD), name).build(),
        ),
        (
            "rename",
            opcode::RenameAt::new(Fd(libc::AT_FDCWD), name, Fd(libc::AT_FDCWD), name).build(),
        ),
        ("truncate", opcode::Ftruncate::new(Fixed(0), 1).build()),
        (
            "uring command",
            opcode::UringCmd16::new(Fixed(0), 0).build(),
        ),
        (
            "message ring",
            opcode::MsgRingData::new(Fd(0), 0, 0, None).build(),
        ),
        ("nothing", opcode::Nop::new().build()),
    ];
    for (name, entry) in entries {
        refused(name, entry);
    }
}

#[test]
fn escape_ring_a_descriptor_that_is_not_registered_is_refused() {
    let (plain, fixed) = locked_in(|ring, file| {
        let mut word = 0u64;
        let at = (&raw mut word).cast::<u8>();
        let by_number = (0..64).map(|fd| opcode::Read::new(Fd(fd), at, 8).build());
        let by_number: Vec<i32> = by_number.map(|entry| result_of(ring, &entry)).collect();
        let read = opcode::Read::new(Fixed(file.number), at, 8).build();
        (by_number, result_of(ring, &read.flags(Flags::FIXED_FILE)))
    });
    assert_eq!(plain, [-libc::EACCES; 64]);
    assert_eq!(fixed, 8, "the registered eventfd can be read");
}

#[test]
fn escape_ring_other_flags_are_refused() {
    let results = locked_in(|ring, file| {
        let flush = opcode::Fsync::new(Fixed(file.number)).build();
        [Flags::IO_LINK, Flags::IO_HARDLINK, Flags::IO_DRAIN]
            .map(|flag| result_of(ring, &flush.clone().flags(Flags::FIXED_FILE | flag)))
    });
    assert_eq!(results, [-libc::EACCES; 3]);
}
