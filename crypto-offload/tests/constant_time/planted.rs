//! What a careless cipher would do with a key.

use std::hint::black_box;

use crate::step::Work;

/// Takes another way for each key.
#[inline(never)]
pub fn branch(work: &mut Work) {
    for byte in work.key {
        if black_box(byte) & 1 != 0 {
            work.output[0] = black_box(work.output[0].wrapping_add(3));
        }
    }
}

/// Reads from an address that a key's byte gives, and takes the same way for each.
#[inline(never)]
pub fn lookup(work: &mut Work) {
    for at in 0..8 {
        let byte = usize::from(black_box(work.key[at]));
        work.output[at] = black_box(work.data[byte]);
    }
}

/// Uses nothing secret.
#[inline(never)]
pub fn harmless(work: &mut Work) {
    for at in 0..64 {
        work.output[at] = black_box(u8::try_from(at).unwrap_or(0));
    }
}
