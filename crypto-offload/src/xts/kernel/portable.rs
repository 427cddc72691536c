//! AES-256-XTS on the `aes` crate: constant-time software where it finds no instructions for AES.
//!
//! Bytes go through a group's room on the stack: each source byte is read once, and nothing but finished output
//! is written to the destination. What the compiler spills meanwhile (round keys, blocks, tweaks) is wiped after
//! each step.
//!
//! UNSAFETY: the schedule is a Rust value in raw secret memory: it is written before it is referenced and
//! never dropped (it owns nothing; its slot is wiped). Data is only touched by the copies of
//! [`crate::raw`].

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes256, Aes256Enc, Block};
use zeroize::Zeroize;

use super::{Base, Functions, GROUP_BYTES};
use crate::raw;
use crate::secret::SLOT_BYTES;
use crate::xts::types::{BLOCK_BYTES, DataUnit, KEY_BYTES};

pub(super) const FUNCTIONS: Functions = Functions {
    expand: |key, schedule| {
        // SAFETY: passed on to the caller.
        unsafe { write_schedule(key, schedule.cast()) };
        raw::wipe_left::<STACK_BYTES>();
    },
    bases: |schedule, unit, first, units, to| {
        // SAFETY: passed on to the caller.
        let written = unsafe { bases(schedule, unit, first, units, to) };
        raw::wipe_left::<STACK_BYTES>();
        written
    },
    encrypt: |schedule, bases, groups, src, dst| {
        // SAFETY: passed on to the caller.
        unsafe {
            crypt(schedule, bases, groups, src, dst, |s, d| {
                s.data.encrypt_blocks(d)
            })
        };
        raw::wipe_left::<STACK_BYTES>();
    },
    decrypt: |schedule, bases, groups, src, dst| {
        // SAFETY: passed on to the caller.
        unsafe {
            crypt(schedule, bases, groups, src, dst, |s, d| {
                s.data.decrypt_blocks(d)
            })
        };
        raw::wipe_left::<STACK_BYTES>();
    },
};

/// How deep the `aes` crate's frames go, in debug builds too.
const STACK_BYTES: usize = 16 * 1024;

/// Cipher blocks of a group.
const GROUP_BLOCKS: usize = GROUP_BYTES / BLOCK_BYTES;

/// What lies in the slot.
struct Schedule {
    data: Aes256,
    tweak: Aes256Enc,
}

const _: () = assert!(size_of::<Schedule>() <= SLOT_BYTES && align_of::<Schedule>() <= 64);

/// Builds the schedule in place. Not inlined, like the other steps, so that its frame lies where
/// [`raw::wipe_left`] wipes.
///
/// # Safety
/// As [`Functions::expand`]: there is room enough (asserted above), ours alone.
#[inline(never)]
unsafe fn write_schedule(key: &[u8; KEY_BYTES], schedule: *mut Schedule) {
    let (halves, _) = key.as_chunks::<{ KEY_BYTES / 2 }>();
    let [data, tweak] = halves else { return };
    // SAFETY: passed on to the caller.
    unsafe {
        (&raw mut (*schedule).data).write(Aes256::new(data.into()));
        (&raw mut (*schedule).tweak).write(Aes256Enc::new(tweak.into()));
    }
}

/// See [`Functions::bases`].
#[inline(never)]
unsafe fn bases(
    schedule: *const u8,
    unit: DataUnit,
    first: u128,
    units: usize,
    to: *mut Base,
) -> usize {
    // SAFETY: written by `expand`, never changed.
    let schedule = unsafe { &*schedule.cast::<Schedule>() };
    let groups = unit.groups();
    // SAFETY: room for all bases, ours alone; a base and a cipher block are both sixteen bytes.
    let to = unsafe { std::slice::from_raw_parts_mut(to, units * groups) };
    let mut number = first;
    for unit in to.chunks_exact_mut(groups) {
        let Some(Base(base)) = unit.first_mut() else {
            break;
        };
        // In place, so that no copy stays behind.
        *base = number.to_le_bytes();
        schedule.tweak.encrypt_block((&mut *base).into());
        let mut tweak = u128::from_le_bytes(*base);
        for base in unit {
            base.0 = tweak.to_le_bytes();
            tweak = times_x32(tweak);
        }
        number = number.wrapping_add(1);
    }
    units * groups
}

/// # Safety
/// As [`super::Crypt`].
#[inline(never)]
unsafe fn crypt(
    schedule: *const u8,
    bases: *mut Base,
    groups: usize,
    src: *const u8,
    dst: *mut u8,
    cipher: fn(&Schedule, &mut [Block]),
) {
    // SAFETY: written by `expand`, never changed.
    let schedule = unsafe { &*schedule.cast::<Schedule>() };
    let mut tweaks = [0u128; GROUP_BLOCKS];
    let mut data = [Block::default(); GROUP_BLOCKS];
    for group in 0..groups {
        // SAFETY: there are `groups` bases.
        let base = unsafe { &mut (*bases.add(group)).0 };
        chain(u128::from_le_bytes(*base), &mut tweaks);
        base.zeroize();
        let at = group * GROUP_BYTES;
        // SAFETY: inside the caller's range; `data` is a group's room, ours.
        unsafe { raw::copy(src.add(at), data.as_mut_ptr().cast(), GROUP_BYTES) };
        add(&mut data, &tweaks);
        cipher(schedule, &mut data);
        add(&mut data, &tweaks);
        // SAFETY: as above.
        unsafe { raw::copy(data.as_ptr().cast(), dst.add(at), GROUP_BYTES) };
    }
    // SAFETY: both are ours.
    unsafe {
        raw::wipe(tweaks.as_mut_ptr().cast(), GROUP_BYTES);
        raw::wipe(data.as_mut_ptr().cast(), GROUP_BYTES);
    }
}

/// Writes `first`, `first` * x, `first` * x^2 ... Eight chains side by side, because each step depends on the
/// one before.
fn chain(first: u128, tweaks: &mut [u128; GROUP_BLOCKS]) {
    let mut tweak = first;
    for to in &mut tweaks[..8] {
        *to = tweak;
        tweak = times_x(tweak);
    }
    for at in 8..GROUP_BLOCKS {
        tweaks[at] = times_x8(tweaks[at - 8]);
    }
}

/// Times x in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1 (IEEE 1619, section 5.2).
fn times_x(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

/// Times x^8 in the same field.
fn times_x8(tweak: u128) -> u128 {
    (tweak << 8) ^ folded(tweak >> 120)
}

/// Times x^32 in the same field.
fn times_x32(tweak: u128) -> u128 {
    (tweak << 32) ^ folded(tweak >> 96)
}

/// What fell off the top, times x^7 + x^2 + x + 1.
fn folded(over: u128) -> u128 {
    over ^ (over << 1) ^ (over << 2) ^ (over << 7)
}

fn add(data: &mut [Block; GROUP_BLOCKS], tweaks: &[u128; GROUP_BLOCKS]) {
    for (block, tweak) in data.iter_mut().zip(tweaks) {
        block.0 = (u128::from_le_bytes(block.0) ^ tweak).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_repeated_doubling() {
        let first = 0x8000_0000_0000_0000_0123_4567_89ab_cdef_u128;
        let mut tweaks = [0; GROUP_BLOCKS];
        chain(first, &mut tweaks);
        let mut expected = first;
        for tweak in tweaks {
            assert_eq!(tweak, expected);
            expected = times_x(expected);
        }
        assert_eq!(times_x32(first), expected);
    }
}
