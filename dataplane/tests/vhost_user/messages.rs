//! Messages of a frontend, byte by byte and as the session takes them; the specification's layouts are
//! written down here once more.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::vhost_user::message::{Header, Message};
use bulkhead_dataplane::vhost_user::{Facts, feature};
use bulkhead_dataplane::worker::message::DeviceId;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

/// Queues of the device.
pub const QUEUES: u16 = 2;
/// Bytes of the memory of [`table`].
pub const MEMORY_BYTES: u64 = 0x1_0000;
/// Frontend address of its first byte; its guest address is 0.
pub const USER: u64 = 0x7f00_0000_0000;
/// virtio features that a device of these tests has of its own.
pub const DEVICE_FEATURES: u64 = 1 << 9;
/// Its capacity.
pub const CAPACITY_SECTORS: u64 = 0x6b73_6964;
/// What a frontend negotiates that uses split rings and no log.
pub const SPLIT: u64 = feature::VERSION_1
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | DEVICE_FEATURES;

pub fn facts() -> Facts {
    let geometry = Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: [0; 20],
        queues: QUEUES,
        discard: false,
    };
    Facts {
        id: DeviceId(5),
        features: DEVICE_FEATURES,
        queues: QUEUES,
        device: BlkDevice::new(geometry, CAPACITY_SECTORS, StorageSpec::Null, None).into(),
    }
}

/// The disk of a session.
pub fn disk(facts: &Facts) -> &Arc<BlkDevice> {
    facts.device.blk().expect("a disk")
}

pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn bytes(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).expect("short");
    [halves(&[code, flags, size]), body.to_vec()].concat()
}

pub fn message(code: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Message {
    let header = Header {
        code,
        need_reply: true,
        body_bytes: u32::try_from(body.len()).expect("short"),
    };
    Message { header, body, fds }
}

pub fn event() -> OwnedFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
        .expect("eventfd")
        .as_fd()
        .try_clone_to_owned()
        .expect("dup")
}

pub fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("memory", MFdFlags::MFD_CLOEXEC).expect("memfd");
    ftruncate(&fd, i64::try_from(bytes).expect("fits")).expect("length");
    fd
}

/// SET_MEM_TABLE's body with regions of (guest address, bytes); the frontend has them from [`USER`] on,
/// and a file for each from its first byte.
pub fn table(regions: &[(u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).expect("few");
    let mut body = halves(&[count, 0]);
    for (guest, bytes) in regions {
        body.extend(words(&[*guest, *bytes, USER + guest, 0]));
    }
    body
}

/// ADD_MEM_REG's and REM_MEM_REG's body.
pub fn one_region(guest: u64, bytes: u64) -> Vec<u8> {
    words(&[0, guest, bytes, USER + guest, 0])
}

/// SET_VRING_ADDR's body: each queue has a page of its own in the first region.
pub fn addresses(index: u32) -> Vec<u8> {
    let base = USER + u64::from(index) * 0x1000;
    let mut body = halves(&[index, 0]);
    body.extend(words(&[base, base + 0x800, base + 0x400, 0]));
    body
}

/// SET_VRING_KICK's, _CALL's and _ERR's body.
pub fn with_fd(index: u64) -> Vec<u8> {
    words(&[index])
}

pub fn without_fd(index: u64) -> Vec<u8> {
    words(&[index | 0x100])
}

/// A body of GET_CONFIG and SET_CONFIG.
pub fn config(offset: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("short");
    [halves(&[offset, size, 0]), payload.to_vec()].concat()
}
