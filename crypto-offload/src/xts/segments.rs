//! Encryption and decryption between segments: scattered pieces of memory that together are whole data units.
//!
//! A data unit may straddle segments on either side, at any byte.
//!
//! UNSAFETY: raw segments are passed on to the engine, whose conditions they must meet: as many bytes
//! on both sides is what is checked here, the rest is the caller's word.
#![expect(unsafe_code, reason = "guest memory by raw pointer")]

use std::ptr::NonNull;

use super::engine::{Direction, Piece};
use super::key::XtsKey;
use super::types::{BufferError, DataUnit};

impl XtsKey {
    /// Encrypts whole data units from the source's segments to the destination's, each `(address, bytes)`, of
    /// any alignment; `first_unit` is the number of the first, up to the 128 bits that a tweak has.
    ///
    /// # Errors
    /// [`BufferError`] if both sides are not the same multiple of the data unit; nothing was written.
    ///
    /// # Safety
    /// The source's segments are readable and the destination's writable through the call, and the iterators
    /// give the same ones when cloned. No Rust reference to any of their bytes is in use. Others (a guest) may
    /// change the bytes meanwhile: what was read first is encrypted. A byte that both sides have should lie at
    /// the same distance from their start (in place), and none be in the destination twice: else what is written
    /// there is of no use.
    pub unsafe fn encrypt_segments<S, D>(
        &self,
        unit: DataUnit,
        first_unit: u128,
        source: S,
        destination: D,
    ) -> Result<(), BufferError>
    where
        S: Iterator<Item = (NonNull<u8>, usize)> + Clone,
        D: Iterator<Item = (NonNull<u8>, usize)> + Clone,
    {
        // SAFETY: passed on to the caller.
        unsafe { self.segments(unit, first_unit, source, destination, Direction::Encrypt) }
    }

    /// Decrypts whole data units between segments, as [`XtsKey::encrypt_segments`].
    ///
    /// # Errors
    /// [`BufferError`] if both sides are not the same multiple of the data unit; nothing was written.
    ///
    /// # Safety
    /// As [`XtsKey::encrypt_segments`].
    pub unsafe fn decrypt_segments<S, D>(
        &self,
        unit: DataUnit,
        first_unit: u128,
        source: S,
        destination: D,
    ) -> Result<(), BufferError>
    where
        S: Iterator<Item = (NonNull<u8>, usize)> + Clone,
        D: Iterator<Item = (NonNull<u8>, usize)> + Clone,
    {
        // SAFETY: passed on to the caller.
        unsafe { self.segments(unit, first_unit, source, destination, Direction::Decrypt) }
    }

    /// Encrypts whole data units from slices to slices.
    ///
    /// # Errors
    /// [`BufferError`] if both sides are not the same multiple of the data unit; nothing was written.
    pub fn encrypt_slices(
        &self,
        unit: DataUnit,
        first_unit: u128,
        source: &[&[u8]],
        destination: &mut [&mut [u8]],
    ) -> Result<(), BufferError> {
        self.slices(unit, first_unit, source, destination, Direction::Encrypt)
    }

    /// Decrypts whole data units from slices to slices.
    ///
    /// # Errors
    /// [`BufferError`] if both sides are not the same multiple of the data unit; nothing was written.
    pub fn decrypt_slices(
        &self,
        unit: DataUnit,
        first_unit: u128,
        source: &[&[u8]],
        destination: &mut [&mut [u8]],
    ) -> Result<(), BufferError> {
        self.slices(unit, first_unit, source, destination, Direction::Decrypt)
    }

    fn slices(
        &self,
        unit: DataUnit,
        first_unit: u128,
        source: &[&[u8]],
        destination: &mut [&mut [u8]],
        direction: Direction,
    ) -> Result<(), BufferError> {
        let source = source.iter().map(|s| (NonNull::from(*s).cast(), s.len()));
        let slices = destination.as_mut_ptr();
        let destination = (0..destination.len()).map(move |at| {
            // SAFETY: one of the slices, which nobody else uses through the call.
            let slice: &mut [u8] = unsafe { &mut *slices.add(at) };
            (NonNull::from(&mut *slice).cast(), slice.len())
        });
        // SAFETY: slices; shared and mutable ones never overlap, nor do two mutable ones.
        unsafe { self.segments(unit, first_unit, source, destination, direction) }
    }

    /// # Safety
    /// As [`XtsKey::encrypt_segments`].
    unsafe fn segments<S, D>(
        &self,
        unit: DataUnit,
        first_unit: u128,
        source: S,
        destination: D,
        direction: Direction,
    ) -> Result<(), BufferError>
    where
        S: Iterator<Item = Piece> + Clone,
        D: Iterator<Item = Piece> + Clone,
    {
        let bytes = total(source.clone());
        unit.check(bytes, total(destination.clone()))?;
        let units = unit.units_in(bytes);
        // SAFETY: as many bytes on both sides; the rest is passed on to the caller.
        unsafe {
            self.run(unit, first_unit, direction)
                .between(units, source, destination);
        }
        Ok(())
    }
}

/// Bytes of all segments. More than there is memory for can't be meant: that fits nothing.
fn total(segments: impl Iterator<Item = Piece>) -> usize {
    segments.fold(0, |sum, (_, bytes)| sum.saturating_add(bytes))
}
