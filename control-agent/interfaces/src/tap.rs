//! Opening the queues of a TAP that is there: one descriptor for each queue pair, with the virtio header of 12 bytes in
//! front of every frame and every offload that the kernel has.
//!
//! It takes no privilege beyond opening `/dev/net/tun` if the TAP belongs to the user who asks; nothing here makes
//! one.
//!
//! UNSAFETY: `ioctl` on a descriptor of our own with structures that live through the call and have the size that its
//! number says.
#![expect(unsafe_code, reason = "ioctl of /dev/net/tun")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use bulkhead_protocol::net::{InterfaceName, MAX_QUEUE_PAIRS};

use crate::name;

/// Where a TAP is opened. A process that is locked in needs to be allowed reading, writing and ioctl of it.
pub const DEVICE: &str = "/dev/net/tun";
/// Bytes of the header before each frame, as virtio's with VERSION_1 (virtio 1.2, 5.1.6).
pub const HEADER_BYTES: u8 = 12;

/// Offloads that every kernel with TAPs has (`TUNSETOFFLOAD`).
const OFFLOADS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
/// Those that came with Linux 6.2.
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A TAP's open queues.
#[derive(Debug)]
pub struct Tap {
    /// One descriptor for each queue pair, in order.
    pub queues: Vec<OwnedFd>,
    /// UDP segments may come from it in one piece too, not only TCP's.
    pub has_uso: bool,
}

/// Why a TAP can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No driver, or a node that this user may not open.
    #[error(
        "can't open {DEVICE}: {0}; load the tun module (`modprobe tun`) and let the agent's user read and write it \
         (mode 0666, as udev makes it, is enough)"
    )]
    Device(#[source] io::Error),
    /// No such interface.
    #[error(
        "there is no interface {0}: make it with `ip tuntap add dev {0} mode tap multi_queue vnet_hdr user AGENT`"
    )]
    NotThere(InterfaceName),
    /// It is something else.
    #[error("interface {0} is no TAP: name one, or remove it and make one of that name")]
    NotATap(InterfaceName),
    /// Made without `multi_queue`.
    #[error(
        "TAP {name} has one queue and the NIC {pairs} queue pairs: make it again with `multi_queue`, or give the NIC \
         one pair"
    )]
    NotMultiQueue {
        /// Which.
        name: InterfaceName,
        /// As the NIC has.
        pairs: u16,
    },
    /// It belongs to somebody else.
    #[error("TAP {0} belongs to another user: make it with `user` and the agent's user")]
    NotOurs(InterfaceName),
    /// Its one queue is open, or all of them are.
    #[error("TAP {0} is in use: another process has it open, or another NIC is connected to it")]
    Busy(InterfaceName),
    /// A number of pairs that no NIC has.
    #[error("a NIC has 1 to {MAX_QUEUE_PAIRS} queue pairs, not {0}")]
    Pairs(u16),
    /// Any other failure.
    #[error("TAP {name}: {step}: {source}")]
    Io {
        /// Which.
        name: InterfaceName,
        /// What was tried.
        step: &'static str,
        /// What it failed with.
        source: io::Error,
    },
}

/// Opens `pairs` queues of a TAP.
///
/// # Errors
/// See [`TapError`]. Nothing stays open then.
pub fn open(name: &InterfaceName, pairs: u16) -> Result<Tap, TapError> {
    if !(1..=MAX_QUEUE_PAIRS).contains(&pairs) {
        return Err(TapError::Pairs(pairs));
    }
    // The kernel would make one for who has the right to.
    if name::is_there(name) == Some(false) {
        return Err(TapError::NotThere(name.clone()));
    }
    let (first, multi_queue) = first_queue(name, pairs)?;
    let mut queues = vec![first];
    for _ in 1..pairs {
        let queue = device()?;
        attach(&queue, name, multi_queue).map_err(|error| explain(error, name))?;
        queues.push(queue);
    }
    let mut has_uso = false;
    for queue in &queues {
        has_uso = set_up(queue, name)?;
    }
    let queues = queues.into_iter().map(OwnedFd::from).collect();
    Ok(Tap { queues, has_uso })
}

/// The first queue, and the flag that the others need.
fn first_queue(name: &InterfaceName, pairs: u16) -> Result<(File, libc::c_int), TapError> {
    let queue = device()?;
    let multi_queue = match attach(&queue, name, libc::IFF_MULTI_QUEUE) {
        Ok(()) => return Ok((queue, libc::IFF_MULTI_QUEUE)),
        // No TAP, or one without several queues: tried as that, it says which.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => 0,
        Err(error) => return Err(explain(error, name)),
    };
    attach(&queue, name, multi_queue).map_err(|error| explain(error, name))?;
    if pairs > 1 {
        let name = name.clone();
        return Err(TapError::NotMultiQueue { name, pairs });
    }
    Ok((queue, multi_queue))
}

fn device() -> Result<File, TapError> {
    // Blocking: io_uring waits for a frame itself, and would be told EAGAIN otherwise.
    let mut both = OpenOptions::new();
    both.read(true).write(true);
    both.open(DEVICE).map_err(TapError::Device)
}

fn attach(queue: &File, name: &InterfaceName, multi_queue: libc::c_int) -> io::Result<()> {
    let flags = libc::c_short::try_from(FLAGS | multi_queue).map_err(io::Error::other)?;
    let request = libc::ifreq {
        ifr_name: name::in_request(name),
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    // SAFETY: an ifreq, which lives through the call; the kernel writes back to it at most.
    done(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw const request) })
}

/// The header's size and the offloads: whether UDP segments are among these.
fn set_up(queue: &File, name: &InterfaceName) -> Result<bool, TapError> {
    let fd = queue.as_raw_fd();
    let failed = |step| {
        move |source| TapError::Io {
            name: name.clone(),
            step,
            source,
        }
    };
    let header = libc::c_int::from(HEADER_BYTES);
    // SAFETY: an int, which lives through the call.
    done(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header) })
        .map_err(failed("setting the header's size"))?;
    let offload = |which: libc::c_uint| {
        // SAFETY: a number by value.
        done(unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(which)) })
    };
    if offload(OFFLOADS | USO).is_ok() {
        return Ok(true);
    }
    offload(OFFLOADS).map_err(failed("setting its offloads"))?;
    Ok(false)
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What an errno of TUNSETIFF means.
fn explain(source: io::Error, name: &InterfaceName) -> TapError {
    let name = name.clone();
    match source.raw_os_error() {
        Some(libc::EPERM) => TapError::NotOurs(name),
        Some(libc::EINVAL) => TapError::NotATap(name),
        Some(libc::EBUSY | libc::E2BIG) => TapError::Busy(name),
        _ => TapError::Io {
            name,
            step: "attaching a queue",
            source,
        },
    }
}
