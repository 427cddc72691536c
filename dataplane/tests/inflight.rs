//! The in-flight region (vhost-user, "Inflight I/O tracking"): at any moment, what the specification's
//! recovery makes of it is exactly what was taken and is not shown as used, in the order in which it was
//! taken. The recovery is written here from the specification, as slowly as it says.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_dataplane::memory::{GuestMemory, SharedArea, anonymous};
use bulkhead_dataplane::virtqueue::{Chain, Format, QueueFeatures, QueueRegion, Virtqueue};
use bulkhead_dataplane::worker::message::RingLayout;
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

const SIZE: u16 = 8;
const ENTRIES: u16 = 16;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const DATA: u64 = 0x3000;
/// The region that is looked at is the second.
const INDEX: u16 = 1;

const PACKED_AVAIL: u16 = 1 << 7;
const PACKED_USED: u16 = 1 << 15;

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// A queue with a region, and a driver of the simplest kind.
struct Rig {
    queue: Virtqueue,
    guest: File,
    region: File,
    packed: bool,
    avail: u16,
    used_seen: u16,
    free: Vec<u16>,
    /// What was taken and is not shown, in order.
    in_flight: Vec<u16>,
    /// Of these, what ended.
    ended: Vec<u16>,
}

fn memory() -> (Arc<GuestMemory>, File) {
    let (memory, fd) = anonymous(0x1_0000).expect("memory");
    (Arc::new(memory), fd.into())
}

fn region(format: Format) -> (QueueRegion, File) {
    let bytes = format.region_bytes(ENTRIES) * 2;
    let fd = memfd_create("inflight", MFdFlags::MFD_CLOEXEC).expect("memfd");
    let file = File::from(fd);
    // What was there before means nothing, but for the version that says so.
    let mut noise = vec![0xa5; usize::try_from(bytes).expect("small")];
    let version =
        usize::try_from(format.region_bytes(ENTRIES) * u64::from(INDEX)).expect("small") + 8;
    noise[version..version + 2].fill(0);
    file.write_all_at(&noise, 0).expect("write");
    let area = SharedArea::map(file.as_fd(), 0, bytes).expect("mapped");
    let region = QueueRegion::new(&Arc::new(area), format, INDEX, ENTRIES).expect("it fits");
    (region, file)
}

impl Rig {
    fn new(packed: bool, in_order: bool) -> Self {
        let features = QueueFeatures {
            packed,
            in_order,
            ..QueueFeatures::default()
        };
        let (memory, guest) = memory();
        let layout = RingLayout {
            size: SIZE,
            desc: 0,
            avail: AVAIL,
            used: USED,
        };
        let base = if packed { 0x8000_8000 } else { 0 };
        let mut queue = Virtqueue::new(&memory, layout, base, features).expect("a queue");
        let (region, file) = region(features.format());
        queue.track(region).expect("long enough");
        Self {
            queue,
            guest,
            region: file,
            packed,
            avail: 0,
            used_seen: 0,
            free: (0..SIZE).collect(),
            in_flight: Vec::new(),
            ended: Vec::new(),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.guest.write_all_at(bytes, at).expect("guest memory");
    }

    /// Offers one descriptor, and has it taken.
    fn take(&mut self, which: usize) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.remove(which % self.free.len());
        let mut bytes = (DATA + 64 * u64::from(head)).to_le_bytes().to_vec();
        bytes.extend(64u32.to_le_bytes());
        if self.packed {
            let wrap = (self.avail / SIZE).is_multiple_of(2);
            bytes.extend(head.to_le_bytes());
            bytes.extend((2 | if wrap { PACKED_AVAIL } else { PACKED_USED }).to_le_bytes());
            self.write(u64::from(self.avail % SIZE) * 16, &bytes);
            self.avail += 1;
        } else {
            bytes.extend([2, 0, 0, 0]);
            self.write(u64::from(head) * 16, &bytes);
            self.write(
                AVAIL + 4 + 2 * u64::from(self.avail % SIZE),
                &head.to_le_bytes(),
            );
            self.avail += 1;
            self.write(AVAIL + 2, &self.avail.to_le_bytes());
        }
        let taken = self.queue.pop(&mut Chain::default()).expect("good");
        assert_eq!(taken, Some(head));
        self.in_flight.push(head);
    }

    fn end(&mut self, which: usize) {
        let open = |head: &&u16| !self.ended.contains(head);
        let left: Vec<u16> = self.in_flight.iter().filter(open).copied().collect();
        if left.is_empty() {
            return;
        }
        let head = left[which % left.len()];
        self.queue.push_used(head, 1);
        self.ended.push(head);
    }

    /// Publishes; the driver takes what it sees.
    fn publish(&mut self) {
        self.queue.publish();
        while let Some(head) = self.next_used() {
            self.in_flight.retain(|h| *h != head);
            self.ended.retain(|h| *h != head);
            self.free.push(head);
            self.used_seen += 1;
        }
    }

    fn next_used(&self) -> Option<u16> {
        let mut ring = vec![0; 0x1000];
        if self.packed {
            self.guest
                .read_exact_at(&mut ring, 0)
                .expect("guest memory");
            let at = usize::from(self.used_seen % SIZE) * 16;
            let wrap = (self.used_seen / SIZE).is_multiple_of(2);
            let flags = half(&ring, at + 14);
            let both = (flags & PACKED_AVAIL != 0, flags & PACKED_USED != 0);
            (both == (wrap, wrap)).then(|| half(&ring, at + 12))
        } else {
            self.guest
                .read_exact_at(&mut ring, USED)
                .expect("guest memory");
            let at = 4 + usize::from(self.used_seen % SIZE) * 8;
            (half(&ring, 2) != self.used_seen).then(|| half(&ring, at))
        }
    }

    fn region_bytes(&self) -> Vec<u8> {
        let format = if self.packed {
            Format::Packed
        } else {
            Format::Split
        };
        let stride = format.region_bytes(ENTRIES);
        let mut bytes = vec![0; usize::try_from(stride).expect("small")];
        let at = stride * u64::from(INDEX);
        self.region.read_exact_at(&mut bytes, at).expect("region");
        bytes
    }

    fn ring_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 0x3000];
        self.guest
            .read_exact_at(&mut bytes, 0)
            .expect("guest memory");
        bytes
    }

    fn recovered(&self) -> Vec<u16> {
        let (region, ring) = (self.region_bytes(), self.ring_bytes());
        if self.packed {
            recover_packed(&region, &ring)
        } else {
            recover_split(&region, &ring)
        }
    }
}

/// "When reconnecting", for split virtqueues.
fn recover_split(region: &[u8], ring: &[u8]) -> Vec<u16> {
    assert_eq!(
        (long(region, 0), half(region, 8), half(region, 10)),
        (0, 1, SIZE)
    );
    let mut inflight: Vec<bool> = (0..SIZE)
        .map(|i| region[16 + 16 * usize::from(i)] == 1)
        .collect();
    let used_idx = half(ring, usize::try_from(USED).expect("small") + 2);
    let mut head = usize::from(half(region, 12));
    for _ in 0..used_idx.wrapping_sub(half(region, 14)) {
        inflight[head] = false;
        head = usize::from(half(region, 16 + 16 * head + 6));
    }
    let mut left: Vec<(u64, u16)> = (0..SIZE)
        .filter(|i| inflight[usize::from(*i)])
        .map(|i| (long(region, 16 + 16 * usize::from(i) + 8), i))
        .collect();
    left.sort_unstable();
    left.into_iter().map(|(_, head)| head).collect()
}

/// "When reconnecting", for packed virtqueues; what is resubmitted has to be whole.
fn recover_packed(region: &[u8], ring: &[u8]) -> Vec<u16> {
    assert_eq!(
        (long(region, 0), half(region, 8), half(region, 10)),
        (0, 1, SIZE)
    );
    let (mut free_head, old_free_head) = (half(region, 12), half(region, 14));
    let (used_idx, old_used_idx) = (half(region, 16), half(region, 18));
    let old_wrap = region[21] == 1;
    let mut old = old_free_head;
    if used_idx != old_used_idx {
        let flags = half(ring, usize::from(old_used_idx) * 16 + 14);
        let available =
            (flags & PACKED_AVAIL != 0) == old_wrap && (flags & PACKED_USED != 0) != old_wrap;
        if !available {
            old = free_head;
        }
    }
    free_head = old;
    let entry = |index: u16| &region[32 + 32 * usize::from(index)..][..32];
    let mut inflight: Vec<bool> = (0..SIZE).map(|i| entry(i)[0] == 1).collect();
    let mut at = free_head;
    for _ in 0..SIZE {
        if at >= SIZE {
            break;
        }
        inflight[usize::from(at)] = false;
        at = half(entry(at), 2);
    }
    let mut left: Vec<(u64, u16)> = Vec::new();
    for first in (0..SIZE).filter(|i| inflight[usize::from(*i)]) {
        let state = entry(first);
        assert_eq!(
            (half(state, 4), half(state, 6)),
            (first, 1),
            "one descriptor each"
        );
        let id = half(state, 16);
        assert_eq!(long(state, 24), DATA + 64 * u64::from(id), "its address");
        assert_eq!(u32::from_le_bytes(state[20..24].try_into().expect("4")), 64);
        left.push((long(state, 8), id));
    }
    left.sort_unstable();
    left.into_iter().map(|(_, id)| id).collect()
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Take(usize),
    End(usize),
    Publish,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => any::<usize>().prop_map(Step::Take),
        3 => any::<usize>().prop_map(Step::End),
        2 => Just(Step::Publish),
    ];
    proptest::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_in_flight_is_found_at_any_moment(
        packed in any::<bool>(),
        in_order in any::<bool>(),
        steps in steps(),
    ) {
        let mut rig = Rig::new(packed, in_order);
        prop_assert_eq!(rig.recovered(), [0u16; 0]);
        for step in steps {
            match step {
                Step::Take(which) => rig.take(which),
                Step::End(which) => rig.end(which),
                Step::Publish => {
                    let before = rig.region_bytes();
                    rig.publish();
                    if !packed {
                        // As if the process had died when the ring was written and the region was not.
                        let recovered = recover_split(&before, &rig.ring_bytes());
                        prop_assert_eq!(recovered, rig.in_flight.clone());
                    }
                }
            }
            prop_assert_eq!(rig.recovered(), rig.in_flight.clone());
        }
    }
}

#[test]
fn only_the_queue_s_own_region_is_written() {
    for packed in [false, true] {
        let mut rig = Rig::new(packed, false);
        rig.take(0);
        let format = if packed {
            Format::Packed
        } else {
            Format::Split
        };
        let stride = format.region_bytes(ENTRIES);
        let mut other = vec![0; usize::try_from(stride).expect("small")];
        rig.region.read_exact_at(&mut other, 0).expect("region");
        assert!(other.iter().all(|byte| *byte == 0xa5));
    }
}

#[test]
fn a_region_has_room_for_the_queue_or_is_refused() {
    let (memory, _guest) = memory();
    let layout = RingLayout {
        size: 32,
        desc: 0,
        avail: AVAIL,
        used: USED,
    };
    for (packed, base) in [(false, 0), (true, 0x8000_8000)] {
        let features = QueueFeatures {
            packed,
            ..QueueFeatures::default()
        };
        let mut queue = Virtqueue::new(&memory, layout, base, features).expect("a queue");
        assert!(queue.track(region(features.format()).0).is_err());
        let area = memfd_create("small", MFdFlags::MFD_CLOEXEC).expect("memfd");
        nix::unistd::ftruncate(&area, 4096).expect("length");
        let area = Arc::new(SharedArea::map(area.as_fd(), 0, 4096).expect("mapped"));
        assert!(QueueRegion::new(&area, features.format(), 0, 32).is_some());
        assert!(QueueRegion::new(&area, features.format(), 200, 32).is_none());
        assert!(QueueRegion::new(&area, features.format(), u16::MAX, 32768).is_none());
    }
}

#[test]
fn a_region_that_is_cut_off_is_noticed() {
    bulkhead_dataplane::memory::sigbus::install().expect("handler");
    for packed in [false, true] {
        let mut rig = Rig::new(packed, false);
        rig.take(0);
        assert!(!rig.queue.is_lost());
        rig.region.set_len(0).expect("cut");
        rig.end(0);
        rig.publish();
        assert!(rig.queue.is_lost());
    }
}
