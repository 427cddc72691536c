//! The self-test: a kernel serves no key before it has shown, once in a process, that it does on this CPU what it
//! should (known answers, both directions, both data units, in place, straddling segments).
//!
//! The keys and data are public, so that nothing of it needs secret memory, nor a system call.
//!
//! UNSAFETY: the schedule and the data are buffers of this module, used by the functions of one kernel.
#![expect(unsafe_code, reason = "kernels work on raw memory")]

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::OnceLock;

use super::engine::{Direction, Piece, Run};
use super::kernel::{Functions, Kernel};
use super::types::{DataUnit, KEY_BYTES};
use crate::secret::SLOT_BYTES;

/// A kernel that does not do what it should. Nothing may be encrypted or decrypted with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the self-test of AES-256-XTS failed ({kernel} kernel: {what}): this CPU or this program is broken and would \
     ruin data, so no encrypted volume is served; move to another host or install the program again"
)]
pub struct SelfTestError {
    /// Which kernel.
    pub kernel: Kernel,
    /// What came out wrong.
    pub what: &'static str,
}

/// Tests the kernel that keys will use, unless that was done before. To be called when a process
/// starts, so that it refuses service at once and not with its first key.
///
/// # Errors
/// [`SelfTestError`], now and ever after.
pub fn self_test() -> Result<(), SelfTestError> {
    let kernel = Kernel::chosen();
    match kernel.functions() {
        Some(functions) => tested(kernel, functions),
        None => Ok(()),
    }
}

/// The verdict on a kernel, found out at its first use.
pub(super) fn tested(kernel: Kernel, functions: &'static Functions) -> Result<(), SelfTestError> {
    static VERDICTS: [OnceLock<Result<(), SelfTestError>>; 5] = [const { OnceLock::new() }; 5];
    let test = || examine(functions).map_err(|what| SelfTestError { kernel, what });
    match VERDICTS.get(kernel as usize) {
        Some(verdict) => *verdict.get_or_init(test),
        None => test(),
    }
}

/// The keys of IEEE 1619-2007, annex B, vectors 10 to 14.
const KEY: [u8; KEY_BYTES] = [
    0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71, 0x35, 0x26,
    0x62, 0x49, 0x77, 0x57, 0x24, 0x70, 0x93, 0x69, 0x99, 0x59, 0x57, 0x49, 0x66, 0x96, 0x76, 0x27,
    0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84, 0x62, 0x64, 0x33, 0x83, 0x27, 0x95,
    0x02, 0x88, 0x41, 0x97, 0x16, 0x93, 0x99, 0x37, 0x51, 0x05, 0x82, 0x09, 0x74, 0x94, 0x45, 0x92,
];

/// How the data unit `0, 1, .. 255, 0, 1, ..` of a number begins and ends when it is encrypted.
struct Answer {
    unit: DataUnit,
    number: u128,
    first: u128,
    last: u128,
}

/// Vectors 10 and 14, and one of a large unit (which AWS-LC and RustCrypto agree on).
const ANSWERS: [Answer; 3] = [
    Answer {
        unit: DataUnit::B512,
        number: 0xff,
        first: 0x1c3b_3a10_2f77_0386_e483_6c99_e370_cf9b,
        last: 0xc4f3_6ffd_a9fc_ea70_b9c6_e693_e148_c151,
    },
    Answer {
        unit: DataUnit::B512,
        number: 0xff_ffff_ffff,
        first: 0x6449_7e5a_831e_4a93_2c09_be3e_5393_376d,
        last: 0xd609_d273_ad5b_0d59_631c_531f_6a0a_57b9,
    },
    Answer {
        unit: DataUnit::B4096,
        number: 0xff_ffff_ffff,
        first: 0x6449_7e5a_831e_4a93_2c09_be3e_5393_376d,
        last: 0xcf4e_bfcb_7017_4944_e5da_2ddc_5e18_35d9,
    },
];

/// Lengths of runs in units: one, a few of what kernels do at once and one more, and more than a batch.
const RUNS: [(DataUnit, usize); 8] = [
    (DataUnit::B512, 1),
    (DataUnit::B512, 4),
    (DataUnit::B512, 17),
    (DataUnit::B512, 67),
    (DataUnit::B4096, 1),
    (DataUnit::B4096, 2),
    (DataUnit::B4096, 5),
    (DataUnit::B4096, 9),
];

/// Where segments end in the straddling runs: at any byte of a data unit.
const SEGMENT_BYTES: usize = 1031;

/// Number of the first unit of a run: its low half overflows in all but the shortest.
const FIRST: u128 = (7 << 64) + u64::MAX as u128 - 2;

/// Room for a schedule.
#[repr(C, align(64))]
struct Slot([u8; SLOT_BYTES]);

/// An expanded key that is no secret.
struct Bench {
    functions: &'static Functions,
    slot: Box<Slot>,
}

/// Says what comes out wrong.
fn examine(functions: &'static Functions) -> Result<(), &'static str> {
    let bench = Bench::new(functions);
    for answer in &ANSWERS {
        bench.answers(answer)?;
    }
    let reference = Kernel::Portable.functions().map(Bench::new);
    for (unit, units) in RUNS {
        let plain = pattern(units * unit.bytes() as usize);
        let mut cipher = plain.clone();
        if let Some(reference) = &reference {
            reference.in_place(unit, Direction::Encrypt, &mut cipher);
        }
        bench.does(unit, Direction::Encrypt, &plain, &cipher)?;
        bench.does(unit, Direction::Decrypt, &cipher, &plain)?;
    }
    Ok(())
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..=u8::MAX).cycle().take(bytes).collect()
}

impl Bench {
    fn new(functions: &'static Functions) -> Self {
        let mut slot = Box::new(Slot([0; SLOT_BYTES]));
        // SAFETY: the slot has the size and alignment of a slot in secret memory.
        unsafe { (functions.expand)(&KEY, slot.0.as_mut_ptr()) };
        Self { functions, slot }
    }

    fn run(&self, unit: DataUnit, first: u128, direction: Direction) -> Run<'_> {
        Run {
            functions: self.functions,
            schedule: self.slot.0.as_ptr(),
            unit,
            first,
            direction,
            key: PhantomData,
        }
    }

    fn answers(&self, answer: &Answer) -> Result<(), &'static str> {
        let plain = pattern(answer.unit.bytes() as usize);
        let mut data = plain.clone();
        let whole = segments(&mut data, usize::MAX);
        let each = || whole.iter().copied();
        // SAFETY: one buffer of a unit on both sides.
        unsafe {
            self.run(answer.unit, answer.number, Direction::Encrypt)
                .between(1, each(), each());
        }
        let first = data.starts_with(&answer.first.to_be_bytes());
        if !first || !data.ends_with(&answer.last.to_be_bytes()) {
            return Err("a known answer, encrypting");
        }
        // SAFETY: as above.
        unsafe {
            self.run(answer.unit, answer.number, Direction::Decrypt)
                .between(1, each(), each());
        }
        if data != plain {
            return Err("a known answer, decrypting");
        }
        Ok(())
    }

    /// Whether a run gives what it should between buffers, in place and between segments.
    fn does(
        &self,
        unit: DataUnit,
        direction: Direction,
        input: &[u8],
        output: &[u8],
    ) -> Result<(), &'static str> {
        let mut data = input.to_vec();
        self.in_place(unit, direction, &mut data);
        if data != output {
            return Err("a run of data units in place");
        }
        let (mut from, mut to) = (input.to_vec(), vec![0; input.len()]);
        for (from_bytes, to_bytes) in [
            (usize::MAX, usize::MAX),
            (SEGMENT_BYTES, usize::MAX),
            (usize::MAX, SEGMENT_BYTES),
        ] {
            to.fill(0);
            let source = segments(&mut from, from_bytes).into_iter();
            let destination = segments(&mut to, to_bytes).into_iter();
            let units = input.len() / unit.bytes() as usize;
            // SAFETY: two buffers of as many bytes as the units have.
            unsafe {
                self.run(unit, FIRST, direction)
                    .between(units, source, destination)
            };
            if to != output {
                return Err("a run of data units between segments");
            }
        }
        Ok(())
    }

    fn in_place(&self, unit: DataUnit, direction: Direction, data: &mut [u8]) {
        let units = data.len() / unit.bytes() as usize;
        let whole = segments(data, usize::MAX);
        let each = || whole.iter().copied();
        // SAFETY: one buffer of as many bytes as the units have, on both sides.
        unsafe {
            self.run(unit, FIRST, direction)
                .between(units, each(), each())
        };
    }
}

/// A buffer in pieces of at most so many bytes.
fn segments(data: &mut [u8], bytes: usize) -> Vec<Piece> {
    data.chunks_mut(bytes)
        .map(|piece| (NonNull::from(&mut *piece).cast(), piece.len()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SecretArena;
    use crate::xts::{KeyError, XtsKey};
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_kernel_passes() {
        for kernel in Kernel::available() {
            let functions = kernel.functions().expect("available");
            assert_eq!(tested(kernel, functions), Ok(()));
        }
        assert_eq!(self_test(), Ok(()));
    }

    /// Which call of a kernel's function is spoilt, counted from one.
    static SPOILT: AtomicUsize = AtomicUsize::new(0);

    fn spoil(at: *mut u8) {
        if SPOILT.fetch_sub(1, Ordering::Relaxed) == 1 {
            // SAFETY: a byte that the function has just written.
            unsafe { *at ^= 1 };
        }
    }

    /// The portable kernel with one bit wrong at one place.
    static FAULTY: [Functions; 3] = {
        const GOOD: &Functions = Kernel::PORTABLE;
        [
            Functions {
                bases: |schedule, unit, first, units, to| {
                    // SAFETY: passed on to the caller.
                    let count = unsafe { (GOOD.bases)(schedule, unit, first, units, to) };
                    spoil(to.wrapping_add(units * unit.groups() - 1).cast());
                    count
                },
                ..*GOOD
            },
            Functions {
                encrypt: |schedule, bases, groups, src, dst| {
                    // SAFETY: passed on to the caller.
                    unsafe { (GOOD.encrypt)(schedule, bases, groups, src, dst) };
                    spoil(dst.wrapping_add(groups * 512 - 1));
                },
                ..*GOOD
            },
            Functions {
                decrypt: |schedule, bases, groups, src, dst| {
                    // SAFETY: passed on to the caller.
                    unsafe { (GOOD.decrypt)(schedule, bases, groups, src, dst) };
                    spoil(dst);
                },
                ..*GOOD
            },
        ]
    };

    /// A single bit that is wrong in any one call of the test is found.
    #[test]
    fn a_kernel_that_errs_anywhere_fails() {
        for faulty in &FAULTY {
            let mut call = 1;
            loop {
                SPOILT.store(call, Ordering::Relaxed);
                let verdict = examine(faulty);
                // It counts down past zero, unless there were fewer calls.
                let left = SPOILT.load(Ordering::Relaxed);
                if (1..=call).contains(&left) {
                    assert_eq!(verdict, Ok(()), "nothing was spoilt");
                    break;
                }
                assert!(verdict.is_err(), "call {call} was spoilt unnoticed");
                call += 1;
            }
            assert!(call > 4, "calls were spoilt");
        }
    }

    #[test]
    fn a_kernel_that_fails_serves_no_key() {
        let arena = SecretArena::new(1).expect("arena");
        for _ in 0..2 {
            let made = XtsKey::with_kernel(&arena, &KEY, Kernel::Faulty);
            let Err(KeyError::SelfTest(error)) = made else {
                panic!("a key from a kernel that fails: {made:?}");
            };
            assert_eq!(error.kernel, Kernel::Faulty);
            assert!(
                error.to_string().contains("no encrypted volume is served"),
                "{error}"
            );
        }
        assert_eq!(arena.free_slots(), 1);
    }
}
