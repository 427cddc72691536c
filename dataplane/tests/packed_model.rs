//! The packed virtqueue against a slow device written from the specification: the same driver writes
//! the same rings for both, good ones and spoilt ones. What the model takes is taken as it takes
//! it, and every byte that either writes into its ring is the same.

use std::sync::Arc;

use bulkhead_dataplane::memory::{GuestBuffer, GuestMemory, RegionSpec};
use bulkhead_dataplane::virtqueue::{Chain, PackedQueue, QueueFeatures};
use bulkhead_dataplane::worker::message::RingLayout;
use bulkhead_integration::driver::desc::Desc;
use bulkhead_integration::driver::memory::GuestMemory as Shared;
use bulkhead_integration::driver::model::{Model, ModelChain};
use bulkhead_integration::driver::packed::advance;
use bulkhead_integration::driver::ring::{Format, Ring};
use bulkhead_integration::random::Random;

const BASE: u64 = 0x10_0000;
const TABLES: u64 = BASE + 0x1_0000;
const DATA: u64 = BASE + 0x2_0000;
const DATA_BYTES: u64 = 0x1_0000;
const MEMORY_BYTES: u64 = 0x4_0000;

/// A driver with its memory and ring.
struct Side {
    memory: Shared,
    ring: Ring,
}

impl Side {
    fn new(size: u16, event_idx: bool) -> Self {
        let memory = Shared::new(&[(BASE, MEMORY_BYTES, 0)]).expect("memory");
        // Every byte of the data tells where it is.
        let pattern: Vec<u8> = (0..DATA_BYTES)
            .map(|i| u8::try_from(i * 31 % 251).expect("small"))
            .collect();
        memory.write(DATA, &pattern).expect("inside");
        let mut ring = Ring::with_format(&memory, BASE, size, Format::Packed).expect("ring");
        ring.event_idx = event_idx;
        Self { memory, ring }
    }

    fn ring_bytes(&self) -> Vec<u8> {
        let len = 16 * usize::from(self.ring.size);
        self.memory.read(self.ring.desc, len).expect("inside")
    }
}

/// The same ring for the queue under test and for the model.
struct Pair {
    ours: Side,
    theirs: Side,
    queue: PackedQueue,
    model: Model,
}

impl Pair {
    fn new(size: u16, event_idx: bool) -> Self {
        let (ours, theirs) = (Side::new(size, event_idx), Side::new(size, event_idx));
        let region = &ours.memory.regions()[0];
        let spec = RegionSpec {
            guest_addr: BASE,
            bytes: MEMORY_BYTES,
            user_addr: region.entry().user_addr,
            file_offset: 0,
        };
        let mapped = GuestMemory::map(&[(spec, region.file())]).expect("mapped");
        let layout = RingLayout {
            size,
            desc: ours.ring.desc,
            avail: ours.ring.avail,
            used: ours.ring.used,
        };
        let features = QueueFeatures {
            packed: true,
            event_idx,
            indirect: true,
            in_order: false,
        };
        let queue = PackedQueue::new(&Arc::new(mapped), layout, ours.ring.base(), features);
        let ring = &theirs.ring;
        let mut model = Model::new(size, ring.desc, ring.avail, ring.used);
        model.event_idx = event_idx;
        // A queue that starts is polled.
        model.disarm(&theirs.memory).expect("inside");
        Self {
            queue: queue.expect("the ring lies in memory"),
            model,
            ours,
            theirs,
        }
    }

    /// Has both drivers do the same.
    fn both<T>(&mut self, act: impl Fn(&mut Side) -> T) -> T {
        act(&mut self.ours);
        act(&mut self.theirs)
    }

    fn write_event(&mut self, at: u16, flags: u16) {
        self.both(|side| {
            let event = side.ring.avail;
            side.memory.store_u16(event, at).expect("inside");
            side.memory.store_u16(event + 2, flags).expect("inside");
        });
    }
}

fn chain(random: &mut Random, most: u64) -> Vec<Desc> {
    let count = 1 + random.below(most);
    let readable = random.below(count + 1);
    (0..count)
        .map(|i| {
            let at = DATA + random.below(DATA_BYTES - 0x400);
            let len = u32::try_from(random.below(0x400)).expect("small");
            if i < readable {
                Desc::readable(at, len)
            } else {
                Desc::writable(at, len)
            }
        })
        .collect()
}

fn bytes_of(buffer: &GuestBuffer) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(buffer.bytes()).expect("small")];
    assert!(buffer.copy_out(0, &mut bytes));
    bytes
}

/// The bytes that ranges lead to, in both memories.
fn bytes_at(memory: &Shared, ranges: &[(u64, u32)]) -> Vec<u8> {
    let parts = ranges
        .iter()
        .map(|&(at, len)| memory.read(at, len as usize));
    parts
        .collect::<Result<Vec<_>, _>>()
        .expect("inside")
        .concat()
}

fn assert_same(chain: &Chain, model: &ModelChain, memory: &Shared) {
    assert_eq!(bytes_of(&chain.readable), bytes_at(memory, &model.readable));
    assert_eq!(bytes_of(&chain.writable), bytes_at(memory, &model.writable));
}

/// Batches of random chains, used in any order, over many rounds of rings of any size.
#[test]
fn good_rings_are_served_as_the_model_serves_them() {
    for (seed, size) in (0u64..).zip([1, 2, 3, 7, 16, 33, 128]) {
        for event_idx in [false, true] {
            let mut random = Random::new(seed);
            let mut pair = Pair::new(size, event_idx);
            let mut free: Vec<u16> = (0..size).collect();
            let mut open: Vec<ModelChain> = Vec::new();
            for round in 0..400 {
                offer(&mut pair, &mut random, &mut free);
                let wants_kick = pair.theirs.ring.publish_quietly(&pair.theirs.memory);
                let ours = pair.ours.ring.publish_quietly(&pair.ours.memory);
                assert_eq!(
                    ours.expect("inside"),
                    wants_kick.expect("inside"),
                    "{round}"
                );
                let mut chain = Chain::default();
                while let Some(taken) = pair.model.pop(&pair.theirs.memory).expect("good") {
                    take_and_put_back(&mut pair.queue, &mut random);
                    assert_eq!(pair.queue.pop(&mut chain), Ok(Some(taken.id)));
                    assert_same(&chain, &taken, &pair.theirs.memory);
                    open.push(taken);
                }
                assert_eq!(pair.queue.pop(&mut chain), Ok(None));
                let ahead = u16::try_from(random.below(u64::from(size))).expect("small");
                let event = advance(pair.ours.ring.last_used, ahead, size);
                pair.write_event(event, u16::try_from(random.below(4)).expect("small"));
                end_some(&mut pair, &mut random, &mut open, &mut free);
            }
        }
    }
}

/// Takes some chains and puts them back: the ring is as if they had not been taken.
fn take_and_put_back(queue: &mut PackedQueue, random: &mut Random) {
    let mut taken = Vec::new();
    for _ in 0..random.below(4) {
        taken.extend(queue.pop(&mut Chain::default()).expect("good"));
    }
    for id in taken.into_iter().rev() {
        queue.unpop(id);
    }
}

/// Offers chains until there is no id or no room, or enough.
fn offer(pair: &mut Pair, random: &mut Random, free: &mut Vec<u16>) {
    for table in 0..random.below(9) {
        let Some(id) = free.pop() else { return };
        let descs = chain(random, 5.min(u64::from(pair.ours.ring.size)));
        let in_table = random.below(3) == 0;
        let offered = pair.both(|side| {
            let at = TABLES + table * 0x100;
            if in_table {
                side.ring.offer_table(&side.memory, id, at, &descs)
            } else {
                side.ring.offer(&side.memory, id, &descs)
            }
        });
        if offered.is_err() {
            // No room: the id stays free.
            free.push(id);
            return;
        }
    }
}

/// Uses some of what is in flight, in any order, in one batch: the same bytes, the same call.
fn end_some(pair: &mut Pair, random: &mut Random, open: &mut Vec<ModelChain>, free: &mut Vec<u16>) {
    let mut count = 0;
    while !open.is_empty() && random.below(4) > 0 {
        let chain = open.swap_remove(random.index(open.len()));
        let len = u32::try_from(random.below(3)).expect("small");
        pair.queue.push_used(chain.id, len);
        let done = pair.model.push_used(&pair.theirs.memory, &chain, len);
        done.expect("inside");
        free.push(chain.id);
        count += 1;
    }
    let call = pair.model.call_wanted(&pair.theirs.memory).expect("inside");
    assert_eq!(pair.queue.publish(), call, "{count} were used");
    assert_eq!(pair.ours.ring_bytes(), pair.theirs.ring_bytes());
    for _ in 0..count {
        let ours = pair.ours.ring.poll_used(&pair.ours.memory).expect("good");
        let theirs = pair.theirs.ring.poll_used(&pair.theirs.memory);
        assert!(ours.is_some());
        assert_eq!(ours, theirs.expect("good"));
    }
    if random.below(2) == 0 {
        assert!(!pair.queue.arm(), "nothing is new");
        pair.model.arm(&pair.theirs.memory).expect("inside");
    } else {
        pair.queue.disarm();
        pair.model.disarm(&pair.theirs.memory).expect("inside");
    }
}

/// Rings with fields spoilt: what the model takes is taken just so; what it refuses is refused, or
/// lies in memory; where it sees nothing, nothing is taken.
#[test]
fn spoilt_rings_are_never_read_otherwise() {
    let (mut taken, mut broken, mut lenient, mut nothing) = (0, 0, 0, 0);
    for seed in 0..4000 {
        let mut random = Random::new(seed);
        let mut pair = Pair::new(16, false);
        let descs: Vec<Desc> = chain(&mut random, 6);
        let in_table = random.below(3) == 0;
        pair.both(|side| {
            let done = if in_table {
                side.ring.offer_table(&side.memory, 3, TABLES, &descs)
            } else {
                side.ring.offer(&side.memory, 3, &descs)
            };
            done.expect("room");
            side.ring.publish_quietly(&side.memory).expect("inside");
        });
        for _ in 0..=random.below(2) {
            spoil(&mut pair, &mut random, in_table);
        }
        let mut chain = Chain::default();
        let ours = pair.queue.pop(&mut chain);
        match pair.model.pop(&pair.theirs.memory) {
            Ok(Some(model)) if in_memory(&pair.theirs.memory, &model) => {
                assert_eq!(ours, Ok(Some(model.id)), "seed {seed}");
                assert_same(&chain, &model, &pair.theirs.memory);
                taken += 1;
            }
            Ok(Some(_)) => {
                assert!(ours.is_err(), "seed {seed}: outside memory, and {ours:?}");
                broken += 1;
            }
            Ok(None) => {
                assert_eq!(ours, Ok(None), "seed {seed}");
                nothing += 1;
            }
            Err(_) if ours.is_ok() => {
                bytes_of(&chain.readable);
                lenient += 1;
            }
            Err(_) => broken += 1,
        }
    }
    // All of it happens, and leniency is rare: flags inside a chain, a table behind descriptors.
    assert!(
        taken > 400 && broken > 400 && nothing > 20,
        "{taken} {broken} {nothing}"
    );
    assert!(lenient < 400, "{lenient} of 4000");
}

fn in_memory(memory: &Shared, chain: &ModelChain) -> bool {
    let mut ranges = chain.readable.iter().chain(&chain.writable);
    ranges.all(|&(at, len)| memory.read(at, len as usize).is_ok())
}

/// Rewrites a field of one of the first descriptors, or of the table's, the same on both sides.
fn spoil(pair: &mut Pair, random: &mut Random, in_table: bool) {
    let table = in_table && random.below(2) == 0;
    let base = if table { TABLES } else { pair.ours.ring.desc };
    let at = base + random.below(7) * 16;
    let which = random.below(5);
    let value = random.next_u64();
    let small = u16::try_from(value & 0xffff).expect("cut");
    pair.both(|side| {
        let write = |at: u64, bytes: &[u8]| side.memory.write(at, bytes).expect("inside");
        match which {
            0 => write(at, &value.to_le_bytes()),
            1 => write(at + 8, &(value & 0x1_ffff).to_le_bytes()[..4]),
            2 => write(at + 12, &(small & 0x1f).to_le_bytes()),
            3 => write(at + 14, &(small & 0x8087).to_le_bytes()),
            _ => {
                let flags = side.memory.load_u16(at + 14).expect("inside");
                let bit = 1u16 << [0u16, 1, 2, 7, 15][usize::from(small % 5)];
                write(at + 14, &(flags ^ bit).to_le_bytes());
            }
        }
    });
}
