//! Bytes as text in the files people handle: base64 (RFC 4648 section 4, padded, no line breaks)
//! for long things, lower-case hex for digests and fingerprints.
//!
//! Written out here rather than taken from a crate because secret keys pass through it: it makes
//! no copies, and looks nothing up in a table by a secret byte.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use zeroize::Zeroizing;

/// The value's character; arithmetic, no table.
fn to_symbol(value: u8) -> char {
    char::from(match value & 63 {
        v @ 0..=25 => b'A' + v,
        v @ 26..=51 => b'a' + (v - 26),
        v @ 52..=61 => b'0' + (v - 52),
        62 => b'+',
        _ => b'/',
    })
}

fn from_symbol(symbol: u8) -> Option<u8> {
    match symbol {
        b'A'..=b'Z' => Some(symbol - b'A'),
        b'a'..=b'z' => Some(symbol - b'a' + 26),
        b'0'..=b'9' => Some(symbol - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    }
}

/// Appends base64; reserves first, so that a secret in `out` is not left behind by growing more
/// often than the caller's own capacity demands.
pub fn push_base64(out: &mut String, bytes: &[u8]) {
    out.reserve(base64_len(bytes.len()));
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| chunk.get(i).copied().unwrap_or(0);
        let (a, b, c) = (byte(0), byte(1), byte(2));
        out.push(to_symbol(a >> 2));
        out.push(to_symbol(a << 4 | b >> 4));
        out.push(if chunk.len() > 1 {
            to_symbol(b << 2 | c >> 6)
        } else {
            '='
        });
        out.push(if chunk.len() > 2 { to_symbol(c) } else { '=' });
    }
}

/// Characters that this many bytes take.
#[must_use]
pub fn base64_len(bytes: usize) -> usize {
    bytes.div_ceil(3) * 4
}

/// Bytes as base64.
#[must_use]
pub fn to_base64(bytes: &[u8]) -> String {
    let mut out = String::new();
    push_base64(&mut out, bytes);
    out
}

/// Base64 to bytes; none if it is not in the one padded form. The bytes are wiped when dropped.
#[must_use]
pub fn from_base64(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let (quads, rest) = text.as_bytes().as_chunks::<4>();
    if !rest.is_empty() {
        return None;
    }
    let mut out = Zeroizing::new(Vec::with_capacity(quads.len() * 3));
    for (index, quad) in quads.iter().enumerate() {
        let last = index + 1 == quads.len();
        let symbols = match quad {
            [_, _, b'=', b'='] if last => 2,
            [_, _, _, b'='] if last => 3,
            _ => 4,
        };
        let mut bits = 0u32;
        for &symbol in quad.iter().take(symbols) {
            bits = bits << 6 | u32::from(from_symbol(symbol)?);
        }
        bits <<= 6 * (4 - symbols);
        let [_, bytes @ ..] = bits.to_be_bytes();
        let (kept, unused) = bytes.split_at_checked(symbols - 1)?;
        if unused.iter().any(|&byte| byte != 0) {
            return None;
        }
        out.extend_from_slice(kept);
    }
    Some(out)
}

/// Bytes as lower-case hex.
#[must_use]
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lower-case hex to bytes; none if it is anything else.
#[must_use]
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn base64_matches_the_vectors_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(to_base64(bytes.as_bytes()), text);
            assert_eq!(
                from_base64(text).expect("valid").as_slice(),
                bytes.as_bytes()
            );
        }
        assert_eq!(to_base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn base64_has_one_form() {
        for bad in [
            "Zg=", "Zh==", "Zm9=", "=m9v", "Zg==Zg==", "Zm 9", "Zm9v\n", "____",
        ] {
            assert!(from_base64(bad).is_none(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trips(bytes: Vec<u8>) {
            let text = to_base64(&bytes);
            prop_assert_eq!(text.len(), base64_len(bytes.len()));
            let back = from_base64(&text).expect("valid");
            prop_assert_eq!(back.as_slice(), bytes.as_slice());
            prop_assert_eq!(from_hex(&to_hex(&bytes)).expect("valid"), bytes);
        }
    }
}
