//! What holds of a queue in either ring format: which pages of its ring are marked in the dirty log, and
//! that a stop of a queue whose driver broke it comes to an end, in order or not.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_dataplane::memory::{DirtyLog, GuestMemory, SharedArea, anonymous};
use bulkhead_dataplane::virtqueue::{Chain, QueueFeatures, RingError, Virtqueue};
use bulkhead_dataplane::worker::message::RingLayout;
use nix::sys::memfd::{MFdFlags, memfd_create};

const SIZE: u16 = 8;
/// Descriptors, avail ring, used ring and data lie on pages of their own.
const LAYOUT: RingLayout = RingLayout {
    size: SIZE,
    desc: 0x1000,
    avail: 0x2000,
    used: 0x3000,
};
const DATA: u64 = 0x4000;
const MEMORY_BYTES: u64 = 0x8000;

struct Rig {
    queue: Virtqueue,
    guest: File,
    log: File,
    packed: bool,
    event_idx: bool,
    offered: u16,
}

impl Rig {
    fn new(features: QueueFeatures) -> Self {
        let (memory, fd) = anonymous(MEMORY_BYTES).expect("memory");
        let area = memfd_create("log", MFdFlags::MFD_CLOEXEC).expect("memfd");
        nix::unistd::ftruncate(&area, 8).expect("length");
        let log = Arc::new(DirtyLog::default());
        log.set_area(Some(SharedArea::map(area.as_fd(), 0, 8).expect("mapped")));
        log.enable(true);
        let memory: Arc<GuestMemory> = Arc::new(memory.with_log(&log));
        let base = if features.packed { 0x8000_8000 } else { 0 };
        Self {
            queue: Virtqueue::new(&memory, LAYOUT, base, features).expect("a queue"),
            guest: fd.into(),
            log: area.into(),
            packed: features.packed,
            event_idx: features.event_idx,
            offered: 0,
        }
    }

    /// One request of eight writable bytes, with this head.
    fn offer(&mut self, head: u16) {
        let mut bytes = (DATA + 8 * u64::from(head)).to_le_bytes().to_vec();
        bytes.extend(8u32.to_le_bytes());
        let write = |at: u64, bytes: &[u8]| self.guest.write_all_at(bytes, at).expect("write");
        if self.packed {
            bytes.extend(head.to_le_bytes());
            bytes.extend((2u16 | 1 << 7).to_le_bytes());
            write(LAYOUT.desc + 16 * u64::from(self.offered), &bytes);
            self.offered += 1;
        } else {
            bytes.extend([2, 0, 0, 0]);
            write(LAYOUT.desc + 16 * u64::from(head), &bytes);
            let slot = LAYOUT.avail + 4 + 2 * u64::from(self.offered);
            write(slot, &head.to_le_bytes());
            self.offered += 1;
            write(LAYOUT.avail + 2, &self.offered.to_le_bytes());
        }
    }

    fn take(&mut self) -> u16 {
        let taken = self.queue.pop(&mut Chain::default()).expect("good");
        taken.expect("there is one")
    }

    /// The driver's wish: a call when the first request is used.
    fn wants_call_for_first(&self) {
        let write = |at: u64, bytes: &[u8]| self.guest.write_all_at(bytes, at).expect("write");
        if self.packed {
            let flags: u16 = if self.event_idx { 2 } else { 0 };
            write(LAYOUT.avail, &0x8000u16.to_le_bytes());
            write(LAYOUT.avail + 2, &flags.to_le_bytes());
        } else {
            write(LAYOUT.avail + 4 + 2 * u64::from(SIZE), &0u16.to_le_bytes());
        }
    }

    /// Requests that the driver sees as used, of as many descriptors in the ring's first turn.
    fn shown(&self) -> u16 {
        let half = |at: u64| {
            let mut bytes = [0; 2];
            self.guest.read_exact_at(&mut bytes, at).expect("read");
            u16::from_le_bytes(bytes)
        };
        if !self.packed {
            return half(LAYOUT.used + 2);
        }
        let used = |place: &u16| half(LAYOUT.desc + 16 * u64::from(*place) + 14) & 0x8080 == 0x8080;
        (0..SIZE).take_while(used).count().try_into().expect("few")
    }

    /// Marked pages; the log is empty afterwards.
    fn marked(&self) -> Vec<u32> {
        let mut bytes = [0; 8];
        self.log.read_exact_at(&mut bytes, 0).expect("read");
        self.log.write_all_at(&[0; 8], 0).expect("clear");
        let bits = u64::from_le_bytes(bytes);
        (0..64).filter(|page| bits & (1 << page) != 0).collect()
    }
}

fn both(f: impl Fn(QueueFeatures)) {
    for packed in [false, true] {
        for event_idx in [false, true] {
            f(QueueFeatures {
                packed,
                event_idx,
                indirect: false,
                in_order: false,
            });
        }
    }
}

#[test]
fn the_pages_of_the_ring_that_are_written_are_marked() {
    both(|features| {
        let mut rig = Rig::new(features);
        rig.queue.set_log(Some(LAYOUT.used));
        rig.marked();
        // Used descriptors are written over available ones in a packed ring.
        let ring = if features.packed { 1 } else { 3 };
        for head in [0, 1] {
            rig.offer(head);
            rig.take();
        }
        assert_eq!(rig.marked(), [0u32; 0], "{features:?}");
        rig.queue.push_used(0, 1);
        rig.queue.push_used(1, 1);
        rig.queue.publish();
        assert_eq!(rig.marked(), [ring], "{features:?}");
        rig.queue.arm().expect("good");
        assert_eq!(rig.marked(), [3], "{features:?}: how it wants to be kicked");
        rig.queue.disarm();
        let quiet: &[u32] = if features.packed || !features.event_idx {
            &[3]
        } else {
            &[]
        };
        assert_eq!(rig.marked(), quiet, "{features:?}");
        rig.queue.set_log(None);
        rig.offer(2);
        rig.take();
        rig.queue.push_used(2, 1);
        rig.queue.publish();
        rig.queue.arm().expect("good");
        assert_eq!(
            rig.marked(),
            [0u32; 0],
            "{features:?}: no marks were wanted"
        );
    });
}

#[test]
fn nothing_stays_in_flight_when_a_chain_is_given_up() {
    both(|features| {
        for in_order in [false, true] {
            let mut rig = Rig::new(QueueFeatures {
                in_order,
                ..features
            });
            for head in 0..4 {
                rig.offer(head);
                assert_eq!(rig.take(), head);
            }
            // The third ends early; the second never can; the fourth and the first end late.
            rig.queue.push_used(2, 1);
            rig.queue.abandon(1);
            assert_eq!(
                rig.queue.in_flight(),
                2,
                "{features:?}, in order: {in_order}"
            );
            rig.queue.push_used(3, 1);
            rig.queue.push_used(0, 1);
            assert_eq!(
                rig.queue.in_flight(),
                0,
                "{features:?}, in order: {in_order}"
            );
        }
    });
}

#[test]
fn a_split_queue_goes_on_at_sixteen_bits_only() {
    let (memory, _fd) = anonymous(MEMORY_BYTES).expect("memory");
    let memory = Arc::new(memory);
    let queue = |base| Virtqueue::new(&memory, LAYOUT, base, QueueFeatures::default());
    assert_eq!(queue(0xffff).expect("a queue").base(), 0xffff);
    assert!(matches!(queue(0x1_0000), Err(RingError::Base { .. })));
}

/// Within a batch the driver sees what ended, and is called at the end for the whole of it.
#[test]
fn what_is_shown_early_counts_for_the_call_at_the_end() {
    both(|features| {
        let mut rig = Rig::new(features);
        // The driver wants to be called for the first request.
        rig.wants_call_for_first();
        for head in [3, 1, 2] {
            rig.offer(head);
        }
        let heads = [rig.take(), rig.take(), rig.take()];
        assert_eq!(rig.shown(), 0);
        rig.queue.push_used(heads[0], 1);
        assert_eq!(rig.shown(), 0, "not before it is shown");
        rig.queue.push_used(heads[1], 1);
        rig.queue.show();
        assert_eq!(rig.shown(), 2);
        rig.queue.show();
        rig.queue.push_used(heads[2], 1);
        assert_eq!(rig.shown(), 2);
        assert!(rig.queue.publish(), "{features:?}: it wants to be called");
        assert_eq!(rig.shown(), 3);
        assert!(!rig.queue.publish(), "nothing is new");
    });
}
