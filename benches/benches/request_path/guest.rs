//! The other side: a driver with prepared requests, in memory that device and driver map apart.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_dataplane::memory::{GuestMemory, anonymous};
use bulkhead_dataplane::worker::message::RingLayout;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vm_memory::{
    Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

/// Requests that are available at once.
pub const BATCH: u16 = 32;
pub const RING_SIZE: u16 = 128;
const MEMORY_BYTES: u64 = 8 << 20;

pub const DESC: u64 = 0;
pub const AVAIL: u64 = 0x1000;
pub const USED: u64 = 0x2000;
const HEADERS: u64 = 0x4000;
const STATUS: u64 = 0x8000;
const DATA: u64 = 0x10_0000;

/// A driver with [`BATCH`] prepared requests, and its guest's memory from both sides.
pub struct Guest {
    pub device_side: Arc<GuestMemory>,
    pub memory: GuestMemoryMmap,
    pub avail: u16,
}

impl Guest {
    /// Requests of so many bytes each, one after the other on the disk; at most 128 KiB.
    pub fn new(kind: u32, request_bytes: u32) -> Self {
        let (device_side, fd) = anonymous(MEMORY_BYTES).unwrap();
        let file = FileOffset::new(File::from(fd), 0);
        let region = MmapRegion::from_file(file, usize::try_from(MEMORY_BYTES).unwrap()).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let guest = Self {
            device_side: Arc::new(device_side),
            memory: GuestMemoryMmap::from_regions(vec![region]).unwrap(),
            avail: 0,
        };
        for request in 0..BATCH {
            guest.prepare(request, kind, request_bytes);
        }
        for slot in 0..RING_SIZE {
            let head = slot % BATCH * 3;
            guest.write(AVAIL + 4 + u64::from(slot) * 2, &head.to_le_bytes());
        }
        guest
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn prepare(&self, request: u16, kind: u32, request_bytes: u32) {
        let at = u64::from(request);
        let sector = at * u64::from(request_bytes) / 512;
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.write(HEADERS + at * 16, &header);
        let (next, writable) = (1u16, 2u16);
        let data = next | if kind == VIRTIO_BLK_T_IN { writable } else { 0 };
        let head = request * 3;
        self.describe(head, HEADERS + at * 16, 16, next);
        self.describe(
            head + 1,
            DATA + at * u64::from(request_bytes),
            request_bytes,
            data,
        );
        self.describe(head + 2, STATUS + at, 1, writable);
    }

    fn describe(&self, index: u16, addr: u64, len: u32, flags: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend((index + 1).to_le_bytes());
        self.write(DESC + u64::from(index) * 16, &bytes);
    }

    /// Makes so many more requests available.
    pub fn offer(&mut self, requests: u16) {
        self.avail = self.avail.wrapping_add(requests);
        let index = GuestAddress(AVAIL + 2);
        self.memory
            .store(self.avail, index, Ordering::Release)
            .unwrap();
    }

    pub fn used(&self) -> u16 {
        let index = GuestAddress(USED + 2);
        self.memory.load(index, Ordering::Acquire).unwrap()
    }

    /// All requests offered must have been used, and have succeeded where `statuses` says so.
    pub fn check(&self, statuses: bool) {
        assert_eq!(self.used(), self.avail, "requests are missing");
        let mut bytes = [0; BATCH as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(STATUS))
            .unwrap();
        assert!(
            !statuses || bytes == [0; BATCH as usize],
            "a request failed"
        );
    }

    pub fn layout() -> RingLayout {
        RingLayout {
            size: RING_SIZE,
            desc: DESC,
            avail: AVAIL,
            used: USED,
        }
    }
}
