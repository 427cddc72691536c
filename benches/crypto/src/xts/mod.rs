//! AES-256-XTS in every shape of call: size of the buffer, data unit, data units a call, direction, in place or not;
//! beside the libraries and the AES rounds alone.
//!
//! `shape` has the shapes. The libraries take one data unit a call, so that their figures don't depend on how many units our calls have.
//!
//! UNSAFETY: [`XtsKey`]'s raw calls encrypt in place; they are given one exclusive slice. Aligned pages are
//! seen as the bytes that they consist of.
#![expect(
    unsafe_code,
    reason = "encryption in place goes by raw address; aligned buffers"
)]

pub(crate) mod shape;

use std::hint::black_box;

use bulkhead_benches::ratio::{Pace, Turns};
use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, Kernel, SecretArena, XtsKey};

use crate::Differ;
use crate::ceiling::{self, Ceiling};
use crate::peers::{Buffers, LIBRARIES};
use bulkhead_benches::figures::row::{Placement, Row, Unit};
use shape::Shape;

/// An arbitrary place on the volume: the first unit of a buffer.
const FIRST_UNIT: u64 = 0x1234_5678;

/// No library may be faster.
const OF_LIBRARY: f64 = 1.0;

pub(crate) fn key_bytes() -> [u8; KEY_BYTES] {
    std::array::from_fn(|i| u8::try_from(i * 7 % 251).unwrap_or_default())
}

/// Our cipher under a kernel.
struct Ours {
    key: XtsKey,
}

impl Ours {
    fn new(kernel: Kernel) -> Self {
        let arena = SecretArena::new(1).expect("secret memory for one key");
        let key = XtsKey::with_kernel(&arena, &key_bytes(), kernel);
        Self {
            key: key.expect("the halves differ and the CPU has the kernel"),
        }
    }

    /// One buffer in calls of the shape.
    fn run(&self, shape: Shape, buffers: Buffers<'_>) {
        let call = shape.call_bytes();
        let numbers = (FIRST_UNIT..).step_by(shape.units);
        match buffers {
            Buffers::InPlace(bytes) => {
                for (bytes, first) in bytes.chunks_exact_mut(call).zip(numbers) {
                    self.in_place(shape, first, bytes);
                }
            }
            Buffers::Between(from, to) => {
                let calls = from.chunks_exact(call).zip(to.chunks_exact_mut(call));
                for ((from, to), first) in calls.zip(numbers) {
                    let done = if shape.encrypt {
                        self.key.encrypt(shape.unit, first, from, to)
                    } else {
                        self.key.decrypt(shape.unit, first, from, to)
                    };
                    done.expect("whole units");
                }
            }
        }
    }

    fn in_place(&self, shape: Shape, first: u64, bytes: &mut [u8]) {
        let (place, len) = (bytes.as_mut_ptr(), bytes.len());
        // SAFETY: one exclusive slice, as source and destination.
        let done = unsafe {
            if shape.encrypt {
                self.key.encrypt_raw(shape.unit, first, place, place, len)
            } else {
                self.key.decrypt_raw(shape.unit, first, place, place, len)
            }
        };
        done.expect("whole units");
    }
}

/// Where pages begin, as guests' and staging buffers do.
const PAGE_BYTES: usize = 4096;

/// A page's worth of bytes, where pages begin.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// A side's own buffers, so that none finds another's in the cache. Where a page begins: a buffer that straddles
/// cache lines costs whoever uses it, and would make the cases differ by chance.
struct Room {
    source: Vec<Page>,
    destination: Vec<Page>,
}

impl Room {
    fn new(shape: Shape) -> Self {
        let pattern = std::array::from_fn(|i| u8::try_from(i % 251).unwrap_or_default());
        let pages = shape.buffer_bytes.div_ceil(PAGE_BYTES);
        Self {
            source: vec![Page(pattern); pages],
            destination: vec![Page([0; PAGE_BYTES]); pages],
        }
    }

    fn buffers(&mut self, shape: Shape) -> Buffers<'_> {
        let source = bytes(&mut self.source, shape);
        if shape.in_place {
            return Buffers::InPlace(black_box(source));
        }
        let destination = bytes(&mut self.destination, shape);
        Buffers::Between(black_box(source), black_box(destination))
    }

    /// What a run left.
    fn result(&mut self, shape: Shape) -> &[u8] {
        bytes(
            if shape.in_place {
                &mut self.source
            } else {
                &mut self.destination
            },
            shape,
        )
    }
}

/// The bytes of a buffer of the shape.
fn bytes(pages: &mut [Page], shape: Shape) -> &mut [u8] {
    let room = pages.len() * PAGE_BYTES;
    let at = pages.as_mut_ptr().cast::<u8>();
    // SAFETY: pages are bytes without gaps, exclusively borrowed, `room` of them.
    let all = unsafe { std::slice::from_raw_parts_mut(at, room) };
    &mut all[..shape.buffer_bytes]
}

/// Measures all shapes under the kernel that volumes use, then all kernels in two shapes.
///
/// # Errors
/// [`Differ`].
pub fn measure(pace: Pace) -> Result<Vec<Row>, Differ> {
    let ours = Ours::new(Kernel::chosen());
    let mut rows = Vec::new();
    for shape in Shape::all() {
        rows.extend(one_shape(&ours, shape, pace)?);
    }
    rows.extend(kernels(&ours, pace)?);
    Ok(rows)
}

/// All sides of a shape, in turns.
fn one_shape(ours: &Ours, shape: Shape, pace: Pace) -> Result<Vec<Row>, Differ> {
    let peers = LIBRARIES.iter().map(|library| {
        let peer = (library.with_key)(&key_bytes(), shape.encrypt);
        (library.name, peer)
    });
    let mut peers: Vec<_> = peers.collect();
    for (name, peer) in &mut peers {
        agree(ours, shape, name, |b| {
            peer.run(shape.unit_bytes(), FIRST_UNIT, b)
        })?;
    }
    let ceiling = Ceiling::of_this_cpu();
    let names: Vec<_> = peers.iter().map(|(name, _)| *name).collect();
    let mut peers: Vec<_> = peers
        .iter_mut()
        .map(|(_, peer)| repeated(shape, move |b| peer.run(shape.unit_bytes(), FIRST_UNIT, b)))
        .collect();
    let mut own = repeated(shape, |b| ours.run(shape, b));
    let mut rounds = || {
        if let Some(ceiling) = ceiling {
            ceiling.run();
        }
    };
    let mut sides: Vec<&mut dyn FnMut()> = vec![&mut own];
    sides.extend(peers.iter_mut().map(|peer| peer as &mut dyn FnMut()));
    sides.push(&mut rounds);
    let turns = pace.turns(&mut sides);
    let mut rows = Vec::new();
    for (peer, name) in names.into_iter().enumerate() {
        rows.push(row(shape, &turns, peer + 1, name));
    }
    if let Some(ceiling) = ceiling {
        rows.push(of_ceiling(shape, &turns, sides.len() - 1, ceiling));
    }
    Ok(rows)
}

/// Does a turn's buffers one after the other.
fn repeated(shape: Shape, mut run: impl FnMut(Buffers<'_>)) -> impl FnMut() {
    let mut room = Room::new(shape);
    move || {
        for _ in 0..shape.repeats() {
            run(room.buffers(shape));
        }
    }
}

/// A row beside a library, or another kernel, that did the same bytes.
fn row(shape: Shape, turns: &Turns, side: usize, peer: &'static str) -> Row {
    let bytes = shape.turn_bytes();
    Row {
        case: shape.case(),
        unit: Unit::GigabytesPerSecond,
        ours: gigabytes(bytes, turns.median(0)),
        peer: peer.into(),
        theirs: gigabytes(bytes, turns.median(side)),
        ratio: turns.ratio(side, 0),
        target: Some(OF_LIBRARY),
        placement: Placement::Inline,
        point: Some(shape.point()),
    }
}

fn of_ceiling(shape: Shape, turns: &Turns, side: usize, ceiling: Ceiling) -> Row {
    // Both did another number of bytes.
    let scale = bytes_ratio(shape.turn_bytes(), ceiling::BYTES);
    Row {
        theirs: gigabytes(ceiling::BYTES, turns.median(side)),
        ratio: turns.ratio(side, 0) * scale,
        target: shape.of_ceiling(),
        ..row(shape, turns, side, ceiling.name())
    }
}

/// Each kernel beside the chosen one.
fn kernels(ours: &Ours, pace: Pace) -> Result<Vec<Row>, Differ> {
    let mut rows = Vec::new();
    for (unit, encrypt) in [
        (DataUnit::B512, true),
        (DataUnit::B512, false),
        (DataUnit::B4096, true),
        (DataUnit::B4096, false),
    ] {
        let shape = Shape {
            buffer_bytes: 64 << 10,
            unit,
            units: (64 << 10) / unit.bytes() as usize,
            encrypt,
            in_place: false,
        };
        for kernel in Kernel::available() {
            let other = Ours::new(kernel);
            agree(ours, shape, kernel.name(), |b| other.run(shape, b))?;
            let mut own = repeated(shape, |b| ours.run(shape, b));
            let mut theirs = repeated(shape, |b| other.run(shape, b));
            let turns = pace.turns(&mut [&mut own, &mut theirs]);
            rows.push(Row {
                case: format!("kernels: {}", shape.case()),
                target: None,
                point: None,
                ..row(shape, &turns, 1, kernel.name())
            });
        }
    }
    Ok(rows)
}

/// Both must make the same bytes.
fn agree(
    ours: &Ours,
    shape: Shape,
    peer: &'static str,
    theirs: impl FnOnce(Buffers<'_>),
) -> Result<(), Differ> {
    let (mut left, mut right) = (Room::new(shape), Room::new(shape));
    ours.run(shape, left.buffers(shape));
    theirs(right.buffers(shape));
    if left.result(shape) == right.result(shape) {
        return Ok(());
    }
    Err(Differ {
        case: shape.case(),
        peer,
    })
}

#[expect(clippy::cast_precision_loss, reason = "sizes of buffers are small")]
fn gigabytes(bytes: usize, seconds: f64) -> f64 {
    bytes as f64 / seconds / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "sizes of buffers are small")]
fn bytes_ratio(one: usize, other: usize) -> f64 {
    one as f64 / other as f64
}
