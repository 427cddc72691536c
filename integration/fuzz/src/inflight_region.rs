//! `inflight_region`: a queue that goes on where another left it, over a ring and an in-flight region of which a driver
//! and a frontend have changed anything since.
//!
//! The model is "When reconnecting" of vhost-user's "Inflight I/O tracking", as slow as it reads, with what can't be
//! true of the ring said beside it. What is in flight is found twice the same: whoever dies between two recoveries
//! changes nothing.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bulkhead_dataplane::memory::SharedArea;
use bulkhead_dataplane::virtqueue::{
    Chain, QueueFeatures, QueueRegion, Recovered, RingError, Virtqueue,
};
use bulkhead_dataplane::worker::message::RingLayout;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::ftruncate;

use crate::guest::{Copy, Guest};
use crate::input::Input;

mod model;

use model::{Model, packed, split};

const DESC: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const DATA: u64 = 0x3000;
const MOST: u16 = 16;
/// Bytes of the area: regions of two queues of any size here.
const AREA: usize = 2 * (32 + 32 * MOST as usize).next_multiple_of(64);

thread_local! {
    static PLACE: RefCell<Place> = RefCell::new(Place::new());
}

/// Memory of a guest, and a frontend's file of in-flight regions.
struct Place {
    guest: Guest,
    file: OwnedFd,
    area: Arc<SharedArea>,
}

impl Place {
    fn new() -> Self {
        let file = memfd_create("inflight", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        ftruncate(&file, i64::try_from(AREA).expect("small")).expect("its length");
        let area = SharedArea::map(file.as_fd(), 0, AREA as u64).expect("mapped");
        Self {
            guest: Guest::new(),
            file,
            area: Arc::new(area),
        }
    }

    fn area(&self) -> Vec<u8> {
        let mut bytes = vec![0; AREA];
        assert_eq!(pread(&self.file, &mut bytes, 0), Ok(AREA));
        bytes
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        let room = AREA.saturating_sub(at).min(bytes.len());
        let offset = i64::try_from(at).expect("small");
        assert_eq!(pwrite(&self.file, &bytes[..room], offset), Ok(room));
    }
}

pub fn run(data: &[u8]) {
    PLACE.with_borrow(|place| {
        let mut input = Input::new(data);
        place.guest.clear();
        place.write(0, &[0; AREA]);
        let shape = Shape::new(&mut input);
        let mut life = Life::new(place, shape);
        life.live(&mut input);
        drop(life);
        spoil(place, &mut input);
        check(place, shape);
    });
}

/// What a queue is like.
#[derive(Debug, Clone, Copy)]
struct Shape {
    features: QueueFeatures,
    size: u16,
    index: u16,
}

impl Shape {
    fn new(input: &mut Input<'_>) -> Self {
        let flags = input.u8();
        let packed = flags & 1 != 0;
        let size = input.below(MOST) + 1;
        Self {
            features: QueueFeatures {
                packed,
                in_order: flags & 2 != 0,
                indirect: flags & 4 != 0,
                event_idx: false,
            },
            size: if packed {
                size
            } else {
                size.next_power_of_two()
            },
            index: u16::from(flags & 8 != 0),
        }
    }

    fn queue(self, place: &Place) -> Virtqueue {
        let layout = RingLayout {
            size: self.size,
            desc: DESC,
            avail: AVAIL,
            used: USED,
        };
        let base = if self.features.packed { 0x8000_8000 } else { 0 };
        Virtqueue::new(&place.guest.memory, layout, base, self.features).expect("a good place")
    }

    fn region(self, place: &Place) -> QueueRegion {
        let format = self.features.format();
        QueueRegion::new(&place.area, format, self.index, self.size).expect("it fits")
    }

    /// Where its region is in the area.
    fn span(self) -> std::ops::Range<usize> {
        let bytes = self.features.format().region_bytes(self.size);
        let bytes = usize::try_from(bytes).expect("small");
        let from = bytes * usize::from(self.index);
        from..from + bytes
    }
}

/// A backend that dies, and a driver that is good.
struct Life<'a> {
    place: &'a Place,
    shape: Shape,
    queue: Virtqueue,
    /// Requests that were made available, and that were taken.
    avail: u16,
    popped: u16,
    taken: Vec<u16>,
    free: Vec<u16>,
}

impl<'a> Life<'a> {
    fn new(place: &'a Place, shape: Shape) -> Self {
        let mut queue = shape.queue(place);
        assert_eq!(queue.recover(shape.region(place)), Ok(Recovered::Fresh));
        Self {
            place,
            shape,
            queue,
            avail: 0,
            popped: 0,
            taken: Vec::new(),
            free: (0..shape.size).collect(),
        }
    }

    fn live(&mut self, input: &mut Input<'_>) {
        for _ in 0..input.u8() % 64 {
            match input.u8() % 4 {
                0 => self.offer(),
                1 => {
                    let taken = self.queue.pop(&mut Chain::default()).expect("good");
                    self.popped += u16::from(taken.is_some());
                    self.taken.extend(taken);
                }
                2 if !self.taken.is_empty() => {
                    let at = input.below(u16::try_from(self.taken.len()).expect("few"));
                    let id = self.taken.remove(usize::from(at));
                    self.queue.push_used(id, 1);
                }
                3 => {
                    self.queue.publish();
                    // Then all of it was shown.
                    if self.taken.is_empty() && self.popped == self.avail {
                        self.free = (0..self.shape.size).collect();
                    }
                }
                _ => {}
            }
        }
    }

    /// A request of one descriptor.
    fn offer(&mut self) {
        if self.free.is_empty() {
            return;
        }
        let id = self.free.remove(0);
        let guest = &self.place.guest;
        let size = self.shape.size;
        let slot = u64::from(self.avail % size);
        let mut bytes = (DATA + 16 * u64::from(id)).to_le_bytes().to_vec();
        bytes.extend(16u32.to_le_bytes());
        if self.shape.features.packed {
            let wrap = (self.avail / size).is_multiple_of(2);
            bytes.extend(id.to_le_bytes());
            bytes.extend((2 | if wrap { 1u16 << 7 } else { 1 << 15 }).to_le_bytes());
            guest.write(DESC + 16 * slot, &bytes);
            self.avail += 1;
        } else {
            bytes.extend([2, 0, 0, 0]);
            guest.write(DESC + 16 * u64::from(id), &bytes);
            guest.write(AVAIL + 4 + 2 * slot, &id.to_le_bytes());
            self.avail += 1;
            guest.write(AVAIL + 2, &self.avail.to_le_bytes());
        }
    }
}

/// Driver and frontend change what they like.
fn spoil(place: &Place, input: &mut Input<'_>) {
    while !input.is_empty() {
        let at = input.u16();
        let place_of = |base: u64| base + u64::from(at % 0x200);
        match input.u8() % 6 {
            0 => place.write(usize::from(at) % AREA, &[input.u8()]),
            1 => place.write((usize::from(at) % AREA) & !1, &input.u16().to_le_bytes()),
            2 => place.write(usize::from(at) % AREA, input.bytes(usize::from(at % 64))),
            3 => place.guest.write(place_of(DESC), &[input.u8()]),
            4 => place.guest.write(place_of(AVAIL), &[input.u8()]),
            _ => place.guest.write(place_of(USED), &[input.u8()]),
        }
    }
}

/// Whoever comes next finds what the model finds; and so does the one after.
fn check(place: &Place, shape: Shape) {
    let before = place.area();
    let copy = place.guest.copy();
    let region = &before[shape.span()];
    let expected = if shape.features.packed {
        packed(
            region,
            &ring(&copy, DESC, 16 * usize::from(shape.size)),
            shape.size,
        )
    } else {
        let avail = ring(&copy, AVAIL, 4 + 2 * usize::from(shape.size));
        split(region, &avail, &ring(&copy, USED, 4), shape.size)
    };
    for _ in 0..2 {
        assert_eq!(recover(place, shape), expected, "{shape:?}");
        if !matches!(expected, Model::Kept(_)) {
            break;
        }
    }
    let after = place.area();
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        assert!(
            before == after || shape.span().contains(&at),
            "byte {at} is another's"
        );
    }
}

fn ring(copy: &Copy, at: u64, bytes: usize) -> Vec<u8> {
    let lies = copy.in_one_region(at, bytes as u64);
    lies.expect("a place of the target's own").to_vec()
}

/// A queue's start: what it finds; what it takes, it takes once, and can give back.
fn recover(place: &Place, shape: Shape) -> Model {
    let mut queue = shape.queue(place);
    let chains = match queue.recover(shape.region(place)) {
        Err(RingError::RegionVersion { .. }) => return Model::Unknown,
        Err(other) => panic!("{other}"),
        Ok(Recovered::Fresh) => return Model::Fresh,
        Ok(Recovered::Stale { .. }) => return Model::Stale,
        Ok(Recovered::Kept { chains }) => chains,
    };
    assert_eq!(
        (queue.in_flight(), queue.left_again()),
        (chains, usize::from(chains))
    );
    let mut again = Vec::new();
    let mut chain = Chain::with_capacity(8);
    loop {
        match queue.pop_again(&mut chain) {
            Ok(Some(id)) => again.push(id),
            Ok(None) => break,
            // The driver has broken it since: it stays where it is.
            Err(_) => {
                let left = queue.left_again();
                assert_eq!(left + again.len(), usize::from(chains));
                queue.leave_again();
                assert_eq!(usize::from(queue.in_flight()), again.len());
                return Model::Kept(None);
            }
        }
    }
    Model::Kept(Some(again))
}
