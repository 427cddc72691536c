//! `xts`: AES-256-XTS between any segments, against AWS-LC's cipher of whole data units.
//!
//! UNSAFETY: AWS-LC is a C library, called with live buffers and their lengths; segments in place are buffers
//! of this target.
#![expect(
    unsafe_code,
    reason = "the oracle is C; segments in place go by raw address"
)]

use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use bulkhead_crypto::xts::{KEY_BYTES, Kernel};
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};

use crate::input::Input;

/// Data units of a run at most, in groups of 512 bytes: more than the engine takes at once.
const MOST_GROUPS: u16 = 80;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kernels = Kernel::available();
    let kernel = kernels[usize::from(input.u8()) % kernels.len()];
    let unit = if input.flag() {
        DataUnit::B4096
    } else {
        DataUnit::B512
    };
    let encrypt = input.flag();
    let in_place = input.flag();
    let first = first_unit(&mut input);
    let key = key(&mut input);
    let bytes = usize::from(input.below(MOST_GROUPS + 1)) * 512 / unit.bytes() as usize
        * unit.bytes() as usize;
    let text = text(input.u64(), bytes);
    let from = cut(&mut input, bytes);
    let to = if in_place {
        Vec::new()
    } else {
        cut(&mut input, bytes)
    };
    let xts = XtsKey::with_kernel(arena(), &key, kernel).expect("a kernel of this CPU");
    let expected = oracle(&key, unit, first, &text, encrypt);
    let given = if in_place {
        same_segments(&xts, unit, first, encrypt, &text, &from)
    } else {
        two_sides(&xts, unit, first, encrypt, &text, &from, &to)
    };
    let wrong = given.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(
        wrong, None,
        "{kernel}: {bytes} bytes from unit {first:#x} on, from {from:?} to {to:?}"
    );
}

/// Room for one key at a time, made once.
fn arena() -> &'static Arc<SecretArena> {
    static ARENA: OnceLock<Arc<SecretArena>> = OnceLock::new();
    ARENA.get_or_init(|| SecretArena::new(1).expect("secret memory for one key"))
}

/// Any number, often one whose low half is about to overflow.
fn first_unit(input: &mut Input) -> u128 {
    let shape = input.u8();
    let low = match shape % 3 {
        0 => u64::MAX - u64::from(input.u8()),
        1 => u64::from(input.u8()),
        _ => input.u64(),
    };
    let high = match shape / 3 % 3 {
        0 => input.u64(),
        1 => u64::MAX,
        _ => 0,
    };
    u128::from(high) << 64 | u128::from(low)
}

/// A key whose halves differ.
fn key(input: &mut Input) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    let bytes = input.bytes(KEY_BYTES);
    key[..bytes.len()].copy_from_slice(bytes);
    if key[..32] == key[32..] {
        key[0] ^= 1;
    }
    key
}

/// Bytes that look random (xorshift64).
fn text(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut text = vec![0; bytes];
    for word in text.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    text
}

/// Cuts a length into segments, some of which may be empty; the last has what is left.
fn cut(input: &mut Input, bytes: usize) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut left = bytes;
    for _ in 0..input.below(40) {
        let most = if input.flag() { 32 } else { 6000 };
        let here = usize::from(input.below(most)).min(left);
        lengths.push(here);
        left -= here;
    }
    lengths.push(left);
    lengths
}

/// Pieces of bytes, each in memory of its own, so that a step beyond one is seen.
fn scattered(bytes: &[u8], lengths: &[usize]) -> Vec<Box<[u8]>> {
    let mut rest = bytes;
    lengths
        .iter()
        .map(|length| {
            let (here, after) = rest.split_at(*length);
            rest = after;
            here.into()
        })
        .collect()
}

fn two_sides(
    key: &XtsKey,
    unit: DataUnit,
    first: u128,
    encrypt: bool,
    text: &[u8],
    from: &[usize],
    to: &[usize],
) -> Vec<u8> {
    let source = scattered(text, from);
    let mut destination = scattered(&vec![0xee; text.len()], to);
    let from: Vec<&[u8]> = source.iter().map(|s| &**s).collect();
    let mut to: Vec<&mut [u8]> = destination.iter_mut().map(|d| &mut **d).collect();
    let done = if encrypt {
        key.encrypt_slices(unit, first, &from, &mut to)
    } else {
        key.decrypt_slices(unit, first, &from, &mut to)
    };
    assert_eq!(done, Ok(()));
    assert_eq!(source.concat(), text, "the source was written");
    destination.concat()
}

fn same_segments(
    key: &XtsKey,
    unit: DataUnit,
    first: u128,
    encrypt: bool,
    text: &[u8],
    lengths: &[usize],
) -> Vec<u8> {
    let mut buffers = scattered(text, lengths);
    let segments: Vec<_> = buffers
        .iter_mut()
        .map(|buffer| (NonNull::from(&mut **buffer).cast(), buffer.len()))
        .collect();
    let each = || segments.iter().copied();
    // SAFETY: buffers of this function, the same on both sides.
    let done = unsafe {
        if encrypt {
            key.encrypt_segments(unit, first, each(), each())
        } else {
            key.decrypt_segments(unit, first, each(), each())
        }
    };
    assert_eq!(done, Ok(()));
    buffers.concat()
}

/// What AWS-LC makes of it, one data unit after the other.
fn oracle(
    key: &[u8; KEY_BYTES],
    unit: DataUnit,
    first: u128,
    text: &[u8],
    encrypt: bool,
) -> Vec<u8> {
    let mut output = vec![0; text.len()];
    let mut number = first;
    let step = unit.bytes() as usize;
    // SAFETY: a context of this function, freed at its end, and a cipher that is there for good.
    let (context, mut cipher) = unsafe {
        (
            aws_lc_sys::EVP_CIPHER_CTX_new(),
            aws_lc_sys::EVP_aes_256_xts(),
        )
    };
    assert!(!context.is_null());
    let mut key = key.as_ptr();
    for (text, output) in text.chunks(step).zip(output.chunks_mut(step)) {
        let tweak = number.to_le_bytes();
        let mut written = 0;
        // SAFETY: a key of the cipher's length or none, sixteen bytes of tweak, buffers of a data unit each.
        unsafe {
            let ready = aws_lc_sys::EVP_CipherInit_ex(
                context,
                cipher,
                std::ptr::null_mut(),
                key,
                tweak.as_ptr(),
                i32::from(encrypt),
            );
            let done = aws_lc_sys::EVP_CipherUpdate(
                context,
                output.as_mut_ptr(),
                &raw mut written,
                text.as_ptr(),
                i32::try_from(step).expect("a data unit is small"),
            );
            assert_eq!((ready, done), (1, 1));
        }
        // The key stays for the units after the first.
        (key, cipher) = (std::ptr::null(), std::ptr::null());
        number = number.wrapping_add(1);
    }
    // SAFETY: made above, freed once.
    unsafe { aws_lc_sys::EVP_CIPHER_CTX_free(context) };
    output
}
