//! AES-256-XTS (IEEE 1619) over data units, as dm-crypt's `aes-xts-plain64` writes it.
//!
//! The tweak of a data unit is its number, 128 bits little-endian; with 4096-byte units that is
//! the number of the 4096-byte unit (`cryptsetup --sector-size 4096 --iv-large-sectors`).
//! Units are whole multiples of a cipher block, so that there is no ciphertext stealing.
//!
//! Bytes go through a small buffer on the stack, [`BATCH_BLOCKS`] cipher blocks at a time: each source byte
//! is read once, and nothing but finished output is written to the destination. So the source
//! (or the destination) may be memory that a guest changes meanwhile, and ciphertext never stands
//! in guest memory.
//!
//! The key schedule lives in secret memory only. The cipher's code copies round keys to registers, and may
//! spill them to its stack frame, as it works.
//!
//! UNSAFETY: the key schedule is built in raw secret memory: it must be written before it is
//! referenced and dropped in place before its slot is freed. The raw functions read and write
//! through pointers whose memory others may change; they must touch exactly the bytes given,
//! each once, through [`copy_in`] and [`copy_out`], and never make a reference to them.
#![expect(
    unsafe_code,
    reason = "key schedules in secret memory; guest memory by raw pointer"
)]

use std::arch::asm;
use std::ptr::NonNull;
use std::sync::Arc;

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes256, Aes256Enc, Block};
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use crate::secret::{ArenaFull, SLOT_BYTES, SecretArena, Slot};

/// Length of a key in bytes: data key, then tweak key.
pub const KEY_BYTES: usize = 64;

/// Cipher block in bytes.
const BLOCK_BYTES: usize = 16;

/// Cipher blocks handled at once: what the widest AES unit takes in one go (AVX-512 with VAES).
pub const BATCH_BLOCKS: usize = 64;

/// Data units whose first tweaks are computed at once.
const TWEAK_UNITS: usize = 16;

/// Why a key can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Data key and tweak key are the same, which XTS forbids (IEEE 1619, FIPS 140 IG C.I).
    #[error("the two halves of the XTS key are equal: make a new volume key")]
    EqualHalves,
    /// No room in secret memory.
    #[error(transparent)]
    ArenaFull(#[from] ArenaFull),
}

/// Buffers that don't fit each other or the data unit. Nothing was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{source_bytes} bytes can't be encrypted or decrypted into {destination_bytes}: \
     both must be the same multiple of the data unit, {unit_bytes} bytes"
)]
pub struct BufferError {
    /// Length of the source in bytes.
    pub source_bytes: usize,
    /// Length of the destination in bytes.
    pub destination_bytes: usize,
    /// The data unit in bytes.
    pub unit_bytes: u32,
}

/// How many bytes share one tweak: 512 or 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DataUnit(u32);

impl DataUnit {
    /// 512 bytes.
    pub const B512: Self = Self(512);
    /// 4096 bytes.
    pub const B4096: Self = Self(4096);

    /// A data unit of `bytes`, if that is 512 or 4096.
    #[must_use]
    pub const fn new(bytes: u32) -> Option<Self> {
        match bytes {
            512 | 4096 => Some(Self(bytes)),
            _ => None,
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.0
    }

    const fn blocks(self) -> usize {
        self.0 as usize / BLOCK_BYTES
    }
}

/// What lies in the slot.
struct Schedule {
    data: Aes256,
    tweak: Aes256Enc,
}

const _: () = assert!(size_of::<Schedule>() <= SLOT_BYTES && align_of::<Schedule>() <= 64);

/// An expanded AES-256-XTS key in secret memory; wiped when it drops.
pub struct XtsKey {
    schedule: NonNull<Schedule>,
    /// Wipes and frees the slot; after `schedule` is dropped in place.
    _slot: Slot,
}

// SAFETY: the schedule is owned by this value alone and never changes after construction.
unsafe impl Send for XtsKey {}
// SAFETY: as above: `&self` only reads.
unsafe impl Sync for XtsKey {}

impl std::fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("XtsKey(..)")
    }
}

impl Drop for XtsKey {
    fn drop(&mut self) {
        // SAFETY: written by `expand`, dropped once, not used afterwards; the slot lives on until
        // the fields drop.
        unsafe { self.schedule.drop_in_place() };
    }
}

impl XtsKey {
    /// Expands `key` (data key, then tweak key) into a slot of the arena. The caller wipes its copy.
    ///
    /// # Errors
    /// [`KeyError::EqualHalves`] (compared in constant time), [`KeyError::ArenaFull`].
    pub fn new(arena: &Arc<SecretArena>, key: &[u8; KEY_BYTES]) -> Result<Self, KeyError> {
        let (data, tweak) = halves(key);
        if data.ct_eq(tweak).into() {
            return Err(KeyError::EqualHalves);
        }
        let slot = arena.take()?;
        let schedule = slot.pointer().cast::<Schedule>();
        expand(schedule, data, tweak);
        scrub_stack();
        Ok(Self {
            schedule,
            _slot: slot,
        })
    }

    /// Whether another key is the same one: whether both halves do the same to two blocks. Two keys
    /// that differ do so with a probability of 2^-256 for each half.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let (one, two) = (self.schedule(), other.schedule());
        let (mut data, mut tweak) = ([test_blocks(); 2], [test_blocks(); 2]);
        for (key, (data, tweak)) in [one, two].iter().zip(data.iter_mut().zip(&mut tweak)) {
            key.data.encrypt_blocks(data);
            key.tweak.encrypt_blocks(tweak);
        }
        let equal = |[one, two]: &[[Block; 2]; 2]| -> bool {
            let pairs = one.iter().zip(two);
            pairs
                .fold(subtle::Choice::from(1), |all, (a, b)| {
                    all & a.as_slice().ct_eq(b.as_slice())
                })
                .into()
        };
        equal(&data) & equal(&tweak)
    }

    /// Encrypts whole data units; `first_unit` is the number of the first.
    ///
    /// # Errors
    /// [`BufferError`] with nothing written.
    pub fn encrypt(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), BufferError> {
        check(unit, src.len(), dst.len())?;
        // SAFETY: two slices of the same length; a shared and a mutable one never overlap.
        unsafe { self.encrypt_raw(unit, first_unit, src.as_ptr(), dst.as_mut_ptr(), src.len()) }
    }

    /// Decrypts whole data units; `first_unit` is the number of the first.
    ///
    /// # Errors
    /// [`BufferError`] with nothing written.
    pub fn decrypt(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), BufferError> {
        check(unit, src.len(), dst.len())?;
        // SAFETY: two slices of the same length; a shared and a mutable one never overlap.
        unsafe { self.decrypt_raw(unit, first_unit, src.as_ptr(), dst.as_mut_ptr(), src.len()) }
    }

    /// As [`XtsKey::encrypt`], between raw addresses of `len` bytes each, of any alignment.
    ///
    /// # Errors
    /// [`BufferError`] if `len` is not a multiple of the data unit; nothing was written.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for `len` bytes through the call. They are the same
    /// address or don't overlap. Others (a guest) may change the bytes meanwhile: what was read
    /// first is encrypted. No Rust reference to either range is in use.
    pub unsafe fn encrypt_raw(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), BufferError> {
        // SAFETY: passed on to the caller.
        unsafe { self.run::<Encrypt>(unit, first_unit, src, dst, len) }
    }

    /// As [`XtsKey::decrypt`], between raw addresses of `len` bytes each, of any alignment.
    ///
    /// # Errors
    /// [`BufferError`] if `len` is not a multiple of the data unit; nothing was written.
    ///
    /// # Safety
    /// As [`XtsKey::encrypt_raw`].
    pub unsafe fn decrypt_raw(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), BufferError> {
        // SAFETY: passed on to the caller.
        unsafe { self.run::<Decrypt>(unit, first_unit, src, dst, len) }
    }

    fn schedule(&self) -> &Schedule {
        // SAFETY: written by `expand`, alive until drop, never changed.
        unsafe { self.schedule.as_ref() }
    }

    /// # Safety
    /// As [`XtsKey::encrypt_raw`].
    unsafe fn run<D: Direction>(
        &self,
        unit: DataUnit,
        first_unit: u64,
        src: *const u8,
        dst: *mut u8,
        len: usize,
    ) -> Result<(), BufferError> {
        check(unit, len, len)?;
        let mut tweaks = Tweaks::new(&self.schedule().tweak, unit, first_unit, len);
        let mut masks = [0u128; BATCH_BLOCKS];
        let mut data = [Block::default(); BATCH_BLOCKS];
        let mut at = 0;
        while at < len {
            let bytes = (len - at).min(BATCH_BLOCKS * BLOCK_BYTES);
            let blocks = bytes / BLOCK_BYTES;
            let (masks, data) = (&mut masks[..blocks], &mut data[..blocks]);
            tweaks.fill(masks);
            // SAFETY: at + bytes <= len, within the caller's ranges; `data` has `bytes` bytes and
            // is ours.
            unsafe { copy_in(src.add(at), data) };
            mask(data, masks);
            D::blocks(&self.schedule().data, data);
            mask(data, masks);
            // SAFETY: as above.
            unsafe { copy_out(data, dst.add(at)) };
            at += bytes;
        }
        Ok(())
    }
}

/// Two blocks that differ, to tell keys apart by. As data they are no tweak that occurs: those of
/// data units are numbers below 2^64.
fn test_blocks() -> [Block; 2] {
    [[0xa5; BLOCK_BYTES].into(), [0x5a; BLOCK_BYTES].into()]
}

/// Encryption or decryption of whole cipher blocks.
trait Direction {
    fn blocks(key: &Aes256, blocks: &mut [Block]);
}

struct Encrypt;
struct Decrypt;

impl Direction for Encrypt {
    fn blocks(key: &Aes256, blocks: &mut [Block]) {
        key.encrypt_blocks(blocks);
    }
}

impl Direction for Decrypt {
    fn blocks(key: &Aes256, blocks: &mut [Block]) {
        key.decrypt_blocks(blocks);
    }
}

fn check(unit: DataUnit, source: usize, destination: usize) -> Result<(), BufferError> {
    if source == destination && source.is_multiple_of(unit.bytes() as usize) {
        return Ok(());
    }
    Err(BufferError {
        source_bytes: source,
        destination_bytes: destination,
        unit_bytes: unit.bytes(),
    })
}

fn halves(key: &[u8; KEY_BYTES]) -> (&[u8; 32], &[u8; 32]) {
    let (halves, rest) = key.as_chunks::<32>();
    debug_assert!(rest.is_empty() && halves.len() == 2);
    (&halves[0], &halves[1])
}

/// Builds the schedule in place. Not inlined, so that what it leaves in its stack frame lies
/// where [`scrub_stack`] wipes.
#[inline(never)]
fn expand(schedule: NonNull<Schedule>, data: &[u8; 32], tweak: &[u8; 32]) {
    // SAFETY: the slot is ours, zeroed, large and aligned enough (asserted above).
    unsafe {
        (&raw mut (*schedule.as_ptr()).data).write(Aes256::new(data.into()));
        (&raw mut (*schedule.as_ptr()).tweak).write(Aes256Enc::new(tweak.into()));
    }
}

/// Overwrites the part of the stack that key expansion used.
#[inline(never)]
fn scrub_stack() {
    let mut frame = [0u8; 16 * 1024];
    std::hint::black_box(&mut frame);
    frame.zeroize();
}

/// The tweaks of successive cipher blocks.
struct Tweaks<'k> {
    key: &'k Aes256Enc,
    blocks_per_unit: usize,
    next_unit: u128,
    units_left: usize,
    /// First tweaks of the coming units, from `ready_at`.
    ready: [Block; TWEAK_UNITS],
    ready_at: usize,
    ready_end: usize,
    /// Tweak of the next block, if `blocks_left` in its unit is not zero.
    tweak: u128,
    blocks_left: usize,
}

impl<'k> Tweaks<'k> {
    fn new(key: &'k Aes256Enc, unit: DataUnit, first_unit: u64, len: usize) -> Self {
        Self {
            key,
            blocks_per_unit: unit.blocks(),
            next_unit: u128::from(first_unit),
            units_left: len / unit.bytes() as usize,
            ready: [Block::default(); TWEAK_UNITS],
            ready_at: 0,
            ready_end: 0,
            tweak: 0,
            blocks_left: 0,
        }
    }

    /// One tweak for each of `masks`, which go no further than the length given at the start.
    fn fill(&mut self, masks: &mut [u128]) {
        let mut rest = masks;
        while !rest.is_empty() {
            if self.blocks_left == 0 {
                self.start_unit();
            }
            let count = rest.len().min(self.blocks_left);
            let (now, later) = rest.split_at_mut(count);
            self.tweak = chain(self.tweak, now);
            self.blocks_left -= count;
            rest = later;
        }
    }

    fn start_unit(&mut self) {
        if self.ready_at == self.ready_end {
            self.encrypt_unit_numbers();
        }
        self.tweak = u128::from_le_bytes(self.ready[self.ready_at].0);
        self.ready_at += 1;
        self.blocks_left = self.blocks_per_unit;
    }

    fn encrypt_unit_numbers(&mut self) {
        let count = self.units_left.clamp(1, TWEAK_UNITS);
        for block in &mut self.ready[..count] {
            block.0 = self.next_unit.to_le_bytes();
            self.next_unit += 1;
        }
        self.key.encrypt_blocks(&mut self.ready[..count]);
        self.units_left = self.units_left.saturating_sub(count);
        self.ready_at = 0;
        self.ready_end = count;
    }
}

/// Writes `first`, `first`*x, `first`*x^2 ... and returns the one after the last. Eight chains
/// side by side, because each step depends on the one before.
fn chain(first: u128, masks: &mut [u128]) -> u128 {
    let mut tweak = first;
    let head = masks.len().min(8);
    for mask in &mut masks[..head] {
        *mask = tweak;
        tweak = times_x(tweak);
    }
    for i in 8..masks.len() {
        masks[i] = times_x8(masks[i - 8]);
    }
    if masks.len() > 8 {
        tweak = times_x(masks[masks.len() - 1]);
    }
    tweak
}

/// Times x in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1 (IEEE 1619, section 5.2).
fn times_x(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

/// Times x^8 in the same field.
fn times_x8(tweak: u128) -> u128 {
    let over = tweak >> 120;
    (tweak << 8) ^ over ^ (over << 1) ^ (over << 2) ^ (over << 7)
}

fn mask(data: &mut [Block], masks: &[u128]) {
    for (block, mask) in data.iter_mut().zip(masks) {
        block.0 = (u128::from_ne_bytes(block.0) ^ u128::from_le(*mask)).to_ne_bytes();
    }
}

/// Copies from memory that others may change into `data`, reading each byte once. In assembly,
/// because to the compiler a concurrent change would be a data race.
///
/// # Safety
/// `src` is readable for the size of `data`.
unsafe fn copy_in(src: *const u8, data: &mut [Block]) {
    let dst = data.as_mut_ptr().cast::<u8>();
    // SAFETY: passed on; `data` is writable for its size.
    unsafe { copy_blocks(src, dst, data.len()) };
}

/// Copies `data` to memory that others may read or change.
///
/// # Safety
/// `dst` is writable for the size of `data`.
unsafe fn copy_out(data: &[Block], dst: *mut u8) {
    // SAFETY: passed on; `data` is readable for its size.
    unsafe { copy_blocks(data.as_ptr().cast(), dst, data.len()) };
}

/// # Safety
/// `src` readable and `dst` writable for `blocks` cipher blocks, not overlapping.
unsafe fn copy_blocks(src: *const u8, dst: *mut u8, blocks: usize) {
    // Data units hold at least 32 blocks, so that four at a time leave none over.
    debug_assert!(blocks.is_multiple_of(4));
    for at in (0..blocks * BLOCK_BYTES).step_by(4 * BLOCK_BYTES) {
        // SAFETY: `at` + 64 stays inside both ranges; the instructions touch those bytes only and
        // accept any alignment.
        unsafe {
            asm!(
                "movdqu {a}, [{src}]",
                "movdqu {b}, [{src} + 16]",
                "movdqu {c}, [{src} + 32]",
                "movdqu {d}, [{src} + 48]",
                "movdqu [{dst}], {a}",
                "movdqu [{dst} + 16], {b}",
                "movdqu [{dst} + 32], {c}",
                "movdqu [{dst} + 48], {d}",
                src = in(reg) src.add(at),
                dst = in(reg) dst.add(at),
                a = out(xmm_reg) _,
                b = out(xmm_reg) _,
                c = out(xmm_reg) _,
                d = out(xmm_reg) _,
                options(nostack, preserves_flags),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_repeated_doubling() {
        let first = 0x8000_0000_0000_0000_0123_4567_89ab_cdef_u128;
        for len in [0usize, 1, 7, 8, 9, 32, 63, 64] {
            let mut masks = vec![0; len];
            let after = chain(first, &mut masks);
            let mut expected = first;
            for mask in masks {
                assert_eq!(mask, expected);
                expected = times_x(expected);
            }
            assert_eq!(after, expected);
        }
    }

    #[test]
    fn the_schedule_is_wiped_on_drop() {
        let arena = SecretArena::new(1).expect("arena");
        let key: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
        let key = XtsKey::new(&arena, &key).expect("key");
        let slot = key.schedule.cast::<u8>();
        // SAFETY: the slot's bytes are mapped while the arena lives; nobody writes them now.
        let taken = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_BYTES) }.to_vec();
        assert!(taken.windows(32).any(|w| w.iter().copied().eq(0..32)));
        drop(key);
        // SAFETY: as above.
        let after = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_BYTES) };
        assert!(after.iter().all(|&b| b == 0));
    }
}
