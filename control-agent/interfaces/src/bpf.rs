//! The five `bpf` calls that an interface's program takes: a map of sockets, the program, its link, an entry of the map,
//! and which interface a link is on. The program is five instructions, written here.
//!
//! UNSAFETY: `bpf` reads a structure and what it points to during the call; all of it lives in the caller's frame.
#![expect(unsafe_code, reason = "the bpf system call")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const OBJECT_INFO: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
/// `BPF_MAP_TYPE_XSKMAP`.
const XSKMAP: u32 = 17;
/// `BPF_PROG_TYPE_XDP`.
const XDP_PROGRAM: u32 = 6;
/// `BPF_XDP`, where a link is attached to an interface.
const XDP_ATTACH: u32 = 37;

/// An instruction: operation, registers (source above destination), offset, immediate.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Instruction(u8, u8, i16, i32);

/// `XDP_PASS`: the frame goes to the host's own stack.
const PASS: i32 = 2;
/// `bpf_redirect_map`.
const REDIRECT_MAP: i32 = 51;
/// Offset of `rx_queue_index` in `struct xdp_md`.
const RX_QUEUE: i16 = 16;

/// `return bpf_redirect_map(&map, context->rx_queue_index, XDP_PASS)`: to the socket of the queue that the frame
/// came by; to the host's own stack if it has none.
fn program(map: i32) -> [Instruction; 6] {
    [
        Instruction(0x61, 0x12, RX_QUEUE, 0), // r2 = *(u32 *)(r1 + RX_QUEUE)
        Instruction(0x18, 0x11, 0, map),      // r1 = map, by descriptor; two halves
        Instruction(0, 0, 0, 0),
        Instruction(0xb7, 0x03, 0, PASS),      // r3 = PASS
        Instruction(0x85, 0, 0, REDIRECT_MAP), // r0 = call
        Instruction(0x95, 0, 0, 0),            // return r0
    ]
}

/// A map of sockets, by the number of the queue.
pub(crate) fn socket_map(queues: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        map_type: u32,
        key_bytes: u32,
        value_bytes: u32,
        most_entries: u32,
        flags: u32,
        inner_map: u32,
        numa_node: u32,
        name: [u8; 16],
    }
    let attributes = Attributes {
        map_type: XSKMAP,
        key_bytes: 4,
        value_bytes: 4,
        most_entries: queues,
        name: *b"bulkhead_xsks\0\0\0",
        ..Attributes::default()
    };
    // SAFETY: the attributes of this command, which point to nothing.
    unsafe { descriptor(MAP_CREATE, &attributes) }
}

/// The program that gives frames to the sockets of a map.
pub(crate) fn redirect_program(map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_bytes: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    let instructions = program(map.as_raw_fd());
    let license = c"Apache-2.0";
    let attributes = Attributes {
        kind: XDP_PROGRAM,
        instruction_count: u32::try_from(instructions.len()).unwrap_or(0),
        instructions: instructions.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        name: *b"bulkhead_xdp\0\0\0\0",
        attach_type: XDP_ATTACH,
        ..Attributes::default()
    };
    // SAFETY: the attributes of this command; instructions and licence live through the call.
    unsafe { descriptor(PROG_LOAD, &attributes) }
}

/// Attaches a program to an interface, for as long as the link is open anywhere.
pub(crate) fn attach(program: BorrowedFd<'_>, interface_index: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        interface: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: number(program),
        interface: interface_index,
        attach_type: XDP_ATTACH,
        flags: 0,
    };
    // SAFETY: the attributes of this command, which point to nothing.
    unsafe { descriptor(LINK_CREATE, &attributes) }
}

/// `BPF_NOEXIST`: only where nothing is.
const ONLY_NEW: u64 = 1;

/// Puts a socket into a map, where there is none (EEXIST). It goes by itself when the socket is closed.
pub(crate) fn put_socket(
    map: BorrowedFd<'_>,
    queue: u32,
    socket: BorrowedFd<'_>,
) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        unused: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let socket = number(socket);
    let attributes = Attributes {
        map: number(map),
        unused: 0,
        key: (&raw const queue).addr() as u64,
        value: (&raw const socket).addr() as u64,
        flags: ONLY_NEW,
    };
    // SAFETY: the attributes of this command; key and value live through the call and are as long as the map's.
    unsafe { call(MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

/// The index of the interface that a link is on; none: it is no such link, or the interface is gone.
pub(crate) fn interface_of(link: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    /// `BPF_LINK_TYPE_XDP`.
    const XDP_LINK: u32 = 6;
    /// The front of `struct bpf_link_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        unused: u32,
        interface: u32,
        rest: [u32; 11],
    }
    #[repr(C)]
    struct Attributes {
        object: u32,
        info_bytes: u32,
        info: u64,
    }
    let mut info = Info::default();
    let attributes = Attributes {
        object: number(link),
        info_bytes: u32::try_from(size_of::<Info>()).unwrap_or(0),
        info: (&raw mut info).addr() as u64,
    };
    // SAFETY: the attributes of this command; the kernel writes at most that many bytes of plain numbers to the info,
    // which lives through the call.
    unsafe { call(OBJECT_INFO, &attributes) }?;
    let is_one = info.kind == XDP_LINK && info.interface != 0;
    Ok(is_one.then_some(info.interface))
}

/// The number of an open descriptor, which is never negative.
fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// # Safety
/// As [`call`].
unsafe fn descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: promised by the caller.
    let fd = unsafe { call(command, attributes) }?;
    // SAFETY: the kernel has just made it (closed on exec, as all of bpf's), for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `attributes` are those of `command`, and what they point to is valid through the call.
unsafe fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    let at = std::ptr::from_ref(attributes);
    // SAFETY: promised by the caller; the kernel takes the fields behind the length as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, at, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(io::Error::other)
}
