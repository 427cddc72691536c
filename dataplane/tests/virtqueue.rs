//! The split virtqueue against `virtio-queue`, the reference implementation of the rust-vmm
//! project, on random rings; against noise; and past ten wraps of its indexes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bulkhead_dataplane::memory::{GuestBuffer, GuestMemory, anonymous};
use bulkhead_dataplane::virtqueue::{Chain, QueueFeatures, RingError, SplitQueue};
use bulkhead_dataplane::worker::message::RingLayout;
use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 16;
const DESC: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const TABLE: u64 = 0x1000;
const MEMORY_BYTES: u64 = 0x1_0000;
const RINGS: RingLayout = RingLayout {
    size: SIZE,
    desc: DESC,
    avail: AVAIL,
    used: USED,
};
const INDIRECT: QueueFeatures = QueueFeatures {
    packed: false,
    event_idx: false,
    indirect: true,
    in_order: false,
};

/// A descriptor, before it is written down.
#[derive(Debug, Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = self.addr.to_le_bytes().to_vec();
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}

/// The same memory twice: for us, and for the reference.
struct Pair {
    ours: Arc<GuestMemory>,
    file: File,
    theirs: GuestMemoryMmap,
}

impl Pair {
    fn new() -> Self {
        let (memory, fd) = anonymous(MEMORY_BYTES).expect("memory");
        let length = usize::try_from(MEMORY_BYTES).expect("small");
        let theirs = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), length)]).expect("memory");
        let pair = Self {
            ours: Arc::new(memory),
            file: fd.into(),
            theirs,
        };
        // Every byte tells where it is.
        let pattern: Vec<u8> = (0..length)
            .map(|i| u8::try_from(i * 31 % 251).expect("small"))
            .collect();
        pair.write(0x2000, &pattern[0x2000..]);
        pair
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("write");
        self.theirs
            .write_slice(bytes, GuestAddress(at))
            .expect("write");
    }

    fn queue(&self, features: QueueFeatures) -> SplitQueue {
        SplitQueue::new(&self.ours, RINGS, 0, features).expect("the rings lie in memory")
    }

    /// What the reference makes of the first available chain: bytes of both directions.
    fn reference(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut queue = Queue::new(SIZE).ok()?;
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(DESC)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(USED)).ok()?;
        queue.set_ready(true);
        let chain = queue.iter(&self.theirs).ok()?.next()?;
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for desc in chain {
            let mut bytes = vec![0; desc.len() as usize];
            self.theirs.read_slice(&mut bytes, desc.addr()).ok()?;
            let into = if desc.is_write_only() {
                &mut writable
            } else {
                &mut readable
            };
            into.extend(bytes);
        }
        Some((readable, writable))
    }
}

fn bytes_of(buffer: &GuestBuffer) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(buffer.bytes()).expect("small")];
    assert!(buffer.copy_out(0, &mut bytes));
    bytes
}

/// Buffers of a good chain: address, length, device-writable.
fn buffers() -> impl Strategy<Value = Vec<(u64, u32, bool)>> {
    let one = (0x2000..0xe000u64, 1..0x1000u32);
    (
        proptest::collection::vec(one.clone(), 0..6),
        proptest::collection::vec(one, 0..6),
    )
        .prop_filter("a chain has a descriptor", |(r, w)| {
            !(r.is_empty() && w.is_empty())
        })
        .prop_map(|(r, w)| {
            let readable = r.into_iter().map(|(at, len)| (at, len, false));
            let writable = w.into_iter().map(|(at, len)| (at, len, true));
            readable.chain(writable).collect()
        })
}

/// Writes the descriptors of a chain to a table, at the given places, linked.
fn link(buffers: &[(u64, u32, bool)], places: &[u16]) -> Vec<(u16, Desc)> {
    let last = buffers.len() - 1;
    buffers
        .iter()
        .enumerate()
        .map(|(i, &(addr, len, write))| {
            let next = if i == last { 0 } else { places[i + 1] };
            let flags = u16::from(i != last) | (u16::from(write) << 1);
            (
                places[i],
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            )
        })
        .collect()
}

fn offer(pair: &Pair, head: u16) {
    pair.write(AVAIL + 4, &head.to_le_bytes());
    pair.write(AVAIL + 2, &1u16.to_le_bytes());
}

fn put(pair: &Pair, table: u64, descs: &[(u16, Desc)]) {
    for (place, desc) in descs {
        pair.write(table + u64::from(*place) * 16, &desc.bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// A good chain, in the ring or in a table, is what the reference says it is.
    #[test]
    fn good_chains_are_read_as_the_reference_reads_them(
        buffers in buffers(),
        places in Just((0..SIZE).collect::<Vec<u16>>()).prop_shuffle(),
        indirect in any::<bool>(),
    ) {
        let pair = Pair::new();
        if indirect {
            let places: Vec<u16> = (0..SIZE).collect();
            let count = u32::try_from(buffers.len()).expect("few");
            put(&pair, TABLE, &link(&buffers, &places));
            let table = Desc { addr: TABLE, len: count * 16, flags: 4, next: 0 };
            put(&pair, DESC, &[(places[3], table)]);
            offer(&pair, places[3]);
        } else {
            put(&pair, DESC, &link(&buffers, &places));
            offer(&pair, places[0]);
        }
        let mut chain = Chain::default();
        let head = pair.queue(INDIRECT).pop(&mut chain).expect("a good ring");
        prop_assert!(head.is_some());
        let reference = pair.reference().expect("the reference takes it");
        prop_assert_eq!(bytes_of(&chain.readable), reference.0);
        prop_assert_eq!(bytes_of(&chain.writable), reference.1);
    }

    /// A chain with one descriptor spoilt: refused, or read as the reference reads it.
    #[test]
    fn spoilt_chains_are_refused_or_the_same(
        buffers in buffers(),
        which in any::<prop::sample::Index>(),
        spoil in (0..5u8, any::<u64>()),
    ) {
        let pair = Pair::new();
        let places: Vec<u16> = (0..SIZE).collect();
        let mut descs = link(&buffers, &places);
        let desc = &mut which.get_mut(&mut descs).1;
        let value = spoil.1;
        match spoil.0 {
            0 => desc.addr = value,
            1 => desc.len = (value & 0xffff_ffff) as u32,
            2 => desc.flags = (value & 7) as u16,
            3 => desc.next = (value & 0x1f) as u16,
            _ => desc.addr = MEMORY_BYTES - (value & 0xfff),
        }
        put(&pair, DESC, &descs);
        offer(&pair, places[0]);
        let mut chain = Chain::default();
        let ours = pair.queue(INDIRECT).pop(&mut chain);
        if let Ok(Some(_)) = ours {
            let (readable, writable) = (bytes_of(&chain.readable), bytes_of(&chain.writable));
            if let Some(reference) = pair.reference() {
                prop_assert_eq!(readable, reference.0);
                prop_assert_eq!(writable, reference.1);
            }
        }
    }

    /// Noise everywhere: an error or a chain inside memory, never more chains than were offered.
    #[test]
    fn noise_is_survived(
        noise in proptest::collection::vec(any::<u8>(), 0x2000),
        event_idx in any::<bool>(),
        base in any::<u16>(),
    ) {
        let (memory, fd) = anonymous(MEMORY_BYTES).expect("memory");
        let file: File = fd.into();
        file.write_all_at(&noise, 0).expect("write");
        let features = QueueFeatures { event_idx, ..INDIRECT };
        let memory = Arc::new(memory);
        let mut queue = SplitQueue::new(&memory, RINGS, base, features).expect("rings");
        let mut chain = Chain::default();
        for _ in 0..SIZE {
            match queue.pop(&mut chain) {
                Ok(Some(head)) => {
                    bytes_of(&chain.readable);
                    queue.push_used(head, 1);
                    queue.publish();
                }
                Ok(None) | Err(_) => break,
            }
        }
        let _ = queue.arm();
    }
}

/// One-descriptor requests in batches of every size, past ten wraps of both indexes, with a
/// driver that counts its calls as the specification has them.
#[test]
fn indexes_wrap_at_every_batch_size() {
    for event_idx in [false, true] {
        let pair = Pair::new();
        let features = QueueFeatures {
            event_idx,
            ..QueueFeatures::default()
        };
        let mut queue = pair.queue(features);
        for place in 0..SIZE {
            let desc = Desc {
                addr: 0x2000,
                len: 512,
                flags: 2,
                next: 0,
            };
            put(&pair, DESC, &[(place, desc)]);
        }
        let mut chain = Chain::default();
        let (mut index, mut requests) = (0u16, 0u32);
        while requests < 655_360 {
            let batch = 1 + u16::try_from(requests % u32::from(SIZE)).expect("small");
            // The driver asks to be called after the whole batch.
            let event = index.wrapping_add(batch - 1);
            let field = AVAIL + 4 + 2 * u64::from(SIZE);
            pair.file
                .write_all_at(&event.to_le_bytes(), field)
                .expect("event");
            for i in 0..batch {
                let slot = u64::from(index.wrapping_add(i) % SIZE);
                let at = AVAIL + 4 + 2 * slot;
                pair.file.write_all_at(&i.to_le_bytes(), at).expect("ring");
            }
            index = index.wrapping_add(batch);
            pair.file
                .write_all_at(&index.to_le_bytes(), AVAIL + 2)
                .expect("index");
            for i in 0..batch {
                // Some are taken and put back first: they are the next ones again.
                let ahead = (batch - i).min(batch % 5);
                for next in i..i + ahead {
                    assert_eq!(queue.pop(&mut chain), Ok(Some(next)));
                }
                for next in (i..i + ahead).rev() {
                    queue.unpop(next);
                }
                let head = queue.pop(&mut chain).expect("good").expect("offered");
                assert_eq!(head, i);
                queue.push_used(head, u32::from(i));
            }
            assert!(queue.pop(&mut chain).expect("good").is_none());
            assert!(queue.publish(), "the driver asked for this call");
            assert!(!queue.publish(), "nothing is new");
            let mut used = [0; 2];
            pair.file.read_exact_at(&mut used, USED + 2).expect("used");
            assert_eq!(u16::from_le_bytes(used), index);
            requests += u32::from(batch);
        }
    }
}

#[test]
fn a_head_in_flight_is_not_taken_twice() {
    let pair = Pair::new();
    let desc = Desc {
        addr: 0x2000,
        len: 1,
        flags: 2,
        next: 0,
    };
    put(&pair, DESC, &[(3, desc)]);
    pair.write(AVAIL + 4, &[3, 0, 3, 0]);
    pair.write(AVAIL + 2, &2u16.to_le_bytes());
    let mut queue = pair.queue(INDIRECT);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(Some(3)));
    assert_eq!(queue.pop(&mut chain), Err(RingError::HeadInFlight(3)));
    queue.push_used(3, 0);
    assert_eq!(queue.pop(&mut chain), Ok(Some(3)));
}

#[test]
fn places_and_sizes_that_can_not_be_are_refused() {
    let (memory, _fd) = anonymous(MEMORY_BYTES).expect("memory");
    let memory = Arc::new(memory);
    let refused = |layout: RingLayout| SplitQueue::new(&memory, layout, 0, INDIRECT).is_err();
    assert!(!refused(RINGS));
    for size in [0, 3, 100, 0xffff] {
        assert!(refused(RingLayout { size, ..RINGS }), "{size}");
    }
    for wrong in [8, MEMORY_BYTES - 16, MEMORY_BYTES, u64::MAX - 15] {
        assert!(
            refused(RingLayout {
                desc: wrong,
                ..RINGS
            }),
            "{wrong:#x}"
        );
    }
    for wrong in [1, MEMORY_BYTES - 4, u64::MAX - 1] {
        assert!(
            refused(RingLayout {
                avail: wrong,
                ..RINGS
            }),
            "{wrong:#x}"
        );
    }
    for wrong in [2, MEMORY_BYTES - 8, u64::MAX - 3] {
        assert!(
            refused(RingLayout {
                used: wrong,
                ..RINGS
            }),
            "{wrong:#x}"
        );
    }
}

/// Entries that are read ahead are used as they were read: what the driver writes there afterwards is for the
/// next time around.
#[test]
fn an_avail_entry_is_read_once() {
    let pair = Pair::new();
    for place in 0..SIZE {
        let desc = Desc {
            addr: 0x2000,
            len: 1,
            flags: 2,
            next: 0,
        };
        put(&pair, DESC, &[(place, desc)]);
    }
    pair.write(AVAIL + 4, &[3, 0, 5, 0]);
    pair.write(AVAIL + 2, &2u16.to_le_bytes());
    let mut queue = pair.queue(INDIRECT);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(Some(3)));
    pair.write(AVAIL + 6, &[7, 0, 9, 0]);
    pair.write(AVAIL + 2, &3u16.to_le_bytes());
    assert_eq!(queue.pop(&mut chain), Ok(Some(5)));
    assert_eq!(queue.pop(&mut chain), Ok(Some(9)));
    assert_eq!(queue.pop(&mut chain), Ok(None));
}

/// A chain that was put back is read anew: a driver gains nothing by changing it. Nor by an index that can't be.
#[test]
fn what_was_put_back_is_read_anew() {
    let pair = Pair::new();
    for place in 0..SIZE {
        let desc = Desc {
            addr: 0x2000,
            len: 1,
            flags: 2,
            next: 0,
        };
        put(&pair, DESC, &[(place, desc)]);
    }
    pair.write(AVAIL + 4, &[3, 0, 5, 0]);
    pair.write(AVAIL + 2, &2u16.to_le_bytes());
    let mut queue = pair.queue(INDIRECT);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(Some(3)));
    assert_eq!(queue.pop(&mut chain), Ok(Some(5)));
    queue.unpop(5);
    assert_eq!(queue.in_flight(), 1);
    pair.write(AVAIL + 6, &[7, 0]);
    assert_eq!(queue.pop(&mut chain), Ok(Some(7)));
    queue.unpop(7);
    queue.unpop(3);
    assert_eq!((queue.in_flight(), queue.next_avail()), (0, 0));
    // Behind what is known already: as many as the queue has, and one more.
    pair.write(AVAIL + 2, &(SIZE + 3).to_le_bytes());
    assert_eq!(queue.pop(&mut chain), Ok(Some(3)));
    assert_eq!(queue.pop(&mut chain), Ok(Some(7)));
    assert!(matches!(
        queue.pop(&mut chain),
        Err(RingError::IndexJump { expected: 2, .. })
    ));
}

/// A head outside the table breaks the ring in its turn, not when it is read ahead.
#[test]
fn what_comes_before_a_head_that_can_not_be_is_taken() {
    let pair = Pair::new();
    let desc = Desc {
        addr: 0x2000,
        len: 1,
        flags: 2,
        next: 0,
    };
    put(&pair, DESC, &[(3, desc)]);
    pair.write(AVAIL + 4, &[3, 0, 0xff, 0xff]);
    pair.write(AVAIL + 2, &2u16.to_le_bytes());
    let mut queue = pair.queue(INDIRECT);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(Some(3)));
    let outside = RingError::OutOfTable {
        index: 0xffff,
        size: u32::from(SIZE),
    };
    for _ in 0..2 {
        assert_eq!(queue.pop(&mut chain), Err(outside));
    }
}
