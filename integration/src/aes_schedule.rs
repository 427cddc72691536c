//! The AES-256 key schedule (FIPS 197, 5.2), slow and plain: tests search memory for its round keys.

/// Multiplication in AES's field.
fn times(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = (a << 1) ^ if a & 0x80 != 0 { 0x1b } else { 0 };
        b >>= 1;
    }
    product
}

/// The substitution of a byte: its inverse (x to the 254th), then an affine map.
fn substitute(x: u8) -> u8 {
    let mut inverse = 1;
    for _ in 0..254 {
        inverse = times(inverse, x);
    }
    (0..5).fold(0x63, |sum, turn| sum ^ inverse.rotate_left(turn))
}

/// The fifteen round keys of a key.
#[must_use]
pub fn round_keys(key: &[u8; 32]) -> Vec<[u8; 16]> {
    let mut words: Vec<[u8; 4]> = key
        .chunks_exact(4)
        .map(|c| [c[0], c[1], c[2], c[3]])
        .collect();
    let mut constant = 1u8;
    for i in 8..60 {
        let mut word = words[i - 1];
        if i % 8 == 0 {
            word.rotate_left(1);
            word = word.map(substitute);
            word[0] ^= constant;
            constant = times(constant, 2);
        } else if i % 8 == 4 {
            word = word.map(substitute);
        }
        for (byte, before) in word.iter_mut().zip(words[i - 8]) {
            *byte ^= before;
        }
        words.push(word);
    }
    words
        .chunks_exact(4)
        .map(|four| {
            let mut key = [0; 16];
            key.copy_from_slice(four.as_flattened());
            key
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 197, appendix A.3: the first and the last words of the expansion.
    #[test]
    fn the_standards_example() {
        let key: [u8; 32] = [
            0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d,
            0x77, 0x81, 0x1f, 0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3,
            0x09, 0x14, 0xdf, 0xf4,
        ];
        let keys = round_keys(&key);
        assert_eq!(keys.len(), 15);
        assert_eq!(keys[0], key[..16]);
        assert_eq!(keys[2][..4], [0x9b, 0xa3, 0x54, 0x11]);
        assert_eq!(keys[14][12..], [0x70, 0x6c, 0x63, 0x1e]);
    }
}
