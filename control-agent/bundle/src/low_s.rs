//! The one form of an ECDSA signature. For each valid (r, s), (r, n - s) is valid too, and would
//! give whoever carries an envelope a second one of the same content with another digest; only
//! the smaller `s` is written and taken.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Bytes of r and of s.
const SCALAR_BYTES: usize = 48;
/// Bytes of a P-384 signature, r then s.
pub(crate) const SIGNATURE_BYTES: usize = 2 * SCALAR_BYTES;

/// Order of P-384 (FIPS 186-5, SP 800-186 section 3.2.1.4), big-endian.
const ORDER: [u8; SCALAR_BYTES] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xc7, 0x63, 0x4d, 0x81, 0xf4, 0x37, 0x2d, 0xdf,
    0x58, 0x1a, 0x0d, 0xb2, 0x48, 0xb0, 0xa7, 0x7a, 0xec, 0xec, 0x19, 0x6a, 0xcc, 0xc5, 0x29, 0x73,
];

/// n - s, for s below n.
fn negated(s: &[u8; SCALAR_BYTES]) -> [u8; SCALAR_BYTES] {
    let mut difference = [0; SCALAR_BYTES];
    let mut borrow = false;
    let digits = difference.iter_mut().zip(ORDER.iter().zip(s)).rev();
    for (out, (&n, &s)) in digits {
        let (partial, below) = n.overflowing_sub(s);
        let (digit, again) = partial.overflowing_sub(u8::from(borrow));
        *out = digit;
        borrow = below || again;
    }
    difference
}

/// Whether the signature has its one form.
pub(crate) fn is_low(signature: &[u8]) -> bool {
    match signature.last_chunk::<SCALAR_BYTES>() {
        Some(s) if signature.len() == SIGNATURE_BYTES => *s <= negated(s),
        _ => false,
    }
}

/// The signature in its one form; valid exactly if the given one is.
pub(crate) fn normalised(mut signature: Vec<u8>) -> Vec<u8> {
    if let Some(s) = signature.last_chunk_mut::<SCALAR_BYTES>() {
        let other = negated(s);
        if other < *s {
            *s = other;
        }
    }
    signature
}

/// Turns a signature into its other, equally valid form.
#[cfg(test)]
pub(crate) fn negate_for_test(signature: &mut [u8]) {
    let s = signature.last_chunk_mut().expect("a whole signature");
    *s = negated(s);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_s_and_its_negative_one_is_low() {
        let mut low = vec![7; SIGNATURE_BYTES];
        low[95] = 1;
        assert!(is_low(&low));
        let mut high = low.clone();
        high[48..].copy_from_slice(&negated(&low[48..].try_into().expect("scalar")));
        assert!(!is_low(&high));
        assert_eq!(normalised(high), low);
        assert_eq!(normalised(low.clone()), low);
        assert!(!is_low(&low[1..]));
    }
}
